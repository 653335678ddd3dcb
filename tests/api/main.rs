//! The public API and the shape of the sources: which items are public, which types may be sent and shared, which
//! compiler errors name the remedy, and which module may import which.

mod architecture;
mod auto_traits;
mod documents;
mod public_api;
mod sources;
mod ui;
