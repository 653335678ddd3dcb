//! [`ContentionDetector`]: whether the provider's bucket stays near empty, and whose doing that is.
//!
//! Lanes that share an account without knowing of each other see the same level in the headers
//! of their replies. A refusal strikes whoever comes a moment too late, and always the same ones where
//! one lane takes each unit the moment it is there; the level tells all of them, and before
//! anybody is refused. Only a *standing* low level counts (as CoDel counts only a
//! standing queue, RFC 8289): a window that is used up at its end, or a burst, says nothing.

use crate::ratelimit::bucket::{Nanos, Rate};

/// So long, and in so many replies, the level must have been low all the time.
const INTERVAL: Nanos = 1_000_000_000;
const READINGS: u32 = 2;
/// What was in a longer silence nobody knows.
const SILENCE: Nanos = 5 * INTERVAL;
/// Low is less than the limit lets through in so many seconds.
const LOW: f64 = 0.6;
/// Less than so many of the largest calls is too little to tell from one of them.
const COARSE: f64 = 2.0;
/// QueueKey sends at least this part of what the limit lets through is taken to be alone.
const ALONE: f64 = 0.75;

/// QueueKey sends less than this part of what it may send does not want more.
const USED: f64 = 0.5;

/// What the lane does itself: how much it has taken, how much of it in one call, and how much
/// it may take in a second.
#[derive(Debug, Clone, Copy)]
pub(in crate::ratelimit) struct OwnUse {
    pub(in crate::ratelimit) taken: u64,
    pub(in crate::ratelimit) largest: u64,
    pub(in crate::ratelimit) pace: f64,
}

/// What the level was lately.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::ratelimit) enum Level {
    Ample,
    /// Low, and nobody else seems to be there.
    Low,
    /// Low by this part of what should be there, and others use the limit.
    Contended(f64),
}

#[derive(Debug, Clone, Copy, Default)]
pub(in crate::ratelimit) struct ContentionDetector {
    since: Nanos,
    heard: Nanos,
    readings: u32,
    most: u64,
    /// What the lane had taken when the interval began.
    taken: u64,
}

impl ContentionDetector {
    /// An interval that begins now.
    fn from(now: Nanos, taken: u64) -> Self {
        Self {
            since: now,
            heard: now,
            taken,
            ..Self::default()
        }
    }

    /// A reply says that so much is `left` of `limit`. Says at the end of an interval what that
    /// comes to for this lane.
    pub(in crate::ratelimit) fn read(
        &mut self,
        now: Nanos,
        left: u64,
        limit: Rate,
        own: OwnUse,
    ) -> Option<Level> {
        if now.saturating_sub(self.heard) > SILENCE {
            *self = Self::from(now, own.taken);
        }
        self.heard = now;
        self.most = self.most.max(left);
        self.readings += 1;
        let time = now.saturating_sub(self.since);
        if time < INTERVAL || self.readings < READINGS {
            return None;
        }
        let Self { most, taken, .. } = *self;
        *self = Self::from(now, own.taken);
        let enough = limit.per_second() * LOW;
        if enough < COARSE * own.largest as f64 {
            return None;
        }
        let short = 1.0 - most as f64 / enough;
        let pace = own.taken.saturating_sub(taken) as f64 * 1e9 / time as f64;
        if short <= 0.0 {
            Some(Level::Ample)
        } else if pace >= ALONE * limit.per_second() {
            Some(Level::Low)
        } else {
            // QueueKey does not use what it has need not give it up.
            (pace >= USED * own.pace).then_some(Level::Contended(short))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            level = contention.read(now, *left, Rate::per_minute(600), own);
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
    fn what_was_taken_may_turn_out_to_be_less() {
        let mut contention = ContentionDetector::default();
        let mut read = |second: u64, taken| {
            let own = OwnUse {
                taken,
                largest: 1,
                pace: 1.0,
            };
            contention.read((100 + second) * INTERVAL, 0, Rate::per_minute(600), own)
        };
        assert_eq!(read(0, 900), None);
        assert_eq!(read(1, 800), None, "nothing in sum");
    }

    #[test]
    fn it_matters_who_uses_the_limit() {
        let level = |taken, largest, pace| level(&[0, 0, 0], taken, largest, pace);
        assert_eq!(level(8, 1, 10.0), Some(Level::Low), "the lane itself");
        assert_eq!(level(2, 1, 10.0), None, "it does not want more");
        assert_eq!(level(2, 4, 3.0), None, "one call is as much");
    }
}
