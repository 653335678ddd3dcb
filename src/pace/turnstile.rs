//! [`Turnstile`]: who may go, and when. The lane without its clock, its lock and its wakers.
//!
//! A pure state machine: every method is given the time (since the lane was made)
//! and says whom to wake. It never waits itself. That leaves one question, who
//! comes back when the time has come, and the answer is the waiter that is next:
//! it is the lane's *timekeeper*, sleeps until its own turn, and lets everybody
//! through who can go by then. Whenever somebody else becomes the next, or the
//! next can go earlier than its alarm, the turnstile wakes it to set its alarm anew.

use std::collections::HashMap;
use std::time::Duration;

use super::buckets::Buckets;
use super::gate::Gate;
use super::limits::Pace;
use super::queue::{Key, Queue};
use super::words::{Binding, CallOutcome, Charge, LaneSnapshot, Place};

/// The longest wait after a refusal that names none.
const LONGEST_THROTTLE: Duration = Duration::from_secs(30);
/// Overload passes sooner than a minute's limit, and costs each call an attempt.
const LONGEST_OVERLOAD: Duration = Duration::from_secs(5);

/// What a call was let through with; it must come back through [`Turnstile::finish`].
#[derive(Debug)]
#[must_use]
pub(super) struct Grant {
    charge: Charge,
    at: Duration,
}

/// What becomes of someone who arrives.
#[derive(Debug)]
pub(super) enum Entry {
    Granted(Grant),
    Queued(Key),
}

/// What a waiter finds when it looks.
#[derive(Debug)]
pub(super) enum Turn {
    Granted(Grant),
    /// Not yet. With a time: it is the timekeeper, and must look again then.
    Wait(Option<Duration>),
}

/// What is left to do once the lock is released, because a waker runs code of
/// others when it wakes and even when it is dropped.
#[derive(Debug)]
pub(super) struct Errands<W> {
    pub(super) wake: Vec<W>,
    pub(super) discard: Vec<W>,
}

impl<W> Default for Errands<W> {
    fn default() -> Self {
        Self {
            wake: Vec::new(),
            discard: Vec::new(),
        }
    }
}

/// How a grant ends.
#[derive(Debug, Clone, Copy)]
pub(super) enum End {
    /// The call was never sent.
    Unsent,
    /// It was sent, and nobody waited for how it ended.
    Abandoned,
    Finished(CallOutcome),
}

/// What keeps a call from going.
struct Obstacle {
    binding: Binding,
    /// When it is gone; `None` if that depends on a call in flight.
    until: Option<Duration>,
}

#[derive(Debug)]
pub(super) struct Turnstile<W> {
    buckets: Buckets,
    gate: Gate,
    /// For snapshots.
    requests_per_minute: Option<u64>,
    most_in_flight: usize,
    in_flight: usize,
    queue: Queue<W>,
    /// Granted out of the queue and not yet collected, by ticket.
    uncollected: HashMap<u64, Grant>,
    /// Who will look next, and when at the latest.
    timekeeper: Option<(Key, Duration)>,
    next_place: u64,
    next_ticket: u64,
    granted: u64,
    throttled: u64,
    overloaded: u64,
}

impl<W> Turnstile<W> {
    pub(super) fn new(pace: &Pace, seed: u64) -> Self {
        Self {
            buckets: Buckets::new(pace, Duration::ZERO),
            gate: Gate::new(seed),
            requests_per_minute: pace.requests_per_minute(),
            most_in_flight: pace.in_flight.unwrap_or(usize::MAX),
            in_flight: 0,
            queue: Queue::new(),
            uncollected: HashMap::new(),
            timekeeper: None,
            next_place: 0,
            next_ticket: 0,
            granted: 0,
            throttled: 0,
            overloaded: 0,
        }
    }

    pub(super) fn arrive(&mut self) -> Place {
        self.next_place += 1;
        Place(self.next_place)
    }

    /// Lets `charge` through now if nobody waits and nothing stands against it.
    pub(super) fn try_enter(&mut self, now: Duration, charge: Charge) -> Option<Grant> {
        (self.queue.is_empty() && self.obstacle(now, charge).is_none())
            .then(|| self.grant(now, charge))
    }

    /// Lets `charge` through, or queues it. Who is queued must [`poll`](Turnstile::poll)
    /// at once, and in the end either collect its grant or [`leave`](Turnstile::leave).
    pub(super) fn enter(
        &mut self,
        now: Duration,
        place: Option<Place>,
        charge: Charge,
        errands: &mut Errands<W>,
    ) -> Entry {
        if let Some(grant) = self.try_enter(now, charge) {
            return Entry::Granted(grant);
        }
        let place = place.unwrap_or_else(|| self.arrive());
        self.next_ticket += 1;
        let key = Key {
            place,
            ticket: self.next_ticket,
        };
        self.queue.push(key, charge);
        self.pump(now, errands);
        Entry::Queued(key)
    }

    /// A waiter looks whether it has been let through, and leaves its waker if not.
    pub(super) fn poll(
        &mut self,
        now: Duration,
        key: Key,
        waker: W,
        errands: &mut Errands<W>,
    ) -> Turn {
        // It is awake: its old waker must not wake it again, its old alarm is spent.
        if let Some(waiter) = self.queue.get_mut(key) {
            errands.discard.extend(waiter.waker.take());
        }
        self.timekeeper.take_if(|(keeper, _)| *keeper == key);
        self.grant_all(now, errands);
        let turn = match self.queue.get_mut(key) {
            Some(waiter) => {
                waiter.waker = Some(waker);
                let alarm = self.alarm(now).filter(|(head, _)| *head == key);
                if alarm.is_some() {
                    self.timekeeper = alarm;
                }
                Turn::Wait(alarm.map(|(_, at)| at))
            }
            None => {
                errands.discard.push(waker);
                let grant = self.uncollected.remove(&key.ticket);
                Turn::Granted(grant.expect("a waiter is in the queue or has its grant"))
            }
        };
        self.appoint(now, errands);
        turn
    }

