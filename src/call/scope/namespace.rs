//! [`MemoNamespace`]: the part of the work that a reply belongs to. With the digest of the request, it makes the key under
//! which the reply is stored.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::hash::{Hash as _, Hasher as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::rejected::RejectedReplies;
use crate::error::Error;
use crate::request::RequestDigest;
use crate::store::{ItemId, MemoKey};
use crate::sync::Mutex;

/// The namespace of replies: the context, or the innermost item of a batch. Requests in it are distinguished by their
/// labels, and identical requests under the same labels by their order.
///
/// An item is named by its key, and without one by its index. A second batch with the same label and keys is the
/// same work and replays. Below an item, a second batch of items without keys is another round: its
/// requests continue the numbers of identical ones in the innermost item with a key.
pub(crate) struct MemoNamespace {
    pub(in crate::call) tenant: Arc<str>,
    /// The durable item whose calls are stored as intents before they are sent.
    pub(in crate::call) intents: Option<Arc<Intents>>,
    name: MemoKey,
    is_item: bool,
    /// The part of each key that keeps the replies of a fresh namespace apart.
    fresh: Option<Arc<str>>,
    /// The number of identical requests so far.
    occurrences: Arc<Occurrences>,
    /// The replies that a durable item has rejected.
    rejected: Option<Arc<RejectedReplies>>,
}

/// The intents of a durable item.
pub(in crate::call) struct Intents {
    pub(in crate::call) item: ItemId,
    pub(in crate::call) attempt: u32,
    /// The intents of calls that ended without a reply, whose key the next identical call uses again.
    ended: Mutex<HashMap<MemoKey, EndedIntent>>,
}

/// The state of the intent of a call that ended without a reply.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::call) enum EndedIntent {
    /// It is being deleted from the store.
    Deleted,
    /// It stays listed: the call was dropped, and may be billed.
    Ambiguous,
}

impl Intents {
    pub(in crate::call) fn end(&self, key: MemoKey, end: EndedIntent) {
        let mut ended = self.ended.lock();
        // A listed intent stays listed.
        let known = ended.entry(key).or_insert(end);
        if end == EndedIntent::Ambiguous {
            *known = end;
        }
    }

    pub(in crate::call) fn ended(&self, key: &MemoKey) -> Option<EndedIntent> {
        self.ended.lock().get(key).copied()
    }
}

/// The number of identical requests in a namespace.
#[derive(Default)]
struct Occurrences(Mutex<HashMap<MemoKey, Numbers>>);

/// The numbers of one request: all below `next` are taken, except for the free ones.
#[derive(Default)]
struct Numbers {
    next: u32,
    free: BTreeSet<u32>,
}

impl Occurrences {
    fn take(&self, request: MemoKey) -> u32 {
        let mut all = self.0.lock();
        let numbers = all.entry(request).or_default();
        numbers.free.pop_first().unwrap_or_else(|| {
            numbers.next += 1;
            numbers.next - 1
        })
    }

    fn give_back(&self, request: MemoKey, number: u32) {
        let mut all = self.0.lock();
        let Some(numbers) = all.get_mut(&request) else {
            return;
        };
        numbers.free.insert(number);
        while numbers.next > 0 && numbers.free.remove(&(numbers.next - 1)) {
            numbers.next -= 1;
        }
        if numbers.next == 0 {
            all.remove(&request);
        }
    }
}

/// The number of a request among the identical ones in its namespace. A call that ends without a reply gives its number
/// back when this is dropped, so that a rerun finds the replies under the same numbers.
pub(in crate::call) struct Occurrence {
    occurrences: Arc<Occurrences>,
    request: MemoKey,
    number: u32,
    has_reply: AtomicBool,
}

impl Occurrence {
    /// Keeps the number taken, because there is a reply under it.
    pub(in crate::call) fn keep(&self) {
        self.has_reply.store(true, Ordering::Relaxed);
    }
}

impl Drop for Occurrence {
    fn drop(&mut self) {
        if !*self.has_reply.get_mut() {
            self.occurrences.give_back(self.request, self.number);
        }
    }
}

/// Counts the items of a batch that have the same key, to distinguish them by their order.
///
/// It keeps a hash of eight bytes of each key. Two keys with the same hash get other names than they would
/// otherwise, but never a reply of each other.
#[derive(Default)]
pub(crate) struct DuplicateKeys {
    seen: HashSet<u64>,
    again: HashMap<Arc<str>, u32>,
}

impl DuplicateKeys {
    /// Returns the number of items before this one that had the same key.
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

impl MemoNamespace {
    /// Makes the namespace of a whole context.
    pub(crate) fn root(tenant: Arc<str>) -> Self {
        let name = MemoKey::of([b"throughline/memo/1".as_slice(), tenant.as_bytes()]);
        Self {
            tenant,
            intents: None,
            name,
            is_item: false,
            fresh: None,
            occurrences: Arc::default(),
            rejected: None,
        }
    }

    /// Makes the namespace of an item that a worker runs. It is the same as that of an item with this key in a batch of
    /// this label at the top of a context.
    pub(crate) fn durable_item(tenant: Arc<str>, name: &str, key: &str) -> Self {
        let root = Self::root(tenant);
        let name = root.item_name(&[], name, &format!("k{key}"), 0);
        Self {
            rejected: Some(Arc::default()),
            ..root.below(name, true, Arc::default())
        }
    }

