//! The guard around a provider: retry loop, and for each attempt a permit from the lane.
//!
//! The order is the point. A retry *around* a paced call waits with its permit in
//! hand and starves the others; a second retry layer *below* it multiplies attempts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::{Instrument, Span, field};

use crate::budget::Budget;
use crate::error::{Error, ErrorKind, Persistence, Result};
use crate::estimate::{Estimator, TokenCounter};
use crate::event::{Event, Observers};
use crate::memo::Asked;
use crate::pace::{CallOutcome, Lane, LaneChange, Need, Permit};
use crate::provider::Provider;
use crate::reply::Reply;
use crate::request::Request;
use crate::retry::{Class, Retry, Streak};
use crate::scope::{Scope, Tally};
use crate::usage::RateSnapshot;

pub(crate) struct Guard {
    provider: Arc<dyn Provider>,
    estimator: Estimator,
    lane: Lane,
    retry: Retry,
    budget: Budget,
    call_timeout: Duration,
    observers: Arc<Observers>,
    /// How many calls got an answer: while it grows, the lane is not stalled.
    answers: AtomicU64,
}

impl Guard {
    pub(crate) fn new(
        provider: Arc<dyn Provider>,
        counter: Option<Box<dyn TokenCounter>>,
        lane: Lane,
        retry: Retry,
        call_timeout: Duration,
        observers: Arc<Observers>,
    ) -> Self {
        let charge = provider.capabilities().output_charge;
        Self {
            estimator: Estimator::new(charge, counter),
            provider,
            lane,
            retry,
            budget: Budget::new(),
            call_timeout,
            observers,
            answers: AtomicU64::new(0),
        }
    }

    pub(crate) fn lane(&self) -> &Lane {
        &self.lane
    }

    /// Whether retries wait because so many calls fail.
    pub(crate) fn budget_is_dry(&self) -> bool {
        self.budget.is_dry()
    }

    pub(crate) fn provider(&self) -> &Arc<dyn Provider> {
        &self.provider
    }

    /// One request, as many calls as it takes.
    ///
    /// `asked` is written down before the first is sent.
    pub(crate) async fn call(
        &self,
        scope: &Scope,
        request: &Request,
        asked: Option<&Asked>,
    ) -> Result<Reply> {
        let result = self.attempts(scope, request, asked).await;
        if let Err(error) = &result {
            scope.add(Tally {
                calls: 1,
                ..Tally::default()
            });
            tracing::debug!(path = %scope, %error, "call failed");
            self.observers.tell(|| Event::CallFailed {
                path: scope.path(),
                error: error.clone(),
            });
        }
        result
    }

    async fn attempts(
        &self,
        scope: &Scope,
        request: &Request,
        asked: Option<&Asked>,
    ) -> Result<Reply> {
        let bounds = &scope.bounds;
        // A retry goes back to where its call stood in the queue, not to the end.
        let need = self.estimator.need(scope, request).at(self.lane.arrive());
        let mut backoff = None;
        let mut streak = Streak::default();
        let answers = self.answers();
        let mut attempt = 0;
        let mut stall = None;
        loop {
            let error = match self.send(scope, request, asked, need, attempt + 1).await {
                Ok(Sent::Answered(reply)) => return Ok(reply),
                Ok(Sent::Failed(error)) => error,
                Err(error) => return Err(error.exhausted(attempt)),
            };
            match Class::of(&error) {
                Class::Final => return Err(error.exhausted(attempt + 1)),
                Class::Throttle => {
                    if self.stalled(&mut stall) {
                        return Err(error.exhausted(attempt));
                    }
                    let wait = self.lane.snapshot().closed_for.unwrap_or_default();
                    self.in_time(scope, wait, &error)
                        .map_err(|error| error.exhausted(attempt))?;
                    self.observers.tell(|| Event::CallThrottled {
                        path: scope.path(),
                        error,
                    });
                }
                Class::Transient => {
                    attempt += 1;
                    stall = None;
                    if attempt >= self.retry.max_attempts() {
                        return Err(error.exhausted(attempt));
                    }
                    if streak.extend(&error) >= self.retry.max_identical()
                        && self.answers() > answers
                    {
                        let permanent = error.with_persistence(Persistence::Permanent);
                        return Err(permanent.exhausted(attempt));
                    }
                    let backoff = backoff.get_or_insert_with(|| self.retry.backoff());
                    let mut delay = backoff.next(fastrand::f64(), error.wait());
                    if !self.budget.spend(error.is_timeout()) {
                        delay = delay.max(self.retry.longest_delay());
                    }
                    self.in_time(scope, delay, &error)
                        .map_err(|error| error.exhausted(attempt))?;
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
                    scope.add(Tally {
                        retries: 1,
                        ..Tally::default()
                    });
                }
            }
        }
    }

