//! [`RateController`]: the share of a limit that the provider really grants, learned from its refusals.
//!
//! The signal is explicit: a 429. Latency is none, for it follows the length of the
//! answers. After a refusal the share drops to four fifths of what was refused, comes
//! back to that on a cubic (fast, then flat where the trouble was), holds, and
//! only then feels its way upwards, as CUBIC does for TCP (RFC 9438).
//!
//! Lanes that share an account have a second signal: a level that stays low ([`ContentionDetector`](super::adaptive::contention)).
//! QueueKey hears it gives up a part of what it has and adds a little that hardly depends on that, so that
//! shares become equal (Chiu and Jain, 1989); what only ever grows and shrinks in proportion
//! keeps them unequal.

use std::time::Duration;

/// The share never drops below this by itself: 50 times too much is not a mistake, it
/// is another account.
const FLOOR: f64 = 0.02;
/// A guess may be that wrong.
const FLOOR_OF_A_GUESS: f64 = 1e-4;
/// Upwards without end means up to here.
const UNBOUNDED: f64 = 1e6;
/// What a refusal leaves of the share that the recovery aims at.
const CUT: f64 = 0.8;
/// The recovery aims a little below what was refused: where each second is counted on its
/// own, aiming at it is refused again before the curve is flat.
const AIM: f64 = 0.98;
/// What was let through since the last refusal counts as the truth if it is
/// clearly less than what was tried, and so does what the headers say. Either is believed
/// down to this part of what was tried: they may be wrong.
const BELIEVED: f64 = 0.7;
const BELIEVED_OF_A_GUESS: f64 = 0.1;
/// The unit of the recovery: this long, or the time of that many calls if that is
/// longer, up to a minute or to what they take at half the limit. A slow account would
/// otherwise be refused every few calls; and a fast one that was slowed far down would take
/// hours to come back.
pub(in crate::ratelimit) const UNIT: Duration = Duration::from_secs(15);
/// Until then what was aimed at is held, in units.
pub(in crate::ratelimit) const HOLD: f64 = 1.5;
pub(in crate::ratelimit) const UNIT_CALLS: u32 = 50;
const LONGEST_UNIT: Duration = Duration::from_secs(60);

/// Where the headers explain a refusal their limit is kept, at first for so many units and then for
/// twice as many, up to a day or so: they may be wrong.
const PATIENCE: f64 = 10.0;
const MOST_PATIENCE: f64 = 5_000.0;

/// How fast a stored_burst is used: not all at once, for many enforce a minute's limit by seconds.
const BURST_FACTOR: f64 = 2.0;

/// While others use the limit: what a low level takes of the share, and what a second adds, times
/// the share's root: of small shares less, for there are more of them.
const EASE: f64 = 0.2;
const GAIN: f64 = 0.025;
/// QueueKey seems to be alone and to leave nothing lets so much through: others, of whom it would never
/// hear, get in between, or the level rises.
const YIELDED: f64 = 0.995;

/// The course of a recovery after `x` units of time (RFC 9438, section 4): fast from `from` towards
/// `aim`, flat around it, and upwards from there after [`HELD`].
pub(in crate::ratelimit) fn recovery(from: f64, aim: f64, x: f64) -> f64 {
    if x <= 1.0 {
        aim - (aim - from) * (1.0 - x).powi(3)
    } else if x <= HOLD {
        aim
    } else {
        // Faster than that where nothing has been refused for long: the trouble is over.
        let doublings = (x - HOLD) / 2.0;
        aim * doublings.max(doublings.powi(2)).min(64.0).exp2()
    }
}

#[derive(Debug, Clone)]
pub(in crate::ratelimit) struct RateController {
    value: f64,
    ceiling: f64,
    /// What the recovery starts from, what it aims at, and its unit of time.
    from: f64,
    aim: f64,
    unit: Duration,
    /// How long somebody has waited for more since the cooldown opened.
    grown: Duration,
    decreased_at: Option<Duration>,
    eased: Option<Contended>,
    /// What the headers say the limit is, where that explains the last refusal.
    told: Option<f64>,
    /// For how many units that is kept before more is tried.
    patience: f64,
}

/// Others use the limit too.
#[derive(Debug, Clone, Copy)]
struct Contended {
    at: Duration,
    /// What `grown` was when the share was lowered last.
    grown: Duration,
}

