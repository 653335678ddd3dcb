//! [`Scheduler`]: decides which call goes next, and when. The lane without its clock, its lock and its wakers.
//!
//! A pure state machine: every method takes the time (since the lane was made)
//! and collects the wakers to call. It never waits itself: while callers wait, the lane must call
//! [`Scheduler::tick`] at the [`Scheduler::deadline`] at the latest, and no caller needs to be
//! polled for that. A grant to a caller that waits is an [offer](super::offers).

mod finish;

use std::time::Duration;

use crate::error::Error;
use crate::ratelimit::adaptive::PolicySet;
use crate::ratelimit::adaptive::refusals::RefusalMonitor;
use crate::ratelimit::bucket::{Nanos, Rate, nanos};
use crate::ratelimit::concurrency::ConcurrencyLimit;
use crate::ratelimit::cooldown::Cooldown;
use crate::ratelimit::limit::Burst;
use crate::ratelimit::limits::{Grant, LimitSet};
use crate::ratelimit::offers::Offers;
use crate::ratelimit::pace::Pace;
use crate::ratelimit::queue::{Queue, WaiterKey};
use crate::ratelimit::tenants::TenantLimits;
use crate::ratelimit::types::{
    Binding, CallOutcome, Charge, LaneSnapshot, Need, Priority, QueuePosition, Tenant, TenantId,
};
use crate::request::RateSnapshot;

/// The number of calls behind the head that are examined for one that may pass it.
const BACKFILL_WINDOW: usize = 8;
/// After this time without an end of the probe another one goes: the first may belong to a future that is
/// not polled, whose timeout does not end it.
const LONGEST_PROBE: Nanos = 60_000_000_000;
/// The time over which grants are counted, in case a rate must be estimated from them.
const THROUGHPUT_WINDOW: Nanos = 60_000_000_000;

/// Names a call that was granted; it must come back through [`Scheduler::finish`].
#[derive(Debug)]
#[must_use]
pub(super) struct GrantId(usize);

/// A granted call. It stays in the scheduler, because its holders are futures, which are moved about.
#[derive(Debug)]
struct Call {
    grant: Grant,
    /// The headers of its reply, where a part of its charge is not in the level yet.
    headers: Option<Box<RateSnapshot>>,
    /// Its tenant, where that has rates of its own.
    tenant: Option<TenantId>,
}

/// The answer to a caller that arrives, or that waits and looks again.
#[derive(Debug)]
pub(super) enum Admission {
    Granted(GrantId),
    /// Not yet: the caller is woken when it has been granted its call.
    Queued(WaiterKey),
    /// The lane is stopped, or was while the caller waited.
    Stopped(Error),
}

/// Wakers to call or drop once the lock is released, because either may run code of the caller.
#[derive(Debug)]
pub(super) struct Wakeups<W> {
    /// Most often there is one waker, which costs no allocation.
    first: Option<W>,
    more: Vec<W>,
    discard: Option<W>,
}

impl<W> Default for Wakeups<W> {
    fn default() -> Self {
        Self {
            first: None,
            more: Vec::new(),
            discard: None,
        }
    }
}

impl<W> Wakeups<W> {
    pub(super) fn wake(&mut self, waker: Option<W>) {
        match self.first {
            None => self.first = waker,
            Some(_) => self.more.extend(waker),
        }
    }

    pub(super) fn discard(&mut self, waker: Option<W>) {
        self.discard = waker;
    }

    pub(super) fn run(self, mut wake: impl FnMut(W)) {
        if let Some(first) = self.first {
            wake(first);
            self.more.into_iter().for_each(wake);
        }
    }
}

/// The reason that a call cannot go yet.
#[derive(Clone, Copy)]
struct Obstacle {
    binding: Binding,
    /// When it is gone; `None` if that depends on a call in flight.
    until: Option<Nanos>,
}

