//! [`TenantLimits`]: the rates of the tenants that have one of their own.
//!
//! Each has a full [`Bucket`] of one second of its rate when it comes. A tenant whose buckets are full again, and that has
//! no call in the lane, needs no state: it would start as a new one does.

use crate::ratelimit::bucket::{Bucket, Nanos, Rate};
use crate::ratelimit::limits::{Grant, Resource};
use crate::ratelimit::queue::Map;
use crate::ratelimit::types::{CallOutcome, Charge, Tenant, TenantId, TenantRates};

/// The burst of a tenant, as the time in which it flows in.
const BURST: Nanos = 1_000_000_000;
/// The most that one call is charged, in minutes of the rate: a usage that cannot be true must not stop a tenant for days.
const LONGEST: u64 = 60;
/// The number of tenants at which those that need no state are removed for the first time.
const SWEEP_AT: usize = 64;

/// One rate of one tenant.
#[derive(Debug)]
struct TenantBucket {
    bucket: Bucket,
    /// The order of the first grant that could take from it: earlier ones have nothing to give back.
    since: u64,
}

impl TenantBucket {
    fn most(&self, units: u64) -> u64 {
        units.min(self.bucket.rate().minute().saturating_mul(LONGEST))
    }
}

#[derive(Debug)]
struct State {
    rates: TenantRates,
    requests: Option<TenantBucket>,
    tokens: Option<TenantBucket>,
    /// Granted calls that have not ended.
    in_flight: usize,
}

impl State {
    fn buckets(&self) -> impl Iterator<Item = (&TenantBucket, Resource)> {
        let requests = self.requests.as_ref().map(|it| (it, Resource::Requests));
        let tokens = self.tokens.as_ref().map(|it| (it, Resource::Tokens));
        requests.into_iter().chain(tokens)
    }

    fn needs_no_state(&self, now: Nanos) -> bool {
        let full = |(it, _): (&TenantBucket, _)| it.bucket.fullness(now) >= 1.0;
        self.in_flight == 0 && self.buckets().all(full)
    }

    fn set(&mut self, now: Nanos, rates: TenantRates, next_order: u64) {
        self.rates = rates;
        let set = |bucket: &mut Option<TenantBucket>, rate: Option<u64>| {
            let rate = rate.map(Rate::per_minute);
            match (bucket.as_mut(), rate) {
                (Some(it), Some(rate)) => it.bucket.retune(now, rate, BURST),
                (None, Some(rate)) => {
                    *bucket = Some(TenantBucket {
                        bucket: Bucket::new(rate, BURST, now),
                        since: next_order,
                    });
                }
                (_, None) => *bucket = None,
            }
        };
        set(&mut self.requests, rates.requests.map(u64::from));
        set(&mut self.tokens, rates.tokens.map(u64::from));
    }
}

#[derive(Debug)]
pub(super) struct TenantLimits {
    tenants: Map<TenantId, State>,
    sweep_at: usize,
}

impl TenantLimits {
    pub(super) fn new() -> Self {
        Self {
            tenants: Map::default(),
            sweep_at: SWEEP_AT,
        }
    }

