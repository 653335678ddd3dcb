//! Parses the rate limits and the wait of a reply from its headers (`retry-after`, `x-ratelimit-…`) and its body.
//!
//! One function reads all dialects, because gateways mix them: OpenAI and compatible servers (`x-ratelimit-…`, resets as
//! Go durations, on Azure as bare seconds) and Anthropic (`anthropic-ratelimit-…`, resets as RFC 3339 times).

use std::time::Duration;

use jiff::Timestamp;
use jiff::civil;
use jiff::fmt::rfc2822;
use jiff::tz::TimeZone;
use serde_json::Value;

use crate::usage::{Quota, RateSnapshot};

/// The longest wait or reset; a longer one is cut to it. No documented window is longer than a day.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// Parses the limits and the wait that the server asks for: `retry-after-ms`, else `retry-after`. ([`retry_info`] parses
/// the wait in the body of an error.)
///
/// `headers` have lower-case names; of several with one name the first counts. Times are relative to the reply's own
/// `Date`, so that a wrong local clock does no harm, or to `clock` if there is no valid one.
pub(crate) fn snapshot<'a>(
    headers: impl Iterator<Item = (&'a str, &'a [u8])>,
    clock: impl Fn() -> Timestamp,
) -> RateSnapshot {
    let (mut date, mut retry_after_ms, mut retry_after) = (None, None, None);
    let [mut requests, mut tokens, mut input, mut output] = [QuotaHeaders::default(); 4];
    // One pass, because every reply comes through here: a lookup for each name of each dialect costs more than
    // parsing the body.
    for (name, value) in headers {
        let field = match name {
            "date" => &mut date,
            "retry-after-ms" => &mut retry_after_ms,
            "retry-after" => &mut retry_after,
            "x-ratelimit-limit-requests" => &mut requests.limit,
            "x-ratelimit-remaining-requests" => &mut requests.remaining,
            "x-ratelimit-reset-requests" => &mut requests.reset,
            "x-ratelimit-limit-tokens" => &mut tokens.limit,
            "x-ratelimit-remaining-tokens" => &mut tokens.remaining,
            "x-ratelimit-reset-tokens" => &mut tokens.reset,
            "x-ratelimit-limit-input-tokens" => &mut input.limit,
            "x-ratelimit-remaining-input-tokens" => &mut input.remaining,
            "x-ratelimit-reset-input-tokens" => &mut input.reset,
            "x-ratelimit-limit-output-tokens" => &mut output.limit,
            "x-ratelimit-remaining-output-tokens" => &mut output.remaining,
            "x-ratelimit-reset-output-tokens" => &mut output.reset,
            "anthropic-ratelimit-requests-limit" => &mut requests.limit,
            "anthropic-ratelimit-requests-remaining" => &mut requests.remaining,
            "anthropic-ratelimit-requests-reset" => &mut requests.reset,
            "anthropic-ratelimit-tokens-limit" => &mut tokens.limit,
            "anthropic-ratelimit-tokens-remaining" => &mut tokens.remaining,
            "anthropic-ratelimit-tokens-reset" => &mut tokens.reset,
            "anthropic-ratelimit-input-tokens-limit" => &mut input.limit,
            "anthropic-ratelimit-input-tokens-remaining" => &mut input.remaining,
            "anthropic-ratelimit-input-tokens-reset" => &mut input.reset,
            "anthropic-ratelimit-output-tokens-limit" => &mut output.limit,
            "anthropic-ratelimit-output-tokens-remaining" => &mut output.remaining,
            "anthropic-ratelimit-output-tokens-reset" => &mut output.reset,
            _ => continue,
        };
        // Not `to_str`, which accepts only ASCII: Go writes microseconds with a µ.
        *field = field.or_else(|| std::str::from_utf8(value).ok());
    }
    // Lazy, because most replies have no time that is relative to it.
    let now = || date.and_then(http_date).unwrap_or_else(&clock);
    RateSnapshot {
        requests: requests.quota(now),
        tokens: tokens.quota(now),
        input_tokens: input.quota(now),
        output_tokens: output.quota(now),
        retry_after: retry_after_ms
            .and_then(|text| seconds(text, 1e-3))
            .or_else(|| retry_after.and_then(|text| seconds_or_date(text, now))),
    }
}

/// The three headers of one limit.
#[derive(Clone, Copy, Default)]
struct QuotaHeaders<'a> {
    limit: Option<&'a str>,
    remaining: Option<&'a str>,
    reset: Option<&'a str>,
}

