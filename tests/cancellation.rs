//! Futures are dropped at every poll while other calls use the same lanes. Afterwards all permits are back, no caller
//! waits for ever, the lanes are as fast as before, and the tally counts every call that was sent.
//!
//! The first test visits all polls of all operations, the last draws combinations by seed, on the paused clock except
//! for runs with several threads. A failure prints its seed.
//!
//! ```text
//! THROUGHLINE_SEED=17 cargo test --all-features --test cancellation random      # one combination
//! THROUGHLINE_LONG=1 THROUGHLINE_MINUTES=25 cargo test --release …              # runs for 25 minutes
//! ```

#[path = "support/long.rs"]
mod long;

use std::fmt;
use std::future::{Future, poll_fn};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use fastrand::Rng;
use futures::future::{BoxFuture, join_all};
use futures::{FutureExt as _, StreamExt as _, stream};
use throughline::provider::Capabilities;
use throughline::store::Memory;
use throughline::{
    Context, Error, ErrorKind, Pace, Provider, Reply, Request, Result, Usage, async_trait,
    call::Deployment,
    ratelimit::{CallOutcome, Lane, Need, Priority, Tenant},
    request::{Delta, ReplyStream},
};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

const SECOND: Duration = Duration::from_secs(1);
/// A wait of this length on the paused clock means that it never ends.
const FOR_EVER: Duration = Duration::from_secs(48 * 3600);
/// How long a future that is not polled is held before it is dropped or polled again.
const HELD: Duration = Duration::from_secs(20);

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// How a future is interrupted after a number of polls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Interruption {
    /// Dropped at once after that poll.
    Dropped,
    /// Dropped when it is woken, in the place of the next poll.
    DroppedWhenWoken,
    /// Not polled any more, and dropped after a while.
    HeldAndDropped,
    /// Not polled for a while, and then to its end.
    HeldAndResumed,
}

impl Interruption {
    const ALL: [Self; 4] = [
        Self::Dropped,
        Self::DroppedWhenWoken,
        Self::HeldAndDropped,
        Self::HeldAndResumed,
    ];
}

/// Runs `future` and interrupts it after `polls` polls. Returns its output, if it completed, and whether it completed
/// before the interruption.
async fn interrupt<F: Future>(
    future: F,
    polls: usize,
    how: Interruption,
    held: Duration,
) -> (Option<F::Output>, bool) {
    let mut future = Box::pin(future);
    let mut done = 0;
    let early = poll_fn(|cx| {
        if done == polls {
            return Poll::Ready(None);
        }
        done += 1;
        match future.as_mut().poll(cx) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if done == polls && how != Interruption::DroppedWhenWoken => {
                Poll::Ready(None)
            }
            Poll::Pending => Poll::Pending,
        }
    });
    match (early.await, how) {
        (Some(output), _) => (Some(output), true),
        (None, Interruption::Dropped | Interruption::DroppedWhenWoken) => (None, false),
        (None, Interruption::HeldAndDropped) => {
            sleep(held).await;
            (None, false)
        }
        (None, Interruption::HeldAndResumed) => {
            sleep(held).await;
            (Some(future.await), false)
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Answer {
    Good,
    Throttled(Option<u64>),
    Overloaded,
    Unavailable,
    Broken,
    Refused,
}

/// A provider that counts its calls and gives different answers in turn.
#[derive(Clone)]
struct Account(Arc<State>);

struct State {
    answers: Vec<Answer>,
    latencies: Vec<Duration>,
    started: AtomicU64,
    answered: AtomicU64,
    throttled: AtomicU64,
    /// Calls that failed, those that were throttled not counted.
    failed: AtomicU64,
    /// Failed calls of which it is unknown whether they are billed.
    ambiguous: AtomicU64,
    dropped: AtomicU64,
}

/// Counts its call as dropped unless that has ended.
struct Started(Option<Account>);

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(account) = &self.0 {
            account.0.dropped.fetch_add(1, Ordering::SeqCst);
        }
    }
}

impl Account {
    fn new(answers: Vec<Answer>, latencies: Vec<Duration>) -> Self {
        Self(Arc::new(State {
            answers,
            latencies,
            started: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            throttled: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            ambiguous: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
        }))
    }

