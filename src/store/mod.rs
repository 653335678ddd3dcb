//! Durable stores of runs, items, replies and logs: [`Store`], [`Queue`] and [`ReplyStore`].
//!
//! | A backend that implements | can |
//! |---|---|
//! | [`ReplyStore`] (2 methods) | keep the replies of a [`Context`](crate::Context), so that a rerun pays for nothing twice |
//! | [`Store`] (10 methods) | keep runs and their results too, for engines that push work |
//! | [`Queue`] (8 more) | hand items to [`Worker`](crate::Worker)s |
//!
//! Callers also have the conveniences of [`StoreExt`] and [`QueueExt`], which every backend gets.
//!
//! Three backends implement all of it: [`Memory`], `Sqlite` (feature `sqlite`: one file, several processes of one
//! machine) and `Postgres` (feature `postgres`: several machines). All pass the same conformance suite,
//! `testing::store` (feature `testing`), and a backend of your own should pass it too.
//!
//! ```
//! use std::time::Duration;
//! use throughline::store::{
//!     Claim, Commit, Memory, NewItem, NewRun, Queue, Settlement, Status, Store, StoreExt,
//! };
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
//! let store = Memory::new();
//! let items = ["1", "2"].map(|n| NewItem::new(n, format!("{{\"n\":{n}}}")));
//! let created = store.create_run(NewRun::new("ada", "double").items(items)).await?;
//!
//! // A worker registers one lease for its process, then claims items, works and commits.
//! let lease = store.register("worker", Duration::from_secs(30)).await?;
//! let claimed = store.claim(lease, Claim::new(["double"], 16)).await?;
//! let settled = claimed.iter().map(|item| Settlement::new(item.hold(), Ok("4".to_owned())));
//! let commit = Commit::new().settlements(settled);
//! assert_eq!(store.commit(commit).await?.items.len(), 2);
//!
//! let run = store.run(created.run).await?.expect("the run exists");
//! assert_eq!((run.status, run.completed, run.total), (Status::Completed, 2, 2));
//! # Ok(()) }
//! ```
//!
//! # Promises of every backend
//!
//! - **Each item commits at most one result.** A claim, a release, a cancellation, the reaping of a lease and a commit
//!   raise the epoch of the item. A caller that names an older epoch changes nothing, so a commit that is sent again
//!   because its answer was lost does no harm.
//! - **Counters are exact.** The transaction that changes items also writes the run's counters and its log, from the
//!   rows that it changed. At any time the counters equal those counted from the items.
//! - **A paid reply is kept**, under its own key and independent of the outcome of its item. The first reply under a
//!   key stays.
//! - **One round trip writes many rows.** No method sends a statement for each row.
//! - **Each method is one transaction**: it happens wholly or not at all, also when it fails or when its future is
//!   dropped. A dropped call may still take effect. `Sqlite` and `Postgres` run each call in a Tokio task of its own and
//!   finish a call that has begun, so that a future which is not polled does not block other callers.
//! - **Times come from the clock of the store**, so the clocks of workers need not agree.
//!
//! # Errors
//!
//! - [`ErrorKind::Store`](crate::ErrorKind::Store): temporary if a retry can help (the connection is gone, the file is
//!   busy for longer than its timeout).
//! - [`ErrorKind::Config`](crate::ErrorKind::Config): data that no backend can keep.
//! - [`ErrorKind::LeaseLost`](crate::ErrorKind::LeaseLost): where a method says so.

#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod detached;
mod extensions;
pub(crate) mod forward;
mod inputs;
pub(crate) mod journal;
mod memory;
mod model;
#[cfg(feature = "postgres")]
mod postgres;
mod replies;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod sql;
#[cfg(feature = "sqlite")]
mod sqlite;
mod transaction;

use std::time::Duration;

use async_trait::async_trait;

use crate::error::Result;

pub use self::extensions::{QueueExt, StoreExt};
pub use self::inputs::{Claim, Commit, IntentFilter, NewItem, NewRun, Note, RunFilter, Settlement};
pub use self::journal::{Journal, JournalStats};
pub use self::memory::Memory;
pub use self::model::{
    Committed, Created, FORMAT, Generation, Handling, Hold, Intent, IntentName, Item, ItemId,
    LeaseId, LogEntry, MemoKey, Purged, Reaped, Run, RunId, Status,
};
#[cfg(feature = "postgres")]
pub use self::postgres::{Postgres, PostgresBuilder};
pub(crate) use self::replies::RepliesOnly;
pub use self::replies::ReplyStore;
#[cfg(feature = "sqlite")]
pub use self::sqlite::{Durability, Sqlite, SqliteBuilder};

