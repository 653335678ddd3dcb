//! [`ContextBuilder`]: what a context is made of.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Context, Items, ParallelToggle, Shared};
use crate::call::deployment::Deployment;
use crate::call::estimate::TokenCounter;
use crate::call::guard::Guard;
use crate::call::memo::{Memo, Place};
use crate::call::pool::Pool;
use crate::call::retry::Retry;
use crate::call::scope::{Bounds, Scope};
use crate::event::{Event, Observer, Observers};
use crate::provider::Provider;
use crate::ratelimit::{Lane, Pace};
#[cfg(doc)]
use crate::request::Request;
use crate::store::journal::Journal;
use crate::store::{RepliesOnly, ReplyStore, Store};

/// Builds a [`Context`].
#[must_use = "a builder does nothing until `build`"]
pub struct ContextBuilder {
    first: Deployment,
    /// Those after it, and whether each begins the next group.
    others: Vec<(Deployment, bool)>,
    counter: Option<Box<dyn TokenCounter>>,
    retry: Option<Retry>,
    model: Option<Arc<str>>,
    call_timeout: Duration,
    grace: Duration,
    parallel: ParallelToggle,
    cancel: Option<CancellationToken>,
    deadline: Option<Instant>,
    observers: Observers,
    store: Option<Arc<dyn Store>>,
}

impl ContextBuilder {
    pub(super) fn new(provider: impl Provider) -> Self {
        Self {
            first: Deployment::new(provider),
            others: Vec::new(),
            counter: None,
            retry: None,
            model: None,
            call_timeout: Duration::from_secs(600),
            grace: Duration::from_secs(1),
            parallel: ParallelToggle::new(true),
            cancel: None,
            deadline: None,
            observers: Observers::default(),
            store: None,
        }
    }

    /// The limits of the account; the context gets a lane of its own. Unlimited unless set.
    pub fn pace(self, pace: Pace) -> Self {
        self.lane(Lane::new(pace))
    }

    /// A lane that several contexts share, because the account is the same.
    pub fn lane(mut self, lane: Lane) -> Self {
        self.first.lane = lane;
        self
    }

    /// Another deployment of what the context calls: an account, a region, a server. A call
    /// goes where it can start first; one that failed goes elsewhere next; one whose
    /// account is refused ([`Error::is_account_wide`](crate::Error::is_account_wide)) is left out. See [`Pool`].
    pub fn deployment(mut self, deployment: Deployment) -> Self {
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

    /// Sets how long [`Context::join_best_effort`] waits for an update after its work is done; 1 s unless set.
    pub fn best_effort_grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Sets a toggle that turns the parallelism of this context off and on at run time.
    pub fn parallel(mut self, toggle: &ParallelToggle) -> Self {
        self.parallel = toggle.clone();
        self
    }

    /// When everything ends.
    pub fn deadline(mut self, deadline: Instant) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// A token that cancels everything, for an application that has one already.
    pub fn cancellation(mut self, token: CancellationToken) -> Self {
        self.cancel = Some(token);
        self
    }

    /// Where replies are remembered: each is looked for before it is paid for, and kept before it is parsed.
    ///
    /// A reply is remembered under where it was asked (batch and [key](crate::Batch::key) of the item, labels),
    /// what was asked ([`Request::digest`]), and which time (the nth identical request there). So a second run replays,
    /// also with another parser; two items with one prompt get two answers, and n identical
    /// requests of one item get n. [`Request::shared`] shares an answer among items; [`Context::fresh`]
    /// asks anew. Give items keys: without one the index names an item, and an inserted one re-pays those behind it.
    /// Identical requests side by side in one item are numbered in the order in which they are asked: where that depends
    /// on timing, give each a label ([`Context::child`], [`Context::stage`]).
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
    ///         .settle(async |cx, river| cx.generate(format!("How long is the {river}?")).await)
    ///         .await;
    ///     assert_eq!(lengths.tally().replayed, run - 1);
    ///     assert_eq!(lengths.all()?[0].text, "2,850 km");
    ///     cx.flush().await?;
    /// }
    /// # Ok(()) }
    /// ```
    #[doc(alias = "cache")]
    #[doc(alias = "checkpoint")]
    #[doc(alias = "resume")]
    pub fn store(mut self, store: impl Store) -> Self {
        self.store = Some(Arc::new(store));
        self
    }

    /// Keeps replies in a store of your own that keeps nothing else; see [`ReplyStore`], and [`store`](Self::store) for how
    /// replies are found again.
    pub fn reply_store(mut self, replies: impl ReplyStore) -> Self {
        self.store = Some(Arc::new(RepliesOnly(replies)));
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
        let retry = self.retry.unwrap_or_default();
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
