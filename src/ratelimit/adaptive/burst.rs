//! [`StoredBurst`]: the units that a provider has stored beyond those that the lane needs, by its headers.
//!
//! A provider that stores a whole minute of its limit lets all of it through at once, and a lane that keeps to
//! the rate leaves it there. Where only the provider has named the limit, the lane believes it and goes at twice
//! the rate until the stored burst is spent, or a call is refused. The refill in the meantime is not counted, so that more is left in
//! the end than was planned.

use super::{LimitPolicy, LimitRefusal, Reading};

/// The factor while a stored burst is spent. Not all at once: many providers enforce a minute's limit by seconds.
const BURST_FACTOR: f64 = 2.0;

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct StoredBurst {
    units: u64,
    /// A call was refused: the provider does not store what it says.
    disproved: bool,
}

impl StoredBurst {
    #[inline]
    pub(super) fn is_available(self) -> bool {
        self.units > 0
    }
}

impl LimitPolicy for StoredBurst {
    #[inline]
    fn on_grant(&mut self, units: u64) {
        self.units = self.units.saturating_sub(units);
    }

    fn on_headers(&mut self, reading: &Reading) {
        if !self.disproved {
            self.units = reading.spare;
        }
    }

    /// Returns whether the refusal was of a call that spent the stored burst. It says nothing of the limit itself.
    fn on_refusal(&mut self, _refusal: &LimitRefusal) -> bool {
        let was_available = self.is_available();
        (self.units, self.disproved) = (0, true);
        was_available
    }

    fn rate_factor(&self) -> Option<f64> {
        self.is_available().then_some(BURST_FACTOR)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BinaryHeap;
    use std::{cmp::Reverse, time::Duration};

    use proptest::prelude::*;

    use crate::ratelimit::adaptive::{PolicySet, headers};
    use crate::ratelimit::bucket::{Nanos, Rate};
    use crate::ratelimit::limit::{Burst, Cost, Limit, Source};
    use crate::request::Quota;

    const SECOND: Nanos = 1_000_000_000;

    /// A provider's bucket of a minute, as it keeps it.
    struct Minute {
        limit: u64,
        level: f64,
        at: Nanos,
    }

    impl Minute {
        fn level(&mut self, now: Nanos) -> f64 {
            let flown = (now - self.at) as f64 / 60e9 * self.limit as f64;
            self.level = (self.level + flown).min(self.limit as f64);
            self.at = now;
            self.level
        }

        fn says(&mut self, now: Nanos) -> Quota {
            let level = self.level(now);
            let used = 1.0 - level / self.limit as f64;
            Quota {
                limit: Some(self.limit),
                remaining: Some(level.max(0.0) as u64),
                reset: Some(Duration::from_secs_f64(60.0 * used)),
            }
        }
    }

    fn advertised(limit: u64) -> Limit {
        let burst = Burst {
            time: SECOND,
            full_at_start: false,
        };
        let mut limit = Limit::new(
            Source::Advertised,
            Rate::per_minute(limit),
            burst,
            0,
            PolicySet::ALL,
        );
        limit.stand_still_until(0, 0);
        limit
    }

    fn take(limit: &mut Limit, now: Nanos, upfront: u64) {
        limit.take(
            now,
            Cost {
                upfront,
                deferred: 0,
            },
        );
    }

    #[test]
    fn a_stored_burst_is_spent_at_twice_the_rate() {
        let mut limit = advertised(600);
        limit.on_headers(0, u64::MAX, None, Some(40), 0);
        assert_eq!(limit.rate_factor(), 2.0, "three bursts of ten are kept");
        take(&mut limit, 0, 4);
        limit.on_headers(0, u64::MAX, None, Some(39), 0);
        assert_eq!(limit.rate_factor(), 2.0, "and the largest call");
        take(&mut limit, 0, 4);
        assert_eq!(limit.rate_factor(), 2.0);
        take(&mut limit, 0, 1);
        assert_eq!(limit.rate_factor(), 1.0);
        limit.on_headers(SECOND, u64::MAX, None, Some(600), SECOND);
        assert_eq!(limit.rate_factor(), 2.0);
        limit.on_headers(2 * SECOND, u64::MAX, None, None, 2 * SECOND);
        assert_eq!(limit.rate_factor(), 1.0);
    }

    #[test]
    fn the_first_refusal_ends_the_stored_burst_and_leaves_the_rate() {
        let mut limit = advertised(600);
        limit.on_headers(0, u64::MAX, None, Some(600), 0);
        assert!(limit.record_refusal(SECOND, 0, 1, None));
        assert_eq!(limit.rate_factor(), 1.0);
        assert!(
            !limit.record_refusal(2 * SECOND, SECOND, 1, None),
            "the same cohort"
        );
        limit.on_headers(3 * SECOND, u64::MAX, None, Some(600), 3 * SECOND);
        assert_eq!(limit.rate_factor(), 1.0);
        assert!(limit.record_refusal(4 * SECOND, 4 * SECOND, 1, None));
        assert!(limit.rate_factor() < 1.0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        /// A provider that stores a minute refuses no call that spends the stored burst, whether its headers state the
        /// level at the admission of a call or at its end.
        #[test]
        fn a_stored_burst_that_is_spent_is_never_refused(
            per_minute in 60..100_000u64,
            on_admission: bool,
            calls in proptest::collection::vec((0..100u64, 1..2_000u64, 0..5_000u64), 1..400),
        ) {
            let mut limit = advertised(per_minute);
            let mut provider = Minute { limit: per_minute, level: per_minute as f64, at: 0 };
            // By the end of the call: when it was granted, the level of the lane then, and the headers of its reply.
            let mut in_flight = BinaryHeap::<Reverse<(Nanos, Nanos, Nanos, u64, Duration)>>::new();
            let (mut now, mut newest, mut faster) = (0, 0, 0);
            for (gap, thousandths, latency) in calls {
                // Up to two seconds' worth in one call.
                let n = (per_minute * thousandths / 60_000).max(1);
                let share = Cost { upfront: n, deferred: 0 };
                now += gap * 1_000_000;
                loop {
                    let ready = limit.ready_at(now, share).unwrap();
                    let end = in_flight.peek().map(|Reverse((end, ..))| *end);
                    let Some(end) = end.filter(|end| *end <= ready) else {
                        now = ready;
                        break;
                    };
                    now = now.max(end);
                    let Some(Reverse((_, at, filled, left, reset))) = in_flight.pop() else {
                        unreachable!("it was looked at");
                    };
                    limit.advance(now, true);
                    let then = Quota { limit: Some(per_minute), remaining: Some(left), reset: Some(reset) };
                    let said = if on_admission { then } else { provider.says(now) };
                    if at >= newest {
                        newest = at;
                        limit.lower(now, said.remaining.unwrap(), at, filled);
                        limit.on_headers(now, u64::MAX, None, headers::left_of_a_minute(&said), at);
                    }
                }
                limit.advance(now, true);
                faster += u64::from(limit.rate_factor() > 1.0);
                // The lane's time counts whole nanoseconds.
                let level = provider.level(now) + 1e-3;
                prop_assert!(level >= n as f64, "{n} of {level} after {faster} calls above the rate");
                provider.level -= n as f64;
                limit.take(now, share);
                limit.resize(now);
                let said = provider.says(now);
                let end = now + latency * 1_000_000;
                let said = (said.remaining.unwrap(), said.reset.unwrap());
                in_flight.push(Reverse((end, now, limit.filled(now), said.0, said.1)));
            }
        }
    }
}
