//! The duration of a call does not grow with the number of items in the store.
//!
//! Postgres counts the scans of each table itself. So the test checks the statements as they are sent, with their plans
//! for known and for unknown parameters, and needs no more rows than make a planner prefer an index. The plans of SQLite
//! are checked beside the statements (`src/store/sqlite/plans_tests.rs`), and this test measures their time.
//! The long form (`THROUGHLINE_LONG=1`) has a million items in both.
#![cfg(all(feature = "sqlite", feature = "postgres", feature = "testing"))]

use std::time::{Duration, Instant};

use sqlx::{Connection as _, SqliteConnection};
use throughline::store::{
    Claim, Item, LeaseId, Postgres, Queue, QueueExt as _, RunId, Sqlite, StoreExt as _,
};

use crate::common::{LONG, done};
use crate::long::is_long;
use crate::server::Schemas;

/// The number of items, in the short form where it is given.
fn rows(short: i64) -> i64 {
    if is_long() { 1_000_000 } else { short }
}

/// Returns statements that fill the tables with a large run of `rows` items, half of them pending and half of them under a
/// live lease, and a small run of another tenant. They bypass the store, because the test measures reading only.
fn fill(rows: i64, series: &str) -> String {
    format!(
        "INSERT INTO runs (v, tenant, name, status, total, created_at, spec)
            VALUES (1, 'big', 'p', 'pending', {rows}, 1, '1'), (1, 'small', 'p', 'pending', 10, 1, '1');
        INSERT INTO leases (worker, expires_at) VALUES ('w', 9000000000000);
        INSERT INTO items (v, run_id, seq, pipeline, tenant, priority, status, lease_id, attempt, max_attempts, key, input)
            SELECT 1, 1, n, 'p', 'big', 0, CASE WHEN n % 2 = 0 THEN 'pending' ELSE 'processing' END,
                CASE WHEN n % 2 = 0 THEN NULL ELSE 1 END, 0, 3, 'k', '1' FROM {series} WHERE n < {rows};
        INSERT INTO items (v, run_id, seq, pipeline, tenant, priority, max_attempts, key, input)
            SELECT 1, 2, n, 'p', 'small', 0, 3, 'k', '1' FROM {series} WHERE n < 10;"
    )
}

/// Makes each kind of call often enough that a prepared statement has the plan that it keeps. Returns the median time of
/// each kind.
async fn exercise(store: &dyn Queue, rows: i64) -> Vec<(&'static str, Duration)> {
    const ROUNDS: usize = 12;
    let mut times: Vec<(&str, Vec<Duration>)> = Vec::new();
    macro_rules! timed {
        ($name:literal, $call:expr) => {{
            let began = Instant::now();
            let result = $call.await.unwrap();
            let took = began.elapsed();
            match times.iter_mut().find(|(name, _)| *name == $name) {
                Some((_, all)) => all.push(took),
                None => times.push(($name, vec![took])),
            }
            result
        }};
    }
    let lease = store.register("w", LONG).await.unwrap();
    for _ in 0..ROUNDS {
        let items = timed!("claim", store.claim(lease, Claim::new(["p"], 64)));
        assert!(items.len() >= 32);
        assert!(timed!("lost", store.lost(lease, &[items[0].hold()])).is_empty());
        let (first, rest) = items.split_at(items.len() / 2);
        assert_eq!(
            timed!("commit", store.commit(done(first))).items.len(),
            first.len()
        );
        let holds: Vec<_> = rest[..8].iter().map(Item::hold).collect();
        assert_eq!(
            timed!("release", store.release(&holds, Duration::ZERO, true)),
            8
        );
        let run = timed!("status", store.run(RunId(1))).unwrap();
        assert_eq!(run.total as i64, rows);
        assert!(timed!("items", store.items(RunId(1), rows as u64 / 2, 10)).len() == 10);
        timed!("ambiguous", store.ambiguous_intents(None, 10));

        let dying = store.register("w", LONG).await.unwrap();
        let held = store.claim(dying, Claim::new(["p"], 16)).await.unwrap();
        store
            .release(&[held[0].hold()], Duration::from_millis(1), true)
            .await
            .unwrap();
        assert!(timed!("heartbeat", store.heartbeat(dying, Duration::ZERO)));
        tokio::time::sleep(Duration::from_millis(5)).await;
        let reaped = timed!("reap", store.reap());
        assert_eq!((reaped.requeued as usize, reaped.due), (held.len() - 1, 1));
        assert!(store.heartbeat(LeaseId(1), LONG).await.unwrap());
        assert_eq!(timed!("retry", store.retry_failed(RunId(1))), 0);
    }
    let median = |mut all: Vec<Duration>| {
        all.sort_unstable();
        all[all.len() / 2]
    };
    times
        .into_iter()
        .map(|(name, all)| (name, median(all)))
        .collect()
}

