//! [`ErrorBody`]: the body of an error response, in any of the formats that services use.

use serde_json::Value;

use super::sanitize;
use crate::error::ErrorKind;
use crate::provider::rate_headers;

/// The parts of an error body that decide how the error is classified.
#[derive(Debug, Default)]
pub(super) struct ErrorBody {
    pub(super) message: String,
    /// The message is not a sentence but a structure, in which validators repeat the request.
    structured: bool,
    /// The first of `code`, `type` and `status` that is given.
    pub(super) code: Option<String>,
    /// All codes, and the reasons of the details, in lower case.
    codes: Vec<String>,
    /// A status in the body, for errors that come with status 200.
    status: Option<u16>,
    /// A quota per day is used up.
    per_day: bool,
    /// The error has a moderation report on the prompt.
    moderated: bool,
    /// The body is a web page: a proxy or firewall in front of the API has answered.
    pub(super) web_page: bool,
}

impl ErrorBody {
    /// Reads a body that is not JSON.
    pub(super) fn from_text(body: &[u8]) -> Self {
        let message = String::from_utf8_lossy(body).trim().to_owned();
        Self {
            web_page: sanitize::is_web_page(&message),
            message,
            ..Self::default()
        }
    }

    pub(super) fn from_json(body: &Value) -> Self {
        let body = body.get(0).unwrap_or(body);
        let error = body.get("error").filter(|error| !error.is_null());
        let error = error.unwrap_or(body);
        let message = ["message", "detail", "error_description"]
            .iter()
            .find_map(|name| error.get(name))
            .unwrap_or(error);

        let mut given: Vec<String> = Vec::new();
        let mut status = None;
        for name in ["code", "type", "status", "statusCode"] {
            match error.get(name) {
                Some(Value::String(code)) if !code.is_empty() => {
                    status = status.or(code.parse().ok());
                    given.push(code.clone());
                }
                Some(Value::Number(number)) => {
                    status = status.or_else(|| u16::try_from(number.as_u64()?).ok());
                }
                _ => {}
            }
        }
        let mut codes: Vec<String> = given.iter().map(|code| code.to_lowercase()).collect();
        let mut per_day = false;
        for detail in rate_headers::details(body) {
            codes.extend(detail["reason"].as_str().map(str::to_lowercase));
            let violations = detail["violations"].as_array().into_iter().flatten();
            per_day |= violations
                .filter_map(|violation| violation["quotaId"].as_str())
                .any(|id| id.contains("PerDay"));
        }
        Self {
            message: message
                .as_str()
                .map_or_else(|| message.to_string(), str::to_owned),
            structured: !message.is_string(),
            code: given
                .into_iter()
                .next()
                .or(status.map(|status| status.to_string())),
            codes,
            // A numeric code can mean anything; only one in the range of error statuses is a status.
            status: status.filter(|status| (400..600).contains(status)),
            per_day,
            moderated: ["flagged_input", "reasons"]
                .iter()
                .any(|name| error["metadata"].get(name).is_some_and(|it| !it.is_null())),
            web_page: false,
        }
    }

    fn has_code(&self, codes: &[&str]) -> bool {
        self.codes.iter().any(|code| codes.contains(&code.as_str()))
    }

    /// Whether credit or quota is used up. A code says so, or (Anthropic's spend limits, with status 400 or 429) only
    /// the message.
    fn is_quota_exhausted(&self, names_wait: bool) -> bool {
        const CODES: [&str; 5] = [
            "insufficient_quota",
            "billing_hard_limit_reached",
            "billing_not_active",
            "billing_error",
            "spend_limit_reached",
        ];
        const PHRASES: [&str; 5] = [
            "credit balance",
            "api usage limit",
            "spend limit",
            "spending limit",
            "spend cap",
        ];
        let message = self.message.to_lowercase();
        self.per_day
            || self.has_code(&CODES)
            // An error that names a wait is about a rate, whatever its message says.
            || (!names_wait
                && !self.structured
                && PHRASES.iter().any(|phrase| message.contains(phrase)))
    }

