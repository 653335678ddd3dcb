//! Properties of the scheduler under any sequence of events.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use proptest::prelude::*;

use crate::ratelimit::bucket::{Nanos, Rate, nanos};
use crate::ratelimit::limit::Burst;
use crate::ratelimit::limits::Resource;
use crate::ratelimit::pace::Pace;
use crate::ratelimit::queue::WaiterKey;
use crate::ratelimit::scheduler::{Admission, GrantId, Scheduler, Wakeups};
use crate::ratelimit::types::{CallOutcome, Charge, Need, QueuePosition};
use crate::request::Usage;

/// One thing that can happen to a lane. Indices count modulo what there is.
#[derive(Debug, Clone)]
enum Op {
    Pass(Duration),
    Arrive(Charge),
    /// Arrives at the place of one that went before, as a retry does.
    Return(usize, Charge),
    Leave(usize),
    End(usize, CallOutcome),
    Retune(Pace),
    /// A caller that waits is not polled from now on.
    Ignore(usize),
    /// One that was not is polled again.
    Notice(usize),
}

struct Waiter {
    key: WaiterKey,
    need: Need,
}

struct Held {
    grant: GrantId,
    position: Option<QueuePosition>,
    charge: Charge,
    /// Where in the books this was entered.
    entry: usize,
}

/// A line in the books.
struct Booked {
    at: Duration,
    charge: Charge,
    kind: Kind,
}

#[derive(PartialEq)]
enum Kind {
    /// A grant, of a call that was sent or not.
    Grant { unsent: bool },
    /// A grant given back, of what was taken then.
    Refund { taken_at: Duration },
    /// A charge in the place of another.
    Settled { before: Charge },
}

/// The scheduler with everything around it that the shell and its users would be.
struct World {
    pace: Pace,
    scheduler: Scheduler<u64>,
    now: Duration,
    cooldown_until: Duration,
    waiting: BTreeMap<u64, Waiter>,
    /// Of those, the callers that are not polled.
    ignored: BTreeSet<u64>,
    /// Whether callers may be ignored: then the order is not strict.
    ignores: bool,
    awake: VecDeque<u64>,
    held: Vec<Held>,
    places: Vec<QueuePosition>,
    books: Vec<Booked>,
    next_id: u64,
}

impl World {
    fn new(pace: Pace) -> Self {
        Self {
            scheduler: Scheduler::new(&pace, 0),
            pace,
            now: Duration::ZERO,
            cooldown_until: Duration::ZERO,
            waiting: BTreeMap::new(),
            ignored: BTreeSet::new(),
            ignores: false,
            awake: VecDeque::new(),
            held: Vec::new(),
            places: Vec::new(),
            books: Vec::new(),
            next_id: 0,
        }
    }

    /// QueueKey is next, and when it goes at the latest, as long as no call in flight matters.
    fn add(&self) -> Option<(WaiterKey, Duration)> {
        let head = self.waiting.values().map(|waiter| waiter.key).min()?;
        let wait = self.scheduler.snapshot(nanos(self.now)).head_wait?;
        Some((head, self.now + wait))
    }

    /// A call that arrives or leaves does not delay the head of the queue.
    fn apply(&mut self, op: Op) {
        let harmless = matches!(op, Op::Pass(_) | Op::Arrive(_) | Op::Leave(_)) && !self.ignores;
        let before = self.add();
        self.carry_out(op);
        if let (true, Some((head, by)), Some((still, then))) = (harmless, before, self.add())
            && head == still
        {
            assert!(
                then <= by + Duration::from_micros(1),
                "{then:?}, not {by:?}"
            );
        }
    }

