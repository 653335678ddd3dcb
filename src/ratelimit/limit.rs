//! [`Limit`]: one rate limit, with its clock and its policies.
//!
//! A bucket takes the time as an argument, so a change of the rate scales the clock of the bucket: the clock
//! runs at the factor of the [policies](LimitPolicies), and stands still during a cooldown. The burst shrinks and grows with
//! the factor: it is a time of the lane, not of the slower clock, because a bucket larger than the provider's
//! forgets debts that the provider remembers.

use super::adaptive::burst::BareReply;
use super::adaptive::contention::OwnUse;
use super::adaptive::deferred::DeferredCharges;
use super::adaptive::{LimitPolicies, LimitRefusal, PolicySet, Reading};
use super::bucket::{Bucket, Nanos, Rate, nanos};
use crate::usage::Quota;

/// Fewer calls than this between two refusals say nothing of the throughput.
const MIN_CALLS: u64 = 4;

/// Where a limit is known from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// The [`Pace`](super::Pace).
    Configured,
    /// The headers of a reply.
    Advertised,
    /// A refusal, and the throughput before it.
    Estimated,
}

/// The burst of a limit, and whether it is available from the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Burst {
    pub(super) time: Nanos,
    /// Otherwise the limit starts with room for one call of any size: the use before the lane was made is
    /// unknown.
    pub(super) full_at_start: bool,
}

/// The units that one call takes of a limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Cost {
    /// The units that are charged when the call is admitted.
    pub(super) upfront: u64,
    /// The units that are charged when it ends, as estimated.
    pub(super) deferred: u64,
}

impl Cost {
    /// Returns the same cost, cut to `most` units.
    #[inline]
    pub(super) fn capped(self, most: u64) -> Self {
        let upfront = self.upfront.min(most);
        Self {
            upfront,
            deferred: self.deferred.min(most - upfront),
        }
    }

    /// The units that must be available: one for a call that is charged only when it ends.
    fn least(self) -> u64 {
        self.upfront.max(u64::from(self.deferred > 0))
    }
}

/// A call whose reply has headers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Answered {
    /// The number of grants before it, and before the next one.
    pub(super) order: u64,
    pub(super) next_order: u64,
    /// The rate that the headers tell.
    pub(super) advertised: Option<Rate>,
    /// The level that it left here when it was granted.
    pub(super) filled: Nanos,
    /// The units that it may get back when it ends.
    pub(super) refundable: u64,
}

/// A call that was refused.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Refused {
    pub(super) sent_at: Nanos,
    /// The units that it would have been charged at its admission.
    pub(super) units: u64,
    /// Whether the headers of the refusal say that the limit is used up, and the rate that they tell.
    pub(super) explained: bool,
    pub(super) advertised: Option<Rate>,
}

/// The units and calls taken until the last reduction.
#[derive(Debug, Clone, Copy, Default)]
struct Checkpoint {
    units: u64,
    calls: u64,
    /// The debt at that time.
    debt: Nanos,
}

#[derive(Debug, Clone)]
pub(super) struct Limit {
    source: Source,
    /// As the provider counts: reserved units are not in it.
    bucket: Bucket,
    /// The capacity of the bucket at factor 1, in the time of the lane.
    burst: Nanos,
    /// The time of the bucket at `at`, which is the time of the lane.
    clock: Nanos,
    /// In the future while the clock stands still.
    at: Nanos,
    /// Calls that were granted earlier were not taken from this limit.
    born: Nanos,
    /// Nothing was taken yet: the first call may go and leave a debt.
    unused: bool,
    /// Units and calls taken so far, and the most that one call took or is estimated to take.
    taken: u64,
    calls: u64,
    largest: u64,
    /// At the last reduction, and the time since in which callers waited for more.
    checkpoint: Checkpoint,
    wanted: Nanos,
    /// When headers last lowered the level: headers of earlier calls are contained in that.
    lowered_at: Nanos,
    deferred: DeferredCharges,
    policies: LimitPolicies,
}

