//! [`Error`]: the failure of a call or an item, and whether a retry can help.

mod kind;

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::kind::{ErrorKind, Persistence};
use crate::usage::RateSnapshot;

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The failure of a call or an item: opaque, cheap to move, cloneable.
///
/// An error has a [kind](Error::kind) and says whether it [is transient](Error::is_temporary),
/// how long the server asks to [wait](Error::wait), and whether the failed call
/// [was paid for](Error::billed). It never contains a key or a header.
///
/// # Example: an error of your own inside a pipeline
///
/// ```
/// use throughline::{Error, Result};
///
/// fn words(text: &str) -> Result<usize> {
///     let first = text.lines().next().ok_or_else(|| Error::other("the reply is empty"))?;
///     first.parse().map_err(Error::other)
/// }
/// assert!(words("").unwrap_err().to_string().contains("the reply is empty"));
/// assert_eq!(words("12").unwrap(), 12);
/// ```
#[derive(Clone, thiserror::Error, Serialize, Deserialize)]
#[error(transparent)]
#[serde(transparent)]
pub struct Error(Box<Inner>);

#[derive(Clone, thiserror::Error, Serialize, Deserialize)]
struct Inner {
    kind: ErrorKind,
    persistence: Persistence,
    message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    wait: Option<Duration>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    http_status: Option<u16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    code: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    request_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    billed: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    account_wide: Option<bool>,
    #[serde(default)]
    attempts: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    item: Option<Arc<str>>,
    #[serde(skip)]
    rate: Option<Box<RateSnapshot>>,
    #[serde(skip)]
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

impl Error {
    /// Makes an error of `kind`, which decides whether a retry can help.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            persistence: kind.persistence(),
            message: message.into(),
            wait: None,
            http_status: None,
            code: None,
            request_id: None,
            billed: kind.billed(),
            account_wide: None,
            attempts: 0,
            item: None,
            rate: None,
            source: None,
        }))
    }

    /// Wraps an error of another type. The result is permanent, so it is not retried.
    ///
    /// An [`Error`] of this crate is returned unchanged.
    pub fn other(error: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        match error.into().downcast::<Self>() {
            Ok(ours) => *ours,
            Err(theirs) => {
                Self::new(ErrorKind::Other, theirs.to_string()).with_source_arc(theirs.into())
            }
        }
    }

    pub(crate) fn cancelled(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Cancelled, what)
    }

    pub(crate) fn panicked(payload: Box<dyn std::any::Any + Send>) -> Self {
        let message = match payload.downcast::<String>() {
            Ok(message) => *message,
            Err(payload) => match payload.downcast::<&'static str>() {
                Ok(message) => (*message).to_owned(),
                Err(_) => "a panic without a message".to_owned(),
            },
        };
        Self::new(ErrorKind::Panicked, message)
    }

    /// Adds the cause, shown by [`std::error::Error::source`]. It is not serialised.
    #[must_use]
    pub fn with_source(self, source: impl StdError + Send + Sync + 'static) -> Self {
        self.with_source_arc(Arc::new(source))
    }

    fn with_source_arc(mut self, source: Arc<dyn StdError + Send + Sync>) -> Self {
        self.0.source = Some(source);
        self
    }

    /// Adds the time that the server asks to wait. The next attempt waits at least that long, and after a refusal by the
    /// rate limit the whole lane does.
    ///
    /// It takes precedence over the `retry_after` of [`with_rate`](Self::with_rate), whichever is set first.
    #[must_use]
    pub fn with_wait(mut self, wait: Duration) -> Self {
        self.0.wait = Some(wait);
        self
    }

    /// Adds the HTTP status.
    #[must_use]
    pub fn with_http_status(mut self, status: u16) -> Self {
        self.0.http_status = Some(status);
        self
    }

    /// Adds the provider's own error code.
    #[must_use]
    pub fn with_code(mut self, code: impl Into<String>) -> Self {
        self.0.code = Some(code.into());
        self
    }

    /// Adds the provider's request id, for questions to its support.
    #[must_use]
    pub fn with_request_id(mut self, id: impl Into<String>) -> Self {
        self.0.request_id = Some(id.into());
        self
    }

    /// Adds the rate-limit metadata that came with the error.
    ///
    /// Its `retry_after` is also the [wait](Self::wait) of a temporary error that has none yet.
    #[must_use]
    pub fn with_rate(mut self, rate: RateSnapshot) -> Self {
        if self.is_temporary() {
            self.0.wait = self.0.wait.or(rate.retry_after);
        }
        self.0.rate = Some(Box::new(rate));
        self
    }

    /// Sets whether the failed call was paid for; `None` if that cannot be known.
    #[must_use]
    pub fn with_billed(mut self, billed: Option<bool>) -> Self {
        self.0.billed = billed;
        self
    }

    /// Sets whether the error concerns all calls of the account ([`is_account_wide`](Error::is_account_wide)), in place of
    /// the answer of the kind.
    #[must_use]
    pub fn with_account_wide(mut self, account_wide: bool) -> Self {
        self.0.account_wide = Some(account_wide);
        self
    }

    /// Sets whether a retry can help, in place of the answer of the kind (`x-should-retry`).
    #[must_use]
    pub fn with_persistence(mut self, persistence: Persistence) -> Self {
        self.0.persistence = persistence;
        self
    }

    /// Marks a temporary error as given up after `attempts` calls to the provider.
    pub(crate) fn exhausted(mut self, attempts: u32) -> Self {
        if self.0.persistence == Persistence::Temporary {
            self.0.persistence = Persistence::Exhausted;
        }
        self.0.attempts = attempts;
        self
    }

    /// Adds the path of the item that failed, unless an inner batch has added one.
    pub(crate) fn of_item(mut self, path: impl FnOnce() -> String) -> Self {
        self.0.item.get_or_insert_with(|| path().into());
        self
    }

    /// Returns the kind of the failure.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Returns whether a retry can help.
    pub fn persistence(&self) -> Persistence {
        self.0.persistence
    }

    /// Returns the message alone, without the kind and the details that `Display` adds.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Returns the time that the server asked to wait, if it did.
    pub fn wait(&self) -> Option<Duration> {
        self.0.wait
    }

    /// Returns the HTTP status, if there was a reply.
    pub fn http_status(&self) -> Option<u16> {
        self.0.http_status
    }

    /// Returns the provider's own error code, if it sent one.
    pub fn code(&self) -> Option<&str> {
        self.0.code.as_deref()
    }

    /// Returns the provider's request id, if it sent one.
    pub fn request_id(&self) -> Option<&str> {
        self.0.request_id.as_deref()
    }

    /// Returns the rate-limit metadata that came with the error, if any. It is not serialised.
    pub fn rate(&self) -> Option<&RateSnapshot> {
        self.0.rate.as_deref()
    }

    /// Returns whether the failed call was paid for; `None` if that cannot be known, as for
    /// a connection that broke after the request was sent.
    pub fn billed(&self) -> Option<bool> {
        self.0.billed
    }

    /// Returns the number of calls to the provider before it was given up; 0 if there was none, or if the error is not
    /// that of a call.
    pub fn attempts(&self) -> u32 {
        self.0.attempts
    }

    /// Returns the path of the item that failed, as in `week-plan[3]/routine[0]`, if the error is that of a batch
    /// ([`try_all`](crate::Batch::try_all)). In nested batches it is the innermost item. `Display` begins with it.
    pub fn item(&self) -> Option<&str> {
        self.0.item.as_deref()
    }

    /// Whether the failure is transient and a retry can help.
    pub fn is_temporary(&self) -> bool {
        self.0.persistence == Persistence::Temporary
    }

    /// Whether the failure is permanent.
    pub fn is_permanent(&self) -> bool {
        self.0.persistence == Persistence::Permanent
    }

    /// Whether the call was tried as often as the policy allows. Do not retry it again.
    pub fn is_exhausted(&self) -> bool {
        self.0.persistence == Persistence::Exhausted
    }

    /// Whether the provider's rate limit refused the call.
    pub fn is_throttled(&self) -> bool {
        self.0.kind == ErrorKind::Throttled
    }

    /// Whether the provider is overloaded.
    pub fn is_overloaded(&self) -> bool {
        self.0.kind == ErrorKind::Overloaded
    }

    /// Whether one of the call's timeouts passed.
    pub fn is_timeout(&self) -> bool {
        self.0.kind == ErrorKind::Timeout
    }

    /// Whether the work was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.0.kind == ErrorKind::Cancelled
    }

    /// Whether the deadline passed.
    pub fn is_deadline_exceeded(&self) -> bool {
        self.0.kind == ErrorKind::DeadlineExceeded
    }

    /// Whether user code panicked.
    pub fn is_panic(&self) -> bool {
        self.0.kind == ErrorKind::Panicked
    }

    /// Whether the reply cannot be used.
    pub fn is_invalid_output(&self) -> bool {
        self.0.kind == ErrorKind::InvalidOutput
    }

    /// Whether the reply was cut short.
    pub fn is_truncated(&self) -> bool {
        self.0.kind == ErrorKind::Truncated
    }

    /// Whether no other call of this account can succeed either: its credentials or its quota are refused, or
    /// the provider has answered no call for a long time. Stop, keep the results so far, and notify a person.
    ///
    /// A single [`Forbidden`](ErrorKind::Forbidden) request is no proof: it counts when a different request
    /// has confirmed it.
    pub fn is_account_wide(&self) -> bool {
        let by_kind = matches!(
            self.0.kind,
            ErrorKind::Unauthorized | ErrorKind::QuotaExhausted
        );
        self.0.account_wide.unwrap_or(by_kind)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(item) = &self.item {
            write!(f, "{item}: ")?;
        }
        f.write_str(self.kind.describe())?;
        match (self.http_status, &self.code) {
            (Some(status), Some(code)) => write!(f, " (HTTP {status}, {code})")?,
            (Some(status), None) => write!(f, " (HTTP {status})")?,
            (None, Some(code)) => write!(f, " ({code})")?,
            (None, None) => {}
        }
        if !self.message.is_empty() {
            write!(f, ": {}", self.message)?;
        }
        if let Some(wait) = self.wait {
            write!(f, "; the server asks to wait {wait:?}")?;
        }
        if self.attempts > 1 {
            write!(f, "; after {} attempts", self.attempts)?;
        }
        Ok(())
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Error");
        out.field("kind", &self.kind)
            .field("persistence", &self.persistence)
            .field("message", &self.message);
        if let Some(source) = &self.source {
            out.field("source", &source.to_string());
        }
        out.field("http_status", &self.http_status)
            .field("code", &self.code)
            .field("request_id", &self.request_id)
            .field("wait", &self.wait)
            .field("attempts", &self.attempts)
            .field("item", &self.item)
            .field("billed", &self.billed)
            .finish()
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Self::new(ErrorKind::Io, error.to_string()).with_source(error)
    }
}

