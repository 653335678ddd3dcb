//! The state of [`Memory`](super::Memory) and the transitions of its items.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use crate::error::Result;
use crate::store::model::{
    Generation, Handling, Hold, Intent, IntentName, Item, ItemId, LeaseId, LogEntry, MemoKey, Run,
    RunId, Status,
};
use crate::store::transaction::{RunChanges, at_millis};

/// Pending items that can be claimed, by pipeline and handling, then by tenant, then by priority and number. There are
/// no empty collections in it.
pub(super) type Ready = BTreeMap<(Arc<str>, Handling), BTreeMap<String, BTreeSet<(i32, ItemId)>>>;

#[derive(Default)]
pub(super) struct State {
    pub(super) runs: BTreeMap<RunId, Run>,
    /// By tenant and idempotency key.
    pub(super) idempotent: HashMap<(String, String), RunId>,
    pub(super) items: BTreeMap<ItemId, Row>,
    /// The items of each run, by `seq`.
    pub(super) of_run: HashMap<RunId, Vec<ItemId>>,
    /// Pending items that can be claimed.
    pub(super) ready: Ready,
    /// Pending items by when they can be claimed.
    pub(super) delayed: BTreeSet<(i64, ItemId)>,
    pub(super) logs: HashMap<RunId, Vec<LogEntry>>,
    pub(super) generations: HashMap<(String, MemoKey), (i64, Generation)>,
    pub(super) intents: BTreeMap<IntentName, Intent>,
    /// The expiry time of each lease.
    pub(super) leases: BTreeMap<LeaseId, i64>,
    /// The last numbers assigned to a run, an item and a lease.
    pub(super) last: [i64; 3],
    /// The tenant that got the last item.
    pub(super) cursor: String,
}

pub(super) struct Row {
    pub(super) item: Item,
    pub(super) pipeline: Arc<str>,
    pub(super) priority: i32,
    pub(super) lease: Option<LeaseId>,
    pub(super) not_before: Option<i64>,
}

impl State {
    pub(super) fn next(&mut self, of: usize) -> i64 {
        self.last[of] += 1;
        self.last[of]
    }

    pub(super) fn note(
        &mut self,
        run: RunId,
        now: i64,
        entries: impl IntoIterator<Item = (String, String)>,
    ) {
        let Some(record) = self.runs.get_mut(&run) else {
            return;
        };
        let log = self.logs.entry(run).or_default();
        for (kind, data) in entries {
            record.log_seq += 1;
            log.push(LogEntry {
                seq: record.log_seq,
                kind,
                data,
                at: at_millis(now),
            });
        }
    }

    /// Sets the status of an item, raises its epoch and removes it from the list that it is on.
    pub(super) fn turn(&mut self, id: ItemId, status: Status) -> Option<&mut Row> {
        let row = self.items.get_mut(&id)?;
        if row.item.status == Status::Pending {
            match row.not_before.take() {
                Some(due) => {
                    self.delayed.remove(&(due, id));
                }
                None => unready(&mut self.ready, row),
            }
        }
        row.item.status = status;
        row.item.epoch += 1;
        row.lease = None;
        Some(row)
    }

    /// Makes an item pending. It can be claimed from `due` on.
    pub(super) fn requeue(&mut self, id: ItemId, due: Option<i64>) {
        self.requeue_as(id, due, |_| {});
    }

    /// Makes an item pending like [`requeue`](Self::requeue), and changes it before it goes on a list.
    pub(super) fn requeue_as(
        &mut self,
        id: ItemId,
        due: Option<i64>,
        change: impl FnOnce(&mut Item),
    ) {
        self.turn(id, Status::Pending);
        let Some(row) = self.items.get_mut(&id) else {
            return;
        };
        change(&mut row.item);
        row.not_before = due;
        match due {
            Some(due) => {
                self.delayed.insert((due, id));
            }
            None => ready(&mut self.ready, row),
        }
    }

    pub(super) fn current(&self, hold: &Hold) -> bool {
        let row = self.items.get(&hold.item);
        row.is_some_and(|row| row.item.epoch == hold.epoch && !row.item.status.is_over())
    }

    /// Ends an item and adds it to `changes`.
    pub(super) fn settle(&mut self, id: ItemId, result: Result<String>, changes: &mut RunChanges) {
        let status = if result.is_ok() {
            Status::Completed
        } else {
            Status::Failed
        };
        let Some(row) = self.turn(id, status) else {
            return;
        };
        let run = row.item.run;
        let change = changes.entry(run).or_default();
        change.settle(row.item.seq, result.as_ref().err());
        (row.item.output, row.item.error) = match result {
            Ok(output) => (Some(output), None),
            Err(error) => (None, Some(error)),
        };
        if let Some(run) = self.runs.get_mut(&run) {
            match status {
                Status::Completed => run.completed += 1,
                _ => run.failed += 1,
            }
        }
    }

    /// Writes log entries for the changes, and ends runs whose last item ended.
    pub(super) fn apply(&mut self, changes: RunChanges, now: i64) {
        for (id, change) in changes {
            let Some(run) = self.runs.get_mut(&id) else {
                continue;
            };
            let mut ended = None;
            if !change.completed.is_empty() || !change.failed.is_empty() {
                run.error = run.error.take().or_else(|| change.error.clone());
                run.status = Status::Processing;
                if run.ended() == run.total {
                    run.status = if run.failed > 0 {
                        Status::Failed
                    } else {
                        Status::Completed
                    };
                    run.ended_at = Some(at_millis(now));
                    ended = Some(run.status);
                }
            }
            self.note(id, now, change.entries(ended));
        }
    }
}

pub(super) fn ready(ready: &mut Ready, row: &Row) {
    let kind = (Arc::clone(&row.pipeline), row.item.handling);
    let tenants = ready.entry(kind).or_default();
    let theirs = tenants.entry(row.item.tenant.clone()).or_default();
    theirs.insert((row.priority, row.item.id));
}

fn unready(ready: &mut Ready, row: &Row) {
    let kind = (Arc::clone(&row.pipeline), row.item.handling);
    let Some(tenants) = ready.get_mut(&kind) else {
        return;
    };
    if let Some(theirs) = tenants.get_mut(&row.item.tenant) {
        theirs.remove(&(row.priority, row.item.id));
        if theirs.is_empty() {
            tenants.remove(&row.item.tenant);
        }
    }
    if tenants.is_empty() {
        ready.remove(&kind);
    }
}
