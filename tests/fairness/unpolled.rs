//! Callers that wait for a lane and are not polled: they hold up no other caller, on no thread
//! and in no runtime, and go when they are polled again.

use std::future::Future;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt as _, join_all};
use futures::stream::{self, StreamExt as _};
use throughline::provider::sim::Sim;
use throughline::{
    Pace, Result,
    ratelimit::{CallOutcome, Lane, Need, Permit},
};
use tokio::runtime::{Builder, Handle};
use tokio::task::yield_now;
use tokio::time::{Instant, Sleep, sleep, timeout};

const SECOND: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_secs(86_400);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn small() -> Need {
    Need::new(10, 10)
}

type Waiting = BoxFuture<'static, Result<Permit>>;

/// A caller that has come to the lane, waits, and is not polled again by itself.
fn waiting(lane: &Lane, need: Need) -> Waiting {
    let lane = lane.clone();
    let mut call = async move { lane.acquire(need).await }.boxed();
    assert!((&mut call).now_or_never().is_none(), "it need not wait");
    call
}

/// One call that takes its time.
async fn call(lane: Lane, latency: Duration) {
    let mut permit = lane.acquire(small()).await.unwrap();
    permit.mark_sent();
    sleep(latency).await;
    permit.finish(CallOutcome::Succeeded { usage: None });
}

/// Measures how long 300 calls take behind a number of callers that are never polled.
async fn behind(unpolled: usize, pace: Pace, latency: Duration) -> Duration {
    let lane = Lane::new(pace);
    // All that is there is taken, so that everybody waits.
    let mut taken: Vec<_> = std::iter::from_fn(|| lane.try_acquire(&small())).collect();
    taken.iter_mut().for_each(Permit::mark_sent);
    let absent: Vec<_> = (0..unpolled).map(|_| waiting(&lane, small())).collect();
    let start = Instant::now();
    let calls: Vec<_> = (0..300)
        .map(|_| tokio::spawn(call(lane.clone(), latency)))
        .collect();
    sleep(latency).await;
    drop(taken);
    join_all(calls).await;
    let took = start.elapsed();
    assert_eq!(lane.snapshot().unpolled, unpolled);
    drop(absent);
    let snapshot = lane.snapshot();
    assert_eq!((snapshot.in_flight, snapshot.waiting), (0, 0));
    took
}

