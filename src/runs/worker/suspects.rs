//! [`SuspectPolicy`]: when a worker takes items that workers have died with, and how many of them.
//!
//! A death says nothing by itself: the worker may have been killed from outside. So a worker takes such items only when it
//! has lived for a while, which one in a crash loop never does; then few at a time, so that the next
//! death leaves few to suspect; and then one with nothing beside it.

use std::time::Duration;

use tokio::time::Instant;

use crate::store::{Handling, Item};

/// The last attempt of an item is made by a worker that has lived for this many leases.
const LEASES_BEFORE_LAST_ATTEMPT: u32 = 16;
/// The longest time between two looks for suspects.
const MAX_LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Which suspects a worker takes, and when. It is told the time.
pub(super) struct SuspectPolicy {
    /// How many of those that are run a few at a time. With the square root of n of n items, as many rounds are
    /// needed to run n suspects as there are items to run alone after a death in one of the rounds.
    few: usize,
    few_running: usize,
    /// From when on the worker has lived long enough for suspects, and for those in their last attempt.
    from: Instant,
    last_from: Instant,
    every: Duration,
    look_at: Instant,
    isolation: Isolation,
    /// From when on another item may be run alone: as long after the last one as that took.
    isolate_from: Instant,
    /// Whether there was nothing else to claim when the worker looked last.
    pub(super) nothing_else: bool,
}

enum Isolation {
    None,
    /// The item waits until the others have ended; nothing is claimed since then.
    Waiting(Box<Item>, Instant),
    Running(Instant),
}

impl SuspectPolicy {
    /// For a worker that lives since `created_at` and may claim from `now` until `last_claim`. Who has little time
    /// takes suspects in the second half of it.
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

    /// When to look for suspects next.
    pub(super) fn look_at(&self) -> Instant {
        self.look_at
    }

    /// What to claim at this look, and how much of it, where `free` items may be started.
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

    /// An item that is to be run alone was claimed. Gives it back where another one waits.
    pub(super) fn isolate(&mut self, item: Item, now: Instant) -> Option<Item> {
        if self.is_isolating() {
            return Some(item);
        }
        self.isolation = Isolation::Waiting(Box::new(item), now);
        None
    }

    /// Whether an item is run alone, or waits for the others to end: nothing is claimed then.
    pub(super) fn is_isolating(&self) -> bool {
        !matches!(self.isolation, Isolation::None)
    }

    /// The item that waits to be run alone.
    pub(super) fn waiting(&self) -> Option<&Item> {
        match &self.isolation {
            Isolation::Waiting(item, _) => Some(item),
            _ => None,
        }
    }

    /// The item to run alone now that nothing else runs.
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

    /// An item was started.
    pub(super) fn started(&mut self, handling: Handling) {
        self.few_running += usize::from(handling == Handling::Few);
    }

    /// An item that was started has ended.
    pub(super) fn ended(&mut self, handling: Handling, now: Instant) {
        match handling {
            Handling::Normal => return,
            Handling::Few => self.few_running = self.few_running.saturating_sub(1),
            Handling::Alone | Handling::LastAttempt => self.end_isolation(now),
        }
        self.look_at = now;
    }

    /// The item that was to be run alone has ended, or was not begun.
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
    fn a_young_worker_takes_no_suspects_and_an_older_one_a_few() {
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
    fn a_worker_with_little_time_takes_them_in_the_second_half_of_it() {
        let now = Instant::now();
        let last_claim = Some(now + 20 * SECOND);
        let mut suspects = SuspectPolicy::new(1, LEASE, now, now, last_claim);
        assert!(suspects.wanted(now + 9 * SECOND, 1).is_empty());
        assert_eq!(suspects.wanted(now + 10 * SECOND, 1).len(), 3);
        // It was created_at earlier and is old enough.
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
