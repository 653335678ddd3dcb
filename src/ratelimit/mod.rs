//! Rate limiting: how fast calls may go, and which caller is next.
//!
//! From the inside out, each module knowing only those before it:
//!
//! - `bucket`: a token bucket (GCRA) as arithmetic over time;
//! - `adaptive`: what is learned of the limits of a provider;
//! - `limit`, `limits`: one limit with its clock, and all limits of a lane, taken at once or not at all;
//! - `concurrency`, `cooldown`, `queue`, `offers`, `tenants`: the calls in flight, the wait after a refusal, the callers
//!   that wait, the grants that they have not collected yet, and the rates of tenants;
//! - `scheduler`: the state machine of all of them, with time as an argument;
//! - `lane`: the asynchronous handle, with the clock, the lock, the wakers and the timers.

mod adaptive;
mod bucket;
mod concurrency;
mod cooldown;
mod lane;
mod limit;
mod limits;
mod offers;
mod pace;
#[cfg(test)]
mod properties_tests;
mod queue;
mod scheduler;
mod tenants;
mod types;

#[doc(hidden)]
pub use self::adaptive::Policy;
pub(crate) use self::cooldown::LONGEST_RETRY_AFTER;
pub use self::lane::{Lane, Permit};
pub use self::pace::Pace;
pub(crate) use self::types::QueueKey;
pub use self::types::{
    Binding, BurstSnapshot, CallOutcome, LaneSnapshot, Need, Priority, QueuePosition, Tenant,
};
