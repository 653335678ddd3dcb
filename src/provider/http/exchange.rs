//! One call from request to [`Reply`], whole or streamed; what is a dialect's own is
//! behind [`Dialect`].

use std::marker::PhantomData;
use std::time::Duration;

use futures::stream;
use serde::Serialize;
/// A tree that borrows from the text it was read from: every reply is read once.
pub(crate) use serde_json_borrow::Value as Json;

use super::body::too_large;
use super::form::Form;
use super::sse::Events;
use super::{Head, Http, Limits, classify};
use crate::error::{Error, ErrorKind, Result};
use crate::request::Request;
use crate::request::Usage;
use crate::request::reply::{Delta, FinishReason, Reply, ReplyStream};

/// How a provider writes replies.
pub(crate) trait Dialect: Send + 'static {
    /// Reads a whole reply; an `Err` says what is missing.
    fn whole(body: &Json<'_>) -> Result<Parts, &'static str>;

    /// Takes in one frame of a stream, but for its text, which is returned.
    fn frame(parts: &mut Parts, frame: &Json<'_>) -> String;
}

/// A reply as far as it is known.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    pub(crate) text: String,
    pub(crate) finish: Option<FinishReason>,
    pub(crate) usage: Usage,
    pub(crate) model: String,
    /// The text is a refusal, which the finish may not say.
    pub(crate) refused: bool,
    /// A frame said that it was the last.
    pub(crate) done: bool,
}

/// The model a request names; without one there is nothing to send.
pub(crate) fn model(request: &Request) -> Result<&str> {
    request.model.as_deref().ok_or_else(|| {
        let message = "the request names no model: set one with Request::model, or a default \
                       for all requests of the context";
        Error::new(ErrorKind::InvalidRequest, message)
    })
}

