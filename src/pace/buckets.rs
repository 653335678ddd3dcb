//! [`Buckets`]: every rate limit of a lane, taken from all at once or not at all.

use std::time::Duration;

use super::bucket::Rate;
use super::headers;
use super::limits::Pace;
use super::meter::{Burst, Meter, Source};
use super::words::{Binding, Charge};
use crate::usage::{Quota, RateSnapshot};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    pub(super) fn of(self, charge: Charge) -> u64 {
        match self {
            Self::Spacing | Self::Requests => 1,
            Self::Tokens => charge.input.saturating_add(charge.output),
            Self::InputTokens => charge.input,
            Self::OutputTokens => charge.output,
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
            (left < resource.of(charge).max(1)).then_some((*resource, part))
        };
        let (resource, _) = Resource::ALL
            .iter()
            .filter_map(short)
            .min_by(|(_, a), (_, b)| a.total_cmp(b))?;
        let rate = resource.quota(said).and_then(headers::per_minute);
        Some(Self { resource, rate })
    }
}

/// One meter for each limited resource, in the order of [`Resource::ALL`].
#[derive(Debug)]
pub(super) struct Buckets([Option<Meter>; Resource::ALL.len()]);

/// How much was left of each limit when a call had been granted.
pub(super) type Mark = [u64; Resource::ALL.len()];

impl Buckets {
    pub(super) fn new(pace: &Pace, now: Duration) -> Self {
        Self(Resource::ALL.map(|resource| {
            let (rate, burst) = resource.limit(pace)?;
            Some(Meter::new(Source::Configured, rate, burst, now))
        }))
    }

    /// Passes the time until `now`, in which somebody waited or nobody did.
    pub(super) fn advance(&mut self, now: Duration, waited: bool) {
        for (_, meter) in self.iter_mut() {
            meter.advance(now, waited);
        }
    }

    /// When all of `charge` can be taken, and which resource comes last: `now` and
    /// nothing, or later.
    pub(super) fn ready_at(&self, now: Duration, charge: Charge) -> (Duration, Binding) {
        let mut last = (now, Binding::Nothing);
        for (resource, meter) in self.iter() {
            let ready_at = meter.ready_at(now, resource.of(charge));
            if ready_at > last.0 {
                last = (ready_at, resource.binding());
            }
        }
        last
    }

    /// Whether `first` could be taken now without keeping `head` beyond `until`.
    pub(super) fn leaves_room(
        &self,
        now: Duration,
        first: Charge,
        head: Charge,
        until: Duration,
    ) -> bool {
        self.iter().all(|(resource, meter)| {
            let (first, head) = (resource.of(first), resource.of(head));
            meter.ready_at(now, first) <= now && meter.ready_after(now, first, head) <= until
        })
    }

    /// What `charge` takes of the scarcest limit: nanoseconds of its rate.
    pub(super) fn cost(&self, charge: Charge) -> u64 {
        let costs = self.iter().map(|(resource, meter)| {
            let time = meter.rate().time_for(resource.of(charge));
            u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
        });
        // An hour is as good as for ever, and sums of hours overflow nothing.
        costs.fold(1, u64::max).min(3_600_000_000_000)
    }

    pub(super) fn take(&mut self, now: Duration, charge: Charge) {
        for (resource, meter) in self.iter_mut() {
            meter.take(now, resource.of(charge));
        }
    }

    pub(super) fn mark(&self, now: Duration) -> Mark {
        let level = |meter: &Option<Meter>| meter.as_ref().map_or(0, |meter| meter.level(now));
        std::array::from_fn(|i| level(&self.0[i]))
    }

    /// Lets every bucket hold as much as goes with what was learned of its limit.
    pub(super) fn resize(&mut self, now: Duration) {
        for (_, meter) in self.iter_mut() {
            meter.resize(now);
        }
    }

    /// Takes everything back, for a call that was never sent.
    pub(super) fn refund(&mut self, now: Duration, charge: Charge, taken_at: Duration) {
        for (resource, meter) in self.iter_mut().filter(|(_, m)| m.knows(taken_at)) {
            meter.refund(now, resource.of(charge), taken_at);
        }
    }

    /// Settles tokens to what was used. The request itself stays charged.
    pub(super) fn settle(
        &mut self,
        now: Duration,
        charge: Charge,
        actual: Charge,
        taken_at: Duration,
    ) {
        for (resource, meter) in self.iter_mut().filter(|(_, m)| m.knows(taken_at)) {
            meter.settle(now, resource.of(charge), resource.of(actual));
        }
    }

    pub(super) fn close_until(&mut self, now: Duration, until: Duration) {
        for (_, meter) in self.iter_mut() {
            meter.close_until(now, until);
        }
    }

