//! Helpers that both SQL backends need: transactions, retries, errors, numbers and rows.

use std::ops::{Deref, DerefMut};
use std::sync::MutexGuard;
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::{Database, Executor, Pool};

use crate::backoff::Jittered;
use crate::error::{Error, ErrorKind, Persistence, Result};
use crate::sync::Mutex;

/// Repeats an operation while `$again` returns, for its error and the number of earlier tries, that another try may
/// succeed. This is a macro so that the compiler sees the borrows of `$operation`.
macro_rules! retrying {
    ($again:expr, $operation:expr) => {{
        let again = $again;
        let mut backoff = None;
        let mut tries = 0;
        loop {
            match $operation.await {
                Err(error) if again(&error, tries) => {
                    let backoff = backoff.get_or_insert_with($crate::store::sql::conflict_waits);
                    tokio::time::sleep(backoff.next()).await;
                    tries += 1;
                }
                result => break result.map_err($crate::store::sql::failed),
            }
        }
    }};
}
pub(super) use retrying;

/// Returns the waits after conflicts with other transactions.
pub(super) fn conflict_waits() -> Jittered {
    Jittered::new(Duration::from_micros(500), Duration::from_millis(64))
}

/// A transaction on a connection of a pool. The connection returns to the pool only after
/// [`commit`](Self::commit) has succeeded. After an error, and when the future that owns the
/// transaction is dropped at any point, the connection is closed, which rolls the transaction back.
///
/// This is not sqlx's `Transaction`, which decides by its own count of open transactions whether to roll back. That count is
/// wrong when `BEGIN` is dropped half-way on Postgres (sqlx #4385, #4393, fixed by #4394 in no release yet), and after
/// SQLite has rolled back by itself, as it does on a full disk.
#[must_use = "a transaction that is dropped closes its connection"]
pub(super) struct Transaction<D: Database> {
    connection: PoolConnection<D>,
    ended: bool,
}

impl<D: Database> Transaction<D>
where
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
{
    pub(super) async fn begin(pool: &Pool<D>, begin: &'static str) -> sqlx::Result<Self> {
        // From here on the guard closes the connection, also if `BEGIN` is dropped half-way.
        let mut transaction = Self {
            connection: pool.acquire().await?,
            ended: false,
        };
        transaction.connection.execute(begin).await?;
        Ok(transaction)
    }

    pub(super) async fn commit(mut self) -> sqlx::Result<()> {
        self.connection.execute("COMMIT").await?;
        self.ended = true;
        Ok(())
    }
}

impl<D: Database> Deref for Transaction<D> {
    type Target = D::Connection;

    fn deref(&self) -> &D::Connection {
        &self.connection
    }
}

impl<D: Database> DerefMut for Transaction<D> {
    fn deref_mut(&mut self) -> &mut D::Connection {
        &mut self.connection
    }
}

impl<D: Database> Drop for Transaction<D> {
    fn drop(&mut self) {
        if !self.ended {
            self.connection.close_on_drop();
        }
    }
}

/// Wraps an error of this crate for a function whose other errors are sqlx's. [`failed`] unwraps it.
#[cfg(feature = "sqlite")]
pub(super) fn own_error(error: Error) -> sqlx::Error {
    sqlx::Error::AnyDriverError(Box::new(error))
}

/// Converts an error of sqlx. The text of the result names no host, user or password.
pub(super) fn failed(error: sqlx::Error) -> Error {
    use sqlx::Error::{
        AnyDriverError, Configuration, Database, Io, PoolClosed, PoolTimedOut, Protocol, Tls,
        WorkerCrashed,
    };
    let code = match &error {
        Database(error) => error.code(),
        _ => None,
    };
    let temporary = match &error {
        Io(_) | Tls(_) | PoolTimedOut | PoolClosed | WorkerCrashed | Protocol(_) => true,
        Database(_) => code.as_deref().is_some_and(passes),
        _ => false,
    };
    let kind = match code.as_deref().is_some_and(refuses) {
        true => ErrorKind::Config,
        false => ErrorKind::Store,
    };
    let store = |message: String| {
        let error = Error::new(kind, message);
        match temporary {
            true => error.with_persistence(Persistence::Temporary),
            false => error,
        }
    };
    match error {
        AnyDriverError(error) => match error.downcast::<Error>() {
            Ok(error) => *error,
            Err(error) => store(error.to_string()),
        },
        // The error may quote the URL, which contains the password.
        Configuration(_) => Error::new(ErrorKind::Config, "the URL of the database cannot be used"),
        Database(error) => {
            let code = error.code().map(|code| code.into_owned());
            let failed = store(error.message().to_owned());
            match code {
                Some(code) => failed.with_code(code),
                None => failed,
            }
        }
        other => store(other.to_string()),
    }
}

