//! Runs, workers and what becomes of items, under the paused clock.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};
use throughline::store::{
    Claim, Handling, Memory, NewItem, NewRun, Queue, RunFilter, Status, Store,
};
use throughline::testing::Counted;
use throughline::{
    Context, Error, ErrorKind, Runner, Sim, Worker, pipeline,
    runs::{AmbiguousPolicy, DriveOutcome},
};
use tokio::time::{sleep, timeout};

use crate::support::{MINUTE, ask, check, sim, worker};

#[tokio::test(start_paused = true)]
async fn a_submitted_run_is_worked_on_and_its_results_are_read() {
    let (store, sim) = (Arc::new(Memory::new()), sim(1));
    let runner = Runner::new(Arc::clone(&store));
    let run = runner
        .submit("ask", &ask(), 0..500)
        .tenant("ada")
        .await
        .unwrap();
    assert_eq!(runner.status(run).await.unwrap(), Some(Status::Pending));
    let watched = tokio::spawn(runner.watch(run).try_collect::<Vec<_>>());

    let worker = worker(&store, &sim).build();
    assert_eq!(worker.drive(10 * MINUTE).await.unwrap(), DriveOutcome::Done);
    let snapshot = runner.snapshot(run).await.unwrap().unwrap();
    assert_eq!(
        (snapshot.run.status, snapshot.remaining()),
        (Status::Completed, 0)
    );
    check(&store, run).await;

    let results: Vec<_> = runner
        .stream_results::<String>(run)
        .try_collect()
        .await
        .unwrap();
    assert_eq!(results.len(), 500);
    for (index, result) in results.iter().enumerate() {
        assert_eq!((result.index as usize, result.attempt), (index, 1));
        assert!(result.output().is_some());
    }
    assert_eq!(sim.ledger().total.billed, 500);
    assert!(sim.ledger().peak_in_flight <= 64);
    let watched = watched.await.unwrap().unwrap();
    assert_eq!(watched.first().unwrap().run.completed, 0);
    assert_eq!(watched.last().unwrap().run.completed, 500);
    assert!(
        watched
            .windows(2)
            .all(|two| two[0].run.completed <= two[1].run.completed)
    );

    let stats = worker.stats();
    assert_eq!(
        (stats.claimed, stats.completed, stats.replies_paid),
        (500, 500, 500)
    );
    assert_eq!((stats.journal.settled, stats.journal.fenced), (500, 0));
    assert!(runner.ambiguous(None, 10).await.unwrap().is_empty());
    // An idle worker leaves no lease behind.
    assert_eq!(store.reap().await.unwrap().leases, 0);
}

#[tokio::test(start_paused = true)]
async fn many_items_take_few_round_trips() {
    let (store, sim) = (Arc::new(Counted::default()), sim(1));
    let runner = Runner::new(Arc::clone(&store));
    runner.submit("ask", &ask(), 0..2048).await.unwrap();
    store.forget();
    let worker = worker(&store, &sim).in_flight(512).build();
    assert_eq!(worker.drive(10 * MINUTE).await.unwrap(), DriveOutcome::Done);
    let calls = |method| store.calls(method);
    // Each item is a reply, an ended intent and a settlement: 6,144 entries by 512 are 12 commits, if all
    // come at once.
    assert_eq!(worker.stats().journal.written, 3 * 2048);
    let journal = worker.stats().journal;
    assert!((12..=20).contains(&journal.commits), "{journal:?}");
    assert!((4..=16).contains(&journal.intent_writes), "{journal:?}");
    assert_eq!(calls("commit"), journal.commits + journal.intent_writes);
    assert!(calls("claim") <= 32, "{}", calls("claim"));
    assert!(calls("generations") <= 32, "{}", calls("generations"));
    // The run is read once, and an idle worker looks once for pipelines that it does not have.
    assert_eq!(calls("runs"), 2);
    assert!(calls("create_run") == 0 && calls("items") == 0 && calls("release") == 0);
}

#[tokio::test(start_paused = true)]
async fn a_second_run_pays_only_for_new_inputs_and_a_fresh_run_for_all() {
    let (store, sim) = (Arc::new(Memory::new()), sim(1));
    let runner = Runner::new(Arc::clone(&store));
    let worker = worker(&store, &sim).build();
    let mut billed = Vec::new();
    let inputs = |inputs: &[u32]| inputs.to_vec();
    for submit in [
        runner.submit("ask", &ask(), inputs(&[1, 2, 2, 3])),
        runner.submit("ask", &ask(), inputs(&[1, 9, 2, 3, 2])),
        runner.submit("ask", &ask(), inputs(&[1, 2, 2, 3])).fresh(),
        runner.submit("ask", &ask(), inputs(&[1, 2, 2, 3])),
        runner
            .submit("ask", &ask(), inputs(&[1, 2]))
            .tenant("another"),
    ] {
        submit.await.unwrap();
        assert_eq!(worker.drive(MINUTE).await.unwrap(), DriveOutcome::Done);
        billed.push(sim.ledger().total.billed);
    }
    assert_eq!(billed, [4, 5, 9, 9, 11]);
}

