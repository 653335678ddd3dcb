//! The meaning of a failed call: for its request, for its deployment, for the whole account.
//!
//! - [`FailureClass`]: the meaning of a single error.
//! - [`History`]: the failures of one request, and its next step.
//! - [`Health`]: whether a deployment has an outage, or refuses the whole account.
//! - [`PoisonDetector`]: whether a request fails by itself while other requests succeed.

mod health;
mod history;
mod poison;

pub(super) use self::health::Health;
pub(super) use self::history::{History, NextStep};
pub(super) use self::poison::{CallEnd, PoisonDetector, Profile, Signature};

use crate::error::{Error, ErrorKind};
use crate::ratelimit::LONGEST_RETRY_AFTER;

/// The meaning of an error for the call that failed with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FailureClass {
    /// The rate limit refused the call. It waits for its lane, which costs no attempt.
    Throttle,
    /// The call may succeed after a wait; trying again costs an attempt.
    Transient,
    /// The call is not tried again.
    Final,
    /// The account is refused, and with it every call.
    Account,
    /// Either this request is refused or the whole account: a 403, or a wait that is too long.
    Doubtful,
}

impl FailureClass {
    pub(super) fn of(error: &Error) -> Self {
        let long = error.wait().is_some_and(|wait| wait > LONGEST_RETRY_AFTER);
        match error.kind() {
            _ if error.is_temporary() && long => Self::Doubtful,
            ErrorKind::Throttled if error.is_temporary() => Self::Throttle,
            _ if error.is_temporary() => Self::Transient,
            ErrorKind::Unauthorized if error.http_status() == Some(403) => Self::Doubtful,
            ErrorKind::Forbidden if !error.is_account_wide() => Self::Doubtful,
            _ if error.is_account_wide() => Self::Account,
            _ => Self::Final,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::error::Persistence;

    #[test]
    fn each_error_has_its_class() {
        let class = |kind| FailureClass::of(&Error::new(kind, ""));
        assert_eq!(class(ErrorKind::Throttled), FailureClass::Throttle);
        assert_eq!(class(ErrorKind::Overloaded), FailureClass::Transient);
        assert_eq!(class(ErrorKind::Connection), FailureClass::Transient);
        assert_eq!(class(ErrorKind::InvalidRequest), FailureClass::Final);
        assert_eq!(class(ErrorKind::QuotaExhausted), FailureClass::Account);
        assert_eq!(class(ErrorKind::Unauthorized), FailureClass::Account);
        assert_eq!(class(ErrorKind::Forbidden), FailureClass::Doubtful);
        let forbidden = Error::new(ErrorKind::Unauthorized, "").with_http_status(403);
        assert_eq!(FailureClass::of(&forbidden), FailureClass::Doubtful);
        for kind in [ErrorKind::Throttled, ErrorKind::Overloaded] {
            let wait = |wait| FailureClass::of(&Error::new(kind, "").with_wait(wait));
            assert_ne!(wait(LONGEST_RETRY_AFTER), FailureClass::Doubtful);
            assert_eq!(wait(Duration::MAX), FailureClass::Doubtful);
        }
        let error = Error::new(ErrorKind::Throttled, "");
        let overruled = error.with_persistence(Persistence::Permanent);
        assert_eq!(FailureClass::of(&overruled), FailureClass::Final);
    }
}
