//! [`WriteBuffer`]: the rows that wait to be written, and when to write them. A pure state machine: time is an argument.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use crate::store::{Commit, Generation, Intent, IntentName, MemoKey, Note, Settlement};

/// One row to write.
#[derive(Debug, Clone)]
pub(super) enum Entry {
    Generation(Generation),
    Settlement(Settlement),
    EndedIntent(IntentName),
    Note(Note),
}

impl Entry {
    /// Returns the approximate number of bytes that the row adds to a commit.
    fn bytes(&self) -> usize {
        /// Numbers, keys and separators.
        const FIXED: usize = 128;
        let texts = match self {
            Self::Generation(generation) => generation.tenant.len() + generation.body.len(),
            Self::Settlement(settlement) => match &settlement.result {
                Ok(output) => output.len(),
                Err(error) => error.message().len(),
            },
            Self::EndedIntent(_) => 0,
            Self::Note(note) => note.kind.len() + note.data.len(),
        };
        FIXED + texts
    }

    /// Returns the index of the row's kind, below [`KINDS`](Self::KINDS). A store that accepts one row of a kind can accept
    /// others.
    pub(super) fn kind(&self) -> usize {
        match self {
            Self::Generation(_) => 0,
            Self::Settlement(_) => 1,
            Self::EndedIntent(_) => 2,
            Self::Note(_) => 3,
        }
    }

    pub(super) const KINDS: usize = 4;
}

/// The limits of a commit and of the buffer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// The most entries in one commit.
    pub(super) batch: usize,
    /// The most bytes in one commit, unless a single entry is larger.
    pub(super) batch_bytes: usize,
    /// The number of waiting entries and intents from which on callers should wait.
    pub(super) max_waiting: usize,
    /// The number of waiting bytes from which on callers should wait.
    pub(super) max_waiting_bytes: usize,
    /// The longest time that an entry waits for others.
    pub(super) linger: Duration,
}

/// The rows to write next: intents in one call, entries in another.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) intents: Vec<Intent>,
    pub(super) entries: Vec<Entry>,
}

#[derive(Debug)]
pub(super) enum Next {
    Write(Batch),
    /// There is nothing to do until this time or until more rows come.
    Wait(Option<Instant>),
    /// The buffer is closed and everything is written.
    End,
}

/// Rows in the order in which they came. A row leaves with a batch and counts as waiting until [`done`](Self::done)
/// confirms that the batch is written.
#[derive(Debug)]
pub(super) struct WriteBuffer {
    limits: Limits,
    entries: VecDeque<Entry>,
    /// The bytes of `entries`, and those of all entries that are not confirmed.
    queued_bytes: usize,
    waiting_bytes: usize,
    intents: VecDeque<Intent>,
    /// The position of the last entry of each commit that is not confirmed.
    ends: VecDeque<u64>,
    /// Replies that are not confirmed to be in the store.
    replies: HashMap<MemoKey, Generation>,
    /// The time when the oldest entry came.
    since: Option<Instant>,
    /// The numbers of rows that have come, and of those that are confirmed.
    entered: Positions,
    done: Positions,
    /// The position up to which entries are to be written at once.
    flush_until: u64,
    closed: bool,
}

/// Positions in the sequences of entries and intents.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Positions {
    pub(super) entries: u64,
    pub(super) intents: u64,
}