    fn carry_out(&mut self, op: Op) {
        match op {
            Op::Pass(time) => self.pass_until(self.now + time),
            Op::Arrive(charge) => self.arrive(None, charge),
            Op::Return(nth, charge) => {
                let position = pick(nth, self.places.len()).map(|i| self.places[i]);
                self.arrive(position, charge);
            }
            Op::Leave(nth) => {
                if let Some(i) = pick(nth, self.waiting.len()) {
                    let id = *self.waiting.keys().nth(i).unwrap();
                    let waiter = self.waiting.remove(&id).unwrap();
                    self.ignored.remove(&id);
                    self.step(|scheduler, now, wakeups| scheduler.leave(now, waiter.key, wakeups));
                }
            }
            Op::End(nth, end) => {
                if let Some(i) = pick(nth, self.held.len()) {
                    let held = self.held.swap_remove(i);
                    self.places.extend(held.position);
                    self.end(held, end);
                }
            }
            Op::Retune(pace) => {
                self.pace = pace.clone();
                // It ends the cooldown.
                self.cooldown_until = Duration::ZERO;
                self.step(|scheduler, now, wakeups| scheduler.retune(now, &pace, wakeups));
            }
            Op::Ignore(nth) => {
                if let Some(i) = pick(nth, self.waiting.len()) {
                    self.ignored.insert(*self.waiting.keys().nth(i).unwrap());
                }
            }
            Op::Notice(nth) => {
                if let Some(i) = pick(nth, self.ignored.len()) {
                    let id = *self.ignored.iter().nth(i).unwrap();
                    self.notice(id);
                }
            }
        }
    }

    fn notice(&mut self, id: u64) {
        self.ignored.remove(&id);
        self.awake.push_back(id);
        self.settle();
    }

    fn arrive(&mut self, position: Option<QueuePosition>, charge: Charge) {
        let mut need =
            Need::new(charge.input, charge.output).output_deferred(charge.output_deferred);
        need.position = position;
        let mut wakeups = Wakeups::default();
        let id = self.next_id;
        self.next_id += 1;
        let turn = self
            .scheduler
            .enter(nanos(self.now), &need, &id, &mut wakeups);
        wakeups.run(|id| self.awake.push_back(id));
        match turn {
            Admission::Granted(grant) => self.granted(grant, position, charge),
            Admission::Stopped(_) => {}
            Admission::Queued(key) => {
                self.waiting.insert(id, Waiter { key, need });
            }
        }
        self.settle();
    }

    fn end(&mut self, held: Held, end: CallOutcome) {
        let granted = &mut self.books[held.entry];
        let (before, taken_at) = (granted.charge, granted.at);
        // The reserved tokens, unless the outcome says otherwise.
        let mut charge = held.charge;
        let mut kind = Kind::Settled { before };
        match end {
            CallOutcome::NotSent => {
                granted.kind = Kind::Grant { unsent: true };
                (charge, kind) = (before, Kind::Refund { taken_at });
            }
            CallOutcome::Succeeded { usage: Some(usage) } => charge = usage.into(),
            CallOutcome::Overloaded { .. } => charge = before,
            CallOutcome::Throttled { wait } => {
                charge = Charge::default();
                self.cooldown_until = self.cooldown_until.max(self.now + wait.unwrap_or_default());
            }
            _ => {}
        }
        let at = self.now;
        self.books.push(Booked { at, charge, kind });
        self.step(|scheduler, now, wakeups| {
            scheduler.finish(now, held.grant, None, end, wakeups);
        });
    }

    fn granted(&mut self, grant: GrantId, position: Option<QueuePosition>, charge: Charge) {
        // Collected later, where the caller was not polled at once.
        let at = Duration::from_nanos(self.scheduler.granted_at(&grant));
        let late = self.now - at;
        assert!(late.is_zero() || self.ignores && late < Duration::from_secs(1));
        assert!(
            at >= self.cooldown_until || self.ignores,
            "a grant during a cooldown"
        );
        self.held.push(Held {
            grant,
            position,
            charge,
            entry: self.books.len(),
        });
        self.books.push(Booked {
            at,
            charge: charge.on_admission(),
            kind: Kind::Grant { unsent: false },
        });
    }

