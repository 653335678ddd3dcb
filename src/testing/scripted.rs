//! [`Scripted`]: a provider that answers from a script.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use futures::{StreamExt as _, stream};
use tokio::time::{Instant, sleep_until};

use crate::error::{Error, ErrorKind, Result};
use crate::provider::{Capabilities, Provider};
use crate::request::Request;
use crate::request::Usage;
use crate::request::reply::{Delta, Reply, ReplyStream};
use crate::sync::Mutex;

/// A provider that answers from a script, line by line, and records the requests.
///
/// Each call takes the next line when it starts, so concurrent calls get their lines in the order in which they were
/// made. Clones share one script. A call beyond the end of the script fails with [`ErrorKind::Config`], which is
/// permanent.
///
/// ```
/// use std::time::Duration;
/// use throughline::testing::Scripted;
/// use throughline::{Error, ErrorKind, Provider, Request};
///
/// #[tokio::main(flavor = "current_thread", start_paused = true)]
/// async fn main() -> throughline::Result<()> {
///     let provider = Scripted::new()
///         .error(Error::new(ErrorKind::Overloaded, "try later"))
///         .delay(Duration::from_secs(2))
///         .reply("The Neva.")
///         .answer_with(|request| Ok(format!("You said: {}", request.last_text())));
///
///     assert!(provider.generate(&Request::new("one")).await.unwrap_err().is_overloaded());
///     assert_eq!(provider.generate(&Request::new("two")).await?.text, "The Neva.");
///     assert_eq!(provider.generate(&Request::new("three")).await?.text, "You said: three");
///
///     assert_eq!(provider.requests()[1].last_text(), "two");
///     assert_eq!(provider.lines_left(), 0);
///     Ok(())
/// }
/// ```
#[derive(Clone, Default)]
#[must_use]
pub struct Scripted(Arc<Mutex<Script>>);

#[derive(Default)]
struct Script {
    lines: VecDeque<Line>,
    /// The delay of the line that is added next.
    delay: Duration,
    requests: Vec<Request>,
    enforces_schema: bool,
}

struct Line {
    delay: Duration,
    answer: Answer,
    /// The pieces of a stream. The delay is divided evenly among them, and each is yielded at the end of its part.
    /// Empty: the whole text is one piece.
    pieces: Vec<String>,
}

type Answer = Box<dyn FnOnce(&Request) -> Result<Reply> + Send>;

impl Scripted {
    /// Creates an empty script.
    pub fn new() -> Self {
        Self::default()
    }

    fn next_line(&self, request: &Request) -> Result<Line> {
        let mut script = self.lock();
        script.requests.push(request.clone());
        let calls = script.requests.len();
        script.lines.pop_front().ok_or_else(|| {
            let asked = request.last_text();
            let message = format!("the script has no line for call {calls}: {asked:?}");
            Error::new(ErrorKind::Config, message)
        })
    }

    /// Declares that this provider enforces JSON schemas. The script is not checked.
    pub fn enforces_schema(self) -> Self {
        self.lock().enforces_schema = true;
        self
    }

    fn lock(&self) -> MutexGuard<'_, Script> {
        self.0.lock()
    }

    fn line(self, answer: impl FnOnce(&Request) -> Result<Reply> + Send + 'static) -> Self {
        let mut script = self.lock();
        let delay = std::mem::take(&mut script.delay);
        script.lines.push_back(Line {
            delay,
            answer: Box::new(answer),
            pieces: Vec::new(),
        });
        drop(script);
        self
    }

    /// Adds a reply with this text. Its usage counts four bytes as a token.
    pub fn reply(self, text: impl Into<String>) -> Self {
        let text = text.into();
        self.answer_with(move |_| Ok(text))
    }

    /// Adds this reply.
    pub fn exact_reply(self, reply: Reply) -> Self {
        self.line(move |_| Ok(reply))
    }

    /// Adds a reply in pieces, spread evenly over the time `over`: of four pieces over 4 s, one is yielded after each
    /// second, and the end with the last. [`Provider::generate`] takes the same time.
    ///
    /// ```
    /// use std::time::Duration;
    /// use futures::StreamExt;
    /// use throughline::{Provider, Request, testing::Scripted, request::Delta};
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> throughline::Result<()> {
    /// let provider = Scripted::new().streamed(Duration::from_secs(4), ["a", "b", "c", "d"]);
    /// let began = tokio::time::Instant::now();
    /// let mut stream = provider.stream(&Request::new("spell")).await?;
    /// assert_eq!(stream.next().await.unwrap()?, Delta::Text("a".into()));
    /// assert_eq!(began.elapsed(), Duration::from_secs(1));
    /// # Ok(()) }
    /// ```
    pub fn streamed<T: Into<String>>(
        self,
        over: Duration,
        pieces: impl IntoIterator<Item = T>,
    ) -> Self {
        let pieces: Vec<String> = pieces.into_iter().map(Into::into).collect();
        self.reply(pieces.concat()).over(over, pieces)
    }

    /// Adds a reply that yields these pieces like [`streamed`](Self::streamed) and then fails with this error.
    /// [`Provider::generate`] fails after the same time.
    pub fn broken<T: Into<String>>(
        self,
        over: Duration,
        pieces: impl IntoIterator<Item = T>,
        error: Error,
    ) -> Self {
        let pieces = pieces.into_iter().map(Into::into).collect();
        self.error(error).over(over, pieces)
    }

    fn over(self, time: Duration, pieces: Vec<String>) -> Self {
        if let Some(line) = self.lock().lines.back_mut() {
            (line.delay, line.pieces) = (time, pieces);
        }
        self
    }

    /// Adds a failure with this error.
    pub fn error(self, error: Error) -> Self {
        self.line(move |_| Err(error))
    }

    /// Adds a reply whose text the closure computes from the request.
    pub fn answer_with(
        self,
        answer: impl FnOnce(&Request) -> Result<String> + Send + 'static,
    ) -> Self {
        self.line(move |request| {
            let text = answer(request)?;
            let tokens = (text.len() as u64).div_ceil(4);
            let usage = Usage::new(request.estimated_input_tokens(), tokens);
            Ok(Reply::new(text, usage))
        })
    }

    /// Delays the next line that is added.
    pub fn delay(self, delay: Duration) -> Self {
        self.lock().delay = delay;
        self
    }

    /// Returns all requests so far, in order, including those beyond the end of the script.
    #[must_use]
    pub fn requests(&self) -> Vec<Request> {
        self.lock().requests.clone()
    }

    /// Returns the number of lines that are left.
    #[must_use]
    pub fn lines_left(&self) -> usize {
        self.lock().lines.len()
    }
}

