//! What a refusal means: status, the provider's own words and headers to an [`Error`].

use std::fmt;

use serde_json::Value;

use crate::error::{Error, ErrorKind, Persistence};
use crate::provider::rate_headers;

use super::{Head, text};

/// What the body of a refusal says, in whatever form the server has chosen.
#[derive(Debug, Default)]
struct Complaint {
    message: String,
    /// The message is no sentence but a structure, in which validators repeat the request.
    structured: bool,
    /// The most telling of `code`, `type` and `status`.
    code: Option<String>,
    /// All of them and the details' reasons, in lower case.
    words: Vec<String>,
    /// A status given in the body, for errors that come with a 200.
    status: Option<u16>,
    per_day: bool,
    /// A moderator's report on the prompt stands beside the message.
    moderated: bool,
    /// The body is a web page: something in front of the API has answered.
    page: bool,
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
            structured: !message.is_string(),
            code: codes
                .into_iter()
                .next()
                .or(status.map(|status| status.to_string())),
            words,
            // A code can be any number; only one that is a refusal's status is one.
            status: status.filter(|status| (400..600).contains(status)),
            per_day,
            moderated: ["flagged_input", "reasons"]
                .iter()
                .any(|name| error["metadata"].get(name).is_some_and(|it| !it.is_null())),
            page: false,
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
            || (!waitable
                && !self.structured
                && PROSE.iter().any(|phrase| message.contains(phrase)))
    }

    /// The request is larger than the limit ever allows, although the status (429) is that of a
    /// limit that is used up: said in words, or by two numbers.
    fn exceeds_limit(&self) -> bool {
        const PROSE: [&str; 3] = [
            "request too large",
            "must be reduced",
            "extra usage is required for long context",
        ];
        let message = self.message.to_lowercase();
        self.says(&["request_too_large", "context_length_exceeded"])
            || PROSE.iter().any(|phrase| message.contains(phrase))
            || matches!(
                (number_after(&message, "limit"), number_after(&message, "requested")),
                (Some(limit), Some(requested)) if requested > limit
            )
    }

    /// The prompt is refused for what it says, by a moderator or by a firewall.
    fn is_about_the_prompt(&self) -> bool {
        const PROSE: [&str; 7] = [
            "usage guidelines",
            "content policy",
            "content management policy",
            "input was flagged",
            "prompt was flagged",
            "content was flagged",
            "request was flagged",
        ];
        let message = self.message.to_lowercase();
        self.page
            || self.moderated
            || self.says(&[
                "content_policy_violation",
                "content_filter",
                "moderation_blocked",
                "invalid_prompt",
            ])
            || PROSE.iter().any(|phrase| message.contains(phrase))
    }

    /// A code says that the credentials or the whole account are refused.
    fn is_about_the_account(&self) -> bool {
        self.says(&[
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

    fn kind(&self, status: u16, waitable: bool) -> ErrorKind {
        let status = match status {
            200..300 => self.status.unwrap_or(0),
            status => status,
        };
        if matches!(status, 0 | 429) && self.exceeds_limit() {
            return ErrorKind::InvalidRequest;
        }
        if matches!(status, 0 | 400 | 402 | 403 | 429) && self.out_of_quota(waitable) {
            return ErrorKind::QuotaExhausted;
        }
        if self.words.iter().any(|word| word.contains("overloaded")) || self.says(&["slow_down"]) {
            return ErrorKind::Overloaded;
        }
        match status {
            300..400 => ErrorKind::Config,
            402 => ErrorKind::QuotaExhausted,
            401 => ErrorKind::Unauthorized,
            0 | 400 | 403 if self.is_about_the_account() => ErrorKind::Unauthorized,
            403 if self.is_about_the_prompt() => ErrorKind::InvalidRequest,
            403 => ErrorKind::Forbidden,
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
            _ if self.says(&["permission_error"]) => ErrorKind::Forbidden,
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

/// The first whole number that stands right behind `word` (`limit 30000`, `Requested: ~12,903`).
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

/// The error for a refusal: a status that is not a success, or a success whose body
/// or frame is an error after all.
pub(super) fn refusal(head: &Head, body: &[u8]) -> Error {
    let json: Option<Value> = serde_json::from_slice(body).ok();
    let mut complaint = json.as_ref().map(Complaint::read).unwrap_or_default();
    if json.is_none() {
        complaint.message = String::from_utf8_lossy(body).trim().to_owned();
        complaint.page = text::is_page(&complaint.message);
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
    let message = message(head, kind, &complaint, body, json.is_some());

    let mut error = head.error(kind, &message);
    if let Some(code) = &complaint.code {
        error = error.with_code(text::shorten(text::line(&head.scrub(code)), 100));
    }
    // A request that can never succeed has nothing to wait for.
    if let Some(wait) = rate
        .retry_after
        .filter(|_| kind != ErrorKind::InvalidRequest)
    {
        error = error.with_wait(wait);
    }
    // No server's advice to try again fills an empty account, or makes a request smaller.
    let hopeless = error.is_account_wide() || complaint.exceeds_limit();
    error = match head.get("x-should-retry") {
        Some("false") => error.with_persistence(Persistence::Permanent),
        Some("true") if !hopeless => error.with_persistence(Persistence::Temporary),
        _ => error,
    };
    if rate.is_empty() {
        error
    } else {
        error.with_rate(rate)
    }
}

/// What is told of a refusal: the server's words, and the address where they say too little.
fn message(head: &Head, kind: ErrorKind, complaint: &Complaint, body: &[u8], json: bool) -> String {
    let address = &head.endpoint.address;
    let said = &complaint.message;
    if kind == ErrorKind::Config {
        return format!(
            "the server redirects to {}, which is not followed so that the key goes to nobody \
             else: set that address as the base URL if it is right",
            head.get("location").unwrap_or("nowhere")
        );
    }
    if !json && is_compressed(head, body) {
        return format!("the reason cannot be read: it is {COMPRESSED}");
    }
    let missing = matches!(head.status, 404 | 405);
    if complaint.page {
        let hint = match head.status {
            403 => "; a firewall in front of the API may refuse this prompt",
            _ if missing => "; is the base URL right?",
            _ => "",
        };
        return format!(
            "a web page came from {address} instead of the API's answer (\"{}\"){hint}",
            text::excerpt(said)
        );
    }
    match (missing && complaint.code.is_none(), json) {
        (true, true) => format!("{said} (from {address})"),
        (true, false) => format!("{said} (from {address}; is the base URL right?)"),
        _ => said.clone(),
    }
}

const COMPRESSED: &str = "compressed, which was not asked for and is not supported (is there a \
                          proxy that compresses?)";

/// Whether a body is compressed, by its first bytes or by what the head says.
fn is_compressed(head: &Head, body: &[u8]) -> bool {
    const GZIP: &[u8] = &[0x1f, 0x8b];
    body.starts_with(GZIP) || head.is_encoded()
}

/// The error for a success whose body is not the API's.
pub(super) fn unreadable(head: &Head, body: &[u8], why: &dyn fmt::Display) -> Error {
    if is_compressed(head, body) {
        // Asked for again, it would be compressed again, and perhaps paid for again.
        return head
            .error(
                ErrorKind::MalformedReply,
                &format!("the reply is {COMPRESSED}"),
            )
            .with_persistence(Persistence::Permanent)
            .with_billed(None);
    }
    let body = String::from_utf8_lossy(body);
    if text::is_page(&body) {
        let message = format!(
            "a web page came from {} instead of the API's answer (\"{}\"); is the base URL right, \
             and does no login page stand in between?",
            head.endpoint.address,
            text::excerpt(&body)
        );
        // It was not the API that answered.
        return head
            .error(ErrorKind::MalformedReply, &message)
            .with_billed(Some(false));
    }
    let message = format!("not JSON ({why}): {body}");
    head.error(ErrorKind::MalformedReply, &message)
}