    fn step(&mut self, step: impl FnOnce(&mut Scheduler<u64>, Nanos, &mut Wakeups<u64>)) {
        let mut wakeups = Wakeups::default();
        step(&mut self.scheduler, nanos(self.now), &mut wakeups);
        wakeups.run(|id| self.awake.push_back(id));
        self.settle();
    }

    /// When a timer looks next.
    fn deadline(&self) -> Option<Duration> {
        self.scheduler.deadline().map(Duration::from_nanos)
    }

    fn pass_until(&mut self, then: Duration) {
        while let Some(at) = self.deadline().filter(|at| *at <= then) {
            self.now = self.now.max(at);
            self.step(|scheduler, now, wakeups| scheduler.tick(now, true, wakeups));
            let next = self.deadline();
            assert!(
                next.is_none_or(|at| at > self.now),
                "a deadline in the past"
            );
        }
        self.now = then;
    }

    /// Everybody who is awake looks, until all sleep; then the lane must be in order.
    fn settle(&mut self) {
        let mut granted = Vec::new();
        while let Some(id) = self.awake.pop_front() {
            let Some(waiter) = self.waiting.get_mut(&id) else {
                continue;
            };
            if self.ignored.contains(&id) {
                continue;
            }
            let (key, need) = (waiter.key, waiter.need);
            let charge = Charge::from(&need);
            let mut wakeups = Wakeups::default();
            let turn = self
                .scheduler
                .poll(nanos(self.now), key, &need, &id, &mut wakeups);
            wakeups.run(|id| self.awake.push_back(id));
            match turn {
                Admission::Granted(grant) => {
                    granted.push((key, charge));
                    self.waiting.remove(&id);
                    self.granted(grant, Some(key.position), charge);
                }
                Admission::Queued(key) => waiter.key = key,
                Admission::Stopped(_) => {
                    self.waiting.remove(&id);
                }
            }
        }
        let first_waiting = self.waiting.values().map(|waiter| waiter.key).min();
        for (key, charge) in granted {
            let in_order = first_waiting.is_none_or(|waiting| key < waiting);
            // QueueKey passes takes nothing of what the head waits for.
            let passes = charge.input == 0 || charge.output == 0;
            assert!(
                in_order || passes || self.ignores,
                "overtaken by {charge:?}"
            );
        }
        let snapshot = self.scheduler.snapshot(nanos(self.now));
        // Grants that were offered and not collected are in flight.
        let offered = snapshot.in_flight - self.held.len();
        assert!(offered <= self.ignored.len());
        assert_eq!(snapshot.waiting + offered, self.waiting.len());
        if let Some(wait) = snapshot.head_wait {
            let deadline = self.deadline();
            assert!(
                deadline.is_some_and(|at| at <= self.now + wait),
                "no timer looks at the head in time"
            );
        }
    }

    /// Passes the time, in which each call is answered after `latency`: by as much as it
    /// has reserved, or by `part` hundredths of it.
    fn live_until(&mut self, then: Duration, latency: Duration, exact: bool, part: u64) {
        loop {
            let ends = self.held.iter();
            let ends = ends.map(|held| self.books[held.entry].at + latency);
            let end = ends.enumerate().min_by_key(|(_, end)| *end);
            let deadline = self.deadline();
            match end {
                // QueueKey goes meanwhile may end before those that are under way now.
                _ if deadline
                    .is_some_and(|at| at <= then && end.is_none_or(|(_, end)| at < end)) =>
                {
                    self.pass_until(deadline.unwrap_or(then));
                }
                Some((i, end)) if end <= then => {
                    self.pass_until(end);
                    let held = self.held.remove(i);
                    let reserved = held.charge.output;
                    let output = if exact {
                        reserved
                    } else {
                        reserved * part / 100
                    };
                    let usage = Some(Usage::new(held.charge.input, output));
                    self.end(held, CallOutcome::Succeeded { usage });
                }
                _ => break,
            }
        }
        self.pass_until(then);
    }

