//! How granted calls end, and what their ends say of the limits.

use std::time::Duration;

use super::{GrantId, Scheduler, Wakeups};
use crate::error::{Error, ErrorKind, Persistence};
use crate::event::Event;
use crate::ratelimit::adaptive::Policy;
use crate::ratelimit::adaptive::refusals::Reduction;
use crate::ratelimit::bucket::{Nanos, nanos};
use crate::ratelimit::concurrency::Refusal;
use crate::ratelimit::cooldown::LONGEST_RETRY_AFTER;
use crate::ratelimit::limits::{Grant, Headers, Learned, Reduced, ThrottledResource};
use crate::ratelimit::types::{CallOutcome, Charge};
use crate::usage::RateSnapshot;

/// The longest wait after a refusal that names none.
const LONGEST_THROTTLE: Duration = Duration::from_secs(30);
/// Overload passes sooner than a minute's limit, and costs each call an attempt.
const LONGEST_OVERLOAD: Duration = Duration::from_secs(5);

impl<W: Clone> Scheduler<W> {
    /// Applies the headers of the reply to a granted call, unless those of a later call are known already.
    pub(in crate::ratelimit) fn observe(
        &mut self,
        now: Nanos,
        id: &GrantId,
        headers: &RateSnapshot,
        wakeups: &mut Wakeups<W>,
    ) -> Vec<Event> {
        let adaptive = self.is_adaptive();
        let call = self.concurrency.get_mut(id.0);
        let grant = &mut call.grant;
        grant.throttled = ThrottledResource::of(headers, grant.charge);
        if !adaptive || grant.at < self.observed {
            return Vec::new();
        }
        if grant.charge.output_deferred {
            // A part of the charge is not in the level yet: the headers wait until the call has ended.
            call.headers = Some(Box::new(headers.clone()));
            return Vec::new();
        }
        let grant = *grant;
        self.advance(now);
        let events = self.apply_headers(now, &grant, grant.charge, headers);
        self.pump(now, wakeups);
        events
    }

    fn apply_headers(
        &mut self,
        now: Nanos,
        grant: &Grant,
        refundable: Charge,
        headers: &RateSnapshot,
    ) -> Vec<Event> {
        self.observed = self.observed.max(grant.at);
        let reply = Headers {
            headers,
            grant,
            refundable,
            next_order: self.granted,
        };
        let learned = self
            .limits
            .apply_headers(now, &reply, self.burst, self.cooldown.until());
        let events = learned.into_iter().map(|learned| match learned {
            Learned::Limit(resource, rate) => Event::LaneRetuned {
                limit: resource.binding().as_str(),
                per_minute: (rate.per_second() * 60.0).round() as u64,
            },
            Learned::Burst(resource, stored) => Event::LaneBurstLearned {
                limit: resource.binding().as_str(),
                stored,
            },
        });
        events.collect()
    }

