//! [`Anthropic`]: the Messages API.

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use secrecy::ExposeSecret as _;
use serde_json::json;

use super::http::{self, Dialect, Http, Json, PartialReply, RequestBody, Settings};
use super::{Capabilities, OutputCharge, Provider};
use crate::error::{Error, ErrorKind, Result};
use crate::request::{FinishReason, Reply, ReplyStream, Request, ResponseFormat, Role, Usage};

const BASE_URL: &str = "https://api.anthropic.com";
const VERSION: &str = "2023-06-01";

/// The value of `max_tokens` for requests without one, because the API requires it. Every model supports it.
const DEFAULT_MAX_TOKENS: u64 = 4096;

/// Keywords of JSON schema that the API refuses.
const UNSUPPORTED_KEYWORDS: [&str; 12] = [
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "uniqueItems",
    "minProperties",
    "maxProperties",
];

/// A provider that speaks Anthropic's Messages API.
///
/// It makes one call for each request and never retries. Every reply and every error
/// carries the rate limits that the server sent. Cheap to clone: clones share connections.
///
/// - An error's [kind](ErrorKind) tells whether a retry can help, and [`Error::billed`] whether
///   the call was charged: a refused call and one without a connection were not, a malformed
///   reply was, and for a call that broke or timed out it is unknown.
/// - It speaks HTTP/1.1, with a connection and an open file (`ulimit -n`) for each call in
///   flight. A call that finds no file descriptor fails with a temporary [`ErrorKind::Io`].
///   With HTTP/2, calls share connections ([`AnthropicBuilder::http2`]).
/// - System messages are joined and sent as the API's `system` field.
/// - Without [`Request::max_tokens`], 4,096 is sent, because the API requires a number.
/// - [`Request::seed`] is not sent: the API has no such field.
/// - A JSON schema is sent as `output_config.format`, which current models enforce. Its objects
///   are closed, and the bounds that the API refuses are removed: check them on the reply. A
///   schema with maps or free JSON cannot be enforced and is not sent, nor is
///   [`ResponseFormat::Json`]; ask for JSON in the prompt instead.
/// - Tokens written to and read from the cache are part of the input tokens. Those read are
///   the cached ones.
///
/// # Example
///
/// ```no_run
/// use throughline::{Anthropic, Provider, Request};
///
/// # async fn example() -> throughline::Result<()> {
/// let anthropic = Anthropic::from_env()?;
/// let reply = anthropic
///     .generate(&Request::new("Name a river.").model("claude-haiku-4-5"))
///     .await?;
/// println!("{} ({} tokens)", reply.text, reply.usage.total());
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Anthropic {
    http: Http,
}

impl Anthropic {
    /// Creates a client with this key and the defaults of [`Anthropic::builder`].
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] if the key has characters that are not allowed in a header.
    pub fn new(key: impl Into<String>) -> Result<Self> {
        Self::builder().api_key(key).build()
    }

    /// Creates a client with the key in `ANTHROPIC_API_KEY` and the base URL in
    /// `ANTHROPIC_BASE_URL`, which defaults to Anthropic's own.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] if neither is set (a base URL alone is enough, because a gateway
    /// may hold the key), or if one is invalid.
    pub fn from_env() -> Result<Self> {
        AnthropicBuilder::from_vars(http::env)?.build()
    }

    /// Returns a builder.
    pub fn builder() -> AnthropicBuilder {
        AnthropicBuilder {
            settings: Settings::new(BASE_URL),
            version: VERSION.into(),
        }
    }

    fn body(request: &Request, stream: bool) -> Result<Vec<u8>> {
        let (system, messages): (Vec<_>, Vec<_>) = request
            .messages
            .iter()
            .partition(|message| message.role == Role::System);
        let system: Vec<&str> = system.iter().map(|message| &*message.content).collect();
        let mut body = RequestBody::new(request);
        body.field("model", Some(http::required_model(request)?))?;
        body.field(
            "max_tokens",
            Some(request.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS)),
        )?;
        // `Role` serialises to the names of the dialect.
        body.field("messages", Some(messages))?;
        let system = (!system.is_empty()).then(|| system.join("\n\n"));
        body.field("system", system)?;
        body.field("temperature", request.temperature)?;
        let stop = (!request.stop.is_empty()).then_some(&request.stop);
        body.field("stop_sequences", stop)?;
        if let ResponseFormat::JsonSchema { schema, .. } = &request.response_format {
            let fit = http::enforceable(schema, &UNSUPPORTED_KEYWORDS);
            if fit.closed {
                let format = json!({"type": "json_schema", "schema": fit.schema});
                body.field("output_config", Some(json!({ "format": format })))?;
            }
        }
        body.finish(stream)
    }
}

