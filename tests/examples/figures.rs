//! The figures of the examples, exact under the paused clock.
#![cfg(all(feature = "sim", feature = "structured", feature = "stages"))]

#[path = "../../examples/quality_log/log.rs"]
mod log;
#[path = "../../examples/practice_routines/practice.rs"]
mod practice;
#[path = "../../examples/coach_conversation/turn.rs"]
mod turn;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use throughline::provider::sim::SimBuilder;
use throughline::store::{Memory, Store as _};
use throughline::testing::Counted;
use throughline::{
    Context, ErrorKind, Outcome, Settled, batch::Progress, context::ParallelToggle, observe::Event,
};
use tokio::time::Instant;

use self::log::{QualityLog, class, class_row_by_row};
use self::practice::{Routine, Way, week};
use self::turn::{MESSAGES, Turn, model, turn};

const GRACE: Duration = Duration::from_millis(300);

/// The turn and its milliseconds.
async fn answered(message: &str, parallel: bool, model: SimBuilder) -> (Turn, u128) {
    let cx = Context::builder(model.build())
        .parallel(&ParallelToggle::new(parallel))
        .best_effort_grace(GRACE)
        .build();
    let began = Instant::now();
    let turn = turn(&cx, message).await.unwrap();
    (turn, began.elapsed().as_millis())
}

async fn failing(step: &str) -> (Turn, u128) {
    let model = model().fail_when(step, ErrorKind::InvalidRequest);
    answered(MESSAGES[0].1, true, model).await
}

#[tokio::test(start_paused = true)]
async fn a_conversation_takes_its_critical_path_for_every_kind_of_message() {
    let expected = [
        ("both", 3_942, 6_467, [true, true], 5),
        ("workout only", 3_942, 5_417, [true, false], 4),
        ("memory only", 3_892, 5_567, [false, true], 4),
        ("neither", 3_442, 4_367, [false, false], 3),
    ];
    for ((name, message), case) in MESSAGES.into_iter().zip(expected) {
        let (ours, fast) = answered(message, true, model()).await;
        let (theirs, slow) = answered(message, false, model()).await;
        assert_eq!(ours, theirs, "{name}: the switch changes the time alone");
        let branches = [ours.workout.is_some(), ours.memory.is_some()];
        assert_eq!((name, fast, slow, branches, ours.seen.len()), case);
    }
}

#[tokio::test(start_paused = true)]
async fn a_failed_update_fails_no_other_step() {
    let (turn, took) = failing("workout-update:").await;
    assert_eq!((turn.seen.len(), took), (4, 3_942));
    assert_eq!(turn.workout.as_deref(), Some("done: workout: the context"));
    assert!(turn.seen.iter().all(|it| !it.contains("workout-update")));
}

#[tokio::test(start_paused = true)]
async fn a_slow_update_delays_the_reply_by_its_grace_at_most() {
    for (update, delay) in [
        ("workout-update", 300),
        // The memory is ready 50 ms before the workout.
        ("memory-update", 250),
        ("acknowledgement", 300),
        ("insights-update", 300),
    ] {
        let model = model().latency_when(format!("{update}:"), Duration::from_secs(30));
        let (turn, took) = answered(MESSAGES[0].1, true, model).await;
        assert_eq!((update, turn.seen.len(), took), (update, 4, 3_942 + delay));
    }
}

#[tokio::test(start_paused = true)]
async fn a_failed_branch_does_not_lose_the_other() {
    let (turn, took) = failing("workout:").await;
    assert_eq!(took, 3_942);
    assert_eq!(turn.workout.as_deref(), Some("not available now"));
    assert_eq!(
        turn.memory.as_deref(),
        Some("done: memory: the memory-query")
    );
    let (turn, _) = failing("memory:").await;
    assert_eq!(turn.workout.as_deref(), Some("done: workout: the context"));
    assert_eq!(turn.memory.as_deref(), Some("not available now"));
}

/// A week, the calls that were paid for, and the most that were in flight.
async fn practised(way: Way, model: SimBuilder) -> (Settled<Routine>, u64, usize) {
    let sim = model.build();
    let cx = Context::builder(sim.clone()).build();
    let week = week(&cx, way, |_| {}).await;
    let ledger = sim.ledger();
    (week, ledger.total.billed, ledger.peak_in_flight)
}

