//! [`Retry`]: the policy by which calls are tried again.

use std::time::Duration;

use crate::backoff::doubling;
#[cfg(doc)]
use crate::error::Error;

/// How often a failing call is tried again, and how long it waits before.
///
/// The wait before the n-th retry is drawn from U(0, min([`max_delay`], [`base_delay`] · 2ⁿ⁻¹))
/// ("full jitter": Brooker, *Exponential Backoff And Jitter*, AWS 2015) and is never
/// shorter than the server asks for. A retry keeps the place in the queue that its call had at first. Only the last one
/// waits behind all others, so that other requests have shown by then whether the provider answers.
///
/// # Failures that cost no attempt
///
/// - **A refusal by the rate limit.** The call waits until its lane has cooled down. From its second
///   refusal on it waits behind the others. Once other calls get through in between, its refusals
///   do not stop the lane any more, so one request that is always refused does not hold up the others. It is
///   given up after five minutes, if [its refusals](Retry::identical) are not those of comparable requests.
/// - **An outage**: 20 failures of 10 different requests without a success. The lane cools down for
///   0.5 s, doubled up to 5 s, and lets one call at a time through until one succeeds. After
///   [`patience`](Retry::patience), the calls that wait fail with an
///   [account-wide](Error::is_account_wide) error, and failures cost attempts again.
///
/// # Timeouts
///
/// A call that times out has held its slot for the longest time that a call can, and may be billed. Only
/// [two](Retry::timeouts) calls are made for a request whose calls time out.
///
/// # The retry budget
///
/// All calls of a context share a budget of 500 tokens: a retry takes 5, one after a timeout
/// 10, and every success gives 1 back. When it is empty, a large part of the calls fails, and retries
/// are a load of their own. Then each retry waits about [`max_delay`] (half of it to one and a half), or as long as its
/// deadline allows. No call fails because of the budget.
///
/// # Deadlines
///
/// The first attempt of a call is always sent before its deadline. A retry fails at once if its wait plus the median
/// latency under the same labels in the last ten minutes passes the deadline.
///
/// This is the only retry layer. The HTTP clients of this crate have none; a provider
/// of your own should have none either, or the layers multiply.
///
/// [`max_delay`]: Retry::max_delay
/// [`base_delay`]: Retry::base_delay
#[doc(alias = "backoff")]
#[derive(Debug, Clone, PartialEq)]
pub struct Retry {
    attempts: u32,
    timeouts: u32,
    base_delay: Duration,
    max_delay: Duration,
    patience: Duration,
    identical: u32,
}

impl Default for Retry {
    /// 5 attempts of which 2 may time out, waits of 0.5 s doubling up to 30 s, 15 min of patience with a provider that
    /// answers no call, and 3 identical failures.
    fn default() -> Self {
        Self {
            attempts: 5,
            timeouts: 2,
            base_delay: Duration::from_millis(500),
            max_delay: Duration::from_secs(30),
            patience: Duration::from_secs(15 * 60),
            identical: 3,
        }
    }
}

impl Retry {
    /// Makes each call once. A call that the rate limit refuses still waits and is sent again.
    pub fn none() -> Self {
        Self::default().attempts(1)
    }

    /// Sets how many calls are made for one request at most, the first one included; 5 unless set.
    ///
    /// # Panics
    /// If `attempts` is 0: a call that is never made has no outcome.
    #[must_use]
    #[track_caller]
    pub fn attempts(mut self, attempts: u32) -> Self {
        assert!(attempts > 0, "Retry::attempts must be at least 1");
        self.attempts = attempts;
        self
    }

    /// Sets how many of the calls for one request may end in a timeout, the last one included; 2 unless set. There are
    /// never more calls than [`attempts`](Self::attempts).
    ///
    /// # Panics
    /// If `timeouts` is 0: the first call is made in any case.
    #[must_use]
    #[track_caller]
    pub fn timeouts(mut self, timeouts: u32) -> Self {
        assert!(timeouts > 0, "Retry::timeouts must be at least 1");
        self.timeouts = timeouts;
        self
    }

    /// Sets the ceiling of the wait before the first retry; it doubles with each. 0.5 s unless set.
    #[must_use]
    pub fn base_delay(mut self, delay: Duration) -> Self {
        self.base_delay = delay;
        self
    }

    /// Sets the highest ceiling of a wait; 30 s unless set. A longer wait that the server asks for is kept.
    #[must_use]
    pub fn max_delay(mut self, delay: Duration) -> Self {
        self.max_delay = delay;
        self
    }

