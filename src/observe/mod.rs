//! Observing a run: [events](Event), and observers that draw and measure them.

#[cfg(feature = "bar")]
mod bar;
#[cfg(feature = "stages")]
mod stages;
mod timeline;

#[cfg(feature = "bar")]
pub use self::bar::Bar;
#[cfg(feature = "stages")]
pub use self::stages::{Stage, StageKind, Stages};
pub use self::timeline::Timeline;
pub use crate::event::{Event, Observer};