    /// Ends a granted call, with the headers of its reply if they were not [observed](Scheduler::observe) before. Returns
    /// what that changes for all callers.
    pub(in crate::ratelimit) fn finish(
        &mut self,
        now: Nanos,
        id: GrantId,
        headers: Option<&RateSnapshot>,
        outcome: CallOutcome,
        wakeups: &mut Wakeups<W>,
    ) -> Vec<Event> {
        let mut grant = self.concurrency.get_mut(id.0).grant;
        if let Some(headers) = headers {
            grant.throttled = ThrottledResource::of(headers, grant.charge);
        }
        let newest = self.is_adaptive() && grant.at >= self.observed;
        let headers = headers.filter(|_| newest);
        // Those of a refusal say what was refused. Those of a reply are about a level that already contains its charge.
        let settles_first =
            grant.charge.output_deferred || matches!(outcome, CallOutcome::Succeeded { .. });
        let estimated = grant.charge;
        let mut events = Vec::new();
        self.advance(now);
        if let Some(headers) = headers.filter(|_| !settles_first) {
            events = self.apply_headers(now, &grant, grant.charge, headers);
        }
        match outcome.charge(estimated) {
            None => self.limits.refund(now, &grant),
            Some(actual) => self.limits.settle(now, &grant, actual),
        }
        match outcome {
            CallOutcome::NotSent | CallOutcome::Abandoned | CallOutcome::Failed { .. } => {}
            CallOutcome::Succeeded { usage } => {
                if let Some(usage) = usage.filter(|_| estimated.output_deferred) {
                    self.limits.record_answer(now, &grant, usage.into());
                }
                self.cooldown.record_success(grant.at);
                self.concurrency
                    .record_success(now, grant.at, grant.in_flight);
                self.probing.take_if(|probing| probing.since <= grant.at);
            }
            CallOutcome::Throttled { wait } => {
                self.throttled += 1;
                if self.throttle(now, &grant, wait, &mut events) {
                    self.start_cooldown(now, grant.at, wait, LONGEST_THROTTLE, &mut events);
                }
                if let Some(wait) = wait.filter(|wait| *wait > LONGEST_RETRY_AFTER) {
                    self.park(now, wait, wakeups, &mut events);
                }
            }
            CallOutcome::Overloaded { wait } => {
                self.overloaded += 1;
                if self.overload(now, &grant, &mut events) {
                    self.start_cooldown(now, grant.at, wait, LONGEST_OVERLOAD, &mut events);
                }
            }
        }
        let call = self.release(id.0);
        self.end_of_tenant(now, &call, outcome);
        let late = headers.filter(|_| settles_first);
        if let Some(headers) = late.or(call.headers.as_deref()) {
            events.extend(self.apply_headers(now, &grant, Charge::default(), headers));
        }
        if let CallOutcome::Succeeded { .. } = outcome {
            self.limits.on_success(now, &grant, self.granted);
        }
        for exceeded in self.limits.take_exceeded() {
            events.push(Event::CallExceedsLimit {
                limit: exceeded.resource.binding().as_str(),
                needed: exceeded.needed,
                per_minute: exceeded.per_minute,
            });
        }
        self.pump(now, wakeups);
        events
    }

    /// Records that the provider was overloaded. Returns whether most calls are refused, so that the lane should cool down.
    ///
    /// A single overload says nothing: it costs its own call an attempt and has no other consequence.
    fn overload(&mut self, now: Nanos, grant: &Grant, events: &mut Vec<Event>) -> bool {
        let granted = self.granted;
        let tolerates = !self.is_adaptive() || self.policies.has(Policy::OverloadTolerance);
        let overloads = &mut self.overloads;
        let random = overloads.is_random();
        let mut tolerated = || overloads.tolerates(now, granted) && tolerates;
        let reduces = self.policies.has(Policy::ConcurrencyControl);
        let refusal = match reduces {
            true => {
                self.concurrency
                    .record_refusal(now, grant.at, grant.in_flight, random, tolerated)
            }
            false if tolerated() => Refusal::Tolerated,
            false => Refusal::Reduced {
                tried: self.concurrency.used(),
                recovered: true,
            },
        };
        if reduces && refusal != Refusal::Tolerated {
            let in_flight = self.concurrency.limit();
            events.push(Event::LaneConcurrencyReduced { in_flight });
        }
        let (tried, recovered, below) = match refusal {
            Refusal::Tolerated | Refusal::Cohort => return false,
            Refusal::Probe => (grant.in_flight, false, false),
            Refusal::Reduced { tried, recovered } => (tried, recovered, true),
        };
        let reduction = Reduction {
            granted,
            tried: tried as f64,
            in_flight: true,
            recovered,
        };
        if self.policies.has(Policy::NoiseDetection)
            && let Some(before) = self.overloads.record_reduction(reduction)
        {
            self.concurrency.restore(before as usize);
        }
        below && self.overloads.is_majority()
    }

