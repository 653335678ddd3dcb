//! How grants end, and what their ends say of the limits.

use std::time::Duration;

use super::super::bucket::{Nanos, nanos};
use super::super::buckets::{Mark, Named, Slowed};
use super::super::refusals::Reduction;
use super::super::slots::Refused;
use super::super::words::{CallOutcome, Charge, LaneChange};
use super::{End, Errands, Grant, Turnstile};
use crate::error::{Error, ErrorKind, Persistence};
use crate::request::RateSnapshot;

/// The longest wait after a refusal that names none.
const LONGEST_THROTTLE: Duration = Duration::from_secs(30);
/// Overload passes sooner than a minute's limit, and costs each call an attempt.
const LONGEST_OVERLOAD: Duration = Duration::from_secs(5);
/// Who is asked to wait longer than this is better told than left waiting.
const LONGEST_WAIT: Duration = Duration::from_secs(10 * 60);

impl<W: Clone> Turnstile<W> {
    /// What the headers of the reply to `grant`'s call say. They are left alone if those
    /// of a later call are known already.
    pub(in crate::ratelimit) fn observe(
        &mut self,
        now: Nanos,
        grant: &Grant,
        said: &RateSnapshot,
        errands: &mut Errands<W>,
    ) -> Vec<LaneChange> {
        let granted = self.slots.get_mut(grant.0);
        granted.named = Named::of(said, granted.charge);
        if !self.adaptive || granted.at < self.observed {
            return Vec::new();
        }
        if granted.charge.in_arrears {
            granted.said = Some(Box::new(said.clone()));
            return Vec::new();
        }
        let (at, mark) = (granted.at, granted.mark);
        self.advance(now);
        let changes = self.heed(now, at, &mark, said);
        self.pump(now, errands);
        changes
    }