#[tokio::test(start_paused = true)]
async fn an_unpolled_call_delays_the_others_by_at_most_five_percent() {
    let free = Pace::unlimited;
    for (pace, latency) in [
        (Pace::per_minute(60), ms(200)),
        (Pace::per_minute(6_000), ms(200)),
        (Pace::per_minute(600).burst(Duration::ZERO), ms(200)),
        (free().tokens(60_000), ms(200)),
        (free().spacing(ms(500)), ms(200)),
        (free().in_flight(1), ms(200)),
        (free().in_flight(4), ms(1_000)),
        (Pace::per_minute(600).in_flight(8), ms(1_000)),
    ] {
        let without = behind(0, pace.clone(), latency).await;
        for unpolled in [1, 10] {
            let with = behind(unpolled, pace.clone(), latency).await;
            let ratio = with.as_secs_f64() / without.as_secs_f64();
            println!("{unpolled} unpolled, {pace:?}: {ratio:.3}");
            assert!(
                with <= without.mul_f64(1.05),
                "{unpolled} unpolled, {pace:?}: {with:?} instead of {without:?}"
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_thousand_unpolled_calls_are_passed_in_seconds() {
    for pace in [Pace::per_minute(6_000), Pace::unlimited().in_flight(1)] {
        let without = behind(0, pace.clone(), ms(200)).await;
        let with = behind(1_000, pace.clone(), ms(200)).await;
        // Each costs no more than a timer's millisecond or what the rate must refill.
        let most = without + 5 * SECOND;
        println!("1,000 unpolled, {pace:?}: {:?} longer", with - without);
        assert!(with <= most, "{pace:?}: {with:?} instead of {without:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_whose_offer_has_expired_is_next_when_it_is_polled() {
    let lane = Lane::new(Pace::per_minute(60));
    lane.acquire(small()).await.unwrap().mark_sent();
    let absent = waiting(&lane, small());
    let others: Vec<_> = (0..10)
        .map(|_| tokio::spawn(call(lane.clone(), ms(1))))
        .collect();
    sleep(4 * SECOND + SECOND / 2).await;
    let snapshot = lane.snapshot();
    // It stood 50 ms in their way.
    assert_eq!((snapshot.waiting, snapshot.unpolled), (7, 1));
    let start = Instant::now();
    absent.await.unwrap().mark_sent();
    assert!(start.elapsed() <= SECOND, "it comes before the others");
    assert_eq!(lane.snapshot().unpolled, 0);
    join_all(others).await;
}

#[tokio::test(start_paused = true)]
async fn an_unpolled_call_that_is_dropped_leaves_no_trace() {
    let lane = Lane::new(Pace::unlimited().in_flight(1));
    let held = lane.acquire(small()).await.unwrap();
    let absent = [waiting(&lane, small()), waiting(&lane, small())];
    let other = tokio::spawn(call(lane.clone(), ms(500)));
    yield_now().await;
    drop(held);
    sleep(SECOND).await;
    assert_eq!(lane.snapshot().unpolled, 2);
    other.await.unwrap();
    drop(absent);
    let snapshot = lane.snapshot();
    assert_eq!((snapshot.in_flight, snapshot.waiting), (0, 0));
    assert!(lane.try_acquire(&small()).is_some());
}

#[tokio::test(start_paused = true)]
async fn what_a_leaked_call_was_granted_comes_back_to_callers_that_do_not_wait() {
    let lane = Lane::new(Pace::unlimited().in_flight(1));
    let held = lane.acquire(small()).await.unwrap();
    std::mem::forget(waiting(&lane, small()));
    drop(held);
    assert!(lane.try_acquire(&small()).is_none(), "it may still come");
    sleep(SECOND).await;
    assert!(lane.try_acquire(&small()).is_some());
}

/// Polls what is inside only a while after it was woken, as a busy task does.
struct Late<F> {
    inner: Pin<Box<F>>,
    by: Duration,
    delay: Option<Pin<Box<Sleep>>>,
}

impl<F: Future> Future for Late<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = &mut *self;
        let by = this.by;
        let delay = this.delay.get_or_insert_with(|| Box::pin(sleep(by)));
        if delay.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        this.delay = None;
        this.inner.as_mut().poll(cx)
    }
}

/// No grant goes round among callers none of which comes in time.
#[tokio::test(start_paused = true)]
async fn callers_that_are_all_slow_to_come_still_go() {
    for (pace, most) in [
        // 50 calls of 100 ms, which begin and end 200 ms late.
        (Pace::unlimited().in_flight(1), 40 * SECOND),
        (Pace::unlimited().in_flight(4), 12 * SECOND),
        (Pace::per_minute(600), 15 * SECOND),
    ] {
        let lane = Lane::new(pace.clone());
        let start = Instant::now();
        let calls = (0..50).map(|_| {
            let lane = lane.clone();
            Late {
                inner: Box::pin(call(lane, ms(100))),
                by: ms(200),
                delay: None,
            }
        });
        let done = timeout(10 * most, join_all(calls)).await;
        assert!(done.is_ok(), "{pace:?}: nobody goes");
        let took = start.elapsed();
        assert!(took <= most, "{pace:?}: {took:?}");
    }
}

/// Nor do quick callers that fill the lane keep a slow one from ever going.
#[tokio::test(start_paused = true)]
async fn a_slow_caller_among_quick_ones_goes_in_the_end() {
    let lane = Lane::new(Pace::unlimited().in_flight(1));
    let quick: Vec<_> = (0..4)
        .map(|_| {
            let lane = lane.clone();
            tokio::spawn(async move {
                loop {
                    call(lane.clone(), ms(100)).await;
                }
            })
        })
        .collect();
    sleep(SECOND).await;
    let slow = (0..5).map(|_| Late {
        inner: Box::pin(call(lane.clone(), ms(100))),
        by: ms(200),
        delay: None,
    });
    let done = timeout(60 * SECOND, join_all(slow)).await;
    assert!(done.is_ok(), "it starves");
    quick.iter().for_each(|task| task.abort());
}

/// A buffered stream is not polled while its consumer is busy with the call before.
#[tokio::test(start_paused = true)]
async fn the_consumer_of_a_buffered_stream_of_calls_may_call() {
    let sim = Sim::builder().latency(ms(100)).build();
    let cx = throughline::Context::builder(sim)
        .pace(Pace::per_minute(60))
        .build();
    let elsewhere = tokio::spawn({
        let cx = cx.clone();
        async move {
            sleep(10 * SECOND).await;
            let start = Instant::now();
            cx.generate("another user").await.unwrap();
            start.elapsed()
        }
    });
    let start = Instant::now();
    let drafts = stream::iter(0..10).map(|n| cx.generate(format!("draft {n}")));
    let mut drafts = drafts.buffer_unordered(4);
    let work = async {
        while let Some(draft) = drafts.next().await {
            cx.generate(draft.unwrap().text).await.unwrap();
        }
    };
    timeout(DAY, work).await.expect("no deadlock");
    // 21 calls at one a second.
    assert!(start.elapsed() <= 23 * SECOND, "{:?}", start.elapsed());
    assert!(elsewhere.await.unwrap() <= 6 * SECOND);
}

/// The slot of the call that has ended is there for the consumer.
#[tokio::test(start_paused = true)]
async fn the_consumer_of_a_buffered_stream_of_calls_may_call_where_slots_are_few() {
    for slots in 1..=3 {
        let sim = Sim::builder().latency(ms(100)).build();
        let cx = throughline::Context::builder(sim)
            .pace(Pace::unlimited().in_flight(slots))
            .build();
        let drafts = stream::iter(0..20).map(|n| cx.generate(format!("draft {n}")));
        let mut drafts = drafts.buffer_unordered(4);
        let work = async {
            while let Some(draft) = drafts.next().await {
                let text = draft.unwrap().text;
                let calls = (0..3).map(|n| cx.generate(format!("{n} about {text}")));
                assert!(join_all(calls).await.iter().all(Result::is_ok));
            }
        };
        let done = timeout(60 * SECOND, work).await;
        assert!(done.is_ok(), "a deadlock with {slots} slots");
    }
}

#[tokio::test(start_paused = true)]
async fn a_buffered_stream_of_calls_may_feed_a_batch_of_calls() {
    let sim = Sim::builder().latency(ms(100)).build();
    let cx = throughline::Context::builder(sim)
        .pace(Pace::per_minute(60))
        .build();
    let first = cx.child("first");
    let topics = stream::iter(0..200)
        .map(move |n| {
            let first = first.clone();
            async move { first.generate(format!("topic {n}")).await.unwrap().text }
        })
        .buffer_unordered(8);
    let work = cx
        .fan_out("second", topics.boxed())
        .buffer_unordered(2)
        .settle(async |cx, topic| cx.generate(topic).await);
    let start = Instant::now();
    let done = timeout(DAY, work).await.expect("no deadlock");
    assert_eq!(done.oks().count(), 200);
    // 400 calls at one a second.
    assert!(start.elapsed() <= 420 * SECOND, "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn timers_end_with_the_queue() {
    async fn tasks() -> usize {
        for _ in 0..10 {
            yield_now().await;
        }
        Handle::current().metrics().num_alive_tasks()
    }
    let lane = Lane::new(Pace::per_minute(1));
    lane.acquire(small()).await.unwrap().mark_sent();
    for _ in 0..3 {
        let calls = [waiting(&lane, small()), waiting(&lane, small())];
        assert_eq!(tasks().await, 1, "one for all that wait");
        drop(calls);
        assert_eq!(tasks().await, 0, "no caller waits");
    }
    let start = Instant::now();
    lane.acquire(small()).await.unwrap().mark_sent();
    assert_eq!((tasks().await, start.elapsed()), (0, 60 * SECOND));

    // A leaked future keeps the lane, but neither a timer nor the clock.
    let lane = Lane::new(Pace::per_minute(1));
    lane.acquire(small()).await.unwrap().mark_sent();
    std::mem::forget(waiting(&lane, small()));
    sleep(61 * SECOND).await;
    assert_eq!(tasks().await, 0);
}

/// Runs `work` in a runtime of its own.
fn run<T>(threads: usize, work: impl Future<Output = T>) -> T {
    let mut builder = match threads {
        0 => Builder::new_current_thread(),
        _ => Builder::new_multi_thread(),
    };
    let runtime = builder.worker_threads(threads.max(1)).enable_all().build();
    runtime.unwrap().block_on(work)
}

/// Ten calls, one after the other, at a hundred a second.
fn ten_calls(lane: &Lane) -> Duration {
    run(2, async {
        let start = Instant::now();
        for _ in 0..10 {
            lane.acquire(small()).await.unwrap().mark_sent();
        }
        start.elapsed()
    })
}

#[test]
fn a_runtime_whose_thread_is_busy_holds_up_no_other() {
    let lane = Lane::new(Pace::per_minute(6_000));
    let (tell, told) = std::sync::mpsc::channel();
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let theirs = lane.clone();
    let busy = std::thread::spawn(move || {
        run(0, async {
            theirs.acquire(small()).await.unwrap().mark_sent();
            let calls: Vec<_> = (0..50).map(|_| waiting(&theirs, small())).collect();
            tell.send(()).unwrap();
            // The whole runtime stands still meanwhile.
            stopped.recv().unwrap();
            for call in calls {
                call.await.unwrap().mark_sent();
            }
        });
    });
    told.recv().unwrap();
    let took = ten_calls(&lane);
    stop.send(()).unwrap();
    busy.join().unwrap();
    assert!(took < SECOND, "{took:?}");
}

#[test]
fn a_runtime_that_is_gone_with_its_calls_leaked_holds_up_no_other() {
    let lane = Lane::new(Pace::per_minute(6_000));
    run(0, async {
        lane.acquire(small()).await.unwrap().mark_sent();
        for _ in 0..50 {
            std::mem::forget(waiting(&lane, small()));
        }
    });
    let took = ten_calls(&lane);
    assert!(took < SECOND, "{took:?}");
}

#[test]
fn a_call_may_move_to_another_runtime() {
    let lane = Lane::new(Pace::per_minute(600));
    let [moved] = run(0, async {
        lane.acquire(small()).await.unwrap().mark_sent();
        [waiting(&lane, small())]
    });
    run(2, async {
        timeout(SECOND, moved).await.unwrap().unwrap().mark_sent();
    });
    let snapshot = lane.snapshot();
    assert_eq!((snapshot.in_flight, snapshot.waiting), (0, 0));
}

#[test]
fn outside_a_runtime_callers_wait_for_calls_in_flight_but_not_for_time() {
    let lane = Lane::new(Pace::unlimited().in_flight(1));
    let held = lane.try_acquire(&small()).unwrap();
    let mut call = waiting(&lane, small());
    drop(held);
    assert!((&mut call).now_or_never().unwrap().is_ok());

    let lane = Lane::new(Pace::per_minute(1));
    lane.try_acquire(&small()).unwrap().mark_sent();
    let waits = std::panic::AssertUnwindSafe(|| lane.acquire(small()).now_or_never());
    assert!(std::panic::catch_unwind(waits).is_err());
    assert_eq!(lane.snapshot().waiting, 0);
}

/// A lane that is used by a task and its `select!`: the branch that is not taken waits on.
#[tokio::test(start_paused = true)]
async fn a_call_in_a_select_whose_other_branch_works_holds_up_no_other() {
    let lane = Lane::new(Pace::per_minute(60));
    lane.acquire(small()).await.unwrap().mark_sent();
    let theirs = lane.clone();
    let selecting = tokio::spawn(async move {
        let mut call = pin!(theirs.acquire(small()));
        tokio::select! {
            _ = &mut call => unreachable!("it has to wait"),
            () = sleep(ms(10)) => sleep(100 * SECOND).await,
        }
        call.await.unwrap().mark_sent();
    });
    yield_now().await;
    let start = Instant::now();
    for _ in 0..50 {
        lane.acquire(small()).await.unwrap().mark_sent();
    }
    assert!(start.elapsed() <= 51 * SECOND, "{:?}", start.elapsed());
    selecting.await.unwrap();
}
