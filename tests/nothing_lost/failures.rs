//! Failures: the requests that are given up, those that wait, and the effect on other requests.
//!
//! All on the paused clock. `THROUGHLINE_LONG=1` runs the long form of the first test.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt as _;
use throughline::{
    Context, ContextBuilder, Error, ErrorKind, Pace, Pipeline as _, PipelineExt as _, Provider,
    Reply, Request, Result, Retry, Settled, Sim, Usage, async_trait, observe::Event, pipeline,
    ratelimit::Binding,
};
use tokio::time::{Instant, sleep, timeout};

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3_600);

/// A provider made of a closure.
struct Answers<F>(F);

#[async_trait]
impl<F, Fut> Provider for Answers<F>
where
    F: Fn(String) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Reply>> + Send + 'static,
{
    fn name(&self) -> &str {
        "answers"
    }

    async fn generate(&self, request: &Request) -> Result<Reply> {
        (self.0)(request.last_text().to_owned()).await
    }
}

/// Makes a context around a closure that gets the prompt.
fn answers<F, Fut>(answer: F) -> ContextBuilder
where
    F: Fn(String) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Reply>> + Send + 'static,
{
    Context::builder(Answers(answer))
}

fn ok() -> Result<Reply> {
    Ok(Reply::new("ok", Usage::new(10, 10)))
}

fn error(kind: ErrorKind) -> Error {
    Error::new(kind, "as the test says")
}

fn forbidden() -> Error {
    Error::new(ErrorKind::Forbidden, "no access to the model").with_http_status(403)
}

/// Makes `n` calls, with their numbers as prompts.
async fn ask(cx: &Context, n: usize) -> Settled<Reply> {
    cx.fan_out("n", 0..n)
        .settle(async |cx, n| cx.generate(n.to_string()).await)
        .await
}

/// Makes `n` calls at the same time.
async fn ask_at_once(cx: &Context, n: usize) -> Settled<Reply> {
    cx.fan_out("n", 0..n)
        .join_all()
        .settle(async |cx, n| cx.generate(n.to_string()).await)
        .await
}

fn counter() -> (Arc<AtomicUsize>, Arc<AtomicUsize>) {
    let counter = Arc::new(AtomicUsize::new(0));
    (Arc::clone(&counter), counter)
}

// Requests that are given up, and those that are not

#[tokio::test(start_paused = true)]
async fn no_item_is_lost_to_independent_failures() {
    let long = std::env::var_os("THROUGHLINE_LONG").is_some();
    let n = if long { 1_000_000 } else { 50_000 };
    for (code, n) in [(None, n), (Some("server_error"), n / 5)] {
        let seed = Mutex::new(fastrand::Rng::with_seed(7));
        let cx = answers(move |_| {
            let fails = seed.lock().unwrap().f64() < 0.05;
            async move {
                sleep(SECOND).await;
                let error = error(ErrorKind::Unavailable).with_http_status(500);
                match (fails, code) {
                    (false, _) => ok(),
                    (true, None) => Err(error),
                    (true, Some(code)) => Err(error.with_code(code)),
                }
            }
        });
        let (closed, count) = counter();
        let cx = cx.retry(Retry::default().attempts(10));
        let cx = cx.on_event(move |event| {
            let closes = matches!(event, Event::LaneCoolingDown { .. });
            count.fetch_add(usize::from(closes), Ordering::Relaxed);
        });
        let cx = cx.build();
        let batch = cx.fan_out("n", 0..n).buffer_unordered(1_000);
        let mut outcomes = batch.stream(async |cx, n| cx.generate(n.to_string()).await.map(drop));
        let (mut lost, mut done) = (Vec::new(), 0);
        while let Some(outcome) = outcomes.next().await {
            done += 1;
            lost.extend(outcome.result.err());
        }
        assert_eq!((done, lost.len()), (n, 0), "{:?}", lost.first());
        assert!(cx.tally().retries > n as u64 / 25);
        // Fifty of a thousand calls that end together fail, and that is no outage.
        assert_eq!(closed.load(Ordering::Relaxed), 0);
    }
}

