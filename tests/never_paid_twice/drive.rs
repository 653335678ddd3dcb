//! Workers with a time budget, as on a platform that cuts calls off. Uses the paused clock.

use std::sync::Arc;
use std::time::Duration;

use throughline::store::{Claim, Memory, Queue as _, RunId};
use throughline::testing::Counted;
use throughline::{Context, Pace, Runner, Sim, Worker, pipeline, runs::DriveOutcome};
use tokio::time::{Instant, sleep, timeout};

use crate::support::{MINUTE, ask, check, sim, worker};

#[tokio::test(start_paused = true)]
async fn a_budget_ends_in_time_and_charges_nothing() {
    let (store, sim) = (Arc::new(Memory::new()), sim(20));
    let runner = Runner::new(Arc::clone(&store));
    let three = Arc::new(pipeline("three", |cx: Context, n: u32| async move {
        for step in 0..3 {
            cx.generate(format!("{n}.{step}")).await?;
        }
        Ok(n)
    }));
    let run = runner
        .submit("three", &three, 0..40)
        .max_attempts(1)
        .await
        .unwrap();
    let build = || {
        let cx = Context::builder(sim.clone())
            .pace(Pace::unlimited().in_flight(4))
            .build();
        Worker::builder(Arc::clone(&store), cx)
            .register("three", Arc::clone(&three))
            .build()
    };
    let mut drives = 0;
    loop {
        let began = Instant::now();
        // Each call is a process of its own, as on a platform that cuts calls off.
        let drive = build().drive(Duration::from_secs(100)).await.unwrap();
        assert!(
            began.elapsed() <= Duration::from_secs(100),
            "{:?}",
            began.elapsed()
        );
        drives += 1;
        if drive == DriveOutcome::Done {
            break;
        }
        let record = runner.snapshot(run).await.unwrap().unwrap().run;
        assert_eq!(record.failed, 0);
        check(&store, run).await;
    }
    // 120 calls of 20 s, four at a time, take 600 s.
    assert!((6..=9).contains(&drives), "{drives}");
    let record = runner.snapshot(run).await.unwrap().unwrap().run;
    assert_eq!((record.completed, record.failed), (40, 0));
    let ledger = sim.ledger();
    assert_eq!((ledger.total.billed, ledger.total.cancelled), (120, 0));
    assert!(runner.ambiguous(None, 10).await.unwrap().is_empty());
}