/// A store of runs, items, generations, intents and logs.
///
/// An engine that pushes work needs no more than this: it reads items, and commits against the epoch that it read.
/// Workers that pull work need a [`Queue`]. [`StoreExt`] adds conveniences for callers, and a `Box` or an
/// `Arc` of a store is a store.
///
/// A text that is described as JSON comes from the layer above and is returned unchanged. The
/// [promises of the module](self#promises-of-every-backend) are part of the contract, and `testing::store` (feature
/// `testing`) checks them.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Returns the name of the backend for messages, such as `sqlite`.
    fn name(&self) -> &'static str {
        "store"
    }

    /// Creates a run with all of its items, pending, and writes the entry `created` into its log.
    /// A run without items is completed at once.
    ///
    /// If the tenant already has a run with the same idempotency key, nothing is written, even if the rest of the input
    /// differs, and the existing run is returned.
    async fn create_run(&self, run: NewRun) -> Result<Created>;

    /// Returns at most `limit` runs, newest first.
    ///
    /// With [`RunFilter::id`] this is one indexed read, however many items the run has.
    async fn runs(&self, filter: RunFilter, limit: u32) -> Result<Vec<Run>>;

    /// Returns at most `limit` items of a run in the order of their `seq`, starting at `from`.
    async fn items(&self, run: RunId, from: u64, limit: u32) -> Result<Vec<Item>>;

    /// Returns at most `limit` entries of a run's log after the entry `after` (0: from the start), in order.
    ///
    /// Entries are numbered without a gap. If an entry is visible, all entries before it are visible.
    /// Besides the notes of commits a store writes these entries, with a JSON object as data:
    ///
    /// | kind | when | data |
    /// |---|---|---|
    /// | `created` | once | `total`: the number of items |
    /// | `started` | the first claim since the run was pending | |
    /// | `settled` | items ended, once for each commit or reap | `completed`, `failed`: arrays of their `seq` |
    /// | `cancelled` | by [`cancel`](Self::cancel) | `items`: the number of items that it stopped |
    /// | `retried` | by [`retry_failed`](Self::retry_failed) | `items`: the number of items that are pending again |
    /// | `ended` | the last item ended; only `retried` comes after it | `status` |
    async fn log(&self, run: RunId, after: u64, limit: u32) -> Result<Vec<LogEntry>>;

    /// Returns the generations of a tenant under these keys, in any order. Missing ones are left out.
    async fn generations(&self, tenant: &str, keys: &[MemoKey]) -> Result<Vec<Generation>>;

    /// Writes generations, outcomes of items, notes, and the start and end of intents.
    ///
    /// Generations, notes and intents are written even if all items are fenced. A settlement counts if its item has not
    /// ended and has the epoch that the settlement names, claimed or not, and it raises the epoch. Notes, intents and
    /// settlements of runs and items that do not exist are ignored. A new intent that exists already takes the
    /// provider's reference of the new one; intents are started before others are ended.
    ///
    /// # Errors
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) if [`Commit::check`] refuses it.
    async fn commit(&self, commit: Commit) -> Result<Committed>;

    /// Returns at most `limit` of the intents that the filter selects, in the order of their names.
    async fn intents(&self, filter: IntentFilter, limit: u32) -> Result<Vec<Intent>>;

    /// Ends a run: its open items are cancelled and their epochs raised, so that their workers cannot commit them.
    /// Returns the number of items that it stopped; 0 if the run has ended or does not exist.
    async fn cancel(&self, run: RunId) -> Result<u64>;

    /// Makes the failed items of a run pending again, with 0 attempts. Returns their number; 0 if the run was cancelled
    /// or does not exist.
    ///
    /// Removes the intents of items that failed with [`ErrorKind::LeaseLost`](crate::ErrorKind::LeaseLost): the caller
    /// that retries such an item has decided about its calls.
    ///
    /// Items keep their [`Handling`], except that [`Handling::LastAttempt`] becomes [`Handling::Alone`]: an item that
    /// ended its workers is still run alone.
    async fn retry_failed(&self, run: RunId) -> Result<u64>;

    /// Removes at most `limit` runs that ended at least `older_than` ago, with all their rows, and at most `limit`
    /// generations that were written at least that long ago, the oldest first.
    ///
    /// A generation stays as long as a run of its tenant may need it again. That is a run which was created before the
    /// generation was written, still exists, and is open or has failed. A run that never ends therefore keeps all
    /// generations that its tenant has paid for since: cancel it.
    async fn purge(&self, older_than: Duration, limit: u32) -> Result<Purged>;
}

