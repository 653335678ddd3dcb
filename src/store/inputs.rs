//! What a store is given: runs to create, commits, and what to list.

use std::collections::HashSet;

use super::model::{Generation, Handling, Hold, IntentName, RunId, Status};
use crate::error::{Error, ErrorKind, Result};

/// The longest text that is in an index: Postgres takes 2,704 bytes for a row of one, and two of
/// these are in one.
const INDEXED: usize = 1024;

/// A run to be created, with all of its items.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct NewRun {
    /// Whose it is: the unit of fairness, and of what may be seen. Empty where there is one only.
    pub tenant: String,
    /// The name of the pipeline.
    pub name: String,
    /// What the layer above wants to find again: JSON, opaque to the store.
    pub spec: String,
    /// Lower goes first among the items of a tenant; 0 unless set.
    pub priority: i32,
    /// How often a worker may claim an item and die with it alone before the item fails; 3 unless set. More than
    /// [`i32::MAX`] counts as that.
    pub max_attempts: u32,
    /// A second run of the same tenant with the same key is the first one again.
    pub idempotency_key: Option<String>,
    /// The items, in the order of their `seq`.
    pub items: Vec<NewItem>,
}

impl NewRun {
    /// A run of the pipeline `name`, without items yet.
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

    /// Sets what the layer above wants to find again.
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

    /// Sets how often a worker may claim an item and die with it alone before the item fails.
    #[must_use]
    pub fn max_attempts(mut self, max_attempts: u32) -> Self {
        self.max_attempts = max_attempts;
        self
    }

    /// Sets the key that makes creating it twice harmless.
    #[must_use]
    pub fn idempotency_key(mut self, key: impl Into<String>) -> Self {
        self.idempotency_key = Some(key.into());
        self
    }

    /// Refuses what not every backend can keep. Backends call it first.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for a text with a NUL character (Postgres has no place for it), a tenant, a name or
    /// an idempotency key of more than 1,024 bytes (they are in indexes) and for `max_attempts` 0.
    pub fn check(&self) -> Result<()> {
        let tenant = ("the name of a tenant", Some(&self.tenant));
        let name = ("the name of a pipeline", Some(&self.name));
        let key = ("an idempotency key", self.idempotency_key.as_ref());
        for (what, text) in [tenant, name, key] {
            let length = text.map_or(0, String::len);
            if length > INDEXED {
                let message = format!("{what} has {INDEXED} bytes at most, not {length}");
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
pub struct NewItem {
    /// What names it among the items of its pipeline. The store does not ask it to be unique.
    pub key: String,
    /// The input: JSON, opaque to the store.
    pub input: String,
}

impl NewItem {
    /// An item.
    pub fn new(key: impl Into<String>, input: impl Into<String>) -> Self {
        Self {
            key: key.into(),
            input: input.into(),
        }
    }
}

/// Which items a worker asks for ([`Queue::claim`](crate::store::Queue::claim)).
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Claim<'a> {
    /// The names of the pipelines that the worker has. Without a name there is nothing to claim.
    pub pipelines: &'a [&'a str],
    /// Only items with this handling.
    pub handling: Handling,
    /// How many at most.
    pub limit: u32,
}

impl<'a> Claim<'a> {
    /// At most `limit` items of these pipelines, with the normal handling.
    pub fn new(pipelines: &'a [&'a str], limit: u32) -> Self {
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

    /// The names, each once: what a backend goes through.
    pub fn names(&self) -> Vec<&'a str> {
        let mut names = self.pipelines.to_vec();
        names.sort_unstable();
        names.dedup();
        names
    }
}

/// How one item ended.
#[derive(Debug, Clone)]
pub struct Settlement {
    /// The item, as it was claimed.
    pub hold: Hold,
    /// Its output (JSON, opaque to the store), or why there is none.
    pub result: Result<String>,
}

/// An entry that the layer above writes into a run's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// The run.
    pub run: RunId,
    /// What kind of entry: a word of the layer above.
    pub kind: String,
    /// What it says: JSON, opaque to the store.
    pub data: String,
}

/// What is written in one transaction and one round trip.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Commit {
    /// Replies to remember. One whose key is known changes nothing.
    pub generations: Vec<Generation>,
    /// Items that ended.
    pub settlements: Vec<Settlement>,
    /// Intents that are none any more.
    pub ended_intents: Vec<IntentName>,
    /// Entries for logs, in front of those that the settlements make.
    pub notes: Vec<Note>,
}

impl Commit {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds replies to remember.
    #[must_use]
    pub fn generations(mut self, generations: impl IntoIterator<Item = Generation>) -> Self {
        self.generations.extend(generations);
        self
    }

    /// Adds items that ended.
    #[must_use]
    pub fn settlements(mut self, settlements: impl IntoIterator<Item = Settlement>) -> Self {
        self.settlements.extend(settlements);
        self
    }

    /// Adds intents that are none any more.
    #[must_use]
    pub fn ended_intents(mut self, names: impl IntoIterator<Item = IntentName>) -> Self {
        self.ended_intents.extend(names);
        self
    }

    /// Adds entries for logs.
    #[must_use]
    pub fn notes(mut self, notes: impl IntoIterator<Item = Note>) -> Self {
        self.notes.extend(notes);
        self
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.generations.is_empty()
            && self.settlements.is_empty()
            && self.ended_intents.is_empty()
            && self.notes.is_empty()
    }

    /// Refuses what not every backend can keep. Backends call it first.
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
        no_nul(bodies.chain(outputs).chain(notes))?;
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

/// Which runs to list.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct RunFilter {
    /// Only this tenant's.
    pub tenant: Option<String>,
    /// Only those that stand so.
    pub status: Option<Status>,
    /// Only those older than this one: the last of the page before.
    pub before: Option<RunId>,
}

impl RunFilter {
    /// All runs.
    pub fn new() -> Self {
        Self::default()
    }

    /// Only this tenant's.
    #[must_use]
    pub fn tenant(mut self, tenant: impl Into<String>) -> Self {
        self.tenant = Some(tenant.into());
        self
    }

    /// Only those that stand so.
    #[must_use]
    pub fn status(mut self, status: Status) -> Self {
        self.status = Some(status);
        self
    }

    /// Only those older than this one.
    #[must_use]
    pub fn before(mut self, before: RunId) -> Self {
        self.before = Some(before);
        self
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
