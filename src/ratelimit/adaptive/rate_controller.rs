//! [`RateController`]: the part of a limit that the provider really grants, learned from its refusals.
//!
//! The signal is explicit: a 429. Latency is no signal, because it follows the length of the answers. After a
//! refusal the factor drops to four fifths of the refused rate, returns to that on a cubic (fast, then flat where
//! the rate was refused), holds, and only then probes upwards, as CUBIC does for TCP (RFC 9438).
//!
//! Lanes that share an account have a second signal: a level that stays low
//! ([`ContentionDetector`](super::contention::ContentionDetector)). Then the lane gives up a part of its rate and adds
//! an amount that hardly depends on the rate, so that the shares of the lanes become equal (Chiu and Jain, 1989);
//! multiplicative changes alone keep them unequal.

use super::{LimitPolicy, LimitRefusal, Reading};
use crate::ratelimit::bucket::Nanos;

const SECOND: Nanos = 1_000_000_000;

/// The factor never drops below this: a limit that is 50 times too high is not a mistake, it is another account.
const FLOOR: f64 = 0.02;
/// An estimate may be further off.
const FLOOR_OF_AN_ESTIMATE: f64 = 1e-4;
/// The ceiling of an estimate.
const UNBOUNDED: f64 = 1e6;
/// The part of the target that is left directly after a refusal.
const CUT: f64 = 0.8;
/// The target of the recovery is a little below the refused rate: where each second is counted separately, the refused
/// rate would be refused again before the curve is flat.
const TARGET: f64 = 0.98;
/// Measured throughput and header limits lower the target, but to no less than this part of the refused rate: they may be
/// wrong.
const BELIEVED: f64 = 0.7;
const BELIEVED_OF_AN_ESTIMATE: f64 = 0.1;
/// The unit of the recovery: this long, or the time of [`UNIT_CALLS`] calls if that is longer, up to a minute or to the
/// time that the calls take at half the limit. Otherwise a slow account would be refused every few calls, and a
/// fast one that was slowed far down would take hours to recover.
pub(in crate::ratelimit) const UNIT: Nanos = 15 * SECOND;
pub(in crate::ratelimit) const UNIT_CALLS: u32 = 50;
const LONGEST_UNIT: Nanos = 60 * SECOND;
/// The target is held until this many units after the refusal.
pub(in crate::ratelimit) const HOLD: f64 = 1.5;

/// Where the headers explain a refusal their limit is kept, at first for this many units and then for
/// twice as many each time, up to about a day: they may be wrong.
const PATIENCE: f64 = 10.0;
const MOST_PATIENCE: f64 = 5_000.0;

/// While others use the limit: the part of the factor that a low level takes, and the amount that a second adds, times
/// the root of the factor: less for small shares, because there are more of them.
const REDUCTION: f64 = 0.2;
const GAIN: f64 = 0.025;

/// Returns the course of a recovery after `x` units of time (RFC 9438, section 4): fast from `from` towards
/// `target`, flat around it, and upwards from there after [`HOLD`].
pub(in crate::ratelimit) fn recovery(from: f64, target: f64, x: f64) -> f64 {
    if x <= 1.0 {
        target - (target - from) * (1.0 - x).powi(3)
    } else if x <= HOLD {
        target
    } else {
        // Faster than CUBIC where nothing has been refused for long: the trouble is over.
        let doublings = (x - HOLD) / 2.0;
        target * doublings.max(doublings.powi(2)).min(64.0).exp2()
    }
}

#[derive(Debug, Clone)]
pub(super) struct RateController {
    factor: f64,
    ceiling: f64,
    /// The start of the recovery, its target, and its unit of time.
    from: f64,
    target: f64,
    unit: Nanos,
    /// The time in which callers waited for more since the recovery began.
    waited: Nanos,
    reduced_at: Option<Nanos>,
    contended: Option<Contended>,
    /// The part of the limit that the headers advertise, where that explains the last refusal.
    advertised: Option<f64>,
    /// The number of units for which that is kept before more is tried.
    patience: f64,
}

/// Others use the limit too.
#[derive(Debug, Clone, Copy)]
struct Contended {
    at: Nanos,
    /// `waited` when the factor was last reduced.
    waited: Nanos,
}

