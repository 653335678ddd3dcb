//! [`Sim`]: a provider that is not there, with limits that are.
//!
//! It answers out of a seed, takes its time on Tokio's clock, enforces the limits of an
//! account exactly, fails as often as it is told to, and keeps a [`Ledger`] of what it
//! let in and what it billed. Under Tokio's paused clock an hour of limits passes in
//! milliseconds, and the same seed gives the same run.
//!
//! # Example: a limit, and the wait that cures it
//!
//! ```
//! use std::time::Duration;
//! use throughline::provider::sim::{Enforcement, Sim};
//! use throughline::{Provider, Request};
//!
//! #[tokio::main(flavor = "current_thread", start_paused = true)]
//! async fn main() -> throughline::Result<()> {
//!     let sim = Sim::builder()
//!         .requests_per_minute(60)
//!         .enforcement(Enforcement::TokenBucket { burst: Duration::from_secs(1) })
//!         .latency(Duration::from_millis(300))
//!         .build();
//!     let request = Request::new("Name a river.");
//!
//!     sim.generate(&request).await?;
//!     let refused = sim.generate(&request).await.unwrap_err();
//!     assert!(refused.is_throttled());
//!     assert_eq!(refused.wait(), Some(Duration::from_millis(700)));
//!
//!     tokio::time::sleep(Duration::from_millis(700)).await;
//!     sim.generate(&request).await?;
//!
//!     let ledger = sim.ledger();
//!     assert_eq!((ledger.total.billed, ledger.total.rejected), (2, 1));
//!     Ok(())
//! }
//! ```
//!
//! # In which order a call is judged
//!
//! Credentials, quota of the account, then the limits: a call takes all it needs of all
//! limits, or is refused and takes nothing (but see
//! [`rejected_calls_count`](SimBuilder::rejected_calls_count)). What is let in may meet a
//! fault. It is billed when its answer is complete; when it is cut, for what was
//! generated; and when the client drops it, likewise. A refusal comes at once.

mod builder;
mod call;
mod ledger;
mod limits;
mod meter;
mod model;

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;

pub use self::builder::SimBuilder;
pub use self::ledger::{Account, Bill, Ended, Ledger, Second};
pub use self::limits::{Enforcement, Headers, Limits};
pub use self::model::Tokens;

use self::call::Call;
use self::ledger::Book;
use self::limits::{Cost, Limiter};
use self::model::{Model, Plan};
use super::{Capabilities, OutputCharge, Provider};
use crate::error::{Error, ErrorKind, Result};
use crate::request::Request;
use crate::request::RequestDigest;
use crate::request::reply::{Reply, ReplyStream};
use crate::usage::{RateSnapshot, Usage};

/// The simulated provider; see the [module](self). Clones share one account.
#[derive(Clone)]
pub struct Sim(Arc<Inner>);

struct Inner {
    model: Model,
    policy: Policy,
    start: Instant,
    account: Mutex<State>,
}

/// What the provider does besides limits and answers.
#[derive(Debug, Clone, Copy, Default)]
struct Policy {
    output_charge: OutputCharge,
    rejected_calls_count: bool,
    headers: Headers,
    hide_retry_after: bool,
    cancelled_is_free: bool,
}

struct State {
    limiter: Limiter,
    unauthorized: bool,
    ledger: Ledger,
    /// How often each call was let in before.
    admitted: HashMap<(Arc<str>, RequestDigest), u64>,
    book: Book,
}

impl Sim {
    /// A provider to be set up.
    pub fn builder() -> SimBuilder {
        SimBuilder::default()
    }

    fn new(limiter: Limiter, policy: Policy, model: Model, file: Option<PathBuf>) -> Self {
        Self(Arc::new(Inner {
            model,
            policy,
            start: Instant::now(),
            account: Mutex::new(State {
                limiter,
                unauthorized: false,
                ledger: Ledger::default(),
                admitted: HashMap::new(),
                book: file.map_or_else(Book::default, |path| Book::open(&path)),
            }),
        }))
    }

    /// What was seen and billed until now.
    pub fn ledger(&self) -> Ledger {
        self.0.lock().ledger.clone()
    }

    /// The calls in flight now.
    pub fn in_flight(&self) -> usize {
        self.0.lock().ledger.in_flight
    }

