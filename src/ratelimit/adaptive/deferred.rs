//! [`DeferredCharges`]: what the calls in flight will be charged when they end.
//!
//! Where a provider counts the tokens of an answer as they are produced, a call takes
//! nothing of them when it is let in. Its bucket fills up while the first answers are written
//! unless more calls start than it holds tokens for; and what comes due is not what was
//! reserved, but what such calls are charged on average.

use crate::ratelimit::bucket::Nanos;

/// Over about so many calls averages are taken.
const REMEMBERED: f64 = 64.0;

#[derive(Debug, Clone, Default)]
pub(in crate::ratelimit) struct DeferredCharges {
    /// What calls in flight have reserved, and how many they are.
    promised: u64,
    calls: u64,
    /// What calls that ended lately had reserved, and what they were charged.
    reserved: f64,
    charged: f64,
    /// The mean of the charges, and of their squares.
    mean: f64,
    square: f64,
    /// How long they took, on average.
    latency: f64,
}

impl DeferredCharges {
    pub(in crate::ratelimit) fn add(&mut self, n: u64) {
        self.promised = self.promised.saturating_add(n);
        self.calls += u64::from(n > 0);
    }

    /// A call that has reserved `n` has ended, however.
    pub(in crate::ratelimit) fn remove(&mut self, n: u64) {
        self.promised = self.promised.saturating_sub(n);
        self.calls = self.calls.saturating_sub(u64::from(n > 0));
    }

    /// An answer was charged `actual` units after so long.
    pub(in crate::ratelimit) fn record(&mut self, reserved: u64, actual: u64, latency: Nanos) {
        let kept = 1.0 - 1.0 / REMEMBERED;
        let first = self.reserved == 0.0;
        self.reserved = self.reserved * kept + reserved as f64;
        self.charged = self.charged * kept + actual as f64;
        let average = |mean: f64, value: f64| match first {
            true => value,
            false => mean * kept + value / REMEMBERED,
        };
        self.latency = average(self.latency, latency as f64);
        let actual = actual as f64;
        self.mean = average(self.mean, actual);
        self.square = average(self.square, actual * actual);
    }

    pub(in crate::ratelimit) fn is_pending(&self) -> bool {
        self.promised > 0
    }

    /// What is sure to come due if a call that reserves `n` starts too: what is expected, less one
    /// standard deviation. Too little in flight leaves the bucket full, and what it cannot
    /// hold is lost; too much is owed for a while, and nothing is lost. `None` if
    /// the call is alone, for then there is nothing to wait for.
    pub(in crate::ratelimit) fn expected_with(&self, n: u64) -> Option<u64> {
        let all = self.promised.saturating_add(n);
        let typical = if self.reserved > 0.0 {
            let expected = all as f64 * self.charged / self.reserved;
            let variance = (self.square - self.mean * self.mean).max(0.0);
            let spread = (variance * (self.calls + 1) as f64).sqrt();
            (expected - spread).round().max(0.0) as u64
        } else {
            all
        };
        (self.promised > 0).then_some(typical)
    }

    /// In how long a call that starts now comes due.
    pub(in crate::ratelimit) fn mean_latency(&self) -> Nanos {
        self.latency as Nanos
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_expected_is_the_part_of_the_reserved_that_is_charged_in_the_end() {
        let mut deferred = DeferredCharges::default();
        assert_eq!(deferred.expected_with(100), None, "nothing is in flight");
        deferred.add(100);
        assert_eq!(deferred.expected_with(100), Some(200), "nothing is known");
        for _ in 0..10 {
            deferred.record(100, 25, 2_000);
        }
        assert_eq!(deferred.expected_with(100), Some(50));
        assert_eq!(deferred.mean_latency(), 2_000);
        for _ in 0..1_000 {
            deferred.record(100, 50, 4_000);
        }
        assert_eq!(deferred.expected_with(100), Some(100));
        assert!(deferred.mean_latency().abs_diff(4_000) <= 1);
        deferred.remove(100);
        assert_eq!(deferred.expected_with(100), None);
    }
}
