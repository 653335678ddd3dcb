//! [`Context::join`], [`alongside`](Context::alongside) and [`stage`](Context::stage): steps with
//! names, together or in turn.

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::{FutureExt as _, future};
use tokio::time::{Instant, timeout};

use crate::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;

/// A switch for parallelism, to be thrown while the service runs: without a deploy, and
/// with the same results.
///
/// While it is off, the batches of its contexts run one item at a time in input order, and
/// [`Context::join`] and [`Context::alongside`] await one thing after the other. What
/// has started already goes on as it is. Clones are one switch.
///
/// ```
/// use throughline::{Context, testing::Scripted, context::Switch};
///
/// let parallel = Switch::new(true);
/// let cx = Context::builder(Scripted::new()).parallel(&parallel).build();
/// parallel.set(false);
/// assert!(!cx.is_parallel());
/// ```
#[derive(Clone)]
pub struct Switch(Arc<AtomicBool>);

impl Switch {
    /// A switch that is on or off.
    pub fn new(on: bool) -> Self {
        Self(Arc::new(AtomicBool::new(on)))
    }

    /// Throws it.
    pub fn set(&self, on: bool) {
        self.0.store(on, Ordering::Relaxed);
    }

    /// Whether it is on.
    pub fn is_on(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Switch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Switch").field(&self.is_on()).finish()
    }
}

/// Several futures in a tuple, of two to eight: what [`Context::join`] takes.
pub trait Join: Send {
    /// The tuple of what they give.
    type Output;

    /// All of them at the same time.
    fn together(self) -> impl Future<Output = Self::Output> + Send;

    /// One after the other, in the order of the tuple.
    fn in_turn(self) -> impl Future<Output = Self::Output> + Send;
}

macro_rules! join {
    ($($future:ident)+) => {
        impl<$($future: Future<Output: Send> + Send),+> Join for ($($future,)+) {
            type Output = ($($future::Output,)+);

            #[allow(non_snake_case)]
            async fn together(self) -> Self::Output {
                let ($($future,)+) = self;
                tokio::join!($($future),+)
            }

            #[allow(non_snake_case)]
            async fn in_turn(self) -> Self::Output {
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
    /// Awaits several futures at the same time, and all to their end; while the context's
    /// [`Switch`] is off, one after the other in the order of the tuple.
    ///
    /// One that needs another's result is written as one future that awaits both, or as a
    /// step after the join: the switch then changes how long it takes, and nothing else.
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
    /// Dropping it drops them all.
    pub async fn join<J: Join>(&self, futures: J) -> J::Output {
        // Boxed, because futures that hold futures by value triple with every level of a graph.
        if self.is_parallel() {
            Box::pin(futures.together()).await
        } else {
            Box::pin(futures.in_turn()).await
        }
    }

    /// Runs `update` beside `work`, as "working on it" beside the work itself.
    ///
    /// Both start together. The result of `work` is never failed by the update, not even
    /// by a panic in it, and never delayed by more than a grace
    /// ([`ContextBuilder::alongside_grace`](crate::ContextBuilder::alongside_grace), 1 s unless set): an update that is
    /// not done by then is dropped and its result is an [`ErrorKind::Timeout`].
    ///
    /// While the context's [`Switch`] is off, the update starts behind the work and is given as long as
    /// it would have had beside it.
    ///
    /// ```
    /// # use throughline::{Context, Result, testing::Scripted};
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<()> {
    /// # let cx = Context::builder(Scripted::new().reply("hello")).build();
    /// let update = async { Err::<(), _>(throughline::Error::other("the socket is closed")) };
    /// let (reply, update) = cx.alongside(update, cx.generate("hi")).await;
    /// assert_eq!(reply?.text, "hello");
    /// assert!(update.is_err());
    /// # Ok(()) }
    /// ```
    ///
    /// # Cancel safety
    /// Dropping it drops both.
    pub async fn alongside<U, W>(
        &self,
        update: impl Future<Output = Result<U>>,
        work: impl Future<Output = W>,
    ) -> (W, Result<U>) {
        let grace = self.alongside_grace();
        // Boxed, because futures that hold futures by value triple with every level of a graph.
        let work = Box::pin(work);
        let update = AssertUnwindSafe(Box::pin(update)).catch_unwind();
        let (work, update) = if self.is_parallel() {
            match future::select(work, pin!(update)).await {
                future::Either::Left((work, update)) => (work, timeout(grace, update).await),
                future::Either::Right((update, work)) => (work.await, Ok(update)),
            }
        } else {
            // As long as it would have had beside the work, so that the results are the same.
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

    /// Runs a named step in a context of its own under `label`, be it a call or any other
    /// work, and tells the observers how long it took ([`Event::StageEnded`]).
    ///
    /// A panic in it is its failure.
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
    /// Those of the step.
    ///
    /// # Cancel safety
    /// Dropping it drops the step; nobody is told of its end.
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
