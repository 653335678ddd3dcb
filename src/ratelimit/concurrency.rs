//! [`ConcurrencyLimit`]: the calls in flight, and the number that is allowed while the provider refuses calls
//! for their number.
//!
//! Neither a 503 nor a 429 says how many calls are too many, but each of them says that one call
//! was: the provider admitted the calls that are still in flight. So a reduction goes to that number and
//! never below it, as DCTCP reduces its window by the share of marked packets (RFC 8257) and not
//! by half. The number comes back in time, on the same curve as a rate ([`recovery`]); where
//! it is refused at the same height again, the next attempt waits twice as long.

use slab::Slab;

use crate::ratelimit::adaptive::rate_controller::{HOLD, UNIT, UNIT_CALLS, recovery};
use crate::ratelimit::adaptive::refusals::FORGOTTEN;
use crate::ratelimit::bucket::Nanos;

/// How long the number is held after a first refusal on the way up, in units of the recovery. It
/// doubles with each that meets the same number, up to [`HOLD`].
const PAUSE: f64 = HOLD / 32.0;
/// The number of answers over which the latency is averaged.
const REMEMBERED: f64 = 8.0;

/// Each slot holds the state of its call until the call ends.
#[derive(Debug)]
pub(super) struct ConcurrencyLimit<T> {
    most: usize,
    taken: Slab<T>,
    /// The largest number at one time of which a call was answered.
    highest: usize,
    /// Fewer than `most` since a refusal.
    reduced: Option<Reduced>,
}

#[derive(Debug)]
struct Reduced {
    limit: usize,
    /// The largest number of calls at one time that the provider has admitted since the last reduction.
    proven: usize,
    /// The recovery, as in [`recovery`]: from, towards, and for how many units so far.
    from: f64,
    aim: f64,
    units: f64,
    /// The time up to which the recovery is computed.
    at: Nanos,
    /// The largest number in flight since a call was last answered that was sent after a reduction.
    peak: usize,
    /// The time of the last reduction: calls sent until then are one cohort.
    reduced_at: Nanos,
    /// The number at which the last attempt was refused, and how long the next one waits.
    refused: usize,
    pause: f64,
    /// The last time at which it was reduced or calls waited for it.
    needed_at: Nanos,
    /// How long calls take, on average; 0.0 until one is answered.
    latency: f64,
    /// The provider has refused the number itself (429).
    over_limit: bool,
}

/// The consequence of a refusal for the number of calls in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The number stays.
    Tolerated,
    /// It went with one that was refused before: there is room for one less.
    Cohort,
    /// One more than the provider is known to let in was tried, and was too many.
    Probe,
    /// Calls are refused at numbers that were admitted before: the limit is now the number of calls in flight.
    Reduced {
        /// How many were in flight.
        tried: usize,
        /// Some time had passed since the last time.
        recovered: bool,
    },
}

impl Reduced {
    /// Adds a stretch of time in which calls waited for concurrency.
    fn grow(&mut self, time: Nanos) {
        if self.limit == 1 && self.peak > 0 {
            // Nothing is answered yet: more calls would only be more refusals.
            return;
        }
        // A slow account is not refused every few calls, nor before the last change could show.
        let calls = self.latency * f64::from(UNIT_CALLS) / self.aim;
        let unit = (UNIT as f64).max(self.latency).max(calls);
        self.units += time as f64 / unit;
        // A number that is too high costs one call, at once, and not a minute's refusals: it may double in
        // each unit, a rate in two.
        let beyond = (self.units - HOLD).max(0.0);
        let limit = recovery(self.from, self.aim, self.units + beyond) as usize;
        self.limit = self.limit.max(limit);
    }

    fn restart(&mut self, aim: usize, units: f64) {
        (self.from, self.aim, self.units) = (self.limit as f64, aim as f64, units);
    }

    /// A call of the cohort was refused: it was not let in either.
    fn shrink(&mut self) {
        self.limit = (self.limit - 1).max(1);
        self.proven = self.proven.min(self.limit);
        self.restart(self.limit, 0.0);
    }
}

