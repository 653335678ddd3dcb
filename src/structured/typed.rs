//! [`GenerateAs`]: a reply as a Rust value; the model is asked again while the reply does not fit.

use std::fmt;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::form::Form;
use super::{QUOTED, SHOWN, extract, quote};
use crate::context::Context;
use crate::error::{Error, ErrorKind, Persistence, Result};
use crate::request::reply::{FinishReason, Reply};
use crate::request::{Message, Request, Role};

/// The default number of requests for one value: the first, and two corrections.
const ASKS: u32 = 3;

/// The policy for a reply that reached its limit on tokens ([`GenerateAs::on_length`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum OnLength {
    /// Fails with [`ErrorKind::Truncated`], because the reply to the same request would be cut again.
    #[default]
    Fail,
    /// Asks once more with this limit. The reply starts from its beginning, because a
    /// provider that enforces a schema cannot continue one; the cut reply is paid for too.
    RaiseTo(u64),
}

impl Context {
    /// Asks for a value of `T`.
    ///
    /// The schema of `T` is sent in the provider's own field if the provider of the deployment
    /// [enforces schemas](crate::provider::Capabilities::json_schema) and this one can be enforced (maps and free JSON
    /// cannot), else in the prompt. A request whose
    /// [`response_format`](Request::response_format) is set already is sent as it is.
    ///
    /// The value may come in a code fence or with prose around it. If a reply does not fit, it is
    /// quoted to the model with the problem and its place, and the model is asked again: twice, unless
    /// [`attempts`](GenerateAs::attempts) is set. [`Tally::reasked`](crate::call::Tally::reasked) counts these requests;
    /// retries of failed calls are counted apart. Each reply comes from [`generate`](Self::generate).
    ///
    /// ```
    /// use schemars::JsonSchema;
    /// use serde::Deserialize;
    /// use throughline::{Context, testing::Scripted};
    ///
    /// #[derive(Debug, Deserialize, JsonSchema)]
    /// struct River {
    ///     name: String,
    ///     length_km: u32,
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
    /// let script = Scripted::new()
    ///     .reply(r#"{"name": "Po", "length_km": "long"}"#)
    ///     .reply(r#"{"name": "Po", "length_km": 652}"#);
    /// let cx = Context::builder(script.clone()).build();
    /// let river = cx
    ///     .generate_as::<River>("Describe a river.")
    ///     .validate(|river| match river.length_km {
    ///         0 => Err("a river has a length".into()),
    ///         _ => Ok(()),
    ///     })
    ///     .await?;
    /// assert_eq!((&*river.name, river.length_km), ("Po", 652));
    /// assert_eq!((cx.tally().reasked, cx.tally().retries), (1, 0));
    /// let asked = script.requests()[1].last_text().to_owned();
    /// assert!(asked.contains("at `length_km`: invalid type: string \"long\", expected u32"));
    /// # Ok(()) }
    /// ```
    pub fn generate_as<T>(&self, request: impl Into<Request>) -> GenerateAs<T>
    where
        T: DeserializeOwned + JsonSchema + Send + 'static,
    {
        GenerateAs {
            cx: self.clone(),
            request: request.into(),
            attempts: ASKS,
            on_length: OnLength::Fail,
            validate: None,
        }
    }
}

type Validate<T> = Box<dyn Fn(&T) -> Result<(), String> + Send>;

/// A request for a value ([`Context::generate_as`]); await it.
///
/// # Errors
/// - [`ErrorKind::InvalidOutput`] if no reply fitted, with the problem of the last reply and its
///   place; [exhausted](Error::is_exhausted), with the number of requests as its attempts. If the model refused, it is
///   not asked again.
/// - [`ErrorKind::Truncated`] if a reply reached its limit on tokens: see [`OnLength`].
/// - As [`Context::generate`] if a call fails.
///
/// # Cancel safety
/// As [`Context::generate`].
#[must_use = "nothing is asked until it is awaited"]
pub struct GenerateAs<T> {
    cx: Context,
    request: Request,
    attempts: u32,
    on_length: OnLength,
    validate: Option<Validate<T>>,
}

/// A value with the replies it took ([`GenerateAs::detailed`]).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Generated<T> {
    /// The value.
    pub value: T,
    /// The reply it was read from.
    pub reply: Reply,
    /// The earlier replies that could not be used, the oldest first.
    pub rejected: Vec<Rejection>,
}

/// A reply that could not be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Rejection {
    /// The text of the reply.
    pub text: String,
    /// The problem, as it was described to the model.
    pub problem: String,
}