#[async_trait]
impl Provider for Anthropic {
    fn name(&self) -> &str {
        "anthropic"
    }

    /// # Cancel safety
    ///
    /// Dropping the future closes the connection. The server may still finish the reply and
    /// charge for it.
    async fn generate(&self, request: &Request) -> Result<Reply> {
        let body = Self::body(request, false)?;
        self.http.generate::<Messages>(body, request.timeout).await
    }

    /// # Cancel safety
    ///
    /// Dropping the future or the stream closes the connection. The server may still finish
    /// the reply and charge for it.
    async fn stream(&self, request: &Request) -> Result<ReplyStream> {
        let body = Self::body(request, true)?;
        self.http.stream::<Messages>(body, request.timeout).await
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            // JSON is enforced with a schema only.
            json_schema: true,
            ..Capabilities::default()
                .with_streaming()
                .with_output_charge(OutputCharge::Produced)
        }
    }
}

impl fmt::Debug for Anthropic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Anthropic")
            .field("http", &self.http)
            .finish()
    }
}

/// Builds an [`Anthropic`]. `Debug` shows neither the key nor the values of headers.
#[derive(Debug, Clone)]
pub struct AnthropicBuilder {
    settings: Settings,
    version: String,
}

impl AnthropicBuilder {
    http::shared_setters!();

    /// Sets the API's version (`anthropic-version`). The default is `2023-06-01`.
    #[must_use]
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.version = version.into();
        self
    }

    /// Builds the client. It connects when the first call is made.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] if the base URL, the key or a header is invalid.
    pub fn build(mut self) -> Result<Anthropic> {
        self.settings
            .plain_headers
            .push(("anthropic-version", self.version));
        if let Some(key) = &self.settings.api_key {
            let key = key.expose_secret().to_owned();
            self.settings.header("x-api-key", key);
        }
        // The base URLs of other APIs include the version, so users may include it here too.
        let base = self.settings.base_url.trim().trim_end_matches('/');
        let path = if base.ends_with("/v1") {
            "/messages"
        } else {
            "/v1/messages"
        };
        let http = Http::new(self.settings, path)?;
        Ok(Anthropic { http })
    }

    fn from_vars(var: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let (key, url) = (var("ANTHROPIC_API_KEY"), var("ANTHROPIC_BASE_URL"));
        if key.is_none() && url.is_none() {
            return Err(Error::new(
                ErrorKind::Config,
                "ANTHROPIC_API_KEY is not set, nor ANTHROPIC_BASE_URL for a server without keys",
            ));
        }
        let builder = Anthropic::builder().base_url(url.unwrap_or_else(|| BASE_URL.into()));
        Ok(builder.api_key(key.unwrap_or_default()))
    }
}

/// The dialect of the Messages API.
struct Messages;

