//! The status and headers of a reply, and the errors that carry them.

use std::sync::Arc;

use reqwest::header::{AsHeaderName, HeaderMap, HeaderName};

use super::{Endpoint, sanitize};
use crate::error::{Error, ErrorKind};
use crate::request::RateSnapshot;

/// The status and headers of a reply, with the endpoint that errors name.
pub(crate) struct Head {
    pub(super) status: u16,
    pub(super) headers: HeaderMap,
    pub(super) rate: RateSnapshot,
    pub(super) endpoint: Arc<Endpoint>,
}

impl Head {
    pub(super) fn get(&self, name: impl AsHeaderName) -> Option<&str> {
        std::str::from_utf8(self.headers.get(name)?.as_bytes()).ok()
    }

    pub(super) fn request_id(&self) -> Option<String> {
        // Looked up for every reply; names given as strings would be parsed each time.
        static NAMES: [HeaderName; 3] = [
            HeaderName::from_static("x-request-id"),
            HeaderName::from_static("request-id"),
            HeaderName::from_static("apim-request-id"),
        ];
        NAMES
            .iter()
            .find_map(|name| self.get(name))
            .map(|id| sanitize::truncate(sanitize::one_line(&self.redact(id)), 200))
    }

    pub(super) fn redact(&self, text: &str) -> String {
        self.endpoint.secrets.redact(text)
    }

    /// Whether the body has a content encoding, although the request allowed none.
    pub(super) fn is_encoded(&self) -> bool {
        let coding = self.get("content-encoding").unwrap_or_default().trim();
        !(coding.is_empty() || coding.eq_ignore_ascii_case("identity"))
    }

    /// Whether the content type is that of server-sent events.
    pub(super) fn declares_events(&self) -> bool {
        self.get("content-type").is_some_and(|content_type| {
            let essence = content_type.split(';').next().unwrap_or_default().trim();
            essence.eq_ignore_ascii_case("text/event-stream")
        })
    }

    /// Creates an error with the status, the request id and the rate limits of this reply.
    pub(super) fn error(&self, kind: ErrorKind, message: &str) -> Error {
        self.annotate(Error::new(kind, sanitize::one_line(&self.redact(message))))
    }

    /// Adds the status, the request id and the rate limits of this reply to an error.
    pub(super) fn annotate(&self, error: Error) -> Error {
        let mut error = error.with_http_status(self.status);
        if let Some(id) = self.request_id() {
            error = error.with_request_id(id);
        }
        if self.rate.is_empty() {
            error
        } else {
            error.with_rate(self.rate.clone())
        }
    }
}
