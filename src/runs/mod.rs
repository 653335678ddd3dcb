//! Durable runs: [`Runner`] submits, observes, cancels and retries them, and [`Worker`] executes them.

mod audit;
mod notes;
mod progress;
mod quota;
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
use self::quota::SubmissionQuota;
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

/// Submits and observes durable runs. Cheap to clone; needs no provider.
///
/// A run is a list of inputs for a pipeline in a [store](crate::store). A [`Worker`] processes them, in this process, in
/// another one, or after a crash.
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
///
/// let snapshot = runner.snapshot(run).await?.expect("it is there");
/// assert_eq!(snapshot.to_string(), "describe: 1 of 1 done");
/// let outputs: Vec<String> = runner.outputs(run).await?; // the input of the next phase
/// let audit = runner.audit(run).await?.expect("it is there");
/// assert!(audit.is_sound() && outputs.len() == 1, "{audit}");
/// # Ok(()) }
/// ```
#[doc(alias = "checkpoint")]
#[doc(alias = "job queue")]
#[doc(alias = "resume")]
#[derive(Clone)]
pub struct Runner {
    store: Arc<dyn Store>,
    poll: Duration,
    /// The tenant whose runs it sees; `None` for all tenants.
    tenant: Option<Arc<str>>,
    /// A second tenant to which the runner was narrowed: it sees no runs at all.
    conflicting_tenant: Option<Arc<str>>,
    quota: Option<Arc<SubmissionQuota>>,
}

impl Runner {
    /// Creates a runner in front of `store`. Pass an `Arc` of the store to share it with a worker.
    pub fn new(store: impl Store) -> Self {
        Self {
            store: Arc::new(store),
            poll: Duration::from_millis(250),
            tenant: None,
            conflicting_tenant: None,
            quota: None,
        }
    }

