//! The gates of the pacing: the whole crate under Tokio's paused clock against a simulated
//! account, each run beside the time that no client can beat.
//!
//! ```sh
//! cargo test --features sim --test pacing_gates -- --nocapture
//! GATE_SEEDS=30 cargo test --release --features sim --test pacing_gates -- --nocapture
//! ```
//!
//! `GATE_SEEDS` is the number of runs of each cell in which chance matters: 3 in a release build, 1 in a debug build. A
//! release build (or `THROUGHLINE_LONG=1`) runs each cell once more without each policy of the rate limiter, and prints what
//! each policy is worth.
//!
//! A row is the worst of its seeds. "configured" is what the lane was told ÷ what the
//! provider enforces; the bound is that of the tighter of both, with the burst of
//! whichever binds (see `support/bound.rs`).

#[path = "support/ablation.rs"]
mod ablation;
#[path = "support/bound.rs"]
mod bound;
#[path = "pacing_gates/cell.rs"]
mod cell;
#[path = "pacing_gates/run.rs"]
mod run;
#[path = "pacing_gates/scenarios.rs"]
mod scenarios;
#[path = "pacing_gates/table.rs"]
mod table;

use std::time::Duration;

use futures::future::join_all;
use throughline::provider::sim::{Dialect, Enforcement, Headers, Sim};
use throughline::ratelimit::Policy;
use throughline::{Context, Pace, Request};
use tokio::time::{Instant, sleep};

use crate::cell::Cell;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

#[test]
fn every_cell_is_within_its_bars() {
    let rows = table::measured(scenarios::all());
    println!("{}", table::Table(&rows));
    let misses: Vec<String> = rows.iter().filter_map(|row| row.misses()).collect();
    assert!(
        misses.is_empty(),
        "{} of {} cells miss a bar:\n{}",
        misses.len(),
        rows.len(),
        misses.join("\n")
    );
}

#[test]
fn each_policy_is_measured_by_switching_it_off() {
    if ablation::is_enabled() {
        table::print_ablation(&scenarios::all());
        return;
    }
    let cell = Cell::new("no headers", 2.0)
        .requests(600, 600)
        .truth(|truth| truth.headers = Headers::None)
        .with(|cell| cell.seeds = 1);
    let without = cell
        .clone()
        .with(|cell| cell.without = Some(Policy::RateControl));
    let [with, without] = [cell, without].map(|cell| table::figures(&cell));
    assert!(
        without.refused > 1.5 * with.refused,
        "{with:?}, without rate control {without:?}"
    );
}

/// 1,000 calls of 200 ms at 6,000 a minute, burst 1 s on both sides.
#[tokio::test(start_paused = true)]
async fn a_right_configuration_is_within_a_hundredth_of_the_bound() {
    let cell = Cell::new("exact", 1.0)
        .requests(6_000, 1_000)
        .truth(|truth| {
            truth.latency = Duration::from_millis(200);
            truth.jitter = 0.0;
        });
    let (measured, ledger) = run::run(&cell, 1).await;
    println!(
        "1,000 calls at 6,000 a minute: {:.3?}, bound {:.3?}, ratio {:.4}",
        measured.makespan,
        measured.bound,
        measured.ratio()
    );
    assert!(measured.ratio() <= 1.01, "{measured:?}");
    assert_eq!((measured.rejected, measured.lost), (0, 0));
    for ms in [1, 10, 55, 100, 250, 1_000, 2_000, 5_000, 60_000] {
        let most = ledger.most_granted_in(Duration::from_millis(ms));
        assert!(most <= 100 + ms as usize / 10, "{most} calls in {ms} ms");
    }
}

/// 60 requests a minute, of which the provider stores a minute; calls of 1 s.
#[tokio::test(start_paused = true)]
async fn a_dozen_calls_on_a_small_account_do_not_wait_for_the_rate() {
    let cell = Cell::new("13 calls", 1.0).requests(60, 13).truth(|truth| {
        truth.enforcement = Enforcement::TokenBucket { burst: MINUTE };
        truth.headers = Headers::As(Dialect::OpenAi);
        truth.latency = SECOND;
        truth.jitter = 0.0;
    });
    let sim = cell.with(|cell| cell.burst = None).sim(1);
    let cx = Context::builder(Sim::clone(&sim))
        .pace(Pace::per_minute(60))
        .build();
    let thirteen = async |round: u32| {
        let start = Instant::now();
        let call = |i| cx.generate(Request::new(format!("{round} {i}")));
        for reply in join_all((0..13).map(call)).await {
            reply.expect("a reply");
        }
        start.elapsed()
    };
    let cold = thirteen(1).await;
    sleep(MINUTE).await;
    let warm = thirteen(2).await;
    println!("13 calls of 1 s at 60 a minute: {cold:.2?} at first, {warm:.2?} a minute later");
    assert!(cold <= 4 * SECOND, "{cold:?}");
    assert!(warm <= SECOND.mul_f64(1.05), "{warm:?}");
    assert_eq!(sim.ledger().total.rejected, 0);
}

/// Headers that promise a minute, and windows of a second that they do not mention.
#[tokio::test(start_paused = true)]
async fn a_promise_that_does_not_hold_is_believed_once() {
    let promises = scenarios::all();
    let promises = promises.iter().find(|cell| cell.truth.hidden.is_some());
    let (measured, ledger) = run::run(promises.expect("such a cell"), 1).await;
    let late = ledger.seconds.iter().skip(10);
    let late: u32 = late.map(|second| second.rejected).sum();
    assert_eq!(late, 0, "of {} that were refused", measured.rejected);
    assert!(measured.rejected > 0, "the promise was not tried");
}
