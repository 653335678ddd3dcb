//! Prints the summary at the end.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use throughline::{Context, Outcome, observe::Event};

pub struct Report {
    limit: u64,
    began: Instant,
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    done: usize,
    failures: BTreeMap<&'static str, usize>,
    latencies: Vec<Duration>,
}

impl Report {
    pub fn new(limit: u64) -> Self {
        Self {
            limit,
            began: Instant::now(),
            counts: Mutex::default(),
        }
    }

    fn counts(&self) -> std::sync::MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn observe(&self, event: &Event) {
        if let Event::CallSucceeded { elapsed, .. } = event {
            self.counts().latencies.push(*elapsed);
        }
    }

    pub fn count<T>(&self, outcome: &Outcome<T>) {
        let mut counts = self.counts();
        match outcome.error() {
            None => counts.done += 1,
            Some(error) => *counts.failures.entry(error.kind().as_str()).or_default() += 1,
        }
    }

    /// Prints the summary and returns the number of failures.
    pub fn print(&self, cx: &Context, output: &Path, unusable: usize, done_before: usize) -> usize {
        let mut counts = self.counts();
        let took = self.began.elapsed();
        let tally = cx.tally();
        let failed = counts.failures.values().sum::<usize>();
        let kinds: Vec<_> = counts
            .failures
            .iter()
            .map(|(kind, count)| format!("{count} {kind}"))
            .collect();

        println!(
            "results   {} in {}",
            done_before + counts.done,
            output.display()
        );
        println!(
            "this run  {} done in {took:.1?}, {done_before} done before",
            counts.done
        );
        if failed > 0 {
            println!("failed    {failed}: {}", kinds.join(", "));
        }
        if unusable > 0 {
            println!("unusable  {unusable} lines of the input, listed above");
        }
        println!(
            "tokens    {} in, {} out",
            tally.usage.input_tokens, tally.usage.output_tokens
        );
        println!(
            "calls     {} attempts, {} refused by the rate limit (429), {} of unknown cost",
            tally.attempts, tally.throttled, tally.ambiguous
        );
        let rate = tally.attempts as f64 / took.as_secs_f64() * 60.0;
        let share = 100.0 * rate / self.limit as f64;
        // A provider that stores its limit while it is not used lets more through at first.
        let stored = if share > 100.0 {
            ", with what was stored"
        } else {
            ""
        };
        println!(
            "rate      {rate:.0} of {} requests per minute ({share:.0} %{stored})",
            self.limit
        );
        counts.latencies.sort_unstable();
        let latencies = &counts.latencies;
        if !latencies.is_empty() {
            // Nearest rank.
            let rank = |p: usize| latencies[(latencies.len() * p).div_ceil(100) - 1];
            println!(
                "latency   P50 {:.0?}, P95 {:.0?}, P99 {:.0?}",
                rank(50),
                rank(95),
                rank(99)
            );
        }
        failed
    }
}
