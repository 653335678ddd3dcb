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

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt as _;
use throughline::provider::sim::{Sim, Tokens};
use throughline::stages::{Kind, Stages};
use throughline::store::Sqlite;
use throughline::{Context, Drive, Pace, Pipeline, Request, Result, Runner, Worker};
use tokio::time::Instant;

const SCALE: f64 = 100.0;
const SECOND: Duration = Duration::from_millis(10);
const BUDGET: Duration = SECOND.saturating_mul(300);
/// A worker's half of the account.
const TOKENS_PER_MINUTE: u64 = 20_000 * SCALE as u64;
const CARDS: usize = 24;
const ITEMS: usize = CARDS + CARDS * 5 + CARDS * 5 * 6;
const STORE: &str = "cards.db";
const LEDGER: &str = "ledger.jsonl";
/// How a process says that there is more to do.
const CONTINUE: i32 = 75;

/// Each phase with how it goes at the provider: safe, normal, fast.
fn phases() -> [(&'static str, Pace); 3] {
    [
        ("stories", Pace::safe().spacing(SECOND * 2)),
        ("subtasks", Pace::normal().spacing(SECOND)),
        ("estimates", Pace::fast().spacing(SECOND / 2)),
    ]
}

/// Splits a text into parts. All three phases do that.
struct Split;

impl Pipeline for Split {
    type Input = String;
    type Output = Vec<String>;

    fn name(&self) -> &str {
        "split"
    }

    async fn run(&self, cx: &Context, whole: String) -> Result<Vec<String>> {
        let reply = cx.generate(Request::new(whole).max_tokens(500)).await?;
        Ok(reply.text.lines().map(str::to_owned).collect())
    }
}

/// 4 s a call; a card has five stories, a story six subtasks, a subtask an estimate.
fn provider(dir: &Path) -> Sim {
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
        .ledger_file(dir.join(LEDGER))
        .build()
}

/// What a platform would call again and again, in as many places as it likes, until it says that all is done.
async fn call(dir: &Path, name: &str) -> Result<Drive> {
    let end = Instant::now() + BUDGET;
    let store = Arc::new(Sqlite::open(dir.join(STORE)).await?);
    let (runner, sim, stages) = (
        Runner::new(Arc::clone(&store)),
        provider(dir),
        Stages::new(),
    );
    let (mut drive, mut paid, mut refused) = (Drive::Done, 0, 0);
    let mut inputs: Vec<_> = (1..=CARDS).map(|n| format!("card {n}")).collect();
    for (phase, pace) in phases() {
        let cx = Context::builder(sim.clone())
            .pace(pace.tokens(TOKENS_PER_MINUTE).in_flight(3))
            .observer(stages.clone())
            .build();
        let worker = Worker::builder(Arc::clone(&store), cx.clone())
            .register(phase, Split)
            .in_flight(6)
            .lease(Duration::from_secs(3))
            .poll_every(SECOND * 5)
            .drain_for(SECOND * 20)
            .build();
        // All rows of the phase in one transaction. Whoever comes second finds the run of the first.
        let submit = runner.submit(phase, &Split, inputs).key(String::clone);
        let run = submit.idempotency_key(phase).await?;
        drive = worker.drive_run(run, end - Instant::now()).await?;
        (paid, refused) = (
            paid + worker.stats().replies_paid,
            refused + cx.tally().throttled,
        );
        if drive == Drive::Continue {
            break;
        }
        let rows = runner.stream_results::<Vec<String>>(run);
        let parts = rows.map_ok(|row| row.output().cloned().unwrap_or_default());
        inputs = parts.try_concat().await?;
    }
    let trips = store.round_trips();
    println!(
        "{name}: {drive:?}; {paid} calls paid, {refused} refused (429), {trips} store round trips"
    );
    for calls in stages
        .report()
        .iter()
        .filter(|stage| stage.kind == Kind::Call)
    {
        let [p50, p95, p99] = [calls.p50, calls.p95, calls.p99].map(|time| time.mul_f64(SCALE));
        println!(
            "    {:9} {:3} calls, P50 {p50:.1?}, P95 {p95:.1?}, P99 {p99:.1?}",
            calls.label, calls.count
        );
    }
    Ok(drive)
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    if let (Some(dir), Some(name)) = (arguments.next(), arguments.next()) {
        return Ok(match call(Path::new(&dir), &name).await? {
            Drive::Done => ExitCode::SUCCESS,
            Drive::Continue => ExitCode::from(CONTINUE as u8),
        });
    }
    let dir = tempfile::tempdir()?;
    let runner = Runner::new(Sqlite::open(dir.path().join(STORE)).await?);
    let kept = witness::supervise(dir.path(), &runner).await?;
    let right = witness::verify(dir.path(), &runner, kept).await?;
    Ok(if right {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
