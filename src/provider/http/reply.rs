//! One call from request to [`Reply`], whole or streamed.

use std::marker::PhantomData;
use std::time::Duration;

use futures::stream;

use super::body::too_large;
use super::dialect::{Dialect, Json, PartialReply};
use super::format::BodyFormat;
use super::head::Head;
use super::settings::Limits;
use super::sse::Events;
use super::{Http, classify};
use crate::error::{Error, ErrorKind, Result};
use crate::request::{Delta, FinishReason, Reply, ReplyStream};

impl Http {
    pub(crate) async fn generate<D: Dialect>(
        &self,
        body: Vec<u8>,
        timeout: Option<Duration>,
    ) -> Result<Reply> {
        let (head, mut body) = self.post(body, timeout).await?;
        let body = body.bytes().await.map_err(|error| head.annotate(error))?;
        match BodyFormat::detect(&body, true, false) {
            // Some servers stream although the request does not ask for it.
            Some(BodyFormat::Events) if !head.is_encoded() => {
                let events = Events::of_body(body, self.limits.max_event);
                let mut streaming = Streaming::<D>::new(head, events, self.limits);
                loop {
                    if let Delta::End(reply) = streaming.next().await? {
                        return Ok(*reply);
                    }
                }
            }
            _ => parse::<D>(&head, &body),
        }
    }

    pub(crate) async fn stream<D: Dialect>(
        &self,
        body: Vec<u8>,
        timeout: Option<Duration>,
    ) -> Result<ReplyStream> {
        let (head, mut body) = self.post(body, timeout).await?;
        let format = body.format(head.declares_events()).await;
        let format = format.map_err(|error| head.annotate(error))?;
        // Some servers cannot stream, and some send an error as a document with status 200.
        if format == BodyFormat::Document || head.is_encoded() {
            let body = body.bytes().await.map_err(|error| head.annotate(error))?;
            let reply = parse::<D>(&head, &body)?;
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

fn parse<D: Dialect>(head: &Head, body: &[u8]) -> Result<Reply> {
    let text =
        std::str::from_utf8(body).map_err(|error| classify::unreadable(head, body, &error))?;
    let trimmed = text.trim_start_matches('\u{feff}').trim();
    let json: Json<'_> =
        serde_json::from_str(trimmed).map_err(|error| classify::unreadable(head, body, &error))?;
    if is_error(&json) {
        return Err(classify::refusal(head, trimmed.as_bytes()));
    }
    let reply =
        D::parse_reply(&json).map_err(|missing| head.error(ErrorKind::MalformedReply, missing))?;
    Ok(finish(head, reply, text))
}

/// Whether JSON that came with a success status is an error object.
fn is_error(json: &Json<'_>) -> bool {
    let json = match json {
        Json::Array(items) => items.first().unwrap_or(json),
        _ => json,
    };
    !json.get("error").is_null() || json.get("object").as_str() == Some("error")
}

fn finish(head: &Head, reply: PartialReply, raw: &str) -> Reply {
    Reply {
        text: reply.text,
        finish: match reply.finish {
            // OpenAI reports `stop` for a refusal too.
            None | Some(FinishReason::Stop) if reply.refused => FinishReason::ContentFilter,
            finish => finish.unwrap_or(FinishReason::Stop),
        },
        usage: reply.usage,
        model: reply.model,
        request_id: head.request_id(),
        raw: Some(raw.into()),
        rate: (!head.rate.is_empty()).then(|| Box::new(head.rate.clone())),
    }
}

struct Streaming<D> {
    head: Head,
    events: Events,
    reply: PartialReply,
    last_event: String,
    max_text: usize,
    dialect: PhantomData<D>,
}

impl<D: Dialect> Streaming<D> {
    fn new(head: Head, events: Events, limits: Limits) -> Self {
        Self {
            head,
            events,
            reply: PartialReply::default(),
            last_event: String::new(),
            max_text: limits.max_body,
            dialect: PhantomData,
        }
    }

    /// Waits for more text, or for the end.
    async fn next(&mut self) -> Result<Delta> {
        loop {
            let data = match self.events.next().await {
                Ok(Some(data)) if data.trim() == "[DONE]" => {
                    if self.last_event.is_empty() {
                        let message = "the stream ended in order, without a reply in it";
                        return Err(self.head.error(ErrorKind::MalformedReply, message));
                    }
                    return Ok(self.end());
                }
                Ok(Some(data)) => data,
                // With a finish reason the text is complete. The events that are missing are not
                // worth a second, paid call.
                Ok(None) | Err(_) if self.reply.finish.is_some() => return Ok(self.end()),
                Ok(None) => return Err(self.cut()),
                Err(error) => return Err(self.head.annotate(error)),
            };
            let event: Json<'_> = match serde_json::from_str(&data) {
                Ok(event) => event,
                Err(_) if self.events.ended() => return Err(self.cut()),
                Err(error) => {
                    let message = format!("an event is not JSON: {error}");
                    return Err(self.head.error(ErrorKind::MalformedReply, &message));
                }
            };
            if is_error(&event) {
                // It is unknown whether the text so far is charged.
                let error = classify::refusal(&self.head, data.as_bytes());
                return Err(error.with_billed(None));
            }
            let text = D::apply_event(&mut self.reply, &event);
            self.last_event = data;
            if self.reply.done {
                return Ok(self.end());
            }
            if text.len() > self.max_text - self.reply.text.len() {
                return Err(self.head.annotate(too_large("text", self.max_text)));
            }
            if !text.is_empty() {
                self.reply.text.push_str(&text);
                return Ok(Delta::Text(text));
            }
        }
    }

    fn end(&mut self) -> Delta {
        let reply = std::mem::take(&mut self.reply);
        let last_event = std::mem::take(&mut self.last_event);
        Delta::End(Box::new(finish(&self.head, reply, &last_event)))
    }

    fn cut(&self) -> Error {
        let message = "the stream ended before the reply did";
        self.head.error(ErrorKind::Connection, message)
    }
}
