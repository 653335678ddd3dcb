//! [`WorkerBuilder`].

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::registry::Registry;
use super::{AmbiguousPolicy, Counters, FOREVER, Inner, Worker};
use crate::call::memo::Memo;
use crate::context::Context;
use crate::pipeline::Pipeline;
use crate::ratelimit::{Priority, Tenant};
use crate::store::Queue;
use crate::store::journal::Journal;

pub(super) type QueueOfTenant = Box<dyn Fn(&str) -> (Priority, Option<Tenant>) + Send + Sync>;

/// How a worker works.
pub(super) struct Options {
    pub(super) name: String,
    pub(super) in_flight: usize,
    pub(super) lease: Duration,
    pub(super) poll: Duration,
    pub(super) drain: Duration,
    pub(super) intents: bool,
    pub(super) ambiguous: AmbiguousPolicy,
    pub(super) queue_of: QueueOfTenant,
}

/// Builds a [`Worker`].
#[must_use = "a builder does nothing until `build`"]
pub struct WorkerBuilder {
    queue: Arc<dyn Queue>,
    cx: Context,
    registry: Registry,
    options: Options,
}

impl WorkerBuilder {
    pub(super) fn new(queue: Arc<dyn Queue>, cx: Context) -> Self {
        let queue_of = |tenant: &str| {
            let tenant = (!tenant.is_empty()).then(|| Tenant::new(tenant, 1));
            (Priority::default(), tenant)
        };
        Self {
            queue,
            cx,
            registry: Registry::default(),
            options: Options {
                name: format!("worker-{}", std::process::id()),
                in_flight: 64,
                lease: Duration::from_secs(30),
                poll: Duration::from_millis(500),
                drain: Duration::from_secs(30),
                intents: true,
                ambiguous: AmbiguousPolicy::default(),
                queue_of: Box::new(queue_of),
            },
        }
    }

    /// Works on the runs that were submitted as `name`.
    ///
    /// # Panics
    /// If that name is taken.
    #[track_caller]
    pub fn register<P>(mut self, name: impl Into<Arc<str>>, pipeline: P) -> Self
    where
        P: Pipeline + 'static,
        P::Input: DeserializeOwned,
        P::Output: Serialize,
    {
        let name = name.into();
        assert!(
            self.registry.add(Arc::clone(&name), pipeline),
            "two pipelines are registered as {name:?}"
        );
        self
    }

    /// What people know it by in the store; `worker-` and the process id unless set. It need not be unique.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.options.name = name.into();
        self
    }

    /// How many items it works on at a time; 64 unless set: enough that the lane is what limits most
    /// accounts. They are what a crash can interrupt.
    ///
    /// # Panics
    /// If it is 0.
    #[track_caller]
    pub fn in_flight(mut self, items: usize) -> Self {
        assert!(
            items > 0,
            "a worker with no items in flight would never work"
        );
        self.options.in_flight = items;
        self
    }

    /// How long others leave its items alone when nothing is heard of it; 30 s unless set. It is heard
    /// of three times as often. At least 100 ms: with less, a busy machine would lose it again and again.
    ///
    /// A worker takes items that other workers have died with when it has lived for one lease, and gives them their last
    /// attempt when it has lived for 16; one that is [driven](Worker::drive) for a shorter time, in the second half of that time.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.options.lease = lease.clamp(Duration::from_millis(100), FOREVER);
        self
    }

    /// How often it looks for work when there was none; 500 ms unless set, and at least 1 ms.
    pub fn poll_every(mut self, poll: Duration) -> Self {
        self.options.poll = poll.clamp(Duration::from_millis(1), FOREVER);
        self
    }

    /// How long calls in flight may take to finish when it stops, before they are dropped; 30 s unless set.
    /// Of a budget ([`Worker::drive`]) it takes a quarter at most.
    pub fn drain_for(mut self, drain: Duration) -> Self {
        self.options.drain = drain.min(FOREVER);
        self
    }

    /// Whether each call is written down before it is sent, so that after a crash
    /// [`Runner::ambiguous`](crate::Runner::ambiguous) knows which may have been paid for in vain; on unless
    /// set. It costs a call a wait for the store, a few milliseconds that it shares with all others of
    /// that moment.
    pub fn intents(mut self, intents: bool) -> Self {
        self.options.intents = intents;
        self
    }

    /// What to do with an item whose last worker died, or was stopped, with a call in flight; [`AmbiguousPolicy::Retry`] unless set.
    pub fn on_ambiguous(mut self, policy: AmbiguousPolicy) -> Self {
        self.options.ambiguous = policy;
        self
    }

    /// In which line of the lane the calls of a tenant wait, by its name. Unless set, each tenant has a line
    /// of its own, of weight 1 and [`Priority::Normal`].
    ///
    /// ```
    /// use throughline::store::Memory;
    /// use throughline::{Context, Worker, testing::Scripted, ratelimit::{Priority, Tenant}};
    ///
    /// let cx = Context::builder(Scripted::new()).build();
    /// let worker = Worker::builder(Memory::new(), cx)
    ///     .tenants(|name| match name {
    ///         "staff" => (Priority::High, None),
    ///         paying if paying.starts_with("pro-") => (Priority::Normal, Some(Tenant::new(paying, 4))),
    ///         other => (Priority::Normal, Some(Tenant::new(other, 1))),
    ///     })
    ///     .build();
    /// # let _ = worker;
    /// ```
    pub fn tenants(
        mut self,
        queue_of: impl Fn(&str) -> (Priority, Option<Tenant>) + Send + Sync + 'static,
    ) -> Self {
        self.options.queue_of = Box::new(queue_of);
        self
    }

    /// The worker.
    pub fn build(self) -> Worker {
        let observers = self.cx.shared_observers();
        let journal = Journal::observed(Arc::clone(&self.queue) as _, observers);
        Worker(Arc::new(Inner {
            queue: self.queue,
            cx: self.cx,
            registry: self.registry,
            options: self.options,
            memo: Arc::new(Memo::new(journal)),
            created_at: Instant::now(),
            unknown: Mutex::default(),
            runs: Mutex::default(),
            counters: Counters::default(),
        }))
    }
}

impl fmt::Debug for WorkerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerBuilder")
            .field("name", &self.options.name)
            .field("pipelines", &self.registry.names())
            .finish_non_exhaustive()
    }
}
