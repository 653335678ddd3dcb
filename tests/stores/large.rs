//! A million items: what must not grow with their number does not.
//!
//! Postgres counts the scans of each table itself, so there the statements as they are really sent
//! are held to it, with their plans for known and for unknown parameters. For SQLite the plans
//! are checked beside the statements (`src/store/sqlite/plans.rs`), and here their time.
#![cfg(all(feature = "sqlite", feature = "postgres", feature = "testing"))]

use std::time::{Duration, Instant};

use sqlx::{Connection as _, SqliteConnection};
use throughline::store::{
    Claim, Commit, Item, LeaseId, Postgres, Queue, RunId, Settlement, Sqlite,
};

use crate::server::Schemas;

const ROWS: i64 = 1_000_000;
const LONG: Duration = Duration::from_secs(3600);

/// One large run of a tenant who has everything pending, half of it in process under a lease that
/// lives, and a tenant with little; written past the store, because only the reading matters here.
fn fill(series: &str) -> String {
    format!(
        "INSERT INTO runs (v, tenant, name, status, total, created_at, spec)
            VALUES (1, 'big', 'p', 'pending', {ROWS}, 1, '1'), (1, 'small', 'p', 'pending', 10, 1, '1');
        INSERT INTO leases (worker, expires_at) VALUES ('w', 9000000000000);
        INSERT INTO items (v, run_id, seq, pipeline, tenant, priority, status, lease_id, attempt, max_attempts, key, input)
            SELECT 1, 1, n, 'p', 'big', 0, CASE WHEN n % 2 = 0 THEN 'pending' ELSE 'processing' END,
                CASE WHEN n % 2 = 0 THEN NULL ELSE 1 END, 0, 3, 'k', '1' FROM {series} WHERE n < {ROWS};
        INSERT INTO items (v, run_id, seq, pipeline, tenant, priority, max_attempts, key, input)
            SELECT 1, 2, n, 'p', 'small', 0, 3, 'k', '1' FROM {series} WHERE n < 10;"
    )
}

fn done(items: &[Item]) -> Commit {
    Commit::new().settlements(items.iter().map(|item| Settlement {
        hold: item.hold(),
        result: Ok("1".to_owned()),
    }))
}

/// Claims, commits, polls, reaps, releases and asks, each so often that a prepared statement has got
/// the plan that it keeps. Gives the median time of each.
async fn exercise(store: &dyn Queue) -> Vec<(&'static str, Duration)> {
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
        let items = timed!("claim", store.claim(lease, Claim::new(&["p"], 64)));
        assert!(items.len() >= 32);
        assert!(timed!("lost", store.lost(&[items[0].hold()])).is_empty());
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
        assert_eq!(run.total as i64, ROWS);
        assert!(timed!("items", store.items(RunId(1), 500_000, 10)).len() == 10);
        timed!("ambiguous", store.ambiguous(None, 10));

        let dying = store.register("w", LONG).await.unwrap();
        let held = store.claim(dying, Claim::new(&["p"], 16)).await.unwrap();
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

/// A whole table of a million rows takes 100 ms and more to read, also on a fast machine.
fn none_is_slow(times: &[(&str, Duration)], limit: Duration) {
    println!("{times:?}");
    for (name, median) in times {
        assert!(*median < limit, "{name} takes {median:?} at {ROWS} items");
    }
}

#[tokio::test]
async fn sqlite_at_a_million() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("large.db");
    Sqlite::open(&path).await.unwrap().close().await;
    let url = format!("sqlite://{}", path.display());
    let mut connection = SqliteConnection::connect(&url).await.unwrap();
    // Statistics of the empty file, gone stale.
    let series = format!(
        "(WITH RECURSIVE s (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM s WHERE n < {ROWS}) SELECT n FROM s)"
    );
    let sql = format!(
        "ANALYZE; PRAGMA synchronous = off; BEGIN; {} COMMIT",
        fill(&series)
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql))
        .execute(&mut connection)
        .await
        .unwrap();
    connection.close().await.unwrap();

    let store = Sqlite::open(&path).await.unwrap();
    none_is_slow(&exercise(&store).await, Duration::from_millis(80));
}

#[tokio::test]
async fn postgres_at_a_million() {
    let Some(schemas) = Schemas::find() else {
        return;
    };
    let store = schemas.open().await;
    // Statistics of the empty tables, and nobody to renew them.
    schemas
        .raw("ALTER TABLE items SET (autovacuum_enabled = off); ANALYZE")
        .await;
    schemas
        .raw(&fill(&format!("generate_series(0, {ROWS}) AS s (n)")))
        .await;

    // Making the indexes read the empty table, and that is counted too.
    let before = scans(&schemas).await;
    none_is_slow(&exercise(&store).await, Duration::from_millis(80));
    store.close().await;
    assert_eq!(
        scans(&schemas).await,
        before,
        "a table was read from end to end"
    );

    schemas.raw("ANALYZE").await;
    let before = scans(&schemas).await;
    let fresh = Postgres::builder(&schemas.url).schema(schemas.newest());
    let fresh = fresh.connect().await.unwrap();
    none_is_slow(&exercise(&fresh).await, Duration::from_millis(80));
    fresh.close().await;
    assert_eq!(scans(&schemas).await, before, "with fresh statistics too");
    schemas.clear().await;
}

/// How often each of the large tables has been read from end to end.
async fn scans(schemas: &Schemas) -> Vec<(String, i64)> {
    // What a session counted is told when it ends, or a second later.
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
