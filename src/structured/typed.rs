//! [`GenerateAs`]: a reply as a value, asked for again while it does not fit.

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

/// So many requests for one value: the first, and two with what was wrong.
const ASKS: u32 = 3;

/// What becomes of a reply that reached its limit on tokens ([`GenerateAs::on_length`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum OnLength {
    /// It fails with [`ErrorKind::Truncated`]: the same request would be cut again.
    #[default]
    Fail,
    /// It is asked for once more with this limit. From the beginning, because a
    /// provider that enforces a schema begins anew; what was cut is paid for too.
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
    /// The value may come in a code fence or with prose around it. A reply that does not fit is
    /// quoted to the model with what is wrong and where, and asked for again: twice unless
    /// [`attempts`](GenerateAs::attempts) says otherwise, counted in
    /// [`Tally::reasked`](crate::call::Tally::reasked) and not among the retries, which failing calls have
    /// besides. Each reply comes through [`generate`](Self::generate).
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

/// A value to be asked for ([`Context::generate_as`]); await it.
///
/// # Errors
/// - [`ErrorKind::InvalidOutput`] when no reply did fit, with what was wrong with the last and
///   where; [exhausted](Error::is_exhausted), with the number of requests as its attempts. At
///   once when the model refused.
/// - [`ErrorKind::Truncated`] when a reply reached its limit on tokens: see [`OnLength`].
/// - As [`Context::generate`] when a call fails.
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

/// A value with what it took to get it ([`GenerateAs::detailed`]).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Generated<T> {
    /// The value.
    pub value: T,
    /// The reply it was read from.
    pub reply: Reply,
    /// The replies before it that could not be used, the oldest first.
    pub rejected: Vec<Rejection>,
}

/// A reply that could not be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Rejection {
    /// The text of the reply.
    pub text: String,
    /// What is wrong with it, as the model was told.
    pub problem: String,
}

impl<T> GenerateAs<T>
where
    T: DeserializeOwned + JsonSchema + Send + 'static,
{
    /// A last word on each value. What it objects to is told to the model like any other
    /// error. A panic in it goes through.
    pub fn validate(mut self, f: impl Fn(&T) -> Result<(), String> + Send + 'static) -> Self {
        self.validate = Some(Box::new(f));
        self
    }

    /// How many replies there may be, the first included; 3 unless set.
    ///
    /// # Panics
    /// If `attempts` is 0.
    #[track_caller]
    pub fn attempts(mut self, attempts: u32) -> Self {
        assert!(attempts > 0, "GenerateAs::attempts must be at least 1");
        self.attempts = attempts;
        self
    }

    /// What becomes of a reply that reached its limit on tokens; [`OnLength::Fail`] unless set.
    pub fn on_length(mut self, policy: OnLength) -> Self {
        self.on_length = policy;
        self
    }

    /// The value with its reply, and the replies that were refused before it.
    ///
    /// # Errors
    /// As awaiting it.
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

/// Fails for a reply that is no answer: cut at its limit on tokens, or a refusal.
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

/// The first request again, with its last reply and what is wrong with that. Earlier ones are left
/// out: the prompt does not grow with each.
fn corrected(first: &Request, text: &str, problem: &str) -> Request {
    let mut request = first.clone();
    request.asks_again = true;
    // An empty turn is refused by some providers.
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
