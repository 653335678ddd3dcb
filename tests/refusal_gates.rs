//! How a lane reacts to refusals that no rate limit explains: the whole crate under Tokio's paused clock against
//! a simulated provider.
//!
//! ```sh
//! cargo test --features sim --test refusal_gates -- --nocapture
//! GATE_SEEDS=30 cargo test --release --features sim --test refusal_gates -- --nocapture
//! ```
//!
//! `GATE_SEEDS` is the number of runs of each cell: 3 in a release build, 1 in a debug build. A release build (or
//! `THROUGHLINE_LONG=1`) runs each cell once more without each policy of the rate limiter, and prints what each policy is worth.
#![allow(missing_docs)]

#[path = "support/ablation.rs"]
mod ablation;

use std::sync::OnceLock;
use std::time::Duration;

use throughline::provider::sim::{Headers, Sim, SimBuilder};
use throughline::ratelimit::{Lane, Policy};
use throughline::{Context, Pace, Retry};
use tokio::time::Instant;

use crate::ablation::Figures;

const SECOND: Duration = Duration::from_secs(1);

/// The figures of one run.
#[derive(Debug, Clone, Copy)]
struct Run {
    seconds: f64,
    /// The part of all calls that was refused.
    refused: f64,
    /// Items without a reply.
    lost: usize,
}

/// A provider that refuses calls for no reason that the lane knows, and the work that is sent to it.
#[derive(Debug, Clone, Copy)]
enum Cell {
    /// This part of the calls is answered with a 503 at random.
    RandomOverloads(f64),
    /// A 503 while this number of calls is in flight, from which second on.
    HiddenConcurrency {
        numbers: &'static [(u64, usize)],
        latency: u64,
        per_minute: u64,
        items: usize,
    },
    /// A tenth of the calls is answered with a 429 at random.
    RandomThrottling {
        per_minute: u64,
        items: usize,
        headers: Headers,
    },
}

impl Cell {
    fn all() -> Vec<Self> {
        [
            Self::overloads(),
            Self::hidden_concurrency(),
            Self::throttling(),
        ]
        .concat()
    }

    fn overloads() -> Vec<Self> {
        [0.001, 0.01].map(Self::RandomOverloads).to_vec()
    }

    fn hidden_concurrency() -> Vec<Self> {
        let hidden = |numbers, latency, per_minute, items| Self::HiddenConcurrency {
            numbers,
            latency,
            per_minute,
            items,
        };
        vec![
            hidden(&[(0, 8)], 2, 6_000, 1_000),
            hidden(&[(0, 100)], 10, 6_000, 2_000),
            hidden(&[(0, 400)], 10, 6_000, 4_000),
            hidden(&[(0, 50)], 1, 6_000, 2_000),
            hidden(&[(0, 24)], 30, 600, 1_000),
            hidden(&[(0, 200), (100, 50)], 5, 6_000, 5_000),
            hidden(&[(0, 50), (150, 200)], 5, 6_000, 8_000),
        ]
    }

    fn throttling() -> Vec<Self> {
        let cells = [
            (600, 2_000, Headers::All),
            (600, 2_000, Headers::None),
            (6_000, 10_000, Headers::None),
            (60, 600, Headers::None),
        ];
        let cells = cells.map(|(per_minute, items, headers)| Self::RandomThrottling {
            per_minute,
            items,
            headers,
        });
        cells.to_vec()
    }

    fn name(&self) -> String {
        match self {
            Self::RandomOverloads(rate) => format!("{} % of 503s", 100.0 * rate),
            Self::HiddenConcurrency {
                numbers, latency, ..
            } => format!("{numbers:?} of {latency} s"),
            Self::RandomThrottling {
                per_minute,
                headers,
                ..
            } => format!("10 % of 429s at {per_minute}, headers {headers:?}"),
        }
    }