impl Limit {
    pub(super) fn new(
        source: Source,
        rate: Rate,
        burst: Burst,
        now: Nanos,
        enabled: PolicySet,
    ) -> Self {
        let mut bucket = Bucket::new(rate, burst.time, now);
        if !burst.full_at_start {
            bucket.lower_to(now, 1);
        }
        Self {
            source,
            bucket,
            burst: burst.time,
            clock: now,
            at: now,
            born: now,
            unused: !burst.full_at_start,
            taken: 0,
            calls: 0,
            largest: 0,
            checkpoint: Checkpoint::default(),
            wanted: 0,
            lowered_at: 0,
            deferred: DeferredCharges::default(),
            policies: LimitPolicies::new(enabled, source == Source::Estimated, burst.full_at_start),
        }
    }

    pub(super) fn source(&self) -> Source {
        self.source
    }

    #[inline]
    pub(super) fn rate(&self) -> Rate {
        self.bucket.rate()
    }

    /// The factor by which the policies multiply the rate now.
    #[inline]
    pub(super) fn rate_factor(&self) -> f64 {
        self.policies.factor()
    }

    /// Returns the units of `units` that one call is charged.
    #[inline]
    pub(super) fn most(&self, units: u64) -> u64 {
        units.min(self.rate().minute())
    }

    /// Returns the part of `cost` that one call is charged.
    #[inline]
    pub(super) fn capped(&self, cost: Cost) -> Cost {
        cost.capped(self.rate().minute())
    }

    /// The level, as the time in which it flowed in.
    #[inline]
    pub(super) fn filled(&self, now: Nanos) -> Nanos {
        self.bucket.filled(self.clock_at(now))
    }

    /// Whether a call that was granted at `granted_at` was taken from this limit.
    pub(super) fn existed_at(&self, granted_at: Nanos) -> bool {
        self.born <= granted_at
    }

    /// Passes the time until `now`, in which callers waited for more of the limit if it was `wanted`.
    #[inline]
    pub(super) fn advance(&mut self, now: Nanos, wanted: bool) {
        let Some(passed) = now.checked_sub(self.at).filter(|time| *time > 0) else {
            return;
        };
        self.clock = self.clock_at(now);
        self.at = now;
        if wanted {
            self.wanted = self.wanted.saturating_add(passed);
            self.policies.on_time(passed);
        }
    }

    /// Returns when `cost` can be taken if no other call takes any before: `now`, or later; `None` if
    /// that depends on a call in flight.
    ///
    /// Where answers are charged when they end, as many calls may be in flight as are expected to cost what
    /// flows in by the time they end.
    #[inline]
    pub(super) fn ready_at(&self, now: Nanos, cost: Cost) -> Option<Nanos> {
        let now = now.max(self.at);
        if self.unused {
            return Some(now);
        }
        let clock = self.clock_at(now);
        let mut ready_at = self.bucket.ready_at(clock, cost.least());
        if cost.deferred > 0
            && let Some(expected) = self.deferred.expected_with(cost.deferred)
        {
            let expected = self.rate().time_for(expected.saturating_add(cost.upfront));
            let lead = (self.deferred.mean_latency() as f64 * self.rate_factor()) as Nanos;
            ready_at = ready_at.max(self.bucket.covers_at(clock, expected, lead)?);
        }
        Some(now.saturating_add(self.slowed(ready_at - clock)))
    }

    /// Returns when `n` units can be taken, if `before` units were taken now.
    pub(super) fn ready_after(&self, now: Nanos, before: u64, n: u64) -> Nanos {
        let clock = self.clock_at(now);
        now.saturating_add(self.slowed(self.bucket.ready_after(clock, before, n) - clock))
    }

    pub(super) fn fullness(&self, now: Nanos) -> f64 {
        self.bucket.fullness(self.clock_at(now))
    }

    /// Expects a call of this `cost`, which has to wait.
    pub(super) fn expect(&mut self, cost: Cost) {
        let cost = self.capped(cost);
        self.largest = self.largest.max(cost.upfront.saturating_add(cost.deferred));
    }

    /// Takes the part of `cost` that one call is charged, the one of that `order`.
    #[inline]
    pub(super) fn take(&mut self, now: Nanos, cost: Cost, order: u64) {
        let is_deferred = cost.deferred > 0;
        let cost = self.capped(cost);
        self.unused = false;
        self.taken = self.taken.saturating_add(cost.upfront);
        self.calls += 1;
        self.bucket.take(self.clock_at(now), cost.upfront);
        if is_deferred {
            self.deferred.add(cost.deferred);
        }
        self.largest = self.largest.max(cost.upfront.saturating_add(cost.deferred));
        let stored_burst = self.policies.stored_burst_mut();
        if stored_burst.is_learning() {
            let time = self.bucket.rate().time_for(cost.upfront);
            stored_burst.on_grant(now, time, order);
        }
    }