    /// Records a refusal by a rate limit, or for the number in flight. Returns whether the lane should cool down.
    fn throttle(
        &mut self,
        now: Nanos,
        grant: &Grant,
        wait: Option<Duration>,
        events: &mut Vec<Event>,
    ) -> bool {
        let explained = grant.throttled.is_some();
        if !self.is_adaptive() {
            return true;
        }
        if !explained && self.throttles.tolerates(now, self.granted) {
            return false;
        }
        let detects_noise = self.policies.has(Policy::NoiseDetection);
        if self.is_over_limit(now, grant, wait) {
            let refusal = self.concurrency.over_limit(now, grant.at, grant.in_flight);
            let in_flight = self.concurrency.limit();
            events.push(Event::LaneConcurrencyReduced { in_flight });
            let Refusal::Reduced { tried, recovered } = refusal else {
                return false;
            };
            let reduction = Reduction {
                granted: self.granted,
                tried: tried as f64,
                in_flight: true,
                recovered,
            };
            if detects_noise && let Some(before) = self.throttles.record_reduction(reduction) {
                self.concurrency.restore(before as usize);
            }
        } else if let Some(reduced) = self.reduce_rate(now, grant, events)
            && !explained
        {
            let reduction = Reduction {
                granted: self.granted,
                tried: reduced.tried,
                in_flight: false,
                recovered: false,
            };
            if detects_noise && let Some(before) = self.throttles.record_reduction(reduction) {
                self.limits.restore(now, reduced.resource, before);
            }
        }
        true
    }

    /// Whether a call was refused for the number in flight: the refusal names neither a wait nor a resource, no rate is near
    /// its end, and most of the calls that are allowed are in flight.
    fn is_over_limit(&self, now: Nanos, grant: &Grant, wait: Option<Duration>) -> bool {
        let unexplained = grant.throttled.is_none() && wait.is_none();
        let many = || self.concurrency.is_mostly_used() && self.limits.are_half_full(now);
        self.policies.has(Policy::ThrottledConcurrency)
            && unexplained
            && (self.concurrency.was_over_limit(grant.at) || many())
    }

    /// Uses the refused limit more slowly; where no limit was known, one that is estimated.
    fn reduce_rate(
        &mut self,
        now: Nanos,
        grant: &Grant,
        events: &mut Vec<Event>,
    ) -> Option<Reduced> {
        let estimate = || (self.throughput.rate(now), self.burst);
        let reduced = self.limits.record_refusal(now, grant, estimate);
        events.extend(reduced.map(|reduced| Event::LaneSlowed {
            limit: reduced.resource.binding().as_str(),
            factor: reduced.factor,
        }));
        reduced
    }

    /// Starts or extends the cooldown, and empties the limits until it ends: the calls that wait for it then go at the
    /// rate of the lane, not all at once.
    fn start_cooldown(
        &mut self,
        now: Nanos,
        granted_at: Nanos,
        wait: Option<Duration>,
        longest: Duration,
        events: &mut Vec<Event>,
    ) {
        let before = self.cooldown.until();
        self.cooldown
            .record_refusal(now, granted_at, self.granted, wait, longest);
        let until = self.cooldown.until();
        self.limits.stand_still_until(now, until);
        if until > before {
            let wait = Duration::from_nanos(until - now);
            events.push(Event::LaneCoolingDown { wait });
        }
    }

    /// Stops the lane for as long as the provider asks: too long to keep callers waiting. Only a lane without a `Context`
    /// is parked: a context reports a call with such a wait as failed, because it may concern that request alone.
    fn park(
        &mut self,
        now: Nanos,
        wait: Duration,
        wakeups: &mut Wakeups<W>,
        events: &mut Vec<Event>,
    ) {
        let message = "the provider asks to wait so long that the lane is parked";
        let why = Error::new(ErrorKind::Throttled, message)
            .with_wait(wait)
            .with_persistence(Persistence::Exhausted);
        events.push(Event::LaneStopped { error: why.clone() });
        self.stop(why, Some(now.saturating_add(nanos(wait))), wakeups);
    }
}
