//! [`Context::join`], [`join_best_effort`](Context::join_best_effort) and [`stage`](Context::stage): several
//! futures at the same time, and named steps.

use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;

use futures::{FutureExt as _, future};
use tokio::time::{Instant, timeout};

use crate::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;

/// A tuple of two to eight futures, the argument of [`Context::join`].
pub trait Join: Send {
    /// The tuple of the outputs.
    type Output;

    /// Awaits all futures at the same time.
    fn concurrently(self) -> impl Future<Output = Self::Output> + Send;

    /// Awaits one future after the other, in the order of the tuple.
    fn sequentially(self) -> impl Future<Output = Self::Output> + Send;
}

macro_rules! join {
    ($($future:ident)+) => {
        impl<$($future: Future<Output: Send> + Send),+> Join for ($($future,)+) {
            type Output = ($($future::Output,)+);

            #[allow(non_snake_case)]
            async fn concurrently(self) -> Self::Output {
                let ($($future,)+) = self;
                tokio::join!($($future),+)
            }

            #[allow(non_snake_case)]
            async fn sequentially(self) -> Self::Output {
                let ($($future,)+) = self;
                ($($future.await,)+)
            }
        }
    };
}
join!(A B);
join!(A B C);
join!(A B C D);
join!(A B C D E);
join!(A B C D E F);
join!(A B C D E F G);
join!(A B C D E F G H);

impl Context {
    /// Awaits several futures at the same time, each to its end. While the context's
    /// [`ParallelToggle`](super::ParallelToggle) is off, awaits one after the other in the order of the tuple.
    ///
    /// A step that needs the result of another belongs into the same future, or behind the join: then the toggle
    /// changes how long the work takes, and nothing else.
    ///
    /// ```
    /// # use throughline::{Context, testing::Scripted};
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
    /// # let cx = Context::builder(Scripted::new().reply("a").reply("b")).build();
    /// let (river, mountain) = cx
    ///     .join((cx.generate("Name a river."), cx.generate("Name a mountain.")))
    ///     .await;
    /// assert_ne!(river?.text, mountain?.text);
    /// # Ok(()) }
    /// ```
    ///
    /// # Cancel safety
    /// Dropping it drops all the futures.
    pub async fn join<J: Join>(&self, futures: J) -> J::Output {
        // Boxed, because futures that hold futures by value triple with every level of a graph.
        if self.is_parallel() {
            Box::pin(futures.concurrently()).await
        } else {
            Box::pin(futures.sequentially()).await
        }
    }

    /// Awaits `work`, and `update` at the same time as far as that costs `work` nothing: a progress message to a
    /// user, for example.
    ///
    /// Both start together. An update that fails or panics does not fail the work. An update that takes longer than
    /// the work delays the result by the grace period at most
    /// ([`ContextBuilder::best_effort_grace`](crate::ContextBuilder::best_effort_grace), 1 s unless set); then it is
    /// dropped, and its result is an [`ErrorKind::Timeout`].
    ///
    /// While the context's [`ParallelToggle`](super::ParallelToggle) is off, the update starts after the work and gets
    /// as much time as it would have had in parallel.
    ///
    /// ```
    /// # use throughline::{Context, Result, testing::Scripted};
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<()> {
    /// # let cx = Context::builder(Scripted::new().reply("hello")).build();
    /// let update = async { Err::<(), _>(throughline::Error::other("the socket is closed")) };
    /// let (reply, update) = cx.join_best_effort(cx.generate("hi"), update).await;
    /// assert_eq!(reply?.text, "hello");
    /// assert!(update.is_err());
    /// # Ok(()) }
    /// ```
    ///
    /// # Cancel safety
    /// Dropping it drops both futures.
    pub async fn join_best_effort<W, U>(
        &self,
        work: impl Future<Output = W>,
        update: impl Future<Output = Result<U>>,
    ) -> (W, Result<U>) {
        let grace = self.best_effort_grace();
        // Boxed, because futures that hold futures by value triple with every level of a graph.
        let work = Box::pin(work);
        let update = AssertUnwindSafe(Box::pin(update)).catch_unwind();
        let (work, update) = if self.is_parallel() {
            match future::select(work, pin!(update)).await {
                future::Either::Left((work, update)) => (work, timeout(grace, update).await),
                future::Either::Right((update, work)) => (work.await, Ok(update)),
            }
        } else {
            // The same time as in parallel, so that the results are the same.
            let began = Instant::now();
            let work = work.await;
            (work, timeout(began.elapsed() + grace, update).await)
        };
        let update = match update {
            Ok(Ok(result)) => result,
            Ok(Err(panic)) => Err(Error::panicked(panic)),
            Err(_) => Err(Error::new(
                ErrorKind::Timeout,
                format!("the update was not done {grace:?} after the work"),
            )),
        };
        (work, update)
    }

    /// Runs a named step (a call, or any other work) in a child context with this label, and reports to the observers
    /// how long it took ([`Event::StageEnded`]).
    ///
    /// A step that panics fails with the panic as its error.
    ///
    /// ```
    /// # use throughline::{Context, testing::Scripted};
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
    /// # async fn load_profile() -> throughline::Result<String> { Ok("profile".into()) }
    /// # let cx = Context::builder(Scripted::new().reply("a")).build();
    /// let profile = cx.stage("profile", |_| load_profile()).await?;
    /// let advice = cx.stage("advice", async |cx| cx.generate(profile).await).await?;
    /// # let _ = advice;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// The error of the step.
    ///
    /// # Cancel safety
    /// Dropping it drops the step, and no event is sent.
    pub async fn stage<T, F, Fut>(&self, label: impl Into<Arc<str>>, work: F) -> Result<T>
    where
        F: FnOnce(Self) -> Fut,
        Fut: Future<Output = Result<T>>,
    {
        let cx = self.child(label);
        let started = Instant::now();
        let result = AssertUnwindSafe(async { work(cx.clone()).await })
            .catch_unwind()
            .await
            .unwrap_or_else(|panic| Err(Error::panicked(panic)));
        cx.observers().tell(|| Event::StageEnded {
            path: cx.path(),
            elapsed: started.elapsed(),
            error: result.as_ref().err().cloned(),
        });
        result
    }
}