/// The provider fails all calls from 60 s on, for two minutes.
async fn outage(kind: ErrorKind, in_flight: usize, n: usize, at_once: bool) {
    let start = Instant::now();
    let cx = answers(move |_| async move {
        if !(60..180).contains(&start.elapsed().as_secs()) {
            sleep(SECOND).await;
            return ok();
        }
        if kind == ErrorKind::Timeout {
            std::future::pending::<()>().await;
        }
        Err(error(kind))
    });
    let cx = cx
        .pace(Pace::per_minute(600).in_flight(in_flight))
        .call_timeout(10 * SECOND)
        .build();
    let settled = match at_once {
        true => ask_at_once(&cx, n).await,
        false => ask(&cx, n).await,
    };
    let name = format!("{kind}, {in_flight} in flight, all at once: {at_once}");
    let lost = settled.failures().count();
    assert_eq!(lost, 0, "{name}: {:?}", settled.failures().next());
    let took = start.elapsed().as_secs();
    let most = n as u64 / 10 + 120 + 30;
    assert!(in_flight < 16 || took < most, "{name}: {took} s");
    let tally = cx.tally();
    let failed = tally.attempts - n as u64;
    assert!(failed < 150, "{name}: {failed} calls were made in vain");
}

#[tokio::test(start_paused = true)]
async fn no_item_is_lost_to_an_outage() {
    outage(ErrorKind::Unavailable, 64, 6_000, true).await;
    for kind in [
        ErrorKind::Connection,
        ErrorKind::Overloaded,
        ErrorKind::Timeout,
        ErrorKind::MalformedReply,
    ] {
        for (in_flight, at_once) in [(64, false), (4, true), (1, true)] {
            outage(kind, in_flight, 1_500, at_once).await;
        }
    }
}

/// New calls fail while those that were sent before are still answered.
#[tokio::test(start_paused = true)]
async fn answers_to_calls_sent_before_an_outage_do_not_hide_it() {
    let start = Instant::now();
    let cx = answers(move |_| async move {
        if (60..180).contains(&start.elapsed().as_secs()) {
            return Err(error(ErrorKind::Unavailable));
        }
        sleep(fastrand::u32(1..60) * SECOND).await;
        ok()
    });
    let cx = cx.pace(Pace::per_minute(600)).build();
    let settled = ask_at_once(&cx, 2_000).await;
    assert_eq!(settled.failures().count(), 0, "{settled}");
}

