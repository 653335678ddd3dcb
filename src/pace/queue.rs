//! [`Queue`]: who waits, and who is next.

use std::collections::BTreeMap;

use super::words::{Charge, Place};

/// One waiter: its place, and a ticket of its own, for two may hold one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) place: Place,
    pub(super) ticket: u64,
}

#[derive(Debug)]
pub(super) struct Waiter<W> {
    pub(super) charge: Charge,
    /// How to reach it. `None` while it is awake anyway.
    pub(super) waker: Option<W>,
}

/// Waiters in order of their places: first come, first served.
///
/// An ordered map rather than a deque, because a retry comes back to the place
/// it had and anybody may leave from anywhere, each in logarithmic time.
#[derive(Debug)]
pub(super) struct Queue<W> {
    waiters: BTreeMap<Key, Waiter<W>>,
}

impl<W> Queue<W> {
    pub(super) fn new() -> Self {
        Self {
            waiters: BTreeMap::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.waiters.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiters.is_empty()
    }

    pub(super) fn push(&mut self, key: Key, charge: Charge) {
        let waiter = Waiter {
            charge,
            waker: None,
        };
        self.waiters.insert(key, waiter);
    }

    /// The one who is next, and what it needs.
    pub(super) fn head(&self) -> Option<(Key, Charge)> {
        let (key, waiter) = self.waiters.first_key_value()?;
        Some((*key, waiter.charge))
    }

    pub(super) fn get_mut(&mut self, key: Key) -> Option<&mut Waiter<W>> {
        self.waiters.get_mut(&key)
    }

    /// Takes everybody out.
    pub(super) fn clear(&mut self) -> impl Iterator<Item = Waiter<W>> {
        std::mem::take(&mut self.waiters).into_values()
    }

    pub(super) fn remove(&mut self, key: Key) -> Option<Waiter<W>> {
        self.waiters.remove(&key)
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    #[test]
    fn a_hundred_thousand_waiters_are_cheap() {
        assert!(size_of::<(Key, Waiter<Waker>)>() <= 64);
    }

    #[test]
    fn an_old_place_comes_before_newer_ones() {
        let mut queue = Queue::<()>::new();
        let key = |place, ticket| Key {
            place: Place(place),
            ticket,
        };
        for key in [key(2, 0), key(3, 1), key(1, 2), key(2, 3)] {
            queue.push(key, Charge::default());
        }
        let mut order = Vec::new();
        while let Some((key, _)) = queue.head() {
            order.push((key.place.0, key.ticket));
            queue.remove(key);
        }
        assert_eq!(order, [(1, 2), (2, 0), (2, 3), (3, 1)]);
    }
}
