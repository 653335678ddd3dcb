//! [`LimitSet`]: all rate limits of a lane, taken together or not at all.

use super::adaptive::{Policy, PolicySet, headers};
use super::bucket::{Nanos, Rate};
use super::limit::{Answered, Burst, Cost, Limit, Refused, Source};
use super::pace::Pace;
use super::types::{Binding, BurstSnapshot, Charge};
use crate::usage::{Quota, RateSnapshot};

/// An hour is as good as unlimited, and sums of hours do not overflow.
const HOUR: Nanos = 3_600_000_000_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Resource {
    Spacing,
    Requests,
    Tokens,
    InputTokens,
    OutputTokens,
}

impl Resource {
    pub(super) const ALL: [Self; 5] = [
        Self::Spacing,
        Self::Requests,
        Self::Tokens,
        Self::InputTokens,
        Self::OutputTokens,
    ];

    /// Returns the units of this resource in `charge`.
    #[inline]
    pub(super) fn of(self, charge: Charge) -> u64 {
        match self {
            Self::Spacing | Self::Requests => 1,
            Self::Tokens => charge.input.saturating_add(charge.output),
            Self::InputTokens => charge.input,
            Self::OutputTokens => charge.output,
        }
    }

    /// Returns the same units, by when they are charged.
    #[inline]
    fn cost(self, charge: Charge) -> Cost {
        let all = self.of(charge);
        if !charge.output_deferred {
            return Cost {
                upfront: all,
                deferred: 0,
            };
        }
        let upfront = self.of(charge.on_admission());
        Cost {
            upfront,
            deferred: all - upfront,
        }
    }

    pub(super) fn binding(self) -> Binding {
        match self {
            Self::Spacing => Binding::Spacing,
            Self::Requests => Binding::Requests,
            Self::Tokens => Binding::Tokens,
            Self::InputTokens => Binding::InputTokens,
            Self::OutputTokens => Binding::OutputTokens,
        }
    }

    /// Returns the rate that `pace` sets for this resource, and the burst that goes with it.
    pub(super) fn limit(self, pace: &Pace) -> Option<(Rate, Burst)> {
        let rate = match self {
            Self::Spacing => {
                let burst = Burst {
                    time: 0,
                    full_at_start: true,
                };
                return Some((pace.spacing?, burst));
            }
            Self::Requests => pace.requests,
            Self::Tokens => pace.tokens,
            Self::InputTokens => pace.input_tokens,
            Self::OutputTokens => pace.output_tokens,
        };
        Some((rate?, pace.burst_or_default()))
    }

    fn quota(self, headers: &RateSnapshot) -> Option<&Quota> {
        match self {
            Self::Spacing => None,
            Self::Requests => Some(&headers.requests),
            Self::Tokens => Some(&headers.tokens),
            Self::InputTokens => Some(&headers.input_tokens),
            Self::OutputTokens => Some(&headers.output_tokens),
        }
    }
}

/// The resource for which a call was refused, according to the headers of the refusal.
#[derive(Debug, Clone, Copy)]
pub(super) struct ThrottledResource {
    resource: Resource,
    rate: Option<Rate>,
}

impl ThrottledResource {
    /// Returns the resource that has less left than `charge` takes; of several the emptiest.
    pub(super) fn of(headers: &RateSnapshot, charge: Charge) -> Option<Self> {
        let short = |resource: &Resource| {
            let quota = resource.quota(headers)?;
            let left = quota.remaining?;
            let part = left as f64 / quota.limit.unwrap_or(1).max(1) as f64;
            (left < resource.of(charge.on_admission()).max(1)).then_some((*resource, part))
        };
        let (resource, _) = Resource::ALL
            .iter()
            .filter_map(short)
            .min_by(|(_, a), (_, b)| a.total_cmp(b))?;
        let rate = resource.quota(headers).and_then(headers::per_minute);
        Some(Self { resource, rate })
    }
}

