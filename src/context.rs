//! [`Context`]: what a run works with.

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::{FutureExt as _, future};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::deployment::Deployment;
use crate::error::{Error, ErrorKind, Result};
use crate::estimate::TokenCounter;
use crate::event::{Event, Observer, Observers};
use crate::guard::{Guard, Sink, With};
use crate::join::Switch;
use crate::journal::Journal;
use crate::memo::{Asked, Memo, Place};
use crate::pace::{Binding, Lane, LaneSnapshot, Pace, Priority, Tenant, Who};
use crate::pool::Pool;
use crate::provider::Provider;
use crate::reply::Reply;
use crate::request::Request;
use crate::retry::Retry;
use crate::scope::{Bounds, Scope, Tally};
use crate::store::Store;

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
    parallel: Switch,
    items: Items,
}

/// Items of all batches of a context.
#[derive(Default)]
struct Items {
    started: AtomicU64,
    done: AtomicU64,
    failed: AtomicU64,
}

impl Context {
    /// Starts a context around `provider`, with no limits and default retries.
    pub fn builder(provider: impl Provider) -> ContextBuilder {
        ContextBuilder {
            first: Deployment::new(provider),
            others: Vec::new(),
            retries: None,
            counter: None,
            retry: None,
            model: None,
            call_timeout: Duration::from_secs(600),
            grace: Duration::from_secs(1),
            parallel: Switch::new(true),
            cancel: CancellationToken::new(),
            deadline: None,
            observers: Observers::default(),
            store: None,
        }
    }

    /// Asks the provider: waits for the lane, sends, tries again as the retry policy says.
    ///
    /// # Errors
    /// What the provider answered in the end; [`Error::attempts`] says after how many calls.
    /// [`ErrorKind::Cancelled`] and [`ErrorKind::DeadlineExceeded`] when the context ended
    /// first; [`Error::billed`] says whether the call may have been paid for by then.
    ///
    /// # Cancel safety
    /// Dropped before the call was sent, nothing is paid and the permit goes back whole.
    /// Dropped after, the provider may bill a reply that nobody receives.
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
        let with = With {
            sink,
            asked: asked.as_deref(),
        };
        let result = match &asked {
            None => guard.call(&self.scope, &request, with).await,
            Some(asked) => {
                let pay = || guard.call(&self.scope, &request, with).boxed();
                Box::pin(asked.answer(&self.scope, pay)).await
            }
        };
        result.inspect_err(|error| guard.failed(&self.scope, error))
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
    /// let (kind, data) = ("class".to_owned(), r#"{"minutes": 45}"#.to_owned());
    /// journal.write(Commit::new().notes([Note { run: classes, kind, data }])); // returns at once
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
    pub fn child(&self, label: impl Into<Arc<str>>) -> Self {
        self.narrowed(label.into(), self.scope.bounds.child())
    }

    /// A context that ends at `deadline`, or at this one's if that comes first.
    pub fn with_deadline(&self, deadline: Instant) -> Self {
        let mut bounds = self.scope.bounds.child();
        bounds.deadline = Some(bounds.deadline.map_or(deadline, |ours| ours.min(deadline)));
        self.narrowed("".into(), bounds)
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
    pub fn with_timeout(&self, after: Duration) -> Self {
        self.with_deadline(Instant::now() + after)
    }

    /// A context whose calls wait in the line of that tenant, and of that priority below
    /// it: see [`Tenant`] for what each gets of the lane.
    pub fn with_tenant(&self, tenant: Tenant) -> Self {
        self.in_line(|who| who.tenant = Some(tenant))
    }

    /// A context whose calls have that priority.
    pub fn with_priority(&self, priority: Priority) -> Self {
        self.in_line(|who| who.priority = priority)
    }

    fn in_line(&self, change: impl FnOnce(&mut Who)) -> Self {
        self.at(|scope| change(&mut scope.who))
    }

    fn at(&self, change: impl FnOnce(&mut Scope)) -> Self {
        let mut scope = Scope::child(&self.scope, "".into(), Arc::clone(&self.scope.bounds));
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
    pub(crate) fn item(&self, label: Arc<str>, index: usize, key: Option<Arc<str>>) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            scope: Arc::new(Scope::item(&self.scope, label, index, key)),
        }
    }

