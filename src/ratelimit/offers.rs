//! [`Offers`]: grants made to callers in the queue, until they are collected.
//!
//! A caller in the queue is granted its call while it sleeps, and woken. Whether its future is
//! polled then is up to the code around it: the future may stand in a `select!` whose other
//! branch runs, in a buffered stream whose consumer is busy, in a runtime that is blocked or
//! gone. So a grant is an *offer*, and one that is not collected expires.
//!
//! - The first offer to a caller stands for [`STANDS_FOR`]: many times what a wake-up takes, and a
//!   fraction of what a call takes.
//! - While offers expire one after the other, no caller seems to be polled, and each stands for half
//!   as long as the one before, down to [`SHORTEST`]. One that is collected ends that.
//! - A caller that has missed an offer is offered its next ones for [`SHORTEST`] only: a caller that is
//!   rarely polled must not hold up the others repeatedly.
//! - A caller that came back within [`LONGEST`] is slow, not absent. Its next offer stands for twice the time that it
//!   took. While no caller has collected a grant since, that holds for every offer, so that callers that are all slow
//!   cannot pass one grant round for ever. Otherwise it holds for one part in [`PATIENCE`] of the time, so that a slow
//!   caller among quick ones is served too.

use std::collections::BTreeSet;

use crate::ratelimit::bucket::Nanos;
use crate::ratelimit::queue::Map;

/// How long an offer stands.
pub(super) const STANDS_FOR: Nanos = 50_000_000;
/// Timers count milliseconds.
const SHORTEST: Nanos = STANDS_FOR >> 4;
/// A caller that takes longer than this to come is absent: calls do not take much longer.
const LONGEST: Nanos = 1_000_000_000;
/// Slow callers may delay the others by a twentieth.
const PATIENCE: u64 = 20;

#[derive(Debug)]
struct Offer<G> {
    grant: G,
    made_at: Nanos,
    expires_at: Nanos,
}

/// A caller that has missed an offer and was polled again.
#[derive(Debug)]
struct Late {
    offered_at: Nanos,
    took: Nanos,
}

/// The offers and the callers that missed one, by the ticket of the caller.
#[derive(Debug)]
pub(super) struct Offers<G> {
    open: Map<u64, Offer<G>>,
    by_expiry: BTreeSet<(Nanos, u64)>,
    /// The time of the offer, for callers whose offer has expired and that were not polled since.
    missed: Map<u64, Nanos>,
    late: Map<u64, Late>,
    /// Offers that expired since one was collected.
    expired_in_a_row: u32,
    /// When an offer was collected last.
    collected_at: Nanos,
    /// When the lane waits for a slow caller again, although others are quick.
    patient_at: Nanos,
}

impl<G> Offers<G> {
    pub(super) fn new() -> Self {
        Self {
            open: Map::default(),
            by_expiry: BTreeSet::new(),
            missed: Map::default(),
            late: Map::default(),
            expired_in_a_row: 0,
            collected_at: 0,
            patient_at: 0,
        }
    }

    pub(super) fn make(&mut self, now: Nanos, ticket: u64, grant: G) {
        let expires_at = now.saturating_add(self.stands_for(now, ticket));
        self.by_expiry.insert((expires_at, ticket));
        let offer = Offer {
            grant,
            made_at: now,
            expires_at,
        };
        self.open.insert(ticket, offer);
    }

    fn stands_for(&mut self, now: Nanos, ticket: u64) -> Nanos {
        let Some(late) = self.late.get(&ticket) else {
            let usual = STANDS_FOR.checked_shr(self.expired_in_a_row);
            return usual.unwrap_or(0).max(SHORTEST);
        };
        let starving = self.collected_at <= late.offered_at;
        if late.took > LONGEST || !(starving || self.patient_at <= now) {
            return SHORTEST;
        }
        let patience = (2 * late.took).clamp(STANDS_FOR, LONGEST);
        self.patient_at = now.saturating_add(PATIENCE * patience);
        patience
    }

    /// The caller is there and takes what it was offered.
    pub(super) fn collect(&mut self, now: Nanos, ticket: u64) -> Option<G> {
        let grant = self.withdraw(ticket)?;
        self.expired_in_a_row = 0;
        self.collected_at = now;
        Some(grant)
    }

    /// The caller goes away: returns what it was offered and has not collected.
    pub(super) fn forget(&mut self, ticket: u64) -> Option<G> {
        self.missed.remove(&ticket);
        self.withdraw(ticket)
    }

    fn withdraw(&mut self, ticket: u64) -> Option<G> {
        self.late.remove(&ticket);
        let offer = self.open.remove(&ticket)?;
        self.by_expiry.remove(&(offer.expires_at, ticket));
        Some(offer.grant)
    }

