//! [`Dialect`]: the part of reading a reply that differs between providers.

/// JSON that borrows from its text. Every reply is parsed once, so there is no need for an owned tree.
pub(crate) use serde_json_borrow::Value as Json;

use crate::error::Result;
use crate::request::{FinishReason, Usage};

/// The format in which a provider writes replies.
pub(crate) trait Dialect: Send + 'static {
    /// Parses a whole reply. The error says what is missing.
    fn parse_reply(body: &Json<'_>) -> Result<PartialReply, &'static str>;

    /// Applies one event of a stream to the reply, except for its text, which is returned.
    fn apply_event(reply: &mut PartialReply, event: &Json<'_>) -> String;
}

/// The part of a reply that has been received.
#[derive(Debug, Default)]
pub(crate) struct PartialReply {
    pub(crate) text: String,
    pub(crate) finish: Option<FinishReason>,
    pub(crate) usage: Usage,
    pub(crate) model: String,
    /// The text is a refusal by the model, even if `finish` does not say so.
    pub(crate) refused: bool,
    /// An event has marked the end of the stream.
    pub(crate) done: bool,
}