/// Returns whether an error with this code is transient. The codes of SQLite are plain numbers, those of Postgres have five
/// characters.
fn passes(code: &str) -> bool {
    match code.parse::<u32>() {
        // SQLITE_BUSY, LOCKED, NOMEM, IOERR, FULL, CANTOPEN and PROTOCOL with their extended codes. A full disk is
        // reported as IOERR if it affects the shared memory or a quota, and CANTOPEN as well when the process has no
        // file descriptor left.
        Ok(number) if code.len() < 5 => matches!(number & 0xff, 5 | 6 | 7 | 10 | 13 | 14 | 15),
        // Connection, rollback of a transaction, resources, locks, intervention of an operator, the system; a server
        // that has become a read-only replica; a client that was idle inside a transaction for too long.
        _ => {
            matches!(code, "25006" | "25P03")
                || ["08", "40", "53", "55", "57", "58"]
                    .iter()
                    .any(|class| code.starts_with(class))
        }
    }
}

/// Returns whether an error with this code is caused by the data: the same data will be refused again, other data may be
/// accepted.
fn refuses(code: &str) -> bool {
    match code.parse::<u32>() {
        // SQLITE_TOOBIG, CONSTRAINT, MISMATCH.
        Ok(number) if code.len() < 5 => matches!(number & 0xff, 18..=20),
        // Data exceptions, constraints, program limits (an index row or a statement that is too large).
        _ => ["22", "23", "54"]
            .iter()
            .any(|class| code.starts_with(class)),
    }
}

