//! [`Worker`]: claims the items of durable runs, runs their pipelines and commits the results.

mod builder;
mod lease;
mod registry;
mod run_item;
mod session;
mod shutdown;
mod suspects;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use self::builder::Options;
pub use self::builder::WorkerBuilder;
use self::registry::Registry;
use self::session::{InFlight, LOST_ITEMS_INTERVAL, Session, SessionEnd, StopCondition};
use crate::backoff::Jittered;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::runs::Spec;
use crate::store::journal::{Journal, JournalStats};
use crate::store::{Queue, RunFilter, RunId, Status, StoreExt as _};
use crate::sync::Mutex;

/// A worker on durable runs: it claims items, runs their pipelines and commits the results. Any number of workers share a
/// store, in one process or in many.
///
/// - **No committed reply is paid for again.** Replies are stored as they come and looked up before each call. A crash can
///   cost only the calls that were in flight, and the replies of the last milliseconds.
/// - **Each item ends once.** Only the worker that holds an item can commit it. A worker that was thought dead
///   and comes back is refused, but the replies that it paid for are kept.
/// - **The items of a dead worker go to others** when its lease expires.
/// - **Results are written in batches**, in the background.
/// - **An item that ends its process harms no other.** The items of a dead worker are retried a few at a time and then one
///   at a time, by workers that have lived for a while. The death of a worker counts as an attempt of an item only if the
///   worker held no other.
///
/// An item whose pipeline returns an error or panics has failed, because its calls have been retried already. It keeps its
/// error, and [`Runner::retry_failed`](crate::Runner::retry_failed) makes it pending again. If the account is refused
/// (credentials, quota), the worker releases its items, stops and returns the error.
///
/// ```
/// use std::sync::Arc;
/// use std::time::Duration;
/// use throughline::store::Memory;
/// use throughline::{Context, Pace, Runner, Sim, Worker, pipeline, runs::DriveOutcome};
///
/// #[tokio::main(flavor = "current_thread", start_paused = true)]
/// async fn main() -> throughline::Result<()> {
///     let summary = pipeline("summary", async |cx: Context, page: u32| {
///         Ok(cx.generate(format!("Sum up page {page}.")).await?.text)
///     });
///     let store = Arc::new(Memory::new());
///     let runner = Runner::new(Arc::clone(&store));
///     let run = runner.submit("summary", &summary, 0..600).await?;
///
///     let cx = Context::builder(Sim::builder().latency(Duration::from_secs(20)).build())
///         .pace(Pace::per_minute(60).in_flight(30))
///         .build();
///     let worker = Worker::builder(store, cx).register("summary", summary).build();
///
///     // In a serverless function that is cut off after five minutes.
///     let mut calls = 1;
///     while worker.drive(Duration::from_secs(300)).await? == DriveOutcome::Continue {
///         calls += 1;
///     }
///     assert_eq!(calls, 3);
///     assert_eq!(runner.snapshot(run).await?.unwrap().run.completed, 600);
///     assert_eq!(worker.stats().replies_paid, 600);
///     Ok(())
/// }
/// ```
#[doc(alias = "resume")]
#[derive(Clone)]
pub struct Worker(Arc<Inner>);

/// The outcome of [`drive`](Worker::drive).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[must_use = "there may be more to do"]
#[non_exhaustive]
pub enum DriveOutcome {
    /// There was nothing left that this worker could claim, now or when it has lived for longer. Other workers may still
    /// hold items.
    Done,
    /// The budget is used up and there may be more to do: drive again.
    Continue,
}

/// The policy for an item whose last worker died, or was stopped, with a call in flight that may or may not have been paid
/// for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AmbiguousPolicy {
    /// Sends the call again. It may be paid for twice, and is listed.
    #[default]
    Retry,
    /// Fails the item. [`Runner::retry_failed`](crate::Runner::retry_failed) sends the call again and removes it from the
    /// list of ambiguous calls. The worker that died must have written [intents](WorkerBuilder::intents).
    Fail,
}

/// The counters of a worker ([`Worker::stats`]).
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct WorkerStats {
    /// Claimed items. An item counts again after each release.
    pub claimed: u64,
    /// Items that ended with an output. [`journal`](Self::journal) counts the committed ones.
    pub completed: u64,
    /// Items that ended with an error.
    pub failed: u64,
    /// Items that were released or lost before they ended.
    pub unfinished: u64,
    /// Lost leases: other workers took the items before a heartbeat arrived.
    pub leases_lost: u64,
    /// Replies that were paid for.
    pub replies_paid: u64,
    /// Replies that came from the store.
    pub replies_replayed: u64,
    /// The counters of the journal that writes the results.
    pub journal: JournalStats,
}

struct Inner {
    queue: Arc<dyn Queue>,
    cx: Context,
    registry: Registry,
    options: Options,
    journal: Journal,
    /// The time of its creation. A worker that has lived for a while is not in a crash loop.
    created_at: Instant,
    /// Unknown pipelines of which the worker has warned.
    unknown: Mutex<HashSet<String>>,
    /// A cache of the runs whose items were claimed.
    runs: Mutex<HashMap<RunId, Arc<RunInfo>>>,
    counters: Counters,
}

