//! [`Retakes`]: replies that a durable item failed on, and asks for anew.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Error, ErrorKind};
use crate::store::MemoKey;

/// What a durable item has learned about its replies while it was run again and again. All places below it share it.
#[derive(Default)]
pub(super) struct Retakes(Mutex<State>);

#[derive(Default)]
struct State {
    /// How many replies under each key the item has failed on: the next one is looked for, or asked for.
    failed: HashMap<MemoKey, u32>,
    /// The newest reply of each place in this run of the item, and the newest of all.
    given: HashMap<MemoKey, Given>,
    newest: Option<Given>,
    /// What items of batches below failed on, with what they said.
    failures: Vec<(Given, String)>,
}

#[derive(Clone, Copy)]
struct Given {
    key: MemoKey,
    replayed: bool,
}

impl Retakes {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The key of the reply that is wanted instead of those under `key` that the item has failed on.
    pub(super) fn current(&self, key: MemoKey) -> MemoKey {
        match self.lock().failed.get(&key) {
            None => key,
            Some(times) => {
                MemoKey::of([key.as_bytes().as_slice(), b"retake", &times.to_be_bytes()])
            }
        }
    }

    /// A reply was given to the code at a place.
    pub(super) fn give(&self, place: MemoKey, key: MemoKey, replayed: bool) {
        let given = Given { key, replayed };
        let mut state = self.lock();
        state.given.insert(place, given);
        state.newest = Some(given);
    }

    /// An item of a batch at `place` has failed.
    pub(super) fn fail(&self, place: MemoKey, error: &Error) {
        if is_of_a_reply(error) {
            let mut state = self.lock();
            let given = state.given.get(&place).copied();
            let failure = given.map(|given| (given, error.message().to_owned()));
            state.failures.extend(failure);
        }
    }

    /// The durable item has failed. True if it did so on a reply that had been kept: run again, it gets another one.
    pub(super) fn retake(&self, error: &Error) -> bool {
        let mut state = self.lock();
        let failures = std::mem::take(&mut state.failures);
        state.given.clear();
        let newest = state.newest.take();
        // The error of an item gets something around it on its way up, as where too few of a batch succeeded.
        let of_batch = failures
            .into_iter()
            .find(|(_, message)| error.message().contains(&**message));
        let newest = newest.filter(|_| is_of_a_reply(error));
        match of_batch.map(|(given, _)| given).or(newest) {
            Some(Given {
                key,
                replayed: true,
            }) => {
                *state.failed.entry(key).or_default() += 1;
                true
            }
            _ => false,
        }
    }
}

/// Whether it was the reply that could not be used, and another one might do.
fn is_of_a_reply(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::InvalidOutput | ErrorKind::Truncated
    )
}
