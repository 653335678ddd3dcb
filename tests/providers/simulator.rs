//! The simulated provider on the paused clock. Other tests rely on it, so its admissions, metadata and bills are
//! checked exactly.
#![cfg(feature = "sim")]

use std::cell::Cell;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::{join_all, poll_immediate};
use proptest::prelude::*;
use throughline::provider::sim::{Ended, Enforcement, Headers, Ledger, Sim, SimBuilder, Tokens};
use throughline::{
    Context, Error, ErrorKind, Provider, Reply, Request, Result, Usage,
    provider::OutputCharge,
    request::{Delta, FinishReason},
};
use tokio::time::{Instant, advance, sleep, timeout};

const SECOND: Duration = Duration::from_secs(1);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn bucket(burst: Duration) -> Enforcement {
    Enforcement::TokenBucket { burst }
}

/// Ten input tokens: four for the frame, six for 24 bytes.
fn ten_tokens() -> Request {
    let request = Request::new("Tell me about the river!");
    assert_eq!(request.estimated_input_tokens(), 10);
    request
}

/// Requests that differ, so that the ledger bills them under keys of their own: those of [`key_of`].
fn numbered(n: u64) -> Request {
    ten_tokens().seed(n)
}

/// The key under which the ledger bills a request outside of a batch.
fn key_of(request: &Request) -> String {
    request.digest().to_string()
}

/// Makes `calls` at once and returns how many are admitted.
async fn let_in(sim: &Sim, calls: usize) -> usize {
    let request = ten_tokens();
    let results = join_all((0..calls).map(|_| sim.generate(&request))).await;
    results.iter().filter(|result| result.is_ok()).count()
}

async fn refused(sim: &Sim, request: &Request) -> Error {
    let error = sim.generate(request).await.unwrap_err();
    assert!(error.is_throttled(), "{error}");
    assert_eq!(error.http_status(), Some(429));
    error
}

static_assertions::assert_impl_all!(Sim: Clone, Send, Sync, Unpin, std::fmt::Debug);

// Limits

#[tokio::test(start_paused = true)]
async fn a_bucket_grants_its_burst_and_then_one_call_at_a_time_to_the_nanosecond() {
    let sim = Sim::builder()
        .requests_per_minute(120)
        .enforcement(bucket(SECOND * 2))
        .build();
    assert_eq!(let_in(&sim, 10).await, 4);
    for _ in 0..3 {
        advance(ms(500) - Duration::from_nanos(1)).await;
        assert_eq!(let_in(&sim, 2).await, 0);
        advance(Duration::from_nanos(1)).await;
        assert_eq!(let_in(&sim, 2).await, 1);
    }
    advance(SECOND * 3600).await;
    assert_eq!(let_in(&sim, 10).await, 4, "idle time fills it, no further");
}

#[tokio::test(start_paused = true)]
async fn a_bucket_holds_one_unit_at_least() {
    let sim = Sim::builder()
        .requests_per_minute(6)
        .enforcement(bucket(ms(1)))
        .build();
    assert_eq!(let_in(&sim, 2).await, 1);
    advance(SECOND * 10).await;
    assert_eq!(let_in(&sim, 2).await, 1);
}

#[tokio::test(start_paused = true)]
async fn windows_of_a_second_allow_no_burst() {
    let sim = Sim::builder()
        .requests_per_minute(180)
        .enforcement(Enforcement::FixedWindow(SECOND))
        .build();
    advance(ms(900)).await;
    assert_eq!(let_in(&sim, 5).await, 3);
    let error = refused(&sim, &ten_tokens()).await;
    assert_eq!(error.wait(), Some(ms(100)));
    advance(ms(100)).await;
    assert_eq!(let_in(&sim, 5).await, 3, "twice the share across the edge");
    advance(SECOND * 60).await;
    assert_eq!(let_in(&sim, 5).await, 3);
}

#[tokio::test(start_paused = true)]
async fn a_window_of_a_minute_allows_a_minute_at_once() {
    let sim = Sim::builder()
        .requests_per_minute(30)
        .enforcement(Enforcement::FixedWindow(SECOND * 60))
        .build();
    advance(SECOND * 50).await;
    assert_eq!(let_in(&sim, 40).await, 30);
    assert_eq!(refused(&sim, &ten_tokens()).await.wait(), Some(SECOND * 10));
    advance(SECOND * 10).await;
    assert_eq!(let_in(&sim, 40).await, 30);
}

