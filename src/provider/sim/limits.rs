//! [`Limits`] and how they are enforced: which call is let in, and what is said of it.

use std::collections::VecDeque;
use std::time::Duration;

use super::meter::{Bucket, Meter, Window};
use crate::usage::{Quota, RateSnapshot};

/// The limits of the simulated account. `None` is no limit; zero panics where it is set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Calls per minute.
    pub requests_per_minute: Option<u64>,
    /// Input and output tokens together, per minute.
    pub tokens_per_minute: Option<u64>,
    /// Input tokens per minute.
    pub input_tokens_per_minute: Option<u64>,
    /// Output tokens per minute.
    pub output_tokens_per_minute: Option<u64>,
    /// Calls in flight at one time.
    pub in_flight: Option<usize>,
    /// Calls in flight at one time above which the provider is overloaded (503).
    pub overload_in_flight: Option<usize>,
    /// Calls the account is good for: every later one is refused as `insufficient_quota`,
    /// which no waiting cures. Zero is allowed here: the account is empty from the start.
    pub total_calls: Option<u64>,
}

impl Limits {
    fn rates(&self) -> [Option<u64>; 4] {
        [
            self.requests_per_minute,
            self.tokens_per_minute,
            self.input_tokens_per_minute,
            self.output_tokens_per_minute,
        ]
    }

    /// # Panics
    /// If a limit other than `total_calls` is zero.
    pub(super) fn check(&self) {
        for (rate, resource) in self.rates().into_iter().zip(RESOURCES) {
            assert!(
                rate != Some(0),
                "a limit of zero {resource} per minute lets nothing through, ever; \
                 `None` is no limit"
            );
        }
        assert!(
            self.in_flight != Some(0),
            "a limit of zero calls in flight lets nothing through, ever; `None` is no limit"
        );
        assert!(
            self.overload_in_flight != Some(0),
            "a provider overloaded by no calls lets nothing through, ever; `None` is no limit"
        );
    }
}

/// How the limits per minute are enforced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Enforcement {
    /// A bucket that starts full, holds `burst` worth of the limit (one unit at least)
    /// and refills continuously. In any window of length `w` at most
    /// `limit × (burst + w)` passes.
    ///
    /// A call for more tokens than the bucket holds passes when it is full, and owes the rest.
    TokenBucket {
        /// How much of the limit may pass at once, as a time. A minute is what
        /// Anthropic documents and what OpenAI's headers show.
        burst: Duration,
    },
    /// Windows of this length, aligned to the start of the simulation, each with its share
    /// of the limit; what one does not use is gone. A minute is the textbook counter, a
    /// second the strict reading of "60 per minute" as "1 per second".
    FixedWindow(Duration),
}

impl Default for Enforcement {
    /// A bucket that holds a minute.
    fn default() -> Self {
        Self::TokenBucket {
            burst: Duration::from_secs(60),
        }
    }
}

impl Enforcement {
    fn meter(self, per_minute: u64, now: Duration) -> Box<dyn Meter> {
        match self {
            Self::TokenBucket { burst } => Box::new(Bucket::full(per_minute, burst, now)),
            Self::FixedWindow(length) => Box::new(Window::new(per_minute, length, now)),
        }
    }
}

/// The rate-limit metadata that replies and errors carry.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub enum Headers {
    /// Every limit there is: the limit per minute, what is left now, and how long until
    /// all of it is back.
    #[default]
    All,
    /// The limit on requests only.
    RequestsOnly,
    /// Every limit, with limit and remainder multiplied by this factor: a provider that
    /// does not say the truth. The resets stay right.
    Wrong(f64),
    /// None.
    None,
}

/// A change of the limits in the middle of the simulation.
pub(super) type Change = Box<dyn Fn(&mut Limits) + Send>;

/// What a call takes of each limit, in the order of `RESOURCES`.
pub(super) type Cost = [u64; 4];

const RESOURCES: [&str; 4] = ["requests", "tokens", "input tokens", "output tokens"];

