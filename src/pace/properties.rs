//! What must hold of the turnstile whatever happens to it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use proptest::prelude::*;

use super::bucket::{Nanos, Rate, nanos};
use super::buckets::Resource;
use super::limits::Pace;
use super::meter::Burst;
use super::queue::Key;
use super::turnstile::{End, Errands, Grant, Turn, Turnstile};
use super::words::{CallOutcome, Charge, Need, Place};
use crate::usage::Usage;

/// One thing that can happen to a lane. Indices count modulo what there is.
#[derive(Debug, Clone)]
enum Op {
    Pass(Duration),
    Arrive(Charge),
    /// Arrives at the place of one that went before, as a retry does.
    Return(usize, Charge),
    Leave(usize),
    End(usize, End),
    Retune(Pace),
}

struct Waiter {
    key: Key,
    charge: Charge,
}

struct Held {
    grant: Grant,
    place: Option<Place>,
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

/// The turnstile with everything around it that the shell and its users would be.
struct World {
    pace: Pace,
    turnstile: Turnstile<u64>,
    now: Duration,
    closed_until: Duration,
    waiting: BTreeMap<u64, Waiter>,
    alarms: BTreeSet<(Duration, u64)>,
    awake: VecDeque<u64>,
    held: Vec<Held>,
    places: Vec<Place>,
    books: Vec<Booked>,
    next_id: u64,
}

impl World {
    fn new(pace: Pace) -> Self {
        Self {
            turnstile: Turnstile::new(&pace, 0),
            pace,
            now: Duration::ZERO,
            closed_until: Duration::ZERO,
            waiting: BTreeMap::new(),
            alarms: BTreeSet::new(),
            awake: VecDeque::new(),
            held: Vec::new(),
            places: Vec::new(),
            books: Vec::new(),
            next_id: 0,
        }
    }

    /// Who is next, and when it goes at the latest, as long as no call in flight matters.
    fn promise(&self) -> Option<(Key, Duration)> {
        let head = self.waiting.values().map(|waiter| waiter.key).min()?;
        let wait = self.turnstile.snapshot(nanos(self.now)).head_wait?;
        Some((head, self.now + wait))
    }

