//! [`Request`]: a prompt with its settings, in terms common to all providers.

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

/// The speaker of a [`Message`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Role {
    /// The author of instructions for the whole conversation.
    System,
    /// The user, who asks.
    User,
    /// The model, which answers.
    Assistant,
}

/// One turn of the conversation.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Message {
    /// The speaker.
    pub role: Role,
    /// The text.
    pub content: String,
}

impl Message {
    /// Makes a message of `role`.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self {
            role,
            content: content.into(),
        }
    }

    /// Makes a message of the user.
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

    /// Makes a message of the model.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new(Role::Assistant, content)
    }

    /// Makes a system message: instructions for the whole conversation.
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
    /// A JSON object of any shape.
    Json,
    /// JSON that satisfies a schema.
    JsonSchema {
        /// A short name for the schema, which some providers require.
        name: String,
        /// The JSON schema.
        schema: Value,
    },
}

/// A prompt with its settings, common to all providers; [`extra`](Request::extra) holds settings of one provider.
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
    /// The most tokens that the answer may have. `None` leaves it to the provider
    /// (Anthropic requires a number; its client sends 4,096).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u64>,
    /// The sampling temperature.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Stop sequences: texts that end the answer where they would appear.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// A seed, for providers that sample reproducibly.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// The form the answer must have.
    pub response_format: ResponseFormat,
    /// Fields that only this provider knows, sent as they are. They replace fields of the same name
    /// that the client sets.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub extra: Map<String, Value>,
    /// The timeout of the whole call; `None` takes the context's. Not part of the digest.
    #[serde(skip)]
    pub timeout: Option<Duration>,
    /// The key of the item that asks, set by the context: the simulator bills it under this key.
    #[serde(skip)]
    pub(crate) item_key: Option<Arc<str>>,
    /// If the context has a store: `Some(n)` shares the nth answer to this request among
    /// all items of a tenant; `None` gives each item an answer of its own. Not part of the digest.
    #[serde(skip)]
    pub sample: Option<u32>,
    /// The type of the reply, for `generate_as` and its siblings. The digest contains its shape only.
    #[serde(skip)]
    pub(crate) reply_type: Option<Arc<ReplyType>>,
    /// Whether the first message is the prompt of the reply type, which the digest leaves out.
    #[serde(skip)]
    pub(crate) has_schema_prompt: bool,
    /// An earlier reply to the same question could not be used. Not part of the digest.
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
    /// Makes a request with one user message.
    pub fn new(prompt: impl Into<String>) -> Self {
        Self {
            messages: vec![Message::new(Role::User, prompt)],
            ..Self::default()
        }
    }

    /// Makes a request with a whole conversation.
    pub fn conversation(messages: impl IntoIterator<Item = Message>) -> Self {
        Self {
            messages: messages.into_iter().collect(),
            ..Self::default()
        }
    }

    /// Puts a system message in front of the others.
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

    /// Sets the most tokens that the answer may have.
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

    /// Adds a stop sequence: a text that ends the answer where it would appear.
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

    /// Sets a field that only this provider knows, sent as it is.
    #[must_use]
    pub fn extra(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.extra.insert(name.into(), value.into());
        self
    }

    /// Sets the timeout of the whole call.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Shares one answer among all items of a tenant that ask the same, if the context has a
    /// store. It is paid for once, also while the call is still in flight.
    #[must_use]
    pub fn shared(self) -> Self {
        self.sample(0)
    }

    /// As [`shared`](Self::shared), with several answers to one request: all requests for sample `n` share one
    /// answer.
    #[must_use]
    pub fn sample(mut self, n: u32) -> Self {
        self.sample = Some(n);
        self
    }

    /// Returns the content of the last message, or an empty text.
    pub fn last_text(&self) -> &str {
        self.messages.last().map_or("", |message| &message.content)
    }

    /// Estimates the number of prompt tokens: one for each four UTF-8 bytes of text, and
    /// four for the frame of each message.
    ///
    /// English prose has 4 to 5 bytes per token. Other scripts have fewer characters per token but more bytes per
    /// character. So the estimate tends to be a little too high.
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
    fn a_system_message_comes_first() {
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
    fn the_timeout_is_not_serialised() {
        let mut request = Request::new("a").timeout(Duration::from_secs(1)).seed(7);
        let json = serde_json::to_string(&request).unwrap();
        request.timeout = None;
        assert_eq!(serde_json::from_str::<Request>(&json).unwrap(), request);
    }
}
