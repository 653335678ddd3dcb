//! The client's connections: which protocol they speak, how long they are kept, and what it
//! means that one was not made or broke.

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

use super::{Endpoint, Settings, flatten, text};
use crate::error::{Error, ErrorKind, Persistence};

/// How long an unused HTTP/1.1 connection is kept. Many servers close theirs after 5 s (uvicorn,
/// Node): a request that is written at that very moment is lost, and nobody knows whether it ran.
const IDLE: Duration = Duration::from_secs(4);

/// The same for HTTP/2, where the server says that it closes (GOAWAY), and up to which request.
const IDLE_HTTP2: Duration = Duration::from_secs(90);

/// A peer that is gone is noticed after the silence and the probes: 30 s.
const TCP_SILENCE: Duration = Duration::from_secs(15);
const TCP_PROBES: (u32, Duration) = (3, Duration::from_secs(5));

/// A client with all but its headers.
pub(super) fn builder(settings: &Settings, url: &Url) -> ClientBuilder {
    let client = Client::builder()
        .connect_timeout(settings.limits.connect)
        .tcp_keepalive(TCP_SILENCE)
        .tcp_keepalive_retries(TCP_PROBES.0)
        .tcp_keepalive_interval(TCP_PROBES.1)
        // The guard above counts and paces every call, so none is made behind its back. (What
        // hyper still does by itself: a request that found its pooled connection closed before
        // a byte of it was written takes another one.)
        .retry(retry::never())
        .redirect(redirect::Policy::none())
        .referer(false);
    if !settings.http2 {
        return client.http1_only().pool_idle_timeout(IDLE);
    }
    let client = client
        .http2_keep_alive_interval(settings.ping)
        .http2_keep_alive_timeout(settings.ping)
        .http2_keep_alive_while_idle(true)
        .pool_idle_timeout(IDLE_HTTP2);
    match url.scheme() {
        // Without TLS there is nothing to negotiate with.
        "http" => client.http2_prior_knowledge(),
        _ => client,
    }
}

/// The body of a request over HTTP/2, and what became of it.
pub(super) struct Upload {
    taken: Arc<AtomicBool>,
}

impl Upload {
    /// Gives the request this body. Its length is told beside it, as a stream has none.
    pub(super) fn attach(request: &mut Request, body: Bytes) -> Self {
        let taken = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&taken);
        request
            .headers_mut()
            .insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        *request.body_mut() = Some(reqwest::Body::wrap_stream(stream::once(async move {
            flag.store(true, Ordering::Relaxed);
            Ok::<_, Infallible>(body)
        })));
        Self { taken }
    }

    /// Whether no server can have begun the request: nothing of its body was taken to be sent
    /// (it waited for a stream of its own when the connection was closed), or the server says so.
    pub(super) fn is_unprocessed(&self, error: &reqwest::Error) -> bool {
        !error.is_connect() && !self.taken.load(Ordering::Relaxed) || was_refused(error)
    }
}

/// Whether an HTTP/2 server has said that it did not begin a request: it closes the
/// connection in order and had not come to it, or it refused the stream (RFC 9113, 8.7).
fn was_refused(error: &(dyn StdError + 'static)) -> bool {
    causes(error)
        .filter_map(|cause| cause.downcast_ref::<h2::Error>())
        .any(|error| {
            let reason = error.reason();
            error.is_remote()
                && (error.is_go_away() && reason == Some(h2::Reason::NO_ERROR)
                    || error.is_reset() && reason == Some(h2::Reason::REFUSED_STREAM))
        })
}

/// The error for a call that got no reply; `unprocessed` if it is known that no server has
/// begun it.
pub(super) fn failure(error: &reqwest::Error, unprocessed: bool, endpoint: &Endpoint) -> Error {
    let connecting = error.is_connect();
    if connecting && lacks_descriptors(error) {
        return out_of_descriptors(endpoint.max_open_files);
    }
    let mut message = text::line(&endpoint.secrets.scrub(&flatten(error)));
    if message.contains("InvalidContentType") {
        // The words of rustls: "received corrupt message of type InvalidContentType".
        message.push_str(
            "; the server does not speak TLS here: should the base URL begin with http://?",
        );
    }
    // A connection that dies in the middle of a call may be a timeout of the system's. It is
    // none of the call's.
    let kind = match connecting && error.is_timeout() {
        true => ErrorKind::Timeout,
        false => ErrorKind::Connection,
    };
    // Nothing was sent where no connection was made.
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

/// Whether no file descriptor was left, in the process or in the system.
fn lacks_descriptors(error: &(dyn StdError + 'static)) -> bool {
    let said = causes(error)
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(is_descriptor_limit);
    // Looking up a name needs descriptors too, and fails for want of them in other words.
    said || cfg!(unix)
        && std::fs::File::open("/dev/null").is_err_and(|error| is_descriptor_limit(&error))
}

fn is_descriptor_limit(error: &io::Error) -> bool {
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    cfg!(unix) && matches!(error.raw_os_error(), Some(ENFILE | EMFILE))
}

/// How many files the process may have open, where that can be read. It is read before it is
/// needed, because reading it needs one.
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
