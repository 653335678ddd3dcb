//! Single calls: attempts, waits, cancellation, and the error of each failure.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use throughline::testing::Scripted;
use throughline::{
    CancellationToken, Context, Error, ErrorKind, Pace, Persistence, Provider, Reply, Request,
    Result, Retry, Sim, Usage, async_trait, context::ParallelToggle, observe::Event,
    ratelimit::Lane, request::RateSnapshot,
};
use tokio::time::{Instant, sleep, timeout};

fn error(kind: ErrorKind) -> Error {
    Error::new(kind, "as scripted")
}

fn throttled(seconds: u64) -> Error {
    error(ErrorKind::Throttled).with_wait(Duration::from_secs(seconds))
}

async fn elapsed<T>(work: impl Future<Output = T>) -> (T, Duration) {
    let began = Instant::now();
    (work.await, began.elapsed())
}

#[tokio::test(start_paused = true)]
async fn a_transient_failure_is_tried_again_within_its_ceiling() {
    let script = Scripted::new()
        .error(error(ErrorKind::Unavailable))
        .error(error(ErrorKind::Connection))
        .reply("third");
    let cx = Context::builder(script.clone()).build();
    let (reply, took) = elapsed(cx.generate("a")).await;
    assert_eq!(reply.unwrap().text, "third");
    assert_eq!(script.requests().len(), 3);
    // U(0, 0.5 s) and U(0, 1 s), with a millisecond of the timer's grain for each.
    assert!(took <= Duration::from_millis(1502), "{took:?}");
    let tally = cx.tally();
    assert_eq!((tally.calls, tally.attempts, tally.throttled), (1, 3, 0));
    assert_eq!(tally.ambiguous, 1, "nobody knows of the broken connection");
}

