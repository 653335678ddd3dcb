//! The data model: the records that a store keeps.

use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};

use crate::error::{Error, ErrorKind, Result};
use crate::request::RequestDigest;
use crate::request::Usage;

/// The format of the records that this release writes. Every row carries it.
pub const FORMAT: u32 = 1;

macro_rules! id {
    ($name:ident, $of:literal) => {
        #[doc = concat!("The number of ", $of, ": positive, assigned by the store and never reused.")]
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

/// The status of a run or an item.
///
/// ```text
/// pending → processing → completed | failed | cancelled
///    ↑___________|  (released, or its worker died)
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Status {
    /// No worker has started it.
    Pending,
    /// A worker holds the item; an item of the run has been started.
    Processing,
    /// The item has its output; every item of the run has.
    Completed,
    /// The item has an error; every item of the run has ended, and at least one failed.
    Failed,
    /// It was stopped before it had an outcome.
    Cancelled,
}

impl Status {
    /// Returns the word that stores keep.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Processing => "processing",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Returns whether the run or item has ended. Only `retry_failed` changes such a status.
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
        known.ok_or_else(|| Error::new(ErrorKind::Store, format!("{word:?} is not a status")))
    }
}

/// How an item may be run, given the deaths of workers that held it before.
///
/// The death of a worker does not tell which item caused it: the worker may have been killed from outside, or one of its
/// items may have ended the process. So [`reap`](crate::store::Queue::reap) raises the handling of each item that a
/// dead worker held. Workers claim such suspects a few at a time and then one at a time, which isolates the item that
/// ends its workers.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Handling {
    /// Beside any number of items: no worker has died while it held this one.
    #[default]
    Normal,
    /// Beside few other items: a worker died while it held this item and others.
    Few,
    /// Beside no other item: that happened again, or a worker died while it held only this item.
    Alone,
    /// As [`Alone`](Self::Alone), and the item fails if its worker dies once more.
    LastAttempt,
}

impl Handling {
    /// Returns the number that stores keep.
    pub fn as_i32(self) -> i32 {
        match self {
            Self::Normal => 0,
            Self::Few => 1,
            Self::Alone => 2,
            Self::LastAttempt => 3,
        }
    }

    /// Returns the handling that stores keep as this number. An unknown number of a newer release counts as the strictest
    /// handling.
    pub fn from_i32(number: i32) -> Self {
        match number {
            0 => Self::Normal,
            1 => Self::Few,
            2 => Self::Alone,
            _ => Self::LastAttempt,
        }
    }

    /// Returns the handling of an item after its worker died. `alone` says whether the worker held no other item, and
    /// `left` is the number of attempts that the item still has.
    pub fn after_death(self, alone: bool, left: u32) -> Self {
        match self {
            Self::Normal if !alone => Self::Few,
            _ if left <= 1 => Self::LastAttempt,
            _ => Self::Alone,
        }
    }
}

/// The result of [`create_run`](crate::store::Store::create_run).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Created {
    /// The run.
    pub run: RunId,
    /// Whether the run is new. False if the tenant had a run with this idempotency key already.
    pub new: bool,
}

impl Created {
    /// Describes a run that was created now (`new`) or earlier, under the same idempotency key.
    pub fn new(run: RunId, new: bool) -> Self {
        Self { run, new }
    }
}

/// A run with its status and counters.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Run {
    /// The number of the run.
    pub id: RunId,
    /// The tenant that owns the run.
    pub tenant: String,
    /// The name of the pipeline.
    pub name: String,
    /// The status of the run.
    pub status: Status,
    /// Data of the layer above: JSON.
    pub spec: String,
    /// The number of items.
    pub total: u64,
    /// The number of completed items.
    pub completed: u64,
    /// The number of failed items.
    pub failed: u64,
    /// The number of cancelled items.
    pub cancelled: u64,
    /// The `seq` of the newest entry of the run's log.
    pub log_seq: u64,
    /// The error of the item that failed first.
    pub error: Option<Error>,
    /// The time of its creation, to the millisecond.
    pub created_at: SystemTime,
    /// The time when the last item ended, to the millisecond.
    pub ended_at: Option<SystemTime>,
}

