//! The records that a store keeps, and what it is given to keep.

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::digest::RequestDigest;
use crate::error::{Error, ErrorKind, Result};
use crate::usage::Usage;

/// The format of the records that this release writes. Every row carries it.
pub const FORMAT: u32 = 1;

macro_rules! id {
    ($name:ident, $of:literal) => {
        #[doc = concat!("The number of ", $of, ": positive, given by the store, never used again.")]
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub i64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self> {
                text.parse().map(Self).map_err(|_| {
                    let message = format!("{text:?} is not the number of {}", $of);
                    Error::new(ErrorKind::Config, message)
                })
            }
        }
    };
}

id!(RunId, "a run");
id!(ItemId, "an item");
id!(LeaseId, "a lease");

/// Where a run or an item stands.
///
/// ```text
/// pending → processing → completed | failed | cancelled
///    ↑___________|  (released, or its worker died)
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Nobody works on it yet.
    Pending,
    /// A worker holds it; of a run: something of it has been started.
    Processing,
    /// It has its output; of a run: every item has.
    Completed,
    /// It has an error instead; of a run: everything ended, and an item failed.
    Failed,
    /// It was stopped before it had either.
    Cancelled,
}

impl Status {
    /// The word that is stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Processing => "processing",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether it stays so unless somebody acts.
    pub fn is_over(self) -> bool {
        !matches!(self, Self::Pending | Self::Processing)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Status {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        let all = [
            Self::Pending,
            Self::Processing,
            Self::Completed,
            Self::Failed,
            Self::Cancelled,
        ];
        let known = all.into_iter().find(|status| status.as_str() == word);
        known.ok_or_else(|| Error::new(ErrorKind::Store, format!("{word:?} is no status")))
    }
}

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
    /// How often an item may be claimed before a worker's death fails it; 3 unless set.
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

    /// Sets how often an item may be claimed before a worker's death fails it.
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
    /// [`ErrorKind::Config`] for a text with a NUL character (Postgres has no place for it)
    /// and for `max_attempts` 0.
    pub fn check(&self) -> Result<()> {
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

/// What became of [`create_run`](crate::store::Store::create_run).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Created {
    /// The run.
    pub run: RunId,
    /// False where the idempotency key was known: this is the run it named before.
    pub new: bool,
}

/// A run as it stands.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Run {
    /// Its number.
    pub id: RunId,
    /// Whose it is.
    pub tenant: String,
    /// The name of the pipeline.
    pub name: String,
    /// Where it stands.
    pub status: Status,
    /// What the layer above put there.
    pub spec: String,
    /// How many items it has.
    pub total: u64,
    /// How many of them are completed.
    pub completed: u64,
    /// How many of them failed.
    pub failed: u64,
    /// How many of them were cancelled.
    pub cancelled: u64,
    /// The `seq` of the newest entry of its log.
    pub log_seq: u64,
    /// The error of the item that failed first.
    pub error: Option<Error>,
    /// When it was created, to the millisecond.
    pub created_at: SystemTime,
    /// When the last item ended, to the millisecond.
    pub ended_at: Option<SystemTime>,
}

impl Run {
    /// How many items are over.
    pub fn ended(&self) -> u64 {
        self.completed + self.failed + self.cancelled
    }
}

/// An item as it stands.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Item {
    /// Its number.
    pub id: ItemId,
    /// The run it is part of.
    pub run: RunId,
    /// Its place in the run, from 0.
    pub seq: u64,
    /// What names it among the items of its pipeline.
    pub key: String,
    /// Whose it is.
    pub tenant: String,
    /// Where it stands.
    pub status: Status,
    /// Rises with every change of hands. Only who names the present one can change the item.
    pub epoch: i64,
    /// How often it has been claimed, releases without charge not counted.
    pub attempt: u32,
    /// How often it may be claimed before a worker's death fails it.
    pub max_attempts: u32,
    /// The input.
    pub input: String,
    /// The output of a completed item.
    pub output: Option<String>,
    /// Why a failed item failed.
    pub error: Option<Error>,
}

impl Item {
    /// The right to change it, as long as nobody else has taken it.
    pub fn hold(&self) -> Hold {
        Hold {
            item: self.id,
            epoch: self.epoch,
        }
    }
}

