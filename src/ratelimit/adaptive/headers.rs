//! Reads limits and levels from the headers of a provider, with care.

use std::time::Duration;

use crate::ratelimit::bucket::Rate;
use crate::request::Quota;

const MINUTE: Duration = Duration::from_secs(60);
/// Periods that providers use besides the minute.
const LONG_PERIODS: [Duration; 2] = [Duration::from_secs(3_600), Duration::from_secs(86_400)];

/// The limit as a rate per minute, unless it is, or may be, one per hour or day.
///
/// The headers do not say for which period a limit holds, but when it is full again:
/// of a limit that flows in evenly, `reset · limit / used` is the period. A limit of fixed
/// windows resets at the window's end instead, so that the quotient is too long and
/// changes from reply to reply: only one that looks like an hour or a day is left for
/// later. Limits per day are not paced: spread over the day they would waste
/// the hours, and when they are used up the provider says so.
pub(in crate::ratelimit) fn per_minute(quota: &Quota) -> Option<Rate> {
    let limit = quota.limit.filter(|limit| *limit > 0)?;
    let used = limit.saturating_sub(quota.remaining.unwrap_or(limit));
    let reset = quota.reset.unwrap_or_default();
    // The units of a minute's limit take at most a minute to come back; a debt may take longer.
    if reset > MINUTE + MINUTE / 10 {
        return None;
    }
    if used > 0 {
        let period = reset.as_secs_f64() * limit as f64 / used as f64;
        let long = |known: &Duration| (period / known.as_secs_f64() - 1.0).abs() < 0.1;
        if LONG_PERIODS.iter().any(long) {
            return None;
        }
    }
    Some(Rate::per_minute(limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quota(limit: u64, remaining: u64, reset: f64) -> Quota {
        Quota {
            limit: Some(limit),
            remaining: Some(remaining),
            reset: Some(Duration::from_secs_f64(reset)),
        }
    }

    #[test]
    fn minutes_are_taken_and_days_are_not() {
        let minute = Some(Rate::per_minute(600));
        assert_eq!(per_minute(&quota(600, 599, 0.1)), minute);
        assert_eq!(per_minute(&quota(600, 0, 60.0)), minute);
        assert_eq!(per_minute(&quota(600, 599, 59.0)), minute, "a fixed window");
        assert_eq!(per_minute(&quota(14_400, 14_399, 6.0)), None, "per day");
        assert_eq!(per_minute(&quota(14_400, 14_370, 179.56)), None, "per day");
        assert_eq!(per_minute(&quota(1_000, 999, 3.6)), None, "per hour");
        let bare = Quota {
            limit: Some(600),
            ..Quota::default()
        };
        assert_eq!(per_minute(&bare), minute);
        assert_eq!(per_minute(&Quota::default()), None);
        assert_eq!(per_minute(&quota(0, 0, 1.0)), None);
    }
}
