//! [`Journal`]: results on their way into a store, written in batches behind the work.

mod buffer;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future;
use tokio::runtime;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until};

use self::buffer::{Batch, Entry, Limits, Next, Positions, WriteBuffer, commit_of};
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, Observers};
use crate::store::{Commit, Generation, Intent, MemoKey, Store};

/// Beyond 512 entries or 16 MiB a commit gets longer, and not cheaper; and a database takes no
/// message of a gigabyte. Entries linger for less than a disk takes to write them.
const LIMITS: Limits = Limits {
    batch: 512,
    batch_bytes: 16 << 20,
    max_waiting: 8 * 512,
    max_waiting_bytes: 16 * (16 << 20),
    linger: Duration::from_millis(5),
};
/// The longest wait between two tries.
const LONGEST_DELAY: Duration = Duration::from_secs(2);
/// How many entries are refused, each alone and with nothing taken, before it must be the store.
const MAX_REJECTED: usize = 32;
/// How long a journal that nobody holds any more goes on trying.
const CLOSED_RETRY_TIME: Duration = Duration::from_secs(10);

/// Results on their way into a store: handing them over costs no round trip, and N of them are
/// written in ⌈N / 512⌉.
///
/// They are written when there are 512 or 16 MiB, when the oldest has waited for 5 ms, or when somebody waits in
/// [`flush`](Self::flush). A write that fails is tried again until it succeeds, told to observers
/// ([`Event::StoreFailed`]), logged, counted ([`stats`](Self::stats)), and told to who flushes. A batch
/// that fails with a permanent error is written in halves, so that one entry does not hold up the others.
/// Given up, alone and as loudly, is only an entry that can never be written: the store says
/// [`ErrorKind::Config`] of it, or refuses it for good while it takes others of its kind.
///
/// Clones share one journal. One task writes; it is started by the first entry. When the last clone is dropped, it
/// writes what is left, tries for ten seconds at most, and ends; call `flush` before the runtime stops.
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

/// What a journal has done so far ([`Journal::stats`]).
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct JournalStats {
    /// Commits that succeeded: each a round trip.
    pub commits: u64,
    /// Writes of intents that succeeded: each a round trip.
    pub intent_writes: u64,
    /// Replies, settlements, notes and ended intents that were written.
    pub written: u64,
    /// Items that were settled by it.
    pub settled: u64,
    /// Settlements that came too late: somebody else has decided about the item.
    pub fenced: u64,
    /// Writes that failed. They were tried again.
    pub failures: u64,
    /// Entries that the store can never keep, and those of a closed journal whose store did not come back.
    pub given_up: u64,
    /// Entries that are not written yet.
    pub waiting: usize,
    /// Why the newest failure failed.
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
    /// Whether there is a writer.
    running: bool,
    /// Since when a closed journal's writes fail.
    failing_since: Option<Instant>,
    /// How often in a row the store has refused a write for good.
    refusals: u32,
}

/// What those who wait are told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Progress {
    reached: Positions,
    failures: u64,
    given_up: u64,
    /// How often the writer has stopped, by itself or with its runtime.
    stops: u64,
}

impl Journal {
    /// A journal in front of `store`.
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
                refusals: 0,
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

    /// Takes over what is to be written, in the order in which it comes. What one call takes over is written in one
    /// commit, unless it is more than 512 entries or 16 MiB.
    ///
    /// Outside of a runtime it is kept until somebody calls [`flush`](Self::flush) or writes inside of one.
    pub fn write(&self, commit: Commit) {
        let mut state = self.core().lock();
        let first = state.buffer.waiting() == 0;
        state.buffer.push(commit, Instant::now());
        let wake = first || state.buffer.is_due();
        self.core().ensure_writer(state, wake);
    }

    /// Writes down calls that are about to be sent, and returns when they are: many that come at a
    /// time are written together.
    ///
    /// # Cancel safety
    /// What is dropped may be written still.
    pub async fn put_intents(&self, intents: impl IntoIterator<Item = Intent>) {
        let until = self.core().change(|buffer| buffer.push_intents(intents));
        self.wait_for(|progress| progress.reached.intents >= until)
            .await;
    }

    /// Waits for progress, and becomes the one who starts the writer if it has stopped with its runtime.
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

    /// Returns when all is written that was handed over before.
    ///
    /// # Errors
    /// The first failure that it meets while it waits. What is not written yet is still tried again
    /// behind your back: another flush waits for it.
    ///
    /// # Cancel safety
    /// Dropping it loses nothing.
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