/// A [`Store`] from which workers pull items.
///
/// A worker registers a lease each time its process starts and keeps it alive with [`heartbeat`](Self::heartbeat). After
/// the worker has died, a [`reap`](Self::reap) by any other worker makes its items available again. [`QueueExt`] adds
/// conveniences for callers.
#[async_trait]
pub trait Queue: Store {
    /// Returns a new lease that expires `ttl` from now. `worker` is a name for people: two processes with the same name
    /// have two leases, and a restarted process does not extend the lease of its predecessor.
    async fn register(&self, worker: &str, ttl: Duration) -> Result<LeaseId>;

    /// Extends a lease to `ttl` from now. Returns false if the lease is gone. The worker must stop then, because it can
    /// no longer commit the items that the lease held.
    ///
    /// A lease that has expired and has not been reaped is valid again.
    async fn heartbeat(&self, lease: LeaseId, ttl: Duration) -> Result<bool>;

    /// Ends a lease and releases its items without charging an attempt. Returns the number of items released.
    async fn retire(&self, lease: LeaseId) -> Result<u64>;

    /// Takes pending items of the pipelines and the [`Handling`] that the claim names, at most
    /// [`limit`](Claim::limit). They are processing under this lease then, with epoch and attempt raised by one, and
    /// are returned in the order in which they were dealt. Items of other pipelines are left to workers that have them.
    ///
    /// Dealing is fair. Tenants take turns in the byte order of their names, starting after the tenant that got the last
    /// item from this handle. No tenant gets a second item before each has one. Within a tenant the lowest
    /// priority goes first, then the lowest number. With more tenants than `limit`, `limit` of them get one item each.
    /// With fewer, a tenant gets at most ⌈limit / tenants⌉ items, even if other tenants have fewer. So there can
    /// be more to claim after fewer than `limit` items were returned, but not after none (unless another worker was
    /// about to take the rest and did not). Items whose release is delayed cannot be claimed until a reap finds them due.
    ///
    /// A pending run becomes processing, and its log says `started`.
    ///
    /// # Errors
    /// [`ErrorKind::LeaseLost`](crate::ErrorKind::LeaseLost) if the lease is gone or has expired. The transaction that
    /// takes the items checks this, so that a concurrent reap cannot come in between.
    ///
    /// # Cancel safety
    /// A claim that is dropped, or whose answer is lost with its connection, may have taken items that no task works
    /// on, under a lease that lives. [`held`](Self::held) finds them.
    async fn claim(&self, lease: LeaseId, claim: Claim) -> Result<Vec<Item>>;

    /// Returns whether pending items of these pipelines can be claimed with a [`Handling`] other than the normal one.
    /// This is a read, whatever the number of items.
    async fn has_suspects(&self, pipelines: &[String]) -> Result<bool>;

    /// Gives items back: open items with the epoch that the hold names are pending again, with their epoch raised. They
    /// can be claimed at the first reap after `delay`, or at once if `delay` is zero. If `charge` is false, the attempt
    /// is not counted. Returns the number of items released.
    async fn release(&self, holds: &[Hold], delay: Duration, charge: bool) -> Result<u64>;

    /// Returns the holds of all items under a lease, in the order of their numbers.
    async fn held(&self, lease: LeaseId) -> Result<Vec<Hold>>;

    /// Removes expired leases and makes their items pending again, with their epoch raised and the [`Handling`] of
    /// [`Handling::after_death`]. Also makes released items available whose delay is over. Every worker calls this
    /// every few seconds.
    ///
    /// The attempt counts only for an item that was the only one of its lease, because otherwise the cause of the death
    /// is unknown. Such an item fails with [`ErrorKind::LeaseLost`](crate::ErrorKind::LeaseLost) when its attempts are
    /// used up. The items of a lease that held several keep the attempts they had before the claim.
    ///
    /// A backend removes leases first and requeues items second, each statement with its own view of the committed
    /// data: a claim that commits between the two must not be overlooked.
    async fn reap(&self) -> Result<Reaped>;
}
