//! [`Counted`]: a store that counts the round trips to it, takes its time and fails when told to.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;

use crate::error::{Error, ErrorKind, Persistence, Result};
use crate::store::{
    Claim, Commit, Committed, Created, Generation, Hold, Intent, IntentName, Item, ItemId, LeaseId,
    LogEntry, MemoKey, Memory, NewRun, Purged, Queue, Reaped, Run, RunFilter, RunId, Store,
};

/// A store around another that counts the calls to it, each of which is a round trip: what is
/// counted is the same on every machine, what is timed is not.
///
/// ```
/// use std::sync::Arc;
/// use throughline::store::{Memory, NewRun, Store};
/// use throughline::testing::Counted;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
/// let store = Counted::new(Memory::new());
/// let run = store.create_run(NewRun::new("ada", "classes")).await?.run;
/// store.set_down(true);
/// assert!(store.run(run).await.is_err());
/// assert_eq!((store.calls("run"), store.trips()), (1, 2));
/// # Ok(()) }
/// ```
#[must_use]
pub struct Counted<S = Memory> {
    inner: S,
    latency: Duration,
    calls: Mutex<BTreeMap<&'static str, u64>>,
    down: AtomicBool,
    stuck: AtomicBool,
    fail_next: Mutex<Vec<&'static str>>,
    largest_commit: AtomicU64,
    refuse: Refuse,
}

type Refuse = Box<dyn Fn(&Commit) -> Option<Error> + Send + Sync>;

impl<S> Counted<S> {
    /// Counts the calls to `inner`.
    pub fn new(inner: S) -> Self {
        Self {
            inner,
            latency: Duration::ZERO,
            calls: Mutex::default(),
            down: AtomicBool::new(false),
            stuck: AtomicBool::new(false),
            fail_next: Mutex::default(),
            largest_commit: AtomicU64::new(0),
            refuse: Box::new(|_| None),
        }
    }

    /// Lets each round trip take this long, on Tokio's clock.
    pub fn latency(mut self, latency: Duration) -> Self {
        self.latency = latency;
        self
    }

    /// Fails the commits for which `why` has an error, with that error.
    pub fn refuse(
        mut self,
        why: impl Fn(&Commit) -> Option<Error> + Send + Sync + 'static,
    ) -> Self {
        self.refuse = Box::new(why);
        self
    }

    /// Calls of a method of [`Store`] or [`Queue`], by its name, failed ones included.
    pub fn calls(&self, method: &str) -> u64 {
        self.lock().get(method).copied().unwrap_or_default()
    }

    /// All calls.
    pub fn trips(&self) -> u64 {
        self.lock().values().sum()
    }

    /// Begins to count from 0.
    pub fn forget(&self) {
        self.lock().clear();
    }

    /// Fails every call with a temporary [`ErrorKind::Store`], or no longer.
    pub fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::Relaxed);
    }

    /// Fails the next call of each of these methods with a temporary [`ErrorKind::Store`]: a broken connection.
    pub fn fail_next(&self, methods: impl IntoIterator<Item = &'static str>) {
        let mut failing = self
            .fail_next
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        failing.extend(methods);
    }

    /// Lets commits hang for ever, or those that come no longer.
    pub fn set_stuck(&self, stuck: bool) {
        self.stuck.store(stuck, Ordering::Relaxed);
    }

    /// How many rows the largest commit had.
    pub fn largest_commit(&self) -> u64 {
        self.largest_commit.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, u64>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn enter(&self, method: &'static str) -> Result<()> {
        *self.lock().entry(method).or_default() += 1;
        if !self.latency.is_zero() {
            tokio::time::sleep(self.latency).await;
        }
        let broken = {
            let mut failing = self
                .fail_next
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let place = failing.iter().position(|failing| *failing == method);
            place.map(|place| failing.swap_remove(place)).is_some()
        };
        if broken || self.down.load(Ordering::Relaxed) {
            let error = Error::new(ErrorKind::Store, "the store is down");
            return Err(error.with_persistence(Persistence::Temporary));
        }
        Ok(())
    }
}

impl Default for Counted {
    fn default() -> Self {
        Self::new(Memory::new())
    }
}

impl<S> fmt::Debug for Counted<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Counted")
            .field("calls", &*self.lock())
            .finish_non_exhaustive()
    }
}

macro_rules! counted {
    ($trait:ident { $(fn $name:ident(&self $(, $arg:ident: $ty:ty)*) -> $ret:ty;)* } $($rest:tt)*) => {
        #[async_trait]
        impl<S: Queue> $trait for Counted<S> {
            $(async fn $name(&self $(, $arg: $ty)*) -> $ret {
                self.enter(stringify!($name)).await?;
                self.inner.$name($($arg),*).await
            })*
            $($rest)*
        }
    };
}

counted!(Store {
    fn create_run(&self, run: NewRun) -> Result<Created>;
    fn run(&self, run: RunId) -> Result<Option<Run>>;
    fn runs(&self, filter: RunFilter, limit: u32) -> Result<Vec<Run>>;
    fn items(&self, run: RunId, from: u64, limit: u32) -> Result<Vec<Item>>;
    fn log(&self, run: RunId, after: u64, limit: u32) -> Result<Vec<LogEntry>>;
    fn generations(&self, tenant: &str, keys: &[MemoKey]) -> Result<Vec<Generation>>;
    fn put_intents(&self, intents: &[Intent]) -> Result<()>;
    fn ambiguous(&self, after: Option<IntentName>, limit: u32) -> Result<Vec<Intent>>;
    fn intents(&self, items: &[ItemId]) -> Result<Vec<Intent>>;
    fn cancel(&self, run: RunId) -> Result<u64>;
    fn retry_failed(&self, run: RunId) -> Result<u64>;
    fn purge(&self, older_than: Duration, limit: u32) -> Result<Purged>;
}
    fn name(&self) -> &'static str {
        "counted"
    }

    async fn commit(&self, commit: Commit) -> Result<Committed> {
        self.enter("commit").await?;
        let rows = commit.generations.len() + commit.settlements.len();
        let rows = rows + commit.notes.len() + commit.ended_intents.len();
        self.largest_commit.fetch_max(rows as u64, Ordering::Relaxed);
        if self.stuck.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        if let Some(error) = (self.refuse)(&commit) {
            return Err(error);
        }
        self.inner.commit(commit).await
    }
);

counted!(Queue {
    fn register(&self, worker: &str, ttl: Duration) -> Result<LeaseId>;
    fn heartbeat(&self, lease: LeaseId, ttl: Duration) -> Result<bool>;
    fn retire(&self, lease: LeaseId) -> Result<u64>;
    fn claim(&self, lease: LeaseId, claim: Claim<'_>) -> Result<Vec<Item>>;
    fn has_suspects(&self, pipelines: &[&str]) -> Result<bool>;
    fn release(&self, holds: &[Hold], delay: Duration, charge: bool) -> Result<u64>;
    fn held(&self, lease: LeaseId) -> Result<Vec<Item>>;
    fn lost(&self, holds: &[Hold]) -> Result<Vec<ItemId>>;
    fn reap(&self) -> Result<Reaped>;
});
