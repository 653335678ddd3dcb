//! [`OpenAi`]: chat completions, at OpenAI and at compatible servers.

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};

use super::http::{self, Dialect, Http, Json, PartialReply, RequestBody, Settings};
use super::{Capabilities, Provider};
use crate::error::{Error, ErrorKind, Result};
use crate::request::{FinishReason, Reply, ReplyStream, Request, ResponseFormat, Usage};

const BASE_URL: &str = "https://api.openai.com/v1";

/// A provider that speaks OpenAI's chat completions: OpenAI itself, Azure, Groq,
/// OpenRouter, vLLM, Ollama, llama.cpp and others, selected by the base URL.
///
/// It makes one call for each request and never retries. Every reply and every error
/// carries the rate limits that the server sent. Cheap to clone: clones share connections.
///
/// - An error's [kind](ErrorKind) tells whether a retry can help, and [`Error::billed`] whether
///   the call was charged: a refused call and one without a connection were not, a malformed
///   reply was, and for a call that broke or timed out it is unknown.
/// - It speaks HTTP/1.1, with a connection and an open file (`ulimit -n`) for each call in
///   flight. A call that finds no file descriptor fails with a temporary [`ErrorKind::Io`].
///   With HTTP/2, calls share connections ([`OpenAiBuilder::http2`]).
/// - [`Request::max_tokens`] is sent as `max_completion_tokens` to OpenAI and Azure, whose
///   newer models refuse `max_tokens`, and as `max_tokens` to all other servers
///   ([`OpenAiBuilder::max_tokens_field`] overrides it).
/// - A JSON schema is sent with `strict: true` if strict mode supports it: closed objects,
///   every property required. Otherwise it is sent with `strict: false`, as guidance.
/// - A refusal by the model is a reply. Its text is the refusal and its finish is
///   [`ContentFilter`](FinishReason::ContentFilter).
/// - With `extra("n", …)` only the first choice is read; [`Reply::raw`] has all of them.
///
/// # Example
///
/// ```no_run
/// use throughline::{OpenAi, Provider, Request};
///
/// # async fn example() -> throughline::Result<()> {
/// let openai = OpenAi::from_env()?;
/// let reply = openai
///     .generate(&Request::new("Name a river.").model("gpt-4.1-mini"))
///     .await?;
/// println!("{} ({} tokens)", reply.text, reply.usage.total());
/// # Ok(())
/// # }
/// ```
///
/// # Example: Azure
///
/// ```
/// use throughline::OpenAi;
///
/// let azure = OpenAi::builder()
///     .base_url("https://example.openai.azure.com/openai/deployments/gpt-4.1")
///     .api_key("0123456789abcdef")
///     .key_header("api-key")
///     .query("api-version", "2024-10-21")
///     .build()?;
/// # Ok::<(), throughline::Error>(())
/// ```
///
/// # Example: a local server, without a key
///
/// ```
/// use throughline::OpenAi;
///
/// let local = OpenAi::builder().base_url("http://localhost:11434/v1").build()?;
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Clone)]
pub struct OpenAi {
    http: Http,
    max_tokens_field: String,
}

impl OpenAi {
    /// Creates a client of OpenAI with this key and the defaults of [`OpenAi::builder`].
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] if the key has characters that are not allowed in a header.
    pub fn new(key: impl Into<String>) -> Result<Self> {
        Self::builder().api_key(key).build()
    }

    /// Creates a client with the key in `OPENAI_API_KEY` and the base URL in `OPENAI_BASE_URL`,
    /// which defaults to OpenAI's own.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] if neither is set (a base URL alone is enough, because local
    /// servers need no key), or if one is invalid.
    pub fn from_env() -> Result<Self> {
        OpenAiBuilder::from_vars(http::env)?.build()
    }

    /// Returns a builder.
    pub fn builder() -> OpenAiBuilder {
        OpenAiBuilder {
            settings: Settings::new(BASE_URL),
            key_header: None,
            max_tokens_field: None,
        }
    }

    fn body(&self, request: &Request, stream: bool) -> Result<Vec<u8>> {
        let mut body = RequestBody::new(request);
        body.field("model", Some(http::required_model(request)?))?;
        // `Role` serialises to the names of the dialect.
        body.field("messages", Some(&request.messages))?;
        body.field(&self.max_tokens_field, request.max_tokens)?;
        body.field("temperature", request.temperature)?;
        body.field("stop", (!request.stop.is_empty()).then_some(&request.stop))?;
        body.field("seed", request.seed)?;
        body.field("response_format", response_format(&request.response_format))?;
        if stream {
            body.field("stream_options", Some(json!({"include_usage": true})))?;
        }
        body.finish(stream)
    }
}