/// A call that was granted, and what it took.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grant {
    pub(super) charge: Charge,
    pub(super) at: Nanos,
    /// The number of grants before it.
    pub(super) order: u64,
    /// The levels after it.
    pub(super) levels: Levels,
    /// The number of calls in flight, with this one.
    pub(super) in_flight: usize,
    /// The resource that the headers of its refusal name.
    pub(super) throttled: Option<ThrottledResource>,
}

/// The levels of the limits, each as the time in which it flows in.
pub(super) type Levels = [Nanos; Resource::ALL.len()];

/// A limit that is used more slowly since a refusal.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reduced {
    pub(super) resource: Resource,
    /// The factor that was in use before.
    pub(super) tried: f64,
    /// The factor that is in use now.
    pub(super) factor: f64,
}

/// The headers of the reply to a granted call.
#[derive(Debug, Clone, Copy)]
pub(super) struct Headers<'a> {
    pub(super) headers: &'a RateSnapshot,
    pub(super) grant: &'a Grant,
    /// The part of the charge of the call that may be given back when it ends.
    pub(super) refundable: Charge,
    /// The number of grants so far.
    pub(super) next_order: u64,
}

/// News about a limit from the headers of a reply.
#[derive(Debug, Clone, Copy)]
pub(super) enum Learned {
    /// A limit that is kept from now on.
    Limit(Resource, Rate),
    /// The units that the provider stores.
    Burst(Resource, u64),
}

/// A charge that is more than a minute of its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Exceeded {
    pub(super) resource: Resource,
    pub(super) needed: u64,
    pub(super) per_minute: u64,
}

#[derive(Debug)]
pub(super) struct LimitSet {
    /// One limit for each limited resource, in the order of [`Resource::ALL`].
    limits: Vec<(Resource, Limit)>,
    /// Charges that exceeded their limit since the last [`take_exceeded`](LimitSet::take_exceeded).
    exceeded: Vec<Exceeded>,
    enabled: PolicySet,
}

impl LimitSet {
    pub(super) fn new(pace: &Pace, now: Nanos) -> Self {
        let enabled = pace.policies;
        let limits = Resource::ALL.into_iter().filter_map(|resource| {
            let (rate, burst) = resource.limit(pace)?;
            let limit = Limit::new(Source::Configured, rate, burst, now, enabled);
            Some((resource, limit))
        });
        Self {
            limits: limits.collect(),
            exceeded: Vec::new(),
            enabled,
        }
    }

    /// Passes the time until `now`, in which callers waited for the limits if they were `wanted`.
    #[inline]
    pub(super) fn advance(&mut self, now: Nanos, wanted: bool) {
        for (_, limit) in &mut self.limits {
            limit.advance(now, wanted);
        }
    }

    /// Returns when all of `charge` can be taken, and the resource that is last: `now` and
    /// [`Binding::Nothing`], or later; `None` is when a call in flight has ended.
    #[inline]
    pub(super) fn ready_at(&self, now: Nanos, charge: Charge) -> (Option<Nanos>, Binding) {
        let mut last = (now, Binding::Nothing);
        for (resource, limit) in &self.limits {
            let cost = limit.capped(resource.cost(charge));
            let Some(ready_at) = limit.ready_at(now, cost) else {
                return (None, resource.binding());
            };
            if ready_at > last.0 {
                last = (ready_at, resource.binding());
            }
        }
        (Some(last.0), last.1)
    }

    /// Whether `first` could be taken now without keeping `head` beyond `until`. No call passes one with a deferred charge:
    /// the time of that charge is unknown.
    pub(super) fn leaves_room(
        &self,
        now: Nanos,
        first: Charge,
        head: Charge,
        until: Nanos,
    ) -> bool {
        self.limits.iter().all(|(resource, limit)| {
            let [first, head] = [first, head].map(|charge| limit.capped(resource.cost(charge)));
            first.deferred == 0
                && head.deferred == 0
                && limit.ready_at(now, first).is_some_and(|at| at <= now)
                && limit.ready_after(now, first.upfront, head.upfront) <= until
        })
    }