    /// Takes back one offer whose time is over.
    pub(super) fn expire(&mut self, now: Nanos) -> Option<G> {
        let (_, ticket) = self.by_expiry.first().copied()?;
        self.expire_of(now, ticket)
    }

    /// Takes back the offer to this caller if its time is over.
    pub(super) fn expire_of(&mut self, now: Nanos, ticket: u64) -> Option<G> {
        let offer = self.open.get(&ticket)?;
        if offer.expires_at > now {
            return None;
        }
        self.missed.insert(ticket, offer.made_at);
        self.expired_in_a_row = self.expired_in_a_row.saturating_add(1);
        self.withdraw(ticket)
    }

    /// Whether the offer to this caller, who is there now, had expired.
    pub(super) fn come_back(&mut self, now: Nanos, ticket: u64) -> bool {
        let Some(offered_at) = self.missed.remove(&ticket) else {
            return false;
        };
        let took = now.saturating_sub(offered_at);
        self.late.insert(ticket, Late { offered_at, took });
        true
    }

    /// Forgets the callers that have missed their offer.
    pub(super) fn forget_missed(&mut self) {
        self.missed.clear();
        self.late.clear();
    }

    pub(super) fn next_expiry(&self) -> Option<Nanos> {
        self.by_expiry.first().map(|(at, _)| *at)
    }

    /// The callers that have missed their offer and were not polled since.
    pub(super) fn missed(&self) -> usize {
        self.missed.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Nanos = 1_000_000;

    fn expire_all(offers: &mut Offers<u64>, now: Nanos) -> Vec<u64> {
        std::iter::from_fn(|| offers.expire(now)).collect()
    }

    #[test]
    fn an_offer_expires_once_unless_it_is_collected() {
        let mut offers = Offers::new();
        offers.make(0, 1, 1);
        offers.make(0, 2, 2);
        assert_eq!(offers.next_expiry(), Some(STANDS_FOR));
        assert_eq!(offers.collect(0, 1), Some(1));
        assert!(expire_all(&mut offers, STANDS_FOR - 1).is_empty());
        assert_eq!(expire_all(&mut offers, STANDS_FOR), [2]);
        assert_eq!((offers.missed(), offers.next_expiry()), (1, None));
        assert_eq!(offers.collect(STANDS_FOR, 2), None);
        assert!(offers.come_back(STANDS_FOR, 2) && !offers.come_back(STANDS_FOR, 2));
    }

    #[test]
    fn a_crowd_that_is_not_there_is_passed_quickly() {
        let mut offers = Offers::new();
        let mut now = 0;
        for ticket in 0..1_000 {
            offers.make(now, ticket, ticket);
            now = offers.next_expiry().unwrap();
            assert!(offers.expire(now).is_some());
        }
        assert!(now < 1_000 * 4 * MS, "{now}");
        offers.make(now, 1_000, 1_000);
        assert!(offers.collect(now, 1_000).is_some());
        offers.make(now, 1_001, 1_001);
        assert_eq!(offers.next_expiry(), Some(now + STANDS_FOR));
    }

    /// How long the next offer stands to a caller that came so long after its last one.
    fn next_stands_for(offers: &mut Offers<u64>, now: Nanos, took: Nanos, between: bool) -> Nanos {
        offers.make(now, 1, 1);
        assert!(offers.expire(now + LONGEST).is_some());
        if between {
            offers.make(now, 2, 2);
            assert!(offers.collect(now + 1, 2).is_some());
        }
        assert!(offers.come_back(now + took, 1));
        offers.make(now + took, 1, 1);
        let stands_for = offers.next_expiry().unwrap() - now - took;
        assert!(offers.forget(1).is_some());
        stands_for
    }

    #[test]
    fn a_slow_caller_is_waited_for_while_no_other_collects_anything() {
        let mut offers = Offers::new();
        for (took, stands_for) in [
            (60 * MS, 120 * MS),
            (20 * MS, STANDS_FOR),
            (600 * MS, LONGEST),
            (2 * LONGEST, SHORTEST),
        ] {
            assert_eq!(next_stands_for(&mut offers, 0, took, false), stands_for);
        }
    }

    #[test]
    fn a_slow_caller_among_quick_ones_is_waited_for_one_part_of_the_time() {
        let mut offers = Offers::new();
        let mut waited = 0;
        for n in 0..1_000 {
            let stands_for = next_stands_for(&mut offers, n * 300 * MS, 100 * MS, true);
            assert!([200 * MS, SHORTEST].contains(&stands_for));
            waited += stands_for - SHORTEST;
        }
        let part = waited as f64 / (1_000 * 300 * MS) as f64;
        assert!((0.04..=0.05).contains(&part), "{part}");
    }
}