fn response_format(format: &ResponseFormat) -> Option<Value> {
    match format {
        ResponseFormat::Text => None,
        ResponseFormat::Json => Some(json!({"type": "json_object"})),
        ResponseFormat::JsonSchema { name, schema } => {
            let fit = http::enforceable(schema, &[]);
            let strict = fit.closed && fit.all_required;
            let schema = if strict { &fit.schema } else { schema };
            // The API refuses the names of generic types: `List<Item>`.
            let name: String = name
                .chars()
                .map(|c| {
                    if c.is_ascii_alphanumeric() || c == '-' {
                        c
                    } else {
                        '_'
                    }
                })
                .take(64)
                .collect();
            let json_schema = json!({"name": name, "schema": schema, "strict": strict});
            Some(json!({"type": "json_schema", "json_schema": json_schema}))
        }
    }
}

#[async_trait]
impl Provider for OpenAi {
    fn name(&self) -> &str {
        "openai"
    }

    /// # Cancel safety
    ///
    /// Dropping the future closes the connection. The server may still finish the reply and
    /// charge for it.
    async fn generate(&self, request: &Request) -> Result<Reply> {
        let body = self.body(request, false)?;
        self.http.generate::<Chat>(body, request.timeout).await
    }

    /// # Cancel safety
    ///
    /// Dropping the future or the stream closes the connection. The server may still finish
    /// the reply and charge for it.
    async fn stream(&self, request: &Request) -> Result<ReplyStream> {
        let body = self.body(request, true)?;
        self.http.stream::<Chat>(body, request.timeout).await
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::default().with_streaming().with_json(true)
    }
}

impl fmt::Debug for OpenAi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenAi")
            .field("http", &self.http)
            .field("max_tokens_field", &self.max_tokens_field)
            .finish()
    }
}

/// Builds an [`OpenAi`]. `Debug` shows neither the key nor the values of headers.
#[derive(Debug, Clone)]
pub struct OpenAiBuilder {
    settings: Settings,
    key_header: Option<String>,
    max_tokens_field: Option<String>,
}

impl OpenAiBuilder {
    http::shared_setters!();

    /// Sends the key in this header instead of as `authorization: Bearer …`. Azure expects it
    /// in `api-key`.
    #[must_use]
    pub fn key_header(mut self, name: impl Into<String>) -> Self {
        self.key_header = Some(name.into());
        self
    }

    /// Sets the organization that pays (`openai-organization`).
    #[must_use]
    pub fn organization(mut self, id: impl Into<String>) -> Self {
        self.settings
            .plain_headers
            .push(("openai-organization", id.into()));
        self
    }

    /// Sets the project that pays (`openai-project`).
    #[must_use]
    pub fn project(mut self, id: impl Into<String>) -> Self {
        self.settings
            .plain_headers
            .push(("openai-project", id.into()));
        self
    }

    /// Sets the name of the field in which [`Request::max_tokens`] is sent. The default is
    /// `max_completion_tokens` for OpenAI and Azure, else `max_tokens`.
    #[must_use]
    pub fn max_tokens_field(mut self, name: impl Into<String>) -> Self {
        self.max_tokens_field = Some(name.into());
        self
    }

