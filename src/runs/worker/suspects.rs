//! [`SuspectPolicy`]: when a worker takes suspects, items whose workers have died, and how many of them.
//!
//! The cause of a death is unknown: the worker may have been killed from outside. So a worker takes suspects only
//! after it has lived for a while, which a worker in a crash loop never does. It takes few at a time, so that the next
//! death leaves few suspects, and then runs one item alone.

use std::time::Duration;

use tokio::time::Instant;

use crate::store::{Handling, Item};

/// The number of leases that a worker must have lived for before it makes the last attempt of an item.
const LEASES_BEFORE_LAST_ATTEMPT: u32 = 16;
/// The longest time between two looks for suspects.
const MAX_LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Decides which suspects a worker takes, and when. Time is an argument.
pub(super) struct SuspectPolicy {
    /// The most suspects with [`Handling::Few`] at a time: the square root of the items in flight. With n suspects the
    /// number of rounds then equals the number of items that a death in one of the rounds leaves to run alone.
    few: usize,
    few_running: usize,
    /// The times from which on the worker takes suspects, and those in their last attempt.
    from: Instant,
    last_from: Instant,
    every: Duration,
    look_at: Instant,
    isolation: Isolation,
    /// The time from which on another item may be run alone: as long after the last one as that took.
    isolate_from: Instant,
    /// Whether the last look found no other items to claim.
    pub(super) nothing_else: bool,
}

enum Isolation {
    None,
    /// The item waits for the others to end. Nothing has been claimed since this time.
    Waiting(Box<Item>, Instant),
    Running(Instant),
}

impl SuspectPolicy {
    /// Creates the policy of a worker that was created at `created_at` and may claim from `now` until `last_claim`. A worker
    /// with little time takes suspects in the second half of it.
    pub(super) fn new(
        in_flight: usize,
        lease: Duration,
        created_at: Instant,
        now: Instant,
        last_claim: Option<Instant>,
    ) -> Self {
        let half = last_claim.map(|last| now + last.saturating_duration_since(now) / 2);
        let after = |age: Duration| {
            let at = super::later(created_at, age).max(now);
            half.map_or(at, |half| at.min(half))
        };
        let from = after(lease);
        Self {
            few: in_flight.isqrt().max(1),
            few_running: 0,
            from,
            last_from: after(lease.saturating_mul(LEASES_BEFORE_LAST_ATTEMPT)),
            every: MAX_LOOK_INTERVAL.min(lease / 4),
            look_at: from,
            isolation: Isolation::None,
            isolate_from: now,
            nothing_else: false,
        }
    }

    /// Returns the time of the next look for suspects.
    pub(super) fn look_at(&self) -> Instant {
        self.look_at
    }

    /// Returns what to claim at this look, and how many items of each handling, if `free` items may be started.
    pub(super) fn wanted(&mut self, now: Instant, free: usize) -> Vec<(Handling, usize)> {
        self.look_at = now + self.every;
        let mut wanted = Vec::new();
        if now < self.from {
            return wanted;
        }
        let few = self.few.saturating_sub(self.few_running).min(free);
        wanted.extend((few > 0).then_some((Handling::Few, few)));
        if now >= self.isolate_from || self.nothing_else {
            wanted.push((Handling::Alone, 1));
            wanted.extend((now >= self.last_from).then_some((Handling::LastAttempt, 1)));
        }
        wanted
    }

    /// Sets an item aside that is to be run alone. Returns it if another item is isolated already.
    pub(super) fn isolate(&mut self, item: Item, now: Instant) -> Option<Item> {
        if self.is_isolating() {
            return Some(item);
        }
        self.isolation = Isolation::Waiting(Box::new(item), now);
        None
    }

    /// Returns whether an item runs alone or waits for the others to end. Nothing is claimed meanwhile.
    pub(super) fn is_isolating(&self) -> bool {
        !matches!(self.isolation, Isolation::None)
    }

    /// Returns the item that waits to be run alone.
    pub(super) fn waiting(&self) -> Option<&Item> {
        match &self.isolation {
            Isolation::Waiting(item, _) => Some(item),
            _ => None,
        }
    }

