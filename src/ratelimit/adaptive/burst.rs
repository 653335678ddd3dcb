//! [`StoredBurst`]: uses what a provider has stored beyond its rate, by the headers of its replies or by a careful probe.
//!
//! Where the readings are those of a [bucket](ProviderBucket), the lane uses the stored burst in steps, as TCP does in its
//! slow start (RFC 5681): each burst may be twice as large as the largest one that was answered. If there is a second
//! limit, of which the headers say nothing, it refuses one step, and the lane does not believe the headers again. A
//! window, in which the burst would be missing later, is left at the rate. Where no headers tell a level, the lane
//! tries three calls above the rate in each round trip, up to the burst of the limit.

use super::provider_bucket::{ProviderBucket, Shape};
use super::{LimitRefusal, Reading};
use crate::ratelimit::bucket::Nanos;

/// The calls of the first step: one at the rate, and two more.
const FIRST_STEP: u64 = 3;
/// The calls above the rate in each round trip where no headers tell a level: the most that are refused.
const PROBE_STEP: u64 = 3;
/// Each refusal that the headers explain halves the part of their promise that is used, down to this, and each reply gives a
/// little of it back.
const LEAST_TRUST: f64 = 1.0 / 16.0;
const TRUST_REGAINED: f64 = 1.02;
/// A lane uses the burst of a limit only where its own rate is at least this part of the provider's: who configures less
/// wants a share of the account. And only up to this multiple: it is another limit that the headers speak of.
const RATES: std::ops::Range<f64> = 0.98..2.2;

#[derive(Debug, Clone, Copy, Default)]
pub(in crate::ratelimit) struct StoredBurst {
    /// Whether headers tell a level and a reset.
    has_headers: bool,
    bucket: ProviderBucket,
    /// The time in which the whole bucket of the provider flows in; zero while it is not known to be one.
    stored: Nanos,
    /// The most that may be used at once, if it is known.
    step: Nanos,
    /// The burst that is in use: what was taken, less what has flowed in since.
    used: Nanos,
    used_at: Nanos,
    /// The largest burst, the order of the call that completed it, and the largest one that was answered.
    peak: Nanos,
    peak_order: u64,
    proven: Nanos,
    last: Raise,
    /// The order of the raise before.
    before: u64,
    /// The sum of the raises before the readings told a bucket from a window.
    undecided: Nanos,
    /// The part of what the headers promise that is used.
    trust: f64,
    refuted: bool,
}

/// The level of the lane was raised before the call of this order was granted.
#[derive(Debug, Clone, Copy, Default)]
struct Raise {
    order: u64,
    by: Nanos,
}

/// A reply without headers, and the state of the limit.
#[derive(Debug, Clone, Copy)]
pub(in crate::ratelimit) struct BareReply {
    pub(in crate::ratelimit) order: u64,
    pub(in crate::ratelimit) next_order: u64,
    pub(in crate::ratelimit) now: Nanos,
    pub(in crate::ratelimit) level: Nanos,
    /// The burst of the limit, and the time of an average call.
    pub(in crate::ratelimit) burst: Nanos,
    pub(in crate::ratelimit) call: Nanos,
}

impl StoredBurst {
    pub(super) fn new(learns: bool) -> Self {
        Self {
            trust: 1.0,
            refuted: !learns,
            ..Self::default()
        }
    }

    /// The most that may be used at once, if it is known to be stored.
    #[inline]
    pub(in crate::ratelimit) fn in_use(&self) -> Option<Nanos> {
        (self.step > 0 && !self.refuted).then_some(self.step)
    }

    /// The time in which everything that the provider stores flows in, if that is known.
    pub(in crate::ratelimit) fn stored(&self) -> Option<Nanos> {
        (self.stored > 0 && !self.refuted).then_some(self.stored)
    }

    /// Whether larger bursts than so far may be tried.
    #[inline]
    pub(in crate::ratelimit) fn is_learning(&self) -> bool {
        !self.refuted
    }

    /// Counts a call that takes `time` of the limit.
    #[inline]
    pub(in crate::ratelimit) fn on_grant(&mut self, now: Nanos, time: Nanos, order: u64) {
        self.used = self.used_now(now).saturating_add(time);
        self.used_at = now;
        // By more than roundings, so that a reply can catch up with it.
        if self.used > self.peak.saturating_add(self.peak / 16) {
            (self.peak, self.peak_order) = (self.used, order);
        }
    }

    fn used_now(&self, now: Nanos) -> Nanos {
        self.used.saturating_sub(now.saturating_sub(self.used_at))
    }

