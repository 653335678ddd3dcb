//! [`Worker`]: claims the items of durable runs, works on them and commits what came of it.

mod builder;
mod registry;
mod run_item;
mod session;
mod suspects;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use self::builder::Options;
pub use self::builder::WorkerBuilder;
use self::registry::Registry;
use self::session::{InFlight, LOST_ITEMS_INTERVAL, Session, SessionEnd, StopCondition};
use crate::call::memo::Memo;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::runs::Spec;
use crate::store::journal::JournalStats;
use crate::store::{Queue, RunFilter, RunId, Status, StoreExt as _};

/// Works on durable runs: claims items, runs their pipelines, commits what came of them. Any number of
/// workers share a store, in one process or in many.
///
/// - **Nothing that was committed is paid for again.** Replies are kept as they come and looked for before a call
///   is sent; what a crash can cost twice is the calls in flight then, and the last milliseconds of replies.
/// - **Each item ends once.** Only the worker that holds an item can commit it. One that was thought dead
///   and comes back is refused; the replies that it paid for are kept all the same.
/// - **A worker that dies leaves nothing behind**: its lease runs out and the others take its items.
/// - **Results are written in batches**, behind the work.
///
/// - **An item that ends its process harms no other.** Items that a dead worker held are tried again a few at a
///   time and then one at a time, by workers that have lived for a while. Only a death with this item
///   alone in hand counts as an attempt of it.
///
/// An item that fails or panics has failed: the guard has retried its calls already. It keeps its error, and
/// [`Runner::retry_failed`](crate::Runner::retry_failed) gives it another chance. When the account is refused (credentials, quota), the worker stops, gives its items back
/// and says why.
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
///     // Where a call is cut off after five minutes, as in a serverless function.
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

/// How a [`drive`](Worker::drive) ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[must_use = "there may be more to do"]
pub enum DriveOutcome {
    /// There was nothing left that this worker could claim, now or when it has lived for longer. Others may still be
    /// at work.
    Done,
    /// The budget is used up and there may be more: drive again.
    Continue,
}

/// What to do with an item whose last worker died, or was stopped, with a call in flight: nobody knows whether
/// the call was paid for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AmbiguousPolicy {
    /// Sends it again. It may be paid for twice, and is listed.
    #[default]
    Retry,
    /// Fails the item. [`Runner::retry_failed`](crate::Runner::retry_failed) sends it again, and takes its calls
    /// off the list of ambiguous ones.
    /// Needs [intents](WorkerBuilder::intents) of the worker that died.
    Fail,
}

/// What a worker has done so far ([`Worker::stats`]).
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct WorkerStats {
    /// Items that it claimed, again after each release.
    pub claimed: u64,
    /// Items that ended with an output. Whether that could be committed says [`journal`](Self::journal).
    pub completed: u64,
    /// Items that ended with an error.
    pub failed: u64,
    /// Items that it gave back, or lost, before they had an end.
    pub unfinished: u64,
    /// Leases that it lost: others had its items before it was heard of again.
    pub leases_lost: u64,
    /// Replies that were paid for.
    pub replies_paid: u64,
    /// Replies that the store had.
    pub replies_replayed: u64,
    /// What became of the writes.
    pub journal: JournalStats,
}

struct Inner {
    queue: Arc<dyn Queue>,
    cx: Context,
    registry: Registry,
    options: Options,
    memo: Arc<Memo>,
    /// When it was built. A worker that has lived for a while is not in a crash loop.
    created_at: Instant,
    /// Names of pipelines that it does not have and has warned of.
    unknown: Mutex<HashSet<String>>,
    /// What there is to know of runs whose items were claimed.
    runs: Mutex<HashMap<RunId, Arc<RunInfo>>>,
    counters: Counters,
}

/// What a worker has to know of a run.
struct RunInfo {
    name: String,
    spec: Spec,
    /// When its time is up.
    deadline: Option<Instant>,
}

