//! [`Anthropic`]: the Messages API.

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use secrecy::ExposeSecret as _;
use serde_json::json;

use super::http::{self, Dialect, Fields, Http, Json, Parts, Settings};
use super::{Capabilities, OutputCharge, Provider};
use crate::error::{Error, ErrorKind, Result};
use crate::request::Usage;
use crate::request::reply::{FinishReason, Reply, ReplyStream};
use crate::request::{Request, ResponseFormat, Role};

const BASE_URL: &str = "https://api.anthropic.com";
const VERSION: &str = "2023-06-01";

/// The API demands a limit; this one suits models of every size.
const MAX_TOKENS: u64 = 4096;

/// What the API's grammars do not take.
const UNSUPPORTED: [&str; 12] = [
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
/// It makes one call for each request and never retries; every reply and every error
/// carries the rate limits the server sent. Cheap to clone: clones share connections.
///
/// - An error's [kind](ErrorKind) says what can be done. A refusal and a connection that
///   was not made cost nothing, a malformed reply did cost, and of a call that broke or
///   timed out nobody knows ([`Error::billed`]).
/// - It speaks HTTP/1.1, with a connection for each call in flight: many of them need as many
///   open files (`ulimit -n`), and a call that finds none left fails with a temporary
///   [`ErrorKind::Io`]. HTTP/2 shares a connection (`http2` of the builder).
/// - System messages are joined and sent as the API's `system` field.
/// - Without [`Request::max_tokens`], 4,096 is sent, as the API demands a number.
/// - [`Request::seed`] is not sent: the API has none.
/// - A JSON schema is sent as `output_config.format`, which current models enforce, closed
///   and without the bounds that the API refuses (check those on the reply). A schema with
///   maps or free JSON cannot be enforced and is not sent, nor is
///   [`ResponseFormat::Json`]: ask for JSON in the prompt then.
/// - Tokens written to and read from the cache are part of the input tokens; those read
///   are the cached ones.
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
    /// A client with this key and the defaults of [`Anthropic::builder`].
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] if the key has characters that no header may have.
    pub fn new(key: impl Into<String>) -> Result<Self> {
        Self::builder().api_key(key).build()
    }

    /// A client with the key in `ANTHROPIC_API_KEY` at the base URL in
    /// `ANTHROPIC_BASE_URL`, or at Anthropic's own if that is not set.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] if neither is set (a base URL may do without a key, as a
    /// gateway may hold it), or if one cannot be used.
    pub fn from_env() -> Result<Self> {
        AnthropicBuilder::from_vars(http::env)?.build()
    }

    /// A builder, for everything that can be set.
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
        let mut body = Fields::new(request);
        body.put("model", Some(http::model(request)?))?;
        body.put("max_tokens", Some(request.max_tokens.unwrap_or(MAX_TOKENS)))?;
        // The other two roles are named here as in the dialect.
        body.put("messages", Some(messages))?;
        let system = (!system.is_empty()).then(|| system.join("\n\n"));
        body.put("system", system)?;
        body.put("temperature", request.temperature)?;
        let stop = (!request.stop.is_empty()).then_some(&request.stop);
        body.put("stop_sequences", stop)?;
        if let ResponseFormat::JsonSchema { schema, .. } = &request.response_format {
            let fit = http::enforceable(schema, &UNSUPPORTED);
            if fit.closed {
                let format = json!({"type": "json_schema", "schema": fit.schema});
                body.put("output_config", Some(json!({ "format": format })))?;
            }
        }
        body.end(stream)
    }
}

#[async_trait]
impl Provider for Anthropic {
    fn name(&self) -> &str {
        "anthropic"
    }

    /// # Cancel safety
    ///
    /// Dropping the future closes the connection; nothing more is sent. The server may
    /// still finish the reply and charge for it.
    async fn generate(&self, request: &Request) -> Result<Reply> {
        let body = Self::body(request, false)?;
        self.http.generate::<Messages>(body, request.timeout).await
    }