    /// Sets how long calls wait for a provider that answers *no* call of their lane, because of its rate limit or in an
    /// outage; 15 min unless set. While other calls get through, a call that the rate limit refuses goes on waiting.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Sets how often in a row a request must have failed in the same way (kind and
    /// [code](Error::code)), at least, before it can be given up without all of its attempts; 3 unless set.
    ///
    /// A request is given up only on evidence that it is itself the cause. Of the requests for the
    /// same model that were sent after its first failure, `n` were answered or failed in that way, and `f` failed. If
    /// ((f + 1) / (n + 2))ᵏ, the probability that other requests would fail `k` times in a row like it, is below 10⁻⁹, the
    /// rest of the attempts would be paid for nothing. Failures that say nothing about the request are no evidence:
    /// timeouts, broken connections, overload, and 5xx without a code.
    ///
    /// # Panics
    /// If `failures` is 0.
    #[must_use]
    #[track_caller]
    pub fn identical(mut self, failures: u32) -> Self {
        assert!(failures > 0, "Retry::identical must be at least 1");
        self.identical = failures;
        self
    }

    pub(super) fn max_identical(&self) -> u32 {
        self.identical
    }

    pub(super) fn max_timeouts(&self) -> u32 {
        self.timeouts
    }

    /// Returns the wait while the retry budget is empty, from a random number in 0..1: around `max_delay`, and spread, so
    /// that the retries of many calls are not sent at the same moment.
    pub(super) fn slowed(&self, random: f64) -> Duration {
        scaled(self.max_delay, 0.5 + random)
    }

    pub(super) fn max_attempts(&self) -> u32 {
        self.attempts
    }

    pub(super) fn longest_stall(&self) -> Duration {
        self.patience
    }

    pub(super) fn backoff(&self) -> Backoff {
        Backoff {
            ceilings: Box::new(doubling(self.base_delay, self.max_delay)),
            max_delay: self.max_delay,
        }
    }
}

/// The waits of one call, with full jitter: a random part of each ceiling.
pub(super) struct Backoff {
    ceilings: Box<dyn Iterator<Item = Duration> + Send + Sync>,
    max_delay: Duration,
}

impl Backoff {
    /// Returns the next wait: the part `random` (0..1) of the ceiling, and never less than `floor`.
    pub(super) fn next(&mut self, random: f64, floor: Option<Duration>) -> Duration {
        let ceiling = self.ceilings.next().unwrap_or(self.max_delay);
        scaled(ceiling, random).max(floor.unwrap_or_default())
    }
}

/// Multiplies a duration, which may be `Duration::MAX`.
fn scaled(duration: Duration, factor: f64) -> Duration {
    let seconds = duration.as_secs_f64() * factor;
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ceilings_double_up_to_the_maximum() {
        let mut backoff = Retry::default().backoff();
        let ceilings: Vec<_> = (0..9)
            .map(|_| backoff.next(1.0, None).as_secs_f64())
            .collect();
        assert_eq!(ceilings, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]);
    }

    #[test]
    fn jitter_never_makes_a_wait_shorter_than_the_server_asks_for() {
        let mut backoff = Retry::default().backoff();
        assert_eq!(backoff.next(0.0, None), Duration::ZERO);
        let floor = Some(Duration::from_secs(45));
        assert_eq!(backoff.next(0.3, floor), Duration::from_secs(45));
    }

    #[test]
    fn a_base_above_the_maximum_is_the_maximum() {
        let mut backoff = Retry::default()
            .base_delay(Duration::from_secs(60))
            .backoff();
        assert_eq!(backoff.next(1.0, None), Duration::from_secs(30));
    }

    #[test]
    fn the_longest_durations_do_not_overflow() {
        let retry = Retry::default()
            .base_delay(Duration::MAX)
            .max_delay(Duration::MAX);
        let mut backoff = retry.backoff();
        for random in [0.0, 0.5, 1.0] {
            let _ = (
                retry.slowed(random),
                backoff.next(random, Some(Duration::MAX)),
            );
        }
        assert_eq!(backoff.next(1.0, None), Duration::MAX);
    }

    #[test]
    fn slowed_retries_wait_around_the_longest_delay() {
        let slowed = |random| Retry::default().slowed(random).as_secs_f64();
        assert_eq!([0.0, 0.5, 1.0].map(slowed), [15.0, 30.0, 45.0]);
    }

    #[test]
    #[should_panic(expected = "at least 1")]
    fn zero_attempts_panics() {
        let _ = Retry::default().attempts(0);
    }
}
