//! How grants end, and what their ends say of the limits.

use std::time::Duration;

use super::{End, Grant, Scheduler, Wakeups};
use crate::error::{Error, ErrorKind, Persistence};
use crate::ratelimit::adaptive::refusals::Reduction;
use crate::ratelimit::bucket::{Nanos, nanos};
use crate::ratelimit::concurrency::Refusal;
use crate::ratelimit::limits::{Levels, Slowed, ThrottledResource};
use crate::ratelimit::types::{CallOutcome, Charge, LaneChange};
use crate::request::RateSnapshot;

/// The longest wait after a refusal that names none.
const LONGEST_THROTTLE: Duration = Duration::from_secs(30);
/// Overload passes sooner than a minute's limit, and costs each call an attempt.
const LONGEST_OVERLOAD: Duration = Duration::from_secs(5);
/// QueueKey is asked to wait longer than this is better told than left waiting.
const LONGEST_WAIT: Duration = Duration::from_secs(10 * 60);

impl<W: Clone> Scheduler<W> {
    /// What the headers of the reply to `grant`'s call say. They are left alone if those
    /// of a later call are known already.
    pub(in crate::ratelimit) fn observe(
        &mut self,
        now: Nanos,
        grant: &Grant,
        said: &RateSnapshot,
        wakeups: &mut Wakeups<W>,
    ) -> Vec<LaneChange> {
        let granted = self.concurrency.get_mut(grant.0);
        granted.named = ThrottledResource::of(said, granted.charge);
        if !self.adaptive || granted.at < self.observed {
            return Vec::new();
        }
        if granted.charge.output_deferred {
            granted.said = Some(Box::new(said.clone()));
            return Vec::new();
        }
        let (at, levels) = (granted.at, granted.levels);
        self.advance(now);
        let changes = self.apply_headers(now, at, &levels, said);
        self.pump(now, wakeups);
        changes
    }

    /// What is said to a call that was let through at `at` and left `mark` in the limits.
    fn apply_headers(
        &mut self,
        now: Nanos,
        at: Nanos,
        levels: &Levels,
        said: &RateSnapshot,
    ) -> Vec<LaneChange> {
        self.observed = self.observed.max(at);
        let closed_until = self.cooldown.until();
        let adopted = self
            .limits
            .observe(now, said, (at, levels), self.burst, closed_until);
        let told = adopted
            .into_iter()
            .map(|(resource, rate)| LaneChange::LimitAdopted {
                limit: resource.binding(),
                per_minute: (rate.per_second() * 60.0).round() as u64,
            });
        told.collect()
    }

    /// A grant comes back. Says what that changes for everybody.
    pub(in crate::ratelimit) fn finish(
        &mut self,
        now: Nanos,
        grant: Grant,
        end: End,
        wakeups: &mut Wakeups<W>,
    ) -> Vec<LaneChange> {
        let granted = self.concurrency.get_mut(grant.0);
        let (charge, at, named) = (granted.charge, granted.at, granted.named);
        let in_flight = granted.in_flight;
        let mut changes = Vec::new();
        self.advance(now);
        if let End::Finished(CallOutcome::Succeeded { .. }) = end {
            self.cooldown.record_success(at);
            self.concurrency.record_success(now, at, in_flight);
            self.probing.take_if(|probing| probing.since <= at);
        }
        match end {
            End::Unsent => self.limits.refund(now, charge, at),
            // Taken to have cost what was reserved.
            End::Abandoned
            | End::Finished(
                CallOutcome::Failed { usage: None } | CallOutcome::Succeeded { usage: None },
            ) => {
                self.limits.settle(now, charge, charge, at);
            }
            End::Finished(CallOutcome::Failed { usage: Some(usage) }) => {
                self.limits.settle(now, charge, usage.into(), at);
            }
            End::Finished(CallOutcome::Succeeded { usage: Some(usage) }) => {
                self.limits.settle(now, charge, usage.into(), at);
                if charge.output_deferred {
                    self.limits.learn(now, charge, usage.into(), at);
                }
            }
            End::Finished(CallOutcome::Throttled { wait }) => {
                self.throttled += 1;
                self.limits.settle(now, charge, Charge::default(), at);
                if self.throttle(now, (at, charge, in_flight), named, wait, &mut changes) {
                    self.close(now, at, wait, LONGEST_THROTTLE, &mut changes);
                }
                if let Some(wait) = wait.filter(|wait| *wait > LONGEST_WAIT) {
                    self.park(now, wait, wakeups, &mut changes);
                }
            }
            End::Finished(CallOutcome::Overloaded { wait }) => {
                self.overloaded += 1;
                let charged = charge.on_admission();
                self.limits.settle(now, charge, charged, at);
                if self.overload(now, at, in_flight, &mut changes) {
                    self.close(now, at, wait, LONGEST_OVERLOAD, &mut changes);
                }
            }
        }
        let granted = self.free_slot(grant.0);
        if let Some(said) = &granted.said {
            changes.extend(self.apply_headers(now, at, &granted.levels, said));
        }
        for exceeded in self.limits.take_exceeded() {
            changes.push(LaneChange::CallExceedsLimit {
                limit: exceeded.resource.binding(),
                needed: exceeded.needed,
                per_minute: exceeded.per_minute,
            });
        }
        self.pump(now, wakeups);
        changes
    }

