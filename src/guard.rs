//! The guard around a provider: retry loop, and for each attempt a permit from the lane.
//!
//! The order is the point. A retry *around* a paced call waits with its permit in
//! hand and starves the others; a second retry layer *below* it multiplies attempts.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::{Instrument, Span, field};

use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, Observers};
use crate::pace::{CallOutcome, Lane, LaneChange, Need, Permit};
use crate::provider::{OutputCharge, Provider};
use crate::reply::Reply;
use crate::request::Request;
use crate::retry::{Class, Retry};
use crate::scope::{Scope, Tally};
use crate::usage::{RateSnapshot, Usage};

/// Output tokens assumed for a request that does not limit them, until its reply says.
const ASSUMED_OUTPUT_TOKENS: u64 = 512;

pub(crate) struct Guard {
    provider: Arc<dyn Provider>,
    output_charge: OutputCharge,
    lane: Lane,
    retry: Retry,
    call_timeout: Duration,
    observers: Arc<Observers>,
    /// When a call last got an answer: what a stalled lane is measured from.
    last_answer: Mutex<Option<Instant>>,
}

impl Guard {
    pub(crate) fn new(
        provider: Arc<dyn Provider>,
        lane: Lane,
        retry: Retry,
        call_timeout: Duration,
        observers: Arc<Observers>,
    ) -> Self {
        Self {
            output_charge: provider.capabilities().output_charge,
            provider,
            lane,
            retry,
            call_timeout,
            observers,
            last_answer: Mutex::new(None),
        }
    }

    pub(crate) fn lane(&self) -> &Lane {
        &self.lane
    }

    pub(crate) fn provider(&self) -> &Arc<dyn Provider> {
        &self.provider
    }

    /// One request, as many calls as it takes.
    pub(crate) async fn call(&self, scope: &Scope, request: &Request) -> Result<Reply> {
        let result = self.attempts(scope, request).await;
        scope.add(Tally {
            calls: 1,
            usage: result
                .as_ref()
                .map_or_else(|_| Default::default(), |reply| reply.usage),
            ..Tally::default()
        });
        if let Err(error) = &result {
            tracing::debug!(path = %scope, %error, "call failed");
            self.observers.tell(|| Event::CallFailed {
                path: scope.path(),
                error: error.clone(),
            });
        }
        result
    }

    async fn attempts(&self, scope: &Scope, request: &Request) -> Result<Reply> {
        let bounds = &scope.bounds;
        // A retry goes back to where its call stood in the queue, not to the end.
        let place = self.lane.arrive();
        let mut backoff = self.retry.backoff();
        let mut attempt = 0;
        let mut throttled_since = None;
        loop {
            let permit = bounds.before_send(self.lane.acquire(need(request).at(place)));
            let permit = permit.await.and_then(|permit| permit);
            let mut permit = permit.map_err(|error| error.exhausted(attempt))?;
            attempt += 1;
            permit.mark_sent();
            let error = match self.attempt(scope, request, attempt).await {
                Ok(reply) => {
                    let usage = Some(self.charged(request, reply.usage));
                    self.conclude(permit, reply.rate.as_deref(), CallOutcome::Done { usage });
                    *self
                        .last_answer
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
                    return Ok(reply);
                }
                Err(error) => error,
            };
            if error.is_account_wide() {
                // Before the slot is free again: nobody else must go.
                self.lane.stop(error.clone());
                self.observers.tell(|| Event::LaneStopped {
                    error: error.clone(),
                });
            }
            let outcome = match error.kind() {
                ErrorKind::Throttled => CallOutcome::Throttled { wait: error.wait() },
                ErrorKind::Overloaded => CallOutcome::Overloaded { wait: error.wait() },
                _ => CallOutcome::Failed { usage: None },
            };
            self.conclude(permit, error.rate(), outcome);
            match Class::of(&error) {
                Class::Final => return Err(error.exhausted(attempt)),
                Class::Throttle => {
                    attempt -= 1;
                    let since = *throttled_since.get_or_insert_with(Instant::now);
                    if self.stalled(since) {
                        return Err(error.exhausted(attempt));
                    }
                    self.observers.tell(|| Event::CallThrottled {
                        path: scope.path(),
                        error,
                    });
                }
                Class::Transient => {
                    throttled_since = None;
                    if attempt >= self.retry.max_attempts() {
                        return Err(error.exhausted(attempt));
                    }
                    let delay = backoff.next(fastrand::f64(), error.wait());
                    if bounds
                        .deadline
                        .is_some_and(|end| Instant::now() + delay >= end)
                    {
                        let message = "the next attempt would start after the deadline";
                        return Err(Error::new(ErrorKind::DeadlineExceeded, message)
                            .with_billed(error.billed())
                            .with_source(error)
                            .exhausted(attempt));
                    }
                    self.observers.tell(|| Event::CallRetried {
                        path: scope.path(),
                        attempt,
                        delay,
                        error,
                    });
                    bounds
                        .before_send(sleep(delay))
                        .await
                        .map_err(|error| error.exhausted(attempt))?;
                }
            }
        }
    }

