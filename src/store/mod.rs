//! The durable truth about runs, items, generations and logs: [`Store`], and [`Queue`] for those
//! that workers pull from.
//!
//! Three backends come with the crate: [`Memory`], `Sqlite` (feature `sqlite`: one file, several
//! processes of one machine) and `Postgres` (feature `postgres`: several machines). All pass the
//! same suite, `testing::store` (feature `testing`), and so should one of your own.
//!
//! ```
//! use std::time::Duration;
//! use throughline::store::{Claim, Commit, Memory, NewItem, NewRun, Queue, Settlement, Status, Store};
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
//! let store = Memory::new();
//! let items = ["1", "2"].map(|n| NewItem::new(n, format!("{{\"n\":{n}}}")));
//! let created = store.create_run(NewRun::new("ada", "double").items(items)).await?;
//!
//! // A worker: one lease for the process, then claim, work, commit.
//! let lease = store.register("worker", Duration::from_secs(30)).await?;
//! let claimed = store.claim(lease, Claim::new(&["double"], 16)).await?;
//! let settled = claimed.iter().map(|item| Settlement {
//!     hold: item.hold(),
//!     result: Ok("4".to_owned()),
//! });
//! let commit = Commit::new().settlements(settled);
//! assert_eq!(store.commit(commit).await?.items.len(), 2);
//!
//! let run = store.run(created.run).await?.expect("it is there");
//! assert_eq!((run.status, run.completed, run.total), (Status::Completed, 2, 2));
//! # Ok(()) }
//! ```
//!
//! # What every backend promises
//!
//! - **Each item commits at most one result.** A claim, a release, a cancellation, a reaped lease and
//!   a commit itself raise the item's epoch, and whoever names an older one changes nothing.
//!   So a commit that is sent again because its answer got lost does no harm.
//! - **Counters are exact.** A run's counters and the order of its log are written in the transaction
//!   that changes the items, from the rows that it changed: they equal the derived counts at any time.
//! - **A reply that was paid for is kept**, under its own key and whatever became of its item. The first
//!   one under a key stays.
//! - **One round trip writes many rows.** No method sends a statement for each row.
//! - **Each method is one transaction**: it happens wholly or not at all, also when it fails or its future is
//!   dropped. A dropped one may still happen, and `Sqlite` and `Postgres` finish what was begun: each call runs in a
//!   task of its own (Tokio's), so that one which is not polled holds up no other.
//! - **Times are the store's own clock**, so workers need not agree on theirs.
//!
//! # Errors
//!
//! [`ErrorKind::Store`](crate::ErrorKind::Store), temporary where trying again can help (the connection is gone, the file
//! is busy for longer than its timeout); [`ErrorKind::Config`](crate::ErrorKind::Config) for what no
//! backend can keep; [`ErrorKind::LeaseLost`](crate::ErrorKind::LeaseLost) where said.

#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod detached;
mod inputs;
pub(crate) mod journal;
mod memory;
mod model;
#[cfg(feature = "postgres")]
mod postgres;
mod shared;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod sql;
#[cfg(feature = "sqlite")]
mod sqlite;
mod transaction;

use std::time::Duration;

use async_trait::async_trait;

use crate::error::Result;

pub use self::inputs::{Claim, Commit, NewItem, NewRun, Note, RunFilter, Settlement};
pub use self::journal::{Journal, JournalStats};
pub use self::memory::Memory;
pub use self::model::{
    Committed, Created, FORMAT, Generation, Handling, Hold, Intent, IntentName, Item, ItemId,
    LeaseId, LogEntry, MemoKey, Purged, Reaped, Run, RunId, Status,
};
#[cfg(feature = "postgres")]
pub use self::postgres::{Postgres, PostgresBuilder};
#[cfg(feature = "sqlite")]
pub use self::sqlite::{Durability, Sqlite, SqliteBuilder};