    fn per_minute(&self) -> u64 {
        match self {
            Self::RandomOverloads(_) => 6_000,
            Self::HiddenConcurrency { per_minute, .. }
            | Self::RandomThrottling { per_minute, .. } => *per_minute,
        }
    }

    fn items(&self) -> usize {
        match self {
            Self::RandomOverloads(_) => 12_000,
            Self::HiddenConcurrency { items, .. } | Self::RandomThrottling { items, .. } => *items,
        }
    }

    fn provider(&self) -> SimBuilder {
        let provider = Sim::builder();
        match *self {
            Self::RandomOverloads(rate) => provider.latency(10 * SECOND).overload_rate(rate),
            Self::HiddenConcurrency {
                numbers, latency, ..
            } => {
                let provider = provider
                    .latency(Duration::from_secs(latency))
                    .jitter(0.3)
                    .overload_in_flight(numbers[0].1);
                numbers[1..]
                    .iter()
                    .fold(provider, |provider, (at, number)| {
                        let number = Some(*number);
                        provider.change_at(Duration::from_secs(*at), move |limits| {
                            limits.overload_in_flight = number
                        })
                    })
            }
            Self::RandomThrottling {
                per_minute,
                headers,
                ..
            } => provider
                .latency(2 * SECOND)
                .jitter(0.5)
                .requests_per_minute(per_minute)
                .headers(headers)
                .throttle_rate(0.1),
        }
    }

    /// Sends all items at once through a lane of its own, on a clock of its own.
    fn run(&self, seed: u64, without: Option<Policy>) -> Run {
        let pace = Pace::per_minute(self.per_minute());
        let pace = without.into_iter().fold(pace, Pace::without);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let sim = self.provider().seed(seed).reply(|_| "ok").build();
            let cx = Context::builder(Sim::clone(&sim))
                .lane(Lane::seeded(pace, seed))
                .retry(Retry::default().attempts(10))
                .build();
            let began = Instant::now();
            let settled = cx
                .fan_out("item", 0..self.items())
                .join_all()
                .settle(async |cx, item| cx.generate(format!("{item}")).await)
                .await;
            let total = sim.ledger().total;
            let refused = total.rejected + total.faults;
            let sent = total.admitted + total.rejected;
            Run {
                seconds: began.elapsed().as_secs_f64(),
                refused: refused as f64 / sent as f64,
                lost: self.items() - settled.oks().count(),
            }
        })
    }

    /// The time of a run divided by the shortest possible time.
    fn ratio(&self, seconds: f64) -> f64 {
        match self {
            Self::RandomOverloads(_) => {
                static WITHOUT: OnceLock<f64> = OnceLock::new();
                seconds / WITHOUT.get_or_init(|| Self::RandomOverloads(0.0).run(0, None).seconds)
            }
            Self::HiddenConcurrency {
                numbers,
                latency,
                per_minute,
                items,
            } => {
                let ends = numbers[1..].iter().map(|(at, _)| *at as f64);
                let each = numbers.iter().zip(ends.chain([f64::INFINITY]));
                let allowed = each.map(|((from, number), end)| {
                    let rate = (*number as f64 / *latency as f64).min(*per_minute as f64 / 60.0);
                    rate * (end.min(seconds) - *from as f64).max(0.0)
                });
                allowed.sum::<f64>() / *items as f64
            }
            Self::RandomThrottling {
                per_minute, items, ..
            } => seconds * *per_minute as f64 / 60.0 / *items as f64,
        }
    }

    /// Runs all seeds, prints each run and checks it against the bars.
    fn check(&self, most_ratio: f64, most_refused: f64) {
        let runs = ablation::in_parallel(ablation::seeds() as usize, |i| {
            (i + 1, self.run(i as u64 + 1, None))
        });
        for (seed, run) in &runs {
            println!(
                "{}, seed {seed}: {:.3} of the best possible, {:.2} % refused, {} lost",
                self.name(),
                1.0 / self.ratio(run.seconds),
                100.0 * run.refused,
                run.lost
            );
        }
        for (seed, run) in runs {
            let ratio = self.ratio(run.seconds);
            let name = self.name();
            assert!(ratio <= most_ratio, "{name}, seed {seed}: ratio {ratio}");
            assert!(run.refused <= most_refused, "{name}, seed {seed}: {run:?}");
            assert_eq!(run.lost, 0, "{name}, seed {seed}");
        }
    }
}