#[tokio::test(start_paused = true)]
async fn a_week_of_practice_takes_the_documented_time_in_each_mode() {
    let (reference, calls, in_flight) = practised(Way::Sequential, practice::model()).await;
    assert_eq!(
        (reference.elapsed().as_secs(), calls, in_flight),
        (52, 13, 1)
    );
    let reference = reference.all().unwrap();
    for (way, most, first) in [
        (Way::Batched, 24, 9_000..=9_000),
        (Way::Parallel, 9, 9_000..=9_000),
        // Its etudes start when a quarter of the plan is there.
        (Way::Streamed, 9, 5_500..=6_100),
    ] {
        let (week, calls, _) = practised(way, practice::model()).await;
        let took = week.elapsed();
        assert!(took <= Duration::from_secs(most), "{way:?}: {took:?}");
        assert_eq!((calls, week.len()), (13, 4));
        let delivered = week.outcomes()[0].ended().as_millis();
        assert!(first.contains(&delivered), "{way:?}: {delivered}");
        assert_eq!(
            week.all().unwrap(),
            reference,
            "{way:?} changes the time alone"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn routines_are_reported_as_they_complete() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&told);
    let cx = Context::builder(practice::model().build()).build();
    let tell = move |routine: &Progress| {
        let name = routine.key.as_deref().unwrap().to_owned();
        heard.lock().unwrap().push((name, routine.elapsed));
    };
    let week = week(&cx, Way::Streamed, tell).await;
    let (names, times): (Vec<_>, Vec<_>) = told.lock().unwrap().drain(..).unzip();
    assert_eq!(names, ["scales", "chords", "rhythm", "sight-reading"]);
    let apart = |pair: &[Duration]| pair[1] - pair[0] > Duration::from_millis(800);
    assert!(times.windows(2).all(apart), "{times:?}");
    let ended: Vec<_> = week.outcomes().iter().map(Outcome::ended).collect();
    assert_eq!(ended, times);
}

#[tokio::test(start_paused = true)]
async fn a_failed_etude_leaves_eleven_and_a_partial_routine() {
    for way in practice::WAYS {
        let model = practice::model().fail_when("chords quickly", ErrorKind::InvalidRequest);
        let (week, calls, _) = practised(way, model).await;
        let routines = week.all().unwrap();
        let etudes: usize = routines.iter().map(|routine| routine.etudes.len()).sum();
        assert_eq!((etudes, calls, routines.len()), (11, 12, 4));
        let partial = |routine: &&Routine| !routine.missing.is_empty();
        let partial: Vec<_> = routines.iter().filter(partial).collect();
        assert_eq!(
            (partial.len(), &*partial[0].missing[0]),
            (1, "chords quickly")
        );
    }
}

/// Returns a context that counts the failures of its store, and a log in a store whose round trips take 75 ms.
async fn quality_log() -> (Context, Arc<AtomicU64>, Arc<Counted>, QualityLog) {
    let told = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&told);
    let cx = Context::builder(log::model())
        .on_event(move |event| {
            if matches!(event, Event::StoreFailed { .. }) {
                counter.fetch_add(1, Ordering::Relaxed);
            }
        })
        .build();
    let store = Counted::new(Memory::new()).latency(Duration::from_millis(75));
    let store = Arc::new(store);
    let log = QualityLog::open(&cx, &store).await.unwrap();
    store.forget();
    (cx, told, store, log)
}

#[tokio::test(start_paused = true)]
async fn a_class_is_noted_in_one_round_trip_in_the_background() {
    let (cx, _, store, log) = quality_log().await;
    let began = Instant::now();
    class_row_by_row(&cx, &log, &*store).await.unwrap();
    assert_eq!((began.elapsed().as_millis(), store.trips()), (8_825, 11));

    store.forget();
    let began = Instant::now();
    class(&cx, &log, 1).await.unwrap();
    assert_eq!((began.elapsed().as_millis(), store.trips()), (8_000, 0));
    log.journal.flush().await.unwrap();
    assert_eq!((store.trips(), store.largest_commit()), (1, 10));
}

#[tokio::test(start_paused = true)]
async fn many_classes_are_noted_in_few_round_trips_and_the_last_are_read_in_two() {
    let (cx, _, store, log) = quality_log().await;
    let began = Instant::now();
    let settled = cx
        .fan_out("class", 0..150)
        .join_all()
        .settle(|cx, number| {
            let log = &log;
            async move { class(&cx, log, number).await }
        })
        .await;
    // The first commit may be running; its 75 ms delay no class.
    assert_eq!(began.elapsed(), Duration::from_secs(8));
    assert_eq!(settled.oks().count(), 150);
    log.journal.flush().await.unwrap();
    // 1,500 rows, 512 to a commit.
    assert_eq!((store.trips(), store.calls("commit")), (3, 3));

    store.forget();
    let recent = log.classes.last(100).await.unwrap();
    assert_eq!(store.trips(), 2);
    // Rows are in the order in which their classes ended, and these ended together.
    let mut numbers: Vec<_> = recent.iter().map(|class| class.number).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, Vec::from_iter(50..150));
}

#[tokio::test(start_paused = true)]
async fn a_log_that_is_down_fails_no_class_and_loses_nothing() {
    let (cx, told, store, log) = quality_log().await;
    store.set_down(true);
    let began = Instant::now();
    for number in 0..3 {
        class(&cx, &log, number).await.unwrap();
    }
    assert_eq!(
        began.elapsed(),
        Duration::from_secs(24),
        "no class waits for it"
    );
    assert!(log.journal.flush().await.is_err());
    let down = log.journal.stats();
    assert!(down.failures > 0 && down.waiting == 30, "{down:?}");
    assert_eq!(told.load(Ordering::Relaxed), down.failures);

    store.set_down(false);
    log.journal.flush().await.unwrap();
    let up = log.journal.stats();
    assert_eq!((up.written, up.given_up, up.waiting), (30, 0, 0));
    assert_eq!(log.classes.last(100).await.unwrap().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_log_writes_its_pending_rows() {
    let (cx, _, store, log) = quality_log().await;
    class(&cx, &log, 7).await.unwrap();
    drop(log);
    assert_eq!(store.trips(), 0);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(store.calls("commit"), 1);
    let runs = store.runs(Default::default(), 10).await.unwrap();
    let rows: u64 = runs.iter().map(|run| run.log_seq).sum();
    assert!(rows >= 10, "{runs:?}");
}
