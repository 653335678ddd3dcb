//! [`Scripted`]: a provider that reads its answers off a script.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;

use crate::error::{Error, ErrorKind, Result};
use crate::provider::Provider;
use crate::reply::Reply;
use crate::request::Request;
use crate::usage::Usage;

/// A provider that answers from a script, line by line, and keeps the requests it saw.
///
/// Each call takes the next line when it starts, so calls in flight together keep the
/// order in which they were made. Clones share one script. A call beyond the end of the
/// script fails with [`ErrorKind::Config`], which nobody retries.
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
    /// For the line that is written next.
    delay: Duration,
    requests: Vec<Request>,
}

struct Line {
    delay: Duration,
    answer: Answer,
}

type Answer = Box<dyn FnOnce(&Request) -> Result<Reply> + Send>;

impl Scripted {
    /// An empty script.
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, Script> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn line(self, answer: impl FnOnce(&Request) -> Result<Reply> + Send + 'static) -> Self {
        let mut script = self.lock();
        let delay = std::mem::take(&mut script.delay);
        script.lines.push_back(Line {
            delay,
            answer: Box::new(answer),
        });
        drop(script);
        self
    }

    /// The next call is answered with this text; its usage is counted at four bytes a token.
    pub fn reply(self, text: impl Into<String>) -> Self {
        let text = text.into();
        self.answer_with(move |_| Ok(text))
    }

    /// The next call is answered with this reply as it is.
    pub fn exact_reply(self, reply: Reply) -> Self {
        self.line(move |_| Ok(reply))
    }

    /// The next call fails with this error.
    pub fn error(self, error: Error) -> Self {
        self.line(move |_| Err(error))
    }

    /// The next call is answered with what the closure makes of its request.
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

    /// The line that follows takes this long.
    pub fn delay(self, delay: Duration) -> Self {
        self.lock().delay = delay;
        self
    }

    /// The requests seen so far, in order; those beyond the end of the script too.
    #[must_use]
    pub fn requests(&self) -> Vec<Request> {
        self.lock().requests.clone()
    }

    /// How many lines nobody has asked for yet.
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
        let line = {
            let mut script = self.lock();
            script.requests.push(request.clone());
            let calls = script.requests.len();
            script.lines.pop_front().ok_or_else(|| {
                Error::new(
                    ErrorKind::Config,
                    format!(
                        "the script has no line for call {calls}: {:?}",
                        request.last_text()
                    ),
                )
            })?
        };
        if !line.delay.is_zero() {
            tokio::time::sleep(line.delay).await;
        }
        (line.answer)(request)
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
    use futures::StreamExt;
    use futures::future::join;

    use super::*;
    use crate::reply::Delta;

    #[tokio::test(start_paused = true)]
    async fn calls_keep_their_lines_when_a_later_one_ends_first() {
        let provider = Scripted::new()
            .delay(Duration::from_secs(1))
            .reply("slow")
            .reply("fast");
        let (a, b) = (Request::new("a"), Request::new("b"));
        let (a, b) = join(provider.generate(&a), provider.generate(&b)).await;
        assert_eq!((&*a.unwrap().text, &*b.unwrap().text), ("slow", "fast"));
    }

    #[tokio::test]
    async fn the_end_of_the_script_is_an_error_that_says_so() {
        let provider = Scripted::new().reply("only");
        provider.generate(&Request::new("a")).await.unwrap();
        let error = provider.generate(&Request::new("b")).await.unwrap_err();
        assert!(error.is_permanent());
        assert_eq!(error.message(), "the script has no line for call 2: \"b\"");
        assert_eq!(provider.requests().len(), 2);
    }

    #[tokio::test]
    async fn a_stream_is_the_reply_in_one_piece() {
        let reply = Reply::new("whole", Usage::new(1, 2));
        let provider = Scripted::new().exact_reply(reply.clone());
        let stream = provider.stream(&Request::new("a")).await.unwrap();
        let deltas: Vec<_> = stream.map(Result::unwrap).collect().await;
        let end = Delta::End(Box::new(reply));
        assert_eq!(deltas, [Delta::Text("whole".into()), end]);
    }
}