/// The right to change an item: it is lost as soon as the item's epoch has risen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Hold {
    /// The item.
    pub item: ItemId,
    /// Its epoch when it was claimed or read.
    pub epoch: i64,
}

/// What a generation is remembered under: 32 bytes that the layer above makes of where it was
/// asked, what was asked, and which time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemoKey([u8; 32]);

impl MemoKey {
    /// A key of these bytes.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// A key of these parts, each told from the next: SHA-256 over each part behind its length in
    /// eight bytes, big end first.
    pub fn of<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut digest = Sha256::new();
        for part in parts {
            digest.update((part.len() as u64).to_be_bytes());
            digest.update(part);
        }
        Self(digest.finalize().into())
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for MemoKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for MemoKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoKey({self})")
    }
}

/// A reply that was paid for.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// Whose it is.
    pub tenant: String,
    /// What it is remembered under.
    pub key: MemoKey,
    /// What was asked.
    pub request: RequestDigest,
    /// The reply: JSON, opaque to the store, stored before anybody parses it.
    pub body: String,
    /// The tokens it used.
    pub usage: Usage,
    /// What it cost in millionths of a dollar, where that is known.
    pub cost_micros: Option<u64>,
}

/// A call that was sent and has not come back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intent {
    /// The item that it was sent for.
    pub item: ItemId,
    /// The item's attempt in which it was sent.
    pub attempt: u32,
    /// What its reply would be remembered under.
    pub key: MemoKey,
    /// The provider's name for it, where it gave one: the id of a batch job.
    pub provider_ref: Option<String>,
}

impl Intent {
    /// What tells it from the others.
    pub fn name(&self) -> IntentName {
        IntentName {
            item: self.item,
            attempt: self.attempt,
            key: self.key,
        }
    }
}

/// What tells an [`Intent`] from the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IntentName {
    /// The item that it was sent for.
    pub item: ItemId,
    /// The item's attempt in which it was sent.
    pub attempt: u32,
    /// What its reply would be remembered under.
    pub key: MemoKey,
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
    pub over: Vec<IntentName>,
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
    pub fn over(mut self, over: impl IntoIterator<Item = IntentName>) -> Self {
        self.over.extend(over);
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
            && self.over.is_empty()
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

/// What a [`Commit`] changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Committed {
    /// The items that ended by it, in the order of their numbers. One that is not among them
    /// had changed hands: somebody else decides about it.
    pub items: Vec<ItemId>,
    /// How many of the generations were new.
    pub generations: u64,
}

/// An entry of a run's log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEntry {
    /// Its place: 1, 2, 3, … without a gap.
    pub seq: u64,
    /// What kind of entry; see [`Store::log`](crate::store::Store::log).
    pub kind: String,
    /// What it says: JSON.
    pub data: String,
    /// When, to the millisecond.
    pub at: SystemTime,
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

/// What [`reap`](crate::store::Queue::reap) found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reaped {
    /// Leases that had expired.
    pub leases: u64,
    /// Items of theirs that are pending again.
    pub requeued: u64,
    /// Items of theirs that failed: their last attempt was the one that died.
    pub failed: u64,
    /// Released items whose delay is over: they can be claimed again.
    pub due: u64,
}

/// What [`purge`](crate::store::Store::purge) removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Purged {
    /// Runs, with their items, intents and logs.
    pub runs: u64,
    /// Generations.
    pub generations: u64,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memo_keys_tell_their_parts_apart() {
        let of = |parts: &[&str]| MemoKey::of(parts.iter().map(|part| part.as_bytes()));
        assert_ne!(of(&["ab", "c"]), of(&["a", "bc"]));
        assert_ne!(of(&["a", ""]), of(&["a"]));
        // Stores keep these: printf '\0\0\0\0\0\0\0\1a' | sha256sum
        assert_eq!(
            of(&["a"]).to_string(),
            "3b196fd4907bedf51c3090e9835f2f7cb61e7ee1b2299ea3b8fed9b4183a822a"
        );
    }

    #[test]
    fn statuses_are_their_words() {
        for status in [Status::Pending, Status::Cancelled] {
            assert_eq!(status.as_str().parse::<Status>().unwrap(), status);
        }
        assert!("done".parse::<Status>().is_err());
        assert_eq!("12".parse::<RunId>().unwrap(), RunId(12));
        assert!("x".parse::<RunId>().is_err());
    }
}
