//! [`Journal`]: results on their way into a store, written in batches behind the work.

mod pending;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future;
use tokio::runtime;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};

use self::pending::{Batch, Entry, Marks, Next, Pending, commit_of};
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, Observers};
use crate::store::{Commit, Generation, Intent, MemoKey, Store};

/// How many entries go into one commit: beyond it a commit gets longer, and not cheaper.
const BATCH: usize = 512;
/// How long an entry may wait for others: less than a disk takes to write it.
const LINGER: Duration = Duration::from_millis(5);
/// As many may wait; then [`Journal::room`] does.
const ROOM: usize = 8 * BATCH;
/// How long a journal that nobody holds any more goes on trying.
const PATIENCE: Duration = Duration::from_secs(10);

/// Results on their way into a store: handing them over costs no round trip, and N of them are
/// written in ⌈N / 512⌉.
///
/// They are written when there are 512, when the oldest has waited for 5 ms, or when somebody waits in
/// [`flush`](Self::flush). A write that fails is tried again until it succeeds, told to observers
/// ([`Event::StoreFailed`]), logged, counted ([`stats`](Self::stats)), and told to who flushes. Only
/// what [`Commit::check`] refuses is given up, alone and as loudly.
///
/// Clones share one journal. One task writes; it is started by the first entry. When the last clone is dropped, it
/// writes what is left, tries for ten seconds at most, and ends; call `flush` before the runtime stops.
///
/// ```
/// use std::sync::Arc;
/// use throughline::store::{Commit, Memory, NewItem, NewRun, Note, Store};
/// use throughline::Journal;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
/// let store = Arc::new(Memory::new());
/// let run = store.create_run(NewRun::new("", "classes").items([NewItem::new("a", "1")])).await?.run;
///
/// let journal = Journal::new(store.clone());
/// for movement in ["plank", "bridge"] {
///     let (kind, data) = ("movement".to_owned(), format!("{movement:?}"));
///     journal.write(Commit::new().notes([Note { run, kind, data }])); // returns at once
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
    /// Entries that no store can keep, and those of a closed journal whose store did not come back.
    pub given_up: u64,
    /// Entries that are not written yet.
    pub waiting: usize,
    /// Why the newest failure failed.
    pub last_error: Option<Error>,
}

struct Handle(Arc<Core>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.lock().pending.close();
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
    pending: Pending,
    stats: JournalStats,
    task: Option<JoinHandle<()>>,
}

/// What those who wait are told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Progress {
    reached: Marks,
    failures: u64,
    given_up: u64,
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
                pending: Pending::new(BATCH, LINGER),
                stats: JournalStats::default(),
                task: None,
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
    /// commit, unless it is more than 512 entries.
    ///
    /// Outside of a runtime it is kept until somebody calls [`flush`](Self::flush) or writes inside of one.
    pub fn write(&self, commit: Commit) {
        let mut state = self.core().lock();
        let first = state.pending.waiting() == 0;
        state.pending.push(commit, Instant::now());
        let wake = first || state.pending.is_due();
        self.core().work(state, wake);
    }

    /// Writes down calls that are about to be sent, and returns when they are: many that come at a
    /// time are written together.
    ///
    /// # Cancel safety
    /// What is dropped may be written still.
    pub async fn intend(&self, intents: impl IntoIterator<Item = Intent>) {
        let until = self.core().enter(|pending| pending.push_intents(intents));
        let mut progress = self.core().progress.subscribe();
        // The sender lives as long as we do.
        let reached = |progress: &Progress| progress.reached.intents >= until;
        let _ = progress.wait_for(reached).await;
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
        let mut progress = self.core().progress.subscribe();
        let before = *progress.borrow_and_update();
        let until = self.core().enter(Pending::hurry);
        let over = |now: &Progress| {
            now.reached.entries >= until
                || (now.failures, now.given_up) != (before.failures, before.given_up)
        };
        let now = progress.wait_for(over).await.map(|now| *now);
        let failed =
            now.is_ok_and(|now| now.given_up > before.given_up || now.reached.entries < until);
        match self.core().lock().stats.last_error.clone() {
            Some(error) if failed => Err(error),
            _ => Ok(()),
        }
    }

    /// Returns when not too many results wait for the store: to be asked before making more.
    pub(crate) async fn room(&self) {
        let mut progress = self.core().progress.subscribe();
        while self.core().lock().pending.waiting() >= ROOM {
            if progress.changed().await.is_err() {
                return;
            }
        }
    }

    /// A reply that is not in the store yet.
    pub(crate) fn unwritten(&self, key: &MemoKey) -> Option<Generation> {
        self.core().lock().pending.reply(key).cloned()
    }

    /// What it has done so far.
    pub fn stats(&self) -> JournalStats {
        let state = self.core().lock();
        JournalStats {
            waiting: state.pending.waiting(),
            ..state.stats.clone()
        }
    }
}

