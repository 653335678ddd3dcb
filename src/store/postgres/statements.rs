//! The SQL statements. Each is one round trip, whatever the number of rows, and finds its rows by an index, which
//! `tests/stores/large.rs` checks.

use sqlx::postgres::PgRow;

use crate::store::sql::{decode, item_columns, kind_of_lost_lease, select};

decode!(PgRow, i32);

/// The present by the clock of the database.
macro_rules! now {
    () => {
        "(extract(epoch FROM now()) * 1000)::bigint"
    };
}

/// Updates counters and logs for ended items, `done (run_id, seq, error)`, and for `notes (run_id, kind, data, place)`. The
/// lock on the row of the run determines the order.
macro_rules! count_and_log {
    () => {
        concat!(
            "delta AS (
                SELECT run_id, sum(note)::bigint AS notes,
                    count(seq) FILTER (WHERE error IS NULL) AS done, count(error) AS broken,
                    (array_agg(error ORDER BY seq) FILTER (WHERE error IS NOT NULL))[1] AS why,
                    coalesce(json_agg(seq ORDER BY seq)
                        FILTER (WHERE seq IS NOT NULL AND error IS NULL), '[]') AS completed,
                    coalesce(json_agg(seq ORDER BY seq) FILTER (WHERE error IS NOT NULL), '[]') AS failed
                FROM (SELECT run_id, 0 AS note, seq, error FROM done
                    UNION ALL SELECT run_id, 1, NULL, NULL FROM notes) AS parts
                GROUP BY run_id),
            counted AS (
                UPDATE runs AS r SET
                    completed = r.completed + d.done, failed = r.failed + d.broken,
                    error = CASE WHEN d.done + d.broken > 0 THEN coalesce(r.error, d.why) ELSE r.error END,
                    log_seq = r.log_seq + d.notes + (d.done + d.broken > 0)::int
                        + (d.done + d.broken > 0
                            AND r.completed + r.failed + r.cancelled + d.done + d.broken = r.total)::int,
                    status = CASE
                        WHEN d.done + d.broken = 0 THEN r.status
                        WHEN r.completed + r.failed + r.cancelled + d.done + d.broken < r.total THEN 'processing'
                        WHEN r.failed + d.broken > 0 THEN 'failed' ELSE 'completed' END,
                    ended_at = CASE WHEN d.done + d.broken > 0
                            AND r.completed + r.failed + r.cancelled + d.done + d.broken = r.total
                        THEN ", now!(), " ELSE r.ended_at END
                FROM delta AS d WHERE r.id = d.run_id
                RETURNING r.id, r.log_seq, r.status, d.notes, d.completed AS completed_seqs,
                    d.failed AS failed_seqs, (d.done + d.broken > 0)::int AS settled,
                    (d.done + d.broken > 0 AND r.completed + r.failed + r.cancelled = r.total)::int AS over),
            logged AS (
                INSERT INTO run_log (run_id, seq, v, kind, data, at)
                SELECT c.id, c.log_seq - c.over - c.settled - c.notes
                        + row_number() OVER (PARTITION BY c.id ORDER BY n.place),
                    1, n.kind, n.data, ", now!(), "
                FROM counted AS c JOIN notes AS n ON n.run_id = c.id
                UNION ALL
                SELECT id, log_seq - over, 1, 'settled',
                    json_build_object('completed', completed_seqs, 'failed', failed_seqs)::text, ", now!(), "
                FROM counted WHERE settled = 1
                UNION ALL
                SELECT id, log_seq, 1, 'ended', json_build_object('status', status)::text, ", now!(), "
                FROM counted WHERE over = 1)"
        )
    };
}

pub(super) const CREATE_RUN: &str = concat!(
    "WITH new AS (
        INSERT INTO runs (v, tenant, name, status, spec, idempotency_key, total, created_at, ended_at, log_seq)
        VALUES (1, $1, $2, CASE WHEN $3 = 0 THEN 'completed' ELSE 'pending' END, $4, $5, $3, ", now!(), ",
            CASE WHEN $3 = 0 THEN ", now!(), " END, CASE WHEN $3 = 0 THEN 2 ELSE 1 END)
        ON CONFLICT (tenant, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
        RETURNING id),
    logged AS (
        INSERT INTO run_log (run_id, seq, v, kind, data, at)
        SELECT id, 1, 1, 'created', json_build_object('total', $3)::text, ", now!(), " FROM new
        UNION ALL
        SELECT id, 2, 1, 'ended', '{\"status\":\"completed\"}', ", now!(), " FROM new WHERE $3 = 0),
    added AS (
        INSERT INTO items (v, run_id, pipeline, tenant, priority, max_attempts, seq, key, input)
        SELECT 1, new.id, $2, $1, $6, $7, i.place - 1, i.key, i.input
        FROM new, unnest($8::text[], $9::text[]) WITH ORDINALITY AS i (key, input, place)
        ORDER BY i.place)
    SELECT id FROM new"
);

