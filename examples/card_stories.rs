//! Cards become stories, stories become subtasks, subtasks get an estimate: three phases, each over the rows of the
//! one before, in two worker processes that are cut off when their time is up. One of them is killed.
//!
//! ```sh
//! cargo run --release --example card_stories --features sim,sqlite,stages
//! ```
//!
//! A second of the case takes 10 ms here, so its budget of 300 s for each call is one of 3 s. The two workers share
//! an account of 40,000 tokens a minute and 10 calls in flight, half of it each, because a simulated
//! account lives in one process. Store, leases and processes are real and not scaled.

#[path = "card_stories/witness.rs"]
mod witness;

use std::sync::Arc;
use std::time::Duration;

use throughline::observe::Stages;
use throughline::provider::sim::{Sim, Tokens};
use throughline::store::Sqlite;
use throughline::{Context, Pace, Request, Result, Runner, Worker, pipeline, runs::DriveOutcome};
use tokio::time::Instant;

const SECOND: Duration = Duration::from_millis(10);
/// A worker's half of the account, a hundred times as fast.
const TOKENS_PER_MINUTE: u64 = 20_000 * 100;
const CARDS: usize = 24;
const ITEMS: usize = CARDS + CARDS * 5 + CARDS * 5 * 6;
const STORE: &str = "cards.db";
const LEDGER: &str = "ledger.jsonl";
/// How a process says that there is more to do.
const CONTINUE: i32 = 75;

/// Splits a text into parts. All three phases do that.
async fn split(cx: Context, whole: String) -> Result<Vec<String>> {
    let reply = cx.generate(Request::new(whole).max_tokens(500)).await?;
    Ok(reply.text.lines().map(str::to_owned).collect())
}

/// 4 s a call; a card has five stories, a story six subtasks, a subtask an estimate.
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

/// What a platform would call again and again, in as many places as it likes, until it says that all is done.
async fn call(name: &str) -> Result<DriveOutcome> {
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
        // All rows of the phase in one transaction. Whoever comes second finds the run of the first.
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
        let drive = call(&name).await?;
        std::process::exit(if drive == DriveOutcome::Done {
            0
        } else {
            CONTINUE
        });
    }
    let dir = tempfile::tempdir()?;
    // The workers inherit it.
    std::env::set_current_dir(&dir)?;
    let runner = Runner::new(Sqlite::open(STORE).await?);
    let keep_going = |name, victim| witness::supervise(&runner, name, victim);
    let (_, kept) = tokio::try_join!(keep_going("a", false), keep_going("b", true))?;
    witness::verify(&runner, kept).await
}
