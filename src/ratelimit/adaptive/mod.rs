//! Policies: what a lane learns of the limits of a provider, from refusals, headers and its own throughput.
//!
//! A limit has a rate. The policies of a limit turn what they observe into a factor for that rate
//! ([`LimitPolicies::factor`]), through the hooks of [`LimitPolicy`]. [`refusals`] and the reductions of
//! [`ConcurrencyLimit`](super::concurrency::ConcurrencyLimit) are the policies of the whole lane; [`deferred`] is the
//! bookkeeping of answers that are charged when they end.
//!
//! Each [`Policy`] can be switched off, so that the gates measure what it is worth: `tests/pacing_gates.rs` and
//! `tests/refusal_gates.rs` print a table, and DESIGN.md keeps it.

pub(super) mod burst;
pub(super) mod contention;
pub(super) mod deferred;
pub(super) mod headers;
mod provider_bucket;
pub(super) mod rate_controller;
pub(super) mod refusals;

use self::burst::StoredBurst;
use self::contention::{ContentionDetector, Level, OwnUse};
use self::rate_controller::RateController;
use super::bucket::{Nanos, Rate};

/// A mechanism that learns from the provider. Only tests switch one off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Policy {
    /// A refused limit is used more slowly for a while.
    RateControl,
    /// The throughput since the last refusal lowers the target of the recovery.
    MeasuredThroughput,
    /// The limit that the headers of a refusal advertise lowers the target of the recovery.
    AdvertisedTarget,
    /// Limits that are not configured are taken from headers.
    AdoptedLimits,
    /// A level that is higher than the headers say is lowered.
    HeaderLevels,
    /// A lane that shares its account gives up a part of its rate while the level stays low.
    Contention,
    /// A lane that seems to be alone leaves a little of the limit while the level stays low.
    Yield,
    /// A burst that the provider has stored is used at once.
    StoredBurst,
    /// Refusals for overload reduce the number of calls in flight.
    ConcurrencyControl,
    /// Refusals by a rate limit can reduce the number of calls in flight.
    ThrottledConcurrency,
    /// A small share of overloads has no consequence.
    OverloadTolerance,
    /// Reductions that do not lower the share of refusals are taken back.
    NoiseDetection,
}

impl Policy {
    /// All policies.
    pub const ALL: [Self; 12] = [
        Self::RateControl,
        Self::MeasuredThroughput,
        Self::AdvertisedTarget,
        Self::AdoptedLimits,
        Self::HeaderLevels,
        Self::Contention,
        Self::Yield,
        Self::StoredBurst,
        Self::ConcurrencyControl,
        Self::ThrottledConcurrency,
        Self::OverloadTolerance,
        Self::NoiseDetection,
    ];
}

/// The policies that are switched on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PolicySet(u16);

impl PolicySet {
    pub(super) const ALL: Self = Self(u16::MAX);
    pub(super) const NONE: Self = Self(0);

    #[inline]
    pub(super) fn has(self, policy: Policy) -> bool {
        self.0 & (1 << policy as u16) != 0
    }

    pub(super) fn without(self, policy: Policy) -> Self {
        Self(self.0 & !(1 << policy as u16))
    }
}

/// The hooks of a policy that learns about one limit. Those that a policy does not need do nothing.
pub(super) trait LimitPolicy {
    /// Callers waited for more of the limit during `time`.
    fn on_time(&mut self, _time: Nanos) {}

    /// The headers of a reply speak of the limit.
    fn on_headers(&mut self, _reading: &Reading) {}

    /// A call was refused for the limit. Returns whether that changes the rate.
    fn on_refusal(&mut self, _refusal: &LimitRefusal) -> bool {
        false
    }

    /// The factor that the policy asks for, if it has a say now.
    fn rate_factor(&self) -> Option<f64>;
}

/// The headers of a reply, as far as they concern one limit.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reading {
    pub(super) now: Nanos,
    /// The order of the call among those that were granted, and that of the next one.
    pub(super) order: u64,
    pub(super) next_order: u64,
    /// The units that are left, and the time until all are.
    pub(super) left: u64,
    pub(super) reset: Option<Nanos>,
    /// The limit, where the headers name one per minute.
    pub(super) limit: Option<Rate>,
    /// The rate that the lane knows.
    pub(super) known: Rate,
    /// The level of the lane when the call was granted, and now. The headers do not say to which of the two they refer.
    pub(super) level_then: Nanos,
    pub(super) level: Nanos,
    /// The time that an average call takes of the whole limit.
    pub(super) call: Nanos,
    /// The burst of the limit while nothing is known of the provider's.
    pub(super) burst: Nanos,
    pub(super) own: OwnUse,
}

