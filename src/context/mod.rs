//! [`Context`]: what a run works with.

mod builder;
mod join;
#[cfg(feature = "signal")]
mod signal;
mod stream;
mod toggle;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::FutureExt as _;
use tokio::time::Instant;

pub use self::builder::ContextBuilder;
pub use self::join::Join;
#[cfg(feature = "signal")]
pub use self::signal::stop_on_signal;
pub use self::stream::Deltas;
pub use self::toggle::ParallelToggle;
use crate::call::deployment::Deployment;
use crate::call::guard::{Guard, Sink, With};
use crate::call::memo::{Asked, Place};
use crate::call::scope::{Bounds, Scope, Tally};
use crate::error::{Error, Result};
use crate::event::{Event, Observers};
use crate::provider::Provider;
use crate::ratelimit::{Binding, Lane, LaneSnapshot, Pace, Priority, QueueKey, Tenant};
use crate::request::Reply;
use crate::request::Request;
use crate::store::Store;
use crate::store::journal::Journal;

/// What a run works with: the provider behind its lane and retries, observers, the
/// deadline, cancellation, and the path of labels so far. Cheap to clone.
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

struct Shared {
    guard: Guard,
    observers: Arc<Observers>,
    model: Option<Arc<str>>,
    grace: Duration,
    parallel: ParallelToggle,
    items: Items,
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
    /// Starts a context around `provider`, with no limits and default retries.
    pub fn builder(provider: impl Provider) -> ContextBuilder {
        ContextBuilder::new(provider)
    }

    /// Asks the provider: waits for the lane, sends, tries again as the retry policy says.
    ///
    /// # Errors
    /// What the provider answered in the end; [`Error::attempts`](crate::Error::attempts) says after how many calls.
    /// [`ErrorKind::Cancelled`](crate::ErrorKind::Cancelled) and
    /// [`ErrorKind::DeadlineExceeded`](crate::ErrorKind::DeadlineExceeded) when the context ended
    /// first; [`Error::billed`](crate::Error::billed) says whether the call may have been paid for by then.
    ///
    /// # Cancel safety
    /// Dropped before the call was sent, nothing is paid and the permit goes back whole.
    /// Dropped after, the provider may bill a reply that nobody receives.
    #[doc(alias = "retry")]
    pub fn generate(
        &self,
        request: impl Into<Request>,
    ) -> impl Future<Output = Result<Reply>> + Send {
        self.generate_into(Box::new(request.into()), None)
    }

    /// As [`generate`](Self::generate); with a sink, the reply is passed on to it while it is
    /// being written.
    pub(crate) async fn generate_into(
        &self,
        mut request: Box<Request>,
        sink: Option<&Sink>,
    ) -> Result<Reply> {
        if request.model.is_none() {
            request.model.clone_from(&self.shared.model);
        }
        if request.item_key.is_none() {
            request.item_key = self.scope.item_key().cloned();
        }
        let guard = &self.shared.guard;
        // In boxes, so that calls without a store are not as large as those with one.
        let asked = Asked::new(&self.scope, &request).map(Box::new);
        let was_sent = AtomicBool::new(false);
        let with = With {
            sink,
            asked: asked.as_deref(),
            was_sent: &was_sent,
        };
        let call = || guard.call(&self.scope, &request, with);
        let result = match &asked {
            None => call().answer().await,
            Some(asked) => {
                let pay = || async { call().answer().await }.boxed();
                Box::pin(asked.answer(&self.scope, pay)).await
            }
        };
        let was_sent = was_sent.into_inner();
        if was_sent && request.asks_again {
            self.scope.add(Tally {
                reasked: 1,
                ..Tally::default()
            });
        }
        if let Err(error) = &result {
            guard.failed(&self.scope, was_sent, error);
            if let (Some(sink), Some(asked)) = (sink, asked) {
                sink.leave_unkept(asked);
            }
        }
        result
    }