    fn start(&self) -> (Started, Answer, Duration) {
        let state = &self.0;
        let n = state.started.fetch_add(1, Ordering::SeqCst) as usize;
        let answer = state.answers[n % state.answers.len()];
        let latency = state.latencies[n % state.latencies.len()];
        (Started(Some(self.clone())), answer, latency)
    }

    fn end(&self, mut started: Started, answer: Answer) -> Result<Reply> {
        started.0 = None;
        let error = match answer {
            Answer::Good => {
                self.0.answered.fetch_add(1, Ordering::SeqCst);
                return Ok(Reply::new("answer", Usage::new(1, 2)));
            }
            Answer::Throttled(wait) => {
                self.0.throttled.fetch_add(1, Ordering::SeqCst);
                let error = Error::new(ErrorKind::Throttled, "slow down");
                return Err(match wait {
                    Some(wait) => error.with_wait(Duration::from_secs(wait)),
                    None => error,
                });
            }
            Answer::Overloaded => Error::new(ErrorKind::Overloaded, "busy"),
            Answer::Unavailable => Error::new(ErrorKind::Unavailable, "down"),
            Answer::Broken => Error::new(ErrorKind::Connection, "reset"),
            Answer::Refused => Error::new(ErrorKind::InvalidRequest, "no"),
        };
        self.0.failed.fetch_add(1, Ordering::SeqCst);
        if error.billed().is_none() {
            self.0.ambiguous.fetch_add(1, Ordering::SeqCst);
        }
        Err(error)
    }
}

#[async_trait]
impl Provider for Account {
    fn name(&self) -> &str {
        "account"
    }

    async fn generate(&self, _: &Request) -> Result<Reply> {
        let (started, answer, latency) = self.start();
        if !latency.is_zero() {
            sleep(latency).await;
        }
        self.end(started, answer)
    }

    /// Three pieces of text, and the end or the failure.
    async fn stream(&self, _: &Request) -> Result<ReplyStream> {
        let (started, answer, latency) = self.start();
        let account = self.clone();
        let deltas = stream::unfold(Some((started, 0)), move |state| {
            let account = account.clone();
            async move {
                let (started, piece) = state?;
                sleep(latency / 4).await;
                if piece < 3 {
                    let text = ["an", "sw", "er"][piece].to_owned();
                    return Some((Ok(Delta::Text(text)), Some((started, piece + 1))));
                }
                let end = account.end(started, answer);
                Some((end.map(|reply| Delta::End(Box::new(reply))), None))
            }
        });
        Ok(deltas.boxed())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::default().with_streaming()
    }
}

/// An operation whose future is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Generate,
    Shared,
    Stream,
    Settle,
    TryAll,
    Outcomes,
    Nested,
    Deadline,
    Drained,
    Lane,
}

impl Operation {
    const ALL: [Self; 10] = [
        Self::Generate,
        Self::Shared,
        Self::Stream,
        Self::Settle,
        Self::TryAll,
        Self::Outcomes,
        Self::Nested,
        Self::Deadline,
        Self::Drained,
        Self::Lane,
    ];