    /// Takes a cost back, for a call that was never sent. The refill since is counted at the full rate, so that the refund
    /// is never too large.
    pub(super) fn refund(&mut self, now: Nanos, cost: Cost, taken_at: Nanos) {
        let is_deferred = cost.deferred > 0;
        let cost = self.capped(cost);
        if is_deferred {
            self.deferred.remove(cost.deferred);
        }
        let clock = self.clock_at(now);
        let passed = now.saturating_sub(taken_at) as f64 * self.rate_factor().max(1.0);
        let taken_at = clock.saturating_sub(passed as Nanos);
        self.bucket.refund(clock, cost.upfront, taken_at);
        self.keep_empty_while_it_stands_still(now);
    }

    /// Replaces the cost of a call by the `actual` units that it was charged in all.
    #[inline]
    pub(super) fn settle(&mut self, now: Nanos, cost: Cost, actual: u64) {
        // Not by the capped cost: the rate, and the cap with it, may have changed since the call was granted.
        let is_deferred = cost.deferred > 0;
        let cost = self.capped(cost);
        self.bucket.settle(self.clock_at(now), cost.upfront, actual);
        if is_deferred {
            self.deferred.remove(cost.deferred);
            self.taken = self
                .taken
                .saturating_sub(cost.upfront)
                .saturating_add(actual);
        }
        self.keep_empty_while_it_stands_still(now);
    }

    /// Records the charge and the latency of an answer that was charged when it ended.
    pub(super) fn record_answer(&mut self, now: Nanos, cost: Cost, actual: u64, taken_at: Nanos) {
        if cost.deferred > 0 {
            let answer = actual.saturating_sub(cost.upfront);
            self.deferred
                .record(cost.deferred, answer, now.saturating_sub(taken_at));
        }
    }

    /// Lowers the level to the `left` units of the headers of a call that was granted at `granted_at` and left the level
    /// `filled` here.
    ///
    /// The headers do not say whether `left` was true when the call was admitted or when it was answered. In the first case
    /// the calls sent since have been taken here too, in the second the provider knows of them as well. So the
    /// level is lowered by its excess in either case, and never raised.
    pub(super) fn lower(&mut self, now: Nanos, left: u64, granted_at: Nanos, filled: Nanos) {
        if granted_at < self.lowered_at {
            return;
        }
        let here = self.bucket.units(self.filled(now));
        let excess = self.bucket.units(filled).min(here).saturating_sub(left);
        if excess > 0 {
            self.bucket.lower_to(self.clock_at(now), here - excess);
            self.lowered_at = now;
        }
    }

    /// Applies the headers of the reply to a call. Returns the units that the provider stores, if that is news.
    pub(super) fn on_headers(&mut self, now: Nanos, quota: &Quota, call: &Answered) -> Option<u64> {
        let left = quota.remaining?;
        let known = self.stored_burst().is_some();
        // The time so far passed at the factor so far.
        self.advance(now, false);
        // The provider may have given back already what the lane will only when the call ends.
        let refundable = self.rate().time_for(self.most(call.refundable));
        let reading = Reading {
            now,
            order: call.order,
            next_order: call.next_order,
            left,
            reset: quota.reset.map(nanos),
            limit: call.advertised,
            known: self.rate(),
            level_then: call.filled.saturating_add(refundable),
            level: self.filled(now).saturating_add(refundable),
            call: self.average_call(),
            burst: self.burst,
            own: OwnUse {
                taken: self.taken,
                largest: self.largest,
                pace: self.rate().per_second() * self.rate_factor(),
            },
        };
        let raise = self.policies.on_headers(&reading);
        self.resize(now);
        self.raise(now, raise);
        let (stored, _) = self.stored_burst().filter(|_| !known)?;
        (self.rate().time_for(stored) > self.burst).then_some(stored)
    }