/// Why the lane is stopped, and until when; with `None`, until [`resume`](Scheduler::resume).
#[derive(Debug)]
struct Stop {
    why: Error,
    until: Option<Nanos>,
}

/// One call at a time goes, because it is not known whether the provider answers any.
#[derive(Debug)]
struct Probing {
    /// The success of a call that was granted since then ends the probing.
    since: Nanos,
    /// The slot of the probe that is under way, and until when others wait for it.
    slot: Option<(usize, Nanos)>,
}

/// The number of grants since a time.
#[derive(Debug, Default)]
struct ThroughputWindow {
    since: Nanos,
    grants: u64,
}

impl ThroughputWindow {
    fn record(&mut self, now: Nanos) {
        if now.saturating_sub(self.since) > THROUGHPUT_WINDOW {
            *self = Self {
                since: now,
                grants: 0,
            };
        }
        self.grants += 1;
    }

    /// Returns the recent throughput as a rate.
    fn rate(&self, now: Nanos) -> Rate {
        let seconds = (now.saturating_sub(self.since) as f64 / 1e9).max(1.0);
        Rate::per_minute((self.grants as f64 * 60.0 / seconds).ceil().max(1.0) as u64)
    }
}

#[derive(Debug)]
pub(super) struct Scheduler<W> {
    policies: PolicySet,
    burst: Burst,
    limits: LimitSet,
    cooldown: Cooldown,
    concurrency: ConcurrencyLimit<Call>,
    /// The refusals because the provider was overloaded.
    overloads: RefusalMonitor,
    /// The refusals by a rate limit that nothing explains.
    throttles: RefusalMonitor,
    queue: Queue<W>,
    tenants: TenantLimits,
    /// Granted out of the queue and not yet collected.
    offers: Offers<(WaiterKey, GrantId)>,
    /// When the caller that is next can go, unless that depends on a call in flight.
    head_ready_at: Option<Nanos>,
    stop: Option<Stop>,
    probing: Option<Probing>,
    /// Why the lane was stopped last, for those who look when it goes again.
    last_stop: Option<Error>,
    /// The time at which the call was granted whose headers were used last.
    observed: Nanos,
    throughput: ThroughputWindow,
    next_place: u64,
    next_ticket: u64,
    /// All grants, and those of them that were not collected in time.
    granted: u64,
    taken_back: u64,
    throttled: u64,
    overloaded: u64,
}

impl<W: Clone> Scheduler<W> {
    pub(super) fn new(pace: &Pace, seed: u64) -> Self {
        Self {
            policies: pace.policies,
            burst: pace.burst_or_default(),
            limits: LimitSet::new(pace, 0),
            cooldown: Cooldown::new(seed),
            concurrency: ConcurrencyLimit::new(pace.in_flight),
            overloads: RefusalMonitor::of_overload(),
            throttles: RefusalMonitor::of_rate(),
            queue: Queue::new(),
            tenants: TenantLimits::new(),
            offers: Offers::new(),
            head_ready_at: None,
            stop: None,
            probing: None,
            last_stop: None,
            observed: 0,
            throughput: ThroughputWindow::default(),
            next_place: 0,
            next_ticket: 0,
            granted: 0,
            taken_back: 0,
            throttled: 0,
            overloaded: 0,
        }
    }

    pub(super) fn next_position(&mut self) -> QueuePosition {
        self.next_place += 1;
        QueuePosition(self.next_place)
    }

    /// Grants a call now if none waits that it would pass, and all limits have room for it.
    pub(super) fn try_enter(&mut self, now: Nanos, need: &Need) -> Option<GrantId> {
        self.end_timed_stop(now);
        if self.stop.is_some() {
            return None;
        }
        let charge = Charge::from(need);
        let tenant = self.announce(now, need.who.tenant);
        if !self.queue.is_empty() && self.would_pass(now, need) {
            return None;
        }
        self.advance(now);
        let obstructed = |lane: &Self| {
            tenant.is_some_and(|id| lane.tenants.ready_at(now, id, charge) > now)
                || lane.obstacle(now, charge).is_some()
        };
        if obstructed(self) {
            // While no caller waits, nothing else takes back what was not collected.
            let expired = self.queue.is_empty() && self.expire(now);
            if !expired || obstructed(self) {
                return None;
            }
        }
        self.limits.resize(now);
        Some(self.grant(now, charge, tenant))
    }