    /// Ends all calls and passes the time until no caller waits that is polled.
    fn drain(&mut self) {
        loop {
            while let Some(held) = self.held.pop() {
                self.end(held, CallOutcome::Abandoned);
            }
            if self.waiting.len() == self.ignored.len() {
                break;
            }
            let next = self
                .deadline()
                .expect("a call waits and nothing will grant it");
            self.pass_until(next);
        }
        let in_flight = self.scheduler.snapshot(nanos(self.now)).in_flight;
        assert!(in_flight <= self.ignored.len());
    }

    /// In every window that ends with a grant: burst + rate · window, or one need
    /// larger than the burst.
    fn check_windows(&self) {
        for resource in Resource::ALL {
            let Some((rate, Burst { time: burst, .. })) = resource.limit(&self.pace) else {
                continue;
            };
            let capacity = i128::from(burst.max(rate.time_for(1)));
            let cost = |charge| i128::from(rate.time_for(resource.of(charge).min(rate.minute())));
            let time = |time: Duration| i128::from(nanos(time));
            // Tokens are booked when they are known; a request counts when it was sent.
            let by_request = matches!(resource, Resource::Spacing | Resource::Requests);
            let books = smaller_first(&self.books, cost);
            let lines = books.into_iter().filter_map(|line| {
                let full = cost(line.charge);
                let booked = match line.kind {
                    Kind::Grant { unsent } => (!(by_request && unsent)).then_some(full),
                    _ if by_request => None,
                    Kind::Refund { taken_at } => Some(-(full - time(line.at - taken_at)).max(0)),
                    Kind::Settled { before } => Some(full - cost(before)),
                };
                Some((line, booked?))
            });
            let lines: Vec<_> = lines.collect();
            for (i, (first, _)) in lines.iter().enumerate() {
                let mut sum = 0;
                for (line, booked) in &lines[i..] {
                    sum += booked;
                    if matches!(line.kind, Kind::Grant { .. }) {
                        let window = time(line.at - first.at);
                        let most = capacity.max(*booked) + window;
                        assert!(sum <= most, "{resource:?}: {sum} ns in {window} ns");
                    }
                }
            }
        }
    }
}

/// The books, and of those that were let in at one instant the smaller first: they are entered as they are polled.
/// Any order in which all can go is as good for this one.
fn smaller_first(books: &[Booked], cost: impl Fn(Charge) -> i128) -> Vec<&Booked> {
    let is_grant = |line: &Booked| matches!(line.kind, Kind::Grant { .. });
    let mut lines: Vec<_> = books.iter().collect();
    for together in lines.chunk_by_mut(|a, b| a.at == b.at && is_grant(a) && is_grant(b)) {
        together.sort_by_key(|line| cost(line.charge));
    }
    lines
}

/// A provider's bucket, as it keeps it: what a call takes when it is let in, and the rest
/// when it ends. Below zero it admits no call.
struct Provider {
    resource: Resource,
    rate: Rate,
    capacity: i128,
    level: i128,
    at: Duration,
}

impl Provider {
    fn of(resource: Resource, pace: &Pace) -> Option<Self> {
        let (rate, burst) = resource.limit(pace)?;
        let capacity = i128::from(burst.time.max(rate.time_for(1)));
        Some(Self {
            resource,
            rate,
            capacity,
            level: capacity,
            at: Duration::ZERO,
        })
    }

    fn cost(&self, charge: Charge) -> i128 {
        let units = self.resource.of(charge).min(self.rate.minute());
        self.rate.time_for(units).into()
    }

    fn pass_until(&mut self, now: Duration) {
        let passed = i128::from(nanos(now - self.at));
        self.level = (self.level + passed).min(self.capacity);
        self.at = now;
    }