    /// Gives the permit back with all the lane can learn from the call.
    fn conclude(&self, mut permit: Permit, said: Option<&RateSnapshot>, outcome: CallOutcome) {
        let mut changes = said.map_or_else(Vec::new, |said| permit.listen(said));
        changes.extend(permit.conclude(outcome));
        for change in changes {
            self.observers.tell(|| match change {
                LaneChange::Closed { wait } => Event::LaneClosed { wait },
                LaneChange::Slowed { limit, scale } => Event::LaneSlowed {
                    limit: limit.as_str(),
                    scale,
                },
                LaneChange::Eased { in_flight } => Event::LaneEased { in_flight },
                LaneChange::Adopted { limit, per_minute } => Event::LaneRetuned {
                    limit: limit.as_str(),
                    per_minute,
                },
                LaneChange::Stopped { why } => Event::LaneStopped { error: why },
            });
        }
    }

    /// One call to the provider, in a span by the OpenTelemetry GenAI conventions.
    async fn attempt(&self, scope: &Scope, request: &Request, attempt: u32) -> Result<Reply> {
        self.observers.tell(|| Event::CallStarted {
            path: scope.path(),
            attempt,
        });
        let started = Instant::now();
        let limit = request.timeout.unwrap_or(self.call_timeout);
        let span = span(self.provider.name(), request);
        let result = scope
            .bounds
            .in_flight(limit, self.provider.generate(request))
            .instrument(span.clone())
            .await
            .and_then(|result| result);
        record(&span, &result);
        let refused = result.as_ref().is_err_and(Error::is_throttled);
        scope.add(Tally {
            attempts: u64::from(!refused),
            throttled: u64::from(refused),
            ambiguous: u64::from(result.as_ref().is_err_and(|error| error.billed().is_none())),
            ..Tally::default()
        });
        if let Ok(reply) = &result {
            self.observers.tell(|| Event::CallSucceeded {
                path: scope.path(),
                attempt,
                elapsed: started.elapsed(),
                usage: reply.usage,
            });
        }
        result
    }

    /// What an answered call costs of the rate limit: a provider that reserves
    /// `max_tokens` gives nothing back for a shorter answer.
    fn charged(&self, request: &Request, mut usage: Usage) -> Usage {
        if self.output_charge == OutputCharge::Reserved {
            let reserved = request.max_tokens.unwrap_or(0);
            usage.output_tokens = usage.output_tokens.max(reserved);
        }
        usage
    }

    /// Whether no call at all has got through for the whole of our patience.
    fn stalled(&self, throttled_since: Instant) -> bool {
        let answered = *self
            .last_answer
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let since = answered.map_or(throttled_since, |answer| answer.max(throttled_since));
        since.elapsed() >= self.retry.max_stall()
    }
}

fn need(request: &Request) -> Need {
    Need::new(
        request.estimated_input_tokens(),
        request.max_tokens.unwrap_or(ASSUMED_OUTPUT_TOKENS),
    )
}

fn span(provider: &str, request: &Request) -> Span {
    tracing::debug_span!(
        "chat",
        gen_ai.operation.name = "chat",
        gen_ai.provider.name = provider,
        gen_ai.request.model = request.model.as_deref(),
        gen_ai.request.max_tokens = request.max_tokens,
        gen_ai.response.id = field::Empty,
        gen_ai.response.model = field::Empty,
        gen_ai.usage.input_tokens = field::Empty,
        gen_ai.usage.output_tokens = field::Empty,
        error.type = field::Empty,
    )
}

fn record(span: &Span, result: &Result<Reply>) {
    match result {
        _ if span.is_disabled() => {}
        Ok(reply) => {
            span.record("gen_ai.response.id", reply.request_id.as_deref());
            span.record("gen_ai.response.model", &*reply.model);
            span.record("gen_ai.usage.input_tokens", reply.usage.input_tokens);
            span.record("gen_ai.usage.output_tokens", reply.usage.output_tokens);
        }
        Err(error) => {
            span.record("error.type", error.kind().as_str());
        }
    }
}
