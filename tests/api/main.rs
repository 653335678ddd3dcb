//! The public API: which types may be sent and shared, which compiler errors name the remedy, and whether the documents name
//! files that exist.

mod auto_traits;
mod documents;
mod ui;
