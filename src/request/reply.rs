//! [`Reply`]: the answer of a provider, whole or streamed in [`Delta`]s.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::usage::{RateSnapshot, Usage};

/// The reason why the model stopped.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FinishReason {
    /// The answer is complete, or met a stop sequence.
    Stop,
    /// The answer reached the limit on output tokens and is cut.
    Length,
    /// The provider withheld content.
    ContentFilter,
    /// The model asked for a tool.
    ToolCalls,
    /// Another reason, as the provider names it.
    #[serde(untagged)]
    Other(String),
}

impl fmt::Display for FinishReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ContentFilter => "content_filter",
            Self::ToolCalls => "tool_calls",
            Self::Other(word) => word,
        })
    }
}

/// The answer of a provider to a [`Request`](crate::Request).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Reply {
    /// The generated text.
    pub text: String,
    /// The reason why the model stopped.
    pub finish: FinishReason,
    /// The tokens that the call used, as the provider counted them.
    pub usage: Usage,
    /// The model that answered, as the provider names it.
    pub model: String,
    /// The provider's id of the call, for questions to its support.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// The body as it was received, before parsing; of a stream, the last frame.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raw: Option<Arc<str>>,
    /// The rate limits at that moment, if the provider reported them. They are outdated in seconds, so they are not
    /// serialised.
    #[serde(skip)]
    pub rate: Option<Box<RateSnapshot>>,
}

impl Reply {
    /// Makes a complete reply of a text and its usage; set the other fields if they are known.
    pub fn new(text: impl Into<String>, usage: Usage) -> Self {
        Self {
            text: text.into(),
            finish: FinishReason::Stop,
            usage,
            model: String::new(),
            request_id: None,
            raw: None,
            rate: None,
        }
    }
}

/// A piece of a streamed reply.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Delta {
    /// More text.
    Text(String),
    /// The text so far is void, because the call is made again. It comes only to streams that
    /// [ask for it](crate::context::Deltas::discarding), and never from a provider.
    Discard,
    /// The end, with the whole reply. A stream that ends without it was cut.
    End(Box<Reply>),
}

/// A reply as it is being written. Dropping it closes the connection.
pub type ReplyStream = Pin<Box<dyn Stream<Item = Result<Delta>> + Send>>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finish_reasons_are_serialised_as_words() {
        for (reason, word) in [
            (FinishReason::ToolCalls, "\"tool_calls\""),
            (FinishReason::Other("pause_turn".into()), "\"pause_turn\""),
        ] {
            assert_eq!(serde_json::to_string(&reason).unwrap(), word);
            assert_eq!(serde_json::from_str::<FinishReason>(word).unwrap(), reason);
            assert_eq!(format!("\"{reason}\""), word);
        }
    }
}
