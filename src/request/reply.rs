//! [`Reply`]: what a provider answered, whole or in [`Delta`]s.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::usage::{RateSnapshot, Usage};

/// Why the model stopped.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FinishReason {
    /// It was done, or met a stop sequence.
    Stop,
    /// It reached the limit on output tokens: the text is cut.
    Length,
    /// The provider withheld content.
    ContentFilter,
    /// It asked for a tool.
    ToolCalls,
    /// The provider's own word for something else.
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

/// A provider's answer to a [`Request`](crate::Request).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Reply {
    /// The generated text.
    pub text: String,
    /// Why the model stopped.
    pub finish: FinishReason,
    /// The tokens used, as the provider counted them.
    pub usage: Usage,
    /// The model that answered, as the provider names it.
    pub model: String,
    /// The provider's id of the call, for a question to its support.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// The body as it came (for a stream: the last frame), before anything was parsed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raw: Option<Arc<str>>,
    /// The rate limits at that moment, if the provider said. Not serialised: it ages in seconds.
    #[serde(skip)]
    pub rate: Option<Box<RateSnapshot>>,
}

impl Reply {
    /// A finished text with its usage; set the other fields as they are known.
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
    /// What came so far is void: the call is made again. A provider never says so; it is
    /// [asked for](crate::context::Deltas::discarding).
    Discard,
    /// The end: the whole reply, text included. A stream that ends without it was cut.
    End(Box<Reply>),
}

/// A reply as it is being written. Dropping it closes the connection.
pub type ReplyStream = Pin<Box<dyn Stream<Item = Result<Delta>> + Send>>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finish_reasons_are_plain_words_in_json() {
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
