//! The memo: a reply that is in the store already is not paid for again.
//!
//! A reply is stored before it is parsed, under the [namespace](super::scope::MemoNamespace) of its call, the digest of its
//! request, and the number of identical requests before it. The journal writes it in the background; until it has been
//! written, it is found in the journal.

mod batch_loader;
mod single_flight;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use self::batch_loader::BatchLoader;
use self::single_flight::SingleFlight;
use super::entry::MemoEntry;
use super::scope::{Scope, Tally};
use super::{Call, retry};
use crate::backoff::doubling;
use crate::error::Result;
use crate::request::Reply;
use crate::store::Generation;
use crate::store::journal::Journal;

/// The time for which a call waits for a store that does not answer, before it fails.
const STORE_TIMEOUT: Duration = Duration::from_secs(60);
/// The waits between two lookups in such a store.
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_LOOKUP_WAIT: Duration = Duration::from_secs(2);

/// The stored replies of a context, and those that are on their way.
pub(crate) struct Memo {
    journal: Journal,
    loader: BatchLoader,
    in_flight: SingleFlight,
}

/// Returns the stored reply, or makes the call and stores its reply. Without a store, makes the call.
pub(super) async fn call(call: &mut Call<'_>) -> Result<Reply> {
    match call.memo {
        None => retry::call(call).await,
        // In a box, so that calls without a store are not as large as those with one.
        Some((memo, entry)) => Box::pin(memo.call(entry, call)).await,
    }
}

impl Memo {
    pub(crate) fn new(journal: Journal) -> Self {
        Self {
            loader: BatchLoader::new(Arc::clone(journal.store())),
            journal,
            in_flight: SingleFlight::default(),
        }
    }

    pub(crate) fn journal(&self) -> &Journal {
        &self.journal
    }

    /// Of several callers that ask for one reply at the same time, one makes the call, and if it is dropped, the next one.
    /// This concerns requests that share their reply, and a durable item that came back to a worker whose call for it has
    /// not ended.
    async fn call(&self, entry: &MemoEntry, call: &mut Call<'_>) -> Result<Reply> {
        let scope = call.scope;
        let join = self.in_flight.join(entry.key());
        let mut flight = scope.bounds.before_send(join).await?;
        match flight.result() {
            Some(Ok(reply)) => Ok(replayed(entry, scope, reply)),
            Some(Err(error)) => Err(error),
            None => {
                let result = match self.find(entry, scope).await? {
                    Some(reply) => Ok(reply),
                    None => entry.store(retry::call(call).await),
                };
                flight.complete(&result);
                result
            }
        }
    }

    /// Returns the stored reply, and counts it as replayed.
    async fn find(&self, entry: &MemoEntry, scope: &Scope) -> Result<Option<Reply>> {
        scope.bounds.before_send(self.journal.capacity()).await?;
        let found = match self.journal.unwritten_reply(&entry.key()) {
            Some(found) => Some(found),
            None => scope.bounds.before_send(self.load(entry)).await??,
        };
        let Some(found) = found else {
            return Ok(None);
        };
        match serde_json::from_str(&found.body) {
            Ok(reply) => Ok(Some(replayed(entry, scope, reply))),
            Err(error) => {
                // Perhaps written by a newer release. The row is kept, because the first one under a key wins.
                tracing::error!(key = %entry.key(), %error, "a stored reply cannot be read: the call is made again");
                Ok(None)
            }
        }
    }

    /// Looks a reply up, again while the store does not answer.
    async fn load(&self, entry: &MemoEntry) -> Result<Option<Generation>> {
        let since = Instant::now();
        let mut waits = doubling(FIRST_WAIT, LONGEST_LOOKUP_WAIT);
        loop {
            match self.loader.load(entry.tenant(), entry.key()).await {
                Err(error) if error.is_temporary() && since.elapsed() < STORE_TIMEOUT => {
                    tracing::warn!(%error, "a lookup waits for the store");
                    sleep(waits.next().unwrap_or(LONGEST_LOOKUP_WAIT)).await;
                }
                done => return done,
            }
        }
    }
}

fn replayed(entry: &MemoEntry, scope: &Scope, reply: Reply) -> Reply {
    entry.has_reply(true);
    scope.add(&Tally {
        replayed: 1,
        ..Tally::default()
    });
    reply
}
