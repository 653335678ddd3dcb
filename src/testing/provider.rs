//! A conformance suite for implementations of [`Provider`]. The providers of this crate pass it.
//!
//! Rate limits, retries and accounting rely on the way in which a provider reports the end of a call: a 429 that is
//! reported as a bad request is never retried, and a bad request that is reported as a failing server is retried in vain.
//! [`conformance`] calls a provider in one [`Scenario`] after the other, whole and streamed, and checks its report.
//!
//! The caller supplies a function from a scenario to a provider whose service behaves as the scenario says. The service
//! may be a fake of the client that the provider wraps, as in the example, or a scripted server on localhost.
//!
//! # Example
//!
//! ```
//! use std::{sync::Arc, time::Duration};
//! use throughline::testing::provider::{self, Scenario};
//! use throughline::{Error, ErrorKind, Provider, Reply, Request, Result, Usage, async_trait};
//!
//! /// A fake of the client that the provider wraps.
//! enum Client {
//!     Answers,
//!     Refuses { status: u16, code: &'static str, retry_after: Option<u64> },
//!     Breaks,
//!     Hangs,
//! }
//!
//! struct MyProvider(Client);
//!
//! #[async_trait]
//! impl Provider for MyProvider {
//!     fn name(&self) -> &str {
//!         "mine"
//!     }
//!
//!     async fn generate(&self, _: &Request) -> Result<Reply> {
//!         let (status, code, retry_after) = match self.0 {
//!             Client::Answers => {
//!                 let usage = Usage::new(provider::INPUT_TOKENS, provider::OUTPUT_TOKENS);
//!                 return Ok(Reply::new(provider::TEXT, usage));
//!             }
//!             Client::Breaks => return Err(Error::new(ErrorKind::Connection, "connection reset")),
//!             Client::Hangs => return std::future::pending().await,
//!             Client::Refuses { status, code, retry_after } => (status, code, retry_after),
//!         };
//!         let kind = match (status, code) {
//!             (429, "insufficient_quota") => ErrorKind::QuotaExhausted,
//!             (429, _) => ErrorKind::Throttled,
//!             (401, _) => ErrorKind::Unauthorized,
//!             (503, _) => ErrorKind::Overloaded,
//!             (500.., _) => ErrorKind::Unavailable,
//!             _ => ErrorKind::InvalidRequest,
//!         };
//!         let error = Error::new(kind, code).with_http_status(status);
//!         Err(match retry_after {
//!             Some(seconds) => error.with_wait(Duration::from_secs(seconds)),
//!             None => error,
//!         })
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
//! let refuses = |status, code, retry_after| Client::Refuses { status, code, retry_after };
//! let open = async |scenario| {
//!     let client = match scenario {
//!         Scenario::Success => Client::Answers,
//!         Scenario::ThrottledWithWait => refuses(429, "rate_limit_exceeded", Some(provider::WAIT.as_secs())),
//!         Scenario::Throttled => refuses(429, "rate_limit_exceeded", None),
//!         Scenario::QuotaExhausted => refuses(429, "insufficient_quota", None),
//!         Scenario::Overloaded => refuses(503, "overloaded", None),
//!         Scenario::ServerError => refuses(500, "server_error", None),
//!         Scenario::InvalidRequest => refuses(400, "invalid_request_error", None),
//!         Scenario::ContextTooLong => refuses(400, "context_length_exceeded", None),
//!         Scenario::Unauthorized => refuses(401, "invalid_api_key", None),
//!         Scenario::CutReply => Client::Breaks,
//!         Scenario::Hang => Client::Hangs,
//!         // A scenario of a later version of this crate, or one that cannot occur.
//!         _ => return None,
//!     };
//!     Some(Arc::new(MyProvider(client)) as Arc<dyn Provider>)
//! };
//! provider::conformance(open).await;
//! # }
//! ```

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use tokio::time::timeout;

use crate::error::{Error, ErrorKind};
use crate::provider::Provider;
use crate::request::{Delta, FinishReason, Reply, Request};

/// The text that the service answers in [`Scenario::Success`], and of which it sends a part in [`Scenario::CutReply`].
pub const TEXT: &str = "The Rhône rises in the Alps, and 長江 on the plateau of Tibet.";

/// The input tokens that the service reports in [`Scenario::Success`].
pub const INPUT_TOKENS: u64 = 12;

/// The output tokens that the service reports in [`Scenario::Success`].
pub const OUTPUT_TOKENS: u64 = 17;

