//! [`Runner`]: durable runs, seen from outside: submit, look, read, cancel, try again.

mod audit;
mod notes;
mod progress;
mod results;
mod submit;
pub(crate) mod worker;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

pub use self::audit::Audit;
pub use self::notes::Notes;
pub use self::progress::RunSnapshot;
pub use self::results::ItemResult;
pub(crate) use self::submit::Spec;
pub use self::submit::Submit;
pub use self::worker::{AmbiguousPolicy, DriveOutcome, Worker, WorkerBuilder, WorkerStats};
use crate::error::{Error, ErrorKind, Result};
use crate::pipeline::Pipeline;
use crate::store::{
    Commit, Intent, IntentName, LogEntry, Purged, Run, RunFilter, RunId, Status, Store,
    StoreExt as _,
};

/// Submits durable runs and says how they stand. Cheap to clone; needs no provider.
///
/// A run is many inputs for a pipeline, kept in a [store](crate::store) until a
/// [`Worker`] has worked on them, here, in another process, or after a crash.
///
/// ```
/// use std::sync::Arc;
/// use throughline::store::{Memory, Status};
/// use throughline::{Context, Runner, Worker, pipeline, testing::Scripted};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
/// let describe = pipeline("describe", async |cx: Context, river: String| {
///     Ok(cx.generate(format!("Describe the {river}.")).await?.text)
/// });
/// let store = Arc::new(Memory::new()); // or Sqlite::open("runs.db").await?, or Postgres
///
/// let runner = Runner::new(Arc::clone(&store));
/// let run = runner.submit("describe", &describe, ["Danube".to_owned()]).await?;
///
/// let cx = Context::builder(Scripted::new().reply("Long and brown.")).build();
/// let worker = Worker::builder(store, cx).register("describe", describe).build();
/// worker.drive(std::time::Duration::from_secs(60)).await?;
///
/// assert_eq!(runner.status(run).await?, Some(Status::Completed));
/// let results = runner.results::<String>(run, 0, 100).await?;
/// assert_eq!(results[0].output(), Some(&"Long and brown.".to_owned()));
/// # Ok(()) }
/// ```
#[doc(alias = "checkpoint")]
#[doc(alias = "job queue")]
#[doc(alias = "resume")]
#[derive(Clone)]
pub struct Runner {
    store: Arc<dyn Store>,
    poll: Duration,
    /// Whose runs it sees; `None` for everybody's.
    tenant: Option<Arc<str>>,
    /// The other tenant that it was narrowed to after that: it sees no runs at all.
    beyond: Option<Arc<str>>,
}

impl Runner {
    /// A runner in front of `store`. Give it an `Arc` of the store to share it with a worker.
    pub fn new(store: impl Store) -> Self {
        Self {
            store: Arc::new(store),
            poll: Duration::from_millis(250),
            tenant: None,
            beyond: None,
        }
    }

