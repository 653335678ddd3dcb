-- Times are milliseconds since 1970. `v` is the format of a row's JSON texts.

CREATE TABLE runs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    v INTEGER NOT NULL,
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('pending', 'processing', 'completed', 'failed', 'cancelled')),
    idempotency_key TEXT,
    total INTEGER NOT NULL,
    completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    cancelled INTEGER NOT NULL DEFAULT 0,
    log_seq INTEGER NOT NULL DEFAULT 0,
    created_at INTEGER NOT NULL,
    ended_at INTEGER,
    error TEXT,
    spec TEXT NOT NULL
) STRICT;
CREATE UNIQUE INDEX runs_idempotency ON runs (tenant, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX runs_tenant ON runs (tenant, id);
CREATE INDEX runs_status ON runs (status, id);
CREATE INDEX runs_ended ON runs (ended_at, id) WHERE ended_at IS NOT NULL;

-- What changes stands before the large texts, so that reading it does not read them.
CREATE TABLE items (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    v INTEGER NOT NULL,
    run_id INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    seq INTEGER NOT NULL,
    tenant TEXT NOT NULL,
    priority INTEGER NOT NULL,
    not_before INTEGER,
    status TEXT NOT NULL DEFAULT 'pending'
        CHECK (status IN ('pending', 'processing', 'completed', 'failed', 'cancelled')),
    epoch INTEGER NOT NULL DEFAULT 0,
    lease_id INTEGER,
    attempt INTEGER NOT NULL DEFAULT 0,
    max_attempts INTEGER NOT NULL,
    key TEXT NOT NULL,
    error TEXT,
    input TEXT NOT NULL,
    output TEXT,
    UNIQUE (run_id, seq)
) STRICT;
CREATE INDEX items_ready ON items (tenant, priority, id) WHERE status = 'pending' AND not_before IS NULL;
CREATE INDEX items_delayed ON items (not_before) WHERE not_before IS NOT NULL;
CREATE INDEX items_leased ON items (lease_id) WHERE lease_id IS NOT NULL;
CREATE INDEX items_failed ON items (run_id) WHERE status = 'failed';

CREATE TABLE generations (
    tenant TEXT NOT NULL,
    memo_key BLOB NOT NULL,
    v INTEGER NOT NULL,
    request_digest BLOB NOT NULL,
    input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    cached_input_tokens INTEGER NOT NULL,
    reasoning_tokens INTEGER NOT NULL,
    cost_micros INTEGER,
    created_at INTEGER NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (tenant, memo_key)
) STRICT;
CREATE INDEX generations_age ON generations (created_at);

CREATE TABLE intents (
    item_id INTEGER NOT NULL REFERENCES items (id) ON DELETE CASCADE,
    attempt INTEGER NOT NULL,
    memo_key BLOB NOT NULL,
    v INTEGER NOT NULL,
    provider_ref TEXT,
    started_at INTEGER NOT NULL,
    PRIMARY KEY (item_id, attempt, memo_key)
) STRICT, WITHOUT ROWID;

CREATE TABLE leases (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    worker TEXT NOT NULL,
    expires_at INTEGER NOT NULL
) STRICT;

CREATE TABLE run_log (
    run_id INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    seq INTEGER NOT NULL,
    v INTEGER NOT NULL,
    kind TEXT NOT NULL,
    data TEXT NOT NULL,
    at INTEGER NOT NULL,
    PRIMARY KEY (run_id, seq)
) STRICT, WITHOUT ROWID;
