//! [`Ledger`]: the calls that the simulated provider has seen and billed, in memory and in a file.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::request::{RequestDigest, Usage};

/// The calls that the provider has seen and billed: a copy, taken by
/// [`Sim::ledger`](super::Sim::ledger) or [read](Ledger::read) from a file.
///
/// It grows with the calls: the simulated provider is for tests and examples.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct Ledger {
    /// The totals of all calls.
    pub total: Totals,
    /// The totals by item key. Calls without a key are under their digest.
    pub by_key: BTreeMap<Arc<str>, Totals>,
    /// All billed calls, in the order of billing.
    pub bills: Vec<Bill>,
    /// The calls in flight now.
    pub in_flight: usize,
    /// The most calls that were ever in flight at one time.
    pub peak_in_flight: usize,
    /// The time at which each call was admitted, counted from the start.
    pub grants: Vec<Duration>,
    /// The calls admitted and refused in each second from the start.
    pub seconds: Vec<Second>,
    /// Lines of the file that are no bill, because a crash cut them.
    pub torn_lines: usize,
}

/// The calls and tokens of one key, or of all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Totals {
    /// Calls that were admitted.
    pub admitted: u64,
    /// Calls refused by a rate limit (429).
    pub rejected: u64,
    /// Calls refused because of the account: an exhausted quota (429) or wrong credentials (401).
    pub denied: u64,
    /// Admitted calls that ended in a fault of the simulation, cut ones included.
    pub faults: u64,
    /// Admitted calls that the client dropped before their end.
    pub cancelled: u64,
    /// Calls that were billed.
    pub billed: u64,
    /// The tokens that were billed.
    pub usage: Usage,
}

/// One second of the simulation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Second {
    /// Calls admitted.
    pub accepted: u32,
    /// Calls refused by a rate limit (429).
    pub rejected: u32,
}

/// One billed call: a line of the ledger file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Bill {
    /// The version of this record, 1.
    pub v: u32,
    /// Increases by one with each bill, from 0 or from the end of the file when it was opened.
    /// Two processes that share a file may use the same number.
    pub seq: u64,
    /// The key of the item, or the digest if it has none.
    pub key: Arc<str>,
    /// The digest of the request.
    pub digest: RequestDigest,
    /// The billed tokens.
    #[serde(flatten)]
    pub usage: Usage,
    /// How the call ended.
    pub ended: Ended,
}

/// How a billed call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Ended {
    /// With a whole answer.
    Complete,
    /// By a fault, after generation had begun.
    Cut,
    /// By the client, which dropped the call.
    Cancelled,
}

impl Ledger {
    /// Reads the bills of a ledger file, which several processes may have written.
    ///
    /// A missing file is an empty ledger. A line that is no bill, such as the last line of a
    /// process that was killed during a write, is counted in
    /// [`torn_lines`](Ledger::torn_lines). The file has only bills: the other totals are zero.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let bytes = match std::fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            read => read?,
        };
        let mut ledger = Self::default();
        for line in bytes.split(|byte| *byte == b'\n') {
            match serde_json::from_slice::<Bill>(line) {
                Ok(bill) => ledger.record(bill),
                Err(_) if line.is_empty() => {}
                Err(_) => ledger.torn_lines += 1,
            }
        }
        Ok(ledger)
    }

    /// Returns the totals of one key, which are zero if it was never seen.
    pub fn of_key(&self, key: &str) -> Totals {
        self.by_key.get(key).copied().unwrap_or_default()
    }

    /// Returns the keys that were billed more than once, and how often.
    pub fn billed_again(&self) -> impl Iterator<Item = (&str, u64)> {
        let again = self.by_key.iter().filter(|(_, a)| a.billed > 1);
        again.map(|(key, totals)| (&**key, totals.billed))
    }

    /// Returns how often each request was billed, by its digest.
    pub fn times_billed(&self) -> BTreeMap<RequestDigest, u64> {
        let mut times = BTreeMap::new();
        for bill in &self.bills {
            *times.entry(bill.digest).or_default() += 1;
        }
        times
    }

    /// Returns the most calls admitted in any window of this length, its end excluded.
    pub fn most_granted_in(&self, window: Duration) -> usize {
        let mut first = 0;
        let within = |(last, at): (usize, &Duration)| {
            while *at >= self.grants[first] + window && first < last {
                first += 1;
            }
            last + 1 - first
        };
        self.grants
            .iter()
            .enumerate()
            .map(within)
            .max()
            .unwrap_or(0)
    }

    /// Changes the totals of `key` and of all calls.
    pub(super) fn count(&mut self, key: &Arc<str>, change: impl Fn(&mut Totals)) {
        change(&mut self.total);
        match self.by_key.get_mut(key) {
            Some(totals) => change(totals),
            None => change(self.by_key.entry(key.clone()).or_default()),
        }
    }

    /// Returns the second that contains `at`.
    pub(super) fn second(&mut self, at: Duration) -> &mut Second {
        let index = at.as_secs() as usize;
        if index >= self.seconds.len() {
            self.seconds.resize(index + 1, Second::default());
        }
        &mut self.seconds[index]
    }

    pub(super) fn record(&mut self, bill: Bill) {
        self.count(&bill.key, |totals| {
            totals.billed += 1;
            totals.usage += bill.usage;
        });
        self.bills.push(bill);
    }
}

