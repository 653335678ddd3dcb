//! [`Items`]: the elements of a list, each as soon as its JSON closes.

use std::fmt;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{self, Poll};
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;

use super::extract;
use super::form::Form;
use crate::call::FailedEntry;
use crate::context::Context;
use crate::context::Deltas;
use crate::error::{Error, ErrorKind, Result};
use crate::request::reply::{Delta, FinishReason, Reply};
use crate::request::{Message, Request, Role};
use crate::structured::json::Reader;

/// The policy for a list whose reply is cut or breaks off ([`Items::on_break`]). The
/// elements before the break are yielded either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum OnBreak {
    /// Ends the stream with the error. No part of the list is stored: a rerun asks for all of it.
    #[default]
    Fail,
    /// Shows the elements so far to the model and asks for the others, `times` at
    /// most; after that as [`Fail`](Self::Fail).
    ///
    /// With a [store](crate::ContextBuilder::store), the elements before the break are stored like a reply: a
    /// rerun yields them again, with the same indices, and then the stored rest.
    AskForRest {
        /// The most requests for the rest.
        times: u32,
    },
}

impl Context {
    /// Asks for a list and yields each of its elements as soon as its JSON closes, while the
    /// rest of the reply is still being written.
    ///
    /// The stream can be the inputs of a batch: the work on the first element begins
    /// before the list has ended. The elements are those of the first array in the reply, by itself or in
    /// a field of an object ([`Items::field`] names one). An element that does not fit
    /// `T` is yielded as an error, and the next one follows.
    ///
    /// The schema is sent as with [`generate_as`](Self::generate_as).
    ///
    /// ```
    /// use schemars::JsonSchema;
    /// use serde::Deserialize;
    /// use throughline::{Context, testing::Scripted};
    ///
    /// #[derive(Deserialize, JsonSchema)]
    /// struct Sketch {
    ///     topic: String,
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() -> throughline::Result<()> {
    /// # let script = Scripted::new()
    /// #     .streamed(std::time::Duration::from_secs(2), [r#"[{"topic": "scales"},"#, r#" {"topic": "chords"}]"#])
    /// #     .reply("1").reply("2");
    /// # let cx = Context::builder(script).build();
    /// let plan = cx.generate_items::<Sketch>("Plan the week.");
    /// let etudes = cx
    ///     .fan_out("etude", plan)
    ///     .settle(async |cx, sketch| cx.generate(format!("An etude on {}.", sketch?.topic)).await)
    ///     .await;
    /// assert_eq!(etudes.all()?.len(), 2);
    /// # Ok(()) }
    /// ```
    pub fn generate_items<T>(&self, request: impl Into<Request>) -> Items<T>
    where
        T: DeserializeOwned + JsonSchema,
    {
        Items {
            cx: self.clone(),
            request: request.into(),
            field: None,
            idle: None,
            on_break: OnBreak::Fail,
            run: None,
            form: Form::list_of::<T>,
            element: PhantomData,
        }
    }
}

/// The elements of a list while it is being written ([`Context::generate_items`]).
///
/// The call starts when the stream is first polled.
///
/// # Errors
/// - [`ErrorKind::InvalidOutput`] for an element that does not fit, with its path; the next element follows. Also for a
///   reply without an array, which ends the stream.
/// - [`ErrorKind::Truncated`] if the reply reached its limit on tokens in the middle of the list, and
///   the error of the call if it broke off: see [`OnBreak`].
///
/// # Cancel safety
/// As [`Deltas`]: dropping it cancels the call. A stream that is read to its end also waits for the end of the call.
#[must_use = "a stream does nothing unless polled"]
pub struct Items<T> {
    cx: Context,
    request: Request,
    field: Option<String>,
    idle: Option<Duration>,
    on_break: OnBreak,
    run: Option<Run>,
    form: fn(Option<&str>) -> Form,
    element: PhantomData<fn() -> T>,
}

struct Run {
    /// The request, with the type of its reply.
    request: Request,
    /// `None` once the last reply has ended.
    deltas: Option<Deltas>,
    reader: Reader,
    /// The number of elements of all replies, including those that did not fit.
    elements: usize,
    asks: u32,
    /// The elements so far, as text, if the rest may be asked for.
    texts: Option<String>,
    /// The reply that is being read, and its memo entry once its call has failed.
    broken: Option<Broken>,
}

/// The part of a reply that can be stored if it breaks off. Only contexts with a store have one.
#[derive(Default)]
struct Broken {
    text: String,
    failed_entry: Arc<FailedEntry>,
}

impl<T> Items<T> {
    /// Sets the field of the reply's object that holds the array. The schema asks for it by this name.
    pub fn field(mut self, name: impl Into<String>) -> Self {
        self.field = Some(name.into());
        self
    }

    /// Sets the policy for a reply that is cut or breaks off; the default is [`OnBreak::Fail`].
    pub fn on_break(mut self, policy: OnBreak) -> Self {
        self.on_break = policy;
        self
    }

    /// Sets the longest silence in the middle of the reply; see [`Deltas::idle_timeout`].
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle = Some(timeout);
        self
    }

    fn start(&mut self) -> Run {
        let form = (self.form)(self.field.as_deref());
        let request = form.ask(std::mem::take(&mut self.request));
        let broken = self.cx.journal().is_some().then(Broken::default);
        Run {
            deltas: Some(self.send(&request, broken.as_ref())),
            request,
            reader: self.reader(),
            elements: 0,
            asks: 1,
            texts: matches!(self.on_break, OnBreak::AskForRest { .. }).then(String::new),
            broken,
        }
    }