    /// Keeps the rates that a call names for its tenant. Returns the tenant if any tenant has rates.
    fn announce(&mut self, now: Nanos, tenant: Option<Tenant>) -> Option<TenantId> {
        let tenant = tenant?;
        let queue = &self.queue;
        let waits = |id| Priority::ALL.iter().any(|it| queue.has(*it, Some(id)));
        if self.tenants.announce(now, tenant, self.granted, waits) {
            self.look_again(now, tenant.id());
        }
        (!self.tenants.is_empty()).then(|| tenant.id())
    }

    /// Lets the timers look at the calls of a tenant again, because its limits have more room.
    fn look_again(&mut self, now: Nanos, tenant: TenantId) {
        self.queue.unpark_tenant(tenant);
        if self.queue.has_head() {
            self.head_ready_at = Some(self.head_ready_at.map_or(now, |at| at.min(now)));
        }
    }

    /// Whether a call that arrives would pass others in the queue. It may pass those that only wait for the rate of
    /// another tenant.
    fn would_pass(&self, now: Nanos, need: &Need) -> bool {
        self.queue.has_head()
            || self.queue.parked_until().is_some_and(|until| until <= now)
            || self
                .queue
                .has(need.who.priority, need.who.tenant.map(Tenant::id))
    }

    /// Grants a call, or queues it with a clone of its waker. A caller in the queue must
    /// [`poll`](Scheduler::poll) when it is woken, and in the end either collect its grant or
    /// [`leave`](Scheduler::leave).
    pub(super) fn enter(
        &mut self,
        now: Nanos,
        need: &Need,
        waker: &W,
        wakeups: &mut Wakeups<W>,
    ) -> Admission {
        let charge = Charge::from(need);
        if let Some(grant) = self.try_enter(now, need) {
            return Admission::Granted(grant);
        }
        if let Some(stop) = &self.stop {
            return Admission::Stopped(stop.why.clone());
        }
        // First, because a clone runs code of the caller: if that panics, nothing has changed.
        let waker = waker.clone();
        self.advance(now);
        self.limits.expect(charge);
        if !self.queue.has_head() {
            self.limits.resize(now);
        }
        let position = need.position.unwrap_or_else(|| self.next_position());
        self.next_ticket += 1;
        let key = self
            .queue
            .push(need.who, position, self.next_ticket, charge);
        self.look(now, key, waker, wakeups)
    }

    /// Returns the grant of a waiter, or stores its waker if it must wait on.
    pub(super) fn poll(
        &mut self,
        now: Nanos,
        key: WaiterKey,
        need: &Need,
        waker: &W,
        wakeups: &mut Wakeups<W>,
    ) -> Admission {
        self.end_timed_stop(now);
        if self.queue.get_mut(key).is_some() {
            // First, because a clone runs code of the caller: if that panics, nothing has changed.
            let waker = waker.clone();
            self.advance(now);
            return self.look(now, key, waker, wakeups);
        }
        if let Some(offer) = self.offers.expire_of(now, key.ticket) {
            // The call would be sent too late for the time at which it was charged.
            self.take_back(now, offer);
        }
        if self.offers.come_back(now, key.ticket) && self.stop.is_none() {
            let waker = waker.clone();
            self.advance(now);
            let charge = Charge::from(need);
            if let Some(tenant) = need.who.tenant
                && !self.tenants.has(tenant.id())
            {
                // It was forgotten meanwhile.
                self.announce(now, Some(tenant));
            }
            let key = self.queue.push(need.who, key.position, key.ticket, charge);
            return self.look(now, key, waker, wakeups);
        }
        // No time is passed here: the factors of the limits would change, and the time at which the head can go with them.
        self.collect(now, key)
    }

