//! [`ContentionDetector`]: whether the level of the provider's bucket stays low, and whether others use the account.
//!
//! Lanes that share an account without knowing of each other see the same level in the headers of their
//! replies. A refusal strikes the caller that comes a moment too late, and always the same lanes where one lane
//! takes each unit the moment it is available; the level informs all of them, and before any call is refused. Only a
//! *standing* low level counts (as CoDel counts only a standing queue, RFC 8289): a window that is used up at
//! its end, or a burst, says nothing.

use super::{LimitPolicy, Reading};
use crate::ratelimit::bucket::Nanos;

/// The level must have been low for this long, and in this many replies.
const INTERVAL: Nanos = 1_000_000_000;
const READINGS: u32 = 2;
/// After a longer silence the level in the meantime is unknown.
const SILENCE: Nanos = 5 * INTERVAL;
/// A level is low below the units that flow in within this many seconds.
const LOW: f64 = 0.6;
/// A low level below this many of the largest calls cannot be distinguished from the effect of one call.
const COARSE: f64 = 2.0;
/// Others use the limit if they take at least this part of what flows in and of what the lane takes. That is remembered for
/// a minute: at an empty bucket a lane that takes each unit the moment it is there starves the others, and no longer
/// sees them.
const OTHERS: f64 = 0.25;
const REMEMBERED: Nanos = 60 * INTERVAL;
/// A lane that sends at least this part of the limit is taken to be alone.
const ALONE: f64 = 0.75;
/// A lane that sends less than this part of what it may send does not want more.
const USED: f64 = 0.5;
/// The factor of a lane that is alone while the level is low: other lanes, which it would never notice, get in
/// between, or the level rises.
const YIELDED: f64 = 0.995;

/// The use of the lane itself: the units that it has taken, the most in one call, and how many it may take in a second.
#[derive(Debug, Clone, Copy)]
pub(in crate::ratelimit) struct OwnUse {
    pub(in crate::ratelimit) taken: u64,
    pub(in crate::ratelimit) largest: u64,
    pub(in crate::ratelimit) pace: f64,
}

/// The level during the last interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Level {
    Ample,
    /// Low, and no other lane seems to use the limit.
    Low,
    /// Low by this part of what should be available, and others use the limit.
    Contended(f64),
}

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ContentionDetector {
    /// Until then others are taken to use the limit, because the level fell by more than the lane has taken.
    others_until: Nanos,
    /// The part of all use that was the lane's own when there was enough for all.
    share: f64,
    /// The units that were left when the interval began.
    left: u64,
    since: Nanos,
    heard: Nanos,
    readings: u32,
    most: u64,
    /// The units that the lane had taken when the interval began.
    taken: u64,
    yields: bool,
}

impl ContentionDetector {
    /// Starts an interval.
    fn restart(&mut self, now: Nanos, left: u64, taken: u64) {
        *self = Self {
            others_until: self.others_until,
            share: self.share,
            left,
            since: now,
            heard: now,
            taken,
            yields: self.yields,
            ..Self::default()
        };
    }

    /// Adds a reading of the headers. Returns the level at the end of an interval. `capacity` is the number of units that the
    /// provider stores, where its limit is known to be a bucket that refills evenly.
    pub(super) fn level(&mut self, reading: &Reading, capacity: Option<f64>) -> Option<Level> {
        let Reading { now, left, own, .. } = *reading;
        let limit = reading.limit?;
        if self.heard == 0 || now.saturating_sub(self.heard) > SILENCE {
            self.restart(now, left, own.taken);
        }
        self.heard = now;
        self.most = self.most.max(left);
        self.readings += 1;
        let time = now.saturating_sub(self.since);
        if time < INTERVAL || self.readings < READINGS {
            return None;
        }
        let Self {
            most,
            taken,
            readings,
            ..
        } = *self;
        let enough = limit.per_second() * LOW;
        let flown = limit.per_second() * time as f64 / 1e9;
        let own_units = own.taken.saturating_sub(taken) as f64;
        let others = self.left as f64 + flown - own_units - left as f64;
        // A debt does not show in a level of zero, and nothing flows into a full bucket.
        let between = 2.0 * flown / f64::from(readings);
        let full = |capacity: f64| most as f64 + between >= capacity;
        let shown = self.left > 0 && capacity.is_some_and(|capacity| !full(capacity));
        if shown && others > (flown + own_units) * OTHERS + COARSE * own.largest as f64 {
            if most as f64 >= enough || !self.sees_others(now) {
                self.share = own_units / (own_units + others);
            }
            self.others_until = now.saturating_add(REMEMBERED);
        }
        self.restart(now, left, own.taken);
        if enough < COARSE * own.largest as f64 {
            return None;
        }
        let short = 1.0 - most as f64 / enough;
        let pace = own_units * 1e9 / time as f64;
        if short <= 0.0 {
            Some(Level::Ample)
        } else if pace >= ALONE * limit.per_second() && !self.sees_others(now) {
            Some(Level::Low)
        } else {
            // A lane that does not use its share need not give it up.
            (pace >= USED * own.pace).then_some(Level::Contended(short))
        }
    }

