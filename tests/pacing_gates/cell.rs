//! One cell of the table: a provider's truth, what was configured, and the work.

use std::time::Duration;

use fastrand::Rng;
use throughline::provider::OutputCharge;
use throughline::provider::sim::{Enforcement, Headers, Sim, Tokens};
use throughline::ratelimit::Policy;
use throughline::{Pace, Request};

use crate::ablation;
use crate::bound::{Curve, Limit};

const SECOND: Duration = Duration::from_secs(1);

/// The limits that the provider enforces.
#[derive(Debug, Clone)]
pub struct Truth {
    pub requests: Option<u64>,
    pub tokens: Option<u64>,
    pub output_tokens: Option<u64>,
    pub in_flight: Option<usize>,
    pub enforcement: Enforcement,
    /// The second one, of which no header speaks.
    pub hidden: Option<Enforcement>,
    /// Every rate is multiplied by the factor from the time on.
    pub steps: Vec<(Duration, f64)>,
    pub headers: Headers,
    pub retry_after: bool,
    pub refusals_count: bool,
    pub output_charge: OutputCharge,
    pub latency: Duration,
    pub jitter: f64,
    /// Drawn when [`OutputCharge::Produced`]; otherwise an answer is a few tokens.
    pub answers: Tokens,
}

/// How large the items' requests are.
#[derive(Debug, Clone, Copy)]
pub enum Sizes {
    /// All alike, without a limit of tokens.
    Small,
    /// `max_tokens` log-normal around 300, one in a hundred above 4,000.
    HeavyTailed,
    /// Small ones, and one in `one_in` of `tokens` `max_tokens`.
    Some { one_in: usize, tokens: u64 },
    /// All ask for that many, and use what the answer takes.
    Capped(u64),
}

/// A row of the table.
#[derive(Debug, Clone)]
pub struct Cell {
    pub scenario: &'static str,
    /// Of all contexts together ÷ true. `None`: nothing is configured.
    pub configured: Option<f64>,
    pub truth: Truth,
    /// The burst of the configuration; `None` is the default, which the lane learns.
    pub burst: Option<Duration>,
    pub contexts: usize,
    pub items: usize,
    pub sizes: Sizes,
    /// Items of a context that are under way at one time.
    pub parallel: usize,
    pub seeds: u64,
    /// The policy of the lane that is switched off.
    pub without: Option<Policy>,
    /// The largest makespan ÷ bound.
    pub most_ratio: f64,
    /// The largest share of attempts that are rejected.
    pub most_rejected: f64,
}

impl Cell {
    /// A cell with the account's limits unset, a bucket of one second, and calls of 2 s ± 50 %.
    pub fn new(scenario: &'static str, configured: impl Into<Option<f64>>) -> Self {
        let configured = configured.into();
        // A right configuration is never rejected.
        let right = configured.is_some_and(|share| share <= 1.0);
        Self {
            scenario,
            configured,
            truth: Truth {
                requests: None,
                tokens: None,
                output_tokens: None,
                in_flight: None,
                enforcement: Enforcement::TokenBucket { burst: SECOND },
                hidden: None,
                steps: Vec::new(),
                headers: Headers::All,
                retry_after: true,
                refusals_count: false,
                output_charge: OutputCharge::Reserved,
                latency: 2 * SECOND,
                jitter: 0.5,
                answers: Tokens::fixed(4),
            },
            burst: Some(SECOND),
            contexts: 1,
            items: 3_000,
            sizes: Sizes::Small,
            parallel: 64,
            // Nothing is drawn that matters until something is refused.
            seeds: if right { 1 } else { ablation::seeds() },
            without: None,
            most_ratio: 1.10,
            most_rejected: if right { 0.0 } else { 0.02 },
        }
    }

    pub fn requests(mut self, per_minute: u64, items: usize) -> Self {
        self.truth.requests = Some(per_minute);
        self.items = items;
        // Calls take 2 s: twice the calls of a lane at double the limit's pace.
        self.parallel = (per_minute as usize / 7).clamp(16, 8_192);
        self
    }

