//! Runs a cell under Tokio's paused clock and measures it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use throughline::provider::sim::{Ledger, Sim};
use throughline::{Context, Request, Settled, observe::Event, ratelimit::Lane};
use tokio::time::Instant;

use crate::bound::{Calls, lower_bound};
use crate::cell::Cell;

/// The figures of one run of a cell.
#[derive(Debug, Clone, Copy)]
pub struct Measured {
    pub makespan: Duration,
    pub bound: Duration,
    pub attempts: u64,
    pub rejected: u64,
    /// Items without a reply.
    pub lost: usize,
    /// The longest time from an item's start to its reply.
    pub longest: Duration,
    /// What [`Measured::longest`] may be at most where nothing is rejected.
    pub longest_queue: Duration,
    /// A window in which more was sent than configured.
    pub above_limit: Option<Duration>,
    pub most_ratio: f64,
    pub most_rejected: f64,
}

impl Measured {
    pub fn ratio(&self) -> f64 {
        self.makespan.as_secs_f64() / self.bound.as_secs_f64()
    }

    pub fn rejected_share(&self) -> f64 {
        self.rejected as f64 / self.attempts.max(1) as f64
    }

    /// Which of the bars it misses, the same bar always in the same place.
    pub fn misses(&self) -> [Option<String>; 5] {
        let right = self.most_rejected == 0.0;
        let rejected = 100.0 * self.rejected_share();
        let too_long = right && self.longest > self.longest_queue.mul_f64(1.1);
        [
            (self.ratio() > self.most_ratio).then(|| format!("{:.3} of the bound", self.ratio())),
            (self.rejected_share() > self.most_rejected)
                .then(|| format!("{rejected:.2} % rejected")),
            (self.lost > 0).then(|| format!("{} lost", self.lost)),
            too_long.then(|| format!("one waited {:.0?}", self.longest)),
            self.above_limit
                .map(|window| format!("too many in {window:?}")),
        ]
    }
}

/// The first window in which more calls got through than all lanes together may send.
fn above_limit(cell: &Cell, ledger: &Ledger) -> Option<Duration> {
    let per_second = cell.truth.requests? as f64 * cell.configured? / 60.0;
    let windows = [0.1, 1.0, 10.0, 60.0].map(Duration::from_secs_f64);
    windows.into_iter().find(|window| {
        let burst = f64::max(
            per_second * cell.own_burst().as_secs_f64(),
            cell.contexts as f64,
        );
        let most = burst + per_second * window.as_secs_f64();
        ledger.most_granted_in(*window) as f64 > most + 1e-6
    })
}

/// The time the answered calls took.
#[derive(Debug, Default)]
struct Latencies(Mutex<Calls>);

impl Latencies {
    fn observe(&self, event: &Event) {
        if let Event::CallSucceeded { elapsed, .. } = event {
            let mut calls = self.0.lock().unwrap();
            calls.total += *elapsed;
            calls.longest_path = calls.longest_path.max(*elapsed);
            let shortest = calls.shortest;
            calls.shortest = match shortest.is_zero() {
                true => *elapsed,
                false => shortest.min(*elapsed),
            };
        }
    }
}

/// Runs `cell` once, on a runtime of its own.
pub fn measure(cell: &Cell, seed: u64) -> Measured {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(run(cell, seed)).0
}

/// Runs `cell` once: what it came to, and what the provider saw.
pub async fn run(cell: &Cell, seed: u64) -> (Measured, Ledger) {
    let sim = cell.sim(seed);
    let latencies = Arc::new(Latencies::default());
    let work = cell.work(seed);
    let began = Instant::now();
    let contexts = work.chunks(work.len().div_ceil(cell.contexts));
    let contexts = contexts.enumerate().map(|(i, share)| {
        let lane = Lane::seeded(cell.pace(), seed * 100 + i as u64);
        let told = Arc::clone(&latencies);
        let cx = Context::builder(Sim::clone(&sim))
            .lane(lane)
            .on_event(move |event| told.observe(event))
            .build();
        settle(cx, share.to_vec(), cell.parallel)
    });
    let settled = join_all(contexts).await;
    let makespan = began.elapsed();

    let mut calls = *latencies.0.lock().unwrap();
    calls.in_flight = cell.slots();
    let outcomes = || settled.iter().flat_map(Settled::outcomes);
    let outputs: Vec<u64> = outcomes()
        .filter_map(|outcome| outcome.result.as_ref().ok().copied())
        .collect();
    let ledger = sim.ledger();
    let measured = Measured {
        makespan,
        bound: lower_bound(&cell.limits(&work, &outputs, seed), calls),
        attempts: ledger.total.admitted + ledger.total.rejected,
        rejected: ledger.total.rejected,
        lost: cell.items - outputs.len(),
        longest: outcomes().map(|o| o.elapsed).max().unwrap_or_default(),
        longest_queue: cell.longest_queue(&work, &outputs) + calls.longest_path,
        above_limit: above_limit(cell, &ledger),
        most_ratio: cell.most_ratio,
        most_rejected: cell.most_rejected,
    };
    (measured, ledger)
}

/// The output tokens of each item's reply.
async fn settle(cx: Context, work: Vec<Request>, parallel: usize) -> Settled<u64> {
    cx.fan_out("item", work)
        .buffer_unordered(parallel)
        .settle(|cx, request| async move { Ok(cx.generate(request).await?.usage.output_tokens) })
        .await
}