impl<T> ConcurrencyLimit<T> {
    pub(super) fn new(most: Option<usize>) -> Self {
        Self {
            most: most.unwrap_or(usize::MAX),
            taken: Slab::new(),
            highest: 0,
            reduced: None,
        }
    }

    #[inline]
    pub(super) fn used(&self) -> usize {
        self.taken.len()
    }

    /// How many there may be now.
    #[inline]
    pub(super) fn limit(&self) -> usize {
        match &self.reduced {
            None => self.most,
            Some(reduced) => self.most.min(reduced.limit),
        }
    }

    #[inline]
    pub(super) fn free(&self) -> usize {
        self.limit().saturating_sub(self.used())
    }

    /// The number of the slot that `call` has taken.
    #[inline]
    pub(super) fn take(&mut self, call: T) -> usize {
        self.taken.insert(call)
    }

    #[inline]
    pub(super) fn get_mut(&mut self, slot: usize) -> &mut T {
        &mut self.taken[slot]
    }

    #[inline]
    pub(super) fn release(&mut self, slot: usize) -> T {
        self.taken.remove(slot)
    }

    pub(super) fn retune(&mut self, most: Option<usize>) {
        self.most = most.unwrap_or(usize::MAX);
        self.reduced = None;
    }

    /// Passes the time until `now`. The number grows while calls wait for concurrency, which they have done
    /// from `since` on; a refusal long ago is forgotten in any case.
    #[inline]
    pub(super) fn advance(&mut self, now: Nanos, since: Option<Nanos>) {
        if self.reduced.is_some() {
            self.recover(now, since);
        }
    }

    fn recover(&mut self, now: Nanos, since: Option<Nanos>) {
        let Some(reduced) = &mut self.reduced else {
            return;
        };
        if let Some(since) = since {
            reduced.grow(now.saturating_sub(reduced.at.max(since)));
            reduced.needed_at = now;
        }
        reduced.at = reduced.at.max(now);
        let forgotten = now.saturating_sub(reduced.needed_at) > FORGOTTEN;
        if forgotten || reduced.limit >= self.most {
            self.reduced = None;
        }
    }

    /// A call that was sent at `sent_at` as number `in_flight` of the calls in flight was refused for their number, or
    /// may have been. It still holds its slot. `tolerated` says whether such a refusal is to be expected
    /// anyway, and `noisy` whether that is so even where more calls are tried than were let in before.
    pub(super) fn record_refusal(
        &mut self,
        now: Nanos,
        sent_at: Nanos,
        in_flight: usize,
        noisy: bool,
        mut tolerated: impl FnMut() -> bool,
    ) -> Refusal {
        let used = self.used();
        let let_in = (used - 1).min(self.limit()).max(1);
        match &mut self.reduced {
            Some(reduced) if sent_at <= reduced.reduced_at => {
                reduced.shrink();
                Refusal::Cohort
            }
            Some(reduced) if in_flight > reduced.proven && !(noisy && tolerated()) => {
                reduced.limit = let_in.max(reduced.proven);
                reduced.reduced_at = now;
                let again = in_flight <= reduced.refused;
                reduced.refused = in_flight;
                if again {
                    reduced.pause = (2.0 * reduced.pause).min(HOLD);
                } else {
                    reduced.pause = PAUSE;
                }
                // Higher than before: luck, or a number that has changed.
                let aim = reduced.aim as usize;
                if again || aim <= reduced.limit {
                    reduced.restart(reduced.limit, HOLD - reduced.pause);
                } else {
                    reduced.restart(aim, 0.0);
                }
                Refusal::Probe
            }
            Some(reduced) if in_flight > reduced.proven => Refusal::Tolerated,
            _ if tolerated() => Refusal::Tolerated,
            reduced => {
                let before = reduced.take();
                let recovered = before.as_ref().is_none_or(|before| before.units >= 1.0);
                let mut new = Reduced {
                    limit: let_in,
                    proven: let_in,
                    from: 0.0,
                    aim: 0.0,
                    units: 0.0,
                    at: now,
                    peak: before.as_ref().map_or(0, |before| before.peak).max(used),
                    reduced_at: now,
                    needed_at: now,
                    refused: in_flight,
                    pause: PAUSE,
                    latency: before.map_or(0.0, |before| before.latency),
                    over_limit: false,
                };
                new.restart(let_in, 0.0);
                *reduced = Some(new);
                Refusal::Reduced {
                    tried: used,
                    recovered,
                }
            }
        }
    }

