//! The pacing lane: how fast calls may go, and who goes next.
//!
//! From the inside out, each knowing only those before it:
//!
//! - `bucket`: one rate limit (GCRA) as arithmetic over time;
//! - `scale`, `arrears`, `surplus`, `ebb`, `meter`: the share of it that the provider really
//!   grants, what will be charged later, what may go faster, whether others use it, and its clock;
//! - `buckets`, `refusals`, `slots`, `gate`, `queue`: all limits at once, which refusals are noise, the
//!   calls in flight, the provider's "not now", the waiters; `headers` reads what replies say of limits;
//! - `offers`: what was granted to a waiter that has not come for it yet;
//! - `turnstile`: the state machine they form, pure, over time as an argument (in `ends`, how calls end);
//! - `timer`: the tasks that let waiters through when their time comes;
//! - `lane`: the thin asynchronous shell, with the clock, the lock and the wakers.

mod arrears;
mod bucket;
mod buckets;
mod ebb;
mod gate;
mod headers;
mod lane;
mod limits;
mod meter;
mod offers;
#[cfg(test)]
mod properties;
mod queue;
mod refusals;
mod scale;
mod slots;
mod surplus;
mod timer;
mod turnstile;
mod words;

pub use self::lane::{Lane, Permit};
pub use self::limits::Pace;
pub use self::words::{Binding, CallOutcome, LaneSnapshot, Need, Place, Priority, Tenant};
pub(crate) use self::words::{LaneChange, Who};
