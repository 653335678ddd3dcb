//! Durable runs: submitted by one process, worked on by others, killed and carried on.
//!
//! ```sh
//! alias durable='cargo run --release --example durable --features full,sqlite,postgres --'
//! durable submit examples/data/earthquakes.jsonl   # prints the run's number, at once
//! durable work --until-idle &                      # as many of these as you like
//! durable work --until-idle &
//! durable status 1 --watch
//! durable results 1 > texts.jsonl
//! ```
//!
//! The store is an SQLite file, or a Postgres by its URL (`--store postgres://…`), and the workers may be on several
//! machines then. Offline it runs on the simulated provider; with `OPENAI_API_KEY` or `ANTHROPIC_API_KEY` in
//! the environment, on the real one. Ctrl-C lets the calls in flight finish and gives the rest back; a worker
//! that is killed has its items taken over when its lease is over.

#[path = "generate/providers.rs"]
mod providers;
#[path = "durable/store.rs"]
mod store;

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand};
use futures::TryStreamExt as _;
use serde::{Deserialize, Serialize};
use serde_json::json;
use throughline::store::{Queue, RunFilter, RunId};
use throughline::{
    Context, Error, ErrorKind, Pace, Pipeline, Request, Result,
    runs::{AmbiguousPolicy, DriveOutcome},
};
use throughline::{Runner, Worker, runs::RunSnapshot};

use crate::providers::ProviderArgs;

#[derive(Parser)]
#[command(about = "A sentence about each earthquake, as a durable run.")]
struct Cli {
    /// Where the runs are: an SQLite file, or the URL of a Postgres
    #[arg(long, global = true, default_value = "runs.db")]
    store: String,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Submits a run over the records of a JSON-lines file and prints its number
    Submit(SubmitArgs),
    /// Works on what was submitted
    Work(Box<WorkArgs>),
    /// How a run stands, or the newest runs
    Status {
        run: Option<RunId>,
        /// Goes on until the run is over
        #[arg(long)]
        watch: bool,
    },
    /// The outcome of each item as a line of JSON
    Results { run: RunId },
    /// The run's log as lines of JSON
    Log { run: RunId },
    /// Stops a run
    Cancel { run: RunId },
    /// Makes the failed items of a run pending again
    Retry { run: RunId },
    /// Calls that may have been paid for in vain, because their worker died
    Ambiguous,
}

#[derive(Args)]
struct SubmitArgs {
    input: PathBuf,
    #[arg(long, default_value = "")]
    tenant: String,
    /// Submitting twice with the same one makes one run
    #[arg(long)]
    idempotency_key: Option<String>,
    /// Lower goes first
    #[arg(long, default_value = "0", allow_negative_numbers = true)]
    priority: i32,
    /// How often an item may be begun before the death of its worker fails it
    #[arg(long, default_value = "3", value_parser = clap::value_parser!(u32).range(1..))]
    max_attempts: u32,
    /// Does not use what earlier runs have paid for
    #[arg(long)]
    fresh: bool,
}

#[derive(Args)]
struct WorkArgs {
    /// Requests per minute, for this worker
    #[arg(long, default_value = "6000", value_parser = clap::value_parser!(u64).range(1..))]
    rpm: u64,
    /// Items at a time
    #[arg(long, default_value = "64", value_parser = clap::value_parser!(u32).range(1..))]
    in_flight: u32,
    /// Milliseconds until others take the items of a worker that is not heard of
    #[arg(long, default_value = "30000", value_parser = clap::value_parser!(u64).range(1..))]
    lease: u64,
    /// Seconds after which it must be over, as where a platform cuts calls off
    #[arg(long)]
    budget: Option<u64>,
    /// Stops when every run is over
    #[arg(long)]
    until_idle: bool,
    /// Fails items whose last worker died with a call in flight, and does not send it again
    #[arg(long)]
    fail_ambiguous: bool,
    #[arg(long, default_value = "worker")]
    name: String,
    #[command(flatten)]
    provider: ProviderArgs,
}