#[tokio::test(start_paused = true)]
async fn a_retry_with_a_repaired_parser_pays_nothing() {
    let (store, sim) = (Arc::new(Memory::new()), sim(1));
    let runner = Runner::new(Arc::clone(&store));
    let repaired = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&repaired);
    let parse = pipeline("parse", move |cx: Context, n: u32| {
        let repaired = flag.load(Ordering::Relaxed);
        async move {
            let reply = cx.generate(format!("{n}")).await?;
            if n == 3 && !repaired {
                panic!("no such field");
            }
            match repaired {
                true => Ok(reply.text.len()),
                false => reply.text.parse::<usize>().map_err(Error::other),
            }
        }
    });
    let run = runner.submit("parse", &parse, 0..20).await.unwrap();
    let cx = Context::builder(sim.clone()).build();
    let worker = Worker::builder(Arc::clone(&store), cx)
        .register("parse", parse)
        .build();
    assert_eq!(worker.drive(MINUTE).await.unwrap(), DriveOutcome::Done);
    let record = runner.snapshot(run).await.unwrap().unwrap().run;
    assert_eq!((record.status, record.failed), (Status::Failed, 20));
    let results = runner.results::<usize>(run, 0, 100).await.unwrap();
    assert!(results[3].error().unwrap().is_panic());
    assert_eq!(results[4].error().unwrap().kind(), ErrorKind::Other);
    assert_eq!(sim.ledger().total.billed, 20);

    repaired.store(true, Ordering::Relaxed);
    assert_eq!(runner.retry_failed(run).await.unwrap(), 20);
    assert_eq!(worker.drive(MINUTE).await.unwrap(), DriveOutcome::Done);
    let record = runner.snapshot(run).await.unwrap().unwrap().run;
    assert_eq!((record.status, record.completed), (Status::Completed, 20));
    assert_eq!(sim.ledger().total.billed, 20);
    assert_eq!(worker.stats().replies_replayed, 20);
    check(&store, run).await;
}

/// Answers each call with the next number.
fn numbered() -> (Sim, Arc<AtomicU32>) {
    let calls = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&calls);
    let reply = move |_: &throughline::Request| {
        let n = count.fetch_add(1, Ordering::Relaxed);
        n.to_string()
    };
    (Sim::builder().reply(reply).build(), calls)
}

#[tokio::test(start_paused = true)]
async fn a_retry_requests_only_the_reply_on_which_the_item_failed() {
    let (sim, calls) = numbered();
    let store = Arc::new(Memory::new());
    let runner = Runner::new(Arc::clone(&store));
    let least = Arc::new(AtomicU32::new(2));
    let wanted = Arc::clone(&least);
    let two = pipeline("two", move |cx: Context, n: u32| {
        let wanted = wanted.load(Ordering::Relaxed);
        async move {
            let outline = cx.generate(format!("outline {n}")).await?.text;
            let text = cx.generate(format!("text {n} {outline}")).await?.text;
            let number: u32 = text.parse().map_err(Error::other)?;
            match number >= wanted {
                true => Ok((outline, number)),
                false => Err(Error::new(ErrorKind::InvalidOutput, "a reply of no use")),
            }
        }
    });
    let run = runner.submit("two", &two, [7]).await.unwrap();
    let cx = Context::builder(sim).build();
    let worker = Worker::builder(Arc::clone(&store), cx)
        .register("two", two)
        .build();
    assert_eq!(worker.drive(MINUTE).await.unwrap(), DriveOutcome::Done);
    assert_eq!(runner.status(run).await.unwrap(), Some(Status::Failed));
    assert_eq!(calls.load(Ordering::Relaxed), 2);
    // The code is the same, so the reply is of no use again, and another one is asked for.
    assert_eq!(runner.retry_failed(run).await.unwrap(), 1);
    assert_eq!(worker.drive(MINUTE).await.unwrap(), DriveOutcome::Done);
    assert_eq!(
        runner.outputs::<(String, u32)>(run).await.unwrap(),
        [("0".to_owned(), 2)]
    );
    assert_eq!(calls.load(Ordering::Relaxed), 3);
    // Another run of the same item finds both, and pays for nothing: also where less is wanted.
    for (least_wanted, number) in [(2, 2), (1, 1)] {
        least.store(least_wanted, Ordering::Relaxed);
        let again = runner.submit("two", &ask_two(), [7]).await.unwrap();
        assert_eq!(worker.drive(MINUTE).await.unwrap(), DriveOutcome::Done);
        assert_eq!(
            runner.outputs::<(String, u32)>(again).await.unwrap()[0].1,
            number
        );
    }
    // Where even the new one is of no use, it fails, once for each retry.
    least.store(5, Ordering::Relaxed);
    let again = runner.submit("two", &ask_two(), [7]).await.unwrap();
    for paid in [4, 5] {
        assert_eq!(worker.drive(MINUTE).await.unwrap(), DriveOutcome::Done);
        assert_eq!(calls.load(Ordering::Relaxed), paid);
        assert_eq!(runner.status(again).await.unwrap(), Some(Status::Failed));
        runner.retry_failed(again).await.unwrap();
    }
    assert_eq!(worker.drive(MINUTE).await.unwrap(), DriveOutcome::Done);
    assert_eq!(runner.status(again).await.unwrap(), Some(Status::Completed));
    assert!(runner.ambiguous(None, 10).await.unwrap().is_empty());
    check(&store, again).await;
}