    /// Learns from a reply without headers to the call of that `order`.
    pub(super) fn on_bare_reply(&mut self, now: Nanos, order: u64, next_order: u64) {
        if self.source != Source::Configured {
            return;
        }
        let reply = BareReply {
            order,
            next_order,
            now,
            level: self.filled(now),
            burst: self.burst,
            call: self.average_call(),
        };
        let raise = self.policies.stored_burst_mut().on_bare_reply(&reply);
        self.raise(now, raise as i64);
    }

    /// Raises the level by a time of the rate, or lowers it. Not while it stands still.
    fn raise(&mut self, now: Nanos, time: i64) {
        if now >= self.at && time != 0 {
            let clock = self.clock_at(now);
            self.bucket.shift(clock, time);
        }
    }

    /// The time of the rate that an average call takes.
    fn average_call(&self) -> Nanos {
        let average = self.taken.div_ceil(self.calls.max(1));
        self.rate().time_for(average.max(1))
    }

    /// The units that the provider is seen to store, and those that are used at once.
    pub(super) fn stored_burst(&self) -> Option<(u64, u64)> {
        let stored = self.bucket.units(self.policies.stored_burst().stored()?);
        Some((stored, self.bucket.units(self.capacity()).min(stored)))
    }

    /// Empties the limit and lets it stand still until `until`; a debt stays. It is
    /// still empty then, whatever is credited before.
    pub(super) fn stand_still_until(&mut self, now: Nanos, until: Nanos) {
        self.unused = false;
        self.clock = self.clock_at(now);
        self.at = self.at.max(now).max(until);
        self.bucket.lower_to(self.clock, 0);
        if self.source == Source::Estimated {
            // The first call need not wait for a rate that is only an estimate.
            self.bucket.settle(self.clock, 1, 0);
        }
    }

    /// Refills from now on, where it would stand still until later. It is still empty.
    pub(super) fn resume(&mut self, now: Nanos) {
        self.at = self.at.min(now);
    }

    /// Records that a call was refused for this limit, and that its units were given back. Returns whether the limit is now used
    /// more slowly.
    pub(super) fn record_refusal(&mut self, now: Nanos, refused: &Refused) -> bool {
        // The time so far passed at the factor so far.
        self.advance(now, false);
        let rate = self.rate();
        let part = |advertised: Rate| advertised.per_second() / rate.per_second();
        let average = self.taken / self.calls.max(1);
        let debt = self.bucket.debt(self.clock_at(now));
        let reduced = self.policies.on_refusal(&LimitRefusal {
            now,
            sent_at: refused.sent_at,
            explained: refused.explained,
            tried: self.rate_factor(),
            passed: self.passed(refused.units, debt),
            advertised: refused.advertised.map(part),
            call: rate.time_for(average),
        });
        if reduced {
            self.checkpoint = Checkpoint {
                units: self.taken,
                calls: self.calls,
                debt,
            };
            self.wanted = 0;
            self.resize(now);
        }
        reduced
    }

    /// The part of the limit that was let through since the last reduction, without the refused units and without the
    /// debt, and with the debt of that time, which has been paid since.
    fn passed(&self, refused: u64, debt: Nanos) -> Option<f64> {
        let before = self.checkpoint;
        let units = self.taken.saturating_sub(before.units);
        let time = self.rate().time_for(units.saturating_sub(refused));
        let time = time.saturating_add(before.debt).saturating_sub(debt);
        let passed = time as f64 / self.wanted as f64;
        (self.calls - before.calls >= MIN_CALLS && passed.is_finite()).then_some(passed)
    }

    /// Takes back the reductions since `factor` was in use: they did not help.
    pub(super) fn restore(&mut self, now: Nanos, factor: f64) {
        // The time so far passed at the factor so far.
        self.advance(now, false);
        self.policies.restore(factor);
    }

    /// Changes the limit. If its rate or its source changes, all that was learned of it is forgotten.
    pub(super) fn retune(&mut self, now: Nanos, source: Source, rate: Rate, burst: Burst) {
        let clock = self.clock_at(now);
        if source != self.source || rate != self.rate() {
            // A level at the old rate says nothing of the new one.
            self.lowered_at = now;
            self.policies
                .reset(source == Source::Estimated, burst.full_at_start);
            self.source = source;
        }
        (self.clock, self.at, self.burst) = (clock, self.at.max(now), burst.time);
        self.bucket.retune(clock, rate, self.capacity());
    }

