//! [`Limit`]: one limit with the clock it lives by.
//!
//! A bucket takes time as an argument, so what the lane learns of a limit is done to
//! its time: the clock runs at the limit's [`RateController`], and stands still while the cooldown is
//! closed. The burst shrinks and grows with it: it is a time of the lane's, not of the
//! slower clock, because a bucket larger than the provider's forgets debts that it holds.

use std::time::Duration;

use crate::ratelimit::adaptive::burst::StoredBurst;
use crate::ratelimit::adaptive::contention::{ContentionDetector, Level, OwnUse};
use crate::ratelimit::adaptive::deferred::DeferredCharges;
use crate::ratelimit::adaptive::rate_controller::RateController;
use crate::ratelimit::bucket::{Bucket, Nanos, Rate, nanos};

/// Fewer calls than this between two refusals say nothing of what passes.
const TELLING: u64 = 4;

/// QueueKey says that there is a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// The [`Pace`](super::Pace).
    Configured,
    /// The headers of a reply.
    Advertised,
    /// A refusal, and what had gone through before it.
    Estimated,
}

/// The burst of a limit, and whether it is there from the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Burst {
    pub(super) time: Duration,
    /// Otherwise there is room for one call, whatever its size: nobody knows what
    /// was used before the lane was made.
    pub(super) full_at_start: bool,
}

/// What one call takes of a limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Cost {
    /// When it is let in.
    pub(super) due: u64,
    /// When it ends, as far as can be foreseen.
    pub(super) later: u64,
}

impl Cost {
    /// The same, if it comes to `most` units or less; otherwise `most` of it.
    #[inline]
    pub(super) fn capped(self, most: u64) -> Self {
        let due = self.due.min(most);
        Self {
            due,
            later: self.later.min(most - due),
        }
    }

    /// A call that will be charged later is let in where one unit is left.
    fn least(self) -> u64 {
        self.due.max(u64::from(self.later > 0))
    }
}

#[derive(Debug, Clone)]
pub(super) struct Limit {
    /// As the provider keeps it: what is only reserved is not in it.
    bucket: Bucket,
    deferred: DeferredCharges,
    /// How much of its rate it holds, as the lane counts time.
    burst: Nanos,
    scale: RateController,
    /// The scale that the bucket's size goes with.
    sized_for: f64,
    source: Source,
    /// The bucket's own time at `at`, the lane's.
    clock: Nanos,
    /// In the future while the clock stands still.
    at: Nanos,
    /// When it was made: what was granted earlier was not taken from it.
    born: Nanos,
    /// Nothing was ever taken: the first call may go and owe.
    fresh: bool,
    /// Units and calls taken so far.
    taken: u64,
    calls: u64,
    /// Both at the last refusal, and what was owed then.
    before: (u64, u64, Nanos),
    /// How long somebody has waited for more since the last refusal.
    busy: Nanos,
    /// When headers lowered it last: what they told earlier calls is in that.
    lowered_at: Nanos,
    /// What may go faster than the rate.
    stored_burst: StoredBurst,
    contention: ContentionDetector,
    /// The most that one call took, or is to take in the end.
    largest: u64,
}

impl Limit {
    pub(super) fn new(source: Source, rate: Rate, burst: Burst, now: Nanos) -> Self {
        let mut bucket = Bucket::new(rate, nanos(burst.time), now);
        if !burst.full_at_start {
            bucket.lower_to(now, 1);
        }
        Self {
            bucket,
            deferred: DeferredCharges::default(),
            burst: nanos(burst.time),
            scale: match source {
                Source::Estimated => RateController::of_an_estimate(),
                Source::Configured | Source::Advertised => RateController::whole(),
            },
            sized_for: 1.0,
            source,
            clock: now,
            at: now,
            born: now,
            fresh: !burst.full_at_start,
            taken: 0,
            calls: 0,
            before: (0, 0, 0),
            busy: 0,
            lowered_at: 0,
            stored_burst: StoredBurst::default(),
            contention: ContentionDetector::default(),
            largest: 0,
        }
    }

    pub(super) fn source(&self) -> Source {
        self.source
    }