impl<T> GenerateAs<T>
where
    T: DeserializeOwned + JsonSchema + Send + 'static,
{
    /// Sets a check of each value. Its objection is passed to the model like any other problem. A panic in it is not
    /// caught.
    pub fn validate(mut self, f: impl Fn(&T) -> Result<(), String> + Send + 'static) -> Self {
        self.validate = Some(Box::new(f));
        self
    }

    /// Sets the most replies to ask for, including the first; the default is 3.
    ///
    /// # Panics
    /// If `attempts` is 0.
    #[track_caller]
    pub fn attempts(mut self, attempts: u32) -> Self {
        assert!(attempts > 0, "GenerateAs::attempts must be at least 1");
        self.attempts = attempts;
        self
    }

    /// Sets the policy for a reply that reached its limit on tokens; the default is [`OnLength::Fail`].
    pub fn on_length(mut self, policy: OnLength) -> Self {
        self.on_length = policy;
        self
    }

    /// Returns the value with its reply and the earlier replies that could not be used.
    ///
    /// # Errors
    /// The same as when it is awaited.
    pub async fn detailed(self) -> Result<Generated<T>> {
        let form = Form::of::<T>();
        let mut first = form.ask(self.request);
        let mut request = first.clone();
        let mut raise = match self.on_length {
            OnLength::RaiseTo(limit) => Some(limit),
            OnLength::Fail => None,
        };
        let mut rejected = Vec::new();
        loop {
            let reply = self.cx.generate(request.clone()).await?;
            let ask = rejected.len() as u32 + 1;
            if let Err(error) = finished(&reply) {
                let Some(limit) = raise.take().filter(|_| error.is_truncated()) else {
                    return Err(error);
                };
                self.cx.reask(ask, &error);
                (first.max_tokens, request.max_tokens) = (Some(limit), Some(limit));
                request.asks_again = true;
                continue;
            }
            let value = extract::value::<T>(&reply.text, form.wrapped).and_then(|value| {
                let valid = self.validate.as_ref().map_or(Ok(()), |valid| valid(&value));
                valid.map(|()| value)
            });
            let problem = match value {
                Ok(value) => {
                    return Ok(Generated {
                        value,
                        reply,
                        rejected,
                    });
                }
                Err(problem) => problem,
            };
            let error = Error::new(ErrorKind::InvalidOutput, &*problem);
            if ask >= self.attempts {
                return Err(error
                    .with_persistence(Persistence::Exhausted)
                    .exhausted(ask));
            }
            self.cx.reask(ask, &error);
            request = corrected(&first, &reply.text, &problem);
            rejected.push(Rejection {
                text: reply.text,
                problem,
            });
        }
    }
}

/// Fails if the reply is cut at its limit on tokens or is a refusal.
pub(super) fn finished(reply: &Reply) -> Result<()> {
    match &reply.finish {
        FinishReason::Length => {
            let n = reply.usage.output_tokens;
            let message = format!("the reply reached its limit at {n} tokens");
            Err(Error::new(ErrorKind::Truncated, message))
        }
        FinishReason::ContentFilter => {
            let message = format!("the model refused: {:?}", quote(&reply.text, SHOWN));
            Err(Error::new(ErrorKind::InvalidOutput, message))
        }
        _ => Ok(()),
    }
}

/// The first request again, with its last reply and the problem of that. Earlier replies are left
/// out, so that the prompt does not grow with each.
fn corrected(first: &Request, text: &str, problem: &str) -> Request {
    let mut request = first.clone();
    request.asks_again = true;
    // Some providers refuse an empty message.
    if !text.trim().is_empty() {
        let turn = Message::new(Role::Assistant, quote(text, QUOTED));
        request.messages.push(turn);
    }
    let objection = format!(
        "This reply cannot be used: {}. Send the whole answer again, corrected, as JSON alone.",
        quote(problem, QUOTED)
    );
    request.messages.push(Message::new(Role::User, objection));
    request
}

impl<T> IntoFuture for GenerateAs<T>
where
    T: DeserializeOwned + JsonSchema + Send + 'static,
{
    type Output = Result<T>;
    type IntoFuture = BoxFuture<'static, Result<T>>;

    fn into_future(self) -> Self::IntoFuture {
        async move { Ok(self.detailed().await?.value) }.boxed()
    }
}

impl<T> fmt::Debug for GenerateAs<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GenerateAs")
            .field("cx", &self.cx)
            .field("attempts", &self.attempts)
            .field("on_length", &self.on_length)
            .finish_non_exhaustive()
    }
}