    /// Returns a runner for one tenant. The runs that it submits belong to the tenant, and the runs of other tenants do not
    /// exist for it. A service whose users must not see each other's runs creates it where the user is known, and passes
    /// on no other runner.
    ///
    /// It refuses calls that concern the whole store (`purge`, `ambiguous`, `dismiss`).
    ///
    /// A runner can only be narrowed: a runner for one tenant that is narrowed to another one sees no runs and refuses to
    /// submit.
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
            Some(_) => narrowed.conflicting_tenant = Some(tenant),
        }
        narrowed
    }

    /// Limits how many runs each tenant may submit: `submissions` at once, and as many in every `per`, spread evenly. Further
    /// ones fail with [`ErrorKind::Throttled`] and the time to [wait](Error::wait), before anything is stored, so they can be
    /// repeated with the same [idempotency key](Submit::idempotency_key). No limit unless set.
    ///
    /// The quota counts in this process alone: clones of the runner and those [for one tenant](Self::for_tenant) share it, other
    /// processes and other runners have their own. A restart begins with an unused quota. A submission that is repeated, or
    /// that the store fails, counts again.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use throughline::{Context, ErrorKind, Runner, pipeline, store::Memory};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() -> throughline::Result<()> {
    /// # let double = pipeline("double", async |_cx: Context, n: u32| Ok(2 * n));
    /// let runner = Runner::new(Memory::new()).quota(2, Duration::from_secs(60));
    /// let ada = runner.for_tenant("ada");
    /// ada.submit("double", &double, [1]).await?;
    /// ada.submit("double", &double, [2]).await?;
    /// let refused = ada.submit("double", &double, [3]).await.unwrap_err();
    /// assert_eq!(refused.kind(), ErrorKind::Throttled);
    /// assert_eq!(refused.wait(), Some(Duration::from_secs(30)));
    /// runner.for_tenant("bob").submit("double", &double, [3]).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Panics
    /// If `submissions` or `per` is zero.
    #[must_use]
    #[track_caller]
    pub fn quota(mut self, submissions: u32, per: Duration) -> Self {
        self.quota = Some(Arc::new(SubmissionQuota::new(submissions, per)));
        self
    }

    /// Fails if the runner was narrowed to two tenants.
    fn check_tenant(&self) -> Result<()> {
        match (&self.tenant, &self.conflicting_tenant) {
            (Some(tenant), Some(other)) => Err(Error::new(
                ErrorKind::Config,
                format!(
                    "this runner for {tenant:?} was narrowed to {other:?} and can submit for neither: \
                     call `for_tenant` on the runner for all tenants"
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Returns a run if it exists for this runner.
    async fn found(&self, run: RunId) -> Result<Option<Run>> {
        if self.conflicting_tenant.is_some() {
            return Ok(None);
        }
        let found = self.store.run(run).await?;
        let theirs = |run: &Run| match &self.tenant {
            Some(tenant) => **tenant == *run.tenant,
            None => true,
        };
        Ok(found.filter(theirs))
    }

    /// Returns whether the runner may read the run. Asks the store only if the runner is for a tenant.
    async fn sees(&self, run: RunId) -> Result<bool> {
        Ok(self.tenant.is_none() || self.found(run).await?.is_some())
    }

    /// Fails if the runner is for a tenant.
    fn check_all_tenants(&self, what: &str) -> Result<()> {
        match &self.tenant {
            None => Ok(()),
            Some(tenant) => Err(Error::new(
                ErrorKind::Config,
                format!("{what} concerns all tenants, and this runner is for {tenant:?}"),
            )),
        }
    }

    /// Sets how often [`watch`](Self::watch) reads the run, each time with a round trip; 250 ms unless set, and at least 1 ms.
    #[must_use]
    pub fn poll_every(mut self, poll: Duration) -> Self {
        self.poll = poll.max(Duration::from_millis(1));
        self
    }

    /// Returns a run of the pipeline that workers have registered as `name`, over `inputs`. Await it to submit it; see
    /// [`Submit`] for its options.
    ///
    /// The pipeline is neither stored nor run here. It determines the type of the inputs.
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
            .within(self.quota.clone())
            .refused_by(self.check_tenant().err())
    }

    /// Returns the status of a run, or `None` if it does not exist. One indexed read.
    ///
    /// # Errors
    /// Those of the store, as for all methods of the runner.
    pub async fn status(&self, run: RunId) -> Result<Option<Status>> {
        Ok(self.found(run).await?.map(|run| run.status))
    }

    /// Returns the run with the figures that follow from it. One indexed read.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn snapshot(&self, run: RunId) -> Result<Option<RunSnapshot>> {
        Ok(self.found(run).await?.map(RunSnapshot::from))
    }

    /// Returns at most `limit` entries of a run's log after the entry `after`, in order and without a gap; see [`Store::log`].
    ///
    /// # Errors
    /// Those of the store.
    pub async fn log_since(&self, run: RunId, after: u64, limit: u32) -> Result<Vec<LogEntry>> {
        match self.sees(run).await? {
            true => self.store.log(run, after, limit).await,
            false => Ok(Vec::new()),
        }
    }

    /// Returns the last `limit` entries of a run's log, in order. Two round trips, however long the log is.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn log_last(&self, run: RunId, limit: u32) -> Result<Vec<LogEntry>> {
        let Some(record) = self.found(run).await? else {
            return Ok(Vec::new());
        };
        let after = record.log_seq.saturating_sub(u64::from(limit));
        self.store.log(run, after, limit).await
    }

    /// Returns at most `limit` runs, newest first. The next page is [`before`](RunFilter::before) the last one.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn list(&self, mut filter: RunFilter, limit: u32) -> Result<Vec<Run>> {
        if self.conflicting_tenant.is_some() {
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

    /// Cancels a run. Pending items stop at once, and the calls of running items are aborted when their worker next looks,
    /// within a second. Returns the number of items that it stopped.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn cancel(&self, run: RunId) -> Result<u64> {
        match self.sees(run).await? {
            true => self.store.cancel(run).await,
            false => Ok(0),
        }
    }

    /// Makes the failed items of a run pending again, and returns their number. Replies that they have paid for are replayed,
    /// so a retry after a parser was repaired costs nothing. An item that fails again on a stored reply, with
    /// [`ErrorKind::InvalidOutput`] or [`ErrorKind::Truncated`], asks for a new reply before it fails.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn retry_failed(&self, run: RunId) -> Result<u64> {
        match self.sees(run).await? {
            true => self.store.retry_failed(run).await,
            false => Ok(0),
        }
    }

    /// Removes runs that ended, and replies that were written, at least `older_than` ago, at most `limit` of each and the
    /// oldest first. Call it regularly; see [`Store::purge`].
    ///
    /// # Errors
    /// Those of the store.
    pub async fn purge(&self, older_than: Duration, limit: u32) -> Result<Purged> {
        self.check_all_tenants("a purge")?;
        self.store.purge(older_than, limit).await
    }

    /// Returns calls of unknown outcome: their worker died after it sent them, so they may have been paid for. At most
    /// `limit`, in the order of their names, after `after`. A call stays listed, also after its item was repeated, until it
    /// is [dismissed](Self::dismiss) or purged with its run.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn ambiguous(&self, after: Option<IntentName>, limit: u32) -> Result<Vec<Intent>> {
        self.check_all_tenants("the list of ambiguous calls")?;
        self.store.ambiguous_intents(after, limit).await
    }

    /// Removes calls from the list of [ambiguous](Self::ambiguous) ones, after an operator has dealt with them.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn dismiss(&self, intents: impl IntoIterator<Item = IntentName>) -> Result<()> {
        self.check_all_tenants("the list of ambiguous calls")?;
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
