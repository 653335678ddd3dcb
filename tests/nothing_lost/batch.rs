//! Batches under the paused clock: how long, in what order, and what is left when it ends early.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::{FutureExt as _, StreamExt as _, stream};
use throughline::{
    Batch, Context, Error, ErrorKind, Pace, Pipeline, PipelineExt as _, Provider, Reply, Request,
    Result, Usage, async_trait, pipeline, ratelimit::Binding,
};
use tokio::time::{Instant, sleep};

const LATENCY: Duration = Duration::from_millis(100);

/// Answers after [`LATENCY`], counts what it sees, refuses prompts that say so.
#[derive(Clone, Default)]
struct Echo(Arc<Counts>);

#[derive(Default)]
struct Counts {
    sent: AtomicUsize,
    running: AtomicUsize,
    peak: AtomicUsize,
}

/// Counts a call as running until it is answered or dropped.
struct Running<'a>(&'a Counts);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl Provider for Echo {
    fn name(&self) -> &str {
        "echo"
    }

    async fn generate(&self, request: &Request) -> Result<Reply> {
        let counts = &*self.0;
        counts.sent.fetch_add(1, Ordering::SeqCst);
        let running = counts.running.fetch_add(1, Ordering::SeqCst) + 1;
        counts.peak.fetch_max(running, Ordering::SeqCst);
        let _running = Running(counts);
        sleep(LATENCY).await;
        match request.last_text() {
            "refuse" => Err(Error::new(ErrorKind::InvalidRequest, "refused")),
            text => Ok(Reply::new(text, Usage::new(1, 2))),
        }
    }
}

impl Echo {
    fn sent(&self) -> usize {
        self.0.sent.load(Ordering::SeqCst)
    }

    fn running(&self) -> usize {
        self.0.running.load(Ordering::SeqCst)
    }

    fn peak(&self) -> usize {
        self.0.peak.load(Ordering::SeqCst)
    }
}

fn setup() -> (Echo, Context) {
    let echo = Echo::default();
    (echo.clone(), Context::builder(echo).build())
}

async fn ask(cx: Context, prompt: impl ToString) -> Result<String> {
    Ok(cx.generate(prompt.to_string()).await?.text)
}

/// Runs twelve calls in the given way; says how long they took and how many ran at once.
async fn twelve(
    choose: impl FnOnce(
        Batch<Context, stream::Iter<std::ops::Range<usize>>>,
    ) -> Batch<Context, stream::Iter<std::ops::Range<usize>>>,
) -> (u128, usize) {
    let (echo, cx) = setup();
    let began = Instant::now();
    let settled = choose(cx.fan_out("n", 0..12)).settle(ask).await;
    let order: Vec<_> = settled.oks().cloned().collect();
    assert_eq!(order, (0..12).map(|n| n.to_string()).collect::<Vec<_>>());
    (began.elapsed().as_millis(), echo.peak())
}

#[tokio::test(start_paused = true)]
async fn each_parallelism_takes_its_exact_time() {
    assert_eq!(twelve(|batch| batch.join_all()).await, (100, 12));
    assert_eq!(twelve(|batch| batch.buffer_unordered(4)).await, (300, 4));
    assert_eq!(twelve(|batch| batch.buffered(4)).await, (300, 4));
    assert_eq!(twelve(|batch| batch.chunks(3)).await, (400, 3));
    assert_eq!(twelve(|batch| batch.sequential()).await, (1200, 1));
    assert_eq!(twelve(|batch| batch).await, (100, 12));
}

#[tokio::test(start_paused = true)]
async fn streams_yield_outcomes_as_they_end_or_in_input_order() {
    let delays = [300, 100, 200];
    let indices = async |ordered: bool| {
        let (_, cx) = setup();
        let batch = cx.fan_out("delay", delays);
        let batch = if ordered {
            batch.buffered(3)
        } else {
            batch.buffer_unordered(3)
        };
        let outcomes = batch.stream(|_, ms| async move {
            sleep(Duration::from_millis(ms)).await;
            Ok(())
        });
        outcomes
            .map(|outcome| outcome.index)
            .collect::<Vec<_>>()
            .await
    };
    assert_eq!(indices(false).await, [1, 2, 0]);
    assert_eq!(indices(true).await, [0, 1, 2]);
}

