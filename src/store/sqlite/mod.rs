//! [`Sqlite`]: the store in one SQLite file.

#[cfg(test)]
mod plans_tests;
mod queue;
mod schema;
mod statements;
#[cfg(test)]
mod transactions_tests;
mod write;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use sqlx::sqlite::{SqliteConnectOptions, SqlitePool, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{ConnectOptions as _, Connection as _, Row as _, Sqlite as Db};

use super::Store;
use super::detached::detached_calls;
use super::inputs::{Commit, IntentFilter, NewRun, RunFilter};
use super::model::{
    Committed, Created, Generation, Intent, Item, LogEntry, MemoKey, Purged, Run, RunId,
};
use super::sql::{Cursor, Transaction, each, failed, own_error, retrying, small, to_sql};
use super::transaction::millis;
use crate::error::{Error, ErrorKind, Persistence, Result};

/// The kind of failure that a commit survives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Durability {
    /// Committed data survives the loss of power: each commit waits for the disk (`synchronous = FULL`). Batches make
    /// this cheap.
    #[default]
    Power,
    /// Committed data survives any end of the process. The loss of power can undo the latest commits, but never a part of
    /// one (`synchronous = NORMAL`).
    Process,
}

/// A store in one SQLite file, for any number of processes on one machine: the embedded default for durable work. SQLite
/// itself is built in.
///
/// Writers take turns, also between processes. Readers do not wait and block no writer (write-ahead log). The file
/// must be on a local disk, because a write-ahead log does not work over a network.
///
/// The file must stay in its place while the store is open. If it is removed or replaced, every later call fails with a
/// permanent [`ErrorKind::Store`], because writes into a removed file would be lost with the process.
///
/// On a full disk calls fail with a temporary error. They succeed again when there is space.
///
/// ```no_run
/// # async fn example() -> throughline::Result<()> {
/// let store = throughline::store::Sqlite::open("runs.db").await?;
/// # Ok(()) }
/// ```
pub struct Sqlite(Arc<Inner>);

struct Inner {
    /// The absolute path, which still names the file after the process has changed its directory.
    path: PathBuf,
    /// The identity of the file that was opened.
    file: FileId,
    busy_timeout: Duration,
    /// One connection: SQLite has one writer at a time, and the pool serves writers in order of arrival.
    writer: SqlitePool,
    readers: SqlitePool,
    cursor: Cursor,
    round_trips: AtomicU64,
}

/// A builder for [`Sqlite`].
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until `open`"]
pub struct SqliteBuilder {
    path: PathBuf,
    durability: Durability,
    busy_timeout: Duration,
}

impl SqliteBuilder {
    /// Sets the kind of failure that a commit survives; the loss of power unless set.
    pub fn durability(mut self, durability: Durability) -> Self {
        self.durability = durability;
        self
    }

    /// Sets how long a call waits for a write of another process before it fails with a temporary error; 30 s unless
    /// set. A call that is queued behind others of this process waits up to four times as long.
    pub fn busy_timeout(mut self, timeout: Duration) -> Self {
        // SQLite counts it in milliseconds in 32 bits.
        self.busy_timeout = timeout.min(Duration::from_millis(i32::MAX as u64));
        self
    }

