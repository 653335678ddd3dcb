//! Contexts with several deployments: where calls go, also after a failure.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use throughline::provider::sim::{Enforcement, Sim};
use throughline::testing::Scripted;
use throughline::{
    Context, Error, ErrorKind, Pace, Request, Result, Retry, Settled,
    call::Deployment,
    observe::Event,
    ratelimit::{Binding, Priority},
};
use tokio::time::Instant;

const SECOND: Duration = Duration::from_secs(1);

fn sim(per_minute: u64) -> Sim {
    Sim::builder()
        .requests_per_minute(per_minute)
        .enforcement(Enforcement::TokenBucket { burst: SECOND })
        .latency(2 * SECOND)
        .build()
}

fn pace(per_minute: u64) -> Pace {
    Pace::per_minute(per_minute).burst(SECOND)
}

async fn rivers(cx: &Context, n: usize) -> Settled<String> {
    cx.fan_out("river", 0..n)
        .join_all()
        .settle(|cx, n| async move { Ok(cx.generate(format!("river {n}")).await?.text) })
        .await
}

#[tokio::test(start_paused = true)]
async fn three_accounts_are_as_fast_as_one_of_their_sum() {
    let sims = [sim(300), sim(200), sim(100)];
    let cx = Context::builder(sims[0].clone())
        .pace(pace(300))
        .deployment(Deployment::new(sims[1].clone()).pace(pace(200)))
        .deployment(Deployment::new(sims[2].clone()).pace(pace(100)))
        .build();
    let began = Instant::now();
    let settled = rivers(&cx, 300).await;
    assert_eq!(settled.oks().count(), 300, "{settled}");
    assert_eq!(settled.tally().throttled, 0);
    // 10 at once, 290 at 10 a second, and the last takes its 2 s.
    let took = began.elapsed();
    assert!(took <= Duration::from_millis(31_700), "{took:?}");
    let lanes = cx.snapshot().lane;
    assert_eq!(lanes.requests_per_minute, Some(600));
    assert_eq!((lanes.in_flight, lanes.waiting), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_refused_account_fails_no_call_while_there_is_another() {
    let refused = Sim::builder().unauthorized().build();
    let stops = Arc::new(Mutex::new(0));
    let count = Arc::clone(&stops);
    let cx = Context::builder(refused.clone())
        .deployment(Deployment::new(sim(600)).pace(pace(600)))
        .on_event(move |event| {
            if matches!(event, Event::LaneStopped { .. }) {
                *count.lock().unwrap() += 1;
            }
        })
        .build();
    assert_eq!(rivers(&cx, 20).await.oks().count(), 20);
    let denied = refused.ledger().total.denied;
    assert!(denied > 0 && *stops.lock().unwrap() > 0);
    assert_eq!(rivers(&cx, 20).await.oks().count(), 20);
    assert_eq!(refused.ledger().total.denied, denied, "it is left out");

    let alone = Context::builder(refused).build();
    let settled = rivers(&alone, 3).await;
    assert!(
        settled
            .failures()
            .all(|failed| failed.error().unwrap().is_account_wide())
    );
}

#[tokio::test(start_paused = true)]
async fn a_retry_goes_to_another_deployment() {
    let broken = || Error::new(ErrorKind::Connection, "reset");
    let cx = Context::builder(Scripted::new().error(broken()).error(broken()))
        .deployment(Deployment::new(Scripted::new().reply("east")))
        .build();
    assert_eq!(cx.generate("where?").await.unwrap().text, "east");
    assert_eq!(cx.tally().retries, 1);
}

#[tokio::test(start_paused = true)]
async fn a_fallback_gets_its_own_attempts_and_its_own_model() {
    let broken = || Error::new(ErrorKind::Connection, "reset");
    let large = Scripted::new().error(broken()).error(broken());
    let small = Scripted::new().error(broken()).reply("small");
    let cx = Context::builder(large.clone())
        .model("large")
        .retry(Retry::default().attempts(2))
        .fallback(Deployment::new(small.clone()).model("small"))
        .build();
    let reply = cx.generate("who?").await.unwrap();
    assert_eq!(reply.text, "small");
    let models = |asked: Vec<Request>| -> Vec<String> {
        let models = asked.into_iter().filter_map(|request| request.model);
        models.map(|model| model.to_string()).collect()
    };
    assert_eq!(models(large.requests()), ["large", "large"]);
    assert_eq!(models(small.requests()), ["small", "small"]);

    let dead = Scripted::new().error(broken()).error(broken());
    let cx = Context::builder(Scripted::new().error(broken()).error(broken()))
        .retry(Retry::default().attempts(2))
        .fallback(Deployment::new(dead))
        .build();
    let error = cx.generate("who?").await.unwrap_err();
    assert_eq!(error.attempts(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_retry_that_would_be_answered_too_late_is_not_sent() -> Result<()> {
    let mut script = Scripted::new();
    for _ in 0..8 {
        script = script.delay(4 * SECOND).reply("warm");
    }
    let broken = Error::new(ErrorKind::Connection, "reset").with_billed(Some(false));
    let script = script.error(broken).reply("never");
    let cx = Context::builder(script.clone()).build();
    for n in 0..8 {
        cx.generate(format!("warm up {n}")).await?;
    }
    // The first attempt is sent: it may be faster than those before.
    let hurried = cx.with_timeout(3 * SECOND);
    let error = hurried.generate("in three seconds").await.unwrap_err();
    assert!(error.is_deadline_exceeded());
    assert_eq!((error.billed(), error.attempts()), (Some(false), 1));
    assert_eq!(script.lines_left(), 1);
    assert_eq!(cx.snapshot().lane.in_flight, 0);
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn retuning_a_deployment_lets_waiting_calls_go_and_sends_events() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let events = Arc::clone(&told);
    let cx = Context::builder(Sim::builder().latency(SECOND).build())
        .pace(pace(1))
        .on_event(move |event| {
            if let Event::LaneRetuned {
                limit, per_minute, ..
            } = event
            {
                events.lock().unwrap().push((*limit, *per_minute));
            }
        })
        .build();
    let began = Instant::now();
    let urgent = cx.with_priority(Priority::High);
    let retune = async {
        tokio::time::sleep(SECOND).await;
        let pace = Pace::per_minute(6_000).tokens(1_000_000);
        cx.retune("sim", pace).unwrap();
    };
    let (settled, ()) = tokio::join!(rivers(&urgent, 20), retune);
    assert_eq!(settled.oks().count(), 20);
    assert!(began.elapsed() < 4 * SECOND, "{:?}", began.elapsed());
    let told = told.lock().unwrap();
    assert_eq!(*told, [("requests", 6_000), ("tokens", 1_000_000)]);
}

#[tokio::test(start_paused = true)]
async fn an_idle_fallback_does_not_hide_the_limiting_factor() {
    let cx = Context::builder(sim(60))
        .pace(pace(60))
        .fallback(Deployment::new(sim(600)).pace(pace(600)))
        .build();
    let look = async {
        tokio::time::sleep(Duration::from_millis(5_500)).await;
        cx.snapshot().lane
    };
    let work = cx.fan_out("river", 0..20).join_all();
    let work = work.settle(async |cx, n| cx.generate(format!("river {n}")).await);
    let (_, lane) = tokio::join!(work, look);
    assert_eq!(lane.binding, Binding::Requests);
    assert_eq!((lane.waiting, lane.requests_per_minute), (14, Some(60)));
    assert!(lane.head_wait.is_some());
}