    pub(super) fn rate(&self) -> Rate {
        self.bucket.rate()
    }

    pub(super) fn scale(&self) -> f64 {
        self.scale.value()
    }

    /// How much of `units` one call is charged.
    #[inline]
    pub(super) fn most(&self, units: u64) -> u64 {
        units.min(self.rate().minute())
    }

    /// How much of `share` one call is charged.
    #[inline]
    pub(super) fn capped(&self, share: Cost) -> Cost {
        share.capped(self.rate().minute())
    }

    /// What is there, as the time in which it flowed in.
    #[inline]
    pub(super) fn filled(&self, now: Nanos) -> Nanos {
        self.bucket.filled(self.clock_at(now))
    }

    /// Whether what was granted at `granted_at` was taken from this limit.
    pub(super) fn existed_at(&self, granted_at: Nanos) -> bool {
        self.born <= granted_at
    }

    /// Passes the time until `now`, in which somebody `wanted` more or nobody did.
    #[inline]
    pub(super) fn advance(&mut self, now: Nanos, wanted: bool) {
        let Some(passed) = now.checked_sub(self.at).filter(|time| *time > 0) else {
            return;
        };
        self.clock = self.clock_at(now);
        self.at = now;
        if wanted {
            self.busy = self.busy.saturating_add(passed);
            if !self.scale.is_settled() {
                self.scale.grow(Duration::from_nanos(passed));
            }
        }
    }

    /// When `share` can be taken if nobody takes any before: `now`, or later; `None` if
    /// nobody can say until a call in flight ends.
    ///
    /// Where answers are charged when they are there, so many calls may be in flight that
    /// what they are expected to cost flows in by the time they end.
    #[inline]
    pub(super) fn ready_at(&self, now: Nanos, share: Cost) -> Option<Nanos> {
        let now = now.max(self.at);
        if self.fresh {
            return Some(now);
        }
        let clock = self.clock_at(now);
        let mut ready_at = self.bucket.ready_at(clock, share.least());
        if share.later > 0
            && let Some(expected) = self.deferred.with(share.later)
        {
            let expected = self.rate().time_for(expected.saturating_add(share.due));
            let lead = (self.deferred.mean_latency() as f64 * self.scale()) as Nanos;
            ready_at = ready_at.max(self.bucket.covers_at(clock, expected, lead)?);
        }
        Some(now.saturating_add(self.slowed(ready_at - clock)))
    }

    /// When `n` units can be taken, if `before` were taken now.
    pub(super) fn ready_after(&self, now: Nanos, before: u64, n: u64) -> Nanos {
        let clock = self.clock_at(now);
        now.saturating_add(self.slowed(self.bucket.ready_after(clock, before, n) - clock))
    }

    pub(super) fn fullness(&self, now: Nanos) -> f64 {
        self.bucket.fullness(self.clock_at(now))
    }

    #[inline]
    pub(super) fn take(&mut self, now: Nanos, share: Cost) {
        self.fresh = false;
        self.taken = self.taken.saturating_add(share.due);
        self.calls += 1;
        self.bucket.take(self.clock_at(now), share.due);
        self.deferred.add(share.later);
        self.largest = self.largest.max(share.due.saturating_add(share.later));
        if self.stored_burst.take(share.due) {
            self.set_burst_available(now);
        }
    }

    /// The refill since is counted at the full rate: never too little.
    pub(super) fn refund(&mut self, now: Nanos, share: Cost, taken_at: Nanos) {
        self.deferred.remove(share.later);
        let clock = self.clock_at(now);
        let passed = now.saturating_sub(taken_at) as f64 * self.scale().max(1.0);
        self.bucket
            .refund(clock, share.due, clock.saturating_sub(passed as Nanos));
        self.keep_empty_while_closed(now);
    }

    /// A call has cost `actual` in all.
    #[inline]
    pub(super) fn settle(&mut self, now: Nanos, share: Cost, actual: u64) {
        self.bucket.settle(self.clock_at(now), share.due, actual);
        if share.later > 0 {
            self.deferred.remove(share.later);
            // It passes when it comes due.
            self.taken = self.taken.saturating_sub(share.due).saturating_add(actual);
        }
        self.keep_empty_while_closed(now);
    }