impl RateController {
    /// All of a limit that somebody has named.
    pub(in crate::ratelimit) fn whole() -> Self {
        Self {
            value: 1.0,
            ceiling: 1.0,
            from: 1.0,
            aim: 1.0,
            unit: UNIT,
            grown: Duration::ZERO,
            decreased_at: None,
            eased: None,
            told: None,
            patience: PATIENCE,
        }
    }

    /// A share of a rate that is itself a guess: it may rise above 1.
    pub(in crate::ratelimit) fn of_an_estimate() -> Self {
        Self {
            ceiling: UNBOUNDED,
            ..Self::whole()
        }
    }

    fn is_estimated(&self) -> bool {
        self.ceiling == UNBOUNDED
    }

    #[inline]
    pub(in crate::ratelimit) fn value(&self) -> f64 {
        self.value
    }

    /// Whether time alone changes nothing.
    #[inline]
    pub(in crate::ratelimit) fn is_settled(&self) -> bool {
        self.value >= self.ceiling || (self.is_untouched() && !self.is_estimated())
    }

    /// Nothing has ever lowered it.
    pub(in crate::ratelimit) fn is_untouched(&self) -> bool {
        self.decreased_at.is_none() && self.eased.is_none()
    }

    /// Twice the limit while there is a `stored_burst`, and the limit otherwise, for one that was
    /// never lowered.
    pub(in crate::ratelimit) fn set_burst_available(&mut self, stored_burst: bool) {
        self.value = if stored_burst {
            BURST_FACTOR
        } else {
            self.value.min(1.0)
        };
    }

    /// The headers say that the limit is `told`. If that is more than they said when they explained
    /// a refusal, there is something new to come back to.
    pub(in crate::ratelimit) fn apply_headers(&mut self, told: f64) {
        if self.told.is_some_and(|before| told > 1.01 * before) {
            self.told = None;
            self.patience = PATIENCE;
            self.rise(self.value, told.min(self.ceiling), 0.0);
        }
    }

    /// The level is `low`, or is not, though nobody else seems to be there.
    pub(in crate::ratelimit) fn yield_share(&mut self, low: bool) {
        if self.is_untouched() && !self.is_estimated() {
            self.value = if low { YIELDED } else { self.value.max(1.0) };
        }
    }

    /// The level is low, by this part of what should be there, and others use the limit.
    pub(in crate::ratelimit) fn reduce(&mut self, now: Duration, short: f64) {
        self.value = (self.value * (1.0 - EASE * short)).max(self.floor());
        self.eased = Some(Contended {
            at: now,
            grown: self.grown,
        });
        // Nothing was refused: there is nothing to come back to.
        self.rise(self.value, self.value, HOLD);
    }

    /// Twice the limit was refused, `now`: the limit itself was not tried.
    pub(in crate::ratelimit) fn record_burst_refusal(&mut self, now: Duration) {
        self.value = 1.0;
        self.decreased_at = Some(now);
    }

    /// Somebody waited for `time` at an open cooldown: only then more is wanted.
    pub(in crate::ratelimit) fn grow(&mut self, time: Duration) {
        self.grown = self.grown.saturating_add(time);
        let x = self.grown.as_secs_f64() / self.unit.as_secs_f64();
        let share = recovery(self.from, self.aim, x);
        if let Some(told) = self.told
            && x >= self.patience
        {
            let beyond = self.unit.mul_f64(x - self.patience);
            self.told = None;
            self.patience = (2.0 * self.patience).min(MOST_PATIENCE);
            let told = told.min(self.ceiling);
            self.rise(told, told, HOLD);
            return self.grow(beyond);
        }
        let most = self
            .told
            .map_or(self.ceiling, |told| told.min(self.ceiling));
        let added = self.eased.map_or(0.0, |eased| {
            let time = self.grown.saturating_sub(eased.grown);
            self.from + GAIN * self.from.sqrt() * time.as_secs_f64()
        });
        self.value = share.max(added).min(most);
    }

    /// Takes back the reductions since `share` was tried: they did not help.
    pub(in crate::ratelimit) fn restore(&mut self, share: f64) {
        if self.value < share {
            (self.value, self.told) = (share.min(self.ceiling), None);
            self.unit = UNIT;
            self.rise(self.value, self.value, HOLD);
        }
    }