    /// What is said to a call that was let through at `at` and left `mark` in the limits.
    fn heed(&mut self, now: Nanos, at: Nanos, mark: &Mark, said: &RateSnapshot) -> Vec<LaneChange> {
        self.observed = self.observed.max(at);
        let closed_until = self.gate.opens_at();
        let adopted = self
            .buckets
            .observe(now, said, (at, mark), self.burst, closed_until);
        let told = adopted
            .into_iter()
            .map(|(resource, rate)| LaneChange::Adopted {
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
        errands: &mut Errands<W>,
    ) -> Vec<LaneChange> {
        let granted = self.slots.get_mut(grant.0);
        let (charge, at, named) = (granted.charge, granted.at, granted.named);
        let nth = granted.nth;
        let mut changes = Vec::new();
        self.advance(now);
        if let End::Finished(CallOutcome::Done { .. }) = end {
            self.gate.welcome(at);
            self.slots.succeeded(now, at, nth);
            self.probing.take_if(|probing| probing.since <= at);
        }
        match end {
            End::Unsent => self.buckets.refund(now, charge, at),
            // Taken to have cost what was reserved.
            End::Abandoned
            | End::Finished(
                CallOutcome::Failed { usage: None } | CallOutcome::Done { usage: None },
            ) => {
                self.buckets.settle(now, charge, charge, at);
            }
            End::Finished(CallOutcome::Failed { usage: Some(usage) }) => {
                self.buckets.settle(now, charge, usage.into(), at);
            }
            End::Finished(CallOutcome::Done { usage: Some(usage) }) => {
                self.buckets.settle(now, charge, usage.into(), at);
                if charge.in_arrears {
                    self.buckets.learn(now, charge, usage.into(), at);
                }
            }
            End::Finished(CallOutcome::Throttled { wait }) => {
                self.throttled += 1;
                self.buckets.settle(now, charge, Charge::default(), at);
                if self.throttle(now, (at, charge, nth), named, wait, &mut changes) {
                    self.close(now, at, wait, LONGEST_THROTTLE, &mut changes);
                }
                if let Some(wait) = wait.filter(|wait| *wait > LONGEST_WAIT) {
                    self.park(now, wait, errands, &mut changes);
                }
            }
            End::Finished(CallOutcome::Overloaded { wait }) => {
                self.overloaded += 1;
                let charged = charge.on_admission();
                self.buckets.settle(now, charge, charged, at);
                if self.overload(now, at, nth, &mut changes) {
                    self.close(now, at, wait, LONGEST_OVERLOAD, &mut changes);
                }
            }
        }
        let granted = self.free_slot(grant.0);
        if let Some(said) = &granted.said {
            changes.extend(self.heed(now, at, &granted.mark, said));
        }
        for exceeded in self.buckets.take_exceeded() {
            changes.push(LaneChange::Exceeded {
                limit: exceeded.resource.binding(),
                needed: exceeded.needed,
                per_minute: exceeded.per_minute,
            });
        }
        self.pump(now, errands);
        changes
    }

    /// A call met an overloaded provider. Returns whether so many do that the lane should wait.
    ///
    /// A single overload says nothing: it costs its own call an attempt, and nobody else anything.
    fn overload(
        &mut self,
        now: Nanos,
        sent_at: Nanos,
        nth: usize,
        changes: &mut Vec<LaneChange>,
    ) -> bool {
        let granted = self.granted;
        let overloads = &mut self.overloads;
        let noisy = overloads.are_noise();
        let mut tolerated = || overloads.add(now, granted);
        let refused = match self.adaptive {
            true => self.slots.refuse(now, sent_at, nth, noisy, tolerated),
            false if tolerated() => Refused::Tolerated,
            false => Refused::Reduced {
                tried: self.slots.used(),
                recovered: true,
            },
        };
        if self.adaptive && refused != Refused::Tolerated {
            let in_flight = self.slots.limit();
            changes.push(LaneChange::Eased { in_flight });
        }
        let (tried, recovered, below) = match refused {
            Refused::Tolerated | Refused::Cohort => return false,
            Refused::Probe => (nth, false, false),
            Refused::Reduced { tried, recovered } => (tried, recovered, true),
        };
        let reduction = Reduction {
            granted,
            tried: tried as f64,
            in_flight: true,
            recovered,
        };
        if let Some(before) = self.overloads.reduced(reduction) {
            self.slots.restore(before as usize);
        }
        below && self.overloads.prevail()
    }

    /// A call was refused by a rate limit, or for the number in flight. Returns whether the lane should
    /// wait.
    fn throttle(
        &mut self,
        now: Nanos,
        (sent_at, charge, nth): (Nanos, Charge, usize),
        named: Option<Named>,
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
            let refused = self.slots.crowded(now, sent_at, nth);
            let in_flight = self.slots.limit();
            changes.push(LaneChange::Eased { in_flight });
            let Refused::Reduced { tried, recovered } = refused else {
                return false;
            };
            let reduction = Reduction {
                granted: self.granted,
                tried: tried as f64,
                in_flight: true,
                recovered,
            };
            if let Some(before) = self.throttles.reduced(reduction) {
                self.slots.restore(before as usize);
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
            if let Some(before) = self.throttles.reduced(reduction) {
                self.buckets.restore(now, slowed.resource, before);
            }
        }
        true
    }

    /// Whether a call was refused for the number in flight: nobody says how long to wait or
    /// for what, no rate is near its end, and most slots are taken.
    fn is_crowd(
        &self,
        now: Nanos,
        sent_at: Nanos,
        named: Option<Named>,
        wait: Option<Duration>,
    ) -> bool {
        let unexplained = named.is_none() && wait.is_none();
        let many = || self.slots.are_many() && self.buckets.are_half_full(now);
        unexplained && (self.slots.was_crowded(sent_at) || many())
    }

    /// Uses the limit that was refused more slowly, where no limit was known one
    /// that is guessed.
    fn slow_down(
        &mut self,
        now: Nanos,
        sent: (Nanos, Charge),
        named: Option<Named>,
        changes: &mut Vec<LaneChange>,
    ) -> Option<Slowed> {
        let guess = || (self.pulse.rate(now), self.burst);
        let slowed = self.buckets.refuse(now, sent, named, guess);
        changes.extend(slowed.map(|slowed| LaneChange::Slowed {
            limit: slowed.resource.binding(),
            scale: slowed.scale,
        }));
        slowed
    }

    /// Closes the gate, and empties the buckets until it opens: what waited behind
    /// it then goes at the lane's rate, not all at once.
    fn close(
        &mut self,
        now: Nanos,
        granted_at: Nanos,
        wait: Option<Duration>,
        longest: Duration,
        changes: &mut Vec<LaneChange>,
    ) {
        let before = self.gate.opens_at();
        self.gate
            .refuse(now, granted_at, self.granted, wait, longest);
        let opens_at = self.gate.opens_at();
        self.buckets.close_until(now, opens_at);
        if opens_at > before {
            let wait = Duration::from_nanos(opens_at - now);
            changes.push(LaneChange::Closed { wait });
        }
    }

    /// Nobody should wait for as long as the provider asks: they are told instead.
    fn park(
        &mut self,
        now: Nanos,
        wait: Duration,
        errands: &mut Errands<W>,
        changes: &mut Vec<LaneChange>,
    ) {
        let message = "the provider asks to wait so long that the lane is parked";
        let why = Error::new(ErrorKind::Throttled, message)
            .with_wait(wait)
            .with_persistence(Persistence::Exhausted);
        changes.push(LaneChange::Stopped { why: why.clone() });
        self.stop(why, Some(now.saturating_add(nanos(wait))), errands);
    }
}
