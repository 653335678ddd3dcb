//! The records that a store keeps.

use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::error::{Error, ErrorKind, Result};
use crate::request::RequestDigest;
use crate::request::Usage;

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

/// How an item is to be run, by what became of the workers that ran it before.
///
/// A worker's death says nothing about the items in its hands: it may have been killed from outside, or one of
/// the items may have ended the process. [`reap`](crate::store::Queue::reap) raises the handling of each, and a worker that asks for
/// few of the one kind, and for one at a time of the others, finds the item that is to blame.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Handling {
    /// With any number of others: no worker has died with it.
    #[default]
    Normal,
    /// With a few others at most: a worker died while it held this item and others.
    Few,
    /// With nothing beside it: the same happened again, or a worker died while it held this item alone.
    Alone,
    /// As [`Alone`](Self::Alone), and if its worker dies once more, the item has failed.
    LastAttempt,
}

impl Handling {
    /// The number that is stored.
    pub fn as_i32(self) -> i32 {
        match self {
            Self::Normal => 0,
            Self::Few => 1,
            Self::Alone => 2,
            Self::LastAttempt => 3,
        }
    }

    /// The handling that is stored as this number. A number of a newer release counts as the strictest.
    pub fn from_i32(number: i32) -> Self {
        match number {
            0 => Self::Normal,
            1 => Self::Few,
            2 => Self::Alone,
            _ => Self::LastAttempt,
        }
    }

    /// The handling after a worker died with the item, which may be begun `left` times more.
    /// `alone`: whether it was the only item that the worker held.
    pub fn after_death(self, alone: bool, left: u32) -> Self {
        match self {
            Self::Normal if !alone => Self::Few,
            _ if left <= 1 => Self::LastAttempt,
            _ => Self::Alone,
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
    /// How often it has been claimed, releases without charge not counted, nor the deaths of workers that held
    /// other items too.
    pub attempt: u32,
    /// How often a worker may claim it and die with it alone before it fails.
    pub max_attempts: u32,
    /// How it is to be run.
    #[serde(default)]
    pub handling: Handling,
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
    /// In which try of the item it was sent: a number that rises with each, as the epoch that a worker
    /// claimed it with.
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
    /// In which try of the item it was sent: a number that rises with each, as the epoch that a worker
    /// claimed it with.
    pub attempt: u32,
    /// What its reply would be remembered under.
    pub key: MemoKey,
}

/// What a [`Commit`](crate::store::Commit) changed.
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