/// Keeps runs, items, generations, intents and logs.
///
/// Engines that push work need no more than this: they read items, and commit against the epoch that
/// they read. Workers that pull want a [`Queue`].
///
/// Texts named JSON come from the layer above and are given back as they came. The promises
/// of the [module](self) are part of the contract.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// The name of the backend, for messages: `sqlite`.
    fn name(&self) -> &'static str;

    /// Creates a run with all of its items, pending, and writes the entry `created` into its log.
    /// A run without items is completed at once.
    ///
    /// If the tenant has a run with the same idempotency key, nothing is written, whatever
    /// else differs, and that run is named.
    async fn create_run(&self, run: NewRun) -> Result<Created>;

    /// A run as it stands; `None` if there is none. One indexed read, however many items it has.
    async fn run(&self, run: RunId) -> Result<Option<Run>>;

    /// At most `limit` runs, newest first.
    async fn runs(&self, filter: RunFilter, limit: u32) -> Result<Vec<Run>>;

    /// At most `limit` items of a run in the order of their `seq`, from `from` on.
    async fn items(&self, run: RunId, from: u64, limit: u32) -> Result<Vec<Item>>;

    /// At most `limit` entries of a run's log after the entry `after` (0: from the start), in order.
    ///
    /// Entries are numbered without a gap, and one that is visible has all before it visible.
    /// Besides the notes of commits a store writes, with a JSON object as data:
    ///
    /// | kind | when | data |
    /// |---|---|---|
    /// | `created` | once | `total`: how many items |
    /// | `started` | the first claim since it was pending | |
    /// | `settled` | items ended, once for each commit or reap | `completed`, `failed`: arrays of their `seq` |
    /// | `cancelled` | by [`cancel`](Self::cancel) | `items`: how many it stopped |
    /// | `retried` | by [`retry_failed`](Self::retry_failed) | `items`: how many are pending again |
    /// | `ended` | the last item ended; after it only `retried` comes | `status` |
    async fn log(&self, run: RunId, after: u64, limit: u32) -> Result<Vec<LogEntry>>;

    /// The generations of a tenant under these keys: those that there are, in no order.
    async fn generations(&self, tenant: &str, keys: &[MemoKey]) -> Result<Vec<Generation>>;

    /// Writes generations, outcomes of items, notes, and the end of intents.
    ///
    /// Generations, notes and ended intents are written even where all items are fenced. A settlement counts
    /// if the item is not over and has the epoch that is named, claimed or not, and raises it. Notes
    /// and settlements of runs and items that are not there are passed over.
    ///
    /// # Errors
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) if [`Commit::check`] refuses it.
    async fn commit(&self, commit: Commit) -> Result<Committed>;

    /// Writes down calls that are about to be sent. An intent that is there already takes
    /// the provider's reference of the new one.
    async fn put_intents(&self, intents: &[Intent]) -> Result<()>;

    /// At most `limit` of the intents of items that no live lease holds: after a crash, the calls of
    /// which nobody knows whether they were paid. In the order of their names, after `after`.
    async fn ambiguous(&self, after: Option<IntentName>, limit: u32) -> Result<Vec<Intent>>;

    /// The intents of these items, whoever holds them, in the order of their names.
    async fn intents(&self, items: &[ItemId]) -> Result<Vec<Intent>>;

    /// Ends a run: its items that are not over are cancelled and their epochs raised, so that who
    /// works on them cannot commit. Gives the number of items it stopped; 0 if the run
    /// is over or not there.
    async fn cancel(&self, run: RunId) -> Result<u64>;

    /// Makes the failed items of a run pending again, with their attempts back at 0. Gives their number; 0 if the run was cancelled or is not there.
    ///
    /// The intents of those that failed with [`ErrorKind::LeaseLost`](crate::ErrorKind::LeaseLost) are removed: whoever tries such an item again has
    /// decided about its calls.
    ///
    /// Their [`Handling`] stays, except that the last attempt is none any more: an item that ended its workers is still run alone.
    async fn retry_failed(&self, run: RunId) -> Result<u64>;

    /// Removes at most `limit` runs that ended at least so long ago, with all that is theirs,
    /// and at most `limit` generations that were written at least so long ago: the oldest first.
    ///
    /// A generation stays as long as a run of its tenant may need it again: one that was created before
    /// the generation was written, and is not over or has failed and is still there. So a run that never ends keeps all
    /// that its tenant has paid for since: cancel it.
    async fn purge(&self, older_than: Duration, limit: u32) -> Result<Purged>;
}

