//! The time of a grant: alone, contended, and with a long queue, beside governor's check.
//!
//! ```sh
//! cargo bench --bench lane
//! ```
//!
//! A grant is an `acquire` and the `finish` of its permit: governor only counts, the lane
//! also queues, takes several limits at once, settles and gives slots back. Bars: 300 ns
//! alone, 1 µs contended by 64 tasks, and no more than logarithmic growth with the queue.
//! (The clock is Tokio's with its test utilities, as dev-dependencies turn them on: a little
//! slower than in a release of an application.)

use std::collections::VecDeque;
use std::hint::black_box;
use std::num::NonZeroU32;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use futures::FutureExt as _;
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use throughline::{
    Pace, Usage,
    ratelimit::{CallOutcome, Lane, Need, Permit},
};
use tokio::runtime::{Builder, Runtime};

/// So much a minute that a bench never waits for it.
const PLENTY: u64 = 1 << 52;
const TASKS: u64 = 64;
/// Calls that have a slot while the other tasks queue.
const SLOTS: usize = 8;
const QUEUES: [usize; 3] = [1_000, 10_000, 100_000];

fn unlimited() -> Lane {
    Lane::new(Pace::unlimited())
}

fn requests() -> Lane {
    Lane::new(Pace::per_minute(PLENTY))
}

fn requests_and_tokens() -> Lane {
    Lane::new(Pace::per_minute(PLENTY).tokens(PLENTY))
}

fn governor() -> DefaultDirectRateLimiter {
    RateLimiter::direct(Quota::per_second(NonZeroU32::MAX).allow_burst(NonZeroU32::MAX))
}

fn need() -> Need {
    Need::new(1_000, 500)
}

fn done(mut permit: Permit) {
    permit.mark_sent();
    permit.finish(CallOutcome::Succeeded {
        usage: Some(Usage::new(990, 120)),
    });
}

fn grant(lane: &Lane) {
    done(
        lane.acquire(black_box(need()))
            .now_or_never()
            .expect("nothing is in its way")
            .expect("the lane is open"),
    );
}

fn check(limiter: &DefaultDirectRateLimiter) {
    black_box(limiter.check()).expect("plenty");
}

/// As the lane with tokens does: one limiter for each limit. Few tokens, because the
/// largest quota there is does not last for more; the cost is that of any number.
fn check_n(limiters: &[DefaultDirectRateLimiter; 2]) {
    const TOKENS: NonZeroU32 = NonZeroU32::new(2).unwrap();
    black_box(limiters[0].check()).expect("plenty");
    black_box(limiters[1].check_n(black_box(TOKENS)))
        .expect("it fits")
        .expect("plenty");
}

/// A lane with one slot, which is taken, and `n` that wait for it.
struct Queued {
    waiting: VecDeque<Pin<Box<dyn Future<Output = Permit>>>>,
    lane: Lane,
    holder: Option<Permit>,
}

impl Queued {
    fn new(n: usize) -> Self {
        let lane = Lane::new(Pace::per_minute(PLENTY).tokens(PLENTY).in_flight(1));
        let mut queued = Self {
            waiting: VecDeque::new(),
            holder: lane.try_acquire(&need()),
            lane,
        };
        (0..n).for_each(|_| queued.enter());
        queued
    }

    fn enter(&mut self) {
        let lane = self.lane.clone();
        let mut waiter =
            Box::pin(async move { lane.acquire(need()).await.expect("the lane is open") });
        let mut cx = Context::from_waker(Waker::noop());
        assert!(waiter.as_mut().poll(&mut cx).is_pending());
        self.waiting.push_back(waiter);
    }

    /// The slot comes free, the first in the queue takes it, and another queues up.
    fn pass_on(&mut self) {
        done(self.holder.take().expect("somebody has the slot"));
        let mut first = self.waiting.pop_front().expect("somebody waits");
        let mut cx = Context::from_waker(Waker::noop());
        match first.as_mut().poll(&mut cx) {
            Poll::Ready(permit) => self.holder = Some(permit),
            Poll::Pending => panic!("it is the turn of the first"),
        }
        self.enter();
    }
}