    /// Reads the books, as far as calls were sent: none is refused. Says what was owed at most.
    fn reads(mut self, books: &[Booked]) -> Duration {
        let mut owed = 0;
        for line in smaller_first(books, |charge| self.cost(charge)) {
            self.pass_until(line.at);
            let cost = self.cost(line.charge);
            match line.kind {
                Kind::Grant { unsent: false } => {
                    let needed = cost.min(self.capacity);
                    // The lane's time counts whole nanoseconds of a slower clock.
                    let level = self.level + 1_000;
                    assert!(level >= needed, "{:?} would be refused", self.resource);
                    self.level -= cost;
                }
                Kind::Settled { before } => {
                    let rest = cost - self.cost(before);
                    self.level = (self.level - rest).min(self.capacity);
                }
                Kind::Grant { unsent: true } | Kind::Refund { .. } => {}
            }
            owed = owed.max(-self.level);
        }
        Duration::from_nanos(owed as u64)
    }
}

fn pick(nth: usize, of: usize) -> Option<usize> {
    nth.checked_rem(of)
}

fn charge() -> impl Strategy<Value = Charge> {
    // Some are larger than any burst below.
    let tokens = || prop_oneof![2 => Just(0), 8 => 0..300u64, 1 => 0..5_000u64];
    (tokens(), tokens(), any::<bool>()).prop_map(|(input, output, output_deferred)| Charge {
        input,
        output,
        output_deferred,
    })
}

fn wait() -> impl Strategy<Value = Option<Duration>> {
    proptest::option::of((0..20_000u64).prop_map(Duration::from_millis))
}

fn end() -> impl Strategy<Value = CallOutcome> {
    prop_oneof![
        2 => Just(CallOutcome::NotSent),
        1 => Just(CallOutcome::Abandoned),
        1 => Just(CallOutcome::Failed { usage: None }),
        1 => Just(CallOutcome::Succeeded { usage: None }),
        8 => (0..400u64, 0..400u64).prop_map(|(input, output)| {
            CallOutcome::Succeeded { usage: Some(Usage::new(input, output)) }
        }),
        1 => wait().prop_map(|wait| CallOutcome::Throttled { wait }),
        1 => wait().prop_map(|wait| CallOutcome::Overloaded { wait }),
    ]
}

fn pace() -> impl Strategy<Value = Pace> {
    use proptest::option::of;
    (
        of(prop_oneof![1..20u64, 1..100_000u64]),
        of(1..1_000_000u64),
        of(1..1_000_000u64),
        of(1..1_000_000u64),
        of(1..6usize),
        of(1..3_000u64),
        0..3_000u64,
    )
        .prop_map(
            |(requests, tokens, input, output, in_flight, spacing, burst)| {
                let mut pace = requests.map_or_else(Pace::unlimited, Pace::per_minute);
                pace = pace.burst(Duration::from_millis(burst));
                pace = tokens.into_iter().fold(pace, Pace::tokens);
                pace = input.into_iter().fold(pace, Pace::input_tokens);
                pace = output.into_iter().fold(pace, Pace::output_tokens);
                pace = in_flight.into_iter().fold(pace, Pace::in_flight);
                let spacing = spacing.map(Duration::from_millis);
                spacing.into_iter().fold(pace, Pace::spacing)
            },
        )
}

fn op() -> impl Strategy<Value = Op> {
    let time = prop_oneof![
        Just(Duration::ZERO),
        (0..50_000_000u64).prop_map(Duration::from_nanos),
        (0..5_000u64).prop_map(Duration::from_millis),
    ];
    prop_oneof![
        4 => time.prop_map(Op::Pass),
        6 => charge().prop_map(Op::Arrive),
        1 => (any::<usize>(), charge()).prop_map(|(nth, charge)| Op::Return(nth, charge)),
        1 => any::<usize>().prop_map(Op::Leave),
        4 => (any::<usize>(), end()).prop_map(|(nth, end)| Op::End(nth, end)),
    ]
}

