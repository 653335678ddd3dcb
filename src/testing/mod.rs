//! For tests of code that uses this crate: [`Scripted`] says exactly what it was told to,
//! and [`Sim`](crate::Sim) behaves like an account with limits.

mod scripted;

pub use self::scripted::Scripted;
