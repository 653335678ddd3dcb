//! One attempt: one call to the provider of the deployment that was chosen.

use std::time::Duration;

use tracing::{Instrument as _, Span, field};

use super::Call;
use super::scope::{Scope, Tally};
use crate::error::{ErrorKind, Result};
use crate::event::Event;
use crate::request::{Reply, Request};

/// Makes one call, within its timeout and the bounds of its scope, in a span by the OpenTelemetry GenAI conventions.
/// Counts the call and reports it to the observers.
pub(super) async fn call(call: &mut Call<'_>) -> Result<Reply> {
    let (stack, scope) = (call.stack, call.scope);
    let attempt = call.attempts + 1;
    stack.observers.tell(|| Event::CallStarted {
        path: scope.path(),
        attempt,
    });
    let adapted = call.deployment.adapt(call.request);
    let request = adapted.as_deref().unwrap_or(call.request);
    let limit = request.timeout.unwrap_or(stack.call_timeout);
    let provider = &*call.deployment.provider;
    let span = span(provider.name(), request);
    let sent = match call.deltas {
        None => provider.generate(request),
        Some(deltas) => Box::pin(deltas.call(provider, request)),
    };
    let unfinished = Unfinished(Some(scope));
    let result = if span.is_disabled() {
        scope.bounds.in_flight(limit, sent).await
    } else {
        let sent = scope.bounds.in_flight(limit, sent);
        Box::pin(sent.instrument(span.clone())).await
    };
    let result = match call.deltas {
        Some(deltas) => result.map_err(|error| deltas.judge(error)),
        None => result,
    };
    unfinished.finished();
    record(&span, &result);
    scope.add(&tally_of(&result));
    if let Ok(reply) = &result {
        stack.observers.tell(|| Event::CallSucceeded {
            path: scope.path(),
            attempt,
            elapsed: call.sent_at.map_or(Duration::ZERO, |sent| sent.elapsed()),
            usage: reply.usage,
        });
    }
    result
}

/// Counts an attempt that ends without a result, because its future is dropped or the provider panics. It may be
/// billed.
struct Unfinished<'a>(Option<&'a Scope>);

impl Unfinished<'_> {
    fn finished(mut self) {
        self.0 = None;
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Some(scope) = self.0 {
            scope.add(&Tally {
                attempts: 1,
                failed: 1,
                ambiguous: 1,
                ..Tally::default()
            });
        }
    }
}

/// Returns the counters for the end of an attempt. An answer is the end of its request too.
fn tally_of(result: &Result<Reply>) -> Tally {
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
    // Even a disabled span evaluates each of its fields.
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
