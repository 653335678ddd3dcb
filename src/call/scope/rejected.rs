//! [`RejectedReplies`]: stored replies because of which a durable item has failed, and which are asked for again.

use std::collections::HashMap;

use crate::error::{Error, ErrorKind};
use crate::store::MemoKey;
use crate::sync::Mutex;

/// The replies that a durable item has rejected in its earlier runs. All namespaces below the item share it.
#[derive(Default)]
pub(super) struct RejectedReplies(Mutex<State>);

#[derive(Default)]
struct State {
    /// The number of rejected replies under each key: the next one is looked up or asked for.
    rejected: HashMap<MemoKey, u32>,
    /// The last reply in each namespace in this run of the item, and the last of all.
    received: HashMap<MemoKey, Received>,
    last: Option<Received>,
    /// The last replies of items of batches that failed, with their error messages.
    failures: Vec<(Received, String)>,
}

#[derive(Clone, Copy)]
struct Received {
    key: MemoKey,
    is_replayed: bool,
}

impl RejectedReplies {
    /// Returns the key of the reply that replaces the rejected ones under `key`.
    pub(super) fn current_key(&self, key: MemoKey) -> MemoKey {
        match self.0.lock().rejected.get(&key) {
            None => key,
            Some(times) => {
                MemoKey::of([key.as_bytes().as_slice(), b"retake", &times.to_be_bytes()])
            }
        }
    }

    /// Records that the caller got a reply in a namespace.
    pub(super) fn record_reply(&self, namespace: MemoKey, key: MemoKey, is_replayed: bool) {
        let received = Received { key, is_replayed };
        let mut state = self.0.lock();
        state.received.insert(namespace, received);
        state.last = Some(received);
    }

    /// Records that an item of a batch has failed in a namespace.
    pub(super) fn record_failure(&self, namespace: MemoKey, error: &Error) {
        if is_caused_by_reply(error) {
            let mut state = self.0.lock();
            let received = state.received.get(&namespace).copied();
            let failure = received.map(|received| (received, error.message().to_owned()));
            state.failures.extend(failure);
        }
    }

    /// Rejects the reply because of which the durable item has failed. Returns `false` if it was not a stored one: then
    /// another run would not get another reply.
    pub(super) fn reject(&self, error: &Error) -> bool {
        let mut state = self.0.lock();
        let failures = std::mem::take(&mut state.failures);
        state.received.clear();
        let last = state.last.take();
        // The message of an item's error may be wrapped on its way up, for example if too few items of a batch succeeded.
        let of_batch = failures
            .into_iter()
            .find(|(_, message)| error.message().contains(&**message));
        let last = last.filter(|_| is_caused_by_reply(error));
        match of_batch.map(|(received, _)| received).or(last) {
            Some(Received {
                key,
                is_replayed: true,
            }) => {
                *state.rejected.entry(key).or_default() += 1;
                true
            }
            _ => false,
        }
    }
}

/// Returns whether the reply could not be used and another one may be usable.
fn is_caused_by_reply(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::InvalidOutput | ErrorKind::Truncated
    )
}