#[cfg(test)]
impl Reading {
    /// A reading that tells a level and a limit.
    pub(super) fn of(now: Nanos, left: u64, limit: Rate, known: Rate, own: OwnUse) -> Self {
        Self {
            now,
            order: 0,
            next_order: 0,
            left,
            reset: None,
            limit: Some(limit),
            known,
            level_then: 0,
            level: 0,
            call: 0,
            burst: 0,
            own,
        }
    }
}

/// A call that was refused for one limit.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct LimitRefusal {
    pub(super) now: Nanos,
    pub(super) sent_at: Nanos,
    /// Whether the headers of the refusal say that the limit is used up.
    pub(super) explained: bool,
    /// The factor that was in use.
    pub(super) tried: f64,
    /// The part of the limit that was let through since the last reduction, if known.
    pub(super) passed: Option<f64>,
    /// The part of the limit that the headers of the refusal advertise.
    pub(super) advertised: Option<f64>,
    /// The time that one call takes of the whole limit.
    pub(super) call: Nanos,
}

/// The policies of one limit. The first that asks for a factor sets it.
#[derive(Debug, Clone)]
pub(super) struct LimitPolicies {
    enabled: PolicySet,
    factor: f64,
    stored_burst: StoredBurst,
    contention: ContentionDetector,
    controller: RateController,
}

impl LimitPolicies {
    /// The policies of a limit that was named, or only estimated. Its burst may be one that is `fixed`.
    pub(super) fn new(enabled: PolicySet, estimated: bool, fixed_burst: bool) -> Self {
        let controller = match estimated {
            true => RateController::of_an_estimate(),
            false => RateController::whole(),
        };
        let learns_burst = enabled.has(Policy::StoredBurst) && !estimated && !fixed_burst;
        Self {
            enabled,
            factor: 1.0,
            stored_burst: StoredBurst::new(learns_burst),
            contention: ContentionDetector::default(),
            controller,
        }
    }

    /// The factor by which the rate is multiplied now.
    #[inline]
    pub(super) fn factor(&self) -> f64 {
        self.factor
    }

    /// The policy of the burst that the provider stores.
    #[inline]
    pub(super) fn stored_burst(&self) -> &StoredBurst {
        &self.stored_burst
    }

    #[inline]
    pub(super) fn stored_burst_mut(&mut self) -> &mut StoredBurst {
        &mut self.stored_burst
    }

    fn update(&mut self) {
        let asked = self.contention.rate_factor();
        let asked = asked.or_else(|| self.controller.rate_factor());
        self.factor = asked.unwrap_or(1.0);
    }

    #[inline]
    pub(super) fn on_time(&mut self, time: Nanos) {
        if !self.controller.is_settled() {
            self.controller.on_time(time);
            self.update();
        }
    }

    /// Returns by how much the level of the lane should rise, or fall.
    pub(super) fn on_headers(&mut self, reading: &Reading) -> i64 {
        let stored = self.stored_burst.stored();
        let capacity = stored.map(|time| time as f64 / 1e9 * reading.known.per_second());
        let level = self.contention.level(reading, capacity);
        let untouched = self.controller.is_untouched();
        let reserve = self.contention.reserve(reading);
        let raise = self.stored_burst.on_headers(reading, untouched, reserve);
        self.controller.on_headers(reading);
        if let Some(level) = level {
            let alone = self.controller.is_alone();
            let yields = level == Level::Low && alone && self.enabled.has(Policy::Yield);
            self.contention.set_yield(yields);
            if let Level::Contended(short) = level
                && self.enabled.has(Policy::Contention)
            {
                let tried = self.factor;
                let share = self.contention.share(reading);
                self.controller.reduce(reading.now, tried, short, share);
            }
        }
        self.update();
        raise
    }

    pub(super) fn on_refusal(&mut self, refusal: &LimitRefusal) -> bool {
        let others = refusal.explained && self.contention.sees_others(refusal.now);
        let changed = if !others && self.stored_burst.on_refusal(refusal) {
            self.controller.record_burst_refusal(refusal.now);
            true
        } else if self.enabled.has(Policy::RateControl) {
            let has = |policy| self.enabled.has(policy);
            self.controller.on_refusal(&LimitRefusal {
                passed: refusal.passed.filter(|_| has(Policy::MeasuredThroughput)),
                advertised: refusal.advertised.filter(|_| has(Policy::AdvertisedTarget)),
                ..*refusal
            })
        } else {
            false
        };
        if changed {
            self.contention.set_yield(false);
        }
        self.update();
        changed
    }

    /// Takes back the reductions since `factor` was in use: they did not help.
    pub(super) fn restore(&mut self, factor: f64) {
        self.controller.restore(self.factor, factor);
        self.update();
    }

    /// Forgets what was learned of a limit that has changed.
    pub(super) fn reset(&mut self, estimated: bool, fixed_burst: bool) {
        let mut new = Self::new(self.enabled, estimated, fixed_burst);
        new.stored_burst.follow(&self.stored_burst);
        *self = new;
    }
}