    fn send(&self, request: &Request, broken: Option<&Broken>) -> Deltas {
        let mut deltas = self.cx.stream(request.clone());
        if let Some(broken) = broken {
            deltas = deltas.failed_entry(&broken.failed_entry);
        }
        match self.idle {
            Some(idle) => deltas.idle_timeout(idle),
            None => deltas,
        }
    }

    fn reader(&self) -> Reader {
        match &self.field {
            Some(name) => Reader::field(name),
            None => Reader::first_array(),
        }
    }

    /// Asks for the rest of a list whose reply has ended, or returns the error.
    fn broken(&self, run: &mut Run, error: Error) -> Result<()> {
        let OnBreak::AskForRest { times } = self.on_break else {
            return Err(error);
        };
        // A list is not continued if the user, the deadline or the account has ended it.
        let curable = error.is_truncated() || error.is_invalid_output() || !error.is_permanent();
        if run.asks > times || !curable || self.cx.check().is_err() {
            return Err(error);
        }
        self.cx.reask(run.asks, &error);
        run.asks += 1;
        let mut request = run.request.clone();
        request.asks_again = true;
        if let Some(texts) = run.texts.as_ref().filter(|texts| !texts.is_empty()) {
            let so_far = Message::new(Role::Assistant, format!("[{texts}]"));
            let rest = "Your list broke off behind these elements. Send the elements that are \
                        missing, and only those, in the form that was asked for.";
            request.messages.push(so_far);
            request.messages.push(Message::new(Role::User, rest));
            // The request for the rest contains these elements, so a rerun must find the same ones.
            run.store_partial();
        }
        if let Some(broken) = &mut run.broken {
            *broken = Broken::default();
        }
        run.deltas = Some(self.send(&request, run.broken.as_ref()));
        run.reader = self.reader();
        Ok(())
    }
}

impl Run {
    /// Stores the received part of a reply whose call has failed.
    fn store_partial(&mut self) {
        if let Some(broken) = &mut self.broken
            && let Some(entry) = broken.failed_entry.take()
        {
            entry.store_partial(std::mem::take(&mut broken.text));
        }
    }

    /// Checks at the end of a reply whether its list is complete.
    fn ended(&self, reply: &Reply) -> Result<()> {
        let n = self.elements;
        match self.reader.finish() {
            Ok(()) => Ok(()),
            Err(_) if reply.finish == FinishReason::Length => Err(Error::new(
                ErrorKind::Truncated,
                format!("the reply reached its limit on tokens behind {n} elements"),
            )),
            Err(error) => Err(error),
        }
    }
}

impl<T: DeserializeOwned> Items<T> {
    /// Returns the next element that has closed.
    fn element(run: &mut Run) -> Option<Result<T>> {
        let text = match run.reader.next_element()? {
            Ok(text) => text,
            Err(error) => {
                run.elements += 1;
                // The last error of the reader is returned at the end of the reply.
                return (!run.reader.is_done()).then_some(Err(error));
            }
        };
        run.elements += 1;
        let value = extract::typed(text, false).map_err(|problem| {
            let message = format!("element {}: {problem}", run.elements);
            Error::new(ErrorKind::InvalidOutput, message)
        });
        if let (Some(texts), true) = (&mut run.texts, value.is_ok()) {
            if !texts.is_empty() {
                texts.push(',');
            }
            texts.push_str(text);
        }
        Some(value)
    }
}

impl<T: DeserializeOwned> Stream for Items<T> {
    type Item = Result<T>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<Option<Result<T>>> {
        let this = self.get_mut();
        let mut run = match this.run.take() {
            Some(run) => run,
            None => this.start(),
        };
        let polled = loop {
            if let Some(element) = Self::element(&mut run) {
                break Poll::Ready(Some(element));
            }
            let Some(deltas) = &mut run.deltas else {
                break Poll::Ready(None);
            };
            let broken = match deltas.poll_next_unpin(cx) {
                Poll::Pending => break Poll::Pending,
                Poll::Ready(Some(Ok(Delta::Text(text)))) => {
                    if let Some(broken) = &mut run.broken {
                        broken.text.push_str(&text);
                    }
                    run.reader.push(text);
                    continue;
                }
                Poll::Ready(Some(Ok(Delta::End(reply)))) => run.ended(&reply),
                // `Discard` comes only to streams that ask for it.
                Poll::Ready(Some(Ok(_))) => continue,
                // The list is complete, although the reply is not.
                Poll::Ready(Some(Err(_))) if run.reader.finish().is_ok() => {
                    run.store_partial();
                    Ok(())
                }
                Poll::Ready(Some(Err(error))) => Err(error),
                Poll::Ready(None) => Ok(()),
            };
            run.deltas = None;
            if let Err(error) = broken
                && let Err(error) = this.broken(&mut run, error)
            {
                break Poll::Ready(Some(Err(error)));
            }
        };
        this.run = Some(run);
        polled
    }
}

impl<T> fmt::Debug for Items<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Items")
            .field("cx", &self.cx)
            .field("field", &self.field)
            .field("on_break", &self.on_break)
            .finish_non_exhaustive()
    }
}