    fn start(self, world: &World, id: u64) -> BoxFuture<'static, ()> {
        let cx = world.cx.child("victim");
        let lane = world.first_lane();
        let latency = world.latency;
        let ask = |cx: Context, n: u64| async move { cx.generate(format!("{n}")).await };
        match self {
            Self::Generate => async move {
                let _ = cx.generate(format!("{id}")).await;
            }
            .boxed(),
            Self::Shared => async move {
                let _ = cx.generate(Request::new("shared").shared()).await;
            }
            .boxed(),
            Self::Stream => async move {
                let mut deltas = cx.stream(format!("{id}")).discarding();
                while deltas.next().await.is_some() {}
            }
            .boxed(),
            Self::Settle => async move {
                let batch = cx.fan_out("item", 0..5).key(move |n| format!("{id}-{n}"));
                let settled = batch.buffer_unordered(3).settle(ask).await;
                assert_eq!(settled.len(), 5);
            }
            .boxed(),
            Self::TryAll => async move {
                let batch = cx.fan_out("all", 0..5).key(move |n| format!("{id}-{n}"));
                let values = batch.buffered(3).try_all(ask).await;
                assert!(values.is_err() || values.is_ok_and(|values| values.len() == 5));
            }
            .boxed(),
            Self::Outcomes => async move {
                let batch = cx.fan_out("outcome", 0..5);
                let outcomes = batch.buffer_unordered(2).stream(ask);
                assert_eq!(outcomes.count().await, 5);
            }
            .boxed(),
            Self::Nested => async move {
                let outer = cx.fan_out("outer", 0..2).join_all();
                let settled = outer.settle(async |cx, _| {
                    let update = cx.generate("update").map(|reply| reply.map(drop));
                    let inner = cx.fan_out("inner", 0..2).settle(ask);
                    let (inner, _) = cx.join_best_effort(inner, update).await;
                    inner.all()
                });
                assert_eq!(settled.await.len(), 2);
            }
            .boxed(),
            Self::Deadline => async move {
                let cx = cx.with_timeout(latency * 3);
                let settled = cx.fan_out("late", 0..3).settle(ask).await;
                assert_eq!(settled.len(), 3);
            }
            .boxed(),
            Self::Drained => async move {
                let ending = async {
                    sleep(latency).await;
                    cx.drain();
                    sleep(latency).await;
                    cx.cancel();
                };
                let work = cx.fan_out("drained", 0..4).sequential().settle(ask);
                let (settled, ()) = tokio::join!(work, ending);
                assert_eq!(settled.len(), 4);
            }
            .boxed(),
            Self::Lane => async move {
                let need = Need::new(10, 10).priority(Priority::High);
                if let Ok(mut permit) = lane.acquire(need).await {
                    sleep(latency).await;
                    permit.mark_sent();
                    sleep(latency).await;
                    permit.finish(CallOutcome::Succeeded { usage: None });
                }
            }
            .boxed(),
        }
    }
}

/// The parameters that are drawn for a combination.
#[derive(Clone)]
struct Plan {
    /// Of the one deployment or of both.
    paces: Vec<Pace>,
    /// The second deployment is a fallback.
    is_fallback: bool,
    has_store: bool,
    answers: Vec<Answer>,
    latencies: Vec<Duration>,
    /// How long a future that is not polled is held.
    held: Duration,
    /// The number of other callers that use the lanes, and of their calls.
    neighbours: u64,
    calls: u64,
}

impl Plan {
    fn is_healthy(&self) -> bool {
        let good = |answer: &Answer| matches!(answer, Answer::Good);
        self.answers.iter().all(good)
    }
}

struct World {
    account: Account,
    cx: Context,
    latency: Duration,
}

impl World {
    fn new(plan: &Plan) -> Self {
        let account = Account::new(plan.answers.clone(), plan.latencies.clone());
        let lanes: Vec<_> = plan.paces.iter().cloned().map(Lane::new).collect();
        let mut builder = Context::builder(account.clone()).lane(lanes[0].clone());
        for lane in &lanes[1..] {
            let deployment = Deployment::new(account.clone()).lane(lane.clone());
            builder = match plan.is_fallback {
                true => builder.fallback(deployment),
                false => builder.deployment(deployment),
            };
        }
        if plan.has_store {
            builder = builder.store(Memory::new());
        }
        Self {
            account,
            cx: builder.build(),
            latency: plan.latencies[0],
        }
    }

    fn first_lane(&self) -> Lane {
        let mut lanes = self.cx.lanes();
        lanes.next().expect("there is one at least").clone()
    }

    /// The others: calls of several tenants and priorities, some of them shared, and permits by hand.
    fn neighbours(&self, plan: &Plan) -> JoinSet<()> {
        let mut tasks = JoinSet::new();
        for id in 0..plan.neighbours {
            let tenant = Tenant::new(["ada", "bob"][id as usize % 2], 1);
            let cx = self.cx.child("neighbour").with_tenant(tenant);
            let cx = match id % 3 {
                0 => cx.with_priority(Priority::Low),
                _ => cx,
            };
            let (lane, latency, calls) = (self.first_lane(), self.latency, plan.calls);
            tasks.spawn(async move {
                for call in 0..calls {
                    match (id + call) % 4 {
                        0 => {
                            let _ = cx.generate(Request::new("shared").shared()).await;
                        }
                        1 => {
                            if let Ok(permit) = lane.acquire(Need::new(5, 5)).await {
                                sleep(latency).await;
                                permit.finish(CallOutcome::Succeeded { usage: None });
                            }
                        }
                        _ => {
                            let _ = cx.generate(format!("{id} {call}")).await;
                        }
                    }
                }
            });
        }
        tasks
    }