impl Run {
    /// Creates the record of a new run: pending, or completed if `total` is 0. For backends.
    pub fn new(
        id: RunId,
        tenant: impl Into<String>,
        name: impl Into<String>,
        total: u64,
        created_at: SystemTime,
    ) -> Self {
        let ended = total == 0;
        Self {
            id,
            tenant: tenant.into(),
            name: name.into(),
            status: if ended {
                Status::Completed
            } else {
                Status::Pending
            },
            spec: "null".to_owned(),
            total,
            completed: 0,
            failed: 0,
            cancelled: 0,
            log_seq: 0,
            error: None,
            created_at,
            ended_at: ended.then_some(created_at),
        }
    }

    /// Returns the number of items that have ended.
    pub fn ended(&self) -> u64 {
        self.completed + self.failed + self.cancelled
    }
}

/// An item of a run.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Item {
    /// The number of the item.
    pub id: ItemId,
    /// The run that the item belongs to.
    pub run: RunId,
    /// The position in the run, from 0.
    pub seq: u64,
    /// The name of the item among the items of its pipeline.
    pub key: String,
    /// The tenant that owns the run.
    pub tenant: String,
    /// The status of the item.
    pub status: Status,
    /// A number that rises each time the item changes hands. Only a caller that names the present one can change the
    /// item.
    pub epoch: i64,
    /// The number of claims, without those that were released free of charge and those of workers that died while they
    /// held other items too.
    pub attempt: u32,
    /// The number of times that a worker may claim the item and die while it holds no other, before the item fails.
    pub max_attempts: u32,
    /// How the item may be run.
    #[serde(default)]
    pub handling: Handling,
    /// The input.
    pub input: String,
    /// The output of a completed item.
    pub output: Option<String>,
    /// The error of a failed item.
    pub error: Option<Error>,
}

impl Item {
    /// Creates the record of a pending item. For backends.
    pub fn new(
        id: ItemId,
        run: RunId,
        seq: u64,
        tenant: impl Into<String>,
        key: impl Into<String>,
        input: impl Into<String>,
    ) -> Self {
        Self {
            id,
            run,
            seq,
            key: key.into(),
            tenant: tenant.into(),
            status: Status::Pending,
            epoch: 0,
            attempt: 0,
            max_attempts: 3,
            handling: Handling::Normal,
            input: input.into(),
            output: None,
            error: None,
        }
    }

    /// Returns the hold that lets a caller change the item until the item changes hands.
    pub fn hold(&self) -> Hold {
        Hold {
            item: self.id,
            epoch: self.epoch,
        }
    }
}

/// A fencing token for an item: the right to change it, which is lost when the epoch of the item rises.
#[doc(alias = "fencing token")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Hold {
    /// The item.
    pub item: ItemId,
    /// The epoch of the item when it was claimed or read.
    pub epoch: i64,
}

/// The key of a generation: a hash of where in the work the request was made, of the request, and of its occurrence.
///
/// Written and serialised as 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemoKey([u8; 32]);

impl MemoKey {
    /// Returns the key that consists of these bytes.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Returns the key of a sequence of parts: the SHA-256 of each part behind its length in eight bytes, big-endian, so
    /// that `["ab", "c"]` and `["a", "bc"]` have different keys.
    pub fn of<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut digest = Sha256::new();
        for part in parts {
            digest.update((part.len() as u64).to_be_bytes());
            digest.update(part);
        }
        Self(digest.finalize().into())
    }

    /// Returns the 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The same bytes as a digest of a request, which has the same text form.
    fn as_digest(&self) -> RequestDigest {
        RequestDigest::from_bytes(self.0)
    }
}

impl fmt::Display for MemoKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_digest().fmt(f)
    }
}

impl fmt::Debug for MemoKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoKey({self})")
    }
}

impl Serialize for MemoKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.as_digest().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for MemoKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        RequestDigest::deserialize(deserializer).map(|digest| Self(*digest.as_bytes()))
    }
}

/// A reply that was paid for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Generation {
    /// The tenant that paid for the reply.
    pub tenant: String,
    /// The key of the reply.
    pub key: MemoKey,
    /// The digest of the request.
    pub request: RequestDigest,
    /// The reply: JSON, opaque to the store, stored before it is parsed.
    pub body: String,
    /// The tokens that the call used.
    pub usage: Usage,
    /// The cost in millionths of a dollar, if known.
    pub cost_micros: Option<u64>,
}