    /// The limits in force now.
    pub fn limits(&self) -> Limits {
        self.0.advanced().1.limiter.limits()
    }

    /// Changes the limits from now on, keeping what is used of them. Changes that were
    /// scheduled still come.
    ///
    /// # Panics
    /// If a limit becomes zero.
    pub fn set_limits(&self, change: impl FnOnce(&mut Limits)) {
        let mut limits = self.limits();
        change(&mut limits);
        let (now, mut state) = self.0.advanced();
        state.limiter.retune(now, limits);
    }

    /// Changes the limit on calls per minute from now on.
    ///
    /// # Panics
    /// If it is zero.
    pub fn set_requests_per_minute(&self, requests: u64) {
        self.set_limits(|limits| limits.requests_per_minute = Some(requests));
    }

    /// Refuses every call as unauthorized (401) from now on, or no longer.
    pub fn set_unauthorized(&self, unauthorized: bool) {
        self.0.lock().unauthorized = unauthorized;
    }

    /// Lets the call in or refuses it, at once.
    fn admit(&self, request: &Request) -> Result<Call> {
        let inner = &self.0;
        let digest = request.digest();
        let key: Arc<str> = match &request.item_key {
            Some(key) => key.clone(),
            None => digest.to_string().into(),
        };
        let input_tokens = request.estimated_input_tokens();
        let reserved = match inner.policy.output_charge {
            OutputCharge::Reserved => request.max_tokens.unwrap_or(0),
            OutputCharge::Produced => 0,
        };
        let cost = [
            1,
            input_tokens.saturating_add(reserved),
            input_tokens,
            reserved,
        ];
        let (nth, number) = inner.admit(&key, digest, cost)?;
        let mut call = Call {
            inner: inner.clone(),
            key,
            digest,
            input_tokens,
            reserved,
            model: request.model.as_deref().unwrap_or("sim").to_owned(),
            request_id: format!("sim-{number}"),
            admitted: Instant::now(),
            plan: Plan::default(),
            settled: false,
        };
        // Only now, outside the lock and under the guard: the user's closure may panic.
        call.plan = inner.model.plan(request, &call.key, &digest, nth);
        if call.plan.fault.is_some() || call.plan.failure.is_some() {
            inner.lock().ledger.note(&call.key, |a| a.faults += 1);
        }
        Ok(call)
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing below leaves the state half changed: a panic elsewhere is no reason
        // for a drop guard to panic too.
        self.account.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The account with its limits brought to the present, and the time since the start.
    fn advanced(&self) -> (Duration, MutexGuard<'_, State>) {
        let mut state = self.lock();
        let now = Instant::now().saturating_duration_since(self.start);
        state.limiter.advance(now);
        (now, state)
    }

    /// How often the call was let in before, and how many calls were in all.
    fn admit(&self, key: &Arc<str>, digest: RequestDigest, cost: Cost) -> Result<(u64, u64)> {
        let (now, mut state) = self.advanced();
        let state = &mut *state;
        state.book.check()?;
        let spent = state.limiter.limits().total_calls;
        let denial = if state.unauthorized {
            let error = Error::new(ErrorKind::Unauthorized, "the key is not known");
            Some(error.with_http_status(401).with_code("invalid_api_key"))
        } else if spent.is_some_and(|calls| state.ledger.total.admitted >= calls) {
            let error = Error::new(ErrorKind::QuotaExhausted, "the account is empty");
            Some(error.with_http_status(429).with_code("insufficient_quota"))
        } else {
            None
        };
        if let Some(error) = denial {
            state.ledger.note(key, |account| account.denied += 1);
            return Err(error);
        }

        let in_flight = state.ledger.in_flight;
        let most = state.limiter.limits().overload_in_flight;
        if most.is_some_and(|most| in_flight >= most) {
            state.ledger.note(key, |account| account.rejected += 1);
            state.ledger.second(now).rejected += 1;
            let rate = state.limiter.snapshot(self.policy.headers);
            let error = Error::new(ErrorKind::Overloaded, "too many calls in flight");
            return Err(error.with_http_status(503).with_rate(rate));
        }
        let verdict = state
            .limiter
            .admit(cost, in_flight, self.policy.rejected_calls_count);
        if let Err(refusal) = verdict {
            state.ledger.note(key, |account| account.rejected += 1);
            state.ledger.second(now).rejected += 1;
            let mut rate = state.limiter.snapshot(self.policy.headers);
            let mut error = Error::new(ErrorKind::Throttled, refusal.message)
                .with_http_status(429)
                .with_code("rate_limit_exceeded");
            if let (Some(wait), false) = (refusal.wait, self.policy.hide_retry_after) {
                rate.retry_after = Some(wait);
                error = error.with_wait(wait);
            }
            return Err(error.with_rate(rate));
        }

        let ledger = &mut state.ledger;
        ledger.note(key, |account| account.admitted += 1);
        ledger.second(now).accepted += 1;
        ledger.grants.push(now);
        ledger.in_flight += 1;
        ledger.peak_in_flight = ledger.peak_in_flight.max(ledger.in_flight);
        let times = state.admitted.entry((key.clone(), digest)).or_default();
        *times += 1;
        Ok((*times - 1, ledger.total.admitted))
    }

    /// Takes a call out of flight and bills it, unless `ended` is `None`.
    fn settle(&self, call: &Call, ended: Option<Ended>) -> Result<RateSnapshot> {
        let (_, mut state) = self.advanced();
        let state = &mut *state;
        state.ledger.in_flight -= 1;
        if ended == Some(Ended::Cancelled) {
            state
                .ledger
                .note(&call.key, |account| account.cancelled += 1);
        }
        let free = ended == Some(Ended::Cancelled) && self.policy.cancelled_is_free;
        if let Some(ended) = ended {
            let usage = call.used(ended, Instant::now());
            let late = usage.output_tokens.saturating_sub(call.reserved);
            state.limiter.spend([0, late, 0, late]);
            if !free {
                state.bill(call, ended, usage)?;
            }
        }
        Ok(state.limiter.snapshot(self.policy.headers))
    }
}

impl State {
    fn bill(&mut self, call: &Call, ended: Ended, usage: Usage) -> Result<()> {
        let bill = Bill {
            v: 1,
            seq: self.book.number(),
            key: call.key.clone(),
            digest: call.digest,
            usage,
            ended,
        };
        let written = self.book.append(&bill);
        self.ledger.enter(bill);
        written.map_err(|error| error.with_billed(Some(true)))
    }
}

#[async_trait]
impl Provider for Sim {
    fn name(&self) -> &str {
        "sim"
    }