/// A pipeline with the type of the inputs of `two`.
fn ask_two() -> impl throughline::Pipeline<Input = u32, Output = (String, u32)> {
    pipeline("two", async |_cx: Context, n: u32| Ok((String::new(), n)))
}

/// Several branches, of which one fails on its reply while others go on: theirs is not asked for again.
#[tokio::test(start_paused = true)]
async fn a_retry_requests_only_the_reply_of_the_failed_branch() {
    let (sim, calls) = numbered();
    let store = Arc::new(Memory::new());
    let runner = Runner::new(Arc::clone(&store));
    let first = Arc::new(OnceLock::new());
    let branches = pipeline("branches", move |cx: Context, n: u32| {
        let first = Arc::clone(&first);
        async move {
            let parts = cx.fan_out("part", 0..5_u32).settle(async |cx, part| {
                let text = cx.generate(format!("part {n}.{part}")).await?.text;
                match part == 1 && *first.get_or_init(|| text.clone()) == text {
                    true => Err(Error::new(ErrorKind::InvalidOutput, "a reply of no use")),
                    false => Ok(text),
                }
            });
            let parts = parts.await.all()?;
            cx.generate(format!("together {n}")).await?;
            Ok(parts)
        }
    });
    let run = runner.submit("branches", &branches, [7]).await.unwrap();
    let cx = Context::builder(sim).build();
    let worker = Worker::builder(Arc::clone(&store), cx)
        .register("branches", branches)
        .build();
    assert_eq!(worker.drive(MINUTE).await.unwrap(), DriveOutcome::Done);
    assert_eq!(runner.status(run).await.unwrap(), Some(Status::Failed));
    let before = calls.load(Ordering::Relaxed);
    runner.retry_failed(run).await.unwrap();
    assert_eq!(worker.drive(MINUTE).await.unwrap(), DriveOutcome::Done);
    let record = runner.snapshot(run).await.unwrap().unwrap().run;
    assert_eq!(record.status, Status::Completed, "{:?}", record.error);
    // Of the branch, and of what comes after.
    assert_eq!(calls.load(Ordering::Relaxed), before + 2);
}

/// Claims items in the name of a worker that is never heard of again.
async fn dies_with(store: &Memory, items: u32) {
    let lease = store
        .register("dead", Duration::from_secs(30))
        .await
        .unwrap();
    assert_eq!(
        store
            .claim(lease, Claim::new(["ask"], items))
            .await
            .unwrap()
            .len(),
        items as usize
    );
}

#[tokio::test(start_paused = true)]
async fn other_workers_complete_the_items_of_a_dead_worker() {
    let (store, sim) = (Arc::new(Memory::new()), sim(1));
    let runner = Runner::new(Arc::clone(&store));
    let once = runner.submit("ask", &ask(), 0..3).await.unwrap();
    let other = runner
        .submit("ask", &ask(), 3..5)
        .max_attempts(1)
        .await
        .unwrap();
    dies_with(&store, 5).await;
    let worker = worker(&store, &sim).name("dead").build();
    let work = worker.run_until(sleep(2 * MINUTE));
    work.await.unwrap();
    for run in [once, other] {
        assert_eq!(runner.status(run).await.unwrap(), Some(Status::Completed));
        check(&store, run).await;
    }
    assert_eq!(sim.ledger().total.billed, 5);
}

#[tokio::test(start_paused = true)]
async fn an_item_held_alone_by_dying_workers_fails_and_can_be_retried() {
    let (store, sim) = (Arc::new(Memory::new()), sim(1));
    let runner = Runner::new(Arc::clone(&store));
    let submit = runner.submit("ask", &ask(), [1]).max_attempts(1);
    let run = submit.await.unwrap();
    dies_with(&store, 1).await;
    let worker = worker(&store, &sim).build();
    worker.run_until(sleep(2 * MINUTE)).await.unwrap();
    let results = runner.results::<String>(run, 0, 10).await.unwrap();
    let error = results[0].error().unwrap();
    assert_eq!(error.kind(), ErrorKind::LeaseLost);
    assert!(error.message().contains("only this item"), "{error}");
    assert_eq!(sim.ledger().total.billed, 0);
    assert_eq!(runner.retry_failed(run).await.unwrap(), 1);
    assert_eq!(worker.drive(MINUTE).await.unwrap(), DriveOutcome::Done);
    assert_eq!(runner.status(run).await.unwrap(), Some(Status::Completed));
}

