//! The settings that the builders of all HTTP providers share, and the URL and headers made of them.

use std::fmt;
use std::time::Duration;

use reqwest::Url;
use reqwest::header::HeaderValue;
use secrecy::SecretString;

use super::secrets::Secrets;
use crate::error::{Error, ErrorKind, Result};
use crate::provider::IDLE_TIMEOUT;

/// The settings that do not depend on the dialect.
#[derive(Clone)]
pub(crate) struct Settings {
    pub(crate) base_url: String,
    pub(crate) api_key: Option<SecretString>,
    /// Headers with secret values: hidden in `Debug`, redacted in errors.
    pub(crate) headers: Vec<(String, SecretString)>,
    /// Headers of the protocol, which hold no secret.
    pub(crate) plain_headers: Vec<(&'static str, String)>,
    pub(crate) query: Vec<(String, String)>,
    /// Whether to speak HTTP/2 to servers that support it.
    pub(crate) http2: bool,
    /// The silence after which an HTTP/2 connection is pinged, and the longest wait for the answer.
    pub(crate) ping: Duration,
    pub(crate) limits: Limits,
}

/// Limits of one call in time and size.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) connect: Duration,
    pub(crate) first_byte: Duration,
    pub(crate) idle: Duration,
    pub(crate) whole: Duration,
    pub(crate) max_body: usize,
    pub(crate) max_event: usize,
}

impl Settings {
    pub(crate) fn new(base_url: &str) -> Self {
        Self {
            base_url: base_url.to_owned(),
            api_key: None,
            headers: Vec::new(),
            plain_headers: Vec::new(),
            query: Vec::new(),
            http2: false,
            ping: Duration::from_secs(10),
            limits: Limits {
                connect: Duration::from_secs(10),
                first_byte: Duration::from_secs(600),
                idle: IDLE_TIMEOUT,
                whole: Duration::from_secs(600),
                max_body: 16 << 20,
                max_event: 1 << 20,
            },
        }
    }

    /// Sets the key without the newline that keys from files and environment variables end with.
    pub(crate) fn set_key(&mut self, key: String) {
        let key = key.trim();
        self.api_key = (!key.is_empty()).then(|| key.into());
    }

    pub(crate) fn header(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.headers.push((name.into(), value.into().into()));
    }

    /// Returns the URL of `path` under the base URL.
    pub(super) fn url(&self, path: &str) -> Result<Url> {
        let wrong = |why: &str| config_error(&format!("the base URL cannot be used: {why}"));
        let scheme = "it must begin with https:// or http://, as in https://api.example.com/v1";
        let mut url = Url::parse(self.base_url.trim()).map_err(|error| {
            match self.base_url.contains("://") {
                true => wrong(&error.to_string()),
                false => wrong(scheme),
            }
        })?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(wrong(scheme));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(wrong("it holds a user or password; send those in a header"));
        }
        let full = format!("{}{path}", url.path().trim_end_matches('/'));
        url.set_path(&full);
        url.set_fragment(None);
        for (name, value) in &self.query {
            url.query_pairs_mut().append_pair(name, value);
        }
        Ok(url)
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn names<T>(pairs: &[(String, T)]) -> Vec<&String> {
            pairs.iter().map(|(name, _)| name).collect()
        }
        // A malformed base URL may hold a password or a key.
        let base_url = Secrets::default().redact(&self.base_url);
        f.debug_struct("Settings")
            .field("base_url", &base_url.rsplit('@').next())
            .field("api_key", &self.api_key.as_ref().map(|_| "[secret]"))
            .field("headers", &names(&self.headers))
            .field("query", &names(&self.query))
            .field("http2", &self.http2)
            .field("limits", &self.limits)
            .finish()
    }
}

/// Returns an environment variable, or `None` if it is unset or blank.
pub(crate) fn env(name: &str) -> Option<String> {
    std::env::var(name)
        .ok()
        .filter(|value| !value.trim().is_empty())
}

pub(super) fn config_error(message: &str) -> Error {
    Error::new(ErrorKind::Config, message)
}

pub(super) fn header_value(name: &str, value: &str) -> Result<HeaderValue> {
    HeaderValue::from_str(value).map_err(|_| {
        config_error(&format!(
            "the value of the header {name} has characters that no header may have"
        ))
    })
}