    /// Returns what `charge` takes of the scarcest limit, in nanoseconds of its rate.
    pub(super) fn time_of(&self, charge: Charge) -> u64 {
        let times = self
            .limits
            .iter()
            .map(|(resource, limit)| limit.rate().time_for(limit.most(resource.of(charge))));
        times.fold(1, u64::max).min(HOUR)
    }

    /// Expects a call that has to wait.
    pub(super) fn expect(&mut self, charge: Charge) {
        for (resource, limit) in &mut self.limits {
            limit.expect(resource.cost(charge));
        }
    }

    /// Takes `charge` for the call of that `order`, and returns the levels after it.
    #[inline]
    pub(super) fn take(&mut self, now: Nanos, charge: Charge, order: u64) -> Levels {
        let mut levels = Levels::default();
        for (resource, limit) in &mut self.limits {
            let needed = resource.of(charge);
            if limit.most(needed) < needed {
                self.exceeded.push(exceeded(*resource, needed, limit));
            }
            limit.take(now, resource.cost(charge), order);
            levels[*resource as usize] = limit.filled(now);
        }
        levels
    }

    /// Adapts the capacity of the limits to what was learned of them.
    pub(super) fn resize(&mut self, now: Nanos) {
        for (_, limit) in &mut self.limits {
            limit.resize(now);
        }
    }

    /// Takes everything back, for a call that was never sent.
    pub(super) fn refund(&mut self, now: Nanos, grant: &Grant) {
        for (resource, limit) in self.of_grant(grant) {
            limit.refund(now, resource.cost(grant.charge), grant.at);
        }
    }

    /// Settles tokens to the `actual` use. The request itself stays charged.
    #[inline]
    pub(super) fn settle(&mut self, now: Nanos, grant: &Grant, actual: Charge) {
        for (resource, limit) in &mut self.limits {
            if !limit.existed_at(grant.at) {
                continue;
            }
            let (estimated, used) = (resource.of(grant.charge), resource.of(actual));
            let charged = limit.most(used);
            if charged < used && limit.most(estimated) == estimated {
                // Otherwise it was recorded when the call was granted.
                self.exceeded.push(exceeded(*resource, used, limit));
            }
            limit.settle(now, resource.cost(grant.charge), charged);
        }
    }

    /// Records an answer that was charged when it ended.
    pub(super) fn record_answer(&mut self, now: Nanos, grant: &Grant, actual: Charge) {
        for (resource, limit) in &mut self.limits {
            let cost = limit.capped(resource.cost(grant.charge));
            let actual = limit.most(resource.of(actual));
            limit.record_answer(now, cost, actual, grant.at);
        }
    }

    /// Returns the charges that exceeded a minute of their limit since the last call of this.
    pub(super) fn take_exceeded(&mut self) -> Vec<Exceeded> {
        std::mem::take(&mut self.exceeded)
    }

    pub(super) fn stand_still_until(&mut self, now: Nanos, until: Nanos) {
        for (_, limit) in &mut self.limits {
            limit.stand_still_until(now, until);
        }
    }

    /// Lets the limits refill from now on that would stand still until later.
    pub(super) fn resume(&mut self, now: Nanos) {
        for (_, limit) in &mut self.limits {
            limit.resume(now);
        }
    }

