//! [`WorkerBuilder`]: the options of a worker.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::registry::Registry;
use super::{AmbiguousPolicy, Counters, FOREVER, Inner, Worker};
use crate::context::Context;
use crate::pipeline::Pipeline;
use crate::ratelimit::{Priority, Tenant};
use crate::store::Queue;
use crate::store::journal::Journal;

pub(super) type QueueOfTenant = Box<dyn Fn(&str) -> (Priority, Option<Tenant>) + Send + Sync>;

/// The options of a worker.
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

/// A builder for [`Worker`].
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

    /// Registers the pipeline for runs that were submitted as `name`.
    ///
    /// # Panics
    /// If the name is taken.
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

    /// Sets the name of the worker for people; `worker-` and the process id unless set. It need not be unique.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.options.name = name.into();
        self
    }

    /// Sets the number of items that run concurrently; 64 unless set, enough for the lane to be the limit with most
    /// accounts. A crash interrupts at most as many items.
    ///
    /// # Panics
    /// If `items` is 0.
    #[track_caller]
    pub fn in_flight(mut self, items: usize) -> Self {
        assert!(
            items > 0,
            "a worker with no items in flight would never work"
        );
        self.options.in_flight = items;
        self
    }

    /// Sets how long after the last heartbeat other workers leave the items of this one alone; 30 s unless set, and at least
    /// 100 ms, because a busy machine would lose shorter leases. Heartbeats are three times as frequent.
    ///
    /// A worker takes suspects, items whose workers have died, after it has lived for one lease, and makes their last attempt
    /// after 16. A worker that is [driven](Worker::drive) for a shorter time does so in the second half of that time.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.options.lease = lease.clamp(Duration::from_millis(100), FOREVER);
        self
    }

    /// Sets how often an idle worker looks for items; 500 ms unless set, and at least 1 ms.
    pub fn poll_every(mut self, poll: Duration) -> Self {
        self.options.poll = poll.clamp(Duration::from_millis(1), FOREVER);
        self
    }

    /// Sets how long calls in flight may take to finish after the worker was stopped, before they are dropped; 30 s unless
    /// set. It is at most a quarter of a budget ([`Worker::drive`]).
    pub fn drain_for(mut self, drain: Duration) -> Self {
        self.options.drain = drain.min(FOREVER);
        self
    }

    /// Sets whether each call is written down before it is sent, so that after a crash
    /// [`Runner::ambiguous`](crate::Runner::ambiguous) lists the calls that may have been paid for in vain; on unless set.
    /// Each call then waits for the store, a few milliseconds that concurrent calls share.
    pub fn intents(mut self, intents: bool) -> Self {
        self.options.intents = intents;
        self
    }

    /// Sets the policy for items whose last worker died, or was stopped, with a call in flight; [`AmbiguousPolicy::Retry`]
    /// unless set.
    pub fn on_ambiguous(mut self, policy: AmbiguousPolicy) -> Self {
        self.options.ambiguous = policy;
        self
    }

    /// Sets the priority and the queue of the lane in which the calls of a tenant wait, by the name of the tenant. Unless set,
    /// each tenant has a queue of its own, of weight 1 and [`Priority::Normal`].
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

    /// Builds the worker.
    pub fn build(self) -> Worker {
        let observers = self.cx.shared_observers();
        let journal = Journal::observed(Arc::clone(&self.queue) as _, observers);
        Worker(Arc::new(Inner {
            queue: self.queue,
            cx: self.cx.with_journal(journal.clone()),
            registry: self.registry,
            options: self.options,
            journal,
            created_at: Instant::now(),
            unknown: Default::default(),
            runs: Default::default(),
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