    /// A call met an overloaded provider. Returns whether so many do that the lane should wait.
    ///
    /// A single overload says nothing: it costs its own call an attempt, and nobody else anything.
    fn overload(
        &mut self,
        now: Nanos,
        sent_at: Nanos,
        in_flight: usize,
        changes: &mut Vec<LaneChange>,
    ) -> bool {
        let granted = self.granted;
        let overloads = &mut self.overloads;
        let noisy = overloads.is_random();
        let mut tolerated = || overloads.add(now, granted);
        let refused = match self.adaptive {
            true => self
                .concurrency
                .record_refusal(now, sent_at, in_flight, noisy, tolerated),
            false if tolerated() => Refusal::Tolerated,
            false => Refusal::Reduced {
                tried: self.concurrency.used(),
                recovered: true,
            },
        };
        if self.adaptive && refused != Refusal::Tolerated {
            let in_flight = self.concurrency.limit();
            changes.push(LaneChange::ConcurrencyReduced { in_flight });
        }
        let (tried, recovered, below) = match refused {
            Refusal::Tolerated | Refusal::Cohort => return false,
            Refusal::Probe => (in_flight, false, false),
            Refusal::Reduced { tried, recovered } => (tried, recovered, true),
        };
        let reduction = Reduction {
            granted,
            tried: tried as f64,
            in_flight: true,
            recovered,
        };
        if let Some(before) = self.overloads.record_reduction(reduction) {
            self.concurrency.restore(before as usize);
        }
        below && self.overloads.is_majority()
    }

    /// A call was refused by a rate limit, or for the number in flight. Returns whether the lane should
    /// wait.
    fn throttle(
        &mut self,
        now: Nanos,
        (sent_at, charge, in_flight): (Nanos, Charge, usize),
        named: Option<ThrottledResource>,
        wait: Option<Duration>,
        changes: &mut Vec<LaneChange>,
    ) -> bool {
        let explained = named.is_some();
        if !self.adaptive {
            return true;
        }
        if !explained && self.throttles.add(now, self.granted) {
            return false;
        }
        if self.is_crowd(now, sent_at, named, wait) {
            let refused = self.concurrency.over_limit(now, sent_at, in_flight);
            let in_flight = self.concurrency.limit();
            changes.push(LaneChange::ConcurrencyReduced { in_flight });
            let Refusal::Reduced { tried, recovered } = refused else {
                return false;
            };
            let reduction = Reduction {
                granted: self.granted,
                tried: tried as f64,
                in_flight: true,
                recovered,
            };
            if let Some(before) = self.throttles.record_reduction(reduction) {
                self.concurrency.restore(before as usize);
            }
        } else if let Some(slowed) = self.slow_down(now, (sent_at, charge), named, changes)
            && !explained
        {
            let reduction = Reduction {
                granted: self.granted,
                tried: slowed.tried,
                in_flight: false,
                recovered: false,
            };
            if let Some(before) = self.throttles.record_reduction(reduction) {
                self.limits.restore(now, slowed.resource, before);
            }
        }
        true
    }

    /// Whether a call was refused for the number in flight: nobody says how long to wait or
    /// for what, no rate is near its end, and most concurrency are taken.
    fn is_crowd(
        &self,
        now: Nanos,
        sent_at: Nanos,
        named: Option<ThrottledResource>,
        wait: Option<Duration>,
    ) -> bool {
        let unexplained = named.is_none() && wait.is_none();
        let many = || self.concurrency.is_mostly_used() && self.limits.are_half_full(now);
        unexplained && (self.concurrency.was_over_limit(sent_at) || many())
    }

    /// Uses the limit that was refused more slowly, where no limit was known one
    /// that is guessed.
    fn slow_down(
        &mut self,
        now: Nanos,
        sent: (Nanos, Charge),
        named: Option<ThrottledResource>,
        changes: &mut Vec<LaneChange>,
    ) -> Option<Slowed> {
        let guess = || (self.throughput.rate(now), self.burst);
        let slowed = self.limits.record_refusal(now, sent, named, guess);
        changes.extend(slowed.map(|slowed| LaneChange::RateReduced {
            limit: slowed.resource.binding(),
            factor: slowed.scale,
        }));
        slowed
    }

    /// Closes the cooldown, and empties the limits until it opens: what waited behind
    /// it then goes at the lane's rate, not all at once.
    fn close(
        &mut self,
        now: Nanos,
        granted_at: Nanos,
        wait: Option<Duration>,
        longest: Duration,
        changes: &mut Vec<LaneChange>,
    ) {
        let before = self.cooldown.until();
        self.cooldown
            .record_refusal(now, granted_at, self.granted, wait, longest);
        let opens_at = self.cooldown.until();
        self.limits.stand_still_until(now, opens_at);
        if opens_at > before {
            let wait = Duration::from_nanos(opens_at - now);
            changes.push(LaneChange::CoolingDown { wait });
        }
    }

    /// Nobody should wait for as long as the provider asks: they are told instead.
    fn park(
        &mut self,
        now: Nanos,
        wait: Duration,
        wakeups: &mut Wakeups<W>,
        changes: &mut Vec<LaneChange>,
    ) {
        let message = "the provider asks to wait so long that the lane is parked";
        let why = Error::new(ErrorKind::Throttled, message)
            .with_wait(wait)
            .with_persistence(Persistence::Exhausted);
        changes.push(LaneChange::Stopped { why: why.clone() });
        self.stop(why, Some(now.saturating_add(nanos(wait))), wakeups);
    }
}
