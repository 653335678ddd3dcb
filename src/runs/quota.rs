//! [`SubmissionQuota`]: how many runs each tenant may submit. governor's keyed limiter, on Tokio's clock.

use std::num::NonZeroU32;
use std::ops::Add;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use governor::clock::{Clock, Reference};
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::keyed::HashMapStateStore;
use governor::{Quota, RateLimiter};

use crate::error::{Error, ErrorKind, Result};

/// governor counts nanoseconds in 64 bits, which overflow after 584 years.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
/// The number of tenants at which those with an unused quota are removed for the first time.
const SWEEP_AT: usize = 1_024;

/// Tokio's clock, which tests can pause.
#[derive(Debug, Clone, Copy)]
struct TokioClock;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct TokioInstant(tokio::time::Instant);

impl Clock for TokioClock {
    type Instant = TokioInstant;

    fn now(&self) -> TokioInstant {
        TokioInstant(tokio::time::Instant::now())
    }
}

impl Reference for TokioInstant {
    fn duration_since(&self, earlier: Self) -> Nanos {
        self.0.saturating_duration_since(earlier.0).into()
    }

    fn saturating_sub(&self, duration: Nanos) -> Self {
        Self(self.0.checked_sub(duration.into()).unwrap_or(self.0))
    }
}

impl Add<Nanos> for TokioInstant {
    type Output = Self;

    fn add(self, duration: Nanos) -> Self {
        Self(self.0 + Duration::from(duration))
    }
}

type KeyedLimiter =
    RateLimiter<String, HashMapStateStore<String>, TokioClock, NoOpMiddleware<TokioInstant>>;

pub(super) struct SubmissionQuota {
    tenants: KeyedLimiter,
    sweep_at: AtomicUsize,
}

impl SubmissionQuota {
    #[track_caller]
    pub(super) fn new(submissions: u32, per: Duration) -> Self {
        let burst = NonZeroU32::new(submissions);
        let burst = burst.expect("a quota of zero submissions would refuse every run");
        assert!(!per.is_zero(), "a quota per no time would refuse no run");
        // Rounded up, so that the quota is never exceeded.
        let interval = per.min(LONGEST).as_nanos().div_ceil(submissions.into());
        let interval = Duration::from_nanos(interval as u64);
        let quota = Quota::with_period(interval).expect("the interval is not zero");
        let quota = quota.allow_burst(burst);
        Self {
            tenants: RateLimiter::new(quota, HashMapStateStore::default(), TokioClock),
            sweep_at: AtomicUsize::new(SWEEP_AT),
        }
    }

    /// Takes one submission from the quota of `tenant`, or fails with the wait until there is one.
    pub(super) fn take(&self, tenant: &String) -> Result<()> {
        let taken = self.tenants.check_key(tenant);
        if self.tenants.len() > self.sweep_at.load(Ordering::Relaxed) {
            self.tenants.retain_recent();
            self.tenants.shrink_to_fit();
            let sweep_at = (2 * self.tenants.len()).max(SWEEP_AT);
            self.sweep_at.store(sweep_at, Ordering::Relaxed);
        }
        taken.map_err(|until| {
            let message = format!("the tenant {tenant:?} has used up its quota of submissions");
            let wait = until.wait_time_from(TokioClock.now());
            Error::new(ErrorKind::Throttled, message).with_wait(wait)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn tenants_with_an_unused_quota_are_removed() {
        let quota = SubmissionQuota::new(2, Duration::from_secs(60));
        for n in 0..100 * SWEEP_AT {
            quota.take(&n.to_string()).unwrap();
            // governor keeps a state for a minute here, so that of 600 tenants.
            tokio::time::advance(Duration::from_millis(100)).await;
            assert!(quota.tenants.len() <= 2 * SWEEP_AT, "{n}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn no_window_has_more_than_the_quota_and_what_flows_in() {
        let quota = SubmissionQuota::new(7, Duration::from_secs(60));
        let mut random = fastrand::Rng::with_seed(3);
        let began = tokio::time::Instant::now();
        let mut taken = Vec::new();
        for _ in 0..2_000 {
            match quota.take(&"ada".to_owned()) {
                Ok(()) => taken.push(began.elapsed()),
                Err(error) => {
                    let wait = error.wait().unwrap();
                    assert!(!wait.is_zero());
                    if random.bool() {
                        // One nanosecond before the wait is over it is still refused.
                        tokio::time::advance(wait - Duration::from_nanos(1)).await;
                        assert!(quota.take(&"ada".to_owned()).is_err());
                        tokio::time::advance(Duration::from_nanos(1)).await;
                        quota.take(&"ada".to_owned()).unwrap();
                        taken.push(began.elapsed());
                    }
                }
            }
            tokio::time::advance(Duration::from_millis(random.u64(0..12_000))).await;
        }
        assert!(taken.len() > 500);
        for (first, from) in taken.iter().enumerate() {
            for (last, to) in taken.iter().enumerate().skip(first) {
                let allowed = 7.0 + (*to - *from).as_secs_f64() * 7.0 / 60.0 + 1e-6;
                assert!((last - first + 1) as f64 <= allowed, "{from:?} to {to:?}");
            }
        }
    }

    #[test]
    fn extreme_quotas_do_not_overflow() {
        for (submissions, per) in [
            (1, Duration::MAX),
            (u32::MAX, Duration::MAX),
            (u32::MAX, Duration::from_nanos(1)),
        ] {
            let quota = SubmissionQuota::new(submissions, per);
            assert!(quota.take(&String::new()).is_ok());
            if submissions == 1 {
                let refused = quota.take(&String::new()).unwrap_err();
                assert!(refused.wait().unwrap() > LONGEST / 2);
            }
        }
    }

    #[test]
    #[should_panic(expected = "a quota of zero submissions would refuse every run")]
    fn a_quota_of_zero_panics() {
        SubmissionQuota::new(0, Duration::from_secs(1));
    }
}
