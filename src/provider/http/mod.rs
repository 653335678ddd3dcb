//! What both HTTP providers stand on: one call, no retries, no surprises.
//!
//! - `mod` (here): the client, its settings, one call's head;
//! - `body`: reading under the call's timeouts and bounds;
//! - `sse`: server-sent events out of a body;
//! - `form`: whether a body is a document or a stream of events;
//! - `exchange`: a call from request to [`Reply`](crate::Reply), whole or streamed;
//! - `classify`: what a refusal means;
//! - `connect`: the client's connections, and why one was not made;
//! - `text`: others' texts, made fit to be shown;
//! - `setters`: the builder methods both providers share;
//! - `secrets`: what must never be shown.

mod body;
mod classify;
mod connect;
mod exchange;
mod form;
mod secrets;
mod setters;
mod sse;
mod text;

use std::fmt;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use reqwest::header::{
    ACCEPT_ENCODING, AsHeaderName, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, USER_AGENT,
};
use reqwest::{Client, Method, Url};
use secrecy::{ExposeSecret, SecretString};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::error::{Error, ErrorKind, Result};
use crate::provider::rate_headers;
use crate::request::RateSnapshot;

pub(crate) use self::exchange::{Dialect, Fields, Json, Parts, model};
pub(crate) use self::setters::shared_setters;
pub(crate) use crate::request::schema::enforceable;

use self::body::Body;
use self::connect::Upload;
use self::secrets::Secrets;

/// Everything a provider's builder can set that is not its dialect's own.
#[derive(Clone)]
pub(crate) struct Settings {
    pub(crate) base_url: String,
    pub(crate) api_key: Option<SecretString>,
    /// Headers whose values are secrets: hidden in `Debug`, taken out of errors.
    pub(crate) headers: Vec<(String, SecretString)>,
    /// Headers of the protocol, secret to nobody.
    pub(crate) plain: Vec<(&'static str, String)>,
    pub(crate) query: Vec<(String, String)>,
    /// Whether HTTP/2 is spoken where the server can.
    pub(crate) http2: bool,
    /// The silence after which an HTTP/2 connection is pinged, and the longest wait for the answer.
    pub(crate) ping: Duration,
    pub(crate) limits: Limits,
}

/// Bounds of one call in time and size.
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
            plain: Vec::new(),
            query: Vec::new(),
            http2: false,
            ping: Duration::from_secs(10),
            limits: Limits {
                connect: Duration::from_secs(10),
                first_byte: Duration::from_secs(600),
                idle: Duration::from_secs(300),
                whole: Duration::from_secs(600),
                max_body: 16 << 20,
                max_event: 1 << 20,
            },
        }
    }

    /// Keys come out of files and environments with a newline at their end.
    pub(crate) fn set_key(&mut self, key: String) {
        let key = key.trim();
        self.api_key = (!key.is_empty()).then(|| key.into());
    }

    pub(crate) fn header(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.headers.push((name.into(), value.into().into()));
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = |pairs: &mut dyn Iterator<Item = &String>| pairs.cloned().collect::<Vec<_>>();
        // A base URL can be wrong in ways that hide a password or a key in it.
        let base_url = Secrets::default().scrub(&self.base_url);
        f.debug_struct("Settings")
            .field("base_url", &base_url.rsplit('@').next())
            .field("api_key", &self.api_key.as_ref().map(|_| "[secret]"))
            .field(
                "headers",
                &names(&mut self.headers.iter().map(|(name, _)| name)),
            )
            .field(
                "query",
                &names(&mut self.query.iter().map(|(name, _)| name)),
            )
            .field("http2", &self.http2)
            .field("limits", &self.limits)
            .finish()
    }
}

/// A client for one endpoint. Cheap to clone: the connections are shared.
#[derive(Clone)]
pub(crate) struct Http {
    client: Client,
    url: Url,
    endpoint: Arc<Endpoint>,
    http2: bool,
    limits: Limits,
}

/// How often a request is sent again that an HTTP/2 server has not begun. Each time, a whole
/// connection was closed under it.
const REPLAYS: u32 = 10;

