//! [`Journal`]: writes results into a store in batches, in the background.

mod buffer;

use std::fmt;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use futures::future;
use tokio::runtime;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until};

use self::buffer::{Batch, Entry, Limits, Next, Positions, WriteBuffer, commit_of};
use crate::backoff::Jittered;
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, Observers};
use crate::store::{Commit, Generation, Intent, MemoKey, Store};
use crate::sync::Mutex;

/// Commits of more than 512 entries or 16 MiB take longer without being cheaper by the row, and a database refuses a
/// message of a gigabyte. The linger time is shorter than a disk takes to write.
const LIMITS: Limits = Limits {
    batch: 512,
    batch_bytes: 16 << 20,
    max_waiting: 8 * 512,
    max_waiting_bytes: 16 * (16 << 20),
    linger: Duration::from_millis(5),
};
/// The first and the longest wait between two tries.
const WAITS: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));
/// The number of entries refused one by one, with none accepted, after which the store is assumed to be the cause.
const MAX_REJECTED: usize = 32;
/// How long a journal keeps trying after its last handle was dropped.
const CLOSED_RETRY_TIME: Duration = Duration::from_secs(10);

/// A write-behind buffer in front of a store: handing results over costs no round trip, and N of them are written in
/// ⌈N / 512⌉ round trips.
///
/// A batch is written when there are 512 results or 16 MiB, when the oldest has waited for 5 ms, or when a caller waits
/// in [`flush`](Self::flush). A failed write is retried until it succeeds. It is reported to observers
/// ([`Event::StoreFailed`]) and to callers of `flush`, logged, and counted in [`stats`](Self::stats). A batch that fails
/// with a permanent error is split in halves, so that one entry does not block the others. Only an entry that can
/// never be written is given up, and reported in the same ways: one that the store refuses with
/// [`ErrorKind::Config`], or permanently while it accepts others of the same kind.
///
/// Clones share one journal. The first entry starts the one task that writes. When the last clone is dropped, the task
/// writes the rest, retries for at most ten seconds, and ends. Call `flush` before the runtime stops.
///
/// ```
/// use std::sync::Arc;
/// use throughline::store::{Commit, Memory, NewItem, NewRun, Note, Store};
/// use throughline::store::Journal;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
/// let store = Arc::new(Memory::new());
/// let run = store.create_run(NewRun::new("", "classes").items([NewItem::new("a", "1")])).await?.run;
///
/// let journal = Journal::new(store.clone());
/// for movement in ["plank", "bridge"] {
///     let note = Note::new(run, "movement", format!("{movement:?}"));
///     journal.write(Commit::new().notes([note])); // returns at once
/// }
/// journal.flush().await?;
/// assert_eq!(store.log(run, 1, 10).await?.len(), 2);
/// assert_eq!(journal.stats().commits, 1);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Journal(Arc<Handle>);

/// The counters of a journal ([`Journal::stats`]).
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct JournalStats {
    /// Successful commits, each one round trip.
    pub commits: u64,
    /// Successful writes of intents, each one round trip.
    pub intent_writes: u64,
    /// Written replies, settlements, notes and ends of intents.
    pub written: u64,
    /// Items that its commits settled.
    pub settled: u64,
    /// Settlements that were fenced, because the item had changed hands.
    pub fenced: u64,
    /// Failed writes. They were retried.
    pub failures: u64,
    /// Entries that were given up: the store can never keep them, or stayed away after the journal was closed.
    pub given_up: u64,
    /// Entries and intents that are not written yet.
    pub waiting: usize,
    /// The error of the newest failure.
    pub last_error: Option<Error>,
}

struct Handle(Arc<Core>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.lock().buffer.close();
        self.0.wake.notify_one();
    }
}

struct Core {
    store: Arc<dyn Store>,
    observers: Arc<Observers>,
    state: Mutex<State>,
    wake: Notify,
    progress: watch::Sender<Progress>,
}

struct State {
    buffer: WriteBuffer,
    stats: JournalStats,
    /// Whether a writer task runs.
    running: bool,
    /// The time since when the writes of a closed journal fail.
    failing_since: Option<Instant>,
    /// The waits after permanent refusals in a row.
    refusals: Jittered,
}

/// The progress that waiting callers see.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Progress {
    reached: Positions,
    failures: u64,
    given_up: u64,
    /// The number of times that the writer task has stopped, by itself or with its runtime.
    stops: u64,
}