/// A lane that reacted to each 503 would be slowed down to a hundredth of its pace where one call in a hundred meets one.
#[test]
fn random_overloads_do_not_slow_a_lane_down() {
    for cell in Cell::overloads() {
        cell.check(1.25, 1.0);
    }
}

#[test]
fn a_hidden_number_of_calls_in_flight_is_found_and_used() {
    for cell in Cell::hidden_concurrency() {
        cell.check(1.0 / 0.85, 0.05);
    }
}

/// Sending less does not help against refusals that come as often at any rate.
#[test]
fn random_refusals_do_not_lower_the_rate_for_long() {
    for cell in Cell::throttling() {
        cell.check(1.0 / 0.7, 1.0);
    }
}

#[test]
fn each_policy_is_measured_by_switching_it_off() {
    if ablation::is_enabled() {
        let cells = Cell::all();
        let names: Vec<_> = cells.iter().map(Cell::name).collect();
        ablation::print(&names, |index, without| {
            let cell = cells[index];
            let runs = (1..=ablation::seeds()).map(|seed| cell.run(seed, without));
            Figures::mean(runs.map(|run| Figures {
                ratio: cell.ratio(run.seconds),
                refused: run.refused,
            }))
        });
        return;
    }
    let cell = Cell::hidden_concurrency()[0];
    let [with, without] = [None, Some(Policy::ConcurrencyControl)].map(|it| cell.run(1, it));
    assert!(
        without.refused > 1.5 * with.refused,
        "{with:?}, without concurrency control {without:?}"
    );
}

/// A refusal that no limit explains delays no other call, but its own call waits as long as the provider asks.
#[tokio::test(start_paused = true)]
async fn a_named_wait_holds_up_its_own_call_where_refusals_are_noise() {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use throughline::{Error, ErrorKind, Provider, Reply, Request, Result, Usage, async_trait};

    /// Refuses every tenth call, and remembers when each request was sent.
    #[derive(Default)]
    struct Noisy {
        calls: AtomicUsize,
        sent: Mutex<Vec<(String, Instant)>>,
    }

    #[async_trait]
    impl Provider for Noisy {
        fn name(&self) -> &str {
            "noisy"
        }

        async fn generate(&self, request: &Request) -> Result<Reply> {
            let sent = (request.last_text().to_owned(), Instant::now());
            self.sent.lock().unwrap().push(sent);
            if self.calls.fetch_add(1, Ordering::Relaxed) % 10 == 9 {
                return Err(Error::new(ErrorKind::Throttled, "no").with_wait(2 * SECOND));
            }
            tokio::time::sleep(SECOND).await;
            Ok(Reply::new("ok", Usage::new(1, 1)))
        }
    }

    let noisy = std::sync::Arc::new(Noisy::default());
    let cx = Context::builder(noisy.clone())
        .lane(Lane::seeded(Pace::per_minute(600), 1))
        .build();
    let began = Instant::now();
    let items = cx.fan_out("item", 0..2_000).join_all();
    let settled = items.settle(async |cx, item| cx.generate(format!("{item}")).await);
    assert_eq!(settled.await.oks().count(), 2_000);
    let pace = 2_000.0 / began.elapsed().as_secs_f64() / 10.0;
    assert!(pace >= 0.7, "{pace} of the pace");
    let sent = noisy.sent.lock().unwrap();
    let mut last = std::collections::HashMap::new();
    for (request, at) in sent.iter() {
        if let Some(before) = last.insert(request, *at) {
            assert!(
                *at - before >= 2 * SECOND,
                "{request} after {:?}",
                *at - before
            );
        }
    }
}
