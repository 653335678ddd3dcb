//! The long forms of tests.
#![allow(dead_code)] // Not every set of features has a test that uses it.

/// Returns whether `THROUGHLINE_LONG` is set, which selects the long forms of the tests.
pub fn is_long() -> bool {
    std::env::var_os("THROUGHLINE_LONG").is_some()
}