    /// Takes the item that is to be run alone, when no other task runs.
    pub(super) fn begin_isolated(&mut self) -> Option<Item> {
        match std::mem::replace(&mut self.isolation, Isolation::None) {
            Isolation::Waiting(item, since) => {
                self.isolation = Isolation::Running(since);
                Some(*item)
            }
            other => {
                self.isolation = other;
                None
            }
        }
    }

    /// Records that an item was started.
    pub(super) fn started(&mut self, handling: Handling) {
        self.few_running += usize::from(handling == Handling::Few);
    }

    /// Records that an item has ended.
    pub(super) fn ended(&mut self, handling: Handling, now: Instant) {
        match handling {
            Handling::Normal => return,
            Handling::Few => self.few_running = self.few_running.saturating_sub(1),
            Handling::Alone | Handling::LastAttempt => self.end_isolation(now),
        }
        self.look_at = now;
    }

    /// Records that the isolated item has ended or was not started.
    pub(super) fn end_isolation(&mut self, now: Instant) {
        if let Isolation::Running(since) | Isolation::Waiting(_, since) = self.isolation {
            self.isolate_from = now + now.saturating_duration_since(since);
        }
        self.isolation = Isolation::None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(30);
    const SECOND: Duration = Duration::from_secs(1);

    fn item() -> Item {
        serde_json::from_value(serde_json::json!({
            "id": 1, "run": 7, "seq": 1, "key": "k", "tenant": "", "status": "processing", "epoch": 2,
            "attempt": 1, "max_attempts": 3, "input": "1", "output": null, "error": null,
            "handling": "alone",
        }))
        .unwrap()
    }

    #[test]
    fn a_worker_takes_a_few_suspects_after_it_has_lived_for_a_lease() {
        let created_at = Instant::now();
        let mut suspects = SuspectPolicy::new(64, LEASE, created_at, created_at, None);
        assert_eq!(suspects.look_at(), created_at + LEASE);
        assert!(suspects.wanted(created_at + LEASE - SECOND, 64).is_empty());
        let wanted = suspects.wanted(created_at + LEASE, 64);
        assert_eq!(wanted, [(Handling::Few, 8), (Handling::Alone, 1)]);
        (0..8).for_each(|_| suspects.started(Handling::Few));
        suspects.ended(Handling::Few, created_at + LEASE);
        assert_eq!(
            suspects.look_at(),
            created_at + LEASE,
            "there is room for another"
        );
        let wanted = suspects.wanted(created_at + LEASES_BEFORE_LAST_ATTEMPT * LEASE, 64);
        let few = (Handling::Few, 1);
        assert_eq!(
            wanted,
            [few, (Handling::Alone, 1), (Handling::LastAttempt, 1)]
        );
        assert_eq!(
            suspects.wanted(created_at + LEASE, 0),
            [(Handling::Alone, 1)]
        );
    }

    #[test]
    fn a_worker_with_little_time_takes_suspects_in_the_second_half_of_it() {
        let now = Instant::now();
        let last_claim = Some(now + 20 * SECOND);
        let mut suspects = SuspectPolicy::new(1, LEASE, now, now, last_claim);
        assert!(suspects.wanted(now + 9 * SECOND, 1).is_empty());
        assert_eq!(suspects.wanted(now + 10 * SECOND, 1).len(), 3);
        // A worker that was created earlier takes suspects at once.
        let created_at = now;
        let now = now + LEASE;
        let suspects = SuspectPolicy::new(1, LEASE, created_at, now, Some(now + 20 * SECOND));
        assert_eq!(suspects.look_at(), now);
    }

    #[test]
    fn one_item_at_a_time_is_run_alone_for_half_of_the_time() {
        let now = Instant::now();
        let mut suspects = SuspectPolicy::new(4, Duration::ZERO, now, now, None);
        assert!(suspects.isolate(item(), now).is_none());
        assert!(suspects.isolate(item(), now).is_some());
        assert!(suspects.is_isolating() && suspects.waiting().is_some());
        assert!(suspects.begin_isolated().is_some() && suspects.is_isolating());
        let over = now + 10 * SECOND;
        suspects.ended(Handling::Alone, over);
        assert!(!suspects.is_isolating());
        assert_eq!(suspects.wanted(over, 4), [(Handling::Few, 2)]);
        assert_eq!(suspects.wanted(over + 10 * SECOND, 4).len(), 3);
        suspects.nothing_else = true;
        assert_eq!(suspects.wanted(over, 4).len(), 3);
    }
}
