//! [`OpenItems`]: whether a batch's parallelism keeps it from starting more items.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::Parallelism;
use crate::context::Context;

/// Counts the open items of one batch and reports to the context while the batch has inputs left and may not start
/// another: then its parallelism, and not the provider, can be the limiting factor ([`Binding::OpenItems`]).
///
/// [`Binding::OpenItems`]: crate::ratelimit::Binding::OpenItems
pub(super) struct OpenItems {
    batch: Context,
    /// Open items that keep another from starting.
    limit: usize,
    /// Open items that still keep another from starting once the limit was reached: a chunk has to end whole.
    hold: usize,
    inputs: Option<usize>,
    taken: AtomicUsize,
    open: AtomicUsize,
    is_full: AtomicBool,
}

impl OpenItems {
    /// `inputs` is the number of inputs, where it is known.
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
            taken: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            is_full: AtomicBool::new(false),
        }
    }

    pub(super) fn start(&self) {
        let taken = self.taken.fetch_add(1, Ordering::Relaxed) + 1;
        let open = self.open.fetch_add(1, Ordering::Relaxed) + 1;
        self.report(open >= self.limit && self.inputs != Some(taken));
    }

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

impl Drop for OpenItems {
    fn drop(&mut self) {
        self.report(false);
    }
}
