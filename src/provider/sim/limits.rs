//! [`Limits`] and their enforcement: which calls are admitted, and the rate-limit metadata of replies.

use std::collections::VecDeque;
use std::time::Duration;

use super::limit::{FixedWindow, Limit, TokenBucket};
use crate::usage::{Quota, RateSnapshot};

/// The limits of the simulated account. `None` is no limit; setting zero panics.
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
    /// Calls until the quota is exhausted: every later one is refused as `insufficient_quota`.
    /// Zero is allowed here: the quota is exhausted from the start.
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
    /// A token bucket that starts full, holds `burst` at the limit's rate (at least one unit)
    /// and refills continuously. In any window of length `w` at most
    /// `limit × (burst + w)` passes.
    ///
    /// A call for more tokens than the bucket holds passes when it is full, and leaves a debt.
    TokenBucket {
        /// The burst, as the time in which the bucket refills. It is a minute in Anthropic's
        /// documentation and according to OpenAI's headers.
        burst: Duration,
    },
    /// Windows of this length, each with its share
    /// of the limit. An unused share is lost. A minute is the textbook counter; a second is the
    /// strict reading of "60 per minute" as "1 per second". The first begins with the simulation, or before it
    /// ([`SimBuilder::window_phase`](super::SimBuilder::window_phase)).
    FixedWindow(Duration),
}

impl Default for Enforcement {
    /// Returns a token bucket that holds a minute.
    fn default() -> Self {
        Self::TokenBucket {
            burst: Duration::from_secs(60),
        }
    }
}

impl Enforcement {
    fn limit(self, per_minute: u64, phase: Duration, now: Duration) -> Box<dyn Limit> {
        match self {
            Self::TokenBucket { burst } => Box::new(TokenBucket::full(per_minute, burst, now)),
            Self::FixedWindow(length) => Box::new(FixedWindow::new(per_minute, length, phase, now)),
        }
    }
}

/// The rate-limit metadata that replies and errors carry.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub enum Headers {
    /// For every limit: the limit per minute, the remaining amount, and the time until it is
    /// unused again.
    #[default]
    All,
    /// The limit on requests only.
    RequestsOnly,
    /// As `All`, with limit and remaining amount multiplied by this factor: a provider with
    /// wrong headers. The resets stay right.
    Wrong(f64),
    /// As `All`, rounded and left out as by this provider.
    As(Dialect),
    /// No metadata.
    None,
}

/// How a provider reports its limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Dialect {
    /// Resets in milliseconds.
    OpenAi,
    /// Resets in whole seconds, and tokens rounded to thousands.
    Anthropic,
    /// Resets in whole seconds.
    Azure,
    /// Requests per day, as many as the limit per minute allows in a day. The limit per minute is not reported.
    Groq,
    /// No resets.
    Mistral,
}

impl Dialect {
    fn report(self, resource: usize, quota: Quota) -> Quota {
        let rounded = |unit: Duration| {
            let units = |reset: Duration| reset.as_nanos().div_ceil(unit.as_nanos()) as u32;
            quota.reset.map(|reset| unit * units(reset))
        };
        let thousands = |n: u64| n.saturating_add(500) / 1_000 * 1_000;
        let mut report = quota;
        match self {
            Self::OpenAi | Self::Groq => report.reset = rounded(Duration::from_millis(1)),
            Self::Azure => report.reset = rounded(Duration::from_secs(1)),
            Self::Mistral => report.reset = None,
            Self::Anthropic => {
                report.reset = rounded(Duration::from_secs(1));
                if resource > 0 {
                    report.remaining = quota.remaining.map(thousands);
                }
            }
        }
        report
    }
}

/// A scheduled change of the limits.
pub(super) type Change = Box<dyn Fn(&mut Limits) + Send>;

/// The cost of a call for each limit, in the order of `RESOURCES`.
pub(super) type Cost = [u64; 4];

const RESOURCES: [&str; 4] = ["requests", "tokens", "input tokens", "output tokens"];