#[tokio::test(start_paused = true)]
async fn an_outage_beyond_the_patience_ends_all_calls_with_an_account_wide_error() {
    let back = Arc::new(AtomicUsize::new(0));
    let is_back = Arc::clone(&back);
    let cx = answers(move |_| {
        let is_back = is_back.load(Ordering::Relaxed) > 0;
        async move {
            match is_back {
                true => ok(),
                false => Err(error(ErrorKind::Connection)),
            }
        }
    });
    let cx = cx.pace(Pace::per_minute(600)).build();
    let start = Instant::now();
    let settled = ask_at_once(&cx, 500).await;
    let (took, minutes) = (start.elapsed(), 60 * SECOND);
    assert_eq!(settled.failures().count(), 500);
    assert!((15 * minutes..16 * minutes).contains(&took), "{took:?}");
    let told = |failed: &&throughline::Outcome<Reply>| failed.error().unwrap().is_account_wide();
    assert!(settled.failures().filter(told).count() > 450);
    back.store(1, Ordering::Relaxed);
    // The lane probes: the next call is not refused unsent.
    cx.with_timeout(20 * SECOND)
        .generate("again")
        .await
        .unwrap();
    assert_eq!(ask(&cx, 100).await.failures().count(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_always_fails_among_healthy_ones_is_given_up_early() {
    let (calls, count) = counter();
    let cx = answers(move |prompt| {
        let poison = prompt == "100";
        count.fetch_add(usize::from(poison), Ordering::Relaxed);
        async move {
            sleep(SECOND).await;
            match poison {
                true => Err(error(ErrorKind::Unavailable).with_code("server_error")),
                false => ok(),
            }
        }
    });
    let retry = Retry::default().attempts(10);
    let cx = cx.pace(Pace::per_minute(600)).retry(retry).build();
    let settled = ask(&cx, 1_000).await;
    let lost: Vec<_> = settled.failures().collect();
    assert_eq!(lost.len(), 1);
    let error = lost[0].error().unwrap();
    assert!(error.is_permanent(), "{error}");
    let calls = calls.load(Ordering::Relaxed);
    assert!((3..10).contains(&calls), "{calls}");
    assert_eq!(error.attempts() as usize, calls);
}

/// All attempts are made, because these failures say nothing about the request.
#[tokio::test(start_paused = true)]
async fn failures_that_say_nothing_about_the_request_are_no_evidence_against_it() {
    for kind in [ErrorKind::Unavailable, ErrorKind::Connection] {
        let cx = answers(move |prompt| async move {
            match prompt == "100" {
                true => Err(error(kind)),
                false => ok(),
            }
        });
        let cx = cx
            .pace(Pace::per_minute(600))
            .retry(Retry::default().attempts(10))
            .build();
        let settled = ask(&cx, 1_000).await;
        let lost: Vec<_> = settled.failures().collect();
        assert_eq!(lost.len(), 1);
        let error = lost[0].error().unwrap();
        assert_eq!((error.attempts(), error.is_exhausted()), (10, true));
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_whose_calls_time_out_is_sent_twice() {
    for (retry, expected) in [
        (Retry::default(), 2),
        (Retry::default().timeouts(3), 3),
        (Retry::default().timeouts(9), 5),
        (Retry::none(), 1),
    ] {
        let hang = |_| std::future::pending::<Result<Reply>>();
        let cx = answers(hang).retry(retry).build();
        let error = cx.generate("a").await.unwrap_err();
        assert_eq!((error.attempts(), error.is_timeout()), (expected, true));
        assert!(error.is_exhausted());
    }
}

// Requests that the rate limit refuses

/// Returns when all other requests were done, and when the refused one was.
async fn refused_always(pace: Pace, poison: bool) -> (Duration, Duration) {
    let cx = answers(move |prompt| async move {
        if poison && prompt == "100" {
            sleep(SECOND / 5).await;
            return Err(error(ErrorKind::Throttled));
        }
        sleep(SECOND).await;
        ok()
    });
    let start = Instant::now();
    let cx = cx.pace(pace).build();
    let others_done = Arc::new(Mutex::new(Duration::ZERO));
    let last = Arc::clone(&others_done);
    let settled = cx
        .fan_out("n", 0..6_000)
        .settle(async |cx, n| {
            let reply = cx.generate(n.to_string()).await?;
            let mut last = last.lock().unwrap();
            *last = start.elapsed().max(*last);
            Ok(reply)
        })
        .await;
    assert_eq!(settled.failures().count(), usize::from(poison));
    let others_done = *others_done.lock().unwrap();
    (others_done, start.elapsed())
}

#[tokio::test(start_paused = true)]
async fn a_request_that_is_always_refused_does_not_delay_the_others() {
    let pace = Pace::per_minute(600).in_flight(64);
    let (without, _) = refused_always(pace.clone(), false).await;
    for pace in [pace.clone(), pace.adaptive(false)] {
        let (with, all) = refused_always(pace, true).await;
        println!("the others took {with:?} instead of {without:?}, all of them {all:?}");
        assert!(
            with <= without * 105 / 100,
            "{with:?} instead of {without:?}"
        );
        // It is given up while other requests are left.
        assert!(all <= without * 105 / 100, "{all:?} instead of {without:?}");
    }
}

/// A provider under contention refuses every second call, and no request is given up because of that.
#[tokio::test(start_paused = true)]
async fn requests_refused_as_often_as_others_are_never_given_up() {
    let seed = Mutex::new(fastrand::Rng::with_seed(3));
    let cx = answers(move |_| {
        let refused = seed.lock().unwrap().f64() < 0.5;
        async move {
            sleep(SECOND).await;
            match refused {
                true => Err(error(ErrorKind::Throttled)),
                false => ok(),
            }
        }
    });
    let cx = cx.pace(Pace::per_minute(6_000).adaptive(false)).build();
    assert_eq!(ask_at_once(&cx, 2_000).await.failures().count(), 0);
}

// Refusals that may concern the whole account

#[tokio::test(start_paused = true)]
async fn forbidden_requests_fail_alone() {
    // One, two neighbours, each tenth, each second; and one error that concerns the credentials.
    let cases: [fn(usize) -> bool; 4] = [
        |n| n == 100,
        |n| n == 100 || n == 101,
        |n| n.is_multiple_of(10),
        |n| n.is_multiple_of(2),
    ];
    let unauthorized = |_: Error| error(ErrorKind::Unauthorized).with_http_status(403);
    for is_forbidden in cases {
        for (in_flight, kind) in [(64, false), (1, false), (64, true)] {
            let cx = answers(move |prompt| async move {
                // Refusals are fast, and answers are not.
                sleep(SECOND / 5).await;
                if prompt.parse().is_ok_and(is_forbidden) {
                    let error = forbidden();
                    return Err(if kind { unauthorized(error) } else { error });
                }
                sleep(SECOND * 4 / 5).await;
                ok()
            });
            let cx = cx
                .pace(Pace::per_minute(6_000).in_flight(in_flight))
                .build();
            let settled = ask(&cx, 400).await;
            let lost = (0..400).filter(|n| is_forbidden(*n)).count();
            assert_eq!(settled.failures().count(), lost, "{in_flight}: {settled}");
            for failed in settled.failures() {
                let error = failed.error().unwrap();
                assert!(!error.is_account_wide() && error.is_permanent(), "{error}");
            }
            assert!(cx.generate("hello").await.is_ok());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_second_different_request_confirms_that_the_account_is_refused() {
    let (calls, count) = counter();
    let cx = answers(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
        async { Err(forbidden()) }
    });
    let cx = cx.build();
    let first = cx.generate("first").await.unwrap_err();
    assert!(!first.is_account_wide(), "{first}");
    let again = cx.generate("first").await.unwrap_err();
    assert!(!again.is_account_wide(), "{again}");
    assert!(cx.lanes().all(|lane| lane.stopped().is_none()));
    let second = cx.generate("second").await.unwrap_err();
    assert!(second.is_account_wide(), "{second}");
    assert!(cx.lanes().all(|lane| lane.stopped().is_some()));
    let sent = calls.load(Ordering::Relaxed);
    let third = cx.generate("third").await.unwrap_err();
    assert_eq!((third.is_account_wide(), third.attempts()), (true, 0));
    assert_eq!(calls.load(Ordering::Relaxed), sent, "nothing is sent");
}

/// No item fails with an error of its own if the whole account is refused in mid-run.
#[tokio::test(start_paused = true)]
async fn an_account_refused_in_mid_run_loses_no_item_and_is_tried_again_after_minutes() {
    for in_flight in [64, 1] {
        let (calls, count) = counter();
        let start = Instant::now();
        let cx = answers(move |_| {
            count.fetch_add(1, Ordering::Relaxed);
            async move {
                sleep(SECOND / 2).await;
                match (30..600).contains(&start.elapsed().as_secs()) {
                    true => Err(forbidden()),
                    false => ok(),
                }
            }
        });
        let cx = cx.pace(Pace::per_minute(600).in_flight(in_flight)).build();
        let settled = ask(&cx, 1_000).await;
        let done = settled.oks().count();
        let in_vain = calls.load(Ordering::Relaxed) - done;
        assert!(in_vain < 90, "{in_vain} calls in vain");
        for failed in settled.failures() {
            assert!(failed.error().unwrap().is_account_wide());
        }
        assert!(start.elapsed() < 60 * SECOND);
        // After five minutes one call tries again; the others wait for its answer and fail with it.
        sleep(360 * SECOND).await;
        let before = calls.load(Ordering::Relaxed);
        let told = ask_at_once(&cx, 100).await;
        let told = told.failures().map(|failed| failed.error().unwrap());
        assert_eq!(told.filter(|error| error.is_account_wide()).count(), 100);
        let probes = calls.load(Ordering::Relaxed) - before;
        assert!(probes <= 12, "{probes} probes");
        sleep(360 * SECOND).await;
        assert_eq!(ask_at_once(&cx, 100).await.oks().count(), 100);
    }
}

#[tokio::test(start_paused = true)]
async fn refused_credentials_are_tried_again_by_one_call_after_minutes() {
    let (calls, count) = counter();
    let start = Instant::now();
    let cx = answers(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
        async move {
            sleep(SECOND).await;
            match start.elapsed() < 400 * SECOND {
                true => Err(error(ErrorKind::Unauthorized).with_http_status(401)),
                false => ok(),
            }
        }
    });
    let cx = cx.build();
    assert!(cx.generate("a").await.unwrap_err().is_account_wide());
    assert!(cx.generate("b").await.unwrap_err().is_account_wide());
    assert_eq!(calls.load(Ordering::Relaxed), 1);
    sleep(340 * SECOND).await;
    let refused = ask_at_once(&cx, 10).await;
    assert_eq!(
        (refused.failures().count(), calls.load(Ordering::Relaxed)),
        (10, 2)
    );
    sleep(340 * SECOND).await;
    assert_eq!(ask_at_once(&cx, 10).await.oks().count(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_wait_of_hours_fails_at_once_and_stops_the_lane_when_a_second_request_confirms_it() {
    for kind in [
        ErrorKind::Throttled,
        ErrorKind::Overloaded,
        ErrorKind::Unavailable,
    ] {
        let start = Instant::now();
        let cx = answers(move |prompt| async move {
            match prompt == "fine" || start.elapsed() > HOUR {
                true => ok(),
                false => Err(error(kind).with_wait(12 * HOUR)),
            }
        });
        let cx = cx.build();
        let told = |result: Result<Reply>| {
            let error = result.unwrap_err();
            assert!(error.is_exhausted(), "{error}");
            assert_eq!((error.kind(), error.wait()), (kind, Some(12 * HOUR)));
            error.is_account_wide()
        };
        assert!(!told(cx.generate("first").await));
        // The refusal of one request does not stop the others.
        cx.generate("fine").await.unwrap();
        assert!(!told(cx.generate("second").await));
        assert!(told(cx.generate("third").await));
        assert!(told(cx.generate("fine").await), "the lane is parked");
        assert!(start.elapsed() < 10 * SECOND, "{:?}", start.elapsed());
        // The account is tried again before the twelve hours are over.
        sleep(HOUR + SECOND).await;
        cx.generate("fine").await.unwrap();
    }
}

// Deadlines

#[tokio::test(start_paused = true)]
async fn the_first_attempt_is_always_sent_before_the_deadline() {
    let start = Instant::now();
    let cx = answers(move |prompt| async move {
        let slow = prompt.starts_with("report") || start.elapsed() < HOUR;
        sleep(if slow { 60 * SECOND } else { SECOND }).await;
        ok()
    });
    let cx = cx.build();
    let reports = cx.fan_out("report", 0..64);
    let reports = reports.settle(async |cx, n| cx.generate(format!("report {n}")).await);
    reports.await.all().unwrap();
    while start.elapsed() < HOUR {
        let _ = cx.with_timeout(10 * SECOND).generate("hello").await;
    }
    for _ in 0..200 {
        for cx in [cx.clone(), cx.child("chat"), cx.child("report")] {
            let answered = cx.with_timeout(10 * SECOND).generate("hello").await;
            answered.unwrap();
        }
        sleep(60 * SECOND).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_retry_is_judged_by_the_latency_of_its_own_label() {
    let (_, count) = counter();
    let cx = answers(move |prompt| {
        let first = prompt == "chat" && count.fetch_add(1, Ordering::Relaxed) == 0;
        async move {
            if prompt == "chat" {
                return if first {
                    Err(error(ErrorKind::Unavailable))
                } else {
                    ok()
                };
            }
            sleep(60 * SECOND).await;
            ok()
        }
    });
    let cx = cx.build();
    ask(&cx, 64).await.all().unwrap();
    let chat = cx.child("chat").with_timeout(20 * SECOND);
    chat.generate("chat").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_empty_retry_budget_spreads_the_retries_and_keeps_deadlines() {
    let sent = Arc::new(Mutex::new(Vec::new()));
    let (times, start) = (Arc::clone(&sent), Instant::now());
    let seen = Mutex::new(HashSet::new());
    let cx = answers(move |prompt| {
        times.lock().unwrap().push(start.elapsed().as_millis());
        // The first call of each request with an even number fails, and each of the bad ones.
        let even = prompt.parse::<u32>().is_ok_and(|n| n.is_multiple_of(2));
        let fails = prompt == "bad" || even && seen.lock().unwrap().insert(prompt);
        async move {
            match fails {
                true => Err(error(ErrorKind::Connection)),
                false => ok(),
            }
        }
    });
    let cx = cx.build();
    let mut n = 100_000;
    while cx.snapshot().lane.binding != Binding::Budget {
        assert!(n < 100_200, "the budget does not run dry");
        cx.generate("bad").await.unwrap_err();
        let good = cx.with_timeout(20 * SECOND);
        good.generate(n.to_string()).await.unwrap();
        n += 2;
    }
    sent.lock().unwrap().clear();
    let (began, all) = (start.elapsed().as_millis(), ask_at_once(&cx, 1_000).await);
    assert_eq!(all.failures().count(), 0, "{all}");
    let mut retries = sent.lock().unwrap().clone();
    retries.retain(|at| *at > began + 10);
    let distinct: HashSet<_> = retries.iter().collect();
    assert!(retries.len() > 300 && distinct.len() > 250);
}

/// A context that failed a whole batch still makes its retries in time.
#[tokio::test(start_paused = true)]
async fn a_call_after_many_failures_still_meets_its_deadline() {
    let (_, odd) = counter();
    let cx = answers(move |prompt| {
        let fails = prompt == "bad" || odd.fetch_add(1, Ordering::Relaxed) % 2 == 0;
        async move {
            match fails {
                true => Err(error(ErrorKind::Connection)),
                false => ok(),
            }
        }
    });
    let cx = cx.build();
    cx.with_timeout(20 * SECOND).generate("good").await.unwrap();
    let bad = cx.fan_out("n", 0..40);
    let bad = bad.settle(async |cx, _| cx.generate("bad").await).await;
    assert_eq!(bad.failures().count(), 40);
    cx.with_timeout(20 * SECOND).generate("good").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_longest_durations_are_no_limits() {
    let sim = || Sim::builder().latency(SECOND).build();
    let cx = Context::builder(sim()).call_timeout(Duration::MAX).build();
    cx.generate("x").await.unwrap();
    let cx = Context::builder(sim()).build();
    let unbounded = cx.with_timeout(Duration::MAX);
    unbounded.generate("x").await.unwrap();
    assert_eq!(unbounded.deadline(), None);
    let bounded = cx.with_timeout(SECOND * 3).with_timeout(Duration::MAX);
    assert!(bounded.deadline().is_some());
    let slow = pipeline("slow", async |cx: Context, _: u32| cx.generate("x").await);
    slow.timeout(Duration::MAX).run(&cx, 1).await.unwrap();
    for kind in [ErrorKind::Unavailable, ErrorKind::Throttled] {
        let cx = answers(move |_| async move { Err(error(kind).with_wait(Duration::MAX)) }).build();
        let unwilling = timeout(SECOND, cx.with_timeout(HOUR).generate("x")).await;
        assert!(unwilling.expect("told at once").is_err());
    }
}

// Money

#[tokio::test(start_paused = true)]
async fn a_call_that_is_dropped_or_panics_is_in_the_tally() {
    let cx = answers(|prompt| async move {
        assert!(prompt != "panic", "in the provider");
        sleep(10 * SECOND).await;
        ok()
    });
    let cx = cx.build();
    assert!(timeout(SECOND, cx.generate("dropped")).await.is_err());
    let tally = cx.tally();
    assert_eq!((tally.attempts, tally.ambiguous, tally.failed), (1, 1, 1));
    let panics = cx.fan_out("n", ["panic"]);
    let panics = panics
        .settle(async |cx, prompt| cx.generate(prompt).await)
        .await;
    assert_eq!(panics.failures().count(), 1);
    let tally = cx.tally();
    assert_eq!((tally.attempts, tally.ambiguous, tally.failed), (2, 2, 2));
}

#[tokio::test(start_paused = true)]
async fn a_pipeline_that_times_out_says_whether_its_calls_were_billed() {
    let told = Arc::new(AtomicU64::new(0));
    let events = Arc::clone(&told);
    let cx = answers(|prompt| async move {
        match &*prompt {
            "refused" => Err(error(ErrorKind::InvalidRequest)),
            "hangs" => std::future::pending().await,
            _ => ok(),
        }
    });
    let cx = cx
        .on_event(move |event| {
            if matches!(event, Event::CallStarted { .. }) {
                events.fetch_add(1, Ordering::Relaxed);
            }
        })
        .build();
    for (prompt, billed) in [
        (None, Some(false)),
        (Some("refused"), Some(false)),
        (Some("answered"), Some(true)),
        (Some("hangs"), None),
    ] {
        let slow = pipeline("slow", move |cx: Context, _: u32| async move {
            if let Some(prompt) = prompt {
                let call = cx.generate(prompt);
                // The call ends before the pipeline does.
                let _ = timeout(SECOND, call).await;
            }
            std::future::pending::<Result<()>>().await
        });
        let error = slow.timeout(5 * SECOND).run(&cx, 1).await.unwrap_err();
        assert!(error.is_deadline_exceeded());
        assert_eq!(error.billed(), billed, "{prompt:?}");
    }
    assert_eq!(told.load(Ordering::Relaxed), 3);
}
