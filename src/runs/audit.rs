//! [`Audit`]: checks that the record, the items and the log of a run agree.

use std::collections::BTreeSet;
use std::fmt;

use serde_json::Value;

use super::Runner;
use crate::error::Result;
use crate::store::{Item, LogEntry, Run, RunId, Status, Store};

/// The number of items or entries that are read at a time.
const PAGE: u32 = 500;

/// The result of a check of all rows of a run ([`Runner::audit`]). `Display` writes one line, and one more for each problem.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Audit {
    /// The run.
    pub run: RunId,
    /// The number of items.
    pub items: u64,
    /// The number of items that the log reports as completed, each once.
    pub completed: u64,
    /// The contradictions, one sentence each.
    pub problems: Vec<String>,
}

impl Audit {
    /// Returns whether everything agrees.
    pub fn is_sound(&self) -> bool {
        self.problems.is_empty()
    }

    /// Checks a run.
    pub(crate) async fn of(store: &dyn Store, run: &Run) -> Result<Self> {
        let mut check = Check::default();
        loop {
            let page = store.items(run.id, check.items, PAGE).await?;
            if page.is_empty() {
                break;
            }
            page.iter().for_each(|item| check.item(run, item));
        }
        loop {
            let page = store.log(run.id, check.entries, PAGE).await?;
            if page.is_empty() {
                break;
            }
            page.iter().for_each(|entry| check.entry(entry));
        }
        check.record(run);
        Ok(Self {
            run: run.id,
            items: check.items,
            completed: check.completed.len() as u64,
            problems: check.problems,
        })
    }
}

impl fmt::Display for Audit {
    /// `run 7: 864 items, 864 completed once each; sound`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            run,
            items,
            completed,
            problems,
        } = self;
        write!(
            f,
            "run {run}: {items} items, {completed} completed once each; "
        )?;
        if problems.is_empty() {
            return f.write_str("sound");
        }
        write!(f, "{} problems", problems.len())?;
        problems
            .iter()
            .try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}

/// The state of a check.
#[derive(Default)]
struct Check {
    items: u64,
    entries: u64,
    /// The numbers of completed, failed and cancelled rows.
    rows: [u64; 3],
    /// The items that the log reports as completed and failed since the last retry.
    completed: BTreeSet<u64>,
    failed: BTreeSet<u64>,
    problems: Vec<String>,
}

impl Check {
    fn expect(&mut self, holds: bool, problem: impl FnOnce() -> String) {
        if !holds {
            self.problems.push(problem());
        }
    }

    fn item(&mut self, run: &Run, item: &Item) {
        let (seq, status) = (self.items, item.status);
        self.items += 1;
        self.expect((item.seq, item.run) == (seq, run.id), || {
            let (found, of) = (item.seq, item.run);
            format!("in the place of item {seq} is item {found} of run {of}")
        });
        let has = (item.output.is_some(), item.error.is_some());
        let should = (status == Status::Completed, status == Status::Failed);
        self.expect(has == should, || {
            format!("item {seq} is {status} and has (an output, an error): {has:?}")
        });
        match status {
            Status::Completed => self.rows[0] += 1,
            Status::Failed => self.rows[1] += 1,
            Status::Cancelled => self.rows[2] += 1,
            Status::Pending | Status::Processing => {}
        }
    }

    fn entry(&mut self, entry: &LogEntry) {
        self.entries += 1;
        let place = self.entries;
        self.expect(entry.seq == place, || {
            format!("in the place of log entry {place} is {}", entry.seq)
        });
        // A gap is reported only once, not again by each page.
        self.entries = self.entries.max(entry.seq);
        match &*entry.kind {
            "settled" => {
                let data: Value = serde_json::from_str(&entry.data).unwrap_or_default();
                self.ended(&data, "completed", |check| &mut check.completed);
                self.ended(&data, "failed", |check| &mut check.failed);
            }
            "retried" => self.failed.clear(),
            _ => {}
        }
    }

    fn ended(&mut self, data: &Value, word: &str, items: impl Fn(&mut Self) -> &mut BTreeSet<u64>) {
        let Some(seqs) = data[word].as_array() else {
            let place = self.entries;
            return self
                .problems
                .push(format!("log entry {place} says nothing of {word}"));
        };
        for seq in seqs {
            let new = seq.as_u64().is_some_and(|seq| items(self).insert(seq));
            self.expect(new, || format!("item {seq} is {word} twice"));
        }
    }

