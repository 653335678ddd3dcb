//! [`Memory`]: the store in memory, and the model that other stores are compared with.

mod state;

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use serde_json::json;
use tokio::time::Instant;

use self::state::{Row, State, ready};
use super::inputs::{Claim, Commit, IntentFilter, NewRun, RunFilter, Settlement};
use super::model::{
    Committed, Created, Generation, Handling, Hold, Intent, IntentName, Item, ItemId, LeaseId,
    LogEntry, MemoKey, Purged, Reaped, Run, RunId, Status,
};
use super::transaction::{
    RunChanges, at_millis, duration_millis, ended_entry, lease_lost, millis, worker_died,
};
use super::{Queue, Store};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Mutex;

/// A store in memory, for tests and for work that need not outlive the process.
///
/// Its clock is Tokio's, so leases and delays expire on the paused clock of a test. Put it into an `Arc` to share it.
pub struct Memory {
    state: Mutex<State>,
    start: (SystemTime, Instant),
}

impl Memory {
    /// Creates an empty store.
    pub fn new() -> Self {
        Self {
            state: Mutex::default(),
            start: (SystemTime::now(), Instant::now()),
        }
    }

    /// Locks the state. Returns the present in milliseconds since 1970 with it.
    fn lock(&self) -> (i64, MutexGuard<'_, State>) {
        let (then, start) = self.start;
        let state = self.state.lock();
        (millis(then + start.elapsed()), state)
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (_, state) = self.lock();
        f.debug_struct("Memory")
            .field("runs", &state.runs.len())
            .field("items", &state.items.len())
            .field("generations", &state.generations.len())
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Store for Memory {
    fn name(&self) -> &'static str {
        "memory"
    }

    async fn create_run(&self, new: NewRun) -> Result<Created> {
        new.check()?;
        let (now, mut state) = self.lock();
        let state = &mut *state;
        let named = new.idempotency_key.map(|key| (new.tenant.clone(), key));
        if let Some(run) = named.as_ref().and_then(|named| state.idempotent.get(named)) {
            return Ok(Created::new(*run, false));
        }
        let id = RunId(state.next(0));
        if let Some(named) = named {
            state.idempotent.insert(named, id);
        }
        let pipeline: Arc<str> = new.name.as_str().into();
        let total = new.items.len() as u64;
        let run = Run {
            spec: new.spec,
            ..Run::new(id, &*new.tenant, new.name, total, at_millis(now))
        };
        let ended = run.ended_at.is_some();
        state.runs.insert(id, run);
        let mut ids = Vec::with_capacity(new.items.len());
        for (seq, item) in (0..).zip(new.items) {
            let row = Row {
                item: Item {
                    max_attempts: new.max_attempts.min(i32::MAX as u32),
                    ..Item::new(
                        ItemId(state.next(1)),
                        id,
                        seq,
                        &*new.tenant,
                        item.key,
                        item.input,
                    )
                },
                pipeline: Arc::clone(&pipeline),
                priority: new.priority,
                lease: None,
                not_before: None,
            };
            ready(&mut state.ready, &row);
            ids.push(row.item.id);
            state.items.insert(row.item.id, row);
        }
        state.of_run.insert(id, ids);
        let created = ("created".to_owned(), json!({"total": total}).to_string());
        state.note(
            id,
            now,
            [created]
                .into_iter()
                .chain(ended.then(|| ended_entry(Status::Completed))),
        );
        Ok(Created::new(id, true))
    }

    async fn runs(&self, filter: RunFilter, limit: u32) -> Result<Vec<Run>> {
        let (_, state) = self.lock();
        let runs = state.runs.values().rev().filter(|run| filter.selects(run));
        Ok(runs.take(limit as usize).cloned().collect())
    }

    async fn items(&self, run: RunId, from: u64, limit: u32) -> Result<Vec<Item>> {
        let (_, state) = self.lock();
        let ids = state.of_run.get(&run).into_iter().flatten();
        let page = ids.skip(from as usize).take(limit as usize);
        Ok(page.map(|id| state.items[id].item.clone()).collect())
    }

    async fn log(&self, run: RunId, after: u64, limit: u32) -> Result<Vec<LogEntry>> {
        let (_, state) = self.lock();
        let entries = state.logs.get(&run).into_iter().flatten();
        let page = entries.skip(after as usize).take(limit as usize);
        Ok(page.cloned().collect())
    }

    async fn generations(&self, tenant: &str, keys: &[MemoKey]) -> Result<Vec<Generation>> {
        let (_, state) = self.lock();
        let keys: BTreeSet<_> = keys.iter().collect();
        let known = |key: &MemoKey| state.generations.get(&(tenant.to_owned(), *key));
        let found = keys.into_iter().filter_map(known);
        Ok(found.map(|(_, generation)| generation.clone()).collect())
    }

    async fn commit(&self, commit: Commit) -> Result<Committed> {
        commit.check()?;
        let (now, mut state) = self.lock();
        let state = &mut *state;
        let mut committed = Committed::default();
        for generation in commit.generations {
            let key = (generation.tenant.clone(), generation.key);
            state.generations.entry(key).or_insert_with(|| {
                committed.generations += 1;
                (now, generation)
            });
        }
        for intent in commit.intents {
            if state.items.contains_key(&intent.item) {
                state.intents.insert(intent.name(), intent);
            }
        }
        for name in commit.ended_intents {
            state.intents.remove(&name);
        }
        let mut changes = RunChanges::new();
        for note in commit.notes {
            let notes = &mut changes.entry(note.run).or_default().notes;
            notes.push((note.kind, note.data));
        }
        for Settlement { hold, result } in commit.settlements {
            if state.current(&hold) {
                state.settle(hold.item, result, &mut changes);
                committed.items.push(hold.item);
            }
        }
        state.apply(changes, now);
        committed.items.sort_unstable();
        Ok(committed)
    }

    async fn intents(&self, filter: IntentFilter, limit: u32) -> Result<Vec<Intent>> {
        let (now, state) = self.lock();
        let held = |item: &ItemId| {
            let lease = state.items.get(item).and_then(|row| row.lease);
            lease.is_some_and(|lease| state.leases.get(&lease).is_some_and(|at| *at > now))
        };
        let selected = |name: &IntentName| {
            filter
                .items
                .as_ref()
                .is_none_or(|items| items.contains(&name.item))
                && filter.after.is_none_or(|after| *name > after)
                && !(filter.unheld && held(&name.item))
        };
        let intents = state.intents.iter().filter(|(name, _)| selected(name));
        let page = intents.take(limit as usize);
        Ok(page.map(|(_, intent)| intent.clone()).collect())
    }

    async fn cancel(&self, run: RunId) -> Result<u64> {
        let (now, mut state) = self.lock();
        let state = &mut *state;
        if state.runs.get(&run).is_none_or(|run| run.status.is_over()) {
            return Ok(0);
        }
        let mut stopped = 0;
        for id in state.of_run.get(&run).cloned().unwrap_or_default() {
            if !state.items[&id].item.status.is_over() {
                state.turn(id, Status::Cancelled);
                stopped += 1;
            }
        }
        if let Some(run) = state.runs.get_mut(&run) {
            run.cancelled += stopped;
            run.status = Status::Cancelled;
            run.ended_at = Some(at_millis(now));
        }
        let cancelled = (
            "cancelled".to_owned(),
            json!({"items": stopped}).to_string(),
        );
        state.note(run, now, [cancelled, ended_entry(Status::Cancelled)]);
        Ok(stopped)
    }

    async fn retry_failed(&self, run: RunId) -> Result<u64> {
        let (now, mut state) = self.lock();
        let state = &mut *state;
        if state
            .runs
            .get(&run)
            .is_none_or(|run| run.status == Status::Cancelled)
        {
            return Ok(0);
        }
        let mut again = 0;
        for id in state.of_run.get(&run).cloned().unwrap_or_default() {
            let item = &state.items[&id].item;
            if item.status == Status::Failed {
                let lost = |error: &Error| error.kind() == ErrorKind::LeaseLost;
                if item.error.as_ref().is_some_and(lost) {
                    state.intents.retain(|name, _| name.item != id);
                }
                state.requeue_as(id, None, |item| {
                    item.attempt = 0;
                    item.error = None;
                    item.handling = item.handling.min(Handling::Alone);
                });
                again += 1;
            }
        }
        if again > 0 {
            if let Some(run) = state.runs.get_mut(&run) {
                run.failed = 0;
                run.error = None;
                run.status = Status::Pending;
                run.ended_at = None;
            }
            let retried = ("retried".to_owned(), json!({"items": again}).to_string());
            state.note(run, now, [retried]);
        }
        Ok(again)
    }

    async fn purge(&self, older_than: Duration, limit: u32) -> Result<Purged> {
        let (now, mut state) = self.lock();
        let state = &mut *state;
        let before = now - duration_millis(older_than);
        let ended = |run: &Run| run.ended_at.map(millis).filter(|at| *at <= before);
        let mut runs: Vec<_> = state
            .runs
            .values()
            .filter_map(|run| Some((ended(run)?, run.id)))
            .collect();
        runs.sort_unstable();
        runs.truncate(limit as usize);
        for (_, run) in &runs {
            state.runs.remove(run);
            state.logs.remove(run);
            for item in state.of_run.remove(run).unwrap_or_default() {
                state.items.remove(&item);
            }
        }
        state
            .idempotent
            .retain(|_, run| state.runs.contains_key(run));
        state
            .intents
            .retain(|name, _| state.items.contains_key(&name.item));
        // The time since when the generations of each tenant are needed.
        let mut floors: HashMap<&str, i64> = HashMap::new();
        for run in state.runs.values() {
            let needs = matches!(
                run.status,
                Status::Pending | Status::Processing | Status::Failed
            );
            if needs && ended(run).is_none() {
                let floor = floors.entry(&run.tenant).or_insert(i64::MAX);
                *floor = millis(run.created_at).min(*floor);
            }
        }
        let needed = |tenant: &str, at: i64| floors.get(tenant).is_some_and(|since| *since <= at);
        let old = state
            .generations
            .iter()
            .filter(|((tenant, _), (at, _))| *at <= before && !needed(tenant, *at));
        let mut old: Vec<_> = old.map(|(key, (at, _))| (*at, key.clone())).collect();
        old.sort_unstable();
        old.truncate(limit as usize);
        for (_, key) in &old {
            state.generations.remove(key);
        }
        Ok(Purged {
            runs: runs.len() as u64,
            generations: old.len() as u64,
        })
    }
}

#[async_trait]
impl Queue for Memory {
    async fn register(&self, _worker: &str, ttl: Duration) -> Result<LeaseId> {
        let (now, mut state) = self.lock();
        let lease = LeaseId(state.next(2));
        state.leases.insert(lease, now + duration_millis(ttl));
        Ok(lease)
    }