impl From<serde_json::Error> for Error {
    /// Wraps the failure to parse JSON of the caller. It is permanent.
    fn from(error: serde_json::Error) -> Self {
        Self::other(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_shows_kind_status_wait_and_attempts() {
        let error = Error::new(ErrorKind::Throttled, "slow down, please")
            .with_http_status(429)
            .with_code("rate_limit_exceeded")
            .with_wait(Duration::from_millis(1500))
            .exhausted(3);
        assert_eq!(
            error.to_string(),
            "throttled (HTTP 429, rate_limit_exceeded): slow down, please; \
             the server asks to wait 1.5s; after 3 attempts"
        );
        assert!(error.is_exhausted() && !error.is_temporary());
    }

    #[test]
    fn a_permanent_error_stays_permanent_when_it_is_given_up() {
        let error = Error::new(ErrorKind::InvalidRequest, "no such model").exhausted(1);
        assert!(error.is_permanent());
        assert_eq!(error.attempts(), 1);
    }

    #[test]
    fn other_returns_an_error_of_the_crate_unchanged_and_keeps_the_source_of_another() {
        let ours = Error::new(ErrorKind::Timeout, "idle");
        assert_eq!(Error::other(ours).kind(), ErrorKind::Timeout);

        let theirs = Error::other("x".parse::<u8>().unwrap_err());
        assert!(theirs.is_permanent());
        assert_eq!(
            StdError::source(&theirs).unwrap().to_string(),
            theirs.message()
        );
    }

    #[test]
    fn all_but_source_and_rate_is_serialised() {
        let error = Error::new(ErrorKind::Connection, "reset")
            .with_source(std::io::Error::other("reset by peer"))
            .with_rate(RateSnapshot::default())
            .with_request_id("req_1");
        let json = serde_json::to_string(&error).unwrap();
        let back: Error = serde_json::from_str(&json).unwrap();
        assert_eq!(back.to_string(), error.to_string());
        assert_eq!(back.request_id(), Some("req_1"));
        assert_eq!(back.billed(), None);
        assert!(StdError::source(&back).is_none() && back.rate().is_none());
    }

    #[test]
    fn a_wait_takes_precedence_over_the_one_in_the_rate() {
        let [one, two] = [1, 2].map(Duration::from_secs);
        let rate = || RateSnapshot::new().with_retry_after(two);
        let error = |kind| Error::new(kind, "");
        let throttled = || error(ErrorKind::Throttled);
        assert_eq!(throttled().with_rate(rate()).wait(), Some(two));
        assert_eq!(
            throttled().with_wait(one).with_rate(rate()).wait(),
            Some(one)
        );
        assert_eq!(
            throttled().with_rate(rate()).with_wait(one).wait(),
            Some(one)
        );
        // A wait does not help: the same request would be refused again.
        let refused = error(ErrorKind::InvalidRequest).with_rate(rate());
        assert_eq!(refused.wait(), None);
    }

    #[test]
    fn panic_payloads_become_messages() {
        assert_eq!(Error::panicked(Box::new("static")).message(), "static");
        assert_eq!(
            Error::panicked(Box::new("owned".to_owned())).message(),
            "owned"
        );
        assert_eq!(
            Error::panicked(Box::new(7)).message(),
            "a panic without a message"
        );
    }
}
