//! [`Request`]: what a provider is asked, in words common to all of them.

pub(crate) mod digest;
pub(crate) mod reply;
#[cfg(any(feature = "http", feature = "structured"))]
pub(crate) mod schema;

pub use self::digest::RequestDigest;
pub use self::reply::{Delta, FinishReason, Reply, ReplyStream};
pub use crate::usage::{Quota, RateSnapshot, Usage};

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Who speaks in a [`Message`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Role {
    /// Instructions that stand above the conversation.
    System,
    /// The one who asks.
    User,
    /// The model.
    Assistant,
}

/// One turn of the conversation.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A turn of `role`.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self {
            role,
            content: content.into(),
        }
    }

    /// A turn of the user.
    ///
    /// ```
    /// use throughline::{Message, Request};
    ///
    /// let request = Request::conversation([
    ///     Message::system("Answer with one word."),
    ///     Message::user("Name a river."),
    ///     Message::assistant("Danube"),
    ///     Message::user("Another one."),
    /// ]);
    /// assert_eq!(request.last_text(), "Another one.");
    /// ```
    pub fn user(content: impl Into<String>) -> Self {
        Self::new(Role::User, content)
    }

    /// A turn of the model.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new(Role::Assistant, content)
    }

    /// Instructions that stand above the conversation.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new(Role::System, content)
    }
}

/// The form the answer must have.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ResponseFormat {
    /// Plain text.
    #[default]
    Text,
    /// Some JSON object.
    Json,
    /// JSON that satisfies a schema.
    JsonSchema {
        /// A short name for the schema, as some providers ask for one.
        name: String,
        /// The JSON schema.
        schema: Value,
    },
}

/// What a provider is asked: neutral words, plus [`extra`](Request::extra) for its own.
///
/// A string is a request with one user message.
///
/// ```
/// use throughline::Request;
///
/// let request = Request::new("Name a river.")
///     .system("Answer with one word.")
///     .max_tokens(10)
///     .temperature(0.7)
///     .extra("top_p", 0.9);
/// assert_eq!(request.messages.len(), 2);
/// ```
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Request {
    /// The model; `None` takes the context's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<Arc<str>>,
    /// The conversation so far, system messages first.
    pub messages: Vec<Message>,
    /// The most tokens the answer may have. `None` leaves it to the provider
    /// (Anthropic demands a number; its client sends 4,096 then).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u64>,
    /// The sampling temperature.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Texts that end the answer where they would appear.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// A seed, for providers that sample reproducibly.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// The form the answer must have.
    pub response_format: ResponseFormat,
    /// Fields of the provider's own, sent as they are. A field that the
    /// provider's client sets itself is overwritten by the one given here.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub extra: Map<String, Value>,
    /// The longest the whole call may take; `None` takes the context's. Not part of the digest.
    #[serde(skip)]
    pub timeout: Option<Duration>,
    /// The key of the item this is asked for, set by the context. It is sent to
    /// nobody and is not part of the digest; the simulated provider's ledger shows it.
    #[serde(skip)]
    pub item_key: Option<Arc<str>>,
    /// Where the context has a store: `Some(n)` shares the nth answer to this request among
    /// all items of a tenant; `None` gives each item an answer of its own. Not part of the digest.
    #[serde(skip)]
    pub sample: Option<u32>,
    /// The type of the reply, for `generate_as` and its siblings. The digest contains its shape only.
    #[serde(skip)]
    pub(crate) reply_type: Option<Arc<ReplyType>>,
    /// Whether the first message is the prompt of the reply type, which the digest leaves out.
    #[serde(skip)]
    pub(crate) has_schema_prompt: bool,
    /// A reply to what this asks for came before and could not be used. Not part of the digest.
    #[serde(skip)]
    pub(crate) asks_again: bool,
}

/// The type of a reply. Each deployment gets its schema in the form that its provider supports. The schema is no part of the
/// digest, so a request replays after its type was edited.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ReplyType {
    /// Whether a value or a list is asked for, and in which field. The digest contains it in place of the response format.
    pub(crate) shape: String,
    /// The schema in the form that providers enforce, with its name; `None` if it cannot be enforced.
    pub(crate) enforceable: Option<(String, Value)>,
    /// The instruction with the schema, for providers that do not enforce it.
    pub(crate) prompt: String,
}