    /// Opens the file, or creates it.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if the path is empty, `:memory:` or a URL. [`ErrorKind::Store`] if the file cannot be
    /// opened, is a database of another program, or was written by a newer release of this library.
    pub async fn open(self) -> Result<Sqlite> {
        let path = absolute(&self.path)?;
        let named = |error: Error| {
            let message = format!("{}: {}", path.display(), error.message());
            Error::new(ErrorKind::Store, message).with_persistence(error.persistence())
        };
        let is_busy = while_busy(self.busy_timeout);
        let options = SqliteConnectOptions::new()
            .filename(&path)
            .busy_timeout(self.busy_timeout)
            .foreign_keys(true)
            // All rows of a claim at once: with the default of 50 the threads wait for each other.
            .row_buffer_size(1024)
            .disable_statement_logging()
            .synchronous(match self.durability {
                Durability::Power => SqliteSynchronous::Full,
                Durability::Process => SqliteSynchronous::Normal,
            });
        let making = options.clone().create_if_missing(true);
        // A file that cannot be opened is mostly a transient lack of resources, unless its folder does not exist.
        let first = retrying!(&is_busy, making.connect()).map_err(named);
        let folder = path.parent().is_some_and(Path::is_dir);
        let mut first = first.map_err(|error| match error.is_temporary() && !folder {
            true => error.with_persistence(Persistence::Permanent),
            false => error,
        })?;
        retrying!(&is_busy, write_ahead(&mut first)).map_err(named)?;
        schema::migrate(&mut first, &path).await?;
        let file = FileId::of(&path).map_err(sqlx::Error::Io);
        let file = file.map_err(failed).map_err(named)?;
        first.close().await.map_err(failed).map_err(named)?;

        // Connections stay open: closing the last one removes the write-ahead log.
        let pool = |max| {
            SqlitePoolOptions::new()
                .min_connections(1)
                .max_connections(max)
                .idle_timeout(None)
                .max_lifetime(None)
                .test_before_acquire(false)
                .acquire_timeout(self.busy_timeout.saturating_mul(4))
        };
        let readers = options.clone().pragma("query_only", "on");
        // A cache of 32 MiB, and a checkpoint every 16 MiB instead of 4, so that a page that changes again and again is
        // written into the file once.
        let writer = options
            .pragma("cache_size", "-32768")
            .pragma("wal_autocheckpoint", "4096");
        Ok(Sqlite(Arc::new(Inner {
            writer: retrying!(&is_busy, pool(1).connect_with(writer.clone())).map_err(named)?,
            readers: retrying!(&is_busy, pool(4).connect_with(readers.clone())).map_err(named)?,
            path,
            file,
            busy_timeout: self.busy_timeout,
            cursor: Cursor::default(),
            round_trips: AtomicU64::new(0),
        })))
    }
}

impl Sqlite {
    /// Opens the file, or creates it, with the defaults of [`builder`](Self::builder).
    ///
    /// # Errors
    /// Those of [`SqliteBuilder::open`].
    pub async fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::builder(path).open().await
    }

    /// Returns a builder for a store in this file.
    pub fn builder(path: impl AsRef<Path>) -> SqliteBuilder {
        SqliteBuilder {
            path: path.as_ref().to_owned(),
            durability: Durability::default(),
            busy_timeout: Duration::from_secs(30),
        }
    }

    /// Waits for calls in progress and closes the file. Dropping the store also closes it, some time later.
    pub async fn close(&self) {
        self.0.readers.close().await;
        self.0.writer.close().await;
    }

    /// Returns the number of transactions and single reads since the store was opened: one for each call, whatever the
    /// number of rows, and more only if another process held a lock.
    pub fn round_trips(&self) -> u64 {
        self.0.round_trips.load(Ordering::Relaxed)
    }
}

detached_calls!(Sqlite);

impl Inner {
    /// Returns the connections for single reads.
    fn reader(&self) -> Result<&SqlitePool> {
        self.check_file().map_err(failed)?;
        self.round_trips.fetch_add(1, Ordering::Relaxed);
        Ok(&self.readers)
    }

    /// Begins a transaction with the write lock. Taking the lock later could fail.
    async fn begin(&self) -> sqlx::Result<Transaction<Db>> {
        self.check_file()?;
        self.round_trips.fetch_add(1, Ordering::Relaxed);
        Transaction::begin(&self.writer, "BEGIN IMMEDIATE").await
    }

    /// Fails if the path no longer names the open file, because writes into a file without a name are lost with the
    /// process. Costs one `stat`, about a microsecond.
    fn check_file(&self) -> sqlx::Result<()> {
        let what = match FileId::of(&self.path) {
            Ok(file) if file == self.file => return Ok(()),
            Ok(_) => "another file was put in its place",
            Err(error) if error.kind() == io::ErrorKind::NotFound => "the file was removed",
            Err(error) => return Err(sqlx::Error::Io(error)),
        };
        let message = format!(
            "{}: {what} while the store was open, so writes would be lost: open the store again",
            self.path.display()
        );
        Err(own_error(Error::new(ErrorKind::Store, message)))
    }

