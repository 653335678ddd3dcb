//! [`Outcome`]: the result of one item. [`Settled`]: the outcomes of all items, in input order.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::call::Tally;
use crate::error::{Error, ErrorKind, Result};

/// The result of one item of a batch, with its cost and duration.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Outcome<T> {
    /// The index of the input, from 0.
    pub index: usize,
    /// The key of the item, if the batch has [keys](crate::Batch::key).
    pub key: Option<Arc<str>>,
    /// The value, or the error.
    pub result: Result<T>,
    /// The cost of the item, with all batches inside it: calls, attempts, tokens.
    pub tally: Tally,
    /// The time from the start of the batch to the start of the item.
    pub started: Duration,
    /// The duration of the item, including the wait for the lane.
    pub elapsed: Duration,
}

impl<T> Outcome<T> {
    /// Whether the item succeeded.
    pub fn is_ok(&self) -> bool {
        self.result.is_ok()
    }

    /// Returns the time from the start of the batch to the end of the item.
    pub fn ended(&self) -> Duration {
        self.started + self.elapsed
    }

    /// The name of the item in a path: its key, or else its index.
    pub(crate) fn name(&self) -> String {
        match &self.key {
            Some(key) => key.to_string(),
            None => self.index.to_string(),
        }
    }

    /// Returns the error, if the item failed.
    pub fn error(&self) -> Option<&Error> {
        self.result.as_ref().err()
    }
}

/// The outcomes of a batch in input order, one for each input.
///
/// `Display` writes a summary of one line.
///
/// ```
/// use throughline::{Context, Error, testing::Scripted};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// # let cx = Context::builder(Scripted::new()).build();
/// let halves = cx.fan_out("half", [4, 5, 6]).settle(async |_cx, n| {
///     if n % 2 == 0 { Ok(n / 2) } else { Err(Error::other("odd")) }
/// });
/// let halves = halves.await;
/// assert_eq!(halves.oks().collect::<Vec<_>>(), [&2, &3]);
/// assert_eq!(halves.failures().next().unwrap().index, 1);
/// assert!(halves.clone().at_least(3).is_err());
/// assert_eq!(halves.or_fallback(|_failed| 0), [2, 0, 3]);
/// # }
/// ```
#[derive(Debug, Clone, Serialize, Deserialize)]
#[must_use = "the failures are in here too"]
pub struct Settled<T> {
    outcomes: Vec<Outcome<T>>,
    elapsed: Duration,
}

impl<T> Settled<T> {
    pub(crate) fn new(mut outcomes: Vec<Outcome<T>>, elapsed: Duration) -> Self {
        outcomes.sort_unstable_by_key(|outcome| outcome.index);
        Self { outcomes, elapsed }
    }

    /// Returns all outcomes, in input order.
    pub fn outcomes(&self) -> &[Outcome<T>] {
        &self.outcomes
    }

    /// Returns the number of items.
    pub fn len(&self) -> usize {
        self.outcomes.len()
    }

    /// Whether there were no items.
    pub fn is_empty(&self) -> bool {
        self.outcomes.is_empty()
    }

    /// Returns the values, in input order.
    pub fn oks(&self) -> impl Iterator<Item = &T> {
        self.outcomes
            .iter()
            .filter_map(|outcome| outcome.result.as_ref().ok())
    }

    /// Returns the outcomes without a value, in input order.
    pub fn failures(&self) -> impl Iterator<Item = &Outcome<T>> {
        self.outcomes.iter().filter(|outcome| !outcome.is_ok())
    }

    /// Returns the cost of the whole batch.
    pub fn tally(&self) -> Tally {
        let mut sum = Tally::default();
        for Outcome { tally, .. } in &self.outcomes {
            sum += *tally;
        }
        sum
    }

    /// Returns the duration of the whole batch.
    pub fn elapsed(&self) -> Duration {
        self.elapsed
    }

    /// Returns the values, if there are at least `n` of them.
    ///
    /// # Errors
    /// [`ErrorKind::TooFew`] with the summary as its message and the first failure as its source.
    pub fn at_least(self, n: usize) -> Result<Vec<T>> {
        if self.oks().count() >= n {
            return Ok(self.into_oks());
        }
        let error = Error::new(ErrorKind::TooFew, format!("{self}, {n} were needed"));
        Err(match self.failures().next().and_then(Outcome::error) {
            Some(first) => error.with_source(first.clone()),
            None => error,
        })
    }

    /// Returns the values, if every item succeeded.
    ///
    /// # Errors
    /// As [`at_least`](Self::at_least).
    pub fn all(self) -> Result<Vec<T>> {
        let n = self.len();
        self.at_least(n)
    }

    /// Returns a value for every input, in input order: `fallback` makes those of failed items.
    pub fn or_fallback(self, mut fallback: impl FnMut(&Outcome<T>) -> T) -> Vec<T> {
        let value = |outcome| match outcome {
            Outcome {
                result: Ok(value), ..
            } => value,
            failed => fallback(&failed),
        };
        self.outcomes.into_iter().map(value).collect()
    }

    /// Returns the results alone, in input order.
    pub fn into_results(self) -> Vec<Result<T>> {
        let outcomes = self.outcomes.into_iter();
        outcomes.map(|outcome| outcome.result).collect()
    }

    /// Returns the values, in input order, and drops the failures.
    pub fn into_oks(self) -> Vec<T> {
        let outcomes = self.outcomes.into_iter();
        outcomes.filter_map(|outcome| outcome.result.ok()).collect()
    }
}

impl<T> IntoIterator for Settled<T> {
    type Item = Outcome<T>;
    type IntoIter = std::vec::IntoIter<Outcome<T>>;

    fn into_iter(self) -> Self::IntoIter {
        self.outcomes.into_iter()
    }
}

impl<T> fmt::Display for Settled<T> {
    /// Writes `10 of 12 succeeded in 3.2s; 1 timeout, 1 throttled (first: #4: timed out: ...)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (done, all) = (self.oks().count(), self.len());
        write!(f, "{done} of {all} succeeded in {:.1?}", self.elapsed)?;
        let mut kinds = BTreeMap::<&str, usize>::new();
        for error in self.failures().filter_map(Outcome::error) {
            *kinds.entry(error.kind().as_str()).or_default() += 1;
        }
        for (i, (kind, count)) in kinds.iter().enumerate() {
            write!(f, "{} {count} {kind}", if i == 0 { ";" } else { "," })?;
        }
        match self.failures().next() {
            Some(Outcome {
                result: Err(error),
                key: Some(key),
                ..
            }) => write!(f, " (first: {key}: {error})"),
            Some(Outcome {
                result: Err(error),
                index,
                ..
            }) => write!(f, " (first: #{index}: {error})"),
            _ => Ok(()),
        }
    }
}
