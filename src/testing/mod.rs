//! Tools for testing code that uses this crate.
//!
//! - [`Scripted`] is a provider that answers from a script, and [`Sim`](crate::Sim) one that behaves like an account
//!   with limits.
//! - [`Counted`] is a store that counts the round trips to it.
//! - [`mod@provider`] and [`mod@store`] are conformance suites for providers and stores of your own.

mod counted;
pub mod provider;
mod scripted;
pub mod store;

pub use self::counted::Counted;
pub use self::scripted::Scripted;
