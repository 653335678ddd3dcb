//! [`ErrorKind`] and [`Persistence`]: what failed, and whether a retry can help.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What went wrong. Ask the predicates of [`Error`](crate::Error) first; match on a kind only
/// where they do not tell enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// The provider refused the call because of a rate limit (429). Waiting cures it.
    Throttled,
    /// The provider is overloaded (503, 529, `slow_down`). Sending less cures it.
    Overloaded,
    /// The provider failed in a way that usually passes (408, 409, 5xx).
    Unavailable,
    /// The connection could not be made, was reset, or ended in the middle of a reply.
    Connection,
    /// The call took longer than one of its timeouts.
    Timeout,
    /// The request itself is refused (400, 404, 413, 422): the same request will fail again.
    InvalidRequest,
    /// The credentials are refused (401). No call of this account will succeed.
    Unauthorized,
    /// The request is forbidden (403) and the provider does not say why. It may be this request
    /// alone (a model that the key may not use, a policy of a gateway) or all of the account's.
    Forbidden,
    /// The account's quota is used up (402, `insufficient_quota`, spend cap, per-day limit).
    /// No call of this account will succeed until somebody acts or the day ends.
    QuotaExhausted,
    /// The reply is not what the protocol says: not JSON, no choices, too large.
    MalformedReply,
    /// The work was cancelled before it had a result.
    Cancelled,
    /// The context's deadline passed, or would have passed before the call could start.
    DeadlineExceeded,
    /// User code panicked; the message is the panic's.
    Panicked,
    /// Fewer items succeeded than were asked for ([`Settled::at_least`](crate::Settled::at_least)).
    TooFew,
    /// A setting is wrong: a missing key, an unusable URL.
    Config,
    /// Reading or writing failed outside the provider, or no file descriptor was left for a
    /// connection.
    Io,
    /// The store failed. Temporary where trying again can help: a connection that is gone, a
    /// file that is busy.
    Store,
    /// A worker's lease is gone: it must stop, because others have its items.
    LeaseLost,
    /// A reply came, and it is not what was asked for: not JSON, not of the type, refused by a
    /// validator or by the model. It is paid for; asking in the same words may end the same way.
    InvalidOutput,
    /// A reply was cut at the limit on its tokens, or broke off in the middle of a value.
    /// Asking again with a higher [`max_tokens`](crate::Request::max_tokens) cures the former.
    Truncated,
    /// An error of the caller's own code, carried by [`Error::other`](crate::Error::other).
    Other,
}

impl ErrorKind {
    /// The kind as a lower-case word with underscores, as it is serialised.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Throttled => "throttled",
            Self::Overloaded => "overloaded",
            Self::Unavailable => "unavailable",
            Self::Connection => "connection",
            Self::Timeout => "timeout",
            Self::InvalidRequest => "invalid_request",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::QuotaExhausted => "quota_exhausted",
            Self::MalformedReply => "malformed_reply",
            Self::Cancelled => "cancelled",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::Panicked => "panicked",
            Self::TooFew => "too_few",
            Self::Config => "config",
            Self::Io => "io",
            Self::Store => "store",
            Self::LeaseLost => "lease_lost",
            Self::InvalidOutput => "invalid_output",
            Self::Truncated => "truncated",
            Self::Other => "other",
        }
    }

    pub(super) fn describe(self) -> &'static str {
        match self {
            Self::Throttled => "throttled by the provider",
            Self::Overloaded => "provider overloaded",
            Self::Unavailable => "provider unavailable",
            Self::Connection => "connection failed",
            Self::Timeout => "timed out",
            Self::InvalidRequest => "request refused",
            Self::Unauthorized => "credentials refused",
            Self::Forbidden => "forbidden",
            Self::QuotaExhausted => "account quota exhausted",
            Self::MalformedReply => "malformed reply",
            Self::Cancelled => "cancelled",
            Self::DeadlineExceeded => "deadline exceeded",
            Self::Panicked => "panicked",
            Self::TooFew => "too few succeeded",
            Self::Config => "bad configuration",
            Self::Io => "input/output failed",
            Self::Store => "store failed",
            Self::LeaseLost => "lease lost",
            Self::InvalidOutput => "unusable output",
            Self::Truncated => "output cut",
            Self::Other => "failed",
        }
    }

    pub(super) fn persistence(self) -> Persistence {
        match self {
            Self::Throttled
            | Self::Overloaded
            | Self::Unavailable
            | Self::Connection
            | Self::Timeout
            | Self::MalformedReply => Persistence::Temporary,
            _ => Persistence::Permanent,
        }
    }

    /// Whether a call that ended so was paid for, as far as the kind alone can tell.
    pub(super) fn billed(self) -> Option<bool> {
        match self {
            Self::Connection | Self::Timeout | Self::Panicked | Self::Other => None,
            Self::MalformedReply | Self::InvalidOutput | Self::Truncated => Some(true),
            _ => Some(false),
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whether trying again can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Persistence {
    /// It may pass: the retry loop tries again.
    Temporary,
    /// It will not pass: nobody tries again.
    Permanent,
    /// It might have passed, but whoever retries has given up. An outer layer
    /// must not retry it once more: that is how retries multiply.
    Exhausted,
}
