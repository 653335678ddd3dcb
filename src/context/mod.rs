//! [`Context`]: the shared state of some work, the first argument of everything that makes calls.

mod builder;
mod join;
#[cfg(feature = "signal")]
mod signal;
mod stream;
mod toggle;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

pub use self::builder::ContextBuilder;
pub use self::join::Join;
#[cfg(feature = "signal")]
pub use self::signal::stop_on_signal;
pub use self::stream::Deltas;
pub use self::toggle::ParallelToggle;
use crate::call::memo::Memo;
use crate::call::scope::{Bounds, MemoNamespace, Scope};
use crate::call::{CallOptions, CallStack, Tally};
use crate::error::{Error, Result};
use crate::event::{Event, Observers};
use crate::provider::Provider;
use crate::ratelimit::{Binding, Lane, LaneSnapshot, Pace, Priority, QueueKey, Tenant};
use crate::request::Reply;
use crate::request::Request;
use crate::store::Store;
use crate::store::journal::Journal;

/// The shared state of some work: the providers behind their lanes and retries, the observers, the
/// deadline, the cancellation, and the path of labels. Cheap to clone.
///
/// ```
/// use throughline::{Context, Pace, Reply, testing::Scripted};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
/// let provider = Scripted::new().reply("The Danube.");
/// let cx = Context::builder(provider)
///     .pace(Pace::per_minute(60).in_flight(4))
///     .model("some-model")
///     .build();
/// assert_eq!(cx.generate("Name a river.").await?.text, "The Danube.");
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Context {
    shared: Arc<Shared>,
    scope: Arc<Scope>,
}

/// The state that a context shares with those that are made from it.
#[derive(Clone)]
struct Shared {
    calls: Arc<CallStack>,
    /// The stored replies, if there is a store.
    memo: Option<Arc<Memo>>,
    observers: Arc<Observers>,
    model: Option<Arc<str>>,
    grace: Duration,
    parallel: ParallelToggle,
    items: Arc<Items>,
}

/// Items of all batches of a context.
#[derive(Default)]
struct Items {
    started: AtomicU64,
    done: AtomicU64,
    failed: AtomicU64,
    cancelled: AtomicU64,
    dropped: AtomicU64,
    /// Batches that may not start another item until one of theirs ends.
    full_batches: AtomicU64,
}

impl Context {
    /// Sends a request: waits for a permit of the lane, calls the provider, and tries again by the retry policy. The page
    /// on [`timeouts`](crate::timeouts) lists the timeouts that apply.
    ///
    /// # Errors
    /// The provider's last error; [`Error::attempts`](crate::Error::attempts) is the number of calls.
    /// [`ErrorKind::Cancelled`](crate::ErrorKind::Cancelled) and
    /// [`ErrorKind::DeadlineExceeded`](crate::ErrorKind::DeadlineExceeded) if the context ended
    /// first; [`Error::billed`](crate::Error::billed) says whether the call may have been paid for by then.
    ///
    /// # Cancel safety
    /// If the future is dropped before the call was sent, nothing is paid and the permit is given back.
    /// If it is dropped later, the provider may bill a reply that is lost.
    #[doc(alias = "retry")]
    pub fn generate(
        &self,
        request: impl Into<Request>,
    ) -> impl Future<Output = Result<Reply>> + Send {
        self.generate_with(Box::new(request.into()), CallOptions::default())
    }

    pub(crate) async fn generate_with(
        &self,
        mut request: Box<Request>,
        options: CallOptions<'_>,
    ) -> Result<Reply> {
        let shared = &*self.shared;
        if request.model.is_none() {
            request.model.clone_from(&shared.model);
        }
        if request.item_key.is_none() {
            request.item_key = self.scope.item_key().cloned();
        }
        let memo = shared.memo.as_deref();
        let call = shared.calls.generate(memo, &self.scope, &request, options);
        call.await
    }