    /// Grants what can be granted, and then returns the grant of this waiter or stores its waker. The waker is a clone of
    /// one that is in use, so it can be dropped here.
    fn look(
        &mut self,
        now: Nanos,
        key: WaiterKey,
        waker: W,
        wakeups: &mut Wakeups<W>,
    ) -> Admission {
        // It must not be woken by what it does itself.
        wakeups.discard = self
            .queue
            .get_mut(key)
            .and_then(|waiter| waiter.waker.take());
        self.pump(now, wakeups);
        match self.queue.get_mut(key) {
            Some(waiter) => {
                waiter.waker = Some(waker);
                Admission::Queued(key)
            }
            None => self.collect(now, key),
        }
    }

    /// Returns the grant of a caller that is no longer in the queue, or why it has none.
    fn collect(&mut self, now: Nanos, key: WaiterKey) -> Admission {
        match (self.offers.collect(now, key.ticket), &self.stop) {
            (Some((_, grant)), None) => Admission::Granted(grant),
            (offer, stop) => {
                let why = stop.as_ref().map(|stop| &stop.why);
                let why = why.or(self.last_stop.as_ref()).cloned();
                if let Some((_, grant)) = offer {
                    let call = self.release(grant.0);
                    self.limits.refund(now, &call.grant);
                    self.end_of_tenant(now, &call, CallOutcome::NotSent);
                }
                Admission::Stopped(
                    why.expect("a waiter is in the queue, has its grant, or was stopped"),
                )
            }
        }
    }

    /// When [`tick`](Scheduler::tick) must be called at the latest. `None` while no caller waits,
    /// or only the end of a call can change anything.
    pub(super) fn deadline(&self) -> Option<Nanos> {
        if self.queue.is_empty() {
            return None;
        }
        let expiry = self.offers.next_expiry();
        self.head_ready_at.into_iter().chain(expiry).min()
    }

