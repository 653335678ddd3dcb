//! [`Postgres`]: the store in a Postgres database.

mod queue;
mod schema;
mod statements;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use sqlx::postgres::{PgConnectOptions, PgExecutor, PgPool, PgPoolOptions};
use sqlx::{ConnectOptions as _, Connection as _, Postgres as Db, Row as _};

use super::Store;
use super::detached::detached_calls;
use super::inputs::{Commit, IntentFilter, NewItem, NewRun, RunFilter};
use super::model::{
    Committed, Created, Generation, Intent, Item, ItemId, LogEntry, MemoKey, Purged, Run, RunId,
};
use super::sql::{
    Cursor, Transaction, each, failed, from_sql, retrying, small, to_sql, write_error,
};
use super::transaction::duration_millis;
use crate::error::{Error, ErrorKind, Result};

/// Items in one statement. A larger message costs as much as it saves.
const ROWS: usize = 10_000;

/// Ends the session of a client that stops in the middle of a transaction, such as a suspended process, because other
/// clients wait for its locks.
const IDLE: (&str, &str) = ("idle_in_transaction_session_timeout", "30s");

/// The upper bound of a pool, which reserves memory for each connection from the start. No server accepts as many.
const MOST_CONNECTIONS: u32 = 10_000;

/// A store in a Postgres database (version 12 or newer), for workers on any number of machines. Its tables have a schema of
/// their own.
///
/// The connection is encrypted if the server supports it. `?sslmode=verify-full` in the URL requires encryption and checks
/// the certificate of the server. A pooler in between must assign one connection to a session.
///
/// ```no_run
/// # async fn example() -> throughline::Result<()> {
/// let store = throughline::store::Postgres::connect("postgres://jobs@db.example/jobs").await?;
/// # Ok(()) }
/// ```
pub struct Postgres(Arc<Inner>);

struct Inner {
    schema: String,
    pool: PgPool,
    cursor: Cursor,
    round_trips: AtomicU64,
}

/// A builder for [`Postgres`].
#[derive(Clone)]
#[must_use = "a builder does nothing until `connect`"]
pub struct PostgresBuilder {
    url: String,
    schema: String,
    connections: u32,
}

impl PostgresBuilder {
    /// Sets the schema of the tables; `throughline` unless set. It is created if it does not exist.
    pub fn schema(mut self, schema: impl Into<String>) -> Self {
        self.schema = schema.into();
        self
    }

    /// Sets the largest number of connections of this store; 8 unless set, at most 10,000.
    pub fn connections(mut self, connections: u32) -> Self {
        self.connections = connections;
        self
    }

    /// Connects, and creates the tables or migrates them to the version of this release.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for a URL or a schema name that cannot be used; [`ErrorKind::Store`] if the
    /// server cannot be reached (temporary) or refuses the connection, or the tables are of a newer release.
    pub async fn connect(self) -> Result<Postgres> {
        let first = self.schema.bytes().next();
        let plain = |c: u8| c == b'_' || c.is_ascii_lowercase() || c.is_ascii_digit();
        if !self.schema.bytes().all(plain)
            || first.is_none_or(|c| c.is_ascii_digit())
            || self.schema.len() > 60
        {
            let message = format!(
                "a schema is named with a-z, 0-9 and _, not {:?}",
                self.schema
            );
            return Err(Error::new(ErrorKind::Config, message));
        }
        let mut options: PgConnectOptions = self.url.parse().map_err(failed)?;
        if options.get_application_name().is_none() {
            options = options.application_name("throughline");
        }
        let options = options
            // The planner overestimates the cost of these short statements: compiling one takes 50 ms, running it 2 ms.
            .options([("search_path", &*self.schema), ("jit", "off"), IDLE])
            .disable_statement_logging();
        // Without the pool, which would retry until its timeout before it reports an error.
        let mut first = options.connect().await.map_err(failed)?;
        schema::migrate(&mut first, &self.schema).await?;
        first.close().await.map_err(failed)?;
        let pool = PgPoolOptions::new()
            .max_connections(self.connections.clamp(1, MOST_CONNECTIONS))
            .acquire_timeout(Duration::from_secs(30))
            // A ping before each statement would double the round trips. A connection that was idle may have been ended
            // by the server or by a firewall.
            .test_before_acquire(false)
            .before_acquire(|connection, meta| {
                Box::pin(async move {
                    let idle = meta.idle_for > Duration::from_secs(5);
                    Ok(!idle || connection.ping().await.is_ok())
                })
            })
            .connect_lazy_with(options);
        Ok(Postgres(Arc::new(Inner {
            schema: self.schema,
            pool,
            cursor: Cursor::default(),
            round_trips: AtomicU64::new(0),
        })))
    }
}

