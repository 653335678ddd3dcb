//! The long forms of tests.

/// Whether the long forms of the tests are asked for, with `THROUGHLINE_LONG=1`.
pub fn is_long() -> bool {
    std::env::var_os("THROUGHLINE_LONG").is_some()
}