    /// Takes a series of reductions back that did not help: `limit` calls may be in flight again.
    pub(super) fn restore(&mut self, limit: usize) {
        if let Some(reduced) = &mut self.reduced {
            reduced.limit = reduced.limit.max(limit);
            reduced.proven = reduced.limit;
            reduced.restart(reduced.limit, HOLD);
        }
    }

    /// Whether more than half of the allowed calls are in flight, so that a refusal may be for their number.
    pub(super) fn is_mostly_used(&self) -> bool {
        self.limit() < usize::MAX && self.used() > self.limit() / 2
    }

    /// A call was refused for the number in flight and nothing else.
    pub(super) fn over_limit(&mut self, now: Nanos, sent_at: Nanos, in_flight: usize) -> Refusal {
        let refused = self.record_refusal(now, sent_at, in_flight, false, || false);
        if let Some(reduced) = &mut self.reduced {
            reduced.over_limit = true;
        }
        refused
    }

    /// Whether calls sent then went with those that were too many.
    pub(super) fn was_over_limit(&self, sent_at: Nanos) -> bool {
        let reduced = self.reduced.as_ref();
        reduced.is_some_and(|reduced| reduced.over_limit && sent_at <= reduced.reduced_at)
    }

    /// A call that was sent at `sent_at` as number `in_flight` of the calls in flight was answered.
    #[inline]
    pub(super) fn record_success(&mut self, now: Nanos, sent_at: Nanos, in_flight: usize) {
        self.highest = self.highest.max(in_flight);
        let Some(reduced) = &mut self.reduced else {
            return;
        };
        let latency = now.saturating_sub(sent_at) as f64;
        let first = reduced.latency == 0.0;
        let weight = if first { 1.0 } else { 1.0 / REMEMBERED };
        reduced.latency += weight * (latency - reduced.latency);
        if sent_at <= reduced.reduced_at {
            return;
        }
        reduced.proven = reduced.proven.max(in_flight.min(reduced.limit));
        let peak = std::mem::take(&mut reduced.peak);
        // Where all calls were refused, nothing is known of how many are too many.
        match self.highest.max(peak) {
            _ if reduced.limit > 1 || peak == 0 => {}
            1 => self.reduced = None,
            aim => reduced.restart(aim, 0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Nanos = 1_000_000_000;

    /// A limit with a number of calls in flight.
    fn taken(most: Option<usize>, calls: usize) -> ConcurrencyLimit<()> {
        let mut concurrency = ConcurrencyLimit::new(most);
        for _ in 0..calls {
            concurrency.take(());
        }
        concurrency
    }

    /// Takes the next slot, and says whether it is refused by a provider that lets in `most`.
    fn tries(concurrency: &mut ConcurrencyLimit<()>, now: Nanos, most: usize) -> bool {
        let slot = concurrency.take(());
        let in_flight = concurrency.used();
        let refused = in_flight > most;
        if refused {
            concurrency.record_refusal(now, now, in_flight, false, || false);
            concurrency.release(slot);
        }
        refused
    }

    #[test]
    fn a_tolerated_refusal_changes_nothing() {
        let mut concurrency = taken(None, 100);
        for second in 0..100 {
            let at = second * SECOND;
            let refused = concurrency.record_refusal(at, at, 100, false, || true);
            assert_eq!(refused, Refusal::Tolerated);
        }
        assert_eq!(concurrency.limit(), usize::MAX);
    }

    #[test]
    fn a_reduction_leaves_as_many_as_were_let_in() {
        let mut concurrency = taken(Some(16), 16);
        assert!(concurrency.is_mostly_used());
        for in_flight in (9..=16).rev() {
            concurrency.over_limit(SECOND, SECOND, in_flight);
            concurrency.release(in_flight - 1);
        }
        assert_eq!((concurrency.used(), concurrency.limit()), (8, 8));
        assert!(concurrency.was_over_limit(SECOND) && !concurrency.was_over_limit(2 * SECOND));
    }

    #[test]
    fn where_the_number_is_refused_again_it_is_tried_ever_more_rarely() {
        let mut concurrency = taken(None, 8);
        assert!(tries(&mut concurrency, SECOND, 8));
        assert_eq!(concurrency.limit(), 8);
        let mut tried = Vec::new();
        for ms in 1_000..400_000 {
            let now = ms * SECOND / 1_000;
            concurrency.advance(now, Some(0));
            if concurrency.free() > 0 {
                assert!(tries(&mut concurrency, now, 8));
                tried.push(ms / 1_000);
            }
            assert_eq!(concurrency.limit(), 8);
        }
        // A unit and a half each in the end, and a little until the curve has reached one more.
        let last: Vec<_> = tried.windows(2).map(|two| two[1] - two[0]).collect();
        assert!(last.is_sorted(), "{last:?}");
        assert!(
            last.last().is_some_and(|wait| (22..40).contains(wait)),
            "{last:?}"
        );
        assert!(tried.len() < 20, "{tried:?}");
    }

    #[test]
    fn room_that_is_there_again_is_found() {
        let mut concurrency = taken(None, 50);
        assert!(tries(&mut concurrency, SECOND, 50));
        let mut now = SECOND;
        while concurrency.used() < 200 {
            now += SECOND / 100;
            concurrency.advance(now, Some(0));
            while concurrency.free() > 0 && !tries(&mut concurrency, now, 200) {}
        }
        assert!(now < 100 * SECOND, "after {} s", now / SECOND);
    }

    #[test]
    fn after_an_outage_the_first_answer_brings_the_number_back() {
        let mut concurrency = taken(None, 1_000);
        concurrency.record_success(SECOND, 0, 1_000);
        for in_flight in (1..=1_000).rev() {
            concurrency.record_refusal(2 * SECOND, SECOND, in_flight, false, || false);
            concurrency.release(in_flight - 1);
        }
        concurrency.advance(60 * SECOND, Some(0));
        assert_eq!(concurrency.limit(), 1, "nothing is answered yet");
        concurrency.take(());
        concurrency.advance(70 * SECOND, Some(0));
        concurrency.record_success(70 * SECOND, 60 * SECOND, 1);
        concurrency.advance(78 * SECOND, Some(0));
        assert!(
            (800..1_000).contains(&concurrency.limit()),
            "{}",
            concurrency.limit()
        );
        concurrency.advance(86 * SECOND, Some(0));
        assert_eq!(concurrency.limit(), 1_000);
    }

    #[test]
    fn one_refusal_of_a_lone_call_is_no_number() {
        let mut concurrency = taken(None, 1);
        concurrency.record_refusal(SECOND, 0, 1, false, || false);
        assert_eq!(concurrency.limit(), 1);
        concurrency.record_success(3 * SECOND, 2 * SECOND, 1);
        assert_eq!(concurrency.limit(), usize::MAX);
    }

    #[test]
    fn a_refusal_long_ago_is_forgotten_unless_it_still_holds_calls_up() {
        let mut concurrency = taken(None, 9);
        assert!(tries(&mut concurrency, SECOND, 9));
        let mut idle = concurrency;
        idle.advance(SECOND + FORGOTTEN, None);
        assert_eq!(idle.limit(), 9);
        idle.advance(SECOND + FORGOTTEN + 1, None);
        assert_eq!(idle.limit(), usize::MAX);

        let mut busy = taken(None, 9);
        for minute in 0..60 {
            let now = minute * 60 * SECOND;
            busy.advance(now, Some(0));
            tries(&mut busy, now, 9);
            assert!(busy.limit() < usize::MAX);
        }
    }

    #[test]
    fn without_a_limit_nobody_is_many() {
        assert!(!taken(None, 1_000).is_mostly_used());
    }
}
