//! [`Retry`]: how often a call is tried again, and how long it waits in between.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

use crate::error::{Error, ErrorKind};

/// How often a failing call is tried again.
///
/// The wait before the n-th retry is drawn from U(0, min([`max_delay`], [`base_delay`] · 2ⁿ))
/// ("full jitter": Brooker, *Exponential Backoff And Jitter*, AWS 2015) and is never
/// shorter than the server asks for. The retry returns to the place in the queue where its call stood; the
/// last one waits behind all others, so that other requests have shown by then whether the provider answers.
///
/// # Failures that cost no attempt
///
/// - **A refusal by the rate limit.** The call waits until its lane has cooled down. From its second
///   refusal on it waits behind the others, and once others get through in between, its refusals
///   do not close the lane any more: one request that is always refused holds up nobody. It is
///   given up after five minutes, if [its refusals](Retry::identical) are not those of comparable requests.
/// - **An outage**: 20 failures of 10 different requests without a success. The lane cools down for
///   0.5 s, doubled up to 5 s, and lets one call at a time through until one succeeds. After
///   [`patience`](Retry::patience), the calls that wait fail with an
///   [account-wide](Error::is_account_wide) error, and failures cost attempts again.
///
/// # Timeouts
///
/// A call that times out has held its slot for as long as a call can, and may be billed. Only
/// [two](Retry::timeouts) calls are made for a request whose calls time out.
///
/// # The retry budget
///
/// All calls of a context share a budget of 500 tokens: a retry takes 5, one after a timeout
/// 10, and every success gives 1 back. When it is empty, so many calls fail that retries
/// are a load of their own: then each waits about [`max_delay`] (half of it to one and a half), or as long as its
/// deadline allows. No call fails because of it.
///
/// # Deadlines
///
/// The first attempt of a call is always sent before its deadline. A retry that could not be answered in time, as
/// long as calls under the same labels took in the last ten minutes, is not waited for: the call fails at once.
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
    /// 5 attempts of which 2 may time out, 0.5 s doubling up to 30 s, 15 min of patience with a provider that
    /// answers nobody, and 3 identical failures.
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
    /// Each call is made once. It still waits while the rate limit refuses it.
    pub fn none() -> Self {
        Self::default().attempts(1)
    }

    /// How many calls are made for one request at most, the first one included.
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

    /// How many of the calls for one request may end in a timeout, the last one included; 2 unless set. It never
    /// allows more calls than [`attempts`](Self::attempts).
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

    /// The ceiling of the wait before the first retry; it doubles with each.
    #[must_use]
    pub fn base_delay(mut self, delay: Duration) -> Self {
        self.base_delay = delay;
        self
    }

    /// The highest ceiling of a wait. A server that asks for more gets more.
    #[must_use]
    pub fn max_delay(mut self, delay: Duration) -> Self {
        self.max_delay = delay;
        self
    }

    /// How long calls keep waiting for a provider that answers *no* call of their lane: because of
    /// its rate limit, or in an outage. While others get through, a call that the rate limit refuses waits on.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// How often in a row a request must have failed in the same way (kind and
    /// [code](Error::code)), at least, before it can be given up without all of its attempts; 3 unless set.
    ///
    /// It is given up only on evidence that the request itself is the cause. Of the requests for the
    /// same model that were sent after its first failure, `n` were answered or failed in that way, and `f` failed. If
    /// ((f + 1) / (n + 2))ᵏ, the probability that others would fail `k` times in a row like it, is below 10⁻⁹, the rest
    /// of the attempts would be paid for nothing. Failures that carry no word about the request are no evidence:
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

    pub(crate) fn max_identical(&self) -> u32 {
        self.identical
    }

    pub(crate) fn max_timeouts(&self) -> u32 {
        self.timeouts
    }

    /// The wait while the retry budget is empty, from a random number in 0..1: around `max_delay`, and spread, so
    /// that the retries of many calls do not leave in one moment.
    pub(crate) fn slowed(&self, random: f64) -> Duration {
        scaled(self.max_delay, 0.5 + random)
    }

    pub(crate) fn max_attempts(&self) -> u32 {
        self.attempts
    }

    pub(crate) fn longest_stall(&self) -> Duration {
        self.patience
    }

    pub(crate) fn backoff(&self) -> Backoff {
        Backoff {
            ceilings: ExponentialBuilder::new()
                .with_factor(2.0)
                .with_min_delay(self.base_delay.min(self.max_delay))
                .with_max_delay(self.max_delay)
                .without_max_times()
                .build(),
            max_delay: self.max_delay,
        }
    }
}