/// The wait that the service asks for in [`Scenario::ThrottledWithWait`].
pub const WAIT: Duration = Duration::from_secs(7);

/// Calls must end within this time. It is shorter than [`WAIT`], so a provider that waits or retries by itself fails.
const PATIENCE: Duration = Duration::from_secs(5);

/// A call to a service that hangs is dropped after this time.
const HANG: Duration = Duration::from_millis(100);

/// A behaviour of the service behind a provider. It behaves so for every call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Scenario {
    /// The service answers [`TEXT`], for [`INPUT_TOKENS`] and [`OUTPUT_TOKENS`].
    ///
    /// The reply must have the text and the tokens (a provider that counts the input by itself may report another number
    /// than [`INPUT_TOKENS`], but not zero), and [`FinishReason::Stop`]. The pieces of a stream must add up to the text,
    /// and [`Delta::End`] must be its last element.
    Success,
    /// The rate limit refuses the call (429) and asks to wait for [`WAIT`].
    ///
    /// The error must be [`ErrorKind::Throttled`], temporary, unbilled, and have the [wait](Error::wait).
    ThrottledWithWait,
    /// The rate limit refuses the call (429) and names no wait.
    ///
    /// The error must be [`ErrorKind::Throttled`], temporary, unbilled, and have no [wait](Error::wait).
    Throttled,
    /// The service refuses the call because the credit or quota of the account is used up (402, or 429 with
    /// `insufficient_quota`).
    ///
    /// The error must be [`ErrorKind::QuotaExhausted`], permanent, unbilled and
    /// [account-wide](Error::is_account_wide): no later call can succeed.
    QuotaExhausted,
    /// The service has no capacity (503, 529).
    ///
    /// The error must be [`ErrorKind::Overloaded`], temporary and unbilled.
    Overloaded,
    /// The service fails (500).
    ///
    /// The error must be [`ErrorKind::Unavailable`], temporary and unbilled.
    ServerError,
    /// The service refuses the request because a field is wrong (400).
    ///
    /// The error must be [`ErrorKind::InvalidRequest`], permanent and unbilled, and it must not be account-wide.
    InvalidRequest,
    /// The service refuses the request because its prompt is longer than the context of the model (400, 413, 429).
    ///
    /// As [`InvalidRequest`](Self::InvalidRequest): no wait makes the prompt shorter.
    ContextTooLong,
    /// The service refuses the credentials (401).
    ///
    /// The error must be [`ErrorKind::Unauthorized`], permanent, unbilled and
    /// [account-wide](Error::is_account_wide).
    Unauthorized,
    /// The service sends a part of [`TEXT`], and then the connection breaks.
    ///
    /// The error must be [`ErrorKind::Connection`] or [`ErrorKind::MalformedReply`] and temporary, and
    /// [`Error::billed`] must not be `Some(false)`, because the service may charge for the part. The pieces of a stream
    /// must add up to a beginning of the text. A stream may also end without an error and without [`Delta::End`].
    CutReply,
    /// The service accepts the request and never answers.
    ///
    /// The call must still be waiting after 100 ms. It is dropped then.
    Hang,
}

impl Scenario {
    const ALL: [Self; 11] = [
        Self::Success,
        Self::ThrottledWithWait,
        Self::Throttled,
        Self::QuotaExhausted,
        Self::Overloaded,
        Self::ServerError,
        Self::InvalidRequest,
        Self::ContextTooLong,
        Self::Unauthorized,
        Self::CutReply,
        Self::Hang,
    ];
}

/// Calls the provider that `open` gives for each [`Scenario`], whole and streamed, and checks what it reports.
///
/// `open` returns `None` for a scenario that cannot occur with its provider, which is then skipped.
///
/// Times are measured on Tokio's clock. Pause it only for providers that use no sockets.
///
/// # Panics
///
/// Panics if a report differs from what the [`Scenario`] asks for. The message names the scenario and the method.
pub async fn conformance(open: impl AsyncFn(Scenario) -> Option<Arc<dyn Provider>>) {
    for scenario in Scenario::ALL {
        let Some(provider) = open(scenario).await else {
            println!("provider conformance: {scenario:?} is skipped");
            continue;
        };
        assert!(!provider.name().is_empty(), "the provider needs a name");
        for method in ["generate", "stream"] {
            let what = format!("{scenario:?}, {method}");
            let limit = match scenario {
                Scenario::Hang => HANG,
                _ => PATIENCE,
            };
            let call = call(&*provider, method);
            check(scenario, timeout(limit, call).await.ok(), &what);
        }
    }
}

