//! [`ContextBuilder`]: builds a context.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Context, ParallelToggle, Shared};
use crate::call::memo::Memo;
use crate::call::scope::{Bounds, MemoNamespace, Scope};
use crate::call::{CallStack, Deployment, Deployments, FALLBACK_AFTER, Retry, TokenCounter};
use crate::event::{Event, Observer, Observers};
use crate::ratelimit::{Lane, Pace};
#[cfg(doc)]
use crate::request::Request;
use crate::store::journal::Journal;
use crate::store::{RepliesOnly, ReplyStore, Store};

/// Builds a [`Context`].
#[must_use = "a builder does nothing until `build`"]
pub struct ContextBuilder {
    first: Deployment,
    /// The other deployments, and whether each is a fallback.
    others: Vec<(Deployment, bool)>,
    fallback_after: Duration,
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

impl Context {
    /// Starts a context around a provider, or a [`Deployment`] with a name or a model, with no limits and default retries.
    pub fn builder(deployment: impl Into<Deployment>) -> ContextBuilder {
        ContextBuilder::new(deployment.into())
    }
}

impl ContextBuilder {
    fn new(first: Deployment) -> Self {
        Self {
            first,
            others: Vec::new(),
            fallback_after: FALLBACK_AFTER,
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

    /// Sets the limits of the account, in a lane of its own; unlimited unless set.
    pub fn pace(self, pace: Pace) -> Self {
        self.lane(Lane::new(pace))
    }

    /// Sets the lane of the account, which several contexts can share.
    pub fn lane(mut self, lane: Lane) -> Self {
        self.first.lane = lane;
        self
    }

    /// Adds another deployment of the same model: an account, a region, a server.
    ///
    /// Each call goes where it can start first: it queues in the lanes of all deployments, and the first one that has room
    /// takes it. After a failure, it goes to another deployment. A deployment whose account is refused
    /// ([`Error::is_account_wide`](crate::Error::is_account_wide)) gets no more calls; after five minutes one call tries
    /// again.
    pub fn deployment(mut self, deployment: impl Into<Deployment>) -> Self {
        self.others.push((deployment.into(), false));
        self
    }

    /// Adds a deployment, often of another model, for calls that those before it cannot make: when
    /// all of them are disabled or [cool down for long](Self::fallback_after), or when a call has used up
    /// its attempts there. Then the call has the same number of attempts here.
    pub fn fallback(mut self, deployment: impl Into<Deployment>) -> Self {
        self.others.push((deployment.into(), true));
        self
    }

    /// Sets for how long a lane must be cooling down until calls go to a [fallback](Self::fallback); 10 minutes unless set.
    /// `Duration::MAX` lets them wait.
    pub fn fallback_after(mut self, cooldown: Duration) -> Self {
        self.fallback_after = cooldown;
        self
    }

    /// Sets how often failing calls are tried again.
    pub fn retry(mut self, retry: Retry) -> Self {
        self.retry = Some(retry);
        self
    }

    /// Sets how the tokens of prompts are counted before a call; see [`TokenCounter`].
    pub fn token_counter(mut self, counter: impl TokenCounter) -> Self {
        self.counter = Some(Box::new(counter));
        self
    }

    /// Sets the model of requests that name none.
    pub fn model(mut self, model: impl Into<Arc<str>>) -> Self {
        self.model = Some(model.into());
        self
    }

    /// Sets the longest time that one call may take, from sending to the last byte; 10 minutes unless
    /// set. [`Request::timeout`] overrides it. See the [table of all timeouts](crate::timeouts).
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

    /// Sets the deadline of the whole context.
    pub fn deadline(mut self, deadline: Instant) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Sets a token that cancels everything, for an application that has one already.
    pub fn cancellation(mut self, token: CancellationToken) -> Self {
        self.cancel = Some(token);
        self
    }

    /// Sets the store for replies: each reply is looked up before its call, and stored before it is parsed.
    ///
    /// The key of a reply consists of the place of its request (batch and [key](crate::Batch::key) of the item, labels),
    /// its content ([`Request::digest`]), and the number of identical requests before it there. So a second run replays
    /// the replies, also with another parser; two items with the same prompt get two replies, and n identical
    /// requests of one item get n. [`Request::shared`] shares a reply among items; [`Context::fresh`]
    /// ignores the stored replies. Give the items keys: without a key, the index names an item, and an inserted item shifts
    /// those after it, whose replies are then paid for again.
    /// Concurrent identical requests of one item are numbered in the order in which they are made. If that order depends
    /// on timing, give each a label ([`Context::child`], [`Context::stage`]).
    ///
    /// Replies are written in the background, in batches ([`Journal`]): call [`Context::flush`] before the end.
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

    /// Sets a store of your own that holds replies only; see [`ReplyStore`]. [`store`](Self::store) documents the keys of
    /// replies.
    pub fn reply_store(mut self, replies: impl ReplyStore) -> Self {
        self.store = Some(Arc::new(RepliesOnly(replies)));
        self
    }

    /// Adds a closure that is called for every event; see [`Observer`].
    pub fn on_event(self, observer: impl Fn(&Event) + Send + Sync + 'static) -> Self {
        self.observer(observer)
    }

    /// Adds an observer of all events.
    pub fn observer(mut self, observer: impl Observer) -> Self {
        self.observers.add(observer);
        self
    }

    /// Builds the context.
    pub fn build(self) -> Context {
        let retry = self.retry.unwrap_or_default();
        let mut deployments = Deployments::new(self.first, self.fallback_after);
        for (deployment, is_fallback) in self.others {
            deployments.add(deployment, is_fallback);
        }
        let observers = Arc::new(self.observers);
        let mut bounds = Bounds::new(self.cancel);
        bounds.deadline = self.deadline;
        let mut scope = Scope::root(Arc::new(bounds));
        let memo = self.store.map(|store| {
            scope.namespace = Some(Arc::new(MemoNamespace::root("".into())));
            Arc::new(Memo::new(Journal::observed(store, Arc::clone(&observers))))
        });
        let calls = CallStack::new(
            deployments,
            self.counter,
            retry,
            self.call_timeout,
            Arc::clone(&observers),
        );
        Context {
            shared: Arc::new(Shared {
                calls: Arc::new(calls),
                memo,
                observers,
                model: self.model,
                grace: self.grace,
                parallel: self.parallel,
                items: Arc::default(),
            }),
            scope: Arc::new(scope),
        }
    }
}
