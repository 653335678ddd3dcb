//! The arguments of store methods: runs to create, claims, commits and filters.

use std::collections::HashSet;

use super::model::{Generation, Handling, Hold, Intent, IntentName, ItemId, Run, RunId, Status};
use crate::error::{Error, ErrorKind, Result};

/// The largest length of an indexed text in bytes. A row of a Postgres index holds 2,704 bytes, and one index holds two
/// of these texts.
const MAX_INDEXED_BYTES: usize = 1024;

/// A run to create, with all of its items.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct NewRun {
    /// The tenant: the unit of fairness and of visibility. Empty for a service with a single tenant.
    pub tenant: String,
    /// The name of the pipeline.
    pub name: String,
    /// Data of the layer above: JSON, opaque to the store.
    pub spec: String,
    /// The priority among the items of a tenant, lowest first; 0 unless set.
    pub priority: i32,
    /// The number of times that a worker may claim an item and die while it holds no other, before the item fails; 3
    /// unless set. Values above [`i32::MAX`] count as that.
    pub max_attempts: u32,
    /// A key that makes creating the run idempotent: with a key that the tenant has used before, the earlier run is
    /// returned.
    pub idempotency_key: Option<String>,
    /// The items, in the order of their `seq`.
    pub items: Vec<NewItem>,
}

impl NewRun {
    /// Creates a run of the pipeline `name` without items.
    pub fn new(tenant: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            tenant: tenant.into(),
            name: name.into(),
            spec: "null".to_owned(),
            max_attempts: 3,
            ..Self::default()
        }
    }

    /// Adds items.
    #[must_use]
    pub fn items(mut self, items: impl IntoIterator<Item = NewItem>) -> Self {
        self.items.extend(items);
        self
    }

    /// Sets the data of the layer above.
    #[must_use]
    pub fn spec(mut self, spec: impl Into<String>) -> Self {
        self.spec = spec.into();
        self
    }

    /// Sets the priority of its items.
    #[must_use]
    pub fn priority(mut self, priority: i32) -> Self {
        self.priority = priority;
        self
    }

    /// Sets the number of times that a worker may die while it holds only an item before that item fails.
    #[must_use]
    pub fn max_attempts(mut self, max_attempts: u32) -> Self {
        self.max_attempts = max_attempts;
        self
    }

    /// Sets the key that makes creating the run idempotent.
    #[must_use]
    pub fn idempotency_key(mut self, key: impl Into<String>) -> Self {
        self.idempotency_key = Some(key.into());
        self
    }

    /// Checks that every backend can keep the run. Backends call this first.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for a text with a NUL character (Postgres cannot store it), for a tenant, a name or an
    /// idempotency key of more than 1,024 bytes (they are indexed), and for 0 `max_attempts`.
    pub fn check(&self) -> Result<()> {
        let tenant = ("the name of a tenant", Some(&self.tenant));
        let name = ("the name of a pipeline", Some(&self.name));
        let key = ("an idempotency key", self.idempotency_key.as_ref());
        for (what, text) in [tenant, name, key] {
            let length = text.map_or(0, String::len);
            if length > MAX_INDEXED_BYTES {
                let message =
                    format!("{what} may have at most {MAX_INDEXED_BYTES} bytes, but has {length}");
                return Err(Error::new(ErrorKind::Config, message));
            }
        }
        let bodies = self.items.iter().flat_map(|item| [&item.key, &item.input]);
        let texts = [&self.tenant, &self.name, &self.spec];
        no_nul(texts.into_iter().chain(&self.idempotency_key).chain(bodies))?;
        if self.max_attempts == 0 {
            return Err(Error::new(
                ErrorKind::Config,
                "max_attempts must be at least 1",
            ));
        }
        Ok(())
    }
}

/// An item of a [`NewRun`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct NewItem {
    /// The name of the item among the items of its pipeline. The store does not require it to be unique.
    pub key: String,
    /// The input: JSON, opaque to the store.
    pub input: String,
}