/// The data of a run that its items need.
struct RunInfo {
    name: String,
    spec: Spec,
    /// The deadline of the run.
    deadline: Option<Instant>,
}

impl RunInfo {
    /// Returns whether the deadline has passed.
    fn is_late(&self) -> bool {
        self.deadline.is_some_and(|end| end <= Instant::now())
    }
}

#[derive(Default)]
struct Counters {
    claimed: AtomicU64,
    completed: AtomicU64,
    failed: AtomicU64,
    unfinished: AtomicU64,
    leases_lost: AtomicU64,
    paid: AtomicU64,
    replayed: AtomicU64,
}

/// The upper bound of all durations, thirty years, because longer ones could overflow a clock.
const FOREVER: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

/// Returns `at` plus `duration`, which is at most [`FOREVER`].
fn later(at: Instant, duration: Duration) -> Instant {
    at + duration.min(FOREVER)
}

/// The waits for a store that is away.
fn backoff() -> Jittered {
    Jittered::new(Duration::from_millis(100), Duration::from_secs(5))
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

impl Worker {
    /// Returns a builder for a worker on `store` whose pipelines run below `cx`, with its provider, lane, retries, observers,
    /// deadline and cancellation. Replies are kept in `store`, whatever store the context has.
    pub fn builder(store: impl Queue, cx: Context) -> WorkerBuilder {
        WorkerBuilder::new(Arc::new(store), cx)
    }

    /// Works until `shutdown` is ready or the context is cancelled or drained. Then it stops claiming, lets the calls in
    /// flight finish, releases unfinished items and returns when all results are written.
    ///
    /// # Errors
    /// The error of a refused account (credentials, quota), and that of a store that cannot be reached at the start or at
    /// the end. Failures in between are retried.
    ///
    /// # Cancel safety
    /// Dropping the future is a crash in which received replies are still written: calls in flight are dropped and may be
    /// billed, and other workers take the items when the lease has expired.
    pub async fn run_until(&self, shutdown: impl Future<Output = ()>) -> Result<()> {
        let stop_at = StopCondition {
            end: None,
            idle: false,
            drain: self.0.options.drain,
        };
        self.work(shutdown, stop_at).await.map(drop)
    }

    /// Works until there is nothing left to claim or the budget is used up. It stops claiming early enough for calls in
    /// flight to finish ([`drain_for`](WorkerBuilder::drain_for)), releases unfinished items without charging an attempt, and
    /// returns when all results are written. Another call continues the work and replays paid replies.
    ///
    /// It exceeds the budget only if the store is away or slower than a fifth of the drain, by at most ten seconds in
    /// which it waits for paid results to be written.
    ///
    /// # Errors
    /// Those of [`run_until`](Self::run_until).
    ///
    /// # Cancel safety
    /// That of [`run_until`](Self::run_until).
    pub async fn drive(&self, budget: Duration) -> Result<DriveOutcome> {
        let stop_at = self.within(budget, true);
        self.work(future::pending(), stop_at).await
    }

    /// Returns the condition for a budget. A budget that overflows the clock never ends.
    fn within(&self, budget: Duration, idle: bool) -> StopCondition {
        StopCondition {
            end: Instant::now().checked_add(budget),
            idle,
            drain: self.0.options.drain.min(budget / 4),
        }
    }

    /// Works like [`drive`](Self::drive), but until one run has ended, also if other workers hold the last of its items. The
    /// next phase of the work can then start from its results.
    ///
    /// Meanwhile it works on all items that it can claim. When the run has ended, it lets calls in flight finish
    /// ([`drain_for`](WorkerBuilder::drain_for)) and releases the rest. [`DriveOutcome::Continue`] means that the run
    /// has not ended, because the budget is used up or the context was drained or cancelled. A run that does not exist
    /// has ended.
    ///
    /// # Errors
    /// Those of [`run_until`](Self::run_until). It waits for a store that is away until the budget is used up.
    ///
    /// # Cancel safety
    /// That of [`run_until`](Self::run_until).
    pub async fn drive_run(&self, run: RunId, budget: Duration) -> Result<DriveOutcome> {
        let stop_at = self.within(budget, false);
        if self.is_over(run, stop_at.end).await? {
            return Ok(DriveOutcome::Done);
        }
        let over = async {
            loop {
                sleep(self.0.options.poll.min(LOST_ITEMS_INTERVAL)).await;
                // A store that does not answer is asked again. A permanent error is reported below.
                if let Ok(true) = self.is_over(run, stop_at.end).await {
                    return;
                }
            }
        };
        let _ = self.work(over, stop_at).await?;
        // The last item may have ended in the drain, and a drained context leaves the run open.
        Ok(match self.is_over(run, stop_at.end).await? {
            true => DriveOutcome::Done,
            false => DriveOutcome::Continue,
        })
    }

    /// Returns whether a run has ended or does not exist. A store that is away is asked again until `end`.
    async fn is_over(&self, run: RunId, end: Option<Instant>) -> Result<bool> {
        let mut backoff = backoff();
        loop {
            match self.0.queue.run(run).await {
                Ok(found) => return Ok(found.is_none_or(|run| run.status.is_over())),
                Err(error)
                    if error.is_temporary() && end.is_none_or(|end| Instant::now() < end) =>
                {
                    tracing::warn!(%error, "the worker waits for the store");
                }
                Err(error) => return Err(error),
            }
            let at = Instant::now() + backoff.next();
            sleep_until(end.map_or(at, |end| at.min(end))).await;
        }
    }

    /// Returns the counters so far.
    pub fn stats(&self) -> WorkerStats {
        let counters = &self.0.counters;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        WorkerStats {
            claimed: read(&counters.claimed),
            completed: read(&counters.completed),
            failed: read(&counters.failed),
            unfinished: read(&counters.unfinished),
            leases_lost: read(&counters.leases_lost),
            replies_paid: read(&counters.paid),
            replies_replayed: read(&counters.replayed),
            journal: self.0.journal.stats(),
        }
    }

    async fn work(
        &self,
        shutdown: impl Future<Output = ()>,
        stop_at: StopCondition,
    ) -> Result<DriveOutcome> {
        let stop = CancellationToken::new();
        let signal = async {
            shutdown.await;
            stop.cancel();
            future::pending().await
        };
        tokio::select! {
            never = signal => never,
            ended = self.0.sessions(&stop, stop_at) => ended,
        }
    }
}

impl Inner {
    /// Runs one session after another, with a new lease after each lost one.
    async fn sessions(
        self: &Arc<Self>,
        stop: &CancellationToken,
        stop_at: StopCondition,
    ) -> Result<DriveOutcome> {
        let mut in_flight = InFlight::default();
        loop {
            let Some(lease) = self.register(stop, stop_at.end).await? else {
                return Ok(if stop_at.idle {
                    DriveOutcome::Continue
                } else {
                    DriveOutcome::Done
                });
            };
            match Session::new(Arc::clone(self), lease)
                .work(&mut in_flight, stop, stop_at)
                .await?
            {
                SessionEnd::Idle | SessionEnd::Stopped => return Ok(DriveOutcome::Done),
                SessionEnd::OutOfTime => return Ok(DriveOutcome::Continue),
                SessionEnd::LeaseLost => {
                    count(&self.counters.leases_lost, 1);
                    tracing::warn!(%lease, worker = self.options.name, "lease lost: other workers have its items");
                }
            }
        }
    }

    /// Registers a lease. Returns `None` if it is time to stop before there is one.
    async fn register(
        &self,
        stop: &CancellationToken,
        end: Option<Instant>,
    ) -> Result<Option<crate::store::LeaseId>> {
        let mut backoff = backoff();
        for attempt in 1.. {
            if stop.is_cancelled()
                || self.cx.is_draining()
                || end.is_some_and(|end| end <= Instant::now())
            {
                break;
            }
            let error: Error = match self
                .queue
                .register(&self.options.name, self.options.lease)
                .await
            {
                Ok(lease) => return Ok(Some(lease)),
                Err(error) => error,
            };
            if !error.is_temporary() || attempt > 10 {
                return Err(error);
            }
            tracing::warn!(%error, "the worker waits for the store");
            tokio::select! {
                () = stop.cancelled() => {}
                () = sleep(backoff.next()) => {}
            }
        }
        Ok(None)
    }

    /// Warns of the newest runs whose pipeline is not registered here, once for each name, which may be misspelt.
    async fn warn_of_unknown_pipelines(&self, names: &[String]) {
        const NEWEST: u32 = 50;
        let filter = RunFilter::new().status(Status::Pending);
        // The next look asks again.
        let Ok(runs) = self.queue.runs(filter, NEWEST).await else {
            return;
        };
        let mut unknown = self.unknown.lock();
        for run in runs {
            if !names.contains(&run.name) && unknown.insert(run.name.clone()) {
                tracing::warn!(
                    pipeline = run.name,
                    registered = ?names,
                    "a run waits for a pipeline that is not registered here"
                );
            }
        }
    }

    /// Returns the data of a run, or `None` if the run does not exist.
    async fn run_info(&self, run: RunId) -> Result<Option<Arc<RunInfo>>> {
        /// The capacity of the cache. Runs are few compared to their items.
        const KNOWN: usize = 1024;
        let known = || self.runs.lock();
        if let Some(info) = known().get(&run) {
            return Ok(Some(Arc::clone(info)));
        }
        let Some(found) = self.queue.run(run).await? else {
            return Ok(None);
        };
        // A spec that another engine wrote has no meaning here.
        let spec: Spec = serde_json::from_str(&found.spec).unwrap_or_default();
        let deadline = spec
            .left()
            .and_then(|left| Instant::now().checked_add(left));
        let info = Arc::new(RunInfo {
            name: found.name,
            spec,
            deadline,
        });
        let mut known = known();
        if known.len() >= KNOWN {
            known.clear();
        }
        known.insert(run, Arc::clone(&info));
        Ok(Some(info))
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker")
            .field("name", &self.0.options.name)
            .field("pipelines", &self.0.registry.names())
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}
