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

use throughline::provider::sim::Headers;
use throughline::ratelimit::Policy;

use crate::cell::Cell;

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
