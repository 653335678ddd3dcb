//! The lane through its public face, on Tokio's paused clock: times are exact.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use futures::FutureExt;
use futures::future::join_all;
use static_assertions::assert_impl_all;
use throughline::{
    Error, ErrorKind, Pace, Usage,
    ratelimit::{Binding, CallOutcome, Lane, LaneSnapshot, Need, Permit, QueuePosition, Tenant},
    request::RateSnapshot,
};
use tokio::time::{Duration, Instant, sleep, timeout};

assert_impl_all!(Lane: Send, Sync, Unpin, Clone);
assert_impl_all!(Permit: Send, Sync, Unpin);
assert_impl_all!(Pace: Send, Sync, Unpin);
assert_impl_all!(LaneSnapshot: Send, Sync, Unpin);

fn small() -> Need {
    Need::new(1, 1)
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

fn done(input: u64, output: u64) -> CallOutcome {
    CallOutcome::Succeeded {
        usage: Some(Usage::new(input, output)),
    }
}

/// Sends `n` calls that answer at once, and says when each went.
async fn sends(lane: &Lane, n: usize, need: Need) -> Vec<Duration> {
    let start = Instant::now();
    let calls = (0..n).map(|_| async move {
        let mut permit = lane.acquire(need).await.unwrap();
        permit.mark_sent();
        start.elapsed()
    });
    join_all(calls).await
}

/// Runs every task that can run, without passing time.
async fn settle() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_rate_is_met_exactly() {
    let lane = Lane::new(Pace::per_minute(6_000).burst(secs(1)));
    let sent = sends(&lane, 1_000, small()).await;
    assert!(sent[..100].iter().all(Duration::is_zero));
    for (i, at) in sent[100..].iter().enumerate() {
        assert_eq!(*at, ms(10) * (i as u32 + 1));
    }
    assert_eq!(sent[999], secs(9), "(1000 - 100) / 100 s");
}

#[tokio::test(start_paused = true)]
async fn rates_beyond_the_timers_millisecond_are_met() {
    let lane = Lane::new(Pace::per_minute(600_000).burst(secs(1)));
    let sent = sends(&lane, 40_000, small()).await;
    assert_eq!(
        *sent.last().unwrap(),
        secs(3),
        "(40,000 - 10,000) / 10,000 s"
    );
    for (i, at) in sent.iter().enumerate() {
        let allowed = 10_000.0 + at.as_secs_f64() * 10_000.0;
        assert!(i as f64 + 1.0 <= allowed + 1e-6);
    }
}

#[tokio::test(start_paused = true)]
async fn a_low_tier_sends_one_at_a_time() {
    let lane = Lane::new(Pace::per_minute(3));
    assert_eq!(sends(&lane, 4, small()).await, [0, 20, 40, 60].map(secs));
}

#[tokio::test(start_paused = true)]
async fn modes_space_calls() {
    for (pace, spacing) in [
        (Pace::safe(), ms(2_000)),
        (Pace::normal(), ms(1_000)),
        (Pace::fast(), ms(500)),
    ] {
        let lane = Lane::new(pace);
        let sent = sends(&lane, 4, small()).await;
        assert_eq!(sent, [0, 1, 2, 3].map(|n| n * spacing));
        sleep(secs(60)).await;
        let later = sends(&lane, 2, small()).await;
        assert_eq!(
            later,
            [Duration::ZERO, spacing],
            "idle time saves nothing up"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn spacing_and_rate_hold_together() {
    let lane = Lane::new(Pace::per_minute(60).burst(secs(3)).spacing(ms(100)));
    let sent = sends(&lane, 5, small()).await;
    assert_eq!(sent, [0, 100, 200, 1_000, 2_000].map(ms));
}

#[tokio::test(start_paused = true)]
async fn unlimited_goes_at_once() {
    let lane = Lane::new(Pace::unlimited());
    let sent = sends(&lane, 1_000, Need::new(u64::MAX, u64::MAX)).await;
    assert!(sent.iter().all(Duration::is_zero));
}

#[tokio::test(start_paused = true)]
async fn calls_in_flight_are_limited() {
    let lane = Lane::new(Pace::unlimited().in_flight(3));
    let (now, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let start = Instant::now();
    let calls = (0..10).map(|_| async {
        let mut permit = lane.acquire(small()).await.unwrap();
        permit.mark_sent();
        let in_flight = now.fetch_add(1, Ordering::Relaxed) + 1;
        most.fetch_max(in_flight, Ordering::Relaxed);
        sleep(secs(1)).await;
        now.fetch_sub(1, Ordering::Relaxed);
        permit.finish(done(1, 1));
    });
    join_all(calls).await;
    assert_eq!(most.into_inner(), 3);
    assert_eq!(start.elapsed(), secs(4));
    assert_eq!(lane.snapshot().in_flight, 0);
}

#[tokio::test(start_paused = true)]
async fn all_that_a_call_needs_is_taken_at_once() {
    // 100 requests, 1,000 input and 100 output tokens a second.
    let lane = Lane::new(
        Pace::per_minute(6_000)
            .input_tokens(60_000)
            .output_tokens(6_000)
            .burst(secs(1)),
    );
    let sent = sends(&lane, 5, Need::new(100, 50)).await;
    assert_eq!(sent, [0, 0, 500, 1_000, 1_500].map(ms), "output binds");
    sleep(secs(10)).await;
    let sent = sends(&lane, 4, Need::new(500, 1)).await;
    assert_eq!(sent, [0, 0, 500, 1_000].map(ms), "input binds");
    sleep(secs(10)).await;
    let sent = sends(&lane, 101, Need::new(1, 0)).await;
    assert_eq!(sent[100], ms(10), "requests bind");
}

#[tokio::test(start_paused = true)]
async fn more_than_the_burst_goes_when_the_limit_is_full_and_owes_the_rest() {
    let lane = Lane::new(Pace::unlimited().tokens(60_000).burst(secs(1)));
    let start = Instant::now();
    for (need, at) in [(500, 0), (5_000, 500), (1_000, 5_500), (5_000, 6_500)] {
        let mut permit = lane.acquire(Need::new(need, 0)).await.unwrap();
        permit.mark_sent();
        assert_eq!(start.elapsed(), ms(at));
    }
}

#[tokio::test(start_paused = true)]
async fn a_large_need_is_not_starved_by_small_ones() {
    let lane = Lane::new(Pace::unlimited().tokens(60_000).burst(secs(1)));
    let stream = tokio::spawn({
        let lane = lane.clone();
        async move {
            loop {
                lane.acquire(Need::new(20, 0)).await.unwrap().mark_sent();
            }
        }
    });
    sleep(secs(5)).await;
    let start = Instant::now();
    lane.acquire(Need::new(900, 0)).await.unwrap().mark_sent();
    assert!(start.elapsed() <= ms(940), "{:?}", start.elapsed());
    stream.abort();
}

#[tokio::test(start_paused = true)]
async fn a_reply_settles_the_estimate() {
    let lane = Lane::new(Pace::unlimited().tokens(60_000).burst(secs(1)));
    let start = Instant::now();

    let too_much = lane.acquire(Need::new(500, 500)).await.unwrap();
    too_much.finish(done(200, 100));
    let as_estimated = lane.acquire(Need::new(500, 200)).await.unwrap();
    assert_eq!(start.elapsed(), Duration::ZERO, "700 came back");
    as_estimated.finish(CallOutcome::Succeeded { usage: None });

    let too_little = lane.acquire(Need::new(10, 0)).await.unwrap();
    assert_eq!(start.elapsed(), ms(10));
    too_little.finish(done(10, 3_000));
    let _behind_the_debt = lane.acquire(Need::new(0, 0)).await.unwrap();
    assert_eq!(start.elapsed(), ms(3_010));
}

#[tokio::test(start_paused = true)]
async fn what_was_not_sent_is_given_back_and_what_was_sent_is_not() {
    let lane = Lane::new(Pace::per_minute(1).tokens(60).burst(secs(1)));
    let need = Need::new(1, 0);
    drop(lane.acquire(need).await.unwrap());
    let mut permit = lane.try_acquire(&need).expect("given back");
    permit.mark_sent();
    drop(permit);
    assert!(lane.try_acquire(&need).is_none(), "sent");
    assert_eq!(lane.snapshot().in_flight, 0);

    let start = Instant::now();
    lane.acquire(need)
        .await
        .unwrap()
        .finish(CallOutcome::Failed { usage: None });
    assert_eq!(start.elapsed(), secs(60));
    assert!(lane.try_acquire(&need).is_none(), "failed calls count");
}

#[tokio::test(start_paused = true)]
async fn a_permit_held_for_long_gives_back_only_what_is_missing() {
    let lane = Lane::new(Pace::safe());
    let held = lane.acquire(small()).await.unwrap();
    sleep(secs(5)).await;
    lane.acquire(small()).await.unwrap().mark_sent();
    drop(held);
    let start = Instant::now();
    lane.acquire(small()).await.unwrap().mark_sent();
    assert_eq!(start.elapsed(), secs(2), "two calls are never closer");
}

#[tokio::test(start_paused = true)]
async fn a_throttled_call_closes_the_lane_and_it_resumes_empty() {
    let lane = Lane::seeded(
        Pace::per_minute(600)
            .tokens(60_000)
            .burst(secs(1))
            .adaptive(false),
        1,
    );
    let first = lane.acquire(small()).await.unwrap();
    first.finish(CallOutcome::Throttled {
        wait: Some(secs(10)),
    });
    let snapshot = lane.snapshot();
    let cooldown = snapshot.cooldown.unwrap();
    assert!((secs(10)..=secs(11)).contains(&cooldown));
    assert_eq!(
        (snapshot.binding, snapshot.throttled),
        (Binding::Cooldown, 1)
    );

    let sent = sends(&lane, 20, small()).await;
    for (i, at) in sent.iter().enumerate() {
        let due = cooldown + ms(100) * (i as u32 + 1);
        assert!((due..due + ms(1)).contains(at), "{i}: {at:?}, not {due:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn credits_while_closed_make_no_herd() {
    let lane = Lane::new(
        Pace::unlimited()
            .tokens(60_000)
            .burst(secs(1))
            .adaptive(false),
    );
    let need = Need::new(100, 0);
    let mut burst = join_all((0..10).map(|_| lane.acquire(need))).await;
    burst
        .pop()
        .unwrap()
        .unwrap()
        .finish(CallOutcome::Throttled {
            wait: Some(secs(5)),
        });
    for permit in burst {
        permit.unwrap().finish(done(0, 0));
    }
    let sent = sends(&lane, 2, need).await;
    assert!(sent[0] >= ms(5_100) && sent[1] - sent[0] >= ms(99));
}

#[tokio::test(start_paused = true)]
async fn without_a_wait_from_the_server_the_lane_cools_down_for_longer_each_time() {
    let lane = Lane::new(Pace::unlimited());
    for expected in [500, 1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000] {
        let permit = lane.acquire(small()).await.unwrap();
        sleep(ms(1)).await;
        permit.finish(CallOutcome::Throttled { wait: None });
        let cooldown = lane.snapshot().cooldown.unwrap();
        let expected = ms(expected);
        assert!(
            (expected..=expected * 11 / 10).contains(&cooldown),
            "{cooldown:?}"
        );
    }
    lane.acquire(small()).await.unwrap().finish(done(1, 1));
    sleep(ms(1)).await;
    let permit = lane.acquire(small()).await.unwrap();
    permit.finish(CallOutcome::Throttled { wait: None });
    assert!(lane.snapshot().cooldown.unwrap() <= ms(550));
}

#[tokio::test(start_paused = true)]
async fn the_order_is_that_of_arrival() {
    let lane = Lane::new(Pace::per_minute(60));
    let order = Mutex::new(Vec::new());
    lane.acquire(small()).await.unwrap().mark_sent();
    let first = lane.next_position();
    let calls = [(1, None), (2, None), (0, Some(first))].map(|(name, place)| {
        let need = place.map_or(small(), |place| small().at(place));
        let (lane, order) = (&lane, &order);
        async move {
            lane.acquire(need).await.unwrap().mark_sent();
            order.lock().unwrap().push(name);
        }
    });
    join_all(calls).await;
    assert_eq!(*order.lock().unwrap(), [0, 1, 2], "a retry keeps its place");
}

#[tokio::test(start_paused = true)]
async fn nobody_slips_past_those_who_wait() {
    let lane = Lane::new(Pace::per_minute(60).tokens(6_000).burst(secs(1)));
    lane.acquire(Need::new(100, 0)).await.unwrap().mark_sent();
    let mut waiting = pin!(lane.acquire(Need::new(50, 0)));
    assert!(waiting.as_mut().now_or_never().is_none());
    lane.retune(Pace::unlimited().tokens(6_000));
    assert!(lane.try_acquire(&Need::new(0, 0)).is_none());
    waiting.await.unwrap().mark_sent();
    assert!(lane.try_acquire(&Need::new(0, 0)).is_some());
}

#[tokio::test(start_paused = true)]
async fn leaving_the_queue_leaves_no_trace() {
    let lane = Lane::new(Pace::per_minute(60));
    lane.acquire(small()).await.unwrap().mark_sent();
    let start = Instant::now();
    let mut first = Box::pin(lane.acquire(small()));
    let mut second = Box::pin(lane.acquire(small()));
    let mut third = Box::pin(lane.acquire(small()));
    for waiting in [&mut first, &mut second, &mut third] {
        assert!(waiting.now_or_never().is_none());
    }
    drop(second);
    assert_eq!(lane.snapshot().waiting, 2);
    first.await.unwrap().mark_sent();
    assert_eq!(start.elapsed(), secs(1));
    third.await.unwrap().mark_sent();
    assert_eq!(start.elapsed(), secs(2));
    let snapshot = lane.snapshot();
    assert_eq!(
        (snapshot.waiting, snapshot.in_flight, snapshot.granted),
        (0, 0, 3)
    );
}

#[tokio::test(start_paused = true)]
async fn callers_go_in_time_when_those_before_them_leave() {
    let lane = Lane::new(Pace::per_minute(1));
    lane.acquire(small()).await.unwrap().mark_sent();
    let start = Instant::now();
    let tasks: Vec<_> = (0..4)
        .map(|_| {
            let lane = lane.clone();
            tokio::spawn(async move {
                lane.acquire(small()).await.unwrap().mark_sent();
                Instant::now()
            })
        })
        .collect();
    settle().await;
    sleep(secs(30)).await;
    let [a, b, c, d] = <[_; 4]>::try_from(tasks).unwrap();
    a.abort();
    settle().await;
    b.abort();
    assert_eq!(c.await.unwrap() - start, secs(60));
    assert_eq!(d.await.unwrap() - start, secs(120));
}

#[tokio::test(start_paused = true)]
async fn a_grant_nobody_collected_goes_to_the_next() {
    let lane = Lane::new(Pace::per_minute(60).in_flight(1));
    let held = lane.acquire(small()).await.unwrap();
    let mut first = Box::pin(lane.acquire(small()));
    let mut second = Box::pin(lane.acquire(small()));
    assert!((&mut first).now_or_never().is_none());
    assert!((&mut second).now_or_never().is_none());
    sleep(secs(1)).await;
    held.finish(done(1, 1));
    assert_eq!(
        lane.snapshot().in_flight,
        1,
        "the first has it, and does not know"
    );
    drop(first);
    let second = second.now_or_never().expect("refunded in full").unwrap();
    drop(second);
    assert_eq!(lane.snapshot().in_flight, 0);
}

#[tokio::test(start_paused = true)]
async fn a_faster_pace_reaches_those_who_wait() {
    let lane = Lane::new(Pace::per_minute(1));
    lane.acquire(small()).await.unwrap().mark_sent();
    let start = Instant::now();
    let waiting = tokio::spawn({
        let lane = lane.clone();
        async move { sends(&lane, 3, small()).await }
    });
    sleep(secs(6)).await;
    // A tenth of a request is there; the rest comes at ten a second.
    lane.retune(Pace::per_minute(600));
    let sent = waiting.await.unwrap();
    assert_eq!(sent, [6_090, 6_190, 6_290].map(ms));
    assert_eq!(start.elapsed(), ms(6_290));
}

#[tokio::test(start_paused = true)]
async fn a_slower_pace_holds_those_who_wait() {
    let lane = Lane::new(Pace::per_minute(600).burst(secs(1)).in_flight(9));
    let burst = join_all((0..9).map(|_| lane.acquire(small()))).await;
    let waiting = tokio::spawn({
        let lane = lane.clone();
        async move { sends(&lane, 2, small()).await }
    });
    settle().await;
    // One request is left; it is kept. All nine must end before one slot is free.
    lane.retune(Pace::per_minute(6).in_flight(1));
    assert_eq!(lane.snapshot().binding, Binding::InFlight);
    for permit in burst {
        sleep(secs(1)).await;
        permit.unwrap().finish(done(1, 1));
    }
    assert_eq!(waiting.await.unwrap(), [9, 19].map(secs));
}

#[tokio::test(start_paused = true)]
async fn a_caller_whose_time_came_to_nothing_goes_when_it_can() {
    let lane = Lane::new(Pace::per_minute(60).in_flight(2));
    let held = lane.acquire(small()).await.unwrap();
    let start = Instant::now();
    let waiting = tokio::spawn({
        let lane = lane.clone();
        async move { sends(&lane, 1, small()).await }
    });
    sleep(ms(500)).await;
    // At 1 s there is no slot, so only the end of the call helps;
    // at 2 s there is a slot, but the rest of the request is 3.5 s away.
    lane.retune(Pace::per_minute(6).in_flight(1));
    sleep(ms(1_500)).await;
    held.finish(done(1, 1));
    let sent = timeout(secs(60), waiting).await.expect("not stranded");
    assert_eq!(sent.unwrap(), [ms(5_500)]);
    assert_eq!(start.elapsed(), ms(5_500));
}

#[tokio::test(start_paused = true)]
async fn the_snapshot_says_what_binds() {
    async fn binding(pace: Pace, used: Need) -> (Binding, Option<Duration>) {
        let lane = Lane::new(pace);
        assert_eq!(lane.snapshot().binding, Binding::Nothing);
        let _held = lane.acquire(used).await.unwrap();
        let mut waiting = pin!(lane.acquire(used));
        assert!(waiting.as_mut().now_or_never().is_none());
        let snapshot = lane.snapshot();
        assert_eq!((snapshot.in_flight, snapshot.waiting), (1, 1));
        (snapshot.binding, snapshot.head_wait)
    }
    let need = Need::new(500, 1_000);
    let wait = |secs| Some(Duration::from_secs(secs));
    let open = Pace::unlimited;
    for (pace, expected) in [
        (Pace::per_minute(1), (Binding::Requests, wait(60))),
        (Pace::normal(), (Binding::Spacing, wait(1))),
        (open().tokens(30_000), (Binding::Tokens, wait(3))),
        (open().input_tokens(30_000), (Binding::InputTokens, wait(1))),
        (
            open().output_tokens(30_000),
            (Binding::OutputTokens, wait(2)),
        ),
        (open().in_flight(1), (Binding::InFlight, None)),
        (
            Pace::per_minute(2).output_tokens(1_000),
            (Binding::OutputTokens, wait(60)),
        ),
    ] {
        assert_eq!(binding(pace.burst(secs(1)), need).await, expected);
    }
}

#[tokio::test(start_paused = true)]
async fn a_waker_may_run_anything_when_it_is_dropped() {
    /// Holds a future that waits in the same lane, as a detached task does.
    struct Task(#[expect(dead_code)] Mutex<Pin<Box<dyn Future<Output = Permit> + Send>>>);
    impl Wake for Task {
        fn wake(self: Arc<Self>) {}
    }

    let lane = Lane::new(Pace::per_minute(1));
    lane.acquire(small()).await.unwrap().mark_sent();
    for polled_again in [true, false] {
        let mut waiting = Box::pin(lane.acquire(small()));
        let mut held = Box::pin({
            let lane = lane.clone();
            async move { lane.acquire(small()).await.unwrap() }
        });
        assert!((&mut held).now_or_never().is_none());
        let waker = Waker::from(Arc::new(Task(Mutex::new(held))));
        let poll = waiting.as_mut().poll(&mut Context::from_waker(&waker));
        assert!(poll.is_pending());
        drop(waker);
        if polled_again {
            assert!((&mut waiting).now_or_never().is_none());
        }
        drop(waiting);
    }
    settle().await;
    assert_eq!(lane.snapshot().waiting, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_threads_share_a_lane() {
    let lane = Lane::new(
        Pace::per_minute(600_000)
            .in_flight(7)
            .tokens(60_000_000)
            .burst(secs(1)),
    );
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let tasks = (0..64).map(|task| {
        let (lane, now, most) = (lane.clone(), now.clone(), most.clone());
        tokio::spawn(async move {
            let place: QueuePosition = lane.next_position();
            for n in 0..250 {
                let need = Need::new(10, 10);
                let acquire = lane.acquire(if n % 5 == 0 { need.at(place) } else { need });
                // Some give up while they wait.
                let Ok(Ok(mut permit)) = timeout(ms(1 + (task + n) % 40), acquire).await else {
                    continue;
                };
                let in_flight = now.fetch_add(1, Ordering::SeqCst) + 1;
                most.fetch_max(in_flight, Ordering::SeqCst);
                if n % 3 == 0 {
                    tokio::task::yield_now().await;
                }
                now.fetch_sub(1, Ordering::SeqCst);
                if n % 7 != 0 {
                    permit.mark_sent();
                    permit.finish(done(10, 5));
                }
            }
        })
    });
    let all = timeout(secs(60), join_all(tasks))
        .await
        .expect("nobody is stranded");
    assert!(all.into_iter().all(|task| task.is_ok()));
    assert!(most.load(Ordering::SeqCst) <= 7);
    let snapshot = lane.snapshot();
    assert_eq!((snapshot.in_flight, snapshot.waiting), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn the_future_can_move_between_tasks() {
    fn is_send<T: Send>(value: T) -> T {
        value
    }
    let lane = Lane::new(Pace::per_minute(60));
    lane.acquire(small()).await.unwrap().mark_sent();
    let start = Instant::now();
    let mut waiting = Box::pin({
        let lane = lane.clone();
        is_send(async move { lane.acquire(small()).await.unwrap() })
    });
    let poll = futures::poll!(&mut waiting);
    assert!(matches!(poll, Poll::Pending));
    tokio::spawn(waiting).await.unwrap().mark_sent();
    assert_eq!(start.elapsed(), secs(1));
}

/// The one behind takes none of the output that the head waits for.
#[tokio::test(start_paused = true)]
async fn who_delays_nobody_may_pass() {
    let pace = Pace::unlimited().input_tokens(60_000).output_tokens(6_000);
    let lane = Lane::new(pace.burst(secs(1)));
    lane.acquire(Need::new(10, 100)).await.unwrap().mark_sent();
    let start = Instant::now();
    let calls = [Need::new(10, 50), Need::new(10, 0), Need::new(10, 1)].map(|need| {
        let lane = &lane;
        async move {
            lane.acquire(need).await.unwrap().mark_sent();
            start.elapsed()
        }
    });
    assert_eq!(join_all(calls).await, [500, 0, 510].map(ms));
}

/// A thousand calls of one tenant do not keep another's from its half.
#[tokio::test(start_paused = true)]
async fn a_light_tenant_is_not_kept_waiting_by_a_heavy_one() {
    let lane = Lane::new(Pace::per_minute(600));
    let call = |tenant| {
        let (lane, need) = (lane.clone(), small().tenant(Tenant::new(tenant, 1)));
        async move {
            let start = Instant::now();
            lane.acquire(need).await.unwrap().mark_sent();
            start.elapsed()
        }
    };
    let heavy = tokio::spawn(join_all(
        (0..1_000).map(|_| call("heavy")).collect::<Vec<_>>(),
    ));
    sleep(secs(10)).await;
    let light = join_all((0..10).map(|_| call("light"))).await;
    assert!(light[9] <= ms(2_100), "{:?}", light[9]);
    assert!(heavy.await.unwrap().iter().all(|at| *at <= secs(101)));
}

#[tokio::test(start_paused = true)]
async fn what_headers_tell_lowers_a_limit_and_names_one_that_nobody_set() {
    let lane = Lane::new(Pace::per_minute(600).burst(secs(10)));
    let mut permit = lane.acquire(small()).await.unwrap();
    permit.mark_sent();
    let mut said = RateSnapshot::default();
    said.requests.limit = Some(600);
    said.requests.remaining = Some(2);
    said.tokens.limit = Some(60_000);
    said.tokens.remaining = Some(500);
    permit.observe(&said);
    permit.finish(done(1, 1));
    let sent = sends(&lane, 3, small()).await;
    assert_eq!(sent[2], ms(100), "two were left, not 99");
    assert!(sent[1] < ms(5), "as soon as the new limit has their tokens");
    let start = Instant::now();
    lane.acquire(Need::new(900, 0)).await.unwrap().mark_sent();
    lane.acquire(Need::new(900, 0)).await.unwrap().mark_sent();
    assert!(
        start.elapsed() > ms(900),
        "1,000 tokens a second were adopted"
    );
}

#[tokio::test(start_paused = true)]
async fn an_isolated_overload_closes_and_reduces_nothing() {
    for pace in [Pace::unlimited(), Pace::unlimited().adaptive(false)] {
        let lane = Lane::new(pace.in_flight(100));
        let permits = join_all((0..100).map(|_| lane.acquire(small()))).await;
        for (i, permit) in permits.into_iter().enumerate() {
            let overloaded = CallOutcome::Overloaded {
                wait: Some(secs(9)),
            };
            let outcome = if i % 50 == 9 { overloaded } else { done(1, 1) };
            permit.unwrap().finish(outcome);
        }
        let snapshot = lane.snapshot();
        assert_eq!((snapshot.overloaded, snapshot.cooldown), (2, None));
        assert_eq!(snapshot.max_in_flight, Some(100));
    }
}

#[tokio::test(start_paused = true)]
async fn a_series_of_overloads_closes_the_lane_and_leaves_the_calls_that_were_let_in() {
    let lane = Lane::new(Pace::unlimited().in_flight(100));
    let mut permits = join_all((0..100).map(|_| lane.acquire(small()))).await;
    for permit in permits.drain(60..) {
        permit
            .unwrap()
            .finish(CallOutcome::Overloaded { wait: None });
    }
    let snapshot = lane.snapshot();
    assert!(snapshot.cooldown.unwrap() <= ms(550));
    // Eight refusals are within the budget.
    assert_eq!((snapshot.in_flight, snapshot.max_in_flight), (60, Some(60)));
}

#[tokio::test(start_paused = true)]
async fn a_refusal_that_no_rate_explains_lowers_the_calls_in_flight() {
    let refused = || CallOutcome::Throttled { wait: None };
    let lane = Lane::new(Pace::per_minute(6_000).burst(secs(1)).in_flight(16));
    let mut permits = join_all((0..16).map(|_| lane.acquire(small()))).await;
    for permit in permits.drain(8..) {
        permit.unwrap().finish(refused());
    }
    let snapshot = lane.snapshot();
    assert_eq!(
        (snapshot.max_in_flight, snapshot.rate_factor),
        (Some(8), 1.0)
    );

    // Where a rate is nearly used up, that is the reason.
    let lane = Lane::new(Pace::per_minute(1_200).burst(secs(1)).in_flight(16));
    let mut permits = join_all((0..16).map(|_| lane.acquire(small()))).await;
    permits.pop().unwrap().unwrap().finish(refused());
    let snapshot = lane.snapshot();
    assert_eq!(snapshot.max_in_flight, Some(16));
    assert!(snapshot.rate_factor < 1.0);

    // The same holds where the refusal names a wait.
    let lane = Lane::new(Pace::per_minute(6_000).burst(secs(1)).in_flight(16));
    let mut permits = join_all((0..16).map(|_| lane.acquire(small()))).await;
    let wait = Some(secs(1));
    permits
        .pop()
        .unwrap()
        .unwrap()
        .finish(CallOutcome::Throttled { wait });
    assert_eq!(lane.snapshot().max_in_flight, Some(16));
}

#[tokio::test(start_paused = true)]
async fn a_stopped_lane_tells_those_who_wait_and_those_who_come() {
    let lane = Lane::new(Pace::per_minute(1));
    lane.acquire(small()).await.unwrap().mark_sent();
    let mut waiting = pin!(lane.acquire(small()));
    assert!(waiting.as_mut().now_or_never().is_none());
    lane.stop(Error::new(
        ErrorKind::QuotaExhausted,
        "the account is empty",
    ));
    assert!(waiting.await.unwrap_err().is_account_wide());
    assert!(lane.acquire(small()).await.is_err());
    assert_eq!(lane.snapshot().binding, Binding::Stopped);
    lane.retune(Pace::unlimited());
    assert!(lane.acquire(small()).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_parked_lane_starts_at_once_when_it_is_resumed_or_retuned() {
    let refused = CallOutcome::Throttled {
        wait: Some(secs(3_600)),
    };
    for retune in [true, false] {
        let lane = Lane::new(Pace::per_minute(60).tokens(60_000));
        let permit = lane.acquire(small()).await.unwrap();
        permit.finish(refused);
        assert_eq!(lane.snapshot().binding, Binding::Stopped);
        if retune {
            lane.retune(Pace::per_minute(60).input_tokens(60_000));
        } else {
            lane.resume();
        }
        let snapshot = lane.snapshot();
        assert_eq!(
            (snapshot.binding, snapshot.cooldown),
            (Binding::Nothing, None)
        );
        let start = Instant::now();
        lane.acquire(small()).await.unwrap().mark_sent();
        lane.acquire(small()).await.unwrap().mark_sent();
        // It resumes empty, and at no more than its rate, which the refusal has lowered.
        assert!((secs(1)..=secs(4)).contains(&start.elapsed()));
        // The rate that was learned from the refusal is forgotten.
        lane.acquire(small()).await.unwrap().finish(refused);
        assert!(lane.acquire(small()).await.is_err());
    }
}

#[tokio::test(start_paused = true)]
async fn a_cooling_lane_lets_waiting_calls_go_when_it_is_resumed() {
    let lane = Lane::new(Pace::per_minute(60));
    let wait = Some(secs(500));
    let permit = lane.acquire(small()).await.unwrap();
    permit.finish(CallOutcome::Throttled { wait });
    let start = Instant::now();
    let waiting = tokio::spawn({
        let lane = lane.clone();
        async move { sends(&lane, 1, small()).await }
    });
    sleep(secs(10)).await;
    lane.resume();
    waiting.await.unwrap();
    assert!(start.elapsed() <= secs(12), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn waits_that_no_clock_can_express_are_as_good_as_endless() {
    for outcome in [
        CallOutcome::Throttled {
            wait: Some(Duration::MAX),
        },
        CallOutcome::Overloaded {
            wait: Some(Duration::MAX),
        },
    ] {
        let lane = Lane::new(Pace::per_minute(60).burst(Duration::MAX));
        // One overload says nothing of the others.
        let mut refused = 0;
        while let Ok(Ok(permit)) = timeout(secs(86_400), lane.acquire(small())).await {
            permit.finish(outcome);
            refused += 1;
            assert!(refused < 20, "{outcome:?} never closes the lane");
        }
    }
    let lane = Lane::new(Pace::unlimited().spacing(Duration::MAX));
    lane.acquire(small()).await.unwrap().mark_sent();
    assert!(timeout(secs(86_400), lane.acquire(small())).await.is_err());
}
