//! [`Bucket`]: one rate limit as pure arithmetic, time as an argument.
//!
//! The Generic Cell Rate Algorithm (ITU-T Recommendation I.371, Traffic control and
//! congestion control in B-ISDN, Annex A; ATM Forum, Traffic Management Specification
//! Version 4.0) in its continuous-state leaky-bucket form. Everything is counted as
//! **time**: `n` units cost the time in which they flow in, and the state is one
//! duration, the time until the bucket is full again. That makes it exact in whole
//! nanoseconds, and makes a refund, a debt or a standstill an addition.
//!
//! Times are counted from any fixed instant of the caller's choice.

use std::time::Duration;

/// A time in nanoseconds. `Duration` keeps seconds and nanoseconds apart, and its arithmetic
/// took half of the time of a grant.
pub(super) type Nanos = u64;

/// Converts a duration; 584 years are as good as for ever.
pub(super) fn nanos(time: Duration) -> Nanos {
    saturating(time.as_nanos())
}

fn saturating(nanos: u128) -> Nanos {
    Nanos::try_from(nanos).unwrap_or(Nanos::MAX)
}

const MINUTE: u128 = 60_000_000_000;

fn per_minute(units: u64, period: Nanos) -> u64 {
    let minute = u128::from(units) * MINUTE / u128::from(period);
    u64::try_from(minute).unwrap_or(u64::MAX).max(1)
}

/// How fast a bucket fills: `units` in every `period`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rate {
    units: u64,
    period: Nanos,
    /// The time of one unit: what every call asks for of the limit on requests.
    one: Nanos,
    /// The units that flow in within a minute, one at least.
    minute: u64,
}

impl Rate {
    /// `units` in every minute. The caller has checked that `units` is not zero.
    pub(super) fn per_minute(units: u64) -> Self {
        Self::new(units, Duration::from_secs(60))
    }

    /// One unit in every `period`. The caller has checked that `period` is not zero.
    pub(super) fn every(period: Duration) -> Self {
        Self::new(1, period)
    }

    fn new(units: u64, period: Duration) -> Self {
        debug_assert!(units > 0 && !period.is_zero());
        let period = nanos(period);
        Self {
            units,
            period,
            one: period.div_ceil(units),
            minute: per_minute(units, period),
        }
    }

    /// The time in which `n` units flow in, rounded up once for all of them.
    #[inline]
    pub(super) fn time_for(self, n: u64) -> Nanos {
        if n <= 1 {
            return n * self.one;
        }
        match n.checked_mul(self.period) {
            Some(product) => product.div_ceil(self.units),
            None => {
                let product = u128::from(n) * u128::from(self.period);
                saturating(product.div_ceil(self.units.into()))
            }
        }
    }

    /// The most that one call is charged: a minute's worth.
    ///
    /// No provider lets more than that through in one call, so a larger number is a request that
    /// will be refused or a usage that cannot be true, and must not keep the lane waiting for hours.
    #[inline]
    pub(super) fn minute(self) -> u64 {
        self.minute
    }

    pub(super) fn per_second(self) -> f64 {
        1e9 / self.nanos_per_unit()
    }

    fn nanos_per_unit(self) -> f64 {
        self.period as f64 / self.units as f64
    }
}

/// One limit's bucket. It starts full.
#[derive(Debug, Clone)]
pub(super) struct Bucket {
    rate: Rate,
    /// The capacity, as the time in which the bucket fills.
    capacity: Nanos,
    /// The time until it is full, as of `at`. Above `capacity` the bucket owes.
    deficit: Nanos,
    /// When `deficit` was true.
    at: Nanos,
}

impl Bucket {
    /// A full bucket that holds `burst` of its rate, and one unit at least.
    pub(super) fn new(rate: Rate, burst: Nanos, now: Nanos) -> Self {
        Self {
            rate,
            capacity: burst.max(rate.time_for(1)),
            deficit: 0,
            at: now,
        }
    }

    #[inline]
    pub(super) fn rate(&self) -> Rate {
        self.rate
    }

