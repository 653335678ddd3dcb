//! [`Budget`]: how many retries all calls of a context may make together.

use std::sync::atomic::{AtomicI64, Ordering};

const FULL: i64 = 500;
const RETRY: i64 = 5;
/// A timeout has held a slot for as long as a call can.
const TIMEOUT: i64 = 10;
const SUCCESS: i64 = 1;

/// Tokens that retries spend and successes earn, as the AWS SDKs keep them.
///
/// While a few calls fail nobody notices it. When most do, the retries would be a
/// second load on a provider that cannot carry the first: then it runs dry, and retries
/// wait as long as they ever do. It slows; it fails nobody.
#[derive(Debug)]
pub(crate) struct Budget(AtomicI64);

impl Budget {
    pub(crate) fn new() -> Self {
        Self(AtomicI64::new(FULL))
    }

    /// Takes a retry out, if there is one in it.
    pub(crate) fn spend(&self, timed_out: bool) -> bool {
        let price = if timed_out { TIMEOUT } else { RETRY };
        let take = |tokens: i64| (tokens >= price).then_some(tokens - price);
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
            .is_ok()
    }

    pub(crate) fn earn(&self) {
        if self.0.load(Ordering::Relaxed) < FULL {
            self.0.fetch_add(SUCCESS, Ordering::Relaxed);
        }
    }

    pub(crate) fn is_dry(&self) -> bool {
        self.0.load(Ordering::Relaxed) < RETRY
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hundred_retries_or_fifty_timeouts_and_successes_earn_more() {
        let budget = Budget::new();
        assert_eq!((0..).take_while(|_| budget.spend(false)).count(), 100);
        assert!(budget.is_dry());
        (0..5).for_each(|_| budget.earn());
        assert!(!budget.is_dry() && !budget.spend(true) && budget.spend(false));
        (0..9_999).for_each(|_| budget.earn());
        assert_eq!((0..).take_while(|_| budget.spend(true)).count(), 50);
    }
}
