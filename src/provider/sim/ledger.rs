//! [`Ledger`]: what the simulated provider saw and what it billed, in memory and in a file.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::request::RequestDigest;
use crate::request::Usage;

/// What the provider saw and billed until one moment: a copy, taken by
/// [`Sim::ledger`](super::Sim::ledger) or [read](Ledger::read) from a file.
///
/// It grows with the calls: the simulated provider is for tests and examples.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct Ledger {
    /// The sums over all calls.
    pub total: Account,
    /// The sums by item key; calls without one are under their digest.
    pub accounts: BTreeMap<Arc<str>, Account>,
    /// Every call that was billed, in the order of billing.
    pub bills: Vec<Bill>,
    /// The calls in flight now.
    pub in_flight: usize,
    /// The most calls that were ever in flight at one time.
    pub peak_in_flight: usize,
    /// When each admitted call was let in, counted from the start.
    pub grants: Vec<Duration>,
    /// Second by second from the start: what was let in, what was refused.
    pub seconds: Vec<Second>,
    /// Lines of the file that are not a bill: a line cut in half by a crash.
    pub torn_lines: usize,
}

/// The calls of one key, or of all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Account {
    /// Calls that were let in.
    pub admitted: u64,
    /// Calls refused by a rate limit (429).
    pub rejected: u64,
    /// Calls refused for the account's sake: an empty one (429) or wrong credentials (401).
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
    /// Calls let in.
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
    /// Counts up by one with each bill, from 0 or from where the file ended when it was
    /// opened; so two processes that share a file can use the same number.
    pub seq: u64,
    /// The item's key, or the digest if there was none.
    pub key: Arc<str>,
    /// What was asked.
    pub digest: RequestDigest,
    /// The tokens billed.
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
    /// By the client, which did not wait for the end.
    Cancelled,
}

impl Ledger {
    /// Reads the bills of a ledger file, of however many processes wrote to it.
    ///
    /// A file that is not there is an empty ledger. A line that is no bill, as a process
    /// killed in the middle of a write leaves one at the end, is counted in
    /// [`torn_lines`](Ledger::torn_lines). The file knows nothing but bills: the other
    /// sums are zero.
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
                Ok(bill) => ledger.enter(bill),
                Err(_) if line.is_empty() => {}
                Err(_) => ledger.torn_lines += 1,
            }
        }
        Ok(ledger)
    }

    /// The sums of one key: zeros if it was never seen.
    pub fn account(&self, key: &str) -> Account {
        self.accounts.get(key).copied().unwrap_or_default()
    }

    /// The keys that were billed more than once, and how often.
    pub fn billed_again(&self) -> impl Iterator<Item = (&str, u64)> {
        let again = self.accounts.iter().filter(|(_, a)| a.billed > 1);
        again.map(|(key, account)| (&**key, account.billed))
    }

    /// How often each request was billed, by its digest: what was paid for twice is there with 2.
    pub fn times_billed(&self) -> BTreeMap<RequestDigest, u64> {
        let mut times = BTreeMap::new();
        for bill in &self.bills {
            *times.entry(bill.digest).or_default() += 1;
        }
        times
    }

    /// The most calls let in within any stretch of `window`, its end not included.
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

    /// Changes the sums of `key` and of all alike.
    pub(super) fn note(&mut self, key: &Arc<str>, change: impl Fn(&mut Account)) {
        change(&mut self.total);
        match self.accounts.get_mut(key) {
            Some(account) => change(account),
            None => change(self.accounts.entry(key.clone()).or_default()),
        }
    }

    /// The second that `at` lies in.
    pub(super) fn second(&mut self, at: Duration) -> &mut Second {
        let index = at.as_secs() as usize;
        if index >= self.seconds.len() {
            self.seconds.resize(index + 1, Second::default());
        }
        &mut self.seconds[index]
    }

    pub(super) fn enter(&mut self, bill: Bill) {
        self.note(&bill.key, |account| {
            account.billed += 1;
            account.usage += bill.usage;
        });
        self.bills.push(bill);
    }
}

/// The file that bills are appended to, if there is one, and the number of the next.
#[derive(Debug, Default)]
pub(super) struct Book {
    file: Option<File>,
    next: u64,
    /// Why the file is of no use: once it has failed it is not trusted again.
    broken: Option<Error>,
}

impl Book {
    /// Opens `path` for appending, after what is there.
    pub(super) fn open(path: &Path) -> Self {
        Self::try_open(path).unwrap_or_else(|error| Self {
            broken: Some(unwritable(error)),
            ..Self::default()
        })
    }

    fn try_open(path: &Path) -> Result<Self> {
        let so_far = Ledger::read(path)?;
        let mut file = OpenOptions::new().append(true).create(true).open(path)?;
        // Ends a line that a crash left half written, or the next bill would be lost in it.
        if so_far.torn_lines > 0 && !std::fs::read(path)?.ends_with(b"\n") {
            file.write_all(b"\n")?;
        }
        let last = so_far.bills.iter().map(|bill| bill.seq).max();
        Ok(Self {
            next: last.map_or(0, |seq| seq + 1),
            ..Self::over(file)
        })
    }

    pub(super) fn over(file: File) -> Self {
        Self {
            file: Some(file),
            ..Self::default()
        }
    }

    /// Takes the next number.
    pub(super) fn number(&mut self) -> u64 {
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

    /// In one write, so that a killed process leaves the line whole or not at all, and
    /// processes that share the file do not mix their lines.
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
    fn the_line_is_flat_json_and_fixed() {
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
    fn a_line_cut_in_half_is_counted_and_not_written_into() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        assert_eq!(Ledger::read(&path).unwrap(), Ledger::default());

        let mut book = Book::open(&path);
        book.append(&bill(0, "a")).unwrap();
        book.append(&bill(1, "b")).unwrap();
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 30]).unwrap();
        let cut = Ledger::read(&path).unwrap();
        assert_eq!((cut.total.billed, cut.torn_lines), (1, 1));

        let mut book = Book::open(&path);
        assert_eq!(book.number(), 1);
        book.append(&bill(1, "b")).unwrap();
        let ledger = Ledger::read(&path).unwrap();
        assert_eq!((ledger.total.billed, ledger.torn_lines), (2, 1));
        assert_eq!(ledger.account("b").usage, Usage::new(3, 4));
        assert_eq!(ledger.billed_again().count(), 0);
    }

    #[test]
    fn the_busiest_window() {
        let mut ledger = Ledger::default();
        assert_eq!(ledger.most_granted_in(Duration::from_secs(1)), 0);
        ledger.grants = [0, 0, 900, 1000, 1800].map(Duration::from_millis).into();
        assert_eq!(ledger.most_granted_in(Duration::from_secs(1)), 3);
        assert_eq!(ledger.most_granted_in(Duration::from_millis(1001)), 4);
        assert_eq!(ledger.most_granted_in(Duration::ZERO), 1);
    }
}