    /// From now on upwards along the curve, of which so many units have passed.
    fn rise(&mut self, from: f64, aim: f64, units: f64) {
        (self.from, self.aim) = (from, aim);
        self.grown = self.unit.mul_f64(units);
        if let Some(eased) = &mut self.eased {
            eased.grown = self.grown;
        }
    }

    fn floor(&self) -> f64 {
        match self.is_estimated() {
            true => FLOOR_OF_A_GUESS,
            false => FLOOR,
        }
    }

    /// A call sent at `sent_at` was refused, `now`. Calls that were on their way when
    /// the first of them was refused are one cohort: only that one counts.
    ///
    /// `passed` is the share that was let through since the last decrease, if known, `told` the
    /// one that the provider's headers speak of, and `call` the time one call takes
    /// of the whole limit. Says whether the share was lowered.
    pub(in crate::ratelimit) fn record_refusal(
        &mut self,
        now: Duration,
        sent_at: Duration,
        passed: Option<f64>,
        told: Option<f64>,
        call: Duration,
    ) -> bool {
        // Nothing goes at the moment of a refusal but what went before it.
        if self.decreased_at.is_some_and(|at| sent_at <= at) {
            return false;
        }
        let tried = self.value;
        let floor = self.floor();
        let believed = match self.is_estimated() {
            true => BELIEVED_OF_A_GUESS,
            false => BELIEVED,
        };
        // Headers that speak of less than what has passed are wrong.
        let told = told.filter(|told| passed.is_none_or(|passed| *told >= 0.9 * passed));
        // Those that speak of more than was tried explain nothing.
        self.told = told.filter(|told| AIM * told <= tried);
        let passed = passed.filter(|passed| *passed < CUT * tried);
        let aim = passed.into_iter().chain(told).fold(AIM * tried, f64::min);
        let aim = aim.max(believed * tried).max(floor);
        self.told = self.told.map(|told| told.max(aim));
        let longest = LONGEST_UNIT.max(call * UNIT_CALLS * 2);
        self.unit = (call * UNIT_CALLS).div_f64(aim).clamp(UNIT, longest);
        self.value = (CUT * aim).max(floor);
        self.decreased_at = Some(now);
        // QueueKey was not told lately that others are there is alone again.
        self.eased = self.eased.filter(|eased| now <= eased.at + UNIT);
        self.rise(self.value, aim, 0.0);
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn refused(scale: &mut RateController, now: u32) -> bool {
        scale.record_refusal(now * SECOND, now * SECOND, None, None, Duration::ZERO)
    }

    fn at(scale: &RateController, x: f64) -> f64 {
        let mut scale = scale.clone();
        scale.grow(UNIT.mul_f64(x));
        scale.value()
    }

    #[test]
    fn the_curve_is_cubic_then_flat_then_exponential() {
        let mut scale = RateController::whole();
        assert!(scale.is_settled());
        refused(&mut scale, 1);
        refused(&mut scale, 2);
        let aim = 0.98 * 0.8 * 0.98;
        let close = |x: f64, expected: f64| {
            let value = at(&scale, x);
            assert!((value - expected).abs() < 1e-9, "{x}: {value}, {expected}");
        };
        close(0.0, 0.8 * aim);
        close(0.5, aim * (1.0 - 0.2 * 0.125));
        close(1.0, aim);
        close(1.5, aim);
        close(2.0, aim * 2_f64.powf(0.25));
        close(40.0, 1.0);
    }

    #[test]
    fn one_decrease_for_each_cohort() {
        let mut scale = RateController::whole();
        assert!(refused(&mut scale, 10));
        let after = scale.value();
        assert!(!scale.record_refusal(11 * SECOND, 9 * SECOND, None, None, Duration::ZERO));
        assert_eq!(scale.value(), after);
        assert!(refused(&mut scale, 12));
    }

    #[test]
    fn what_was_let_through_and_what_headers_say_lower_the_aim() {
        let mut scale = RateController::whole();
        scale.record_refusal(SECOND, SECOND, Some(0.75), None, Duration::ZERO);
        assert!((at(&scale, 1.0) - 0.75).abs() < 1e-9);
        let mut scale = RateController::whole();
        scale.record_refusal(SECOND, SECOND, Some(0.1), None, Duration::ZERO);
        assert!((at(&scale, 1.0) - BELIEVED).abs() < 1e-9);
        let mut scale = RateController::whole();
        scale.record_refusal(SECOND, SECOND, None, Some(0.7), Duration::ZERO);
        assert!((at(&scale, 1.0) - 0.7).abs() < 1e-9);
    }

    #[test]
    fn headers_that_explain_a_refusal_are_kept_until_they_change_or_patience_ends() {
        let mut scale = RateController::whole();
        scale.record_refusal(SECOND, SECOND, None, Some(0.8), Duration::ZERO);
        let units = |units: f64| UNIT.mul_f64(units);
        scale.grow(units(9.9));
        assert_eq!(scale.value(), 0.8);
        let mut raised = scale.clone();
        raised.apply_headers(0.8);
        assert_eq!(raised.value(), 0.8);
        raised.apply_headers(0.9);
        raised.grow(units(1.0));
        assert!((raised.value() - 0.9).abs() < 1e-9);
        scale.grow(units(0.3));
        assert!((0.8..0.9).contains(&scale.value()) && scale.value() > 0.8);
        // The second time it takes twice as long.
        scale.record_refusal(500 * SECOND, 500 * SECOND, None, Some(0.8), Duration::ZERO);
        scale.grow(units(19.9));
        assert_eq!(scale.value(), 0.8);
        let mut scale = RateController::whole();
        scale.record_refusal(SECOND, SECOND, None, Some(2.0), Duration::ZERO);
        assert_eq!(at(&scale, 9.0), 1.0, "that explains nothing");
    }

    #[test]
    fn a_slow_account_recovers_by_calls() {
        let mut scale = RateController::whole();
        scale.record_refusal(SECOND, SECOND, None, Some(0.8), SECOND * 4 / 5);
        scale.grow(50 * SECOND - SECOND);
        assert!(scale.value() < 0.8, "50 calls at a second each");
        scale.grow(SECOND);
        assert!((scale.value() - 0.8).abs() < 1e-9);
    }

    #[test]
    fn a_guess_may_be_exceeded() {
        let mut scale = RateController::of_an_estimate();
        refused(&mut scale, 1);
        assert!(at(&scale, 10.0) > 10.0);
        assert!(at(&scale, 1e9).is_finite());
    }

    #[test]
    fn shares_of_one_account_become_equal() {
        let mut shares = [0.9, 0.1].map(|value| RateController {
            value,
            ..RateController::whole()
        });
        for second in 0..200 {
            for scale in &mut shares {
                scale.reduce(second * SECOND, 0.3);
                scale.grow(SECOND);
            }
        }
        let [one, other] = shares.map(|scale| scale.value());
        assert!((one / other - 1.0).abs() < 0.02, "{one} and {other}");
        assert!((0.1..0.3).contains(&one), "{one}");
    }

    #[test]
    fn who_is_alone_makes_way_only_while_the_level_is_low() {
        let mut scale = RateController::whole();
        scale.yield_share(true);
        assert_eq!(scale.value(), YIELDED);
        scale.yield_share(false);
        assert_eq!(scale.value(), 1.0);
        refused(&mut scale, 1);
        let lowered = scale.value();
        scale.yield_share(true);
        assert_eq!(scale.value(), lowered);
    }

    proptest! {
        #[test]
        fn it_stays_within_floor_and_ceiling_and_only_grows_in_between(
            steps in proptest::collection::vec((any::<bool>(), 0..60_000u64, 0.0..2.0f64), 1..200),
        ) {
            let mut scale = RateController::whole();
            let mut now = Duration::ZERO;
            for (refusal, ms, passed) in steps {
                let before = scale.value();
                let time = Duration::from_millis(ms);
                now += time;
                if refusal {
                    scale.record_refusal(now, now, Some(passed), None, Duration::from_millis(ms));
                    prop_assert!(scale.value() <= before.max(FLOOR));
                } else {
                    scale.grow(time);
                    prop_assert!(scale.value() >= before);
                }
                prop_assert!((FLOOR..=1.0).contains(&scale.value()));
            }
        }
    }
}