    /// Rejects the stored reply because of which a durable item has failed. Returns the namespace in which to run it again;
    /// `None` if the item has not failed because of a stored reply.
    pub(crate) fn reject_reply(&self, error: &Error) -> Option<Self> {
        let is_rejected = self.rejected.as_ref()?.reject(error);
        is_rejected.then(|| self.below(self.name, self.is_item, Arc::default()))
    }

    /// Records that an item of a batch has failed here.
    pub(crate) fn record_failure(&self, error: &Error) {
        if let Some(rejected) = &self.rejected {
            rejected.record_failure(self.name, error);
        }
    }

    /// Records that the caller got the reply under `key`.
    pub(in crate::call) fn record_reply(&self, key: MemoKey, is_replayed: bool) {
        if let Some(rejected) = &self.rejected {
            rejected.record_reply(self.name, key, is_replayed);
        }
    }

    /// Returns the key of the reply that replaces the rejected ones under `key`.
    pub(in crate::call) fn current_key(&self, key: MemoKey) -> MemoKey {
        match &self.rejected {
            Some(rejected) => rejected.current_key(key),
            None => key,
        }
    }

    /// The name contains `repeat` only if other items had the same key before. The length of each part is in the hash, so
    /// no key can be made up that means a repeated one.
    fn item_name(&self, labels: &[&Arc<str>], label: &str, name: &str, repeat: u32) -> MemoKey {
        let labels = labels.iter().map(|label| label.as_bytes());
        let parts = [self.name.as_bytes().as_slice()].into_iter().chain(labels);
        let parts = parts.chain([label.as_bytes(), name.as_bytes()]);
        let repeated = repeat.to_be_bytes();
        MemoKey::of(parts.chain((repeat > 0).then_some(repeated.as_slice())))
    }

    fn below(&self, name: MemoKey, is_item: bool, occurrences: Arc<Occurrences>) -> Self {
        Self {
            tenant: Arc::clone(&self.tenant),
            intents: self.intents.clone(),
            name,
            is_item,
            fresh: self.fresh.clone(),
            occurrences,
            rejected: self.rejected.clone(),
        }
    }

    /// Makes the namespace of a batch's item under these labels. `repeat` is the number of items before it with its key.
    pub(crate) fn item(
        &self,
        labels: &[&Arc<str>],
        label: &str,
        index: usize,
        key: Option<&str>,
        repeat: u32,
    ) -> Self {
        let (name, occurrences) = match key {
            Some(key) => (format!("k{key}"), Arc::default()),
            None if self.is_item => (format!("i{index}"), Arc::clone(&self.occurrences)),
            None => (format!("i{index}"), Arc::default()),
        };
        let name = self.item_name(labels, label, &name, repeat);
        self.below(name, true, occurrences)
    }

    /// Makes a namespace without any stored reply. `tag` distinguishes it from other fresh ones.
    pub(crate) fn fresh(&self, tag: impl Into<Arc<str>>) -> Self {
        let tag = tag.into();
        let parts = [self.name.as_bytes(), b"fresh".as_slice(), tag.as_bytes()];
        Self {
            fresh: Some(tag.clone()),
            ..self.below(MemoKey::of(parts), self.is_item, Arc::default())
        }
    }

    /// Stores the intents of this durable item before its calls are sent.
    pub(crate) fn with_intents(mut self, item: ItemId, attempt: u32) -> Self {
        self.intents = Some(Arc::new(Intents {
            item,
            attempt,
            ended: Mutex::default(),
        }));
        self
    }

    /// Returns the key of the reply to a request that this item does not share with others. Each call returns the key of
    /// the next reply to identical requests.
    pub(in crate::call) fn own_key(
        &self,
        labels: &[&Arc<str>],
        request: &RequestDigest,
    ) -> (MemoKey, Occurrence) {
        let labels = labels.iter().map(|label| label.as_bytes());
        let parts = [self.name.as_bytes().as_slice()].into_iter().chain(labels);
        let request = MemoKey::of(parts.chain([request.as_bytes().as_slice()]));
        let occurrence = Occurrence {
            number: self.occurrences.take(request),
            occurrences: Arc::clone(&self.occurrences),
            request,
            has_reply: AtomicBool::new(false),
        };
        let number = occurrence.number.to_be_bytes();
        let key = MemoKey::of([request.as_bytes().as_slice(), &number]);
        (key, occurrence)
    }

    /// Returns the key of the reply to a request that all items of the tenant share.
    pub(in crate::call) fn shared_key(&self, request: &RequestDigest, sample: u32) -> MemoKey {
        MemoKey::of([
            b"throughline/shared/1".as_slice(),
            self.tenant.as_bytes(),
            self.fresh.as_deref().unwrap_or_default().as_bytes(),
            request.as_bytes(),
            &sample.to_be_bytes(),
        ])
    }
}

impl fmt::Debug for MemoNamespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoNamespace")
            .field("tenant", &self.tenant)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}