    /// What a reply says of the limits, to a call granted when `mark` was left: levels are
    /// lowered, and limits that nobody has named are adopted. Says which were adopted.
    pub(super) fn observe(
        &mut self,
        now: Duration,
        said: &RateSnapshot,
        (granted_at, mark): (Duration, &Mark),
        burst: Burst,
        closed_until: Duration,
    ) -> Vec<(Resource, Rate)> {
        let mut adopted = Vec::new();
        for (i, resource) in Resource::ALL.into_iter().enumerate() {
            let Some(quota) = resource.quota(said) else {
                continue;
            };
            let slot = &mut self.0[i];
            if slot
                .as_ref()
                .is_none_or(|m| m.source() != Source::Configured)
                && let Some(rate) = headers::per_minute(quota)
                && slot
                    .as_ref()
                    .is_none_or(|m| m.source() != Source::Told || m.rate() != rate)
            {
                match slot {
                    Some(meter) => meter.retune(now, Source::Told, rate, burst),
                    None => {
                        let mut meter = Meter::new(Source::Told, rate, burst, now);
                        // It is not fresh: what revealed it has used it.
                        meter.close_until(now, closed_until);
                        *slot = Some(meter);
                    }
                }
                adopted.push((resource, rate));
            }
            if let (Some(meter), Some(left)) = (slot, quota.remaining) {
                meter.lower(now, left, granted_at, mark[i]);
            }
        }
        adopted
    }

    /// A call of `charge` sent at `sent_at` was refused. Slows down the resource that the headers name,
    /// else the one that is nearest empty, else requests: at the rate `guess` if
    /// they had none. Says which resource was slowed to which share.
    pub(super) fn refuse(
        &mut self,
        now: Duration,
        (sent_at, charge): (Duration, Charge),
        named: Option<Named>,
        guess: impl FnOnce() -> (Rate, Burst),
    ) -> Option<(Resource, f64)> {
        let resource = named.map(|named| named.resource).or_else(|| {
            let fullness = self.iter().map(|(r, meter)| (r, meter.fullness(now)));
            let emptiest = fullness.min_by(|(_, a), (_, b)| a.total_cmp(b));
            emptiest.map(|(resource, _)| resource)
        });
        let resource = match resource {
            // Calls spaced apart are requests that are limited.
            Some(resource) if self.0[resource as usize].is_some() => resource,
            _ if self.0[Resource::Requests as usize].is_none()
                && self.0[Resource::Spacing as usize].is_some() =>
            {
                Resource::Spacing
            }
            _ => Resource::Requests,
        };
        let told = named.filter(|named| named.resource == resource);
        let meter = self.0[resource as usize].get_or_insert_with(|| {
            let (rate, burst) = guess();
            Meter::new(Source::Guessed, rate, burst, now)
        });
        let lowered = meter.refuse(
            now,
            sent_at,
            resource.of(charge),
            told.and_then(|named| named.rate),
        );
        lowered.then(|| (resource, meter.scale()))
    }

    /// The smallest share of a limit that is used now because of refusals.
    pub(super) fn scale(&self) -> f64 {
        let named = self.iter().map(|(_, meter)| meter);
        let named = named.filter(|meter| meter.source() != Source::Guessed);
        named.map(Meter::scale).fold(1.0, f64::min)
    }

    /// The limit on requests in a minute that is kept now.
    pub(super) fn requests_per_minute(&self) -> Option<f64> {
        let meter = self.0[Resource::Requests as usize].as_ref()?;
        Some(meter.rate().per_second() * 60.0 * meter.scale())
    }

    /// Changes the limits. One that was there keeps its level, a new one is fresh
    /// unless the lane is closed until later; one that was learned stays.
    pub(super) fn retune(&mut self, now: Duration, pace: &Pace, closed_until: Duration) {
        for (slot, resource) in self.0.iter_mut().zip(Resource::ALL) {
            match (slot.as_mut(), resource.limit(pace)) {
                (Some(meter), Some((rate, burst))) => {
                    meter.retune(now, Source::Configured, rate, burst);
                }
                (Some(meter), None) if meter.source() != Source::Configured && pace.adaptive => {}
                (_, None) => *slot = None,
                (None, Some((rate, burst))) => {
                    let mut meter = Meter::new(Source::Configured, rate, burst, now);
                    if closed_until > now {
                        meter.close_until(now, closed_until);
                    }
                    *slot = Some(meter);
                }
            }
        }
    }

    fn iter(&self) -> impl Iterator<Item = (Resource, &Meter)> {
        let slots = Resource::ALL.into_iter().zip(&self.0);
        slots.filter_map(|(resource, slot)| Some((resource, slot.as_ref()?)))
    }

    fn iter_mut(&mut self) -> impl Iterator<Item = (Resource, &mut Meter)> {
        let slots = Resource::ALL.into_iter().zip(&mut self.0);
        slots.filter_map(|(resource, slot)| Some((resource, slot.as_mut()?)))
    }
}
