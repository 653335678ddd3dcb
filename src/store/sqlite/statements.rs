//! The SQL statements. Each is one round trip, whatever the number of rows, and finds its rows by an index, which
//! `plans_tests.rs` checks. `NOT INDEXED` demands the primary key of the table. Without it SQLite reads a whole index if the
//! statistics are older than the rows.

use sqlx::sqlite::SqliteRow;

use crate::store::sql::{decode, item_columns, kind_of_lost_lease, select};

decode!(SqliteRow, i64);

pub(super) const RUN_BY_ID: &str = select!(runs "WHERE id = ?1");

pub(super) const RUNS: &str = select!(runs "WHERE id < ?1 ORDER BY id DESC LIMIT ?2");

pub(super) const RUNS_OF_TENANT: &str = select!(
    runs "WHERE id < ?1 AND tenant = ?3 AND (?4 IS NULL OR status = ?4) ORDER BY id DESC LIMIT ?2"
);

pub(super) const RUNS_OF_STATUS: &str =
    select!(runs "WHERE id < ?1 AND status = ?4 ORDER BY id DESC LIMIT ?2");

pub(super) const ITEMS: &str =
    select!(items "WHERE run_id = ?1 AND seq >= ?2 ORDER BY seq LIMIT ?3");

pub(super) const LOG: &str = select!(log "WHERE run_id = ?1 AND seq > ?2 ORDER BY seq LIMIT ?3");

pub(super) const GENERATIONS: &str = select!(
    generations "WHERE tenant = ?1 AND memo_key IN (SELECT unhex(value) FROM json_each(?2))"
);

pub(super) const PUT_INTENTS: &str = "INSERT INTO intents (item_id, attempt, memo_key, v, \
    provider_ref, started_at) \
    SELECT value ->> 0, value ->> 1, unhex(value ->> 2), 1, value ->> 3, ?2 FROM json_each(?1) \
    WHERE EXISTS (SELECT 1 FROM items NOT INDEXED WHERE id = value ->> 0) \
    ON CONFLICT DO UPDATE SET provider_ref = excluded.provider_ref";

pub(super) const END_INTENTS: &str = "DELETE FROM intents WHERE (item_id, attempt, memo_key) IN \
    (SELECT value ->> 0, value ->> 1, unhex(value ->> 2) FROM json_each(?1))";

/// The condition of both statements for intents: those after `?1`, `?2`, `?3`, and with `?6` only those of items that no
/// live lease holds at `?5`.
macro_rules! intents_where {
    ($items:literal) => {
        concat!(
            "SELECT t.item_id, t.attempt, t.memo_key, t.provider_ref FROM intents t \
            WHERE (t.item_id, t.attempt, t.memo_key) > (?1, ?2, ?3)",
            $items,
            " AND (NOT ?6 OR NOT EXISTS \
            (SELECT 1 FROM items i NOT INDEXED JOIN leases l ON l.id = i.lease_id \
            WHERE i.id = t.item_id AND l.expires_at > ?5)) \
            ORDER BY t.item_id, t.attempt, t.memo_key LIMIT ?4"
        )
    };
}

pub(super) const INTENTS: &str = intents_where!("");

pub(super) const INTENTS_OF_ITEMS: &str =
    intents_where!(" AND t.item_id IN (SELECT value FROM json_each(?7))");

/// A lease that is live.
pub(super) const LIVE: &str = "SELECT 1 FROM leases WHERE id = ?1 AND expires_at > ?2";