    /// Learns from the headers of a reply. Returns by how much the level of the lane should rise, or fall.
    ///
    /// While the readings are not clear, only a limit that was never refused (`untouched`) is tried. The units of
    /// `reserve` are left to others.
    pub(super) fn on_headers(&mut self, reading: &Reading, untouched: bool, reserve: u64) -> i64 {
        self.trust = (self.trust * TRUST_REGAINED).min(1.0);
        if reading.order >= self.peak_order {
            self.proven = self.proven.max(self.peak);
        }
        self.has_headers |= reading.reset.is_some();
        if self.refuted {
            return 0;
        }
        let Some(read) = self.bucket.read(reading) else {
            return 0;
        };
        let first = reading.call.saturating_mul(FIRST_STEP);
        let grown = self.proven.saturating_mul(2).max(first);
        let time = |units: f64| reading.known.time_for(units.max(0.0) as u64);
        match read.shape {
            Shape::Window => {
                (self.step, self.stored) = (0, 0);
                // It is missing in the rest of the window.
                return -(std::mem::take(&mut self.undecided) as i64);
            }
            _ if !RATES.contains(&(reading.known.per_second() / read.rate)) => {
                (self.step, self.stored) = (0, 0);
                return 0;
            }
            Shape::Bucket { capacity } => {
                self.stored = time(capacity);
                self.undecided = 0;
                self.step = grown.min(self.stored.max(first));
            }
            Shape::Unclear => {}
        }
        let unclear = read.shape == Shape::Unclear;
        let then = self.level_then(reading);
        let Some(then) = then.filter(|_| untouched || !unclear) else {
            return 0;
        };
        // Others may use the same account, and read the same level.
        let kept = reading.known.time_for(reserve).max(reading.call);
        let short = time(read.left).saturating_sub(kept);
        let short = short.saturating_sub(then.max(reading.level));
        let short = if reserve > 0 {
            short / 2
        } else {
            short / 4 * 3
        };
        let in_use = self.used_now(reading.now).saturating_add(reading.level);
        // Until the readings are clear, no more than the burst that every limit has.
        let most = match unclear {
            true => grown.min(reading.burst.max(first)),
            false => self.step,
        };
        let raise = short.min(most.saturating_sub(in_use.max(self.undecided)));
        let raise = (raise as f64 * self.trust) as Nanos;
        if raise < reading.call {
            return 0;
        }
        if unclear {
            self.undecided += raise;
            self.step = reading.level.saturating_add(raise);
        }
        self.record_raise(reading.next_order, raise);
        raise as i64
    }

    /// The level of the lane when the call was granted, as if the last raise had been before; unknown for older calls.
    fn level_then(&self, reading: &Reading) -> Option<Nanos> {
        match reading.order {
            order if order >= self.last.order => Some(reading.level_then),
            order if order >= self.before => Some(reading.level_then.saturating_add(self.last.by)),
            _ => None,
        }
    }

    fn record_raise(&mut self, order: u64, by: Nanos) {
        if self.last.order < order {
            self.before = std::mem::replace(&mut self.last, Raise { order, by: 0 }).order;
        }
        self.last.by = self.last.by.saturating_add(by);
    }

    /// Learns from a reply without headers. Returns by how much the level of the lane should rise.
    pub(in crate::ratelimit) fn on_bare_reply(&mut self, reply: &BareReply) -> Nanos {
        if self.refuted || self.has_headers || reply.order < self.last.order {
            return 0;
        }
        let step = reply.call.saturating_mul(PROBE_STEP);
        let room = reply.burst.saturating_sub(self.used_now(reply.now));
        let most = step.min(room);
        if self.proven >= reply.burst || reply.level >= most {
            return 0;
        }
        self.record_raise(reply.next_order, most - reply.level);
        most - reply.level
    }

    /// Takes over from a limit that has changed whether its burst was refuted.
    pub(super) fn follow(&mut self, before: &Self) {
        self.refuted |= before.refuted;
        (self.last, self.before) = (before.last, before.last.order);
    }

