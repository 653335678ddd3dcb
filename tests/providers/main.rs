//! The providers: the contract of all of them, and the simulator, which is the witness of other tests.

mod conformance;
mod simulator;

#[cfg(all(feature = "openai", feature = "anthropic"))]
#[path = "../support/mod.rs"]
mod support;
