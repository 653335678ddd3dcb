//! The tables: a list of migrations, to which releases only add.

use std::path::Path;

use sqlx::{Connection as _, Row as _, SqliteConnection};

use super::super::sql::failed;
use crate::error::{Error, ErrorKind, Result};

/// Marks a file as one of this library: `thln`.
const APPLICATION_ID: i32 = i32::from_be_bytes(*b"thln");

/// Migration n takes a file from version n to n + 1. A released migration is never changed.
const STEPS: &[&str] = &[include_str!("0001.sql"), include_str!("0002.sql")];

/// Fixed statistics for the query planner, those of a large file. With statistics of a small file the planner would read
/// whole tables after the file has grown, and plans for many rows are not slower with few.
const STATISTICS: &[(&str, Option<&str>, &str)] = &[
    ("generations", Some("generations_age"), "1000000 1"),
    (
        "generations",
        Some("sqlite_autoindex_generations_1"),
        "1000000 10000 1",
    ),
    ("intents", Some("intents"), "10000 2 2 1"),
    ("items", Some("items_delayed"), "10000 10"),
    ("items", Some("items_failed"), "10000 100"),
    ("items", Some("items_leased"), "10000 100"),
    (
        "items",
        Some("items_ready"),
        "1000000 100000 100000 10000 1000 1",
    ),
    ("items", Some("sqlite_autoindex_items_1"), "1000000 1000 1"),
    ("leases", None, "100"),
    ("run_log", Some("run_log"), "1000000 100 1"),
    ("runs", Some("runs_ended"), "10000 1 1"),
    ("runs", Some("runs_idempotency"), "10000 100 1"),
    ("runs", Some("runs_status"), "10000 2000 1"),
    ("runs", Some("runs_tenant"), "10000 100 1"),
];

/// Migrates the file to the version of this release.
pub(super) async fn migrate(connection: &mut SqliteConnection, path: &Path) -> Result<()> {
    let newest = STEPS.len() as i32;
    // Usually there is nothing to do, and then the write lock is not taken.
    if state(connection).await.map_err(failed)? == (APPLICATION_ID, newest, false)
        && statistics(connection).await.map_err(failed)? == wanted()
    {
        return Ok(());
    }
    let mut transaction = connection
        .begin_with("BEGIN IMMEDIATE")
        .await
        .map_err(failed)?;
    let refuse = |what: String| {
        Err(Error::new(
            ErrorKind::Store,
            format!("{}: {what}", path.display()),
        ))
    };
    let version = match state(&mut transaction).await.map_err(failed)? {
        (APPLICATION_ID, version, _) if version <= newest => version,
        (APPLICATION_ID, version, _) => {
            return refuse(format!(
                "written by a newer release (version {version} of the tables, this one knows {newest}): \
                 open it with that release, or take another file"
            ));
        }
        (0, 0, true) => 0,
        _ => return refuse("a database, but not a store of this library".to_owned()),
    };
    for step in &STEPS[version as usize..] {
        sqlx::raw_sql(*step)
            .execute(&mut *transaction)
            .await
            .map_err(failed)?;
    }
    for (pragma, value) in [("application_id", APPLICATION_ID), ("user_version", newest)] {
        let set = sqlx::AssertSqlSafe(format!("PRAGMA {pragma} = {value}"));
        sqlx::raw_sql(set)
            .execute(&mut *transaction)
            .await
            .map_err(failed)?;
    }
    tell(&mut transaction).await.map_err(failed)?;
    transaction.commit().await.map_err(failed)
}

/// Returns the application, the version, and whether the file is empty.
async fn state(connection: &mut SqliteConnection) -> sqlx::Result<(i32, i32, bool)> {
    let row = sqlx::query(
        "SELECT (SELECT application_id FROM pragma_application_id), \
         (SELECT user_version FROM pragma_user_version), \
         NOT EXISTS (SELECT 1 FROM sqlite_schema)",
    )
    .fetch_one(connection)
    .await?;
    Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?))
}

fn wanted() -> Vec<(String, Option<String>, String)> {
    let own = |(table, index, numbers): &(&str, Option<&str>, &str)| {
        (
            table.to_string(),
            index.map(str::to_owned),
            numbers.to_string(),
        )
    };
    STATISTICS.iter().map(own).collect()
}

/// Returns the present statistics.
async fn statistics(
    connection: &mut SqliteConnection,
) -> sqlx::Result<Vec<(String, Option<String>, String)>> {
    let there = "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = 'sqlite_stat1')";
    if !sqlx::query_scalar::<_, bool>(there)
        .fetch_one(&mut *connection)
        .await?
    {
        return Ok(Vec::new());
    }
    let all = sqlx::query_as("SELECT tbl, idx, stat FROM sqlite_stat1 ORDER BY tbl, idx");
    all.fetch_all(connection).await
}

/// Writes the fixed statistics, which later connections use.
async fn tell(connection: &mut SqliteConnection) -> sqlx::Result<()> {
    // This creates the table of statistics.
    sqlx::raw_sql("ANALYZE sqlite_schema; DELETE FROM sqlite_stat1")
        .execute(&mut *connection)
        .await?;
    for (table, index, numbers) in STATISTICS {
        let tell = sqlx::query("INSERT INTO sqlite_stat1 (tbl, idx, stat) VALUES (?, ?, ?)");
        tell.bind(table)
            .bind(index)
            .bind(numbers)
            .execute(&mut *connection)
            .await?;
    }
    Ok(())
}