/// 64 tasks on two threads take turns; the time of `grants` grants in all.
fn contended(runtime: &Runtime, lane: &Lane, grants: u64) -> Duration {
    let each = grants.div_ceil(TASKS);
    runtime.block_on(async {
        let began = Instant::now();
        let tasks: Vec<_> = (0..TASKS)
            .map(|_| {
                let lane = lane.clone();
                tokio::spawn(async move {
                    for _ in 0..each {
                        let permit = lane.acquire(need()).await.expect("the lane is open");
                        // Where a call would be made: the others get their turn.
                        tokio::task::yield_now().await;
                        done(permit);
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.expect("a task");
        }
        began.elapsed()
    })
}

/// The same tasks with governor: what the tasks themselves cost.
fn contended_governor(runtime: &Runtime, grants: u64) -> Duration {
    let limiter = std::sync::Arc::new(governor());
    let each = grants.div_ceil(TASKS);
    runtime.block_on(async {
        let began = Instant::now();
        let tasks: Vec<_> = (0..TASKS)
            .map(|_| {
                let limiter = std::sync::Arc::clone(&limiter);
                tokio::spawn(async move {
                    for _ in 0..each {
                        limiter.until_ready().await;
                        tokio::task::yield_now().await;
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.expect("a task");
        }
        began.elapsed()
    })
}

fn two_threads() -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(2)
        .enable_time()
        .build()
        .expect("a runtime")
}

fn lane(c: &mut Criterion) {
    let runtime = two_threads();
    let slots = || Lane::new(Pace::per_minute(PLENTY).tokens(PLENTY).in_flight(SLOTS));

    let mut group = c.benchmark_group("lane");
    group
        .sample_size(30)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3));
    for (name, lane) in [
        ("unlimited", unlimited()),
        ("requests", requests()),
        ("requests_tokens", requests_and_tokens()),
    ] {
        group.bench_function(name, |b| b.iter(|| grant(&lane)));
    }
    let limiters = [governor(), governor()];
    group.bench_function("governor_check", |b| b.iter(|| check(&limiters[0])));
    group.bench_function("governor_check_n", |b| b.iter(|| check_n(&limiters)));
    group.bench_function("64_tasks", |b| {
        let lane = requests_and_tokens();
        b.iter_custom(|n| contended(&runtime, &lane, n.max(TASKS)));
    });
    group.bench_function("64_tasks_8_slots", |b| {
        b.iter_custom(|n| contended(&runtime, &slots(), n.max(TASKS)));
    });
    group.bench_function("64_tasks_governor", |b| {
        b.iter_custom(|n| contended_governor(&runtime, n.max(TASKS)));
    });
    for n in QUEUES {
        let mut queued = Queued::new(n);
        group.bench_function(BenchmarkId::new("queued", n), |b| {
            b.iter(|| queued.pass_on());
        });
    }
    group.finish();
    summary(&runtime, &slots());
}

/// Medians in nanoseconds for each grant, taken in turn so that a machine whose speed
/// drifts drifts for all.
fn summary(runtime: &Runtime, slots: &Lane) {
    const ROUNDS: usize = 51;
    const GRANTS: u64 = 20_000;
    let lanes = [unlimited(), requests(), requests_and_tokens()];
    let limiters = [governor(), governor()];
    let mut queues = QUEUES.map(Queued::new);
    let mut times: Vec<Vec<f64>> = vec![Vec::new(); 11];
    for _ in 0..ROUNDS {
        let mut column = times.iter_mut();
        let mut note = |took: Duration| {
            let nanos = took.as_secs_f64() * 1e9 / GRANTS as f64;
            column.next().expect("a column").push(nanos);
        };
        for lane in &lanes {
            note(time(GRANTS, || grant(lane)));
        }
        note(time(GRANTS, || check(&limiters[0])));
        note(time(GRANTS, || check_n(&limiters)));
        note(contended(runtime, &lanes[2], GRANTS));
        note(contended(runtime, slots, GRANTS));
        note(contended_governor(runtime, GRANTS));
        for queue in &mut queues {
            note(time(GRANTS, || queue.pass_on()));
        }
    }
    let medians: Vec<f64> = times.iter_mut().map(|times| median(times)).collect();
    let row = |name: &str, i: usize, beside: usize, bar: &str| {
        let (ours, theirs) = (medians[i], medians[beside]);
        let ratio = ours / theirs;
        println!("{name:<36} {ours:>8.0} {theirs:>10.0} {ratio:>7.2}  {bar}");
    };
    println!("\nns for each grant, {ROUNDS} rounds      lane   governor   ratio  bar");
    row("unlimited / check", 0, 3, "300");
    row("requests / check", 1, 3, "300");
    row("requests and tokens / check, check_n", 2, 4, "300");
    row("64 tasks", 5, 7, "1,000");
    row("64 tasks for 8 slots", 6, 7, "1,000");
    println!("queued                                    ns   to 1,000");
    for (i, n) in QUEUES.iter().enumerate() {
        let nanos = medians[8 + i];
        println!(
            "{n:>7} {nanos:>35.0} {:>10.2}  of {:.2} if logarithmic",
            nanos / medians[8],
            (*n as f64).ln() / (QUEUES[0] as f64).ln()
        );
    }
}

fn time(n: u64, mut work: impl FnMut()) -> Duration {
    let began = Instant::now();
    (0..n).for_each(|_| work());
    began.elapsed()
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

criterion_group!(benches, lane);
criterion_main!(benches);
