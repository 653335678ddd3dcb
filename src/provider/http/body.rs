//! The body of a reply, read within the timeouts and size limits of its call.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reqwest::Response;

use super::Endpoint;
use super::connection::error_chain;
use super::format::BodyFormat;
use super::settings::Limits;
use super::timer::{CallTimer, Deadline, timed_out};
use crate::error::{Error, ErrorKind, Persistence, Result};

/// Size and time limits for the body of an error response. Its status alone is enough to go on with.
const ERROR_TEXT: (usize, Duration) = (64 << 10, Duration::from_secs(5));

pub(super) struct Body {
    response: Response,
    /// Bytes that were read to detect the format, and that the next read returns.
    peeked: Bytes,
    endpoint: Arc<Endpoint>,
    limits: Limits,
    timer: CallTimer,
    deadline: Deadline,
    /// The timeout of the whole call, for error messages.
    whole: Duration,
}

impl Body {
    pub(super) fn new(
        response: Response,
        endpoint: Arc<Endpoint>,
        limits: Limits,
        timer: CallTimer,
        deadline: Deadline,
        whole: Duration,
    ) -> Self {
        Self {
            response,
            peeked: Bytes::new(),
            endpoint,
            limits,
            timer,
            deadline,
            whole,
        }
    }

    /// Waits for the next piece; `None` at the end.
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>> {
        if !self.peeked.is_empty() {
            return Ok(Some(std::mem::take(&mut self.peeked)));
        }
        let (idle, deadline) = (self.limits.idle, self.deadline);
        let end = || Deadline::after(idle).min(deadline);
        match self.timer.timeout(end, self.response.chunk()).await {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(error)) => {
                let message = format!("the reply broke off: {}", error_chain(&error));
                let message = self.endpoint.secrets.redact(&message);
                Err(Error::new(ErrorKind::Connection, message))
            }
            Err(end) if end == deadline => Err(timed_out("the call", self.whole)),
            Err(_) => Err(timed_out("the next piece of the reply", idle)),
        }
    }

    /// Detects the format of the body by its first bytes, which the next read returns again.
    pub(super) async fn format(&mut self, declared_events: bool) -> Result<BodyFormat> {
        let mut start = Bytes::new();
        loop {
            let ended = match self.chunk().await? {
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
            // The limit stops a server that sends white space without end.
            let ended = ended || start.len() > self.limits.max_event;
            if let Some(format) = BodyFormat::detect(&start, ended, declared_events) {
                self.peeked = start;
                return Ok(format);
            }
        }
    }

    /// Reads the whole body.
    pub(super) async fn bytes(&mut self) -> Result<Bytes> {
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
                // Most bodies arrive in one piece, which needs no copy.
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

    /// Reads the body of an error response within [`ERROR_TEXT`]. A body that breaks off is returned as far as it came,
    /// because the error response matters more.
    pub(super) async fn error_text(&mut self) -> Vec<u8> {
        let (max, time) = ERROR_TEXT;
        self.deadline = Deadline::after(time).min(self.deadline);
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

/// Returns the error for a reply over a size limit. It is permanent, unlike other malformed replies, because a retry
/// would be paid for and probably get as large a reply.
pub(super) fn too_large(what: &str, max: usize) -> Error {
    let message = format!("the reply's {what} is larger than the {max} bytes allowed");
    Error::new(ErrorKind::MalformedReply, message).with_persistence(Persistence::Permanent)
}
