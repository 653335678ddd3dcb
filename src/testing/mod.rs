//! For tests of code that uses this crate: [`Scripted`] says exactly what it was told to,
//! [`Sim`](crate::Sim) behaves like an account with limits, [`Counted`] counts the round trips to a store, and [`mod@store`] is what every
//! backend of the [store](crate::store) must pass.

mod counted;
mod scripted;
pub mod store;

pub use self::counted::Counted;
pub use self::scripted::Scripted;
