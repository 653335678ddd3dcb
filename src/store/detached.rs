//! Calls that go on without their callers.

use crate::error::{Error, ErrorKind, Persistence, Result};

/// Runs a call in a task of its own, so that it depends neither on being polled nor on its caller's patience.
///
/// A call holds a connection, and some hold locks. Were it driven by its caller, a future that is begun
/// and then not polled, as one in a `buffer_unordered` whose consumer is busy, would hold up everybody
/// who needs the connection or the lock, among them perhaps the consumer itself.
pub(super) async fn detached<T: Send + 'static>(
    call: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    match tokio::spawn(call).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => {
                let error = Error::new(ErrorKind::Store, "the runtime stopped during the call");
                Err(error.with_persistence(Persistence::Temporary))
            }
        },
    }
}

/// Makes `$store`, a newtype around the `Arc` of a store, a store that runs each call of that one in a task.
macro_rules! detached_calls {
    ($store:ident) => {
        const _: () = {
            use std::sync::Arc;
            use std::time::Duration;

            use $crate::error::Result;
            use $crate::store::detached::detached;
            use $crate::store::{
                Claim, Commit, Committed, Created, Generation, Hold, Intent, IntentName, Item,
                ItemId, LeaseId, LogEntry, MemoKey, NewRun, Purged, Queue, Reaped, Run, RunFilter,
                RunId, Store,
            };

            #[async_trait::async_trait]
            #[deny(clippy::missing_trait_methods)]
            impl Store for $store {
                fn name(&self) -> &'static str {
                    self.0.name()
                }

                async fn create_run(&self, run: NewRun) -> Result<Created> {
                    let inner = Arc::clone(&self.0);
                    detached(async move { inner.create_run(run).await }).await
                }

                async fn run(&self, run: RunId) -> Result<Option<Run>> {
                    let inner = Arc::clone(&self.0);
                    detached(async move { inner.run(run).await }).await
                }

                async fn runs(&self, filter: RunFilter, limit: u32) -> Result<Vec<Run>> {
                    let inner = Arc::clone(&self.0);
                    detached(async move { inner.runs(filter, limit).await }).await
                }

                async fn items(&self, run: RunId, from: u64, limit: u32) -> Result<Vec<Item>> {
                    let inner = Arc::clone(&self.0);
                    detached(async move { inner.items(run, from, limit).await }).await
                }

                async fn log(&self, run: RunId, after: u64, limit: u32) -> Result<Vec<LogEntry>> {
                    let inner = Arc::clone(&self.0);
                    detached(async move { inner.log(run, after, limit).await }).await
                }

                async fn generations(
                    &self,
                    tenant: &str,
                    keys: &[MemoKey],
                ) -> Result<Vec<Generation>> {
                    let inner = Arc::clone(&self.0);
                    let (tenant, keys) = (tenant.to_owned(), keys.to_vec());
                    detached(async move { inner.generations(&tenant, &keys).await }).await
                }

                async fn commit(&self, commit: Commit) -> Result<Committed> {
                    let inner = Arc::clone(&self.0);
                    detached(async move { inner.commit(commit).await }).await
                }

                async fn put_intents(&self, intents: &[Intent]) -> Result<()> {
                    let (inner, intents) = (Arc::clone(&self.0), intents.to_vec());
                    detached(async move { inner.put_intents(&intents).await }).await
                }

                async fn ambiguous(
                    &self,
                    after: Option<IntentName>,
                    limit: u32,
                ) -> Result<Vec<Intent>> {
                    let inner = Arc::clone(&self.0);
                    detached(async move { inner.ambiguous(after, limit).await }).await
                }

                async fn intents(&self, items: &[ItemId]) -> Result<Vec<Intent>> {
                    let (inner, items) = (Arc::clone(&self.0), items.to_vec());
                    detached(async move { inner.intents(&items).await }).await
                }

                async fn cancel(&self, run: RunId) -> Result<u64> {
                    let inner = Arc::clone(&self.0);
                    detached(async move { inner.cancel(run).await }).await
                }

                async fn retry_failed(&self, run: RunId) -> Result<u64> {
                    let inner = Arc::clone(&self.0);
                    detached(async move { inner.retry_failed(run).await }).await
                }

                async fn purge(&self, older_than: Duration, limit: u32) -> Result<Purged> {
                    let inner = Arc::clone(&self.0);
                    detached(async move { inner.purge(older_than, limit).await }).await
                }
            }

            #[async_trait::async_trait]
            #[deny(clippy::missing_trait_methods)]
            impl Queue for $store {
                async fn register(&self, worker: &str, ttl: Duration) -> Result<LeaseId> {
                    let (inner, worker) = (Arc::clone(&self.0), worker.to_owned());
                    detached(async move { inner.register(&worker, ttl).await }).await
                }

                async fn heartbeat(&self, lease: LeaseId, ttl: Duration) -> Result<bool> {
                    let inner = Arc::clone(&self.0);
                    detached(async move { inner.heartbeat(lease, ttl).await }).await
                }

                async fn retire(&self, lease: LeaseId) -> Result<u64> {
                    let inner = Arc::clone(&self.0);
                    detached(async move { inner.retire(lease).await }).await
                }

                async fn claim(&self, lease: LeaseId, claim: Claim<'_>) -> Result<Vec<Item>> {
                    let inner = Arc::clone(&self.0);
                    let Claim {
                        handling, limit, ..
                    } = claim;
                    let names = claim.pipelines.iter().map(|name| name.to_string());
                    let names: Vec<String> = names.collect();
                    detached(async move {
                        let names: Vec<&str> = names.iter().map(String::as_str).collect();
                        let claim = Claim::new(&names, limit).handling(handling);
                        inner.claim(lease, claim).await
                    })
                    .await
                }

                async fn has_suspects(&self, pipelines: &[&str]) -> Result<bool> {
                    let inner = Arc::clone(&self.0);
                    let names = pipelines.iter().map(|name| name.to_string());
                    let names: Vec<String> = names.collect();
                    detached(async move {
                        let names: Vec<&str> = names.iter().map(String::as_str).collect();
                        inner.has_suspects(&names).await
                    })
                    .await
                }

                async fn release(
                    &self,
                    holds: &[Hold],
                    delay: Duration,
                    charge: bool,
                ) -> Result<u64> {
                    let (inner, holds) = (Arc::clone(&self.0), holds.to_vec());
                    detached(async move { inner.release(&holds, delay, charge).await }).await
                }

                async fn held(&self, lease: LeaseId) -> Result<Vec<Item>> {
                    let inner = Arc::clone(&self.0);
                    detached(async move { inner.held(lease).await }).await
                }

                async fn lost(&self, holds: &[Hold]) -> Result<Vec<ItemId>> {
                    let (inner, holds) = (Arc::clone(&self.0), holds.to_vec());
                    detached(async move { inner.lost(&holds).await }).await
                }

                async fn reap(&self) -> Result<Reaped> {
                    let inner = Arc::clone(&self.0);
                    detached(async move { inner.reap().await }).await
                }
            }
        };
    };
}
pub(super) use detached_calls;
