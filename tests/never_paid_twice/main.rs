//! With a store, a committed reply is never paid for again, and each item of a durable run ends once.

mod drive;
mod kills;
mod memo;
mod reply_store;
mod runner;
mod runs;

#[path = "../support/durable.rs"]
mod support;
