//! [`Place`]: where in the work a reply belongs, which is the first half of what it is remembered under.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::Memo;
use crate::digest::RequestDigest;
use crate::store::{ItemId, MemoKey};

/// The innermost thing with a name: the context, or an item that has a key. What is asked below it is told
/// apart by labels, and identical requests under the same labels by their order.
///
/// Items without a key below one that has a key belong to it: an index would make an
/// inserted sibling re-pay all behind it. At the top nothing else tells them apart, so there the
/// index is the name, and what is counted is forgotten with the item.
pub(crate) struct Place {
    pub(crate) memo: Arc<Memo>,
    pub(crate) tenant: Arc<str>,
    /// The durable item whose calls are written down before they are sent, and its attempt.
    pub(crate) intents: Option<(ItemId, u32)>,
    name: MemoKey,
    is_item: bool,
    /// What a fresh asking puts into each key.
    fresh: Option<Arc<str>>,
    /// How often each request was asked here.
    asked: Mutex<HashMap<MemoKey, u32>>,
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
            asked: Mutex::default(),
        }
    }

    /// The place of an item that a worker runs: the same as that of an item with this key in a batch of this
    /// label at the top of a context.
    pub(crate) fn durable(memo: Arc<Memo>, tenant: Arc<str>, name: &str, key: &str) -> Self {
        let root = Self::root(memo, tenant);
        root.below(root.item_name(&[], name, &format!("k{key}")), true)
    }

    fn item_name(&self, labels: &[&Arc<str>], label: &str, name: &str) -> MemoKey {
        let labels = labels.iter().map(|label| label.as_bytes());
        let parts = [self.name.as_bytes().as_slice()].into_iter().chain(labels);
        MemoKey::of(parts.chain([label.as_bytes(), name.as_bytes()]))
    }

    fn below(&self, name: MemoKey, is_item: bool) -> Self {
        Self {
            memo: Arc::clone(&self.memo),
            tenant: Arc::clone(&self.tenant),
            intents: self.intents,
            name,
            is_item,
            fresh: self.fresh.clone(),
            asked: Mutex::default(),
        }
    }

    /// The place of a batch's item under these labels: its own, or this one.
    pub(crate) fn item(
        self: &Arc<Self>,
        labels: &[&Arc<str>],
        label: &Arc<str>,
        index: usize,
        key: &Option<Arc<str>>,
    ) -> Arc<Self> {
        let name = match key {
            Some(key) => format!("k{key}"),
            None if self.is_item => return Arc::clone(self),
            None => format!("i{index}"),
        };
        Arc::new(self.below(self.item_name(labels, label, &name), true))
    }

    /// This place, where nothing has been asked yet. `tag` tells one such from another.
    pub(crate) fn fresh(&self, tag: impl Into<Arc<str>>) -> Self {
        let tag = tag.into();
        let parts = [self.name.as_bytes(), b"fresh".as_slice(), tag.as_bytes()];
        Self {
            fresh: Some(tag.clone()),
            ..self.below(MemoKey::of(parts), self.is_item)
        }
    }

    /// This place, whose calls are written down for a durable item before they are sent.
    pub(crate) fn with_intents(mut self, item: ItemId, attempt: u32) -> Self {
        self.intents = Some((item, attempt));
        self
    }

    /// What the reply to a request is remembered under, if this item alone is to have it. Asked again, it gives
    /// another: the next reply.
    pub(crate) fn own_key(&self, labels: &[&Arc<str>], request: &RequestDigest) -> MemoKey {
        let labels = labels.iter().map(|label| label.as_bytes());
        let parts = [self.name.as_bytes().as_slice()].into_iter().chain(labels);
        let asked = MemoKey::of(parts.chain([request.as_bytes().as_slice()]));
        let occurrence = {
            let mut counts = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
            let count = counts.entry(asked).or_default();
            *count += 1;
            *count - 1
        };
        MemoKey::of([asked.as_bytes().as_slice(), &occurrence.to_be_bytes()])
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
