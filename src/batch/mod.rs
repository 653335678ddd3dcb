//! [`Batch`]: many inputs through one piece of work, with a parallelism and a collection rule.

mod engine;
mod inputs;
mod intake;
mod open_items;
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

/// How many items run at a time unless the batch says otherwise: enough that the lane,
/// which paces the calls, is what limits most accounts.
const DEFAULT_PARALLELISM: usize = 64;

/// Inputs may say that there are more of them than there is memory.
const MOST_RESERVED: usize = 1 << 16;

impl Context {
    /// Many inputs through one closure, each item in a context of its own under `label`.
    ///
    /// See [`Batch`] for how many run at a time and how they are collected.
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
    /// How many outcomes of a stream may wait for the consumer or be under way.
    fn window(self) -> usize {
        match self {
            Self::JoinAll => Semaphore::MAX_PERMITS,
            // As many again as run, so that a slow consumer does not idle the lane.
            Self::Buffered(n) | Self::Unordered(n) | Self::Chunks(n) => {
                n.saturating_mul(2).min(Semaphore::MAX_PERMITS)
            }
        }
    }
}

/// Many inputs through one piece of work: choose how many run at a time, then how to collect.
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
/// | `settle` | [`Settled`]: every outcome, in input order; never fails |
/// | `try_all` | all values, or the first failure, after which nothing new is sent |
/// | `stream` | [`Outcomes`]: each outcome as it comes, in memory O(in flight) |
///
/// Items hold no permits, only the calls inside them do, so fan-outs can be nested
/// without deadlock. A panic in an item is that item's failure; a panic of the iterator
/// that makes the inputs is the caller's own and goes through.
///
/// A batch of a pipeline collects with `settle(&cx)`, a fan-out of a context with
/// `settle(async |cx, input| { .. })`. Such a closure borrows what it captures, here a `String`, for all items at
/// once, and may hold fan-outs of its own. [`stream`](Self::stream) needs an owned closure and shows how to write one.
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

    /// Starts every item at once. Memory grows with the inputs; the lane still paces the calls.
    pub fn join_all(self) -> Self {
        self.parallelism(Parallelism::JoinAll)
    }

    /// Runs `n` items at a time and yields in input order. An item that ends before its
    /// predecessors keeps its place until they have ended.
    ///
    /// # Panics
    /// If `n` is 0.
    #[track_caller]
    pub fn buffered(self, n: usize) -> Self {
        assert!(n > 0, "Batch::buffered: no item would ever run with n = 0");
        self.parallelism(Parallelism::Buffered(n))
    }

    /// Runs `n` items at a time and yields as they end.
    ///
    /// This bounds the items, of which each may make many calls; [`Pace::in_flight`](crate::Pace::in_flight)
    /// bounds the calls of all batches together.
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

    /// Names each item: outcomes, events and ledgers then say the key in the place of the
    /// index. A panic in `f` fails the item.
    ///
    /// Keys are best unique. Where there is a [store](crate::ContextBuilder::store), items are remembered by their
    /// keys; items of one batch with the same key are told apart by their order, so that each has answers
    /// of its own. That takes 8 to 16 bytes of memory for each key of the batch.
    pub fn key(mut self, f: impl Fn(&S::Item) -> String + Send + 'static) -> Self {
        self.key = Some(Box::new(f));
        self
    }

    /// How urgent the calls of the items are; the context's own unless set.
    pub fn priority(mut self, priority: Priority) -> Self {
        self.priority = Some(priority);
        self
    }

    /// Calls `f` each time an item has its outcome. A panic in it is caught and counted.
    pub fn on_progress(mut self, f: impl Fn(&Progress) + Send + Sync + 'static) -> Self {
        self.on_progress = Some(Box::new(f));
        self
    }
}

/// Collecting a fan-out of a context.
impl<T: Send, S: Stream<Item = T> + Send> Batch<Context, S> {
    /// Runs `work` on every item and gives every outcome, in input order. Never fails.
    ///
    /// # Cancel safety
    /// Dropping it drops the items: nothing more is sent, and what is in flight may be billed.
    pub async fn settle<O, F, Fut>(self, work: F) -> Settled<O>
    where
        F: Fn(Context, T) -> Fut + Send,
        Fut: Future<Output = Result<O>> + Send,
        O: Send,
    {
        let began = Instant::now();
        // All of it is kept, so the room for it is made once.
        let mut outcomes = Vec::with_capacity(self.inputs.size_hint().0.min(MOST_RESERVED));
        let mut running = self.run(work, None, None);
        while let Some(item) = running.next().await {
            outcomes.push(item.0);
            yield_after(outcomes.len()).await;
        }
        Settled::new(outcomes, began.elapsed())
    }

    /// Runs `work` on every item and gives all values in input order, or the first failure.
    ///
    /// # Errors
    /// The first failure, with the item it comes from ([`Error::item`](crate::Error::item)). From then on nothing new is
    /// sent; calls in flight are paid already, so they are waited for. Where the context drains, is
    /// cancelled or meets its deadline before all inputs were taken, the error says so:
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

    /// Runs `work` on every item and yields the outcomes as they come. See [`Outcomes`].
    ///
    /// The items run in a task of their own, so `work` cannot borrow: it owns what it captures and hands a
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
        let room = Arc::new(Semaphore::new(self.parallelism.window()));
        let cut_short = CutShort::default();
        let stop = Some((cx.clone(), Arc::clone(&cut_short)));
        Outcomes::spawn(cx, self.run(work, stop, Some(room)), cut_short)
    }
}
