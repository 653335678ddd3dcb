//! The HTTP client of the providers: one call for each request, without retries or redirects.
//!
//! - `mod` (here): the client, and sending a request until the head of its reply;
//! - `settings`: the settings that the builders share, and `setters` their methods;
//! - `request_body`: the JSON of a request;
//! - `reply`: a call from request to [`Reply`](crate::Reply), whole or streamed;
//! - `dialect`: the part of reading a reply that each provider implements;
//! - `head`: status and headers of a reply;
//! - `body`: reading a body within the timeouts and size limits of a call;
//! - `format`: whether a body is a document or a stream of events;
//! - `sse`: server-sent events out of a body;
//! - `classify`: from an error response to an [`Error`](crate::Error), and `error_body` for its JSON;
//! - `connection`: connection settings, and the errors of connections that fail;
//! - `timer`: the timeouts of a call;
//! - `sanitize`: server texts made fit for one line of a log;
//! - `secrets`: redaction of keys.

mod body;
mod classify;
mod connection;
mod dialect;
mod error_body;
mod format;
mod head;
mod reply;
mod request_body;
mod sanitize;
mod secrets;
mod setters;
mod settings;
mod sse;
mod timer;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, USER_AGENT,
};
use reqwest::{Client, Method, Url};
use secrecy::ExposeSecret;
use tokio::time::Instant;

use crate::error::Result;
use crate::provider::rate_headers;

pub(crate) use self::dialect::{Dialect, Json, PartialReply};
pub(crate) use self::request_body::{RequestBody, required_model};
pub(crate) use self::setters::shared_setters;
pub(crate) use self::settings::{Settings, env};
pub(crate) use crate::request::schema::enforceable;

use self::body::Body;
use self::connection::Upload;
use self::head::Head;
use self::secrets::Secrets;
use self::settings::{Limits, config_error, header_value};
use self::timer::{CallTimer, Deadline, timed_out};

/// A client for one endpoint. Cheap to clone: the connections are shared.
#[derive(Clone)]
pub(crate) struct Http {
    client: Client,
    url: Url,
    endpoint: Arc<Endpoint>,
    http2: bool,
    limits: Limits,
}

/// How often a request is resent that an HTTP/2 server has not begun to process. Each time, the server has closed
/// a whole connection.
const MAX_RESENDS: u32 = 10;

/// The parts of an endpoint that error messages need.
struct Endpoint {
    /// The URL without its query, which may hold a key.
    address: String,
    secrets: Secrets,
    /// The limit on open files at the time when the client was built, if it is known.
    max_open_files: Option<u64>,
}

impl Http {
    /// Creates a client that posts to `path` under the base URL.
    pub(crate) fn new(settings: Settings, path: &str) -> Result<Self> {
        let mut secrets = Secrets::default();
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        // Static, so that the six copies that reqwest makes of it for each call count no references.
        let agent = concat!("throughline/", env!("CARGO_PKG_VERSION"));
        headers.insert(USER_AGENT, HeaderValue::from_static(agent));
        // Without this header, a server may choose any compression.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        for (name, value) in &settings.plain_headers {
            headers.insert(*name, header_value(name, value)?);
        }
        for (name, value) in &settings.headers {
            let text = value.expose_secret();
            secrets.add(text);
            // The name of the scheme is no part of the secret: `Bearer sk-…`.
            secrets.add(text.split_once(' ').map_or("", |(_, token)| token));
            let mut value = header_value(name, text)?;
            value.set_sensitive(true);
            let header: HeaderName = name
                .parse()
                .map_err(|_| config_error(&format!("{name:?} is not a header's name")))?;
            headers.insert(header, value);
        }
        let url = settings.url(path)?;
        // A proxy receives the `user-agent` among these headers, and no other.
        let client = connection::builder(&settings, &url).default_headers(headers);
        let client = client
            .build()
            .map_err(|error| config_error(&secrets.redact(&connection::error_chain(&error))))?;
        let address = url.as_str().split('?').next().unwrap_or_default();
        let endpoint = Endpoint {
            address: address.to_owned(),
            secrets,
            max_open_files: connection::max_open_files(),
        };
        Ok(Self {
            client,
            url,
            endpoint: endpoint.into(),
            http2: settings.http2,
            limits: settings.limits,
        })
    }

    pub(crate) fn host(&self) -> &str {
        self.url.host_str().unwrap_or_default()
    }

    /// Posts a body and waits for the head of the reply. A status other than success is an error.
    async fn post(&self, body: Vec<u8>, timeout: Option<Duration>) -> Result<(Head, Body)> {
        let whole = timeout.map_or(self.limits.whole, |asked| asked.min(self.limits.whole));
        let start = Instant::now();
        let deadline = Deadline::from(start, whole);
        let first_byte = || Deadline::from(start, self.limits.first_byte).min(deadline);

        let mut body = Bytes::from(body);
        let mut timer = CallTimer::default();
        let mut resends = 0;
        let mut response = loop {
            let (request, upload) = self.request(&mut body);
            let sent = self.client.execute(request);
            let error = match timer.timeout(first_byte, sent).await {
                Ok(Ok(response)) => break response,
                Ok(Err(error)) => error,
                Err(end) if end == deadline => return Err(timed_out("the call", whole)),
                Err(_) => return Err(timed_out("the reply's first byte", self.limits.first_byte)),
            };
            let unprocessed = upload.is_some_and(|upload| upload.is_unprocessed(&error));
            if !unprocessed || resends == MAX_RESENDS {
                return Err(connection::error(&error, unprocessed, &self.endpoint));
            }
            resends += 1;
        };

        let headers = std::mem::take(response.headers_mut());
        let pairs = headers
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_bytes()));
        let mut head = Head {
            status: response.status().as_u16(),
            rate: rate_headers::snapshot(pairs, Timestamp::now),
            headers,
            endpoint: Arc::clone(&self.endpoint),
        };
        let endpoint = Arc::clone(&self.endpoint);
        let mut body = Body::new(response, endpoint, self.limits, timer, deadline, whole);
        if (200..300).contains(&head.status) {
            // Some servers send it with every reply; it means nothing for an admitted call.
            head.rate.retry_after = None;
            return Ok((head, body));
        }
        let text = body.error_text().await;
        Err(classify::refusal(&head, &text))
    }

    /// Builds the request. HTTP/2 may need its body again, so there it is cloned, and the upload records whether
    /// it was begun.
    fn request(&self, body: &mut Bytes) -> (reqwest::Request, Option<Upload>) {
        let mut request = reqwest::Request::new(Method::POST, self.url.clone());
        if self.http2 {
            let upload = Upload::attach(&mut request, body.clone());
            return (request, Some(upload));
        }
        *request.body_mut() = Some(std::mem::take(body).into());
        (request, None)
    }
}

impl fmt::Debug for Http {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Http")
            .field("url", &self.endpoint.address)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}
