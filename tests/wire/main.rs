//! The HTTP providers over real sockets: requests, replies, refusals, streams, faults and connections.
#![cfg(all(feature = "openai", feature = "anthropic"))]

mod connections;
mod faults;
mod refusals;
mod replies;
mod streams;

#[path = "../support/mod.rs"]
mod support;
