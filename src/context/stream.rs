//! [`Context::stream`] and [`Deltas`]: a reply while it is being written.

use std::fmt;
use std::panic::resume_unwind;
use std::pin::Pin;
#[cfg(feature = "structured")]
use std::sync::Arc;
use std::task::{self, Poll, ready};
use std::time::Duration;

use futures::{FutureExt as _, Stream};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::JoinHandle;

#[cfg(feature = "structured")]
use crate::call::FailedEntry;
use crate::call::{CallOptions, DeltaSender};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::provider::IDLE_TIMEOUT;
use crate::request::Request;
use crate::request::reply::Delta;

impl Context {
    /// Sends a request and yields the reply while it is written: [`Delta::Text`] piece by piece,
    /// and finally [`Delta::End`] with the whole reply and its usage.
    ///
    /// The call goes through the same layers as [`generate`](Self::generate): lane, budget, retries,
    /// tally, events, deadline and cancellation. A failed call is tried again only while nothing
    /// was yielded, unless [`Deltas::discarding`] allows it.
    ///
    /// ```
    /// use futures::StreamExt;
    /// use throughline::{Context, testing::Scripted, request::Delta};
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
    /// # let cx = Context::builder(Scripted::new().streamed(std::time::Duration::ZERO, ["The ", "Danube."])).build();
    /// let mut deltas = cx.stream("Name a river.");
    /// let mut text = String::new();
    /// while let Some(delta) = deltas.next().await {
    ///     match delta? {
    ///         Delta::Text(more) => text.push_str(&more),
    ///         Delta::End(reply) => assert_eq!(reply.text, text),
    ///         _ => {}
    ///     }
    /// }
    /// assert_eq!(text, "The Danube.");
    /// # Ok(()) }
    /// ```
    pub fn stream(&self, request: impl Into<Request>) -> Deltas {
        Deltas {
            // Its own cancellation: dropping the stream ends this call and no other.
            cx: self.child(""),
            idle_timeout: IDLE_TIMEOUT,
            discard: false,
            #[cfg(feature = "structured")]
            failed_entry: None,
            state: State::New(Box::new(request.into())),
        }
    }
}

/// A reply while it is being written ([`Context::stream`]).
///
/// The call starts when the stream is first polled, and runs in a task of its own, so a consumer that is busy or waits for
/// another permit does not hold up its permit. Pieces that the consumer has not taken yet are buffered, one reply at most.
///
/// The stream ends after [`Delta::End`] or the first error.
///
/// # Errors
/// As [`Context::generate`]. A transient error in the middle of the reply is
/// [exhausted](crate::Error::is_exhausted): a second try would repeat what the reader has seen.
///
/// # Cancel safety
/// Dropping the stream cancels the call: the connection is closed, the permit is settled and the
/// attempt counted the next time the runtime gets to the task. It may be billed.
///
/// # Panics
/// Outside a Tokio runtime, when first polled. A panic of the provider comes out of `poll_next`.
#[must_use = "a stream does nothing unless polled"]
pub struct Deltas {
    cx: Context,
    idle_timeout: Duration,
    discard: bool,
    #[cfg(feature = "structured")]
    failed_entry: Option<Arc<FailedEntry>>,
    state: State,
}

enum State {
    New(Box<Request>),
    Running(UnboundedReceiver<Result<Delta>>, JoinHandle<()>),
    Done,
}

impl Deltas {
    /// Sets the longest time between two pieces of the reply; 5 minutes unless set, as for the connections of the HTTP
    /// providers, because some models think for minutes in the middle of a reply. The time until the first piece is bounded
    /// by the call timeout alone. See the [table of all timeouts](crate::timeouts).
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle_timeout = timeout;
        self
    }

    /// Allows a reply that broke off to be started again, by the retry policy. Then
    /// [`Delta::Discard`] comes first: the pieces before it are void.
    pub fn discarding(mut self) -> Self {
        self.discard = true;
        self
    }

    /// Puts the memo entry of the call there if it fails, for a reader that can use a part of the reply.
    #[cfg(feature = "structured")]
    pub(crate) fn failed_entry(mut self, failed_entry: &Arc<FailedEntry>) -> Self {
        self.failed_entry = Some(Arc::clone(failed_entry));
        self
    }

    fn start(&self, request: Request) -> State {
        let (sender, receiver) = unbounded_channel();
        let deltas = DeltaSender::new(sender, self.idle_timeout, self.discard);
        let cx = self.cx.clone();
        #[cfg(feature = "structured")]
        let failed_entry = self.failed_entry.clone();
        let driver = tokio::spawn(async move {
            let options = CallOptions {
                deltas: Some(&deltas),
                #[cfg(feature = "structured")]
                failed_entry: failed_entry.as_deref(),
            };
            let result = cx.generate_with(Box::new(request), options).await;
            deltas.end(result);
        });
        State::Running(receiver, driver)
    }
}

impl Stream for Deltas {
    type Item = Result<Delta>;

    fn poll_next(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
    ) -> Poll<Option<Result<Delta>>> {
        loop {
            match &mut self.state {
                State::New(request) => {
                    let request = std::mem::take(&mut **request);
                    self.state = self.start(request);
                }
                State::Running(receiver, driver) => {
                    if let Some(delta) = ready!(receiver.poll_recv(cx)) {
                        return Poll::Ready(Some(delta));
                    }
                    let ended = ready!(driver.poll_unpin(cx));
                    self.state = State::Done;
                    match ended {
                        Ok(()) => {}
                        Err(error) if error.is_panic() => resume_unwind(error.into_panic()),
                        Err(_) => {
                            let message = "the runtime that drove the call has shut down";
                            let error = Error::cancelled(message).with_billed(None);
                            return Poll::Ready(Some(Err(error)));
                        }
                    }
                }
                State::Done => return Poll::Ready(None),
            }
        }
    }
}

impl Drop for Deltas {
    fn drop(&mut self) {
        // The task ends by itself instead of by an abort, so that its attempt is counted.
        self.cx.cancel();
    }
}

impl fmt::Debug for Deltas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deltas")
            .field("cx", &self.cx)
            .finish_non_exhaustive()
    }
}
