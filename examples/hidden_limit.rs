//! Configures a lane with twice the true rate limit. In the middle of the run the true limit falls to a quarter.
//!
//! ```sh
//! cargo run --example hidden_limit --features sim
//! cargo run --example hidden_limit --features sim -- --svg hidden_limit.svg
//! ```
//!
//! The example runs on Tokio's paused clock against the simulated provider, so ten minutes pass in a second. The chart shows
//! the calls per second that the provider accepted and rejected. The bound is the time of the last reply for a client that
//! knows the true limit all the time.

#[path = "../tests/support/bound.rs"]
mod bound;
#[path = "hidden_limit/run.rs"]
mod run;
#[path = "hidden_limit/svg.rs"]
mod svg;
#[path = "hidden_limit/terminal.rs"]
mod terminal;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use crate::run::Run;

#[derive(Parser)]
#[command(about = "Configured with twice the limit, which then falls to a quarter.")]
struct Args {
    /// Also write the chart to this SVG file
    #[arg(long)]
    svg: Option<PathBuf>,

    /// Seed of the latencies and of the lane's jitter
    #[arg(long, default_value = "1")]
    seed: u64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    let run = runtime.block_on(Run::new(args.seed));
    print!("{}", terminal::Chart(&run));
    print!("{}", totals(&run));
    if let Some(path) = args.svg
        && let Err(error) = std::fs::write(&path, svg::chart(&run))
    {
        eprintln!("error: {}: {error}", path.display());
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn totals(run: &Run) -> String {
    format!(
        "{} of {} calls answered in {:.0} s; bound {:.0} s, ratio {:.3}\n\
         {} calls sent, {} accepted, {} rejected ({:.2} %)\n",
        run.answered,
        run::CALLS,
        run.makespan.as_secs_f64(),
        run.bound.as_secs_f64(),
        run.ratio(),
        run.accepted + run.rejected,
        run.accepted,
        run.rejected,
        100.0 * run.rejected_share(),
    )
}
