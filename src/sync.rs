//! [`Mutex`]: a lock that a panic elsewhere does not poison.

use std::sync::{MutexGuard, PoisonError};

/// A [`std::sync::Mutex`] whose `lock` ignores poisoning.
///
/// The state behind the locks of this crate is consistent between any two statements, so a panic while a lock is held
/// (of a user's callback, for example) must not take all other calls with it.
#[derive(Debug, Default)]
pub(crate) struct Mutex<T>(std::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(std::sync::Mutex::new(value))
    }

    #[cfg(test)]
    pub(crate) fn is_poisoned(&self) -> bool {
        self.0.is_poisoned()
    }

    #[inline]
    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