impl Journal {
    /// Creates a journal in front of `store`.
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self::observed(store, Arc::default())
    }

    pub(crate) fn observed(store: Arc<dyn Store>, observers: Arc<Observers>) -> Self {
        Self(Arc::new(Handle(Arc::new(Core {
            store,
            observers,
            state: Mutex::new(State {
                buffer: WriteBuffer::new(LIMITS),
                stats: JournalStats::default(),
                running: false,
                failing_since: None,
                refusals: backoff(),
            }),
            wake: Notify::new(),
            progress: watch::Sender::default(),
        }))))
    }

    fn core(&self) -> &Arc<Core> {
        &self.0.0
    }

    pub(crate) fn store(&self) -> &Arc<dyn Store> {
        &self.core().store
    }

    /// Hands a commit over and returns at once. Commits are written in order, and the rows of one commit in one
    /// transaction, unless they are more than 512 entries or 16 MiB.
    ///
    /// Called outside of a runtime, it keeps the rows until a call of [`flush`](Self::flush) or `write` inside of one.
    pub fn write(&self, commit: Commit) {
        let mut state = self.core().lock();
        let first = state.buffer.waiting() == 0;
        state.buffer.push(commit, Instant::now());
        let wake = first || state.buffer.is_due();
        self.core().ensure_writer(state, wake);
    }

    /// Writes down calls that are about to be sent, and returns when they are written. Intents of concurrent callers are
    /// written together.
    ///
    /// # Cancel safety
    /// If the future is dropped, the intents may be written all the same.
    pub async fn put_intents(&self, intents: impl IntoIterator<Item = Intent>) {
        let until = self.core().change(|buffer| buffer.push_intents(intents));
        self.wait_for(|progress| progress.reached.intents >= until)
            .await;
    }

    /// Waits until `reached` holds. Starts the writer if it has stopped with its runtime.
    async fn wait_for(&self, reached: impl Fn(&Progress) -> bool) -> Progress {
        let mut progress = self.core().progress.subscribe();
        loop {
            let now = *progress.borrow_and_update();
            if reached(&now) {
                return now;
            }
            self.core().ensure_writer(self.core().lock(), false);
            // The sender lives as long as we do.
            let _ = progress.changed().await;
        }
    }

    /// Waits until everything is written that was handed over before the call.
    ///
    /// # Errors
    /// The first failure while it waits. The rows are still retried in the background, and another flush waits for them.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing.
    pub async fn flush(&self) -> Result<()> {
        let before = *self.core().progress.borrow();
        let until = self.core().change(WriteBuffer::flush_until);
        let over = |now: &Progress| {
            now.reached.entries >= until
                || (now.failures, now.given_up) != (before.failures, before.given_up)
        };
        let now = self.wait_for(over).await;
        let failed = now.given_up > before.given_up || now.reached.entries < until;
        match self.core().lock().stats.last_error.clone() {
            Some(error) if failed => Err(error),
            _ => Ok(()),
        }
    }

    /// Waits until few enough results wait for the store. Called before a result is produced.
    pub(crate) async fn capacity(&self) {
        let has_capacity = |_: &Progress| self.core().lock().buffer.has_capacity();
        self.wait_for(has_capacity).await;
    }

    /// Returns a reply that is not in the store yet.
    pub(crate) fn unwritten_reply(&self, key: &MemoKey) -> Option<Generation> {
        self.core().lock().buffer.reply(key).cloned()
    }

    /// Returns the counters so far.
    pub fn stats(&self) -> JournalStats {
        let state = self.core().lock();
        JournalStats {
            waiting: state.buffer.waiting(),
            ..state.stats.clone()
        }
    }
}

/// The reason why rows were not written.
enum WriteFailure {
    /// The store says that it can never keep these rows.
    Rejected(Error),
    /// The store refuses the rows permanently, without saying that they are the cause.
    Permanent(Error),
    /// The journal is closed and its store stayed away.
    TooLate(Error),
}

/// Replaces the last part by its two halves.
fn halve<T>(parts: &mut Vec<Vec<T>>) {
    if let Some(mut first) = parts.pop() {
        let second = first.split_off(first.len() / 2);
        parts.extend([second, first]);
    }
}

fn backoff() -> Jittered {
    Jittered::new(WAITS.0, WAITS.1)
}

/// The entries of a batch in parts, the next part last. Dropped with the runtime, it returns them to the buffer, and a
/// caller that waits or writes in another runtime starts a writer there.
struct UnwrittenEntries<'a> {
    core: &'a Core,
    stack: Vec<Vec<Entry>>,
    /// Entries that were refused one by one, while it is open whether they or the store are the cause.
    rejected_entries: Vec<Entry>,
}

impl Drop for UnwrittenEntries<'_> {
    fn drop(&mut self) {
        if !(self.stack.is_empty() && self.rejected_entries.is_empty()) {
            let rejected_entries = std::mem::take(&mut self.rejected_entries).into_iter();
            let entries = rejected_entries.chain(self.stack.drain(..).rev().flatten());
            let entries = entries.collect();
            self.core.lock().buffer.give_back(entries, Instant::now());
        }
    }
}

