//! [`RetryBudget`]: the number of retries that all calls of a context may make together.

use std::sync::atomic::{AtomicI64, Ordering};

const FULL: i64 = 500;
const RETRY: i64 = 5;
/// A call that timed out has held its slot for the longest time that a call can.
const TIMEOUT: i64 = 10;
const SUCCESS: i64 = 1;

/// A budget of tokens that retries spend and successes earn, as in the AWS SDKs.
///
/// While a few calls fail, it has no effect. When most calls fail, their retries would be a second load on a provider that
/// cannot carry the first. Then the budget runs empty, and each retry waits for the longest delay. No call fails because of
/// it.
#[derive(Debug)]
pub(super) struct RetryBudget(AtomicI64);

impl RetryBudget {
    pub(super) fn new() -> Self {
        Self(AtomicI64::new(FULL))
    }

    /// Takes the tokens for a retry, and returns whether there were enough.
    pub(super) fn spend(&self, timed_out: bool) -> bool {
        let price = if timed_out { TIMEOUT } else { RETRY };
        let take = |tokens: i64| (tokens >= price).then_some(tokens - price);
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
            .is_ok()
    }

    pub(super) fn earn(&self) {
        if self.0.load(Ordering::Relaxed) < FULL {
            self.0.fetch_add(SUCCESS, Ordering::Relaxed);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.load(Ordering::Relaxed) < RETRY
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_has_room_for_100_retries_or_50_timeouts_and_successes_refill_it() {
        let budget = RetryBudget::new();
        assert_eq!((0..).take_while(|_| budget.spend(false)).count(), 100);
        assert!(budget.is_empty());
        (0..5).for_each(|_| budget.earn());
        assert!(!budget.is_empty() && !budget.spend(true) && budget.spend(false));
        (0..9_999).for_each(|_| budget.earn());
        assert_eq!((0..).take_while(|_| budget.spend(true)).count(), 50);
    }
}