pub(super) const ADD_ITEMS: &str = "
    INSERT INTO items (v, run_id, pipeline, tenant, priority, max_attempts, seq, key, input)
    SELECT 1, $1, $8, $2, $3, $4, $5 + i.place - 1, i.key, i.input
    FROM unnest($6::text[], $7::text[]) WITH ORDINALITY AS i (key, input, place)
    ORDER BY i.place";

pub(super) const RUN_OF_KEY: &str =
    "SELECT id FROM runs WHERE tenant = $1 AND idempotency_key = $2";

pub(super) const RUN_BY_ID: &str = select!(runs "WHERE id = $1");

pub(super) const RUNS: &str = select!(runs "WHERE id < $1 ORDER BY id DESC LIMIT $2");

pub(super) const RUNS_OF_TENANT: &str =
    select!(runs "WHERE id < $1 AND tenant = $3 ORDER BY id DESC LIMIT $2");

pub(super) const RUNS_OF_STATUS: &str =
    select!(runs "WHERE id < $1 AND status = $3 ORDER BY id DESC LIMIT $2");

pub(super) const RUNS_OF_BOTH: &str =
    select!(runs "WHERE id < $1 AND tenant = $3 AND status = $4 ORDER BY id DESC LIMIT $2");

pub(super) const ITEMS: &str =
    select!(items "WHERE run_id = $1 AND seq >= $2 ORDER BY seq LIMIT $3");

pub(super) const LOG: &str = select!(log "WHERE run_id = $1 AND seq > $2 ORDER BY seq LIMIT $3");

pub(super) const GENERATIONS: &str =
    select!(generations "WHERE tenant = $1 AND memo_key = ANY ($2::bytea[])");

/// Writes a commit. The items are fenced by their epoch. The condition on the status is written so that no index matches
/// it, because with an index on the status the planner might read all items in process.
pub(super) const COMMIT: &str = concat!(
    "WITH input AS (
        SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::text[]) AS s (id, epoch, output, error)),
    done AS (
        UPDATE items AS i SET
            status = CASE WHEN s.error IS NULL THEN 'completed' ELSE 'failed' END,
            output = s.output, error = s.error, lease_id = NULL, not_before = NULL, epoch = i.epoch + 1
        FROM input AS s
        WHERE i.id = s.id AND i.epoch = s.epoch AND i.status NOT IN ('completed', 'failed', 'cancelled')
        RETURNING i.id, i.run_id, i.seq, i.error),
    generated AS (
        INSERT INTO generations (v, tenant, memo_key, request_digest, body, input_tokens, output_tokens,
            cached_input_tokens, reasoning_tokens, cost_micros, created_at)
        SELECT 1, g.*, ", now!(), "
        FROM unnest($5::text[], $6::bytea[], $7::bytea[], $8::text[], $9::bigint[], $10::bigint[],
            $11::bigint[], $12::bigint[], $13::bigint[]) AS g
        ON CONFLICT DO NOTHING
        RETURNING 1),
    over AS (
        DELETE FROM intents AS i
        USING unnest($14::bigint[], $15::int[], $16::bytea[]) AS o (item, attempt, key)
        WHERE i.item_id = o.item AND i.attempt = o.attempt AND i.memo_key = o.key),
    notes AS (
        SELECT * FROM unnest($17::bigint[], $18::text[], $19::text[]) WITH ORDINALITY
            AS n (run_id, kind, data, place)),
    ", count_and_log!(), "
    SELECT (SELECT count(*) FROM generated), ARRAY (SELECT id FROM done ORDER BY id)"
);

