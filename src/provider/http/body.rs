//! The body of a reply, read under its call's timeouts and bounds.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reqwest::Response;

use super::form::Form;
use super::{Alarm, Deadline, Endpoint, Limits, flatten, too_slow};
use crate::error::{Error, ErrorKind, Persistence, Result};

/// How much of a refusal's body is read, and how long for: the status alone says
/// enough to go on with.
const REFUSAL: (usize, Duration) = (64 << 10, Duration::from_secs(5));

pub(super) struct Body {
    response: Response,
    /// Read already, and to be read again.
    ahead: Bytes,
    endpoint: Arc<Endpoint>,
    limits: Limits,
    alarm: Alarm,
    deadline: Deadline,
    whole: Duration,
}

impl Body {
    pub(super) fn new(
        response: Response,
        endpoint: Arc<Endpoint>,
        limits: Limits,
        alarm: Alarm,
        deadline: Deadline,
        whole: Duration,
    ) -> Self {
        Self {
            response,
            ahead: Bytes::new(),
            endpoint,
            limits,
            alarm,
            deadline,
            whole,
        }
    }

    /// The next piece, `None` at the end.
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>> {
        if !self.ahead.is_empty() {
            return Ok(Some(std::mem::take(&mut self.ahead)));
        }
        let (idle, deadline) = (self.limits.idle, self.deadline);
        let end = || Deadline::after(idle).min(deadline);
        match self.alarm.guard(end, self.response.chunk()).await {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(error)) => {
                let message = format!("the reply broke off: {}", flatten(&error));
                let message = self.endpoint.secrets.scrub(&message);
                Err(Error::new(ErrorKind::Connection, message))
            }
            Err(end) if end == deadline => Err(too_slow("the call", self.whole)),
            Err(_) => Err(too_slow("the next piece of the reply", idle)),
        }
    }

    /// What the body is, by its first bytes, which stay to be read.
    pub(super) async fn form(&mut self, declared_events: bool) -> Result<Form> {
        let mut start = Bytes::new();
        loop {
            let over = match self.chunk().await? {
                Some(chunk) if start.is_empty() => {
                    start = chunk;
                    false
                }
                Some(chunk) => {
                    start = [&start[..], &chunk[..]].concat().into();
                    false
                }
                None => true,
            };
            // White space without end is no body.
            let over = over || start.len() > self.limits.max_event;
            if let Some(form) = Form::of(&start, over, declared_events) {
                self.ahead = start;
                return Ok(form);
            }
        }
    }

    /// The whole body.
    pub(super) async fn all(&mut self) -> Result<Bytes> {
        let max = self.limits.max_body;
        let announced = self.response.content_length().unwrap_or(0);
        if announced > max as u64 {
            return Err(too_large("body", max));
        }
        let (mut first, mut all, mut left) = (Bytes::new(), Vec::new(), max);
        while let Some(chunk) = self.chunk().await? {
            left = left
                .checked_sub(chunk.len())
                .ok_or_else(|| too_large("body", max))?;
            if first.is_empty() {
                // Most come in one piece, which need not be copied.
                first = chunk;
                continue;
            }
            if all.is_empty() {
                all.reserve(first.len().max(announced as usize));
                all.extend_from_slice(&first);
            }
            all.extend_from_slice(&chunk);
        }
        Ok(if all.is_empty() { first } else { all.into() })
    }

    /// As much of a refusal's body as comes soon and whole. That it breaks off is no
    /// error: the refusal is.
    pub(super) async fn beginning(&mut self) -> Vec<u8> {
        let (max, patience) = REFUSAL;
        self.deadline = Deadline::after(patience).min(self.deadline);
        let mut start = Vec::new();
        while let Ok(Some(chunk)) = self.chunk().await {
            start.extend_from_slice(&chunk[..chunk.len().min(max - start.len())]);
            if start.len() == max {
                break;
            }
        }
        start
    }
}

/// Permanent, unlike other malformed replies: the same answer would be as large
/// again, and paid for again.
pub(super) fn too_large(what: &str, max: usize) -> Error {
    let message = format!("the reply's {what} is larger than the {max} bytes allowed");
    Error::new(ErrorKind::MalformedReply, message).with_persistence(Persistence::Permanent)
}