/// Converts a counter for SQL.
pub(super) fn to_sql(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// Converts a counter from SQL.
pub(super) fn from_sql(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

/// Converts a small number for SQL, where its column is a signed integer of 32 bits.
pub(super) fn small(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// Converts a small number from SQL. Earlier releases did not bound it by [`small`], and SQLite kept the large value.
pub(super) fn from_small(number: impl Into<i64>) -> u32 {
    u32::try_from(number.into().max(0)).unwrap_or(u32::MAX)
}

/// Reads a stored error. A text that cannot be read becomes the message of an error.
pub(super) fn read_error(text: Option<String>) -> Option<Error> {
    let text = text?;
    let read = serde_json::from_str(&text);
    Some(read.unwrap_or_else(|_| Error::new(ErrorKind::Other, text)))
}

/// The part of a stored error that says that a lease was lost. No other error contains it, because quotes within a text
/// are escaped.
macro_rules! kind_of_lost_lease {
    () => {
        r#""kind":"lease_lost""#
    };
}
pub(super) use kind_of_lost_lease;

pub(super) fn write_error(error: &Error) -> String {
    // An error is a plain record, whose serialisation does not fail.
    serde_json::to_string(error).unwrap_or_default()
}

/// The columns of an item, in the order in which [`decode`] reads them.
macro_rules! item_columns {
    () => {
        "id, run_id, seq, key, tenant, status, epoch, attempt, max_attempts, input, output, error, \
         priority, handling"
    };
}
pub(super) use item_columns;

/// A query with the columns that [`decode`] reads, in its order, of the rows that `$rest` selects.
macro_rules! select {
    (runs $rest:literal) => {
        concat!(
            "SELECT id, tenant, name, status, spec, total, completed, failed, cancelled, log_seq, \
             error, created_at, ended_at FROM runs ",
            $rest
        )
    };
    (items $rest:literal) => {
        concat!(
            "SELECT ",
            $crate::store::sql::item_columns!(),
            " FROM items ",
            $rest
        )
    };
    (log $rest:literal) => {
        concat!("SELECT seq, kind, data, at FROM run_log ", $rest)
    };
    (generations $rest:literal) => {
        concat!(
            "SELECT memo_key, request_digest, body, input_tokens, output_tokens, \
             cached_input_tokens, reasoning_tokens, cost_micros FROM generations ",
            $rest
        )
    };
}
pub(super) use select;

/// Defines functions that read records from rows of type `$row`. `$small` is the type of columns with small numbers.
macro_rules! decode {
    ($row:ty, $small:ty) => {
        fn wrong_word(error: $crate::error::Error) -> sqlx::Error {
            sqlx::Error::Decode(Box::new(error))
        }

        pub(super) fn run(row: &$row) -> sqlx::Result<$crate::store::model::Run> {
            use sqlx::Row as _;
            use $crate::store::sql::{from_sql, read_error};
            use $crate::store::transaction::at_millis;
            Ok($crate::store::model::Run {
                id: $crate::store::model::RunId(row.try_get(0)?),
                tenant: row.try_get(1)?,
                name: row.try_get(2)?,
                status: row.try_get::<&str, _>(3)?.parse().map_err(wrong_word)?,
                spec: row.try_get(4)?,
                total: from_sql(row.try_get(5)?),
                completed: from_sql(row.try_get(6)?),
                failed: from_sql(row.try_get(7)?),
                cancelled: from_sql(row.try_get(8)?),
                log_seq: from_sql(row.try_get(9)?),
                error: read_error(row.try_get(10)?),
                created_at: at_millis(row.try_get(11)?),
                ended_at: row.try_get::<Option<i64>, _>(12)?.map(at_millis),
            })
        }

        /// The runs that the filter selects.
        pub(super) fn selected_runs(
            rows: &[$row],
            filter: &$crate::store::RunFilter,
            limit: u32,
        ) -> $crate::error::Result<Vec<$crate::store::Run>> {
            let mut runs = $crate::store::sql::each(rows, run)?;
            runs.retain(|run| filter.selects(run));
            runs.truncate(limit as usize);
            Ok(runs)
        }

        pub(super) fn hold(row: &$row) -> sqlx::Result<$crate::store::Hold> {
            use sqlx::Row as _;
            Ok($crate::store::Hold {
                item: $crate::store::ItemId(row.try_get(0)?),
                epoch: row.try_get(1)?,
            })
        }

        /// An item and its priority.
        pub(super) fn item(row: &$row) -> sqlx::Result<($crate::store::model::Item, i32)> {
            use sqlx::Row as _;
            use $crate::store::sql::{from_small, from_sql, read_error};
            let item = $crate::store::model::Item {
                id: $crate::store::model::ItemId(row.try_get(0)?),
                run: $crate::store::model::RunId(row.try_get(1)?),
                seq: from_sql(row.try_get(2)?),
                key: row.try_get(3)?,
                tenant: row.try_get(4)?,
                status: row.try_get::<&str, _>(5)?.parse().map_err(wrong_word)?,
                epoch: row.try_get(6)?,
                attempt: from_small(row.try_get::<$small, _>(7)?),
                max_attempts: from_small(row.try_get::<$small, _>(8)?),
                input: row.try_get(9)?,
                output: row.try_get(10)?,
                error: read_error(row.try_get(11)?),
                handling: $crate::store::model::Handling::from_i32(row.try_get(13)?),
            };
            Ok((item, row.try_get(12)?))
        }

        pub(super) fn log_entry(row: &$row) -> sqlx::Result<$crate::store::model::LogEntry> {
            use sqlx::Row as _;
            Ok($crate::store::model::LogEntry {
                seq: $crate::store::sql::from_sql(row.try_get(0)?),
                kind: row.try_get(1)?,
                data: row.try_get(2)?,
                at: $crate::store::transaction::at_millis(row.try_get(3)?),
            })
        }

        /// A generation, given the tenant in whose name it was looked up.
        pub(super) fn generation(
            row: &$row,
            tenant: &str,
        ) -> sqlx::Result<$crate::store::model::Generation> {
            use sqlx::Row as _;
            use $crate::store::sql::{bytes, from_sql};
            let mut usage =
                $crate::request::Usage::new(from_sql(row.try_get(3)?), from_sql(row.try_get(4)?));
            usage.cached_input_tokens = from_sql(row.try_get(5)?);
            usage.reasoning_tokens = from_sql(row.try_get(6)?);
            Ok($crate::store::model::Generation {
                tenant: tenant.to_owned(),
                key: $crate::store::model::MemoKey::new(bytes(row.try_get(0)?)?),
                request: $crate::request::RequestDigest::from_bytes(bytes(row.try_get(1)?)?),
                body: row.try_get(2)?,
                usage,
                cost_micros: row.try_get::<Option<i64>, _>(7)?.map(from_sql),
            })
        }

        pub(super) fn intent(row: &$row) -> sqlx::Result<$crate::store::model::Intent> {
            use sqlx::Row as _;
            Ok($crate::store::model::Intent {
                item: $crate::store::model::ItemId(row.try_get(0)?),
                attempt: $crate::store::sql::from_small(row.try_get::<$small, _>(1)?),
                key: $crate::store::model::MemoKey::new($crate::store::sql::bytes(
                    row.try_get(2)?,
                )?),
                provider_ref: row.try_get(3)?,
            })
        }
    };
}
pub(super) use decode;

pub(super) fn bytes(bytes: &[u8]) -> sqlx::Result<[u8; 32]> {
    bytes
        .try_into()
        .map_err(|_| sqlx::Error::Decode("not 32 bytes".into()))
}

/// Reads a record from each row.
pub(super) fn each<R, T>(rows: &[R], read: impl FnMut(&R) -> sqlx::Result<T>) -> Result<Vec<T>> {
    rows.iter()
        .map(read)
        .collect::<sqlx::Result<_>>()
        .map_err(failed)
}

/// The tenant that got the last item from a handle. The next claim begins after it.
#[derive(Default)]
pub(super) struct Cursor(Mutex<String>);

impl Cursor {
    pub(super) fn get(&self) -> String {
        self.lock().clone()
    }

    /// Sorts the items of a claim that began after `cursor` in the order in which they were dealt, and moves the cursor to
    /// the last one.
    pub(super) fn deal(
        &self,
        items: Vec<(super::model::Item, i32)>,
        cursor: &str,
    ) -> Vec<super::model::Item> {
        let items = dealt(items, cursor);
        if let Some(last) = items.last() {
            self.lock().clone_from(&last.tenant);
        }
        items
    }

    fn lock(&self) -> MutexGuard<'_, String> {
        self.0.lock()
    }
}

/// Sorts items in the order in which they were dealt: by rank within their tenant, then by tenant, beginning after
/// `cursor`. See [`Queue::claim`](super::Queue::claim).
fn dealt(mut items: Vec<(super::model::Item, i32)>, cursor: &str) -> Vec<super::model::Item> {
    items.sort_by(|(a, a_priority), (b, b_priority)| {
        let turn = |tenant: &str| tenant <= cursor;
        (turn(&a.tenant), &a.tenant, a_priority, a.id).cmp(&(
            turn(&b.tenant),
            &b.tenant,
            b_priority,
            b.id,
        ))
    });
    let mut ranked = Vec::with_capacity(items.len());
    let mut rank = 0;
    for (place, (item, _)) in items.into_iter().enumerate() {
        let same =
            ranked
                .last()
                .is_some_and(|(_, _, last): &(usize, usize, super::model::Item)| {
                    last.tenant == item.tenant
                });
        rank = if same { rank + 1 } else { 0 };
        ranked.push((rank, place, item));
    }
    ranked.sort_by_key(|(rank, place, _)| (*rank, *place));
    ranked.into_iter().map(|(_, _, item)| item).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_error_of_a_lost_lease_is_recognised_by_its_kind() {
        let lost = Error::new(ErrorKind::LeaseLost, "no").with_code("x");
        assert!(write_error(&lost).contains(kind_of_lost_lease!()));
        let other = Error::new(ErrorKind::Other, kind_of_lost_lease!());
        assert!(!write_error(&other).contains(kind_of_lost_lease!()));
    }
}
