//! Several deployments behind one queue: full rate together, nobody rejected, nobody lost.

use std::time::Duration;

use futures::StreamExt as _;
use futures::future::join_all;
use throughline::provider::sim::{Enforcement, Sim};
use throughline::{
    Error, ErrorKind, Pace, Provider as _, Request, Result,
    call::Pool,
    ratelimit::{CallOutcome, Lane, Need},
};
use tokio::time::{Instant, timeout};

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

fn unauthorized() -> Error {
    Error::new(ErrorKind::Unauthorized, "the key is not known")
}

/// One call as a guard makes it: again after a refusal, elsewhere after a bad account.
async fn call(pool: &Pool<Sim>, n: usize) -> Result<usize> {
    let mut visit = pool.arrive();
    let request = Request::new(format!("river {n}"));
    loop {
        let mut turn = pool.acquire(Need::new(10, 10), &mut visit).await?;
        turn.mark_sent();
        let index = turn.index();
        match turn.deployment().generate(&request).await {
            Ok(reply) => {
                turn.finish(CallOutcome::Succeeded {
                    usage: Some(reply.usage),
                });
                return Ok(index);
            }
            Err(error) if error.is_account_wide() => turn.leave_out(error),
            Err(error) if error.is_throttled() => {
                turn.finish(CallOutcome::Throttled { wait: error.wait() });
            }
            Err(error) => {
                turn.finish(CallOutcome::Failed { usage: None });
                return Err(error);
            }
        }
    }
}

/// `n` calls, at most 64 at a time: where each ended, and how long they all took.
async fn calls(pool: &Pool<Sim>, n: usize) -> (Vec<Result<usize>>, Duration) {
    let began = Instant::now();
    let calls = futures::stream::iter(0..n).map(|n| call(pool, n));
    let results = calls.buffer_unordered(64).collect().await;
    (results, began.elapsed())
}

fn rejected(pool: &Pool<Sim>) -> u64 {
    let ledgers = pool.deployments().map(|(sim, _)| sim.ledger());
    ledgers.map(|ledger| ledger.total.rejected).sum()
}

/// The row of the peers: 600 a minute, 2 s of latency, 300 calls. The usual router
/// rejects at its limit and loses most of them.
#[tokio::test(start_paused = true)]
async fn it_waits_instead_of_rejecting_300_of_300() {
    let one = Pool::new(sim(600), lane(600));
    let three = Pool::new(sim(300), lane(300))
        .beside(sim(200), lane(200))
        .beside(sim(100), lane(100));
    for pool in [one, three] {
        let (results, took) = calls(&pool, 300).await;
        let answered = results.iter().filter(|result| result.is_ok()).count();
        assert_eq!((answered, rejected(&pool)), (300, 0));
        // 10 at once, 290 at 10 a second, and the last takes its 2 s.
        assert!(took <= Duration::from_millis(31_700), "{took:?}");
        let left = pool.deployments().map(|(_, lane)| lane.snapshot());
        assert!(left.into_iter().all(|it| it.in_flight + it.waiting == 0));
    }
}

#[tokio::test(start_paused = true)]
async fn each_takes_its_share_however_unequal() {
    let pool = Pool::new(sim(60), lane(60)).beside(sim(1_200), lane(1_200));
    let (results, took) = calls(&pool, 1_260).await;
    let first = results.iter().filter(|it| matches!(it, Ok(0))).count();
    assert!((58..=63).contains(&first), "{first}");
    // 21 at once and 21 a second.
    assert!(took <= Duration::from_secs(62), "{took:?}");
    assert_eq!(rejected(&pool), 0);
}