/// Writes all rows of a commit except the new intents, in one statement.
async fn write_rows(commit: &Commit, executor: impl PgExecutor<'_>) -> sqlx::Result<Committed> {
    let Commit {
        generations,
        settlements,
        intents: _,
        ended_intents,
        notes,
    } = commit;
    let usage = |of: fn(&Generation) -> u64| -> Vec<i64> {
        generations.iter().map(|g| to_sql(of(g))).collect()
    };
    let outputs = settlements.iter().map(|s| s.result.as_deref().ok());
    let errors = settlements
        .iter()
        .map(|s| s.result.as_ref().err().map(write_error));
    let row = sqlx::query(statements::COMMIT)
        .bind(
            settlements
                .iter()
                .map(|s| s.hold.item.0)
                .collect::<Vec<_>>(),
        )
        .bind(settlements.iter().map(|s| s.hold.epoch).collect::<Vec<_>>())
        .bind(outputs.collect::<Vec<_>>())
        .bind(errors.collect::<Vec<_>>())
        .bind(generations.iter().map(|g| &*g.tenant).collect::<Vec<_>>())
        .bind(
            generations
                .iter()
                .map(|g| &g.key.as_bytes()[..])
                .collect::<Vec<_>>(),
        )
        .bind(
            generations
                .iter()
                .map(|g| &g.request.as_bytes()[..])
                .collect::<Vec<_>>(),
        )
        .bind(generations.iter().map(|g| &*g.body).collect::<Vec<_>>())
        .bind(usage(|g| g.usage.input_tokens))
        .bind(usage(|g| g.usage.output_tokens))
        .bind(usage(|g| g.usage.cached_input_tokens))
        .bind(usage(|g| g.usage.reasoning_tokens))
        .bind(
            generations
                .iter()
                .map(|g| g.cost_micros.map(to_sql))
                .collect::<Vec<_>>(),
        )
        .bind(
            ended_intents
                .iter()
                .map(|name| name.item.0)
                .collect::<Vec<_>>(),
        )
        .bind(
            ended_intents
                .iter()
                .map(|name| small(name.attempt))
                .collect::<Vec<_>>(),
        )
        .bind(
            ended_intents
                .iter()
                .map(|name| &name.key.as_bytes()[..])
                .collect::<Vec<_>>(),
        )
        .bind(notes.iter().map(|note| note.run.0).collect::<Vec<_>>())
        .bind(notes.iter().map(|note| &*note.kind).collect::<Vec<_>>())
        .bind(notes.iter().map(|note| &*note.data).collect::<Vec<_>>())
        .fetch_one(executor)
        .await?;
    Ok(Committed {
        generations: from_sql(row.try_get(0)?),
        items: row
            .try_get::<Vec<i64>, _>(1)?
            .into_iter()
            .map(ItemId)
            .collect(),
    })
}

async fn write_intents(intents: &[Intent], executor: impl PgExecutor<'_>) -> sqlx::Result<()> {
    // One statement cannot change a row twice: the last intent of a name counts.
    let by_name = intents.iter().map(|intent| (intent.name(), intent));
    let intents: BTreeMap<_, _> = by_name.collect();
    let names = || intents.keys();
    let put = sqlx::query(statements::PUT_INTENTS)
        .bind(names().map(|name| name.item.0).collect::<Vec<_>>())
        .bind(names().map(|name| small(name.attempt)).collect::<Vec<_>>())
        .bind(
            names()
                .map(|name| &name.key.as_bytes()[..])
                .collect::<Vec<_>>(),
        )
        .bind(
            intents
                .values()
                .map(|intent| intent.provider_ref.as_deref())
                .collect::<Vec<_>>(),
        );
    put.execute(executor).await.map(drop)
}

impl fmt::Debug for PostgresBuilder {
    /// Leaves out the URL, which contains the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresBuilder")
            .field("schema", &self.schema)
            .field("connections", &self.connections)
            .finish_non_exhaustive()
    }
}

impl Postgres {
    /// Connects to `postgres://user:password@host:port/database` with the defaults of
    /// [`builder`](Self::builder).
    ///
    /// # Errors
    /// Those of [`PostgresBuilder::connect`].
    pub async fn connect(url: impl Into<String>) -> Result<Self> {
        Self::builder(url).connect().await
    }

    /// Returns a builder for a store at this URL. The connections have the application name `throughline`, unless the URL sets
    /// one.
    pub fn builder(url: impl Into<String>) -> PostgresBuilder {
        PostgresBuilder {
            url: url.into(),
            schema: "throughline".to_owned(),
            connections: 8,
        }
    }

    /// Waits for calls in progress and closes all connections.
    pub async fn close(&self) {
        self.0.pool.close().await;
    }