impl WriteBuffer {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            entries: VecDeque::new(),
            queued_bytes: 0,
            waiting_bytes: 0,
            intents: VecDeque::new(),
            ends: VecDeque::new(),
            replies: HashMap::new(),
            since: None,
            entered: Positions::default(),
            done: Positions::default(),
            flush_until: 0,
            closed: false,
        }
    }

    pub(super) fn push(&mut self, commit: Commit, now: Instant) {
        let before = self.entries.len();
        for generation in commit.generations {
            // The first reply under a key stays, here as in the store.
            let known = self.replies.entry(generation.key);
            known.or_insert_with(|| generation.clone());
            self.entries.push_back(Entry::Generation(generation));
        }
        self.entries
            .extend(commit.ended_intents.into_iter().map(Entry::EndedIntent));
        self.entries
            .extend(commit.notes.into_iter().map(Entry::Note));
        let settlements = commit.settlements.into_iter();
        self.entries.extend(settlements.map(Entry::Settlement));
        let new = self.entries.len() - before;
        let bytes = self
            .entries
            .range(before..)
            .map(Entry::bytes)
            .sum::<usize>();
        self.queued_bytes += bytes;
        self.waiting_bytes += bytes;
        self.entered.entries += new as u64;
        if new > 0 {
            self.ends.push_back(self.entered.entries);
            self.since.get_or_insert(now);
        }
    }

    pub(super) fn push_intents(&mut self, intents: impl IntoIterator<Item = Intent>) -> u64 {
        for intent in intents {
            self.intents.push_back(intent);
            self.entered.intents += 1;
        }
        self.entered.intents
    }

    /// Returns whether the writer has something to do at once.
    pub(super) fn is_due(&self) -> bool {
        !self.intents.is_empty() || self.is_batch() || self.closed
    }

    /// Returns whether there is enough for a full commit.
    fn is_batch(&self) -> bool {
        self.entries.len() >= self.limits.batch || self.queued_bytes >= self.limits.batch_bytes
    }

    /// Returns whether callers may add more rows.
    pub(super) fn has_capacity(&self) -> bool {
        self.waiting() < self.limits.max_waiting
            && self.waiting_bytes < self.limits.max_waiting_bytes
    }

    /// Makes all present entries due. Returns the position of the last one.
    pub(super) fn flush_until(&mut self) -> u64 {
        self.flush_until = self.entered.entries;
        self.flush_until
    }

    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    pub(super) fn next(&mut self, now: Instant) -> Next {
        let due = self.since.map(|since| since + self.limits.linger);
        let flushing = self.flush_until > self.done.entries || self.closed;
        let write = !self.entries.is_empty()
            && (flushing || self.is_batch() || due.is_some_and(|due| due <= now));
        if !write && self.intents.is_empty() {
            return match (self.closed, self.entries.is_empty()) {
                (true, true) => Next::End,
                (_, true) => Next::Wait(None),
                (_, false) => Next::Wait(due),
            };
        }
        let intents = self.intents.len().min(self.limits.batch);
        let entries = if write {
            self.take_entries()
        } else {
            Vec::new()
        };
        self.since = (!self.entries.is_empty()).then_some(now);
        Next::Write(Batch {
            intents: self.intents.drain(..intents).collect(),
            entries,
        })
    }

    /// Takes the oldest entries: at least one, and at most as many as a commit may hold. Two settlements of one item, which a
    /// process makes before and after it lost a lease, go into two batches, because a commit may not hold both.
    /// Entries that came in one commit stay together if a batch can hold them.
    fn take_entries(&mut self) -> Vec<Entry> {
        let mut items = HashSet::new();
        let mut bytes = 0;
        let fits = |(place, entry): (usize, &Entry)| {
            bytes += entry.bytes();
            let once = match entry {
                Entry::Settlement(settlement) => items.insert(settlement.hold.item),
                _ => true,
            };
            once && (place == 0 || bytes <= self.limits.batch_bytes)
        };
        let until = self.entries.iter().take(self.limits.batch).enumerate();
        let until = until.map(fits).take_while(|fits| *fits).count();
        let taken = self.entered.entries - self.entries.len() as u64;
        let whole = self
            .ends
            .partition_point(|end| *end <= taken + until as u64);
        let end = self.ends.range(..whole).next_back();
        let until = match end {
            Some(end) if *end > taken => (end - taken) as usize,
            _ => until,
        };
        let taken: Vec<_> = self.entries.drain(..until).collect();
        self.queued_bytes -= taken.iter().map(Entry::bytes).sum::<usize>();
        taken
    }

    /// Puts entries back that were not written. They are the oldest again.
    pub(super) fn give_back(&mut self, entries: Vec<Entry>, now: Instant) {
        for entry in entries.into_iter().rev() {
            self.queued_bytes += entry.bytes();
            self.entries.push_front(entry);
        }
        self.since = Some(now);
    }

    /// Puts intents back that were not written. They are the oldest again.
    pub(super) fn give_back_intents(&mut self, intents: Vec<Intent>) {
        for intent in intents.into_iter().rev() {
            self.intents.push_front(intent);
        }
    }

    /// Confirms that rows are written or given up.
    pub(super) fn done(&mut self, entries: &[Entry], intents: usize) {
        for entry in entries {
            self.waiting_bytes -= entry.bytes();
            if let Entry::Generation(generation) = entry {
                self.replies.remove(&generation.key);
            }
        }
        self.done.entries += entries.len() as u64;
        let done = self.done.entries;
        while self.ends.front().is_some_and(|end| *end <= done) {
            self.ends.pop_front();
        }
        self.done.intents += intents as u64;
    }

    pub(super) fn reached(&self) -> Positions {
        self.done
    }

    pub(super) fn waiting(&self) -> usize {
        let entries = self.entered.entries - self.done.entries;
        (entries + self.entered.intents - self.done.intents) as usize
    }

    pub(super) fn reply(&self, key: &MemoKey) -> Option<&Generation> {
        self.replies.get(key)
    }
}