    /// A context that asks anew, where there is a store: no reply of before is used, and those
    /// that it pays for are remembered apart from all others.
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
        self.at(|scope| {
            let place = scope.place.take();
            scope.place = place.map(|place| Arc::new(place.fresh(tag())));
        })
    }

    /// Waits until everything that was paid for is in the store. Nothing to do without a store.
    ///
    /// # Errors
    /// The store's, while it fails; what is not written yet is still tried again. See [`Journal::flush`].
    pub async fn flush(&self) -> Result<()> {
        match &self.scope.place {
            Some(place) => place.memo.journal().flush().await,
            None => Ok(()),
        }
    }

    /// The journal in front of the store, if there is one.
    pub fn journal(&self) -> Option<&Journal> {
        let place = self.scope.place.as_ref()?;
        Some(place.memo.journal())
    }

    /// A journal of your own in front of `store`, whose failures this context's observers are told of: for
    /// what is noted beside the work, as a log of its quality.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use throughline::store::{Commit, Memory, NewRun, Note, Store};
    /// # use throughline::{Context, testing::Scripted};
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
    /// # let cx = Context::builder(Scripted::new()).build();
    /// let store = Arc::new(Memory::new());
    /// let classes = store.create_run(NewRun::new("ada", "classes")).await?.run; // no items: a log
    /// let journal = cx.journal_into(Arc::clone(&store));
    /// let note = Note::new(classes, "class", r#"{"minutes": 45}"#);
    /// journal.write(Commit::new().notes([note])); // returns at once
    /// journal.flush().await?;
    /// # Ok(()) }
    /// ```
    pub fn journal_into(&self, store: impl Store) -> Journal {
        Journal::observed(Arc::new(store), self.shared_observers())
    }

    /// A context one label further down the path, with a tally and a cancellation of its own.
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

    /// A context that ends at `deadline`, or at this one's if that comes first.
    #[must_use = "it makes a new context and leaves this one as it is"]
    pub fn with_deadline(&self, deadline: Instant) -> Self {
        self.narrowed("".into(), self.scope.bounds.until(deadline))
    }

    /// A context that ends `after` this long from now, or with this one if that comes first.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use throughline::{Context, testing::Scripted};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
    /// let slow = Scripted::new().delay(Duration::from_secs(9)).reply("late");
    /// let cx = Context::builder(slow).build();
    /// let error = cx.with_timeout(Duration::from_secs(5)).generate("hi").await.unwrap_err();
    /// assert!(error.is_deadline_exceeded());
    /// assert_eq!(error.billed(), None); // it was sent, and nobody knows
    /// # }
    /// ```
    #[must_use = "it makes a new context and leaves this one as it is"]
    pub fn with_timeout(&self, after: Duration) -> Self {
        match Instant::now().checked_add(after) {
            Some(deadline) => self.with_deadline(deadline),
            None => self.narrowed("".into(), self.scope.bounds.child()),
        }
    }

    /// A context whose calls wait in the line of that tenant, and of that priority below
    /// it: see [`Tenant`] for what each gets of the lane.
    #[must_use = "it makes a new context and leaves this one as it is"]
    pub fn with_tenant(&self, tenant: Tenant) -> Self {
        self.in_line(|who| who.tenant = Some(tenant))
    }

    /// A context whose calls have that priority.
    #[must_use = "it makes a new context and leaves this one as it is"]
    pub fn with_priority(&self, priority: Priority) -> Self {
        self.in_line(|who| who.priority = priority)
    }

    fn in_line(&self, change: impl FnOnce(&mut QueueKey)) -> Self {
        self.at(|scope| change(&mut scope.who))
    }

    fn at(&self, change: impl FnOnce(&mut Scope)) -> Self {
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

    /// The context of one item of a batch whose context is `self`.
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

    /// The context of an item that a worker runs: below this one, but with a place and bounds of its own.
    pub(crate) fn durable_item(
        &self,
        label: Arc<str>,
        key: Arc<str>,
        place: Arc<Place>,
        deadline: Option<Instant>,
        who: impl FnOnce(&mut QueueKey),
    ) -> Self {
        let bounds = match deadline {
            Some(deadline) => self.scope.bounds.until(deadline),
            None => self.scope.bounds.child(),
        };
        let mut scope = Scope::child(&self.scope, label, Arc::new(bounds.into_unit()));
        scope.key = Some(key);
        scope.place = Some(place);
        who(&mut scope.who);
        Self {
            shared: Arc::clone(&self.shared),
            scope: Arc::new(scope),
        }
    }

    /// Ends this context and all below it: what waits is not sent, calls in flight are dropped.
    ///
    /// Only clones share a cancellation. A context made from another one ([`child`](Self::child),
    /// [`with_tenant`](Self::with_tenant), [`with_timeout`](Self::with_timeout) and so on) and that of each item of
    /// a batch have their own: cancelling or [draining](Self::drain) them ends neither the context they
    /// were made from nor their siblings.
    pub fn cancel(&self) {
        self.scope.bounds.cancel();
    }

    /// Sends nothing new in this context and all below it; calls in flight finish and their
    /// results are kept. For a clean stop.
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

    /// Whether batches and joins run in parallel ([`ContextBuilder::parallel`]).
    pub fn is_parallel(&self) -> bool {
        self.shared.parallel.is_on()
    }

    /// Whether [`cancel`](Self::cancel) was called here or above.
    pub fn is_cancelled(&self) -> bool {
        self.scope.bounds.is_cancelled()
    }

    /// Whether [`drain`](Self::drain) or [`cancel`](Self::cancel) was called here or above.
    pub fn is_draining(&self) -> bool {
        self.scope.bounds.is_draining()
    }

    /// When this context ends by itself.
    pub fn deadline(&self) -> Option<Instant> {
        self.scope.bounds.deadline
    }

    /// Why nothing new may start, if so.
    pub(crate) fn check(&self) -> Result<()> {
        self.scope.bounds.check()
    }

    /// The labels, keys and indices that lead here: `week-plan[3]/routine[0]`.
    pub fn path(&self) -> Arc<str> {
        self.scope.path()
    }

    /// What this context and all below it have cost so far.
    pub fn tally(&self) -> Tally {
        self.scope.tally()
    }

    /// The lane of the provider; of the first, where there are several.
    pub fn lane(&self) -> &Lane {
        self.first().1
    }

    /// The lanes of all deployments, in the order in which the builder was given them.
    pub fn lanes(&self) -> impl Iterator<Item = &Lane> {
        let deployments = self.shared.guard.pool().deployments();
        deployments.map(|(_, lane)| lane)
    }

    /// The bare provider, without lane and retries; the first, where there are several.
    pub fn provider(&self) -> &Arc<dyn Provider> {
        &self.first().0.provider
    }

    fn first(&self) -> (&Deployment, &Lane) {
        let mut deployments = self.shared.guard.pool().deployments();
        deployments.next().expect("a pool is made around its first")
    }

    /// Changes the limits under those who wait and those in flight, as [`Lane::retune`] does
    /// (of the first lane, where there are several), and tells the observers.
    pub fn retune(&self, pace: Pace) {
        let limits: Vec<_> = pace.limits().collect();
        self.lane().retune(pace);
        for (limit, per_minute) in limits {
            self.observers().tell(|| Event::LaneRetuned {
                limit: limit.as_str(),
                per_minute,
            });
        }
    }

    /// How the work stands, to poll as often as you like.
    pub fn snapshot(&self) -> Snapshot {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let items = &self.shared.items;
        // Settled first, started last: a reader never sees more settled than started.
        let (items_done, items_failed) = (count(&items.done), count(&items.failed));
        let items_cancelled = count(&items.cancelled);
        let items_dropped = count(&items.dropped);
        let mut lane = self.shared.guard.pool().snapshot();
        if lane.binding == Binding::Nothing {
            if self.shared.guard.budget_is_dry() {
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

    /// A reply could not be used and is asked for again.
    #[cfg(feature = "structured")]
    pub(crate) fn reask(&self, ask: u32, error: &Error) {
        self.observers().tell(|| Event::ReplyRejected {
            path: self.path(),
            ask,
            error: error.clone(),
        });
    }

    /// How long a finished piece of work waits for the update beside it.
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

    /// The path of the item of that name in a batch with that label of this context.
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

    /// An item that was started has been dropped before its outcome.
    pub(crate) fn item_dropped(&self) {
        self.shared.items.dropped.fetch_add(1, Ordering::Relaxed);
    }

    /// A batch has inputs left and as many items open as it may have, or no longer.
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
            .field("provider", &self.provider().name())
            .field("path", &self.path())
            .field("tally", &self.tally())
            .finish_non_exhaustive()
    }
}

/// How the work of a context stands ([`Context::snapshot`]).
///
/// Items and panics are counted over the whole context, the tally from the asking
/// context downwards, and the lane over everybody who shares it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Snapshot {
    /// Items of batches that have started.
    pub items_started: u64,
    /// Items that ended well.
    pub items_done: u64,
    /// Items that failed, those that were cancelled not counted.
    pub items_failed: u64,
    /// Items that ended because of [`drain`](Context::drain) or [`cancel`](Context::cancel), most of
    /// them before a call was sent.
    pub items_cancelled: u64,
    /// Items that were dropped on the way, with their batch.
    pub items_dropped: u64,
    /// What the work has cost so far.
    pub tally: Tally,
    /// The lane: in flight, waiting, and what binds now.
    pub lane: LaneSnapshot,
    /// Panics in observers and progress callbacks, caught.
    pub observer_panics: u64,
}

impl Snapshot {
    /// Items that are over: done, failed or cancelled.
    pub fn items_ended(&self) -> u64 {
        self.items_done + self.items_failed + self.items_cancelled
    }

    /// Items that are under way.
    pub fn items_running(&self) -> u64 {
        let over = self.items_ended() + self.items_dropped;
        self.items_started.saturating_sub(over)
    }
}
