//! [`Journal`]: results on their way into a store, written in batches behind the work.

mod pending;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future;
use tokio::runtime;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until};

use self::pending::{Batch, Entry, Limits, Marks, Next, Pending, commit_of};
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, Observers};
use crate::store::{Commit, Generation, Intent, MemoKey, Store};

/// Beyond 512 entries or 16 MiB a commit gets longer, and not cheaper; and a database takes no
/// message of a gigabyte. Entries linger for less than a disk takes to write them.
const LIMITS: Limits = Limits {
    batch: 512,
    batch_bytes: 16 << 20,
    room: 8 * 512,
    room_bytes: 16 * (16 << 20),
    linger: Duration::from_millis(5),
};
/// The longest wait between two tries.
const LONGEST_DELAY: Duration = Duration::from_secs(2);
/// How many entries are refused, each alone and with nothing taken, before it must be the store.
const SUSPECTS: usize = 32;
/// How long a journal that nobody holds any more goes on trying.
const PATIENCE: Duration = Duration::from_secs(10);

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
    reached: Marks,
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
                pending: Pending::new(LIMITS),
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
            self.core().work(self.core().lock(), false);
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
        let until = self.core().enter(Pending::hurry);
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
    pub(crate) async fn room(&self) {
        let has_room = |_: &Progress| self.core().lock().pending.has_room();
        self.wait_for(has_room).await;
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

/// Why something could not be written.
enum Failed {
    /// The store says that it can never keep this.
    Data(Error),
    /// The store refuses it for good, and does not say that the data is to blame.
    Refused(Error),
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
struct Parts<'a> {
    core: &'a Core,
    stack: Vec<Vec<Entry>>,
    /// Entries that were refused alone, while nothing else tells whether that is the fault of the store.
    suspects: Vec<Entry>,
}

impl Drop for Parts<'_> {
    fn drop(&mut self) {
        if !(self.stack.is_empty() && self.suspects.is_empty()) {
            let suspects = std::mem::take(&mut self.suspects).into_iter();
            let entries = suspects.chain(self.stack.drain(..).rev().flatten());
            let entries = entries.collect();
            self.core.lock().pending.give_back(entries, Instant::now());
        }
    }
}

/// The same of intents.
struct IntentParts<'a> {
    core: &'a Core,
    stack: Vec<Vec<Intent>>,
}