/// The longest median time of a call. Reading a whole table of 400,000 rows or more takes longer, also on a fast machine.
const LIMIT: Duration = Duration::from_millis(80);

fn assert_fast(times: &[(&str, Duration)]) {
    println!("{times:?}");
    for (name, median) in times {
        assert!(*median < LIMIT, "{name} takes {median:?}");
    }
}

#[tokio::test]
async fn calls_of_sqlite_take_the_same_time_at_any_number_of_items() {
    let rows = rows(400_000);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("large.db");
    Sqlite::open(&path).await.unwrap().close().await;
    let url = format!("sqlite://{}", path.display());
    let mut connection = SqliteConnection::connect(&url).await.unwrap();
    // Statistics of the empty file, gone stale.
    let series = format!(
        "(WITH RECURSIVE s (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM s WHERE n < {rows}) SELECT n FROM s)"
    );
    let sql = format!(
        "ANALYZE; PRAGMA synchronous = off; BEGIN; {} COMMIT",
        fill(rows, &series)
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql))
        .execute(&mut connection)
        .await
        .unwrap();
    connection.close().await.unwrap();

    let store = Sqlite::open(&path).await.unwrap();
    assert_fast(&exercise(&store, rows).await);
}

#[tokio::test]
async fn no_call_of_postgres_reads_a_whole_table() {
    let rows = rows(100_000);
    let Some(schemas) = Schemas::find() else {
        return;
    };
    let store = schemas.open().await;
    // The statistics of the empty tables, which are not renewed.
    schemas
        .raw("ALTER TABLE items SET (autovacuum_enabled = off); ANALYZE")
        .await;
    schemas
        .raw(&fill(rows, &format!("generate_series(0, {rows}) AS s (n)")))
        .await;

    // Building the indexes read the empty tables, which is counted too.
    let before = scans(&schemas).await;
    assert_fast(&exercise(&store, rows).await);
    store.close().await;
    assert_eq!(scans(&schemas).await, before, "a whole table was read");

    schemas.raw("ANALYZE").await;
    let before = scans(&schemas).await;
    let fresh = Postgres::builder(&schemas.url).schema(schemas.newest());
    let fresh = fresh.connect().await.unwrap();
    assert_fast(&exercise(&fresh, rows).await);
    fresh.close().await;
    assert_eq!(scans(&schemas).await, before, "with fresh statistics too");
    schemas.clear().await;
}

/// Returns the number of times that each of the large tables was read as a whole.
async fn scans(schemas: &Schemas) -> Vec<(String, i64)> {
    // A session reports its counts when it ends, or a second later.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let scans = sqlx::query_as(
        "SELECT relname::text, seq_scan FROM pg_stat_user_tables \
         WHERE schemaname = current_schema() AND relname IN ('items', 'run_log') ORDER BY 1",
    );
    scans
        .fetch_all(&mut schemas.connection().await)
        .await
        .unwrap()
}