    /// Learns what answers cost that are charged when they are there, and when that is.
    pub(super) fn learn(&mut self, now: Nanos, share: Cost, actual: u64, taken_at: Nanos) {
        if share.later > 0 {
            let answer = actual.saturating_sub(share.due);
            self.deferred
                .learn(share.later, answer, now.saturating_sub(taken_at));
        }
    }

    /// What the provider says is left, to a call granted at `granted_at` that left so much here,
    /// as [`filled`](Limit::filled) says it.
    ///
    /// Nobody says whether that was true when the call was let in or when it was
    /// answered. In the first case what was sent since has been taken here too,
    /// in the second it is known to the provider as well: so the limit is lowered by
    /// what it had too much in either case, and never raised.
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

    /// The provider says that so much is `left` of a whole minute that it keeps, or nothing
    /// of the kind, to a call granted at `granted_at`.
    ///
    /// Taken at its word is only who speaks of a limit that nobody else has named, and only
    /// until the first refusal.
    pub(super) fn offer(&mut self, now: Nanos, left: Option<u64>, granted_at: Nanos) {
        let asked = self.source == Source::Advertised && self.existed_at(granted_at);
        if !asked || !self.scale.is_untouched() {
            return;
        }
        // If that was true when the call was let in, the lane may have sent two bursts since,
        // and twice of what has come back; a third one it needs itself.
        let since = now.saturating_sub(granted_at);
        let kept = self.bucket.units(since.saturating_add(3 * self.burst));
        // So does the largest call, for a provider that keeps a minute refuses what is more
        // than it has; and what is charged later is not in what is left.
        let kept = kept.saturating_add(self.largest);
        let left = left.filter(|_| !self.deferred.is_pending());
        self.stored_burst
            .set(left.unwrap_or(0).saturating_sub(kept));
        self.set_burst_available(now);
    }

    /// The provider says that so much is `left` of its `limit`.
    pub(super) fn detect_contention(&mut self, now: Nanos, left: u64, limit: Rate) {
        let told = limit.per_second() / self.rate().per_second();
        self.scale.apply_headers(told);
        let own = OwnUse {
            taken: self.taken,
            largest: self.largest,
            pace: self.rate().per_second() * self.scale(),
        };
        let Some(level) = self.contention.read(now, left, limit, own) else {
            return;
        };
        // So far at the old scale.
        self.advance(now, false);
        match level {
            Level::Contended(short) => self.scale.reduce(Duration::from_nanos(now), short),
            Level::Low => self.scale.yield_share(true),
            Level::Ample => self.scale.yield_share(false),
        }
    }

    /// Goes as fast as the stored_burst allows from now on.
    fn set_burst_available(&mut self, now: Nanos) {
        self.advance(now, false);
        self.scale.set_burst_available(self.stored_burst.is_there());
    }

    /// Empties the limit and lets it stand still until `until`; a debt stays. It is
    /// still empty then, whatever is credited before.
    pub(super) fn stand_still_until(&mut self, now: Nanos, until: Nanos) {
        self.fresh = false;
        self.clock = self.clock_at(now);
        self.at = self.at.max(now).max(until);
        self.bucket.lower_to(self.clock, 0);
        if self.source == Source::Estimated {
            // QueueKey only guesses at a rate must not make the first call wait for it.
            self.bucket.settle(self.clock, 1, 0);
        }
    }

    /// Refills from now on, where it would stand still until later. It is empty still.
    pub(super) fn resume(&mut self, now: Nanos) {
        self.at = self.at.min(now);
    }