/// The intents of a batch in parts; see [`UnwrittenEntries`].
struct UnwrittenIntents<'a> {
    core: &'a Core,
    stack: Vec<Vec<Intent>>,
}

impl Drop for UnwrittenIntents<'_> {
    fn drop(&mut self) {
        if !self.stack.is_empty() {
            let intents = self.stack.drain(..).rev().flatten().collect();
            self.core.lock().buffer.give_back_intents(intents);
        }
    }
}

/// A running writer. When it stops, it wakes the waiting callers, one of which starts another.
struct Writer(Arc<Core>);

impl Drop for Writer {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.running = false;
        self.0.progress.send_modify(|progress| progress.stops += 1);
    }
}

impl fmt::Debug for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Journal")
            .field("store", &self.core().store.name())
            .field("stats", &self.stats())
            .finish()
    }
}

impl Core {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Changes the buffer and wakes the writer.
    fn change(self: &Arc<Self>, change: impl FnOnce(&mut WriteBuffer) -> u64) -> u64 {
        let mut state = self.lock();
        let until = change(&mut state.buffer);
        self.ensure_writer(state, true);
        until
    }

    /// Starts a writer if there is none, and wakes it if there is something new to do.
    fn ensure_writer(self: &Arc<Self>, mut state: MutexGuard<'_, State>, wake: bool) {
        let idle = !state.running && state.buffer.waiting() > 0;
        let runtime = idle.then(runtime::Handle::try_current).and_then(Result::ok);
        state.running |= runtime.is_some();
        // A runtime that shuts down drops the task at once, and then its guard takes the lock.
        drop(state);
        if let Some(runtime) = runtime {
            let writer = Writer(Arc::clone(self));
            runtime.spawn(async move { writer.0.run().await });
        }
        if wake {
            self.wake.notify_one();
        }
    }

    async fn run(&self) {
        loop {
            let next = self.lock().buffer.next(Instant::now());
            match next {
                Next::Write(batch) => self.write(batch).await,
                Next::Wait(Some(due)) => tokio::select! {
                    () = self.wake.notified() => {}
                    () = sleep_until(due) => {}
                },
                Next::Wait(None) => self.wake.notified().await,
                Next::End => return,
            }
        }
    }

    /// Writes intents and entries concurrently, because a caller that waits for an intent holds a permit of the lane.
    async fn write(&self, batch: Batch) {
        let Batch { intents, entries } = batch;
        future::join(self.write_intents(intents), self.write_entries(entries)).await;
    }

    async fn write_intents(&self, intents: Vec<Intent>) {
        let mut parts = UnwrittenIntents {
            core: self,
            stack: vec![intents],
        };
        while let Some(intents) = parts.stack.last() {
            if intents.is_empty() {
                parts.stack.pop();
                continue;
            }
            let many = intents.len();
            let done = self
                .write_with_retries(|| {
                    self.store
                        .commit(Commit::new().intents(intents.iter().cloned()))
                })
                .await;
            let error = match done {
                Ok(_) => None,
                Err(WriteFailure::TooLate(error)) => Some(error),
                Err(_) if many > 1 => {
                    halve(&mut parts.stack);
                    continue;
                }
                Err(WriteFailure::Rejected(error)) => Some(error),
                Err(WriteFailure::Permanent(error)) => {
                    if self.pause_after_refusal(&error).await {
                        continue;
                    }
                    Some(error)
                }
            };
            let mut state = self.lock();
            state.buffer.done(&[], many);
            match error {
                None => state.stats.intent_writes += 1,
                Some(error) => self.give_up(&mut state, many, error),
            }
            self.publish(state);
            parts.stack.pop();
        }
    }