    #[must_use]
    pub fn truth(mut self, change: impl FnOnce(&mut Truth)) -> Self {
        change(&mut self.truth);
        self
    }

    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    pub fn sim(&self, seed: u64) -> Sim {
        let truth = &self.truth;
        let mut sim = Sim::builder()
            .enforcement(truth.enforcement)
            .headers(truth.headers)
            .retry_after(truth.retry_after)
            .rejected_calls_count(truth.refusals_count)
            .output_charge(truth.output_charge)
            .latency(truth.latency)
            .jitter(truth.jitter)
            .output_tokens(truth.answers)
            .reply(|_| "ok")
            .window_phase(self.phase(seed))
            .seed(seed);
        if let Some(hidden) = truth.hidden {
            sim = sim.hidden_enforcement(hidden);
        }
        if let Some(n) = truth.requests {
            sim = sim.requests_per_minute(n);
        }
        if let Some(n) = truth.tokens {
            sim = sim.tokens_per_minute(n);
        }
        if let Some(n) = truth.output_tokens {
            sim = sim.output_tokens_per_minute(n);
        }
        if let Some(n) = truth.in_flight {
            sim = sim.in_flight(n);
        }
        for (at, factor) in truth.steps.clone() {
            let (requests, tokens) = (truth.requests, truth.tokens);
            let output_tokens = truth.output_tokens;
            sim = sim.change_at(at, move |limits| {
                limits.requests_per_minute = requests.map(|n| scaled(n, factor));
                limits.tokens_per_minute = tokens.map(|n| scaled(n, factor));
                limits.output_tokens_per_minute = output_tokens.map(|n| scaled(n, factor));
            });
        }
        sim.build()
    }

    /// The pace of each context.
    pub fn pace(&self) -> Pace {
        let Some(configured) = self.configured else {
            return self.ablated(Pace::unlimited());
        };
        let share = configured / self.contexts as f64;
        let mut pace = match self.truth.requests {
            Some(n) => Pace::per_minute(scaled(n, share)),
            None => Pace::unlimited(),
        };
        if let Some(n) = self.truth.tokens {
            pace = pace.tokens(scaled(n, share));
        }
        if let Some(n) = self.truth.output_tokens {
            pace = pace.output_tokens(scaled(n, share));
        }
        if let Some(n) = self.truth.in_flight {
            pace = pace.in_flight(scaled(n as u64, share) as usize);
        }
        self.ablated(match self.burst {
            Some(burst) => pace.burst(burst),
            None => pace,
        })
    }

    fn ablated(&self, pace: Pace) -> Pace {
        self.without.into_iter().fold(pace, Pace::without)
    }

    /// The requests of all items.
    pub fn work(&self, seed: u64) -> Vec<Request> {
        let mut rng = Rng::with_seed(seed);
        let request = |i: usize| {
            let request = Request::new(format!("{i:08}"));
            match self.sizes {
                Sizes::Small => request,
                Sizes::HeavyTailed => request.max_tokens(log_normal(&mut rng, 300.0, 4_000.0)),
                Sizes::Some { one_in, tokens } => {
                    let large = i % one_in == one_in / 2;
                    request.max_tokens(if large { tokens } else { 50 })
                }
                Sizes::Capped(tokens) => request.max_tokens(tokens),
            }
        };
        (0..self.items).map(request).collect()
    }

    /// How long before the run the first window began: at random, so that nothing can win by guessing whole seconds.
    fn phase(&self, seed: u64) -> Duration {
        let enforcements = [Some(self.truth.enforcement), self.truth.hidden];
        let lengths = enforcements.into_iter().map(|it| match it {
            Some(Enforcement::FixedWindow(length)) => length,
            _ => Duration::ZERO,
        });
        let longest = lengths.max().unwrap_or_default();
        longest.mul_f64(Rng::with_seed(seed ^ 0x9e37).f64())
    }

    /// The most that a context may send at once: what is configured, or else a second's worth, or what the provider shows
    /// to store where not less than its limit is configured.
    pub fn own_burst(&self) -> Duration {
        let stored = match self.truth.enforcement {
            Enforcement::TokenBucket { burst } if self.truth.headers != Headers::None => burst,
            _ => Duration::ZERO,
        };
        let share = self.configured.unwrap_or(1.0) / self.contexts as f64;
        let learned = if share < 1.0 {
            SECOND
        } else {
            stored.max(SECOND)
        };
        self.burst.unwrap_or(learned)
    }

    /// The limits: those of the provider, of the configuration, and of the headers where
    /// it says less than it enforces (to believe it is no fault).
    pub fn limits(&self, work: &[Request], outputs: &[u64], seed: u64) -> Vec<Limit> {
        let truth = &self.truth;
        let requests = truth.requests.map(|n| {
            let costs = work.iter().map(|_| 1);
            Limit::new(self.curves(n, seed), costs)
        });
        let tokens = truth
            .tokens
            .map(|n| Limit::new(self.curves(n, seed), work.iter().map(tokens)));
        // Produced tokens are charged at the end of a call: those of calls in flight when
        // the last call is admitted is not in its way. Those are the last ones in order: to
        // keep the longest answers for the end one would have to know them before.
        let output_tokens = truth.output_tokens.map(|n| {
            let charged = outputs.len().saturating_sub(self.parallel);
            Limit::new(self.curves(n, seed), outputs[..charged].iter().copied())
        });
        [requests, tokens, output_tokens]
            .into_iter()
            .flatten()
            .collect()
    }