    /// A waiter goes away without its grant, or with one it never collected.
    pub(super) fn leave(&mut self, now: Duration, key: Key, errands: &mut Errands<W>) {
        if let Some(grant) = self.uncollected.remove(&key.ticket) {
            self.finish(now, grant, End::Unsent, errands);
        } else if let Some(waiter) = self.queue.remove(key) {
            errands.discard.extend(waiter.waker);
            self.pump(now, errands);
        }
    }

    /// A grant comes back.
    pub(super) fn finish(
        &mut self,
        now: Duration,
        grant: Grant,
        end: End,
        errands: &mut Errands<W>,
    ) {
        let Grant { charge, at } = grant;
        self.in_flight -= 1;
        match end {
            End::Unsent => self.buckets.refund(now, charge, at),
            End::Abandoned | End::Finished(CallOutcome::Failed) => {}
            End::Finished(CallOutcome::Done { usage }) => {
                self.gate.welcome(at);
                if let Some(usage) = usage {
                    self.buckets.settle(now, charge, usage.into(), at);
                }
            }
            End::Finished(CallOutcome::Throttled { wait }) => {
                self.throttled += 1;
                self.buckets.settle(now, charge, Charge::default(), at);
                self.close(now, at, wait, LONGEST_THROTTLE);
            }
            End::Finished(CallOutcome::Overloaded { wait }) => {
                self.overloaded += 1;
                self.close(now, at, wait, LONGEST_OVERLOAD);
            }
        }
        self.pump(now, errands);
    }

    /// Changes the limits under those who wait and those in flight.
    pub(super) fn retune(&mut self, now: Duration, pace: &Pace, errands: &mut Errands<W>) {
        self.buckets.retune(now, pace, self.gate.opens_at());
        self.requests_per_minute = pace.requests_per_minute();
        self.most_in_flight = pace.in_flight.unwrap_or(usize::MAX);
        self.pump(now, errands);
    }

    pub(super) fn snapshot(&self, now: Duration) -> LaneSnapshot {
        let closed_for = self.gate.opens_at().saturating_sub(now);
        let (binding, head_wait) = match self.queue.head() {
            Some((_, charge)) => match self.obstacle(now, charge) {
                Some(Obstacle { binding, until }) => (binding, until.map(|at| at - now)),
                // Its time has come, and its timekeeper is about to notice.
                None => (Binding::Nothing, Some(Duration::ZERO)),
            },
            None if !closed_for.is_zero() => (Binding::Gate, None),
            None => (Binding::Nothing, None),
        };
        LaneSnapshot {
            requests_per_minute: self.requests_per_minute,
            in_flight: self.in_flight,
            waiting: self.queue.len(),
            granted: self.granted,
            throttled: self.throttled,
            overloaded: self.overloaded,
            closed_for: (!closed_for.is_zero()).then_some(closed_for),
            binding,
            head_wait,
        }
    }

    /// Closes the gate, and empties the buckets until it opens: what waited behind
    /// it then goes at the lane's rate, not all at once.
    fn close(
        &mut self,
        now: Duration,
        granted_at: Duration,
        wait: Option<Duration>,
        longest: Duration,
    ) {
        self.gate.refuse(now, granted_at, wait, longest);
        self.buckets.drain_until(now, self.gate.opens_at());
    }

    fn obstacle(&self, now: Duration, charge: Charge) -> Option<Obstacle> {
        let (mut until, mut binding) = self.buckets.ready_at(now, charge);
        let full = self.in_flight >= self.most_in_flight;
        if full {
            binding = Binding::InFlight;
        }
        if self.gate.opens_at() > now {
            binding = Binding::Gate;
            until = until.max(self.gate.opens_at());
        }
        (full || until > now).then_some(Obstacle {
            binding,
            until: (!full).then_some(until),
        })
    }

    fn grant(&mut self, now: Duration, charge: Charge) -> Grant {
        self.buckets.take(now, charge);
        self.in_flight += 1;
        self.granted += 1;
        Grant { charge, at: now }
    }

    /// After anything has changed: lets everybody through who can go, and sees to
    /// it that somebody keeps the time for the rest.
    fn pump(&mut self, now: Duration, errands: &mut Errands<W>) {
        self.grant_all(now, errands);
        self.appoint(now, errands);
    }

    fn grant_all(&mut self, now: Duration, errands: &mut Errands<W>) {
        while let Some((key, charge)) = self.queue.head() {
            if self.obstacle(now, charge).is_some() {
                return;
            }
            let waiter = self.queue.remove(key);
            errands.wake.extend(waiter.and_then(|waiter| waiter.waker));
            let grant = self.grant(now, charge);
            self.uncollected.insert(key.ticket, grant);
        }
    }

    /// Who must look next, and when: nobody if only a call in flight can change anything.
    fn alarm(&self, now: Duration) -> Option<(Key, Duration)> {
        let (head, charge) = self.queue.head()?;
        Some((head, self.obstacle(now, charge)?.until?))
    }

    /// Wakes the one who must look next, unless it is awake or will be in time.
    fn appoint(&mut self, now: Duration, errands: &mut Errands<W>) {
        let Some((head, at)) = self.alarm(now) else {
            return;
        };
        if self
            .timekeeper
            .is_some_and(|(keeper, alarm)| keeper == head && alarm <= at)
        {
            return;
        }
        self.timekeeper = Some((head, now));
        let waiter = self.queue.get_mut(head);
        errands
            .wake
            .extend(waiter.and_then(|waiter| waiter.waker.take()));
    }
}