#[tokio::test(start_paused = true)]
async fn the_limit_on_calls_in_flight_names_no_wait() {
    let sim = Sim::builder().in_flight(2).latency(SECOND).build();
    let request = ten_tokens();
    let mut first = Box::pin(sim.generate(&request));
    let mut second = Box::pin(sim.generate(&request));
    assert!(poll_immediate(&mut first).await.is_none());
    assert!(poll_immediate(&mut second).await.is_none());
    assert_eq!(refused(&sim, &request).await.wait(), None);

    drop(second);
    assert_eq!(sim.in_flight(), 1, "a dropped call frees its place");
    let third = sim.generate(&request);
    let (first, third) = futures::join!(first, third);
    assert!(first.is_ok() && third.is_ok());
    let ledger = sim.ledger();
    assert_eq!((ledger.in_flight, ledger.peak_in_flight), (0, 2));
}

#[tokio::test(start_paused = true)]
async fn reserved_tokens_are_charged_on_admission_and_not_refunded() {
    let sim = Sim::builder()
        .tokens_per_minute(600)
        .output_tokens(Tokens::fixed(5))
        .build();
    let request = ten_tokens().max_tokens(290);
    let reply = sim.generate(&request).await.unwrap();
    assert_eq!(reply.usage, Usage::new(10, 5));
    assert_eq!(reply.rate.unwrap().tokens.remaining, Some(300));
    sim.generate(&request).await.unwrap();
    assert_eq!(refused(&sim, &request).await.wait(), Some(SECOND * 30));
}

