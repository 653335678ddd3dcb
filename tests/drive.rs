//! Runs that are driven for a time, as where a platform cuts calls off: under the paused clock.

#[path = "support/durable.rs"]
mod support;

use std::sync::Arc;
use std::time::Duration;

use throughline::store::{Memory, RunId};
use throughline::testing::Counted;
use throughline::{Context, Drive, Pace, Runner, Sim, Worker, pipeline};
use tokio::time::{Instant, sleep, timeout};

use self::support::{MINUTE, ask, check, sim, worker};

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
        // Each a process of its own, as where a platform cuts calls off.
        let drive = build().drive(Duration::from_secs(100)).await.unwrap();
        assert!(
            began.elapsed() <= Duration::from_secs(100),
            "{:?}",
            began.elapsed()
        );
        drives += 1;
        if drive == Drive::Done {
            break;
        }
        let record = runner.snapshot(run).await.unwrap().unwrap().run;
        assert_eq!(record.failed, 0);
        check(&store, run).await;
    }
    // 120 calls of 20 s by four: 600 s.
    assert!((6..=9).contains(&drives), "{drives}");
    let record = runner.snapshot(run).await.unwrap().unwrap().run;
    assert_eq!((record.completed, record.failed), (40, 0));
    let ledger = sim.ledger();
    assert_eq!((ledger.total.billed, ledger.total.cancelled), (120, 0));
    assert!(runner.ambiguous(None, 10).await.unwrap().is_empty());
}

/// What is paid for is worth being late, by as much as the store is slow.
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
            if drive.unwrap() == Drive::Done {
                break;
            }
        }
        let record = runner.snapshot(run).await.unwrap().unwrap().run;
        assert_eq!((record.completed, record.failed), (40, 0));
        let bills = sim.ledger();
        assert_eq!(
            (
                bills.total.billed - bills.total.cancelled,
                bills.accounts.len()
            ),
            (40, 40)
        );
    }
}

#[tokio::test(start_paused = true)]
async fn what_drains_does_not_end_in_a_fallback() {
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
    assert_eq!(worker.drive(5 * MINUTE).await.unwrap(), Drive::Done);
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

/// Whenever the budget ends: a call that was not sent is not on the list of those that may have been.
#[tokio::test(start_paused = true)]
async fn what_was_not_sent_is_not_ambiguous() {
    for millis in (0..1_200).step_by(35) {
        let store = Counted::new(Memory::new()).latency(Duration::from_millis(100));
        let (store, sim) = (Arc::new(store), sim(10));
        let runner = Runner::new(Arc::clone(&store));
        runner.submit("ask", &ask(), 0..4).await.unwrap();
        let worker = worker(&store, &sim).build();
        // It may not have the time to write everything: then the journal does when it is dropped.
        let drive = worker.drive(Duration::from_millis(millis)).await;
        drop(worker);
        sleep(MINUTE).await;
        let listed = runner.ambiguous(None, 10).await.unwrap();
        let sent = sim.ledger().total.admitted;
        assert_eq!(listed.len() as u64, sent, "after {millis} ms: {drive:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_run_is_driven_to_its_end_also_when_others_die_with_its_last_items() {
    let (store, sim) = (Arc::new(Memory::new()), sim(10));
    let runner = Runner::new(Arc::clone(&store));
    let run = runner.submit("ask", &ask(), 0..4).await.unwrap();
    let lease = Duration::from_secs(30);
    let dead = worker(&store, &sim).lease(lease).build();
    // It takes all items and dies in the middle of its calls.
    let died = timeout(Duration::from_secs(5), dead.drive(MINUTE)).await;
    assert!(died.is_err());

    let alive = worker(&store, &sim).lease(lease).build();
    // There is nothing to claim yet, which is no reason to say that it is done.
    let ended = alive.drive_run(run, Duration::from_secs(10)).await.unwrap();
    assert_eq!((ended, alive.stats().claimed), (Drive::Continue, 0));
    let ended = alive.drive_run(run, 5 * MINUTE).await.unwrap();
    assert_eq!((ended, alive.stats().claimed), (Drive::Done, 4));
    assert_eq!(check(&store, run).await["completed"], 4);
    // Nothing to wait for: it is over, or not there.
    let before = Instant::now();
    for run in [run, RunId(99)] {
        assert_eq!(alive.drive_run(run, MINUTE).await.unwrap(), Drive::Done);
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
    assert_eq!(drive.await.unwrap().unwrap(), Drive::Continue);
}
