//! throughline
#![cfg_attr(docsrs, feature(doc_cfg))]

mod digest;
mod error;
mod pace;
pub mod provider;
mod reply;
mod request;
#[cfg(feature = "testing")]
pub mod testing;
mod usage;

pub use async_trait::async_trait;

pub use crate::digest::RequestDigest;
pub use crate::error::{Error, ErrorKind, Persistence, Result};
pub use crate::pace::{Binding, Lane, LaneSnapshot, Need, Outcome, Pace, Permit, Place};
#[cfg(feature = "sim")]
pub use crate::provider::sim::Sim;
#[cfg(feature = "anthropic")]
pub use crate::provider::{Anthropic, AnthropicBuilder};
pub use crate::provider::{Capabilities, OutputCharge, Provider};
#[cfg(feature = "openai")]
pub use crate::provider::{OpenAi, OpenAiBuilder};
pub use crate::reply::{Delta, FinishReason, Reply, ReplyStream};
pub use crate::request::{Message, Request, ResponseFormat, Role};
pub use crate::usage::{Quota, RateSnapshot, Usage};