    /// Builds the client. It connects when the first call is made.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] if the base URL, the key or a header is invalid.
    pub fn build(mut self) -> Result<OpenAi> {
        if let Some(key) = &self.settings.api_key {
            let key = key.expose_secret().to_owned();
            match self.key_header {
                Some(name) => self.settings.header(name, key),
                None => self
                    .settings
                    .header("authorization", format!("Bearer {key}")),
            }
        }
        let http = Http::new(self.settings, "/chat/completions")?;
        let host = http.host();
        let newest = [
            "api.openai.com",
            ".openai.azure.com",
            ".cognitiveservices.azure.com",
        ]
        .iter()
        .any(|name| host.ends_with(name));
        let field = if newest {
            "max_completion_tokens"
        } else {
            "max_tokens"
        };
        Ok(OpenAi {
            max_tokens_field: self.max_tokens_field.unwrap_or_else(|| field.into()),
            http,
        })
    }

    fn from_vars(var: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let (key, url) = (var("OPENAI_API_KEY"), var("OPENAI_BASE_URL"));
        if key.is_none() && url.is_none() {
            return Err(Error::new(
                ErrorKind::Config,
                "OPENAI_API_KEY is not set, nor OPENAI_BASE_URL for a server without keys",
            ));
        }
        let builder = OpenAi::builder().base_url(url.unwrap_or_else(|| BASE_URL.into()));
        Ok(builder.api_key(key.unwrap_or_default()))
    }
}

/// The dialect of chat completions.
struct Chat;

impl Dialect for Chat {
    fn parse_reply(body: &Json<'_>) -> Result<PartialReply, &'static str> {
        let choice = first_choice(body).ok_or("the reply has no choices")?;
        let message = choice.get("message");
        let mut reply = PartialReply::default();
        reply.text = content(&mut reply, message);
        read_metadata(&mut reply, body, choice);
        // Azure omits the message if its filter has removed all of it.
        if message.is_null() && reply.finish != Some(FinishReason::ContentFilter) {
            return Err("the choice has no message");
        }
        Ok(reply)
    }

    fn apply_event(reply: &mut PartialReply, event: &Json<'_>) -> String {
        // The event with the usage has no choice.
        let choice = first_choice(event).unwrap_or(&Json::Null);
        let text = content(reply, choice.get("delta"));
        read_metadata(reply, event, choice);
        text
    }
}

/// Returns the choice with index 0. With `n` above one, the events of a stream hold other choices too.
fn first_choice<'a>(body: &'a Json<'a>) -> Option<&'a Json<'a>> {
    let mut choices = body.get("choices").as_array()?.iter();
    choices.find(|choice| choice.get("index").as_u64().unwrap_or(0) == 0)
}

/// Reads model, usage and finish reason.
fn read_metadata(reply: &mut PartialReply, body: &Json<'_>, choice: &Json<'_>) {
    if let Some(model) = body.get("model").as_str() {
        model.clone_into(&mut reply.model);
    }
    if let Some(usage) = usage(body.get("usage")) {
        reply.usage = usage;
    }
    // Some servers send an empty reason in every event where others send null.
    let reason = choice.get("finish_reason").as_str();
    if let Some(reason) = reason.filter(|reason| !reason.is_empty()) {
        reply.finish = Some(match reason {
            "stop" => FinishReason::Stop,
            "length" => FinishReason::Length,
            "content_filter" => FinishReason::ContentFilter,
            "tool_calls" | "function_call" => FinishReason::ToolCalls,
            other => FinishReason::Other(other.to_owned()),
        });
    }
}

/// Returns the text of a message or a delta: a string, or a list of parts with some servers.
fn content(reply: &mut PartialReply, message: &Json<'_>) -> String {
    let text = match message.get("content") {
        Json::Str(text) => text.to_string(),
        Json::Array(pieces) => pieces
            .iter()
            .filter_map(|p| p.get("text").as_str())
            .collect(),
        _ => String::new(),
    };
    match message.get("refusal").as_str() {
        Some(refusal) if text.is_empty() && !refusal.is_empty() => {
            reply.refused = true;
            refusal.to_owned()
        }
        _ => text,
    }
}