    fn record(&mut self, run: &Run) {
        let [completed, failed, cancelled] = self.rows;
        let logged = (self.completed.len() as u64, self.failed.len() as u64);
        for (what, counted, found) in [
            ("items", run.total, self.items),
            ("completed items", run.completed, completed),
            ("failed items", run.failed, failed),
            ("cancelled items", run.cancelled, cancelled),
            ("log entries", run.log_seq, self.entries),
            ("completed items in the log", run.completed, logged.0),
            ("failed items in the log", run.failed, logged.1),
        ] {
            self.expect(counted == found, || {
                format!("the record counts {counted} {what}, and there are {found}")
            });
        }
        let over = run.status.is_over();
        self.expect(over == (run.ended() == run.total), || {
            let (status, ended, total) = (run.status, run.ended(), run.total);
            format!("it is {status} with {ended} of {total} items over")
        });
        self.expect(over == run.ended_at.is_some(), || {
            format!("it is {} and ended at {:?}", run.status, run.ended_at)
        });
    }
}

impl Runner {
    /// Checks a run: its counters equal those of its rows, and its log has no gap and reports the end of each item once.
    /// Returns `None` if the run does not exist. For operators and tests, because it reads every row.
    ///
    /// The result is only reliable if no worker processes the run meanwhile.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn audit(&self, run: RunId) -> Result<Option<Audit>> {
        match self.found(run).await? {
            Some(run) => Audit::of(&*self.store, &run).await.map(Some),
            None => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn entry(seq: u64, kind: &str, data: &str) -> LogEntry {
        LogEntry {
            seq,
            kind: kind.to_owned(),
            data: data.to_owned(),
            at: SystemTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn an_audit_finds_gaps_and_items_that_ended_twice() {
        let mut check = Check::default();
        check.entry(&entry(1, "created", "{}"));
        check.entry(&entry(
            2,
            "settled",
            r#"{"completed": [0, 1], "failed": [2]}"#,
        ));
        check.entry(&entry(3, "retried", "{}"));
        check.entry(&entry(4, "settled", r#"{"completed": [], "failed": [2]}"#));
        assert!(check.problems.is_empty(), "{:?}", check.problems);
        check.entry(&entry(6, "settled", r#"{"completed": [1], "failed": [2]}"#));
        check.entry(&entry(7, "settled", r#"{"completed": [3]}"#));
        assert_eq!(
            check.problems,
            [
                "in the place of log entry 5 is 6",
                "item 1 is completed twice",
                "item 2 is failed twice",
                "log entry 7 says nothing of failed",
            ]
        );
    }

    #[test]
    fn an_audit_finds_counters_that_differ_from_the_rows() {
        let run: Run = serde_json::from_value(serde_json::json!({
            "id": 7, "tenant": "", "name": "n", "status": "completed", "spec": "null",
            "total": 2, "completed": 2, "failed": 0, "cancelled": 0, "log_seq": 0, "error": null,
            "created_at": SystemTime::UNIX_EPOCH, "ended_at": null,
        }))
        .unwrap();
        let item: Item = serde_json::from_value(serde_json::json!({
            "id": 1, "run": 7, "seq": 1, "key": "k", "tenant": "", "status": "completed", "epoch": 2,
            "attempt": 1, "max_attempts": 3, "input": "1", "output": null, "error": null,
        }))
        .unwrap();
        let mut check = Check::default();
        check.item(&run, &item);
        check.record(&run);
        let audit = Audit {
            run: run.id,
            items: check.items,
            completed: 0,
            problems: check.problems,
        };
        assert!(!audit.is_sound());
        assert_eq!(
            audit.to_string(),
            "run 7: 1 items, 0 completed once each; 6 problems\
             \n  in the place of item 0 is item 1 of run 7\
             \n  item 0 is completed and has (an output, an error): (false, false)\
             \n  the record counts 2 items, and there are 1\
             \n  the record counts 2 completed items, and there are 1\
             \n  the record counts 2 completed items in the log, and there are 0\
             \n  it is completed and ended at None"
        );
    }
}
