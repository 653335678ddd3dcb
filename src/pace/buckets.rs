//! [`Buckets`]: every rate limit of a lane, taken from all at once or not at all.

use std::time::Duration;

use super::bucket::{Bucket, Rate};
use super::limits::Pace;
use super::words::{Binding, Charge};

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

    fn binding(self) -> Binding {
        match self {
            Self::Spacing => Binding::Spacing,
            Self::Requests => Binding::Requests,
            Self::Tokens => Binding::Tokens,
            Self::InputTokens => Binding::InputTokens,
            Self::OutputTokens => Binding::OutputTokens,
        }
    }

    /// What `pace` says of this resource: its rate, and the burst that goes with it.
    pub(super) fn limit(self, pace: &Pace) -> Option<(Rate, Duration)> {
        let rate = match self {
            Self::Spacing => return Some((pace.spacing?, Duration::ZERO)),
            Self::Requests => pace.requests,
            Self::Tokens => pace.tokens,
            Self::InputTokens => pace.input_tokens,
            Self::OutputTokens => pace.output_tokens,
        };
        Some((rate?, pace.burst))
    }
}

/// One bucket for each limited resource, in the order of [`Resource::ALL`].
#[derive(Debug)]
pub(super) struct Buckets([Option<Bucket>; Resource::ALL.len()]);

impl Buckets {
    pub(super) fn new(pace: &Pace, now: Duration) -> Self {
        Self(Resource::ALL.map(|resource| {
            let (rate, burst) = resource.limit(pace)?;
            Some(Bucket::new(rate, burst, now))
        }))
    }

    /// When all of `charge` can be taken, and which resource comes last: `now` and
    /// nothing, or later.
    pub(super) fn ready_at(&self, now: Duration, charge: Charge) -> (Duration, Binding) {
        let mut last = (now, Binding::Nothing);
        for (resource, bucket) in self.iter() {
            let ready_at = bucket.ready_at(now, resource.of(charge));
            if ready_at > last.0 {
                last = (ready_at, resource.binding());
            }
        }
        last
    }

    pub(super) fn take(&mut self, now: Duration, charge: Charge) {
        for (resource, bucket) in self.iter_mut() {
            bucket.take(now, resource.of(charge));
        }
    }

    /// Takes everything back, for a call that was never sent.
    pub(super) fn refund(&mut self, now: Duration, charge: Charge, taken_at: Duration) {
        for (resource, bucket) in self.iter_mut().filter(|(_, b)| b.knows(taken_at)) {
            bucket.refund(now, resource.of(charge), taken_at);
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
        for (resource, bucket) in self.iter_mut().filter(|(_, b)| b.knows(taken_at)) {
            bucket.settle(now, resource.of(charge), resource.of(actual));
        }
    }

    pub(super) fn drain_until(&mut self, now: Duration, until: Duration) {
        for (_, bucket) in self.iter_mut() {
            bucket.drain_until(now, until);
        }
    }

    /// Changes the limits. A bucket that was there keeps its level, a new one is
    /// full unless the lane is closed until later.
    pub(super) fn retune(&mut self, now: Duration, pace: &Pace, closed_until: Duration) {
        for (slot, resource) in self.0.iter_mut().zip(Resource::ALL) {
            let limit = resource.limit(pace);
            match (slot.as_mut(), limit) {
                (Some(bucket), Some((rate, burst))) => bucket.retune(now, rate, burst),
                (_, None) => *slot = None,
                (None, Some((rate, burst))) => {
                    let mut bucket = Bucket::new(rate, burst, now);
                    if closed_until > now {
                        bucket.drain_until(now, closed_until);
                    }
                    *slot = Some(bucket);
                }
            }
        }
    }

    fn iter(&self) -> impl Iterator<Item = (Resource, &Bucket)> {
        let slots = Resource::ALL.into_iter().zip(&self.0);
        slots.filter_map(|(resource, slot)| Some((resource, slot.as_ref()?)))
    }

    fn iter_mut(&mut self) -> impl Iterator<Item = (Resource, &mut Bucket)> {
        let slots = Resource::ALL.into_iter().zip(&mut self.0);
        slots.filter_map(|(resource, slot)| Some((resource, slot.as_mut()?)))
    }
}
