//! [`Scope`]: the place of a call in the tree of work. It has a path of labels, [`Bounds`], a [`Tally`] and, if there is a
//! store, a [`MemoNamespace`].

mod bounds;
mod namespace;
mod rejected;
mod tally;

use std::fmt::{self, Write as _};
use std::sync::Arc;

pub(crate) use self::bounds::Bounds;
pub(crate) use self::namespace::{DuplicateKeys, MemoNamespace};
pub(super) use self::namespace::{EndedIntent, Occurrence};
pub use self::tally::Tally;

use self::tally::AtomicTally;
use crate::ratelimit::QueueKey;

/// Drops a chain of parents one by one, because a recursive drop of a long one would overflow the stack.
fn drop_chain<T>(parent: Option<Arc<T>>, next: fn(&mut T) -> Option<Arc<T>>) {
    let mut parent = parent;
    while let Some(mut last) = parent.and_then(Arc::into_inner) {
        parent = next(&mut last);
    }
}

/// A node in the tree of work. Costs that are added to its tally are added to those of its parents.
pub(crate) struct Scope {
    parent: Option<Arc<Scope>>,
    pub(crate) label: Arc<str>,
    /// A hash of the labels from the root to here, without keys and indices.
    pub(crate) labels: u64,
    index: Option<usize>,
    pub(crate) key: Option<Arc<str>>,
    pub(crate) bounds: Arc<Bounds>,
    /// The tenant and the priority of its calls in the queues.
    pub(crate) queue: QueueKey,
    /// The namespace of the replies that are stored here, if there is a store.
    pub(crate) namespace: Option<Arc<MemoNamespace>>,
    tally: AtomicTally,
}

impl Scope {
    pub(crate) fn root(bounds: Arc<Bounds>) -> Self {
        Self {
            parent: None,
            label: "".into(),
            labels: 0xcbf2_9ce4_8422_2325,
            index: None,
            key: None,
            bounds,
            queue: QueueKey::default(),
            namespace: None,
            tally: AtomicTally::default(),
        }
    }

    #[inline]
    pub(crate) fn child(parent: &Arc<Self>, label: Arc<str>, bounds: Arc<Bounds>) -> Self {
        Self {
            parent: Some(Arc::clone(parent)),
            // FNV-1a, which is cheap for short labels: every item of a batch has a scope.
            labels: label.bytes().fold(parent.labels, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            }),
            label,
            index: None,
            key: None,
            bounds,
            queue: parent.queue,
            namespace: parent.namespace.clone(),
            tally: AtomicTally::default(),
        }
    }

    /// Makes the scope of one item of a batch, with bounds of its own. `repeat` is the number of items before it in
    /// the batch with the same key.
    #[inline]
    pub(crate) fn item(
        batch: &Arc<Self>,
        label: Arc<str>,
        index: usize,
        key: Option<Arc<str>>,
        repeat: u32,
    ) -> Self {
        let bounds = Arc::new(batch.bounds.child());
        let mut item = Self::child(batch, label, bounds);
        item.index = Some(index);
        item.key = key;
        if let Some(namespace) = &batch.namespace {
            let labels = batch.labels_in_namespace();
            let key = item.key.as_deref();
            let namespace = namespace.item(&labels, &item.label, index, key, repeat);
            item.namespace = Some(Arc::new(namespace));
        }
        item
    }

    /// Returns the labels between the scope that begins the namespace and this one.
    pub(crate) fn labels_in_namespace(&self) -> Vec<&Arc<str>> {
        let mut labels = Vec::new();
        let mut scope = self;
        // The name of the namespace contains the label of the scope that begins it.
        while let Some(parent) = scope.parent.as_deref().filter(|parent| {
            let namespaces = parent.namespace.as_ref().zip(scope.namespace.as_ref());
            namespaces.is_some_and(|(above, here)| Arc::ptr_eq(above, here))
        }) {
            labels.extend(Some(&scope.label).filter(|label| !label.is_empty()));
            scope = parent;
        }
        labels.reverse();
        labels
    }

    /// Adds to the tally of this scope and of those above it.
    pub(crate) fn add(&self, tally: &Tally) {
        let mut scope = self;
        loop {
            scope.tally.add(tally);
            match &scope.parent {
                Some(parent) => scope = parent,
                None => break,
            }
        }
    }

    pub(crate) fn tally(&self) -> Tally {
        self.tally.read()
    }

    /// Yields this scope and those above it, the innermost first.
    fn outwards(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |scope| scope.parent.as_deref())
    }

    /// Returns the key of the innermost item that has one.
    pub(crate) fn item_key(&self) -> Option<&Arc<str>> {
        self.outwards().find_map(|scope| scope.key.as_ref())
    }

    pub(crate) fn path(&self) -> Arc<str> {
        self.to_string().into()
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        drop_chain(self.parent.take(), |scope| scope.parent.take());
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut scopes: Vec<_> = self.outwards().collect();
        scopes.reverse();
        let mut is_first = true;
        for scope in scopes {
            if !scope.label.is_empty() {
                if !is_first {
                    f.write_char('/')?;
                }
                f.write_str(&scope.label)?;
            }
            match (&scope.key, scope.index) {
                (Some(key), _) => write!(f, "[{key}]")?,
                (None, Some(index)) => write!(f, "[{index}]")?,
                (None, None) if scope.label.is_empty() => continue,
                (None, None) => {}
            }
            is_first = false;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::usage::Usage;

    fn nested() -> (Arc<Scope>, Arc<Scope>) {
        let root = Arc::new(Scope::root(Arc::new(Bounds::new(None))));
        let item = Arc::new(Scope::item(&root, "plan".into(), 3, Some("k".into()), 0));
        let inner = Arc::new(Scope::item(&item, "etude".into(), 0, None, 0));
        (root, inner)
    }

    #[test]
    fn paths_name_labels_keys_and_indices() {
        let (root, inner) = nested();
        assert_eq!(root.to_string(), "");
        assert_eq!(inner.to_string(), "plan[k]/etude[0]");
        assert_eq!(inner.item_key().map(|key| &**key), Some("k"));
    }

    #[test]
    fn tallies_add_up_to_the_root() {
        let (root, inner) = nested();
        let cost = Tally {
            attempts: 2,
            usage: Usage::new(5, 7),
            ..Tally::default()
        };
        inner.add(&cost);
        root.add(&cost);
        assert_eq!(inner.tally(), cost);
        assert_eq!(root.tally().attempts, 4);
        assert_eq!(root.tally().usage, Usage::new(10, 14));
    }

    #[test]
    fn labels_are_separated_by_a_slash_and_empty_ones_left_out() {
        let root = Arc::new(Scope::root(Arc::new(Bounds::new(None))));
        let child = |parent: &Arc<Scope>, label: &str| {
            let bounds = Arc::new(parent.bounds.child());
            Arc::new(Scope::child(parent, label.into(), bounds))
        };
        let a = child(&root, "a");
        let b = child(&child(&child(&a, ""), ""), "b");
        assert_eq!(b.to_string(), "a/b");
        let week = Arc::new(Scope::item(&root, "week".into(), 0, None, 0));
        let day = Scope::item(&child(&week, ""), "day".into(), 0, None, 0);
        assert_eq!(day.to_string(), "week[0]/day[0]");
        let nameless = Scope::item(&a, "".into(), 3, None, 0);
        assert_eq!(nameless.to_string(), "a[3]");
    }
}
