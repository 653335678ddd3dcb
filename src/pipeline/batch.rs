//! Collects a [`Batch`] of a [`Pipeline`]: [`settle`](Batch::settle), [`try_all`](Batch::try_all) and
//! [`stream`](Batch::stream) with the context in which the items run.

use std::sync::Arc;

use futures::Stream;

use super::Pipeline;
use crate::batch::{Batch, Outcomes, Settled};
use crate::context::Context;
use crate::error::Result;

/// Collecting a batch of a pipeline.
impl<P, S> Batch<P, S>
where
    P: Pipeline,
    S: Stream<Item = P::Input> + Send,
{
    /// Runs the pipeline on every input and returns all outcomes, in input order. Never fails.
    ///
    /// # Cancel safety
    /// Dropping it drops the items: no further call is sent, and calls in flight may be billed.
    pub async fn settle(self, cx: &Context) -> Settled<P::Output> {
        let (pipeline, batch) = self.bind(cx.clone());
        let pipeline = &pipeline;
        batch
            .settle(|cx, input| async move { pipeline.run(&cx, input).await })
            .await
    }

    /// Runs the pipeline on every input and returns all values in input order, or the first failure.
    ///
    /// # Errors
    /// The first failure, with the path of its item ([`Error::item`](crate::Error::item)). After it, no further call is
    /// sent; calls in flight are paid for already, so `try_all` waits for them. If the context drains, is
    /// cancelled or reaches its deadline before all inputs were taken, the error says so:
    /// there are never fewer values than inputs.
    ///
    /// # Cancel safety
    /// As [`settle`](Self::settle).
    pub async fn try_all(self, cx: &Context) -> Result<Vec<P::Output>> {
        let (pipeline, batch) = self.bind(cx.clone());
        let pipeline = &pipeline;
        batch
            .try_all(|cx, input| async move { pipeline.run(&cx, input).await })
            .await
    }

    /// Runs the pipeline on every input and yields the outcomes as they come. See [`Outcomes`].
    ///
    /// # Panics
    /// Outside a Tokio runtime.
    pub fn stream(self, cx: &Context) -> Outcomes<P::Output>
    where
        P: 'static,
        S: 'static,
        P::Input: 'static,
        P::Output: 'static,
    {
        let (pipeline, batch) = self.bind(cx.clone());
        let pipeline = Arc::new(pipeline);
        batch.stream(move |cx, input| {
            let pipeline = Arc::clone(&pipeline);
            async move { pipeline.run(&cx, input).await }
        })
    }
}