    /// Returns a condition for retries: another process holds a lock, and the busy timeout has not passed.
    fn is_busy(&self) -> impl Fn(&sqlx::Error, u32) -> bool + use<> {
        while_busy(self.busy_timeout)
    }
}

/// The identity of a file, which differs for another file at the same path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    #[cfg(unix)]
    fn of(path: &Path) -> io::Result<Self> {
        use std::os::unix::fs::MetadataExt as _;
        let file = std::fs::metadata(path)?;
        Ok(Self {
            device: file.dev(),
            inode: file.ino(),
        })
    }

    /// On other systems an open file cannot be removed, and only its absence is detected.
    #[cfg(not(unix))]
    fn of(path: &Path) -> io::Result<Self> {
        std::fs::metadata(path)?;
        Ok(Self {
            device: 0,
            inode: 0,
        })
    }
}

/// Returns the absolute path. Refuses names that SQLite does not treat as paths.
fn absolute(path: &Path) -> Result<PathBuf> {
    let refuse = |why: &str| {
        let message = format!(
            "{:?} is not a path of a database file: {why}",
            path.display()
        );
        Err(Error::new(ErrorKind::Config, message))
    };
    let text = path.to_string_lossy();
    if text.is_empty() || text == ":memory:" {
        return refuse("each connection would have an empty database of its own; use `Memory`");
    }
    if ["file:", "sqlite:"].iter().any(|url| text.starts_with(url)) {
        return refuse("give the path itself, without a scheme");
    }
    match std::path::absolute(path) {
        Ok(path) => Ok(path),
        Err(error) => refuse(&error.to_string()),
    }
}

impl fmt::Debug for Sqlite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sqlite")
            .field("path", &self.0.path)
            .finish_non_exhaustive()
    }
}

/// Returns the present in milliseconds since 1970.
fn now() -> i64 {
    millis(SystemTime::now())
}

/// Returns a condition for retries: the operation failed because of a lock, and less than `timeout` has passed.
fn while_busy(timeout: Duration) -> impl Fn(&sqlx::Error, u32) -> bool + use<> {
    let until = Instant::now() + timeout;
    move |error, _| {
        let code = error.as_database_error().and_then(|error| error.code());
        let number = code.and_then(|code| code.parse::<u32>().ok());
        // SQLITE_BUSY and SQLITE_LOCKED with their extended codes. SQLite itself waits for most locks, so these errors
        // mostly come at the end of that wait.
        number.is_some_and(|number| matches!(number & 0xff, 5 | 6)) && Instant::now() < until
    }
}

/// Sets the write-ahead log, which lets readers and the writer work side by side. The mode is stored in the file.
async fn write_ahead(connection: &mut sqlx::SqliteConnection) -> sqlx::Result<()> {
    let mode = sqlx::query_scalar::<_, String>("PRAGMA journal_mode");
    if mode.fetch_one(&mut *connection).await? != "wal" {
        let set = sqlx::query("PRAGMA journal_mode = wal");
        set.fetch_one(connection).await?;
    }
    Ok(())
}