impl RateController {
    /// A controller of a limit that is configured or advertised.
    pub(super) fn whole() -> Self {
        Self {
            factor: 1.0,
            ceiling: 1.0,
            from: 1.0,
            target: 1.0,
            unit: UNIT,
            waited: 0,
            reduced_at: None,
            contended: None,
            advertised: None,
            patience: PATIENCE,
        }
    }

    /// A controller of a rate that is itself an estimate: the factor may rise above 1.
    pub(super) fn of_an_estimate() -> Self {
        Self {
            ceiling: UNBOUNDED,
            ..Self::whole()
        }
    }

    fn is_estimated(&self) -> bool {
        self.ceiling == UNBOUNDED
    }

    /// Whether the passing of time alone changes nothing.
    #[inline]
    pub(super) fn is_settled(&self) -> bool {
        self.factor >= self.ceiling || (self.is_untouched() && !self.is_estimated())
    }

    /// Whether nothing has ever reduced the factor.
    pub(super) fn is_untouched(&self) -> bool {
        self.reduced_at.is_none() && self.contended.is_none()
    }

    /// Whether nothing is known of others that use the limit.
    pub(super) fn is_alone(&self) -> bool {
        self.is_untouched() && !self.is_estimated()
    }

    /// Reduces the factor from `tried`: the level is low by the part `short` of what should be available, and others use the
    /// limit. The first time it falls to the `share` that the lane had when there was enough, if that is known.
    pub(super) fn reduce(&mut self, now: Nanos, tried: f64, short: f64, share: Option<f64>) {
        let share = share.filter(|_| self.contended.is_none()).unwrap_or(1.0);
        self.factor = (tried * (1.0 - REDUCTION * short)).min(share);
        self.factor = self.factor.max(self.floor());
        self.contended = Some(Contended {
            at: now,
            waited: self.waited,
        });
        // No call was refused: there is no rate to return to.
        self.rise(self.factor, self.factor, HOLD);
    }

    /// A call was refused at a multiple of the limit, so the limit itself was not tried.
    pub(super) fn record_burst_refusal(&mut self, now: Nanos) {
        self.factor = 1.0;
        self.reduced_at = Some(now);
    }

    /// Takes back the reductions since `factor` was in use: they did not help.
    pub(super) fn restore(&mut self, tried: f64, factor: f64) {
        if tried < factor {
            (self.factor, self.advertised) = (factor.min(self.ceiling), None);
            self.unit = UNIT;
            self.rise(self.factor, self.factor, HOLD);
        }
    }

    /// Starts the curve at `from`, with a number of units that have passed already.
    fn rise(&mut self, from: f64, target: f64, units: f64) {
        (self.from, self.target) = (from, target);
        self.waited = (self.unit as f64 * units) as Nanos;
        if let Some(contended) = &mut self.contended {
            contended.waited = self.waited;
        }
    }

    fn floor(&self) -> f64 {
        match self.is_estimated() {
            true => FLOOR_OF_AN_ESTIMATE,
            false => FLOOR,
        }
    }
}

impl LimitPolicy for RateController {
    fn on_time(&mut self, time: Nanos) {
        self.waited = self.waited.saturating_add(time);
        let x = self.waited as f64 / self.unit as f64;
        let curve = recovery(self.from, self.target, x);
        if let Some(advertised) = self.advertised
            && x >= self.patience
        {
            let beyond = self.unit as f64 * (x - self.patience);
            self.advertised = None;
            self.patience = (2.0 * self.patience).min(MOST_PATIENCE);
            let advertised = advertised.min(self.ceiling);
            self.rise(advertised, advertised, HOLD);
            return self.on_time(beyond as Nanos);
        }
        let most = self.advertised.unwrap_or(self.ceiling).min(self.ceiling);
        let added = self.contended.map_or(0.0, |contended| {
            let time = self.waited.saturating_sub(contended.waited) as f64 / SECOND as f64;
            self.from + GAIN * self.from.sqrt() * time
        });
        self.factor = curve.max(added).min(most);
    }

    /// Where the headers advertise more than when they explained a refusal, more is tried.
    fn on_headers(&mut self, reading: &Reading) {
        let (Some(before), Some(limit)) = (self.advertised, reading.limit) else {
            return;
        };
        let advertised = limit.per_second() / reading.known.per_second();
        if advertised > 1.01 * before {
            self.advertised = None;
            self.patience = PATIENCE;
            self.rise(self.factor, advertised.min(self.ceiling), 0.0);
        }
    }