    /// Checks that nothing is left of the dropped operation.
    async fn audit(&self, plan: &Plan, what: &dyn fmt::Debug) {
        // Tasks whose futures were dropped end the next time the runtime gets to them.
        for _ in 0..1_000 {
            let is_idle = |lane: &Lane| {
                let lane = lane.snapshot();
                (lane.in_flight, lane.waiting) == (0, 0)
            };
            if self.cx.lanes().all(is_idle) && self.cx.snapshot().items_running() == 0 {
                break;
            }
            sleep(Duration::from_millis(1)).await;
        }
        for lane in self.cx.lanes() {
            let lane = lane.snapshot();
            assert_eq!((lane.in_flight, lane.waiting), (0, 0), "{what:?}: {lane:?}");
        }
        let snapshot = self.cx.snapshot();
        assert_eq!(snapshot.items_running(), 0, "{what:?}: {snapshot:?}");

        let state = &self.account.0;
        let count = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
        let dropped = count(&state.dropped);
        let tally = self.cx.tally();
        let ended = [&state.answered, &state.throttled, &state.failed].map(count);
        assert_eq!(
            (tally.attempts + tally.throttled, tally.throttled),
            (count(&state.started), ended[1]),
            "{what:?}: {tally:?}"
        );
        assert_eq!(ended.iter().sum::<u64>() + dropped, count(&state.started));
        let ambiguous = count(&state.ambiguous) + dropped;
        assert_eq!(tally.ambiguous, ambiguous, "{what:?}: {tally:?}");
        let answered = ended[0];
        assert_eq!(
            tally.usage,
            Usage::new(answered, 2 * answered),
            "{what:?}: {tally:?}"
        );
        let causes = tally.overloaded + tally.timed_out + tally.transient + tally.failed;
        assert_eq!(tally.attempts, answered + causes, "{what:?}: {tally:?}");
        if let Some(journal) = self.cx.journal() {
            timeout(FOR_EVER, journal.flush())
                .await
                .expect("the journal writes")
                .unwrap();
            assert_eq!(journal.stats().waiting, 0, "{what:?}");
        }
        if plan.is_healthy() {
            self.audit_speed(plan, what).await;
        }
    }

    /// Checks that all slots are free and that calls take as long as on new lanes.
    async fn audit_speed(&self, plan: &Plan, what: &dyn fmt::Debug) {
        for (lane, pace) in self.cx.lanes().zip(&plan.paces) {
            let fresh = Lane::new(pace.clone());
            // Long enough for every limit to be unused.
            sleep(Duration::from_secs(3600)).await;
            let most = fresh.snapshot().max_in_flight;
            assert_eq!(lane.snapshot().max_in_flight, most, "{what:?}");
            let mut took = Vec::new();
            for lane in [lane, &fresh] {
                let began = Instant::now();
                for _ in 0..4 {
                    let slots = most.unwrap_or(4).min(16);
                    let permits = join_all((0..slots).map(|_| lane.acquire(Need::new(5, 5))));
                    let permits = timeout(FOR_EVER, permits).await;
                    for permit in permits.unwrap_or_else(|_| panic!("{what:?}: a slot is lost")) {
                        permit
                            .unwrap()
                            .finish(CallOutcome::Succeeded { usage: None });
                    }
                }
                took.push(began.elapsed());
            }
            // Not later, because calls that were not sent leave no debt, and not earlier.
            let tolerance = took[1].mul_f64(0.02) + Duration::from_millis(2);
            assert!(took[0].abs_diff(took[1]) <= tolerance, "{what:?}: {took:?}");
        }
    }
}

fn runtime() -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().start_paused(true).build().unwrap()
}

/// Runs the operation in a new world with other callers, interrupted after a number of polls. Returns whether it had
/// completed before.
fn run_one(plan: &Plan, operation: Operation, polls: usize, how: Interruption, seed: u64) -> bool {
    fastrand::seed(seed);
    runtime().block_on(async {
        let what = (operation, polls, how, seed);
        let world = World::new(plan);
        let mut tasks = world.neighbours(plan);
        // The other callers are ahead of it in the queue.
        tokio::task::yield_now().await;
        let victim = interrupt(operation.start(&world, 99), polls, how, plan.held);
        let victim = tokio::spawn(victim);
        let all = async {
            while let Some(done) = tasks.join_next().await {
                done.unwrap();
            }
            victim.await.unwrap()
        };
        let (_, ended) = timeout(FOR_EVER, all)
            .await
            .unwrap_or_else(|_| panic!("{what:?}: a caller waits for ever: {:?}", world.cx));
        world.audit(plan, &what).await;
        ended
    })
}

