//! The guard around a provider: retry loop, and for each attempt a permit from the lane.
//!
//! The order is the point. A retry *around* a paced call waits with its permit in
//! hand and starves the others; a second retry layer *below* it multiplies attempts.

mod evidence;
mod health;
mod history;
mod stream;

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::time::{Instant, sleep, timeout};
use tracing::{Instrument, Span, field};

use crate::call::budget::Budget;
use crate::call::deployment::Deployment;
use crate::call::estimate::{Estimator, TokenCounter, charged, charged_in_vain};
use crate::call::memo::Asked;
use crate::call::pool::{Pool, Turn, Visit};
use crate::call::retry::{Class, LONGEST_WAIT, Retry};
use crate::call::scope::{Scope, Tally};
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, Observers};
use crate::provider::{OutputCharge, Provider};
use crate::ratelimit::{CallOutcome, LaneChange, Need};
use crate::request::Reply;
use crate::request::Request;
use crate::usage::{RateSnapshot, Usage};

use self::evidence::{CallEnd, Profile, Signature, Watches};
use self::health::Health;
use self::history::{History, Next};
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
    /// Of each deployment, by its index in the pool.
    health: Vec<Health>,
    watches: Watches,
}

impl Guard {
    pub(crate) fn new(
        pool: Pool<Deployment>,
        counter: Option<Box<dyn TokenCounter>>,
        retry: Retry,
        call_timeout: Duration,
        observers: Arc<Observers>,
    ) -> Self {
        let health = pool.deployments().map(|_| Health::default()).collect();
        Self {
            pool,
            health,
            watches: Watches::default(),
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
    fn is_too_late(&self, scope: &Scope, end: Instant) -> bool {
        let fast = self.estimator.latency(scope, 0.1).unwrap_or_default();
        let answered = Instant::now().checked_add(fast);
        answered.is_none_or(|answered| answered >= end)
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
                LaneChange::CoolingDown { wait } => Event::LaneCoolingDown { wait },
                LaneChange::RateReduced { limit, factor } => Event::LaneSlowed {
                    limit: limit.as_str(),
                    factor,
                },
                LaneChange::ConcurrencyReduced { in_flight } => {
                    Event::LaneConcurrencyReduced { in_flight }
                }
                LaneChange::LimitAdopted { limit, per_minute } => Event::LaneRetuned {
                    limit: limit.as_str(),
                    per_minute,
                },
                LaneChange::CallExceedsLimit {
                    limit,
                    needed,
                    per_minute,
                } => Event::CallExceedsLimit {
                    limit: limit.as_str(),
                    needed,
                    per_minute,
                },
                LaneChange::Stopped { why } => Event::LaneStopped { error: why },
            });
        }
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

impl<'a> Call<'a> {
    /// As many calls as it takes.
    pub(crate) async fn answer(&self) -> Result<Reply> {
        // A retry goes back to where its call stood in the queue, not to the end.
        let mut visit = self.guard.pool.arrive();
        // In a box that most calls do not need, because most are answered the first time.
        let mut history = None;
        let mut attempts = 0;
        loop {
            // Awaited where it is made: under a name, it would be in here twice.
            let next = match self.send(&mut visit, attempts + 1, &mut history).await {
                Ok(Sent::Answered(reply)) => return Ok(reply),
                Ok(Sent::Failed(next)) => next,
                Err(error) => return Err(error.exhausted(attempts)),
            };
            let (delay, error) = match next {
                Next::End { error, attempt } => {
                    return Err(error.exhausted(attempts + u32::from(attempt)));
                }
                Next::Elsewhere => {
                    attempts += 1;
                    continue;
                }
                Next::Refused { delay, error } => {
                    let delay = match delay {
                        Duration::ZERO => self.own_wait(&visit, &error),
                        delay => delay,
                    };
                    self.guard.observers.tell(|| Event::CallThrottled {
                        path: self.scope.path(),
                        error,
                    });
                    self.pause(delay)
                        .await
                        .map_err(|error| error.exhausted(attempts))?;
                    continue;
                }
                Next::Retry { delay, error } => (delay, error),
            };
            attempts += 1;
            self.guard.observers.tell(|| Event::CallRetried {
                path: self.scope.path(),
                attempt: attempts,
                delay,
                error,
            });
            self.pause(delay)
                .await
                .map_err(|error| error.exhausted(attempts))?;
            self.scope.add(Tally {
                retries: 1,
                ..Tally::default()
            });
        }
    }

