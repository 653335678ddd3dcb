//! The guard around a provider: retry loop, and for each attempt a permit from the lane.
//!
//! The order is the point. A retry *around* a paced call waits with its permit in
//! hand and starves the others; a second retry layer *below* it multiplies attempts.

mod stream;

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::time::{Instant, sleep, timeout};
use tracing::{Instrument, Span, field};

use crate::budget::Budget;
use crate::deployment::Deployment;
use crate::error::{Error, ErrorKind, Persistence, Result};
use crate::estimate::{Estimator, TokenCounter, charged, charged_in_vain};
use crate::event::{Event, Observers};
use crate::memo::Asked;
use crate::pace::{CallOutcome, LaneChange, Need};
use crate::pool::{Pool, Turn, Visit};
use crate::provider::{OutputCharge, Provider};
use crate::reply::Reply;
use crate::request::Request;
use crate::retry::{Class, Retry, Streak};
use crate::scope::{Scope, Tally};
use crate::usage::RateSnapshot;

pub(crate) use self::stream::{Sink, Unkept};

/// How long the writing of an intent may go on when the call has been called off.
const LAST_INTENT: Duration = Duration::from_secs(1);

pub(crate) struct Guard {
    pool: Pool<Deployment>,
    estimator: Estimator,
    retry: Retry,
    budget: Budget,
    call_timeout: Duration,
    observers: Arc<Observers>,
    /// How many calls got an answer: while it grows, the lane is not stalled.
    answers: AtomicU64,
}

impl Guard {
    pub(crate) fn new(
        pool: Pool<Deployment>,
        counter: Option<Box<dyn TokenCounter>>,
        retry: Retry,
        call_timeout: Duration,
        observers: Arc<Observers>,
    ) -> Self {
        Self {
            pool,
            estimator: Estimator::new(counter),
            retry,
            budget: Budget::new(),
            call_timeout,
            observers,
            answers: AtomicU64::new(0),
        }
    }

    pub(crate) fn pool(&self) -> &Pool<Deployment> {
        &self.pool
    }

    /// Whether retries wait because so many calls fail.
    pub(crate) fn budget_is_dry(&self) -> bool {
        self.budget.is_dry()
    }

    /// Counts and tells of a request that has failed for good, after calls to the provider or without any.
    pub(crate) fn failed(&self, scope: &Scope, was_sent: bool, error: &Error) {
        scope.add(Tally {
            calls: u64::from(was_sent),
            unsent: u64::from(!was_sent),
            ..Tally::default()
        });
        tracing::debug!(path = %scope, %error, "call failed");
        self.observers.tell(|| Event::CallFailed {
            path: scope.path(),
            error: error.clone(),
        });
    }