    /// Applies the headers of a reply: levels are corrected, and limits that are not configured are adopted. Returns the news.
    pub(super) fn apply_headers(
        &mut self,
        now: Nanos,
        reply: &Headers<'_>,
        burst: Burst,
        cooldown_until: Nanos,
    ) -> Vec<Learned> {
        let Headers {
            headers,
            grant,
            refundable,
            next_order,
        } = *reply;
        let mut learned = Vec::new();
        for resource in Resource::ALL {
            let Some(quota) = resource.quota(headers) else {
                continue;
            };
            let advertised = headers::per_minute(quota);
            if let Some(rate) = advertised
                && self.enabled.has(Policy::AdoptedLimits)
                && self.adopt(now, resource, rate, burst, cooldown_until)
            {
                learned.push(Learned::Limit(resource, rate));
            }
            let lowers = self.enabled.has(Policy::HeaderLevels);
            if let (Some(limit), Some(left)) = (self.get_mut(resource), quota.remaining) {
                let filled = grant.levels[resource as usize];
                if lowers {
                    limit.lower(now, left, grant.at, filled);
                }
                let answered = Answered {
                    order: grant.order,
                    next_order,
                    advertised,
                    filled,
                    refundable: match resource {
                        Resource::Requests => 0,
                        _ => resource.of(refundable),
                    },
                };
                let stored = limit.on_headers(now, quota, &answered);
                learned.extend(stored.map(|stored| Learned::Burst(resource, stored)));
            }
        }
        learned
    }

    /// Learns from the success of a call, where no headers tell what is left.
    pub(super) fn on_success(&mut self, now: Nanos, grant: &Grant, next_order: u64) {
        for (_, limit) in self.of_grant(grant) {
            limit.on_bare_reply(now, grant.order, next_order);
        }
    }

    /// The bursts that the provider is seen to store.
    pub(super) fn bursts(&self) -> Vec<BurstSnapshot> {
        let bursts = self.limits.iter().filter_map(|(resource, limit)| {
            let (stored, usable) = limit.stored_burst()?;
            let limit = resource.binding();
            Some(BurstSnapshot {
                limit,
                stored,
                usable,
            })
        });
        bursts.collect()
    }

    /// Keeps an advertised limit, unless one is configured. Returns whether it is news.
    fn adopt(
        &mut self,
        now: Nanos,
        resource: Resource,
        rate: Rate,
        burst: Burst,
        cooldown_until: Nanos,
    ) -> bool {
        let enabled = self.enabled;
        match self.get_mut(resource) {
            Some(limit) if limit.source() == Source::Configured => false,
            Some(limit) if limit.source() == Source::Advertised && limit.rate() == rate => false,
            Some(limit) => {
                limit.retune(now, Source::Advertised, rate, burst);
                true
            }
            None => {
                let mut limit = Limit::new(Source::Advertised, rate, burst, now, enabled);
                // It is not unused: the call that revealed it has used it.
                limit.stand_still_until(now, cooldown_until);
                self.insert(resource, limit);
                true
            }
        }
    }

    /// Records that a granted call was refused. Slows down the resource that the headers name,
    /// else the one that is nearest empty, else requests: at the rate `estimate` if they had no limit. Returns the resource
    /// that was slowed down.
    pub(super) fn record_refusal(
        &mut self,
        now: Nanos,
        grant: &Grant,
        estimate: impl FnOnce() -> (Rate, Burst),
    ) -> Option<Reduced> {
        let resource = grant.throttled.map(|it| it.resource).or_else(|| {
            let fullness = self.limits.iter().map(|(r, it)| (r, it.fullness(now)));
            let emptiest = fullness.min_by(|(_, a), (_, b)| a.total_cmp(b));
            emptiest.map(|(resource, _)| *resource)
        });
        let resource = match resource.filter(|resource| self.get(*resource).is_some()) {
            Some(resource) => resource,
            // Calls that are spaced apart are requests that are limited.
            None if self.get(Resource::Requests).is_none()
                && self.get(Resource::Spacing).is_some() =>
            {
                Resource::Spacing
            }
            None => Resource::Requests,
        };
        let throttled = grant.throttled.filter(|it| it.resource == resource);
        if self.get(resource).is_none() && self.enabled.has(Policy::RateControl) {
            let (rate, burst) = estimate();
            let limit = Limit::new(Source::Estimated, rate, burst, now, self.enabled);
            self.insert(resource, limit);
        }
        let limit = self.get_mut(resource)?;
        let tried = limit.rate_factor();
        let refused = Refused {
            sent_at: grant.at,
            units: limit.capped(resource.cost(grant.charge)).upfront,
            explained: throttled.is_some(),
            advertised: throttled.and_then(|it| it.rate),
        };
        let reduced = limit.record_refusal(now, &refused);
        reduced.then(|| Reduced {
            resource,
            tried,
            factor: limit.rate_factor(),
        })
    }