impl NewItem {
    /// Creates an item.
    pub fn new(key: impl Into<String>, input: impl Into<String>) -> Self {
        Self {
            key: key.into(),
            input: input.into(),
        }
    }
}

/// A worker's request for items ([`Queue::claim`](crate::store::Queue::claim)).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Claim {
    /// The names of the worker's pipelines, each once and in order. Without a name there is nothing to claim.
    pub pipelines: Vec<String>,
    /// The handling of the items.
    pub handling: Handling,
    /// The largest number of items.
    pub limit: u32,
}

impl Claim {
    /// Asks for at most `limit` items of these pipelines, with the normal handling.
    pub fn new(pipelines: impl IntoIterator<Item = impl AsRef<str>>, limit: u32) -> Self {
        let names = pipelines.into_iter().map(|name| name.as_ref().to_owned());
        let mut pipelines: Vec<_> = names.collect();
        pipelines.sort_unstable();
        pipelines.dedup();
        Self {
            pipelines,
            handling: Handling::Normal,
            limit,
        }
    }

    /// Asks for items with this handling instead.
    #[must_use]
    pub fn handling(mut self, handling: Handling) -> Self {
        self.handling = handling;
        self
    }
}

/// The outcome of one item.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Settlement {
    /// The hold of the item, as it was claimed or read.
    pub hold: Hold,
    /// The output of the item (JSON, opaque to the store), or its error.
    pub result: Result<String>,
}

impl Settlement {
    /// Creates the outcome of the item that `hold` names.
    pub fn new(hold: Hold, result: Result<String>) -> Self {
        Self { hold, result }
    }
}

/// An entry that the layer above writes into a run's log.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Note {
    /// The run.
    pub run: RunId,
    /// The kind of the entry, a word of the layer above.
    pub kind: String,
    /// The content: JSON, opaque to the store.
    pub data: String,
}

impl Note {
    /// Creates an entry for the log of `run`.
    pub fn new(run: RunId, kind: impl Into<String>, data: impl Into<String>) -> Self {
        Self {
            run,
            kind: kind.into(),
            data: data.into(),
        }
    }
}

/// Rows that are written in one transaction and one round trip.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Commit {
    /// Replies to keep. A reply under a key that is taken changes nothing.
    pub generations: Vec<Generation>,
    /// Outcomes of items.
    pub settlements: Vec<Settlement>,
    /// Intents of calls that are about to be sent.
    pub intents: Vec<Intent>,
    /// Names of intents to delete, because their calls have ended.
    pub ended_intents: Vec<IntentName>,
    /// Log entries, written before those that the settlements cause.
    pub notes: Vec<Note>,
}

impl Commit {
    /// Creates an empty commit.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds replies to keep.
    #[must_use]
    pub fn generations(mut self, generations: impl IntoIterator<Item = Generation>) -> Self {
        self.generations.extend(generations);
        self
    }

    /// Adds outcomes of items.
    #[must_use]
    pub fn settlements(mut self, settlements: impl IntoIterator<Item = Settlement>) -> Self {
        self.settlements.extend(settlements);
        self
    }

    /// Adds intents of calls that are about to be sent.
    #[must_use]
    pub fn intents(mut self, intents: impl IntoIterator<Item = Intent>) -> Self {
        self.intents.extend(intents);
        self
    }

    /// Adds names of intents to delete.
    #[must_use]
    pub fn ended_intents(mut self, names: impl IntoIterator<Item = IntentName>) -> Self {
        self.ended_intents.extend(names);
        self
    }

    /// Adds log entries.
    #[must_use]
    pub fn notes(mut self, notes: impl IntoIterator<Item = Note>) -> Self {
        self.notes.extend(notes);
        self
    }

