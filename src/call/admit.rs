//! Admission: chooses a deployment for the next attempt and waits for a permit of its lane.

use std::pin::pin;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::time::{Instant, timeout};

use super::deployments::DeploymentPermit;
use super::entry::MemoEntry;
use super::estimate::charged;
use super::failures::CallEnd;
use super::scope::Scope;
use super::{Call, attempt};
use crate::error::{Error, ErrorKind, Result};
use crate::provider::OutputCharge;
use crate::ratelimit::{CallOutcome, Need};
use crate::request::Reply;

/// The time that an intent has to be written after its call has been cancelled.
const INTENT_GRACE: Duration = Duration::from_secs(1);

/// Waits for a permit and makes one attempt with it.
///
/// If the attempt fails, its permit is left in [`Call::permit`], because the reaction to the failure must come before the
/// next call can go. If nothing was sent, there is no permit.
pub(super) async fn call(call: &mut Call<'_>) -> Result<Reply> {
    let (stack, scope) = (call.stack, call.scope);
    scope.bounds.check()?;
    check_refusal(call)?;
    let mut permit = match stack.deployments.try_acquire(need(call), &mut call.route) {
        Some(permit) => permit,
        None => wait(call).await?,
    };
    if call.history.is_some() {
        check_refusal(call)?;
        // The first attempt is always sent: without it, faster times would never be noticed.
        check_deadline(call)?;
    }
    if let Some((_, entry)) = call.memo {
        // With the permit in hand, so that requests that only wait in a queue are not recorded as sent.
        write_intent(scope, entry).await?;
    }
    permit.mark_sent();
    let (number, is_sampled) = stack.estimator.number();
    call.was_sent = true;
    call.number = number;
    // Skips the clock read when no observer or estimator needs it.
    call.sent_at = (is_sampled || stack.observers.listen()).then(Instant::now);
    call.deployment = permit.deployment();
    call.permit = Some(permit);
    let reply = attempt::call(call).await?;
    if let Some(permit) = call.permit.take() {
        answered(call, permit, &reply, is_sampled);
    }
    Ok(reply)
}

/// Gives the permit of an answered call back, with everything that its lane and others learn from the answer.
fn answered(call: &Call<'_>, permit: DeploymentPermit<'_>, reply: &Reply, is_sampled: bool) {
    let stack = call.stack;
    let health = call.health(&permit);
    let usage = charged(call.deployment.output_charge(), call.request, reply.usage);
    let outcome = CallOutcome::Succeeded { usage: Some(usage) };
    permit.conclude(reply.rate.as_deref(), outcome, &stack.observers);
    if health.answered(call.number) {
        call.deployment.lane.end_probing();
    }
    if stack.poison.has_suspects() {
        call.record_end(CallEnd::Answered);
    }
    if let Some(sent_at) = call.sent_at.filter(|_| is_sampled) {
        stack.estimator.learn(call.scope, reply.usage, sent_at);
    }
    stack.budget.earn();
    stack.answers.fetch_add(1, Ordering::Relaxed);
}

/// Returns what the request needs at a deployment, by its index.
fn need<'a>(call: &Call<'a>) -> impl Fn(usize) -> Need + Send + Sync + use<'a> {
    let (stack, scope, request) = (call.stack, call.scope, call.request);
    let input = call.input.clone();
    move |index| {
        let charge = stack.deployments.get(index).output_charge();
        let output = stack.estimator.output(scope, request, charge);
        Need::new(input.at(index), output)
            .output_deferred(charge == OutputCharge::Produced)
            .of(scope.queue)
    }
}

/// Waits for a permit. In a box, so that the many calls that need not wait are not as large as this.
fn wait<'a, 'b>(call: &'b mut Call<'a>) -> BoxFuture<'b, Result<DeploymentPermit<'a>>> {
    let (need, scope, stack) = (need(call), call.scope, call.stack);
    let permit = stack.deployments.acquire(need, &mut call.route);
    async move { scope.bounds.before_send(permit).await? }.boxed()
}

/// Fails if the last attempt was refused with an error that may concern the whole account, and other calls have shown by
/// now that it concerns this request alone.
fn check_refusal(call: &mut Call<'_>) -> Result<()> {
    let health = &call.stack.health;
    let history = call.history.as_mut();
    match history.and_then(|history| history.own_refusal(health)) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Fails if nine of ten calls take longer than the time until the deadline.
fn check_deadline(call: &Call<'_>) -> Result<()> {
    let Some(deadline) = call.scope.bounds.deadline else {
        return Ok(());
    };
    let fast = call.stack.estimator.latency(call.scope, 0.1);
    let answered = Instant::now().checked_add(fast.unwrap_or_default());
    if answered.is_none_or(|answered| answered >= deadline) {
        let message = "not even a fast call would be answered before the deadline";
        return Err(Error::new(ErrorKind::DeadlineExceeded, message));
    }
    Ok(())
}

/// Records in the store that the call is about to be sent. In a box, because calls without a store have no intent.
fn write_intent<'b>(scope: &'b Scope, entry: &'b MemoEntry) -> BoxFuture<'b, Result<()>> {
    async move {
        let mut written = pin!(entry.write_intent());
        if let Err(ended) = scope.bounds.before_send(written.as_mut()).await {
            // It may be on its way to the store: once it is there, the end of the call can delete it.
            let _ = timeout(INTENT_GRACE, written).await;
            return Err(ended);
        }
        scope.bounds.check()
    }
    .boxed()
}