/// Why a call is not let in.
pub(super) struct Refusal {
    pub(super) message: String,
    /// How long until the same call would be let in, unless others come first. Unknown
    /// for calls in flight: nobody can say when one of them ends.
    pub(super) wait: Option<Duration>,
}

/// All limits of the account at one moment.
pub(super) struct Limiter {
    limits: Limits,
    enforcement: Enforcement,
    meters: [Option<Box<dyn Meter>>; 4],
    /// By time, earliest first.
    schedule: VecDeque<(Duration, Change)>,
}

impl Limiter {
    pub(super) fn new(
        limits: Limits,
        enforcement: Enforcement,
        mut schedule: Vec<(Duration, Change)>,
    ) -> Self {
        schedule.sort_by_key(|(at, _)| *at);
        // A rehearsal, so that a wrong change is found here and not in the middle of a run.
        let mut rehearsal = limits;
        rehearsal.check();
        for (_, change) in &schedule {
            change(&mut rehearsal);
            rehearsal.check();
        }
        Self {
            limits,
            enforcement,
            meters: limits
                .rates()
                .map(|rate| rate.map(|rate| enforcement.meter(rate, Duration::ZERO))),
            schedule: schedule.into(),
        }
    }

    pub(super) fn limits(&self) -> Limits {
        self.limits
    }

    /// Moves on to `now`, through every change scheduled until then.
    pub(super) fn advance(&mut self, now: Duration) {
        while self.schedule.front().is_some_and(|(at, _)| *at <= now) {
            if let Some((at, change)) = self.schedule.pop_front() {
                let mut limits = self.limits;
                change(&mut limits);
                self.retune(at, limits);
            }
        }
        self.advance_meters(now);
    }

    fn advance_meters(&mut self, now: Duration) {
        for meter in self.meters.iter_mut().flatten() {
            meter.advance(now);
        }
    }

    /// Puts `limits` in force at `now`. A limit that was there keeps what is used of it;
    /// a new one starts unused.
    pub(super) fn retune(&mut self, now: Duration, limits: Limits) {
        limits.check();
        self.advance_meters(now);
        self.limits = limits;
        for (meter, rate) in self.meters.iter_mut().zip(limits.rates()) {
            match (meter.as_mut(), rate) {
                (Some(meter), Some(rate)) => meter.retune(rate),
                (_, rate) => *meter = rate.map(|rate| self.enforcement.meter(rate, now)),
            }
        }
    }

    /// Lets a call in and takes its cost of every limit, or refuses it and takes nothing;
    /// with `refusals_count` a refusal takes a request where one is left.
    pub(super) fn admit(
        &mut self,
        cost: Cost,
        in_flight: usize,
        refusals_count: bool,
    ) -> Result<(), Refusal> {
        let crowded = self.limits.in_flight.filter(|limit| in_flight >= *limit);
        let short = self.shortest(cost);
        if crowded.is_none() && short.is_none() {
            self.spend(cost);
            return Ok(());
        }
        if refusals_count && let Some(requests) = &mut self.meters[0] {
            requests.waste();
        }
        // Asked again, as the refusal itself may have moved it.
        let wait = self.shortest(cost);
        Err(match (crowded, short) {
            (Some(limit), _) => Refusal {
                message: format!("{limit} calls in flight is the limit"),
                wait: None,
            },
            (None, short) => Refusal {
                message: short.map_or_else(String::new, |(i, _)| {
                    format!(
                        "rate limit reached for {}: limit {} per minute, requested {}",
                        RESOURCES[i],
                        self.limits.rates()[i].unwrap_or(0),
                        cost[i],
                    )
                }),
                wait: wait.map(|(_, nanos)| duration(nanos)),
            },
        })
    }

    /// The limit that keeps `cost` waiting longest, and for how long.
    fn shortest(&self, cost: Cost) -> Option<(usize, u128)> {
        let waits = self.meters.iter().zip(cost).enumerate();
        waits
            .filter_map(|(i, (meter, cost))| Some((i, meter.as_ref()?.wait(cost))))
            .filter(|(_, wait)| *wait > 0)
            .max_by_key(|(_, wait)| *wait)
    }

