//! Computes the times of five real systems: as they were, after an optimisation of their own, on the critical path, and
//! with this crate.
//!
//! ```sh
//! cargo bench --bench cases --all-features
//! ```
//!
//! Tokio's clock is paused, so the figures depend on the latencies alone and are the same on any machine. Stores take
//! 5 ms for a round trip unless the case says otherwise. `benches/store.rs` and `benches/lane.rs` measure CPU time.

#[path = "../examples/quality_log/log.rs"]
#[allow(dead_code)] // This bench uses only a part of the examples' modules.
mod log;
#[path = "../examples/practice_routines/practice.rs"]
#[allow(dead_code)]
mod practice;
#[path = "../examples/coach_conversation/turn.rs"]
#[allow(dead_code)]
mod turn;

use std::sync::Arc;
use std::time::Duration;

use throughline::store::Memory;
use throughline::testing::Counted;
use throughline::{
    Context, Pace, Result, Runner, Sim, Worker, context::ParallelToggle, pipeline,
    runs::DriveOutcome,
};
use tokio::time::Instant;

const HEAD: [&str; 5] = ["", "original", "optimised", "critical path", "throughline"];

fn row(cells: [&str; 5]) {
    let [what, before, after, path, ours] = cells;
    println!("{what:42}  {before:>16}  {after:>16}  {path:>14}  {ours:>14}");
}

fn seconds(time: Duration) -> String {
    format!("{:.3} s", time.as_secs_f64())
}

fn counted(latency_ms: u64) -> Arc<Counted> {
    Arc::new(Counted::new(Memory::new()).latency(Duration::from_millis(latency_ms)))
}

#[tokio::main(flavor = "current_thread", start_paused = true)]
async fn main() -> Result<()> {
    row(HEAD);
    practice_routines().await?;
    background_programs().await?;
    quality_log().await?;
    conversation().await?;
    card_stories().await
}

async fn practice_routines() -> Result<()> {
    println!("1 practice routines: 13 calls of 3 to 5 s");
    for (way, path) in practice::WAYS
        .into_iter()
        .zip(["52.000 s", "24.000 s", "9.000 s", "9.000 s"])
    {
        let cx = Context::builder(practice::model().build()).build();
        let week = practice::week(&cx, way, |_| {}).await;
        let (first, all) = (seconds(week.outcomes()[0].ended()), seconds(week.elapsed()));
        week.all()?;
        let what = format!("{way:?}").to_lowercase();
        row([
            &format!("  {what}, all four routines"),
            "40 to 60 s",
            "15 to 20 s",
            path,
            &all,
        ]);
        row([
            &format!("  {what}, the first routine"),
            "as all",
            "as all",
            "",
            &first,
        ]);
    }
    Ok(())
}

/// Gather, analyse, generate, validate: four calls of 10 s.
async fn program(cx: Context, user: u32) -> Result<String> {
    let mut known = format!("user {user}");
    for step in ["gather", "analyse", "generate", "validate"] {
        known = cx
            .child(step)
            .generate(format!("{step}: {known}"))
            .await?
            .text;
    }
    Ok(known)
}

async fn background_programs() -> Result<()> {
    println!("2 training programs: a chain of 40 s, 200 users at once, a store of 5 ms");
    let store = counted(5);
    let runner = Runner::new(Arc::clone(&store));
    let program = pipeline("program", program);
    let began = Instant::now();
    runner.submit("program", &program, [0]).await?;
    let ours = format!("{} ms, {} trip", began.elapsed().as_millis(), store.trips());
    row([
        "  submit returns",
        "30 to 60 s",
        "< 1 s",
        "5 ms, 1 trip",
        &ours,
    ]);

    for user in 1..200 {
        runner.submit("program", &program, [user]).await?;
    }
    let sim = Sim::builder().latency(Duration::from_secs(10)).build();
    let cx = Context::builder(sim.clone()).build();
    let worker = Worker::builder(store, cx)
        .in_flight(200)
        .register("program", program)
        .build();
    let began = Instant::now();
    let done = worker.drive(Duration::from_secs(300)).await? == DriveOutcome::Done;
    assert!(
        done && worker.stats().completed == 200,
        "{:?}",
        worker.stats()
    );
    row([
        "  200 programs, submitted and awaiting",
        "",
        "",
        "40.000 s",
        &seconds(began.elapsed()),
    ]);
    let paid = sim.ledger().total.billed.to_string();
    row(["  paid calls", "", "", "800", &paid]);
    Ok(())
}