    /// # Cancel safety
    ///
    /// Dropping the future or the stream closes the connection; nothing more is sent.
    /// The server may still finish the reply and charge for it.
    async fn stream(&self, request: &Request) -> Result<ReplyStream> {
        let body = Self::body(request, true)?;
        self.http.stream::<Messages>(body, request.timeout).await
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            // A schema is enforced; "some JSON", without one, is not.
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

/// Builds an [`Anthropic`]. Its `Debug` shows no key and no header's value.
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

    /// Builds the client. It connects with its first call.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] if the base URL, the key or a header cannot be used.
    pub fn build(mut self) -> Result<Anthropic> {
        self.settings
            .plain
            .push(("anthropic-version", self.version));
        if let Some(key) = &self.settings.api_key {
            let key = key.expose_secret().to_owned();
            self.settings.header("x-api-key", key);
        }
        // People write the base URL with the version in it, as other APIs have it.
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
    fn whole(body: &Json<'_>) -> Result<Parts, &'static str> {
        let blocks = body.get("content").as_array();
        let blocks = blocks.ok_or("the reply has no content")?;
        let mut parts = Parts {
            text: blocks
                .iter()
                .filter_map(|block| block.get("text").as_str())
                .collect(),
            ..Parts::default()
        };
        read(&mut parts, body, body);
        Ok(parts)
    }

    fn frame(parts: &mut Parts, frame: &Json<'_>) -> String {
        match frame.get("type").as_str().unwrap_or_default() {
            "message_start" => read(parts, frame.get("message"), frame.get("message")),
            "message_delta" => read(parts, frame, frame.get("delta")),
            "message_stop" => parts.done = true,
            // `ping`, blocks' starts and stops, and what may come in later versions.
            _ => {}
        }
        // Only a `content_block_delta` has one, and of those only a `text_delta`.
        frame
            .get("delta")
            .get("text")
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }
}

/// Takes in what stands beside the text; `delta` is where a stop reason would be.
fn read(parts: &mut Parts, message: &Json<'_>, delta: &Json<'_>) {
    if let Some(model) = message.get("model").as_str() {
        model.clone_into(&mut parts.model);
    }
    usage(&mut parts.usage, message.get("usage"));
    // As with the other dialect, compatible servers may write an empty one for null.
    let reason = delta.get("stop_reason").as_str();
    if let Some(reason) = reason.filter(|reason| !reason.is_empty()) {
        parts.finish = Some(match reason {
            "end_turn" | "stop_sequence" => FinishReason::Stop,
            "max_tokens" | "model_context_window_exceeded" => FinishReason::Length,
            "refusal" => FinishReason::ContentFilter,
            "tool_use" => FinishReason::ToolCalls,
            other => FinishReason::Other(other.to_owned()),
        });
    }
}

/// A stream counts its output cumulatively, and its input mostly in the first frame only.
fn usage(usage: &mut Usage, counts: &Json<'_>) {
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
    fn system_messages_leave_the_conversation_and_max_tokens_is_always_there() {
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
    fn a_schema_is_sent_closed_and_without_bounds_or_not_at_all() {
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
    fn the_environment_names_a_key_or_a_server() {
        let error = AnthropicBuilder::from_vars(|_| None).unwrap_err();
        assert!(error.message().contains("ANTHROPIC_API_KEY"));
        for base in ["http://localhost:1", "http://localhost:1/v1/"] {
            let vars = |name: &str| (name == "ANTHROPIC_BASE_URL").then(|| base.to_owned());
            let client = AnthropicBuilder::from_vars(vars).unwrap().build().unwrap();
            assert!(format!("{client:?}").contains("http://localhost:1/v1/messages"));
        }
    }

    #[test]
    fn a_schema_is_enforced_and_plain_json_is_not() {
        let can = Anthropic::new("k").unwrap().capabilities();
        assert!(can.streaming && can.json_schema && !can.json);
        assert_eq!(can.output_charge, OutputCharge::Produced);
    }
}
