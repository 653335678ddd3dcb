//! [`Batch`]: runs one piece of work on many inputs, with a parallelism and a rule for collecting the outcomes.

mod engine;
mod inputs;
mod intake;
mod limit_report;
mod settled;

use std::sync::Arc;

use futures::{Stream, StreamExt as _};
use tokio::sync::Semaphore;
use tokio::time::Instant;

pub use self::engine::{Outcomes, Progress};
pub use self::inputs::IntoInputs;
use self::intake::{CutShort, yield_after};
pub use self::settled::{Outcome, Settled};
use crate::context::Context;
use crate::error::Result;
use crate::ratelimit::Priority;

/// The default number of items that run at a time: enough that the lane, which paces the calls, is the limit for most
/// accounts.
const DEFAULT_PARALLELISM: usize = 64;

/// The most outcomes for which memory is reserved in advance, because inputs may report any length.
const MOST_RESERVED: usize = 1 << 16;

impl Context {
    /// Makes a batch that runs one closure on many inputs, each item in a context of its own under `label`.
    ///
    /// See [`Batch`] for the parallelism and for collecting the outcomes.
    pub fn fan_out<M, I: IntoInputs<M>>(
        &self,
        label: impl Into<Arc<str>>,
        inputs: I,
    ) -> Batch<Self, I::Stream> {
        Batch::new(self.clone(), label.into(), inputs.into_inputs())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Parallelism {
    JoinAll,
    Buffered(usize),
    Unordered(usize),
    Chunks(usize),
}

impl Parallelism {
    /// The number of items of a stream that may run or wait for the consumer.
    fn window(self) -> usize {
        match self {
            Self::JoinAll => Semaphore::MAX_PERMITS,
            // Twice as many as may run, so that a slow consumer does not idle the lane.
            Self::Buffered(n) | Self::Unordered(n) | Self::Chunks(n) => {
                n.saturating_mul(2).min(Semaphore::MAX_PERMITS)
            }
        }
    }
}

/// One piece of work for many inputs: choose the parallelism, then collect the outcomes.
///
/// | parallelism | runs | a stream yields |
/// |---|---|---|
/// | [`join_all`](Self::join_all) | all at once | as they end |
/// | [`buffer_unordered(n)`](Self::buffer_unordered) | n at a time (64 unless set) | as they end |
/// | [`buffered(n)`](Self::buffered) | n at a time | in input order |
/// | [`chunks(n)`](Self::chunks) | n together, then the next n | as they end |
/// | [`sequential`](Self::sequential) | one at a time | in input order |
///
/// | collection | gives |
/// |---|---|
/// | `settle` | [`Settled`]: all outcomes, in input order; never fails |
/// | `try_all` | all values, or the first failure, after which no further call is sent |
/// | `stream` | [`Outcomes`]: each outcome as it comes, with memory for the items in flight only |
///
/// Only calls hold permits, not items, so fan-outs can be nested without deadlock. A panic in an item is caught and
/// fails that item; a panic of the iterator of inputs is not caught.
///
/// A batch of a pipeline collects with `settle(&cx)`, a fan-out of a context with
/// `settle(async |cx, input| { .. })`. All items share one borrow of what such a closure captures, here a `String`, and it
/// may contain fan-outs of its own. [`stream`](Self::stream) needs an owned closure and shows how to write one.
///
/// ```
/// use throughline::{Context, testing::Scripted};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
/// # let cx = Context::builder(Scripted::new().reply("a").reply("b").reply("c")).build();
/// let style = String::from("in one sentence");
/// let rivers = cx
///     .fan_out("river", ["Danube", "Rhine", "Po"])
///     .key(|name| name.to_string())
///     .buffer_unordered(2)
///     .on_progress(|progress| eprintln!("{progress}"))
///     .settle(async |cx, name| cx.generate(format!("Describe the {name} {style}.")).await)
///     .await;
/// assert_eq!(rivers.all()?.len(), 3);
/// # Ok(()) }
/// ```
#[must_use = "a batch does nothing until it is collected: `settle`, `try_all` or `stream`"]
pub struct Batch<W, S: Stream> {
    work: W,
    label: Arc<str>,
    inputs: S,
    parallelism: Parallelism,
    key: Option<KeyFn<S::Item>>,
    priority: Option<Priority>,
    on_progress: Option<ProgressFn>,
}

pub(crate) type KeyFn<T> = Box<dyn Fn(&T) -> String + Send>;
pub(crate) type ProgressFn = Box<dyn Fn(&Progress) + Send + Sync>;

impl<W, S: Stream> Batch<W, S> {
    pub(crate) fn new(work: W, label: Arc<str>, inputs: S) -> Self {
        Self {
            work,
            label,
            inputs,
            parallelism: Parallelism::Unordered(DEFAULT_PARALLELISM),
            key: None,
            priority: None,
            on_progress: None,
        }
    }

    /// Takes the work out and puts `cx` in its place, for a fan-out of `cx` that is otherwise the same.
    pub(crate) fn bind(self, cx: Context) -> (W, Batch<Context, S>) {
        let batch = Batch {
            work: cx,
            label: self.label,
            inputs: self.inputs,
            parallelism: self.parallelism,
            key: self.key,
            priority: self.priority,
            on_progress: self.on_progress,
        };
        (self.work, batch)
    }

    fn parallelism(mut self, parallelism: Parallelism) -> Self {
        self.parallelism = parallelism;
        self
    }

    /// Starts all items at once. Memory grows with the number of inputs; the lane still paces the calls.
    pub fn join_all(self) -> Self {
        self.parallelism(Parallelism::JoinAll)
    }

    /// Runs `n` items at a time and yields their outcomes in input order. An outcome waits for those of earlier
    /// items.
    ///
    /// # Panics
    /// If `n` is 0.
    #[track_caller]
    pub fn buffered(self, n: usize) -> Self {
        assert!(n > 0, "Batch::buffered: no item would ever run with n = 0");
        self.parallelism(Parallelism::Buffered(n))
    }

    /// Runs `n` items at a time and yields their outcomes as they end.
    ///
    /// This limits the items, of which each may make many calls; [`Pace::in_flight`](crate::Pace::in_flight)
    /// limits the calls of all batches together.
    ///
    /// # Panics
    /// If `n` is 0.
    #[track_caller]
    #[doc(alias = "concurrency")]
    pub fn buffer_unordered(self, n: usize) -> Self {
        assert!(
            n > 0,
            "Batch::buffer_unordered: no item would ever run with n = 0"
        );
        self.parallelism(Parallelism::Unordered(n))
    }

    /// Runs `n` items together, and the next `n` when all of them have ended.
    ///
    /// # Panics
    /// If `n` is 0.
    #[track_caller]
    pub fn chunks(self, n: usize) -> Self {
        assert!(n > 0, "Batch::chunks: no item would ever run with n = 0");
        self.parallelism(Parallelism::Chunks(n))
    }

    /// Runs one item at a time.
    pub fn sequential(self) -> Self {
        self.buffered(1)
    }

    /// Gives each item a key, which outcomes, events and ledgers show instead of the index. A panic in `f` fails the
    /// item.
    ///
    /// Keys should be unique. With a [store](crate::ContextBuilder::store), the answers of an item are found by its
    /// key. Items of one batch with the same key are distinguished by their order, so that each has answers
    /// of its own. That takes 8 to 16 bytes of memory for each key of the batch.
    pub fn key(mut self, f: impl Fn(&S::Item) -> String + Send + 'static) -> Self {
        self.key = Some(Box::new(f));
        self
    }

    /// Sets the priority of the calls; the default is the priority of the context.
    pub fn priority(mut self, priority: Priority) -> Self {
        self.priority = Some(priority);
        self
    }

    /// Calls `f` after each item. A panic in it is caught and counted.
    pub fn on_progress(mut self, f: impl Fn(&Progress) + Send + Sync + 'static) -> Self {
        self.on_progress = Some(Box::new(f));
        self
    }
}

/// Collecting a fan-out of a context.
impl<T: Send, S: Stream<Item = T> + Send> Batch<Context, S> {
    /// Runs `work` on every input and returns all outcomes, in input order. Never fails.
    ///
    /// # Cancel safety
    /// Dropping it drops the items: no further call is sent, and calls in flight may be billed.
    pub async fn settle<O, F, Fut>(self, work: F) -> Settled<O>
    where
        F: Fn(Context, T) -> Fut + Send,
        Fut: Future<Output = Result<O>> + Send,
        O: Send,
    {
        let began = Instant::now();
        // All outcomes are kept, so their memory is reserved once.
        let mut outcomes = Vec::with_capacity(self.inputs.size_hint().0.min(MOST_RESERVED));
        let mut running = self.run(work, None, None);
        while let Some(item) = running.next().await {
            outcomes.push(item.0);
            yield_after(outcomes.len()).await;
        }
        Settled::new(outcomes, began.elapsed())
    }

    /// Runs `work` on every input and returns all values in input order, or the first failure.
    ///
    /// # Errors
    /// The first failure, with the path of its item ([`Error::item`](crate::Error::item)). After it, no further call is
    /// sent; calls in flight are paid for already, so `try_all` waits for them. If the context drains, is
    /// cancelled or reaches its deadline before all inputs were taken, the error says so:
    /// there are never fewer values than inputs.
    ///
    /// # Cancel safety
    /// As [`settle`](Self::settle).
    pub async fn try_all<O, F, Fut>(mut self, work: F) -> Result<Vec<O>>
    where
        F: Fn(Context, T) -> Fut + Send,
        Fut: Future<Output = Result<O>> + Send,
        O: Send,
    {
        let began = Instant::now();
        let cx = self.work.child("");
        self.work = cx.clone();
        let label = Arc::clone(&self.label);
        let cut_short = CutShort::default();
        let mut failure = None;
        let mut outcomes = Vec::new();
        let mut running = self.run(work, Some((cx.clone(), Arc::clone(&cut_short))), None);
        while let Some(item) = running.next().await {
            let (outcome, _) = *item;
            if failure.is_none()
                && let Some(error) = outcome.error()
            {
                let name = outcome.name();
                failure = Some(error.clone().of_item(|| cx.item_path(&label, &name)));
                cx.drain();
            }
            outcomes.push(outcome);
            yield_after(outcomes.len()).await;
        }
        match failure.or_else(|| cut_short.get().cloned()) {
            Some(error) => Err(error),
            None => Settled::new(outcomes, began.elapsed()).all(),
        }
    }

    /// Runs `work` on every input and yields the outcomes as they come. See [`Outcomes`].
    ///
    /// The items run in a task of their own, so `work` cannot borrow: it owns the values it captures and gives a
    /// clone to each item.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use futures::StreamExt as _;
    /// use throughline::{Context, testing::Scripted};
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
    /// # let cx = Context::builder(Scripted::new().reply("a").reply("b")).build();
    /// let style: Arc<str> = "in one sentence".into();
    /// let mut rivers = cx.fan_out("river", ["Danube", "Rhine"]).stream(move |cx, name| {
    ///     let style = Arc::clone(&style);
    ///     async move { cx.generate(format!("Describe the {name} {style}.")).await }
    /// });
    /// while let Some(outcome) = rivers.next().await {
    ///     println!("{}", outcome.result?.text);
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Panics
    /// Outside a Tokio runtime.
    pub fn stream<O, F, Fut>(mut self, work: F) -> Outcomes<O>
    where
        F: Fn(Context, T) -> Fut + Send + 'static,
        Fut: Future<Output = Result<O>> + Send + 'static,
        S: 'static,
        T: 'static,
        O: Send + 'static,
    {
        let cx = self.work.child("");
        self.work = cx.clone();
        let window = Arc::new(Semaphore::new(self.parallelism.window()));
        let cut_short = CutShort::default();
        let stop = Some((cx.clone(), Arc::clone(&cut_short)));
        Outcomes::spawn(cx, self.run(work, stop, Some(window)), cut_short)
    }
}
