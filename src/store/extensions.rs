//! [`StoreExt`] and [`QueueExt`]: conveniences on top of the contracts, the same for every backend.

use async_trait::async_trait;

use super::{
    Commit, Hold, Intent, IntentFilter, IntentName, ItemId, LeaseId, Queue, Run, RunFilter, RunId,
    Store,
};
use crate::error::Result;

/// Conveniences for callers of a [`Store`].
#[async_trait]
pub trait StoreExt: Store {
    /// Returns a run, or `None` if it does not exist. One indexed read.
    async fn run(&self, run: RunId) -> Result<Option<Run>> {
        Ok(self.runs(RunFilter::new().id(run), 1).await?.pop())
    }

    /// Writes down calls that are about to be sent.
    async fn put_intents(&self, intents: &[Intent]) -> Result<()> {
        let commit = Commit::new().intents(intents.iter().cloned());
        self.commit(commit).await.map(drop)
    }

    /// Returns at most `limit` intents, after `after`, of items that no live lease holds. After a crash these are the
    /// calls that may or may not have been paid for.
    async fn ambiguous_intents(
        &self,
        after: Option<IntentName>,
        limit: u32,
    ) -> Result<Vec<Intent>> {
        let mut filter = IntentFilter::ambiguous();
        filter.after = after;
        self.intents(filter, limit).await
    }
}

impl<S: Store + ?Sized> StoreExt for S {}

/// Conveniences for callers of a [`Queue`].
#[async_trait]
pub trait QueueExt: Queue {
    /// Returns the items among `holds` that the lease no longer holds, because they were cancelled, reaped, released or
    /// settled. Calls for them can be aborted.
    async fn lost(&self, lease: LeaseId, holds: &[Hold]) -> Result<Vec<ItemId>> {
        if holds.is_empty() {
            return Ok(Vec::new());
        }
        let held: std::collections::HashSet<_> = self.held(lease).await?.into_iter().collect();
        let lost = holds.iter().filter(|hold| !held.contains(hold));
        Ok(lost.map(|hold| hold.item).collect())
    }
}

impl<Q: Queue + ?Sized> QueueExt for Q {}