    /// Takes back the reductions of a limit since `factor` was in use: the limit is not the reason for the
    /// refusals. A limit that was only estimated from them is dropped.
    pub(super) fn restore(&mut self, now: Nanos, resource: Resource, factor: f64) {
        self.limits
            .retain(|(_, limit)| limit.source() != Source::Estimated);
        if let Some(limit) = self.get_mut(resource) {
            limit.restore(now, factor);
        }
    }

    /// Whether at least half of each limit is left, so that a refusal is hardly for one of them.
    pub(super) fn are_half_full(&self, now: Nanos) -> bool {
        self.limits
            .iter()
            .all(|(_, limit)| limit.fullness(now) >= 0.5)
    }

    /// The smallest factor of a limit that is configured or advertised.
    pub(super) fn rate_factor(&self) -> f64 {
        let known = self.limits.iter().map(|(_, limit)| limit);
        let known = known.filter(|limit| limit.source() != Source::Estimated);
        known.map(Limit::rate_factor).fold(1.0, f64::min)
    }

    /// The limit on requests in a minute that is kept now.
    pub(super) fn requests_per_minute(&self) -> Option<f64> {
        let limit = self.get(Resource::Requests)?;
        Some(limit.rate().per_second() * 60.0 * limit.rate_factor())
    }

    /// Changes the limits. One that existed before keeps its level, a new one is unused
    /// unless the lane cools down; one that was learned stays.
    pub(super) fn retune(&mut self, now: Nanos, pace: &Pace, cooldown_until: Nanos) {
        self.enabled = pace.policies;
        let adaptive = pace.policies != PolicySet::NONE;
        for resource in Resource::ALL {
            match (self.get_mut(resource), resource.limit(pace)) {
                (Some(limit), Some((rate, burst))) => {
                    limit.retune(now, Source::Configured, rate, burst);
                }
                (Some(limit), None) if limit.source() != Source::Configured && adaptive => {}
                (_, None) => self.limits.retain(|(other, _)| *other != resource),
                (None, Some((rate, burst))) => {
                    let mut limit = Limit::new(Source::Configured, rate, burst, now, pace.policies);
                    if cooldown_until > now {
                        limit.stand_still_until(now, cooldown_until);
                    }
                    self.insert(resource, limit);
                }
            }
        }
    }

    /// The limits from which `grant` was taken.
    fn of_grant(&mut self, grant: &Grant) -> impl Iterator<Item = (Resource, &mut Limit)> {
        let at = grant.at;
        let limits = self.limits.iter_mut();
        let limits = limits.filter(move |(_, limit)| limit.existed_at(at));
        limits.map(|(resource, limit)| (*resource, limit))
    }

    fn get(&self, resource: Resource) -> Option<&Limit> {
        let mut limits = self.limits.iter();
        limits.find_map(|(other, limit)| (*other == resource).then_some(limit))
    }

    fn get_mut(&mut self, resource: Resource) -> Option<&mut Limit> {
        let mut limits = self.limits.iter_mut();
        limits.find_map(|(other, limit)| (*other == resource).then_some(limit))
    }

    /// Adds a limit for a resource that has none.
    fn insert(&mut self, resource: Resource, limit: Limit) {
        let index = self.limits.partition_point(|(other, _)| *other < resource);
        self.limits.insert(index, (resource, limit));
    }
}

fn exceeded(resource: Resource, needed: u64, limit: &Limit) -> Exceeded {
    Exceeded {
        resource,
        needed,
        per_minute: limit.rate().minute(),
    }
}
