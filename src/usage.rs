//! [`Usage`]: the tokens of a reply. [`RateSnapshot`]: the rate limits that a provider reported with it.

use std::iter::Sum;
use std::ops::{Add, AddAssign};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The tokens that a call used, as the provider counted them.
///
/// Cached tokens are part of the input tokens, reasoning tokens part of the output tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Usage {
    /// Tokens of the prompt, cached ones included.
    pub input_tokens: u64,
    /// Tokens of the answer, reasoning included.
    pub output_tokens: u64,
    /// Input tokens that were read from the provider's cache.
    #[serde(default)]
    pub cached_input_tokens: u64,
    /// Output tokens spent on reasoning that the text does not show.
    #[serde(default)]
    pub reasoning_tokens: u64,
}

impl Usage {
    /// Makes a usage of input and output tokens, with none cached and none for reasoning.
    pub fn new(input_tokens: u64, output_tokens: u64) -> Self {
        Self {
            input_tokens,
            output_tokens,
            ..Self::default()
        }
    }

    /// Returns the sum of input and output tokens.
    pub fn total(&self) -> u64 {
        self.input_tokens.saturating_add(self.output_tokens)
    }
}

impl Add for Usage {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self {
            input_tokens: self.input_tokens.saturating_add(other.input_tokens),
            output_tokens: self.output_tokens.saturating_add(other.output_tokens),
            cached_input_tokens: self
                .cached_input_tokens
                .saturating_add(other.cached_input_tokens),
            reasoning_tokens: self.reasoning_tokens.saturating_add(other.reasoning_tokens),
        }
    }
}

impl AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for Usage {
    fn sum<I: Iterator<Item = Self>>(usages: I) -> Self {
        usages.fold(Self::default(), Add::add)
    }
}

/// The rate limits that a provider reported with one reply or error.
///
/// Every field is optional, because providers report different limits.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RateSnapshot {
    /// The limit on requests: per day at Groq, per minute elsewhere.
    pub requests: Quota,
    /// The limit on input and output tokens together.
    pub tokens: Quota,
    /// The limit on input tokens, where it is a limit of its own.
    pub input_tokens: Quota,
    /// The limit on output tokens, where it is a limit of its own.
    pub output_tokens: Quota,
    /// The time that the server asks to wait before the next call. It counts in an error, see
    /// [`Error::with_rate`](crate::Error::with_rate), and is ignored in a successful reply.
    pub retry_after: Option<Duration>,
}

impl RateSnapshot {
    /// Makes an empty snapshot; add the limits that the provider reported.
    ///
    /// ```
    /// use std::time::Duration;
    /// use throughline::request::{Quota, RateSnapshot};
    ///
    /// // `x-ratelimit-limit-requests: 500`, `-remaining-requests: 499`, `-reset-requests: 120ms`
    /// let requests = Quota::new(500, 499, Duration::from_millis(120));
    /// let rate = RateSnapshot::new()
    ///     .with_requests(requests)
    ///     .with_tokens(Quota::new(None, 149_984, None));
    /// assert_eq!(rate.requests.limit, Some(500));
    /// ```
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the limit on requests.
    #[must_use]
    pub fn with_requests(mut self, quota: Quota) -> Self {
        self.requests = quota;
        self
    }

    /// Adds the limit on input and output tokens together.
    #[must_use]
    pub fn with_tokens(mut self, quota: Quota) -> Self {
        self.tokens = quota;
        self
    }

    /// Adds the limit on input tokens.
    #[must_use]
    pub fn with_input_tokens(mut self, quota: Quota) -> Self {
        self.input_tokens = quota;
        self
    }

    /// Adds the limit on output tokens.
    #[must_use]
    pub fn with_output_tokens(mut self, quota: Quota) -> Self {
        self.output_tokens = quota;
        self
    }

    /// Adds the time that the server asks to wait before the next call.
    #[must_use]
    pub fn with_retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// Whether the provider reported nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// One limit, as the provider reports it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Quota {
    /// The amount that is allowed in a period.
    pub limit: Option<u64>,
    /// The amount that is left now.
    pub remaining: Option<u64>,
    /// The time until the whole amount is available again, counted from when the reply was written.
    pub reset: Option<Duration>,
}

impl Quota {
    /// Makes a quota of a limit in a period, the amount that remains, and the time until the whole amount is available
    /// again; `None` for each that the provider does not report.
    ///
    /// A lane reads the limit as one per minute, unless `remaining` and `reset` show that it holds for
    /// an hour or a day. Leave out a limit for another period if the provider reports no reset.
    pub fn new(
        limit: impl Into<Option<u64>>,
        remaining: impl Into<Option<u64>>,
        reset: impl Into<Option<Duration>>,
    ) -> Self {
        Self {
            limit: limit.into(),
            remaining: remaining.into(),
            reset: reset.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_adds_without_overflow() {
        let sum: Usage = [Usage::new(1, 2), Usage::new(u64::MAX, 3)]
            .into_iter()
            .sum();
        assert_eq!((sum.input_tokens, sum.output_tokens), (u64::MAX, 5));
        assert_eq!(sum.total(), u64::MAX);
    }
}