/// What messages about an endpoint need.
struct Endpoint {
    /// Its URL without the query, which may hold a key.
    address: String,
    secrets: Secrets,
    /// How many files the process might have open when the client was made, if that is known.
    max_open_files: Option<u64>,
}

impl Http {
    /// A client that posts to `path` under the base URL.
    pub(crate) fn new(settings: Settings, path: &str) -> Result<Self> {
        let mut secrets = Secrets::default();
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        // Static, so that the six copies that reqwest makes of it for each call count no references.
        let agent = concat!("throughline/", env!("CARGO_PKG_VERSION"));
        headers.insert(USER_AGENT, HeaderValue::from_static(agent));
        // Without it, any compression would be as good an answer.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        for (name, value) in &settings.plain {
            headers.insert(*name, header_value(name, value)?);
        }
        for (name, value) in &settings.headers {
            let text = value.expose_secret();
            secrets.add(text);
            // The word for the scheme is no part of the secret: `Bearer sk-…`.
            secrets.add(text.split_once(' ').map_or("", |(_, token)| token));
            let mut value = header_value(name, text)?;
            value.set_sensitive(true);
            let header: HeaderName = name
                .parse()
                .map_err(|_| config(&format!("{name:?} is not a header's name")))?;
            headers.insert(header, value);
        }
        let url = endpoint(&settings, path)?;
        // A proxy is told the `user-agent` among them, and no other.
        let client = connect::builder(&settings, &url).default_headers(headers);
        let client = client
            .build()
            .map_err(|error| config(&secrets.scrub(&flatten(&error))))?;
        let address = url.as_str().split('?').next().unwrap_or_default();
        let endpoint = Endpoint {
            address: address.to_owned(),
            secrets,
            max_open_files: connect::max_open_files(),
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

    /// Posts a body and waits for the head of the reply; a refusal is an error.
    async fn post(&self, body: Vec<u8>, timeout: Option<Duration>) -> Result<(Head, Body)> {
        let whole = timeout.map_or(self.limits.whole, |asked| asked.min(self.limits.whole));
        let start = Instant::now();
        let deadline = Deadline::from(start, whole);
        let first_byte = || Deadline::from(start, self.limits.first_byte).min(deadline);

        let mut body = Bytes::from(body);
        let mut alarm = Alarm::default();
        let mut replays = 0;
        let mut response = loop {
            let (request, upload) = self.request(&mut body);
            let sent = self.client.execute(request);
            let error = match alarm.guard(first_byte, sent).await {
                Ok(Ok(response)) => break response,
                Ok(Err(error)) => error,
                Err(end) if end == deadline => return Err(too_slow("the call", whole)),
                Err(_) => return Err(too_slow("the reply's first byte", self.limits.first_byte)),
            };
            let unprocessed = upload.is_some_and(|upload| upload.is_unprocessed(&error));
            if !unprocessed || replays == REPLAYS {
                return Err(connect::failure(&error, unprocessed, &self.endpoint));
            }
            replays += 1;
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
        let mut body = Body::new(response, endpoint, self.limits, alarm, deadline, whole);
        if (200..300).contains(&head.status) {
            // Some send it with every reply. It asks nobody to wait who was let in.
            head.rate.retry_after = None;
            return Ok((head, body));
        }
        let text = body.beginning().await;
        Err(classify::refusal(&head, &text))
    }

    /// The request with its body. Over HTTP/2, where it may be sent again, the body stays too,
    /// and what is taken of it is watched.
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

/// The first part of a reply, with what is needed to speak of it in errors.
pub(crate) struct Head {
    status: u16,
    headers: HeaderMap,
    rate: RateSnapshot,
    endpoint: Arc<Endpoint>,
}

impl Head {
    fn get(&self, name: impl AsHeaderName) -> Option<&str> {
        std::str::from_utf8(self.headers.get(name)?.as_bytes()).ok()
    }

    fn request_id(&self) -> Option<String> {
        // Every reply is asked for them: as strings, they would be parsed each time.
        static NAMES: [HeaderName; 3] = [
            HeaderName::from_static("x-request-id"),
            HeaderName::from_static("request-id"),
            HeaderName::from_static("apim-request-id"),
        ];
        NAMES
            .iter()
            .find_map(|name| self.get(name))
            .map(|id| text::shorten(text::line(&self.scrub(id)), 200))
    }

    fn scrub(&self, text: &str) -> String {
        self.endpoint.secrets.scrub(text)
    }

    /// Whether the body has an encoding, although none was asked for.
    fn is_encoded(&self) -> bool {
        let coding = self.get("content-encoding").unwrap_or_default().trim();
        !(coding.is_empty() || coding.eq_ignore_ascii_case("identity"))
    }

    /// Whether the server calls the body a stream of events.
    fn declares_events(&self) -> bool {
        self.get("content-type").is_some_and(|form| {
            let essence = form.split(';').next().unwrap_or_default().trim();
            essence.eq_ignore_ascii_case("text/event-stream")
        })
    }

    /// An error that carries what the head tells.
    fn error(&self, kind: ErrorKind, message: &str) -> Error {
        self.mark(Error::new(kind, text::line(&self.scrub(message))))
    }

    fn mark(&self, error: Error) -> Error {
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

/// A point in time that may be too far away to be one.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Deadline(Option<Instant>);

impl Deadline {
    fn after(duration: Duration) -> Self {
        Self::from(Instant::now(), duration)
    }

    fn from(start: Instant, duration: Duration) -> Self {
        Self(start.checked_add(duration))
    }

    fn min(self, other: Self) -> Self {
        match (self.0, other.0) {
            (Some(a), Some(b)) => Self(Some(a.min(b))),
            (a, b) => Self(a.or(b)),
        }
    }
}

/// The one timer of a call, moved from deadline to deadline. Setting a timer and taking it
/// back costs more than moving it, and what is ready at once needs none.
#[derive(Default)]
struct Alarm(Option<Pin<Box<Sleep>>>);

impl Alarm {
    /// Waits for `future`, or fails with the deadline that came first. What is ready at once has none.
    async fn guard<F: Future>(
        &mut self,
        deadline: impl Fn() -> Deadline,
        future: F,
    ) -> Result<F::Output, Deadline> {
        let mut future = pin!(future);
        let mut end = None;
        poll_fn(|cx| {
            if let Poll::Ready(output) = future.as_mut().poll(cx) {
                return Poll::Ready(Ok(output));
            }
            let end = *end.get_or_insert_with(&deadline);
            match end.0 {
                Some(at) => self.set(at).poll(cx).map(|()| Err(end)),
                None => Poll::Pending,
            }
        })
        .await
    }

    fn set(&mut self, at: Instant) -> Pin<&mut Sleep> {
        let mut alarm = self
            .0
            .get_or_insert_with(|| Box::pin(sleep_until(at)))
            .as_mut();
        if alarm.deadline() != at {
            alarm.as_mut().reset(at);
        }
        alarm
    }
}

fn too_slow(what: &str, after: Duration) -> Error {
    Error::new(
        ErrorKind::Timeout,
        format!("{what} took longer than {after:?}"),
    )
}

/// An error and its causes in one line. The causes are not kept as a source: they
/// are another crate's types, and could hold a URL.
fn flatten(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// An environment variable that is set to something.
pub(crate) fn env(name: &str) -> Option<String> {
    std::env::var(name)
        .ok()
        .filter(|value| !value.trim().is_empty())
}

fn config(message: &str) -> Error {
    Error::new(ErrorKind::Config, message)
}

fn header_value(name: &str, value: &str) -> Result<HeaderValue> {
    HeaderValue::from_str(value).map_err(|_| {
        config(&format!(
            "the value of the header {name} has characters that no header may have"
        ))
    })
}

fn endpoint(settings: &Settings, path: &str) -> Result<Url> {
    let wrong = |why: &str| config(&format!("the base URL cannot be used: {why}"));
    let scheme = "it must begin with https:// or http://, as in https://api.example.com/v1";
    let mut url = Url::parse(settings.base_url.trim()).map_err(|error| {
        match settings.base_url.contains("://") {
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
    for (name, value) in &settings.query {
        url.query_pairs_mut().append_pair(name, value);
    }
    Ok(url)
}
