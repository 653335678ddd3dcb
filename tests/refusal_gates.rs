//! What a lane makes of refusals that no rate limit explains: the whole crate under Tokio's paused clock against
//! a simulated provider.
//!
//! ```sh
//! cargo test --features sim --test refusal_gates -- --nocapture
//! GATE_SEEDS=30 cargo test --release --features sim --test refusal_gates -- --nocapture
//! ```
#![allow(missing_docs)]

use std::time::Duration;

use throughline::provider::sim::{Headers, Sim, SimBuilder};
use throughline::{Context, Pace, Retry, ratelimit::Lane};
use tokio::time::Instant;

const SECOND: Duration = Duration::from_secs(1);

/// How many runs each cell is made of.
fn seeds() -> impl Iterator<Item = u64> {
    let seeds = std::env::var("GATE_SEEDS").ok();
    let seeds = seeds.map_or(3, |seeds| seeds.parse().expect("GATE_SEEDS is a number"));
    1..=seeds
}

/// What a run came to.
#[derive(Debug, Clone, Copy)]
struct Run {
    seconds: f64,
    /// The part of all calls that was refused.
    refused: f64,
    /// Items without a reply.
    lost: usize,
}

/// Sends `items` at once through a lane of its own, on a clock of its own.
fn run(provider: impl FnOnce() -> SimBuilder, pace: Pace, items: usize, seed: u64) -> Run {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        let sim = provider().seed(seed).reply(|_| "ok").build();
        let cx = Context::builder(Sim::clone(&sim))
            .lane(Lane::seeded(pace, seed))
            .retry(Retry::default().attempts(10))
            .build();
        let began = Instant::now();
        let settled = cx
            .fan_out("item", 0..items)
            .join_all()
            .settle(async |cx, item| cx.generate(format!("{item}")).await)
            .await;
        let total = sim.ledger().total;
        let refused = total.rejected + total.faults;
        let sent = total.admitted + total.rejected;
        Run {
            seconds: began.elapsed().as_secs_f64(),
            refused: refused as f64 / sent as f64,
            lost: items - settled.oks().count(),
        }
    })
}

/// A lane that reacts to each 503 is slowed down by noise: to a hundredth of its pace, where one call in
/// a hundred meets one.
#[test]
fn random_overloads_do_not_slow_a_lane_down() {
    let of = |rate, seed| {
        let provider = || Sim::builder().latency(10 * SECOND).overload_rate(rate);
        run(provider, Pace::per_minute(6_000), 12_000, seed)
    };
    let without = of(0.0, 0).seconds;
    for rate in [0.001, 0.01] {
        for seed in seeds() {
            let Run { seconds, lost, .. } = of(rate, seed);
            let ratio = seconds / without;
            println!(
                "{} % of 503s, seed {seed}: {ratio:.3}, {lost} lost",
                100.0 * rate
            );
            assert!(ratio <= 1.25, "{ratio} of the time without them");
            assert_eq!(lost, 0);
        }
    }
}

/// A provider that answers 503 while so many calls are in flight, from which second on.
struct Hidden {
    numbers: &'static [(u64, usize)],
    latency: u64,
    per_minute: u64,
    items: usize,
}

impl Hidden {
    fn provider(&self) -> SimBuilder {
        let (_, first) = self.numbers[0];
        let provider = Sim::builder()
            .latency(Duration::from_secs(self.latency))
            .jitter(0.3)
            .overload_in_flight(first);
        self.numbers[1..]
            .iter()
            .fold(provider, |provider, (at, number)| {
                let number = Some(*number);
                provider.change_at(Duration::from_secs(*at), move |limits| {
                    limits.overload_in_flight = number
                })
            })
    }

    /// How many calls the numbers and the pace allow in so many seconds.
    fn allowed(&self, seconds: f64) -> f64 {
        let ends = self.numbers[1..].iter().map(|(at, _)| *at as f64);
        let each = self.numbers.iter().zip(ends.chain([f64::INFINITY]));
        let each = each.map(|((from, number), end)| {
            let rate = (*number as f64 / self.latency as f64).min(self.per_minute as f64 / 60.0);
            rate * (end.min(seconds) - *from as f64).max(0.0)
        });
        each.sum()
    }
}

#[test]
fn a_hidden_number_of_calls_in_flight_is_found_and_used() {
    let hidden = |numbers, latency, per_minute, items| Hidden {
        numbers,
        latency,
        per_minute,
        items,
    };
    let cells = [
        hidden(&[(0, 8)], 2, 6_000, 1_000),
        hidden(&[(0, 100)], 10, 6_000, 2_000),
        hidden(&[(0, 400)], 10, 6_000, 4_000),
        hidden(&[(0, 50)], 1, 6_000, 2_000),
        hidden(&[(0, 24)], 30, 600, 1_000),
        hidden(&[(0, 200), (100, 50)], 5, 6_000, 5_000),
        hidden(&[(0, 50), (150, 200)], 5, 6_000, 8_000),
    ];
    for cell in cells {
        for seed in seeds() {
            let pace = Pace::per_minute(cell.per_minute);
            let run = run(|| cell.provider(), pace, cell.items, seed);
            let goodput = cell.items as f64 / cell.allowed(run.seconds);
            println!(
                "{:?} of {} s, seed {seed}: {goodput:.3} of what they allow, {:.2} % refused, {} lost",
                cell.numbers,
                cell.latency,
                100.0 * run.refused,
                run.lost
            );
            assert!(
                goodput >= 0.85,
                "{goodput} of what {:?} allow",
                cell.numbers
            );
            assert!(run.refused <= 0.05, "{} of {:?}", run.refused, cell.numbers);
            assert_eq!(run.lost, 0);
        }
    }
}

/// To send less is no cure for refusals that come as often at any rate.
#[test]
fn random_refusals_do_not_lower_the_rate_for_long() {
    let cells = [
        (600, 2_000, Headers::All),
        (600, 2_000, Headers::None),
        (6_000, 10_000, Headers::None),
        (60, 600, Headers::None),
    ];
    for (per_minute, items, headers) in cells {
        for seed in seeds() {
            let provider = || {
                let provider = Sim::builder().latency(2 * SECOND).jitter(0.5);
                provider
                    .requests_per_minute(per_minute)
                    .headers(headers)
                    .throttle_rate(0.1)
            };
            let run = run(provider, Pace::per_minute(per_minute), items, seed);
            let pace = items as f64 / run.seconds / (per_minute as f64 / 60.0);
            println!(
                "{per_minute} a minute, headers {headers:?}, seed {seed}: {pace:.3} of the pace, {:.1} % \
                 refused",
                100.0 * run.refused
            );
            assert!(pace >= 0.7, "{pace} of {per_minute} a minute");
            assert_eq!(run.lost, 0);
        }
    }
}

/// A refusal that no limit explains holds up no other call, but its own call waits as long as it was asked to.
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
