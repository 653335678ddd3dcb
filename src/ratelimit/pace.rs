//! [`Pace`]: the limits a lane keeps.

use std::time::Duration;

use crate::ratelimit::adaptive::{Policy, PolicySet};
use crate::ratelimit::bucket::{Rate, nanos};
use crate::ratelimit::limit::Burst;
use crate::ratelimit::types::Binding;

/// The limits of one provider account and group of models.
///
/// Token limits are per minute and count what the provider counts: either input
/// and output together ([`tokens`](Pace::tokens)) or each on its own
/// ([`input_tokens`](Pace::input_tokens), [`output_tokens`](Pace::output_tokens)).
/// A resource without a limit here is limited by the headers and the refusals of the provider
/// ([`adaptive`](Pace::adaptive)), and by nothing else: there are no hidden defaults, and
/// no number means unlimited.
///
/// # Example: a tier as its provider prints it
///
/// ```
/// use throughline::Pace;
///
/// let pace = Pace::per_minute(500).tokens(200_000).in_flight(32);
/// # let _ = pace;
/// ```
///
/// # Example: limits unknown
///
/// ```
/// use throughline::Pace;
///
/// // One call a second, and at most four at a time.
/// let pace = Pace::normal().in_flight(4);
/// # let _ = pace;
/// ```
#[doc(alias = "rate limit")]
#[doc(alias = "throttle")]
#[derive(Debug, Clone, PartialEq)]
#[must_use]
pub struct Pace {
    pub(super) spacing: Option<Rate>,
    pub(super) requests: Option<Rate>,
    pub(super) tokens: Option<Rate>,
    pub(super) input_tokens: Option<Rate>,
    pub(super) output_tokens: Option<Rate>,
    pub(super) in_flight: Option<usize>,
    burst: Option<Duration>,
    pub(super) policies: PolicySet,
}

impl Pace {
    /// Sets no limits. The headers of replies and refusals can add some ([`adaptive`](Pace::adaptive)).
    pub fn unlimited() -> Self {
        Self {
            spacing: None,
            requests: None,
            tokens: None,
            input_tokens: None,
            output_tokens: None,
            in_flight: None,
            burst: None,
            policies: PolicySet::ALL,
        }
    }

    /// At most `requests` in a minute.
    ///
    /// # Panics
    ///
    /// If `requests` is zero: a lane that never grants a call is a mistake.
    #[track_caller]
    pub fn per_minute(requests: u64) -> Self {
        Self {
            requests: Some(rate("requests", requests)),
            ..Self::unlimited()
        }
    }

    /// At most `requests` in a second: the same limit as 60 times that in a minute, which is how
    /// events and [`LaneSnapshot`](crate::ratelimit::LaneSnapshot) name it.
    ///
    /// # Panics
    ///
    /// If `requests` is zero.
    ///
    /// ```
    /// use throughline::Pace;
    ///
    /// assert_eq!(Pace::per_second(10), Pace::per_minute(600));
    /// ```
    #[track_caller]
    pub fn per_second(requests: u64) -> Self {
        Self::per_minute(requests.saturating_mul(60))
    }

    /// Two seconds between the starts of two calls: for an account whose limits are not known.
    pub fn safe() -> Self {
        Self::unlimited().spacing(Duration::from_secs(2))
    }

    /// One second between the starts of two calls.
    pub fn normal() -> Self {
        Self::unlimited().spacing(Duration::from_secs(1))
    }

    /// Half a second between the starts of two calls.
    pub fn fast() -> Self {
        Self::unlimited().spacing(Duration::from_millis(500))
    }

    /// At most `tokens` in a minute, input and output together.
    ///
    /// # Panics
    ///
    /// If `tokens` is zero.
    #[track_caller]
    pub fn tokens(mut self, tokens: u64) -> Self {
        self.tokens = Some(rate("tokens", tokens));
        self
    }

    /// At most `tokens` of input in a minute.
    ///
    /// # Panics
    ///
    /// If `tokens` is zero.
    #[track_caller]
    pub fn input_tokens(mut self, tokens: u64) -> Self {
        self.input_tokens = Some(rate("input tokens", tokens));
        self
    }

    /// At most `tokens` of output in a minute.
    ///
    /// # Panics
    ///
    /// If `tokens` is zero.
    #[track_caller]
    pub fn output_tokens(mut self, tokens: u64) -> Self {
        self.output_tokens = Some(rate("output tokens", tokens));
        self
    }

    /// At most `calls` between permit and reply.
    ///
    /// # Panics
    ///
    /// If `calls` is zero.
    #[track_caller]
    #[doc(alias = "concurrency")]
    #[doc(alias = "semaphore")]
    pub fn in_flight(mut self, calls: usize) -> Self {
        assert!(
            calls > 0,
            "a pace of zero calls in flight lets nothing through"
        );
        self.in_flight = Some(calls);
        self
    }