    /// Whether the request is larger than the limit ever allows, although the status (429) is that of a limit that is
    /// used up. The message says so, or it has two numbers that do.
    pub(super) fn exceeds_limit(&self) -> bool {
        const PHRASES: [&str; 3] = [
            "request too large",
            "must be reduced",
            "extra usage is required for long context",
        ];
        let message = self.message.to_lowercase();
        self.has_code(&["request_too_large", "context_length_exceeded"])
            || PHRASES.iter().any(|phrase| message.contains(phrase))
            || matches!(
                (number_after(&message, "limit"), number_after(&message, "requested")),
                (Some(limit), Some(requested)) if requested > limit
            )
    }

    /// Whether a moderator or a firewall refuses the prompt for its content.
    fn refuses_prompt(&self) -> bool {
        const PHRASES: [&str; 7] = [
            "usage guidelines",
            "content policy",
            "content management policy",
            "input was flagged",
            "prompt was flagged",
            "content was flagged",
            "request was flagged",
        ];
        let message = self.message.to_lowercase();
        self.web_page
            || self.moderated
            || self.has_code(&[
                "content_policy_violation",
                "content_filter",
                "moderation_blocked",
                "invalid_prompt",
            ])
            || PHRASES.iter().any(|phrase| message.contains(phrase))
    }

    /// Whether a code says that the credentials or the whole account are refused.
    fn refuses_account(&self) -> bool {
        self.has_code(&[
            "invalid_api_key",
            "api_key_invalid",
            "api_key_service_blocked",
            "access_token_expired",
            "authentication_error",
            "unauthenticated",
            "account_deactivated",
            "consumer_suspended",
            "service_disabled",
            "unsupported_country_region_territory",
        ])
    }

    /// Returns the kind of the error with this status; `names_wait` if the server asks for a wait.
    pub(super) fn kind(&self, status: u16, names_wait: bool) -> ErrorKind {
        let status = match status {
            200..300 => self.status.unwrap_or(0),
            status => status,
        };
        if matches!(status, 0 | 429) && self.exceeds_limit() {
            return ErrorKind::InvalidRequest;
        }
        if matches!(status, 0 | 400 | 402 | 403 | 429) && self.is_quota_exhausted(names_wait) {
            return ErrorKind::QuotaExhausted;
        }
        if self.codes.iter().any(|code| code.contains("overloaded"))
            || self.has_code(&["slow_down"])
        {
            return ErrorKind::Overloaded;
        }
        match status {
            300..400 => ErrorKind::Config,
            402 => ErrorKind::QuotaExhausted,
            401 => ErrorKind::Unauthorized,
            0 | 400 | 403 if self.refuses_account() => ErrorKind::Unauthorized,
            403 if self.refuses_prompt() => ErrorKind::InvalidRequest,
            403 => ErrorKind::Forbidden,
            429 => ErrorKind::Throttled,
            // 498: Groq's capacity exceeded.
            498 | 503 | 529 => ErrorKind::Overloaded,
            408 | 409 | 425 => ErrorKind::Unavailable,
            400..500 => ErrorKind::InvalidRequest,
            500.. => ErrorKind::Unavailable,
            _ if self.has_code(&[
                "rate_limit_error",
                "rate_limit_exceeded",
                "resource_exhausted",
            ]) =>
            {
                ErrorKind::Throttled
            }
            _ if self.has_code(&["permission_error"]) => ErrorKind::Forbidden,
            _ if self.has_code(&[
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

/// Returns the first whole number that follows `word` directly (`limit 30000`, `Requested: ~12,903`).
fn number_after(text: &str, word: &str) -> Option<u64> {
    text.match_indices(word).find_map(|(at, _)| {
        let rest = &text[at + word.len()..];
        let rest = rest.trim_start_matches([' ', ':', '=', '~']);
        let end = rest
            .find(|c: char| !c.is_ascii_digit() && c != ',')
            .unwrap_or(rest.len());
        rest[..end].replace(',', "").parse().ok()
    })
}
