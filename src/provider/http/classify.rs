//! Error responses: from status, headers and body to an [`Error`].

use std::fmt;

use serde_json::Value;

use super::error_body::ErrorBody;
use super::head::Head;
use super::sanitize;
use crate::error::{Error, ErrorKind, Persistence};
use crate::provider::rate_headers;

/// Returns the error for a status other than success, and for a success whose body or event is an error.
pub(super) fn refusal(head: &Head, body: &[u8]) -> Error {
    let json: Option<Value> = serde_json::from_slice(body).ok();
    let error_body = match &json {
        Some(json) => ErrorBody::from_json(json),
        None => ErrorBody::from_text(body),
    };

    let mut rate = head.rate.clone();
    let wait_in_body = || rate_headers::retry_info(json.as_ref()?);
    rate.retry_after = rate.retry_after.or_else(wait_in_body);
    let kind = error_body.kind(head.status, rate.retry_after.is_some());
    if kind == ErrorKind::Throttled {
        rate.retry_after = rate
            .retry_after
            .or_else(|| rate_headers::exhausted_reset(&rate));
    }
    let message = message(head, kind, &error_body, body, json.is_some());

    let mut error = head.error(kind, &message);
    if let Some(code) = &error_body.code {
        let code = sanitize::one_line(&head.redact(code));
        error = error.with_code(sanitize::truncate(code, 100));
    }
    // No wait helps a request that can never succeed.
    if let Some(wait) = rate
        .retry_after
        .filter(|_| kind != ErrorKind::InvalidRequest)
    {
        error = error.with_wait(wait);
    }
    // No retry refills an account or makes a request smaller, even if the server asks for one.
    let permanent = error.is_account_wide() || error_body.exceeds_limit();
    error = match head.get("x-should-retry") {
        Some("false") => error.with_persistence(Persistence::Permanent),
        Some("true") if !permanent => error.with_persistence(Persistence::Temporary),
        _ => error,
    };
    if rate.is_empty() {
        error
    } else {
        error.with_rate(rate)
    }
}

/// Returns the server's message, with the address if the message is too short to act on.
fn message(head: &Head, kind: ErrorKind, error: &ErrorBody, body: &[u8], json: bool) -> String {
    let address = &head.endpoint.address;
    let message = &error.message;
    if kind == ErrorKind::Config {
        return format!(
            "the server redirects to {}, which is not followed so that the key is not sent to another \
             server: set that address as the base URL if it is right",
            head.get("location").unwrap_or("no address")
        );
    }
    if !json && is_compressed(head, body) {
        return format!("the reason cannot be read: it is {COMPRESSED}");
    }
    let missing = matches!(head.status, 404 | 405);
    if error.web_page {
        let hint = match head.status {
            403 => "; a firewall in front of the API may refuse this prompt",
            _ if missing => "; is the base URL right?",
            _ => "",
        };
        return format!(
            "a web page came from {address} instead of the API's answer (\"{}\"){hint}",
            sanitize::web_page_excerpt(message)
        );
    }
    match (missing && error.code.is_none(), json) {
        (true, true) => format!("{message} (from {address})"),
        (true, false) => format!("{message} (from {address}; is the base URL right?)"),
        _ => message.clone(),
    }
}

const COMPRESSED: &str = "compressed, which was not asked for and is not supported (is there a \
                          proxy that compresses?)";

/// Whether a body is compressed, by its first bytes or by its `content-encoding`.
fn is_compressed(head: &Head, body: &[u8]) -> bool {
    const GZIP: &[u8] = &[0x1f, 0x8b];
    body.starts_with(GZIP) || head.is_encoded()
}

/// Returns the error for a success whose body is not JSON.
pub(super) fn unreadable(head: &Head, body: &[u8], why: &dyn fmt::Display) -> Error {
    if is_compressed(head, body) {
        // A retry would get a compressed body again, and perhaps be paid for again.
        return head
            .error(
                ErrorKind::MalformedReply,
                &format!("the reply is {COMPRESSED}"),
            )
            .with_persistence(Persistence::Permanent)
            .with_billed(None);
    }
    let body = String::from_utf8_lossy(body);
    if sanitize::is_web_page(&body) {
        let message = format!(
            "a web page came from {} instead of the API's answer (\"{}\"); is the base URL right, \
             and does no login page stand in between?",
            head.endpoint.address,
            sanitize::web_page_excerpt(&body)
        );
        // The page did not come from the API, so nothing was charged.
        return head
            .error(ErrorKind::MalformedReply, &message)
            .with_billed(Some(false));
    }
    let message = format!("not JSON ({why}): {body}");
    head.error(ErrorKind::MalformedReply, &message)
}
