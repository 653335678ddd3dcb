//! [`Deltas`]: a reply while it is being written.

use std::fmt;
use std::panic::resume_unwind;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{self, Poll, ready};
use std::time::Duration;

use futures::{FutureExt as _, Stream, StreamExt as _};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::JoinHandle;

use crate::call::guard::{Sink, Unkept};
use crate::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::request::Request;
use crate::request::reply::{Delta, Reply};

/// The longest silence in the middle of a reply.
const IDLE: Duration = Duration::from_secs(60);

impl Context {
    /// Asks the provider and yields the reply as it is written: [`Delta::Text`] piece by piece,
    /// and at last [`Delta::End`] with the whole reply and its usage.
    ///
    /// It goes through the same guard as [`generate`](Self::generate): lane, budget, retries,
    /// tally, events, deadline and cancellation. A failed call is tried again only while nothing
    /// was yielded, unless [`Deltas::discarding`] says otherwise.
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
            idle: IDLE,
            discard: false,
            unkept: None,
            state: State::New(Box::new(request.into())),
        }
    }
}

/// A reply while it is being written ([`Context::stream`]).
///
/// The call starts when the stream is first polled, and runs in a task of its own: its permit
/// is never held up by a consumer that is busy, nor by one that waits for a permit itself. What
/// was not taken yet is kept, a reply at most.
///
/// The stream ends behind [`Delta::End`] or the first error.
///
/// # Errors
/// As [`Context::generate`]. An error in the middle of the reply that could have passed is
/// [exhausted](crate::Error::is_exhausted): nobody may try it again unseen.
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
    idle: Duration,
    discard: bool,
    unkept: Option<Arc<Unkept>>,
    state: State,
}

enum State {
    New(Box<Request>),
    Running(UnboundedReceiver<Result<Delta>>, JoinHandle<()>),
    Done,
}

impl Deltas {
    /// The longest silence in the middle of the reply, before which it counts as broken; 60 s
    /// unless set. The time until the first word is bounded by the call's timeout alone.
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle = timeout;
        self
    }

    /// Lets a reply that broke off be begun again, as the retry policy says. Then
    /// [`Delta::Discard`] comes first: what was yielded until then is void.
    pub fn discarding(mut self) -> Self {
        self.discard = true;
        self
    }

    /// Reads the reply to its end, passing each piece of its text on as it comes, and gives the whole of it.
    ///
    /// ```
    /// # use throughline::{Context, testing::Scripted};
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
    /// # let cx = Context::builder(Scripted::new().streamed(std::time::Duration::ZERO, ["The ", "Danube."])).build();
    /// let reply = cx.stream("Name a river.").for_each_text(|piece| print!("{piece}")).await?;
    /// assert_eq!(reply.text, "The Danube.");
    /// # Ok(()) }
    /// ```
    ///
    /// With [`discarding`](Self::discarding), pieces of a reply that is begun again are passed on again; the
    /// one that is given at the end is whole in any case.
    ///
    /// # Errors
    /// As the stream's.
    ///
    /// # Cancel safety
    /// Dropping it cancels the call.
    pub async fn for_each_text(mut self, mut f: impl FnMut(&str)) -> Result<Reply> {
        while let Some(delta) = self.next().await {
            match delta? {
                Delta::Text(piece) => f(&piece),
                Delta::End(reply) => return Ok(*reply),
                _ => {}
            }
        }
        // Behind the end of a stream there is nothing: somebody has polled it to its end before.
        Err(Error::new(
            ErrorKind::MalformedReply,
            "the reply was read to its end already",
        ))
    }

    /// Leaves the memo's place of the call there, should it fail: whoever can use what has come of
    /// the reply may keep that.
    #[cfg(feature = "structured")]
    pub(crate) fn leaving_unkept(mut self, unkept: &Arc<Unkept>) -> Self {
        self.unkept = Some(Arc::clone(unkept));
        self
    }

    fn start(&self, request: Request) -> State {
        let (sender, receiver) = unbounded_channel();
        let (idle, discard) = (self.idle, self.discard);
        let cx = self.cx.clone();
        let unkept = self.unkept.clone();
        let driver = tokio::spawn(async move {
            let sink = Sink::new(sender, idle, discard).unkept(unkept);
            let result = cx.generate_into(Box::new(request), Some(&sink)).await;
            sink.end(result);
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
        // The task ends by itself, and not by an abort: so its attempt is counted.
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
