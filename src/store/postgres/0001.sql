-- Times are milliseconds since 1970. `v` is the format of a row's JSON texts.
-- Texts that are compared are compared by their bytes, whatever the database's own order.
-- No foreign keys: every statement that writes has read what it refers to, and checking
-- them row by row would make up a good part of a bulk insert.

CREATE TABLE runs (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    v smallint NOT NULL,
    tenant text COLLATE "C" NOT NULL,
    name text NOT NULL,
    status text COLLATE "C" NOT NULL
        CHECK (status IN ('pending', 'processing', 'completed', 'failed', 'cancelled')),
    idempotency_key text COLLATE "C",
    total bigint NOT NULL,
    completed bigint NOT NULL DEFAULT 0,
    failed bigint NOT NULL DEFAULT 0,
    cancelled bigint NOT NULL DEFAULT 0,
    log_seq bigint NOT NULL DEFAULT 0,
    created_at bigint NOT NULL,
    ended_at bigint,
    error text,
    spec text NOT NULL
);
CREATE UNIQUE INDEX runs_idempotency ON runs (tenant, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX runs_tenant ON runs (tenant, id);
CREATE INDEX runs_status ON runs (status, id);
CREATE INDEX runs_ended ON runs (ended_at, id) WHERE ended_at IS NOT NULL;

CREATE TABLE items (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    v smallint NOT NULL,
    run_id bigint NOT NULL,
    seq bigint NOT NULL,
    tenant text COLLATE "C" NOT NULL,
    priority integer NOT NULL,
    not_before bigint,
    status text COLLATE "C" NOT NULL DEFAULT 'pending'
        CHECK (status IN ('pending', 'processing', 'completed', 'failed', 'cancelled')),
    epoch bigint NOT NULL DEFAULT 0,
    lease_id bigint,
    attempt integer NOT NULL DEFAULT 0,
    max_attempts integer NOT NULL,
    key text NOT NULL,
    error text,
    input text NOT NULL,
    output text,
    UNIQUE (run_id, seq)
);
CREATE INDEX items_ready ON items (tenant, priority, id) WHERE status = 'pending' AND not_before IS NULL;
CREATE INDEX items_delayed ON items (not_before) WHERE not_before IS NOT NULL;
CREATE INDEX items_leased ON items (lease_id) WHERE lease_id IS NOT NULL;
CREATE INDEX items_failed ON items (run_id) WHERE status = 'failed';

CREATE TABLE generations (
    tenant text COLLATE "C" NOT NULL,
    memo_key bytea NOT NULL,
    v smallint NOT NULL,
    request_digest bytea NOT NULL,
    input_tokens bigint NOT NULL,
    output_tokens bigint NOT NULL,
    cached_input_tokens bigint NOT NULL,
    reasoning_tokens bigint NOT NULL,
    cost_micros bigint,
    created_at bigint NOT NULL,
    body text NOT NULL,
    PRIMARY KEY (tenant, memo_key)
);
CREATE INDEX generations_age ON generations (created_at);

CREATE TABLE intents (
    item_id bigint NOT NULL,
    attempt integer NOT NULL,
    memo_key bytea NOT NULL,
    v smallint NOT NULL,
    provider_ref text,
    started_at bigint NOT NULL,
    PRIMARY KEY (item_id, attempt, memo_key)
);

CREATE TABLE leases (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    worker text NOT NULL,
    expires_at bigint NOT NULL
);

CREATE TABLE run_log (
    run_id bigint NOT NULL,
    seq bigint NOT NULL,
    v smallint NOT NULL,
    kind text NOT NULL,
    data text NOT NULL,
    at bigint NOT NULL,
    PRIMARY KEY (run_id, seq)
);
