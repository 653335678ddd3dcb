//! Several deployments behind one queue: their full rate together, no call is rejected, none is lost.

use std::time::Duration;

use throughline::provider::sim::{Enforcement, Sim};
use throughline::testing::Scripted;
use throughline::{
    Context, Error, ErrorKind, Pace, Result,
    call::Deployment,
    ratelimit::{CallOutcome, Lane, Need},
};
use tokio::time::{Instant, sleep, timeout};

const SECOND: Duration = Duration::from_secs(1);

fn sim(per_minute: u64) -> Sim {
    Sim::builder()
        .requests_per_minute(per_minute)
        .enforcement(Enforcement::TokenBucket { burst: SECOND })
        .latency(2 * SECOND)
        .build()
}

fn lane(per_minute: u64) -> Lane {
    Lane::seeded(Pace::per_minute(per_minute).burst(SECOND), 1)
}

/// A deployment whose provider answers each call with its name, at once.
fn named(name: &'static str, lane: &Lane) -> Deployment {
    let provider = (0..300).fold(Scripted::new(), |script, _| script.reply(name));
    Deployment::new(provider).name(name).lane(lane.clone())
}

/// Lets a lane cool down for this time, as after a refusal of the provider.
async fn refuse(lane: &Lane, wait: Duration) {
    let refused = lane.acquire(Need::new(1, 1)).await.unwrap();
    refused.finish(CallOutcome::Throttled { wait: Some(wait) });
}

fn unauthorized() -> Error {
    Error::new(ErrorKind::Unauthorized, "the key is not known")
}

/// Makes `n` calls, at most 64 at a time, and returns how many were answered and how long they took.
async fn calls(cx: &Context, n: usize) -> (usize, Duration) {
    let began = Instant::now();
    let calls = cx.fan_out("river", 0..n).buffer_unordered(64);
    let settled = calls
        .settle(async |cx, n| cx.generate(format!("river {n}")).await)
        .await;
    (settled.oks().count(), began.elapsed())
}

async fn where_to(cx: &Context) -> Result<String> {
    Ok(cx.generate("where?").await?.text)
}

fn rejected(sims: &[Sim]) -> u64 {
    sims.iter().map(|sim| sim.ledger().total.rejected).sum()
}

/// 600 a minute, 2 s of latency, 300 calls: a router that rejects calls at its limit loses most of them.
#[tokio::test(start_paused = true)]
async fn calls_wait_instead_of_being_rejected() {
    for sims in [vec![sim(600)], vec![sim(300), sim(200), sim(100)]] {
        let rates = if sims.len() == 1 {
            vec![600]
        } else {
            vec![300, 200, 100]
        };
        let mut all = sims.iter().zip(rates);
        let (first, rate) = all.next().unwrap();
        let mut builder = Context::builder(first.clone()).lane(lane(rate));
        for (sim, rate) in all {
            builder = builder.deployment(Deployment::new(sim.clone()).lane(lane(rate)));
        }
        let cx = builder.build();
        let (answered, took) = calls(&cx, 300).await;
        assert_eq!((answered, rejected(&sims)), (300, 0));
        // 10 at once, 290 at 10 a second, and the last takes its 2 s.
        assert!(took <= Duration::from_millis(31_700), "{took:?}");
        let mut left = cx.lanes().map(Lane::snapshot);
        assert!(left.all(|it| it.in_flight + it.waiting == 0));
    }
}

#[tokio::test(start_paused = true)]
async fn each_deployment_takes_its_share_however_unequal() {
    let sims = [sim(60), sim(1_200)];
    let cx = Context::builder(sims[0].clone())
        .lane(lane(60))
        .deployment(Deployment::new(sims[1].clone()).lane(lane(1_200)))
        .build();
    let (answered, took) = calls(&cx, 1_260).await;
    let first = sims[0].ledger().total.admitted;
    assert!((58..=63).contains(&first), "{first}");
    // 21 at once and 21 a second.
    assert!(took <= Duration::from_secs(62), "{took:?}");
    assert_eq!((answered, rejected(&sims)), (1_260, 0));
}