pub(super) const PUT_INTENTS: &str = concat!(
    "INSERT INTO intents (item_id, attempt, memo_key, v, provider_ref, started_at)
    SELECT n.item, n.attempt, n.key, 1, n.reference, ", now!(), "
    FROM unnest($1::bigint[], $2::int[], $3::bytea[], $4::text[]) AS n (item, attempt, key, reference)
    WHERE EXISTS (SELECT 1 FROM items WHERE id = n.item)
    ON CONFLICT (item_id, attempt, memo_key) DO UPDATE SET provider_ref = excluded.provider_ref"
);

/// The condition of both statements for intents: those after `$1`, `$2`, `$3`, and with `$5` only those of items that no
/// live lease holds.
macro_rules! intents_where {
    ($items:literal) => {
        concat!(
            "SELECT t.item_id, t.attempt, t.memo_key, t.provider_ref FROM intents AS t
            WHERE (t.item_id, t.attempt, t.memo_key) > ($1, $2, $3)",
            $items,
            " AND (NOT $5 OR NOT EXISTS (
                SELECT 1 FROM items AS i JOIN leases AS l ON l.id = i.lease_id
                WHERE i.id = t.item_id AND l.expires_at > ",
            now!(),
            "))
            ORDER BY t.item_id, t.attempt, t.memo_key LIMIT $4"
        )
    };
}

pub(super) const INTENTS: &str = intents_where!("");

pub(super) const INTENTS_OF_ITEMS: &str = intents_where!(" AND t.item_id = ANY ($6)");

/// A lock for each run, held by cancellations and retries, because each must see all changes of the other. Commits do not
/// need it: they change the items that they name.
pub(super) const ONE_AT_A_TIME: &str =
    "SELECT pg_advisory_xact_lock(hashtext(current_schema()), hashint8($1))";

pub(super) const CANCEL: &str = concat!(
    "WITH stopped AS (
        UPDATE items SET status = 'cancelled', lease_id = NULL, not_before = NULL, epoch = epoch + 1
        WHERE run_id = $1 AND status IN ('pending', 'processing') RETURNING 1),
    n AS (SELECT count(*) AS items FROM stopped),
    over AS (
        UPDATE runs SET status = 'cancelled', cancelled = cancelled + n.items, log_seq = log_seq + 2,
            ended_at = ", now!(), "
        FROM n WHERE id = $1 AND n.items > 0 RETURNING id, log_seq, n.items),
    logged AS (
        INSERT INTO run_log (run_id, seq, v, kind, data, at)
        SELECT id, log_seq - 1, 1, 'cancelled', json_build_object('items', items)::text, ", now!(), " FROM over
        UNION ALL SELECT id, log_seq, 1, 'ended', '{\"status\":\"cancelled\"}', ", now!(), " FROM over)
    SELECT items FROM n"
);

pub(super) const RETRY: &str = concat!(
    "WITH lost AS (
        SELECT id FROM items WHERE run_id = $1 AND status = 'failed' AND strpos(error, '",
    kind_of_lost_lease!(),
    "') > 0),
    again AS (
        UPDATE items SET status = 'pending', epoch = epoch + 1, attempt = 0, error = NULL,
            handling = least(handling, 2)
        WHERE run_id = $1 AND status = 'failed'
            AND EXISTS (SELECT 1 FROM runs WHERE id = $1 AND status <> 'cancelled') RETURNING id),
    dismissed AS (
        DELETE FROM intents USING lost, again WHERE lost.id = again.id AND intents.item_id = again.id),
    n AS (SELECT count(*) AS items FROM again),
    retried AS (
        UPDATE runs SET status = 'pending', failed = failed - n.items, error = NULL, ended_at = NULL,
            log_seq = log_seq + 1
        FROM n WHERE id = $1 AND n.items > 0 RETURNING id, log_seq, n.items),
    logged AS (
        INSERT INTO run_log (run_id, seq, v, kind, data, at)
        SELECT id, log_seq, 1, 'retried', json_build_object('items', items)::text, ", now!(), " FROM retried)
    SELECT items FROM n"
);

/// `floors` has for each tenant the time since when its generations are needed.
pub(super) const PURGE: &str = concat!(
    "WITH old AS (
        SELECT id FROM runs WHERE ended_at <= ",
    now!(),
    " - $1 ORDER BY ended_at, id LIMIT $2
        FOR UPDATE SKIP LOCKED),
    old_items AS (DELETE FROM items USING old WHERE items.run_id = old.id RETURNING items.id),
    old_intents AS (DELETE FROM intents USING old_items WHERE intents.item_id = old_items.id),
    old_logs AS (DELETE FROM run_log USING old WHERE run_log.run_id = old.id),
    old_runs AS (DELETE FROM runs USING old WHERE runs.id = old.id RETURNING 1),
    floors AS MATERIALIZED (
        SELECT tenant, min(created_at) AS since FROM runs
        WHERE status IN ('pending', 'processing', 'failed')
            AND (ended_at IS NULL OR ended_at > ",
    now!(),
    " - $1)
        GROUP BY tenant),
    old_generations AS (
        DELETE FROM generations WHERE (tenant, memo_key) IN (
            SELECT g.tenant, g.memo_key FROM generations AS g WHERE g.created_at <= ",
    now!(),
    " - $1 AND NOT EXISTS (
                SELECT 1 FROM floors AS f WHERE f.tenant = g.tenant AND f.since <= g.created_at)
            ORDER BY g.created_at, g.tenant, g.memo_key LIMIT $2)
        RETURNING 1)
    SELECT (SELECT count(*) FROM old_runs), (SELECT count(*) FROM old_generations)"
);