impl Drop for IntentParts<'_> {
    fn drop(&mut self) {
        if !self.stack.is_empty() {
            let intents = self.stack.drain(..).rev().flatten().collect();
            self.core.lock().pending.give_back_intents(intents);
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

    /// Changes what is pending so that there is something to do at once.
    fn enter(self: &Arc<Self>, change: impl FnOnce(&mut Pending) -> u64) -> u64 {
        let mut state = self.lock();
        let until = change(&mut state.pending);
        self.work(state, true);
        until
    }

    /// Makes sure that somebody writes, and tells it if there is something new to do.
    fn work(self: &Arc<Self>, mut state: MutexGuard<'_, State>, wake: bool) {
        let idle = !state.running && state.pending.waiting() > 0;
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
        let mut parts = IntentParts {
            core: self,
            stack: vec![intents],
        };
        while let Some(intents) = parts.stack.last() {
            if intents.is_empty() {
                parts.stack.pop();
                continue;
            }
            let many = intents.len();
            let done = self.persist(|| self.store.put_intents(intents)).await;
            let error = match done {
                Ok(()) => None,
                Err(Failed::TooLate(error)) => Some(error),
                Err(_) if many > 1 => {
                    halve(&mut parts.stack);
                    continue;
                }
                Err(Failed::Data(error)) => Some(error),
                Err(Failed::Refused(error)) => {
                    if self.pause(&error).await {
                        continue;
                    }
                    Some(error)
                }
            };
            let mut state = self.lock();
            state.pending.done(&[], many);
            match error {
                None => state.stats.intent_writes += 1,
                Some(error) => self.give_up(&mut state, many, error),
            }
            self.tell(state);
            parts.stack.pop();
        }
    }

    async fn write_entries(&self, entries: Vec<Entry>) {
        // Halves of what was refused as a whole: who is to blame is found, and the others are written.
        let mut parts = Parts {
            core: self,
            stack: vec![entries],
            suspects: Vec::new(),
        };
        // The kinds of which the store has taken an entry since the batch was begun.
        let mut taken = [false; Entry::KINDS];
        let mut refused = None;
        while let Some(entries) = parts.stack.last() {
            if entries.is_empty() {
                parts.stack.pop();
                continue;
            }
            let done = self.persist(|| self.store.commit(commit_of(entries))).await;
            let result = match done {
                Ok(committed) => Ok(committed.items.len() as u64),
                Err(Failed::TooLate(error)) => Err(error),
                Err(_) if entries.len() > 1 => {
                    halve(&mut parts.stack);
                    continue;
                }
                Err(Failed::Data(error)) => Err(error),
                Err(Failed::Refused(error)) => {
                    parts
                        .suspects
                        .extend(parts.stack.pop().into_iter().flatten());
                    refused = Some(error);
                    if parts.suspects.len() >= SUSPECTS && taken == [false; Entry::KINDS] {
                        break;
                    }
                    continue;
                }
            };
            let mut state = self.lock();
            state.pending.done(entries, 0);
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
            self.tell(state);
            parts.stack.pop();
        }
        if let Some(error) = refused {
            self.judge(&mut parts.suspects, taken, error).await;
            // Those that are left go back, and next time what has come meanwhile goes with them.
        }
    }

    /// Gives up those suspects that the store has refused while it took others of their kind. For the rest
    /// waits: then it may be the store, and no paid reply is given up for that.
    async fn judge(&self, suspects: &mut Vec<Entry>, taken: [bool; Entry::KINDS], error: Error) {
        let blamed = |entry: &mut Entry| taken[entry.kind()];
        let blamed: Vec<_> = suspects.extract_if(.., blamed).collect();
        if !blamed.is_empty() {
            let mut state = self.lock();
            state.pending.done(&blamed, 0);
            self.give_up(&mut state, blamed.len(), error.clone());
            self.tell(state);
        }
        if !suspects.is_empty() && !self.pause(&error).await {
            let mut state = self.lock();
            state.pending.done(suspects, 0);
            self.give_up(&mut state, suspects.len(), error);
            self.tell(state);
            suspects.clear();
        }
    }

    /// Tries until it succeeds, is refused, or has been closed for too long.
    async fn persist<T, F: Future<Output = Result<T>>>(
        &self,
        write: impl Fn() -> F,
    ) -> Result<T, Failed> {
        let mut tries = 0;
        loop {
            let error = match write().await {
                Ok(done) => {
                    let mut state = self.lock();
                    (state.failing_since, state.refusals) = (None, 0);
                    return Ok(done);
                }
                Err(error) if error.kind() == ErrorKind::Config => return Err(Failed::Data(error)),
                Err(error) if !error.is_temporary() => return Err(Failed::Refused(error)),
                Err(error) => error,
            };
            if !self.goes_on(&error) {
                return Err(Failed::TooLate(error));
            }
            sleep(delay(tries)).await;
            tries += 1;
        }
    }

    /// Waits after a write that the store has refused for good, longer each time in a row. False if it is
    /// not to be tried again.
    async fn pause(&self, error: &Error) -> bool {
        let goes_on = self.goes_on(error);
        let refusals = {
            let mut state = self.lock();
            state.refusals = state.refusals.saturating_add(1);
            state.refusals
        };
        if goes_on {
            sleep(delay(refusals)).await;
        }
        goes_on
    }

    /// Counts and tells a failure. Says whether to try again: a journal that is closed does not for ever.
    fn goes_on(&self, error: &Error) -> bool {
        let mut state = self.lock();
        state.stats.failures += 1;
        state.stats.last_error = Some(error.clone());
        let waiting = state.pending.waiting();
        let goes_on = !state.pending.is_closed() || {
            let since = *state.failing_since.get_or_insert_with(Instant::now);
            since.elapsed() < PATIENCE
        };
        self.tell(state);
        tracing::warn!(%error, waiting, "results wait for the store");
        self.observers.tell(|| Event::StoreFailed {
            error: error.clone(),
            waiting,
        });
        goes_on
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
            stops: self.progress.borrow().stops,
        };
        // Under the lock, so that what they see never goes back.
        self.progress.send_replace(progress);
        drop(state);
    }
}
