//! [`Buckets`]: every rate limit of a lane, taken from all at once or not at all.

use std::time::Duration;

use super::bucket::{Nanos, Rate};
use super::headers;
use super::limits::Pace;
use super::meter::{Burst, Meter, Share, Source};
use super::words::{Binding, Charge};
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
    fn share(self, charge: Charge) -> Share {
        if !charge.in_arrears {
            let due = self.of(charge);
            return Share { due, later: 0 };
        }
        let due = self.of(charge.on_admission());
        Share {
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
                    at_once: true,
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
pub(super) struct Named {
    resource: Resource,
    rate: Option<Rate>,
}

impl Named {
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
    fn of(resource: Resource, needed: u64, meter: &Meter) -> Self {
        Self {
            resource,
            needed,
            per_minute: meter.rate().minute(),
        }
    }
}

#[derive(Debug)]
pub(super) struct Buckets {
    /// One meter for each limited resource, in the order of [`Resource::ALL`].
    meters: Vec<(Resource, Meter)>,
    /// Charges that exceeded their limit since they were last asked for.
    exceeded: Vec<Exceeded>,
}

/// How much was left of each limit when a call had been granted, as time of its rate.
pub(super) type Mark = [Nanos; Resource::ALL.len()];

impl Buckets {
    pub(super) fn new(pace: &Pace, now: Nanos) -> Self {
        let meters = Resource::ALL.into_iter().filter_map(|resource| {
            let (rate, burst) = resource.limit(pace)?;
            let meter = Meter::new(Source::Configured, rate, burst, now);
            Some((resource, meter))
        });
        Self {
            meters: meters.collect(),
            exceeded: Vec::new(),
        }
    }

    /// Passes the time until `now`, in which somebody waited or nobody did.
    #[inline]
    pub(super) fn advance(&mut self, now: Nanos, waited: bool) {
        for (_, meter) in &mut self.meters {
            meter.advance(now, waited);
        }
    }

    /// When all of `charge` can be taken, and which resource comes last: `now` and
    /// nothing, or later; `None` is when a call in flight has ended.
    #[inline]
    pub(super) fn ready_at(&self, now: Nanos, charge: Charge) -> (Option<Nanos>, Binding) {
        let mut last = (now, Binding::Nothing);
        for (resource, meter) in &self.meters {
            let share = meter.capped(resource.share(charge));
            let Some(ready_at) = meter.ready_at(now, share) else {
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
        self.meters.iter().all(|(resource, meter)| {
            let [first, head] = [first, head].map(|charge| meter.capped(resource.share(charge)));
            first.later == 0
                && head.later == 0
                && meter.ready_at(now, first).is_some_and(|at| at <= now)
                && meter.ready_after(now, first.due, head.due) <= until
        })
    }

    /// What `charge` takes of the scarcest limit: nanoseconds of its rate.
    pub(super) fn cost(&self, charge: Charge) -> u64 {
        let costs = self
            .meters
            .iter()
            .map(|(resource, meter)| meter.rate().time_for(meter.most(resource.of(charge))));
        // An hour is as good as for ever, and sums of hours overflow nothing.
        costs.fold(1, u64::max).min(3_600_000_000_000)
    }

    /// Says what it leaves.
    #[inline]
    pub(super) fn take(&mut self, now: Nanos, charge: Charge) -> Mark {
        let mut mark = Mark::default();
        for (resource, meter) in &mut self.meters {
            let whole = resource.share(charge);
            let share = meter.capped(whole);
            if share != whole {
                let needed = resource.of(charge);
                self.exceeded.push(Exceeded::of(*resource, needed, meter));
            }
            meter.take(now, share);
            mark[*resource as usize] = meter.filled(now);
        }
        mark
    }

    /// Lets every bucket hold as much as goes with what was learned of its limit.
    pub(super) fn resize(&mut self, now: Nanos) {
        for (_, meter) in &mut self.meters {
            meter.resize(now);
        }
    }

    /// Takes everything back, for a call that was never sent.
    pub(super) fn refund(&mut self, now: Nanos, charge: Charge, taken_at: Nanos) {
        for (resource, meter) in self.meters.iter_mut().filter(|(_, m)| m.knows(taken_at)) {
            meter.refund(now, meter.capped(resource.share(charge)), taken_at);
        }
    }

    /// Settles tokens to what was used. The request itself stays charged.
    #[inline]
    pub(super) fn settle(&mut self, now: Nanos, charge: Charge, actual: Charge, taken_at: Nanos) {
        for (resource, meter) in self.meters.iter_mut().filter(|(_, m)| m.knows(taken_at)) {
            let (whole, used) = (resource.share(charge), resource.of(actual));
            let (share, charged) = (meter.capped(whole), meter.most(used));
            if charged != used && share == whole {
                // Otherwise it was noted when it was granted.
                self.exceeded.push(Exceeded::of(*resource, used, meter));
            }
            meter.settle(now, share, charged);
        }
    }

    /// An answer came: what such calls cost, where that is charged only then.
    pub(super) fn learn(&mut self, now: Nanos, charge: Charge, actual: Charge, taken_at: Nanos) {
        for (resource, meter) in &mut self.meters {
            let share = meter.capped(resource.share(charge));
            let actual = meter.most(resource.of(actual));
            meter.learn(now, share, actual, taken_at);
        }
    }

    /// The charges that exceeded a minute of their limit since this was last called.
    pub(super) fn take_exceeded(&mut self) -> Vec<Exceeded> {
        std::mem::take(&mut self.exceeded)
    }

    pub(super) fn close_until(&mut self, now: Nanos, until: Nanos) {
        for (_, meter) in &mut self.meters {
            meter.close_until(now, until);
        }
    }

    /// Lets the limits refill from now on that would stand still until later.
    pub(super) fn reopen(&mut self, now: Nanos) {
        for (_, meter) in &mut self.meters {
            meter.reopen(now);
        }
    }

    /// What a reply says of the limits, to a call granted when `mark` was left: levels are
    /// lowered, and limits that nobody has named are adopted. Says which were adopted.
    pub(super) fn observe(
        &mut self,
        now: Nanos,
        said: &RateSnapshot,
        (granted_at, mark): (Nanos, &Mark),
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
            let source = known.as_ref().map(|meter| meter.source());
            if source != Some(Source::Configured)
                && let Some(rate) = told
            {
                match known {
                    Some(meter) if source == Some(Source::Told) && meter.rate() == rate => {}
                    Some(meter) => {
                        meter.retune(now, Source::Told, rate, burst);
                        adopted.push((resource, rate));
                    }
                    None => {
                        let mut meter = Meter::new(Source::Told, rate, burst, now);
                        // It is not fresh: what revealed it has used it.
                        meter.close_until(now, closed_until);
                        self.insert(resource, meter);
                        adopted.push((resource, rate));
                    }
                }
            }
            if let (Some(meter), Some(left)) = (self.get_mut(resource), quota.remaining) {
                meter.lower(now, left, granted_at, mark[resource as usize]);
                if !burst.at_once {
                    meter.offer(now, headers::left_of_a_minute(quota), granted_at);
                }
                if let Some(limit) = told {
                    meter.compare(now, left, limit);
                }
            }
        }
        adopted
    }

    /// A call of `charge` sent at `sent_at` was refused. Slows down the resource that the headers name,
    /// else the one that is nearest empty, else requests: at the rate `guess` if
    /// they had none. Says which resource was slowed, and by how much.
    pub(super) fn refuse(
        &mut self,
        now: Nanos,
        (sent_at, charge): (Nanos, Charge),
        named: Option<Named>,
        guess: impl FnOnce() -> (Rate, Burst),
    ) -> Option<Slowed> {
        let resource = named.map(|named| named.resource).or_else(|| {
            let fullness = self
                .meters
                .iter()
                .map(|(r, meter)| (r, meter.fullness(now)));
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
            self.insert(resource, Meter::new(Source::Guessed, rate, burst, now));
        }
        let meter = self.get_mut(resource)?;
        let tried = meter.scale();
        let lowered = meter.refuse(
            now,
            sent_at,
            meter.capped(resource.share(charge)).due,
            told.and_then(|named| named.rate),
        );
        lowered.then(|| Slowed {
            resource,
            tried,
            scale: meter.scale(),
        })
    }

    /// Takes back the reductions of a limit since `share` of it was tried: it is not the reason for the
    /// refusals. One that was only guessed from them is none.
    pub(super) fn restore(&mut self, now: Nanos, resource: Resource, share: f64) {
        self.meters
            .retain(|(_, meter)| meter.source() != Source::Guessed);
        if let Some(meter) = self.get_mut(resource) {
            meter.restore(now, share);
        }
    }

    /// Whether a refusal is hardly for one of these limits: at least half of each is left.
    pub(super) fn are_half_full(&self, now: Nanos) -> bool {
        self.meters
            .iter()
            .all(|(_, meter)| meter.fullness(now) >= 0.5)
    }

    /// The smallest share of a limit that is used now because of refusals.
    pub(super) fn scale(&self) -> f64 {
        let named = self.meters.iter().map(|(_, meter)| meter);
        let named = named.filter(|meter| meter.source() != Source::Guessed);
        named.map(Meter::scale).fold(1.0, f64::min)
    }

    /// The limit on requests in a minute that is kept now.
    pub(super) fn requests_per_minute(&self) -> Option<f64> {
        let meter = self.get(Resource::Requests)?;
        Some(meter.rate().per_second() * 60.0 * meter.scale())
    }

    /// Changes the limits. One that was there keeps its level, a new one is fresh
    /// unless the lane is closed until later; one that was learned stays.
    pub(super) fn retune(&mut self, now: Nanos, pace: &Pace, closed_until: Nanos) {
        for resource in Resource::ALL {
            match (self.get_mut(resource), resource.limit(pace)) {
                (Some(meter), Some((rate, burst))) => {
                    meter.retune(now, Source::Configured, rate, burst);
                }
                (Some(meter), None) if meter.source() != Source::Configured && pace.adaptive => {}
                (_, None) => self.meters.retain(|(other, _)| *other != resource),
                (None, Some((rate, burst))) => {
                    let mut meter = Meter::new(Source::Configured, rate, burst, now);
                    if closed_until > now {
                        meter.close_until(now, closed_until);
                    }
                    self.insert(resource, meter);
                }
            }
        }
    }

    fn get(&self, resource: Resource) -> Option<&Meter> {
        let mut meters = self.meters.iter();
        meters.find_map(|(other, meter)| (*other == resource).then_some(meter))
    }

    fn get_mut(&mut self, resource: Resource) -> Option<&mut Meter> {
        let mut meters = self.meters.iter_mut();
        meters.find_map(|(other, meter)| (*other == resource).then_some(meter))
    }

    /// A meter for a resource that has none.
    fn insert(&mut self, resource: Resource, meter: Meter) {
        let place = self.meters.partition_point(|(other, _)| *other < resource);
        self.meters.insert(place, (resource, meter));
    }
}