/// Finds the tenants with items to claim one by one, with one index lookup for each pipeline (`?4`), then the part of each
/// tenant, and of all parts the first `?2` items in the order of dealing.
pub(super) const CLAIM: &str = concat!(
    "\
UPDATE items NOT INDEXED SET status = 'processing', lease_id = ?1, epoch = epoch + 1, attempt = attempt + 1 \
WHERE id IN ( \
    WITH RECURSIVE \
    names (name) AS MATERIALIZED (SELECT value FROM json_each(?4)), \
    up (tenant, n) AS ( \
        SELECT (SELECT min((SELECT tenant FROM items INDEXED BY items_ready WHERE status = 'pending' \
            AND not_before IS NULL AND pipeline = name AND handling = ?5 \
            AND tenant > ?3 ORDER BY tenant LIMIT 1)) FROM names), 1 \
        UNION ALL \
        SELECT (SELECT min((SELECT tenant FROM items INDEXED BY items_ready WHERE status = 'pending' \
            AND not_before IS NULL AND pipeline = name AND handling = ?5 \
            AND tenant > up.tenant ORDER BY tenant LIMIT 1)) FROM names), n + 1 \
        FROM up WHERE up.tenant IS NOT NULL AND n < ?2), \
    around (tenant, n) AS ( \
        SELECT (SELECT min((SELECT tenant FROM items INDEXED BY items_ready WHERE status = 'pending' \
            AND not_before IS NULL AND pipeline = name AND handling = ?5 \
            AND tenant >= '' ORDER BY tenant LIMIT 1)) FROM names), 1 \
        UNION ALL \
        SELECT (SELECT min((SELECT tenant FROM items INDEXED BY items_ready WHERE status = 'pending' \
            AND not_before IS NULL AND pipeline = name AND handling = ?5 \
            AND tenant > around.tenant ORDER BY tenant LIMIT 1)) FROM names), n + 1 \
        FROM around WHERE around.tenant <= ?3 AND n < ?2), \
    turns (turn, tenant) AS MATERIALIZED ( \
        SELECT n, tenant FROM up WHERE tenant IS NOT NULL \
        UNION ALL SELECT n + ?2, tenant FROM around WHERE tenant <= ?3 \
        ORDER BY 1 LIMIT ?2), \
    part (size) AS MATERIALIZED (SELECT (?2 + count(*) - 1) / max(count(*), 1) FROM turns), \
    parts (turn, rank, id) AS ( \
        SELECT t.turn, row_number() OVER (PARTITION BY t.turn ORDER BY i.priority, i.id), i.id \
        FROM turns t CROSS JOIN names CROSS JOIN items i NOT INDEXED ON i.id IN ( \
            SELECT id FROM items INDEXED BY items_ready WHERE status = 'pending' AND not_before IS NULL \
            AND pipeline = name AND handling = ?5 \
            AND tenant = t.tenant ORDER BY priority, id LIMIT (SELECT size FROM part))) \
    SELECT id FROM parts WHERE rank <= (SELECT size FROM part) ORDER BY rank, turn LIMIT ?2) \
RETURNING ",
    item_columns!()
);

pub(super) const SUSPECTS: &str = "SELECT EXISTS (SELECT 1 FROM json_each(?1) AS n CROSS JOIN items AS i \
    INDEXED BY items_ready ON i.pipeline = n.value AND i.handling IN (1, 2, 3) \
    WHERE i.status = 'pending' AND i.not_before IS NULL)";

pub(super) const START_RUNS: &str = "UPDATE runs NOT INDEXED SET status = 'processing', log_seq = log_seq + 1 \
    WHERE id IN (SELECT value FROM json_each(?1)) AND status = 'pending' RETURNING id, log_seq";

/// `?1` has run, notes, completed, failed, error. Returns the run, the number of its last log entry, and its status.
pub(super) const COUNT: &str = "\
UPDATE runs NOT INDEXED SET \
    completed = completed + d.done, failed = failed + d.broken, \
    error = CASE WHEN d.done + d.broken > 0 THEN coalesce(error, d.why) ELSE error END, \
    log_seq = log_seq + d.notes + (d.done + d.broken > 0) \
        + (d.done + d.broken > 0 AND completed + failed + cancelled + d.done + d.broken = total), \
    status = CASE \
        WHEN d.done + d.broken = 0 THEN status \
        WHEN completed + failed + cancelled + d.done + d.broken < total THEN 'processing' \
        WHEN failed + d.broken > 0 THEN 'failed' ELSE 'completed' END, \
    ended_at = CASE \
        WHEN d.done + d.broken > 0 AND completed + failed + cancelled + d.done + d.broken = total \
        THEN ?2 ELSE ended_at END \
FROM (SELECT value ->> 0 AS run, value ->> 1 AS notes, value ->> 2 AS done, value ->> 3 AS broken, \
    value ->> 4 AS why FROM json_each(?1)) AS d \
WHERE runs.id = d.run \
RETURNING id, log_seq, status";

pub(super) const ADD_LOG: &str = "INSERT INTO run_log (run_id, seq, v, kind, data, at) \
    SELECT value ->> 0, value ->> 1, 1, value ->> 2, value ->> 3, ?2 FROM json_each(?1)";

pub(super) const HEARTBEAT: &str = "UPDATE leases SET expires_at = ?2 WHERE id = ?1";

pub(super) const RETIRE: &str = "DELETE FROM leases WHERE id = ?1";

pub(super) const RETIRE_ITEMS: &str = "UPDATE items SET status = 'pending', lease_id = NULL, \
    epoch = epoch + 1, attempt = max(attempt - 1, 0) WHERE lease_id = ?1";