    /// Returns when `n` units can be taken if no other call takes any before: `now`, or later.
    ///
    /// More than the bucket ever holds waits until it is full. Zero units wait
    /// while the bucket owes, because a debt is paid by waiting.
    #[inline]
    pub(super) fn ready_at(&self, now: Nanos, n: u64) -> Nanos {
        let spare = self.capacity.saturating_sub(self.rate.time_for(n));
        now.saturating_add(self.deficit_at(now).saturating_sub(spare))
    }

    /// Returns when the level and the refill of `lead` together cover `time`; `None` if they never do.
    pub(super) fn covers_at(&self, now: Nanos, time: Nanos, lead: Nanos) -> Option<Nanos> {
        let spare = self.capacity.saturating_add(lead).checked_sub(time)?;
        Some(now.saturating_add(self.deficit_at(now).saturating_sub(spare)))
    }

    /// As [`ready_at`](Bucket::ready_at), if `before` units were taken now.
    pub(super) fn ready_after(&self, now: Nanos, before: u64, n: u64) -> Nanos {
        let mut bucket = self.clone();
        bucket.take(now, before);
        bucket.ready_at(now, n)
    }

    /// The level, as the time in which it flowed in.
    #[inline]
    pub(super) fn filled(&self, now: Nanos) -> Nanos {
        self.capacity.saturating_sub(self.deficit_at(now))
    }

    /// The whole units that flow in so much time.
    pub(super) fn units(&self, time: Nanos) -> u64 {
        (time as f64 / self.rate.nanos_per_unit()) as u64
    }

    /// The time until the debt is paid.
    pub(super) fn debt(&self, now: Nanos) -> Nanos {
        self.deficit_at(now).saturating_sub(self.capacity)
    }

    /// How full it is, from 1.0 down to 0.0 and below that in debt.
    pub(super) fn fullness(&self, now: Nanos) -> f64 {
        1.0 - self.deficit_at(now) as f64 / self.capacity as f64
    }

    /// Takes `n` units, whether they are there or not.
    #[inline]
    pub(super) fn take(&mut self, now: Nanos, n: u64) {
        self.debit(now, self.rate.time_for(n));
    }

    /// Gives back the units that [`take`](Bucket::take) took at `taken_at`, for a call that was never sent.
    ///
    /// Only units that have not flowed in again since come back: the bucket may have been full in the meantime, and
    /// a larger refund would put more into a window than the limit allows. An immediate refund is a full one.
    pub(super) fn refund(&mut self, now: Nanos, n: u64, taken_at: Nanos) {
        let refilled = now.saturating_sub(taken_at);
        self.credit(now, self.rate.time_for(n).saturating_sub(refilled));
    }

    /// Replaces a charge of `charged` units by one of `actual`, as the provider does
    /// when a reply is complete. Too small a charge becomes a debt.
    #[inline]
    pub(super) fn settle(&mut self, now: Nanos, charged: u64, actual: u64) {
        if charged == actual {
            return;
        }
        let (charged, actual) = (self.rate.time_for(charged), self.rate.time_for(actual));
        if actual > charged {
            self.debit(now, actual - charged);
        } else {
            self.credit(now, charged - actual);
        }
    }

    /// Raises the level by a time of the rate, or lowers it if that is negative.
    pub(super) fn shift(&mut self, now: Nanos, time: i64) {
        match time {
            0.. => self.credit(now, time.unsigned_abs()),
            _ => self.debit(now, time.unsigned_abs()),
        }
    }

    /// Lowers the level to `n` units, if there are more. A debt stays.
    pub(super) fn lower_to(&mut self, now: Nanos, n: u64) {
        self.flow(now);
        let deficit = self.capacity.saturating_sub(self.rate.time_for(n));
        self.deficit = self.deficit.max(deficit);
    }

