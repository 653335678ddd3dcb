//! A call whose reply is passed on while it is being written.
//!
//! To the guard it is a call like any other: permit, budget, tally, events and bounds are
//! those of [`Guard::call`](super::Guard::call), and so is the retry loop. What differs is what
//! is done in flight, and that a reply somebody has begun to read is not begun again by itself.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::timeout;

use crate::call::memo::Asked;
use crate::error::{Error, ErrorKind, Persistence, Result};
use crate::provider::Provider;
use crate::request::Request;
use crate::request::reply::{Delta, Reply};

/// Who reads along.
pub(crate) struct Sink {
    deltas: UnboundedSender<Result<Delta>>,
    idle: Duration,
    /// Whether a reply that broke off may be begun again, what came of it being void.
    discard: bool,
    yielded: AtomicBool,
    unkept: Option<Arc<Unkept>>,
}

/// The place in the memo of a streamed call that failed, for a reader who can use what came of its reply.
#[derive(Default)]
pub(crate) struct Unkept(Mutex<Option<Box<Asked>>>);

impl Unkept {
    fn lock(&self) -> MutexGuard<'_, Option<Box<Asked>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The call, once it has failed in a context with a store.
    #[cfg(feature = "structured")]
    pub(crate) fn take(&self) -> Option<Box<Asked>> {
        self.lock().take()
    }
}

impl Sink {
    pub(crate) fn new(
        deltas: UnboundedSender<Result<Delta>>,
        idle: Duration,
        discard: bool,
    ) -> Self {
        Self {
            deltas,
            idle,
            discard,
            yielded: AtomicBool::new(false),
            unkept: None,
        }
    }

    /// Leaves a call that failed there.
    pub(crate) fn unkept(mut self, unkept: Option<Arc<Unkept>>) -> Self {
        self.unkept = unkept;
        self
    }

    /// The call has failed, and nothing of it is kept. To be called before [`end`](Self::end).
    pub(crate) fn leave_unkept(&self, asked: Box<Asked>) {
        if let Some(unkept) = &self.unkept {
            *unkept.lock() = Some(asked);
        }
    }

    /// The last words: the whole reply, or why there is none. A reply of which nothing was
    /// passed on, as it was remembered and not asked for, is passed on whole.
    pub(crate) fn end(&self, result: Result<Reply>) {
        let end = result.map(|reply| {
            if !self.yielded.load(Ordering::Relaxed) && !reply.text.is_empty() {
                self.send(Delta::Text(reply.text.clone()));
            }
            Delta::End(Box::new(reply))
        });
        // Nobody reads any more: nothing is lost, the tally has it.
        let _ = self.deltas.send(end);
    }

    fn send(&self, delta: Delta) {
        let _ = self.deltas.send(Ok(delta));
    }

    /// Makes one call and passes on what comes of it, but for the end.
    pub(super) async fn call(&self, provider: &dyn Provider, request: &Request) -> Result<Reply> {
        if self.yielded.swap(false, Ordering::Relaxed) {
            self.send(Delta::Discard);
        }
        self.read(provider, request).await
    }

    /// What a failed call means: one of which something was read is not made again unasked.
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
            // How long a model thinks before its first word is for the call's timeout to say.
            let delta = if self.yielded.load(Ordering::Relaxed) {
                let delta = timeout(self.idle, stream.next()).await;
                delta.map_err(|_| {
                    let message = format!("no more of the reply within {:?}", self.idle);
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