/// `?1` has items and epochs, `?2` is the due time or null, `?3` the number of attempts to give back.
pub(super) const RELEASE: &str = "UPDATE items NOT INDEXED SET status = 'pending', lease_id = NULL, \
    epoch = items.epoch + 1, attempt = max(attempt - ?3, 0), not_before = ?2 \
    FROM (SELECT value ->> 0 AS id, value ->> 1 AS epoch FROM json_each(?1)) AS h \
    WHERE items.id = h.id AND items.epoch = h.epoch \
    AND items.status NOT IN ('completed', 'failed', 'cancelled')";

pub(super) const HELD: &str = "SELECT id, epoch FROM items WHERE lease_id = ?1 ORDER BY id";

pub(super) const ANYTHING_TO_REAP: &str = "SELECT EXISTS (SELECT 1 FROM leases WHERE expires_at <= ?1) \
    OR EXISTS (SELECT 1 FROM items WHERE not_before <= ?1)";

pub(super) const REAP_LEASES: &str = "DELETE FROM leases WHERE expires_at <= ?1 RETURNING id";

/// Dead leases that held one item.
pub(super) const HELD_ALONE: &str = "SELECT lease_id FROM items \
    WHERE lease_id IN (SELECT value FROM json_each(?1)) GROUP BY lease_id HAVING count(*) = 1";

/// `?1`: dead leases, `?2`: those of them that held one item. See `Handling::after_death`.
pub(super) const REQUEUE: &str = "UPDATE items SET status = 'pending', lease_id = NULL, \
    epoch = epoch + 1, attempt = max(attempt - d.back, 0), \
    handling = CASE WHEN handling = 0 AND d.back = 1 THEN 1 \
        WHEN max_attempts - max(attempt - d.back, 0) <= 1 THEN 3 ELSE 2 END \
    FROM (SELECT value AS lease, value NOT IN (SELECT value FROM json_each(?2)) AS back \
        FROM json_each(?1)) AS d \
    WHERE items.lease_id = d.lease AND (d.back = 1 OR attempt < max_attempts)";

/// `?1`: dead leases that held one item.
pub(super) const GIVE_UP: &str = "UPDATE items SET status = 'failed', lease_id = NULL, \
    epoch = epoch + 1, error = ?2 WHERE lease_id IN (SELECT value FROM json_each(?1)) \
    RETURNING id, run_id, seq";

pub(super) const LET_IN: &str = "UPDATE items SET not_before = NULL WHERE not_before <= ?1";

pub(super) const CANCEL_ITEMS: &str = "UPDATE items SET status = 'cancelled', lease_id = NULL, \
    not_before = NULL, epoch = epoch + 1 WHERE run_id = ?1 AND status IN ('pending', 'processing')";

pub(super) const CANCEL_RUN: &str = "UPDATE runs SET status = 'cancelled', \
    cancelled = cancelled + ?2, log_seq = log_seq + 2, ended_at = ?3 WHERE id = ?1 RETURNING log_seq";

pub(super) const RETRY_ITEMS: &str = "UPDATE items SET status = 'pending', epoch = epoch + 1, \
    attempt = 0, error = NULL, handling = min(handling, 2) WHERE run_id = ?1 AND status = 'failed'";

/// Executed before the items are pending again.
pub(super) const RETRY_INTENTS: &str = concat!(
    "DELETE FROM intents WHERE item_id IN (SELECT id FROM items \
    WHERE run_id = ?1 AND status = 'failed' AND instr(error, '",
    kind_of_lost_lease!(),
    "') > 0)"
);

pub(super) const RETRY_RUN: &str = "UPDATE runs SET status = 'pending', failed = failed - ?2, \
    error = NULL, ended_at = NULL, log_seq = log_seq + 1 WHERE id = ?1 RETURNING log_seq";

pub(super) const PURGE_RUNS: &str = "DELETE FROM runs WHERE id IN \
    (SELECT id FROM runs WHERE ended_at <= ?1 ORDER BY ended_at, id LIMIT ?2)";

/// `floors` has for each tenant the time since when its generations are needed. Few runs have these statuses.
pub(super) const PURGE_GENERATIONS: &str = "DELETE FROM generations WHERE rowid IN ( \
    WITH floors (tenant, since) AS MATERIALIZED ( \
        SELECT tenant, min(created_at) FROM runs INDEXED BY runs_status \
        WHERE status IN ('pending', 'processing', 'failed') AND (ended_at IS NULL OR ended_at > ?1) \
        GROUP BY tenant) \
    SELECT g.rowid FROM generations AS g INDEXED BY generations_age WHERE g.created_at <= ?1 \
        AND NOT EXISTS (SELECT 1 FROM floors AS f WHERE f.tenant = g.tenant AND f.since <= g.created_at) \
    ORDER BY g.created_at, g.rowid LIMIT ?2)";