#[tokio::test(start_paused = true)]
async fn a_wait_in_the_rate_headers_alone_lets_the_lane_cool_down() {
    let wait = Duration::from_secs(20);
    let rate = RateSnapshot::new().with_retry_after(wait);
    let script = Scripted::new()
        .error(error(ErrorKind::Throttled).with_rate(rate.clone()))
        .error(throttled(5).with_rate(rate))
        .reply("third");
    let cx = Context::builder(script).build();
    let (reply, took) = elapsed(cx.generate("a")).await;
    assert_eq!(reply.unwrap().text, "third");
    let slack = took.checked_sub(Duration::from_secs(25)).unwrap();
    assert!(slack < Duration::from_secs(5), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn the_last_error_has_the_number_of_attempts_and_is_exhausted() {
    let mut script = Scripted::new();
    for _ in 0..9 {
        script = script.error(error(ErrorKind::Unavailable));
    }
    let cx = Context::builder(script.clone()).build();
    let error = cx.generate("a").await.unwrap_err();
    assert_eq!(error.attempts(), 5);
    assert!(error.is_exhausted() && !error.is_temporary());
    assert_eq!(script.requests().len(), 5);
    assert!(error.to_string().ends_with("after 5 attempts"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn permanent_errors_are_tried_once() {
    for kind in [
        ErrorKind::InvalidRequest,
        ErrorKind::Unauthorized,
        ErrorKind::QuotaExhausted,
    ] {
        let script = Scripted::new().error(error(kind)).reply("never");
        let cx = Context::builder(script.clone()).build();
        let error = cx.generate("a").await.unwrap_err();
        assert_eq!((error.kind(), error.attempts()), (kind, 1));
        assert_eq!(script.lines_left(), 1);
    }
    let overruled = error(ErrorKind::Unavailable).with_persistence(Persistence::Permanent);
    let cx = Context::builder(Scripted::new().error(overruled).reply("never")).build();
    assert_eq!(cx.generate("a").await.unwrap_err().attempts(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_retry_waits_at_least_as_long_as_the_server_asks() {
    let script = Scripted::new()
        .error(error(ErrorKind::Unavailable).with_wait(Duration::from_secs(40)))
        .reply("after it");
    let cx = Context::builder(script).build();
    let (reply, took) = elapsed(cx.generate("a")).await;
    assert!(reply.is_ok());
    assert!(took >= Duration::from_secs(40), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_refusal_by_the_rate_limit_costs_no_attempt_and_lets_the_lane_cool_down_for_all() {
    let script = Scripted::new()
        .error(throttled(10))
        .error(throttled(10))
        .reply("one")
        .reply("two");
    let cx = Context::builder(script)
        .retry(Retry::none())
        .pace(Pace::unlimited().in_flight(1))
        .build();
    let second = cx.clone();
    let late = tokio::spawn(async move {
        sleep(Duration::from_secs(1)).await;
        elapsed(second.generate("late")).await
    });
    let (first, took) = elapsed(cx.generate("a")).await;
    // A call that was refused once keeps its place in the queue; one that was refused twice goes behind the others.
    assert_eq!(first.unwrap().text, "two");
    // Twice the server's delay with a jitter of up to a tenth, and the wait behind the other call.
    assert!(took >= Duration::from_secs(20), "{took:?}");
    assert!(took <= Duration::from_millis(24_010), "{took:?}");
    let (late, took) = late.await.unwrap();
    assert_eq!(late.unwrap().text, "one");
    assert!(
        took >= Duration::from_secs(9),
        "the gate is everybody's: {took:?}"
    );
    let tally = cx.tally();
    assert_eq!((tally.calls, tally.attempts, tally.throttled), (2, 2, 2));
}

#[tokio::test(start_paused = true)]
async fn a_limit_that_lets_no_call_through_ends_with_an_exhausted_error() {
    struct Closed(AtomicU32);
    #[async_trait]
    impl Provider for Closed {
        fn name(&self) -> &str {
            "closed"
        }
        async fn generate(&self, _: &Request) -> Result<Reply> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Err(throttled(60))
        }
    }
    let cx = Context::builder(Closed(AtomicU32::new(0))).build();
    let (result, took) = elapsed(cx.generate("a")).await;
    let error = result.unwrap_err();
    assert!(error.is_throttled() && error.is_exhausted());
    assert_eq!(error.attempts(), 0);
    assert!(took >= Duration::from_secs(15 * 60), "{took:?}");
    assert!(took <= Duration::from_secs(17 * 60), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_call_that_hangs_ends_with_its_timeout() {
    let hang = || Scripted::new().delay(Duration::MAX / 4).reply("never");
    let cx = Context::builder(hang()).retry(Retry::none()).build();
    let (result, took) = elapsed(cx.generate("a")).await;
    assert!(result.unwrap_err().is_timeout());
    assert_eq!(took, Duration::from_secs(600));

    let cx = Context::builder(hang()).retry(Retry::none()).build();
    let request = Request::new("a").timeout(Duration::from_secs(3));
    let (result, took) = elapsed(cx.generate(request)).await;
    let error = result.unwrap_err();
    assert!(error.is_timeout() && error.billed().is_none());
    assert_eq!(took, Duration::from_secs(3));
    assert_eq!(cx.tally().ambiguous, 1);
}

#[tokio::test(start_paused = true)]
async fn the_deadline_ends_a_call_in_flight_and_no_retry_starts_after_it() {
    let script = Scripted::new()
        .delay(Duration::from_secs(60))
        .reply("never");
    let cx = Context::builder(script)
        .build()
        .with_timeout(Duration::from_secs(5));
    let (result, took) = elapsed(cx.generate("a")).await;
    assert!(result.unwrap_err().is_deadline_exceeded());
    assert_eq!(took, Duration::from_secs(5));

    let wait = Duration::from_secs(30);
    let script = Scripted::new()
        .error(error(ErrorKind::Unavailable).with_wait(wait))
        .reply("never");
    let cx = Context::builder(script.clone()).build();
    let (result, took) = elapsed(cx.with_timeout(wait).generate("a")).await;
    let error = result.unwrap_err();
    assert!(error.is_deadline_exceeded());
    assert_eq!((took, error.attempts()), (Duration::ZERO, 1));
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.starts_with("provider unavailable"), "{source}");
    assert_eq!(script.lines_left(), 1);
}

#[tokio::test(start_paused = true)]
async fn cancelling_ends_waiting_calls_and_calls_in_flight() {
    let token = CancellationToken::new();
    let script = Scripted::new()
        .delay(Duration::from_secs(60))
        .reply("never")
        .reply("never");
    let cx = Context::builder(script.clone())
        .pace(Pace::unlimited().in_flight(1))
        .cancellation(token.clone())
        .build();
    let canceller = async {
        sleep(Duration::from_secs(1)).await;
        token.cancel();
    };
    let ((in_flight, waiting, ()), took) =
        elapsed(async { tokio::join!(cx.generate("a"), cx.generate("b"), canceller) }).await;
    let (in_flight, waiting) = (in_flight.unwrap_err(), waiting.unwrap_err());
    assert_eq!(took, Duration::from_secs(1));
    assert!(in_flight.is_cancelled() && in_flight.billed().is_none());
    assert!(waiting.is_cancelled() && waiting.billed() == Some(false));
    assert_eq!(waiting.attempts(), 0);
    assert_eq!(script.requests().len(), 1);
    assert!(cx.generate("c").await.unwrap_err().is_cancelled());
    assert_eq!(cx.snapshot().lane.in_flight, 0);
}

#[tokio::test(start_paused = true)]
async fn draining_finishes_calls_in_flight_and_sends_no_more() {
    let script = Scripted::new()
        .delay(Duration::from_secs(60))
        .reply("paid")
        .reply("never");
    let cx = Context::builder(script.clone())
        .pace(Pace::unlimited().in_flight(1))
        .build();
    let drainer = async {
        sleep(Duration::from_secs(1)).await;
        cx.drain();
    };
    let (in_flight, waiting, ()) = tokio::join!(cx.generate("a"), cx.generate("b"), drainer);
    assert_eq!(in_flight.unwrap().text, "paid");
    assert!(waiting.unwrap_err().is_cancelled());
    assert_eq!(script.lines_left(), 1);
}

#[tokio::test(start_paused = true)]
async fn cancelling_a_child_does_not_cancel_its_parent_or_siblings() {
    let cx = Context::builder(Scripted::new().reply("parent")).build();
    let child = cx.child("stage");
    child.cancel();
    assert!(child.generate("a").await.unwrap_err().is_cancelled());
    assert!(cx.generate("a").await.is_ok());
    assert_eq!(child.tally().attempts, 0);
    assert_eq!(cx.tally().attempts, 1);
}

/// A dropped call gives its permit back.
#[tokio::test(start_paused = true)]
async fn dropping_a_call_frees_its_slot() {
    let script = Scripted::new()
        .delay(Duration::from_secs(60))
        .reply("dropped")
        .reply("b");
    let cx = Context::builder(script)
        .pace(Pace::unlimited().in_flight(1))
        .build();
    assert!(
        timeout(Duration::from_secs(1), cx.generate("a"))
            .await
            .is_err()
    );
    assert_eq!(cx.snapshot().lane.in_flight, 0);
    assert_eq!(cx.generate("b").await.unwrap().text, "b");
}

#[tokio::test(start_paused = true)]
async fn a_retry_holds_no_slot_while_it_waits() {
    let script = Scripted::new()
        .error(error(ErrorKind::Unavailable).with_wait(Duration::from_secs(30)))
        .reply("other")
        .reply("again");
    let cx = Context::builder(script)
        .pace(Pace::unlimited().in_flight(1))
        .build();
    let other = async {
        sleep(Duration::from_millis(1)).await;
        elapsed(cx.generate("other")).await
    };
    let (again, (other, took)) = tokio::join!(cx.generate("again"), other);
    assert_eq!(
        (&*again.unwrap().text, &*other.unwrap().text),
        ("again", "other")
    );
    assert_eq!(took, Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn contexts_of_one_account_share_a_lane() {
    let lane = Lane::new(Pace::per_minute(60));
    let script = Scripted::new().reply("a").reply("b");
    let [one, two] = [0, 1].map(|_| Context::builder(script.clone()).lane(lane.clone()).build());
    let (_, took) = elapsed(async { tokio::join!(one.generate("a"), two.generate("b")) }).await;
    assert_eq!(took, Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn the_context_fills_in_the_model_where_a_request_names_none() {
    let script = Scripted::new().reply("a").reply("b");
    let cx = Context::builder(script.clone()).model("m-1").build();
    let batch = cx.fan_out("n", ["x", "y"]).sequential();
    let settled = batch.settle(|cx, n| async move {
        let request = Request::new(n);
        cx.generate(if n == "y" {
            request.model("m-2")
        } else {
            request
        })
        .await
    });
    settled.await.all().unwrap();
    let seen = script.requests();
    assert_eq!(seen[0].model.as_deref(), Some("m-1"));
    assert_eq!(seen[1].model.as_deref(), Some("m-2"));
}

#[tokio::test(start_paused = true)]
async fn events_report_each_step_of_a_call_and_a_panicking_observer_changes_nothing() {
    let script = Scripted::new()
        .error(throttled(1))
        .error(error(ErrorKind::Unavailable))
        .reply("done")
        .error(error(ErrorKind::InvalidRequest));
    let story = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&story);
    let cx = Context::builder(script)
        .on_event(|_| panic!("an observer"))
        .on_event(move |event| {
            sink.lock().unwrap().push(match event {
                Event::CallStarted { attempt, .. } => format!("started {attempt}"),
                Event::CallThrottled { .. } => "throttled".to_owned(),
                Event::LaneCoolingDown { .. } => "closed".to_owned(),
                Event::CallRetried { attempt, .. } => format!("retried {attempt}"),
                Event::CallSucceeded { attempt, .. } => format!("succeeded {attempt}"),
                Event::CallFailed { error, .. } => format!("failed {}", error.kind()),
                other => other.to_string(),
            });
        })
        .build();
    assert_eq!(cx.generate("a").await.unwrap().text, "done");
    assert!(cx.generate("b").await.is_err());
    let expected = [
        "started 1",
        "the lane slows to 78 % of the limit on requests",
        "closed",
        "throttled",
        "started 1",
        "retried 1",
        "started 2",
        "succeeded 2",
        "started 1",
        "failed invalid_request",
    ];
    assert_eq!(*story.lock().unwrap(), expected);
    assert_eq!(cx.snapshot().observer_panics, expected.len() as u64);
}

#[tokio::test(start_paused = true)]
async fn a_best_effort_update_never_fails_the_work_and_delays_it_by_the_grace_at_most() {
    let cx = Context::builder(Scripted::new()).build();
    let work = || async {
        sleep(Duration::from_secs(2)).await;
        "work"
    };
    let after = |seconds| async move {
        sleep(Duration::from_secs(seconds)).await;
        Ok(seconds)
    };
    let ((done, update), took) = elapsed(cx.join_best_effort(work(), after(1))).await;
    assert_eq!((done, update.unwrap()), ("work", 1));
    assert_eq!(took, Duration::from_secs(2), "they start together");

    let ((done, update), took) = elapsed(cx.join_best_effort(work(), after(9))).await;
    assert_eq!(done, "work");
    assert!(update.unwrap_err().is_timeout());
    assert_eq!(took, Duration::from_secs(3), "the work, and the grace");

    let failing = async { Err::<(), _>(Error::other("socket closed")) };
    let (done, update) = cx.join_best_effort(work(), failing).await;
    assert_eq!(
        (done, update.unwrap_err().message()),
        ("work", "socket closed")
    );

    let panicking = async { panic!("in the update") };
    let (done, update) = cx.join_best_effort::<_, ()>(work(), panicking).await;
    assert_eq!(done, "work");
    assert!(update.unwrap_err().is_panic());
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_a_provider_gives_its_permit_back() {
    struct Panics;
    #[async_trait]
    impl Provider for Panics {
        fn name(&self) -> &str {
            "panics"
        }
        async fn generate(&self, request: &Request) -> Result<Reply> {
            assert!(request.last_text() != "a", "in the provider");
            Ok(Reply::new("fine", Usage::default()))
        }
    }
    let cx = Context::builder(Panics)
        .pace(Pace::unlimited().in_flight(1))
        .build();
    let settled = cx.fan_out("n", ["a", "b"]).sequential();
    let settled = settled
        .settle(|cx, n| async move { cx.generate(n).await })
        .await;
    let first = settled.outcomes()[0].error().unwrap();
    assert!(first.is_panic());
    assert_eq!(first.message(), "in the provider");
    assert!(settled.outcomes()[1].is_ok());
    assert_eq!(cx.snapshot().lane.in_flight, 0);
}

/// When the account is refused, waiting calls are not sent either.
#[tokio::test(start_paused = true)]
async fn a_refused_account_stops_all_calls_until_the_deployment_is_enabled() {
    let script = Scripted::new()
        .delay(Duration::from_secs(1))
        .error(error(ErrorKind::Unauthorized))
        .reply("after it");
    let stopped = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&stopped);
    let cx = Context::builder(script.clone())
        .pace(Pace::unlimited().in_flight(1))
        .on_event(move |event| {
            if let Event::LaneStopped { error, .. } = event {
                assert!(error.is_account_wide());
                count.fetch_add(1, Ordering::Relaxed);
            }
        })
        .build();
    let (refused, waiting) = tokio::join!(cx.generate("a"), cx.generate("b"));
    let (refused, waiting) = (refused.unwrap_err(), waiting.unwrap_err());
    assert_eq!((refused.attempts(), waiting.attempts()), (1, 0));
    for error in [waiting, cx.generate("c").await.unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::Unauthorized);
    }
    assert_eq!(
        cx.snapshot().lane.binding,
        throughline::ratelimit::Binding::Stopped
    );
    assert_eq!(
        (script.requests().len(), stopped.load(Ordering::Relaxed)),
        (1, 1)
    );
    cx.enable("scripted").unwrap();
    assert_eq!(cx.generate("d").await.unwrap().text, "after it");
}

#[tokio::test(start_paused = true)]
async fn calls_fail_instead_of_waiting_for_a_lane_with_a_very_long_wait() {
    let script = Scripted::new()
        .error(throttled(3_600))
        .error(throttled(3_600))
        .reply("an hour later");
    let cx = Context::builder(script).build();
    for (prompt, parked) in [("a", false), ("another", true)] {
        let (result, took) = elapsed(cx.generate(prompt)).await;
        let error = result.unwrap_err();
        assert!(error.is_throttled() && error.is_exhausted(), "{error}");
        assert_eq!(
            (error.wait(), took),
            (Some(Duration::from_secs(3_600)), Duration::ZERO)
        );
        assert_eq!(cx.lanes().any(|lane| lane.stopped().is_some()), parked);
    }
    // The wait and the jitter of the cooldown.
    sleep(Duration::from_secs(3_602)).await;
    assert!(cx.lanes().all(|lane| lane.stopped().is_none()));
    assert_eq!(cx.generate("b").await.unwrap().text, "an hour later");
}

#[tokio::test(start_paused = true)]
async fn a_request_refused_for_its_size_leaves_the_token_limit_alone() {
    for max_tokens in [128_000, u64::from(u32::MAX), u64::MAX] {
        let script = Scripted::new()
            .error(error(ErrorKind::InvalidRequest).with_http_status(400))
            .reply("next");
        let pace = Pace::per_minute(500).tokens(30_000);
        let cx = Context::builder(script).pace(pace).build();
        let large = Request::new("hi").max_tokens(max_tokens);
        cx.generate(large).await.unwrap_err();
        let (next, took) = elapsed(cx.generate(Request::new("hi").max_tokens(100))).await;
        next.unwrap();
        // Only the limit on requests is left to wait for, at 500 a minute.
        assert!(took <= Duration::from_millis(250), "{max_tokens}: {took:?}");
    }
}

/// The lane counts a minute's worth and sends an event. Otherwise the calls behind it would wait for days.
#[tokio::test(start_paused = true)]
async fn one_call_is_charged_a_minute_of_a_limit_at_most() {
    let reply = |input, output| Reply::new("ok", Usage::new(input, output));
    let (small, large) = (Request::new("hi"), Request::new("hi").max_tokens(128_000));
    let cases = [
        (small.clone(), reply(u64::MAX, 1), u64::MAX),
        (small.clone(), reply(1, u64::MAX), u64::MAX),
        (large, reply(1, 1), 128_005),
    ];
    for (request, odd, charged) in cases {
        let exceeded = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&exceeded);
        let cx = Context::builder(Scripted::new().exact_reply(odd).reply("next"))
            .pace(Pace::per_minute(500).tokens(30_000))
            .on_event(move |event| {
                if let Event::CallExceedsLimit {
                    limit,
                    needed,
                    per_minute,
                    ..
                } = event
                {
                    heard.lock().unwrap().push((*limit, *needed, *per_minute));
                }
            })
            .build();
        cx.generate(request).await.unwrap();
        assert_eq!(*exceeded.lock().unwrap(), [("tokens", charged, 30_000)]);
        let (next, took) = elapsed(cx.generate(small.clone())).await;
        next.unwrap();
        assert!(took >= Duration::from_secs(50), "it is charged: {took:?}");
        assert!(took <= Duration::from_secs(62), "{took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_empty_retry_budget_slows_retries_and_fails_no_call() {
    let mut script = Scripted::new();
    for _ in 0..101 {
        script = script.error(error(ErrorKind::Connection)).reply("again");
    }
    // Each request costs a retry and earns a success: it takes 4 of the 500 tokens.
    let cx = Context::builder(script).build();
    let settled = cx.fan_out("n", 0..101).sequential();
    let settled = settled.settle(|cx, n| async move { cx.generate(n.to_string()).await });
    assert_eq!(settled.await.failures().count(), 0);
    let tally = cx.tally();
    assert_eq!((tally.retries, tally.transient), (101, 101));

    let mut script = Scripted::new();
    for _ in 0..200 {
        script = script.error(error(ErrorKind::Connection));
    }
    let cx = Context::builder(script.reply("again"))
        .retry(Retry::default().attempts(300))
        .build();
    let long = Retry::default()
        .attempts(300)
        .max_delay(Duration::from_secs(1));
    let cx = Context::builder(cx.provider("scripted").unwrap().clone())
        .retry(long)
        .build();
    let (reply, took) = elapsed(cx.generate("a")).await;
    assert!(reply.is_ok());
    // A hundred random waits below a second, then a hundred around one second.
    let hundred = Duration::from_secs(100);
    assert!((hundred..hundred * 2).contains(&took), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_retry_that_could_not_be_answered_in_time_fails_at_once() {
    let latency = Duration::from_secs(10);
    let mut script = Scripted::new();
    for _ in 0..8 {
        script = script.delay(latency).reply("warm");
    }
    let unavailable = error(ErrorKind::Unavailable).with_wait(Duration::from_secs(5));
    let script = script.delay(latency).error(unavailable).reply("never");
    let cx = Context::builder(script).build();
    for _ in 0..8 {
        cx.generate("warm").await.unwrap();
    }
    let (result, took) = elapsed(cx.with_timeout(Duration::from_secs(22)).generate("a")).await;
    let error = result.unwrap_err();
    assert!(error.is_deadline_exceeded(), "{error}");
    assert_eq!(
        (took, error.attempts()),
        (Duration::from_secs(10), 1),
        "10 + 5 + 10 > 22"
    );
}

#[tokio::test(start_paused = true)]
async fn the_parallel_toggle_changes_how_long_work_takes_and_not_its_results() {
    let second = Duration::from_secs(1);
    let parallel = ParallelToggle::new(true);
    let mut told = Vec::new();
    for on in [true, false] {
        parallel.set(on);
        let sim = Sim::builder().latency(second).build();
        let cx = Context::builder(sim).parallel(&parallel).build();
        let ask = |label: &'static str| {
            cx.stage(label, move |cx| async move {
                Ok(cx.generate(label).await?.text)
            })
        };
        let began = Instant::now();
        let (a, b, c) = cx.join((ask("a"), ask("b"), ask("c"))).await;
        let joined = began.elapsed();
        let items = cx.fan_out("item", 0..4).join_all();
        let items =
            items.try_all(|cx, n| async move { Ok(cx.generate(n.to_string()).await?.text) });
        let items = items.await.unwrap();
        let fanned = began.elapsed() - joined;
        let update = async {
            sleep(second / 2).await;
            Ok(())
        };
        let (work, update) = cx.join_best_effort(ask("work"), update).await;
        assert!(update.is_ok());
        let beside = began.elapsed() - joined - fanned;
        told.push((a.unwrap(), b.unwrap(), c.unwrap(), items, work.unwrap()));
        let times = [joined, fanned, beside].map(|it| it.as_millis());
        let expected = if on {
            [1_000, 1_000, 1_000]
        } else {
            [3_000, 4_000, 1_500]
        };
        assert_eq!(times, expected);
    }
    assert_eq!(told[0], told[1]);
}

#[tokio::test(start_paused = true)]
async fn a_stage_that_panics_fails_and_sends_an_event() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let events = Arc::clone(&told);
    let cx = Context::builder(Scripted::new())
        .on_event(move |event| {
            if let Event::StageEnded { path, error, .. } = event {
                events
                    .lock()
                    .unwrap()
                    .push((path.to_string(), error.is_some()));
            }
        })
        .build();
    let inner = cx.child("plan");
    let failed = inner.stage("bad", |_| async { panic!("at the disco") });
    let failed: Result<()> = failed.await;
    assert!(failed.unwrap_err().is_panic());
    inner.stage("good", |_| async { Ok(()) }).await.unwrap();
    let told = told.lock().unwrap();
    assert_eq!(
        *told,
        [
            ("plan/bad".to_owned(), true),
            ("plan/good".to_owned(), false)
        ]
    );
}