    /// Returns the number of statements that were sent: one for each batch, two or three in transactions that need
    /// several, and more only after conflicts with other workers. The begin and the end of a transaction and the pings of idle
    /// connections are not counted.
    pub fn round_trips(&self) -> u64 {
        self.0.round_trips.load(Ordering::Relaxed)
    }
}

detached_calls!(Postgres);

impl Inner {
    /// Returns the pool for one statement, which it counts.
    fn pool(&self) -> &PgPool {
        self.round_trips.fetch_add(1, Ordering::Relaxed);
        &self.pool
    }

    async fn begin(&self) -> sqlx::Result<Transaction<Db>> {
        Transaction::begin(self.pool(), "BEGIN").await
    }

    async fn write_run(&self, run: &NewRun) -> sqlx::Result<Option<Created>> {
        let keys = |items: &[NewItem]| {
            items
                .iter()
                .map(|item| item.key.clone())
                .collect::<Vec<_>>()
        };
        let inputs = |items: &[NewItem]| {
            items
                .iter()
                .map(|item| item.input.clone())
                .collect::<Vec<_>>()
        };
        let chunks: Vec<_> = run.items.chunks(ROWS).collect();
        let head = chunks.first().copied().unwrap_or_default();
        let create = sqlx::query_scalar::<_, i64>(statements::CREATE_RUN)
            .bind(&run.tenant)
            .bind(&run.name)
            .bind(to_sql(run.items.len() as u64))
            .bind(&run.spec)
            .bind(&run.idempotency_key)
            .bind(run.priority)
            .bind(small(run.max_attempts))
            .bind(keys(head))
            .bind(inputs(head));
        if chunks.len() < 2 {
            let id = create.fetch_optional(self.pool()).await?;
            return Ok(id.map(|id| Created {
                run: RunId(id),
                new: true,
            }));
        }
        let mut transaction = self.begin().await?;
        let Some(id) = create.fetch_optional(&mut *transaction).await? else {
            transaction.commit().await?;
            return Ok(None);
        };
        for (i, chunk) in chunks.iter().enumerate().skip(1) {
            self.round_trips.fetch_add(1, Ordering::Relaxed);
            let add = sqlx::query(statements::ADD_ITEMS)
                .bind(id)
                .bind(&run.tenant)
                .bind(run.priority)
                .bind(small(run.max_attempts))
                .bind((i * ROWS) as i64)
                .bind(keys(chunk))
                .bind(inputs(chunk))
                .bind(&run.name);
            add.execute(&mut *transaction).await?;
        }
        transaction.commit().await?;
        Ok(Some(Created {
            run: RunId(id),
            new: true,
        }))
    }

    async fn write_commit(&self, commit: &Commit) -> sqlx::Result<Committed> {
        if commit.intents.is_empty() {
            return write_rows(commit, self.pool()).await;
        }
        let mut rest = commit.clone();
        let intents = std::mem::take(&mut rest.intents);
        if rest.is_empty() {
            write_intents(&intents, self.pool()).await?;
            return Ok(Committed::default());
        }
        let mut transaction = self.begin().await?;
        write_intents(&intents, &mut *transaction).await?;
        self.round_trips.fetch_add(1, Ordering::Relaxed);
        let committed = write_rows(&rest, &mut *transaction).await?;
        transaction.commit().await?;
        Ok(committed)
    }

    /// Executes a statement that cancels the items of a run or makes its failed items pending.
    async fn turn_run(&self, sql: &'static str, run: RunId) -> sqlx::Result<u64> {
        let mut transaction = self.begin().await?;
        let turn = sqlx::query(statements::ONE_AT_A_TIME).bind(run.0);
        turn.execute(&mut *transaction).await?;
        self.round_trips.fetch_add(1, Ordering::Relaxed);
        let items = sqlx::query_scalar(sql)
            .bind(run.0)
            .fetch_one(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(from_sql(items))
    }
}

impl fmt::Debug for Postgres {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Postgres")
            .field("schema", &self.0.schema)
            .finish_non_exhaustive()
    }
}

/// The most retries of a transaction that failed because of concurrent ones.
const TRIES: u32 = 10;

/// Returns whether to retry: the transaction failed by a deadlock or a serialisation conflict.
fn is_conflict(error: &sqlx::Error, tries: u32) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    tries < TRIES && code.is_some_and(|code| matches!(&*code, "40P01" | "40001"))
}

