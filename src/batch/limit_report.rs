//! [`LimitReport`]: reports when the parallelism of a batch is the limiting factor.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::Parallelism;
use crate::context::Context;

/// Counts the open items of one batch. It reports to the context while the batch has inputs left and may not start
/// another item, because then the parallelism can be the limiting factor instead of the provider
/// ([`Binding::OpenItems`]).
///
/// [`Binding::OpenItems`]: crate::ratelimit::Binding::OpenItems
pub(super) struct LimitReport {
    batch: Context,
    /// The number of open items at which no other item may start.
    limit: usize,
    /// Once full, the batch counts as full while at least this number of items is open: all items of a chunk must end
    /// before another one starts.
    hold: usize,
    inputs: Option<usize>,
    open: AtomicUsize,
    is_full: AtomicBool,
}

impl LimitReport {
    /// Counts the items of `batch`; `inputs` is the number of inputs, if it is known.
    pub(super) fn new(batch: Context, parallelism: Parallelism, inputs: Option<usize>) -> Self {
        let (limit, hold) = match parallelism {
            Parallelism::JoinAll => (usize::MAX, usize::MAX),
            Parallelism::Buffered(n) | Parallelism::Unordered(n) => (n, n),
            Parallelism::Chunks(n) => (n, 1),
        };
        Self {
            batch,
            limit,
            hold,
            inputs,
            open: AtomicUsize::new(0),
            is_full: AtomicBool::new(false),
        }
    }

    /// Counts the start of the item with this index.
    pub(super) fn start(&self, index: usize) {
        let open = self.open.fetch_add(1, Ordering::Relaxed) + 1;
        self.report(open >= self.limit && self.inputs != Some(index + 1));
    }

    /// Counts the end of an item whose outcome has left the batch.
    pub(super) fn end(&self) {
        let open = self.open.fetch_sub(1, Ordering::Relaxed) - 1;
        let is_full = self.is_full.load(Ordering::Relaxed);
        self.report(is_full && open >= self.hold);
    }

    fn report(&self, is_full: bool) {
        if self.is_full.swap(is_full, Ordering::Relaxed) != is_full {
            self.batch.batch_is_full(is_full);
        }
    }
}

impl Drop for LimitReport {
    fn drop(&mut self) {
        self.report(false);
    }
}