#[async_trait]
impl Provider for Scripted {
    fn name(&self) -> &str {
        "scripted"
    }

    async fn generate(&self, request: &Request) -> Result<Reply> {
        let line = self.next_line(request)?;
        if !line.delay.is_zero() {
            tokio::time::sleep(line.delay).await;
        }
        (line.answer)(request)
    }

    async fn stream(&self, request: &Request) -> Result<ReplyStream> {
        let mut line = self.next_line(request)?;
        let began = Instant::now();
        let request = request.clone();
        let pieces = std::mem::take(&mut line.pieces);
        let count = pieces.len() as u32;
        let spread = stream::iter((1..).zip(pieces)).then(move |(i, piece)| async move {
            sleep_until(began + line.delay * i / count).await;
            Ok(Delta::Text(piece))
        });
        let end = stream::once(async move {
            sleep_until(began + line.delay).await;
            match (line.answer)(&request) {
                Err(error) => vec![Err(error)],
                Ok(reply) if count > 0 => vec![Ok(Delta::End(Box::new(reply)))],
                Ok(reply) => vec![
                    Ok(Delta::Text(reply.text.clone())),
                    Ok(Delta::End(Box::new(reply))),
                ],
            }
        });
        Ok(spread.chain(end.flat_map(stream::iter)).boxed())
    }

    fn capabilities(&self) -> Capabilities {
        let capabilities = Capabilities::default().with_streaming();
        match self.lock().enforces_schema {
            true => capabilities.with_json(true),
            false => capabilities,
        }
    }
}

impl fmt::Debug for Scripted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let script = self.lock();
        f.debug_struct("Scripted")
            .field("lines_left", &script.lines.len())
            .field("requests", &script.requests.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use futures::future::join;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn concurrent_calls_get_their_lines_in_the_order_of_the_calls() {
        let provider = Scripted::new()
            .delay(Duration::from_secs(1))
            .reply("slow")
            .reply("fast");
        let (a, b) = (Request::new("a"), Request::new("b"));
        let (a, b) = join(provider.generate(&a), provider.generate(&b)).await;
        assert_eq!((&*a.unwrap().text, &*b.unwrap().text), ("slow", "fast"));
    }

    #[tokio::test]
    async fn a_call_beyond_the_end_of_the_script_fails() {
        let provider = Scripted::new().reply("only");
        provider.generate(&Request::new("a")).await.unwrap();
        let error = provider.generate(&Request::new("b")).await.unwrap_err();
        assert!(error.is_permanent());
        assert_eq!(error.message(), "the script has no line for call 2: \"b\"");
        assert_eq!(provider.requests().len(), 2);
    }

    #[tokio::test]
    async fn a_reply_without_pieces_is_streamed_in_one_piece() {
        let reply = Reply::new("whole", Usage::new(1, 2));
        let provider = Scripted::new().exact_reply(reply.clone());
        let stream = provider.stream(&Request::new("a")).await.unwrap();
        let deltas: Vec<_> = stream.map(Result::unwrap).collect().await;
        let end = Delta::End(Box::new(reply));
        assert_eq!(deltas, [Delta::Text("whole".into()), end]);
    }
}
