//! [`Drafts`]: one value while it is being written.

use std::fmt;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{self, Poll};
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;

use super::extract;
use super::form::Form;
use super::typed::finished;
use crate::context::Context;
use crate::context::Deltas;
use crate::error::{Error, ErrorKind, Result};
use crate::request::Delta;
use crate::request::Request;
use crate::structured::json::Draft;

/// A value that is still being written, or complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Growing<T> {
    /// The value so far: fields may be missing, texts and lists may be short.
    Partial(T),
    /// The complete value.
    Whole(T),
}

impl<T> Growing<T> {
    /// Returns the value.
    pub fn into_inner(self) -> T {
        match self {
            Self::Partial(value) | Self::Whole(value) => value,
        }
    }

    /// Whether the value is complete.
    pub fn is_whole(&self) -> bool {
        matches!(self, Self::Whole(_))
    }
}

impl Context {
    /// Asks for one value and yields drafts of it while it is being written, for display; the last is
    /// the complete value.
    ///
    /// The fields of `T` should be optional or have defaults, because a draft that does not fit `T` is left out. So is a
    /// draft that is less than a 64th longer than the one before, which keeps the work linear in the length of the reply.
    ///
    /// The schema is sent as with [`generate_as`](Self::generate_as). If the reply does not
    /// fit, the model is not asked again, because the drafts were shown already.
    ///
    /// ```
    /// use futures::StreamExt;
    /// use schemars::JsonSchema;
    /// use serde::Deserialize;
    /// use throughline::{Context, testing::Scripted, structured::Growing};
    ///
    /// #[derive(Debug, Default, PartialEq, Deserialize, JsonSchema)]
    /// #[serde(default)]
    /// struct Story {
    ///     title: String,
    ///     text: Option<String>,
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() -> throughline::Result<()> {
    /// # let pieces = [r#"{"title": "Two ri"#, r#"vers", "text": "Once"#, r#"."}"#];
    /// # let cx = Context::builder(Scripted::new().streamed(std::time::Duration::from_secs(3), pieces)).build();
    /// let mut drafts = cx.generate_drafts::<Story>("A story, please.");
    /// let first = drafts.next().await.unwrap()?;
    /// assert_eq!(first, Growing::Partial(Story { title: "Two ri".into(), text: None }));
    /// let second = drafts.next().await.unwrap()?.into_inner();
    /// assert_eq!((&*second.title, second.text.as_deref()), ("Two rivers", Some("Once")));
    /// # let last = drafts.collect::<Vec<_>>().await.pop().unwrap()?;
    /// # assert!(last.is_whole());
    /// # Ok(()) }
    /// ```
    pub fn generate_drafts<T>(&self, request: impl Into<Request>) -> Drafts<T>
    where
        T: DeserializeOwned + JsonSchema,
    {
        let form = Form::of::<T>();
        let request = form.ask(request.into());
        Drafts {
            deltas: Some(self.stream(request)),
            draft: Draft::new(),
            shown: 0,
            wrapped: form.wrapped,
            value: PhantomData,
        }
    }
}

/// The drafts of a value while it is being written ([`Context::generate_drafts`]).
///
/// The call starts when the stream is first polled. If the consumer is slower than the reply, it gets the latest draft
/// only.
///
/// # Errors
/// As [`Context::stream`]; [`ErrorKind::InvalidOutput`] if the whole reply does not fit, and
/// [`ErrorKind::Truncated`] if it reached its limit on tokens. The stream ends after an error.
///
/// # Cancel safety
/// As [`Deltas`]: dropping it cancels the call.
#[must_use = "a stream does nothing unless polled"]
pub struct Drafts<T> {
    deltas: Option<Deltas>,
    draft: Draft,
    /// The length of the last draft.
    shown: usize,
    wrapped: bool,
    value: PhantomData<fn() -> T>,
}

impl<T> Drafts<T> {
    /// Sets the longest silence in the middle of the reply; see [`Deltas::idle_timeout`].
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.deltas = self.deltas.map(|deltas| deltas.idle_timeout(timeout));
        self
    }
}

impl<T: DeserializeOwned> Drafts<T> {
    /// Returns the value so far, if it is long enough for another draft.
    fn grown(&mut self) -> Option<T> {
        if self.draft.len() <= self.shown + self.shown / 64 {
            return None;
        }
        let closed = self.draft.closed()?;
        let value = extract::typed(&closed, self.wrapped).ok()?;
        self.shown = self.draft.len();
        Some(value)
    }
}

impl<T: DeserializeOwned> Stream for Drafts<T> {
    type Item = Result<Growing<T>>;

    fn poll_next(
        self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
    ) -> Poll<Option<Result<Growing<T>>>> {
        let this = self.get_mut();
        let end = loop {
            let Some(deltas) = &mut this.deltas else {
                return Poll::Ready(None);
            };
            match deltas.poll_next_unpin(cx) {
                Poll::Pending => {
                    return match this.grown() {
                        Some(value) => Poll::Ready(Some(Ok(Growing::Partial(value)))),
                        None => Poll::Pending,
                    };
                }
                Poll::Ready(Some(Ok(Delta::Text(text)))) => this.draft.push(text),
                Poll::Ready(Some(Ok(Delta::End(reply)))) => {
                    break finished(&reply).and_then(|()| {
                        extract::value(&reply.text, this.wrapped)
                            .map_err(|problem| Error::new(ErrorKind::InvalidOutput, problem))
                    });
                }
                // `Discard` comes only to streams that ask for it.
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(Some(Err(error))) => break Err(error),
                Poll::Ready(None) => return Poll::Ready(None),
            }
        };
        this.deltas = None;
        Poll::Ready(Some(end.map(Growing::Whole)))
    }
}

impl<T> fmt::Debug for Drafts<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Drafts")
            .field("deltas", &self.deltas)
            .finish_non_exhaustive()
    }
}
