//! [`MemoEntry`]: the key under which the reply to one request is stored, and the intent of its call.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::scope::{EndedIntent, MemoNamespace, Occurrence, Scope};
use crate::error::{Error, Result};
use crate::request::{Reply, Request, RequestDigest};
use crate::store::journal::Journal;
use crate::store::{Commit, Generation, Intent, MemoKey};
#[cfg(feature = "structured")]
use crate::{request::FinishReason, sync::Mutex, usage::Usage};

/// The entry of one request in the memo. It is made once for each request, because it counts identical ones.
pub(crate) struct MemoEntry {
    journal: Journal,
    namespace: Arc<MemoNamespace>,
    key: MemoKey,
    /// The key of the first reply, where `key` is that of another one that replaces it.
    first_key: MemoKey,
    digest: RequestDigest,
    /// The number of the request among identical ones; `None` if items share its reply.
    occurrence: Option<Occurrence>,
    intent: Option<Intent>,
    /// Whether the intent is written and has not ended.
    has_open_intent: AtomicBool,
}

impl MemoEntry {
    /// Returns `None` for a scope without a namespace.
    pub(super) fn new(journal: &Journal, scope: &Scope, request: &Request) -> Option<Self> {
        let namespace = Arc::clone(scope.namespace.as_ref()?);
        let digest = request.digest();
        let (first_key, occurrence) = match request.sample {
            Some(sample) => (namespace.shared_key(&digest, sample), None),
            None => {
                let (key, occurrence) = namespace.own_key(&scope.labels_in_namespace(), &digest);
                (key, Some(occurrence))
            }
        };
        let key = namespace.current_key(first_key);
        let intent = namespace.intents.as_deref().map(|intents| Intent {
            item: intents.item,
            attempt: intents.attempt,
            key,
            provider_ref: None,
        });
        Some(Self {
            journal: journal.clone(),
            namespace,
            key,
            first_key,
            digest,
            occurrence,
            intent,
            has_open_intent: AtomicBool::new(false),
        })
    }

    pub(super) fn key(&self) -> MemoKey {
        self.key
    }

    pub(super) fn tenant(&self) -> &Arc<str> {
        &self.namespace.tenant
    }

    /// Marks the entry as one with a reply: the next identical request asks for another one.
    pub(super) fn has_reply(&self, is_replayed: bool) {
        self.namespace.record_reply(self.first_key, is_replayed);
        if let Some(occurrence) = &self.occurrence {
            occurrence.keep();
        }
    }

    /// Hands a reply over to be stored, and ends the intent of its call.
    pub(super) fn store(&self, result: Result<Reply>) -> Result<Reply> {
        let ended = self.end_intent(result.as_ref().err());
        let mut commit = Commit::new().ended_intents(ended.map(Intent::name));
        if let Ok(reply) = &result {
            commit.generations.push(Generation {
                tenant: self.namespace.tenant.to_string(),
                key: self.key,
                request: self.digest,
                body: serde_json::to_string(reply)?,
                usage: reply.usage,
                cost_micros: None,
            });
            self.has_reply(false);
        }
        if !commit.is_empty() {
            self.journal.write(commit);
        }
        result
    }

    /// Stores the part of a reply that came before its stream broke off.
    #[cfg(feature = "structured")]
    pub(crate) fn store_partial(&self, text: String) {
        let mut reply = Reply::new(text, Usage::default());
        reply.finish = FinishReason::Other("broken_off".to_owned());
        if let Err(error) = self.store(Ok(reply)) {
            tracing::error!(key = %self.key, %error, "a reply cannot be stored");
        }
    }

    /// Returns the intent of the call, if it has ended and its end is to be stored.
    fn end_intent(&self, error: Option<&Error>) -> Option<&Intent> {
        // A call that was dropped has no end: it is not known whether it is billed.
        let was_dropped = |error: &Error| error.is_cancelled() && error.billed().is_none();
        if error.is_some_and(was_dropped) || !self.has_open_intent.swap(false, Ordering::Relaxed) {
            return None;
        }
        let intents = self.namespace.intents.as_deref()?;
        if intents.ended(&self.key) == Some(EndedIntent::Ambiguous) {
            // An earlier call with this key may have been billed: the intent stays listed.
            return None;
        }
        if error.is_some() {
            intents.end(self.key, EndedIntent::Deleted);
        }
        self.intent.as_ref()
    }

    /// Stores that the call is about to be sent, if the namespace has intents. Further attempts have the same intent.
    pub(super) async fn write_intent(&self) {
        if let (Some(intent), Some(intents)) = (&self.intent, self.namespace.intents.as_deref())
            && !self.has_open_intent.load(Ordering::Relaxed)
        {
            // The deletion of an earlier intent with this key must not delete this one.
            if intents.ended(&self.key) == Some(EndedIntent::Deleted) {
                while self.journal.flush().await.is_err() {}
            }
            self.journal.put_intents([intent.clone()]).await;
            self.has_open_intent.store(true, Ordering::Relaxed);
        }
    }
}

impl Drop for MemoEntry {
    fn drop(&mut self) {
        if *self.has_open_intent.get_mut()
            && let Some(intents) = &self.namespace.intents
        {
            intents.end(self.key, EndedIntent::Ambiguous);
        }
    }
}

/// The memo entry of a streamed call that has failed, for a reader that can use a part of its reply.
#[cfg(feature = "structured")]
#[derive(Default)]
pub(crate) struct FailedEntry(Mutex<Option<Box<MemoEntry>>>);

#[cfg(feature = "structured")]
impl FailedEntry {
    pub(super) fn put(&self, entry: Box<MemoEntry>) {
        *self.0.lock() = Some(entry);
    }

    /// Returns the entry, once the call has failed in a context with a store.
    pub(crate) fn take(&self) -> Option<Box<MemoEntry>> {
        self.0.lock().take()
    }
}