    /// How long the provider asks this call to wait after a refusal for which its lane does not.
    ///
    /// Where there are other deployments, one of them may take it at once.
    fn own_wait(&self, visit: &Visit, error: &Error) -> Duration {
        let alone = self.guard.health.len() == 1;
        let wait = error.wait().filter(|wait| alone && *wait <= LONGEST_WAIT);
        let wait = wait.filter(|wait| *wait > self.guard.pool.cooldown(visit));
        wait.unwrap_or_default()
    }

    /// In a box, because most calls never wait for another attempt.
    fn pause(&self, delay: Duration) -> BoxFuture<'_, Result<()>> {
        async move {
            if delay.is_zero() {
                return Ok(());
            }
            self.scope.bounds.before_send(sleep(delay)).await
        }
        .boxed()
    }

    /// A permit, the call, and all that is learned from how it ended. Errors when
    /// nothing was sent.
    async fn send(
        &self,
        visit: &mut Visit,
        attempt: u32,
        history: &mut Option<Box<History<'a>>>,
    ) -> Result<Sent> {
        let bounds = &self.scope.bounds;
        bounds.check()?;
        self.check_refusal(history)?;
        let mut turn = match self.guard.pool.try_acquire_by(self.need(), visit) {
            Some(turn) => turn,
            None => self.wait(visit).await?,
        };
        if history.is_some() {
            self.check_refusal(history)?;
            let deadline = bounds.deadline;
            // The first attempt is always sent: without it nothing is learned of faster times.
            if deadline.is_some_and(|end| self.guard.is_too_late(self.scope, end)) {
                let message = "not even a fast call would be answered before the deadline";
                return Err(Error::new(ErrorKind::DeadlineExceeded, message));
            }
        }
        if let Some(asked) = self.with.asked {
            // With the permit in hand, so that what only waits in line is not written down as sent.
            self.intend(asked).await?;
        }
        turn.mark_sent();
        self.with.was_sent.store(true, Ordering::Relaxed);
        let (index, deployment) = (turn.index(), turn.deployment());
        let health = &self.guard.health[index];
        let charge = deployment.charge();
        let adapted = deployment.adapt(self.request);
        let request = adapted.as_deref().unwrap_or(self.request);
        let (call, sampled) = self.guard.estimator.number();
        // Who learns nothing from it and tells nobody need not look at the clock.
        let sent = (sampled || self.guard.observers.listen()).then(Instant::now);
        let provider = &*deployment.provider;
        match self.attempt(provider, request, attempt, sent).await {
            Ok(reply) => {
                let usage = Some(charged(charge, request, reply.usage));
                self.guard.conclude(
                    turn,
                    reply.rate.as_deref(),
                    CallOutcome::Succeeded { usage },
                );
                if health.answered(call) {
                    deployment.lane.end_probing();
                }
                if self.guard.watches.are_open() {
                    self.note(call, CallEnd::Answered, history);
                }
                if let Some(sent) = sent.filter(|_| sampled) {
                    self.guard.estimator.learn(self.scope, reply.usage, sent);
                }
                self.guard.budget.earn();
                self.guard.answers.fetch_add(1, Ordering::Relaxed);
                Ok(Sent::Answered(reply))
            }
            Err(error) => {
                if self.guard.watches.are_open()
                    && let Some(signature) = Signature::of(&error)
                {
                    self.note(call, CallEnd::Failed(signature), history);
                }
                let new = || Box::new(History::new(&self.guard.retry));
                let history = history.get_or_insert_with(new);
                let rate = error.rate().cloned();
                // Before the permit is given back: nobody must go whom its failure stops.
                let refused_alone = history.is_refused_alone(self, &error);
                let outcome = self.outcome(&error, charge, refused_alone);
                let next = history.judge(self, visit, &turn, call, error);
                self.guard.conclude(turn, rate.as_ref(), outcome);
                Ok(Sent::Failed(next))
            }
        }
    }