    /// What arrives or leaves, whoever it lets pass, keeps nobody waiting who is next.
    fn apply(&mut self, op: Op) {
        let harmless = matches!(op, Op::Pass(_) | Op::Arrive(_) | Op::Leave(_));
        let before = self.promise();
        self.carry_out(op);
        if let (true, Some((head, by)), Some((still, then))) = (harmless, before, self.promise())
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
                let place = pick(nth, self.places.len()).map(|i| self.places[i]);
                self.arrive(place, charge);
            }
            Op::Leave(nth) => {
                if let Some(i) = pick(nth, self.waiting.len()) {
                    let id = *self.waiting.keys().nth(i).unwrap();
                    let waiter = self.waiting.remove(&id).unwrap();
                    self.alarms.retain(|(_, of)| *of != id);
                    self.step(|turnstile, now, errands| turnstile.leave(now, waiter.key, errands));
                }
            }
            Op::End(nth, end) => {
                if let Some(i) = pick(nth, self.held.len()) {
                    let held = self.held.swap_remove(i);
                    self.places.extend(held.place);
                    self.end(held, end);
                }
            }
            Op::Retune(pace) => {
                self.pace = pace.clone();
                self.step(|turnstile, now, errands| turnstile.retune(now, &pace, errands));
            }
        }
    }

    fn arrive(&mut self, place: Option<Place>, charge: Charge) {
        let mut need = Need::new(charge.input, charge.output).in_arrears(charge.in_arrears);
        need.place = place;
        let mut errands = Errands::default();
        let id = self.next_id;
        self.next_id += 1;
        let turn = self
            .turnstile
            .enter(nanos(self.now), &need, &id, &mut errands);
        errands.run(|id| self.awake.push_back(id));
        match turn {
            Turn::Granted(grant) => self.granted(grant, place, charge),
            Turn::Stopped(_) => {}
            Turn::Wait(key, alarm) => {
                self.waiting.insert(id, Waiter { key, charge });
                self.set_alarm(id, alarm);
            }
        }
        self.settle();
    }

    fn end(&mut self, held: Held, end: End) {
        let granted = &mut self.books[held.entry];
        let (before, taken_at) = (granted.charge, granted.at);
        // Nobody says otherwise: what was reserved.
        let mut charge = held.charge;
        let mut kind = Kind::Settled { before };
        match end {
            End::Unsent => {
                granted.kind = Kind::Grant { unsent: true };
                (charge, kind) = (before, Kind::Refund { taken_at });
            }
            End::Finished(CallOutcome::Done { usage: Some(usage) }) => charge = usage.into(),
            End::Finished(CallOutcome::Overloaded { .. }) => charge = before,
            End::Finished(CallOutcome::Throttled { wait }) => {
                charge = Charge::default();
                self.closed_until = self.closed_until.max(self.now + wait.unwrap_or_default());
            }
            _ => {}
        }
        let at = self.now;
        self.books.push(Booked { at, charge, kind });
        self.step(|turnstile, now, errands| {
            turnstile.finish(now, held.grant, end, errands);
        });
    }

    fn granted(&mut self, grant: Grant, place: Option<Place>, charge: Charge) {
        assert!(
            self.now >= self.closed_until,
            "a grant through a closed gate"
        );
        self.held.push(Held {
            grant,
            place,
            charge,
            entry: self.books.len(),
        });
        self.books.push(Booked {
            at: self.now,
            charge: charge.on_admission(),
            kind: Kind::Grant { unsent: false },
        });
    }

    fn step(&mut self, step: impl FnOnce(&mut Turnstile<u64>, Nanos, &mut Errands<u64>)) {
        let mut errands = Errands::default();
        step(&mut self.turnstile, nanos(self.now), &mut errands);
        errands.run(|id| self.awake.push_back(id));
        self.settle();
    }

    fn set_alarm(&mut self, id: u64, alarm: Option<Nanos>) {
        if let Some(at) = alarm.map(Duration::from_nanos) {
            assert!(at > self.now, "an alarm in the past");
            self.alarms.retain(|(_, of)| *of != id);
            self.alarms.insert((at, id));
        }
    }

    fn pass_until(&mut self, then: Duration) {
        while let Some(&(at, id)) = self.alarms.first().filter(|(at, _)| *at <= then) {
            self.alarms.pop_first();
            self.now = self.now.max(at);
            self.awake.push_back(id);
            self.settle();
        }
        self.now = then;
    }

    /// Everybody who is awake looks, until all sleep; then the lane must be in order.
    fn settle(&mut self) {
        let mut granted = Vec::new();
        while let Some(id) = self.awake.pop_front() {
            let Some(waiter) = self.waiting.get(&id) else {
                continue;
            };
            let (key, charge) = (waiter.key, waiter.charge);
            let mut errands = Errands::default();
            let turn = self.turnstile.poll(nanos(self.now), key, &id, &mut errands);
            errands.run(|id| self.awake.push_back(id));
            match turn {
                Turn::Granted(grant) => {
                    granted.push((key, charge));
                    self.waiting.remove(&id);
                    self.alarms.retain(|(_, of)| *of != id);
                    self.granted(grant, Some(key.place), charge);
                }
                Turn::Wait(_, alarm) => self.set_alarm(id, alarm),
                Turn::Stopped(_) => {
                    self.waiting.remove(&id);
                    self.alarms.retain(|(_, of)| *of != id);
                }
            }
        }
        let first_waiting = self.waiting.values().map(|waiter| waiter.key).min();
        for (key, charge) in granted {
            let in_order = first_waiting.is_none_or(|waiting| key < waiting);
            // Who passes takes nothing of what the head waits for.
            let passes = charge.input == 0 || charge.output == 0;
            assert!(in_order || passes, "overtaken by {charge:?}");
        }
        let snapshot = self.turnstile.snapshot(nanos(self.now));
        assert_eq!(snapshot.in_flight, self.held.len());
        assert_eq!(snapshot.waiting, self.waiting.len());
        if let Some(wait) = snapshot.head_wait {
            let alarm = self.alarms.first().map(|(at, _)| *at);
            assert!(
                alarm.is_some_and(|at| at <= self.now + wait),
                "nobody keeps the time"
            );
        }
    }

    /// Passes the time, in which each call is answered after `latency`: by as much as it
    /// has reserved, or by so many hundredths of it.
    fn live_until(&mut self, then: Duration, latency: Duration, exact: bool, part: u64) {
        loop {
            let ends = self.held.iter();
            let ends = ends.map(|held| self.books[held.entry].at + latency);
            let end = ends.enumerate().min_by_key(|(_, end)| *end);
            let alarm = self.alarms.first().map(|(at, _)| *at);
            match end {
                // Who goes meanwhile may end before those that are under way now.
                _ if alarm.is_some_and(|at| at <= then && end.is_none_or(|(_, end)| at < end)) => {
                    self.pass_until(alarm.unwrap_or(then));
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
                    self.end(held, End::Finished(CallOutcome::Done { usage }));
                }
                _ => break,
            }
        }
        self.pass_until(then);
    }

    /// Ends all calls and passes the time until nobody waits.
    fn drain(&mut self) {
        loop {
            while let Some(held) = self.held.pop() {
                self.end(held, End::Abandoned);
            }
            if self.waiting.is_empty() {
                break;
            }
            let next = self
                .alarms
                .first()
                .expect("somebody waits and nobody will come")
                .0;
            self.pass_until(next);
        }
        assert_eq!(self.turnstile.snapshot(nanos(self.now)).in_flight, 0);
    }

    /// In every window that ends with a grant: burst + rate · window, or one need
    /// larger than the burst.
    fn check_windows(&self) {
        for resource in Resource::ALL {
            let Some((rate, Burst { time: burst, .. })) = resource.limit(&self.pace) else {
                continue;
            };
            let capacity = i128::from(nanos(burst).max(rate.time_for(1)));
            let cost = |charge| i128::from(rate.time_for(resource.of(charge)));
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

/// The books, and of those that were let in at one instant the smaller first: they are entered as they look, and
/// the timekeeper, who looks first, may have gone last. Any order in which all can go is as good for this one.
fn smaller_first(books: &[Booked], cost: impl Fn(Charge) -> i128) -> Vec<&Booked> {
    let is_grant = |line: &Booked| matches!(line.kind, Kind::Grant { .. });
    let mut lines: Vec<_> = books.iter().collect();
    for together in lines.chunk_by_mut(|a, b| a.at == b.at && is_grant(a) && is_grant(b)) {
        together.sort_by_key(|line| cost(line.charge));
    }
    lines
}

/// A provider's bucket, as it keeps it: what a call takes when it is let in, and the rest
/// when it ends. Below zero it lets nobody in.
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
        let capacity = i128::from(nanos(burst.time).max(rate.time_for(1)));
        Some(Self {
            resource,
            rate,
            capacity,
            level: capacity,
            at: Duration::ZERO,
        })
    }

    fn cost(&self, charge: Charge) -> i128 {
        self.rate.time_for(self.resource.of(charge)).into()
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
    (tokens(), tokens(), any::<bool>()).prop_map(|(input, output, in_arrears)| Charge {
        input,
        output,
        in_arrears,
    })
}

fn wait() -> impl Strategy<Value = Option<Duration>> {
    proptest::option::of((0..20_000u64).prop_map(Duration::from_millis))
}

fn end() -> impl Strategy<Value = End> {
    prop_oneof![
        2 => Just(End::Unsent),
        1 => Just(End::Abandoned),
        1 => Just(End::Finished(CallOutcome::Failed { usage: None })),
        1 => Just(End::Finished(CallOutcome::Done { usage: None })),
        8 => (0..400u64, 0..400u64).prop_map(|(input, output)| {
            End::Finished(CallOutcome::Done { usage: Some(Usage::new(input, output)) })
        }),
        1 => wait().prop_map(|wait| End::Finished(CallOutcome::Throttled { wait })),
        1 => wait().prop_map(|wait| End::Finished(CallOutcome::Overloaded { wait })),
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

    /// Order, limits, gate and timekeeping hold at every step (see `World::settle`).
    #[test]
    fn whatever_happens_the_lane_is_in_order(
        pace in pace(),
        ops in proptest::collection::vec(op(), 1..60),
    ) {
        let most_in_flight = pace.in_flight.unwrap_or(usize::MAX);
        let mut world = World::new(pace);
        for op in ops {
            world.apply(op);
            prop_assert!(world.held.len() <= most_in_flight);
        }
        world.drain();
        world.check_windows();
        // Of a call that was never sent the provider knows nothing, so that what is credited
        // meanwhile is lost at its brim and not at ours.
        let unsent = |line: &Booked| line.kind == Kind::Grant { unsent: true };
        if !world.books.iter().any(unsent) {
            for resource in Resource::ALL {
                let provider = Provider::of(resource, &world.pace);
                provider.map(|provider| provider.reads(&world.books));
            }
        }
    }

    /// Answers that are charged when they are there: no call is refused; and where they cost
    /// what was reserved, no more is owed than flows in while a call takes its time (or
    /// than one call costs), and one standard deviation of what was in flight: that of
    /// one call is half of the largest at most.
    #[test]
    fn what_is_charged_at_the_end_is_never_refused_nor_owed_for_long(
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
            world.carry_out(Op::Arrive(Charge { input: 0, output, in_arrears: true }));
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
    let mut world = Turnstile::<u64>::new(
        &Pace::per_minute(60_000_000).burst(Duration::from_secs(1)),
        0,
    );
    let mut now = 0;
    let mut errands = Errands::default();
    let need = Need::default();
    let mut keys = VecDeque::new();
    let mut granted = 0;
    for id in 0..1_100_000 {
        match world.enter(now, &need, &id, &mut errands) {
            Turn::Granted(_) => granted += 1,
            Turn::Wait(key, _) => keys.push_back((id, key)),
            Turn::Stopped(_) => panic!("nobody stopped it"),
        }
    }
    assert_eq!((granted, keys.len()), (1_000_000, 100_000));
    while let Some((id, key)) = keys.pop_front() {
        now += 1_000;
        match world.poll(now, key, &id, &mut errands) {
            Turn::Granted(_) => granted += 1,
            _ => panic!("its time has come"),
        }
    }
    assert_eq!(granted, 1_100_000);
}