/// A [`Store`] that workers pull items from.
///
/// A worker registers once for each start of its process and keeps the lease alive with
/// [`heartbeat`](Self::heartbeat). When it dies, anybody's [`reap`](Self::reap) gives its items to the others.
#[async_trait]
pub trait Queue: Store {
    /// A new lease for `ttl` from now. `worker` is for people; two processes that call themselves
    /// alike still have two leases, and a process that starts again does not look alive for
    /// its dead self.
    async fn register(&self, worker: &str, ttl: Duration) -> Result<LeaseId>;

    /// Extends a lease to `ttl` from now. False if it is gone: stop working, nothing of
    /// what the lease held can be committed any more.
    ///
    /// A lease that has expired and has not been reaped yet lives again.
    async fn heartbeat(&self, lease: LeaseId, ttl: Duration) -> Result<bool>;

    /// Ends a lease and releases what it holds, without charge. Gives the number of items released.
    async fn retire(&self, lease: LeaseId) -> Result<u64>;

    /// Takes pending items of the pipelines and the [`Handling`] that the claim names, at most
    /// [`limit`](Claim::limit): they are processing, under this lease, with epoch and attempt raised by one. They come
    /// in the order in which they were dealt. Items of other pipelines are left as they are, for workers that have them.
    ///
    /// Dealing is fair: tenants take turns, in the order of their names (by bytes) and from the one after the last that
    /// got something from this handle; nobody gets a second item before each has one. Within a tenant the
    /// lowest priority goes first, then the lowest number. With more tenants than `limit`, `limit` of
    /// them get an item each. With fewer, a tenant gets at most ⌈limit / tenants⌉, also
    /// where the others have less: there can be more to claim after less than `limit`, but not after
    /// nothing (unless another worker was about to take the rest, and did not). Items whose release is delayed are not there until a reap finds them due.
    ///
    /// A run that was pending is processing now, and its log says `started`.
    ///
    /// # Errors
    /// [`ErrorKind::LeaseLost`](crate::ErrorKind::LeaseLost) if the lease is gone or has expired.
    /// It is checked in the transaction that takes the items, against a reaper at the same time.
    ///
    /// # Cancel safety
    /// A claim that is dropped, or whose answer is lost with its connection, may have taken items that
    /// nobody works on, under a lease that lives. [`held`](Self::held) finds them.
    async fn claim(&self, lease: LeaseId, claim: Claim<'_>) -> Result<Vec<Item>>;

    /// Whether there are pending items of these pipelines that could be claimed with another [`Handling`] than the normal one.
    /// A read, whatever the number of items.
    async fn has_suspects(&self, pipelines: &[&str]) -> Result<bool>;

    /// Gives items back: those that are not over and have the epoch that is named are pending again, with
    /// the epoch raised. They can be claimed when `delay` is over, at the next reap; at once where it is zero.
    /// With `charge` false their attempt counts for nothing. Gives the number of items released.
    async fn release(&self, holds: &[Hold], delay: Duration, charge: bool) -> Result<u64>;

    /// All items that a lease holds, in the order of their numbers. What a worker does not know of among
    /// them, a claim took whose answer was lost: it can be worked on, or released.
    async fn held(&self, lease: LeaseId) -> Result<Vec<Item>>;

    /// Those of the holds that are lost: the item was cancelled, reaped, or settled by somebody.
    /// A call for it may be aborted.
    async fn lost(&self, holds: &[Hold]) -> Result<Vec<ItemId>>;

    /// Ends leases that have expired. Their items are pending again with the epoch raised, and with the
    /// [`Handling`] that follows ([`Handling::after_death`]). And lets released items in whose delay is over. To be called
    /// every few seconds, by anybody.
    ///
    /// The attempt counts only for an item that was all that its lease held: whatever ended the worker, it was none of its
    /// neighbours. Such an item fails, with [`ErrorKind::LeaseLost`](crate::ErrorKind::LeaseLost), when its
    /// attempts are used up. The items of a lease that held several keep the attempts they had before the claim.
    ///
    /// Leases go first and items second, each seeing what was committed until then: a claim that commits
    /// between the two must not be overlooked.
    async fn reap(&self) -> Result<Reaped>;
}