/// A drive may exceed its budget by the time that a slow store takes to write paid replies.
#[tokio::test(start_paused = true)]
async fn a_slow_store_loses_nothing_when_the_budget_ends() {
    for millis in (6_000..9_000).step_by(170) {
        let store = Counted::new(Memory::new()).latency(Duration::from_millis(400));
        let calls = Sim::builder().latency(Duration::from_millis(2_500));
        let (store, sim) = (Arc::new(store), calls.jitter(0.5).build());
        let runner = Runner::new(Arc::clone(&store));
        let run = runner.submit("ask", &ask(), 0..40).await.unwrap();
        let budget = Duration::from_millis(millis);
        loop {
            let worker = worker(&store, &sim).in_flight(20).build();
            let began = Instant::now();
            let drive = worker.drive(budget).await;
            let late = began.elapsed().saturating_sub(budget);
            assert!(late < Duration::from_secs(4), "{late:?}");
            assert_eq!(worker.stats().journal.waiting, 0, "{drive:?}");
            if drive.unwrap() == DriveOutcome::Done {
                break;
            }
        }
        let record = runner.snapshot(run).await.unwrap().unwrap().run;
        assert_eq!((record.completed, record.failed), (40, 0));
        let bills = sim.ledger();
        assert_eq!(
            (
                bills.total.billed - bills.total.cancelled,
                bills.by_key.len()
            ),
            (40, 40)
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_drain_does_not_make_an_item_end_in_a_fallback() {
    let (store, sim) = (Arc::new(Memory::new()), sim(10));
    let runner = Runner::new(Arc::clone(&store));
    let careful = pipeline("careful", |cx: Context, n: u32| async move {
        let parts = cx.fan_out("part", 0..3).sequential();
        let parts = parts
            .settle(|cx, part| async move { Ok(cx.generate(format!("{n}.{part}")).await?.text) });
        Ok(parts.await.or_fallback(|_| "fallback".to_owned()))
    });
    let run = runner.submit("careful", &careful, 0..4).await.unwrap();
    let cx = Context::builder(sim.clone()).build();
    let worker = Worker::builder(Arc::clone(&store), cx)
        .register("careful", careful)
        .build();
    worker
        .run_until(sleep(Duration::from_secs(15)))
        .await
        .unwrap();
    assert_eq!(
        runner.snapshot(run).await.unwrap().unwrap().run.completed,
        0
    );
    assert_eq!(sim.ledger().total.billed, 8);
    assert_eq!(worker.drive(5 * MINUTE).await.unwrap(), DriveOutcome::Done);
    let results = runner.results::<Vec<String>>(run, 0, 10).await.unwrap();
    assert!(
        results
            .iter()
            .all(|result| !result.output().unwrap().contains(&"fallback".to_owned()))
    );
    assert_eq!(
        (sim.ledger().total.billed, sim.ledger().total.cancelled),
        (12, 0)
    );
}

/// Holds whenever the budget ends.
#[tokio::test(start_paused = true)]
async fn a_call_that_was_not_sent_is_not_ambiguous() {
    for millis in (0..1_200).step_by(35) {
        let store = Counted::new(Memory::new()).latency(Duration::from_millis(100));
        let (store, sim) = (Arc::new(store), sim(10));
        let runner = Runner::new(Arc::clone(&store));
        runner.submit("ask", &ask(), 0..4).await.unwrap();
        let worker = worker(&store, &sim).build();
        // If the time is too short to write everything, the journal writes the rest when it is dropped.
        let drive = worker.drive(Duration::from_millis(millis)).await;
        drop(worker);
        sleep(MINUTE).await;
        let listed = runner.ambiguous(None, 10).await.unwrap();
        let sent = sim.ledger().total.admitted;
        assert_eq!(listed.len() as u64, sent, "after {millis} ms: {drive:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_run_is_driven_to_its_end_although_other_workers_die() {
    let (store, sim) = (Arc::new(Memory::new()), sim(10));
    let runner = Runner::new(Arc::clone(&store));
    let run = runner.submit("ask", &ask(), 0..4).await.unwrap();
    let lease = Duration::from_secs(30);
    let dead = worker(&store, &sim).lease(lease).build();
    // This worker takes all items and dies during its calls.
    let died = timeout(Duration::from_secs(5), dead.drive(MINUTE)).await;
    assert!(died.is_err());

    let alive = worker(&store, &sim).lease(lease).build();
    // Nothing can be claimed yet, but the run has not ended.
    let ended = alive.drive_run(run, Duration::from_secs(10)).await.unwrap();
    assert_eq!((ended, alive.stats().claimed), (DriveOutcome::Continue, 0));
    let ended = alive.drive_run(run, 5 * MINUTE).await.unwrap();
    assert_eq!((ended, alive.stats().claimed), (DriveOutcome::Done, 4));
    assert_eq!(check(&store, run).await["completed"], 4);
    // The run has ended or does not exist, so there is nothing to wait for.
    let before = Instant::now();
    for run in [run, RunId(99)] {
        assert_eq!(
            alive.drive_run(run, MINUTE).await.unwrap(),
            DriveOutcome::Done
        );
    }
    assert_eq!(Instant::now(), before);
}

#[tokio::test(start_paused = true)]
async fn driving_a_run_ends_with_its_context() {
    let store = Arc::new(Memory::new());
    let runner = Runner::new(Arc::clone(&store));
    let run = runner.submit("ask", &ask(), 0..4).await.unwrap();
    let cx = Context::builder(sim(10)).build();
    let worker = Worker::builder(store, cx.clone())
        .register("ask", ask())
        .build();
    let drive = tokio::spawn(async move { worker.drive_run(run, MINUTE).await });
    sleep(Duration::from_secs(1)).await;
    cx.cancel();
    assert_eq!(drive.await.unwrap().unwrap(), DriveOutcome::Continue);
}

#[tokio::test(start_paused = true)]
async fn a_run_is_driven_to_its_end_though_the_store_is_away_for_a_while() {
    let (store, sim) = (Arc::new(Counted::new(Memory::new())), sim(5));
    let runner = Runner::new(Arc::clone(&store));
    let run = runner.submit("ask", &ask(), 0..10).await.unwrap();
    // Another worker dies while it holds an item, so there is nothing to do for a while.
    let lease = store.register("other", 2 * Duration::from_secs(20));
    let held = Claim::new(["ask"], 1);
    let held = store.claim(lease.await.unwrap(), held).await.unwrap();
    assert_eq!(held.len(), 1);
    let down = Arc::clone(&store);
    tokio::spawn(async move {
        for outage in [3, 15, 3] {
            sleep(Duration::from_secs(12)).await;
            down.set_down(true);
            sleep(Duration::from_secs(outage)).await;
            down.set_down(false);
        }
    });
    let worker = worker(&store, &sim).build();
    let drive = worker.drive_run(run, 5 * MINUTE).await;
    assert_eq!(drive.unwrap(), DriveOutcome::Done);
    assert_eq!(check(&store, run).await["completed"], 10);
}

/// If the store is away when the budget ends, the drive returns an error.
#[tokio::test(start_paused = true)]
async fn a_drive_of_a_run_ends_although_the_store_does_not_come_back() {
    let (store, sim) = (Arc::new(Counted::new(Memory::new())), sim(5));
    let runner = Runner::new(Arc::clone(&store));
    let run = runner.submit("ask", &ask(), 0..10).await.unwrap();
    let worker = worker(&store, &sim).build();
    store.set_down(true);
    let began = Instant::now();
    let error = worker.drive_run(run, MINUTE).await.unwrap_err();
    assert!(error.is_temporary(), "{error}");
    assert!(began.elapsed() <= MINUTE + Duration::from_secs(15));
}

/// Other runs have endless work, which must not delay the end.
#[tokio::test(start_paused = true)]
async fn a_drive_of_a_run_ends_with_the_run() {
    let (store, sim) = (Arc::new(Memory::new()), sim(1));
    let runner = Runner::new(Arc::clone(&store));
    let run = runner.submit("ask", &ask(), 0..10).await.unwrap();
    let rest = runner.submit("ask", &ask(), 10..10_000).await.unwrap();
    let worker = worker(&store, &sim).in_flight(10).build();
    let began = Instant::now();
    let drive = worker.drive_run(run, 5 * MINUTE).await.unwrap();
    assert_eq!(drive, DriveOutcome::Done);
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "{:?}",
        began.elapsed()
    );
    // Calls in flight were finished, and no item is held.
    let counts = check(&store, rest).await;
    assert!(counts["completed"] > 0 && !counts.contains_key("processing"));
}

#[tokio::test(start_paused = true)]
async fn the_shortest_and_longest_durations_are_accepted() {
    let all = [
        Duration::ZERO,
        Duration::MAX,
        Duration::from_secs(u64::MAX / 4),
    ];
    for long in all {
        let (store, sim) = (Arc::new(Memory::new()), sim(1));
        let runner = Runner::new(Arc::clone(&store)).poll_every(long);
        let build = || {
            worker(&store, &sim)
                .lease(long)
                .poll_every(long)
                .drain_for(long)
                .build()
        };
        // Each worker polls very rarely, so it finds only items that exist when it starts.
        let run = runner.submit("ask", &ask(), [1]).timeout(Duration::MAX);
        let run = run.await.unwrap();
        let first = build();
        let stopped = first.run_until(sleep(Duration::from_secs(5)));
        timeout(MINUTE, stopped).await.unwrap().unwrap();
        if !long.is_zero() {
            assert_eq!(check(&store, run).await["completed"], 1, "{long:?}");
        }
        let again = runner.submit("ask", &ask(), [2]).await.unwrap();
        let drive = timeout(5 * MINUTE, build().drive(long)).await.unwrap();
        assert_eq!(
            drive.is_ok_and(|drive| drive == DriveOutcome::Done),
            !long.is_zero()
        );
        let drive = build().drive_run(again, long).await.unwrap();
        assert_eq!(drive == DriveOutcome::Done, !long.is_zero());
        assert_eq!(
            runner.purge(long, 10).await.unwrap().generations > 0,
            long.is_zero()
        );
    }
}

#[tokio::test(start_paused = true)]
async fn items_that_could_not_be_released_are_released_later() {
    let (store, sim) = (Arc::new(Counted::default()), sim(1));
    let runner = Runner::new(Arc::clone(&store));
    let run = runner.submit("ask", &ask(), [1, 2, 3]).await.unwrap();
    // Two broken connections in a pool: one fails the read of the run, the other the release of its items.
    store.fail_next(["runs", "release"]);
    let worker = worker(&store, &sim).build();
    worker.run_until(sleep(MINUTE)).await.unwrap();
    assert_eq!(check(&store, run).await["completed"], 3);
    assert!(store.calls("release") > 1);
}