fn plans() -> [Plan; 4] {
    let plan = Plan {
        paces: vec![Pace::unlimited().in_flight(2)],
        is_fallback: false,
        has_store: false,
        answers: vec![Answer::Good],
        latencies: vec![SECOND],
        held: HELD,
        neighbours: 3,
        calls: 2,
    };
    let paced = Plan {
        paces: vec![Pace::per_minute(120).tokens(20_000).in_flight(3)],
        has_store: true,
        ..plan.clone()
    };
    let two = Plan {
        paces: vec![
            Pace::per_minute(60).in_flight(1),
            Pace::unlimited().in_flight(1),
        ],
        ..plan.clone()
    };
    let faulty = Plan {
        paces: vec![Pace::per_minute(600).in_flight(2)],
        answers: vec![
            Answer::Good,
            Answer::Throttled(Some(2)),
            Answer::Overloaded,
            Answer::Good,
            Answer::Broken,
            Answer::Good,
            Answer::Refused,
        ],
        ..plan.clone()
    };
    [plan, paced, two, faulty]
}

#[test]
fn dropping_any_operation_at_any_poll_does_not_block_the_others() {
    let mut runs = 0;
    for (index, plan) in plans().iter().enumerate() {
        for operation in Operation::ALL {
            for how in Interruption::ALL {
                let mut polls = 0;
                while !run_one(plan, operation, polls, how, index as u64) {
                    polls += 1;
                    assert!(polls < 1_000, "{operation:?} does not end");
                }
                runs += polls + 1;
            }
        }
    }
    println!("{runs} interruptions");
    assert!(runs > 500);
}

/// Returns the times of five grants on a lane for one call a second after a first call, while an operation is
/// interrupted before it sends a call. `None` if it had sent one by then.
fn five_permits_beside(operation: Option<(Operation, usize, Interruption)>) -> Option<Duration> {
    runtime().block_on(async {
        let pace = Pace::per_minute(60).burst(SECOND);
        let world = World::new(&Plan {
            paces: vec![pace.in_flight(9)],
            ..plans()[0].clone()
        });
        let lane = world.first_lane();
        let took = Instant::now();
        let first = lane.acquire(Need::new(5, 5)).await.unwrap();
        first.finish(CallOutcome::Succeeded { usage: None });
        let was_sent = Arc::new(AtomicU64::new(0));
        let victim = operation.map(|(operation, polls, how)| {
            let future = operation.start(&world, 1);
            let was_sent = Arc::clone(&was_sent);
            tokio::spawn(async move {
                let (output, _) = interrupt(future, polls, how, HELD).await;
                was_sent.fetch_add(u64::from(output.is_some()), Ordering::SeqCst);
            })
        });
        tokio::task::yield_now().await;
        for _ in 0..5 {
            let permit = lane.acquire(Need::new(5, 5)).await.unwrap();
            permit.finish(CallOutcome::Succeeded { usage: None });
        }
        let took = took.elapsed();
        if let Some(victim) = victim {
            victim.await.unwrap();
        }
        let started = world.account.0.started.load(Ordering::SeqCst);
        (started + was_sent.load(Ordering::SeqCst) == 0).then_some(took)
    })
}

#[test]
fn calls_dropped_before_they_are_sent_are_not_charged_to_the_rate() {
    let alone = five_permits_beside(None).unwrap();
    let mut granted = 0;
    for operation in [Operation::Lane, Operation::Generate] {
        // A permit that is held until the limit has recovered is charged for the time, as documented.
        for (how, polls) in [
            (Interruption::Dropped, 3),
            (Interruption::DroppedWhenWoken, 2),
        ] {
            for polls in 0..polls {
                let what = (operation, polls, how);
                if let Some(took) = five_permits_beside(Some(what)) {
                    let late = took.saturating_sub(alone);
                    assert!(late < Duration::from_millis(5), "{what:?}: {took:?}");
                    granted += u32::from(polls == 2);
                }
            }
        }
    }
    assert!(granted > 0, "none had its permit");
}

