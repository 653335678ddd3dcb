//! The effects of a transaction on runs: counters and log entries, and the units of time in stores.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::json;

use super::model::{RunId, Status};
use crate::error::{Error, ErrorKind};

/// The changes of one run in one transaction.
#[derive(Debug, Default)]
pub(super) struct RunChange {
    /// Kind and data of the notes, in order.
    pub(super) notes: Vec<(String, String)>,
    /// The `seq`s of items that are completed now.
    pub(super) completed: Vec<u64>,
    /// The `seq`s of items that failed now.
    pub(super) failed: Vec<u64>,
    /// The error of the failed item with the lowest `seq`.
    pub(super) error: Option<Error>,
}

impl RunChange {
    /// Adds an item that ended, with its error if it failed.
    pub(super) fn settle(&mut self, seq: u64, error: Option<&Error>) {
        match error {
            None => self.completed.push(seq),
            Some(error) => {
                if self.failed.iter().all(|other| seq < *other) {
                    self.error = Some(error.clone());
                }
                self.failed.push(seq);
            }
        }
    }

    /// Returns the entries for the run's log. `ended` is the status of the run if it ended.
    pub(super) fn entries(mut self, ended: Option<Status>) -> Vec<(String, String)> {
        let mut entries = self.notes;
        if !self.completed.is_empty() || !self.failed.is_empty() {
            self.completed.sort_unstable();
            self.failed.sort_unstable();
            let data = json!({"completed": self.completed, "failed": self.failed});
            entries.push(("settled".to_owned(), data.to_string()));
        }
        entries.extend(ended.map(ended_entry));
        entries
    }
}

pub(super) fn ended_entry(status: Status) -> (String, String) {
    ("ended".to_owned(), json!({"status": status}).to_string())
}

/// Returns the error of an item whose worker died in its last attempt.
pub(super) fn worker_died() -> Error {
    Error::new(
        ErrorKind::LeaseLost,
        "the worker died or lost its lease while it held only this item, in the last attempt of the item; \
         `retry_failed` gives it new attempts",
    )
}

/// Returns the error of a claim under a lease that is gone.
pub(super) fn lease_lost(lease: super::LeaseId) -> Error {
    let message = format!("lease {lease} is gone or has expired: stop, and register again");
    Error::new(ErrorKind::LeaseLost, message)
}

/// Converts a time to milliseconds since 1970.
pub(super) fn millis(at: SystemTime) -> i64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    duration_millis(since)
}

/// Converts a duration to milliseconds, rounded up so that a delay is never shorter than requested.
pub(super) fn duration_millis(duration: Duration) -> i64 {
    let millis = duration.as_nanos().div_ceil(1_000_000);
    // At most a thousand years, which does not overflow when added to the present.
    millis.min(31_556_952_000_000) as i64
}

/// Converts milliseconds since 1970 to a time.
pub(super) fn at_millis(millis: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(millis.max(0) as u64)
}

/// The changes of all runs in one transaction, in the order of the runs' numbers.
pub(super) type RunChanges = std::collections::BTreeMap<RunId, RunChange>;
