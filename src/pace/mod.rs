//! The pacing lane: how fast calls may go, and who goes next.
//!
//! From the inside out, each knowing only those before it:
//!
//! - `bucket`: one rate limit (GCRA) as arithmetic over time;
//! - `buckets`, `gate`, `queue`: all limits at once, the provider's "not now", the waiters;
//! - `turnstile`: the state machine they form, pure, over time as an argument;
//! - `lane`: the thin asynchronous shell, with the clock, the lock and the wakers.

mod bucket;
mod buckets;
mod gate;
mod lane;
mod limits;
#[cfg(test)]
mod properties;
mod queue;
mod turnstile;
mod words;

pub use self::lane::{Lane, Permit};
pub use self::limits::Pace;
pub use self::words::{Binding, CallOutcome, LaneSnapshot, Need, Place};