    /// # Cancel safety
    /// Dropping it frees its place in flight; what was generated until then is billed.
    async fn generate(&self, request: &Request) -> Result<Reply> {
        self.admit(request)?.begin().await?.whole().await
    }

    async fn stream(&self, request: &Request) -> Result<ReplyStream> {
        Ok(self.admit(request)?.begin().await?.pieces())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
            .with_streaming()
            .with_output_charge(self.0.policy.output_charge)
    }
}

impl fmt::Debug for Sim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.lock();
        f.debug_struct("Sim")
            .field("limits", &state.limiter.limits())
            .field("policy", &self.0.policy)
            .field("model", &self.0.model)
            .field("in_flight", &state.ledger.in_flight)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_bill_that_cannot_be_written_fails_its_call_and_all_that_follow() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let sim = Sim::builder().build();
        let read_only = std::fs::File::open(file.path()).unwrap();
        sim.0.lock().book = Book::over(read_only);

        let request = Request::new("a");
        let paid = sim.generate(&request).await.unwrap_err();
        assert_eq!((paid.kind(), paid.billed()), (ErrorKind::Io, Some(true)));
        let refused = sim.generate(&request).await.unwrap_err();
        assert_eq!(
            (refused.kind(), refused.billed()),
            (ErrorKind::Io, Some(false))
        );
        let total = sim.ledger().total;
        assert_eq!((total.admitted, total.billed), (1, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_bill_nobody_waits_for_is_not_lost_silently_either() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let sim = Sim::builder().latency(Duration::from_secs(1)).build();
        let read_only = std::fs::File::open(file.path()).unwrap();
        sim.0.lock().book = Book::over(read_only);

        let request = Request::new("a");
        let limit = Duration::from_millis(1);
        let cancelled = tokio::time::timeout(limit, sim.generate(&request)).await;
        assert!(cancelled.is_err());
        let next = sim.generate(&request).await.unwrap_err();
        assert_eq!(next.kind(), ErrorKind::Io);
    }
}