#[tokio::test(start_paused = true)]
async fn a_chunk_starts_after_the_slowest_item_of_the_one_before() {
    let (_, cx) = setup();
    let began = Instant::now();
    let settled = cx
        .fan_out("delay", [5, 1, 1, 1])
        .chunks(2)
        .settle(|_, s| async move {
            sleep(Duration::from_secs(s)).await;
            Ok(())
        });
    let starts: Vec<_> = settled
        .await
        .outcomes()
        .iter()
        .map(|o| o.started.as_secs())
        .collect();
    assert_eq!(starts, [0, 0, 5, 5]);
    assert_eq!(began.elapsed(), Duration::from_secs(6));
}

#[tokio::test(start_paused = true)]
async fn empty_batches_end_at_once() {
    let (echo, cx) = setup();
    let none: [u8; 0] = [];
    assert!(cx.fan_out("n", none).settle(ask).await.is_empty());
    assert_eq!(
        cx.fan_out("n", none).chunks(3).try_all(ask).await.unwrap(),
        [""; 0]
    );
    assert!(cx.fan_out("n", none).stream(ask).next().await.is_none());
    assert_eq!(echo.sent(), 0);
}

/// Invariant 2: every input ends as exactly one outcome.
#[tokio::test(start_paused = true)]
async fn every_input_has_an_outcome_whatever_happens_to_an_item() {
    let (_, cx) = setup();
    let settled = cx
        .fan_out("n", 0..20)
        .key(|n| {
            if *n == 7 {
                panic!("key")
            } else {
                format!("k{n}")
            }
        })
        .on_progress(|_| panic!("progress"))
        .buffer_unordered(4)
        .settle(|cx, n| {
            assert!(n != 3, "before the future");
            async move {
                assert!(n != 5, "inside the future");
                ask(
                    cx,
                    if n % 4 == 0 {
                        "refuse".to_owned()
                    } else {
                        n.to_string()
                    },
                )
                .await
            }
        })
        .await;
    let indices: Vec<_> = settled.outcomes().iter().map(|o| o.index).collect();
    assert_eq!(indices, (0..20).collect::<Vec<_>>());
    let kind = |n: usize| settled.outcomes()[n].error().map(Error::kind);
    for n in 0..20 {
        let expected = match n {
            3 | 5 | 7 => Some(ErrorKind::Panicked),
            n if n % 4 == 0 => Some(ErrorKind::InvalidRequest),
            _ => None,
        };
        assert_eq!(kind(n), expected, "{n}");
    }
    assert_eq!(
        settled.outcomes()[5].error().unwrap().message(),
        "inside the future"
    );
    assert_eq!(settled.outcomes()[7].key, None);
    assert_eq!(settled.outcomes()[8].key.as_deref(), Some("k8"));
    // The failure says after how many attempts, and whether it cost anything.
    let refused = &settled.outcomes()[8];
    assert_eq!(refused.error().unwrap().attempts(), 1);
    assert_eq!(refused.error().unwrap().billed(), Some(false));
    assert_eq!(refused.tally.usage, Usage::default());
    assert_eq!(settled.outcomes()[9].tally.usage, Usage::new(1, 2));
    let snapshot = cx.snapshot();
    assert_eq!((snapshot.items_done, snapshot.items_failed), (12, 8));
    assert_eq!(snapshot.observer_panics, 20);
    assert_eq!(cx.tally(), settled.tally());
}

/// Invariant 2: what is not begun any more ends too, as one outcome that says why.
#[tokio::test(start_paused = true)]
async fn a_batch_that_ends_early_loses_no_input() {
    // Items 8 to 11 are in flight at that moment.
    let midway = 5 * LATENCY / 2;
    let cases: [(_, fn(&Context), _, _); 3] = [
        (100 * LATENCY, Context::drain, 12, 0),
        (100 * LATENCY, Context::cancel, 8, 4),
        // First attempts are sent however late it is.
        (midway, |_| {}, 8, 4),
    ];
    for (timeout, end, answered, ambiguous) in cases {
        let cx = setup().1.with_timeout(timeout);
        let ending = async {
            sleep(midway).await;
            end(&cx);
        };
        let batch = cx.fan_out("n", 0..20).buffer_unordered(4).settle(ask);
        let (settled, ()) = tokio::join!(batch, ending);
        let indices = settled.outcomes().iter().map(|outcome| outcome.index);
        assert!(indices.eq(0..20));
        let errors = settled.failures().filter_map(|failed| failed.error());
        let (unknown, unpaid): (Vec<_>, Vec<_>) =
            errors.partition(|error| error.billed().is_none());
        assert_eq!(settled.oks().count(), answered);
        assert_eq!(
            (unknown.len(), unpaid.len()),
            (ambiguous, 20 - answered - ambiguous)
        );
        let why = |error: &&Error| error.is_cancelled() || error.is_deadline_exceeded();
        assert!(unknown.iter().chain(&unpaid).all(why));
    }
}