    /// The context of an item that a worker runs: below this one, but with a place and bounds of its own.
    pub(crate) fn durable_item(
        &self,
        label: Arc<str>,
        key: Arc<str>,
        place: Arc<Place>,
        who: impl FnOnce(&mut Who),
    ) -> Self {
        let bounds = Arc::new(self.scope.bounds.separate());
        let mut scope = Scope::child(&self.scope, label, bounds);
        scope.key = Some(key);
        scope.place = Some(place);
        who(&mut scope.who);
        Self {
            shared: Arc::clone(&self.shared),
            scope: Arc::new(scope),
        }
    }

    /// Runs `update` beside `work`, as "working on it" beside the work itself.
    ///
    /// Both start together. The result of `work` is never failed by the update, not even
    /// by a panic in it, and never delayed by more than a grace
    /// ([`ContextBuilder::alongside_grace`], 1 s unless set): an update that is
    /// not done by then is dropped and its result is an [`ErrorKind::Timeout`].
    ///
    /// While the context's [`Switch`] is off, the update starts behind the work and is given as long as
    /// it would have had beside it.
    ///
    /// ```
    /// # use throughline::{Context, Result, testing::Scripted};
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<()> {
    /// # let cx = Context::builder(Scripted::new().reply("hello")).build();
    /// let update = async { Err::<(), _>(throughline::Error::other("the socket is closed")) };
    /// let (reply, update) = cx.alongside(update, cx.generate("hi")).await;
    /// assert_eq!(reply?.text, "hello");
    /// assert!(update.is_err());
    /// # Ok(()) }
    /// ```
    ///
    /// # Cancel safety
    /// Dropping it drops both.
    pub async fn alongside<U, W>(
        &self,
        update: impl Future<Output = Result<U>>,
        work: impl Future<Output = W>,
    ) -> (W, Result<U>) {
        let grace = self.shared.grace;
        // Boxed, because futures that hold futures by value triple with every level of a graph.
        let work = Box::pin(work);
        let update = AssertUnwindSafe(Box::pin(update)).catch_unwind();
        let (work, update) = if self.is_parallel() {
            match future::select(work, pin!(update)).await {
                future::Either::Left((work, update)) => (work, timeout(grace, update).await),
                future::Either::Right((update, work)) => (work.await, Ok(update)),
            }
        } else {
            // As long as it would have had beside the work, so that the results are the same.
            let began = Instant::now();
            let work = work.await;
            (work, timeout(began.elapsed() + grace, update).await)
        };
        let update = match update {
            Ok(Ok(result)) => result,
            Ok(Err(panic)) => Err(Error::panicked(panic)),
            Err(_) => Err(Error::new(
                ErrorKind::Timeout,
                format!("the update was not done {grace:?} after the work"),
            )),
        };
        (work, update)
    }

    /// Ends this context and all below it: what waits is not sent, calls in flight are dropped.
    /// An item's context shares its batch's cancellation.
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
    ///     .settle(|cx, page| async move { cx.generate(format!("page {page}")).await });
    /// let (settled, ()) = tokio::join!(work, stop);
    /// assert_eq!(settled.oks().count(), 2); // the one in flight is kept
    /// assert!(settled.failures().all(|failed| failed.error().unwrap().is_cancelled()));
    /// # }
    /// ```
    pub fn drain(&self) {
        self.scope.bounds.drain.cancel();
    }

    /// Whether batches and joins run in parallel ([`ContextBuilder::parallel`]).
    pub fn is_parallel(&self) -> bool {
        self.shared.parallel.is_on()
    }

    /// Whether [`cancel`](Self::cancel) was called here or above.
    pub fn is_cancelled(&self) -> bool {
        self.scope.bounds.cancel.is_cancelled()
    }

    /// Whether [`drain`](Self::drain) or [`cancel`](Self::cancel) was called here or above.
    pub fn is_draining(&self) -> bool {
        self.scope.bounds.drain.is_cancelled()
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
        let others = self.lanes().skip(1).map(Lane::snapshot);
        let mut lane = others.fold(self.lane().snapshot(), LaneSnapshot::beside);
        if lane.binding == Binding::Nothing && self.shared.guard.budget_is_dry() {
            lane.binding = Binding::Budget;
        }
        Snapshot {
            items_started: count(&items.started),
            items_done,
            items_failed,
            tally: self.tally(),
            lane,
            observer_panics: self.observers().panics(),
        }
    }

    /// A reply could not be used and is asked for again.
    #[cfg(feature = "structured")]
    pub(crate) fn reask(&self, ask: u32, error: &Error) {
        self.scope.add(Tally {
            reasked: 1,
            ..Tally::default()
        });
        self.observers().tell(|| Event::ReplyRejected {
            path: self.path(),
            ask,
            error: error.clone(),
        });
    }

    /// The key of the item this context belongs to.
    pub(crate) fn key(&self) -> Option<Arc<str>> {
        self.scope.key.clone()
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

    pub(crate) fn item_started(&self) {
        self.shared.items.started.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn item_settled(&self, ok: bool) {
        let items = &self.shared.items;
        let counter = if ok { &items.done } else { &items.failed };
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
    /// Items that failed.
    pub items_failed: u64,
    /// What the work has cost so far.
    pub tally: Tally,
    /// The lane: in flight, waiting, and what binds now.
    pub lane: LaneSnapshot,
    /// Panics in observers and progress callbacks, caught.
    pub observer_panics: u64,
}

impl Snapshot {
    /// Items that are under way.
    pub fn items_running(&self) -> u64 {
        self.items_started
            .saturating_sub(self.items_done + self.items_failed)
    }
}

/// Builds a [`Context`].
#[must_use = "a builder does nothing until `build`"]
pub struct ContextBuilder {
    first: Deployment,
    /// Those after it, and whether each begins the next group.
    others: Vec<(Deployment, bool)>,
    /// The retries that the pace brings.
    retries: Option<u32>,
    counter: Option<Box<dyn TokenCounter>>,
    retry: Option<Retry>,
    model: Option<Arc<str>>,
    call_timeout: Duration,
    grace: Duration,
    parallel: Switch,
    cancel: CancellationToken,
    deadline: Option<Instant>,
    observers: Observers,
    store: Option<Arc<dyn Store>>,
}

impl ContextBuilder {
    /// The limits of the account; the context gets a lane of its own. Unlimited unless set.
    /// A pace that brings a number of retries ([`Pace::safe`]) sets them, unless
    /// [`retry`](Self::retry) does.
    pub fn pace(mut self, pace: Pace) -> Self {
        self.retries = pace.retries();
        self.lane(Lane::new(pace))
    }

    /// A lane that several contexts share, because the account is the same.
    pub fn lane(mut self, lane: Lane) -> Self {
        self.first.lane = lane;
        self
    }

    /// Another deployment of what the context calls: an account, a region, a server. A call
    /// goes where it can start first; one that failed goes elsewhere next; one whose
    /// account is refused ([`Error::is_account_wide`]) is left out. See [`Pool`].
    pub fn beside(mut self, deployment: Deployment) -> Self {
        self.others.push((deployment, false));
        self
    }

    /// A deployment, often of another model, for calls that those before it cannot make: when
    /// all of them are left out or closed for more than 10 minutes, or when a call has used up
    /// its attempts there. It gets the same number of attempts here.
    pub fn fallback(mut self, deployment: Deployment) -> Self {
        self.others.push((deployment, true));
        self
    }

    /// How often failing calls are tried again.
    pub fn retry(mut self, retry: Retry) -> Self {
        self.retry = Some(retry);
        self
    }

    /// How the tokens of prompts are counted, before the provider says; see [`TokenCounter`].
    pub fn token_counter(mut self, counter: impl TokenCounter) -> Self {
        self.counter = Some(Box::new(counter));
        self
    }

    /// The model of requests that name none.
    pub fn model(mut self, model: impl Into<Arc<str>>) -> Self {
        self.model = Some(model.into());
        self
    }

    /// The longest one call may take, from sending to the last byte; 10 minutes unless
    /// set. [`Request::timeout`] overrules it.
    pub fn call_timeout(mut self, timeout: Duration) -> Self {
        self.call_timeout = timeout;
        self
    }

    /// How long a finished piece of work waits for the update beside it
    /// ([`Context::alongside`]); 1 s unless set.
    pub fn alongside_grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// A switch that turns the parallelism of this context off and on at run time.
    pub fn parallel(mut self, switch: &Switch) -> Self {
        self.parallel = switch.clone();
        self
    }

    /// When everything ends.
    pub fn deadline(mut self, deadline: Instant) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// A token that cancels everything, for an application that has one already.
    pub fn cancellation(mut self, token: CancellationToken) -> Self {
        self.cancel = token;
        self
    }

    /// Where replies are remembered: each is looked for before it is paid for, and kept before it is parsed.
    ///
    /// A reply is remembered under where it was asked (batch and [key](crate::Batch::key) of the item, labels),
    /// what was asked ([`Request::digest`]), and which time (the nth identical request there). So a second run replays,
    /// also with another parser; two items with one prompt get two answers, and n identical
    /// requests of one item get n. [`Request::shared`] shares an answer among items; [`Context::fresh`]
    /// asks anew. Give items keys: without one the index names an item, and an inserted one re-pays those behind it.
    ///
    /// Replies are written behind the work, in batches ([`Journal`]): [`Context::flush`] before the end.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use throughline::store::Memory;
    /// use throughline::{Context, testing::Scripted};
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
    /// let store = Arc::new(Memory::new());
    /// let provider = Scripted::new().reply("2,850 km");
    /// for run in [1, 2] {
    ///     let cx = Context::builder(provider.clone()).store(Arc::clone(&store)).build();
    ///     let lengths = cx
    ///         .fan_out("length", ["Danube"])
    ///         .key(|river| river.to_string())
    ///         .settle(|cx, river| async move { cx.generate(format!("How long is the {river}?")).await })
    ///         .await;
    ///     assert_eq!(lengths.tally().replayed, run - 1);
    ///     assert_eq!(lengths.all()?[0].text, "2,850 km");
    ///     cx.flush().await?;
    /// }
    /// # Ok(()) }
    /// ```
    pub fn store(mut self, store: impl Store) -> Self {
        self.store = Some(Arc::new(store));
        self
    }

    /// A closure that is told of every event; see [`Observer`].
    pub fn on_event(self, observer: impl Fn(&Event) + Send + Sync + 'static) -> Self {
        self.observer(observer)
    }

    /// An observer that is told of every event.
    pub fn observer(mut self, observer: impl Observer) -> Self {
        self.observers.add(observer);
        self
    }

    /// The context.
    pub fn build(self) -> Context {
        let retry = self.retry.unwrap_or_else(|| match self.retries {
            Some(retries) => Retry::default().attempts(retries + 1),
            None => Retry::default(),
        });
        let lane = |deployment: &Deployment| deployment.lane.clone();
        let mut pool = Pool::new(self.first.clone(), lane(&self.first));
        for (deployment, is_fallback) in self.others {
            let lane = lane(&deployment);
            pool = match is_fallback {
                true => pool.fallback(deployment, lane),
                false => pool.beside(deployment, lane),
            };
        }
        let observers = Arc::new(self.observers);
        let mut bounds = Bounds::new(self.cancel);
        bounds.deadline = self.deadline;
        let mut scope = Scope::root(Arc::new(bounds));
        scope.place = self.store.map(|store| {
            let journal = Journal::observed(store, Arc::clone(&observers));
            Arc::new(Place::root(Arc::new(Memo::new(journal)), "".into()))
        });
        Context {
            shared: Arc::new(Shared {
                guard: Guard::new(
                    pool,
                    self.counter,
                    retry,
                    self.call_timeout,
                    Arc::clone(&observers),
                ),
                observers,
                model: self.model,
                grace: self.grace,
                parallel: self.parallel,
                items: Items::default(),
            }),
            scope: Arc::new(scope),
        }
    }
}