    /// Reduces the factor. Calls that were in flight when the first of them was refused are one cohort: only the first
    /// counts.
    fn on_refusal(&mut self, refusal: &LimitRefusal) -> bool {
        let LimitRefusal {
            now, tried, call, ..
        } = *refusal;
        // No call is sent at the moment of a refusal but those before it.
        if self.reduced_at.is_some_and(|at| refusal.sent_at <= at) {
            return false;
        }
        let floor = self.floor();
        let believed = match self.is_estimated() {
            true => BELIEVED_OF_AN_ESTIMATE,
            false => BELIEVED,
        };
        // Headers that advertise less than what was let through are wrong.
        let passed = refusal.passed;
        let is_possible =
            |advertised: &f64| passed.is_none_or(|passed| *advertised >= 0.9 * passed);
        let advertised = refusal.advertised.filter(is_possible);
        // Those that advertise more than was tried explain nothing.
        self.advertised = advertised.filter(|advertised| TARGET * advertised <= tried);
        let passed = passed.filter(|passed| *passed < CUT * tried);
        let known = passed.into_iter().chain(advertised);
        let target = known.fold(TARGET * tried, f64::min);
        let target = target.max(believed * tried).max(floor);
        self.advertised = self.advertised.map(|advertised| advertised.max(target));
        let calls = call.saturating_mul(UNIT_CALLS.into());
        let longest = LONGEST_UNIT.max(calls.saturating_mul(2));
        self.unit = ((calls as f64 / target) as Nanos).clamp(UNIT, longest);
        self.factor = (CUT * target).max(floor);
        self.reduced_at = Some(now);
        // Contention that was not observed lately is over.
        let lately = |contended: &Contended| now <= contended.at.saturating_add(UNIT);
        self.contended = self.contended.filter(lately);
        self.rise(self.factor, target, 0.0);
        true
    }