    /// A permit, the call, and all that is learned from how it ended. Errors when
    /// nothing was sent.
    async fn send(
        &self,
        scope: &Scope,
        request: &Request,
        asked: Option<&Asked>,
        need: Need,
        attempt: u32,
    ) -> Result<Sent> {
        let permit = scope.bounds.before_send(self.lane.acquire(need));
        let mut permit = permit.await??;
        if let Some(asked) = asked {
            // With the permit in hand, so that what only waits in line is not written down as sent.
            scope.bounds.before_send(asked.intend()).await?;
        }
        permit.mark_sent();
        // Who learns nothing from it and tells nobody need not look at the clock.
        let sampled = self.estimator.samples();
        let sent = (sampled || self.observers.listen()).then(Instant::now);
        match self.attempt(scope, request, attempt, sent).await {
            Ok(reply) => {
                let usage = Some(self.estimator.charged(request, reply.usage));
                self.conclude(permit, reply.rate.as_deref(), CallOutcome::Done { usage });
                if let Some(sent) = sent.filter(|_| sampled) {
                    self.estimator.learn(scope, reply.usage, sent.elapsed());
                }
                self.budget.earn();
                self.answers.fetch_add(1, Ordering::Relaxed);
                Ok(Sent::Answered(reply))
            }
            Err(error) => {
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
                    _ => CallOutcome::Failed {
                        usage: self.estimator.charged_in_vain(&need, error.billed()),
                    },
                };
                self.conclude(permit, error.rate(), outcome);
                Ok(Sent::Failed(error))
            }
        }
    }

    /// Fails if a call that waits first could not be answered before the deadline.
    fn in_time(&self, scope: &Scope, wait: Duration, error: &Error) -> Result<()> {
        let latency = self.estimator.median_latency().unwrap_or_default();
        let answered = Instant::now() + wait + latency;
        if scope.bounds.deadline.is_none_or(|end| answered < end) {
            return Ok(());
        }
        let message = "the next attempt would not be answered before the deadline";
        Err(Error::new(ErrorKind::DeadlineExceeded, message)
            .with_billed(error.billed())
            .with_source(error.clone()))
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
    async fn attempt(
        &self,
        scope: &Scope,
        request: &Request,
        attempt: u32,
        sent: Option<Instant>,
    ) -> Result<Reply> {
        self.observers.tell(|| Event::CallStarted {
            path: scope.path(),
            attempt,
        });
        let limit = request.timeout.unwrap_or(self.call_timeout);
        let span = span(self.provider.name(), request);
        // The provider itself: through the `Arc` the call would be boxed once more.
        let call = (*self.provider).generate(request);
        let call = scope.bounds.in_flight(limit, call);
        let result = if span.is_disabled() {
            call.await
        } else {
            call.instrument(span.clone()).await
        };
        let result = result.and_then(|result| result);
        record(&span, &result);
        scope.add(by_class(&result));
        if let Ok(reply) = &result {
            self.observers.tell(|| Event::CallSucceeded {
                path: scope.path(),
                attempt,
                elapsed: sent.map_or(Duration::ZERO, |sent| sent.elapsed()),
                usage: reply.usage,
            });
        }
        result
    }

    /// Whether no call at all has got through for the whole of our patience.
    fn stalled(&self, stall: &mut Option<Stall>) -> bool {
        let now = Stall {
            since: Instant::now(),
            answers: self.answers(),
        };
        let stall = stall.get_or_insert(now);
        if stall.answers != now.answers {
            *stall = now;
        }
        stall.since.elapsed() >= self.retry.max_stall()
    }

    fn answers(&self) -> u64 {
        self.answers.load(Ordering::Relaxed)
    }
}

/// Since when the lane has answered nobody.
#[derive(Clone, Copy)]
struct Stall {
    since: Instant,
    answers: u64,
}

/// How a call ended that was sent.
enum Sent {
    Answered(Reply),
    Failed(Error),
}

/// The counters that an attempt belongs to, by how it ended. An answer ends its request too.
fn by_class(result: &Result<Reply>) -> Tally {
    let mut tally = Tally::default();
    let error = match result {
        Ok(reply) => {
            (tally.calls, tally.attempts, tally.usage) = (1, 1, reply.usage);
            return tally;
        }
        Err(error) => error,
    };
    tally.ambiguous = u64::from(error.billed().is_none());
    let counter = match error.kind() {
        ErrorKind::Throttled => {
            tally.throttled = 1;
            return tally;
        }
        ErrorKind::Overloaded => &mut tally.overloaded,
        ErrorKind::Timeout => &mut tally.timed_out,
        _ if error.is_temporary() => &mut tally.transient,
        _ => &mut tally.failed,
    };
    *counter = 1;
    tally.attempts = 1;
    tally
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