    /// Whether others were lately seen to use the limit.
    pub(super) fn sees_others(&self, now: Nanos) -> bool {
        now < self.others_until
    }

    /// The part of its rate that the lane used when there was enough for all, if others were lately seen.
    pub(super) fn share(&self, reading: &Reading) -> Option<f64> {
        let limit = reading.limit.filter(|_| self.sees_others(reading.now))?;
        Some(self.share * limit.per_second() / reading.known.per_second())
    }

    /// The units that are left to others, if any were seen: a level above that is ample.
    pub(super) fn reserve(&self, reading: &Reading) -> u64 {
        let others = reading.limit.filter(|_| self.sees_others(reading.now));
        others.map_or(0, |limit| (limit.per_second() * LOW) as u64)
    }

    pub(super) fn set_yield(&mut self, yields: bool) {
        self.yields = yields;
    }
}

impl LimitPolicy for ContentionDetector {
    fn rate_factor(&self) -> Option<f64> {
        self.yields.then_some(YIELDED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ratelimit::bucket::Rate;

    fn reading(now: Nanos, left: u64, own: OwnUse) -> Reading {
        let rate = Rate::per_minute(600);
        Reading::of(now, left, rate, rate, own)
    }

    /// Of a limit of ten a second, of which the lane may take `pace` and takes `taken` in the
    /// second of the readings.
    fn level(left: &[u64], taken: u64, largest: u64, pace: f64) -> Option<Level> {
        let mut contention = ContentionDetector::default();
        let mut level = None;
        for (i, left) in left.iter().enumerate() {
            let own = OwnUse {
                taken: if i == 0 { 0 } else { taken },
                largest,
                pace,
            };
            let now = 100 * INTERVAL + INTERVAL / 2 * i as u64;
            level = contention.level(&reading(now, *left, own), None);
        }
        level
    }

    #[test]
    fn only_a_level_that_stays_low_is_low() {
        let level = |left| level(left, 2, 1, 3.0);
        assert_eq!(level(&[0, 0]), None, "not long enough");
        assert_eq!(level(&[0, 3, 0]), Some(Level::Contended(0.5)));
        assert_eq!(level(&[0, 0, 0]), Some(Level::Contended(1.0)));
        assert_eq!(level(&[0, 6, 0]), Some(Level::Ample), "a window's end");
    }

    #[test]
    fn a_refund_between_two_readings_is_not_contention() {
        let mut contention = ContentionDetector::default();
        let mut read = |second: u64, taken| {
            let own = OwnUse {
                taken,
                largest: 1,
                pace: 1.0,
            };
            contention.level(&reading((100 + second) * INTERVAL, 0, own), None)
        };
        assert_eq!(read(0, 900), None);
        assert_eq!(read(1, 800), None, "nothing in sum");
    }

    #[test]
    fn a_low_level_counts_only_if_the_lane_itself_does_not_explain_it() {
        let level = |taken, largest, pace| level(&[0, 0, 0], taken, largest, pace);
        assert_eq!(level(8, 1, 10.0), Some(Level::Low), "the lane itself");
        assert_eq!(level(2, 1, 10.0), None, "it does not want more");
        assert_eq!(level(2, 4, 3.0), None, "one call is as much");
    }
}
