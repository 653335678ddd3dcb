//! What a transaction does to a run besides changing its items: counters and log.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::json;

use super::model::{RunId, Status};
use crate::error::{Error, ErrorKind};

/// What one transaction did to one run.
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
    /// An item of the run ended.
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

    /// The entries for its log; `ended` says how the run ended, if it did.
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

/// Why an item failed whose worker died in its last attempt.
pub(super) fn worker_died() -> Error {
    Error::new(
        ErrorKind::LeaseLost,
        "its worker died, or lost its lease, with this item alone in hand, in the last attempt that the \
         item had; `retry_failed` gives it new ones",
    )
}

/// A claim under a lease that is gone.
pub(super) fn lease_lost(lease: super::LeaseId) -> Error {
    let message = format!("lease {lease} is gone or has expired: stop, and register again");
    Error::new(ErrorKind::LeaseLost, message)
}

/// Milliseconds since 1970.
pub(super) fn millis(at: SystemTime) -> i64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    duration_millis(since)
}

/// `duration` in whole milliseconds, rounded up: a delay is never shorter than asked for.
pub(super) fn duration_millis(duration: Duration) -> i64 {
    let millis = duration.as_nanos().div_ceil(1_000_000);
    // A thousand years is for ever, and cannot overflow when added to the present.
    millis.min(31_556_952_000_000) as i64
}

/// The time that is so many milliseconds after 1970.
pub(super) fn at_millis(millis: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(millis.max(0) as u64)
}

/// Adds `item` to the changes of `run`, which are few: in the order of the runs' numbers.
pub(super) type RunChanges = std::collections::BTreeMap<RunId, RunChange>;
