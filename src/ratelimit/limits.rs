//! [`LimitSet`]: every rate limit of a lane, taken from all at once or not at all.

use std::time::Duration;

use crate::ratelimit::adaptive::headers;
use crate::ratelimit::bucket::{Nanos, Rate};
use crate::ratelimit::limit::{Burst, Cost, Limit, Source};
use crate::ratelimit::pace::Pace;
use crate::ratelimit::types::{Binding, Charge};
use crate::usage::{Quota, RateSnapshot};

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

    /// How much of this resource a call takes.
    #[inline]
    pub(super) fn of(self, charge: Charge) -> u64 {
        match self {
            Self::Spacing | Self::Requests => 1,
            Self::Tokens => charge.input.saturating_add(charge.output),
            Self::InputTokens => charge.input,
            Self::OutputTokens => charge.output,
        }
    }

    /// The same, by when it is charged.
    #[inline]
    fn share(self, charge: Charge) -> Cost {
        if !charge.output_deferred {
            let due = self.of(charge);
            return Cost { due, later: 0 };
        }
        let due = self.of(charge.on_admission());
        Cost {
            due,
            later: self.of(charge) - due,
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

    /// What `pace` says of this resource: its rate, and the burst that goes with it.
    pub(super) fn limit(self, pace: &Pace) -> Option<(Rate, Burst)> {
        let rate = match self {
            Self::Spacing => {
                let burst = Burst {
                    time: Duration::ZERO,
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

    /// What the headers say of it.
    fn quota(self, said: &RateSnapshot) -> Option<&Quota> {
        match self {
            Self::Spacing => None,
            Self::Requests => Some(&said.requests),
            Self::Tokens => Some(&said.tokens),
            Self::InputTokens => Some(&said.input_tokens),
            Self::OutputTokens => Some(&said.output_tokens),
        }
    }
}

/// What the headers of a refusal say of why.
#[derive(Debug, Clone, Copy)]
pub(super) struct ThrottledResource {
    resource: Resource,
    rate: Option<Rate>,
}

impl ThrottledResource {
    /// The resource of which less is left than `charge` takes; of several the emptiest.
    pub(super) fn of(said: &RateSnapshot, charge: Charge) -> Option<Self> {
        let short = |resource: &Resource| {
            let quota = resource.quota(said)?;
            let left = quota.remaining?;
            let part = left as f64 / quota.limit.unwrap_or(1).max(1) as f64;
            (left < resource.of(charge.on_admission()).max(1)).then_some((*resource, part))
        };
        let (resource, _) = Resource::ALL
            .iter()
            .filter_map(short)
            .min_by(|(_, a), (_, b)| a.total_cmp(b))?;
        let rate = resource.quota(said).and_then(headers::per_minute);
        Some(Self { resource, rate })
    }
}

/// A limit that is used more slowly since a refusal.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slowed {
    pub(super) resource: Resource,
    /// The share of it that was used before.
    pub(super) tried: f64,
    /// The share that is used now.
    pub(super) scale: f64,
}

/// A charge that is more than a minute of its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Exceeded {
    pub(super) resource: Resource,
    pub(super) needed: u64,
    pub(super) per_minute: u64,
}

impl Exceeded {
    fn of(resource: Resource, needed: u64, limit: &Limit) -> Self {
        Self {
            resource,
            needed,
            per_minute: limit.rate().minute(),
        }
    }
}

#[derive(Debug)]
pub(super) struct LimitSet {
    /// One limit for each limited resource, in the order of [`Resource::ALL`].
    limits: Vec<(Resource, Limit)>,
    /// Charges that exceeded their limit since they were last asked for.
    exceeded: Vec<Exceeded>,
}

/// How much was left of each limit when a call had been granted, as time of its rate.
pub(super) type Levels = [Nanos; Resource::ALL.len()];

impl LimitSet {
    pub(super) fn new(pace: &Pace, now: Nanos) -> Self {
        let limits = Resource::ALL.into_iter().filter_map(|resource| {
            let (rate, burst) = resource.limit(pace)?;
            let limit = Limit::new(Source::Configured, rate, burst, now);
            Some((resource, limit))
        });
        Self {
            limits: limits.collect(),
            exceeded: Vec::new(),
        }
    }

    /// Passes the time until `now`, in which somebody waited or nobody did.
    #[inline]
    pub(super) fn advance(&mut self, now: Nanos, waited: bool) {
        for (_, limit) in &mut self.limits {
            limit.advance(now, waited);
        }
    }

    /// When all of `charge` can be taken, and which resource comes last: `now` and
    /// nothing, or later; `None` is when a call in flight has ended.
    #[inline]
    pub(super) fn ready_at(&self, now: Nanos, charge: Charge) -> (Option<Nanos>, Binding) {
        let mut last = (now, Binding::Nothing);
        for (resource, limit) in &self.limits {
            let share = limit.capped(resource.share(charge));
            let Some(ready_at) = limit.ready_at(now, share) else {
                return (None, resource.binding());
            };
            if ready_at > last.0 {
                last = (ready_at, resource.binding());
            }
        }
        (Some(last.0), last.1)
    }

    /// Whether `first` could be taken now without keeping `head` beyond `until`. What is
    /// charged later nobody passes: it is not known when that will be.
    pub(super) fn leaves_room(
        &self,
        now: Nanos,
        first: Charge,
        head: Charge,
        until: Nanos,
    ) -> bool {
        self.limits.iter().all(|(resource, limit)| {
            let [first, head] = [first, head].map(|charge| limit.capped(resource.share(charge)));
            first.later == 0
                && head.later == 0
                && limit.ready_at(now, first).is_some_and(|at| at <= now)
                && limit.ready_after(now, first.due, head.due) <= until
        })
    }

    /// What `charge` takes of the scarcest limit: nanoseconds of its rate.
    pub(super) fn cost(&self, charge: Charge) -> u64 {
        let costs = self
            .limits
            .iter()
            .map(|(resource, limit)| limit.rate().time_for(limit.most(resource.of(charge))));
        // An hour is as good as for ever, and sums of hours overflow nothing.
        costs.fold(1, u64::max).min(3_600_000_000_000)
    }

    /// Says what it leaves.
    #[inline]
    pub(super) fn take(&mut self, now: Nanos, charge: Charge) -> Levels {
        let mut levels = Levels::default();
        for (resource, limit) in &mut self.limits {
            let whole = resource.share(charge);
            let share = limit.capped(whole);
            if share != whole {
                let needed = resource.of(charge);
                self.exceeded.push(Exceeded::of(*resource, needed, limit));
            }
            limit.take(now, share);
            levels[*resource as usize] = limit.filled(now);
        }
        levels
    }

    /// Lets every bucket hold as much as goes with what was learned of its limit.
    pub(super) fn resize(&mut self, now: Nanos) {
        for (_, limit) in &mut self.limits {
            limit.resize(now);
        }
    }

    /// Takes everything back, for a call that was never sent.
    pub(super) fn refund(&mut self, now: Nanos, charge: Charge, taken_at: Nanos) {
        for (resource, limit) in self
            .limits
            .iter_mut()
            .filter(|(_, m)| m.existed_at(taken_at))
        {
            limit.refund(now, limit.capped(resource.share(charge)), taken_at);
        }
    }

    /// Settles tokens to what was used. The request itself stays charged.
    #[inline]
    pub(super) fn settle(&mut self, now: Nanos, charge: Charge, actual: Charge, taken_at: Nanos) {
        for (resource, limit) in self
            .limits
            .iter_mut()
            .filter(|(_, m)| m.existed_at(taken_at))
        {
            let (whole, used) = (resource.share(charge), resource.of(actual));
            let (share, charged) = (limit.capped(whole), limit.most(used));
            if charged != used && share == whole {
                // Otherwise it was noted when it was granted.
                self.exceeded.push(Exceeded::of(*resource, used, limit));
            }
            limit.settle(now, share, charged);
        }
    }

    /// An answer came: what such calls cost, where that is charged only then.
    pub(super) fn learn(&mut self, now: Nanos, charge: Charge, actual: Charge, taken_at: Nanos) {
        for (resource, limit) in &mut self.limits {
            let share = limit.capped(resource.share(charge));
            let actual = limit.most(resource.of(actual));
            limit.learn(now, share, actual, taken_at);
        }
    }

    /// The charges that exceeded a minute of their limit since this was last called.
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

    /// What a reply says of the limits, to a call granted when `mark` was left: levels are
    /// lowered, and limits that nobody has named are adopted. Says which were adopted.
    pub(super) fn observe(
        &mut self,
        now: Nanos,
        said: &RateSnapshot,
        (granted_at, levels): (Nanos, &Levels),
        burst: Burst,
        closed_until: Nanos,
    ) -> Vec<(Resource, Rate)> {
        let mut adopted = Vec::new();
        for resource in Resource::ALL {
            let Some(quota) = resource.quota(said) else {
                continue;
            };
            let told = headers::per_minute(quota);
            let known = self.get_mut(resource);
            let source = known.as_ref().map(|limit| limit.source());
            if source != Some(Source::Configured)
                && let Some(rate) = told
            {
                match known {
                    Some(limit) if source == Some(Source::Advertised) && limit.rate() == rate => {}
                    Some(limit) => {
                        limit.retune(now, Source::Advertised, rate, burst);
                        adopted.push((resource, rate));
                    }
                    None => {
                        let mut limit = Limit::new(Source::Advertised, rate, burst, now);
                        // It is not fresh: what revealed it has used it.
                        limit.stand_still_until(now, closed_until);
                        self.insert(resource, limit);
                        adopted.push((resource, rate));
                    }
                }
            }
            if let (Some(limit), Some(left)) = (self.get_mut(resource), quota.remaining) {
                limit.lower(now, left, granted_at, levels[resource as usize]);
                if !burst.full_at_start {
                    limit.offer(now, headers::left_of_a_minute(quota), granted_at);
                }
                if let Some(rate) = told {
                    limit.detect_contention(now, left, rate);
                }
            }
        }
        adopted
    }

    /// A call of `charge` sent at `sent_at` was refused. Slows down the resource that the headers name,
    /// else the one that is nearest empty, else requests: at the rate `guess` if
    /// they had none. Says which resource was slowed, and by how much.
    pub(super) fn record_refusal(
        &mut self,
        now: Nanos,
        (sent_at, charge): (Nanos, Charge),
        named: Option<ThrottledResource>,
        guess: impl FnOnce() -> (Rate, Burst),
    ) -> Option<Slowed> {
        let resource = named.map(|named| named.resource).or_else(|| {
            let fullness = self
                .limits
                .iter()
                .map(|(r, limit)| (r, limit.fullness(now)));
            let emptiest = fullness.min_by(|(_, a), (_, b)| a.total_cmp(b));
            emptiest.map(|(resource, _)| *resource)
        });
        let resource = match resource.filter(|resource| self.get(*resource).is_some()) {
            Some(resource) => resource,
            // Calls spaced apart are requests that are limited.
            None if self.get(Resource::Requests).is_none()
                && self.get(Resource::Spacing).is_some() =>
            {
                Resource::Spacing
            }
            None => Resource::Requests,
        };
        let told = named.filter(|named| named.resource == resource);
        if self.get(resource).is_none() {
            let (rate, burst) = guess();
            self.insert(resource, Limit::new(Source::Estimated, rate, burst, now));
        }
        let limit = self.get_mut(resource)?;
        let tried = limit.scale();
        let lowered = limit.record_refusal(
            now,
            sent_at,
            limit.capped(resource.share(charge)).due,
            told.and_then(|named| named.rate),
        );
        lowered.then(|| Slowed {
            resource,
            tried,
            scale: limit.scale(),
        })
    }

    /// Takes back the reductions of a limit since `share` of it was tried: it is not the reason for the
    /// refusals. One that was only guessed from them is none.
    pub(super) fn restore(&mut self, now: Nanos, resource: Resource, share: f64) {
        self.limits
            .retain(|(_, limit)| limit.source() != Source::Estimated);
        if let Some(limit) = self.get_mut(resource) {
            limit.restore(now, share);
        }
    }

    /// Whether a refusal is hardly for one of these limits: at least half of each is left.
    pub(super) fn are_half_full(&self, now: Nanos) -> bool {
        self.limits
            .iter()
            .all(|(_, limit)| limit.fullness(now) >= 0.5)
    }

    /// The smallest share of a limit that is used now because of refusals.
    pub(super) fn scale(&self) -> f64 {
        let named = self.limits.iter().map(|(_, limit)| limit);
        let named = named.filter(|limit| limit.source() != Source::Estimated);
        named.map(Limit::scale).fold(1.0, f64::min)
    }

    /// The limit on requests in a minute that is kept now.
    pub(super) fn requests_per_minute(&self) -> Option<f64> {
        let limit = self.get(Resource::Requests)?;
        Some(limit.rate().per_second() * 60.0 * limit.scale())
    }

    /// Changes the limits. One that was there keeps its level, a new one is fresh
    /// unless the lane is closed until later; one that was learned stays.
    pub(super) fn retune(&mut self, now: Nanos, pace: &Pace, closed_until: Nanos) {
        for resource in Resource::ALL {
            match (self.get_mut(resource), resource.limit(pace)) {
                (Some(limit), Some((rate, burst))) => {
                    limit.retune(now, Source::Configured, rate, burst);
                }
                (Some(limit), None) if limit.source() != Source::Configured && pace.adaptive => {}
                (_, None) => self.limits.retain(|(other, _)| *other != resource),
                (None, Some((rate, burst))) => {
                    let mut limit = Limit::new(Source::Configured, rate, burst, now);
                    if closed_until > now {
                        limit.stand_still_until(now, closed_until);
                    }
                    self.insert(resource, limit);
                }
            }
        }
    }

    fn get(&self, resource: Resource) -> Option<&Limit> {
        let mut limits = self.limits.iter();
        limits.find_map(|(other, limit)| (*other == resource).then_some(limit))
    }

    fn get_mut(&mut self, resource: Resource) -> Option<&mut Limit> {
        let mut limits = self.limits.iter_mut();
        limits.find_map(|(other, limit)| (*other == resource).then_some(limit))
    }

    /// A limit for a resource that has none.
    fn insert(&mut self, resource: Resource, limit: Limit) {
        let position = self.limits.partition_point(|(other, _)| *other < resource);
        self.limits.insert(position, (resource, limit));
    }
}
