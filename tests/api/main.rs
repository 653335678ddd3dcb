//! The public API: which types may be sent and shared, and which compiler errors name the remedy.

mod auto_traits;
mod ui;