    /// What the lane is told of a failed call.
    fn outcome(&self, error: &Error, charge: OutputCharge, refused_alone: bool) -> CallOutcome {
        // One request's word holds up no other.
        let untold = refused_alone || Class::of(error) == Class::Doubtful;
        let wait = error.wait();
        match error.kind() {
            _ if untold && error.billed() == Some(false) => CallOutcome::Failed {
                usage: Some(Usage::default()),
            },
            ErrorKind::Throttled if !untold => CallOutcome::Throttled { wait },
            ErrorKind::Overloaded if !untold => CallOutcome::Overloaded { wait },
            _ => CallOutcome::Failed {
                usage: charged_in_vain(charge, self.input, error),
            },
        }
    }

    /// Fails if the last attempt was refused in doubt, and by now it is clear that it was meant alone.
    fn check_refusal(&self, history: &mut Option<Box<History<'a>>>) -> Result<()> {
        match history.as_mut().and_then(|it| it.own_refusal(self.guard)) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Lets the end of this call be evidence for the requests that are watched.
    fn note(&self, call: u64, end: CallEnd, history: &Option<Box<History<'a>>>) {
        let own = history.as_ref().and_then(|history| history.watch_id());
        self.guard.watches.note(call, self.profile(), end, own);
    }

    fn profile(&self) -> Profile {
        Profile::new(self.request, self.input)
    }

    /// In a box, because calls without a store have none.
    fn intend<'b>(&'b self, asked: &'b Asked) -> BoxFuture<'b, Result<()>> {
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
                .output_deferred(charge == OutputCharge::Produced)
                .of(self.scope.who)
        }
    }

    /// In a box, so that the many calls that need not wait are not as large as this.
    fn wait<'b>(&'b self, visit: &'b mut Visit) -> BoxFuture<'b, Result<Turn<'a, Deployment>>> {
        let turn = self.guard.pool.acquire_by(self.need(), visit);
        async move { self.scope.bounds.before_send(turn).await? }.boxed()
    }

    /// Fails if a call that waits first could not be answered before the deadline.
    fn in_time(&self, wait: Duration, error: &Error) -> Result<()> {
        let Some(left) = self.time_left() else {
            return Ok(());
        };
        if left.is_some_and(|left| wait < left) {
            return Ok(());
        }
        let message = "the next attempt would not be answered before the deadline";
        Err(Error::new(ErrorKind::DeadlineExceeded, message)
            .with_billed(error.billed())
            .with_source(error.clone()))
    }

    /// How long a call may wait in order to be answered before the deadline, if there is one. Inside, `None` if it
    /// is too late already.
    fn time_left(&self) -> Option<Option<Duration>> {
        let deadline = self.scope.bounds.deadline?;
        let latency = self.guard.estimator.latency(self.scope, 0.5);
        let left = deadline.saturating_duration_since(Instant::now());
        Some(left.checked_sub(latency.unwrap_or_default()))
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
        let unfinished = Unfinished(Some(self.scope));
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
        unfinished.finished();
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

/// How a call ended that was sent.
enum Sent {
    Answered(Reply),
    Failed(Next),
}

/// Counts an attempt that ends without a result, because its future is dropped or the provider panics. It may be
/// paid for.
struct Unfinished<'a>(Option<&'a Scope>);

impl Unfinished<'_> {
    fn finished(mut self) {
        self.0 = None;
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Some(scope) = self.0 {
            scope.add(Tally {
                attempts: 1,
                failed: 1,
                ambiguous: 1,
                ..Tally::default()
            });
        }
    }
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