    fn curves(&self, per_minute: u64, seed: u64) -> Vec<Curve> {
        let enforced = [Some(self.truth.enforcement), self.truth.hidden];
        let curve = |enforcement| match enforcement {
            Enforcement::FixedWindow(length) => {
                Curve::windows(per_minute, length, self.phase(seed))
            }
            Enforcement::TokenBucket { burst } => {
                self.stepped(Curve::bucket(per_minute, burst), per_minute)
            }
            other => panic!("no curve for {other:?}"),
        };
        let mut curves: Vec<_> = enforced.into_iter().flatten().map(curve).collect();
        let windows = matches!(self.truth.enforcement, Enforcement::FixedWindow(_));
        let burst = match self.burst {
            // Windows let nothing through beyond their share.
            None if windows => Duration::ZERO,
            _ => self.own_burst(),
        };
        if let Some(configured) = self.configured {
            curves.push(Curve::bucket(scaled(per_minute, configured), burst));
        }
        if let Headers::Wrong(factor) = self.truth.headers
            && factor < 1.0
        {
            curves.push(Curve::bucket(scaled(per_minute, factor), burst));
        }
        curves
    }

    fn stepped(&self, curve: Curve, per_minute: u64) -> Curve {
        let steps = self.truth.steps.iter();
        steps.fold(curve, |curve, (at, factor)| {
            curve.then(*at, scaled(per_minute, *factor))
        })
    }

    /// How many calls may be in flight, by the truth and by the configuration.
    pub fn slots(&self) -> Option<usize> {
        let truth = self.truth.in_flight?;
        let configured = self.configured.map_or(truth, |share| {
            scaled(truth as u64, share).try_into().expect("few slots")
        });
        Some(truth.min(configured))
    }

    /// The longest that a call may wait in a queue that serves in the order of arrival, at
    /// the slowest of the rates: while the charge of all that are under way with it flows
    /// in, or until they have had their turn in the slots.
    pub fn longest_queue(&self, work: &[Request], outputs: &[u64]) -> Duration {
        let share = self.configured.unwrap_or(1.0).min(1.0);
        let slowest = self.truth.steps.iter().map(|(_, factor)| *factor);
        let slowest = slowest.fold(share, f64::min);
        let under_way = (self.parallel * self.contexts).min(self.items);
        let flows_in = |costs: Vec<u64>, per_minute: Option<u64>, calls: usize| {
            let per_minute = per_minute?;
            let most = costs
                .windows(calls.min(costs.len()))
                .map(|w| w.iter().sum::<u64>())
                .max();
            Some(most? as f64 / (slowest * per_minute as f64 / 60.0))
        };
        let truth = &self.truth;
        let each = [
            flows_in(vec![1; work.len()], truth.requests, under_way),
            flows_in(work.iter().map(tokens).collect(), truth.tokens, under_way),
            // Charged at the end, those who have ended are owed for too: as many as can have
            // been in flight at one time.
            flows_in(outputs.to_vec(), truth.output_tokens, 2 * under_way),
            self.slots().map(|slots| {
                let turns = (under_way / slots) as f64;
                turns * truth.latency.as_secs_f64() * (1.0 + truth.jitter)
            }),
        ];
        let longest = each.into_iter().flatten().fold(0.0, f64::max);
        Duration::from_secs_f64(longest)
    }
}

/// The tokens of a request where `max_tokens` is reserved.
fn tokens(request: &Request) -> u64 {
    request.estimated_input_tokens() + request.max_tokens.unwrap_or(0)
}

fn scaled(n: u64, factor: f64) -> u64 {
    ((n as f64 * factor).round() as u64).max(1)
}

fn log_normal(rng: &mut Rng, median: f64, p99: f64) -> u64 {
    let radius = (-2.0 * (1.0 - rng.f64()).ln()).sqrt();
    let normal = radius * (std::f64::consts::TAU * rng.f64()).cos();
    let sigma = (p99 / median).ln() / 2.326;
    (median * (sigma * normal).exp()).clamp(1.0, 20_000.0) as u64
}
