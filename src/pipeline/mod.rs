//! [`Pipeline`]: the trait that users implement, and its adapters.

mod adapters;
mod batch;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;

pub use self::adapters::{Map, OrElse, Then, Timeout};
use crate::batch::{Batch, IntoInputs};
use crate::context::Context;
use crate::error::Result;

/// An async function from `Input` to `Output` that gets a [`Context`].
///
/// The function is ordinary Rust: `?`, `if`, `join!`, loops. Every call that goes through
/// the context is paced, retried and counted; [`Context::fan_out`] runs a step for many inputs.
///
/// Implement the trait with a plain `async fn`, or make a pipeline of a closure with [`pipeline()`].
///
/// ```
/// use throughline::{Context, Pipeline, PipelineExt as _, Result, testing::Scripted};
///
/// struct Translate {
///     language: &'static str,
/// }
///
/// impl Pipeline for Translate {
///     type Input = String;
///     type Output = String;
///
///     fn name(&self) -> &str {
///         "translate"
///     }
///
///     async fn run(&self, cx: &Context, text: String) -> Result<String> {
///         let prompt = format!("Translate into {}: {text}", self.language);
///         Ok(cx.generate(prompt).await?.text)
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<()> {
/// let cx = Context::builder(Scripted::new().reply("Fluss").reply("Berg")).build();
/// let texts = ["river".to_owned(), "mountain".to_owned()];
/// let german = Translate { language: "German" }.batch(texts).sequential().settle(&cx).await;
/// assert_eq!(german.all()?, ["Fluss", "Berg"]);
/// # Ok(()) }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a `Pipeline`",
    label = "this is not a `Pipeline`",
    note = "implement `Pipeline` with `async fn run(&self, cx: &Context, input: Input) -> Result<Output>`,",
    note = "or wrap a closure: `pipeline(\"name\", async |cx: Context, input: Input| {{ .. }})`"
)]
pub trait Pipeline: Send + Sync {
    /// The input of one run.
    type Input: Send;
    /// The output of one run.
    type Output: Send;

    /// Returns a short, stable name, under which paths, logs and stores show the pipeline.
    fn name(&self) -> &str;

    /// Runs the pipeline on one input.
    ///
    /// # Errors
    /// The error of the work inside. Wrap errors of other types with [`Error::other`](crate::Error::other).
    fn run(
        &self,
        cx: &Context,
        input: Self::Input,
    ) -> impl Future<Output = Result<Self::Output>> + Send;
}

