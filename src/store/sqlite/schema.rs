//! The tables, as a list of steps that is only ever added to.

use std::path::Path;

use sqlx::{Connection as _, Row as _, SqliteConnection};

use super::super::sql::failed;
use crate::error::{Error, ErrorKind, Result};

/// Says that a file is ours: `thln`.
const APPLICATION_ID: i32 = i32::from_be_bytes(*b"thln");

/// Step n brings a file from version n to n + 1. A step that has been released is never changed.
const STEPS: &[&str] = &[include_str!("0001.sql")];

/// Brings the file to this release's version.
pub(super) async fn migrate(connection: &mut SqliteConnection, path: &Path) -> Result<()> {
    let newest = STEPS.len() as i32;
    // Mostly there is nothing to do, and then nobody is kept waiting for the right to write.
    if state(connection).await.map_err(failed)? == (APPLICATION_ID, newest, false) {
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
    transaction.commit().await.map_err(failed)
}

/// Application, version, and whether the file is empty.
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
