//! [`Place`]: where in the work a reply belongs, which is the first half of what it is remembered under.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::hash::{Hash as _, Hasher as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Memo;
use super::retakes::Retakes;
use crate::error::Error;
use crate::request::RequestDigest;
use crate::store::{ItemId, MemoKey};

/// Where a reply belongs: the context, or the innermost item of a batch. What is asked below it is told
/// apart by labels, and identical requests under the same labels by their order.
///
/// An item is named by its key, and without one by its index. A second batch with the same label and keys is the
/// same work and replays. Below an item, a second batch of items without keys is another round: identical
/// requests are counted through, in the innermost item with a key.
pub(crate) struct Place {
    pub(crate) memo: Arc<Memo>,
    pub(crate) tenant: Arc<str>,
    /// The durable item whose calls are written down before they are sent.
    pub(super) intents: Option<Arc<Intents>>,
    name: MemoKey,
    is_item: bool,
    /// What a fresh asking puts into each key.
    fresh: Option<Arc<str>>,
    /// How often each request was asked here.
    asked: Arc<Occurrences>,
    /// The replies that the durable item asks for anew.
    retakes: Option<Arc<Retakes>>,
}

/// The calls of a durable item that are written down before they are sent.
pub(super) struct Intents {
    pub(super) item: ItemId,
    pub(super) attempt: u32,
    /// What became of calls that ended without a reply, whose key the next identical call uses again.
    left: Mutex<HashMap<MemoKey, LeftIntent>>,
}

/// What a call without a reply has left of its intent.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum LeftIntent {
    /// It is on its way out of the store.
    Ended,
    /// It stays listed: the call was dropped, and may have been paid for.
    Ambiguous,
}

impl Intents {
    pub(super) fn leave(&self, key: MemoKey, left: LeftIntent) {
        let mut all = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        // What is listed stays listed.
        let known = all.entry(key).or_insert(left);
        if left == LeftIntent::Ambiguous {
            *known = left;
        }
    }

    pub(super) fn left(&self, key: &MemoKey) -> Option<LeftIntent> {
        let all = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(key).copied()
    }
}

/// How often each request was asked at a place.
#[derive(Default)]
struct Occurrences(Mutex<HashMap<MemoKey, Numbers>>);

/// The numbers of one request: all below `next` are taken, but for those that are free again.
#[derive(Default)]
struct Numbers {
    next: u32,
    free: BTreeSet<u32>,
}

impl Occurrences {
    fn lock(&self) -> MutexGuard<'_, HashMap<MemoKey, Numbers>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, asked: MemoKey) -> u32 {
        let mut all = self.lock();
        let numbers = all.entry(asked).or_default();
        numbers.free.pop_first().unwrap_or_else(|| {
            numbers.next += 1;
            numbers.next - 1
        })
    }

    fn give_back(&self, asked: MemoKey, number: u32) {
        let mut all = self.lock();
        let Some(numbers) = all.get_mut(&asked) else {
            return;
        };
        numbers.free.insert(number);
        while numbers.next > 0 && numbers.free.remove(&(numbers.next - 1)) {
            numbers.next -= 1;
        }
        if numbers.next == 0 {
            all.remove(&asked);
        }
    }
}

/// The number of a request among the identical ones at its place. Dropped, it is free for the next of them: a call
/// that ended without a reply leaves no gap, so that a rerun finds the replies under the same numbers.
pub(super) struct Occurrence {
    occurrences: Arc<Occurrences>,
    asked: MemoKey,
    number: u32,
    has_reply: AtomicBool,
}

impl Occurrence {
    /// There is a reply under this number: it stays taken.
    pub(super) fn keep(&self) {
        self.has_reply.store(true, Ordering::Relaxed);
    }
}

impl Drop for Occurrence {
    fn drop(&mut self) {
        if !*self.has_reply.get_mut() {
            self.occurrences.give_back(self.asked, self.number);
        }
    }
}

/// Tells the items of a batch that have the same key apart, by their order.
///
/// It keeps eight bytes of each key: two keys that share them get other names than they would
/// otherwise, and no reply of each other's.
#[derive(Default)]
pub(crate) struct Repeats {
    seen: HashSet<u64>,
    again: HashMap<Arc<str>, u32>,
}

impl Repeats {
    /// How many items before it had this key.
    pub(crate) fn count(&mut self, key: &Arc<str>) -> u32 {
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        if self.seen.insert(hasher.finish()) {
            return 0;
        }
        let count = self.again.entry(Arc::clone(key)).or_default();
        *count += 1;
        *count
    }
}

impl Place {
    /// The place of a whole context.
    pub(crate) fn root(memo: Arc<Memo>, tenant: Arc<str>) -> Self {
        let name = MemoKey::of([b"throughline/memo/1".as_slice(), tenant.as_bytes()]);
        Self {
            memo,
            tenant,
            intents: None,
            name,
            is_item: false,
            fresh: None,
            asked: Arc::default(),
            retakes: None,
        }
    }

