//! The tables: a list of migrations, to which releases only add.

use sqlx::{Acquire as _, AssertSqlSafe, PgConnection};

use crate::error::{Error, ErrorKind, Result};
use crate::store::sql::failed;

/// Migration n takes the tables from version n to n + 1. A released migration is never changed.
const STEPS: &[&str] = &[include_str!("0001.sql"), include_str!("0002.sql")];

/// Migrates the tables in `schema`, the search path of the connection, to the version of this release.
pub(super) async fn migrate(connection: &mut PgConnection, schema: &str) -> Result<()> {
    let newest = STEPS.len() as i32;
    // Usually there is nothing to do, and then no privilege to create tables is needed.
    if version(connection).await.map_err(failed)? == Some(newest) {
        return Ok(());
    }
    let mut transaction = connection.begin().await.map_err(failed)?;
    // The lock is needed because `IF NOT EXISTS` fails when two sessions create the same object.
    for prepare in [
        format!("SELECT pg_advisory_xact_lock(hashtext('throughline:{schema}'))"),
        format!("CREATE SCHEMA IF NOT EXISTS \"{schema}\""),
        "CREATE TABLE IF NOT EXISTS schema_version (version integer NOT NULL)".to_owned(),
    ] {
        let prepare = sqlx::raw_sql(AssertSqlSafe(prepare));
        prepare.execute(&mut *transaction).await.map_err(failed)?;
    }
    let version = version(&mut transaction)
        .await
        .map_err(failed)?
        .unwrap_or(0);
    if version > newest {
        return Err(Error::new(
            ErrorKind::Store,
            format!(
                "schema {schema:?} was written by a newer release (version {version} of the tables, \
                 this one knows {newest}): use that release, or take another schema"
            ),
        ));
    }
    for step in &STEPS[version as usize..] {
        sqlx::raw_sql(*step)
            .execute(&mut *transaction)
            .await
            .map_err(failed)?;
    }
    for (sql, bind) in [
        ("DELETE FROM schema_version WHERE version <> $1", newest),
        (
            "INSERT INTO schema_version SELECT $1 WHERE NOT EXISTS (SELECT 1 FROM schema_version)",
            newest,
        ),
    ] {
        sqlx::query(sql)
            .bind(bind)
            .execute(&mut *transaction)
            .await
            .map_err(failed)?;
    }
    transaction.commit().await.map_err(failed)
}

async fn version(connection: &mut PgConnection) -> sqlx::Result<Option<i32>> {
    let there = sqlx::query_scalar::<_, bool>("SELECT to_regclass('schema_version') IS NOT NULL");
    if !there.fetch_one(&mut *connection).await? {
        return Ok(None);
    }
    let version = sqlx::query_scalar("SELECT version FROM schema_version");
    version.fetch_optional(connection).await
}