#[async_trait]
impl Store for Inner {
    fn name(&self) -> &'static str {
        "sqlite"
    }

    async fn create_run(&self, run: NewRun) -> Result<Created> {
        run.check()?;
        retrying!(self.is_busy(), self.write_run(&run))
    }

    async fn runs(&self, filter: RunFilter, limit: u32) -> Result<Vec<Run>> {
        let reader = self.reader()?;
        if let Some(id) = filter.id {
            let found = retrying!(
                self.is_busy(),
                sqlx::query(statements::RUN_BY_ID)
                    .bind(id.0)
                    .fetch_all(reader)
            )?;
            return statements::selected_runs(&found, &filter, limit);
        }
        let sql = match (&filter.tenant, filter.status) {
            (Some(_), _) => statements::RUNS_OF_TENANT,
            (None, Some(_)) => statements::RUNS_OF_STATUS,
            (None, None) => statements::RUNS,
        };
        let found = retrying!(
            self.is_busy(),
            sqlx::query(sql)
                .bind(filter.before.map_or(i64::MAX, |run| run.0))
                .bind(limit)
                .bind(&filter.tenant)
                .bind(filter.status.map(|status| status.as_str()))
                .fetch_all(reader)
        )?;
        each(&found, statements::run)
    }

    async fn items(&self, run: RunId, from: u64, limit: u32) -> Result<Vec<Item>> {
        let reader = self.reader()?;
        let found = retrying!(
            self.is_busy(),
            sqlx::query(statements::ITEMS)
                .bind(run.0)
                .bind(to_sql(from))
                .bind(limit)
                .fetch_all(reader)
        )?;
        each(&found, |row| Ok(statements::item(row)?.0))
    }

    async fn log(&self, run: RunId, after: u64, limit: u32) -> Result<Vec<LogEntry>> {
        let reader = self.reader()?;
        let found = retrying!(
            self.is_busy(),
            sqlx::query(statements::LOG)
                .bind(run.0)
                .bind(to_sql(after))
                .bind(limit)
                .fetch_all(reader)
        )?;
        each(&found, statements::log_entry)
    }

    async fn generations(&self, tenant: &str, keys: &[MemoKey]) -> Result<Vec<Generation>> {
        let reader = self.reader()?;
        let keys: Vec<_> = keys.iter().map(MemoKey::to_string).collect();
        let keys = serde_json::to_string(&keys)?;
        let found = retrying!(
            self.is_busy(),
            sqlx::query(statements::GENERATIONS)
                .bind(tenant)
                .bind(&keys)
                .fetch_all(reader)
        )?;
        each(&found, |row| statements::generation(row, tenant))
    }

    async fn commit(&self, commit: Commit) -> Result<Committed> {
        commit.check()?;
        if commit.is_empty() {
            return Ok(Committed::default());
        }
        retrying!(self.is_busy(), self.write_commit(&commit))
    }

    async fn intents(&self, filter: IntentFilter, limit: u32) -> Result<Vec<Intent>> {
        let reader = self.reader()?;
        let sql = match filter.items {
            Some(_) => statements::INTENTS_OF_ITEMS,
            None => statements::INTENTS,
        };
        let items = serde_json::to_string(&filter.items)?;
        let after = filter.after;
        let found = retrying!(
            self.is_busy(),
            sqlx::query(sql)
                .bind(after.map_or(0, |name| name.item.0))
                .bind(after.map_or(0, |name| small(name.attempt)))
                .bind(after.map_or_else(Vec::new, |name| name.key.as_bytes().to_vec()))
                .bind(limit)
                .bind(now())
                .bind(filter.unheld)
                .bind(&items)
                .fetch_all(reader)
        )?;
        each(&found, statements::intent)
    }

    async fn cancel(&self, run: RunId) -> Result<u64> {
        retrying!(self.is_busy(), self.write_cancel(run))
    }

    async fn retry_failed(&self, run: RunId) -> Result<u64> {
        retrying!(self.is_busy(), self.write_retry(run))
    }

    async fn purge(&self, older_than: Duration, limit: u32) -> Result<Purged> {
        let before = now() - super::transaction::duration_millis(older_than);
        let write = async || {
            let mut transaction = self.begin().await?;
            let mut removed = [0; 2];
            let purges = [statements::PURGE_RUNS, statements::PURGE_GENERATIONS];
            for (removed, sql) in removed.iter_mut().zip(purges) {
                let purge = sqlx::query(sql).bind(before).bind(limit);
                *removed = purge.execute(&mut *transaction).await?.rows_affected();
            }
            transaction.commit().await?;
            Ok(Purged {
                runs: removed[0],
                generations: removed[1],
            })
        };
        retrying!(self.is_busy(), write())
    }
}

/// Returns the number in the first column.
fn first(row: &sqlx::sqlite::SqliteRow) -> sqlx::Result<i64> {
    row.try_get(0)
}