impl Dialect for Messages {
    fn parse_reply(body: &Json<'_>) -> Result<PartialReply, &'static str> {
        let blocks = body.get("content").as_array();
        let blocks = blocks.ok_or("the reply has no content")?;
        let mut reply = PartialReply {
            text: blocks
                .iter()
                .filter_map(|block| block.get("text").as_str())
                .collect(),
            ..PartialReply::default()
        };
        read_metadata(&mut reply, body, body);
        Ok(reply)
    }

    fn apply_event(reply: &mut PartialReply, event: &Json<'_>) -> String {
        match event.get("type").as_str().unwrap_or_default() {
            "message_start" => read_metadata(reply, event.get("message"), event.get("message")),
            "message_delta" => read_metadata(reply, event, event.get("delta")),
            "message_stop" => reply.done = true,
            // `ping`, starts and stops of blocks, and events of later versions.
            _ => {}
        }
        // Only the `text_delta` of a `content_block_delta` has a text.
        event
            .get("delta")
            .get("text")
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }
}

/// Reads model, usage and stop reason, which is a field of `delta`.
fn read_metadata(reply: &mut PartialReply, message: &Json<'_>, delta: &Json<'_>) {
    if let Some(model) = message.get("model").as_str() {
        model.clone_into(&mut reply.model);
    }
    read_usage(&mut reply.usage, message.get("usage"));
    // Compatible servers may send an empty reason in the place of null.
    let reason = delta.get("stop_reason").as_str();
    if let Some(reason) = reason.filter(|reason| !reason.is_empty()) {
        reply.finish = Some(match reason {
            "end_turn" | "stop_sequence" => FinishReason::Stop,
            "max_tokens" | "model_context_window_exceeded" => FinishReason::Length,
            "refusal" => FinishReason::ContentFilter,
            "tool_use" => FinishReason::ToolCalls,
            other => FinishReason::Other(other.to_owned()),
        });
    }
}

/// Reads the token counts. In a stream, output counts are cumulative, and mostly only the first event has input counts.
fn read_usage(usage: &mut Usage, counts: &Json<'_>) {
    let count = |name: &str| counts.get(name).as_u64();
    if let Some(fresh) = count("input_tokens") {
        let read = count("cache_read_input_tokens").unwrap_or(0);
        let written = count("cache_creation_input_tokens").unwrap_or(0);
        usage.input_tokens = fresh.saturating_add(read).saturating_add(written);
        usage.cached_input_tokens = read;
    }
    if let Some(output) = count("output_tokens") {
        usage.output_tokens = output;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn sent(request: &Request, stream: bool) -> Value {
        serde_json::from_slice(&Anthropic::body(request, stream).unwrap()).unwrap()
    }

    #[test]
    fn system_messages_are_sent_apart_and_max_tokens_is_always_sent() {
        let request = Request::new("a")
            .system("two")
            .system("one")
            .model("m")
            .stop("x")
            .seed(1);
        assert_eq!(
            sent(&request, true),
            json!({
                "model": "m",
                "max_tokens": 4096,
                "system": "one\n\ntwo",
                "messages": [{"role": "user", "content": "a"}],
                "stop_sequences": ["x"],
                "stream": true,
            })
        );
        assert_eq!(sent(&request.max_tokens(9), false)["max_tokens"], 9);
    }

    #[test]
    fn a_schema_is_sent_closed_and_without_bounds_or_not_sent() {
        let with = |schema: Value| {
            let format = ResponseFormat::JsonSchema {
                name: "n".into(),
                schema,
            };
            sent(&Request::new("a").model("m").response_format(format), false)
        };
        let body = with(json!({"type": "object", "properties": {
            "n": {"type": "integer", "minimum": 0, "format": "uint8"},
        }}));
        assert_eq!(
            body["output_config"]["format"],
            json!({"type": "json_schema", "schema": {
                "type": "object",
                "properties": {"n": {"type": "integer"}},
                "additionalProperties": false,
            }})
        );
        assert_eq!(with(json!({"type": "object"})).get("output_config"), None);
    }

    #[test]
    fn the_environment_must_name_a_key_or_a_base_url() {
        let error = AnthropicBuilder::from_vars(|_| None).unwrap_err();
        assert!(error.message().contains("ANTHROPIC_API_KEY"));
        for base in ["http://localhost:1", "http://localhost:1/v1/"] {
            let vars = |name: &str| (name == "ANTHROPIC_BASE_URL").then(|| base.to_owned());
            let client = AnthropicBuilder::from_vars(vars).unwrap().build().unwrap();
            assert!(format!("{client:?}").contains("http://localhost:1/v1/messages"));
        }
    }

    #[test]
    fn capabilities_include_json_schema_but_not_plain_json() {
        let capabilities = Anthropic::new("k").unwrap().capabilities();
        assert!(capabilities.streaming && capabilities.json_schema && !capabilities.json);
        assert_eq!(capabilities.output_charge, OutputCharge::Produced);
    }
}
