//! Batched, rate-limited LLM generation: run at the full rate that the provider allows, never
//! above it, and never lose a result or pay for it twice.
//!
//! Use this crate to send hundreds or millions of requests to a language model and to get one outcome for each. It paces
//! the calls to the limits of the account, retries transient failures, reports the cost, and continues where it stopped.
//! It is of little use for a single conversation, and it does not build agents or prompts.
//!
//! - [`Context`] is the handle for calls: a [`Provider`] behind a [`Pace`], with [retries](Retry), a deadline,
//!   cancellation and [observers](observe::Observer).
//! - [`Batch`] runs an async closure for many inputs and returns an [`Outcome`] for each, in
//!   [`Settled`]. Batches can be nested.
//! - [`Pipeline`] gives a step a name, so that steps can be combined, registered and tested.
//! - A [store] keeps the replies, so that no reply is paid for twice ([`ContextBuilder::store`]). With a store for several
//!   processes, a [`Runner`] submits runs and [`Worker`]s do them, even if some of the workers die.
//!
//! # Example
//!
//! ```
//! use std::time::Duration;
//! use throughline::{Context, Pace, Sim};
//!
//! #[tokio::main(flavor = "current_thread", start_paused = true)]
//! async fn main() -> throughline::Result<()> {
//!     // A simulated account that allows 600 requests a minute; its clock is Tokio's.
//!     let provider = Sim::builder()
//!         .requests_per_minute(600)
//!         .latency(Duration::from_secs(2))
//!         .build();
//!     let cx = Context::builder(provider)
//!         .pace(Pace::per_minute(600).in_flight(32))
//!         .build();
//!
//!     let rivers = ["Danube", "Rhine", "Po"];
//!     let style = String::from("in one sentence"); // the closure borrows it
//!     let settled = cx
//!         .fan_out("river", rivers)
//!         .key(|name| name.to_string())
//!         .settle(async |cx, name| cx.generate(format!("Describe the {name} {style}.")).await)
//!         .await;
//!     assert_eq!(settled.tally().throttled, 0);
//!     assert_eq!(settled.all()?.len(), 3);
//!     Ok(())
//! }
//! ```
//!
//! # Features
//!
//! No feature is enabled by default; the core depends on neither HTTP nor SQL.
//!
//! - `openai`: [`OpenAi`], chat completions at any base URL.
//! - `anthropic`: [`Anthropic`], the Messages API.
//! - `structured`: replies as Rust values, whole ([`Context::generate_as`]), element by element
//!   ([`Context::generate_items`]) and growing ([`Context::generate_drafts`]).
//! - `sqlite`, `postgres`: durable [stores](store), besides the one in memory. They need Rust 1.94.
//! - `sim`: [`Sim`], a simulated provider that enforces limits on Tokio's clock and records its bills.
//! - `testing`: [`testing::Scripted`] and `sim`, for tests of your own code.
//! - `bar`: [`observe::Bar`], a terminal progress bar.
//! - `stages`: [`observe::Stages`], percentiles of calls, stages and items by label.
//! - `tiktoken`: [`call::Tiktoken`], which counts prompt tokens with the tokenizers of OpenAI.
//! - `signal`: [`context::stop_on_signal`], which stops on Ctrl-C and SIGTERM.
//! - `full`: `openai`, `anthropic`, `structured`, `sim`, `bar` and `signal`.
//!
//! # Where to go from here
//!
//! - [`tutorial`]: a pipeline step by step, from ten lines to the streamed form (with the features
//!   `structured` and `sim`).
//! - [`timeouts`]: which phase of a call each timeout covers, and which one wins.
//! - [`design`]: the design decisions and their reasons.

#![cfg_attr(docsrs, feature(doc_cfg))]

mod backoff;
pub mod batch;
pub mod call;
pub mod context;
mod error;
mod event;
pub mod observe;
pub mod pipeline;
pub mod provider;
pub mod ratelimit;
pub mod request;
pub mod runs;
pub mod store;
#[cfg(feature = "structured")]
pub mod structured;
mod sync;
#[cfg(feature = "testing")]
pub mod testing;
mod usage;

#[cfg(all(feature = "sim", feature = "structured"))]
#[doc = include_str!("tutorial.md")]
pub mod tutorial {}

#[doc = include_str!("timeouts.md")]
pub mod timeouts {}

#[doc = include_str!("../DESIGN.md")]
pub mod design {}

/// The README's examples, run as doc-tests.
#[cfg(all(doctest, feature = "sim", feature = "structured"))]
#[doc = include_str!("../README.md")]
mod readme {}

pub use async_trait::async_trait;
pub use tokio_util::sync::CancellationToken;

#[doc(inline)]
pub use crate::batch::{Batch, Outcome, Settled};
#[doc(inline)]
pub use crate::call::Retry;
#[doc(inline)]
pub use crate::context::{Context, ContextBuilder};
pub use crate::error::{Error, ErrorKind, Persistence, Result};
#[doc(inline)]
pub use crate::pipeline::{Pipeline, PipelineExt, pipeline};
#[cfg(feature = "anthropic")]
#[doc(inline)]
pub use crate::provider::Anthropic;
#[cfg(feature = "openai")]
#[doc(inline)]
pub use crate::provider::OpenAi;
#[doc(inline)]
pub use crate::provider::Provider;
#[cfg(feature = "sim")]
#[doc(inline)]
pub use crate::provider::sim::Sim;
#[doc(inline)]
pub use crate::ratelimit::Pace;
#[doc(inline)]
pub use crate::request::{Message, Reply, Request, Usage};
#[doc(inline)]
pub use crate::runs::{Runner, Worker};
