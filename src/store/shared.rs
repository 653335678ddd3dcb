//! A store behind an [`Arc`] is a store: several share it.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::{
    Claim, Commit, Committed, Created, Generation, Hold, Intent, IntentName, Item, ItemId, LeaseId,
    LogEntry, MemoKey, NewRun, Purged, Queue, Reaped, Run, RunFilter, RunId, Store,
};
use crate::error::Result;

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<S: Store + ?Sized> Store for Arc<S> {
    fn name(&self) -> &'static str {
        (**self).name()
    }

    async fn create_run(&self, run: NewRun) -> Result<Created> {
        (**self).create_run(run).await
    }

    async fn run(&self, run: RunId) -> Result<Option<Run>> {
        (**self).run(run).await
    }

    async fn runs(&self, filter: RunFilter, limit: u32) -> Result<Vec<Run>> {
        (**self).runs(filter, limit).await
    }

    async fn items(&self, run: RunId, from: u64, limit: u32) -> Result<Vec<Item>> {
        (**self).items(run, from, limit).await
    }

    async fn log(&self, run: RunId, after: u64, limit: u32) -> Result<Vec<LogEntry>> {
        (**self).log(run, after, limit).await
    }

    async fn generations(&self, tenant: &str, keys: &[MemoKey]) -> Result<Vec<Generation>> {
        (**self).generations(tenant, keys).await
    }

    async fn commit(&self, commit: Commit) -> Result<Committed> {
        (**self).commit(commit).await
    }

    async fn put_intents(&self, intents: &[Intent]) -> Result<()> {
        (**self).put_intents(intents).await
    }

    async fn ambiguous(&self, after: Option<IntentName>, limit: u32) -> Result<Vec<Intent>> {
        (**self).ambiguous(after, limit).await
    }

    async fn intents(&self, items: &[ItemId]) -> Result<Vec<Intent>> {
        (**self).intents(items).await
    }

    async fn cancel(&self, run: RunId) -> Result<u64> {
        (**self).cancel(run).await
    }

    async fn retry_failed(&self, run: RunId) -> Result<u64> {
        (**self).retry_failed(run).await
    }

    async fn purge(&self, older_than: Duration, limit: u32) -> Result<Purged> {
        (**self).purge(older_than, limit).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<S: Queue + ?Sized> Queue for Arc<S> {
    async fn register(&self, worker: &str, ttl: Duration) -> Result<LeaseId> {
        (**self).register(worker, ttl).await
    }

    async fn heartbeat(&self, lease: LeaseId, ttl: Duration) -> Result<bool> {
        (**self).heartbeat(lease, ttl).await
    }

    async fn retire(&self, lease: LeaseId) -> Result<u64> {
        (**self).retire(lease).await
    }

    async fn claim(&self, lease: LeaseId, claim: Claim<'_>) -> Result<Vec<Item>> {
        (**self).claim(lease, claim).await
    }

    async fn has_suspects(&self, pipelines: &[&str]) -> Result<bool> {
        (**self).has_suspects(pipelines).await
    }

    async fn release(&self, holds: &[Hold], delay: Duration, charge: bool) -> Result<u64> {
        (**self).release(holds, delay, charge).await
    }

    async fn held(&self, lease: LeaseId) -> Result<Vec<Item>> {
        (**self).held(lease).await
    }

    async fn lost(&self, holds: &[Hold]) -> Result<Vec<ItemId>> {
        (**self).lost(holds).await
    }

    async fn reap(&self) -> Result<Reaped> {
        (**self).reap().await
    }
}
