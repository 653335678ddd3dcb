//! Replies as values: the incremental JSON reader, typed replies and lists.

#[cfg(feature = "structured")]
mod items;
mod json;
#[cfg(feature = "structured")]
mod values;
