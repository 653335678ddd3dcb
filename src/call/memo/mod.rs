//! The memo in front of the guard: a reply that the store has is not paid for again.
//!
//! A reply is kept before anybody parses it, under *where* it was asked ([`Place`]), *what* was
//! asked (the digest) and *which time*. The journal writes it behind the work; until then it
//! is found in the journal.

mod flights;
mod lookups;
mod place;
mod retakes;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::time::{Instant, sleep};

use self::flights::Flights;
use self::lookups::Lookups;
use self::place::{LeftIntent, Occurrence};
pub(crate) use self::place::{Place, Repeats};
use crate::call::scope::{Scope, Tally};
use crate::error::{Error, Result};
use crate::request::Reply;
use crate::request::Request;
use crate::request::RequestDigest;
use crate::store::journal::Journal;
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
    /// The key of the first reply, where `key` is that of one that is asked for instead.
    first_key: MemoKey,
    digest: RequestDigest,
    /// The number of the key; a key that items share has none.
    occurrence: Option<Occurrence>,
    intent: Option<Intent>,
    /// The intent is written, and nothing has ended it.
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
        let (key, occurrence) = match request.sample {
            Some(sample) => (place.shared_key(&digest, sample), None),
            None => {
                let (key, occurrence) = place.own_key(&scope.labels_here(), &digest);
                (key, Some(occurrence))
            }
        };
        let first_key = key;
        let key = place.current(first_key);
        let intent = place.intents.as_deref().map(|intents| Intent {
            item: intents.item,
            attempt: intents.attempt,
            key,
            provider_ref: None,
        });
        Some(Self {
            place,
            key,
            first_key,
            digest,
            occurrence,
            intent,
            intended: AtomicBool::new(false),
        })
    }

    /// There is a reply: the next identical request asks for another one.
    fn has_reply(&self, replayed: bool) {
        self.place.give(self.first_key, replayed);
        if let Some(occurrence) = &self.occurrence {
            occurrence.keep();
        }
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
        scope.bounds.before_send(memo.journal.capacity()).await?;
        let found = match memo.journal.unwritten_reply(&self.key) {
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
        self.has_reply(true);
        scope.add(Tally {
            replayed: 1,
            ..Tally::default()
        });
        reply
    }

    /// Hands a reply over to be stored, and ends the intent of its call.
    pub(crate) fn keep(&self, result: Result<Reply>) -> Result<Reply> {
        let ended = self.end_intent(result.as_ref().err());
        let mut commit = Commit::new().ended_intents(ended.map(Intent::name));
        if let Ok(reply) = &result {
            commit.generations.push(Generation {
                tenant: self.place.tenant.to_string(),
                key: self.key,
                request: self.digest,
                body: serde_json::to_string(reply)?,
                usage: reply.usage,
                cost_micros: None,
            });
            self.has_reply(false);
        }
        if !commit.is_empty() {
            self.place.memo.journal.write(commit);
        }
        result
    }

    /// Keeps as much of a reply as came before its stream broke off, for who goes on from there.
    #[cfg(feature = "structured")]
    pub(crate) fn keep_broken(&self, text: String) {
        let mut reply = Reply::new(text, crate::request::Usage::default());
        reply.finish = crate::request::FinishReason::Other("broken_off".to_owned());
        if let Err(error) = self.keep(Ok(reply)) {
            tracing::error!(key = %self.key, %error, "a reply cannot be written down");
        }
    }

    /// The intent of the call, if it has an end and that one is to be written.
    fn end_intent(&self, error: Option<&Error>) -> Option<&Intent> {
        // A call that we dropped ourselves has no end: nobody knows whether it is paid for.
        let dropped = |error: &Error| error.is_cancelled() && error.billed().is_none();
        if error.is_some_and(dropped) || !self.intended.swap(false, Ordering::Relaxed) {
            return None;
        }
        let intents = self.place.intents.as_deref()?;
        if intents.left(&self.key) == Some(LeftIntent::Ambiguous) {
            // An earlier call under this name may have been paid for: it stays listed.
            return None;
        }
        if error.is_some() {
            intents.leave(self.key, LeftIntent::Ended);
        }
        self.intent.as_ref()
    }

    /// Writes down that the call is about to be sent, if that is wanted here.
    /// Once: a second attempt is the same intent.
    pub(crate) async fn intend(&self) {
        if let (Some(intent), Some(intents)) = (&self.intent, self.place.intents.as_deref())
            && !self.intended.load(Ordering::Relaxed)
        {
            let journal = &self.place.memo.journal;
            // The end of an earlier intent of this name must not take this one away.
            if intents.left(&self.key) == Some(LeftIntent::Ended) {
                while journal.flush().await.is_err() {}
            }
            journal.put_intents([intent.clone()]).await;
            self.intended.store(true, Ordering::Relaxed);
        }
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        if *self.intended.get_mut()
            && let Some(intents) = &self.place.intents
        {
            intents.leave(self.key, LeftIntent::Ambiguous);
        }
    }
}