/// The reason why a call is not admitted.
pub(super) struct Refusal {
    pub(super) message: String,
    /// The time until the same call would be admitted, unless others come first. Unknown for
    /// the limit on calls in flight, because the end of a call is not known in advance.
    pub(super) wait: Option<Duration>,
}

type ByResource = [Option<Box<dyn Limit>>; 4];

const DAY: Duration = Duration::from_secs(86_400);

/// All limits of the account at one moment.
pub(super) struct LimitSet {
    limits: Limits,
    enforcement: Enforcement,
    window_phase: Duration,
    /// One for each of `RESOURCES`.
    by_resource: ByResource,
    /// The same limits enforced in a second way, of which no header speaks.
    hidden: Option<(Enforcement, ByResource)>,
    /// The requests of a day.
    day: Option<TokenBucket>,
    /// In the order of time.
    schedule: VecDeque<(Duration, Change)>,
}

impl LimitSet {
    pub(super) fn new(
        limits: Limits,
        enforcement: Enforcement,
        hidden: Option<Enforcement>,
        window_phase: Duration,
        mut schedule: Vec<(Duration, Change)>,
    ) -> Self {
        schedule.sort_by_key(|(at, _)| *at);
        // Applies all changes once, so that an invalid one panics here and not during a run.
        let mut rehearsal = limits;
        rehearsal.check();
        for (_, change) in &schedule {
            change(&mut rehearsal);
            rehearsal.check();
        }
        let by_resource = |enforcement: Enforcement| {
            let limit = |rate| enforcement.limit(rate, window_phase, Duration::ZERO);
            limits.rates().map(|rate| rate.map(limit))
        };
        let day = |rate| TokenBucket::full(rate, DAY, Duration::ZERO);
        Self {
            limits,
            enforcement,
            window_phase,
            by_resource: by_resource(enforcement),
            hidden: hidden.map(|enforcement| (enforcement, by_resource(enforcement))),
            day: limits.requests_per_minute.map(day),
            schedule: schedule.into(),
        }
    }

    pub(super) fn current(&self) -> Limits {
        self.limits
    }

    /// Advances to `now`, and applies every change that was scheduled until then.
    pub(super) fn advance(&mut self, now: Duration) {
        while self.schedule.front().is_some_and(|(at, _)| *at <= now) {
            if let Some((at, change)) = self.schedule.pop_front() {
                let mut limits = self.limits;
                change(&mut limits);
                self.apply(at, limits);
            }
        }
        self.advance_limits(now);
    }

    fn advance_limits(&mut self, now: Duration) {
        for limit in self.each_mut() {
            limit.advance(now);
        }
        if let Some(day) = &mut self.day {
            day.advance(now);
        }
    }

    fn each_mut(&mut self) -> impl Iterator<Item = &mut Box<dyn Limit>> {
        let hidden = self.hidden.iter_mut().flat_map(|(_, limits)| limits);
        self.by_resource.iter_mut().chain(hidden).flatten()
    }

    /// Applies `limits` at `now`. A limit that existed before keeps its used amount; a new one
    /// starts unused.
    pub(super) fn apply(&mut self, now: Duration, limits: Limits) {
        limits.check();
        self.advance_limits(now);
        self.limits = limits;
        let all = [(self.enforcement, &mut self.by_resource)];
        let hidden = self.hidden.as_mut();
        let all = all.into_iter().chain(hidden.map(|(how, by)| (*how, by)));
        for (enforcement, by_resource) in all {
            for (limit, rate) in by_resource.iter_mut().zip(limits.rates()) {
                match (limit.as_mut(), rate) {
                    (Some(limit), Some(rate)) => limit.set_rate(rate),
                    (_, rate) => {
                        let phase = self.window_phase;
                        *limit = rate.map(|rate| enforcement.limit(rate, phase, now));
                    }
                }
            }
        }
    }