/// The file to which bills are appended, if there is one, and the number of the next bill.
#[derive(Debug, Default)]
pub(super) struct LedgerFile {
    file: Option<File>,
    next: u64,
    /// The error of the file. It is not used again after its first failure.
    broken: Option<Error>,
}

impl LedgerFile {
    /// Opens `path` for appending.
    pub(super) fn open(path: &Path) -> Self {
        Self::try_open(path).unwrap_or_else(|error| Self {
            broken: Some(unwritable(error)),
            ..Self::default()
        })
    }

    fn try_open(path: &Path) -> Result<Self> {
        let so_far = Ledger::read(path)?;
        let mut file = OpenOptions::new().append(true).create(true).open(path)?;
        // Ends a line that a crash left incomplete; otherwise the next bill would become part of it.
        if so_far.torn_lines > 0 && !std::fs::read(path)?.ends_with(b"\n") {
            file.write_all(b"\n")?;
        }
        let last = so_far.bills.iter().map(|bill| bill.seq).max();
        Ok(Self {
            next: last.map_or(0, |seq| seq + 1),
            ..Self::from_file(file)
        })
    }

    pub(super) fn from_file(file: File) -> Self {
        Self {
            file: Some(file),
            ..Self::default()
        }
    }

    /// Returns the number of the next bill.
    pub(super) fn next_number(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    /// # Errors
    /// If the file has failed before.
    pub(super) fn check(&self) -> Result<()> {
        self.broken.clone().map_or(Ok(()), Err)
    }

    /// Appends the bill.
    pub(super) fn append(&mut self, bill: &Bill) -> Result<()> {
        self.check()?;
        self.write(bill).map_err(|error| {
            let error = unwritable(error);
            self.broken = Some(error.clone());
            error
        })
    }

    /// Appends the bill in one write, so that a killed process leaves the line whole or not at
    /// all, and processes that share the file do not mix their lines.
    fn write(&mut self, bill: &Bill) -> Result<()> {
        let Some(file) = &mut self.file else {
            return Ok(());
        };
        let mut line = serde_json::to_vec(bill)?;
        line.push(b'\n');
        let written = loop {
            match file.write(&line) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        if written < line.len() {
            return Err(io::Error::from(io::ErrorKind::WriteZero).into());
        }
        Ok(())
    }
}

fn unwritable(error: Error) -> Error {
    let message = format!("the ledger file cannot be used: {}", error.message());
    Error::new(ErrorKind::Io, message).with_source(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Request;

    fn bill(seq: u64, key: &str) -> Bill {
        Bill {
            v: 1,
            seq,
            key: key.into(),
            digest: Request::new(key).digest(),
            usage: Usage::new(3, 4),
            ended: Ended::Complete,
        }
    }

    #[test]
    fn the_format_of_a_line_is_stable() {
        let line = serde_json::to_string(&bill(7, "k")).unwrap();
        assert_eq!(
            line,
            format!(
                "{{\"v\":1,\"seq\":7,\"key\":\"k\",\"digest\":\"{}\",\"input_tokens\":3,\
                 \"output_tokens\":4,\"cached_input_tokens\":0,\"reasoning_tokens\":0,\
                 \"ended\":\"complete\"}}",
                Request::new("k").digest()
            )
        );
    }

    #[test]
    fn a_cut_line_is_counted_and_the_next_bill_starts_a_new_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        assert_eq!(Ledger::read(&path).unwrap(), Ledger::default());

        let mut file = LedgerFile::open(&path);
        file.append(&bill(0, "a")).unwrap();
        file.append(&bill(1, "b")).unwrap();
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 30]).unwrap();
        let cut = Ledger::read(&path).unwrap();
        assert_eq!((cut.total.billed, cut.torn_lines), (1, 1));

        let mut file = LedgerFile::open(&path);
        assert_eq!(file.next_number(), 1);
        file.append(&bill(1, "b")).unwrap();
        let ledger = Ledger::read(&path).unwrap();
        assert_eq!((ledger.total.billed, ledger.torn_lines), (2, 1));
        assert_eq!(ledger.of_key("b").usage, Usage::new(3, 4));
        assert_eq!(ledger.billed_again().count(), 0);
    }

    #[test]
    fn most_granted_in_finds_the_busiest_window() {
        let mut ledger = Ledger::default();
        assert_eq!(ledger.most_granted_in(Duration::from_secs(1)), 0);
        ledger.grants = [0, 0, 900, 1000, 1800].map(Duration::from_millis).into();
        assert_eq!(ledger.most_granted_in(Duration::from_secs(1)), 3);
        assert_eq!(ledger.most_granted_in(Duration::from_millis(1001)), 4);
        assert_eq!(ledger.most_granted_in(Duration::ZERO), 1);
    }
}
