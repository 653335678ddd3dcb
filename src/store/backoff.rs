//! The waits between tries of a store that fails.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};

/// Waits that begin at `first` and double up to `longest`, each prolonged at random by at most itself. They never end.
pub(crate) struct Backoff(ExponentialBackoff);

impl Backoff {
    pub(crate) fn new(first: Duration, longest: Duration) -> Self {
        let waits = ExponentialBuilder::new()
            .with_min_delay(first)
            .with_max_delay(longest)
            .without_max_times()
            .with_jitter();
        Self(waits.build())
    }

    /// Returns the next wait.
    pub(crate) fn next(&mut self) -> Duration {
        self.0.next().unwrap_or_default()
    }
}