/// A record of the input.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Quake {
    id: String,
    place: Option<String>,
    magnitude: Option<f64>,
    depth_km: Option<f64>,
    time: Option<String>,
}

/// What workers know the pipeline by.
const NAME: &str = "describe-earthquake";

struct Describe;

impl Pipeline for Describe {
    type Input = Quake;
    type Output = String;

    fn name(&self) -> &str {
        NAME
    }

    async fn run(&self, cx: &Context, quake: Quake) -> Result<String> {
        let prompt = format!(
            "Write one plain sentence about the earthquake {} near {} on {}: magnitude {}, {} km deep.",
            quake.id,
            quake.place.as_deref().unwrap_or("an unknown place"),
            quake.time.as_deref().unwrap_or("an unknown day"),
            quake
                .magnitude
                .map_or("unknown".to_owned(), |n| n.to_string()),
            quake
                .depth_km
                .map_or("unknown".to_owned(), |n| n.to_string()),
        );
        Ok(cx
            .generate(Request::new(prompt).max_tokens(200))
            .await?
            .text)
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .init();
    match run(Cli::parse()).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

async fn run(cli: Cli) -> Result<ExitCode> {
    let store = store::open(&cli.store).await?;
    let runner = Runner::new(Arc::clone(&store));
    match cli.command {
        Command::Submit(args) => submit(&runner, args).await?,
        Command::Work(args) => return work(store, *args).await,
        Command::Status { run: None, .. } => {
            for run in runner.list(RunFilter::new(), 20).await? {
                println!(
                    "{} {}: {}",
                    run.id,
                    run.status,
                    show(&runner, run.id).await?
                );
            }
        }
        Command::Status {
            run: Some(run),
            watch: false,
        } => println!("{}", show(&runner, run).await?),
        Command::Status {
            run: Some(run),
            watch: true,
        } => {
            show(&runner, run).await?;
            let mut watched = runner.watch(run);
            while let Some(snapshot) = watched.try_next().await? {
                println!("{snapshot}");
            }
        }
        Command::Results { run } => results(&runner, run).await?,
        Command::Log { run } => {
            let mut after = 0;
            loop {
                let page = runner.log_since(run, after, 1000).await?;
                let Some(last) = page.last() else { break };
                after = last.seq;
                for entry in page {
                    write_line(&json!({"seq": entry.seq, "kind": entry.kind, "data": entry.data}))?;
                }
            }
        }
        Command::Cancel { run } => println!("{} items stopped", runner.cancel(run).await?),
        Command::Retry { run } => println!(
            "{} items are pending again",
            runner.retry_failed(run).await?
        ),
        Command::Ambiguous => {
            let mut after = None;
            loop {
                let page = runner.ambiguous(after, 1000).await?;
                let Some(last) = page.last() else { break };
                after = Some(last.name());
                for call in page {
                    write_line(&json!({
                        "item": call.item, "attempt": call.attempt, "call": call.key.to_string(),
                    }))?;
                }
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn submit(runner: &Runner, args: SubmitArgs) -> Result<()> {
    let unusable = |line: usize, why: String| {
        let message = format!("{}:{}: {why}", args.input.display(), line + 1);
        Error::new(ErrorKind::Config, message)
    };
    let file = File::open(&args.input).map_err(|error| {
        Error::new(
            ErrorKind::Io,
            format!("cannot read {}: {error}", args.input.display()),
        )
    })?;
    let mut quakes = Vec::new();
    for (line, text) in BufReader::new(file).lines().enumerate() {
        let text = text?;
        if !text.trim().is_empty() {
            let quake: Quake =
                serde_json::from_str(&text).map_err(|error| unusable(line, error.to_string()))?;
            quakes.push(quake);
        }
    }
    let (count, began) = (quakes.len(), Instant::now());
    let mut submit = runner
        .submit(NAME, &Describe, quakes)
        .key(|quake| quake.id.clone())
        .tenant(args.tenant)
        .priority(args.priority)
        .max_attempts(args.max_attempts);
    if args.fresh {
        submit = submit.fresh();
    }
    if let Some(key) = args.idempotency_key {
        submit = submit.idempotency_key(key);
    }
    println!("{}", submit.await?);
    eprintln!("{count} items submitted in {:.1?}", began.elapsed());
    Ok(())
}

async fn work(store: Arc<dyn Queue>, args: WorkArgs) -> Result<ExitCode> {
    let chosen = args.provider.choose()?;
    let simulated = if chosen.simulated { " (simulated)" } else { "" };
    eprintln!("working on {}{simulated}", chosen.model);
    let cx = Context::builder(chosen.provider)
        .pace(Pace::per_minute(args.rpm).in_flight(args.in_flight as usize))
        .model(chosen.model)
        .build();
    let policy = if args.fail_ambiguous {
        AmbiguousPolicy::Fail
    } else {
        AmbiguousPolicy::Retry
    };
    let worker = Worker::builder(Arc::clone(&store), cx.clone())
        .register(NAME, Describe)
        .name(args.name)
        .in_flight(args.in_flight as usize)
        .lease(Duration::from_millis(args.lease))
        .on_ambiguous(policy)
        .build();
    let stop = throughline::context::stop_on_signal()?;
    let interrupted = async {
        stop.cancelled().await;
        eprintln!("waiting for the calls in flight");
    };
    let ended = match args.budget {
        Some(seconds) => worker.drive(Duration::from_secs(seconds)).await,
        None if args.until_idle => {
            let runner = Runner::new(store);
            let over = all_over(&runner);
            let until = async {
                tokio::select! {
                    () = interrupted => {}
                    () = over => {}
                }
            };
            worker.run_until(until).await.map(|()| DriveOutcome::Done)
        }
        None => worker
            .run_until(interrupted)
            .await
            .map(|()| DriveOutcome::Done),
    };
    let stats = worker.stats();
    eprintln!(
        "{} completed, {} failed, {} given back, {} too late; {} replies paid, {} out of the store; {} writes",
        stats.completed,
        stats.failed,
        stats.unfinished,
        stats.journal.fenced,
        stats.replies_paid,
        stats.replies_replayed,
        stats.journal.commits + stats.journal.intent_writes,
    );
    Ok(match ended? {
        DriveOutcome::Done => ExitCode::SUCCESS,
        DriveOutcome::Continue => {
            eprintln!("the budget is used up: start again to go on");
            ExitCode::from(75)
        }
    })
}

/// Ready when no run waits or is worked on: also those of others, because a worker may die.
async fn all_over(runner: &Runner) {
    use throughline::store::Status::{Pending, Processing};
    loop {
        let mut open = false;
        for status in [Pending, Processing] {
            let found = runner.list(RunFilter::new().status(status), 1).await;
            open |= found.map_or(true, |runs| !runs.is_empty());
        }
        if !open {
            return;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn show(runner: &Runner, run: RunId) -> Result<RunSnapshot> {
    let snapshot = runner.snapshot(run).await?;
    snapshot.ok_or_else(|| Error::new(ErrorKind::Config, format!("there is no run {run}")))
}

async fn results(runner: &Runner, run: RunId) -> Result<()> {
    let mut results = runner.stream_results::<String>(run);
    while let Some(item) = results.try_next().await? {
        let (text, error) = (item.output(), item.error().map(ToString::to_string));
        write_line(&json!({
            "id": item.key, "status": item.status, "attempt": item.attempt, "text": text, "error": error,
        }))?;
    }
    Ok(())
}

/// Not `println`: who reads us may have read enough.
fn write_line(line: &serde_json::Value) -> Result<()> {
    writeln!(std::io::stdout(), "{line}").map_err(Error::from)
}