    /// Takes a cost that is known only afterwards.
    pub(super) fn spend(&mut self, cost: Cost) {
        for (meter, cost) in self.meters.iter_mut().zip(cost) {
            if let Some(meter) = meter {
                meter.spend(cost);
            }
        }
    }

    /// What a provider with these `headers` says of its limits.
    pub(super) fn snapshot(&self, headers: Headers) -> RateSnapshot {
        let (shown, factor) = match headers {
            Headers::All => (4, 1.0),
            Headers::RequestsOnly => (1, 1.0),
            Headers::Wrong(factor) => (4, factor),
            Headers::None => (0, 1.0),
        };
        let scaled = |n: u64| (n as f64 * factor).round() as u64;
        let mut quotas = [Quota::default(); 4];
        for (i, (meter, rate)) in self.meters.iter().zip(self.limits.rates()).enumerate() {
            if let (Some(meter), true) = (meter, i < shown) {
                quotas[i] = Quota {
                    limit: rate.map(scaled),
                    remaining: Some(scaled(meter.remaining())),
                    reset: Some(duration(meter.reset())),
                };
            }
        }
        let [requests, tokens, input_tokens, output_tokens] = quotas;
        RateSnapshot {
            requests,
            tokens,
            input_tokens,
            output_tokens,
            retry_after: None,
        }
    }
}

fn duration(nanos: u128) -> Duration {
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(requests: u64, tokens: u64) -> Limits {
        Limits {
            requests_per_minute: Some(requests),
            tokens_per_minute: Some(tokens),
            ..Limits::default()
        }
    }

    #[test]
    fn all_or_nothing_and_the_longest_wait() {
        let mut limiter = Limiter::new(limits(60, 600), Enforcement::default(), Vec::new());
        assert!(limiter.admit([1, 600, 0, 0], 0, false).is_ok());
        let refusal = limiter.admit([1, 10, 0, 0], 0, false).err().unwrap();
        assert_eq!(refusal.wait, Some(Duration::from_secs(1)));
        assert!(refusal.message.contains("for tokens: limit 600"));
        let said = limiter.snapshot(Headers::All);
        assert_eq!(said.requests.remaining, Some(59));
        assert_eq!(said.tokens.remaining, Some(0));
        assert_eq!(said.tokens.reset, Some(Duration::from_secs(60)));
        assert_eq!(said.input_tokens, Quota::default());
    }

    #[test]
    fn a_refusal_that_counts_moves_its_own_wait() {
        let burst = Duration::from_secs(1);
        let mut limiter = Limiter::new(
            limits(60, 600),
            Enforcement::TokenBucket { burst },
            Vec::new(),
        );
        assert!(limiter.admit([1, 1, 0, 0], 0, true).is_ok());
        limiter.advance(Duration::from_millis(900));
        let refusal = limiter.admit([1, 1, 0, 0], 0, true).err().unwrap();
        assert_eq!(refusal.wait, Some(Duration::from_secs(1)));
    }

    #[test]
    fn scheduled_changes_happen_in_order_at_their_own_time() {
        let change = |n| -> Change { Box::new(move |l| l.requests_per_minute = Some(n)) };
        let burst = Duration::from_secs(60);
        let mut limiter = Limiter::new(
            limits(60, 600),
            Enforcement::TokenBucket { burst },
            vec![
                (Duration::from_secs(20), change(120)),
                (Duration::from_secs(10), change(6)),
            ],
        );
        limiter.spend([60, 0, 0, 0]);
        // 10 s at 60 a minute is 10, of which 6 fit; 10 s at 6 add none; 1 s at 120 adds 2.
        limiter.advance(Duration::from_secs(21));
        assert_eq!(limiter.snapshot(Headers::All).requests.remaining, Some(8));
        assert_eq!(limiter.limits().requests_per_minute, Some(120));
    }

    #[test]
    #[should_panic(expected = "a limit of zero requests per minute")]
    fn a_scheduled_zero_is_found_at_once() {
        let zero: Change = Box::new(|l| l.requests_per_minute = Some(0));
        Limiter::new(
            limits(60, 600),
            Enforcement::default(),
            vec![(Duration::from_secs(1), zero)],
        );
    }
}
