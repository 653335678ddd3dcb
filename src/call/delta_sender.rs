//! An attempt whose reply is passed on while it is being written.
//!
//! It goes through the same layers as any other call. Two things differ: the provider's stream is read instead of its whole
//! reply, and a reply whose reader has seen a part of it is not started again without the reader's consent.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::timeout;

use crate::error::{Error, ErrorKind, Persistence, Result};
use crate::provider::Provider;
use crate::request::Request;
use crate::request::reply::{Delta, Reply};

/// Sends the pieces of a reply to its reader.
pub(crate) struct DeltaSender {
    deltas: UnboundedSender<Result<Delta>>,
    idle_timeout: Duration,
    /// Whether a reply that broke off may be started again, after [`Delta::Discard`].
    discard: bool,
    yielded: AtomicBool,
}

impl DeltaSender {
    pub(crate) fn new(
        deltas: UnboundedSender<Result<Delta>>,
        idle_timeout: Duration,
        discard: bool,
    ) -> Self {
        Self {
            deltas,
            idle_timeout,
            discard,
            yielded: AtomicBool::new(false),
        }
    }

    /// Sends the end: the whole reply, or the error. If no piece was sent before, because the reply comes from the store,
    /// sends its whole text first.
    pub(crate) fn end(&self, result: Result<Reply>) {
        let end = result.map(|reply| {
            if !self.yielded.load(Ordering::Relaxed) && !reply.text.is_empty() {
                self.send(Delta::Text(reply.text.clone()));
            }
            Delta::End(Box::new(reply))
        });
        // A reader that has gone loses nothing: the tally has counted the call.
        let _ = self.deltas.send(end);
    }

    fn send(&self, delta: Delta) {
        let _ = self.deltas.send(Ok(delta));
    }

    /// Makes one call and sends the pieces of its reply, but not the end.
    pub(super) async fn call(&self, provider: &dyn Provider, request: &Request) -> Result<Reply> {
        if self.yielded.swap(false, Ordering::Relaxed) {
            self.send(Delta::Discard);
        }
        self.read(provider, request).await
    }

    /// Marks the error of a call as exhausted if the reader has seen a part of the reply and did not allow a second try.
    pub(super) fn judge(&self, error: Error) -> Error {
        let begun = self.yielded.load(Ordering::Relaxed);
        if begun && !self.discard && error.is_temporary() {
            return error.with_persistence(Persistence::Exhausted);
        }
        error
    }

    async fn read(&self, provider: &dyn Provider, request: &Request) -> Result<Reply> {
        let mut stream = provider.stream(request).await?;
        loop {
            // The time until the first piece is bounded by the call timeout alone.
            let delta = if self.yielded.load(Ordering::Relaxed) {
                let delta = timeout(self.idle_timeout, stream.next()).await;
                delta.map_err(|_| {
                    let message = format!("no more of the reply within {:?}", self.idle_timeout);
                    Error::new(ErrorKind::Timeout, message)
                })?
            } else {
                stream.next().await
            };
            match delta {
                Some(Ok(Delta::End(reply))) => return Ok(*reply),
                Some(Ok(delta)) => {
                    self.yielded.store(true, Ordering::Relaxed);
                    self.send(delta);
                }
                Some(Err(error)) => return Err(error),
                None => {
                    let message = "the stream ended before the reply did";
                    return Err(Error::new(ErrorKind::Connection, message));
                }
            }
        }
    }
}
