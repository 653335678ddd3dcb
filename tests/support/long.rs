//! The long forms of tests.
#![allow(dead_code)] // Not every set of features has a test that uses it.

/// Whether the long forms of the tests are asked for, with `THROUGHLINE_LONG=1`.
pub fn is_long() -> bool {
    std::env::var_os("THROUGHLINE_LONG").is_some()
}
