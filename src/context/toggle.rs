//! [`ParallelToggle`]: turns the parallelism of contexts off and on at run time.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

#[cfg(doc)]
use crate::Context;

/// Turns the parallelism of contexts off and on while the service runs, with the same results and without a
/// deployment.
///
/// While the toggle is off, the batches of its contexts run one item at a time in the order of the inputs, and
/// [`Context::join`] and [`Context::join_best_effort`] await one future after the other. Work that has already started
/// is not affected. Clones share one toggle.
///
/// ```
/// use throughline::{Context, testing::Scripted, context::ParallelToggle};
///
/// let parallel = ParallelToggle::new(true);
/// let cx = Context::builder(Scripted::new()).parallel(&parallel).build();
/// parallel.set(false);
/// assert!(!cx.is_parallel());
/// ```
#[derive(Clone)]
pub struct ParallelToggle(Arc<AtomicBool>);

impl ParallelToggle {
    /// Creates a toggle that is on or off.
    pub fn new(on: bool) -> Self {
        Self(Arc::new(AtomicBool::new(on)))
    }

    /// Turns parallelism on or off for all contexts with this toggle.
    pub fn set(&self, on: bool) {
        self.0.store(on, Ordering::Relaxed);
    }

    /// Returns whether parallelism is on.
    pub fn is_on(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for ParallelToggle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ParallelToggle")
            .field(&self.is_on())
            .finish()
    }
}