impl Request {
    /// A request with one user message.
    pub fn new(prompt: impl Into<String>) -> Self {
        Self {
            messages: vec![Message::new(Role::User, prompt)],
            ..Self::default()
        }
    }

    /// A request with a whole conversation.
    pub fn conversation(messages: impl IntoIterator<Item = Message>) -> Self {
        Self {
            messages: messages.into_iter().collect(),
            ..Self::default()
        }
    }

    /// Puts a system message in front.
    #[must_use]
    pub fn system(mut self, content: impl Into<String>) -> Self {
        self.messages.insert(0, Message::new(Role::System, content));
        self
    }

    /// Sets the model.
    #[must_use]
    pub fn model(mut self, model: impl Into<Arc<str>>) -> Self {
        self.model = Some(model.into());
        self
    }

    /// Sets the most tokens the answer may have.
    #[must_use]
    pub fn max_tokens(mut self, max_tokens: u64) -> Self {
        self.max_tokens = Some(max_tokens);
        self
    }

    /// Sets the sampling temperature.
    #[must_use]
    pub fn temperature(mut self, temperature: f64) -> Self {
        self.temperature = Some(temperature);
        self
    }

    /// Adds a text that ends the answer where it would appear.
    #[must_use]
    pub fn stop(mut self, sequence: impl Into<String>) -> Self {
        self.stop.push(sequence.into());
        self
    }

    /// Sets the seed.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Sets the form the answer must have.
    #[must_use]
    pub fn response_format(mut self, format: ResponseFormat) -> Self {
        self.response_format = format;
        self
    }

    /// Sets a field of the provider's own, sent as it is.
    #[must_use]
    pub fn extra(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.extra.insert(name.into(), value.into());
        self
    }

    /// Sets the longest the whole call may take.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Shares one answer among all items of a tenant that ask the same, where the context has a
    /// store: it is paid for once, also while it is still in flight.
    #[must_use]
    pub fn shared(self) -> Self {
        self.sample(0)
    }

    /// As [`shared`](Self::shared), for who wants several answers to one request: all that ask for
    /// sample `n` get the same one.
    #[must_use]
    pub fn sample(mut self, n: u32) -> Self {
        self.sample = Some(n);
        self
    }

    /// The content of the last message, empty without one.
    pub fn last_text(&self) -> &str {
        self.messages.last().map_or("", |message| &message.content)
    }

    /// A rough count of the prompt's tokens: four UTF-8 bytes to a token for text, and
    /// four tokens for the frame of each message. English prose has 4 to 5 bytes to a
    /// token and other scripts have fewer characters to one but more bytes to each,
    /// so the estimate tends to lie a little above the truth.
    pub fn estimated_input_tokens(&self) -> u64 {
        let schema = match &self.response_format {
            ResponseFormat::JsonSchema { schema, .. } => schema.to_string().len(),
            _ => 0,
        };
        let text: usize = self.messages.iter().map(|m| m.content.len()).sum();
        ((text + schema) as u64).div_ceil(4) + 4 * self.messages.len() as u64
    }
}

impl From<&str> for Request {
    fn from(prompt: &str) -> Self {
        Self::new(prompt)
    }
}

impl From<&String> for Request {
    fn from(prompt: &String) -> Self {
        Self::new(prompt)
    }
}

impl From<String> for Request {
    fn from(prompt: String) -> Self {
        Self::new(prompt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_message_goes_first() {
        let request = Request::new("a").system("b");
        assert_eq!(request.messages[0].role, Role::System);
        assert_eq!(request.last_text(), "a");
    }

    #[test]
    fn input_tokens_grow_with_text_and_messages() {
        assert_eq!(Request::default().estimated_input_tokens(), 0);
        assert_eq!(Request::new("12345678").estimated_input_tokens(), 2 + 4);
        assert_eq!(
            Request::new("12345678")
                .system("1")
                .estimated_input_tokens(),
            3 + 8
        );
    }

    #[test]
    fn json_round_trip_leaves_out_what_is_ours_alone() {
        let mut request = Request::new("a").timeout(Duration::from_secs(1)).seed(7);
        let json = serde_json::to_string(&request).unwrap();
        request.timeout = None;
        assert_eq!(serde_json::from_str::<Request>(&json).unwrap(), request);
    }
}
