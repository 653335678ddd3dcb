//! The waits between the attempts of anything that is tried again: [`doubling`], and [`Jittered`] for callers that would
//! otherwise come back at the same moment.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};

/// Yields waits without end: `first`, then twice the wait before, up to `longest`, without jitter.
pub(crate) fn doubling(
    first: Duration,
    longest: Duration,
) -> impl Iterator<Item = Duration> + use<> {
    exponential(first, longest).build()
}

/// The waits of [`doubling`], each prolonged at random by at most itself.
pub(crate) struct Jittered(ExponentialBackoff);

impl Jittered {
    pub(crate) fn new(first: Duration, longest: Duration) -> Self {
        Self(exponential(first, longest).with_jitter().build())
    }

    /// Returns the next wait.
    pub(crate) fn next(&mut self) -> Duration {
        self.0.next().unwrap_or_default()
    }
}

fn exponential(first: Duration, longest: Duration) -> ExponentialBuilder {
    ExponentialBuilder::new()
        .with_factor(2.0)
        .with_min_delay(first.min(longest))
        .with_max_delay(longest)
        .without_max_times()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest() {
        let seconds = |first, longest| {
            let waits = doubling(Duration::from_secs(first), Duration::from_secs(longest));
            waits.take(5).map(|wait| wait.as_secs()).collect::<Vec<_>>()
        };
        assert_eq!(seconds(1, 5), [1, 2, 4, 5, 5]);
        assert_eq!(seconds(9, 5), [5; 5]);
    }

    #[test]
    fn jitter_at_most_doubles_a_wait() {
        let mut waits = Jittered::new(Duration::from_secs(1), Duration::from_secs(4));
        for shortest in [1, 2, 4, 4] {
            let range = Duration::from_secs(shortest)..=Duration::from_secs(2 * shortest);
            let wait = waits.next();
            assert!(range.contains(&wait), "{wait:?} is not in {range:?}");
        }
    }
}
