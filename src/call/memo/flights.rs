//! [`Flights`]: of several that ask for one shared reply at a time, one pays.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Mutex as Seat, OwnedMutexGuard};

use crate::error::{Error, Result};
use crate::request::Reply;
use crate::store::MemoKey;

type Landed = Option<Result<Reply>>;

#[derive(Default)]
pub(super) struct Flights(Arc<Mutex<HashMap<MemoKey, Arc<Seat<Landed>>>>>);

/// The turn of one that asks. Whoever has it first, pays; the others find how it ended. Dropped without that,
/// the next one pays.
pub(super) struct Flight {
    flights: Arc<Mutex<HashMap<MemoKey, Arc<Seat<Landed>>>>>,
    key: MemoKey,
    seat: Arc<Seat<Landed>>,
    landed: Option<OwnedMutexGuard<Landed>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Flights {
    pub(super) async fn board(&self, key: MemoKey) -> Flight {
        let seat = Arc::clone(lock(&self.0).entry(key).or_default());
        let mut flight = Flight {
            flights: Arc::clone(&self.0),
            key,
            seat,
            landed: None,
        };
        flight.landed = Some(Arc::clone(&flight.seat).lock_owned().await);
        flight
    }
}

impl Flight {
    /// How it ended for the one that paid.
    pub(super) fn landed(&self) -> Option<Result<Reply, Error>> {
        self.landed.as_deref().and_then(Clone::clone)
    }

    /// Tells those who wait. What ended only the one that paid is no news for the others.
    pub(super) fn land(&mut self, result: &Result<Reply>) {
        let ours_alone = |error: &Error| error.is_cancelled() || error.is_deadline_exceeded();
        if result.as_ref().err().is_some_and(ours_alone) {
            return;
        }
        if let Some(landed) = self.landed.as_deref_mut() {
            *landed = Some(result.clone());
        }
        // Who comes from now on finds the reply in the journal or the store, or asks anew.
        lock(&self.flights).remove(&self.key);
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.landed = None;
        let mut flights = lock(&self.flights);
        // Ours and the map's: nobody else waits for it.
        if Arc::strong_count(&self.seat) == 2
            && flights
                .get(&self.key)
                .is_some_and(|seat| Arc::ptr_eq(seat, &self.seat))
        {
            flights.remove(&self.key);
        }
    }
}