    async fn heartbeat(&self, lease: LeaseId, ttl: Duration) -> Result<bool> {
        let (now, mut state) = self.lock();
        let expires = state.leases.get_mut(&lease);
        Ok(expires.map(|at| *at = now + duration_millis(ttl)).is_some())
    }

    async fn retire(&self, lease: LeaseId) -> Result<u64> {
        let (_, mut state) = self.lock();
        let state = &mut *state;
        state.leases.remove(&lease);
        let held = state.items.values().filter(|row| row.lease == Some(lease));
        let held: Vec<_> = held.map(|row| row.item.id).collect();
        for id in &held {
            state.requeue(*id, None);
            if let Some(row) = state.items.get_mut(id) {
                row.item.attempt = row.item.attempt.saturating_sub(1);
            }
        }
        Ok(held.len() as u64)
    }

    async fn claim(&self, lease: LeaseId, claim: Claim) -> Result<Vec<Item>> {
        let (now, mut state) = self.lock();
        let state = &mut *state;
        if state.leases.get(&lease).is_none_or(|at| *at <= now) {
            return Err(lease_lost(lease));
        }
        let limit = claim.limit as usize;
        let names = claim.pipelines.iter();
        let lists =
            names.filter_map(|name| state.ready.get(&(name.as_str().into(), claim.handling)));
        let lists: Vec<_> = lists.collect();
        let tenants: BTreeSet<_> = lists.iter().flat_map(|list| list.keys()).collect();
        let after = tenants.iter().filter(|tenant| ***tenant > state.cursor);
        let wrapped = tenants.iter().filter(|tenant| ***tenant <= state.cursor);
        let turns: Vec<_> = after.chain(wrapped).take(limit).collect();
        if turns.is_empty() {
            return Ok(Vec::new());
        }
        let part = limit.div_ceil(turns.len());
        let mut dealt = Vec::new();
        for (turn, tenant) in turns.into_iter().enumerate() {
            let theirs = lists.iter().filter_map(|list| list.get(*tenant));
            let mut theirs: Vec<_> = theirs.flat_map(|items| items.iter().take(part)).collect();
            theirs.sort_unstable();
            let theirs = theirs.into_iter().take(part).enumerate();
            dealt.extend(theirs.map(|(rank, (_, id))| (rank, turn, *id)));
        }
        dealt.sort_unstable();
        dealt.truncate(limit);

        let mut items = Vec::with_capacity(dealt.len());
        let mut started = BTreeSet::new();
        for (_, _, id) in dealt {
            if let Some(row) = state.turn(id, Status::Processing) {
                row.item.attempt += 1;
                row.lease = Some(lease);
                started.insert(row.item.run);
                items.push(row.item.clone());
            }
        }
        if let Some(last) = items.last() {
            state.cursor.clone_from(&last.tenant);
        }
        for id in started {
            if let Some(run) = state.runs.get_mut(&id)
                && run.status == Status::Pending
            {
                run.status = Status::Processing;
                state.note(id, now, [("started".to_owned(), "{}".to_owned())]);
            }
        }
        Ok(items)
    }