fn usage(usage: &Json<'_>) -> Option<Usage> {
    usage.is_object().then(|| {
        let count = |value: &Json<'_>| value.as_u64().unwrap_or(0);
        Usage {
            input_tokens: count(usage.get("prompt_tokens")),
            output_tokens: count(usage.get("completion_tokens")),
            cached_input_tokens: count(usage.get("prompt_tokens_details").get("cached_tokens")),
            reasoning_tokens: count(
                usage
                    .get("completion_tokens_details")
                    .get("reasoning_tokens"),
            ),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vars<'a>(vars: &'a [(&str, &str)]) -> impl Fn(&str) -> Option<String> + 'a {
        |name| {
            let pair = vars.iter().find(|(key, _)| *key == name);
            pair.map(|(_, value)| (*value).to_owned())
        }
    }

    fn sent(openai: &OpenAi, request: &Request, stream: bool) -> Value {
        serde_json::from_slice(&openai.body(request, stream).unwrap()).unwrap()
    }

    #[test]
    fn a_base_url_needs_no_key_but_openai_itself_does() {
        let error = OpenAiBuilder::from_vars(vars(&[])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.message().contains("OPENAI_API_KEY"));
        let local = vars(&[("OPENAI_BASE_URL", "http://localhost:1/v1/")]);
        let local = OpenAiBuilder::from_vars(local).unwrap().build().unwrap();
        assert!(format!("{local:?}").contains("http://localhost:1/v1/chat/completions"));
        assert!(
            OpenAiBuilder::from_vars(vars(&[("OPENAI_API_KEY", "sk-1\n")]))
                .unwrap()
                .build()
                .is_ok()
        );
    }

    #[test]
    fn the_field_for_max_tokens_depends_on_the_server() {
        let request = Request::new("a").model("m").max_tokens(5);
        let field = |url: &str, name: Option<&str>| {
            let mut builder = OpenAi::builder().base_url(url);
            if let Some(name) = name {
                builder = builder.max_tokens_field(name);
            }
            let body = sent(&builder.build().unwrap(), &request, false);
            body.as_object()
                .unwrap()
                .keys()
                .find(|key| key.starts_with("max"))
                .unwrap()
                .clone()
        };
        assert_eq!(field(BASE_URL, None), "max_completion_tokens");
        assert_eq!(
            field("https://x.openai.azure.com/openai", None),
            "max_completion_tokens"
        );
        assert_eq!(field("http://localhost:8000/v1", None), "max_tokens");
        assert_eq!(field(BASE_URL, Some("max_tokens")), "max_tokens");
    }

    #[test]
    fn extra_fields_overwrite_all_fields_except_stream() {
        let request = Request::new("a")
            .system("s")
            .model("m")
            .temperature(0.5)
            .seed(7)
            .stop("x")
            .extra("temperature", 0.9)
            .extra("stream", true);
        let openai = OpenAi::new("sk-test").unwrap();
        assert_eq!(
            sent(&openai, &request, false),
            json!({
                "model": "m",
                "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
                "temperature": 0.9,
                "seed": 7,
                "stop": ["x"],
            })
        );
        let streamed = sent(&openai, &request, true);
        assert_eq!(streamed["stream"], true);
        assert_eq!(streamed["stream_options"], json!({"include_usage": true}));
    }

    #[test]
    fn a_schema_is_strict_only_if_strict_mode_supports_it() {
        let format = |schema: Value| {
            let name = "List<Item>".to_owned();
            response_format(&ResponseFormat::JsonSchema { name, schema }).unwrap()["json_schema"]
                .take()
        };
        let strict = format(
            json!({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}),
        );
        assert_eq!(strict["strict"], true);
        assert_eq!(strict["name"], "List_Item_");
        assert_eq!(strict["schema"]["additionalProperties"], false);
        let optional = json!({"type": "object", "properties": {"a": {"type": "string"}}});
        let guided = format(optional.clone());
        assert_eq!(
            (&guided["strict"], &guided["schema"]),
            (&json!(false), &optional)
        );
    }
}