    /// Admits a call and charges every limit, or refuses it and charges none. With
    /// `refusals_count`, a refusal costs a request if one is left.
    pub(super) fn admit(
        &mut self,
        cost: Cost,
        in_flight: usize,
        refusals_count: bool,
    ) -> Result<(), Refusal> {
        let full = self.limits.in_flight.filter(|limit| in_flight >= *limit);
        let short = self.longest_wait(cost);
        if full.is_none() && short.is_none() {
            self.charge(cost);
            return Ok(());
        }
        if refusals_count && let Some(requests) = &mut self.by_resource[0] {
            requests.charge_refusal();
        }
        // Again, because the charge for the refusal may have changed it.
        let wait = self.longest_wait(cost);
        Err(match (full, short) {
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

    /// Returns the limit with the longest wait for `cost`, and that wait.
    fn longest_wait(&self, cost: Cost) -> Option<(usize, u128)> {
        let hidden = self.hidden.as_ref().map(|(_, limits)| limits);
        let all = [Some(&self.by_resource), hidden].into_iter().flatten();
        let waits = all.flat_map(|limits| limits.iter().zip(cost).enumerate());
        waits
            .filter_map(|(i, (limit, cost))| Some((i, limit.as_ref()?.wait(cost))))
            .filter(|(_, wait)| *wait > 0)
            .max_by_key(|(_, wait)| *wait)
    }

    /// Charges a cost that is known only when the call ends.
    pub(super) fn charge(&mut self, cost: Cost) {
        let hidden = self.hidden.as_mut().map(|(_, limits)| limits);
        for limits in [Some(&mut self.by_resource), hidden].into_iter().flatten() {
            for (limit, cost) in limits.iter_mut().zip(cost) {
                if let Some(limit) = limit {
                    limit.charge(cost);
                }
            }
        }
        if let Some(day) = &mut self.day {
            day.charge(cost[0]);
        }
    }

    /// Returns the rate-limit metadata of a provider with these `headers`.
    pub(super) fn snapshot(&self, headers: Headers) -> RateSnapshot {
        let (shown, factor) = match headers {
            Headers::All => (4, 1.0),
            Headers::RequestsOnly => (1, 1.0),
            Headers::Wrong(factor) => (4, factor),
            Headers::As(_) => (4, 1.0),
            Headers::None => (0, 1.0),
        };
        let scaled = |n: u64| (n as f64 * factor).round() as u64;
        let mut quotas = [Quota::default(); 4];
        for (i, (limit, rate)) in self.by_resource.iter().zip(self.limits.rates()).enumerate() {
            if let (Some(limit), true) = (limit, i < shown) {
                quotas[i] = Quota {
                    limit: rate.map(scaled),
                    remaining: Some(scaled(limit.remaining())),
                    reset: Some(duration(limit.reset())),
                };
            }
        }
        if let Headers::As(dialect) = headers {
            if let (Dialect::Groq, Some(day)) = (dialect, &self.day) {
                let per_day = |rate: u64| rate.saturating_mul(DAY.as_secs() / 60);
                quotas[0] = Quota {
                    limit: self.limits.requests_per_minute.map(per_day),
                    remaining: Some(day.remaining()),
                    reset: Some(duration(day.reset())),
                };
            }
            for (resource, quota) in quotas.iter_mut().enumerate() {
                *quota = dialect.report(resource, *quota);
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

    fn set(
        limits: Limits,
        enforcement: Enforcement,
        schedule: Vec<(Duration, Change)>,
    ) -> LimitSet {
        LimitSet::new(limits, enforcement, None, Duration::ZERO, schedule)
    }

    fn limits(requests: u64, tokens: u64) -> Limits {
        Limits {
            requests_per_minute: Some(requests),
            tokens_per_minute: Some(tokens),
            ..Limits::default()
        }
    }

    #[test]
    fn a_refused_call_is_charged_nothing_and_told_the_longest_wait() {
        let mut set = set(limits(60, 600), Enforcement::default(), Vec::new());
        assert!(set.admit([1, 600, 0, 0], 0, false).is_ok());
        let refusal = set.admit([1, 10, 0, 0], 0, false).err().unwrap();
        assert_eq!(refusal.wait, Some(Duration::from_secs(1)));
        assert!(refusal.message.contains("for tokens: limit 600"));
        let metadata = set.snapshot(Headers::All);
        assert_eq!(metadata.requests.remaining, Some(59));
        assert_eq!(metadata.tokens.remaining, Some(0));
        assert_eq!(metadata.tokens.reset, Some(Duration::from_secs(60)));
        assert_eq!(metadata.input_tokens, Quota::default());
    }

    #[test]
    fn a_refusal_that_counts_prolongs_its_own_wait() {
        let burst = Duration::from_secs(1);
        let mut set = set(
            limits(60, 600),
            Enforcement::TokenBucket { burst },
            Vec::new(),
        );
        assert!(set.admit([1, 1, 0, 0], 0, true).is_ok());
        set.advance(Duration::from_millis(900));
        let refusal = set.admit([1, 1, 0, 0], 0, true).err().unwrap();
        assert_eq!(refusal.wait, Some(Duration::from_secs(1)));
    }

    #[test]
    fn scheduled_changes_happen_in_order_at_their_own_time() {
        let change = |n| -> Change { Box::new(move |l| l.requests_per_minute = Some(n)) };
        let burst = Duration::from_secs(60);
        let mut set = set(
            limits(60, 600),
            Enforcement::TokenBucket { burst },
            vec![
                (Duration::from_secs(20), change(120)),
                (Duration::from_secs(10), change(6)),
            ],
        );
        set.charge([60, 0, 0, 0]);
        // 10 s at 60 a minute add 10, of which 6 fit; 10 s at 6 add none; 1 s at 120 adds 2.
        set.advance(Duration::from_secs(21));
        assert_eq!(set.snapshot(Headers::All).requests.remaining, Some(8));
        assert_eq!(set.current().requests_per_minute, Some(120));
    }

    #[test]
    #[should_panic(expected = "a limit of zero requests per minute")]
    fn a_scheduled_limit_of_zero_panics_at_once() {
        let zero: Change = Box::new(|l| l.requests_per_minute = Some(0));
        set(
            limits(60, 600),
            Enforcement::default(),
            vec![(Duration::from_secs(1), zero)],
        );
    }

    #[test]
    fn a_hidden_enforcement_refuses_and_is_not_reported() {
        let minute = Enforcement::default();
        let second = Enforcement::FixedWindow(Duration::from_secs(1));
        let limits = Limits {
            requests_per_minute: Some(600),
            ..Limits::default()
        };
        let phase = Duration::from_millis(300);
        let mut set = LimitSet::new(limits, minute, Some(second), phase, Vec::new());
        for _ in 0..10 {
            assert!(set.admit([1, 0, 0, 0], 0, false).is_ok());
        }
        let refusal = set.admit([1, 0, 0, 0], 0, false).unwrap_err();
        assert_eq!(refusal.wait, Some(Duration::from_millis(700)));
        assert_eq!(set.snapshot(Headers::All).requests.remaining, Some(590));
    }

    #[test]
    fn each_dialect_reports_what_its_provider_does() {
        let mut set = set(limits(60, 60_000), Enforcement::default(), Vec::new());
        set.advance(Duration::ZERO);
        set.charge([1, 2_345, 0, 0]);
        set.advance(Duration::from_micros(100));
        let report = |dialect| {
            let snapshot = set.snapshot(Headers::As(dialect));
            let [requests, tokens] = [snapshot.requests, snapshot.tokens];
            (
                requests.remaining,
                requests.reset,
                tokens.remaining,
                tokens.reset,
            )
        };
        let ms = |ms| Some(Duration::from_millis(ms));
        for (dialect, expected) in [
            (
                Dialect::OpenAi,
                (Some(59), ms(1_000), Some(57_655), ms(2_345)),
            ),
            (
                Dialect::Anthropic,
                (Some(59), ms(1_000), Some(58_000), ms(3_000)),
            ),
            (
                Dialect::Azure,
                (Some(59), ms(1_000), Some(57_655), ms(3_000)),
            ),
            (
                Dialect::Groq,
                (Some(86_399), ms(1_000), Some(57_655), ms(2_345)),
            ),
            (Dialect::Mistral, (Some(59), None, Some(57_655), None)),
        ] {
            assert_eq!(report(dialect), expected, "{dialect:?}");
        }
    }
}