/// A request's body: our fields, and the provider's own ([`Request::extra`]) in the place of
/// ours where the names are the same.
pub(crate) struct Fields<'a> {
    json: Vec<u8>,
    request: &'a Request,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(request: &'a Request) -> Self {
        // Most of it is the prompt: with room for that, it seldom grows and is copied step by step.
        let texts = request.messages.iter().map(|m| m.content.len());
        Self {
            json: Vec::with_capacity(512 + texts.sum::<usize>()),
            request,
        }
    }

    pub(crate) fn put(&mut self, name: &str, value: Option<impl Serialize>) -> Result<()> {
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

    /// The whole body. Whether the reply is streamed is for the method that was called to say.
    pub(crate) fn end(mut self, stream: bool) -> Result<Vec<u8>> {
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

impl Http {
    pub(crate) async fn generate<D: Dialect>(
        &self,
        body: Vec<u8>,
        timeout: Option<Duration>,
    ) -> Result<Reply> {
        let (head, mut body) = self.post(body, timeout).await?;
        let body = body.all().await.map_err(|error| head.mark(error))?;
        match Form::of(&body, true, false) {
            // Some servers stream whether they are asked to or not.
            Some(Form::Events) if !head.is_encoded() => {
                let events = Events::of_body(body, self.limits.max_event);
                let mut streaming = Streaming::<D>::new(head, events, self.limits);
                loop {
                    if let Delta::End(reply) = streaming.next().await? {
                        return Ok(*reply);
                    }
                }
            }
            _ => whole::<D>(&head, &body),
        }
    }

    pub(crate) async fn stream<D: Dialect>(
        &self,
        body: Vec<u8>,
        timeout: Option<Duration>,
    ) -> Result<ReplyStream> {
        let (head, mut body) = self.post(body, timeout).await?;
        let form = body.form(head.declares_events()).await;
        let form = form.map_err(|error| head.mark(error))?;
        // Some servers cannot stream, and some answer so when they refuse after all.
        if form == Form::Document || head.is_encoded() {
            let body = body.all().await.map_err(|error| head.mark(error))?;
            let reply = whole::<D>(&head, &body)?;
            let text = (!reply.text.is_empty()).then(|| Ok(Delta::Text(reply.text.clone())));
            let end = Ok(Delta::End(Box::new(reply)));
            return Ok(Box::pin(stream::iter(text.into_iter().chain([end]))));
        }
        let events = Events::new(body, self.limits.max_event);
        let streaming = Streaming::<D>::new(head, events, self.limits);
        Ok(Box::pin(stream::unfold(
            Some(streaming),
            |streaming| async {
                let mut streaming = streaming?;
                let delta = streaming.next().await;
                let more = matches!(delta, Ok(Delta::Text(_)));
                Some((delta, more.then_some(streaming)))
            },
        )))
    }
}

fn whole<D: Dialect>(head: &Head, body: &[u8]) -> Result<Reply> {
    let text =
        std::str::from_utf8(body).map_err(|error| classify::unreadable(head, body, &error))?;
    let trimmed = text.trim_start_matches('\u{feff}').trim();
    let json: Json<'_> =
        serde_json::from_str(trimmed).map_err(|error| classify::unreadable(head, body, &error))?;
    if is_error(&json) {
        return Err(classify::refusal(head, trimmed.as_bytes()));
    }
    let parts =
        D::whole(&json).map_err(|missing| head.error(ErrorKind::MalformedReply, missing))?;
    Ok(reply(head, parts, text))
}

/// Whether what came with a success says that it is none.
fn is_error(json: &Json<'_>) -> bool {
    let json = match json {
        Json::Array(items) => items.first().unwrap_or(json),
        _ => json,
    };
    !json.get("error").is_null() || json.get("object").as_str() == Some("error")
}

fn reply(head: &Head, parts: Parts, raw: &str) -> Reply {
    Reply {
        text: parts.text,
        finish: match parts.finish {
            // OpenAI ends a refusal like any other text.
            None | Some(FinishReason::Stop) if parts.refused => FinishReason::ContentFilter,
            finish => finish.unwrap_or(FinishReason::Stop),
        },
        usage: parts.usage,
        model: parts.model,
        request_id: head.request_id(),
        raw: Some(raw.into()),
        rate: (!head.rate.is_empty()).then(|| Box::new(head.rate.clone())),
    }
}

struct Streaming<D> {
    head: Head,
    events: Events,
    parts: Parts,
    last: String,
    max_text: usize,
    dialect: PhantomData<D>,
}

impl<D: Dialect> Streaming<D> {
    fn new(head: Head, events: Events, limits: Limits) -> Self {
        Self {
            head,
            events,
            parts: Parts::default(),
            last: String::new(),
            max_text: limits.max_body,
            dialect: PhantomData,
        }
    }

    /// More text, or the end.
    async fn next(&mut self) -> Result<Delta> {
        loop {
            let data = match self.events.next().await {
                Ok(Some(data)) if data.trim() == "[DONE]" => {
                    if self.last.is_empty() {
                        let message = "the stream ended in order, without a reply in it";
                        return Err(self.head.error(ErrorKind::MalformedReply, message));
                    }
                    return Ok(self.end());
                }
                Ok(Some(data)) => data,
                // The text is whole once the model said why it stopped; what else
                // was to come is not worth paying for again.
                Ok(None) | Err(_) if self.parts.finish.is_some() => return Ok(self.end()),
                Ok(None) => return Err(self.cut()),
                Err(error) => return Err(self.head.mark(error)),
            };
            let frame: Json<'_> = match serde_json::from_str(&data) {
                Ok(frame) => frame,
                Err(_) if self.events.ended() => return Err(self.cut()),
                Err(error) => {
                    let message = format!("an event is not JSON: {error}");
                    return Err(self.head.error(ErrorKind::MalformedReply, &message));
                }
            };
            if is_error(&frame) {
                // Nobody says what the text so far has cost.
                let error = classify::refusal(&self.head, data.as_bytes());
                return Err(error.with_billed(None));
            }
            let text = D::frame(&mut self.parts, &frame);
            self.last = data;
            if self.parts.done {
                return Ok(self.end());
            }
            if text.len() > self.max_text - self.parts.text.len() {
                return Err(self.head.mark(too_large("text", self.max_text)));
            }
            if !text.is_empty() {
                self.parts.text.push_str(&text);
                return Ok(Delta::Text(text));
            }
        }
    }

    fn end(&mut self) -> Delta {
        let parts = std::mem::take(&mut self.parts);
        let last = std::mem::take(&mut self.last);
        Delta::End(Box::new(reply(&self.head, parts, &last)))
    }

    fn cut(&self) -> Error {
        let message = "the stream ended before the reply did";
        self.head.error(ErrorKind::Connection, message)
    }
}