    /// Returns when not too many results wait for the store: to be asked before making more.
    pub(crate) async fn capacity(&self) {
        let has_capacity = |_: &Progress| self.core().lock().buffer.has_capacity();
        self.wait_for(has_capacity).await;
    }

    /// A reply that is not in the store yet.
    pub(crate) fn unwritten_reply(&self, key: &MemoKey) -> Option<Generation> {
        self.core().lock().buffer.reply(key).cloned()
    }

    /// What it has done so far.
    pub fn stats(&self) -> JournalStats {
        let state = self.core().lock();
        JournalStats {
            waiting: state.buffer.waiting(),
            ..state.stats.clone()
        }
    }
}

/// Why something could not be written.
enum WriteFailure {
    /// The store says that it can never keep this.
    Rejected(Error),
    /// The store refuses it for good, and does not say that the data is to blame.
    Permanent(Error),
    /// The journal was closed and its store did not come back.
    TooLate(Error),
}

/// Two halves in the place of the last part.
fn halve<T>(parts: &mut Vec<Vec<T>>) {
    if let Some(mut first) = parts.pop() {
        let second = first.split_off(first.len() / 2);
        parts.extend([second, first]);
    }
}

/// How long to wait after so many tries: 20 ms, 40 ms, 80 ms, …, a part of it drawn by chance.
fn delay(tries: u32) -> Duration {
    let delay = Duration::from_millis(20 << tries.min(10)).min(LONGEST_DELAY);
    delay.mul_f64(0.5 + fastrand::f64() / 2.0)
}

/// What is being written, the next part last. It goes back if the runtime stops in the middle: whoever
/// waits for it or touches the journal in another runtime writes it.
struct UnwrittenEntries<'a> {
    core: &'a Core,
    stack: Vec<Vec<Entry>>,
    /// Entries that were refused alone, while nothing else tells whether that is the fault of the store.
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

/// The same of intents.
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

/// The writer, as long as it runs. When it stops, those who wait are woken: one of them starts another.
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
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what is buffer so that there is something to do at once.
    fn change(self: &Arc<Self>, change: impl FnOnce(&mut WriteBuffer) -> u64) -> u64 {
        let mut state = self.lock();
        let until = change(&mut state.buffer);
        self.ensure_writer(state, true);
        until
    }

    /// Makes sure that somebody writes, and tells it if there is something new to do.
    fn ensure_writer(self: &Arc<Self>, mut state: MutexGuard<'_, State>, wake: bool) {
        let idle = !state.running && state.buffer.waiting() > 0;
        let runtime = idle.then(runtime::Handle::try_current).and_then(Result::ok);
        state.running |= runtime.is_some();
        // A runtime that is being shut down drops what it is to spawn, and the guard takes the lock.
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

    /// Side by side, because who waits for an intent holds a place in the lane.
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
        // Halves of what was refused as a whole: who is to blame is found, and the others are written.
        let mut parts = UnwrittenEntries {
            core: self,
            stack: vec![entries],
            rejected_entries: Vec::new(),
        };
        // The kinds of which the store has taken an entry since the batch was begun.
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
            // Those that are left go back, and next time what has come meanwhile goes with them.
        }
    }

    /// Gives up those rejected_entries that the store has refused while it took others of their kind. For the rest
    /// waits: then it may be the store, and no paid reply is given up for that.
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

    /// Tries until it succeeds, is refused, or has been closed for too long.
    async fn write_with_retries<T, F: Future<Output = Result<T>>>(
        &self,
        write: impl Fn() -> F,
    ) -> Result<T, WriteFailure> {
        let mut tries = 0;
        loop {
            let error = match write().await {
                Ok(done) => {
                    let mut state = self.lock();
                    (state.failing_since, state.refusals) = (None, 0);
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
            sleep(delay(tries)).await;
            tries += 1;
        }
    }

    /// Waits after a write that the store has refused for good, longer each time in a row. False if it is
    /// not to be tried again.
    async fn pause_after_refusal(&self, error: &Error) -> bool {
        let may_retry = self.may_retry(error);
        let refusals = {
            let mut state = self.lock();
            state.refusals = state.refusals.saturating_add(1);
            state.refusals
        };
        if may_retry {
            sleep(delay(refusals)).await;
        }
        may_retry
    }

    /// Counts and tells a failure. Says whether to try again: a journal that is closed does not for ever.
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
        tracing::error!(%error, entries, "given up: the store will never have these");
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
        // Under the lock, so that what they see never goes back.
        self.progress.send_replace(progress);
        drop(state);
    }
}