#[tokio::test(start_paused = true)]
async fn drained_items_count_as_cancelled_and_not_as_failed() {
    let (_, cx) = setup();
    let lines = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&lines);
    let batch = cx
        .fan_out("n", 0..6)
        .sequential()
        .on_progress(move |progress| told.lock().unwrap().push(progress.to_string()))
        .settle(async |item, n| {
            if n == 2 {
                cx.drain();
            }
            ask(item, n).await
        });
    let settled = batch.await;
    assert_eq!((settled.oks().count(), settled.failures().count()), (2, 4));
    let snapshot = cx.snapshot();
    assert_eq!(snapshot.items_done, 2);
    assert_eq!((snapshot.items_failed, snapshot.items_cancelled), (0, 4));
    assert_eq!((snapshot.items_ended(), snapshot.items_running()), (6, 0));
    let last = lines.lock().unwrap().pop().unwrap();
    assert_eq!(last, "n: 2 of 6 done, 4 cancelled, 200.0ms");
}

#[tokio::test(start_paused = true)]
async fn an_async_closure_borrows_nests_and_runs_in_a_spawned_task() {
    let (_, cx) = setup();
    let week = async move {
        let template = String::from("Describe");
        cx.fan_out("routine", ["scales".to_owned(), "chords".to_owned()])
            .settle(async |cx, routine| {
                let etudes = cx.fan_out("etude", ["slowly", "quickly"]);
                let etudes = etudes
                    .settle(async |cx, how| {
                        let prompt = format!("{template} {routine} {how}");
                        Ok(cx.generate(prompt).await?.text)
                    })
                    .await;
                Ok((routine, etudes.all()?))
            })
            .await
            .all()
    };
    let week = tokio::spawn(week).await.unwrap().unwrap();
    assert_eq!(week[1].0, "chords");
    assert_eq!(week[1].1[1], "Describe chords quickly");
}

#[tokio::test(start_paused = true)]
async fn the_summary_names_the_failures() {
    let (_, cx) = setup();
    let prompts = ["a", "refuse", "b", "refuse"];
    let settled = cx
        .fan_out("p", prompts)
        .key(|p| format!("<{p}>"))
        .settle(ask)
        .await;
    assert_eq!(
        settled.to_string(),
        "2 of 4 succeeded in 100.0ms; 2 invalid_request (first: <refuse>: request refused: refused)"
    );
    let json = serde_json::to_string(&settled).unwrap();
    let back: throughline::Settled<String> = serde_json::from_str(&json).unwrap();
    assert_eq!(back.to_string(), settled.to_string());
    let error = settled.at_least(3).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooFew);
    let source = std::error::Error::source(&error).unwrap();
    assert_eq!(source.to_string(), "request refused: refused");
}

#[tokio::test(start_paused = true)]
async fn try_all_stops_sending_at_the_first_failure_and_waits_for_calls_in_flight() {
    let (echo, cx) = setup();
    let finished = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&finished);
    let prompts = (0..100).map(|n| {
        if n == 1 {
            "refuse".to_owned()
        } else {
            n.to_string()
        }
    });
    let result = cx
        .fan_out("p", prompts)
        .buffer_unordered(4)
        .try_all(move |cx, prompt| {
            let count = Arc::clone(&count);
            async move {
                let first = ask(cx.clone(), prompt).await?;
                count.fetch_add(1, Ordering::SeqCst);
                ask(cx, first).await
            }
        })
        .await;
    assert_eq!(result.unwrap_err().kind(), ErrorKind::InvalidRequest);
    assert_eq!(echo.running(), 0);
    // The first four were sent together; at most what they had already begun came after.
    assert!(echo.sent() <= 5, "{} sent", echo.sent());
    assert_eq!(finished.load(Ordering::SeqCst), 3);
    assert!(!cx.is_draining(), "only the batch drains");
    let all = cx.fan_out("p", ["a", "b"]).try_all(ask).await;
    assert_eq!(all.unwrap(), ["a", "b"]);
}

/// The time that a context has, how it is ended before, and the kind of the error.
type Cut = (Duration, fn(&Context), ErrorKind);

/// How the inputs of a batch come to be left: the context drains, is cancelled, or meets its deadline.
const CUTS: [Cut; 3] = [
    (
        Duration::from_secs(100),
        Context::drain,
        ErrorKind::Cancelled,
    ),
    (
        Duration::from_secs(100),
        Context::cancel,
        ErrorKind::Cancelled,
    ),
    (
        Duration::from_millis(250),
        |_| {},
        ErrorKind::DeadlineExceeded,
    ),
];