    /// A call of `refused` units sent at `sent_at` was refused for this limit, and they were
    /// given back; `told` is the rate that headers speak of. Says whether the limit is
    /// now used more slowly.
    pub(super) fn record_refusal(
        &mut self,
        now: Nanos,
        sent_at: Nanos,
        refused: u64,
        told: Option<Rate>,
    ) -> bool {
        // So far at the old scale.
        self.advance(now, false);
        if self.stored_burst.is_there() {
            // What was tried is more than the limit, of which it says nothing.
            self.stored_burst.set(0);
            self.scale.record_burst_refusal(Duration::from_nanos(now));
            self.resize(now);
            return true;
        }
        let rate = self.bucket.rate();
        let average = self.taken / self.calls.max(1);
        // The refused call itself did not pass, and what is owed did not yet: a debt of
        // before has been paid in the meantime.
        let (taken, calls, owed) = self.before;
        let debt = self.bucket.debt(self.clock_at(now));
        let passed = self.taken.saturating_sub(taken).saturating_sub(refused);
        let passed = rate.time_for(passed);
        let passed = passed.saturating_add(owed).saturating_sub(debt);
        let passed = passed as f64 / self.busy as f64;
        let passed = (self.calls - calls >= TELLING && passed.is_finite()).then_some(passed);
        let told = told.map(|told| told.per_second() / rate.per_second());
        let call = Duration::from_nanos(rate.time_for(average));
        let [at, sent_at] = [now, sent_at].map(Duration::from_nanos);
        let lowered = self.scale.record_refusal(at, sent_at, passed, told, call);
        if lowered {
            self.before = (self.taken, self.calls, debt);
            self.busy = 0;
            self.resize(now);
        }
        lowered
    }

    /// Takes back the reductions since `share` was tried: they did not help.
    pub(super) fn restore(&mut self, now: Nanos, share: f64) {
        // So far at the old scale.
        self.advance(now, false);
        self.scale.restore(share);
    }

    /// Changes the limit; what was learned of it is forgotten, for whoever sets it
    /// now knows better.
    pub(super) fn retune(&mut self, now: Nanos, source: Source, rate: Rate, burst: Burst) {
        let clock = self.clock_at(now);
        if source != self.source || rate != self.bucket.rate() {
            // What was left at the old rate says nothing of the new one.
            self.lowered_at = now;
            let fresh = Self::new(source, rate, burst, now);
            (self.scale, self.source) = (fresh.scale, source);
        }
        (self.clock, self.at, self.burst) = (clock, self.at.max(now), nanos(burst.time));
        self.bucket.retune(clock, rate, self.scaled(self.burst));
        self.sized_for = self.scale.value();
    }

    /// Lets the bucket hold as much as goes with the scale. Not while somebody waits until
    /// it is full: that would never come nearer.
    #[inline]
    pub(super) fn resize(&mut self, now: Nanos) {
        if self.sized_for == self.scale.value() {
            return;
        }
        self.sized_for = self.scale.value();
        let clock = self.clock_at(now);
        self.bucket.resize(clock, self.scaled(self.burst));
    }

    #[inline]
    fn keep_empty_while_closed(&mut self, now: Nanos) {
        if now < self.at {
            let least = u64::from(self.source == Source::Estimated);
            self.bucket.lower_to(self.clock, least);
        }
    }

    /// Nothing to reckon where no time has passed, or it stands still.
    #[inline]
    fn clock_at(&self, now: Nanos) -> Nanos {
        match now.saturating_sub(self.at) {
            0 => self.clock,
            passed => self.clock.saturating_add(self.scaled(passed)),
        }
    }

    /// A time of the lane's as the bucket sees it.
    #[inline]
    fn scaled(&self, time: Nanos) -> Nanos {
        match self.scale.value() {
            1.0 => time,
            scale => times(time, scale),
        }
    }

    /// A time of the bucket's as the lane sees it.
    #[inline]
    fn slowed(&self, time: Nanos) -> Nanos {
        let scale = self.scale.value();
        if scale == 1.0 || time == 0 {
            return time;
        }
        // Up, and one on top: the way back must not fall short by a rounding.
        ((time as f64 / scale).ceil() as Nanos).saturating_add(1)
    }
}