    /// Adapts the capacity of the bucket to what was learned. Not while a caller waits until the bucket is full: that would
    /// never come nearer.
    #[inline]
    pub(super) fn resize(&mut self, now: Nanos) {
        let clock = self.clock_at(now);
        self.bucket.resize(clock, self.capacity());
    }

    /// The burst at the factor, or as much of what the provider is seen to store as may be used at once. A call that is
    /// larger than the burst needs as much as it takes, or a full bucket.
    #[inline]
    fn capacity(&self) -> Nanos {
        let burst = self.scaled(self.burst);
        let stored_burst = self.policies.stored_burst();
        match (stored_burst.in_use(), stored_burst.stored()) {
            (in_use, None) => burst.max(in_use.unwrap_or(0)),
            (in_use, Some(stored)) => {
                let largest = self.rate().time_for(self.largest);
                // Readings are rounded: one that is hardly smaller than the burst is as large.
                let stored = if stored < self.burst / 4 * 3 {
                    stored
                } else {
                    stored.max(self.burst)
                };
                burst.max(in_use.unwrap_or(0)).max(largest).min(stored)
            }
        }
    }

    #[inline]
    fn keep_empty_while_it_stands_still(&mut self, now: Nanos) {
        if now < self.at {
            let least = u64::from(self.source == Source::Estimated);
            self.bucket.lower_to(self.clock, least);
        }
    }

    #[inline]
    fn clock_at(&self, now: Nanos) -> Nanos {
        match now.saturating_sub(self.at) {
            0 => self.clock,
            passed => self.clock.saturating_add(self.scaled(passed)),
        }
    }

    /// Converts a time of the lane to the time of the bucket.
    #[inline]
    fn scaled(&self, time: Nanos) -> Nanos {
        match self.rate_factor() {
            1.0 => time,
            factor => times(time, factor),
        }
    }

    /// Converts a time of the bucket to the time of the lane.
    #[inline]
    fn slowed(&self, time: Nanos) -> Nanos {
        let factor = self.rate_factor();
        if factor == 1.0 || time == 0 {
            return time;
        }
        // Rounded up and one more: the way back must not fall short by a rounding.
        ((time as f64 / factor).ceil() as Nanos).saturating_add(1)
    }
}

