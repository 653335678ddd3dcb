//! The stores: the contract that all of them keep, outages, and many items.
#![cfg(feature = "testing")]

#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod common;
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
