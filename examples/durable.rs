//! Durable runs: one process submits them, others work on them, may be killed, and continue.
//!
//! ```sh
//! alias durable='cargo run --release --example durable --features full,sqlite,postgres --'
//! durable submit examples/data/earthquakes.jsonl   # prints the id of the run
//! durable work --until-idle &                      # start any number of workers
//! durable work --until-idle &
//! durable status 1 --watch
//! durable results 1 > texts.jsonl
//! ```
//!
//! The store is an SQLite file or a Postgres database (`--store postgres://…`), which workers on several machines can
//! share. It runs offline on the simulated provider; with `OPENAI_API_KEY` or `ANTHROPIC_API_KEY` in the environment it
//! runs on the real provider. Ctrl-C lets the calls in flight finish and releases the other items. When a worker is killed,
//! other workers take over its items after its lease expires.

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
    /// The store: an SQLite file or the URL of a Postgres database
    #[arg(long, global = true, default_value = "runs.db")]
    store: String,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Submits a run over the records of a JSON-lines file and prints its id
    Submit(SubmitArgs),
    /// Works on the submitted runs
    Work(Box<WorkArgs>),
    /// Shows the progress of a run, or of the newest runs
    Status {
        run: Option<RunId>,
        /// Follow the run until it ends
        #[arg(long)]
        watch: bool,
    },
    /// Prints the outcome of each item as a line of JSON
    Results { run: RunId },
    /// Prints the log of a run as lines of JSON
    Log { run: RunId },
    /// Cancels a run
    Cancel { run: RunId },
    /// Makes the failed items of a run pending again
    Retry { run: RunId },
    /// Lists the calls that may have been paid for without a result, because their worker died
    Ambiguous,
}

#[derive(Args)]
struct SubmitArgs {
    /// Input file with one JSON object per line
    input: PathBuf,
    /// Tenant to which the run belongs
    #[arg(long, default_value = "")]
    tenant: String,
    /// A second submission with the same key returns the run of the first
    #[arg(long)]
    idempotency_key: Option<String>,
    /// Priority of the run; lower runs first
    #[arg(long, default_value = "0", allow_negative_numbers = true)]
    priority: i32,
    /// Number of attempts after which an item fails when its worker dies
    #[arg(long, default_value = "3", value_parser = clap::value_parser!(u32).range(1..))]
    max_attempts: u32,
    /// Do not reuse the replies of earlier runs
    #[arg(long)]
    fresh: bool,
}

#[derive(Args)]
struct WorkArgs {
    /// Requests per minute, for this worker
    #[arg(long, default_value = "6000", value_parser = clap::value_parser!(u64).range(1..))]
    rpm: u64,
    /// Maximum number of items at a time
    #[arg(long, default_value = "64", value_parser = clap::value_parser!(u32).range(1..))]
    in_flight: u32,
    /// Milliseconds without a heartbeat until other workers take over the items
    #[arg(long, default_value = "30000", value_parser = clap::value_parser!(u64).range(1..))]
    lease: u64,
    /// Time budget in seconds, for platforms that limit the time of a process
    #[arg(long)]
    budget: Option<u64>,
    /// Stop when every run has ended
    #[arg(long)]
    until_idle: bool,
    /// Fail items whose last worker died with a call in flight, instead of sending the call again
    #[arg(long)]
    fail_ambiguous: bool,
    /// Name of the worker, for logs
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

/// The name under which workers register the pipeline.
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
        Command::Cancel { run } => println!("{} items cancelled", runner.cancel(run).await?),
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
    let unusable = |line: usize, reason: String| {
        let message = format!("{}:{}: {reason}", args.input.display(), line + 1);
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
            let idle = until_idle(&runner);
            let until = async {
                tokio::select! {
                    () = interrupted => {}
                    () = idle => {}
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
        "{} completed, {} failed, {} released, {} too late; {} replies paid, {} replies from the store; {} writes",
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
        _ => {
            eprintln!("the time budget is used up: start again to continue");
            ExitCode::from(75)
        }
    })
}

/// Waits until no run is pending or processing. This includes items of other workers, because those may die.
async fn until_idle(runner: &Runner) {
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

/// Writes a line. Unlike `println!`, it returns an error when the reader has closed the pipe.
fn write_line(line: &serde_json::Value) -> Result<()> {
    writeln!(std::io::stdout(), "{line}").map_err(Error::from)
}