    /// Returns whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.generations.is_empty()
            && self.settlements.is_empty()
            && self.intents.is_empty()
            && self.ended_intents.is_empty()
            && self.notes.is_empty()
    }

    /// Checks that every backend can keep the rows. Backends call this first.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for a text with a NUL character and for an item that is settled twice.
    pub fn check(&self) -> Result<()> {
        let bodies = self.generations.iter().flat_map(|g| [&g.tenant, &g.body]);
        let outputs = self
            .settlements
            .iter()
            .filter_map(|s| s.result.as_ref().ok());
        let notes = self.notes.iter().flat_map(|note| [&note.kind, &note.data]);
        let intents = self.intents.iter().filter_map(|i| i.provider_ref.as_ref());
        no_nul(bodies.chain(outputs).chain(notes).chain(intents))?;
        let mut items = HashSet::with_capacity(self.settlements.len());
        let twice = self.settlements.iter().find(|s| !items.insert(s.hold.item));
        match twice {
            Some(s) => Err(Error::new(
                ErrorKind::Config,
                format!("item {} is settled twice in one commit", s.hold.item),
            )),
            None => Ok(()),
        }
    }
}

/// A filter for intents ([`Store::intents`](crate::store::Store::intents)).
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct IntentFilter {
    /// Only intents of these items.
    pub items: Option<Vec<ItemId>>,
    /// Only intents of items that no live lease holds.
    pub unheld: bool,
    /// Only intents after this one: the last of the page before.
    pub after: Option<IntentName>,
}

impl IntentFilter {
    /// Selects the intents of these items, whether leases hold the items or not.
    pub fn items(items: impl IntoIterator<Item = ItemId>) -> Self {
        Self {
            items: Some(items.into_iter().collect()),
            ..Self::default()
        }
    }

    /// Selects the intents of items that no live lease holds: calls that may or may not have been paid for.
    pub fn ambiguous() -> Self {
        Self {
            unheld: true,
            ..Self::default()
        }
    }

    /// Selects only intents after this one.
    #[must_use]
    pub fn after(mut self, after: IntentName) -> Self {
        self.after = Some(after);
        self
    }
}

/// A filter for runs ([`Store::runs`](crate::store::Store::runs)).
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct RunFilter {
    /// Only the run with this number.
    pub id: Option<RunId>,
    /// Only runs of this tenant.
    pub tenant: Option<String>,
    /// Only runs with this status.
    pub status: Option<Status>,
    /// Only runs older than this one: the last of the page before.
    pub before: Option<RunId>,
}

impl RunFilter {
    /// Selects all runs.
    pub fn new() -> Self {
        Self::default()
    }

    /// Selects only the run with this number.
    #[must_use]
    pub fn id(mut self, id: RunId) -> Self {
        self.id = Some(id);
        self
    }

    /// Selects only runs of this tenant.
    #[must_use]
    pub fn tenant(mut self, tenant: impl Into<String>) -> Self {
        self.tenant = Some(tenant.into());
        self
    }

    /// Selects only runs with this status.
    #[must_use]
    pub fn status(mut self, status: Status) -> Self {
        self.status = Some(status);
        self
    }

    /// Selects only runs older than this one.
    #[must_use]
    pub fn before(mut self, before: RunId) -> Self {
        self.before = Some(before);
        self
    }

    /// Returns whether the filter selects this run.
    pub fn selects(&self, run: &Run) -> bool {
        self.id.is_none_or(|id| run.id == id)
            && self
                .tenant
                .as_ref()
                .is_none_or(|tenant| run.tenant == *tenant)
            && self.status.is_none_or(|status| run.status == status)
            && self.before.is_none_or(|before| run.id < before)
    }
}

fn no_nul<'a>(texts: impl IntoIterator<Item = &'a String>) -> Result<()> {
    match texts.into_iter().find(|text| text.contains('\0')) {
        None => Ok(()),
        Some(text) => {
            let start: String = text.chars().take(40).collect();
            let message = format!("a text with a NUL character cannot be stored: {start:?}");
            Err(Error::new(ErrorKind::Config, message))
        }
    }
}