/// What is being written, the next part last. It goes back if the runtime stops in the middle: whoever
/// touches the journal in another one writes it.
struct Parts<'a> {
    core: &'a Core,
    stack: Vec<Vec<Entry>>,
}

impl Drop for Parts<'_> {
    fn drop(&mut self) {
        if !self.stack.is_empty() {
            let entries = self.stack.drain(..).rev().flatten().collect();
            self.core.lock().pending.give_back(entries, Instant::now());
        }
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

    /// Changes what is pending so that there is something to do at once.
    fn enter(self: &Arc<Self>, change: impl FnOnce(&mut Pending) -> u64) -> u64 {
        let mut state = self.lock();
        let until = change(&mut state.pending);
        self.work(state, true);
        until
    }

    /// Makes sure that somebody writes, and tells it if there is something new to do.
    fn work(self: &Arc<Self>, mut state: MutexGuard<'_, State>, wake: bool) {
        // One whose runtime has stopped is finished too.
        let idle = state.task.as_ref().is_none_or(JoinHandle::is_finished);
        if idle
            && state.pending.waiting() > 0
            && let Ok(runtime) = runtime::Handle::try_current()
        {
            state.task = Some(runtime.spawn(Arc::clone(self).run()));
        }
        drop(state);
        if wake {
            self.wake.notify_one();
        }
    }

    async fn run(self: Arc<Self>) {
        loop {
            let next = self.lock().pending.next(Instant::now());
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
        if intents.is_empty() {
            return;
        }
        let done = self.persist(|| self.store.put_intents(&intents)).await;
        let mut state = self.lock();
        state.pending.done(&[], intents.len());
        match done {
            Ok(()) => state.stats.intent_writes += 1,
            Err(error) => self.give_up(&mut state, intents.len(), error),
        }
        self.tell(state);
    }

    async fn write_entries(&self, entries: Vec<Entry>) {
        // Halves of what was refused as a whole: who is to blame is found, and the others are written.
        let mut parts = Parts {
            core: self,
            stack: vec![entries],
        };
        while let Some(entries) = parts.stack.last_mut() {
            if entries.is_empty() {
                parts.stack.pop();
                continue;
            }
            let settlements = entries
                .iter()
                .filter(|entry| matches!(entry, Entry::Settlement(_)))
                .count();
            let done = self.persist(|| self.store.commit(commit_of(entries))).await;
            let mut state = self.lock();
            match done {
                Ok(committed) => {
                    state.stats.commits += 1;
                    state.stats.written += entries.len() as u64;
                    state.stats.settled += committed.items.len() as u64;
                    state.stats.fenced += (settlements - committed.items.len()) as u64;
                }
                Err(error) if error.kind() == ErrorKind::Config && entries.len() > 1 => {
                    let half = entries.split_off(entries.len() / 2);
                    let first = std::mem::replace(entries, half);
                    parts.stack.push(first);
                    continue;
                }
                Err(error) => self.give_up(&mut state, entries.len(), error),
            }
            state.pending.done(entries, 0);
            parts.stack.pop();
            self.tell(state);
        }
    }

    /// Tries until it succeeds, is refused for what it says, or has been closed for too long.
    async fn persist<T, F: Future<Output = Result<T>>>(&self, write: impl Fn() -> F) -> Result<T> {
        let mut delay = Duration::from_millis(20);
        let mut closed = None;
        loop {
            let error = match write().await {
                Ok(done) => return Ok(done),
                Err(error) if error.kind() == ErrorKind::Config => return Err(error),
                Err(error) => error,
            };
            let (waiting, is_closed) = {
                let mut state = self.lock();
                state.stats.failures += 1;
                state.stats.last_error = Some(error.clone());
                let waiting = state.pending.waiting();
                let is_closed = state.pending.is_closed();
                self.tell(state);
                (waiting, is_closed)
            };
            tracing::warn!(%error, waiting, "results wait for the store");
            self.observers.tell(|| Event::StoreFailed {
                error: error.clone(),
                waiting,
            });
            if is_closed && closed.get_or_insert_with(Instant::now).elapsed() >= PATIENCE {
                return Err(error);
            }
            sleep(delay.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            delay = (delay * 2).min(Duration::from_secs(2));
        }
    }

    fn give_up(&self, state: &mut State, entries: usize, error: Error) {
        tracing::error!(%error, entries, "given up: the store will never have these");
        state.stats.given_up += entries as u64;
        state.stats.last_error = Some(error);
    }

    fn tell(&self, state: MutexGuard<'_, State>) {
        let progress = Progress {
            reached: state.pending.reached(),
            failures: state.stats.failures,
            given_up: state.stats.given_up,
        };
        // Under the lock, so that what they see never goes back.
        self.progress.send_replace(progress);
        drop(state);
    }
}