async fn quality_log() -> Result<()> {
    println!("3 quality log: 9 movements and a summary for each class, a store of 75 ms");
    let store = counted(75);
    let cx = Context::builder(log::model()).build();
    let log = log::QualityLog::open(&cx, &store).await?;
    let added = |began: Instant| format!("{} ms", began.elapsed().as_millis() - 8_000);

    let began = Instant::now();
    log::class_row_by_row(&cx, &log, &*store).await?;
    row([
        "  row by row, added to a class",
        "510 to 1,520 ms",
        "",
        "",
        &added(began),
    ]);
    store.forget();
    let began = Instant::now();
    log::class(&cx, &log, 1).await?;
    row([
        "  added to a class",
        "510 to 1,520 ms",
        "~0 ms",
        "0 ms",
        &added(began),
    ]);
    log.journal.flush().await?;
    row([
        "  round trips to write a class",
        "10",
        "2",
        "1",
        &store.trips().to_string(),
    ]);
    store.forget();
    let classes = cx.fan_out("class", 0..100).join_all();
    classes
        .settle(|cx, n| {
            let log = &log;
            async move { log::class(&cx, log, n).await }
        })
        .await
        .all()?;
    log.journal.flush().await?;
    row([
        "  round trips to write 100 classes",
        "1,000",
        "200",
        "4",
        &store.trips().to_string(),
    ]);
    Ok(())
}

async fn conversation() -> Result<()> {
    println!("4 coach conversation: until the answer has ended");
    let original = [
        ["6,467 ms", "4,092 ms", "3,942 ms"],
        ["", "", "3,942 ms"],
        ["", "", "3,892 ms"],
        ["", "", "3,442 ms"],
    ];
    let parallel = ParallelToggle::new(true);
    let grace = Duration::from_millis(300);
    let cx = Context::builder(turn::model().build());
    let cx = cx.parallel(&parallel).best_effort_grace(grace).build();
    for ((name, message), [before, after, path]) in turn::MESSAGES.into_iter().zip(original) {
        let began = Instant::now();
        turn::turn(&cx, message).await?;
        let took = began.elapsed();
        row([
            &format!("  {name}"),
            before,
            after,
            path,
            &format!("{} ms", took.as_millis()),
        ]);
    }
    parallel.set(false);
    let began = Instant::now();
    turn::turn(&cx, turn::MESSAGES[0].1).await?;
    let took = began.elapsed();
    row([
        "  both, sequential",
        "6,467 ms",
        "",
        "",
        &format!("{} ms", took.as_millis()),
    ]);
    Ok(())
}

async fn card_stories() -> Result<()> {
    println!(
        "5 stories of cards: 200 calls of 1 s, 3 in flight, budgets of 300 s; the provider allows 10 in flight and 40,000 tokens/min"
    );
    let modes = [
        ("safe", Pace::safe(), "399.000 s"),
        ("normal", Pace::normal(), "200.000 s"),
        ("fast", Pace::fast(), "100.500 s"),
    ];
    for (name, pace, path) in modes {
        let store = counted(5);
        let runner = Runner::new(Arc::clone(&store));
        let story = pipeline("story", |cx: Context, card: u32| async move {
            Ok(cx
                .generate(format!("Tell the story of card {card}."))
                .await?
                .text)
        });
        let run = runner.submit("story", &story, 0..200).await?;
        if name == "safe" {
            row([
                "  round trips to create 200",
                "200",
                "20 to 40",
                "1",
                &store.trips().to_string(),
            ]);
        }
        let sim = Sim::builder()
            .in_flight(10)
            .tokens_per_minute(40_000)
            .latency(Duration::from_secs(1));
        let sim = sim.build();
        let cx = Context::builder(sim.clone())
            .pace(pace.in_flight(3))
            .build();
        let worker = Worker::builder(Arc::clone(&store), cx)
            .in_flight(3)
            .register("story", story)
            .build();
        let (began, mut drives) = (Instant::now(), 1);
        while worker.drive(Duration::from_secs(300)).await? == DriveOutcome::Continue {
            drives += 1;
        }
        row([
            &format!("  {name}, {drives} budgets"),
            "",
            "",
            path,
            &seconds(began.elapsed()),
        ]);
        let (ledger, run) = (sim.ledger(), runner.snapshot(run).await?);
        let completed = run.map_or(0, |run| run.run.completed);
        let ours = format!(
            "{completed}, {}, {}",
            ledger.total.billed, ledger.total.rejected
        );
        row([
            "  completed, paid, refused (429)",
            "",
            "",
            "200, 200, 0",
            &ours,
        ]);
    }
    Ok(())
}