/// Never inlined: else floats are reckoned with before it is known whether they are needed.
#[inline(never)]
fn times(time: Nanos, factor: f64) -> Nanos {
    (time as f64 * factor) as Nanos
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Nanos = 1_000_000_000;

    /// `n` units when the call is let in.
    fn at_once(due: u64) -> Cost {
        Cost { due, later: 0 }
    }

    fn ready_at(limit: &Limit, now: Nanos, n: u64) -> Nanos {
        limit.ready_at(now, at_once(n)).unwrap()
    }

    /// 10 a second, of which 10 may go at once.
    fn limit(source: Source) -> Limit {
        let burst = Burst {
            time: Duration::from_secs(1),
            full_at_start: true,
        };
        Limit::new(source, Rate::per_minute(600), burst, 0)
    }

    #[test]
    fn a_slower_clock_is_a_lower_rate_and_a_smaller_burst() {
        let mut limit = limit(Source::Configured);
        let part = Rate::per_minute(450);
        assert!(limit.record_refusal(0, 0, 1, Some(part)));
        limit.stand_still_until(0, SECOND);
        assert!((limit.scale() - 0.6).abs() < 1e-9);
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
        assert_eq!(limit.scale(), 1.0);
        limit.resize(1_000 * SECOND);
        assert_eq!(limit.filled(1_002 * SECOND), SECOND, "and with ten again");
    }

    #[test]
    fn closed_it_stands_still_and_resumes_empty() {
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
    fn only_time_in_which_somebody_waits_brings_it_back() {
        let mut limit = limit(Source::Configured);
        limit.record_refusal(0, 0, 1, None);
        let low = limit.scale();
        limit.advance(1_000 * SECOND, false);
        assert_eq!(limit.scale(), low);
        limit.advance(2_000 * SECOND, true);
        assert_eq!(limit.scale(), 1.0);
    }

    #[test]
    fn what_passed_between_two_refusals_is_the_better_guess() {
        let mut limit = limit(Source::Configured);
        limit.take(0, at_once(1));
        limit.record_refusal(0, 0, 1, None);
        let mut now = 0;
        for _ in 0..51 {
            now += SECOND / 5;
            limit.advance(now, true);
            limit.take(now, at_once(1));
        }
        let tried = limit.scale();
        limit.record_refusal(now, now, 1, None);
        // 50 passed in 10.2 s of a limit of 102: so little is believed down to a part.
        let expected = 0.8 * 0.7 * tried;
        assert!(tried > 0.97, "one refused call says nothing of what passes");
        assert!(
            (limit.scale() - expected).abs() < 1e-6,
            "{}, not {expected}",
            limit.scale()
        );
    }

    #[test]
    fn a_fresh_limit_lets_one_call_go_and_owe() {
        let burst = Burst {
            time: Duration::from_secs(1),
            full_at_start: false,
        };
        let mut limit = Limit::new(Source::Configured, Rate::per_minute(600), burst, SECOND);
        assert_eq!(ready_at(&limit, SECOND, 1_000), SECOND);
        limit.take(SECOND, at_once(5));
        assert_eq!(ready_at(&limit, SECOND, 1), SECOND + SECOND / 2);
        limit.retune(SECOND, Source::Configured, Rate::per_minute(600), burst);
        assert_eq!(ready_at(&limit, SECOND, 1), SECOND + SECOND / 2);
    }

    #[test]
    fn calls_charged_at_their_end_start_ahead_of_what_they_will_cost() {
        let call = Cost { due: 0, later: 10 };
        let starts = |limit: &mut Limit, now| {
            let mut started = 0;
            while limit.ready_at(now, call) == Some(now) {
                limit.take(now, call);
                started += 1;
            }
            started
        };
        let mut limit = limit(Source::Configured);
        assert_eq!(starts(&mut limit, 0), 1, "nobody knows yet when they end");
        assert_eq!(limit.ready_at(0, call), None, "only that one can say");
        limit.settle(2 * SECOND, call, 5);
        limit.learn(2 * SECOND, call, 5, 0);
        // There are 5, and 20 more come within two seconds: five calls of 5.
        assert_eq!(starts(&mut limit, 2 * SECOND), 5);
        // Where something is owed, nobody starts.
        for _ in 0..5 {
            limit.settle(3 * SECOND, call, 10);
        }
        assert_eq!(
            limit.ready_at(3 * SECOND, call),
            Some(7 * SECOND + SECOND / 10)
        );
    }
}