    /// Returns a context that ignores the replies in the store, and stores its own replies apart from all others. Without
    /// a store, it differs in nothing.
    ///
    /// ```
    /// use throughline::store::Memory;
    /// use throughline::{Context, testing::Scripted};
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
    /// let provider = Scripted::new().reply("The Danube.").reply("The Rhine.");
    /// let cx = Context::builder(provider).store(Memory::new()).build();
    /// let first = cx.child("river").generate("Name a river.").await?;
    /// let again = cx.fresh().child("river").generate("Name a river.").await?;
    /// assert_eq!((&*first.text, &*again.text), ("The Danube.", "The Rhine."));
    /// # Ok(()) }
    /// ```
    #[must_use = "it makes a new context and leaves this one as it is"]
    pub fn fresh(&self) -> Self {
        let tag = || format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..));
        self.with_scope(|scope| {
            let namespace = scope.namespace.take();
            scope.namespace = namespace.map(|namespace| Arc::new(namespace.fresh(tag())));
        })
    }

    /// Waits until all replies so far are in the store. Returns at once without a store.
    ///
    /// # Errors
    /// The error of the store, while it fails. Writing goes on in the background. See [`Journal::flush`].
    pub async fn flush(&self) -> Result<()> {
        match self.journal() {
            Some(journal) => journal.flush().await,
            None => Ok(()),
        }
    }

    /// Returns the journal in front of the store, if there is a store.
    pub fn journal(&self) -> Option<&Journal> {
        Some(self.shared.memo.as_ref()?.journal())
    }

    /// Returns this context with its replies in the store of another journal.
    pub(crate) fn with_journal(&self, journal: Journal) -> Self {
        Self {
            shared: Arc::new(Shared {
                memo: Some(Arc::new(Memo::new(journal))),
                ..(*self.shared).clone()
            }),
            scope: Arc::clone(&self.scope),
        }
    }

    /// Makes a separate journal in front of `store`, whose failures are reported to this context's observers. It is for
    /// notes about the work, such as a log of its quality.
    pub fn journal_into(&self, store: impl Store) -> Journal {
        Journal::observed(Arc::new(store), self.shared_observers())
    }

    /// Returns a context one label further down the path, with a tally and a cancellation of its own.
    ///
    /// ```
    /// # use throughline::{Context, testing::Scripted};
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
    /// let cx = Context::builder(Scripted::new().reply("a").reply("b")).build();
    /// let (draft, review) = (cx.child("draft"), cx.child("review"));
    /// draft.generate("write").await?;
    /// review.cancel();
    /// assert!(review.generate("read").await.unwrap_err().is_cancelled());
    /// assert_eq!((&*draft.path(), draft.tally().attempts), ("draft", 1));
    /// assert_eq!(cx.tally().attempts, 1);
    /// # Ok(()) }
    /// ```
    #[must_use = "it makes a new context and leaves this one as it is"]
    pub fn child(&self, label: impl Into<Arc<str>>) -> Self {
        self.narrowed(label.into(), self.scope.bounds.child())
    }

    /// Returns a context that ends at `deadline`, or at this one's if that comes first.
    #[must_use = "it makes a new context and leaves this one as it is"]
    pub fn with_deadline(&self, deadline: Instant) -> Self {
        self.narrowed("".into(), self.scope.bounds.until(deadline))
    }

    /// Returns a context that ends after this time, or with this one if that comes first.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use throughline::{Context, testing::Scripted};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
    /// let slow = Scripted::new().delay(Duration::from_secs(9)).reply("late");
    /// let cx = Context::builder(slow).build();
    /// let error = cx.with_timeout(Duration::from_secs(5)).generate("hi").await.unwrap_err();
    /// assert!(error.is_deadline_exceeded());
    /// assert_eq!(error.billed(), None); // it was sent: not known
    /// # }
    /// ```
    #[must_use = "it makes a new context and leaves this one as it is"]
    pub fn with_timeout(&self, after: Duration) -> Self {
        match Instant::now().checked_add(after) {
            Some(deadline) => self.with_deadline(deadline),
            None => self.narrowed("".into(), self.scope.bounds.child()),
        }
    }

    /// Returns a context whose calls wait in the queue of that tenant; see [`Tenant`] for its share of the lane.
    #[must_use = "it makes a new context and leaves this one as it is"]
    pub fn with_tenant(&self, tenant: Tenant) -> Self {
        self.with_queue(|queue| queue.tenant = Some(tenant))
    }

    /// Returns a context whose calls have that priority.
    #[must_use = "it makes a new context and leaves this one as it is"]
    pub fn with_priority(&self, priority: Priority) -> Self {
        self.with_queue(|queue| queue.priority = priority)
    }

    fn with_queue(&self, change: impl FnOnce(&mut QueueKey)) -> Self {
        self.with_scope(|scope| change(&mut scope.queue))
    }

    fn with_scope(&self, change: impl FnOnce(&mut Scope)) -> Self {
        let bounds = Arc::new(self.scope.bounds.child());
        let mut scope = Scope::child(&self.scope, "".into(), bounds);
        change(&mut scope);
        Self {
            shared: Arc::clone(&self.shared),
            scope: Arc::new(scope),
        }
    }

    fn narrowed(&self, label: Arc<str>, bounds: Bounds) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            scope: Arc::new(Scope::child(&self.scope, label, Arc::new(bounds))),
        }
    }

    /// Returns the context of one item of a batch whose context is `self`.
    pub(crate) fn item(
        &self,
        label: Arc<str>,
        index: usize,
        key: Option<Arc<str>>,
        repeat: u32,
    ) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            scope: Arc::new(Scope::item(&self.scope, label, index, key, repeat)),
        }
    }

    /// Returns the context of an item that a worker runs: below this one, but with a namespace and bounds of its own.
    pub(crate) fn durable_item(
        &self,
        label: Arc<str>,
        key: Arc<str>,
        namespace: Arc<MemoNamespace>,
        deadline: Option<Instant>,
        queue: impl FnOnce(&mut QueueKey),
    ) -> Self {
        let bounds = match deadline {
            Some(deadline) => self.scope.bounds.until(deadline),
            None => self.scope.bounds.child(),
        };
        let mut scope = Scope::child(&self.scope, label, Arc::new(bounds.into_unit()));
        scope.key = Some(key);
        scope.namespace = Some(namespace);
        queue(&mut scope.queue);
        Self {
            shared: Arc::clone(&self.shared),
            scope: Arc::new(scope),
        }
    }

    /// Ends this context and all below it: calls that wait are not sent, and calls in flight are dropped.
    ///
    /// Only clones share a cancellation. A context made from another one ([`child`](Self::child),
    /// [`with_tenant`](Self::with_tenant), [`with_timeout`](Self::with_timeout) and so on) and that of each item of
    /// a batch have their own: cancelling or [draining](Self::drain) them ends neither the context they
    /// were made from nor their siblings.
    pub fn cancel(&self) {
        self.scope.bounds.cancel();
    }

    /// Lets calls in flight finish, and sends no new ones in this context and all below it. It is for a clean stop:
    /// the results of the calls in flight are kept.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use throughline::{Context, Sim};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
    /// let cx = Context::builder(Sim::builder().latency(Duration::from_secs(2)).build()).build();
    /// let stop = async {
    ///     tokio::time::sleep(Duration::from_secs(3)).await;
    ///     cx.drain();
    /// };
    /// let work = cx
    ///     .fan_out("page", 0..10)
    ///     .sequential()
    ///     .settle(async |cx, page| cx.generate(format!("page {page}")).await);
    /// let (settled, ()) = tokio::join!(work, stop);
    /// assert_eq!(settled.oks().count(), 2); // the one in flight is kept
    /// assert!(settled.failures().all(|failed| failed.error().unwrap().is_cancelled()));
    /// # }
    /// ```
    pub fn drain(&self) {
        self.scope.bounds.drain();
    }

    /// Returns whether batches and joins run in parallel ([`ContextBuilder::parallel`]).
    pub fn is_parallel(&self) -> bool {
        self.shared.parallel.is_on()
    }

    /// Returns whether [`cancel`](Self::cancel) was called here or above.
    pub fn is_cancelled(&self) -> bool {
        self.scope.bounds.is_cancelled()
    }

    /// Returns whether [`drain`](Self::drain) or [`cancel`](Self::cancel) was called here or above.
    pub fn is_draining(&self) -> bool {
        self.scope.bounds.is_draining()
    }

    /// Returns the deadline of this context.
    pub fn deadline(&self) -> Option<Instant> {
        self.scope.bounds.deadline
    }

    /// Fails if no new work may start.
    pub(crate) fn check(&self) -> Result<()> {
        self.scope.bounds.check()
    }

    /// Returns the path of labels, keys and indices from the root to here: `week-plan[3]/routine[0]`.
    pub fn path(&self) -> Arc<str> {
        self.scope.path()
    }

    /// Returns the calls and tokens of this context and all below it so far.
    pub fn tally(&self) -> Tally {
        self.scope.tally()
    }

    /// Returns the names of the deployments, in the order in which the builder got them
    /// ([`Deployment::name`](crate::call::Deployment::name)).
    pub fn deployments(&self) -> impl Iterator<Item = &str> {
        let deployments = self.shared.calls.deployments().iter();
        deployments.map(|deployment| deployment.name_or_provider())
    }

    /// Returns the lanes of all deployments, in the order in which the builder got them.
    pub fn lanes(&self) -> impl Iterator<Item = &Lane> {
        let deployments = self.shared.calls.deployments().iter();
        deployments.map(|deployment| &deployment.lane)
    }

    /// Returns the lane of the deployment with this name.
    ///
    /// # Errors
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) if no [deployment](Self::deployments) has this name.
    pub fn lane(&self, deployment: &str) -> Result<&Lane> {
        Ok(&self.shared.calls.deployments().find(deployment)?.lane)
    }

    /// Returns the provider of the deployment with this name, without lane and retries.
    ///
    /// # Errors
    /// As [`lane`](Self::lane).
    pub fn provider(&self, deployment: &str) -> Result<&Arc<dyn Provider>> {
        Ok(&self.shared.calls.deployments().find(deployment)?.provider)
    }

    /// Sends no more calls to the deployment with this name: its lane is stopped. Calls in flight finish, and those that
    /// wait go to another deployment, or fail with `reason` if there is none.
    ///
    /// # Errors
    /// As [`lane`](Self::lane).
    pub fn disable(&self, deployment: &str, reason: Error) -> Result<()> {
        self.lane(deployment)?.stop(reason);
        Ok(())
    }

    /// Sends calls to the deployment with this name again, after it was disabled: by [`disable`](Self::disable), or because
    /// the provider refused its account.
    ///
    /// ```
    /// # use throughline::{Context, Error, testing::Scripted, call::Deployment};
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
    /// # let (west, east) = (Scripted::new(), Scripted::new().reply("east").reply("east"));
    /// let cx = Context::builder(Deployment::new(west).name("west"))
    ///     .deployment(Deployment::new(east).name("east"))
    ///     .build();
    /// cx.disable("west", Error::other("maintenance"))?;
    /// assert_eq!(cx.generate("where?").await?.text, "east");
    /// cx.enable("west")?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`lane`](Self::lane).
    pub fn enable(&self, deployment: &str) -> Result<()> {
        self.lane(deployment)?.resume();
        Ok(())
    }

    /// Changes the limits of the deployment with this name, for calls that wait and calls in flight too, as
    /// [`Lane::retune`] does, and reports it to the observers.
    ///
    /// # Errors
    /// As [`lane`](Self::lane).
    pub fn retune(&self, deployment: &str, pace: Pace) -> Result<()> {
        let limits: Vec<_> = pace.limits().collect();
        self.lane(deployment)?.retune(pace);
        for (limit, per_minute) in limits {
            self.observers().tell(|| Event::LaneRetuned {
                limit: limit.as_str(),
                per_minute,
            });
        }
        Ok(())
    }

    /// Returns the progress of the work and the state of the lanes. It is cheap enough to be polled.
    pub fn snapshot(&self) -> Snapshot {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let items = &self.shared.items;
        // Settled first and started last, so that there are never more settled than started.
        let (items_done, items_failed) = (count(&items.done), count(&items.failed));
        let items_cancelled = count(&items.cancelled);
        let items_dropped = count(&items.dropped);
        let mut lane = self.shared.calls.deployments().snapshot();
        if lane.binding == Binding::Nothing {
            if self.shared.calls.is_budget_empty() {
                lane.binding = Binding::Budget;
            } else if count(&items.full_batches) > 0 {
                lane.binding = Binding::OpenItems;
            }
        }
        Snapshot {
            items_started: count(&items.started),
            items_done,
            items_failed,
            items_cancelled,
            items_dropped,
            tally: self.tally(),
            lane,
            observer_panics: self.observers().panics(),
        }
    }

    /// Reports that a reply could not be used and is asked for again.
    #[cfg(feature = "structured")]
    pub(crate) fn reask(&self, ask: u32, error: &Error) {
        self.observers().tell(|| Event::ReplyRejected {
            path: self.path(),
            ask,
            error: error.clone(),
        });
    }

    /// Returns how long [`join_best_effort`](Self::join_best_effort) waits for an update after its work.
    pub(crate) fn best_effort_grace(&self) -> Duration {
        self.shared.grace
    }

    pub(crate) fn scope(&self) -> &Arc<Scope> {
        &self.scope
    }

    pub(crate) fn bounds(&self) -> &Bounds {
        &self.scope.bounds
    }

    pub(crate) fn observers(&self) -> &Observers {
        &self.shared.observers
    }

    pub(crate) fn shared_observers(&self) -> Arc<Observers> {
        Arc::clone(&self.shared.observers)
    }

    /// Returns the path of the item of that name in a batch with that label of this context.
    pub(crate) fn item_path(&self, label: &str, name: &str) -> String {
        match &*self.path() {
            "" => format!("{label}[{name}]"),
            path if label.is_empty() => format!("{path}[{name}]"),
            path => format!("{path}/{label}[{name}]"),
        }
    }

    pub(crate) fn item_started(&self) {
        self.shared.items.started.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a started item that was dropped before its outcome.
    pub(crate) fn item_dropped(&self) {
        self.shared.items.dropped.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a batch whose parallelism is the limiting factor: it has inputs left and as many items open as it may have.
    pub(crate) fn batch_is_full(&self, is_full: bool) {
        let batches = &self.shared.items.full_batches;
        match is_full {
            true => batches.fetch_add(1, Ordering::Relaxed),
            false => batches.fetch_sub(1, Ordering::Relaxed),
        };
    }

    pub(crate) fn item_settled(&self, error: Option<&Error>) {
        let items = &self.shared.items;
        let counter = match error {
            None => &items.done,
            Some(error) if error.is_cancelled() => &items.cancelled,
            Some(_) => &items.failed,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("deployments", &self.deployments().collect::<Vec<_>>())
            .field("path", &self.path())
            .field("tally", &self.tally())
            .finish_non_exhaustive()
    }
}

/// The progress of a context's work ([`Context::snapshot`]).
///
/// Items and panics are counted over the whole context, the tally for the context that is asked
/// and all below it, and the lane over all contexts that share it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Snapshot {
    /// Items of batches that were started.
    pub items_started: u64,
    /// Items that succeeded.
    pub items_done: u64,
    /// Items that failed, without those that were cancelled.
    pub items_failed: u64,
    /// Items that ended because of [`drain`](Context::drain) or [`cancel`](Context::cancel), most of
    /// them before a call was sent.
    pub items_cancelled: u64,
    /// Items that were dropped with their batch before they ended.
    pub items_dropped: u64,
    /// The calls and tokens so far.
    pub tally: Tally,
    /// The lane: calls in flight and waiting, and the limit that binds now.
    pub lane: LaneSnapshot,
    /// The panics of observers and progress callbacks, which were caught.
    pub observer_panics: u64,
}

impl Snapshot {
    /// Returns the number of items that have ended: done, failed or cancelled.
    pub fn items_ended(&self) -> u64 {
        self.items_done + self.items_failed + self.items_cancelled
    }

    /// Returns the number of items that have started and not ended.
    pub fn items_running(&self) -> u64 {
        let over = self.items_ended() + self.items_dropped;
        self.items_started.saturating_sub(over)
    }
}
