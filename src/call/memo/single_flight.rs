//! [`SingleFlight`]: of several callers that ask for the same reply at the same time, one makes the call.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::OwnedMutexGuard;

use crate::error::{Error, Result};
use crate::request::Reply;
use crate::store::MemoKey;
use crate::sync::Mutex;

/// The result of the call, once it has one. The caller that makes the call holds the lock.
type Slot = Arc<tokio::sync::Mutex<Option<Result<Reply>>>>;
type Slots = Arc<Mutex<HashMap<MemoKey, Slot>>>;

/// The calls in flight, by the key of their reply.
#[derive(Default)]
pub(super) struct SingleFlight(Slots);

/// The membership of one caller in a flight. If there is no [result](Flight::result), the caller makes the call. If it is
/// dropped without one, the next caller makes the call.
pub(super) struct Flight {
    slots: Slots,
    key: MemoKey,
    slot: Slot,
    guard: Option<OwnedMutexGuard<Option<Result<Reply>>>>,
}

impl SingleFlight {
    /// Joins the flight for this key, and waits for the caller that makes the call, if there is one.
    pub(super) async fn join(&self, key: MemoKey) -> Flight {
        let slot = Arc::clone(self.0.lock().entry(key).or_default());
        let mut flight = Flight {
            slots: Arc::clone(&self.0),
            key,
            slot,
            guard: None,
        };
        flight.guard = Some(Arc::clone(&flight.slot).lock_owned().await);
        flight
    }
}

impl Flight {
    /// Returns the result of the caller that has made the call.
    pub(super) fn result(&self) -> Option<Result<Reply>> {
        self.guard.as_deref().and_then(Clone::clone)
    }

    /// Passes the result to the callers that wait, unless it concerns this caller alone.
    pub(super) fn complete(&mut self, result: &Result<Reply>) {
        let is_ours = |error: &Error| error.is_cancelled() || error.is_deadline_exceeded();
        if result.as_ref().err().is_some_and(is_ours) {
            return;
        }
        if let Some(slot) = self.guard.as_deref_mut() {
            *slot = Some(result.clone());
        }
        // Later callers find the reply in the journal or the store, or make a call of their own.
        self.slots.lock().remove(&self.key);
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.guard = None;
        let mut slots = self.slots.lock();
        // Only this flight and the map hold the slot: no other caller waits for it.
        if Arc::strong_count(&self.slot) == 2
            && slots
                .get(&self.key)
                .is_some_and(|slot| Arc::ptr_eq(slot, &self.slot))
        {
            slots.remove(&self.key);
        }
    }
}