    async fn has_suspects(&self, pipelines: &[String]) -> Result<bool> {
        let (_, state) = self.lock();
        let mut ready = state.ready.keys();
        Ok(ready.any(|(name, handling)| {
            *handling != Handling::Normal && pipelines.iter().any(|known| **known == **name)
        }))
    }

    async fn release(&self, holds: &[Hold], delay: Duration, charge: bool) -> Result<u64> {
        let (now, mut state) = self.lock();
        let state = &mut *state;
        let due = (!delay.is_zero()).then(|| now + duration_millis(delay));
        let mut released = 0;
        for hold in holds {
            if state.current(hold) {
                state.requeue(hold.item, due);
                if let Some(row) = state.items.get_mut(&hold.item) {
                    row.item.attempt -= u32::from(!charge).min(row.item.attempt);
                }
                released += 1;
            }
        }
        Ok(released)
    }

    async fn held(&self, lease: LeaseId) -> Result<Vec<Hold>> {
        let (_, state) = self.lock();
        let held = state.items.values().filter(|row| row.lease == Some(lease));
        Ok(held.map(|row| row.item.hold()).collect())
    }

    async fn reap(&self) -> Result<Reaped> {
        let (now, mut state) = self.lock();
        let state = &mut *state;
        let mut reaped = Reaped::default();
        let expired: BTreeSet<_> = state
            .leases
            .iter()
            .filter_map(|(lease, at)| (*at <= now).then_some(*lease))
            .collect();
        state.leases.retain(|lease, _| !expired.contains(lease));
        reaped.leases = expired.len() as u64;

        let mut dead = HashMap::<LeaseId, Vec<ItemId>>::new();
        for row in state.items.values() {
            if let Some(lease) = row.lease.filter(|lease| expired.contains(lease)) {
                dead.entry(lease).or_default().push(row.item.id);
            }
        }
        let mut changes = RunChanges::new();
        for held in dead.into_values() {
            let alone = held.len() == 1;
            for id in held {
                let item = &state.items[&id].item;
                if alone && item.attempt >= item.max_attempts {
                    state.settle(id, Err(worker_died()), &mut changes);
                    reaped.failed += 1;
                    continue;
                }
                state.requeue_as(id, None, |item| {
                    item.attempt = item.attempt.saturating_sub(u32::from(!alone));
                    let left = item.max_attempts.saturating_sub(item.attempt);
                    item.handling = item.handling.after_death(alone, left);
                });
                reaped.requeued += 1;
            }
        }
        state.apply(changes, now);

        while let Some((due, id)) = state.delayed.first().copied()
            && due <= now
        {
            state.delayed.pop_first();
            if let Some(row) = state.items.get_mut(&id) {
                row.not_before = None;
                ready(&mut state.ready, row);
            }
            reaped.due += 1;
        }
        Ok(reaped)
    }
}