impl Generation {
    /// Creates the record of a reply of unknown cost.
    pub fn new(
        tenant: impl Into<String>,
        key: MemoKey,
        request: RequestDigest,
        body: impl Into<String>,
        usage: Usage,
    ) -> Self {
        Self {
            tenant: tenant.into(),
            key,
            request,
            body: body.into(),
            usage,
            cost_micros: None,
        }
    }
}

/// A call that is about to be sent, or was sent and has not returned.
///
/// After a crash the intents that are left name the calls that may or may not have been paid for.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Intent {
    /// The item that the call is for.
    pub item: ItemId,
    /// The try of the item in which the call was sent: a number that rises with each try, such as the epoch of the
    /// claim.
    pub attempt: u32,
    /// The key under which the reply would be kept.
    pub key: MemoKey,
    /// The provider's name for the call, if it has one: the id of a batch job.
    pub provider_ref: Option<String>,
}

impl Intent {
    /// Creates an intent without a provider's reference.
    pub fn new(name: IntentName) -> Self {
        Self {
            item: name.item,
            attempt: name.attempt,
            key: name.key,
            provider_ref: None,
        }
    }

    /// Sets the provider's name for the call.
    #[must_use]
    pub fn provider_ref(mut self, reference: impl Into<String>) -> Self {
        self.provider_ref = Some(reference.into());
        self
    }

    /// Returns the name of the intent, which is unique.
    pub fn name(&self) -> IntentName {
        IntentName {
            item: self.item,
            attempt: self.attempt,
            key: self.key,
        }
    }
}

/// The unique name of an [`Intent`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IntentName {
    /// The item that the call is for.
    pub item: ItemId,
    /// The try of the item in which the call was sent.
    pub attempt: u32,
    /// The key under which the reply would be kept.
    pub key: MemoKey,
}

/// The result of a [`Commit`](crate::store::Commit).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Committed {
    /// The items that the commit ended, in the order of their numbers. An item that was settled and is missing here had
    /// changed hands: another caller decides about it.
    pub items: Vec<ItemId>,
    /// The number of generations that were new.
    pub generations: u64,
}

/// An entry of a run's log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LogEntry {
    /// The position: 1, 2, 3, … without a gap.
    pub seq: u64,
    /// The kind of the entry; see [`Store::log`](crate::store::Store::log).
    pub kind: String,
    /// The content: JSON.
    pub data: String,
    /// The time of the entry, to the millisecond.
    pub at: SystemTime,
}

impl LogEntry {
    /// Creates an entry. For backends.
    pub fn new(seq: u64, kind: impl Into<String>, data: impl Into<String>, at: SystemTime) -> Self {
        Self {
            seq,
            kind: kind.into(),
            data: data.into(),
            at,
        }
    }
}

/// The result of [`reap`](crate::store::Queue::reap).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Reaped {
    /// The number of leases that had expired.
    pub leases: u64,
    /// The number of their items that are pending again.
    pub requeued: u64,
    /// The number of their items that failed, because their last attempt ended with the worker.
    pub failed: u64,
    /// The number of released items whose delay is over and that can be claimed again.
    pub due: u64,
}

/// The result of [`purge`](crate::store::Store::purge).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Purged {
    /// The number of removed runs. Their items, intents and logs are removed with them.
    pub runs: u64,
    /// The number of removed generations.
    pub generations: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memo_key_depends_on_where_its_parts_begin() {
        let of = |parts: &[&str]| MemoKey::of(parts.iter().map(|part| part.as_bytes()));
        assert_ne!(of(&["ab", "c"]), of(&["a", "bc"]));
        assert_ne!(of(&["a", ""]), of(&["a"]));
        // Stores keep these keys: printf '\0\0\0\0\0\0\0\1a' | sha256sum
        assert_eq!(
            of(&["a"]).to_string(),
            "3b196fd4907bedf51c3090e9835f2f7cb61e7ee1b2299ea3b8fed9b4183a822a"
        );
    }

    #[test]
    fn statuses_and_ids_parse_from_their_text_form() {
        for status in [Status::Pending, Status::Cancelled] {
            assert_eq!(status.as_str().parse::<Status>().unwrap(), status);
        }
        assert!("done".parse::<Status>().is_err());
        assert_eq!("12".parse::<RunId>().unwrap(), RunId(12));
        assert!("x".parse::<RunId>().is_err());
    }
}
