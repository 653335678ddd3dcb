//! Splits cards into stories, stories into subtasks, and estimates each subtask: three phases, each over the outputs of
//! the one before. Two worker processes do the work. Each stops when its time budget is used up and is then started
//! again; one of them is killed.
//!
//! ```sh
//! cargo run --release --example card_stories --features sim,sqlite,stages
//! ```
//!
//! The example runs a hundred times as fast as the real system, so a time budget of 300 s is one of 3 s. The workers
//! share an account of 40,000 tokens a minute and 10 calls in flight. Each has half of it, because a simulated account
//! is local to a process. The store, the leases and the processes are real.

#[path = "card_stories/witness.rs"]
mod witness;

use std::sync::Arc;
use std::time::Duration;

use throughline::observe::Stages;
use throughline::provider::sim::{Sim, Tokens};
use throughline::store::Sqlite;
use throughline::{Context, Pace, Request, Result, Runner, Worker, pipeline, runs::DriveOutcome};
use tokio::time::Instant;

/// A second of the real system.
const SECOND: Duration = Duration::from_millis(10);
/// Half of the account, a hundred times as fast.
const TOKENS_PER_MINUTE: u64 = 20_000 * 100;
const CARDS: usize = 24;
const ITEMS: usize = CARDS + CARDS * 5 + CARDS * 5 * 6;
const STORE: &str = "cards.db";
const LEDGER: &str = "ledger.jsonl";
/// Exit status of a worker process whose time budget is used up.
const CONTINUE: i32 = 75;

/// Splits a text into parts, in all three phases.
async fn split(cx: Context, whole: String) -> Result<Vec<String>> {
    let reply = cx.generate(Request::new(whole).max_tokens(500)).await?;
    Ok(reply.text.lines().map(str::to_owned).collect())
}

/// Returns the simulated provider. A card has five stories, a story six subtasks, a subtask one estimate; a call takes 4 s.
fn provider() -> Sim {
    let parts = |whole: &str| match whole.matches('/').count() {
        0 => (1..=5).map(|n| format!("{whole}/story {n}")).collect(),
        1 => (1..=6).map(|n| format!("{whole}/subtask {n}")).collect(),
        _ => vec!["2 hours".to_owned()],
    };
    Sim::builder()
        .tokens_per_minute(TOKENS_PER_MINUTE)
        .in_flight(5)
        .latency(SECOND * 4)
        .jitter(0.2)
        .output_tokens(Tokens::fixed(400))
        .reply(move |request| parts(request.last_text()).join("\n"))
        .ledger_file(LEDGER)
        .build()
}

/// Works on the three phases for at most 300 s. A platform would start this repeatedly, in any number of processes, until
/// it returns that all is done.
async fn work(name: &str) -> Result<DriveOutcome> {
    let end = Instant::now() + SECOND * 300;
    let store = Arc::new(Sqlite::open(STORE).await?);
    let (runner, stages) = (Runner::new(Arc::clone(&store)), Stages::new());
    let (provider, mut drive) = (provider(), DriveOutcome::Done);
    let mut inputs: Vec<_> = (1..=CARDS).map(|n| format!("card {n}")).collect();
    for (phase, pace) in [
        ("stories", Pace::safe().spacing(SECOND * 2)),
        ("subtasks", Pace::normal().spacing(SECOND)),
        ("estimates", Pace::fast().spacing(SECOND / 2)),
    ] {
        let cx = Context::builder(provider.clone())
            .pace(pace.tokens(TOKENS_PER_MINUTE).in_flight(3))
            .observer(stages.clone())
            .build();
        let split = pipeline(phase, split);
        // Submits all inputs in one transaction. The idempotency key makes the second worker find the run of the first.
        let submit = runner.submit(phase, &split, inputs).key(String::clone);
        let run = submit.idempotency_key(phase).await?;
        let worker = Worker::builder(Arc::clone(&store), cx.clone())
            .register(phase, split)
            .in_flight(6)
            .lease(Duration::from_secs(3))
            .poll_every(SECOND * 5)
            .build();
        drive = worker.drive_run(run, end - Instant::now()).await?;
        let (paid, refused) = (worker.stats().replies_paid, cx.tally().throttled);
        println!("{name}, {phase}: {drive:?}; {paid} calls paid, {refused} refused (429)");
        if drive == DriveOutcome::Continue {
            break;
        }
        inputs = runner.outputs::<Vec<String>>(run).await?.concat();
    }
    let trips = store.round_trips();
    println!("{name}: {trips} store round trips\n{stages}");
    Ok(drive)
}

#[tokio::main]
async fn main() -> Result<()> {
    if let Some(name) = std::env::args().nth(1) {
        let drive = work(&name).await?;
        std::process::exit(if drive == DriveOutcome::Done {
            0
        } else {
            CONTINUE
        });
    }
    let dir = tempfile::tempdir()?;
    // The worker processes inherit the current directory.
    std::env::set_current_dir(&dir)?;
    let runner = Runner::new(Sqlite::open(STORE).await?);
    let supervise = |name, victim| witness::supervise(&runner, name, victim);
    let (_, kept) = tokio::try_join!(supervise("a", false), supervise("b", true))?;
    witness::verify(&runner, kept).await
}