#[tokio::test(start_paused = true)]
async fn try_all_never_returns_fewer_values_than_inputs() {
    for (timeout, end, kind) in CUTS {
        // Items that do not notice the end, and inputs that come slowly.
        let work = |_: Context, n: u32| async move {
            sleep(LATENCY).await;
            Ok(n)
        };
        let cx = setup().1.with_timeout(timeout);
        let slow = stream::iter(0..10).then(|n| sleep(LATENCY).map(move |()| n));
        let (cut, slowly, ()) = tokio::join!(
            cx.fan_out("n", 0..10).sequential().try_all(work),
            cx.fan_out("n", slow.boxed()).try_all(work),
            async {
                sleep(Duration::from_millis(250)).await;
                end(&cx);
            }
        );
        for error in [cut.unwrap_err(), slowly.unwrap_err()] {
            assert_eq!(error.kind(), kind);
            let message = error.message();
            assert!(message.contains("left the others"), "{message}");
        }

        // With all of its inputs taken, it ends well.
        let cx = setup().1.with_timeout(timeout);
        let (whole, ()) = tokio::join!(cx.fan_out("n", 0..1).sequential().try_all(work), async {
            sleep(LATENCY / 2).await;
            cx.drain();
        });
        assert_eq!(whole.unwrap(), [0]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_of_outcomes_reports_that_it_was_cut_short() {
    for (timeout, end, kind) in CUTS {
        let cx = setup().1.with_timeout(timeout);
        let mut outcomes = cx
            .fan_out("n", 0..10)
            .sequential()
            .stream(|_, n| async move {
                sleep(LATENCY).await;
                Ok(n)
            });
        assert!(outcomes.next().await.unwrap().is_ok());
        assert!(outcomes.cut_short().is_none(), "it has not ended");
        sleep(Duration::from_millis(160)).await;
        end(&cx);
        assert!(outcomes.by_ref().count().await < 9);
        let why = outcomes.cut_short().expect("inputs were left");
        assert_eq!(why.kind(), kind);
    }
    let (_, cx) = setup();
    let mut outcomes = cx.fan_out("n", 0..10).stream(ask);
    assert_eq!(outcomes.by_ref().count().await, 10);
    assert!(outcomes.cut_short().is_none());
}

#[test]
fn a_stream_reports_that_its_runtime_has_shut_down() {
    let runtime = || {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(1).enable_all().build().unwrap()
    };
    let (ours, theirs) = (runtime(), runtime());
    let (_, cx) = setup();
    let (mut outcomes, mut deltas) = {
        let _in = theirs.enter();
        let batch = cx.fan_out("n", 0..1_000).sequential();
        (batch.stream(ask), cx.stream("a"))
    };
    let first = ours.block_on(outcomes.next()).unwrap();
    assert!(first.is_ok());
    // Its call starts in their runtime, too.
    let pending = {
        let _in = theirs.enter();
        deltas.next().now_or_never()
    };
    assert!(pending.is_none());
    theirs.shutdown_background();
    assert!(ours.block_on(outcomes.by_ref().count()) < 999);
    assert!(outcomes.cut_short().is_some_and(Error::is_cancelled));
    let last = ours.block_on(deltas.next()).unwrap();
    assert!(last.unwrap_err().is_cancelled());
    assert!(ours.block_on(deltas.next()).is_none());
}

#[tokio::test(start_paused = true)]
async fn the_failure_of_try_all_names_its_item() {
    let (_, cx) = setup();
    let weeks = cx.child("plan").fan_out("week", 0..2).sequential();
    let error = weeks.try_all(|cx, week| async move {
        let days = cx.with_priority(throughline::ratelimit::Priority::Low);
        let days = days
            .fan_out("day", ["mon", "refuse"])
            .key(|day| day.to_string());
        days.try_all(|cx, day| ask(cx, if week == 1 { day } else { "fine" }))
            .await
    });
    let error = error.await.unwrap_err();
    assert_eq!(error.item(), Some("plan/week[1]/day[refuse]"));
    assert_eq!(
        error.to_string(),
        "plan/week[1]/day[refuse]: request refused: refused"
    );
    let json = serde_json::to_string(&error).unwrap();
    let back: Error = serde_json::from_str(&json).unwrap();
    assert_eq!(back.to_string(), error.to_string());
}

#[tokio::test(start_paused = true)]
async fn cancelling_a_context_affects_neither_its_parent_nor_its_siblings() {
    use throughline::ratelimit::{Priority, Tenant};
    let narrowings: [fn(&Context) -> Context; 6] = [
        |cx| cx.child("a"),
        |cx| cx.with_tenant(Tenant::new("acme", 1)),
        |cx| cx.with_priority(Priority::Low),
        |cx| cx.with_timeout(Duration::from_secs(60)),
        |cx| cx.with_deadline(Instant::now() + Duration::from_secs(60)),
        Context::fresh,
    ];
    for narrow in narrowings {
        for end in [Context::cancel, Context::drain] {
            let (_, cx) = setup();
            let (ended, other) = (narrow(&cx), narrow(&cx));
            let waiting = other.child("below");
            let (answer, ()) = tokio::join!(ask(waiting, "a"), async { end(&ended) });
            answer.unwrap();
            assert!(ask(ended.clone(), "a").await.unwrap_err().is_cancelled());
            assert!(ended.is_draining() && !cx.is_draining() && !other.is_draining());
            ask(cx, "a").await.unwrap();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_item_that_cancels_its_context_cancels_only_itself() {
    for end in [Context::cancel, Context::drain] {
        let (_, cx) = setup();
        let work = move |cx: Context, n: u32| async move {
            if n == 1 {
                end(&cx);
            }
            ask(cx, n).await
        };
        let settled = cx.fan_out("n", 0..4).settle(work).await;
        let failed: Vec<_> = settled.failures().map(|outcome| outcome.index).collect();
        assert_eq!(failed, [1]);
        assert!(!cx.is_draining());
        // The failure of an item is that of `try_all`, and ends the batch.
        let error = cx.fan_out("n", 0..4).try_all(work).await.unwrap_err();
        assert_eq!(error.item(), Some("n[1]"));
        assert!(!cx.is_draining());
    }
}

#[tokio::test(start_paused = true)]
async fn cancelling_the_context_of_a_batch_cancels_all_of_its_items() {
    let (echo, cx) = setup();
    let batch = cx.child("batch");
    let settle = batch.fan_out("n", 0..4).settle(|cx, n| async move {
        let inner = cx.with_priority(throughline::ratelimit::Priority::Low);
        ask(inner.child("call"), n).await
    });
    let (settled, ()) = tokio::join!(settle, async {
        sleep(LATENCY / 2).await;
        batch.cancel();
    });
    assert_eq!(settled.failures().count(), 4);
    assert_eq!((echo.sent(), echo.running()), (4, 0));
}

/// Runs `work` beside a task that counts how often it gets its turn.
async fn turns_beside<T>(work: impl Future<Output = T>) -> usize {
    let turns = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&turns);
    let other = tokio::spawn(async move {
        loop {
            count.fetch_add(1, Ordering::Relaxed);
            tokio::task::yield_now().await;
        }
    });
    work.await;
    other.abort();
    turns.load(Ordering::Relaxed)
}

#[tokio::test(start_paused = true)]
async fn batches_over_ready_items_let_other_tasks_run() {
    const ITEMS: u32 = 10_000;
    let (_, cx) = setup();
    let ready = |_, n: u32| async move { Ok(n) };
    let batch = || cx.fan_out("n", 0..ITEMS);
    let drained = cx.child("drained");
    drained.drain();
    for turns in [
        turns_beside(batch().settle(ready)).await,
        turns_beside(batch().join_all().settle(ready)).await,
        turns_beside(batch().buffered(8).settle(ready)).await,
        turns_beside(batch().chunks(8).try_all(ready)).await,
        turns_beside(batch().join_all().stream(ready).count()).await,
        turns_beside(drained.fan_out("n", 0..ITEMS).settle(ask)).await,
    ] {
        // Tokio lets a task do 128 things at a time.
        assert!(turns >= ITEMS as usize / 128, "{turns}");
    }
}

#[tokio::test(start_paused = true)]
async fn items_of_a_dropped_batch_are_not_running() {
    let (_, cx) = setup();
    let settle = cx.fan_out("n", 0..100).settle(ask);
    let dropped = tokio::time::timeout(LATENCY / 2, settle).await;
    assert!(dropped.is_err());
    let snapshot = cx.snapshot();
    assert_eq!((snapshot.items_started, snapshot.items_dropped), (64, 64));
    assert_eq!(snapshot.items_running(), 0);

    let mut outcomes = cx.fan_out("n", 0..10).stream(ask);
    outcomes.next().await.unwrap();
    assert_eq!(cx.snapshot().items_running(), 0);
    let sleeping = cx.fan_out("n", 0..10).stream(|_, _| async move {
        sleep(Duration::from_secs(3600)).await;
        Ok(())
    });
    sleep(LATENCY).await;
    assert_eq!(cx.snapshot().items_running(), 10);
    drop(sleeping);
    tokio::task::yield_now().await;
    assert_eq!(cx.snapshot().items_running(), 0);
}

#[tokio::test(start_paused = true)]
async fn requests_that_were_never_sent_do_not_count_as_calls() {
    let pace = throughline::Pace::unlimited().in_flight(4);
    let cx = Context::builder(Echo::default()).pace(pace).build();
    let work = cx.fan_out("n", 0..20).settle(ask);
    let (settled, ()) = tokio::join!(work, async {
        sleep(LATENCY / 2).await;
        cx.drain();
    });
    let tally = settled.tally();
    assert_eq!((tally.calls, tally.attempts, tally.unsent), (4, 4, 16));
    assert_eq!(tally.to_string(), "4 calls, 16 unsent, 4 + 8 tokens");
}

/// In a thread with a small stack: one that overflows ends the process.
#[test]
fn a_long_chain_of_contexts_does_not_overflow_the_stack() {
    let chain = || {
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let (_, mut cx) = setup();
            let first = cx.clone();
            for _ in 0..20_000 {
                cx = cx.child("turn");
            }
            let (answer, ()) = tokio::join!(ask(cx.clone(), "a"), sleep(LATENCY / 2));
            answer.unwrap();
            assert_eq!(cx.path().len(), "turn/".len() * 20_000 - 1);
            first.cancel();
            assert!(cx.is_cancelled());
        });
    };
    let thread = std::thread::Builder::new().stack_size(512 << 10);
    thread.spawn(chain).unwrap().join().unwrap();
}

/// Invariant 5: dropping a future or stream sends nothing more.
#[tokio::test(start_paused = true)]
async fn a_dropped_batch_sends_no_further_call() {
    let (echo, cx) = setup();
    let batch = cx.fan_out("n", 0..100).buffer_unordered(4).settle(ask);
    assert!(
        tokio::time::timeout(Duration::from_millis(150), batch)
            .await
            .is_err()
    );
    assert_eq!((echo.sent(), echo.running()), (8, 0));

    let mut outcomes = cx.fan_out("n", 0..100).buffer_unordered(4).stream(ask);
    assert!(outcomes.next().await.is_some());
    drop(outcomes);
    let sent = echo.sent();
    sleep(Duration::from_secs(10)).await;
    assert_eq!((echo.sent(), echo.running()), (sent, 0));
    assert_eq!(cx.snapshot().lane.in_flight, 0);
}

/// Invariant 7: a slow consumer never stalls calls in flight.
#[tokio::test(start_paused = true)]
async fn calls_in_flight_go_on_while_the_consumer_sleeps() {
    let (echo, cx) = setup();
    let mut outcomes = cx.fan_out("n", 0..100).buffer_unordered(4).stream(ask);
    assert!(outcomes.next().await.is_some());
    sleep(Duration::from_secs(60)).await;
    assert_eq!(echo.running(), 0, "nothing hangs half done");
    // Invariant 4: and it has not run ahead either: 2n, and the one that was taken.
    assert_eq!(echo.sent(), 9);
    assert_eq!(outcomes.count().await, 99);
    assert_eq!(echo.peak(), 4);
}

/// Invariant 4: inputs are taken when there is room for them.
#[tokio::test(start_paused = true)]
async fn inputs_are_taken_lazily() {
    for chunks in [false, true] {
        let (_, cx) = setup();
        let taken = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&taken);
        let inputs = (0..).inspect(move |_| {
            count.fetch_add(1, Ordering::SeqCst);
        });
        let batch = cx.fan_out("n", inputs);
        let batch = if chunks {
            batch.chunks(10)
        } else {
            batch.buffer_unordered(10)
        };
        let mut outcomes = batch.stream(ask);
        for n in 1..=50 {
            // Long enough for everything that may start to start.
            sleep(Duration::from_secs(1)).await;
            outcomes.next().await.unwrap();
            let ahead = taken.load(Ordering::SeqCst) - n;
            assert!(ahead <= 21, "{ahead} taken ahead of the consumer");
        }
    }
}

/// Invariant 6: items hold no permits, so nested fan-outs cannot deadlock.
#[tokio::test(start_paused = true)]
async fn nested_fan_outs_share_one_slot() {
    let echo = Echo::default();
    let pace = throughline::Pace::unlimited().in_flight(1);
    let cx = Context::builder(echo.clone()).pace(pace).build();
    let began = Instant::now();
    let settled = cx
        .fan_out("outer", 0..3)
        .join_all()
        .settle(|cx, outer| async move {
            let inner = cx.fan_out("inner", 0..3).join_all();
            let inner = inner
                .settle(move |cx, inner| ask(cx, format!("{outer}.{inner}")))
                .await;
            ask(cx, inner.all()?.join(" ")).await
        });
    let settled = tokio::time::timeout(Duration::from_secs(3600), settled).await;
    let values = settled.expect("no deadlock").all().unwrap();
    assert_eq!(values[2], "2.0 2.1 2.2");
    assert_eq!(echo.peak(), 1);
    assert_eq!(began.elapsed(), 12 * LATENCY);
}

#[tokio::test(start_paused = true)]
async fn streams_of_inputs_start_work_as_they_arrive() {
    let (_, cx) = setup();
    let arriving = stream::unfold(0, |n| async move {
        (n < 4).then_some(())?;
        sleep(Duration::from_secs(1)).await;
        Some((n, n + 1))
    });
    let settled = cx
        .fan_out("n", arriving.boxed())
        .join_all()
        .settle(ask)
        .await;
    let starts: Vec<_> = settled
        .outcomes()
        .iter()
        .map(|o| o.started.as_secs())
        .collect();
    assert_eq!(starts, [1, 2, 3, 4]);
    assert_eq!(settled.elapsed(), Duration::from_millis(4100));
}

#[tokio::test(start_paused = true)]
async fn a_panic_of_the_inputs_is_not_caught() {
    let (_, cx) = setup();
    let inputs = || (0..10).inspect(|n| assert!(*n != 2, "inputs"));
    let stream = cx.fan_out("n", inputs()).sequential().stream(ask);
    let panic = std::panic::AssertUnwindSafe(stream.count())
        .catch_unwind()
        .await;
    let message = panic.unwrap_err();
    assert_eq!(message.downcast_ref::<&str>(), Some(&"inputs"));

    let settle = cx.fan_out("n", inputs()).sequential().settle(ask);
    let panic = std::panic::AssertUnwindSafe(settle).catch_unwind().await;
    assert_eq!(panic.err().unwrap().downcast_ref::<&str>(), Some(&"inputs"));
}

#[test]
fn a_parallelism_of_zero_panics() {
    let (_, cx) = setup();
    for choose in [
        |batch: Batch<Context, stream::Iter<_>>| drop(batch.buffered(0)),
        |batch: Batch<Context, stream::Iter<_>>| drop(batch.buffer_unordered(0)),
        |batch: Batch<Context, stream::Iter<_>>| drop(batch.chunks(0)),
    ] {
        let batch = cx.fan_out("n", [1].into_iter());
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| choose(batch)));
        let message = *panic.unwrap_err().downcast::<&str>().unwrap();
        assert!(message.contains("no item would ever run"), "{message}");
    }
}