    /// Returns whether the refusal was of a call that used a burst. It says nothing of the rate itself.
    pub(super) fn on_refusal(&mut self, refusal: &LimitRefusal) -> bool {
        // A burst of one call is the rate.
        let burst = self.peak > refusal.call.saturating_mul(FIRST_STEP) && !self.refuted;
        if !burst || self.last.order == 0 {
            return false;
        }
        if refusal.explained {
            // The level was used up by others, or is not what the headers said. The bucket is as large as before.
            self.trust = (self.trust / 2.0).max(LEAST_TRUST);
            return false;
        }
        self.refuted = true;
        (self.step, self.peak, self.proven) = (0, 0, 0);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BinaryHeap;
    use std::{cmp::Reverse, time::Duration};

    use proptest::prelude::*;

    use super::*;
    use crate::ratelimit::adaptive::{PolicySet, headers};
    use crate::ratelimit::bucket::Rate;
    use crate::ratelimit::limit::{Answered, Burst, Cost, Limit, Refused, Source};
    use crate::request::Quota;

    const SECOND: Nanos = 1_000_000_000;

    /// How a provider enforces a limit.
    #[derive(Debug, Clone, Copy)]
    enum Kind {
        /// A bucket that fills in this time.
        Bucket(Nanos),
        /// Windows of this length, the first of which began this long before the start.
        Windows(Nanos, Nanos),
    }

    /// A limit of the provider, as it keeps it.
    struct Provider {
        kind: Kind,
        per_minute: u64,
        level: f64,
        at: Nanos,
    }

    impl Provider {
        fn new(kind: Kind, per_minute: u64) -> Self {
            let mut provider = Self {
                kind,
                per_minute,
                level: 0.0,
                at: 0,
            };
            provider.level = provider.capacity();
            provider
        }

        fn capacity(&self) -> f64 {
            let (Kind::Bucket(time) | Kind::Windows(time, _)) = self.kind;
            (self.per_minute as f64 * time as f64 / 60e9).max(1.0)
        }

        fn level(&mut self, now: Nanos) -> f64 {
            match self.kind {
                Kind::Bucket(_) => {
                    let flown = (now - self.at) as f64 / 60e9 * self.per_minute as f64;
                    self.level = (self.level + flown).min(self.capacity());
                }
                Kind::Windows(length, phase) => {
                    if (now + phase) / length > (self.at + phase) / length {
                        self.level = self.capacity();
                    }
                }
            }
            self.at = now;
            self.level
        }

        fn says(&mut self, now: Nanos) -> Quota {
            let level = self.level(now);
            let reset = match self.kind {
                Kind::Bucket(_) => (self.capacity() - level) * 60.0 / self.per_minute as f64,
                Kind::Windows(length, phase) => (length - (now + phase) % length) as f64 / 1e9,
            };
            Quota {
                limit: Some(self.per_minute),
                remaining: Some(level.max(0.0) as u64),
                reset: Some(Duration::from_secs_f64(reset)),
            }
        }
    }

    fn at_once(upfront: u64) -> Cost {
        Cost {
            upfront,
            deferred: 0,
        }
    }

    /// The end of a call, when it was granted, its order, the level of the lane then, and the headers of that time.
    type InFlight = (Nanos, Nanos, u64, Nanos, u64, Duration);

    /// A lane with one limit, and the calls it has in flight at a provider.
    struct World {
        limit: Limit,
        provider: Provider,
        on_admission: bool,
        now: Nanos,
        next: u64,
        observed: Nanos,
        in_flight: BinaryHeap<Reverse<InFlight>>,
        refused: u64,
    }

    impl World {
        fn new(kind: Kind, per_minute: u64, on_admission: bool) -> Self {
            let burst = Burst {
                time: SECOND,
                full_at_start: false,
            };
            let rate = Rate::per_minute(per_minute);
            Self {
                limit: Limit::new(Source::Configured, rate, burst, 0, PolicySet::ALL),
                provider: Provider::new(kind, per_minute),
                on_admission,
                now: 0,
                next: 0,
                observed: 0,
                in_flight: BinaryHeap::new(),
                refused: 0,
            }
        }

        /// Passes the time until the first reply, or until `then`.
        fn step(&mut self, then: Nanos) {
            let end = self.in_flight.peek().map(|Reverse((end, ..))| *end);
            self.now = self.now.max(end.map_or(then, |end| end.min(then)));
            self.limit.advance(self.now, true);
            if end.is_none_or(|end| end > then) {
                return;
            }
            let Some(Reverse((_, at, order, filled, left, reset))) = self.in_flight.pop() else {
                return;
            };
            let then = Quota {
                limit: Some(self.provider.per_minute),
                remaining: Some(left),
                reset: Some(reset),
            };
            let quota = match self.on_admission {
                true => then,
                false => self.provider.says(self.now),
            };
            if at >= self.observed {
                self.observed = at;
                self.limit
                    .lower(self.now, quota.remaining.unwrap(), at, filled);
                let answered = Answered {
                    order,
                    next_order: self.next,
                    advertised: headers::per_minute(&quota),
                    filled,
                    refundable: 0,
                };
                self.limit.on_headers(self.now, &quota, &answered);
            }
        }

        /// Waits until the lane lets a call of `n` units through, and sends it. Returns what the provider had.
        fn call(&mut self, n: u64, latency: Nanos) -> f64 {
            loop {
                let ready = self.limit.ready_at(self.now, at_once(n)).unwrap();
                if ready <= self.now {
                    break;
                }
                self.step(ready);
            }
            // The lane's time counts whole nanoseconds.
            let level = self.provider.level(self.now) + 1e-3;
            if level >= n as f64 {
                self.provider.level -= n as f64;
            } else {
                self.refused += 1;
            }
            self.limit.take(self.now, at_once(n), self.next);
            self.limit.resize(self.now);
            let said = self.provider.says(self.now);
            let said = (said.remaining.unwrap(), said.reset.unwrap());
            let end = self.now + latency;
            let filled = self.limit.filled(self.now);
            self.in_flight
                .push(Reverse((end, self.now, self.next, filled, said.0, said.1)));
            self.next += 1;
            level
        }

        fn pass(&mut self, time: Nanos) {
            let then = self.now + time;
            while self.now < then {
                self.step(then);
            }
        }
    }

    #[test]
    fn a_minute_that_is_stored_is_used_in_doubling_steps() {
        let mut world = World::new(Kind::Bucket(60 * SECOND), 60, true);
        for _ in 0..13 {
            world.call(1, SECOND);
        }
        assert!(world.now <= 3 * SECOND, "{}", world.now);
        world.pass(60 * SECOND);
        let start = world.now;
        for _ in 0..13 {
            world.call(1, SECOND);
        }
        assert_eq!(world.now, start, "known by now");
        // Resets in whole seconds: one may be rounded up.
        assert_eq!(world.limit.stored_burst(), Some((59, 20)));
    }

    #[test]
    fn a_refusal_that_nothing_explains_refutes_the_burst() {
        let mut world = World::new(Kind::Bucket(60 * SECOND), 600, true);
        for _ in 0..50 {
            world.call(1, SECOND / 5);
        }
        assert!(world.limit.stored_burst().is_some());
        let refused = Refused {
            sent_at: world.now,
            units: 1,
            ..Refused::default()
        };
        assert!(world.limit.record_refusal(world.now, &refused));
        assert_eq!(world.limit.rate_factor(), 1.0, "it is no word on the rate");
        assert_eq!(world.limit.stored_burst(), None);
        for _ in 0..50 {
            world.call(1, SECOND / 5);
        }
        assert_eq!(world.limit.stored_burst(), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        /// A bucket that stores what its headers say refuses no call, whether they state the level at the admission of a
        /// call or at its end.
        #[test]
        fn a_stored_burst_that_is_used_is_never_refused(
            per_minute in 60..100_000u64,
            seconds in 1..90u64,
            on_admission: bool,
            calls in proptest::collection::vec((0..100u64, 1..2_000u64, 0..5_000u64), 1..400),
        ) {
            let mut world = World::new(Kind::Bucket(seconds * SECOND), per_minute, on_admission);
            for (gap, thousandths, latency) in calls {
                // Up to a second's worth in one call.
                let n = (per_minute * thousandths.min(1_000) / 60_000).max(1);
                world.pass(gap * 1_000_000);
                let level = world.call(n, latency * 1_000_000);
                prop_assert!(level >= n as f64, "{n} of {level}");
            }
        }

        /// Windows get no burst: the calls that were tried before they were recognised are left out again.
        #[test]
        fn a_window_is_not_taken_for_a_bucket(
            per_second in 1..2_000u64,
            length in 1..90u64,
            phase in 0..90_000u64,
            on_admission: bool,
            latencies in proptest::collection::vec(0..5_000u64, 400),
        ) {
            let kind = Kind::Windows(length * SECOND, phase * 1_000_000 % (length * SECOND));
            let mut world = World::new(kind, 60 * per_second, on_admission);
            for latency in latencies {
                world.call(1, latency * 1_000_000);
            }
            prop_assert!(world.limit.stored_burst().is_none());
            // Calls that are late by a part of a window meet the next one: with a few units a window that happens.
            prop_assert!(world.refused <= 4, "{} of 400", world.refused);
        }
    }
}
