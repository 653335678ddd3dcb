//! Batched, rate-limited LLM generation: run at the full rate the provider allows, never
//! above it, and lose nothing.
//!
//! - Write the work as a [`Pipeline`]: one async function from an input to an output, in ordinary Rust.
//! - Give it a [`Context`]: a [`Provider`] behind a [`Pace`], with [retries](Retry), a deadline,
//!   cancellation and [observers](Observer).
//! - Run it for many inputs as a [`Batch`], nested as you like, and get one
//!   [`Outcome`] for each: [`Settled`].
//! - Give the context a [store], and nothing is paid for twice ([`ContextBuilder::store`]). Submit the work with a
//!   [`Runner`], and [`Worker`]s in any number of processes do it, whoever of them dies.
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
//! None is on by default; the core pulls in neither HTTP nor SQL.
//!
//! - `openai`: [`OpenAi`], chat completions at any base URL.
//! - `anthropic`: [`Anthropic`], the Messages API.
//! - `structured`: replies as Rust values, whole ([`Context::generate_as`]), element by element
//!   ([`Context::generate_items`]) and growing ([`Context::generate_drafts`]).
//! - `sqlite`, `postgres`: durable [stores](store) besides the one in memory. They need Rust 1.94.
//! - `sim`: [`Sim`], a provider that enforces limits on Tokio's clock and bills a ledger.
//! - `testing`: [`testing::Scripted`] and `sim`, for tests of your own code.
//! - `bar`: [`bar::Bar`], a terminal progress bar.
//! - `stages`: [`stages::Stages`], percentiles of calls, stages and items by label.
//! - `tiktoken`: [`Tiktoken`], a counter of prompt tokens.
//! - `signal`: [`stop_on_signal`], for services that are asked to stop.
//! - `full`: `openai`, `anthropic`, `structured`, `sim`, `bar` and `signal`.
//!
//! # Where to go from here
//!
//! - [`tutorial`]: a pipeline step by step, from ten lines to the streamed form (with the features
//!   `structured` and `sim`).
//! - [`design`]: the design decisions and their reasons.

#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(feature = "bar")]
pub mod bar;
mod batch;
mod budget;
mod context;
mod deployment;
mod digest;
mod error;
mod estimate;
mod event;
mod guard;
mod join;
mod journal;
pub mod json;
mod memo;
mod pace;
mod pipeline;
mod pool;
pub mod provider;
mod reply;
mod request;
mod retry;
mod run;
#[cfg(any(feature = "http", feature = "structured"))]
mod schema;
mod scope;
mod settled;
#[cfg(feature = "signal")]
mod signal;
#[cfg(feature = "stages")]
pub mod stages;
pub mod store;
mod stream;
#[cfg(feature = "structured")]
mod structured;
#[cfg(feature = "testing")]
pub mod testing;
#[cfg(feature = "tiktoken")]
mod tiktoken;
mod timeline;
mod usage;
mod worker;

#[cfg(all(feature = "sim", feature = "structured"))]
#[doc = include_str!("tutorial.md")]
pub mod tutorial {}

#[doc = include_str!("../DESIGN.md")]
pub mod design {}

/// The README's examples, run as doc-tests.
#[cfg(all(doctest, feature = "sim", feature = "structured"))]
#[doc = include_str!("../README.md")]
mod readme {}

pub use async_trait::async_trait;
pub use tokio_util::sync::CancellationToken;

pub use crate::batch::{Batch, IntoInputs, Outcomes, Over, Progress};
pub use crate::context::{Context, ContextBuilder, Snapshot};
pub use crate::deployment::Deployment;
pub use crate::digest::RequestDigest;
pub use crate::error::{Error, ErrorKind, Persistence, Result};
pub use crate::estimate::TokenCounter;
pub use crate::event::{Event, Observer};
pub use crate::join::{Join, Switch};
pub use crate::journal::{Journal, JournalStats};
pub use crate::pace::{
    Binding, CallOutcome, Lane, LaneSnapshot, Need, Pace, Permit, Place, Priority, Tenant,
};
pub use crate::pipeline::{
    BoxPipeline, FnPipeline, Map, OrElse, Pipeline, PipelineExt, Then, Timeout, pipeline,
};
pub use crate::pool::{Pool, Turn, Visit};
#[cfg(feature = "sim")]
#[doc(inline)]
pub use crate::provider::sim::Sim;
#[cfg(feature = "anthropic")]
#[doc(inline)]
pub use crate::provider::{Anthropic, AnthropicBuilder};
#[doc(inline)]
pub use crate::provider::{Capabilities, OutputCharge, Provider};
#[cfg(feature = "openai")]
#[doc(inline)]
pub use crate::provider::{OpenAi, OpenAiBuilder};
pub use crate::reply::{Delta, FinishReason, Reply, ReplyStream};
pub use crate::request::{Message, Request, ResponseFormat, Role};
pub use crate::retry::Retry;
pub use crate::run::{Audit, ItemResult, Notes, RunSnapshot, Runner, Submit};
pub use crate::scope::Tally;
pub use crate::settled::{Outcome, Settled};
#[cfg(feature = "signal")]
pub use crate::signal::stop_on_signal;
pub use crate::stream::Deltas;
#[cfg(feature = "structured")]
pub use crate::structured::{
    Drafts, GenerateAs, Generated, Growing, Items, OnBreak, OnLength, Rejection,
};
#[cfg(feature = "tiktoken")]
pub use crate::tiktoken::Tiktoken;
pub use crate::timeline::Timeline;
pub use crate::usage::{Quota, RateSnapshot, Usage};
pub use crate::worker::{Ambiguous, Drive, Worker, WorkerBuilder, WorkerStats};