    /// At least `time` between the starts of two calls, whatever the other limits allow.
    ///
    /// # Panics
    ///
    /// If `time` is zero.
    #[track_caller]
    pub fn spacing(mut self, time: Duration) -> Self {
        assert!(!time.is_zero(), "a pace needs a spacing above zero");
        self.spacing = Some(Rate::every(time));
        self
    }

    /// Sets how much of an unused limit may go at once, as time at the full rate: with 600 requests a minute and a burst
    /// of 2 s that is 20. It is an exact bound: in no window more is sent than the burst and the rate allow. It is there
    /// from the start.
    ///
    /// One request may always go at once. A burst of zero makes requests evenly
    /// spaced, but loses the rate of any moment at which the machine is late
    /// (timers count milliseconds).
    ///
    /// # Without a burst
    ///
    /// Then the lane learns what the provider stores. It starts with one call, because the use before the lane was made is
    /// unknown, and saves up at most one second of the rate. If the headers of the replies show a bucket that stores more
    /// (OpenAI stores a minute), and not less than the provider's limit is configured here, the lane uses that: in bursts
    /// that may double with each round trip, so that a second limit, of which the headers say nothing, refuses one step
    /// at most. After such a refusal the lane keeps to one second for good. It also does so with fixed windows, and
    /// where less than the provider's limit is configured, because that is a share of the account. Where no headers tell
    /// what is left, the lane tries up to one second of the rate, three calls in each round trip, until the first refusal.
    ///
    /// [`LaneSnapshot::bursts`](crate::ratelimit::LaneSnapshot::bursts) and
    /// [`Event::LaneBurstLearned`](crate::observe::Event::LaneBurstLearned) report what was learned. A lane that is not
    /// [adaptive](Pace::adaptive) learns nothing.
    pub fn burst(mut self, time: Duration) -> Self {
        self.burst = Some(time);
        self
    }

    /// Sets whether the lane learns from the provider. It does by default:
    ///
    /// - a limit that is refused although it was kept is used more slowly, and more
    ///   again as time passes without a refusal, never above what is set here;
    /// - limits that are not set here are taken from the headers of the replies, or learned
    ///   from the first refusal;
    /// - a limit of which the headers say that less is left is lowered to that, and one of which the provider has stored
    ///   more is used faster ([`burst`](Pace::burst));
    /// - a provider that refuses more than a few of a hundred calls as overloaded (503, 529) gets no more calls at one
    ///   time than it admits, and slowly more again;
    /// - where sending less does not lower the share of refused calls, no limit is the reason: the lane returns to
    ///   its full rate.
    ///
    /// Without it, a refusal starts a cooldown and changes nothing else.
    pub fn adaptive(mut self, adaptive: bool) -> Self {
        self.policies = match adaptive {
            true => PolicySet::ALL,
            false => PolicySet::NONE,
        };
        self
    }

    /// Switches one policy off, to measure what it is worth.
    #[doc(hidden)]
    pub fn without(mut self, policy: Policy) -> Self {
        self.policies = self.policies.without(policy);
        self
    }

    pub(super) fn burst_or_default(&self) -> Burst {
        Burst {
            time: nanos(self.burst.unwrap_or(Duration::from_secs(1))),
            full_at_start: self.burst.is_some(),
        }
    }

    /// The limits per minute that are set.
    pub(crate) fn limits(&self) -> impl Iterator<Item = (Binding, u64)> + use<> {
        let limits = [
            (Binding::Requests, self.requests),
            (Binding::Tokens, self.tokens),
            (Binding::InputTokens, self.input_tokens),
            (Binding::OutputTokens, self.output_tokens),
        ];
        let per_minute = |rate: Rate| (rate.per_second() * 60.0).round() as u64;
        limits
            .into_iter()
            .filter_map(move |(limit, rate)| Some((limit, per_minute(rate?))))
    }
}

#[track_caller]
fn rate(what: &str, per_minute: u64) -> Rate {
    assert!(
        per_minute > 0,
        "a pace of zero {what} a minute lets nothing through"
    );
    Rate::per_minute(per_minute)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "zero requests a minute")]
    fn zero_requests() {
        let _ = Pace::per_minute(0);
    }

    #[test]
    #[should_panic(expected = "zero tokens a minute")]
    fn zero_tokens() {
        let _ = Pace::unlimited().tokens(0);
    }

    #[test]
    #[should_panic(expected = "zero input tokens a minute")]
    fn zero_input_tokens() {
        let _ = Pace::unlimited().input_tokens(0);
    }

    #[test]
    #[should_panic(expected = "zero output tokens a minute")]
    fn zero_output_tokens() {
        let _ = Pace::unlimited().output_tokens(0);
    }

    #[test]
    #[should_panic(expected = "zero calls in flight")]
    fn zero_in_flight() {
        let _ = Pace::unlimited().in_flight(0);
    }

    #[test]
    #[should_panic(expected = "spacing above zero")]
    fn zero_spacing() {
        let _ = Pace::unlimited().spacing(Duration::ZERO);
    }
}