    /// Changes rate and burst. The level stays in units, so far as the bucket holds it;
    /// so does a debt.
    pub(super) fn retune(&mut self, now: Nanos, rate: Rate, burst: Nanos) {
        self.flow(now);
        let capacity = burst.max(rate.time_for(1));
        if rate != self.rate || capacity != self.capacity {
            let stretch = rate.nanos_per_unit() / self.rate.nanos_per_unit();
            let scaled = |time: Nanos| (time as f64 * stretch) as Nanos;
            let level = scaled(self.capacity.saturating_sub(self.deficit));
            let debt = scaled(self.deficit.saturating_sub(self.capacity));
            self.deficit = capacity.saturating_sub(level).saturating_add(debt);
            (self.rate, self.capacity) = (rate, capacity);
        }
    }

    /// Changes the burst alone. The level stays, so far as the bucket holds it, and so does
    /// a debt.
    pub(super) fn resize(&mut self, now: Nanos, burst: Nanos) {
        let capacity = burst.max(self.rate.time_for(1));
        if capacity != self.capacity {
            self.flow(now);
            let level = self.capacity.saturating_sub(self.deficit);
            let debt = self.deficit.saturating_sub(self.capacity);
            self.deficit = capacity.saturating_sub(level).saturating_add(debt);
            self.capacity = capacity;
        }
    }

    #[inline]
    fn deficit_at(&self, now: Nanos) -> Nanos {
        self.deficit.saturating_sub(now.saturating_sub(self.at))
    }

    #[inline]
    fn flow(&mut self, now: Nanos) {
        self.deficit = self.deficit_at(now);
        self.at = self.at.max(now);
    }

    #[inline]
    fn debit(&mut self, now: Nanos, time: Nanos) {
        self.flow(now);
        self.deficit = self.deficit.saturating_add(time);
    }