#[tokio::test(start_paused = true)]
async fn a_closed_lane_does_not_come_first() {
    let (closed, open) = (lane(600), lane(600));
    let wait = Some(30 * SECOND);
    let refused = closed.acquire(Need::new(1, 1)).await;
    refused.unwrap().finish(CallOutcome::Throttled { wait });
    let pool = Pool::new(sim(600), closed).beside(sim(600), open);
    let (results, took) = calls(&pool, 100).await;
    assert!(results.iter().all(|it| matches!(it, Ok(1))));
    assert!(took <= 12 * SECOND, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_bad_account_is_left_out_and_its_calls_go_elsewhere() {
    let bad = Sim::builder().unauthorized().build();
    let pool = Pool::new(bad.clone(), Lane::new(Pace::unlimited())).beside(sim(600), lane(600));
    let (results, _) = calls(&pool, 50).await;
    assert!(results.iter().all(|it| matches!(it, Ok(1))), "{results:?}");
    let tried = bad.ledger().total.denied;
    let (results, _) = calls(&pool, 50).await;
    assert!(results.iter().all(|it| matches!(it, Ok(1))));
    assert_eq!(bad.ledger().total.denied, tried, "nobody goes there again");

    bad.set_unauthorized(false);
    pool.readmit(0);
    assert!(matches!(call(&pool, 0).await, Ok(0)));
}

#[tokio::test(start_paused = true)]
async fn when_all_are_out_those_who_wait_are_told_why() {
    let pool = Pool::new("a", lane(1)).beside("b", lane(1));
    let mut visit = pool.arrive();
    let need = Need::new(1, 1);
    let first = pool.acquire(need, &mut visit).await.unwrap();
    let second = pool.acquire(need, &mut visit).await.unwrap();
    assert_ne!(first.index(), second.index());
    let waiting = pool.acquire(need, &mut visit);
    let leaving = async {
        tokio::time::sleep(SECOND).await;
        first.leave_out(unauthorized());
        second.leave_out(unauthorized());
    };
    let (told, ()) = tokio::join!(timeout(2 * SECOND, waiting), leaving);
    let error = told.expect("at once").unwrap_err();
    assert!(error.is_account_wide());
    let late = pool.acquire(need, &mut visit).await;
    assert!(late.unwrap_err().is_account_wide());
}

#[tokio::test(start_paused = true)]
async fn groups_are_asked_in_order() {
    let main = lane(60);
    let pool = Pool::new("main", main.clone()).fallback("older", lane(600));
    let need = Need::new(1, 1);
    let take = async || {
        let turn = pool.acquire(need, &mut pool.arrive()).await.unwrap();
        let deployment = *turn.deployment();
        turn.finish(CallOutcome::Succeeded { usage: None });
        deployment
    };
    // To wait is no reason to take another model.
    let (start, mut took) = (Instant::now(), Vec::new());
    for _ in 0..3 {
        took.push(take().await);
    }
    assert_eq!((took, start.elapsed()), (vec!["main"; 3], 2 * SECOND));
    // That it is parked is one, for who waits already too.
    let turn = pool.acquire(need, &mut pool.arrive()).await.unwrap();
    let parking = async {
        tokio::time::sleep(SECOND / 2).await;
        let wait = Some(3_600 * SECOND);
        turn.finish(CallOutcome::Throttled { wait });
    };
    let (fallen_back, ()) = tokio::join!(timeout(SECOND, take()), parking);
    assert_eq!(fallen_back.unwrap(), "older");
    // It is no longer when the lane is about to open.
    let opens_in = main.snapshot().cooldown.unwrap();
    tokio::time::sleep(opens_in - SECOND).await;
    assert_eq!(take().await, "main");
}

#[tokio::test(start_paused = true)]
async fn a_call_that_failed_goes_elsewhere_and_then_falls_back() {
    let free = || Lane::new(Pace::unlimited());
    let pool = Pool::new("a", free())
        .beside("b", free())
        .fallback("c", free());
    let mut visit = pool.arrive();
    let mut went = Vec::new();
    for _ in 0..2 {
        let turn = pool.acquire(Need::new(1, 1), &mut visit).await.unwrap();
        went.push(*turn.deployment());
        visit.avoid(turn.index());
        turn.finish(CallOutcome::Failed { usage: None });
    }
    assert_eq!(went, ["a", "b"]);
    assert!(visit.fall_back(&pool, 1));
    let turn = pool.acquire(Need::new(1, 1), &mut visit).await.unwrap();
    assert_eq!(*turn.deployment(), "c");
    assert!(!visit.fall_back(&pool, turn.index()), "there is no more");
    drop(turn);
    assert!(pool.acquire(Need::new(1, 1), &mut visit).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn who_leaves_leaves_every_queue() {
    let pool = Pool::new("a", lane(60)).beside("b", lane(60));
    let mut visits: Vec<_> = (0..20).map(|_| pool.arrive()).collect();
    let waits = visits
        .iter_mut()
        .map(|visit| pool.acquire(Need::new(1, 1), visit));
    let waited = timeout(Duration::from_millis(500), join_all(waits)).await;
    assert!(waited.is_err());
    for (_, lane) in pool.deployments() {
        let snapshot = lane.snapshot();
        assert_eq!((snapshot.waiting, snapshot.in_flight), (0, 0));
    }
    // Nothing was sent, so a whole burst and what flowed in is there again.
    let start = Instant::now();
    for _ in 0..4 {
        let mut turn = pool
            .acquire(Need::new(1, 1), &mut pool.arrive())
            .await
            .unwrap();
        turn.mark_sent();
    }
    assert!(start.elapsed() <= SECOND, "{:?}", start.elapsed());
}

/// Parked for an hour, then free again: nobody but the clock says so.
#[tokio::test(start_paused = true)]
async fn callers_that_wait_notice_when_a_parked_deployment_is_back() {
    let parked = async |lane: &Lane| {
        let wait = Some(3_600 * SECOND);
        let refused = lane.acquire(Need::new(1, 1)).await.unwrap();
        refused.finish(CallOutcome::Throttled { wait });
    };
    for fallback in [false, true] {
        let (fast, slow) = (lane(6_000), lane(1));
        parked(&fast).await;
        let pool = Pool::new("fast", fast);
        let pool = match fallback {
            false => pool.beside("slow", slow),
            true => pool.fallback("slow", slow),
        };
        let start = Instant::now();
        let calls = (0..200).map(|_| async {
            let turn = pool.acquire(Need::new(1, 1), &mut pool.arrive()).await;
            turn.unwrap().mark_sent();
        });
        join_all(calls).await;
        // 61 go meanwhile, and the others within seconds; a refusal adds up to 2 s to the wait.
        let took = start.elapsed();
        assert!((3_600 * SECOND..3_610 * SECOND).contains(&took), "{took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn callers_that_wait_notice_when_a_lane_is_opened_by_hand() {
    for stopped in [false, true] {
        let (fast, slow) = (lane(6_000), lane(1));
        if stopped {
            fast.stop(unauthorized());
        } else {
            let wait = Some(7_200 * SECOND);
            let refused = fast.acquire(Need::new(1, 1)).await.unwrap();
            refused.finish(CallOutcome::Throttled { wait });
        }
        let pool = Pool::new("fast", fast.clone()).beside("slow", slow);
        let start = Instant::now();
        let calls = (0..20).map(|_| async {
            let turn = pool.acquire(Need::new(1, 1), &mut pool.arrive()).await;
            turn.unwrap().mark_sent();
        });
        let opening = async {
            tokio::time::sleep(10 * SECOND).await;
            // On the lane, not on the pool.
            fast.resume();
        };
        tokio::join!(join_all(calls), opening);
        let took = start.elapsed();
        assert!(took < 12 * SECOND, "{took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn parked_after_may_be_without_end() {
    let main = lane(60);
    let pool = Pool::new("main", main.clone())
        .fallback("older", lane(600))
        .parked_after(Duration::MAX);
    let refused = main.acquire(Need::new(1, 1)).await.unwrap();
    let wait = Some(30 * SECOND);
    refused.finish(CallOutcome::Throttled { wait });
    let turn = pool.acquire(Need::new(1, 1), &mut pool.arrive()).await;
    assert_eq!(*turn.unwrap().deployment(), "main");
}
