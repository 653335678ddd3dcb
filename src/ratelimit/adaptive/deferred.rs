//! [`DeferredCharges`]: the expected charges of the calls in flight, where answers are charged when they end.
//!
//! Where a provider counts the tokens of an answer as they are produced, a call takes none of them when it is admitted.
//! The bucket of the provider overflows while the first answers are written, unless more calls start than it holds tokens
//! for. The expected charge is not the reserved number of tokens, but the average of such calls.

use crate::ratelimit::bucket::Nanos;

/// The number of calls over which averages are taken.
const REMEMBERED: f64 = 64.0;

#[derive(Debug, Clone, Default)]
pub(in crate::ratelimit) struct DeferredCharges {
    /// The units that the calls in flight have reserved, and the number of these calls.
    reserved_in_flight: u64,
    calls: u64,
    /// The units that recent calls had reserved, and the units that they were charged.
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
        self.reserved_in_flight = self.reserved_in_flight.saturating_add(n);
        self.calls += 1;
    }

    /// Removes a call that had reserved `n` units: it has ended in any way.
    pub(in crate::ratelimit) fn remove(&mut self, n: u64) {
        self.reserved_in_flight = self.reserved_in_flight.saturating_sub(n);
        self.calls = self.calls.saturating_sub(1);
        if self.calls == 0 {
            // The cap of a call may have changed since it was granted.
            self.reserved_in_flight = 0;
        }
    }

    /// Records an answer that was charged `actual` units after `latency`.
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
        self.calls > 0
    }

    /// Returns the units that will be charged at least if a call that reserves `n` starts too: the expected charge, less one
    /// standard deviation. With too few calls in flight the bucket overflows and units are lost; too many
    /// leave a debt for a while, and nothing is lost. `None` if the call is alone: then there is nothing to wait for.
    pub(in crate::ratelimit) fn expected_with(&self, n: u64) -> Option<u64> {
        let all = self.reserved_in_flight.saturating_add(n);
        let typical = if self.reserved > 0.0 {
            let expected = all as f64 * self.charged / self.reserved;
            let variance = (self.square - self.mean * self.mean).max(0.0);
            let spread = (variance * (self.calls + 1) as f64).sqrt();
            (expected - spread).round().max(0.0) as u64
        } else {
            all
        };
        self.is_pending().then_some(typical)
    }

    /// The average time from the start of a call to its charge.
    pub(in crate::ratelimit) fn mean_latency(&self) -> Nanos {
        self.latency as Nanos
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_expected_charge_is_the_average_part_of_the_reserved_units() {
        let mut deferred = DeferredCharges::default();
        assert_eq!(deferred.expected_with(100), None, "nothing is in flight");
        deferred.add(100);
        assert_eq!(
            deferred.expected_with(100),
            Some(200),
            "nothing is known yet"
        );
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