#[test]
fn calls_behind_a_dropped_large_call_start_as_soon_as_they_fit() {
    runtime().block_on(async {
        // Ten tokens a second, a minute's worth at once.
        let lane = Lane::new(Pace::unlimited().tokens(600).burst(60 * SECOND));
        let began = Instant::now();
        let all = lane.acquire(Need::new(300, 300)).await.unwrap();
        all.finish(CallOutcome::Succeeded { usage: None });
        for polls in 1..3 {
            let large = lane.acquire(Need::new(300, 300));
            let large = interrupt(large, polls, Interruption::HeldAndDropped, 10 * SECOND);
            let small = async {
                tokio::task::yield_now().await;
                let _permit = lane.acquire(Need::new(2, 3)).await.unwrap();
                began.elapsed()
            };
            let before = began.elapsed();
            let bounded = timeout(10 * SECOND, large);
            let (large, took) = tokio::join!(bounded, small);
            assert!(large.is_err() || large.is_ok_and(|(permit, _)| permit.is_none()));
            let waited = took - before;
            assert!(waited.abs_diff(10 * SECOND) < SECOND / 100, "{waited:?}");
        }
    });
}

/// Two identical requests, one after the other, of each of five items.
async fn two_answers_each(cx: &Context) -> usize {
    let batch = cx.fan_out("item", 0..5).key(|n: &u64| n.to_string());
    let settled = batch.buffer_unordered(3).settle(|cx, _| async move {
        cx.generate("ask").await?;
        cx.fan_out("part", 0..1)
            .try_all(|cx, _| async move { cx.generate("ask").await })
            .await?;
        cx.generate("ask").await
    });
    settled.await.oks().count()
}

#[test]
fn a_batch_dropped_at_any_poll_pays_for_no_stored_reply_again() {
    let mut polls = 0;
    let mut ended = false;
    while !ended {
        ended = runtime().block_on(async {
            let store = Arc::new(Memory::new());
            let account = Account::new(vec![Answer::Good], vec![SECOND, SECOND / 3, 2 * SECOND]);
            let cx = || {
                let cx = Context::builder(account.clone()).store(Arc::clone(&store));
                cx.pace(Pace::unlimited().in_flight(2)).build()
            };
            let count = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
            let first = cx();
            let how = Interruption::Dropped;
            let (_, ended) = interrupt(two_answers_each(&first), polls, how, HELD).await;
            // Once more in the same process, and once in another one.
            assert_eq!(two_answers_each(&first).await, 5);
            first.flush().await.unwrap();
            let dropped = count(&account.0.dropped);
            assert!(dropped <= 2, "poll {polls}");
            assert_eq!(count(&account.0.started), 15 + dropped, "poll {polls}");
            let second = cx();
            assert_eq!(two_answers_each(&second).await, 5);
            assert_eq!(second.tally().replayed, 15, "poll {polls}");
            assert_eq!(count(&account.0.started), 15 + dropped, "poll {polls}");
            ended
        });
        polls += 1;
    }
    assert!(polls > 10, "{polls}");
}

/// A plan, and the operations in it, by seed.
fn draw(rng: &mut Rng, threads: bool) -> (Plan, Vec<(Operation, usize, Interruption, Duration)>) {
    let unit = match threads {
        true => Duration::from_micros(rng.u64(1..400)),
        false => Duration::from_millis(rng.u64(1..8_000)),
    };
    let pace = |rng: &mut Rng| {
        let mut pace = match rng.u8(..3) {
            _ if threads => Pace::unlimited(),
            0 => Pace::unlimited(),
            1 => Pace::per_minute(rng.u64(20..2_000)),
            _ => Pace::per_minute(rng.u64(20..2_000)).tokens(rng.u64(2_000..100_000)),
        };
        if threads || rng.bool() {
            pace = pace.in_flight(rng.usize(1..6));
        }
        if rng.u8(..4) == 0 {
            pace = pace.adaptive(false);
        }
        pace
    };
    let deployments = rng.usize(1..3);
    let paces = (0..deployments).map(|_| pace(rng)).collect();
    let is_healthy = threads || rng.bool();
    let answers = (0..rng.usize(1..40)).map(|_| match rng.u8(..40) {
        _ if is_healthy => Answer::Good,
        0 => Answer::Throttled(None),
        1 => Answer::Throttled(Some(rng.u64(1..30))),
        2 => Answer::Throttled(Some(rng.u64(1..3_000))),
        3..5 => Answer::Overloaded,
        5..7 => Answer::Unavailable,
        7..9 => Answer::Broken,
        9 => Answer::Refused,
        _ => Answer::Good,
    });
    let answers = answers.collect();
    let latencies = (0..rng.usize(1..8)).map(|_| unit.mul_f64(0.2 + rng.f64()));
    let latencies = latencies.collect();
    let plan = Plan {
        paces,
        is_fallback: rng.bool(),
        has_store: rng.bool(),
        answers,
        latencies,
        held: unit.mul_f64(20.0 * rng.f64()),
        neighbours: rng.u64(1..6),
        calls: rng.u64(1..5),
    };
    let victims = (0..rng.usize(1..10)).map(|_| {
        let polls = match rng.bool() {
            true => rng.usize(..4),
            false => rng.usize(..40),
        };
        let start = unit.mul_f64(4.0 * rng.f64());
        (
            Operation::ALL[rng.usize(..Operation::ALL.len())],
            polls,
            Interruption::ALL[rng.usize(..Interruption::ALL.len())],
            start,
        )
    });
    let victims = victims.collect();
    (plan, victims)
}

