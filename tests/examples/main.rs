//! The examples: their figures under the paused clock, and their programs as real processes that are killed.

mod figures;
mod generate;
mod processes;

#[path = "../support/long.rs"]
mod long;
#[path = "../support/program.rs"]
mod program;
#[cfg(all(feature = "openai", feature = "anthropic"))]
#[path = "../support/mod.rs"]
mod support;