/// A thousand take seconds in a debug build.
fn cases() -> u32 {
    match std::env::var_os("THROUGHLINE_LONG") {
        Some(_) => 10_000,
        None => 1_000,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]

    /// Order, limits, cooldown and deadlines hold at every step (see `World::settle`).
    #[test]
    fn whatever_happens_the_lane_is_in_order(
        pace in pace(),
        ops in proptest::collection::vec(op(), 1..60),
    ) {
        let max_in_flight = pace.in_flight.unwrap_or(usize::MAX);
        let mut world = World::new(pace);
        for op in ops {
            world.apply(op);
            prop_assert!(world.held.len() <= max_in_flight);
        }
        world.drain();
        world.check_windows();
        // The provider does not know of a call that was never sent: its bucket may be full, and lose units, while that of
        // the lane is not.
        let unsent = |line: &Booked| line.kind == Kind::Grant { unsent: true };
        if !world.books.iter().any(unsent) {
            for resource in Resource::ALL {
                let provider = Provider::of(resource, &world.pace);
                provider.map(|provider| provider.reads(&world.books));
            }
        }
    }

    /// No call is refused whose answer is charged at its end. If the charge is the reserved one, the debt is at most the
    /// units that flow in during one call (or the cost of one call), plus one standard deviation of the charges in flight.
    /// The deviation of one call is at most half of the largest charge.
    #[test]
    fn calls_that_are_charged_at_their_end_are_not_refused_and_leave_a_small_debt(
        per_minute in 60..1_000_000u64,
        burst in 0..3_000u64,
        latency in 1..20_000u64,
        exact: bool,
        calls in proptest::collection::vec((0..4_000u64, 1..3_000u64, 0..300u64), 1..60),
    ) {
        let pace = Pace::unlimited().output_tokens(per_minute).burst(Duration::from_millis(burst));
        let latency = Duration::from_millis(latency);
        let mut world = World::new(pace);
        let rate = Resource::OutputTokens.limit(&world.pace).unwrap().0;
        let mut largest = Duration::ZERO;
        for (gap, output, part) in calls {
            world.live_until(world.now + Duration::from_millis(gap), latency, exact, part);
            largest = largest.max(Duration::from_nanos(rate.time_for(output)));
            world.carry_out(Op::Arrive(Charge { input: 0, output, output_deferred: true }));
        }
        while !world.waiting.is_empty() || !world.held.is_empty() {
            world.live_until(world.now + latency, latency, exact, 100);
        }
        let provider = Provider::of(Resource::OutputTokens, &world.pace).unwrap();
        let owed = provider.reads(&world.books);
        if exact {
            let spread = largest.mul_f64(0.5 * (world.books.len() as f64 / 2.0).sqrt());
            let most = latency.max(largest) + spread + Duration::from_micros(1);
            prop_assert!(owed <= most, "{owed:?} owed, not {most:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Callers that are not polled hold up no other and take nothing with them, and they go
    /// when they are polled again and it is their turn. No grant is collected much later than made.
    #[test]
    fn callers_that_are_not_polled_strand_nobody(
        pace in pace(),
        ops in proptest::collection::vec(
            prop_oneof![
                10 => op(),
                2 => any::<usize>().prop_map(Op::Ignore),
                1 => any::<usize>().prop_map(Op::Notice),
            ],
            1..100,
        ),
    ) {
        let max_in_flight = pace.in_flight.unwrap_or(usize::MAX);
        let mut world = World::new(pace);
        world.ignores = true;
        for op in ops {
            world.apply(op);
            prop_assert!(world.held.len() <= max_in_flight);
        }
        world.drain();
        while let Some(id) = world.ignored.first().copied() {
            world.notice(id);
            world.drain();
        }
        prop_assert_eq!(world.scheduler.snapshot(nanos(world.now)).in_flight, 0);
    }

    #[test]
    fn retuning_strands_nobody(
        first in pace(),
        ops in proptest::collection::vec(
            prop_oneof![10 => op(), 1 => pace().prop_map(Op::Retune)],
            1..200,
        ),
    ) {
        let mut world = World::new(first);
        for op in ops {
            let before = world.held.len();
            world.apply(op);
            let most = world.pace.in_flight.unwrap_or(usize::MAX);
            prop_assert!(world.held.len() <= most.max(before));
        }
        world.drain();
    }
}

#[test]
fn a_hundred_thousand_waiters_go_one_by_one() {
    let mut world = Scheduler::<u64>::new(
        &Pace::per_minute(60_000_000).burst(Duration::from_secs(1)),
        0,
    );
    let mut now = 0;
    let mut wakeups = Wakeups::default();
    let need = Need::default();
    let mut keys = VecDeque::new();
    let mut granted = 0;
    for id in 0..1_100_000 {
        match world.enter(now, &need, &id, &mut wakeups) {
            Admission::Granted(_) => granted += 1,
            Admission::Queued(key) => keys.push_back((id, key)),
            Admission::Stopped(_) => panic!("the lane was not stopped"),
        }
    }
    assert_eq!((granted, keys.len()), (1_000_000, 100_000));
    while let Some((id, key)) = keys.pop_front() {
        now += 1_000;
        match world.poll(now, key, &need, &id, &mut wakeups) {
            Admission::Granted(_) => granted += 1,
            _ => panic!("its time has come"),
        }
    }
    assert_eq!(granted, 1_100_000);
}

/// A caller that collects its grant must not change the time at which the next one can go.
#[test]
fn collecting_a_grant_keeps_the_deadline_of_the_next_call() {
    let mut lane = Scheduler::<u64>::new(&Pace::per_minute(60).burst(Duration::ZERO), 0);
    let mut wakeups = Wakeups::default();
    let need = Need::default();
    let Admission::Granted(id) = lane.enter(0, &need, &0, &mut wakeups) else {
        panic!("nothing is in its way");
    };
    lane.finish(
        0,
        id,
        None,
        CallOutcome::Throttled { wait: None },
        &mut wakeups,
    );
    let [first, _second] = [1, 2].map(|id| match lane.enter(0, &need, &id, &mut wakeups) {
        Admission::Queued(key) => key,
        _ => panic!("the lane cools down"),
    });
    let granted_at = lane.deadline().expect("two calls wait");
    lane.tick(granted_at, true, &mut wakeups);
    let now = granted_at + 20_000_000;
    let turn = lane.poll(now, first, &need, &1, &mut wakeups);
    assert!(matches!(turn, Admission::Granted(_)));
    let wait = lane.snapshot(now).head_wait.expect("the second call waits");
    let deadline = lane.deadline().expect("the second call waits");
    assert!(deadline <= now + nanos(wait), "{deadline} after {wait:?}");
}

/// The cap of a charge depends on the rate: a call that was granted before a retune must still be removed from the
/// charges that are pending.
#[test]
fn a_deferred_charge_is_removed_although_the_limit_was_lowered_meanwhile() {
    let pace = |tokens| Pace::unlimited().tokens(tokens).burst(Duration::ZERO);
    let mut lane = Scheduler::<u64>::new(&pace(470), 0);
    let mut wakeups = Wakeups::default();
    let need = Need::new(188, 282).output_deferred(true);
    let Admission::Granted(id) = lane.enter(0, &need, &0, &mut wakeups) else {
        panic!("nothing is in its way");
    };
    lane.retune(0, &pace(1), &mut wakeups);
    let next = Need::new(0, 12).output_deferred(true);
    let queued = lane.enter(0, &next, &1, &mut wakeups);
    assert!(matches!(queued, Admission::Queued(_)));
    lane.finish(0, id, None, CallOutcome::Abandoned, &mut wakeups);
    assert!(lane.deadline().is_some(), "no call is in flight");
}