#[tokio::test(start_paused = true)]
async fn produced_tokens_are_charged_at_the_end_and_may_leave_a_debt() {
    let sim = Sim::builder()
        .input_tokens_per_minute(6_000)
        .output_tokens_per_minute(600)
        .output_charge(OutputCharge::Produced)
        .output_tokens(Tokens::fixed(500))
        .latency(SECOND)
        .build();
    let request = ten_tokens().max_tokens(4_096);
    let both = join_all([sim.generate(&request), sim.generate(&request)]).await;
    let last = both.into_iter().map(Result::unwrap).last().unwrap();
    let said = last.rate.unwrap();
    assert_eq!(said.output_tokens.remaining, Some(0));
    assert_eq!(said.input_tokens.limit, Some(6_000));
    // 1,000 produced of 600: 400 owed and one to pass, at 10 a second.
    let error = refused(&sim, &request).await;
    assert_eq!(error.wait(), Some(ms(40_100)));
    assert!(error.message().contains("output tokens"), "{error}");
    advance(ms(40_100)).await;
    sim.generate(&request).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_call_above_the_capacity_passes_a_full_bucket_and_leaves_a_debt() {
    let sim = Sim::builder()
        .tokens_per_minute(600)
        .enforcement(bucket(SECOND))
        .build();
    let large = ten_tokens().max_tokens(90);
    sim.generate(&large).await.unwrap();
    assert_eq!(refused(&sim, &large).await.wait(), Some(SECOND * 10));
    sleep(SECOND * 10).await;
    sim.generate(&large).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_refused_call_is_charged_only_if_refusals_count() {
    for (count, accepted) in [(false, 1), (true, 0)] {
        let sim = Sim::builder()
            .requests_per_minute(60)
            .enforcement(bucket(SECOND))
            .rejected_calls_count(count)
            .build();
        assert_eq!(let_in(&sim, 1).await, 1);
        advance(ms(600)).await;
        assert_eq!(let_in(&sim, 1).await, 0);
        advance(ms(400)).await;
        assert_eq!(let_in(&sim, 1).await, accepted);
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_is_admitted_after_the_named_wait_and_not_before() {
    for enforcement in [bucket(ms(1500)), Enforcement::FixedWindow(ms(700))] {
        let sim = Sim::builder()
            .requests_per_minute(47)
            .tokens_per_minute(1_013)
            .enforcement(enforcement)
            .rejected_calls_count(true)
            .build();
        for tokens in [3, 50, 7, 90, 20, 1, 1, 33] {
            let request = ten_tokens().max_tokens(tokens);
            if let Err(error) = sim.generate(&request).await {
                let wait = error.wait().unwrap();
                assert_eq!(error.rate().unwrap().retry_after, Some(wait));
                advance(wait).await;
                sim.generate(&request).await.unwrap();
            }
        }
        assert!(sim.ledger().total.rejected > 4);
    }
}

#[tokio::test(start_paused = true)]
async fn the_wait_can_be_hidden() {
    let sim = Sim::builder()
        .requests_per_minute(1)
        .retry_after(false)
        .build();
    assert_eq!(let_in(&sim, 1).await, 1);
    let error = refused(&sim, &ten_tokens()).await;
    assert_eq!(error.wait(), None);
    assert_eq!(error.rate().unwrap().retry_after, None);
}

#[tokio::test(start_paused = true)]
async fn limits_change_by_method_and_by_schedule() {
    let sim = Sim::builder()
        .requests_per_minute(60)
        .enforcement(bucket(SECOND))
        .change_at(SECOND * 100, |limits| limits.in_flight = Some(1))
        .build();
    assert_eq!(let_in(&sim, 9).await, 1);
    sim.set_requests_per_minute(6);
    assert_eq!(refused(&sim, &ten_tokens()).await.wait(), Some(SECOND * 10));
    sim.set_requests_per_minute(600);
    assert_eq!(refused(&sim, &ten_tokens()).await.wait(), Some(ms(100)));
    sim.set_limits(|limits| limits.requests_per_minute = None);
    assert_eq!(let_in(&sim, 100).await, 100);

    assert_eq!(sim.limits().in_flight, None);
    advance(SECOND * 100).await;
    assert_eq!(sim.limits().in_flight, Some(1));
}

#[test]
fn an_hour_of_simulation_takes_less_than_a_thousandth_of_it() {
    let began = cpu_time();
    on_paused_clock(simulate_an_hour());
    let took = cpu_time() - began;
    assert!(took < SECOND * 3600 / 1000, "{took:?}");
}

/// The CPU time of this thread, which other load on the machine does not change.
#[cfg(target_os = "linux")]
fn cpu_time() -> Duration {
    use rustix::time::{ClockId, clock_gettime};
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}

#[cfg(not(target_os = "linux"))]
fn cpu_time() -> Duration {
    static START: std::sync::LazyLock<std::time::Instant> =
        std::sync::LazyLock::new(std::time::Instant::now);
    START.elapsed()
}

async fn simulate_an_hour() {
    let sim = Sim::builder()
        .requests_per_minute(60)
        .enforcement(bucket(SECOND))
        .latency(ms(2_500))
        .build();
    let left = Cell::new(3_600);
    let worker = async |_| {
        while left.get() > 0 {
            left.set(left.get() - 1);
            let request = numbered(left.get());
            while let Err(error) = sim.generate(&request).await {
                sleep(error.wait().unwrap()).await;
            }
        }
    };
    let start = Instant::now();
    join_all((0..3).map(worker)).await;
    // One a second, the first at once, the last with its latency.
    assert_eq!(start.elapsed(), SECOND * 3_599 + ms(2_500));

    let ledger = sim.ledger();
    assert_eq!(ledger.total.billed, 3_600);
    assert_eq!(ledger.billed_again().count(), 0);
    assert_eq!(ledger.most_granted_in(SECOND), 1);
    assert!(
        ledger.seconds[..3_600]
            .iter()
            .all(|second| second.accepted == 1)
    );
}

fn on_paused_clock<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap()
        .block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// For any pattern of arrival, the calls admitted in any window are at most burst + rate × window, and no call is
    /// refused without need.
    #[test]
    fn no_window_has_more_calls_than_the_limit_allows(
        per_minute in 1_u64..3_000,
        burst_ms in 1_u64..5_000,
        arrivals in prop::collection::vec((0_u64..400, 1_usize..12), 1..60),
        refusals_count: bool,
    ) {
        let sim = Sim::builder()
            .requests_per_minute(per_minute)
            .enforcement(bucket(ms(burst_ms)))
            .rejected_calls_count(refusals_count);
        let ledger = on_paused_clock(async {
            let sim = sim.build();
            for (gap, calls) in arrivals {
                advance(ms(gap)).await;
                let_in(&sim, calls).await;
            }
            sim.ledger()
        });
        // In units of a sixty-thousandth of a call, so that the arithmetic is exact.
        let burst = (per_minute * burst_ms).max(60_000);
        for (i, from) in ledger.grants.iter().enumerate() {
            for (n, to) in ledger.grants[i..].iter().enumerate() {
                let window = (*to - *from).as_millis() as u64;
                prop_assert!((n as u64 + 1) * 60_000 <= burst + per_minute * window);
            }
        }
        prop_assert!(!ledger.grants.is_empty());
    }

    /// The same for tokens, in windows and with calls of all sizes that fit.
    #[test]
    fn no_window_has_more_tokens_than_the_limit_allows(
        arrivals in prop::collection::vec((0_u64..400, 1_u64..90), 1..120),
    ) {
        let bills = on_paused_clock(async {
            let sim = Sim::builder()
                .tokens_per_minute(6_000)
                .enforcement(Enforcement::FixedWindow(SECOND))
                .build();
            let mut seconds = vec![0; 60];
            let start = Instant::now();
            for (gap, tokens) in arrivals {
                advance(ms(gap)).await;
                if sim.generate(&ten_tokens().max_tokens(tokens)).await.is_ok() {
                    seconds[start.elapsed().as_secs() as usize] += 10 + tokens;
                }
            }
            seconds
        });
        prop_assert!(bills.iter().all(|tokens| *tokens <= 100), "{bills:?}");
    }
}

// Answers, latency, streams

async fn timed(sim: &Sim, request: &Request) -> (Reply, Duration) {
    let start = Instant::now();
    let reply = sim.generate(request).await.unwrap();
    (reply, start.elapsed())
}

#[tokio::test(start_paused = true)]
async fn latency_is_the_sum_of_its_parts_and_determined_by_the_seed() {
    let exact = Sim::builder()
        .latency(ms(200))
        .time_to_first_token(ms(300))
        .time_per_token(ms(10))
        .output_tokens(Tokens::fixed(50))
        .build();
    assert_eq!(timed(&exact, &ten_tokens()).await.1, SECOND);

    let build = |seed| {
        Sim::builder()
            .seed(seed)
            .time_per_token(ms(20))
            .jitter(0.3)
            .output_tokens(Tokens::heavy_tailed(100, 1_000))
            .build()
    };
    let run = async |sim: Sim, reversed: bool| {
        let mut prompts: Vec<_> = (0..20).map(|i| Request::new(format!("p{i}"))).collect();
        if reversed {
            prompts.reverse();
        }
        let mut results = Vec::new();
        for prompt in &prompts {
            let (reply, latency) = timed(&sim, prompt).await;
            results.push((reply.text, reply.usage.total(), latency.as_millis()));
        }
        results.sort();
        results
    };
    let first = run(build(1), false).await;
    assert_eq!(first, run(build(1), false).await);
    assert_eq!(first, run(build(1), true).await, "whatever the order");
    assert_ne!(first, run(build(2), false).await);
}

#[tokio::test(start_paused = true)]
async fn answers_can_be_given_and_max_tokens_cuts_them() {
    let sim = Sim::builder()
        .reply(|request| request.last_text().to_uppercase())
        .build();
    let reply = sim.generate(&ten_tokens()).await.unwrap();
    assert_eq!(reply.text, "TELL ME ABOUT THE RIVER!");
    assert_eq!(reply.usage, Usage::new(10, 6));
    assert_eq!(reply.finish, FinishReason::Stop);

    let reply = sim.generate(&ten_tokens().max_tokens(2)).await.unwrap();
    assert_eq!(reply.text, "TELL ME ");
    assert_eq!(reply.usage.output_tokens, 2);
    assert_eq!(reply.finish, FinishReason::Length);
}

#[tokio::test(start_paused = true)]
async fn a_stream_spreads_its_text_over_the_latency() {
    let sim = Sim::builder()
        .time_to_first_token(ms(100))
        .time_per_token(ms(10))
        .output_tokens(Tokens::fixed(31))
        .build();
    let start = Instant::now();
    let mut stream = sim.stream(&ten_tokens()).await.unwrap();
    assert_eq!(start.elapsed(), Duration::ZERO);
    let (mut text, mut times, mut end) = (String::new(), Vec::new(), None);
    while let Some(delta) = stream.next().await {
        match delta.unwrap() {
            Delta::Text(piece) => {
                text += &piece;
                times.push(start.elapsed());
            }
            Delta::End(reply) => end = Some(*reply),
            other => panic!("{other:?}"),
        }
    }
    let reply = end.unwrap();
    assert_eq!(text, reply.text);
    assert_eq!(times.len(), 31);
    assert_eq!((times[0], times[30]), (ms(100), ms(410)));
    let whole = sim.generate(&ten_tokens()).await.unwrap();
    assert_eq!((whole.text, whole.usage), (reply.text, reply.usage));
    assert_eq!(sim.ledger().total.billed, 2);
}

// Rate-limit metadata

#[tokio::test(start_paused = true)]
async fn replies_carry_limit_remaining_amount_and_reset() {
    let build = |headers| {
        Sim::builder()
            .requests_per_minute(60)
            .tokens_per_minute(6_000)
            .headers(headers)
            .build()
    };
    let request = ten_tokens().max_tokens(90);
    let said = async |sim: &Sim| sim.generate(&request).await.unwrap().rate;

    let sim = build(Headers::All);
    said(&sim).await;
    let rate = said(&sim).await.unwrap();
    let quota = (rate.requests.limit, rate.requests.remaining);
    assert_eq!(quota, (Some(60), Some(58)));
    assert_eq!(rate.requests.reset, Some(SECOND * 2));
    assert_eq!(rate.tokens.remaining, Some(5_800));
    assert_eq!(rate.tokens.reset, Some(SECOND * 2));
    assert_eq!(rate.input_tokens.limit, None);
    advance(ms(1_500)).await;
    assert_eq!(said(&sim).await.unwrap().requests.reset, Some(ms(1_500)));

    let wrong = said(&build(Headers::Wrong(2.0))).await.unwrap();
    let quota = (wrong.requests.limit, wrong.requests.remaining);
    assert_eq!(quota, (Some(120), Some(118)));
    assert_eq!(wrong.requests.reset, Some(SECOND));

    let requests = said(&build(Headers::RequestsOnly)).await.unwrap();
    assert_eq!(requests.requests.remaining, Some(59));
    assert_eq!(requests.tokens.limit, None);
    assert_eq!(said(&build(Headers::None)).await, None);
}

#[tokio::test(start_paused = true)]
async fn an_exhausted_quota_and_wrong_credentials_refuse_every_call() {
    let sim = Sim::builder().insufficient_quota_after(2).build();
    assert_eq!(let_in(&sim, 5).await, 2);
    let error = sim.generate(&ten_tokens()).await.unwrap_err();
    assert!(error.is_account_wide() && error.is_permanent());
    let told = (error.http_status(), error.code());
    assert_eq!(told, (Some(429), Some("insufficient_quota")));
    sim.set_limits(|limits| limits.total_calls = None);
    assert_eq!(let_in(&sim, 1).await, 1);

    let sim = Sim::builder().unauthorized().build();
    let error = sim.generate(&ten_tokens()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
    sim.set_unauthorized(false);
    assert_eq!(let_in(&sim, 1).await, 1);
    let total = sim.ledger().total;
    assert_eq!((total.admitted, total.denied, total.rejected), (1, 1, 0));
}

// Faults and bills

#[tokio::test(start_paused = true)]
async fn faults_occur_at_their_rates_and_are_billed_as_documented() {
    let sim = Sim::builder()
        .error_rate(0.10)
        .reset_rate(0.05)
        .hang_rate(0.05)
        .cut_rate(0.10)
        .overload_rate(0.10)
        .latency(SECOND)
        .build();
    let calls = (0..2_000).map(|i| {
        let (sim, request) = (sim.clone(), numbered(i));
        async move { timeout(SECOND * 2, sim.generate(&request)).await }
    });
    let (mut ok, mut hung, mut kinds) = (0, 0, Vec::new());
    for result in join_all(calls).await {
        match result {
            Ok(Ok(_)) => ok += 1,
            Ok(Err(error)) => kinds.push((error.kind(), error.billed())),
            Err(_) => hung += 1,
        }
    }
    let count = |kind, billed| kinds.iter().filter(|k| **k == (kind, billed)).count();
    let near = |n: usize, expected: usize| n.abs_diff(expected) < 45;
    assert!(near(ok, 1_200), "{ok}");
    assert!(near(hung, 100), "{hung}");
    assert!(near(count(ErrorKind::Unavailable, Some(false)), 200));
    assert!(near(count(ErrorKind::Connection, None), 100));
    assert!(near(count(ErrorKind::Overloaded, Some(false)), 200));
    let cut = count(ErrorKind::MalformedReply, Some(true));
    assert!(near(cut, 200));

    let ledger = sim.ledger();
    assert_eq!(ledger.total.faults, 2_000 - ok as u64);
    assert_eq!(ledger.total.billed as usize, ok + cut);
    assert_eq!((ledger.total.cancelled, ledger.in_flight), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_retry_draws_a_new_fault() {
    let sim = Sim::builder().error_rate(0.5).build();
    let request = ten_tokens();
    let mut attempts = 1;
    while sim.generate(&request).await.is_err() {
        attempts += 1;
        assert!(attempts < 50);
    }
    let request = Request::new("another");
    let luck: Vec<bool> = join_all((0..40).map(|_| sim.generate(&request)))
        .await
        .iter()
        .map(Result::is_ok)
        .collect();
    assert!(luck.contains(&true) && luck.contains(&false));
}

#[tokio::test(start_paused = true)]
async fn a_cut_stream_has_no_end_and_its_text_is_billed() {
    let sim = Sim::builder()
        .cut_rate(1.0)
        .time_per_token(ms(100))
        .output_tokens(Tokens::fixed(100))
        .build();
    let request = ten_tokens();
    let stream = sim.stream(&request).await.unwrap();
    let deltas: Vec<_> = stream.collect().await;
    assert!(deltas.iter().all(|d| matches!(d, Ok(Delta::Text(_)))));
    let ledger = sim.ledger();
    assert_eq!(ledger.bills[0].ended, Ended::Cut);
    let billed = ledger.of_key(&key_of(&request)).usage;
    assert_eq!(billed.input_tokens, 10);
    assert!(billed.output_tokens.abs_diff(deltas.len() as u64) <= 1);
    assert!(billed.output_tokens < 100);
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_call_is_billed_for_its_generated_tokens() {
    let build = || {
        Sim::builder()
            .latency(SECOND)
            .tokens_per_minute(1_000)
            .output_charge(OutputCharge::Produced)
            .output_tokens(Tokens::fixed(100))
    };
    let sim = build().build();
    let [a, b] = [1, 2].map(numbered);
    assert!(timeout(ms(300), sim.generate(&a)).await.is_err());
    let mut stream = sim.stream(&b).await.unwrap();
    sleep(ms(600)).await;
    assert!(stream.next().await.is_some());
    drop(stream);

    let ledger = sim.ledger();
    assert_eq!(ledger.of_key(&key_of(&a)).usage, Usage::new(10, 30));
    assert_eq!(ledger.of_key(&key_of(&b)).usage, Usage::new(10, 60));
    assert_eq!((ledger.total.cancelled, ledger.total.billed), (2, 2));
    assert!(ledger.bills.iter().all(|b| b.ended == Ended::Cancelled));
    assert_eq!(ledger.in_flight, 0);

    let kind = build().bill_cancelled(false).build();
    assert!(timeout(ms(300), kind.generate(&a)).await.is_err());
    let account = kind.ledger().of_key(&key_of(&a));
    assert_eq!((account.cancelled, account.billed), (1, 0));
    assert_eq!(account.usage, Usage::default());
}

#[tokio::test(start_paused = true)]
async fn the_ledger_has_totals_by_key_and_of_all_calls() {
    let sim = Sim::builder()
        .requests_per_minute(3)
        .output_tokens(Tokens::fixed(7))
        .build();
    for n in [1, 1, 2, 2] {
        let _ = sim.generate(&numbered(n)).await;
    }
    let ledger = sim.ledger();
    let names = [1, 2].map(|n| key_of(&numbered(n)));
    let [a, b] = names.each_ref().map(|name| ledger.of_key(name));
    assert_eq!((a.admitted, a.rejected, a.billed), (2, 0, 2));
    assert_eq!((b.admitted, b.rejected, b.billed), (1, 1, 1));
    assert_eq!(a.usage, Usage::new(20, 14));
    assert_eq!(Vec::from_iter(ledger.billed_again()), [(&*names[0], 2)]);
    assert_eq!(ledger.seconds.len(), 1);
    assert_eq!(
        (ledger.seconds[0].accepted, ledger.seconds[0].rejected),
        (3, 1)
    );
}

#[tokio::test(start_paused = true)]
async fn items_of_a_batch_are_billed_under_their_keys() {
    let sim = Sim::builder().build();
    let cx = Context::builder(sim.clone()).build();
    let batch = cx.fan_out("n", ["x", "y"]).key(|n| format!("key-{n}"));
    let settled = batch.settle(async |cx, n| cx.generate(n).await).await;
    assert!(settled.all().is_ok());
    let ledger = sim.ledger();
    assert_eq!(ledger.by_key.len(), 2);
    assert_eq!(ledger.of_key("key-y").billed, 1);
}

// The ledger in a file

#[tokio::test(start_paused = true)]
async fn the_ledger_file_has_each_bill_at_once_and_is_continued() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bills.ledger");
    let build = || Sim::builder().latency(SECOND).ledger_file(&path).build();

    let sim = build();
    let [a, b] = [1, 2].map(numbered);
    let mut call = Box::pin(sim.generate(&a));
    assert!(poll_immediate(&mut call).await.is_none());
    assert_eq!(Ledger::read(&path).unwrap().total.billed, 0);
    call.await.unwrap();
    assert_eq!(Ledger::read(&path).unwrap().bills, sim.ledger().bills);
    drop(sim);

    // A killed process may leave an incomplete last line.
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, [&whole[..], &whole[..20]].concat()).unwrap();
    let ledger = Ledger::read(&path).unwrap();
    assert_eq!((ledger.total.billed, ledger.torn_lines), (1, 1));

    let sim = build();
    sim.generate(&b).await.unwrap();
    let ledger = Ledger::read(&path).unwrap();
    let bills = ledger.bills.iter().map(|bill| (bill.seq, &*bill.key));
    assert_eq!(
        Vec::from_iter(bills),
        [(0, &*key_of(&a)), (1, &*key_of(&b))]
    );
    assert_eq!(ledger.torn_lines, 1);
}

#[tokio::test(start_paused = true)]
async fn two_simulators_can_share_a_ledger_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bills.ledger");
    let sims: Vec<_> = (0..2)
        .map(|_| Sim::builder().ledger_file(&path).build())
        .collect();
    for i in 0..50 {
        sims[i % 2].generate(&numbered(i as u64)).await.unwrap();
    }
    let ledger = Ledger::read(&path).unwrap();
    assert_eq!((ledger.by_key.len(), ledger.torn_lines), (50, 0));
    assert_eq!(ledger.billed_again().count(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_ledger_file_that_cannot_be_opened_fails_every_call() {
    let dir = tempfile::tempdir().unwrap();
    let sim = Sim::builder().ledger_file(dir.path()).build();
    for _ in 0..2 {
        let error = sim.generate(&ten_tokens()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.message().contains("ledger file"), "{error}");
    }
}

#[test]
#[should_panic(expected = "a limit of zero requests per minute")]
fn a_limit_of_zero_panics() {
    let _ = SimBuilder::default().requests_per_minute(0).build();
}

#[tokio::test(start_paused = true)]
async fn clones_share_one_account_and_a_panicking_reply_frees_its_slot() {
    let sim = Sim::builder()
        .reply(|_| -> String { panic!("the user's own") })
        .build();
    let clone: Arc<dyn Provider> = Arc::new(sim.clone());
    let call = tokio::spawn(async move { clone.generate(&ten_tokens()).await.is_ok() });
    assert!(call.await.unwrap_err().is_panic());
    let ledger = sim.ledger();
    assert_eq!((ledger.total.admitted, ledger.in_flight), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn fail_when_takes_the_latency_and_is_not_billed() {
    let sim = Sim::builder()
        .latency_when("four", Duration::from_secs(4))
        .latency_when("five", Duration::from_secs(9))
        // The last one that matches applies.
        .latency_when("fi", Duration::from_secs(5))
        .reply(|_| "a number")
        .reply_when("ve", |request| format!("{}!", request.last_text()))
        .fail_when("four", ErrorKind::InvalidRequest)
        .build();
    let began = Instant::now();
    let failed = sim.generate(&Request::new("four")).await.unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::InvalidRequest);
    assert_eq!(began.elapsed(), Duration::from_secs(4));
    assert!(sim.stream(&Request::new("four")).await.is_err());
    // A dropped call is not billed either.
    let request = Request::new("four");
    let dropped = timeout(Duration::from_secs(1), sim.generate(&request)).await;
    assert!(dropped.is_err());

    let began = Instant::now();
    let five = sim.generate(&Request::new("five")).await.unwrap();
    assert_eq!((&*five.text, began.elapsed().as_secs()), ("five!", 5));
    let total = sim.ledger().total;
    assert_eq!((total.admitted, total.faults, total.billed), (4, 3, 1));
    assert_eq!(sim.in_flight(), 0);
}
