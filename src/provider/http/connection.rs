//! Connections: protocol and keep-alive settings, and the errors of connections that fail.

use std::convert::Infallible;
use std::error::Error as StdError;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use reqwest::header::{CONTENT_LENGTH, HeaderValue};
use reqwest::{Client, ClientBuilder, Request, Url, redirect, retry};

use super::{Endpoint, Settings, sanitize};
use crate::error::{Error, ErrorKind, Persistence};

/// How long an unused HTTP/1.1 connection is kept. Many servers close theirs after 5 s (uvicorn, Node). A request
/// that is written at that moment is lost, and it is unknown whether the server processed it.
const KEEP_ALIVE: Duration = Duration::from_secs(4);

/// The same for HTTP/2, where a server announces that it closes, and up to which request (GOAWAY).
const KEEP_ALIVE_HTTP2: Duration = Duration::from_secs(90);

/// A dead peer is detected after the silence and the probes: 30 s.
const TCP_SILENCE: Duration = Duration::from_secs(15);
const TCP_PROBES: (u32, Duration) = (3, Duration::from_secs(5));

/// Returns a client builder with all settings except the headers.
pub(super) fn builder(settings: &Settings, url: &Url) -> ClientBuilder {
    let client = Client::builder()
        .connect_timeout(settings.limits.connect)
        .tcp_keepalive(TCP_SILENCE)
        .tcp_keepalive_retries(TCP_PROBES.0)
        .tcp_keepalive_interval(TCP_PROBES.1)
        // The caller counts and paces every call, so the client makes none by itself. (hyper still moves a request
        // to another connection if its pooled connection was closed before a byte was written.)
        .retry(retry::never())
        .redirect(redirect::Policy::none())
        .referer(false);
    if !settings.http2 {
        return client.http1_only().pool_idle_timeout(KEEP_ALIVE);
    }
    let client = client
        .http2_keep_alive_interval(settings.ping)
        .http2_keep_alive_timeout(settings.ping)
        .http2_keep_alive_while_idle(true)
        .pool_idle_timeout(KEEP_ALIVE_HTTP2);
    match url.scheme() {
        // Without TLS there is no protocol negotiation.
        "http" => client.http2_prior_knowledge(),
        _ => client,
    }
}

/// The body of a request over HTTP/2, which records whether the client has begun to send it.
pub(super) struct Upload {
    begun: Arc<AtomicBool>,
}

impl Upload {
    /// Sets the body of the request, and its `content-length`, as a streamed body has no known length.
    pub(super) fn attach(request: &mut Request, body: Bytes) -> Self {
        let begun = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&begun);
        request
            .headers_mut()
            .insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        *request.body_mut() = Some(reqwest::Body::wrap_stream(stream::once(async move {
            flag.store(true, Ordering::Relaxed);
            Ok::<_, Infallible>(body)
        })));
        Self { begun }
    }

    /// Whether no server can have begun to process the request: it still waited for a stream when the connection was
    /// closed, so that no byte of its body was taken, or the server reports that it did not process it.
    pub(super) fn is_unprocessed(&self, error: &reqwest::Error) -> bool {
        !error.is_connect() && !self.begun.load(Ordering::Relaxed) || was_not_processed(error)
    }
}

/// Whether an HTTP/2 server reports that it did not process a request: by a graceful GOAWAY that excludes the
/// stream, or by refusing the stream (RFC 9113, 8.7).
fn was_not_processed(error: &(dyn StdError + 'static)) -> bool {
    causes(error)
        .filter_map(|cause| cause.downcast_ref::<h2::Error>())
        .any(|error| {
            let reason = error.reason();
            error.is_remote()
                && (error.is_go_away() && reason == Some(h2::Reason::NO_ERROR)
                    || error.is_reset() && reason == Some(h2::Reason::REFUSED_STREAM))
        })
}

/// Returns the error for a call without a reply. `unprocessed` means that certainly no server has processed it.
pub(super) fn error(error: &reqwest::Error, unprocessed: bool, endpoint: &Endpoint) -> Error {
    let connecting = error.is_connect();
    if connecting && lacks_descriptors(error) {
        return out_of_descriptors(endpoint.max_open_files);
    }
    let mut message = sanitize::one_line(&endpoint.secrets.redact(&error_chain(error)));
    if message.contains("InvalidContentType") {
        // rustls reports "received corrupt message of type InvalidContentType".
        message.push_str(
            "; the server does not speak TLS here: should the base URL begin with http://?",
        );
    }
    // The operating system may report a connection that dies during a call as timed out; no timeout of the call has
    // passed then.
    let kind = match connecting && error.is_timeout() {
        true => ErrorKind::Timeout,
        false => ErrorKind::Connection,
    };
    // Nothing was sent if there was no connection.
    let unbilled = connecting || unprocessed;
    Error::new(kind, message).with_billed(unbilled.then_some(false))
}

fn out_of_descriptors(max: Option<u64>) -> Error {
    let limit = max.map_or_else(String::new, |max| format!(" of {max}"));
    let message = format!(
        "no connection could be opened: the process has reached its limit{limit} open files \
         (ulimit -n), and each call in flight needs one. Raise that limit or lower Pace::in_flight"
    );
    Error::new(ErrorKind::Io, message)
        .with_persistence(Persistence::Temporary)
        .with_billed(Some(false))
}

/// Whether the process or the system has run out of file descriptors.
fn lacks_descriptors(error: &(dyn StdError + 'static)) -> bool {
    let reported = causes(error)
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(is_descriptor_limit);
    // A name lookup needs descriptors too, and reports their lack in another way.
    reported
        || cfg!(unix)
            && std::fs::File::open("/dev/null").is_err_and(|error| is_descriptor_limit(&error))
}

fn is_descriptor_limit(error: &io::Error) -> bool {
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    cfg!(unix) && matches!(error.raw_os_error(), Some(ENFILE | EMFILE))
}

/// Returns the limit on open files of the process, if it can be read. It is read in advance, because reading needs a
/// file descriptor.
pub(super) fn max_open_files() -> Option<u64> {
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn causes<'a>(
    error: &'a (dyn StdError + 'static),
) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

/// Formats an error and its causes in one line. They are not kept as a source, because the types belong to other
/// crates and may hold a URL.
pub(super) fn error_chain(error: &(dyn StdError + 'static)) -> String {
    let texts: Vec<String> = causes(error).map(ToString::to_string).collect();
    texts.join(": ")
}