    pub(super) fn head_ready_at(&self) -> Option<Nanos> {
        self.head_ready_at
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Whether an offer has not been collected in time.
    pub(super) fn has_expired(&self, now: Nanos) -> bool {
        self.offers.next_expiry().is_some_and(|at| at <= now)
    }

    /// Passes the deadline: takes back the offers that were not collected, if it is to `expire`
    /// them, and grants all calls that can go.
    pub(super) fn tick(&mut self, now: Nanos, expire: bool, wakeups: &mut Wakeups<W>) {
        self.advance(now);
        if expire {
            self.expire(now);
        }
        self.pump(now, wakeups);
    }

    /// Wakes the caller that is next.
    pub(super) fn wake_head(&mut self, wakeups: &mut Wakeups<W>) {
        match self.queue.head() {
            Some((head, _)) => {
                let waiter = self.queue.get_mut(head);
                wakeups.wake(waiter.and_then(|waiter| waiter.waker.take()));
            }
            // All wait for the rate of their tenant.
            None => self.wake_all(wakeups),
        }
    }

    /// Wakes all callers that wait.
    pub(super) fn wake_all(&mut self, wakeups: &mut Wakeups<W>) {
        for waiter in self.queue.iter_mut() {
            wakeups.wake(waiter.waker.take());
        }
    }

    /// Takes back the offers that were not collected in time. A caller that missed its offer
    /// leaves the queue, so that it holds up no other, until it is polled again: then it is
    /// back at its place. Says whether there was any.
    fn expire(&mut self, now: Nanos) -> bool {
        let mut any = false;
        while let Some(offer) = self.offers.expire(now) {
            self.take_back(now, offer);
            any = true;
        }
        any
    }

    fn take_back(&mut self, now: Nanos, (key, id): (WaiterKey, GrantId)) {
        let call = self.release(id.0);
        self.limits.refund(now, &call.grant);
        self.end_of_tenant(now, &call, CallOutcome::NotSent);
        self.queue
            .release(key, self.limits.time_of(call.grant.charge));
        self.taken_back += 1;
    }

    #[cfg(test)]
    pub(super) fn capped_tenants(&self) -> usize {
        self.tenants.len()
    }

    /// When a call was let through.
    #[cfg(test)]
    pub(super) fn granted_at(&mut self, id: &GrantId) -> Nanos {
        self.concurrency.get_mut(id.0).grant.at
    }

    /// Removes a waiter that goes away without its grant, or with one it never collected.
    pub(super) fn leave(&mut self, now: Nanos, key: WaiterKey, wakeups: &mut Wakeups<W>) {
        if let Some((_, grant)) = self.offers.forget(key.ticket) {
            self.finish(now, grant, None, CallOutcome::NotSent, wakeups);
        } else if let Some(waiter) = self.queue.remove(key) {
            self.advance(now);
            wakeups.discard = waiter.waker;
            self.pump(now, wakeups);
        }
    }

    /// Changes the limits, also for waiting calls and calls in flight, and resumes a lane
    /// that was stopped.
    pub(super) fn retune(&mut self, now: Nanos, pace: &Pace, wakeups: &mut Wakeups<W>) {
        self.advance(now);
        (self.policies, self.burst) = (pace.policies, pace.burst_or_default());
        self.limits.retune(now, pace, self.cooldown.until());
        self.concurrency.retune(pace.in_flight);
        self.resume(now, wakeups);
    }

    /// Fails all calls that wait or arrive, until [`resume`](Scheduler::resume).
    pub(super) fn stop(&mut self, why: Error, until: Option<Nanos>, wakeups: &mut Wakeups<W>) {
        for waiter in self.queue.clear() {
            wakeups.wake(waiter.waker);
        }
        self.offers.forget_missed();
        self.head_ready_at = None;
        self.last_stop = Some(why.clone());
        self.stop = Some(Stop { why, until });
    }

    /// Ends a stop, a cooldown and probing. The limits are empty
    /// and refill from now on; the rates that were learned stay.
    pub(super) fn resume(&mut self, now: Nanos, wakeups: &mut Wakeups<W>) {
        self.advance(now);
        self.stop = None;
        self.cooldown.end();
        self.limits.resume(now);
        self.probing = None;
        self.pump(now, wakeups);
    }

    /// Sends nothing for as long as `wait`, and then one call at a time until one succeeds.
    pub(super) fn cool_down(&mut self, now: Nanos, wait: Duration, wakeups: &mut Wakeups<W>) {
        self.advance(now);
        self.cooldown.extend_until(now.saturating_add(nanos(wait)));
        self.limits.stand_still_until(now, self.cooldown.until());
        self.probe(now);
        self.pump(now, wakeups);
    }

    /// The provider answers: calls go as usual.
    pub(super) fn end_probing(&mut self, now: Nanos, wakeups: &mut Wakeups<W>) {
        if self.probing.take().is_some() {
            self.advance(now);
            self.pump(now, wakeups);
        }
    }

    fn is_adaptive(&self) -> bool {
        self.policies != PolicySet::NONE
    }

    fn probe(&mut self, now: Nanos) {
        self.probing.get_or_insert(Probing {
            since: now,
            slot: None,
        });
    }

    fn release(&mut self, slot: usize) -> Call {
        if let Some(probing) = &mut self.probing {
            probing.slot.take_if(|(probe, _)| *probe == slot);
        }
        self.concurrency.release(slot)
    }

    /// Settles a call that was released with the rates of its tenant.
    fn end_of_tenant(&mut self, now: Nanos, call: &Call, outcome: CallOutcome) {
        if let Some(tenant) = call.tenant {
            self.tenants.end(now, tenant, &call.grant, outcome);
            self.look_again(now, tenant);
        }
    }

    pub(super) fn stopped(&mut self, now: Nanos) -> Option<&Error> {
        self.end_timed_stop(now);
        self.stop.as_ref().map(|stop| &stop.why)
    }

    pub(super) fn snapshot(&self, now: Nanos) -> LaneSnapshot {
        let from_now = |at: Nanos| Duration::from_nanos(at.saturating_sub(now));
        let cooldown = from_now(self.cooldown.until());
        let stop = self.stop.as_ref();
        let (binding, head_wait) = match self.queue.head() {
            _ if stop.is_some() => {
                let until = stop.and_then(|stop| stop.until);
                (Binding::Stopped, until.map(from_now))
            }
            Some((_, charge)) => match self.obstacle(now, charge) {
                Some(Obstacle { binding, until }) => (binding, until.map(from_now)),
                // Its time has come, and a timer is about to notice.
                None => (Binding::Nothing, Some(Duration::ZERO)),
            },
            None if !cooldown.is_zero() && self.queue.is_empty() => (Binding::Cooldown, None),
            None if !self.queue.is_empty() => {
                let until = self.queue.parked_until();
                (Binding::TenantRate, until.map(from_now))
            }
            None => (Binding::Nothing, None),
        };
        LaneSnapshot {
            requests_per_minute: self
                .limits
                .requests_per_minute()
                .map(|rate| rate.round() as u64),
            rate_factor: self.limits.rate_factor(),
            max_in_flight: Some(self.concurrency.limit()).filter(|limit| *limit < usize::MAX),
            in_flight: self.concurrency.used(),
            waiting: self.queue.len() + self.offers.missed(),
            unpolled: self.offers.missed(),
            granted: self.granted - self.taken_back,
            throttled: self.throttled,
            overloaded: self.overloaded,
            bursts: self.limits.bursts(),
            cooldown: (!cooldown.is_zero()).then_some(cooldown),
            binding,
            head_wait,
        }
    }

    /// Passes the time until `now`. The factor of a limit recovers only while a call waits
    /// that has a slot.
    fn advance(&mut self, now: Nanos) {
        let waited = self.queue.has_head();
        let concurrency = self.concurrency.free() == 0;
        self.limits.advance(now, waited && !concurrency);
        let cooled_down_at = self.cooldown.until();
        self.concurrency
            .advance(now, (waited && concurrency).then_some(cooled_down_at));
        self.end_timed_stop(now);
    }

    /// Ends a stop whose time is over: from then on one call at a time probes the provider.
    fn end_timed_stop(&mut self, now: Nanos) {
        let over = |stop: &mut Stop| stop.until.is_some_and(|until| until <= now);
        if self.stop.take_if(over).is_some() {
            self.probe(now);
        }
    }

    fn obstacle(&self, now: Nanos, charge: Charge) -> Option<Obstacle> {
        let cools_until = self.cooldown.until();
        let probe = self.probing.as_ref().and_then(|probing| probing.slot);
        if let Some((_, until)) = probe.filter(|(_, until)| *until > now) {
            return Some(Obstacle {
                binding: Binding::Cooldown,
                until: Some(until),
            });
        }
        if self.concurrency.free() == 0 {
            let binding = match cools_until > now {
                true => Binding::Cooldown,
                false => Binding::InFlight,
            };
            let until = None;
            return Some(Obstacle { binding, until });
        }
        let (mut until, mut binding) = self.limits.ready_at(now, charge);
        if cools_until > now {
            until = until.map(|until| until.max(cools_until));
            binding = Binding::Cooldown;
        }
        (until != Some(now)).then_some(Obstacle { binding, until })
    }

    fn grant(&mut self, now: Nanos, charge: Charge, tenant: Option<TenantId>) -> GrantId {
        let order = self.granted;
        let tenant = tenant.and_then(|id| self.tenants.take(now, id, charge));
        let levels = self.limits.take(now, charge, order);
        self.throughput.record(now);
        self.granted += 1;
        let grant = Grant {
            charge,
            at: now,
            order,
            levels,
            in_flight: self.concurrency.used() + 1,
            throttled: None,
        };
        let headers = None;
        let slot = self.concurrency.take(Call {
            grant,
            headers,
            tenant,
        });
        if let Some(probing) = &mut self.probing {
            probing.slot = Some((slot, now.saturating_add(LONGEST_PROBE)));
        }
        GrantId(slot)
    }

    /// Grants all calls that can go, after any change.
    fn pump(&mut self, now: Nanos, wakeups: &mut Wakeups<W>) {
        self.head_ready_at = self.grant_all(now, wakeups);
    }

    /// Returns when the next call can go: `None` if that depends on a call in flight.
    fn grant_all(&mut self, now: Nanos, wakeups: &mut Wakeups<W>) -> Option<Nanos> {
        self.queue.unpark_until(now);
        let head_ready_at = self.grant_heads(now, wakeups);
        head_ready_at
            .into_iter()
            .chain(self.queue.parked_until())
            .min()
    }

    fn grant_heads(&mut self, now: Nanos, wakeups: &mut Wakeups<W>) -> Option<Nanos> {
        loop {
            let (head, charge) = self.queue.head()?;
            if let Some(tenant) = self.capped_tenant(head) {
                let ready_at = self.tenants.ready_at(now, tenant, charge);
                if ready_at > now {
                    self.queue.park(head, ready_at);
                    continue;
                }
            }
            match self.obstacle(now, charge) {
                None => {
                    self.let_through(now, head, charge, wakeups);
                    // Bursts grow between two heads, so that none waits for a goal that moves.
                    self.limits.resize(now);
                }
                Some(obstacle) => match self.backfill(now, head, charge, obstacle) {
                    Some((key, charge)) => self.let_through(now, key, charge, wakeups),
                    None => return obstacle.until,
                },
            }
        }
    }

    /// Returns the tenant of a waiter, if any tenant has rates.
    fn capped_tenant(&self, key: WaiterKey) -> Option<TenantId> {
        match self.tenants.is_empty() {
            true => None,
            false => self.queue.tenant(key),
        }
    }

    fn let_through(
        &mut self,
        now: Nanos,
        key: WaiterKey,
        charge: Charge,
        wakeups: &mut Wakeups<W>,
    ) {
        let cost = self.limits.time_of(charge);
        let tenant = self.capped_tenant(key);
        let waiter = self.queue.serve(key, cost);
        wakeups.wake(waiter.and_then(|waiter| waiter.waker));
        let grant = self.grant(now, charge, tenant);
        self.offers.make(now, key.ticket, (key, grant));
    }

    /// Returns a call behind the head that can go now without delaying the head (EASY
    /// backfill: Lifka, 1995). There is none where the head waits for requests, because
    /// each call takes one, nor while the next slot must be kept for the head.
    fn backfill(
        &self,
        now: Nanos,
        head: WaiterKey,
        charge: Charge,
        obstacle: Obstacle,
    ) -> Option<(WaiterKey, Charge)> {
        let until = obstacle.until?;
        let tokens = matches!(
            obstacle.binding,
            Binding::Tokens | Binding::InputTokens | Binding::OutputTokens
        );
        if !tokens || self.concurrency.free() < 2 {
            return None;
        }
        let mut behind = self.queue.behind(head).take(BACKFILL_WINDOW);
        let of_head = self.capped_tenant(head);
        // One of the same tenant would take of its rate too.
        let tenant_allows = |key, first| match self.capped_tenant(key) {
            None => true,
            tenant if tenant == of_head => false,
            Some(tenant) => self.tenants.ready_at(now, tenant, first) <= now,
        };
        behind.find(|(key, first)| {
            tenant_allows(*key, *first) && self.limits.leaves_room(now, *first, charge, until)
        })
    }
}