/// Not inlined, so that no floating-point work is done where the factor is 1.
#[inline(never)]
fn times(time: Nanos, factor: f64) -> Nanos {
    (time as f64 * factor) as Nanos
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Nanos = 1_000_000_000;

    /// `n` units when the call is let in.
    fn at_once(upfront: u64) -> Cost {
        Cost {
            upfront,
            deferred: 0,
        }
    }

    fn ready_at(limit: &Limit, now: Nanos, n: u64) -> Nanos {
        limit.ready_at(now, at_once(n)).unwrap()
    }

    fn refused(sent_at: Nanos, advertised: Option<Rate>) -> Refused {
        Refused {
            sent_at,
            units: 1,
            advertised,
            ..Refused::default()
        }
    }

    /// 10 a second, of which 10 may go at once.
    fn limit(source: Source) -> Limit {
        let burst = Burst {
            time: SECOND,
            full_at_start: true,
        };
        Limit::new(source, Rate::per_minute(600), burst, 0, PolicySet::ALL)
    }

    #[test]
    fn a_slower_clock_lowers_the_rate_and_the_burst() {
        let mut limit = limit(Source::Configured);
        let part = Rate::per_minute(450);
        assert!(limit.record_refusal(0, &refused(0, Some(part))));
        limit.stand_still_until(0, SECOND);
        assert!((limit.rate_factor() - 0.6).abs() < 1e-9);
        let wait = ready_at(&limit, SECOND, 1) - SECOND;
        assert!(wait.abs_diff(SECOND / 6) < 1_000, "{wait}");
        let wait = ready_at(&limit, SECOND, 6) - SECOND;
        assert!(wait.abs_diff(SECOND) < 1_000, "{wait}");
        assert_eq!(
            ready_at(&limit, SECOND, 10),
            ready_at(&limit, SECOND, 6),
            "it is full with six"
        );
        limit.advance(1_000 * SECOND, true);
        assert_eq!(limit.rate_factor(), 1.0);
        limit.resize(1_000 * SECOND);
        assert_eq!(limit.filled(1_002 * SECOND), SECOND, "and with ten again");
    }

    #[test]
    fn a_limit_that_stands_still_resumes_empty() {
        let mut limit = limit(Source::Configured);
        let ms = |ms: u64| ms * 1_000_000;
        limit.stand_still_until(ms(500), ms(5_000));
        limit.settle(ms(600), at_once(10), 0);
        limit.refund(ms(600), at_once(10), ms(600));
        limit.advance(ms(700), true);
        assert_eq!(ready_at(&limit, ms(700), 0), ms(5_000));
        assert_eq!(ready_at(&limit, ms(700), 1), ms(5_100));
        limit.stand_still_until(ms(700), ms(2_000));
        assert_eq!(ready_at(&limit, ms(700), 1), ms(5_100), "never shorter");
        limit.advance(ms(5_500), true);
        assert_eq!(ready_at(&limit, ms(5_500), 5), ms(5_500));
    }

    #[test]
    fn the_rate_recovers_only_while_calls_wait() {
        let mut limit = limit(Source::Configured);
        limit.record_refusal(0, &refused(0, None));
        let low = limit.rate_factor();
        limit.advance(1_000 * SECOND, false);
        assert_eq!(limit.rate_factor(), low);
        limit.advance(2_000 * SECOND, true);
        assert_eq!(limit.rate_factor(), 1.0);
    }

    #[test]
    fn throughput_between_two_refusals_lowers_the_target() {
        let mut limit = limit(Source::Configured);
        limit.take(0, at_once(1), 0);
        limit.record_refusal(0, &refused(0, None));
        let mut now = 0;
        for _ in 0..51 {
            now += SECOND / 5;
            limit.advance(now, true);
            limit.take(now, at_once(1), 0);
        }
        let tried = limit.rate_factor();
        limit.record_refusal(now, &refused(now, None));
        // 50 passed in 10.2 s of a limit of 102: so little is believed down to a part.
        let expected = 0.8 * 0.7 * tried;
        assert!(tried > 0.97, "one refused call says nothing of what passes");
        assert!(
            (limit.rate_factor() - expected).abs() < 1e-6,
            "{}, not {expected}",
            limit.rate_factor()
        );
    }

    #[test]
    fn an_unused_limit_admits_one_call_of_any_size() {
        let burst = Burst {
            time: SECOND,
            full_at_start: false,
        };
        let mut limit = Limit::new(
            Source::Configured,
            Rate::per_minute(600),
            burst,
            SECOND,
            PolicySet::ALL,
        );
        assert_eq!(ready_at(&limit, SECOND, 1_000), SECOND);
        limit.take(SECOND, at_once(5), 0);
        assert_eq!(ready_at(&limit, SECOND, 1), SECOND + SECOND / 2);
        limit.retune(SECOND, Source::Configured, Rate::per_minute(600), burst);
        assert_eq!(ready_at(&limit, SECOND, 1), SECOND + SECOND / 2);
    }

    #[test]
    fn calls_charged_at_their_end_start_ahead_of_their_charge() {
        let call = Cost {
            upfront: 0,
            deferred: 10,
        };
        let starts = |limit: &mut Limit, now| {
            let mut started = 0;
            while limit.ready_at(now, call) == Some(now) {
                limit.take(now, call, 0);
                started += 1;
            }
            started
        };
        let mut limit = limit(Source::Configured);
        assert_eq!(
            starts(&mut limit, 0),
            1,
            "the latency of such calls is not known yet"
        );
        assert_eq!(limit.ready_at(0, call), None, "only that one can say");
        limit.settle(2 * SECOND, call, 5);
        limit.record_answer(2 * SECOND, call, 5, 0);
        // There are 5, and 20 more come within two seconds: five calls of 5.
        assert_eq!(starts(&mut limit, 2 * SECOND), 5);
        // While there is a debt, no call starts.
        for _ in 0..5 {
            limit.settle(3 * SECOND, call, 10);
        }
        assert_eq!(
            limit.ready_at(3 * SECOND, call),
            Some(7 * SECOND + SECOND / 10)
        );
    }
}
