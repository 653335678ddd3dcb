//! [`ErrorKind`] and [`Persistence`]: what failed, and whether a retry can help.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The kind of a failure. Use the predicates of [`Error`](crate::Error) first; match on a kind only
/// if they are not enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// The provider refused the call because of a rate limit (429), or a [`Runner`](crate::Runner::quota) the submission of a
    /// run. It succeeds after a wait.
    Throttled,
    /// The provider is overloaded (503, 529, `slow_down`). Sending fewer calls helps.
    Overloaded,
    /// The provider failed with an error that is usually transient (408, 409, 5xx).
    Unavailable,
    /// The connection could not be made, was reset, or ended in the middle of a reply.
    Connection,
    /// The call took longer than one of its timeouts.
    Timeout,
    /// The request itself is refused (400, 404, 413, 422): the same request will fail again.
    InvalidRequest,
    /// The credentials are refused (401). No call of this account will succeed.
    Unauthorized,
    /// The request is forbidden (403), and the provider gives no reason. Either this request
    /// is refused (a model that the key may not use, a policy of a gateway) or every request of the account.
    Forbidden,
    /// The account's quota is used up (402, `insufficient_quota`, spend cap, per-day limit).
    /// No call of this account will succeed until its owner acts or the day ends.
    QuotaExhausted,
    /// The reply breaks the protocol: it is not JSON, has no choices, or is too large.
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
    /// The store failed. Temporary if a retry can help: a lost connection, a busy file.
    Store,
    /// A worker has lost its lease. It must stop, because other workers have its items.
    LeaseLost,
    /// The reply cannot be used: it is not JSON, does not fit the type, or was refused by a
    /// validator or by the model. It is paid for, and the same request may get the same reply.
    InvalidOutput,
    /// The reply was cut at its limit on tokens, or broke off in the middle of a value. In the first case, ask again
    /// with a higher [`max_tokens`](crate::Request::max_tokens).
    Truncated,
    /// An error of the caller's own code, carried by [`Error::other`](crate::Error::other).
    Other,
}

impl ErrorKind {
    /// Returns the kind in snake case, as it is serialised.
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
            Self::Throttled => "throttled",
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

    /// Whether a call that ended with this kind was paid for, if the kind decides it.
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

/// Whether a retry can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Persistence {
    /// The failure is transient: the retry loop tries again.
    Temporary,
    /// The failure is permanent: there is no retry.
    Permanent,
    /// The failure was transient, and the retry loop has given up. An outer layer must not retry again, because
    /// retries would multiply.
    Exhausted,
}