/// One in sixteen runs on two threads and the real clock, because one thread cannot interleave everything.
fn run_random(seed: u64) {
    let threads = seed % 16 == 15;
    let mut rng = Rng::with_seed(seed);
    let (plan, victims) = draw(&mut rng, threads);
    fastrand::seed(seed);
    let runtime = match threads {
        true => {
            let mut builder = tokio::runtime::Builder::new_multi_thread();
            builder.worker_threads(2).enable_all().build().unwrap()
        }
        false => runtime(),
    };
    let for_ever = match threads {
        true => Duration::from_secs(60),
        false => FOR_EVER,
    };
    // Ends and retunes while the others are under way, in some of the runs.
    let stops = rng.u8(..4) == 0;
    let retunes = rng.u8(..4) == 0;
    let what = (seed, &victims);
    runtime.block_on(async {
        let world = World::new(&plan);
        let mut tasks = world.neighbours(&plan);
        for (id, (operation, polls, how, start)) in (1_000..).zip(victims.iter().copied()) {
            let future = operation.start(&world, id);
            let held = plan.held;
            tasks.spawn(async move {
                sleep(start).await;
                interrupt(future, polls, how, held).await;
            });
        }
        let (lanes, paces, latency) = (
            world.cx.lanes().cloned().collect::<Vec<_>>(),
            plan.paces.clone(),
            world.latency,
        );
        tasks.spawn(async move {
            for (lane, pace) in lanes.iter().zip(paces) {
                if retunes {
                    sleep(latency).await;
                    lane.retune(Pace::unlimited().in_flight(1));
                    sleep(latency).await;
                    lane.retune(pace);
                }
                if stops {
                    sleep(latency).await;
                    lane.stop(Error::new(ErrorKind::Unauthorized, "stopped"));
                    sleep(latency).await;
                    lane.resume();
                }
            }
        });
        let all = async {
            while let Some(done) = tasks.join_next().await {
                done.unwrap_or_else(|error| panic!("{what:?}: {error}"));
            }
        };
        if timeout(for_ever, all).await.is_err() {
            panic!(
                "{what:?}: a caller waits for ever: {:?} {:?}",
                world.cx.snapshot(),
                world.cx.lanes().collect::<Vec<_>>()
            );
        }
        // Waiting for an hour is impossible on the real clock.
        let plan = match threads {
            true => Plan {
                answers: vec![Answer::Refused],
                ..plan.clone()
            },
            false => plan.clone(),
        };
        world.audit(&plan, &what).await;
    });
}

#[test]
fn random_combinations_of_dropped_operations_leave_no_trace() {
    if let Some(seed) = number("THROUGHLINE_SEED") {
        return run_random(seed);
    }
    let began = std::time::Instant::now();
    let (first, budget) = match long::is_long() {
        // Seeds differ from run to run.
        true => (
            fastrand::u64(..) >> 16,
            60 * number("THROUGHLINE_MINUTES").unwrap_or(5),
        ),
        false => (0, 0),
    };
    let mut runs = 0;
    while runs < 300 || began.elapsed() < Duration::from_secs(budget) {
        let seed = first + runs;
        let run = std::panic::catch_unwind(|| run_random(seed));
        if let Err(panic) = run {
            eprintln!("THROUGHLINE_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
        runs += 1;
    }
    println!(
        "{runs} combinations from seed {first} in {:?}",
        began.elapsed()
    );
}
