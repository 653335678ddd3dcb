//! [`Sim`]: a simulated provider that enforces the rate limits of an account.
//!
//! It draws answers from a seed, takes its latency on Tokio's clock, enforces limits exactly, injects faults at given
//! rates, and keeps a [`Ledger`] of the calls that it admitted and billed. Under Tokio's paused clock an hour passes in
//! less than a second, and the same seed gives the same run.
//!
//! # Example: a refused call succeeds after the wait that the provider names
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
//! # Order of checks
//!
//! Credentials, quota of the account, then the limits: a call is charged to all limits, or refused
//! at once and charged to none (but see [`rejected_calls_count`](SimBuilder::rejected_calls_count)). An
//! admitted call may end in a fault. A complete answer is billed; so are the tokens that were
//! generated before a cut or before the client dropped the call.

mod builder;
mod call;
mod ledger;
mod limit;
mod limits;
mod model;

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;

pub use self::builder::SimBuilder;
pub use self::ledger::{Bill, Ended, Ledger, Second, Totals};
pub use self::limits::{Dialect, Enforcement, Headers, Limits};
pub use self::model::Tokens;

use self::call::Call;
use self::ledger::LedgerFile;
use self::limits::{Cost, LimitSet};
use self::model::{Model, Plan};
use super::{Capabilities, OutputCharge, Provider};
use crate::error::{Error, ErrorKind, Result};
use crate::request::Request;
use crate::request::RequestDigest;
use crate::request::reply::{Reply, ReplyStream};
use crate::sync::Mutex;
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

/// Options other than limits and answers.
#[derive(Debug, Clone, Copy, Default)]
struct Policy {
    output_charge: OutputCharge,
    rejected_calls_count: bool,
    headers: Headers,
    hide_retry_after: bool,
    cancelled_is_free: bool,
}

struct State {
    limits: LimitSet,
    unauthorized: bool,
    ledger: Ledger,
    /// How often each call was admitted.
    admitted: HashMap<(Arc<str>, RequestDigest), u64>,
    file: LedgerFile,
}

impl Sim {
    /// Returns a builder.
    pub fn builder() -> SimBuilder {
        SimBuilder::default()
    }

    fn new(limits: LimitSet, policy: Policy, model: Model, path: Option<PathBuf>) -> Self {
        Self(Arc::new(Inner {
            model,
            policy,
            start: Instant::now(),
            account: Mutex::new(State {
                limits,
                unauthorized: false,
                ledger: Ledger::default(),
                admitted: HashMap::new(),
                file: path.map_or_else(LedgerFile::default, |path| LedgerFile::open(&path)),
            }),
        }))
    }

    /// Returns the calls seen and billed until now.
    pub fn ledger(&self) -> Ledger {
        self.0.lock().ledger.clone()
    }

    /// Returns the number of calls in flight.
    pub fn in_flight(&self) -> usize {
        self.0.lock().ledger.in_flight
    }

    /// Returns the current limits.
    pub fn limits(&self) -> Limits {
        self.0.advanced().1.limits.current()
    }

    /// Changes the limits from now on and keeps their used amounts. Scheduled changes still
    /// apply.
    ///
    /// # Panics
    /// If a limit becomes zero.
    pub fn set_limits(&self, change: impl FnOnce(&mut Limits)) {
        let mut limits = self.limits();
        change(&mut limits);
        let (now, mut state) = self.0.advanced();
        state.limits.apply(now, limits);
    }

    /// Changes the limit on calls per minute from now on.
    ///
    /// # Panics
    /// If it is zero.
    pub fn set_requests_per_minute(&self, requests: u64) {
        self.set_limits(|limits| limits.requests_per_minute = Some(requests));
    }

    /// Sets whether every call is refused as unauthorized (401) from now on.
    pub fn set_unauthorized(&self, unauthorized: bool) {
        self.0.lock().unauthorized = unauthorized;
    }

