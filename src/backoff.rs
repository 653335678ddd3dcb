//! [`doubling`]: the waits between the attempts of anything that is tried again.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};

/// Yields waits without end: `first`, then twice the wait before, up to `longest`. There is no jitter; callers that may
/// come at the same moment add their own.
pub(crate) fn doubling(
    first: Duration,
    longest: Duration,
) -> impl Iterator<Item = Duration> + use<> {
    ExponentialBuilder::new()
        .with_factor(2.0)
        .with_min_delay(first.min(longest))
        .with_max_delay(longest)
        .without_max_times()
        .build()
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
}
