//! What a refusal means: status, the provider's own words and headers to an [`Error`].

use serde_json::Value;

use crate::error::{Error, ErrorKind, Persistence};
use crate::provider::rate_headers;

use super::Head;

/// Longest message kept of what a server says, in bytes.
const MAX_MESSAGE: usize = 2048;

/// What the body of a refusal says, in whatever form the server has chosen.
#[derive(Debug, Default)]
struct Complaint {
    message: String,
    /// The most telling of `code`, `type` and `status`.
    code: Option<String>,
    /// All of them and the details' reasons, in lower case.
    words: Vec<String>,
    /// A status given in the body, for errors that come with a 200.
    status: Option<u16>,
    per_day: bool,
}

impl Complaint {
    fn read(body: &Value) -> Self {
        let body = body.get(0).unwrap_or(body);
        let error = body.get("error").filter(|error| !error.is_null());
        let error = error.unwrap_or(body);
        let message = ["message", "detail", "error_description"]
            .iter()
            .find_map(|name| error.get(name))
            .unwrap_or(error);

        let mut codes: Vec<String> = Vec::new();
        let mut status = None;
        for name in ["code", "type", "status", "statusCode"] {
            match error.get(name) {
                Some(Value::String(word)) if !word.is_empty() => {
                    status = status.or(word.parse().ok());
                    codes.push(word.clone());
                }
                Some(Value::Number(number)) => {
                    status = status.or_else(|| u16::try_from(number.as_u64()?).ok());
                }
                _ => {}
            }
        }
        let mut words: Vec<String> = codes.iter().map(|word| word.to_lowercase()).collect();
        let mut per_day = false;
        for detail in rate_headers::details(body) {
            words.extend(detail["reason"].as_str().map(str::to_lowercase));
            let violations = detail["violations"].as_array().into_iter().flatten();
            per_day |= violations
                .filter_map(|violation| violation["quotaId"].as_str())
                .any(|id| id.contains("PerDay"));
        }
        Self {
            message: message
                .as_str()
                .map_or_else(|| message.to_string(), str::to_owned),
            code: codes
                .into_iter()
                .next()
                .or(status.map(|status| status.to_string())),
            words,
            // A code can be any number; only one that is a refusal's status is one.
            status: status.filter(|status| (400..600).contains(status)),
            per_day,
        }
    }

    fn says(&self, words: &[&str]) -> bool {
        self.words.iter().any(|word| words.contains(&word.as_str()))
    }

    /// Money is out: said by code, or (Anthropic's caps, a plain 400 or 429) only in prose.
    fn out_of_quota(&self, waitable: bool) -> bool {
        const CODES: [&str; 5] = [
            "insufficient_quota",
            "billing_hard_limit_reached",
            "billing_not_active",
            "billing_error",
            "spend_limit_reached",
        ];
        const PROSE: [&str; 5] = [
            "credit balance",
            "api usage limit",
            "spend limit",
            "spending limit",
            "spend cap",
        ];
        let message = self.message.to_lowercase();
        self.per_day
            || self.says(&CODES)
            // Who names a time to come back speaks of a rate, whatever the wording.
            || (!waitable && PROSE.iter().any(|phrase| message.contains(phrase)))
    }

    fn kind(&self, status: u16, waitable: bool) -> ErrorKind {
        let status = match status {
            200..300 => self.status.unwrap_or(0),
            status => status,
        };
        if matches!(status, 0 | 400 | 402 | 403 | 429) && self.out_of_quota(waitable) {
            return ErrorKind::QuotaExhausted;
        }
        if self.words.iter().any(|word| word.contains("overloaded")) || self.says(&["slow_down"]) {
            return ErrorKind::Overloaded;
        }
        match status {
            300..400 => ErrorKind::Config,
            402 => ErrorKind::QuotaExhausted,
            401 | 403 => ErrorKind::Unauthorized,
            400 if self.says(&["invalid_api_key", "api_key_invalid"]) => ErrorKind::Unauthorized,
            429 => ErrorKind::Throttled,
            // 498: Groq's capacity exceeded.
            498 | 503 | 529 => ErrorKind::Overloaded,
            408 | 409 | 425 => ErrorKind::Unavailable,
            400..500 => ErrorKind::InvalidRequest,
            500.. => ErrorKind::Unavailable,
            _ if self.says(&[
                "rate_limit_error",
                "rate_limit_exceeded",
                "resource_exhausted",
            ]) =>
            {
                ErrorKind::Throttled
            }
            _ if self.says(&[
                "authentication_error",
                "permission_error",
                "invalid_api_key",
            ]) =>
            {
                ErrorKind::Unauthorized
            }
            _ if self.says(&[
                "invalid_request_error",
                "not_found_error",
                "request_too_large",
            ]) =>
            {
                ErrorKind::InvalidRequest
            }
            _ => ErrorKind::Unavailable,
        }
    }
}

/// The error for a refusal: a status that is not a success, or a success whose body
/// or frame is an error after all.
pub(super) fn refusal(head: &Head, body: &[u8]) -> Error {
    let json: Option<Value> = serde_json::from_slice(body).ok();
    let mut complaint = json.as_ref().map(Complaint::read).unwrap_or_default();
    if json.is_none() {
        complaint.message = String::from_utf8_lossy(body).trim().to_owned();
    }

    let mut rate = head.rate.clone();
    let wait = || rate_headers::retry_info(json.as_ref()?);
    rate.retry_after = rate.retry_after.or_else(wait);
    let kind = complaint.kind(head.status, rate.retry_after.is_some());
    if kind == ErrorKind::Throttled {
        rate.retry_after = rate
            .retry_after
            .or_else(|| rate_headers::exhausted_reset(&rate));
    }
    let message = match (kind, head.get("location")) {
        (ErrorKind::Config, to) => format!(
            "the server redirects to {}, which is not followed so that the key goes to nobody \
             else: set that address as the base URL if it is right",
            to.unwrap_or("nowhere")
        ),
        _ => complaint.message,
    };

    let mut error = head.error(kind, &message);
    if let Some(code) = &complaint.code {
        error = error.with_code(shorten(head.scrub(code), 100));
    }
    if let Some(wait) = rate.retry_after {
        error = error.with_wait(wait);
    }
    error = match head.get("x-should-retry") {
        Some("false") => error.with_persistence(Persistence::Permanent),
        // No server's advice to try again fills an empty account.
        Some("true") if !error.is_account_wide() => error.with_persistence(Persistence::Temporary),
        _ => error,
    };
    if rate.is_empty() {
        error
    } else {
        error.with_rate(rate)
    }
}

/// Cuts a text to at most `max` bytes, at a character's end.
pub(super) fn shorten(text: String, max: usize) -> String {
    if text.len() <= max {
        return text;
    }
    let mark = "…";
    let mut end = max - mark.len();
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{mark}", &text[..end])
}

/// A server's message as it may be shown: without secrets, and bounded.
pub(super) fn shown(head: &Head, message: &str) -> String {
    shorten(head.scrub(message), MAX_MESSAGE)
}