    /// The place of an item that a worker runs: the same as that of an item with this key in a batch of this
    /// label at the top of a context.
    pub(crate) fn durable(memo: Arc<Memo>, tenant: Arc<str>, name: &str, key: &str) -> Self {
        let root = Self::root(memo, tenant);
        let name = root.item_name(&[], name, &format!("k{key}"), 0);
        Self {
            retakes: Some(Arc::default()),
            ..root.below(name, true, Arc::default())
        }
    }

    /// This place of a durable item that has failed, to run it again, where that was because of a reply that had been
    /// kept: it then gets another one.
    pub(crate) fn retake(&self, error: &Error) -> Option<Self> {
        let again = self.retakes.as_ref()?.retake(error);
        again.then(|| self.below(self.name, self.is_item, Arc::default()))
    }

    /// An item of a batch at this place has failed.
    pub(crate) fn failed(&self, error: &Error) {
        if let Some(retakes) = &self.retakes {
            retakes.fail(self.name, error);
        }
    }

    /// The reply under `key` was given to the code here.
    pub(super) fn give(&self, key: MemoKey, replayed: bool) {
        if let Some(retakes) = &self.retakes {
            retakes.give(self.name, key, replayed);
        }
    }

    /// The key of the reply that is wanted instead of those under `key` that the durable item has failed on.
    pub(super) fn current(&self, key: MemoKey) -> MemoKey {
        match &self.retakes {
            Some(retakes) => retakes.current(key),
            None => key,
        }
    }

    /// `repeat` is in the name only of an item whose key others before it had: each part is told apart by its
    /// length, so no key can be written that means a repeated one.
    fn item_name(&self, labels: &[&Arc<str>], label: &str, name: &str, repeat: u32) -> MemoKey {
        let labels = labels.iter().map(|label| label.as_bytes());
        let parts = [self.name.as_bytes().as_slice()].into_iter().chain(labels);
        let parts = parts.chain([label.as_bytes(), name.as_bytes()]);
        let repeated = repeat.to_be_bytes();
        MemoKey::of(parts.chain((repeat > 0).then_some(repeated.as_slice())))
    }

    fn below(&self, name: MemoKey, is_item: bool, asked: Arc<Occurrences>) -> Self {
        Self {
            memo: Arc::clone(&self.memo),
            tenant: Arc::clone(&self.tenant),
            intents: self.intents.clone(),
            name,
            is_item,
            fresh: self.fresh.clone(),
            asked,
            retakes: self.retakes.clone(),
        }
    }

    /// The place of a batch's item under these labels. `repeat` says how many items before it had its key.
    pub(crate) fn item(
        &self,
        labels: &[&Arc<str>],
        label: &str,
        index: usize,
        key: Option<&str>,
        repeat: u32,
    ) -> Self {
        let (name, asked) = match key {
            Some(key) => (format!("k{key}"), Arc::default()),
            None if self.is_item => (format!("i{index}"), Arc::clone(&self.asked)),
            None => (format!("i{index}"), Arc::default()),
        };
        self.below(self.item_name(labels, label, &name, repeat), true, asked)
    }

    /// This place, where nothing has been asked yet. `tag` tells one such from another.
    pub(crate) fn fresh(&self, tag: impl Into<Arc<str>>) -> Self {
        let tag = tag.into();
        let parts = [self.name.as_bytes(), b"fresh".as_slice(), tag.as_bytes()];
        Self {
            fresh: Some(tag.clone()),
            ..self.below(MemoKey::of(parts), self.is_item, Arc::default())
        }
    }

    /// This place, whose calls are written down for a durable item before they are sent.
    pub(crate) fn with_intents(mut self, item: ItemId, attempt: u32) -> Self {
        self.intents = Some(Arc::new(Intents {
            item,
            attempt,
            left: Mutex::default(),
        }));
        self
    }

    /// What the reply to a request is remembered under, if this item alone is to have it. Asked again, it gives
    /// another: the next reply.
    pub(super) fn own_key(
        &self,
        labels: &[&Arc<str>],
        request: &RequestDigest,
    ) -> (MemoKey, Occurrence) {
        let labels = labels.iter().map(|label| label.as_bytes());
        let parts = [self.name.as_bytes().as_slice()].into_iter().chain(labels);
        let asked = MemoKey::of(parts.chain([request.as_bytes().as_slice()]));
        let occurrence = Occurrence {
            number: self.asked.take(asked),
            occurrences: Arc::clone(&self.asked),
            asked,
            has_reply: AtomicBool::new(false),
        };
        let number = occurrence.number.to_be_bytes();
        let key = MemoKey::of([asked.as_bytes().as_slice(), &number]);
        (key, occurrence)
    }

    /// What the reply to a request is remembered under, if all of the tenant's items share it.
    pub(crate) fn shared_key(&self, request: &RequestDigest, sample: u32) -> MemoKey {
        MemoKey::of([
            b"throughline/shared/1".as_slice(),
            self.tenant.as_bytes(),
            self.fresh.as_deref().unwrap_or_default().as_bytes(),
            request.as_bytes(),
            &sample.to_be_bytes(),
        ])
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Place")
            .field("tenant", &self.tenant)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}
