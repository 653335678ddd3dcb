//! Generates a text for each record of a JSON-lines file.
//!
//! ```sh
//! cargo run --release --example generate --features full -- examples/data/earthquakes.jsonl
//! ```
//!
//! It runs offline on the simulated provider. With `OPENAI_API_KEY` (and `OPENAI_BASE_URL`) or
//! `ANTHROPIC_API_KEY` in the environment, the same command runs on the real provider.
//!
//! Each line of the output has the id of a record and its text or its failure. Ctrl-C stops sending and waits for the
//! calls in flight. The next start does only the records that are missing, also after `kill -9`.
//!
//! Exit status: 0 if every record has its text; 1 if a record failed or a line could not be used (each is named on
//! standard error); 2 if the job could not run; 130 if it was interrupted.

#[path = "generate/output.rs"]
mod output;
#[path = "generate/providers.rs"]
mod providers;
#[path = "generate/records.rs"]
mod records;
#[path = "generate/report.rs"]
mod report;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use futures::StreamExt as _;
use throughline::observe::Bar;
use throughline::{Context, Error, Outcome, Pace, Reply, Request};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use crate::output::Output;
use crate::providers::ProviderArgs;
use crate::records::{Record, Records, Template};
use crate::report::Report;

#[derive(Parser)]
#[command(about = "Generate a text for each record of a JSON-lines file.")]
struct Args {
    /// Input file with one JSON object per line
    input: PathBuf,

    /// Output file with one JSON object per line; results that it already has are kept
    #[arg(long, short, default_value = "generated.jsonl")]
    output: PathBuf,

    /// Prompt template; {name} stands for a field of the record
    #[arg(
        long,
        default_value = "Write one plain sentence about the earthquake near {place} on {time}: \
                         magnitude {magnitude}, {depth_km} km deep."
    )]
    prompt: Template,

    /// Field with the id of a record
    #[arg(long, default_value = "id")]
    id: String,

    /// Maximum number of missing records to do
    #[arg(long)]
    limit: Option<usize>,

    /// Requests per minute [default: 6000 on the simulated provider, else 60]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    rpm: Option<u64>,

    /// Input and output tokens per minute
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    tpm: Option<u64>,

    /// Maximum number of calls in flight
    #[arg(long, default_value = "64", value_parser = clap::value_parser!(u32).range(1..))]
    in_flight: u32,

    /// Maximum number of tokens of a reply
    #[arg(long, default_value = "200", value_parser = clap::value_parser!(u64).range(1..))]
    max_tokens: u64,

    /// Timeout of a call in seconds
    #[arg(long, default_value = "120", value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,

    #[command(flatten)]
    provider: ProviderArgs,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Args::parse()).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

async fn run(args: Args) -> Result<ExitCode, Error> {
    let open = || Records::open(&args.input, &args.id, &args.prompt);
    let limit = args.limit.unwrap_or(usize::MAX);

    // The first pass reports unusable lines before any call is paid for.
    let mut unusable = 0;
    let mut ids = Vec::new();
    for record in open()? {
        match record {
            Ok(record) => ids.push(record.id),
            Err(problem) => {
                unusable += 1;
                eprintln!("{}:{problem}", args.input.display());
            }
        }
    }
    let mut output = Output::resume(&args.output)?;
    let done_before = ids.iter().filter(|id| output.has(id)).count();
    let missing = (ids.len() - done_before).min(limit);
    drop(ids);

    let chosen = args.provider.choose()?;
    let rpm = args
        .rpm
        .unwrap_or(if chosen.simulated { 6_000 } else { 60 });
    let mut pace = Pace::per_minute(rpm).in_flight(args.in_flight as usize);
    if let Some(tpm) = args.tpm {
        pace = pace.tokens(tpm);
    }
    eprintln!(
        "{missing} records on {} ({}), {done_before} done before, at {rpm} requests per minute -> {}",
        chosen.provider.name(),
        chosen.model,
        args.output.display()
    );

    let report = Arc::new(Report::new(rpm));
    let cx = Context::builder(chosen.provider)
        .model(chosen.model)
        .pace(pace)
        .call_timeout(Duration::from_secs(args.timeout))
        .on_event({
            let report = Arc::clone(&report);
            move |event| report.observe(event)
        })
        .build();
    let max_tokens = args.max_tokens;
    let finished = output.finished();
    let todo = open()?.filter_map(Result::ok);
    let todo = todo
        .filter(move |record| !finished.contains(&record.id))
        .take(limit);
    // The items of a stream run in a task of their own, so the closure must own what it uses.
    let mut outcomes = cx
        .fan_out("record", todo)
        .key(|record: &Record| record.id.clone())
        .buffer_unordered(4 * args.in_flight as usize)
        .stream(move |cx, record| async move {
            let request = Request::new(record.prompt).max_tokens(max_tokens);
            Ok((record.line, cx.generate(request).await?))
        });

    let mut bar = Bar::new(missing as u64);
    let mut tick = interval(Duration::from_millis(100));
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut interrupts = interrupts()?;
    let mut stopped = None;
    loop {
        tokio::select! {
            outcome = outcomes.next() => {
                let Some(outcome) = outcome else { break };
                if let Some(error) = outcome.error() {
                    if error.is_cancelled() {
                        continue; // It was never sent. The next start does it.
                    }
                    if error.is_account_wide() && stopped.is_none() {
                        stopped = Some(format!("no call can succeed any more: {error}"));
                        cx.drain();
                    }
                    bar.println(format!("{}: {error}", name(&outcome)));
                }
                report.count(&outcome);
                if let Err(error) = output.write(&outcome) {
                    bar.finish();
                    return Err(error);
                }
            }
            Some(()) = interrupts.recv() => {
                if stopped.is_none() {
                    bar.println("stopping: waiting for the calls in flight (interrupt again to drop them)");
                    stopped = Some("interrupted".to_owned());
                    cx.drain();
                } else {
                    cx.cancel();
                }
            }
            _ = tick.tick() => {}
        }
        bar.update(&cx.snapshot());
    }
    bar.finish();

    let failed = report.print(&cx, &args.output, unusable, done_before);
    Ok(match stopped {
        Some(reason) => {
            eprintln!("stopped: {reason}; start again to continue with the missing records");
            ExitCode::from(if reason == "interrupted" { 130 } else { 1 })
        }
        None if failed + unusable > 0 => ExitCode::FAILURE,
        None => ExitCode::SUCCESS,
    })
}

/// Returns the id of the record, for messages.
fn name(outcome: &Outcome<(usize, Reply)>) -> &str {
    outcome.key.as_deref().unwrap_or("?")
}

/// Receives every SIGINT (Ctrl-C) and SIGTERM.
fn interrupts() -> std::io::Result<mpsc::UnboundedReceiver<()>> {
    let (sender, interrupts) = mpsc::unbounded_channel();
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut ctrl_c = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = ctrl_c.recv() => {}
                    _ = terminate.recv() => {}
                }
                let _ = sender.send(());
            }
        });
    }
    #[cfg(not(unix))]
    tokio::spawn(async move {
        while tokio::signal::ctrl_c().await.is_ok() {
            let _ = sender.send(());
        }
    });
    Ok(interrupts)
}