impl QuotaHeaders<'_> {
    fn quota(self, now: impl Fn() -> Timestamp) -> Quota {
        let limit = self.limit.map(count);
        // Azure sends -1 or 0 for an unknown limit. The other two headers are meaningless then.
        if matches!(limit, Some(None | Some(0))) {
            return Quota::default();
        }
        Quota {
            limit: limit.flatten(),
            remaining: self.remaining.and_then(count),
            reset: self.reset.and_then(|text| reset(text, now)),
        }
    }
}

/// Returns the time until every exhausted quota has reset: the wait for a refused call if the server names none. A reset
/// is the time until the quota is *full*, so this is rather too long than too short.
pub(crate) fn exhausted_reset(rate: &RateSnapshot) -> Option<Duration> {
    [
        rate.requests,
        rate.tokens,
        rate.input_tokens,
        rate.output_tokens,
    ]
    .iter()
    .filter(|quota| quota.remaining == Some(0))
    .filter_map(|quota| quota.reset)
    .max()
}

/// Returns the entries of `details` in a Google error, which compatible servers put in different places.
pub(crate) fn details(body: &Value) -> impl Iterator<Item = &Value> {
    let first = body.get(0).unwrap_or(body);
    let error = first.get("error").unwrap_or(first);
    error
        .get("details")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
}

/// Parses the wait in the `google.rpc.RetryInfo` of an error body.
pub(crate) fn retry_info(body: &Value) -> Option<Duration> {
    details(body).find_map(|detail| go_duration(detail.get("retryDelay")?.as_str()?))
}

fn count(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

fn reset(text: &str, now: impl Fn() -> Timestamp) -> Option<Duration> {
    go_duration(text)
        .or_else(|| seconds(text, 1.0))
        .or_else(|| Some(until(text.trim().parse().ok()?, now())))
}

fn seconds_or_date(text: &str, now: impl Fn() -> Timestamp) -> Option<Duration> {
    seconds(text, 1.0).or_else(|| Some(until(http_date(text)?, now())))
}

/// Parses a decimal number of `unit` seconds. Negative numbers, NaN and infinities are ignored.
fn seconds(text: &str, unit: f64) -> Option<Duration> {
    let value: f64 = text.trim().parse().ok()?;
    bounded(value * unit)
}

fn bounded(seconds: f64) -> Option<Duration> {
    (seconds.is_finite() && seconds >= 0.0)
        .then(|| Duration::from_secs_f64(seconds.min(LONGEST.as_secs_f64())))
}

/// Parses a duration as Go's `time.Duration` prints it: `17ms`, `6m0s`, `2m59.56s`, `1h2m3s`.
fn go_duration(text: &str) -> Option<Duration> {
    const UNITS: [(&str, f64); 8] = [
        ("ns", 1.0),
        ("us", 1e3),
        ("\u{b5}s", 1e3),  // micro sign
        ("\u{3bc}s", 1e3), // Greek mu: Go reads both
        ("ms", 1e6),
        ("s", 1e9),
        ("m", 60e9),
        ("h", 3600e9),
    ];
    let mut rest = text.trim();
    let mut nanos = 0.0;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let unit_at = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, after) = rest.split_at(unit_at);
        let unit_end = after
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(after.len());
        let (unit, after) = after.split_at(unit_end);
        let (_, scale) = UNITS.iter().find(|(name, _)| *name == unit)?;
        // An f64 holds whole nanoseconds up to 2^53 exactly: three months.
        nanos += (number.parse::<f64>().ok()? * scale).round();
        rest = after;
    }
    let longest = LONGEST.as_nanos() as f64;
    Some(Duration::from_nanos(nanos.min(longest) as u64))
}

/// Parses the three date formats of RFC 9110: the one in use, and two obsolete ones that recipients must accept.
fn http_date(text: &str) -> Option<Timestamp> {
    let text = text.trim();
    let parser = rfc2822::DateTimeParser::new().relaxed_weekday(true);
    parser.parse_timestamp(text).ok().or_else(|| {
        ["%A, %d-%b-%y %H:%M:%S GMT", "%a %b %e %H:%M:%S %Y"]
            .iter()
            .find_map(|format| civil::DateTime::strptime(format, text).ok())
            .and_then(|date| date.to_zoned(TimeZone::UTC).ok())
            .map(|date| date.timestamp())
    })
}