    #[inline]
    fn credit(&mut self, now: Nanos, time: Nanos) {
        self.flow(now);
        self.deficit = self.deficit.saturating_sub(time);
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use governor::clock::FakeRelativeClock;
    use governor::{Quota, RateLimiter};
    use proptest::prelude::*;

    use super::*;

    const SECOND: Nanos = 1_000_000_000;

    fn ms(ms: u64) -> Nanos {
        ms * 1_000_000
    }

    /// 10 units a second, 10 of burst.
    fn bucket() -> Bucket {
        Bucket::new(Rate::per_minute(600), SECOND, 0)
    }

    fn try_take(bucket: &mut Bucket, now: Nanos, n: u64) -> bool {
        let ready = bucket.ready_at(now, n) <= now;
        if ready {
            bucket.take(now, n);
        }
        ready
    }

    #[test]
    fn cost_is_rounded_up_once_for_all_units() {
        let rate = Rate::per_minute(7);
        assert_eq!(rate.time_for(7), 60 * SECOND);
        assert_eq!(rate.time_for(1), 8_571_428_572);
        assert_eq!(rate.time_for(u64::MAX), Nanos::MAX, "it saturates");
        let fast = Rate::per_minute(u64::MAX);
        assert_eq!(fast.time_for(u64::MAX), 60 * SECOND);
    }

    #[test]
    fn it_starts_full_and_fills_at_its_rate() {
        let mut bucket = bucket();
        bucket.take(ms(0), 10);
        assert_eq!(bucket.ready_at(ms(0), 1), ms(100));
        assert_eq!(bucket.ready_at(ms(0), 10), ms(1_000));
        assert_eq!(bucket.ready_at(ms(999), 10), ms(1_000));
    }

    #[test]
    fn it_holds_one_unit_at_least() {
        let mut bucket = Bucket::new(Rate::per_minute(3), SECOND, ms(0));
        assert!(try_take(&mut bucket, ms(0), 1));
        assert_eq!(bucket.ready_at(ms(0), 1), ms(20_000));
    }

    #[test]
    fn more_than_it_holds_waits_for_a_full_bucket_and_owes_the_rest() {
        let mut bucket = bucket();
        bucket.take(ms(0), 1);
        assert_eq!(bucket.ready_at(ms(0), 25), ms(100));
        bucket.take(ms(100), 25);
        assert_eq!(bucket.ready_at(ms(100), 1), ms(100 + 1_600));
        assert_eq!(
            bucket.ready_at(ms(100), 0),
            ms(100 + 1_500),
            "a debt holds even those who take nothing"
        );
    }

    #[test]
    fn a_refund_at_once_is_full_and_a_late_one_only_what_has_not_flowed_in() {
        let mut at_once = bucket();
        at_once.take(ms(0), 10);
        at_once.refund(ms(0), 10, ms(0));
        assert!(try_take(&mut at_once, ms(0), 10));

        // Had the ten never been taken, the bucket would have been full at 800 ms,
        // and after these three it would hold seven.
        let mut late = bucket();
        late.take(ms(0), 10);
        late.take(ms(800), 3);
        late.refund(ms(800), 10, ms(0));
        assert!(try_take(&mut late, ms(800), 7));
        assert!(!try_take(&mut late, ms(800), 1));
    }

    #[test]
    fn settling_refunds_up_to_full_and_debits_into_debt() {
        let mut bucket = bucket();
        bucket.take(ms(0), 10);
        bucket.settle(ms(0), 10, 4);
        assert_eq!(bucket.ready_at(ms(0), 6), ms(0));
        bucket.settle(ms(0), 0, 16);
        assert_eq!(bucket.ready_at(ms(0), 1), ms(1_100));
        bucket.settle(ms(0), 1_000, 0);
        bucket.take(ms(0), 10);
        assert_eq!(bucket.ready_at(ms(0), 1), ms(100));
    }

    #[test]
    fn lowering_takes_what_is_above_and_forgives_no_debt() {
        let mut bucket = bucket();
        bucket.lower_to(ms(0), 4);
        assert_eq!(bucket.ready_at(ms(0), 4), ms(0));
        assert_eq!(bucket.ready_at(ms(0), 5), ms(100));
        bucket.lower_to(ms(0), 9);
        assert_eq!(bucket.ready_at(ms(0), 5), ms(100), "never raised");
        bucket.take(ms(0), 14);
        bucket.lower_to(ms(0), 0);
        assert_eq!(bucket.ready_at(ms(0), 0), ms(1_000), "ten are owed");
    }

    #[test]
    fn retuned_it_keeps_its_level_in_units() {
        let faster = Rate::per_minute(6_000);
        let mut half_full = bucket();
        half_full.take(ms(0), 5);
        half_full.retune(ms(0), faster, SECOND);
        assert_eq!(half_full.ready_at(ms(0), 5), ms(0));
        assert_eq!(half_full.ready_at(ms(0), 6), ms(10));

        let mut in_debt = bucket();
        in_debt.take(ms(0), 15);
        in_debt.retune(ms(0), faster, SECOND);
        assert_eq!(in_debt.ready_at(ms(0), 0), ms(50));

        let mut full = bucket();
        full.retune(ms(0), Rate::per_minute(60), SECOND);
        assert!(try_take(&mut full, ms(0), 1));
        assert_eq!(
            full.ready_at(ms(0), 1),
            ms(1_000),
            "it holds what it can hold"
        );
    }

    #[test]
    fn resized_it_keeps_its_level_and_its_debt() {
        let mut half_full = bucket();
        half_full.take(ms(0), 5);
        half_full.resize(ms(0), SECOND * 4 / 5);
        assert_eq!(half_full.ready_at(ms(0), 5), ms(0));
        assert_eq!(half_full.ready_at(ms(0), 8), ms(300));
        assert_eq!(half_full.ready_at(ms(0), 100), ms(300), "that is full");
        half_full.resize(ms(0), SECOND * 2 / 5);
        assert_eq!(half_full.ready_at(ms(0), 10), ms(0), "what it can hold");
        half_full.resize(ms(0), SECOND);
        assert_eq!(half_full.ready_at(ms(0), 5), ms(100));

        let mut in_debt = bucket();
        in_debt.take(ms(0), 15);
        in_debt.resize(ms(0), SECOND / 2);
        assert_eq!(in_debt.ready_at(ms(0), 0), ms(500));
        in_debt.resize(ms(0), SECOND);
        assert_eq!(in_debt.ready_at(ms(0), 0), ms(500));
    }

    /// A plain token bucket: a level in units, in floating point.
    struct Plain {
        per_second: f64,
        capacity: f64,
        level: f64,
        at: Nanos,
    }

    impl Plain {
        fn spare(&mut self, now: Nanos, n: u64) -> f64 {
            let elapsed = (now - self.at) as f64 / 1e9;
            self.level = (self.level + elapsed * self.per_second).min(self.capacity);
            self.at = now;
            self.level - (n as f64).min(self.capacity)
        }
    }

    /// Steps of (advance, n): many close to nothing, some long.
    fn steps(largest: u64) -> impl Strategy<Value = Vec<(Nanos, u64)>> {
        let advance = prop_oneof![Just(0), 0..5_000_000u64, (0..3_000u64).prop_map(ms),];
        proptest::collection::vec((advance, 1..=largest), 1..200)
    }

    proptest! {
        #[test]
        fn it_decides_as_governor_does(
            period in 1..2_000_000_000u64,
            (burst, steps) in (1..50u32).prop_flat_map(|b| (Just(b), steps(b.into()))),
        ) {
            let clock = FakeRelativeClock::default();
            let quota = Quota::with_period(Duration::from_nanos(period))
                .unwrap()
                .allow_burst(NonZeroU32::new(burst).unwrap());
            let governor = RateLimiter::direct_with_clock(quota, clock.clone());
            let mut ours = Bucket::new(
                Rate::every(Duration::from_nanos(period)),
                period * u64::from(burst),
                0,
            );
            let mut now = 0;
            for (advance, n) in steps {
                clock.advance(Duration::from_nanos(advance));
                now += advance;
                let cells = NonZeroU32::new(u32::try_from(n).unwrap()).unwrap();
                let theirs = governor.check_n(cells).unwrap().is_ok();
                prop_assert_eq!(try_take(&mut ours, now, n), theirs);
            }
        }

        #[test]
        fn it_decides_as_a_plain_token_bucket_does(
            limit in 1..10_000_000u64,
            burst in 0..5_000u64,
            steps in steps(2_000),
        ) {
            let rate = Rate::per_minute(limit);
            let mut ours = Bucket::new(rate, ms(burst), 0);
            let capacity = (limit as f64 * burst as f64 / 60_000.0).max(1.0);
            let mut plain = Plain {
                per_second: limit as f64 / 60.0,
                capacity,
                level: capacity,
                at: 0,
            };
            let mut now = 0;
            for (advance, n) in steps {
                now += advance;
                let spare = plain.spare(now, n);
                let taken = try_take(&mut ours, now, n);
                // Within rounding either answer is right: follow ours.
                if spare.abs() > 1e-3 {
                    prop_assert_eq!(taken, spare > 0.0, "spare {}", spare);
                }
                if taken {
                    plain.level -= n as f64;
                }
            }
        }

        #[test]
        fn no_window_holds_more_than_burst_and_rate_allow(
            limit in 1..100_000u64,
            burst in 0..3_000u64,
            steps in steps(200),
            kept in proptest::collection::vec(any::<bool>(), 200),
            held in 0..2_000u64,
        ) {
            let rate = Rate::per_minute(limit);
            let mut bucket = Bucket::new(rate, ms(burst), 0);
            let mut now = 0;
            let mut grants = Vec::new();
            let mut refunds: Vec<(Nanos, u64, Nanos)> = Vec::new();
            for ((advance, n), kept) in steps.into_iter().zip(kept) {
                now += advance;
                refunds.retain(|&(due, n, taken_at)| {
                    if due <= now {
                        bucket.refund(now, n, taken_at);
                    }
                    due > now
                });
                if try_take(&mut bucket, now, n) {
                    if kept {
                        grants.push((now, rate.time_for(n)));
                    } else {
                        refunds.push((now + ms(held), n, now));
                    }
                }
            }
            for first in 0..grants.len() {
                let mut sum = 0;
                for &(end, cost) in &grants[first..] {
                    sum += cost;
                    let window = end - grants[first].0;
                    // One larger than the bucket goes through a full bucket.
                    let most = bucket.capacity.max(cost);
                    prop_assert!(sum <= most + window, "{sum} in {window}");
                }
            }
        }
    }
}