#[tokio::test(start_paused = true)]
async fn a_lane_that_cools_down_does_not_come_first() {
    let (cooling, ready) = (lane(600), lane(600));
    refuse(&cooling, 30 * SECOND).await;
    let sims = [sim(600), sim(600)];
    let cx = Context::builder(Deployment::new(sims[0].clone()).lane(cooling))
        .deployment(Deployment::new(sims[1].clone()).lane(ready))
        .build();
    let (_, took) = calls(&cx, 100).await;
    assert_eq!(sims[1].ledger().total.admitted, 100);
    assert!(took <= 12 * SECOND, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_refused_account_gets_no_calls_until_it_is_enabled() {
    let bad = Sim::builder().unauthorized().build();
    let cx = Context::builder(Deployment::new(bad.clone()).name("bad"))
        .deployment(Deployment::new(sim(600)).lane(lane(600)))
        .build();
    assert_eq!(calls(&cx, 50).await.0, 50);
    let tried = bad.ledger().total.denied;
    assert_eq!(calls(&cx, 50).await.0, 50);
    assert_eq!(bad.ledger().total.denied, tried, "no call goes there again");

    bad.set_unauthorized(false);
    cx.enable("bad").unwrap();
    assert_eq!(calls(&cx, 1).await.0, 1);
    assert_eq!(bad.ledger().total.admitted, 1);
}

#[tokio::test(start_paused = true)]
async fn when_all_deployments_are_disabled_waiting_calls_fail_with_the_reason() {
    let lanes = [lane(1), lane(1)];
    for lane in &lanes {
        lane.acquire(Need::new(1, 1)).await.unwrap().mark_sent();
    }
    let cx = Context::builder(named("a", &lanes[0]))
        .deployment(named("b", &lanes[1]))
        .build();
    let disabling = async {
        sleep(SECOND).await;
        cx.disable("a", unauthorized()).unwrap();
        cx.disable("b", unauthorized()).unwrap();
    };
    let (failed, ()) = tokio::join!(timeout(2 * SECOND, where_to(&cx)), disabling);
    let error = failed.expect("at once").unwrap_err();
    assert!(error.is_account_wide());
    assert!(where_to(&cx).await.unwrap_err().is_account_wide());
}

#[tokio::test(start_paused = true)]
async fn an_unknown_deployment_is_an_error_that_names_the_known_ones() {
    let cx = Context::builder(Scripted::new())
        .deployment(Scripted::new())
        .build();
    assert_eq!(
        cx.deployments().collect::<Vec<_>>(),
        ["scripted", "scripted-2"]
    );
    for failed in [cx.enable("east"), cx.retune("east", Pace::unlimited())] {
        let error = failed.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.message().contains("scripted, scripted-2"), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn groups_of_deployments_are_used_in_order() {
    let main = lane(60);
    let cx = Context::builder(named("main", &main))
        .fallback(named("older", &lane(600)))
        .build();
    // Waiting is no reason to take another model.
    let (start, mut took) = (Instant::now(), Vec::new());
    for _ in 0..3 {
        took.push(where_to(&cx).await.unwrap());
    }
    assert_eq!(
        (took, start.elapsed()),
        (vec!["main".to_owned(); 3], 2 * SECOND)
    );
    // A long cooldown is one, for calls that wait already too.
    let permit = main.acquire(Need::new(1, 1)).await.unwrap();
    let parking = async {
        sleep(SECOND / 2).await;
        let wait = Some(3_600 * SECOND);
        permit.finish(CallOutcome::Throttled { wait });
    };
    let (fallen_back, ()) = tokio::join!(timeout(SECOND, where_to(&cx)), parking);
    assert_eq!(fallen_back.unwrap().unwrap(), "older");
    // It is no reason any more when the lane has almost cooled down.
    let ready_in = main.snapshot().cooldown.unwrap();
    sleep(ready_in - SECOND).await;
    assert_eq!(where_to(&cx).await.unwrap(), "main");
}

#[tokio::test(start_paused = true)]
async fn a_dropped_call_leaves_every_queue() {
    let lanes = [lane(60), lane(60)];
    let cx = Context::builder(named("a", &lanes[0]))
        .deployment(named("b", &lanes[1]))
        .build();
    for lane in &lanes {
        lane.acquire(Need::new(1, 1)).await.unwrap().mark_sent();
    }
    let waited = timeout(Duration::from_millis(500), calls(&cx, 20)).await;
    assert!(waited.is_err());
    for lane in &lanes {
        let snapshot = lane.snapshot();
        assert_eq!((snapshot.waiting, snapshot.in_flight), (0, 0));
    }
    // Nothing was sent, so each lane has a whole call again after a second.
    let start = Instant::now();
    assert_eq!(calls(&cx, 4).await.0, 4);
    assert!(start.elapsed() <= 3 * SECOND / 2, "{:?}", start.elapsed());
}

/// The end of a long cooldown comes without any notification.
#[tokio::test(start_paused = true)]
async fn waiting_calls_notice_the_end_of_a_long_cooldown() {
    for is_fallback in [false, true] {
        let (fast, slow) = (lane(6_000), lane(1));
        refuse(&fast, 3_600 * SECOND).await;
        let builder = Context::builder(named("fast", &fast));
        let cx = match is_fallback {
            false => builder.deployment(named("slow", &slow)),
            true => builder.fallback(named("slow", &slow)),
        };
        let (answered, took) = calls(&cx.build(), 200).await;
        assert_eq!(answered, 200);
        // 61 go meanwhile, and the others within seconds; a refusal adds up to 2 s to the wait.
        assert!((3_600 * SECOND..3_610 * SECOND).contains(&took), "{took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn waiting_calls_notice_that_a_lane_is_resumed() {
    for is_stopped in [false, true] {
        let (fast, slow) = (lane(6_000), lane(1));
        match is_stopped {
            true => fast.stop(unauthorized()),
            false => refuse(&fast, 7_200 * SECOND).await,
        }
        let cx = Context::builder(named("fast", &fast))
            .deployment(named("slow", &slow))
            .build();
        let resuming = async {
            sleep(10 * SECOND).await;
            // On the lane, not on the context.
            fast.resume();
        };
        let ((answered, took), ()) = tokio::join!(calls(&cx, 20), resuming);
        assert_eq!(answered, 20);
        assert!(took < 12 * SECOND, "{took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn calls_can_wait_for_any_cooldown_instead_of_falling_back() {
    let main = lane(60);
    let cx = Context::builder(named("main", &main))
        .fallback(named("older", &lane(600)))
        .fallback_after(Duration::MAX)
        .build();
    refuse(&main, 30 * SECOND).await;
    assert_eq!(where_to(&cx).await.unwrap(), "main");
}
