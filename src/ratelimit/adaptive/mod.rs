//! What a lane learns of the limits of a provider: from refusals, from headers, and from its own throughput.

pub(super) mod burst;
pub(super) mod contention;
pub(super) mod deferred;
pub(super) mod headers;
pub(super) mod rate_controller;
pub(super) mod refusals;