    /// A runner for one tenant's runs: what it submits is theirs, and runs of others are not there, whatever is asked of
    /// them. For services whose users must not see each other's: make it where the user is known, and hand on
    /// nothing else.
    ///
    /// What concerns the store as a whole (`purge`, `ambiguous`, `dismiss`) it refuses.
    ///
    /// A runner is only ever narrowed: made for another tenant, one that is for a tenant already sees no runs, and refuses
    /// to submit.
    ///
    /// ```
    /// # use throughline::{Context, Runner, pipeline, store::{Memory, RunFilter}};
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
    /// # let double = pipeline("double", async |_cx: Context, n: u32| Ok(2 * n));
    /// let runner = Runner::new(Memory::new());
    /// let (ada, bob) = (runner.for_tenant("ada"), runner.for_tenant("bob"));
    /// let run = ada.submit("double", &double, [1, 2, 3]).await?;
    /// assert_eq!(ada.list(RunFilter::new(), 10).await?[0].id, run);
    /// assert!(bob.snapshot(run).await?.is_none());
    /// assert_eq!(bob.cancel(run).await?, 0);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn for_tenant(&self, tenant: impl Into<Arc<str>>) -> Self {
        let tenant = tenant.into();
        let mut narrowed = self.clone();
        match &self.tenant {
            None => narrowed.tenant = Some(tenant),
            Some(ours) if *ours == tenant => {}
            Some(_) => narrowed.beyond = Some(tenant),
        }
        narrowed
    }

    /// Fails for a runner that was narrowed to two tenants.
    fn has_tenant(&self) -> Result<()> {
        match (&self.tenant, &self.beyond) {
            (Some(tenant), Some(beyond)) => Err(Error::new(
                ErrorKind::Config,
                format!(
                    "this runner was made for {beyond:?} out of one for {tenant:?}: it can submit for \
                     neither; call `for_tenant` on the runner for all"
                ),
            )),
            _ => Ok(()),
        }
    }

    /// The run's record, if it is there for this runner.
    async fn found(&self, run: RunId) -> Result<Option<Run>> {
        if self.beyond.is_some() {
            return Ok(None);
        }
        let found = self.store.run(run).await?;
        let theirs = |run: &Run| match &self.tenant {
            Some(tenant) => **tenant == *run.tenant,
            None => true,
        };
        Ok(found.filter(theirs))
    }

    /// Whether a run may be asked for more. Without a tenant the store is not asked.
    async fn sees(&self, run: RunId) -> Result<bool> {
        Ok(self.tenant.is_none() || self.found(run).await?.is_some())
    }

    /// Refuses what would reach beyond a tenant.
    fn sees_all(&self, what: &str) -> Result<()> {
        match &self.tenant {
            None => Ok(()),
            Some(tenant) => Err(Error::new(
                ErrorKind::Config,
                format!("{what} concerns all runs, and this runner is for those of {tenant:?}"),
            )),
        }
    }

    /// How often [`watch`](Self::watch) looks; 250 ms unless set, as each look is a round trip, and at least 1 ms.
    #[must_use]
    pub fn poll_every(mut self, poll: Duration) -> Self {
        self.poll = poll.max(Duration::from_millis(1));
        self
    }

    /// A run of the pipeline that workers know as `name`, over `inputs`. Await it to submit it: see
    /// [`Submit`] for its options.
    ///
    /// The pipeline itself is not kept, nor run: it says what the inputs are.
    pub fn submit<P>(
        &self,
        name: impl Into<String>,
        _pipeline: &P,
        inputs: impl IntoIterator<Item = P::Input>,
    ) -> Submit<P::Input>
    where
        P: Pipeline + ?Sized,
        P::Input: Serialize,
    {
        let inputs = inputs.into_iter().collect();
        Submit::new(Arc::clone(&self.store), name.into(), inputs)
            .only_for(self.tenant.clone())
            .refused_by(self.has_tenant().err())
    }

    /// Where a run stands; `None` if there is no such run (any more). One indexed read.
    ///
    /// # Errors
    /// The store's, as for all methods here.
    pub async fn status(&self, run: RunId) -> Result<Option<Status>> {
        Ok(self.found(run).await?.map(|run| run.status))
    }

    /// The run's record, with what follows from it. One indexed read.
    ///
    /// # Errors
    /// The store's.
    pub async fn snapshot(&self, run: RunId) -> Result<Option<RunSnapshot>> {
        Ok(self.found(run).await?.map(RunSnapshot::from))
    }

    /// At most `limit` entries of a run's log after the entry `after`, in order and without a gap; see [`Store::log`].
    ///
    /// # Errors
    /// The store's.
    pub async fn log_since(&self, run: RunId, after: u64, limit: u32) -> Result<Vec<LogEntry>> {
        match self.sees(run).await? {
            true => self.store.log(run, after, limit).await,
            false => Ok(Vec::new()),
        }
    }

    /// The last `limit` entries of a run's log, in order: however long it is, two round trips.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use throughline::Runner;
    /// # use throughline::store::{Commit, Memory, NewRun, Note, Store};
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
    /// # let store = Arc::new(Memory::new());
    /// let classes = store.create_run(NewRun::new("ada", "classes")).await?.run;
    /// let notes = (1..=500).map(|n| Note::new(classes, "class", n.to_string()));
    /// store.commit(Commit::new().notes(notes)).await?;
    /// let last = Runner::new(store).log_last(classes, 100).await?;
    /// assert_eq!((last.len(), &*last[99].data), (100, "500"));
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// The store's.
    pub async fn log_last(&self, run: RunId, limit: u32) -> Result<Vec<LogEntry>> {
        let Some(record) = self.found(run).await? else {
            return Ok(Vec::new());
        };
        let after = record.log_seq.saturating_sub(u64::from(limit));
        self.store.log(run, after, limit).await
    }

    /// At most `limit` runs, newest first. The next page is [`before`](RunFilter::before) the last one.
    ///
    /// # Errors
    /// The store's.
    pub async fn list(&self, mut filter: RunFilter, limit: u32) -> Result<Vec<Run>> {
        if self.beyond.is_some() {
            return Ok(Vec::new());
        }
        if let Some(tenant) = &self.tenant {
            let asked = filter.tenant.replace(tenant.to_string());
            if asked.is_some_and(|asked| asked != **tenant) {
                return Ok(Vec::new());
            }
        }
        self.store.runs(filter, limit).await
    }

    /// Ends a run: what nobody works on stops at once, and calls in flight for it are aborted when their
    /// worker looks (every second). Gives the number of items it stopped.
    ///
    /// # Errors
    /// The store's.
    pub async fn cancel(&self, run: RunId) -> Result<u64> {
        match self.sees(run).await? {
            true => self.store.cancel(run).await,
            false => Ok(0),
        }
    }

    /// Makes the failed items of a run pending again. What they have paid for is replayed, so a repaired parser costs
    /// nothing. An item that fails again on a reply that was kept, with [`ErrorKind::InvalidOutput`] or
    /// [`ErrorKind::Truncated`], asks for another one before it has failed. Gives their number.
    ///
    /// # Errors
    /// The store's.
    pub async fn retry_failed(&self, run: RunId) -> Result<u64> {
        match self.sees(run).await? {
            true => self.store.retry_failed(run).await,
            false => Ok(0),
        }
    }

    /// Removes runs that ended at least so long ago and replies written at least so long ago, at most `limit`
    /// of each and the oldest first: to be called now and then.
    ///
    /// # Errors
    /// The store's.
    pub async fn purge(&self, older_than: Duration, limit: u32) -> Result<Purged> {
        self.sees_all("a purge")?;
        self.store.purge(older_than, limit).await
    }

    /// Calls that were sent and of which nobody knows the end, because their worker died: they may have been paid for.
    /// At most `limit`, in the order of their names, after `after`. They stay listed, also when the
    /// item has been done again, until they are [dismissed](Self::dismiss) or purged with their run.
    ///
    /// # Errors
    /// The store's.
    pub async fn ambiguous(&self, after: Option<IntentName>, limit: u32) -> Result<Vec<Intent>> {
        self.sees_all("the list of ambiguous calls")?;
        self.store.ambiguous_intents(after, limit).await
    }

    /// Takes calls off the list of [`ambiguous`](Self::ambiguous) ones: somebody has dealt with them.
    ///
    /// # Errors
    /// The store's.
    pub async fn dismiss(&self, intents: impl IntoIterator<Item = IntentName>) -> Result<()> {
        self.sees_all("the list of ambiguous calls")?;
        let commit = Commit::new().ended_intents(intents);
        self.store.commit(commit).await.map(drop)
    }
}

impl fmt::Debug for Runner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runner")
            .field("store", &self.store.name())
            .field("tenant", &self.tenant)
            .finish_non_exhaustive()
    }
}