/// Adapters and batches for every [`Pipeline`].
///
/// ```
/// use std::time::Duration;
/// use throughline::{Context, Error, Pipeline as _, PipelineExt as _, pipeline};
/// # use throughline::testing::Scripted;
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> throughline::Result<()> {
/// let count = pipeline("count", async |cx: Context, text: String| {
///     let reply = cx.generate(format!("How many words? {text}")).await?;
///     reply.text.parse::<usize>().map_err(Error::other)
/// });
/// let by_hand = pipeline("by-hand", async |_cx, text: String| {
///     Ok(text.split_whitespace().count())
/// });
/// let double = pipeline("double", async |_cx, n: usize| Ok(2 * n));
///
/// let chain = count
///     .timeout(Duration::from_secs(60))
///     .or_else(by_hand)
///     .then(double)
///     .map(|n| format!("{n} words"));
/// assert_eq!(chain.name(), "count>double");
///
/// let cx = Context::builder(Scripted::new().reply("two or three")).build();
/// assert_eq!(chain.run(&cx, "one two".to_owned()).await?, "4 words");
/// # Ok(()) }
/// ```
pub trait PipelineExt: Pipeline + Sized {
    /// Makes a batch that runs the pipeline on many inputs, from any iterator or stream.
    ///
    /// It takes the pipeline by value, as iterator adapters do: batch `&pipeline` to keep the pipeline, and
    /// `Arc<pipeline>` to keep it and [`stream`](Batch::stream).
    fn batch<M, I>(self, inputs: I) -> Batch<Self, I::Stream>
    where
        I: IntoInputs<M, Item = Self::Input>,
    {
        let label = self.name().into();
        Batch::new(self, label, inputs.into_inputs())
    }

    /// Passes the output to `next`. The name is `first>next`.
    fn then<P: Pipeline<Input = Self::Output>>(self, next: P) -> Then<Self, P> {
        Then::new(self, next)
    }

    /// Applies `f` to the output.
    fn map<T: Send, F>(self, f: F) -> Map<Self, F>
    where
        F: Fn(Self::Output) -> T + Send + Sync,
    {
        Map::new(self, f)
    }

    /// Runs `fallback` on the same input when this pipeline fails, for example a
    /// cheaper model or a fixed answer. The error of a cancelled or expired context is returned without running it.
    fn or_else<P>(self, fallback: P) -> OrElse<Self, P>
    where
        P: Pipeline<Input = Self::Input, Output = Self::Output>,
        Self::Input: Clone,
    {
        OrElse::new(self, fallback)
    }

    /// Fails a run that takes longer than `limit`
    /// with [`ErrorKind::DeadlineExceeded`](crate::ErrorKind::DeadlineExceeded).
    fn timeout(self, limit: Duration) -> Timeout<Self> {
        Timeout::new(self, limit)
    }

    /// Erases the type, for lists and registries of pipelines.
    fn boxed(self) -> BoxPipeline<Self::Input, Self::Output>
    where
        Self: 'static,
    {
        BoxPipeline(Arc::new(self))
    }
}

impl<P: Pipeline> PipelineExt for P {}

macro_rules! forward {
    ($($(#[$allow:meta])* [$($generics:tt)*] $holder:ty),+) => {$(
        impl<$($generics)*> Pipeline for $holder {
            type Input = P::Input;
            type Output = P::Output;

            fn name(&self) -> &str {
                (**self).name()
            }

            async fn run(&self, cx: &Context, input: P::Input) -> Result<P::Output> {
                (**self).run(cx, input).await
            }
        }
    )+};
}
forward!([P: Pipeline + ?Sized] &P, [P: Pipeline + ?Sized] Arc<P>, [P: Pipeline + ?Sized] Box<P>);

/// Makes a pipeline of an async closure that takes a context and an input.
///
/// The closure may borrow the values it captures; then the pipeline lives as long as they do. A pipeline that a
/// [`Worker`](crate::Worker) registers, or whose batch is [streamed](Batch::stream), must not borrow: use a closure that
/// captures nothing, or a struct with fields that implements [`Pipeline`].
///
/// ```
/// use throughline::{Context, PipelineExt as _, pipeline};
///
/// let question = String::from("How many words?");
/// let count_words = pipeline("count-words", async |cx: Context, text: String| {
///     let reply = cx.generate(format!("{question} {text}")).await?;
///     reply.text.parse::<u32>().map_err(throughline::Error::other)
/// });
/// let guarded = count_words.timeout(std::time::Duration::from_secs(60));
/// # let _ = guarded;
/// ```
pub fn pipeline<I, O, F, Fut>(name: impl Into<Arc<str>>, run: F) -> FnPipeline<I, F>
where
    F: Fn(Context, I) -> Fut + Send + Sync,
    Fut: Future<Output = Result<O>> + Send,
    I: Send,
    O: Send,
{
    FnPipeline {
        name: name.into(),
        run,
        input: std::marker::PhantomData,
    }
}

/// A pipeline made of a closure ([`pipeline()`]).
#[must_use = "a pipeline does nothing until it is run"]
pub struct FnPipeline<I, F> {
    name: Arc<str>,
    run: F,
    input: std::marker::PhantomData<fn(I)>,
}

/// Does not require the input to be `Clone`, so that one pipeline can be submitted to and registered.
impl<I, F: Clone> Clone for FnPipeline<I, F> {
    fn clone(&self) -> Self {
        Self {
            name: Arc::clone(&self.name),
            run: self.run.clone(),
            input: self.input,
        }
    }
}

impl<I, O, F, Fut> Pipeline for FnPipeline<I, F>
where
    F: Fn(Context, I) -> Fut + Send + Sync,
    Fut: Future<Output = Result<O>> + Send,
    I: Send,
    O: Send,
{
    type Input = I;
    type Output = O;

    fn name(&self) -> &str {
        &self.name
    }

    async fn run(&self, cx: &Context, input: I) -> Result<O> {
        (self.run)(cx.clone(), input).await
    }
}

/// A pipeline whose type is erased; cheap to clone ([`PipelineExt::boxed`]).
pub struct BoxPipeline<I, O>(Arc<dyn ErasedPipeline<I, O>>);

impl<I, O> Clone for BoxPipeline<I, O> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<I, O> fmt::Debug for BoxPipeline<I, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("BoxPipeline").field(&self.0.name()).finish()
    }
}

impl<I: Send, O: Send> Pipeline for BoxPipeline<I, O> {
    type Input = I;
    type Output = O;

    fn name(&self) -> &str {
        self.0.name()
    }

    async fn run(&self, cx: &Context, input: I) -> Result<O> {
        self.0.run(cx, input).await
    }
}

/// The object-safe form of [`Pipeline`], whose `run` returns a type that a vtable cannot name.
trait ErasedPipeline<I, O>: Send + Sync {
    fn name(&self) -> &str;
    fn run<'a>(&'a self, cx: &'a Context, input: I) -> BoxFuture<'a, Result<O>>
    where
        I: 'a;
}

impl<P: Pipeline> ErasedPipeline<P::Input, P::Output> for P {
    fn name(&self) -> &str {
        Pipeline::name(self)
    }

    fn run<'a>(&'a self, cx: &'a Context, input: P::Input) -> BoxFuture<'a, Result<P::Output>>
    where
        P::Input: 'a,
    {
        Box::pin(Pipeline::run(self, cx, input))
    }
}