/// Returns the time from `now` to `then`, zero if `then` is past.
fn until(then: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(then.duration_since(now))
        .unwrap_or_default()
        .min(LONGEST)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const DATE: &str = "Tue, 03 Jun 2025 10:00:00 GMT";

    fn read(headers: &[(&str, &str)]) -> RateSnapshot {
        let headers = headers
            .iter()
            .map(|(name, value)| (*name, value.as_bytes()));
        snapshot(headers, || Timestamp::UNIX_EPOCH)
    }

    fn quota(limit: u64, remaining: u64, reset: Duration) -> Quota {
        Quota {
            limit: Some(limit),
            remaining: Some(remaining),
            reset: Some(reset),
        }
    }

    #[test]
    fn go_durations_are_parsed() {
        let cases = [
            ("17ms", Some(Duration::from_millis(17))),
            ("1s", Some(Duration::from_secs(1))),
            ("6m0s", Some(Duration::from_secs(360))),
            ("2m59.56s", Some(Duration::from_millis(179_560))),
            ("1h2m3s", Some(Duration::from_secs(3723))),
            ("250\u{b5}s", Some(Duration::from_micros(250))),
            ("250\u{3bc}s", Some(Duration::from_micros(250))),
            ("250us", Some(Duration::from_micros(250))),
            ("1.5ns", Some(Duration::from_nanos(2))),
            ("0s", Some(Duration::ZERO)),
            (" 45.8s ", Some(Duration::from_millis(45_800))),
            ("9999999h", Some(LONGEST)),
            ("", None),
            ("-1s", None),
            ("1", None),
            ("s", None),
            ("1.2.3s", None),
            ("1d", None),
            ("1s?", None),
        ];
        for (text, expected) in cases {
            assert_eq!(go_duration(text), expected, "{text:?}");
        }
    }

    #[test]
    fn openai_headers_are_parsed() {
        let rate = read(&[
            ("x-ratelimit-limit-requests", "14400"),
            ("x-ratelimit-remaining-requests", "14399"),
            ("x-ratelimit-reset-requests", "2m59.56s"),
            ("x-ratelimit-limit-tokens", "18000"),
            ("x-ratelimit-remaining-tokens", "0"),
            ("x-ratelimit-reset-tokens", "17ms"),
        ]);
        let tokens = quota(18_000, 0, Duration::from_millis(17));
        assert_eq!(
            rate.requests,
            quota(14_400, 14_399, Duration::from_millis(179_560))
        );
        assert_eq!(rate.tokens, tokens);
        assert_eq!(rate.retry_after, None);
        assert_eq!(exhausted_reset(&rate), tokens.reset);
    }

    #[test]
    fn azure_resets_are_bare_seconds_and_unknown_limits_are_ignored() {
        let rate = read(&[
            ("x-ratelimit-limit-requests", "60"),
            ("x-ratelimit-remaining-requests", "59"),
            ("x-ratelimit-reset-requests", "10"),
            ("x-ratelimit-limit-tokens", "-1"),
            ("x-ratelimit-remaining-tokens", "0"),
            ("x-ratelimit-reset-tokens", "60"),
        ]);
        assert_eq!(rate.requests, quota(60, 59, Duration::from_secs(10)));
        assert_eq!(rate.tokens, Quota::default());
        assert_eq!(exhausted_reset(&rate), None);
        assert!(read(&[("x-ratelimit-limit-tokens", "0")]).is_empty());
    }

    #[test]
    fn anthropic_resets_are_relative_to_the_date_of_the_reply() {
        let rate = read(&[
            ("date", DATE),
            ("anthropic-ratelimit-requests-limit", "50"),
            ("anthropic-ratelimit-requests-remaining", "49"),
            ("anthropic-ratelimit-requests-reset", "2025-06-03T10:00:02Z"),
            ("anthropic-ratelimit-tokens-limit", "40000"),
            ("anthropic-ratelimit-input-tokens-remaining", "0"),
            (
                "anthropic-ratelimit-input-tokens-reset",
                "2025-06-03T12:00:30.5+02:00",
            ),
            ("anthropic-ratelimit-output-tokens-remaining", "0"),
            (
                "anthropic-ratelimit-output-tokens-reset",
                "2025-06-03T09:00:00Z",
            ),
        ]);
        assert_eq!(rate.requests, quota(50, 49, Duration::from_secs(2)));
        assert_eq!(rate.tokens.limit, Some(40_000));
        assert_eq!(rate.input_tokens.reset, Some(Duration::from_millis(30_500)));
        assert_eq!(rate.output_tokens.reset, Some(Duration::ZERO), "past");
        assert_eq!(exhausted_reset(&rate), Some(Duration::from_millis(30_500)));
    }

    #[test]
    fn a_reset_without_a_date_header_is_relative_to_the_local_clock() {
        let reset = ("anthropic-ratelimit-requests-reset", "1970-01-01T00:00:05Z");
        let rate = read(&[reset]);
        assert_eq!(rate.requests.reset, Some(Duration::from_secs(5)));
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let cases = [
            ("2", Some(Duration::from_secs(2))),
            ("0", Some(Duration::ZERO)),
            ("0.25", Some(Duration::from_millis(250))),
            (
                "Tue, 03 Jun 2025 10:01:30 GMT",
                Some(Duration::from_secs(90)),
            ),
            (
                "Tuesday, 03-Jun-25 10:01:30 GMT",
                Some(Duration::from_secs(90)),
            ),
            ("Tue Jun  3 10:01:30 2025", Some(Duration::from_secs(90))),
            ("Tue, 03 Jun 2025 09:00:00 GMT", Some(Duration::ZERO)),
            ("Tue, 03 Jun 2125 10:00:00 GMT", Some(LONGEST)),
            ("1e300", Some(LONGEST)),
            ("-1", None),
            ("NaN", None),
            ("inf", None),
            ("soon", None),
        ];
        for (text, expected) in cases {
            let rate = read(&[("date", DATE), ("retry-after", text)]);
            assert_eq!(rate.retry_after, expected, "{text:?}");
        }
    }

    #[test]
    fn retry_after_ms_wins_over_retry_after() {
        let ms = ("retry-after-ms", "1500");
        let s = ("retry-after", "2");
        let wait = |headers: &[_]| read(headers).retry_after;
        assert_eq!(wait(&[s, ms]), Some(Duration::from_millis(1500)));
        assert_eq!(wait(&[s]), Some(Duration::from_secs(2)));
        assert_eq!(
            wait(&[("retry-after-ms", "?"), s]),
            Some(Duration::from_secs(2))
        );
        assert_eq!(wait(&[]), None);
    }

    #[test]
    fn a_body_may_ask_for_a_wait() {
        let body = json!([{"error": {"details": [
            {"@type": "type.googleapis.com/google.rpc.QuotaFailure"},
            {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "45.8s"},
        ]}}]);
        assert_eq!(retry_info(&body), Some(Duration::from_millis(45_800)));
        assert_eq!(retry_info(&json!({"error": {}})), None);
    }

    #[test]
    fn input_and_output_tokens_are_parsed_in_both_dialects() {
        let rate = read(&[
            ("x-ratelimit-remaining-input-tokens", "7"),
            ("x-ratelimit-reset-output-tokens", "2s"),
        ]);
        assert_eq!(rate.input_tokens.remaining, Some(7));
        assert_eq!(rate.output_tokens.reset, Some(Duration::from_secs(2)));
    }

    /// Prints a duration as Go does: the largest units first, a fraction in the last one.
    fn print_go(duration: Duration) -> String {
        let (s, nanos) = (duration.as_secs(), duration.subsec_nanos());
        let fraction = format!("{}.{nanos:09}s", s % 60);
        match (s / 3600, s / 60 % 60) {
            (0, 0) if s == 0 && nanos < 1_000_000 => format!("{}\u{b5}s", f64::from(nanos) / 1e3),
            (0, 0) if s == 0 => format!("{}ms", f64::from(nanos) / 1e6),
            (0, 0) => fraction,
            (0, m) => format!("{m}m{fraction}"),
            (h, m) => format!("{h}h{m}m{fraction}"),
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,40}", number in "[-+]?[0-9.eE]{1,30}(ms|s|m|h)?") {
            for text in [&text, &number] {
                for name in [
                    "date", "retry-after", "retry-after-ms", "x-ratelimit-limit-tokens",
                    "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens",
                    "anthropic-ratelimit-requests-reset",
                ] {
                    let rate = read(&[(name, text)]);
                    for found in [rate.retry_after, rate.tokens.reset, rate.requests.reset] {
                        prop_assert!(found.unwrap_or_default() <= LONGEST);
                    }
                }
                let body = json!({"error": {"details": [{"retryDelay": text}]}});
                prop_assert!(retry_info(&body).unwrap_or_default() <= LONGEST);
            }
        }

        #[test]
        fn a_printed_go_duration_is_parsed_to_the_same_value(nanos in 0..=LONGEST.as_nanos() as u64) {
            let duration = Duration::from_nanos(nanos);
            let now = Timestamp::from_second(1_700_000_000).unwrap();
            let then = now + jiff::SignedDuration::try_from(duration).unwrap();
            prop_assert_eq!(go_duration(&print_go(duration)), Some(duration));
            prop_assert_eq!(reset(&then.to_string(), || now), Some(duration));
            let bare = format!("{}.{:09}", duration.as_secs(), duration.subsec_nanos());
            prop_assert_eq!(reset(&bare, || now), Some(duration));
            prop_assert_eq!(seconds_or_date(&bare, || now), Some(duration));
        }

        #[test]
        fn a_printed_http_date_is_parsed_to_the_same_value(seconds in 0_i64..=86_400) {
            let now = Timestamp::from_second(1_700_000_000).unwrap();
            let then = now + jiff::SignedDuration::from_secs(seconds);
            let text = then.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
            prop_assert_eq!(seconds_or_date(&text, || now), Some(Duration::from_secs(seconds as u64)));
        }
    }
}