/// The pieces that a stream yielded, and how the call ended.
#[derive(Debug)]
struct Ended {
    pieces: Option<Vec<String>>,
    /// `None` if the stream ended without [`Delta::End`].
    result: Option<Result<Reply, Error>>,
}

async fn call(provider: &dyn Provider, method: &str) -> Ended {
    let request = Request::new("Where do rivers rise?").model("model");
    if method == "generate" {
        let result = Some(provider.generate(&request).await);
        return Ended {
            pieces: None,
            result,
        };
    }
    let mut pieces = Vec::new();
    let result = match provider.stream(&request).await {
        Err(error) => Some(Err(error)),
        Ok(mut stream) => loop {
            let result = match stream.next().await {
                None => break None,
                Some(Ok(Delta::Text(text))) => {
                    pieces.push(text);
                    continue;
                }
                Some(Ok(Delta::End(reply))) => Ok(*reply),
                Some(Ok(delta)) => panic!("a provider never yields {delta:?}"),
                Some(Err(error)) => Err(error),
            };
            let after = stream.next().await;
            assert!(
                after.is_none(),
                "the stream goes on after its end: {after:?}"
            );
            break Some(result);
        },
    };
    Ended {
        pieces: Some(pieces),
        result,
    }
}

fn check(scenario: Scenario, ended: Option<Ended>, what: &str) {
    use ErrorKind::*;
    if scenario == Scenario::Hang {
        assert!(ended.is_none(), "{what}: there is no answer, but {ended:?}");
        return;
    }
    let ended = ended.unwrap_or_else(|| {
        panic!(
            "{what}: the call takes more than {PATIENCE:?}; a provider neither waits nor retries"
        )
    });
    let (kinds, temporary): (&[ErrorKind], bool) = match scenario {
        Scenario::Success => return check_success(ended, what),
        Scenario::ThrottledWithWait | Scenario::Throttled => (&[Throttled], true),
        Scenario::QuotaExhausted => (&[QuotaExhausted], false),
        Scenario::Overloaded => (&[Overloaded], true),
        Scenario::ServerError => (&[Unavailable], true),
        Scenario::InvalidRequest | Scenario::ContextTooLong => (&[InvalidRequest], false),
        Scenario::Unauthorized => (&[Unauthorized], false),
        Scenario::CutReply => (&[Connection, MalformedReply], true),
        Scenario::Hang => unreachable!(),
    };
    let cut = scenario == Scenario::CutReply;
    let text = ended.pieces.unwrap_or_default().concat();
    assert!(
        text.is_empty() || cut && TEXT.starts_with(&text),
        "{what}: the pieces are {text:?}"
    );
    let error = match ended.result {
        Some(Err(error)) => error,
        None if cut => return,
        None => panic!("{what}: the stream ends without an error"),
        Some(Ok(reply)) => panic!("{what}: there is no whole reply, but {reply:?}"),
    };
    assert!(
        kinds.contains(&error.kind()),
        "{what}: {kinds:?}, not {error:?}"
    );
    assert_eq!(
        error.is_temporary(),
        temporary,
        "{what}: temporary, {error:?}"
    );
    match cut {
        true => assert_ne!(error.billed(), Some(false), "{what}: billed, {error:?}"),
        false => assert_eq!(error.billed(), Some(false), "{what}: billed, {error:?}"),
    }
    let account_wide = matches!(error.kind(), QuotaExhausted | Unauthorized);
    assert_eq!(
        error.is_account_wide(),
        account_wide,
        "{what}: account-wide, {error:?}"
    );
    let wait = (scenario == Scenario::ThrottledWithWait).then_some(WAIT);
    assert_eq!(error.wait(), wait, "{what}: the wait, {error:?}");
}

fn check_success(ended: Ended, what: &str) {
    let reply = match ended.result {
        Some(Ok(reply)) => reply,
        Some(Err(error)) => panic!("{what}: {error:?}"),
        None => panic!("{what}: the stream ends without Delta::End"),
    };
    assert_eq!(reply.text, TEXT, "{what}: the text");
    if let Some(pieces) = ended.pieces {
        assert_eq!(pieces.concat(), TEXT, "{what}: the pieces");
    }
    assert_eq!(reply.finish, FinishReason::Stop, "{what}: the finish");
    assert_ne!(reply.usage.input_tokens, 0, "{what}: the input tokens");
    assert_eq!(
        reply.usage.output_tokens, OUTPUT_TOKENS,
        "{what}: the output tokens"
    );
}
