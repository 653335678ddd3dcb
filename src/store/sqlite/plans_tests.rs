//! Tests that every statement finds its rows by an index, whatever the statistics are.

use sqlx::{AssertSqlSafe, Connection as _, Row as _, SqliteConnection};

use super::Sqlite;
use super::statements::*;
use super::write::settle_statement;
use crate::store::inputs::Settlement;
use crate::store::model::{Hold, ItemId};

/// Returns the steps of the plan for a statement.
async fn plan(connection: &mut SqliteConnection, sql: &str) -> Vec<String> {
    let explain = sqlx::query(AssertSqlSafe(format!("EXPLAIN QUERY PLAN {sql}")));
    let steps = explain.fetch_all(connection).await;
    let steps = steps.unwrap_or_else(|error| panic!("{error}: {sql}"));
    steps
        .iter()
        .map(|step| step.get::<String, _>("detail"))
        .collect()
}

/// Returns whether a step reads the whole of a table that grows. `leases` has only a row for each live worker.
fn scans(step: &str) -> bool {
    const LARGE: [&str; 9] = [
        "items",
        "runs",
        "generations",
        "intents",
        "run_log",
        "i",
        "t",
        "x",
        "r",
    ];
    let table = step
        .strip_prefix("SCAN ")
        .and_then(|rest| rest.split(' ').next());
    // The turns of a claim are named `t` too. Their step has a bloom filter or nothing after the name.
    table.is_some_and(|table| LARGE.contains(&table)) && step != "SCAN t"
}

#[tokio::test]
async fn every_statement_uses_an_index() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("plans.db");
    Sqlite::open(&path).await.unwrap().close().await;
    let url = format!("sqlite://{}", path.display());

    let hold = Hold {
        item: ItemId(1),
        epoch: 1,
    };
    let settlements = vec![
        Settlement {
            hold,
            result: Ok("1".to_owned())
        };
        512
    ];
    let settle = settle_statement(&settlements).into_string();
    let statements = [
        RUN_BY_ID,
        RUNS,
        RUNS_OF_TENANT,
        RUNS_OF_STATUS,
        ITEMS,
        LOG,
        GENERATIONS,
        PUT_INTENTS,
        END_INTENTS,
        INTENTS,
        INTENTS_OF_ITEMS,
        LIVE,
        CLAIM,
        START_RUNS,
        COUNT,
        HEARTBEAT,
        RETIRE,
        RETIRE_ITEMS,
        RELEASE,
        HELD,
        ANYTHING_TO_REAP,
        REAP_LEASES,
        SUSPECTS,
        HELD_ALONE,
        REQUEUE,
        GIVE_UP,
        LET_IN,
        CANCEL_ITEMS,
        CANCEL_RUN,
        RETRY_INTENTS,
        RETRY_ITEMS,
        RETRY_RUN,
        PURGE_RUNS,
        PURGE_GENERATIONS,
        &settle,
    ];

    // No statistics; stale ones of an empty and of a small file; those of a million rows that are all in process, or all
    // pending of one tenant and of one run.
    let small = "INSERT INTO items (v, run_id, seq, pipeline, tenant, priority, max_attempts, key, input) \
                 SELECT 1, id, 0, 'p', 'a', 0, 3, 'k', '1' FROM runs; ANALYZE;";
    let stat = |index: &str, numbers: &str| {
        let sql = "INSERT OR REPLACE INTO sqlite_stat1 (tbl, idx, stat) VALUES";
        format!("{sql} ('items', '{index}', '{numbers}'); ")
    };
    let all_leased = [
        "DELETE FROM sqlite_stat1; ".to_owned(),
        stat("items_leased", "1000000 1000000"),
        stat("items_ready", "1 1 1 1 1 1"),
        "ANALYZE sqlite_schema;".to_owned(),
    ];
    let all_ready = [
        "DELETE FROM sqlite_stat1; ".to_owned(),
        stat("items_leased", "1 1"),
        stat("items_ready", "1000000 1000000 1000000 1000000 1000000 1"),
        stat("sqlite_autoindex_items_1", "1000000 1000000 1"),
        "ANALYZE sqlite_schema;".to_owned(),
    ];
    for statistics in [
        "".to_owned(),
        "ANALYZE;".to_owned(),
        format!(
            "INSERT INTO runs (v, tenant, name, status, total, created_at, spec) \
         VALUES (1, 'a', 'p', 'pending', 1, 1, '1'), (1, 'a', 'p', 'pending', 1, 1, '1'); {small}"
        ),
        all_leased.concat(),
        all_ready.concat(),
    ] {
        let mut connection = SqliteConnection::connect(&url).await.unwrap();
        sqlx::raw_sql(AssertSqlSafe(&*statistics))
            .execute(&mut connection)
            .await
            .unwrap();
        connection.close().await.unwrap();
        // Opening the store writes the fixed statistics.
        Sqlite::open(&path).await.unwrap().close().await;
        let mut connection = SqliteConnection::connect(&url).await.unwrap();
        for sql in statements {
            let steps = plan(&mut connection, sql).await;
            if sql == RUNS {
                // This reads the primary key backwards and stops after a page.
                assert!(steps.len() == 1 && steps[0].ends_with("runs") || !scans(&steps[0]));
                continue;
            }
            assert!(
                !steps.iter().any(|step| scans(step)),
                "{statistics}\n{sql}\n{steps:#?}"
            );
        }
        connection.close().await.unwrap();
    }
}

#[tokio::test]
async fn the_check_finds_a_statement_that_reads_a_whole_table() {
    let mut connection = SqliteConnection::connect("sqlite::memory:").await.unwrap();
    sqlx::raw_sql("CREATE TABLE items (id, key)")
        .execute(&mut connection)
        .await
        .unwrap();
    let steps = plan(&mut connection, "SELECT * FROM items WHERE key = 1").await;
    assert!(steps.iter().any(|step| scans(step)), "{steps:?}");
}
