//! The stores: one contract for all of them, outages, and a million items.
#![cfg(feature = "testing")]

mod large;
mod memory;
mod outages;
mod postgres;
mod sqlite;

#[path = "../support/long.rs"]
mod long;
#[cfg(feature = "postgres")]
#[path = "../support/postgres.rs"]
mod server;
