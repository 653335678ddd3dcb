//! The memo in front of the guard: a reply that the store has is not paid for again.
//!
//! A reply is kept before anybody parses it, under *where* it was asked ([`Place`]), *what* was
//! asked (the digest) and *which time*. The journal writes it behind the work; until then it
//! is found in the journal.

mod flights;
mod lookups;
mod place;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::time::{Instant, sleep};

use self::flights::Flights;
use self::lookups::Lookups;
pub(crate) use self::place::Place;
use crate::digest::RequestDigest;
use crate::error::{Error, Result};
use crate::journal::Journal;
use crate::reply::Reply;
use crate::request::Request;
use crate::scope::{Scope, Tally};
use crate::store::{Commit, Generation, Intent, MemoKey};

/// How long a call waits for a store that does not answer before it fails.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Memo {
    journal: Journal,
    lookups: Lookups,
    flights: Flights,
}

/// One request with the key of its reply: made once for each asking, because it counts.
pub(crate) struct Asked {
    place: Arc<Place>,
    key: MemoKey,
    digest: RequestDigest,
    intent: Option<Intent>,
    intended: AtomicBool,
}

impl Memo {
    pub(crate) fn new(journal: Journal) -> Self {
        Self {
            lookups: Lookups::new(Arc::clone(journal.store())),
            journal,
            flights: Flights::default(),
        }
    }

    pub(crate) fn journal(&self) -> &Journal {
        &self.journal
    }
}

impl Asked {
    /// `None` where there is no store.
    pub(crate) fn new(scope: &Scope, request: &Request) -> Option<Self> {
        let place = Arc::clone(scope.place.as_ref()?);
        let digest = request.digest();
        let key = match request.sample {
            Some(sample) => place.shared_key(&digest, sample),
            None => place.own_key(&scope.labels_here(), &digest),
        };
        let intent = place.intents.map(|(item, attempt)| Intent {
            item,
            attempt,
            key,
            provider_ref: None,
        });
        Some(Self {
            place,
            key,
            digest,
            intent,
            intended: AtomicBool::new(false),
        })
    }

    /// The reply out of the store, or what `pay` gets for it: that is kept before it is returned.
    ///
    /// Of several that ask for one reply at a time one pays, and if that one is dropped, the next: those that share it,
    /// and an item that came back to a worker whose call for it is still under way.
    pub(crate) async fn answer<'a>(
        &'a self,
        scope: &'a Scope,
        pay: impl FnOnce() -> BoxFuture<'a, Result<Reply>> + Send,
    ) -> Result<Reply> {
        let board = self.place.memo.flights.board(self.key);
        let mut flight = scope.bounds.before_send(board).await?;
        match flight.landed() {
            Some(Ok(reply)) => Ok(self.replayed(scope, reply)),
            Some(Err(error)) => Err(error),
            None => {
                let result = match self.lookup(scope).await? {
                    Some(reply) => Ok(reply),
                    None => self.keep(pay().await),
                };
                flight.land(&result);
                result
            }
        }
    }

    /// The reply that the store has, counted as replayed.
    pub(crate) async fn lookup(&self, scope: &Scope) -> Result<Option<Reply>> {
        let memo = &self.place.memo;
        scope.bounds.before_send(memo.journal.room()).await?;
        let found = match memo.journal.unwritten(&self.key) {
            Some(found) => Some(found),
            None => scope.bounds.before_send(self.patiently()).await??,
        };
        let Some(found) = found else {
            return Ok(None);
        };
        match serde_json::from_str(&found.body) {
            Ok(reply) => Ok(Some(self.replayed(scope, reply))),
            Err(error) => {
                // Of a newer release perhaps. The row stays as it is: the first one under a key does.
                tracing::error!(key = %self.key, %error, "a stored reply cannot be read: it is paid for again");
                Ok(None)
            }
        }
    }

    async fn patiently(&self) -> Result<Option<Generation>> {
        let since = Instant::now();
        let mut delay = Duration::from_millis(50);
        loop {
            let lookups = &self.place.memo.lookups;
            match lookups.find(&self.place.tenant, self.key).await {
                Err(error) if error.is_temporary() && since.elapsed() < PATIENCE => {
                    tracing::warn!(%error, "a lookup waits for the store");
                    sleep(delay).await;
                    delay = (delay * 2).min(Duration::from_secs(2));
                }
                done => return done,
            }
        }
    }

    fn replayed(&self, scope: &Scope, reply: Reply) -> Reply {
        scope.add(Tally {
            replayed: 1,
            ..Tally::default()
        });
        reply
    }

    /// Hands a reply over to be stored, and ends the intent of its call.
    pub(crate) fn keep(&self, result: Result<Reply>) -> Result<Reply> {
        let intended = self.intended.load(Ordering::Relaxed);
        // A call that we dropped ourselves has no end: nobody knows whether it is paid for.
        let dropped = |error: &Error| error.is_cancelled() && error.billed().is_none();
        let ended = intended && !result.as_ref().err().is_some_and(dropped);
        let intent = self.intent.as_ref().filter(|_| ended);
        let mut commit = Commit::new().over(intent.map(Intent::name));
        if let Ok(reply) = &result {
            commit.generations.push(Generation {
                tenant: self.place.tenant.to_string(),
                key: self.key,
                request: self.digest,
                body: serde_json::to_string(reply)?,
                usage: reply.usage,
                cost_micros: None,
            });
        }
        if !commit.is_empty() {
            self.place.memo.journal.write(commit);
        }
        result
    }

    /// Writes down that the call is about to be sent, if that is wanted here.
    /// Once: a second attempt is the same intent.
    pub(crate) async fn intend(&self) {
        if let Some(intent) = &self.intent
            && !self.intended.load(Ordering::Relaxed)
        {
            self.place.memo.journal.intend([intent.clone()]).await;
            self.intended.store(true, Ordering::Relaxed);
        }
    }
}