/// Each process of a fleet that dies when it comes to one of these inputs. Dropped, a worker dies as a process does: nothing is
/// given back, and others take its items when its lease is over.
async fn die_of(
    poison: &'static [u32],
    store: &Arc<Memory>,
    sim: &Sim,
    in_flight: usize,
) -> Vec<Duration> {
    let began = tokio::time::Instant::now();
    let mut deaths = Vec::new();
    loop {
        let dead = Arc::new(tokio::sync::Notify::new());
        let death = Arc::clone(&dead);
        let work = pipeline("work", move |cx: Context, n: u32| {
            let death = Arc::clone(&death);
            async move {
                let text = cx.generate(format!("{n}")).await?.text;
                if poison.contains(&n) {
                    death.notify_one();
                    std::future::pending::<()>().await;
                }
                Ok(text)
            }
        });
        let cx = Context::builder(sim.clone()).build();
        let worker = Worker::builder(Arc::clone(store), cx)
            .register("work", work)
            .in_flight(in_flight)
            .build();
        tokio::select! {
            done = worker.drive(120 * MINUTE) => {
                assert_eq!(done.unwrap(), DriveOutcome::Done);
                return deaths;
            }
            () = dead.notified() => deaths.push(began.elapsed()),
        }
        // Until the lease of the dead is over there may be nothing to do, and a drive is done at once.
        drop(worker);
        sleep(Duration::from_secs(31)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_item_that_ends_its_process_fails_alone_and_its_neighbours_complete() {
    for in_flight in [1, 4, 16, 64] {
        let (store, sim) = (Arc::new(Memory::new()), sim(1));
        let runner = Runner::new(Arc::clone(&store));
        let work = pipeline("work", |_cx: Context, n: u32| async move { Ok(n) });
        let run = runner.submit("work", &work, 0..100).await.unwrap();
        let deaths = die_of(&[5, 47], &store, &sim, in_flight).await;
        let results = runner.results::<String>(run, 0, 100).await.unwrap();
        for result in &results {
            let poison = [5, 47].contains(&result.index);
            assert_eq!(result.error().is_some(), poison, "{in_flight}: {result:?}");
            assert_eq!(
                result.output().is_some(),
                !poison,
                "{in_flight}: {result:?}"
            );
        }
        // Two deaths in company at most and three alone, for each of the two.
        println!("{in_flight} in flight: workers died after {deaths:?}");
        assert!((6..=10).contains(&deaths.len()), "{in_flight}: {deaths:?}");
        check(&store, run).await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_item_whose_workers_died_twice_is_run_alone() {
    let (store, sim) = (Arc::new(Memory::new()), sim(10));
    let runner = Runner::new(Arc::clone(&store));
    let running = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&running);
    let alone = Arc::new(AtomicU32::new(0));
    let was_alone = Arc::clone(&alone);
    let work = pipeline("ask", move |cx: Context, n: u32| {
        let (count, alone) = (Arc::clone(&count), Arc::clone(&was_alone));
        async move {
            let before = count.fetch_add(1, Ordering::Relaxed);
            let text = cx.generate(format!("{n}")).await;
            let after = count.fetch_sub(1, Ordering::Relaxed);
            if n < 3 && (before, after) == (0, 1) {
                alone.fetch_add(1, Ordering::Relaxed);
            }
            Ok(text?.text)
        }
    });
    let run = runner.submit("ask", &work, 0..3).await.unwrap();
    let long = Duration::from_secs(3600);
    for handling in [Handling::Normal, Handling::Few] {
        let dead = store.register("dead", long).await.unwrap();
        let claim = Claim::new(["ask"], 3).handling(handling);
        assert_eq!(store.claim(dead, claim).await.unwrap().len(), 3);
        store.heartbeat(dead, Duration::ZERO).await.unwrap();
        assert_eq!(store.reap().await.unwrap().requeued, 3);
    }
    let others = runner.submit("ask", &work, 3..900).await.unwrap();
    let cx = Context::builder(sim.clone()).build();
    let worker = Worker::builder(Arc::clone(&store), cx).register("ask", work);
    let worker = worker.in_flight(16).build();
    let began = tokio::time::Instant::now();
    assert_eq!(worker.drive(60 * MINUTE).await.unwrap(), DriveOutcome::Done);
    for run in [run, others] {
        assert_eq!(runner.status(run).await.unwrap(), Some(Status::Completed));
        check(&store, run).await;
    }
    assert_eq!(alone.load(Ordering::Relaxed), 3);
    // 57 rounds of 10 s, and the three with the time to empty the worker before each.
    let took = began.elapsed();
    assert!(took < Duration::from_secs(570 + 3 * 20 + 30), "{took:?}");
}

/// As by a supervisor that is too impatient, or a node that fails again and again: the deaths say nothing of the items.
#[tokio::test(start_paused = true)]
async fn no_item_fails_in_a_crash_loop() {
    let store = Arc::new(Memory::new());
    let sim = Sim::builder()
        .latency(Duration::from_secs(8))
        .jitter(0.5)
        .build();
    let runner = Runner::new(Arc::clone(&store));
    let run = runner.submit("ask", &ask(), 0..400).await.unwrap();
    for kill in 0..100 {
        let worker = worker(&store, &sim).in_flight(16).build();
        let life = Duration::from_secs(3 + kill % 60);
        let _ = timeout(life, worker.run_until(std::future::pending())).await;
    }
    let worker = worker(&store, &sim).build();
    let ended = worker.drive_run(run, 240 * MINUTE).await.unwrap();
    let record = runner.snapshot(run).await.unwrap().unwrap().run;
    assert_eq!(
        (ended, record.completed, record.failed),
        (DriveOutcome::Done, 400, 0)
    );
    check(&store, run).await;
}

#[tokio::test(start_paused = true)]
async fn cancelling_stops_pending_items_and_aborts_calls_in_flight() {
    let (store, sim) = (Arc::new(Memory::new()), sim(50));
    let runner = Runner::new(Arc::clone(&store));
    let run = runner.submit("ask", &ask(), 0..100).await.unwrap();
    let other = runner
        .submit("ask", &ask(), 1000..1003)
        .tenant("other")
        .await
        .unwrap();
    let worker = worker(&store, &sim).in_flight(10).build();
    let cancel = async {
        sleep(Duration::from_secs(10)).await;
        assert_eq!(sim.ledger().in_flight, 10);
        assert_eq!(runner.cancel(run).await.unwrap(), 100);
        sleep(Duration::from_secs(2)).await;
        // Its places are free again, for the other's.
        assert_eq!(sim.ledger().total.cancelled, 7);
        assert_eq!(sim.ledger().in_flight, 3);
        sleep(MINUTE).await;
    };
    worker.run_until(cancel).await.unwrap();
    let record = runner.snapshot(run).await.unwrap().unwrap().run;
    assert_eq!((record.status, record.cancelled), (Status::Cancelled, 100));
    assert_eq!(runner.status(other).await.unwrap(), Some(Status::Completed));
    assert_eq!(runner.retry_failed(run).await.unwrap(), 0);
    check(&store, run).await;
    // The calls may or may not have been paid for.
    assert_eq!(runner.ambiguous(None, 100).await.unwrap().len(), 7);
    let names = runner.ambiguous(None, 100).await.unwrap();
    runner
        .dismiss(names.iter().map(|intent| intent.name()))
        .await
        .unwrap();
    assert!(runner.ambiguous(None, 100).await.unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_was_thought_dead_is_refused_and_its_replies_are_kept() {
    let (store, sim) = (Arc::new(Counted::default()), sim(100));
    let runner = Runner::new(Arc::clone(&store));
    let run = runner.submit("ask", &ask(), 0..8).await.unwrap();
    let stale = worker(&store, &sim).lease(Duration::from_secs(30)).build();
    let stop = Arc::new(tokio::sync::Notify::new());
    let working = tokio::spawn({
        let (stale, stop) = (stale.clone(), Arc::clone(&stop));
        async move { stale.run_until(stop.notified()).await }
    });
    sleep(Duration::from_secs(10)).await;
    assert_eq!(sim.ledger().in_flight, 8);
    // Nothing is heard of it, because the store is not there for it; then others reap.
    store.set_down(true);
    sleep(Duration::from_secs(50)).await;
    store.set_down(false);
    assert_eq!(store.reap().await.unwrap().requeued, 8);
    // Its calls go on to their end: they are paid for.
    sleep(Duration::from_secs(60)).await;
    stop.notify_one();
    working.await.unwrap().unwrap();
    let stats = stale.stats();
    assert_eq!((stats.leases_lost, stats.journal.fenced), (1, 8));
    assert_eq!(stats.replies_replayed, 8);
    let ledger = sim.ledger();
    assert_eq!((ledger.total.billed, ledger.total.cancelled), (8, 0));
    assert_eq!(runner.status(run).await.unwrap(), Some(Status::Completed));
    check(&store, run).await;
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_away_for_a_while_costs_nothing() {
    let (store, sim) = (Arc::new(Counted::default()), sim(2));
    let runner = Runner::new(Arc::clone(&store));
    let run = runner.submit("ask", &ask(), 0..300).await.unwrap();
    let worker = worker(&store, &sim).in_flight(16).build();
    let outages = async {
        for _ in 0..5 {
            sleep(Duration::from_millis(4700)).await;
            store.set_down(true);
            sleep(Duration::from_secs(6)).await;
            store.set_down(false);
        }
        std::future::pending::<()>().await
    };
    let work = worker.drive(10 * MINUTE);
    tokio::select! {
        done = work => assert_eq!(done.unwrap(), DriveOutcome::Done),
        () = outages => {}
    }
    let record = runner.snapshot(run).await.unwrap().unwrap().run;
    assert_eq!((record.completed, record.failed), (300, 0));
    assert_eq!(sim.ledger().total.billed, 300);
    assert!(worker.stats().journal.failures > 0);
    check(&store, run).await;
}

#[tokio::test(start_paused = true)]
async fn a_worker_leaves_items_of_other_pipelines_to_workers_that_have_them() {
    let (store, sim) = (Arc::new(Memory::new()), sim(1));
    let runner = Runner::new(Arc::clone(&store));
    let unknown = runner
        .submit("unheard", &ask(), 0..3)
        .max_attempts(1)
        .await
        .unwrap();
    let known = runner.submit("ask", &ask(), 0..3).await.unwrap();
    let here = worker(&store, &sim).build();
    assert_eq!(here.drive(MINUTE).await.unwrap(), DriveOutcome::Done);
    assert_eq!(here.stats().claimed, 3);
    assert_eq!(runner.status(known).await.unwrap(), Some(Status::Completed));
    let record = runner.snapshot(unknown).await.unwrap().unwrap().run;
    assert_eq!(record.ended(), 0);

    let cx = Context::builder(sim.clone()).build();
    let there = Worker::builder(Arc::clone(&store), cx)
        .register("unheard", ask())
        .build();
    let began = tokio::time::Instant::now();
    assert_eq!(there.drive(MINUTE).await.unwrap(), DriveOutcome::Done);
    // At once: the other worker has not touched them.
    assert_eq!(began.elapsed(), Duration::from_secs(1));
    assert_eq!(
        runner.status(unknown).await.unwrap(),
        Some(Status::Completed)
    );
}

/// As in each rolling deploy: workers of the last release do not know the pipeline yet.
#[tokio::test(start_paused = true)]
async fn a_worker_without_the_pipeline_does_not_slow_one_with_it() {
    let (store, sim) = (Arc::new(Memory::new()), sim(1));
    let runner = Runner::new(Arc::clone(&store));
    let other = pipeline("other", |_cx: Context, n: u32| async move { Ok(n) });
    let cx = Context::builder(sim.clone()).build();
    let old = Worker::builder(Arc::clone(&store), cx).register("other", other);
    let old = old.build();
    let old = tokio::spawn(async move { old.run_until(std::future::pending()).await });
    sleep(Duration::from_secs(5)).await;
    let run = runner.submit("ask", &ask(), 0..500).await.unwrap();
    let began = tokio::time::Instant::now();
    let new = worker(&store, &sim).in_flight(16).build();
    assert_eq!(
        new.drive_run(run, 60 * MINUTE).await.unwrap(),
        DriveOutcome::Done
    );
    // 500 items of 1 s by 16.
    let took = began.elapsed();
    assert!(took < Duration::from_secs(34), "{took:?}");
    old.abort();
}

#[tokio::test(start_paused = true)]
async fn a_refused_account_stops_the_worker_and_fails_nothing() {
    let store = Arc::new(Memory::new());
    let sim = Sim::builder()
        .latency(Duration::from_secs(1))
        .insufficient_quota_after(5)
        .build();
    let runner = Runner::new(Arc::clone(&store));
    let run = runner
        .submit("ask", &ask(), 0..50)
        .max_attempts(1)
        .await
        .unwrap();
    let broke = worker(&store, &sim).in_flight(4).build();
    let error = broke.run_until(std::future::pending()).await.unwrap_err();
    assert!(error.is_account_wide(), "{error}");
    let record = runner.snapshot(run).await.unwrap().unwrap().run;
    assert_eq!(record.failed, 0);
    assert_eq!(record.completed, 5);
    let paid = self::sim(1);
    assert_eq!(
        worker(&store, &paid).build().drive(MINUTE).await.unwrap(),
        DriveOutcome::Done
    );
    let record = runner.snapshot(run).await.unwrap().unwrap().run;
    assert_eq!((record.completed, record.failed), (50, 0));
    assert_eq!(paid.ledger().total.billed, 45);
}

#[tokio::test(start_paused = true)]
async fn a_large_tenant_does_not_delay_a_small_one() {
    let (store, sim) = (Arc::new(Memory::new()), sim(1));
    let runner = Runner::new(Arc::clone(&store));
    runner
        .submit("ask", &ask(), 0..1000)
        .tenant("large")
        .await
        .unwrap();
    let worker = worker(&store, &sim).in_flight(8).build();
    let small = async {
        sleep(Duration::from_secs(20)).await;
        let small = runner
            .submit("ask", &ask(), 2000..2008)
            .tenant("small")
            .await
            .unwrap();
        let ended = runner.watch(small).try_collect::<Vec<_>>();
        let ended = timeout(Duration::from_secs(6), ended).await;
        assert!(ended.is_ok(), "{:?}", runner.snapshot(small).await);
    };
    worker.run_until(small).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn runs_are_listed_in_pages_and_purged_by_age() {
    let store = Arc::new(Memory::new());
    let runner = Runner::new(Arc::clone(&store));
    for tenant in ["a", "b", "a", "b", "a"] {
        runner
            .submit("ask", &ask(), 0..1)
            .tenant(tenant)
            .await
            .unwrap();
    }
    let page = runner.list(RunFilter::new().tenant("a"), 2).await.unwrap();
    assert_eq!(page.len(), 2);
    let last = page.last().unwrap().id;
    let rest = runner
        .list(RunFilter::new().tenant("a").before(last), 2)
        .await
        .unwrap();
    assert_eq!(rest.len(), 1);
    runner.cancel(last).await.unwrap();
    let cancelled = runner
        .list(RunFilter::new().status(Status::Cancelled), 9)
        .await
        .unwrap();
    assert_eq!(cancelled.len(), 1);
    sleep(MINUTE).await;
    assert_eq!(runner.purge(2 * MINUTE, 10).await.unwrap().runs, 0);
    assert_eq!(runner.purge(MINUTE, 10).await.unwrap().runs, 1);
    assert_eq!(runner.status(last).await.unwrap(), None);
    assert!(runner.watch(last).next().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn an_item_whose_pipeline_cancels_itself_ends() {
    let (store, sim) = (Arc::new(Memory::new()), sim(1));
    let runner = Runner::new(Arc::clone(&store));
    let attempts = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&attempts);
    let gives_up = pipeline("gives-up", move |cx: Context, n: u32| {
        count.fetch_add(1, Ordering::Relaxed);
        async move {
            cx.cancel();
            Ok(cx.generate(format!("{n}")).await?.text)
        }
    });
    let run = runner.submit("gives-up", &gives_up, 0..3).await.unwrap();
    let cx = Context::builder(sim.clone()).build();
    let worker = Worker::builder(Arc::clone(&store), cx)
        .register("gives-up", gives_up)
        .build();
    assert_eq!(worker.drive(MINUTE).await.unwrap(), DriveOutcome::Done);
    assert_eq!(runner.status(run).await.unwrap(), Some(Status::Failed));
    assert_eq!(
        (attempts.load(Ordering::Relaxed), sim.ledger().total.billed),
        (3, 0)
    );
}

#[tokio::test(start_paused = true)]
async fn an_input_of_another_type_fails_and_says_so() {
    let (store, sim) = (Arc::new(Memory::new()), sim(1));
    let new = NewRun::new("", "ask").items([NewItem::new("a", "\"not a number\"")]);
    let run = store.create_run(new).await.unwrap().run;
    assert_eq!(
        worker(&store, &sim).build().drive(MINUTE).await.unwrap(),
        DriveOutcome::Done
    );
    let result = Runner::new(store)
        .results::<String>(run, 0, 1)
        .await
        .unwrap()
        .remove(0);
    let message = result.error().unwrap().to_string();
    assert!(
        message.contains("type of this pipeline's inputs: invalid type"),
        "{message}"
    );
}

#[tokio::test(start_paused = true)]
async fn calls_in_flight_at_a_crash_follow_the_policy() {
    for policy in [AmbiguousPolicy::Retry, AmbiguousPolicy::Fail] {
        let (store, sim) = (Arc::new(Memory::new()), sim(10));
        let runner = Runner::new(Arc::clone(&store));
        let run = runner.submit("ask", &ask(), 0..6).await.unwrap();
        let dying = worker(&store, &sim).in_flight(2).build();
        // As good as a crash: two replies are in, two calls under way.
        let crash = dying.run_until(std::future::pending());
        assert!(timeout(Duration::from_secs(15), crash).await.is_err());
        assert!(runner.ambiguous(None, 10).await.unwrap().is_empty());
        sleep(MINUTE).await;
        let ambiguous = runner.ambiguous(None, 10).await.unwrap();
        assert_eq!(ambiguous.len(), 2);

        let next = worker(&store, &sim).on_ambiguous(policy).build();
        assert_eq!(next.drive(5 * MINUTE).await.unwrap(), DriveOutcome::Done);
        let record = runner.snapshot(run).await.unwrap().unwrap().run;
        let failed = if policy == AmbiguousPolicy::Fail {
            2
        } else {
            0
        };
        assert_eq!((record.completed, record.failed), (6 - failed, failed));
        if failed > 0 {
            let results = runner.results::<String>(run, 0, 10).await.unwrap();
            let mut errors = results.iter().filter_map(|result| result.error());
            assert!(errors.all(|error| error.message().contains("may have been paid for")));
            assert_eq!(runner.retry_failed(run).await.unwrap(), 2);
            assert_eq!(next.drive(5 * MINUTE).await.unwrap(), DriveOutcome::Done);
            assert_eq!(runner.status(run).await.unwrap(), Some(Status::Completed));
        }
        // They stay listed until an operator has dealt with them, for example by a retry of the failed items.
        let listed = runner.ambiguous(None, 10).await.unwrap();
        assert_eq!(listed.len(), 2 - failed as usize);
        assert!(failed > 0 || listed == ambiguous);
        let ledger = sim.ledger().total;
        assert_eq!((ledger.admitted, ledger.cancelled), (8, 2));
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_dropped_by_a_stop_is_not_sent_again_if_the_policy_is_to_fail() {
    let (store, sim) = (Arc::new(Memory::new()), sim(60));
    let runner = Runner::new(Arc::clone(&store));
    let run = runner.submit("ask", &ask(), [1]).await.unwrap();
    let patience = Duration::from_secs(5);
    let build = || {
        let worker = worker(&store, &sim).drain_for(patience);
        worker.on_ambiguous(AmbiguousPolicy::Fail).build()
    };
    build().run_until(sleep(2 * patience)).await.unwrap();
    assert_eq!(sim.ledger().total.admitted, 1);
    assert_eq!(runner.ambiguous(None, 10).await.unwrap().len(), 1);
    assert_eq!(
        build().drive(10 * MINUTE).await.unwrap(),
        DriveOutcome::Done
    );
    assert_eq!(sim.ledger().total.admitted, 1, "it was sent again");
    assert_eq!(runner.status(run).await.unwrap(), Some(Status::Failed));
    // Whoever tries it again has decided about it: it is sent, and no longer listed.
    assert_eq!(runner.retry_failed(run).await.unwrap(), 1);
    assert!(runner.ambiguous(None, 10).await.unwrap().is_empty());
    assert_eq!(
        build().drive(10 * MINUTE).await.unwrap(),
        DriveOutcome::Done
    );
    assert_eq!(runner.status(run).await.unwrap(), Some(Status::Completed));
}

#[tokio::test(start_paused = true)]
async fn many_small_runs_start_together() {
    let store = Counted::new(Memory::new()).latency(Duration::from_millis(5));
    let (store, sim) = (
        Arc::new(store),
        Sim::builder().latency(Duration::from_secs(10)).build(),
    );
    let answer = pipeline("answer", |cx: Context, user: u32| async move {
        Ok(cx.generate(format!("Answer {user}.")).await?.text)
    });
    let runner = Runner::new(Arc::clone(&store));
    for user in 0..200 {
        runner.submit("answer", &answer, [user]).await.unwrap();
    }
    let cx = Context::builder(sim.clone()).build();
    let worker = Worker::builder(store, cx).in_flight(200);
    let worker = worker.register("answer", answer).build();
    let began = tokio::time::Instant::now();
    let drive = worker.drive(Duration::from_secs(300)).await.unwrap();
    assert_eq!(
        (drive, sim.ledger().total.billed),
        (DriveOutcome::Done, 200)
    );
    // A round trip for each run, one after the other, would be a second.
    let extra = began.elapsed() - Duration::from_secs(10);
    assert!(extra < Duration::from_millis(250), "{extra:?}");
}

/// Ten pages of a book, one after the other, counted in one of three ways.
#[derive(Clone)]
struct Pages(&'static str);

impl throughline::Pipeline for Pages {
    type Input = u32;
    type Output = usize;

    fn name(&self) -> &str {
        "pages"
    }

    async fn run(&self, cx: &Context, book: u32) -> throughline::Result<usize> {
        let pages = cx.fan_out("page", 0..10).sequential();
        let work = move |cx: Context, page: u32| async move {
            Ok(cx.generate(format!("book {book} page {page}")).await?.text)
        };
        match self.0 {
            "try_all" => Ok(pages.try_all(work).await?.len()),
            "stream" => {
                // A pipeline that does not check why the stream has ended.
                let outcomes = pages.stream(work);
                let done = outcomes.filter(|outcome| std::future::ready(outcome.is_ok()));
                Ok(done.count().await)
            }
            _ => Ok(pages.settle(work).await.all()?.len()),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_shortened_batch_is_never_committed() {
    for how in ["settle", "try_all", "stream"] {
        let (store, sim) = (Arc::new(Memory::new()), sim(2));
        let runner = Runner::new(Arc::clone(&store));
        let run = runner.submit("pages", &Pages(how), 0..3).await.unwrap();
        let worker = || {
            let cx = Context::builder(sim.clone()).build();
            Worker::builder(Arc::clone(&store), cx)
                .register("pages", Pages(how))
                .build()
        };
        // A stop signal after two of the pages, and another process goes on.
        worker()
            .run_until(sleep(Duration::from_secs(5)))
            .await
            .unwrap();
        let outputs: Vec<usize> = runner.outputs(run).await.unwrap();
        assert!(outputs.is_empty(), "{how}: {outputs:?}");
        let _ = worker().drive(10 * MINUTE).await.unwrap();
        assert_eq!(
            runner.outputs::<usize>(run).await.unwrap(),
            [10; 3],
            "{how}"
        );
        assert_eq!(sim.ledger().total.billed, 30, "{how}");

        // The run's time is up in the middle.
        let late = runner.submit("pages", &Pages(how), 10..11);
        let late = late.timeout(Duration::from_secs(5)).await.unwrap();
        let drive = worker().drive_run(late, MINUTE).await.unwrap();
        assert_eq!(drive, DriveOutcome::Done);
        let record = runner.snapshot(late).await.unwrap().unwrap().run;
        assert_eq!((record.status, record.failed), (Status::Failed, 1), "{how}");
        // With `settle`, the pipeline itself says that there were too few.
        let error = record.error.unwrap();
        assert!(error.is_deadline_exceeded() || how == "settle", "{error}");
    }
}

/// A pipeline that gives up on a slow call and asks once more.
#[tokio::test(start_paused = true)]
async fn a_dropped_call_stays_listed_and_the_next_one_is_replayed() {
    let (store, calls) = (Arc::new(Memory::new()), Arc::new(AtomicU32::new(0)));
    let count = Arc::clone(&calls);
    let sim = Sim::builder()
        .latency_when("ask", Duration::from_secs(1))
        .build();
    let broken = Arc::new(AtomicBool::new(true));
    let is_broken = Arc::clone(&broken);
    let patient = pipeline("patient", move |cx: Context, n: u32| {
        let (count, broken) = (Arc::clone(&count), is_broken.load(Ordering::Relaxed));
        async move {
            for patience in [100, 10_000] {
                count.fetch_add(1, Ordering::Relaxed);
                let call = cx.generate(format!("ask {n}"));
                if let Ok(reply) = timeout(Duration::from_millis(patience), call).await {
                    let text = reply?.text;
                    return match broken {
                        true => Err(Error::other("the parser is broken")),
                        false => Ok(text),
                    };
                }
            }
            Err(Error::other("slow"))
        }
    });
    let runner = Runner::new(Arc::clone(&store));
    let run = runner.submit("patient", &patient, [1]).await.unwrap();
    let cx = Context::builder(sim.clone()).build();
    let worker = Worker::builder(Arc::clone(&store), cx)
        .register("patient", patient)
        .build();
    assert_eq!(worker.drive(MINUTE).await.unwrap(), DriveOutcome::Done);
    assert_eq!(runner.status(run).await.unwrap(), Some(Status::Failed));
    let calls_made = sim.ledger().total.admitted;
    assert_eq!(calls_made, 2);
    // The first may have been paid for.
    assert_eq!(runner.ambiguous(None, 10).await.unwrap().len(), 1);
    broken.store(false, Ordering::Relaxed);
    runner.retry_failed(run).await.unwrap();
    assert_eq!(worker.drive(MINUTE).await.unwrap(), DriveOutcome::Done);
    assert_eq!(runner.status(run).await.unwrap(), Some(Status::Completed));
    assert_eq!(sim.ledger().total.admitted, calls_made);
    assert_eq!(runner.ambiguous(None, 10).await.unwrap().len(), 1);
}
