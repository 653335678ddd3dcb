//! [`RequestBody`]: writes the JSON of a request.

use serde::Serialize;

use crate::error::{Error, ErrorKind, Result};
use crate::request::Request;

/// Returns the model of a request, without which nothing can be sent.
pub(crate) fn required_model(request: &Request) -> Result<&str> {
    request.model.as_deref().ok_or_else(|| {
        let message = "the request names no model: set one with Request::model, or a default \
                       for all requests of the context";
        Error::new(ErrorKind::InvalidRequest, message)
    })
}

/// The JSON object of a request: the fields of the dialect, and those of [`Request::extra`], which win where the
/// names are equal.
pub(crate) struct RequestBody<'a> {
    json: Vec<u8>,
    request: &'a Request,
}

impl<'a> RequestBody<'a> {
    pub(crate) fn new(request: &'a Request) -> Self {
        // Most of the body is the prompt: reserving room for it avoids copies while the buffer grows.
        let texts = request.messages.iter().map(|m| m.content.len());
        Self {
            json: Vec::with_capacity(512 + texts.sum::<usize>()),
            request,
        }
    }

    pub(crate) fn field(&mut self, name: &str, value: Option<impl Serialize>) -> Result<()> {
        match value {
            Some(value) if !self.request.extra.contains_key(name) => self.write(name, value),
            _ => Ok(()),
        }
    }

    fn write(&mut self, name: &str, value: impl Serialize) -> Result<()> {
        let first = self.json.is_empty();
        self.json.push(if first { b'{' } else { b',' });
        serde_json::to_writer(&mut self.json, name)?;
        self.json.push(b':');
        Ok(serde_json::to_writer(&mut self.json, &value)?)
    }

    /// Finishes the object. `extra` cannot decide whether the reply is streamed: the method that was called does.
    pub(crate) fn finish(mut self, stream: bool) -> Result<Vec<u8>> {
        let extra = self.request.extra.iter();
        for (name, value) in extra.filter(|(name, _)| *name != "stream") {
            self.write(name, value)?;
        }
        if stream {
            self.write("stream", true)?;
        }
        self.json.push(b'}');
        Ok(self.json)
    }
}
