//! [`Cooldown`]: the wait of the whole lane after a refusal (Retry-After, or a growing time).

use std::time::Duration;

use fastrand::Rng;

use crate::ratelimit::adaptive::refusals::FORGOTTEN;
use crate::ratelimit::bucket::{Nanos, nanos};

/// The wait after a first refusal that names none; it doubles with each further one.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// Refusals are not in a row if this number of calls were granted in between.
const MANY: u64 = 4;
const LONGEST_JITTER: Duration = Duration::from_secs(2);
/// Calls are not kept waiting where a provider asks for a longer wait than this.
pub(crate) const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(10 * 60);

#[derive(Debug)]
pub(super) struct Cooldown {
    until: Nanos,
    /// The time of the last refusal that counted.
    refused_at: Option<Nanos>,
    /// Refusals in a row; those of one cohort count once.
    refusals: u32,
    /// The number of calls that had been granted by then.
    granted: u64,
    jitter: Rng,
}

impl Cooldown {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            until: 0,
            refused_at: None,
            refusals: 0,
            granted: 0,
            jitter: Rng::with_seed(seed),
        }
    }

    pub(super) fn until(&self) -> Nanos {
        self.until
    }

    /// Starts a cooldown for the `wait` that the provider asks for, or else for a time that doubles
    /// from refusal to refusal up to `longest`. A cooldown that is under way never becomes shorter.
    ///
    /// Calls that were on their way when the first of them was refused are one
    /// cohort: their refusals say nothing new and do not double the wait. The wait starts anew if at least [`MANY`] calls
    /// were granted since the previous refusal, although none of them need be answered yet. `granted` is the number of
    /// calls that were ever granted.
    pub(super) fn record_refusal(
        &mut self,
        now: Nanos,
        granted_at: Nanos,
        granted: u64,
        wait: Option<Duration>,
        longest: Duration,
    ) {
        if self.is_news(granted_at) {
            let since = granted.saturating_sub(self.granted);
            let long_ago = |at: Nanos| now.saturating_sub(at) > FORGOTTEN;
            if since >= MANY || self.refused_at.is_some_and(long_ago) {
                self.refusals = 0;
            }
            self.refusals = self.refusals.saturating_add(1);
            (self.refused_at, self.granted) = (Some(now), granted);
        }
        // Zero means that the server named no wait.
        let wait = wait.filter(|wait| !wait.is_zero()).unwrap_or_else(|| {
            let doublings = self.refusals.saturating_sub(1).min(16);
            FIRST_WAIT.saturating_mul(1 << doublings).min(longest)
        });
        let cooldown = wait.saturating_add(self.jitter(wait));
        let until = now.saturating_add(nanos(cooldown));
        self.until = self.until.max(until);
    }

    /// Extends the cooldown until `until`, unless it takes longer already.
    pub(super) fn extend_until(&mut self, until: Nanos) {
        self.until = self.until.max(until);
    }

    /// Ends the cooldown.
    pub(super) fn end(&mut self) {
        self.until = 0;
        self.refusals = 0;
    }

    /// A call came through: the next refusal is a first one again.
    pub(super) fn record_success(&mut self, granted_at: Nanos) {
        if self.is_news(granted_at) {
            self.refusals = 0;
        }
    }

    /// Whether a call that was granted at this time was granted after the last refusal was known.
    fn is_news(&self, granted_at: Nanos) -> bool {
        self.refused_at.is_none_or(|refused| granted_at > refused)
    }

    /// Adds jitter and never subtracts it, so that processes that wait for the same moment spread out after it and none
    /// comes early.
    fn jitter(&mut self, wait: Duration) -> Duration {
        let most = (wait / 10).min(LONGEST_JITTER);
        Duration::from_nanos(self.jitter.u64(0..=nanos(most)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const LONGEST: Duration = Duration::from_secs(30);

    fn at(second: u64) -> Nanos {
        second * 1_000_000_000
    }

    #[test]
    fn jitter_is_added_and_bounded() {
        for seed in 0..100 {
            for wait in [SECOND / 100, SECOND, 60 * SECOND] {
                let mut cooldown = Cooldown::new(seed);
                cooldown.record_refusal(at(1), at(1), 1, Some(wait), LONGEST);
                let jitter = Duration::from_nanos(cooldown.until() - at(1)) - wait;
                assert!(
                    jitter <= wait / 10 && jitter <= 2 * SECOND,
                    "{jitter:?} on {wait:?}"
                );
            }
        }
    }

    #[test]
    fn the_same_seed_jitters_the_same() {
        let until = |seed| {
            let mut cooldown = Cooldown::new(seed);
            cooldown.record_refusal(at(1), at(1), 1, Some(60 * SECOND), LONGEST);
            cooldown.until()
        };
        assert_eq!(until(7), until(7));
        assert_ne!(until(7), until(8));
    }

    #[test]
    fn waits_double_from_cohort_to_cohort_and_a_success_resets_them() {
        let mut cooldown = Cooldown::new(0);
        let wait_of = |cooldown: &mut Cooldown, now: u64, granted_at: u64| {
            let now = at(now);
            cooldown.record_refusal(now, at(granted_at), 1, None, LONGEST);
            let wait = Duration::from_nanos(cooldown.until() - now);
            // Without its jitter of up to a tenth.
            [500, 1_000, 2_000, 30_000]
                .into_iter()
                .map(Duration::from_millis)
                .find(|w| (*w..=*w * 11 / 10).contains(&wait))
                .expect("one of the expected waits")
        };
        assert_eq!(wait_of(&mut cooldown, 10, 5), SECOND / 2);
        assert_eq!(wait_of(&mut cooldown, 11, 6), SECOND / 2, "the same cohort");
        assert_eq!(wait_of(&mut cooldown, 20, 15), SECOND);
        assert_eq!(wait_of(&mut cooldown, 30, 25), 2 * SECOND);
        cooldown.record_success(at(20));
        cooldown.record_success(at(31));
        assert_eq!(wait_of(&mut cooldown, 40, 35), SECOND / 2);
        for n in 1..=40 {
            cooldown.record_refusal(at(100 * n), at(100 * n - 1), 1, None, LONGEST);
        }
        assert_eq!(wait_of(&mut cooldown, 4_500, 4_499), LONGEST);
        let later = 4_500 + FORGOTTEN / at(1) + 1;
        assert_eq!(
            wait_of(&mut cooldown, later, later - 1),
            SECOND / 2,
            "forgotten"
        );
    }

    #[test]
    fn a_later_refusal_never_shortens_a_cooldown() {
        let mut cooldown = Cooldown::new(0);
        cooldown.record_refusal(at(1), at(1), 1, Some(60 * SECOND), LONGEST);
        let promised = cooldown.until();
        cooldown.record_refusal(at(2), at(1), 1, Some(SECOND), LONGEST);
        assert_eq!(cooldown.until(), promised);
        cooldown.record_refusal(at(2), at(1), 1, Some(Duration::MAX), LONGEST);
        assert_eq!(cooldown.until(), Nanos::MAX);
    }

    #[test]
    fn a_wait_of_zero_is_no_wait_named() {
        let mut cooldown = Cooldown::new(0);
        cooldown.record_refusal(at(1), at(1), 1, Some(Duration::ZERO), LONGEST);
        assert!(cooldown.until() >= at(1) + nanos(FIRST_WAIT));
    }
}