    fn rate_factor(&self) -> Option<f64> {
        Some(self.factor)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::contention::OwnUse;
    use super::*;
    use crate::ratelimit::bucket::Rate;

    /// Refuses a call that was sent at the same time.
    fn refuse(
        controller: &mut RateController,
        now: Nanos,
        passed: Option<f64>,
        advertised: Option<f64>,
        call: Nanos,
    ) -> bool {
        controller.on_refusal(&LimitRefusal {
            now,
            sent_at: now,
            tried: controller.factor,
            passed,
            advertised,
            call,
            ..LimitRefusal::default()
        })
    }

    fn refused(controller: &mut RateController, second: u64) -> bool {
        refuse(controller, second * SECOND, None, None, 0)
    }

    fn units(units: f64) -> Nanos {
        (UNIT as f64 * units) as Nanos
    }

    fn at(controller: &RateController, x: f64) -> f64 {
        let mut controller = controller.clone();
        controller.on_time(units(x));
        controller.factor
    }

    #[test]
    fn the_curve_is_cubic_then_flat_then_exponential() {
        let mut controller = RateController::whole();
        assert!(controller.is_settled());
        refused(&mut controller, 1);
        refused(&mut controller, 2);
        let target = 0.98 * 0.8 * 0.98;
        let close = |x: f64, expected: f64| {
            let value = at(&controller, x);
            assert!((value - expected).abs() < 1e-9, "{x}: {value}, {expected}");
        };
        close(0.0, 0.8 * target);
        close(0.5, target * (1.0 - 0.2 * 0.125));
        close(1.0, target);
        close(1.5, target);
        close(2.0, target * 2_f64.powf(0.25));
        close(40.0, 1.0);
    }

    #[test]
    fn a_cohort_of_refusals_reduces_the_rate_once() {
        let mut controller = RateController::whole();
        assert!(refused(&mut controller, 10));
        let after = controller.factor;
        assert!(!controller.on_refusal(&LimitRefusal {
            now: 11 * SECOND,
            sent_at: 9 * SECOND,
            tried: after,
            ..LimitRefusal::default()
        }));
        assert_eq!(controller.factor, after);
        assert!(refused(&mut controller, 12));
    }

    #[test]
    fn throughput_and_header_limits_lower_the_target() {
        let mut controller = RateController::whole();
        refuse(&mut controller, SECOND, Some(0.75), None, 0);
        assert!((at(&controller, 1.0) - 0.75).abs() < 1e-9);
        let mut controller = RateController::whole();
        refuse(&mut controller, SECOND, Some(0.1), None, 0);
        assert!((at(&controller, 1.0) - BELIEVED).abs() < 1e-9);
        let mut controller = RateController::whole();
        refuse(&mut controller, SECOND, None, Some(0.7), 0);
        assert!((at(&controller, 1.0) - 0.7).abs() < 1e-9);
    }

    fn advertise(controller: &mut RateController, part: f64) {
        let known = Rate::per_minute(1_000);
        let advertised = Rate::per_minute((1_000.0 * part) as u64);
        let own = OwnUse {
            taken: 0,
            largest: 0,
            pace: 0.0,
        };
        controller.on_headers(&Reading::of(0, 0, advertised, known, own));
    }

    #[test]
    fn headers_that_explain_a_refusal_are_kept_until_they_change_or_patience_ends() {
        let mut controller = RateController::whole();
        refuse(&mut controller, SECOND, None, Some(0.8), 0);
        controller.on_time(units(9.9));
        assert_eq!(controller.factor, 0.8);
        let mut raised = controller.clone();
        advertise(&mut raised, 0.8);
        assert_eq!(raised.factor, 0.8);
        advertise(&mut raised, 0.9);
        raised.on_time(units(1.0));
        assert!((raised.factor - 0.9).abs() < 1e-9);
        controller.on_time(units(0.3));
        assert!((0.8..0.9).contains(&controller.factor) && controller.factor > 0.8);
        // The second time it takes twice as long.
        refuse(&mut controller, 500 * SECOND, None, Some(0.8), 0);
        controller.on_time(units(19.9));
        assert_eq!(controller.factor, 0.8);
        let mut controller = RateController::whole();
        refuse(&mut controller, SECOND, None, Some(2.0), 0);
        assert_eq!(at(&controller, 9.0), 1.0, "that explains nothing");
    }

    #[test]
    fn a_slow_account_recovers_in_units_of_calls() {
        let mut controller = RateController::whole();
        refuse(&mut controller, SECOND, None, Some(0.8), SECOND * 4 / 5);
        controller.on_time(50 * SECOND - SECOND);
        assert!(controller.factor < 0.8, "50 calls at a second each");
        controller.on_time(SECOND);
        assert!((controller.factor - 0.8).abs() < 1e-9);
    }

    #[test]
    fn an_estimate_may_be_exceeded() {
        let mut controller = RateController::of_an_estimate();
        refused(&mut controller, 1);
        assert!(at(&controller, 10.0) > 10.0);
        assert!(at(&controller, 1e9).is_finite());
    }

    #[test]
    fn the_shares_of_lanes_of_one_account_become_equal() {
        let mut shares = [0.9, 0.1].map(|factor| RateController {
            factor,
            ..RateController::whole()
        });
        for second in 0..200 {
            for controller in &mut shares {
                controller.reduce(second * SECOND, controller.factor, 0.3, None);
                controller.on_time(SECOND);
            }
        }
        let [one, other] = shares.map(|controller| controller.factor);
        assert!((one / other - 1.0).abs() < 0.02, "{one} and {other}");
        assert!((0.1..0.3).contains(&one), "{one}");
    }

    proptest! {
        #[test]
        fn it_stays_within_floor_and_ceiling_and_only_grows_in_between(
            steps in proptest::collection::vec((any::<bool>(), 0..60_000u64, 0.0..2.0f64), 1..200),
        ) {
            let mut controller = RateController::whole();
            let mut now = 0;
            for (refusal, ms, passed) in steps {
                let before = controller.factor;
                let time = ms * 1_000_000;
                now += time;
                if refusal {
                    refuse(&mut controller, now, Some(passed), None, ms * 1_000_000);
                    prop_assert!(controller.factor <= before.max(FLOOR));
                } else {
                    controller.on_time(time);
                    prop_assert!(controller.factor >= before);
                }
                prop_assert!((FLOOR..=1.0).contains(&controller.factor));
            }
        }
    }
}