/// The waits of one call. backon gives the ceilings; the jitter is ours, because
/// backon's is added to the delay and full jitter takes a part of it.
pub(crate) struct Backoff {
    ceilings: ExponentialBackoff,
    max_delay: Duration,
}

impl Backoff {
    /// The next wait: `random` in 0..1 of the ceiling, and never below `floor`.
    pub(crate) fn next(&mut self, random: f64, floor: Option<Duration>) -> Duration {
        let ceiling = self.ceilings.next().unwrap_or(self.max_delay);
        scaled(ceiling, random).max(floor.unwrap_or_default())
    }
}

/// A part or a multiple of a duration, which may be `Duration::MAX`.
fn scaled(duration: Duration, factor: f64) -> Duration {
    let seconds = duration.as_secs_f64() * factor;
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

/// A server that asks for a longer wait is not waited for: the caller is told.
pub(crate) const LONGEST_WAIT: Duration = Duration::from_secs(10 * 60);

/// What an error means for the call that met it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// The rate limit refused the call: it waits for its lane, which costs no attempt.
    Throttle,
    /// Try again after a wait; costs an attempt.
    Transient,
    /// Do not try again.
    Final,
    /// The account is refused, and with it every call.
    Account,
    /// This request is refused, or the whole account: a 403, or a wait that nobody waits for.
    Doubtful,
}

impl Class {
    pub(crate) fn of(error: &Error) -> Self {
        let long = error.wait().is_some_and(|wait| wait > LONGEST_WAIT);
        match error.kind() {
            _ if error.is_temporary() && long => Self::Doubtful,
            ErrorKind::Throttled if error.is_temporary() => Self::Throttle,
            _ if error.is_temporary() => Self::Transient,
            ErrorKind::Unauthorized if error.http_status() == Some(403) => Self::Doubtful,
            ErrorKind::Forbidden if !error.is_account_wide() => Self::Doubtful,
            _ if error.is_account_wide() => Self::Account,
            _ => Self::Final,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Persistence;

    #[test]
    fn ceilings_double_up_to_the_maximum() {
        let mut backoff = Retry::default().backoff();
        let ceilings: Vec<_> = (0..9)
            .map(|_| backoff.next(1.0, None).as_secs_f64())
            .collect();
        assert_eq!(ceilings, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]);
    }

    #[test]
    fn jitter_takes_a_part_but_never_undercuts_the_server() {
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
    fn waits_without_end_do_not_overflow() {
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

    #[test]
    fn classes() {
        let class = |kind| Class::of(&Error::new(kind, ""));
        assert_eq!(class(ErrorKind::Throttled), Class::Throttle);
        assert_eq!(class(ErrorKind::Overloaded), Class::Transient);
        assert_eq!(class(ErrorKind::Connection), Class::Transient);
        assert_eq!(class(ErrorKind::InvalidRequest), Class::Final);
        assert_eq!(class(ErrorKind::QuotaExhausted), Class::Account);
        assert_eq!(class(ErrorKind::Unauthorized), Class::Account);
        assert_eq!(class(ErrorKind::Forbidden), Class::Doubtful);
        let forbidden = Error::new(ErrorKind::Unauthorized, "").with_http_status(403);
        assert_eq!(Class::of(&forbidden), Class::Doubtful);
        for kind in [ErrorKind::Throttled, ErrorKind::Overloaded] {
            let wait = |wait| Class::of(&Error::new(kind, "").with_wait(wait));
            assert_ne!(wait(LONGEST_WAIT), Class::Doubtful);
            assert_eq!(wait(Duration::MAX), Class::Doubtful);
        }
        let overruled =
            Error::new(ErrorKind::Throttled, "").with_persistence(Persistence::Permanent);
        assert_eq!(Class::of(&overruled), Class::Final);
    }
}