    /// Admits the call or refuses it.
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
        // Outside the lock and under the drop guard, because the user's closure may panic.
        call.plan = inner.model.plan(request, &call.key, &digest, nth);
        if call.plan.fault.is_some() || call.plan.failure.is_some() {
            inner
                .lock()
                .ledger
                .count(&call.key, |totals| totals.faults += 1);
        }
        Ok(call)
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is consistent at every possible panic, so a poisoned lock need not make a drop guard panic.
        self.account.lock()
    }

    /// Locks the account, advances its limits to the present, and returns the time since the start.
    fn advanced(&self) -> (Duration, MutexGuard<'_, State>) {
        let mut state = self.lock();
        let now = Instant::now().saturating_duration_since(self.start);
        state.limits.advance(now);
        (now, state)
    }

    /// Returns how often the call was admitted before, and the number of all admitted calls.
    fn admit(&self, key: &Arc<str>, digest: RequestDigest, cost: Cost) -> Result<(u64, u64)> {
        let (now, mut state) = self.advanced();
        let state = &mut *state;
        state.file.check()?;
        let spent = state.limits.current().total_calls;
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
            state.ledger.count(key, |totals| totals.denied += 1);
            return Err(error);
        }

        let in_flight = state.ledger.in_flight;
        let limit = state.limits.current().overload_in_flight;
        if limit.is_some_and(|limit| in_flight >= limit) {
            state.ledger.count(key, |totals| totals.rejected += 1);
            state.ledger.second(now).rejected += 1;
            let rate = state.limits.snapshot(self.policy.headers);
            let error = Error::new(ErrorKind::Overloaded, "too many calls in flight");
            return Err(error.with_http_status(503).with_rate(rate));
        }
        let admitted = state
            .limits
            .admit(cost, in_flight, self.policy.rejected_calls_count);
        if let Err(refusal) = admitted {
            state.ledger.count(key, |totals| totals.rejected += 1);
            state.ledger.second(now).rejected += 1;
            let mut rate = state.limits.snapshot(self.policy.headers);
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
        ledger.count(key, |totals| totals.admitted += 1);
        ledger.second(now).accepted += 1;
        ledger.grants.push(now);
        ledger.in_flight += 1;
        ledger.peak_in_flight = ledger.peak_in_flight.max(ledger.in_flight);
        let times = state.admitted.entry((key.clone(), digest)).or_default();
        *times += 1;
        Ok((*times - 1, ledger.total.admitted))
    }

    /// Ends a call and bills it, unless `ended` is `None`.
    fn settle(&self, call: &Call, ended: Option<Ended>) -> Result<RateSnapshot> {
        let (_, mut state) = self.advanced();
        let state = &mut *state;
        state.ledger.in_flight -= 1;
        if ended == Some(Ended::Cancelled) {
            state
                .ledger
                .count(&call.key, |totals| totals.cancelled += 1);
        }
        let free = ended == Some(Ended::Cancelled) && self.policy.cancelled_is_free;
        if let Some(ended) = ended {
            let usage = call.used(ended, Instant::now());
            let late = usage.output_tokens.saturating_sub(call.reserved);
            state.limits.charge([0, late, 0, late]);
            if !free {
                state.bill(call, ended, usage)?;
            }
        }
        Ok(state.limits.snapshot(self.policy.headers))
    }
}

impl State {
    fn bill(&mut self, call: &Call, ended: Ended, usage: Usage) -> Result<()> {
        let bill = Bill {
            v: 1,
            seq: self.file.next_number(),
            key: call.key.clone(),
            digest: call.digest,
            usage,
            ended,
        };
        let written = self.file.append(&bill);
        self.ledger.record(bill);
        written.map_err(|error| error.with_billed(Some(true)))
    }
}

#[async_trait]
impl Provider for Sim {
    fn name(&self) -> &str {
        "sim"
    }

    /// # Cancel safety
    /// Dropping the future ends the call. The tokens generated until then are billed.
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
            .field("limits", &state.limits.current())
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
        sim.0.lock().file = LedgerFile::from_file(read_only);

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
    async fn a_bill_of_a_dropped_call_that_cannot_be_written_fails_the_next_call() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let sim = Sim::builder().latency(Duration::from_secs(1)).build();
        let read_only = std::fs::File::open(file.path()).unwrap();
        sim.0.lock().file = LedgerFile::from_file(read_only);

        let request = Request::new("a");
        let limit = Duration::from_millis(1);
        let cancelled = tokio::time::timeout(limit, sim.generate(&request)).await;
        assert!(cancelled.is_err());
        let next = sim.generate(&request).await.unwrap_err();
        assert_eq!(next.kind(), ErrorKind::Io);
    }
}