    async fn write_entries(&self, entries: Vec<Entry>) {
        // A refused batch is split in halves until the rejected entries are found and all others are written.
        let mut parts = UnwrittenEntries {
            core: self,
            stack: vec![entries],
            rejected_entries: Vec::new(),
        };
        // The kinds of which the store has accepted an entry of this batch.
        let mut taken = [false; Entry::KINDS];
        let mut refused = None;
        while let Some(entries) = parts.stack.last() {
            if entries.is_empty() {
                parts.stack.pop();
                continue;
            }
            let done = self
                .write_with_retries(|| self.store.commit(commit_of(entries)))
                .await;
            let result = match done {
                Ok(committed) => Ok(committed.items.len() as u64),
                Err(WriteFailure::TooLate(error)) => Err(error),
                Err(_) if entries.len() > 1 => {
                    halve(&mut parts.stack);
                    continue;
                }
                Err(WriteFailure::Rejected(error)) => Err(error),
                Err(WriteFailure::Permanent(error)) => {
                    parts
                        .rejected_entries
                        .extend(parts.stack.pop().into_iter().flatten());
                    refused = Some(error);
                    if parts.rejected_entries.len() >= MAX_REJECTED
                        && taken == [false; Entry::KINDS]
                    {
                        break;
                    }
                    continue;
                }
            };
            let mut state = self.lock();
            state.buffer.done(entries, 0);
            match result {
                Ok(settled) => {
                    let settlements = entries.iter();
                    let settlements =
                        settlements.filter(|entry| matches!(entry, Entry::Settlement(_)));
                    state.stats.commits += 1;
                    state.stats.written += entries.len() as u64;
                    state.stats.settled += settled;
                    state.stats.fenced += settlements.count() as u64 - settled;
                    entries.iter().for_each(|entry| taken[entry.kind()] = true);
                }
                Err(error) => self.give_up(&mut state, entries.len(), error),
            }
            self.publish(state);
            parts.stack.pop();
        }
        if let Some(error) = refused {
            self.drop_rejected(&mut parts.rejected_entries, taken, error)
                .await;
            // The rest goes back to the buffer and is written with later entries.
        }
    }

    /// Gives up the entries that the store has refused while it accepted others of their kind. Waits for the rest: the store
    /// may be the cause, and then no paid reply is given up.
    async fn drop_rejected(
        &self,
        rejected_entries: &mut Vec<Entry>,
        taken: [bool; Entry::KINDS],
        error: Error,
    ) {
        let rejected = |entry: &mut Entry| taken[entry.kind()];
        let rejected: Vec<_> = rejected_entries.extract_if(.., rejected).collect();
        if !rejected.is_empty() {
            let mut state = self.lock();
            state.buffer.done(&rejected, 0);
            self.give_up(&mut state, rejected.len(), error.clone());
            self.publish(state);
        }
        if !rejected_entries.is_empty() && !self.pause_after_refusal(&error).await {
            let mut state = self.lock();
            state.buffer.done(rejected_entries, 0);
            self.give_up(&mut state, rejected_entries.len(), error);
            self.publish(state);
            rejected_entries.clear();
        }
    }

    /// Retries until the write succeeds or is refused, or the journal has been closed for too long.
    async fn write_with_retries<T, F: Future<Output = Result<T>>>(
        &self,
        write: impl Fn() -> F,
    ) -> Result<T, WriteFailure> {
        let mut backoff = backoff();
        loop {
            let error = match write().await {
                Ok(done) => {
                    let mut state = self.lock();
                    (state.failing_since, state.refusals) = (None, self::backoff());
                    return Ok(done);
                }
                Err(error) if error.kind() == ErrorKind::Config => {
                    return Err(WriteFailure::Rejected(error));
                }
                Err(error) if !error.is_temporary() => return Err(WriteFailure::Permanent(error)),
                Err(error) => error,
            };
            if !self.may_retry(&error) {
                return Err(WriteFailure::TooLate(error));
            }
            sleep(backoff.next()).await;
        }
    }

    /// Waits after a write that the store has refused permanently, longer each time in a row. Returns whether to try again.
    async fn pause_after_refusal(&self, error: &Error) -> bool {
        let may_retry = self.may_retry(error);
        if may_retry {
            let wait = self.lock().refusals.next();
            sleep(wait).await;
        }
        may_retry
    }

    /// Counts and reports a failure. Returns whether to try again: a closed journal stops after a while.
    fn may_retry(&self, error: &Error) -> bool {
        let mut state = self.lock();
        state.stats.failures += 1;
        state.stats.last_error = Some(error.clone());
        let waiting = state.buffer.waiting();
        let may_retry = !state.buffer.is_closed() || {
            let since = *state.failing_since.get_or_insert_with(Instant::now);
            since.elapsed() < CLOSED_RETRY_TIME
        };
        self.publish(state);
        tracing::warn!(%error, waiting, "results wait for the store");
        self.observers.tell(|| Event::StoreFailed {
            error: error.clone(),
            waiting,
        });
        may_retry
    }

    fn give_up(&self, state: &mut State, entries: usize, error: Error) {
        tracing::error!(%error, entries, "entries are given up: the store cannot keep them");
        state.stats.given_up += entries as u64;
        state.stats.last_error = Some(error);
    }

    fn publish(&self, state: MutexGuard<'_, State>) {
        let progress = Progress {
            reached: state.buffer.reached(),
            failures: state.stats.failures,
            given_up: state.stats.given_up,
            stops: self.progress.borrow().stops,
        };
        // Under the lock, so that the progress that callers see never decreases.
        self.progress.send_replace(progress);
        drop(state);
    }
}
