//! A store that counts the calls to it, and fails when it is told to.
#![allow(dead_code, missing_docs, unreachable_pub)] // Each test uses its part of this.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use throughline::store::{
    Commit, Committed, Created, Generation, Hold, Intent, IntentName, Item, ItemId, LeaseId,
    LogEntry, MemoKey, Memory, NewRun, Purged, Queue, Reaped, Run, RunFilter, RunId, Store,
};
use throughline::{Error, ErrorKind, Persistence, Result, async_trait};

#[derive(Default)]
pub struct Counted {
    inner: Memory,
    calls: Mutex<BTreeMap<&'static str, u64>>,
    down: AtomicBool,
    /// Commits do not return.
    pub stuck: AtomicBool,
    pub largest_commit: AtomicU64,
}

impl Counted {
    pub fn calls(&self, method: &str) -> u64 {
        self.calls.lock().unwrap().get(method).copied().unwrap_or(0)
    }

    pub fn forget(&self) {
        self.calls.lock().unwrap().clear();
    }

    pub fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::Relaxed);
    }

    fn enter(&self, method: &'static str) -> Result<()> {
        *self.calls.lock().unwrap().entry(method).or_default() += 1;
        if self.down.load(Ordering::Relaxed) {
            let error = Error::new(ErrorKind::Store, "the store is down");
            return Err(error.with_persistence(Persistence::Temporary));
        }
        Ok(())
    }
}

macro_rules! counted {
    ($trait:ident { $(fn $name:ident(&self $(, $arg:ident: $ty:ty)*) -> $ret:ty;)* } $($rest:tt)*) => {
        #[async_trait]
        impl $trait for Counted {
            $(async fn $name(&self $(, $arg: $ty)*) -> $ret {
                self.enter(stringify!($name))?;
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
        self.enter("commit")?;
        let rows = commit.generations.len() + commit.settlements.len() + commit.notes.len() + commit.over.len();
        self.largest_commit.fetch_max(rows as u64, Ordering::Relaxed);
        if self.stuck.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        self.inner.commit(commit).await
    }
);

counted!(Queue {
    fn register(&self, worker: &str, ttl: Duration) -> Result<LeaseId>;
    fn heartbeat(&self, lease: LeaseId, ttl: Duration) -> Result<bool>;
    fn retire(&self, lease: LeaseId) -> Result<u64>;
    fn claim(&self, lease: LeaseId, limit: u32) -> Result<Vec<Item>>;
    fn release(&self, holds: &[Hold], delay: Duration, charge: bool) -> Result<u64>;
    fn held(&self, lease: LeaseId) -> Result<Vec<Item>>;
    fn lost(&self, holds: &[Hold]) -> Result<Vec<ItemId>>;
    fn reap(&self) -> Result<Reaped>;
});
