//! [`Provider`]: the interface to a model, and its implementations.

#[cfg(feature = "anthropic")]
mod anthropic;
#[cfg(feature = "sim")]
pub mod sim;
// With one provider alone, a part is unused. Dead code shows with both.
#[cfg(feature = "http")]
#[cfg_attr(
    not(all(feature = "openai", feature = "anthropic")),
    allow(dead_code, unused)
)]
mod http;
#[cfg(feature = "openai")]
mod openai;
#[cfg(feature = "http")]
#[cfg_attr(
    not(all(feature = "openai", feature = "anthropic")),
    allow(dead_code, unused)
)]
mod rate_headers;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::stream;

use crate::error::Result;
use crate::request::Request;
use crate::request::reply::{Delta, Reply, ReplyStream};

#[cfg(feature = "anthropic")]
pub use self::anthropic::{Anthropic, AnthropicBuilder};
#[cfg(feature = "openai")]
pub use self::openai::{OpenAi, OpenAiBuilder};

/// The longest time between two pieces of a reply, unless set: some models think for minutes in the middle of a stream.
pub(crate) const IDLE_TIMEOUT: Duration = Duration::from_secs(300);

/// A model behind an API, a process or a function.
///
/// A provider makes **one** call and reports how it ended. It does not retry, wait or queue: the
/// [`Context`](crate::Context) does that for all providers.
///
/// - The [kind](crate::ErrorKind) of an error decides whether the call is retried and what happens to the calls behind
///   it. [`testing::provider`](crate::testing::provider) is a test suite for it (feature `testing`).
/// - An error carries the server's [wait](crate::Error::with_wait) and
///   [rate limits](crate::Error::with_rate), a reply the [rate limits](Reply::rate), if the server sends them.
/// - The returned future may be dropped at any await: it must close its connection.
///
/// # Example: a provider of your own
///
/// ```
/// use throughline::{Provider, Reply, Request, Result, Usage, async_trait};
///
/// struct Shout;
///
/// #[async_trait]
/// impl Provider for Shout {
///     fn name(&self) -> &str {
///         "shout"
///     }
///
///     async fn generate(&self, request: &Request) -> Result<Reply> {
///         Ok(Reply::new(request.last_text().to_uppercase(), Usage::new(1, 1)))
///     }
/// }
/// ```
#[async_trait]
pub trait Provider: Send + Sync + 'static {
    /// Returns a short name for logs, spans and errors: `openai`, `anthropic`.
    fn name(&self) -> &str;

    /// Makes the call and waits for the whole reply.
    async fn generate(&self, request: &Request) -> Result<Reply>;

    /// Makes the call and yields the reply as it is written, [`Delta::End`] last.
    ///
    /// The default waits for the whole reply and yields it as one piece.
    async fn stream(&self, request: &Request) -> Result<ReplyStream> {
        let reply = self.generate(request).await?;
        let text = Delta::Text(reply.text.clone());
        Ok(Box::pin(stream::iter([
            Ok(text),
            Ok(Delta::End(Box::new(reply))),
        ])))
    }

    /// Returns the optional features of this provider. The default is none.
    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }
}

/// The optional features of a provider.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// [`Provider::stream`] yields text while it is being written.
    pub streaming: bool,
    /// [`ResponseFormat::Json`](crate::request::ResponseFormat::Json) is enforced.
    pub json: bool,
    /// [`ResponseFormat::JsonSchema`](crate::request::ResponseFormat::JsonSchema) is enforced.
    pub json_schema: bool,
    /// How the provider charges output tokens against its rate limit.
    pub output_charge: OutputCharge,
}

impl Capabilities {
    /// Declares that [`Provider::stream`] yields text while it is being written.
    #[must_use]
    pub fn with_streaming(mut self) -> Self {
        self.streaming = true;
        self
    }

    /// Declares that JSON output is enforced, and with `schema` that a schema is.
    #[must_use]
    pub fn with_json(mut self, schema: bool) -> Self {
        self.json = true;
        self.json_schema = schema;
        self
    }

    /// Declares how output tokens are charged against the rate limit.
    #[must_use]
    pub fn with_output_charge(mut self, charge: OutputCharge) -> Self {
        self.output_charge = charge;
        self
    }
}

/// The output tokens that a provider charges against a token limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OutputCharge {
    /// `max_tokens` of the request, when the call is admitted (OpenAI, Azure).
    #[default]
    Reserved,
    /// The tokens that the reply really has, when they are produced (Anthropic).
    Produced,
}

macro_rules! forward {
    ($($holder:ty),+) => {$(
        #[async_trait]
        #[deny(clippy::missing_trait_methods)]
        impl<P: Provider + ?Sized> Provider for $holder {
            fn name(&self) -> &str {
                (**self).name()
            }
            async fn generate(&self, request: &Request) -> Result<Reply> {
                (**self).generate(request).await
            }
            async fn stream(&self, request: &Request) -> Result<ReplyStream> {
                (**self).stream(request).await
            }
            fn capabilities(&self) -> Capabilities {
                (**self).capabilities()
            }
        }
    )+};
}
forward!(Arc<P>, Box<P>);

impl fmt::Debug for dyn Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Provider").field(&self.name()).finish()
    }
}