#[tokio::test(start_paused = true)]
async fn progress_is_reported_after_each_item() {
    let (_, cx) = setup();
    let lines = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&lines);
    let settled = cx
        .fan_out("river", ["Po", "refuse", "Rhine"])
        .sequential()
        .on_progress(move |progress| sink.lock().unwrap().push(progress.to_string()))
        .settle(ask);
    assert_eq!(settled.await.failures().count(), 1);
    assert_eq!(
        *lines.lock().unwrap(),
        [
            "river: 1 of 3 done, 100.0ms",
            "river: 1 of 3 done, 1 failed, 200.0ms",
            "river: 2 of 3 done, 1 failed, 300.0ms"
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn events_contain_the_path_of_the_item() {
    let echo = Echo::default();
    let paths = Arc::new(Mutex::new(BTreeSet::new()));
    let sink = Arc::clone(&paths);
    let cx = Context::builder(echo)
        .on_event(move |event| {
            sink.lock().unwrap().insert(event.to_string());
        })
        .build();
    let outer = cx
        .child("week")
        .fan_out("plan", ["a"])
        .key(|k| k.to_string());
    let settled =
        outer.settle(|cx, _| async move { cx.fan_out("etude", ["x"]).settle(ask).await.all() });
    settled.await.all().unwrap();
    let expected = [
        "week/plan[a]/etude[0]: call 1 answered in 100.0ms, 1 + 2 tokens",
        "week/plan[a]/etude[0]: call 1 sent",
        "week/plan[a]/etude[0]: done in 100.0ms",
        "week/plan[a]: done in 100.0ms",
    ];
    assert_eq!(*paths.lock().unwrap(), expected.map(str::to_owned).into());
}

struct Shout;

impl Pipeline for Shout {
    type Input = String;
    type Output = String;

    fn name(&self) -> &str {
        "shout"
    }

    async fn run(&self, cx: &Context, text: String) -> Result<String> {
        Ok(ask(cx.clone(), text).await?.to_uppercase())
    }
}

#[tokio::test(start_paused = true)]
async fn pipelines_batch_by_value_by_reference_and_shared() {
    let (_, cx) = setup();
    let texts = || ["a".to_owned(), "b".to_owned()];
    let shout = Arc::new(Shout);
    assert_eq!(
        (&*shout).batch(texts()).settle(&cx).await.all().unwrap(),
        ["A", "B"]
    );
    assert_eq!(
        Arc::clone(&shout).batch(texts()).stream(&cx).count().await,
        2
    );
    assert_eq!(
        Shout.boxed().batch(texts()).try_all(&cx).await.unwrap(),
        ["A", "B"]
    );
}

#[tokio::test(start_paused = true)]
async fn adapters_chain_map_fall_back_and_time_out() {
    let (_, cx) = setup();
    let slow = Arc::new(pipeline("slow", |cx: Context, text: String| async move {
        sleep(Duration::from_secs(5)).await;
        ask(cx, text).await
    }));
    let chain = Shout
        .then(pipeline(
            "len",
            |_, text: String| async move { Ok(text.len()) },
        ))
        .map(|n| n * 2);
    assert_eq!(chain.name(), "shout>len");
    assert_eq!(chain.run(&cx, "abc".into()).await.unwrap(), 6);

    let began = Instant::now();
    let timed = Arc::clone(&slow).timeout(Duration::from_secs(1));
    let error = timed.run(&cx, "a".into()).await.unwrap_err();
    assert!(
        error.is_deadline_exceeded() && error.billed() == Some(false),
        "{error:?}"
    );
    assert_eq!(began.elapsed(), Duration::from_secs(1));

    let fallback = Arc::clone(&slow)
        .timeout(Duration::from_secs(1))
        .or_else(Shout)
        .boxed();
    assert_eq!(fallback.run(&cx, "a".into()).await.unwrap(), "A");

    let cancelled = cx.child("cancelled");
    cancelled.cancel();
    let guarded = Shout.or_else(pipeline("never", |_, _| async move {
        panic!("a cancelled context needs no fallback")
    }));
    let error = guarded.run(&cancelled, "a".into()).await.unwrap_err();
    assert!(error.is_cancelled() && error.billed() == Some(false));
}

/// Returns the limiting factors of `batch` in their order, read in each quarter of the latency.
async fn limiting_factors<O: std::fmt::Debug>(
    cx: &Context,
    batch: impl Future<Output = O>,
) -> Vec<Binding> {
    let mut batch = std::pin::pin!(batch);
    let mut factors = Vec::new();
    while tokio::time::timeout(LATENCY / 4, batch.as_mut())
        .await
        .is_err()
    {
        factors.push(cx.snapshot().lane.binding);
    }
    factors.dedup();
    factors
}

#[tokio::test(start_paused = true)]
async fn open_items_are_the_limiting_factor_until_the_last_input_is_taken() {
    use Binding::{Nothing, OpenItems};
    let cx = Context::builder(Echo::default()).build();
    let work = async |cx: Context, n: usize| cx.generate(format!("{n}")).await;
    let by_default = limiting_factors(&cx, cx.fan_out("n", 0..3 * 64).settle(work));
    // While the last 64 items run, no input is left.
    assert_eq!(by_default.await, [OpenItems, Nothing]);

    let all = limiting_factors(&cx, cx.fan_out("n", 0..192).join_all().settle(work));
    assert_eq!(all.await, [Nothing]);
    let chunks = cx.fan_out("n", 0..8).chunks(4).settle(work);
    assert_eq!(limiting_factors(&cx, chunks).await, [OpenItems, Nothing]);
    assert_eq!(cx.snapshot().lane.binding, Nothing);
}

#[tokio::test(start_paused = true)]
async fn a_limit_of_the_lane_takes_precedence_over_open_items_and_a_dropped_batch_does_not_count() {
    let cx = Context::builder(Echo::default())
        .pace(Pace::unlimited().in_flight(2))
        .build();
    let work = async |cx: Context, n: usize| cx.generate(format!("{n}")).await;
    let mut batch = Box::pin(cx.fan_out("n", 0..192).settle(work));
    assert!(tokio::time::timeout(LATENCY / 2, &mut batch).await.is_err());
    assert_eq!(cx.snapshot().lane.binding, Binding::InFlight);
    drop(batch);
    assert_eq!(cx.snapshot().lane.binding, Binding::Nothing);
}