    /// One request, to be [answered](Call::answer).
    pub(crate) fn call<'a>(
        &'a self,
        scope: &'a Scope,
        request: &'a Request,
        with: With<'a>,
    ) -> Call<'a> {
        Call {
            guard: self,
            scope,
            request,
            with,
            input: self.estimator.input(request),
        }
    }

    /// Whether nine of ten calls take longer than there is time until `end`.
    fn is_too_late(&self, end: Instant) -> bool {
        let fast = self.estimator.latency(0.1).unwrap_or_default();
        Instant::now() + fast >= end
    }

    /// Gives the permit back with all the lane can learn from the call.
    fn conclude(
        &self,
        turn: Turn<'_, Deployment>,
        said: Option<&RateSnapshot>,
        outcome: CallOutcome,
    ) {
        for change in turn.conclude(said, outcome) {
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

/// One request on its way through the guard.
pub(crate) struct Call<'a> {
    guard: &'a Guard,
    scope: &'a Scope,
    request: &'a Request,
    with: With<'a>,
    /// The tokens of its prompt, as far as can be told.
    input: u64,
}

impl Call<'_> {
    /// As many calls as it takes.
    pub(crate) async fn answer(&self) -> Result<Reply> {
        // A retry goes back to where its call stood in the queue, not to the end.
        let mut visit = self.guard.pool.arrive();
        let mut backoff = None;
        let mut streak = Streak::default();
        let answers = self.guard.answers();
        let mut attempt = 0;
        // Attempts that were made before the call fell back to where it is now.
        let mut before = 0;
        let mut stall = None;
        loop {
            // Awaited where it is made: under a name, it would be in here twice.
            let (index, error) = match self.send(&mut visit, attempt + 1).await {
                Ok(Sent::Answered(reply)) => return Ok(reply),
                Ok(Sent::Failed(index, error)) => (index, error),
                Err(error) => return Err(error.exhausted(attempt)),
            };
            match Class::of(&error) {
                // Nobody is sent to that account any more; another may do it.
                Class::Final if error.is_account_wide() && self.guard.pool.is_open_to(&visit) => {}
                Class::Final => return Err(error.exhausted(attempt + 1)),
                Class::Throttle => {
                    if self.guard.stalled(&mut stall) {
                        return Err(error.exhausted(attempt));
                    }
                    let wait = self.guard.pool.closed_for(&visit);
                    self.in_time(wait, &error)
                        .map_err(|error| error.exhausted(attempt))?;
                    self.guard.observers.tell(|| Event::CallThrottled {
                        path: self.scope.path(),
                        error,
                    });
                }
                Class::Transient => {
                    attempt += 1;
                    stall = None;
                    visit.avoid(index);
                    let used_up = attempt - before >= self.guard.retry.max_attempts();
                    let quarantined = streak.extend(&error) >= self.guard.retry.max_identical()
                        && self.guard.answers() > answers;
                    if used_up || quarantined {
                        if visit.fall_back(&self.guard.pool, index)
                            && self.guard.pool.is_open_to(&visit)
                        {
                            (before, backoff, streak) = (attempt, None, Streak::default());
                            continue;
                        }
                        let error = match used_up {
                            true => error,
                            false => error.with_persistence(Persistence::Permanent),
                        };
                        return Err(error.exhausted(attempt));
                    }
                    let backoff =
                        backoff.get_or_insert_with(|| Box::new(self.guard.retry.backoff()));
                    let mut delay = backoff.next(fastrand::f64(), error.wait());
                    if !self.guard.budget.spend(error.is_timeout()) {
                        delay = delay.max(self.guard.retry.longest_delay());
                    }
                    self.in_time(delay, &error)
                        .map_err(|error| error.exhausted(attempt))?;
                    self.guard.observers.tell(|| Event::CallRetried {
                        path: self.scope.path(),
                        attempt,
                        delay,
                        error,
                    });
                    Box::pin(self.scope.bounds.before_send(sleep(delay)))
                        .await
                        .map_err(|error| error.exhausted(attempt))?;
                    self.scope.add(Tally {
                        retries: 1,
                        ..Tally::default()
                    });
                }
            }
        }
    }

    /// A permit, the call, and all that is learned from how it ended. Errors when
    /// nothing was sent.
    async fn send(&self, visit: &mut Visit, attempt: u32) -> Result<Sent> {
        let bounds = &self.scope.bounds;
        bounds.check()?;
        let mut turn = match self.guard.pool.try_acquire_by(self.need(), visit) {
            Some(turn) => turn,
            None => self.wait(visit).await?,
        };
        if bounds
            .deadline
            .is_some_and(|end| self.guard.is_too_late(end))
        {
            let message = "not even a fast call would be answered before the deadline";
            return Err(Error::new(ErrorKind::DeadlineExceeded, message));
        }
        if let Some(asked) = self.with.asked {
            // With the permit in hand, so that what only waits in line is not written down as sent.
            self.intend(asked).await?;
        }
        turn.mark_sent();
        self.with.was_sent.store(true, Ordering::Relaxed);
        let (index, deployment) = (turn.index(), turn.deployment());
        let charge = deployment.charge();
        let adapted = deployment.adapt(self.request);
        let request = adapted.as_deref().unwrap_or(self.request);
        // Who learns nothing from it and tells nobody need not look at the clock.
        let sampled = self.guard.estimator.samples();
        let sent = (sampled || self.guard.observers.listen()).then(Instant::now);
        let provider = &*deployment.provider;
        match self.attempt(provider, request, attempt, sent).await {
            Ok(reply) => {
                let usage = Some(charged(charge, request, reply.usage));
                self.guard
                    .conclude(turn, reply.rate.as_deref(), CallOutcome::Done { usage });
                if let Some(sent) = sent.filter(|_| sampled) {
                    self.guard
                        .estimator
                        .learn(self.scope, reply.usage, sent.elapsed());
                }
                self.guard.budget.earn();
                self.guard.answers.fetch_add(1, Ordering::Relaxed);
                Ok(Sent::Answered(reply))
            }
            Err(error) => {
                if error.is_account_wide() {
                    // Before the slot is free again: nobody else must go.
                    turn.leave_out(error.clone());
                    self.guard.observers.tell(|| Event::LaneStopped {
                        error: error.clone(),
                    });
                    return Ok(Sent::Failed(index, error));
                }
                let outcome = match error.kind() {
                    ErrorKind::Throttled => CallOutcome::Throttled { wait: error.wait() },
                    ErrorKind::Overloaded => CallOutcome::Overloaded { wait: error.wait() },
                    _ => CallOutcome::Failed {
                        usage: charged_in_vain(charge, self.input, error.billed()),
                    },
                };
                self.guard.conclude(turn, error.rate(), outcome);
                Ok(Sent::Failed(index, error))
            }
        }
    }

    /// In a box, because calls without a store have none.
    fn intend<'a>(&'a self, asked: &'a Asked) -> BoxFuture<'a, Result<()>> {
        let bounds = &self.scope.bounds;
        async move {
            let mut written = pin!(asked.intend());
            if let Err(ended) = bounds.before_send(written.as_mut()).await {
                // It may be on its way: once it is there, the end of the call can take it back.
                let _ = timeout(LAST_INTENT, written).await;
                return Err(ended);
            }
            bounds.check()
        }
        .boxed()
    }

    /// What the request needs at a deployment.
    fn need(&self) -> impl Fn(&Deployment) -> Need + Send + Sync {
        move |deployment| {
            let charge = deployment.charge();
            let output = self
                .guard
                .estimator
                .output(self.scope, self.request, charge);
            Need::new(self.input, output)
                .in_arrears(charge == OutputCharge::Produced)
                .of(self.scope.who)
        }
    }

    /// In a box, so that the many calls that need not wait are not as large as this.
    fn wait<'a>(&'a self, visit: &'a mut Visit) -> BoxFuture<'a, Result<Turn<'a, Deployment>>> {
        let turn = self.guard.pool.acquire_by(self.need(), visit);
        async move { self.scope.bounds.before_send(turn).await? }.boxed()
    }

    /// Fails if a call that waits first could not be answered before the deadline.
    fn in_time(&self, wait: Duration, error: &Error) -> Result<()> {
        let latency = self.guard.estimator.latency(0.5).unwrap_or_default();
        let answered = Instant::now() + wait + latency;
        if self.scope.bounds.deadline.is_none_or(|end| answered < end) {
            return Ok(());
        }
        let message = "the next attempt would not be answered before the deadline";
        Err(Error::new(ErrorKind::DeadlineExceeded, message)
            .with_billed(error.billed())
            .with_source(error.clone()))
    }

    /// One call to the provider, in a span by the OpenTelemetry GenAI conventions.
    async fn attempt(
        &self,
        provider: &dyn Provider,
        request: &Request,
        attempt: u32,
        sent: Option<Instant>,
    ) -> Result<Reply> {
        self.guard.observers.tell(|| Event::CallStarted {
            path: self.scope.path(),
            attempt,
        });
        let limit = request.timeout.unwrap_or(self.guard.call_timeout);
        let span = span(provider.name(), request);
        let sink = self.with.sink;
        let call = match sink {
            None => provider.generate(request),
            Some(sink) => Box::pin(sink.call(provider, request)),
        };
        let result = if span.is_disabled() {
            self.scope.bounds.in_flight(limit, call).await
        } else {
            let call = self.scope.bounds.in_flight(limit, call);
            Box::pin(call.instrument(span.clone())).await
        };
        let result = match sink {
            Some(sink) => result.map_err(|error| sink.judge(error)),
            None => result,
        };
        record(&span, &result);
        self.scope.add(by_class(&result));
        if let Ok(reply) = &result {
            self.guard.observers.tell(|| Event::CallSucceeded {
                path: self.scope.path(),
                attempt,
                elapsed: sent.map_or(Duration::ZERO, |sent| sent.elapsed()),
                usage: reply.usage,
            });
        }
        result
    }
}

/// What goes with a request through the guard.
#[derive(Clone, Copy)]
pub(crate) struct With<'a> {
    /// Who reads the reply while it is being written.
    pub(crate) sink: Option<&'a Sink>,
    /// What is written down before the request is sent.
    pub(crate) asked: Option<&'a Asked>,
    /// Set when a call for the request leaves for the provider.
    pub(crate) was_sent: &'a AtomicBool,
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
    /// At which deployment, and why.
    Failed(usize, Error),
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
    // Nobody listens: a disabled span still looks at each of its fields.
    if !tracing::enabled!(tracing::Level::DEBUG) {
        return Span::none();
    }
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
