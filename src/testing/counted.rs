//! [`Counted`]: a store that counts its round trips, and can delay and fail them.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::MutexGuard;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::error::{Error, ErrorKind, Persistence, Result};
use crate::store::forward::forward_store;
use crate::store::{Commit, Memory};
use crate::sync::Mutex;

/// A wrapper around a store that counts the calls to it. Each call is a round trip, and their number is the same on
/// every machine, unlike their time.
///
/// ```
/// use std::sync::Arc;
/// use throughline::store::{Memory, NewRun, Store, StoreExt};
/// use throughline::testing::Counted;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
/// let store = Counted::new(Memory::new());
/// let run = store.create_run(NewRun::new("ada", "classes")).await?.run;
/// store.set_down(true);
/// assert!(store.run(run).await.is_err());
/// assert_eq!((store.calls("runs"), store.trips()), (1, 2));
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
    /// Wraps `inner`.
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

    /// Delays each round trip by this time, on Tokio's clock.
    pub fn latency(mut self, latency: Duration) -> Self {
        self.latency = latency;
        self
    }

    /// Fails the commits for which `why` returns an error, with that error.
    pub fn refuse(
        mut self,
        why: impl Fn(&Commit) -> Option<Error> + Send + Sync + 'static,
    ) -> Self {
        self.refuse = Box::new(why);
        self
    }

    /// Returns the number of calls of a method of [`Store`](crate::store::Store) or [`Queue`](crate::store::Queue), failed
    /// ones included.
    pub fn calls(&self, method: &str) -> u64 {
        self.lock().get(method).copied().unwrap_or_default()
    }

    /// Returns the number of all calls.
    pub fn trips(&self) -> u64 {
        self.lock().values().sum()
    }

    /// Sets all counts to 0.
    pub fn forget(&self) {
        self.lock().clear();
    }

    /// Sets whether every call fails with a temporary [`ErrorKind::Store`].
    pub fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::Relaxed);
    }

    /// Fails the next call of each of these methods with a temporary [`ErrorKind::Store`], like a broken connection.
    pub fn fail_next(&self, methods: impl IntoIterator<Item = &'static str>) {
        let mut failing = self.fail_next.lock();
        failing.extend(methods);
    }

    /// Sets whether commits from now on hang for ever.
    pub fn set_stuck(&self, stuck: bool) {
        self.stuck.store(stuck, Ordering::Relaxed);
    }

    /// Returns the number of rows of the largest commit.
    pub fn largest_commit(&self) -> u64 {
        self.largest_commit.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, u64>> {
        self.calls.lock()
    }

    async fn enter(&self, method: &'static str) -> Result<()> {
        *self.lock().entry(method).or_default() += 1;
        if !self.latency.is_zero() {
            tokio::time::sleep(self.latency).await;
        }
        let broken = {
            let mut failing = self.fail_next.lock();
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

impl<S> Counted<S> {
    async fn enter_commit(&self, commit: &Commit) -> Result<()> {
        let rows = commit.generations.len() + commit.settlements.len() + commit.notes.len();
        let rows = rows + commit.intents.len() + commit.ended_intents.len();
        self.largest_commit
            .fetch_max(rows as u64, Ordering::Relaxed);
        if self.stuck.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        match (self.refuse)(commit) {
            Some(error) => Err(error),
            None => Ok(()),
        }
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

/// Counts a call, takes its time or fails it, and passes it on.
macro_rules! counted_call {
    ($self:tt.name()) => {
        "counted"
    };
    ($self:tt.commit(($commit:ident: $($type:tt)+))) => {{
        $self.enter("commit").await?;
        $self.enter_commit(&$commit).await?;
        $self.inner.commit($commit).await
    }};
    ($self:tt.$method:ident($(($argument:ident: $($type:tt)+)),*)) => {{
        $self.enter(stringify!($method)).await?;
        $self.inner.$method($($argument),*).await
    }};
}

forward_store!(counted_call, [S: Queue], [S: Queue], Counted<S>);