pub(super) const REGISTER: &str = concat!(
    "INSERT INTO leases (worker, expires_at) VALUES ($1, ",
    now!(),
    " + $2) RETURNING id"
);

pub(super) const HEARTBEAT: &str = concat!(
    "UPDATE leases SET expires_at = ",
    now!(),
    " + $2 WHERE id = $1"
);

/// Executed before `RETIRE_ITEMS`, each with its own view of the data: see `Queue::reap`.
pub(super) const RETIRE: &str = "DELETE FROM leases WHERE id = $1";

pub(super) const RETIRE_ITEMS: &str = "UPDATE items SET status = 'pending', lease_id = NULL, \
    epoch = epoch + 1, attempt = greatest(attempt - 1, 0) WHERE lease_id = $1";

/// The first tenant with items to claim of the pipelines `$4`, among the tenants that `$which` selects.
macro_rules! next_tenant {
    ($which:literal) => {
        concat!(
            "(SELECT min(t.tenant) FROM unnest($4::text[]) AS n (name) CROSS JOIN LATERAL (
                SELECT i.tenant FROM items AS i WHERE i.status = 'pending' AND i.not_before IS NULL
                    AND i.pipeline = n.name AND i.handling = $5 AND ", $which, "
                ORDER BY i.tenant LIMIT 1) AS t)"
        )
    };
}

