//! Measures what each policy of the rate limiter is worth: every cell once more with the policy switched off.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use throughline::ratelimit::Policy;

/// A policy is worth keeping if a cell without it takes this much more of its lower bound,
const WORTH_RATIO: f64 = 0.01;
/// or has this much more of its calls refused.
const WORTH_REFUSED: f64 = 0.001;

/// The figures of a cell, as means over its seeds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Figures {
    /// Time divided by the lower bound.
    pub ratio: f64,
    /// The part of the calls that was refused.
    pub refused: f64,
}

impl Figures {
    pub fn mean(runs: impl IntoIterator<Item = Self>) -> Self {
        let (mut sum, mut n) = (Self::default(), 0.0);
        for run in runs {
            sum.ratio += run.ratio;
            sum.refused += run.refused;
            n += 1.0;
        }
        Self {
            ratio: sum.ratio / n,
            refused: sum.refused / n,
        }
    }
}

/// How many seeds each cell runs with: `GATE_SEEDS`, or else 3 in a release build and 1 in a debug build.
pub fn seeds() -> u64 {
    let default = if cfg!(debug_assertions) { 1 } else { 3 };
    let seeds = std::env::var("GATE_SEEDS").ok();
    seeds.map_or(default, |seeds| {
        seeds.parse().expect("GATE_SEEDS is a number")
    })
}

/// Whether the whole table is to be measured: it takes minutes in a debug build.
pub fn is_enabled() -> bool {
    !cfg!(debug_assertions) || std::env::var_os("THROUGHLINE_LONG").is_some()
}

/// Calls `work` with each number below `n`, on as many threads as the machine has.
pub fn in_parallel<T: Send>(n: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::new());
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= n {
                        return;
                    }
                    let result = work(index);
                    done.lock().unwrap().push((index, result));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap();
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

/// Measures all cells with and without each policy, and prints for each policy the two cells that need it most.
pub fn print(cells: &[String], measure: impl Fn(usize, Option<Policy>) -> Figures + Sync) {
    let variants: Vec<_> = [None]
        .into_iter()
        .chain(Policy::ALL.into_iter().map(Some))
        .collect();
    let figures = in_parallel(variants.len() * cells.len(), |job| {
        measure(job % cells.len(), variants[job / cells.len()])
    });
    let (with, without) = figures.split_at(cells.len());
    println!(
        "\n{:<22} {:>8}  {:<34} {:>10}  {:<34} worth",
        "without", "ratio", "in", "refused", "in"
    );
    for (policy, without) in Policy::ALL.iter().zip(without.chunks(cells.len())) {
        let most = |figure: fn(&Figures) -> f64| {
            let worse = (0..cells.len()).map(|i| (i, figure(&without[i]) - figure(&with[i])));
            worse
                .max_by(|(_, a), (_, b)| a.total_cmp(b))
                .expect("a cell")
        };
        let (slower, ratio) = most(|figures| figures.ratio);
        let (noisier, refused) = most(|figures| figures.refused);
        let worth = ratio >= WORTH_RATIO || refused >= WORTH_REFUSED;
        println!(
            "{:<22} {:>+8.3}  {:<34} {:>+8.2} %  {:<34} {}",
            format!("{policy:?}"),
            ratio,
            cells[slower],
            100.0 * refused,
            cells[noisier],
            if worth { "yes" } else { "NO" }
        );
    }
}
