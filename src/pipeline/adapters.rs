//! The adapters of [`PipelineExt`](super::PipelineExt): pipelines around one or two others.

use std::time::Duration;

use tokio::time::timeout;

use super::Pipeline;
use crate::call::Tally;
use crate::context::Context;
use crate::error::{Error, ErrorKind, Result};

/// Runs one pipeline after the other ([`PipelineExt::then`](super::PipelineExt::then)).
#[derive(Debug, Clone)]
#[must_use = "a pipeline does nothing until it is run"]
pub struct Then<A, B> {
    first: A,
    next: B,
    name: String,
}

impl<A: Pipeline, B: Pipeline> Then<A, B> {
    pub(super) fn new(first: A, next: B) -> Self {
        let name = format!("{}>{}", first.name(), next.name());
        Self { first, next, name }
    }
}

impl<A: Pipeline, B: Pipeline<Input = A::Output>> Pipeline for Then<A, B> {
    type Input = A::Input;
    type Output = B::Output;

    fn name(&self) -> &str {
        &self.name
    }

    async fn run(&self, cx: &Context, input: A::Input) -> Result<B::Output> {
        let between = self.first.run(cx, input).await?;
        self.next.run(cx, between).await
    }
}

/// Applies a function to the output of a pipeline ([`PipelineExt::map`](super::PipelineExt::map)).
#[derive(Debug, Clone)]
#[must_use = "a pipeline does nothing until it is run"]
pub struct Map<P, F> {
    inner: P,
    f: F,
}

impl<P, F> Map<P, F> {
    pub(super) fn new(inner: P, f: F) -> Self {
        Self { inner, f }
    }
}

impl<P, T, F> Pipeline for Map<P, F>
where
    P: Pipeline,
    T: Send,
    F: Fn(P::Output) -> T + Send + Sync,
{
    type Input = P::Input;
    type Output = T;

    fn name(&self) -> &str {
        self.inner.name()
    }

    async fn run(&self, cx: &Context, input: P::Input) -> Result<T> {
        self.inner.run(cx, input).await.map(&self.f)
    }
}

/// Runs a fallback when a pipeline fails ([`PipelineExt::or_else`](super::PipelineExt::or_else)).
#[derive(Debug, Clone)]
#[must_use = "a pipeline does nothing until it is run"]
pub struct OrElse<P, Q> {
    inner: P,
    fallback: Q,
}

impl<P, Q> OrElse<P, Q> {
    pub(super) fn new(inner: P, fallback: Q) -> Self {
        Self { inner, fallback }
    }
}

impl<P, Q> Pipeline for OrElse<P, Q>
where
    P: Pipeline,
    P::Input: Clone,
    Q: Pipeline<Input = P::Input, Output = P::Output>,
{
    type Input = P::Input;
    type Output = P::Output;

    fn name(&self) -> &str {
        self.inner.name()
    }

    async fn run(&self, cx: &Context, input: P::Input) -> Result<P::Output> {
        match self.inner.run(cx, input.clone()).await {
            Err(error) if cx.check().is_ok() => {
                tracing::debug!(pipeline = self.name(), %error, "falling back");
                self.fallback.run(cx, input).await
            }
            result => result,
        }
    }
}

/// Whether any of the calls in `tally` was paid for; `None` if that is not known.
fn billed(tally: &Tally) -> Option<bool> {
    let failed = tally.overloaded + tally.timed_out + tally.transient + tally.failed;
    if tally.attempts > failed {
        return Some(true);
    }
    // Some transient failures are billed (a malformed reply), and most are not.
    let unknown = tally.ambiguous + tally.transient > 0;
    (!unknown).then_some(false)
}

/// Limits the duration of a pipeline ([`PipelineExt::timeout`](super::PipelineExt::timeout)).
#[derive(Debug, Clone)]
#[must_use = "a pipeline does nothing until it is run"]
pub struct Timeout<P> {
    inner: P,
    limit: Duration,
}

impl<P> Timeout<P> {
    pub(super) fn new(inner: P, limit: Duration) -> Self {
        Self { inner, limit }
    }
}

impl<P: Pipeline> Pipeline for Timeout<P> {
    type Input = P::Input;
    type Output = P::Output;

    fn name(&self) -> &str {
        self.inner.name()
    }

    async fn run(&self, cx: &Context, input: P::Input) -> Result<P::Output> {
        // The deadline ends calls with an error that says whether they were paid for. The timer ends other waits of
        // the pipeline.
        let bounded = cx.with_timeout(self.limit);
        match timeout(self.limit, self.inner.run(&bounded, input)).await {
            Ok(result) => result,
            Err(_) => {
                let message = format!("{} took longer than {:?}", self.name(), self.limit);
                let error = Error::new(ErrorKind::DeadlineExceeded, message);
                Err(error.with_billed(billed(&bounded.tally())))
            }
        }
    }
}
