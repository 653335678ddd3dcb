//! The retry loop: one attempt after the other until a request is answered or has failed for good.

use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::time::sleep;

use super::deployments::DeploymentPermit;
use super::estimate::charged_for_failure;
use super::failures::{CallEnd, FailureClass, History, NextStep, Signature};
use super::scope::{Scope, Tally};
use super::{Call, admit};
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;
use crate::ratelimit::{CallOutcome, LONGEST_RETRY_AFTER};
use crate::request::Reply;
use crate::usage::Usage;

/// Makes attempts until the request is answered or has failed for good.
pub(super) async fn call(call: &mut Call<'_>) -> Result<Reply> {
    loop {
        let error = match admit::call(call).await {
            Ok(reply) => return Ok(reply),
            Err(error) => error,
        };
        let Some(permit) = call.permit.take() else {
            // Nothing was sent.
            return Err(error.exhausted(call.attempts));
        };
        let delay = match next_step(call, permit, error) {
            NextStep::Fail { error, is_attempt } => {
                return Err(error.exhausted(call.attempts + u32::from(is_attempt)));
            }
            NextStep::Elsewhere => {
                call.attempts += 1;
                continue;
            }
            NextStep::Refused { delay, error } => {
                let delay = match delay {
                    Duration::ZERO => own_wait(call, &error),
                    delay => delay,
                };
                call.stack.observers.tell(|| Event::CallThrottled {
                    path: call.scope.path(),
                    error,
                });
                pause(call, delay).await?;
                continue;
            }
            NextStep::Retry { delay, error } => {
                call.attempts += 1;
                call.stack.observers.tell(|| Event::CallRetried {
                    path: call.scope.path(),
                    attempt: call.attempts,
                    delay,
                    error,
                });
                delay
            }
        };
        pause(call, delay).await?;
        call.scope.add(&Tally {
            retries: 1,
            ..Tally::default()
        });
    }
}

/// Decides what follows from a failed attempt, and gives its permit back.
fn next_step<'a>(call: &mut Call<'a>, permit: DeploymentPermit<'a>, error: Error) -> NextStep {
    let stack = call.stack;
    if stack.poison.has_suspects()
        && let Some(signature) = Signature::of(&error)
    {
        call.record_end(CallEnd::Failed(signature));
    }
    // From here on `call` has no history, which `record_end` reads: it must come first. `judge` needs both.
    let history = call.history.take();
    let mut history = history.unwrap_or_else(|| Box::new(History::new(&stack.retry)));
    let rate = error.rate().cloned();
    let outcome = outcome(call, &permit, &history, &error);
    // Before the permit is given back: it may stop the lane, and then no other call may go.
    let next = history.judge(call, &permit, error);
    call.history = Some(history);
    permit.conclude(rate.as_ref(), outcome, &stack.observers);
    next
}

/// The outcome of a failed attempt for the lane.
fn outcome<'a>(
    call: &Call<'a>,
    permit: &DeploymentPermit<'_>,
    history: &History<'a>,
    error: &Error,
) -> CallOutcome {
    let charge = permit.deployment().output_charge();
    // The refusal of a single request does not stop the calls of others.
    let concerns_request =
        history.is_refused_alone(call, error) || FailureClass::of(error) == FailureClass::Doubtful;
    let wait = error.wait();
    match error.kind() {
        _ if concerns_request && error.billed() == Some(false) => CallOutcome::Failed {
            usage: Some(Usage::default()),
        },
        ErrorKind::Throttled if !concerns_request => CallOutcome::Throttled { wait },
        ErrorKind::Overloaded if !concerns_request => CallOutcome::Overloaded { wait },
        _ => CallOutcome::Failed {
            usage: charged_for_failure(charge, call.input.at(permit.index()), error),
        },
    }
}

/// Returns how long the provider asks this call to wait after a refusal for which its lane does not wait.
///
/// Where there are other deployments, one of them may take the call at once.
fn own_wait(call: &Call<'_>, error: &Error) -> Duration {
    let deployments = &call.stack.deployments;
    let is_only = deployments.iter().len() == 1;
    let wait = error
        .wait()
        .filter(|wait| is_only && *wait <= LONGEST_RETRY_AFTER);
    let wait = wait.filter(|wait| *wait > deployments.cooldown(&call.route));
    wait.unwrap_or_default()
}

/// Waits before the next attempt, unless the call is ended meanwhile. In a box, because most calls never wait here.
fn pause<'b>(call: &Call<'b>, delay: Duration) -> BoxFuture<'b, Result<()>> {
    let (scope, attempts): (&'b Scope, _) = (call.scope, call.attempts);
    async move {
        if delay.is_zero() {
            return Ok(());
        }
        let waited = scope.bounds.before_send(sleep(delay)).await;
        waited.map_err(|error| error.exhausted(attempts))
    }
    .boxed()
}
