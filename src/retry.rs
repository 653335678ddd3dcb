//! [`Retry`]: how often a call is tried again, and how long it waits in between.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

use crate::error::{Error, ErrorKind};

/// How often a failing call is tried again.
///
/// The wait before the n-th retry is drawn from U(0, min([`max_delay`], [`base_delay`] · 2ⁿ))
/// ("full jitter": Brooker, *Exponential Backoff And Jitter*, AWS 2015) and is never
/// shorter than what the server asks for. A call that the rate limit refuses has
/// not been tried at all: it waits at the closed gate of its lane and costs no attempt.
///
/// All calls of a context share a budget of 500 tokens: a retry takes 5, one after a timeout
/// 10, and every success gives 1 back. When it is empty, so many calls fail that retries
/// are a load of their own: then each waits at least [`max_delay`]. None fails for it.
///
/// A call whose next attempt could not be answered before the deadline, as long as calls
/// usually take, fails at once instead.
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
    base_delay: Duration,
    max_delay: Duration,
    patience: Duration,
    identical: u32,
}

impl Default for Retry {
    /// 5 attempts, 0.5 s doubling up to 30 s, 15 min of patience with a rate limit, and
    /// 3 identical failures.
    fn default() -> Self {
        Self {
            attempts: 5,
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

    /// How long a call keeps waiting at a rate limit that lets *no* call of its
    /// lane through. While others get through, it waits its turn without end.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// How often in a row one request may fail in exactly the same way, while other calls
    /// succeed: then it is the request, and the rest of the attempts would be paid for nothing.
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

    pub(crate) fn longest_delay(&self) -> Duration {
        self.max_delay
    }

    pub(crate) fn max_attempts(&self) -> u32 {
        self.attempts
    }

    pub(crate) fn max_stall(&self) -> Duration {
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
        ceiling.mul_f64(random).max(floor.unwrap_or_default())
    }
}

/// What an error means for the call that met it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// The rate limit said no: wait at the gate, costs no attempt.
    Throttle,
    /// Try again after a wait; costs an attempt.
    Transient,
    /// Do not try again.
    Final,
}

impl Class {
    pub(crate) fn of(error: &Error) -> Self {
        match error.kind() {
            _ if !error.is_temporary() => Self::Final,
            ErrorKind::Throttled => Self::Throttle,
            _ => Self::Transient,
        }
    }
}

/// Failures of one request that are all the same.
#[derive(Default)]
pub(crate) struct Streak {
    last: Option<(ErrorKind, Option<String>, String)>,
    length: u32,
}

impl Streak {
    /// How often in a row it has failed just so. Failures of the line say nothing of
    /// the request: they are no streak.
    pub(crate) fn extend(&mut self, error: &Error) -> u32 {
        if !matches!(
            error.kind(),
            ErrorKind::Unavailable | ErrorKind::MalformedReply
        ) {
            *self = Self::default();
            return 0;
        }
        let this = (
            error.kind(),
            error.code().map(str::to_owned),
            error.message().to_owned(),
        );
        if self.last.as_ref() != Some(&this) {
            (self.last, self.length) = (Some(this), 0);
        }
        self.length += 1;
        self.length
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Persistence;

    #[test]
    fn a_streak_is_of_identical_failures() {
        let error = |message: &str| Error::new(ErrorKind::Unavailable, message);
        let mut streak = Streak::default();
        let lengths = ["a", "a", "b", "b", "b"].map(|message| streak.extend(&error(message)));
        assert_eq!(lengths, [1, 2, 1, 2, 3]);
        assert_eq!(streak.extend(&Error::new(ErrorKind::Connection, "b")), 0);
        assert_eq!(streak.extend(&error("b")), 1);
    }

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
        assert_eq!(class(ErrorKind::QuotaExhausted), Class::Final);
        let overruled =
            Error::new(ErrorKind::Throttled, "").with_persistence(Persistence::Permanent);
        assert_eq!(Class::of(&overruled), Class::Final);
    }
}