impl RunInfo {
    /// Whether its time is up.
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

/// The longest time that anything here lasts: thirty years. Longer ones would overflow a clock.
const FOREVER: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

/// `at` and `duration` together, or a time that nobody lives to see.
fn later(at: Instant, duration: Duration) -> Instant {
    at + duration.min(FOREVER)
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

impl Worker {
    /// A worker on `store` whose pipelines run below `cx`: with its provider, lane, retries, observers, deadline and cancellation.
    /// Replies are remembered in `store`, whatever store the context has.
    pub fn builder(store: impl Queue, cx: Context) -> WorkerBuilder {
        WorkerBuilder::new(Arc::new(store), cx)
    }

    /// Works until `shutdown` is ready or the context is cancelled or drained; then stops claiming, lets the calls
    /// in flight finish, gives back what is not done and returns when all is written.
    ///
    /// # Errors
    /// Why no call can succeed any more (credentials, quota), and the store's error if it cannot be reached
    /// at the start or at the end. What fails in between is tried again.
    ///
    /// # Cancel safety
    /// Dropping it is a crash with a soft landing: calls in flight are dropped and may be billed, replies that
    /// came are written, and others take its items when its lease has run out.
    ///
    /// ```
    /// # use throughline::{Context, Worker, testing::Scripted, store::Memory};
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
    /// # let worker = Worker::builder(Memory::new(), Context::builder(Scripted::new()).build()).build();
    /// # let signal = std::future::ready(());
    /// worker.run_until(signal).await?; // as `tokio::signal::ctrl_c()`
    /// # Ok(()) }
    /// ```
    pub async fn run_until(&self, shutdown: impl Future<Output = ()>) -> Result<()> {
        let stop_at = StopCondition {
            end: None,
            idle: false,
            drain: self.0.options.drain,
        };
        self.work(shutdown, stop_at).await.map(drop)
    }

    /// Works until there is nothing left to claim or the budget is used up: it stops claiming early enough that
    /// calls in flight can finish ([`drain_for`](WorkerBuilder::drain_for)), gives back what is not done without charging an attempt,
    /// and returns when all is written. Called again, it goes on where it was: what was paid for is replayed.
    ///
    /// It is late only where the store is slower than a fifth of the drain, or away: what is paid for is waited for, ten
    /// seconds at most.
    ///
    /// # Errors
    /// As [`run_until`](Self::run_until).
    ///
    /// # Cancel safety
    /// As [`run_until`](Self::run_until).
    pub async fn drive(&self, budget: Duration) -> Result<DriveOutcome> {
        let stop_at = self.within(budget, true);
        self.work(future::pending(), stop_at).await
    }

    /// StopCondition a budget is used up. One that is longer than a clock can show never is.
    fn within(&self, budget: Duration, idle: bool) -> StopCondition {
        StopCondition {
            end: Instant::now().checked_add(budget),
            idle,
            drain: self.0.options.drain.min(budget / 4),
        }
    }

    /// As [`drive`](Self::drive), but until one run is over: also where others hold the last of its items, who may
    /// die with them. The next phase of some work can start from its results then.
    ///
    /// Meanwhile it works on whatever it can claim, and when the run is over it lets what is in flight
    /// finish ([`drain_for`](WorkerBuilder::drain_for)) and gives the rest back. With [`DriveOutcome::Continue`] the run is not over, because the
    /// budget is used up or the context was drained or cancelled. A run that is not there is over.
    ///
    /// # Errors
    /// As [`run_until`](Self::run_until). A store that is away for a while is waited for, until the budget is used up.
    ///
    /// # Cancel safety
    /// As [`run_until`](Self::run_until).
    ///
    /// ```
    /// # use std::{sync::Arc, time::Duration};
    /// # use throughline::{
    /// #     Context, Runner, Worker, pipeline, testing::Scripted, runs::DriveOutcome, store::Memory,
    /// # };
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
    /// # let double = pipeline("double", async |_cx: Context, n: u32| Ok(2 * n));
    /// # let store = Arc::new(Memory::new());
    /// # let runner = Runner::new(Arc::clone(&store));
    /// # let run = runner.submit("double", &double, [1, 2, 3]).await?;
    /// # let cx = Context::builder(Scripted::new()).build();
    /// # let worker = Worker::builder(store, cx).register("double", double).build();
    /// if worker.drive_run(run, Duration::from_secs(300)).await? == DriveOutcome::Done {
    ///     println!("{}", runner.results::<u32>(run, 0, 100).await?.len());
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn drive_run(&self, run: RunId, budget: Duration) -> Result<DriveOutcome> {
        let stop_at = self.within(budget, false);
        if self.is_over(run, stop_at.end).await? {
            return Ok(DriveOutcome::Done);
        }
        let over = async {
            loop {
                sleep(self.0.options.poll.min(LOST_ITEMS_INTERVAL)).await;
                // A store that does not answer is asked again, and an error that stays is met elsewhere.
                if let Ok(true) = self.is_over(run, stop_at.end).await {
                    return;
                }
            }
        };
        let _ = self.work(over, stop_at).await?;
        // The last item may have ended in the drain; and where the context was drained, the run is not over.
        Ok(match self.is_over(run, stop_at.end).await? {
            true => DriveOutcome::Done,
            false => DriveOutcome::Continue,
        })
    }

    /// Whether a run is over, or not there. A store that is away is asked again until `end`.
    async fn is_over(&self, run: RunId, end: Option<Instant>) -> Result<bool> {
        let mut delay = Duration::from_millis(100);
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
            let at = later(Instant::now(), delay);
            sleep_until(end.map_or(at, |end| at.min(end))).await;
            delay = (delay * 2).min(Duration::from_secs(5));
        }
    }

    /// What it has done so far.
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
            journal: self.0.memo.journal().stats(),
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
    /// One session after the other: a lost lease is followed by a new one.
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
                    tracing::warn!(%lease, worker = self.options.name, "lease lost: others have its items");
                }
            }
        }
    }

    /// A lease; `None` if it is time to stop before there is one.
    async fn register(
        &self,
        stop: &CancellationToken,
        end: Option<Instant>,
    ) -> Result<Option<crate::store::LeaseId>> {
        let mut delay = Duration::from_millis(100);
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
                () = sleep(delay) => {}
            }
            delay = (delay * 2).min(Duration::from_secs(5));
        }
        Ok(None)
    }

    /// Says of the newest runs that wait for a pipeline which is not registered here, once for each name: it may be
    /// misspelt.
    async fn warn_of_unknown_pipelines(&self, names: &[String]) {
        const NEWEST: u32 = 50;
        let filter = RunFilter::new().status(Status::Pending);
        // It is asked again before long.
        let Ok(runs) = self.queue.runs(filter, NEWEST).await else {
            return;
        };
        let mut unknown = self.unknown.lock().unwrap_or_else(PoisonError::into_inner);
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

    /// What there is to know of a run; `None` if it is gone.
    async fn run_info(&self, run: RunId) -> Result<Option<Arc<RunInfo>>> {
        /// Runs are few beside their items; what is orphans is read again.
        const KNOWN: usize = 1024;
        let known = || self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(info) = known().get(&run) {
            return Ok(Some(Arc::clone(info)));
        }
        let Some(found) = self.queue.run(run).await? else {
            return Ok(None);
        };
        // A spec of somebody else's making says nothing to us.
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