#[async_trait]
impl Store for Inner {
    fn name(&self) -> &'static str {
        "postgres"
    }

    async fn create_run(&self, run: NewRun) -> Result<Created> {
        run.check()?;
        loop {
            if let Some(created) = retrying!(is_conflict, self.write_run(&run))? {
                return Ok(created);
            }
            let known = sqlx::query_scalar(statements::RUN_OF_KEY)
                .bind(&run.tenant)
                .bind(&run.idempotency_key)
                .fetch_optional(self.pool());
            // The run does not exist if it was purged in between.
            if let Some(id) = known.await.map_err(failed)? {
                return Ok(Created {
                    run: RunId(id),
                    new: false,
                });
            }
        }
    }

    async fn runs(&self, filter: RunFilter, limit: u32) -> Result<Vec<Run>> {
        if let Some(id) = filter.id {
            let read = sqlx::query(statements::RUN_BY_ID).bind(id.0);
            let found = read.fetch_all(self.pool()).await.map_err(failed)?;
            return statements::selected_runs(&found, &filter, limit);
        }
        let status = filter.status.map(|status| status.as_str());
        let tenant = filter.tenant.as_deref();
        let sql = match (tenant, status) {
            (Some(_), Some(_)) => statements::RUNS_OF_BOTH,
            (Some(_), None) => statements::RUNS_OF_TENANT,
            (None, Some(_)) => statements::RUNS_OF_STATUS,
            (None, None) => statements::RUNS,
        };
        let before = filter.before.map_or(i64::MAX, |run| run.0);
        let mut list = sqlx::query(sql).bind(before).bind(i64::from(limit));
        for word in [tenant, status].into_iter().flatten() {
            list = list.bind(word);
        }
        let found = list.fetch_all(self.pool()).await.map_err(failed)?;
        each(&found, statements::run)
    }

    async fn items(&self, run: RunId, from: u64, limit: u32) -> Result<Vec<Item>> {
        let list = sqlx::query(statements::ITEMS)
            .bind(run.0)
            .bind(to_sql(from))
            .bind(i64::from(limit));
        let found = list.fetch_all(self.pool()).await.map_err(failed)?;
        each(&found, |row| Ok(statements::item(row)?.0))
    }

    async fn log(&self, run: RunId, after: u64, limit: u32) -> Result<Vec<LogEntry>> {
        let list = sqlx::query(statements::LOG)
            .bind(run.0)
            .bind(to_sql(after))
            .bind(i64::from(limit));
        let found = list.fetch_all(self.pool()).await.map_err(failed)?;
        each(&found, statements::log_entry)
    }

    async fn generations(&self, tenant: &str, keys: &[MemoKey]) -> Result<Vec<Generation>> {
        let keys: Vec<_> = keys.iter().map(|key| &key.as_bytes()[..]).collect();
        let look = sqlx::query(statements::GENERATIONS).bind(tenant).bind(keys);
        let found = look.fetch_all(self.pool()).await.map_err(failed)?;
        each(&found, |row| statements::generation(row, tenant))
    }

    async fn commit(&self, commit: Commit) -> Result<Committed> {
        commit.check()?;
        if commit.is_empty() {
            return Ok(Committed::default());
        }
        retrying!(is_conflict, self.write_commit(&commit))
    }

    async fn intents(&self, filter: IntentFilter, limit: u32) -> Result<Vec<Intent>> {
        let sql = match filter.items {
            Some(_) => statements::INTENTS_OF_ITEMS,
            None => statements::INTENTS,
        };
        let after = filter.after;
        let mut list = sqlx::query(sql)
            .bind(after.map_or(0, |name| name.item.0))
            .bind(after.map_or(0, |name| small(name.attempt)))
            .bind(after.map_or_else(Vec::new, |name| name.key.as_bytes().to_vec()))
            .bind(i64::from(limit))
            .bind(filter.unheld);
        if let Some(items) = filter.items {
            list = list.bind(items.iter().map(|item| item.0).collect::<Vec<_>>());
        }
        let found = list.fetch_all(self.pool()).await.map_err(failed)?;
        each(&found, statements::intent)
    }

    async fn cancel(&self, run: RunId) -> Result<u64> {
        retrying!(is_conflict, self.turn_run(statements::CANCEL, run))
    }

    async fn retry_failed(&self, run: RunId) -> Result<u64> {
        retrying!(is_conflict, self.turn_run(statements::RETRY, run))
    }

    async fn purge(&self, older_than: Duration, limit: u32) -> Result<Purged> {
        let row = retrying!(is_conflict, {
            let purge = sqlx::query(statements::PURGE);
            let purge = purge
                .bind(duration_millis(older_than))
                .bind(i64::from(limit));
            purge.fetch_one(self.pool())
        })?;
        let count = |column: usize| row.try_get(column).map(from_sql).map_err(failed);
        Ok(Purged {
            runs: count(0)?,
            generations: count(1)?,
        })
    }
}