    /// Whether no tenant has a rate of its own.
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.tenants.is_empty()
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.tenants.len()
    }

    pub(super) fn has(&self, tenant: TenantId) -> bool {
        self.tenants.contains_key(&tenant)
    }

    /// Keeps the rates that a call names, for all calls of its tenant. Returns whether they have changed. `waits` says
    /// whether a tenant has calls in the queue.
    pub(super) fn announce(
        &mut self,
        now: Nanos,
        tenant: Tenant,
        next_order: u64,
        waits: impl Fn(TenantId) -> bool,
    ) -> bool {
        let rates = tenant.rates();
        match self.tenants.get_mut(&tenant.id()) {
            Some(state) if state.rates == rates => return false,
            Some(state) => state.set(now, rates, next_order),
            None if rates == TenantRates::default() => return false,
            None => {
                if self.tenants.len() >= self.sweep_at {
                    self.tenants
                        .retain(|id, state| !state.needs_no_state(now) || waits(*id));
                    self.sweep_at = (2 * self.tenants.len()).max(SWEEP_AT);
                }
                let mut state = State {
                    rates,
                    requests: None,
                    tokens: None,
                    in_flight: 0,
                };
                state.set(now, rates, next_order);
                self.tenants.insert(tenant.id(), state);
            }
        }
        true
    }

    /// Returns when the rates of a tenant let `charge` through: `now`, or later.
    pub(super) fn ready_at(&self, now: Nanos, tenant: TenantId, charge: Charge) -> Nanos {
        let state = self.tenants.get(&tenant);
        let buckets = state.into_iter().flat_map(State::buckets);
        let times = buckets.map(|(it, resource)| {
            let units = it.most(resource.of(charge));
            it.bucket.ready_at(now, units)
        });
        times.fold(now, Nanos::max)
    }

    /// Takes `charge`. Returns the tenant if its rates are kept: then the call must [end](TenantLimits::end) here too.
    pub(super) fn take(&mut self, now: Nanos, id: TenantId, charge: Charge) -> Option<TenantId> {
        let state = self.tenants.get_mut(&id)?;
        state.in_flight += 1;
        if let Some(it) = &mut state.requests {
            it.bucket.take(now, 1);
        }
        if let Some(it) = &mut state.tokens {
            it.bucket.take(now, it.most(Resource::Tokens.of(charge)));
        }
        Some(id)
    }

    /// Ends a granted call: gives everything back for one that was not sent, and settles the tokens of others.
    pub(super) fn end(&mut self, now: Nanos, id: TenantId, grant: &Grant, outcome: CallOutcome) {
        let state = self.tenants.get_mut(&id);
        let state = state.expect("a tenant with a call in flight keeps its state");
        state.in_flight -= 1;
        let estimated = grant.charge;
        let actual = outcome.charge(estimated);
        let took = |it: &&mut TenantBucket| it.since <= grant.order;
        if let Some(it) = state.requests.as_mut().filter(took)
            && actual.is_none()
        {
            it.bucket.refund(now, 1, grant.at);
        }
        if let Some(it) = state.tokens.as_mut().filter(took) {
            let charged = it.most(Resource::Tokens.of(estimated));
            match actual {
                None => it.bucket.refund(now, charged, grant.at),
                Some(actual) => {
                    it.bucket
                        .settle(now, charged, it.most(Resource::Tokens.of(actual)))
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::ratelimit::bucket::nanos;
    use crate::ratelimit::pace::Pace;
    use crate::ratelimit::queue::WaiterKey;
    use crate::ratelimit::scheduler::{Admission, GrantId, Scheduler, Wakeups};
    use crate::ratelimit::types::{Binding, Need};
    use crate::request::Usage;

    const SECOND: Nanos = 1_000_000_000;

    /// A line in the books of one tenant: what was taken, or less than nothing where it was given back.
    struct Line {
        at: Nanos,
        tokens: i128,
        /// A call that was granted.
        grant: bool,
        unsent: bool,
    }

    struct Held {
        id: GrantId,
        tenant: usize,
        tokens: u64,
        line: usize,
    }

    /// A lane whose callers come as soon as they are woken.
    struct World {
        lane: Scheduler<u64>,
        tenants: Vec<Tenant>,
        now: Nanos,
        next: u64,
        waiting: BTreeMap<u64, (WaiterKey, Need, usize)>,
        held: Vec<Held>,
        books: Vec<Vec<Line>>,
    }

    impl World {
        fn new(pace: &Pace, tenants: Vec<Tenant>) -> Self {
            Self {
                lane: Scheduler::new(pace, 0),
                books: tenants.iter().map(|_| Vec::new()).collect(),
                tenants,
                now: 0,
                next: 0,
                waiting: BTreeMap::new(),
                held: Vec::new(),
            }
        }

        fn granted(&mut self, id: GrantId, tenant: usize, tokens: u64) {
            let at = self.lane.granted_at(&id);
            assert_eq!(at, self.now);
            let line = self.books[tenant].len();
            self.held.push(Held {
                id,
                tenant,
                tokens,
                line,
            });
            self.books[tenant].push(Line {
                at,
                tokens: tokens.into(),
                grant: true,
                unsent: false,
            });
        }

        /// Returns whether the call was granted at once.
        fn arrive(&mut self, tenant: usize, tokens: u64) -> bool {
            let need = Need::new(tokens, 0).tenant(self.tenants[tenant]);
            self.next += 1;
            let id = self.next;
            let mut wakeups = Wakeups::default();
            let answer = self.lane.enter(self.now, &need, &id, &mut wakeups);
            let at_once = matches!(answer, Admission::Granted(_));
            match answer {
                Admission::Granted(grant) => self.granted(grant, tenant, tokens),
                Admission::Queued(key) => {
                    self.waiting.insert(id, (key, need, tenant));
                }
                Admission::Stopped(_) => unreachable!("nothing stops the lane"),
            }
            self.collect(wakeups);
            at_once
        }

        fn collect(&mut self, wakeups: Wakeups<u64>) {
            let mut woken = Vec::new();
            wakeups.run(|id| woken.push(id));
            while let Some(id) = woken.pop() {
                let Some((key, need, tenant)) = self.waiting.remove(&id) else {
                    continue;
                };
                let mut wakeups = Wakeups::default();
                match self.lane.poll(self.now, key, &need, &id, &mut wakeups) {
                    Admission::Granted(grant) => self.granted(grant, tenant, need.input_tokens),
                    Admission::Queued(key) => {
                        self.waiting.insert(id, (key, need, tenant));
                    }
                    Admission::Stopped(_) => unreachable!("nothing stops the lane"),
                }
                wakeups.run(|id| woken.push(id));
            }
        }

        fn end(&mut self, nth: usize, outcome: CallOutcome) {
            let held = self.held.swap_remove(nth);
            let line = &mut self.books[held.tenant][held.line];
            let refilled = self.now - line.at;
            let rate = self.tenants[held.tenant].rates().tokens;
            let charged = i128::from(held.tokens);
            let tokens = match outcome {
                CallOutcome::NotSent => {
                    line.unsent = true;
                    // Less what has flowed in meanwhile.
                    let per_minute = rate.map_or(0, u64::from);
                    let flowed = u128::from(refilled) * u128::from(per_minute) / 60_000_000_000;
                    -(charged - flowed as i128).max(0)
                }
                CallOutcome::Throttled { .. } => -charged,
                CallOutcome::Succeeded { usage: Some(usage) } => {
                    i128::from(usage.input_tokens) - charged
                }
                _ => 0,
            };
            self.books[held.tenant].push(Line {
                at: self.now,
                tokens,
                grant: false,
                unsent: false,
            });
            let mut wakeups = Wakeups::default();
            self.lane
                .finish(self.now, held.id, None, outcome, &mut wakeups);
            self.collect(wakeups);
        }

        fn pass_until(&mut self, then: Nanos) {
            while let Some(at) = self.lane.deadline().filter(|at| *at <= then) {
                self.now = self.now.max(at);
                let mut wakeups = Wakeups::default();
                self.lane.tick(self.now, true, &mut wakeups);
                self.collect(wakeups);
                let next = self.lane.deadline();
                assert!(
                    next.is_none_or(|at| at > self.now),
                    "a deadline in the past"
                );
            }
            self.now = then;
        }

        fn drain(&mut self) {
            loop {
                while !self.held.is_empty() {
                    self.end(0, CallOutcome::Abandoned);
                }
                if self.waiting.is_empty() {
                    break;
                }
                let next = self.lane.deadline();
                self.pass_until(next.expect("a call waits and nothing will grant it"));
            }
        }

        /// In every window that ends with a grant: a second of the rate and what flows in, or one call that is larger.
        fn check_windows(&self) {
            for (tenant, books) in self.tenants.iter().zip(&self.books) {
                let rates = tenant.rates();
                if let Some(rate) = rates.requests {
                    let rate = Rate::per_minute(rate.into());
                    let sent: Vec<_> = books.iter().filter(|it| it.grant && !it.unsent).collect();
                    for (i, first) in sent.iter().enumerate() {
                        for (n, last) in sent[i..].iter().enumerate() {
                            let taken = (n as u64 + 1) * rate.time_for(1);
                            let most = BURST.max(rate.time_for(1)) + (last.at - first.at);
                            assert!(taken <= most, "{taken} of {most}");
                        }
                    }
                }
                if let Some(rate) = rates.tokens {
                    let rate = Rate::per_minute(rate.into());
                    for i in 0..books.len() {
                        let mut sum = 0;
                        for line in &books[i..] {
                            sum += line.tokens;
                            if !line.grant {
                                continue;
                            }
                            let same = books.iter().filter(|it| it.grant && it.at == line.at);
                            let largest = same.map(|it| it.tokens as u64).max();
                            let largest = rate.time_for(largest.unwrap_or(0));
                            let most = BURST.max(rate.time_for(1)).max(largest)
                                + (line.at - books[i].at)
                                // A credit is rounded to whole tokens in these books.
                                + books.len() as u64 * rate.time_for(1);
                            let taken = rate.time_for(u64::try_from(sum).unwrap_or(0));
                            assert!(taken <= most, "{taken} of {most}");
                        }
                    }
                }
            }
        }
    }

    #[derive(Debug, Clone)]
    enum Op {
        Arrive(usize, u64),
        Pass(u64),
        End(usize, CallOutcome),
        Leave(usize),
    }

    fn op() -> impl Strategy<Value = Op> {
        let outcome = prop_oneof![
            2 => Just(CallOutcome::NotSent),
            1 => Just(CallOutcome::Abandoned),
            1 => Just(CallOutcome::Throttled { wait: None }),
            4 => (0..600u64).prop_map(|input| CallOutcome::Succeeded {
                usage: Some(Usage::new(input, 0)),
            }),
        ];
        prop_oneof![
            8 => (0..4usize, 0..400u64).prop_map(|(tenant, tokens)| Op::Arrive(tenant, tokens)),
            4 => (0..3_000u64).prop_map(Op::Pass),
            4 => (any::<usize>(), outcome).prop_map(|(nth, outcome)| Op::End(nth, outcome)),
            1 => any::<usize>().prop_map(Op::Leave),
        ]
    }

    fn tenants() -> impl Strategy<Value = Vec<Tenant>> {
        use proptest::option::of;
        let rates = (of(1..2_000u64), of(60..100_000u64));
        proptest::collection::vec(rates, 4).prop_map(|rates| {
            let tenants = rates
                .into_iter()
                .enumerate()
                .map(|(n, (requests, tokens))| {
                    let tenant = Tenant::new(&n.to_string(), n as u32 + 1);
                    let tenant = requests
                        .into_iter()
                        .fold(tenant, Tenant::requests_per_minute);
                    tokens.into_iter().fold(tenant, Tenant::tokens_per_minute)
                });
            tenants.collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1_000))]

        /// Each call goes in the end, the lane keeps its limits, and no window of a tenant exceeds its rates.
        #[test]
        fn whatever_happens_each_tenant_keeps_its_rates(
            tenants in tenants(),
            in_flight in 1..6usize,
            requests in 60..6_000u64,
            ops in proptest::collection::vec(op(), 1..80),
        ) {
            let pace = Pace::per_minute(requests).in_flight(in_flight).adaptive(false);
            let mut world = World::new(&pace, tenants);
            for op in ops {
                match op {
                    Op::Arrive(tenant, tokens) => {
                        world.arrive(tenant, tokens);
                    }
                    Op::Pass(millis) => world.pass_until(world.now + millis * 1_000_000),
                    Op::End(nth, outcome) => {
                        if let Some(nth) = nth.checked_rem(world.held.len()) {
                            world.end(nth, outcome);
                        }
                    }
                    Op::Leave(nth) => {
                        if let Some(nth) = nth.checked_rem(world.waiting.len()) {
                            let id = *world.waiting.keys().nth(nth).unwrap();
                            let (key, ..) = world.waiting.remove(&id).unwrap();
                            let mut wakeups = Wakeups::default();
                            world.lane.leave(world.now, key, &mut wakeups);
                            world.collect(wakeups);
                        }
                    }
                }
                prop_assert!(world.held.len() <= in_flight);
                let capped = |tenant: usize| world.tenants[tenant].rates() != TenantRates::default();
                if world.lane.snapshot(world.now).binding == Binding::TenantRate {
                    prop_assert!(world.waiting.values().all(|(.., tenant)| capped(*tenant)));
                }
            }
            world.drain();
            world.check_windows();
            let rate = Rate::per_minute(requests);
            let mut sent: Vec<_> = world.books.iter().flatten().collect();
            sent.retain(|it| it.grant && !it.unsent);
            sent.sort_by_key(|it| it.at);
            for (i, first) in sent.iter().enumerate() {
                for (n, last) in sent[i..].iter().enumerate() {
                    let most = SECOND.max(rate.time_for(1)) + (last.at - first.at);
                    prop_assert!((n as u64 + 1) * rate.time_for(1) <= most);
                }
            }
        }

        /// In a lane that has room, a tenant without rates never waits, whatever others wait for.
        #[test]
        fn a_capped_tenant_delays_no_other(
            calls in proptest::collection::vec((0..3usize, 0..400u64, 0..300u64), 1..100),
        ) {
            let tenants = vec![
                Tenant::new("free", 1),
                Tenant::new("slow", 9).requests_per_minute(20),
                Tenant::new("small", 9).tokens_per_minute(6_000),
            ];
            let mut world = World::new(&Pace::unlimited(), tenants);
            for (tenant, tokens, gap) in calls {
                world.pass_until(world.now + gap * 1_000_000);
                let at_once = world.arrive(tenant, tokens);
                prop_assert!(at_once || tenant != 0);
            }
            world.drain();
            world.check_windows();
        }
    }

    fn one(tenant: Tenant) -> World {
        World::new(&Pace::unlimited(), vec![tenant])
    }

    #[test]
    fn a_call_larger_than_the_burst_waits_for_a_full_bucket_and_then_owes() {
        let mut world = one(Tenant::new("a", 1).tokens_per_minute(6_000));
        // 100 tokens flow in within a second.
        assert!(world.arrive(0, 1_000));
        assert!(!world.arrive(0, 1));
        world.pass_until(9 * SECOND);
        assert_eq!(world.waiting.len(), 1);
        world.pass_until(9 * SECOND + SECOND / 50);
        assert!(world.waiting.is_empty());
    }

    #[test]
    fn what_was_not_used_comes_back_and_what_was_used_beyond_is_owed() {
        let minute = |tokens| CallOutcome::Succeeded {
            usage: Some(Usage::new(tokens, 0)),
        };
        for (outcome, ready_at) in [
            (CallOutcome::NotSent, 0),
            (CallOutcome::Throttled { wait: None }, 0),
            (minute(10), 0),
            (CallOutcome::Abandoned, SECOND),
            (minute(200), 2 * SECOND),
        ] {
            let mut world = World::new(
                &Pace::unlimited().adaptive(false),
                vec![Tenant::new("a", 1).tokens_per_minute(6_000)],
            );
            assert!(world.arrive(0, 100));
            assert!(!world.arrive(0, 90));
            world.end(0, outcome);
            // A refusal without a wait cools the lane down, which says nothing of the tenant.
            let mut wakeups = Wakeups::default();
            world.lane.resume(0, &mut wakeups);
            world.collect(wakeups);
            let ready_at = ready_at - ready_at.min(SECOND / 10);
            world.pass_until(ready_at.saturating_sub(1));
            assert_eq!(world.waiting.is_empty(), ready_at == 0, "{outcome:?}");
            world.pass_until(ready_at);
            assert!(world.waiting.is_empty(), "{outcome:?}");
        }
    }

    #[test]
    fn the_rates_of_the_last_call_hold_for_all() {
        let mut world = one(Tenant::new("a", 1).requests_per_minute(1));
        assert!(world.arrive(0, 0));
        for _ in 0..10 {
            assert!(!world.arrive(0, 0));
        }
        assert_eq!(world.lane.snapshot(0).binding, Binding::TenantRate);
        assert_eq!(
            world.lane.snapshot(0).head_wait,
            Some(Duration::from_secs(60))
        );
        world.tenants[0] = Tenant::new("a", 1);
        world.arrive(0, 0);
        assert!(world.waiting.is_empty());
    }

    #[test]
    fn a_call_of_another_tenant_is_tried_while_a_capped_one_waits() {
        let mut world = one(Tenant::new("a", 1).requests_per_minute(1));
        assert!(world.arrive(0, 0) && !world.arrive(0, 0));
        let capped = Need::new(0, 0).tenant(world.tenants[0]);
        assert!(world.lane.try_enter(0, &capped).is_none());
        assert!(world.lane.try_enter(0, &Need::new(0, 0)).is_some());
    }

    #[test]
    fn tenants_that_come_and_go_leave_nothing_behind() {
        let mut lane = Scheduler::<u64>::new(&Pace::unlimited(), 0);
        let mut wakeups = Wakeups::default();
        for n in 0..20_000_u64 {
            let tenant = Tenant::new(&n.to_string(), 1).requests_per_minute(60);
            let need = Need::new(0, 0).tenant(tenant);
            let now = n * SECOND / 20;
            let grant = lane.try_enter(now, &need).expect("it has its first second");
            lane.finish(now, grant, None, CallOutcome::Abandoned, &mut wakeups);
            assert!(lane.capped_tenants() <= SWEEP_AT + 1);
        }
    }

    /// Prints the time of one grant, beside ever more tenants that wait for their rates. It must not grow with them.
    #[test]
    fn thousands_of_capped_tenants_do_not_slow_a_grant() {
        let measure = |tenants: usize| {
            let capped = |n: usize| Tenant::new(&n.to_string(), 1).requests_per_minute(60);
            let mut world = World::new(&Pace::unlimited(), (0..tenants).map(capped).collect());
            for n in 0..2 * tenants {
                world.arrive(n % tenants, 0);
            }
            assert_eq!(world.waiting.len(), tenants);
            let mut wakeups = Wakeups::default();
            let need = Need::new(0, 0);
            let began = std::time::Instant::now();
            for _ in 0..10_000 {
                let grant = world
                    .lane
                    .try_enter(0, &need)
                    .expect("nothing is in its way");
                world
                    .lane
                    .finish(0, grant, None, CallOutcome::Abandoned, &mut wakeups);
            }
            let other = began.elapsed() / 10_000;
            // Now they go, all at the same time.
            let began = std::time::Instant::now();
            world.pass_until(nanos(Duration::from_secs(1)));
            assert!(world.waiting.is_empty());
            (other, began.elapsed() / tenants as u32)
        };
        let times = [10, 1_000, 30_000].map(|tenants| (tenants, measure(tenants)));
        for (tenants, (other, capped)) in times {
            eprintln!(
                "{tenants} capped: {other:?} for another's call, {capped:?} for one of theirs"
            );
        }
        let [few, .., many] = times.map(|(_, (other, _))| other);
        assert!(many < 10 * few, "{many:?}, and {few:?} beside few");
    }

    #[test]
    #[should_panic(expected = "a tenant with zero requests per minute would never be served")]
    fn zero_requests_panic() {
        let _ = Tenant::new("a", 1).requests_per_minute(0);
    }

    #[test]
    #[should_panic(expected = "a tenant with zero tokens per minute would never be served")]
    fn zero_tokens_panic() {
        let _ = Tenant::new("a", 1).tokens_per_minute(0);
    }
}