/// Finds the tenants with items to claim one by one, with one index lookup for each pipeline, then the part of each
/// tenant, and of all parts the first `$2` items in the order of dealing.
///
/// The lease is read before any item is changed, and locked against removal until the statement is committed.
pub(super) const CLAIM: &str = concat!(
    "WITH RECURSIVE lease AS MATERIALIZED (
        SELECT id FROM leases WHERE id = $1 AND expires_at > ",
    now!(),
    " FOR KEY SHARE),
    up (tenant, n) AS (
        SELECT ",
    next_tenant!("i.tenant > $3"),
    ", 1
        UNION ALL
        SELECT ",
    next_tenant!("i.tenant > up.tenant"),
    ", n + 1
        FROM up WHERE up.tenant IS NOT NULL AND n < $2),
    around (tenant, n) AS (
        SELECT ",
    next_tenant!("true"),
    ", 1
        UNION ALL
        SELECT ",
    next_tenant!("i.tenant > around.tenant"),
    ", n + 1
        FROM around WHERE around.tenant <= $3 AND n < $2),
    turns AS MATERIALIZED (
        SELECT n AS turn, tenant FROM up WHERE tenant IS NOT NULL
        UNION ALL SELECT n + $2, tenant FROM around WHERE tenant <= $3
        ORDER BY 1 LIMIT $2),
    part AS MATERIALIZED (SELECT ($2 + count(*) - 1) / greatest(count(*), 1) AS size FROM turns),
    picked AS (
        SELECT p.id FROM lease CROSS JOIN turns AS t CROSS JOIN LATERAL (
            SELECT row_number() OVER (ORDER BY x.priority, x.id) AS rank, x.id
            FROM unnest($4::text[]) AS n (name) CROSS JOIN LATERAL (
                SELECT i.id, i.priority FROM items AS i
                WHERE i.status = 'pending' AND i.not_before IS NULL
                    AND i.pipeline = n.name AND i.handling = $5 AND i.tenant = t.tenant
                ORDER BY i.priority, i.id LIMIT (SELECT size FROM part)
                FOR UPDATE SKIP LOCKED) AS x) AS p
        WHERE p.rank <= (SELECT size FROM part)
        ORDER BY p.rank, t.turn LIMIT $2),
    taken AS (
        UPDATE items AS i SET status = 'processing', lease_id = $1, epoch = i.epoch + 1,
            attempt = i.attempt + 1
        FROM picked AS p WHERE i.id = p.id
        RETURNING i.*),
    started AS (
        UPDATE runs SET status = 'processing', log_seq = log_seq + 1
        WHERE id IN (SELECT run_id FROM taken) AND status = 'pending' RETURNING id, log_seq),
    logged AS (
        INSERT INTO run_log (run_id, seq, v, kind, data, at)
        SELECT id, log_seq, 1, 'started', '{}', ",
    now!(),
    " FROM started)
    SELECT ",
    item_columns!(),
    " FROM taken"
);

pub(super) const SUSPECTS: &str = "
    SELECT EXISTS (SELECT 1 FROM unnest($1::text[]) AS n (name) CROSS JOIN unnest(ARRAY[1, 2, 3]) AS h (handling)
        CROSS JOIN LATERAL (SELECT 1 FROM items AS i WHERE i.status = 'pending' AND i.not_before IS NULL
            AND i.pipeline = n.name AND i.handling = h.handling LIMIT 1) AS x)";

pub(super) const LIVE: &str = concat!(
    "SELECT EXISTS (SELECT 1 FROM leases WHERE id = $1 AND expires_at > ",
    now!(),
    ")"
);

/// `$3` is the delay or null, `$4` the number of attempts to give back.
pub(super) const RELEASE: &str = concat!(
    "UPDATE items AS i SET status = 'pending', lease_id = NULL, epoch = i.epoch + 1,
        attempt = greatest(i.attempt - $4, 0), not_before = ", now!(), " + $3
    FROM unnest($1::bigint[], $2::bigint[]) AS h (id, epoch)
    WHERE i.id = h.id AND i.epoch = h.epoch AND i.status NOT IN ('completed', 'failed', 'cancelled')"
);

pub(super) const HELD: &str = "SELECT id, epoch FROM items WHERE lease_id = $1 ORDER BY id";

pub(super) const ANYTHING_TO_REAP: &str = concat!(
    "SELECT EXISTS (SELECT 1 FROM leases WHERE expires_at <= ",
    now!(),
    ")
        OR EXISTS (SELECT 1 FROM items WHERE not_before <= ",
    now!(),
    ")"
);

pub(super) const REAP_LEASES: &str = concat!(
    "DELETE FROM leases WHERE expires_at <= ",
    now!(),
    " RETURNING id"
);

/// See `Handling::after_death`.
pub(super) const REAP_ITEMS: &str = concat!(
    "WITH dead AS (
        SELECT lease_id AS lease, (count(*) > 1)::int AS back FROM items
        WHERE lease_id = ANY ($1::bigint[]) GROUP BY lease_id),
    requeued AS (
        UPDATE items AS i SET status = 'pending', lease_id = NULL, epoch = i.epoch + 1,
            attempt = greatest(i.attempt - d.back, 0),
            handling = CASE WHEN i.handling = 0 AND d.back = 1 THEN 1
                WHEN i.max_attempts - greatest(i.attempt - d.back, 0) <= 1 THEN 3 ELSE 2 END
        FROM dead AS d
        WHERE i.lease_id = ANY ($1::bigint[]) AND i.lease_id = d.lease
            AND (d.back = 1 OR i.attempt < i.max_attempts) RETURNING 1),
    done AS (
        UPDATE items AS i SET status = 'failed', lease_id = NULL, epoch = i.epoch + 1, error = $2
        FROM dead AS d
        WHERE i.lease_id = ANY ($1::bigint[]) AND i.lease_id = d.lease
            AND d.back = 0 AND i.attempt >= i.max_attempts
        RETURNING i.run_id, i.seq, i.error),
    notes AS (
        SELECT NULL::bigint AS run_id, NULL::text AS kind, NULL::text AS data, 0 AS place WHERE false),
    ", count_and_log!(), "
    SELECT (SELECT count(*) FROM requeued), (SELECT count(*) FROM done)"
);

pub(super) const LET_IN: &str = concat!(
    "UPDATE items SET not_before = NULL WHERE not_before <= ",
    now!()
);