/// Returns the commit that writes these entries.
pub(super) fn commit_of(entries: &[Entry]) -> Commit {
    let mut commit = Commit::new();
    for entry in entries.iter().cloned() {
        match entry {
            Entry::Generation(generation) => commit.generations.push(generation),
            Entry::Settlement(settlement) => commit.settlements.push(settlement),
            Entry::EndedIntent(name) => commit.ended_intents.push(name),
            Entry::Note(note) => commit.notes.push(note),
        }
    }
    commit
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Hold, ItemId, RunId};

    fn settled(item: i64) -> Commit {
        Commit::new().settlements([Settlement {
            hold: Hold {
                item: ItemId(item),
                epoch: 1,
            },
            result: Ok("1".to_owned()),
        }])
    }

    fn notes(n: usize) -> Commit {
        let note = Note {
            run: RunId(1),
            kind: "k".to_owned(),
            data: "{}".to_owned(),
        };
        Commit::new().notes(vec![note; n])
    }

    fn buffer(batch: usize, linger: Duration) -> WriteBuffer {
        WriteBuffer::new(Limits {
            batch,
            batch_bytes: 10_000,
            max_waiting: 100,
            max_waiting_bytes: 100_000,
            linger,
        })
    }

    fn written(next: Next) -> usize {
        match next {
            Next::Write(batch) => batch.entries.len(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_full_batch_is_due_at_once_and_a_partial_one_after_its_linger_time() {
        let now = Instant::now();
        let linger = Duration::from_millis(5);
        let mut buffer = buffer(4, linger);
        assert!(matches!(buffer.next(now), Next::Wait(None)));
        buffer.push(notes(6), now);
        assert_eq!(written(buffer.next(now)), 4);
        let Next::Wait(Some(due)) = buffer.next(now) else {
            panic!("two entries are left and not due");
        };
        assert_eq!(due, now + linger);
        assert_eq!(written(buffer.next(due)), 2);
        assert_eq!(buffer.waiting(), 6);
        buffer.done(&[], 0);
        assert_eq!(buffer.waiting(), 6);
    }

    #[test]
    fn entries_of_one_commit_stay_together_unless_a_batch_cannot_hold_them() {
        let now = Instant::now();
        let mut buffer = buffer(4, Duration::ZERO);
        for n in [3, 3, 1, 9, 1] {
            buffer.push(notes(n), now);
        }
        let mut sizes = Vec::new();
        while let Next::Write(batch) = buffer.next(now) {
            // A batch is being written while the next one is chosen.
            sizes.push(batch.entries.len());
            if sizes.len() == 2 {
                buffer.give_back(batch.entries, now);
            } else {
                buffer.done(&batch.entries, 0);
            }
        }
        assert_eq!(sizes, [3, 4, 4, 4, 4, 2]);
        assert!(buffer.ends.is_empty());
    }

    #[test]
    fn a_flush_makes_present_entries_due_and_no_later_ones() {
        let now = Instant::now();
        let mut buffer = buffer(4, Duration::from_secs(1));
        buffer.push(notes(1), now);
        assert_eq!(buffer.flush_until(), 1);
        let Next::Write(batch) = buffer.next(now) else {
            panic!("a flush waits");
        };
        buffer.done(&batch.entries, 0);
        buffer.push(notes(1), now);
        assert!(matches!(buffer.next(now), Next::Wait(Some(_))));
        buffer.close();
        assert_eq!(written(buffer.next(now)), 1);
        assert!(matches!(buffer.next(now), Next::End));
    }

    #[test]
    fn two_settlements_of_one_item_go_into_two_batches() {
        let now = Instant::now();
        let mut buffer = buffer(8, Duration::ZERO);
        for item in [1, 2, 1] {
            buffer.push(settled(item), now);
        }
        assert_eq!(written(buffer.next(now)), 2);
        assert_eq!(written(buffer.next(now)), 1);
    }

    #[test]
    fn a_commit_is_bounded_in_bytes_and_a_larger_entry_is_written_alone() {
        let now = Instant::now();
        let mut buffer = buffer(512, Duration::from_secs(1));
        let note = |bytes: usize| {
            Commit::new().notes([Note {
                run: RunId(1),
                kind: "k".to_owned(),
                data: "x".repeat(bytes),
            }])
        };
        for bytes in [4_000, 4_000, 4_000, 50_000, 4_000] {
            buffer.push(note(bytes), now);
        }
        // There is more than one commit may hold, so only the rest lingers.
        assert!(buffer.has_capacity());
        let mut sizes = Vec::new();
        while let Next::Write(batch) = buffer.next(now) {
            sizes.push(batch.entries.len());
            buffer.done(&batch.entries, 0);
        }
        assert_eq!(sizes, [2, 1, 1]);
        assert_eq!(buffer.waiting(), 1);
        for _ in 0..3 {
            buffer.push(note(40_000), now);
        }
        assert!(!buffer.has_capacity());
        while let Next::Write(batch) = buffer.next(now) {
            buffer.done(&batch.entries, 0);
        }
        assert!(buffer.has_capacity());
        assert_eq!((buffer.queued_bytes, buffer.waiting_bytes), (0, 0));
    }
}
