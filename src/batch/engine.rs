//! The engine runs the items of a batch; [`Outcomes`] streams their outcomes.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{self, Poll, ready};
use std::time::Duration;

use futures::stream::{BoxStream, FuturesUnordered};
use futures::{FutureExt as _, Stream, StreamExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::intake::{CutShort, Intake, yield_after};
use super::limit_report::LimitReport;
use super::{Batch, Parallelism, ProgressFn};
use crate::batch::Outcome;
use crate::call::scope::{DuplicateKeys, Scope};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::sync::Mutex;

/// The slot of an outcome in the window of a stream, free again when the consumer takes the outcome.
type Slot = Option<OwnedSemaphorePermit>;

impl<T: Send, S: Stream<Item = T> + Send> Batch<Context, S> {
    /// Runs `work` on the inputs and yields the outcomes as they come.
    ///
    /// With `stop`, no input is taken after that context has ended, and the error that says so is stored there; without
    /// it, all inputs are taken and end as cancelled. With `window`, an input is taken when a slot is free.
    pub(super) fn run<'a, O, F, Fut>(
        self,
        work: F,
        stop: Option<(Context, CutShort)>,
        window: Option<Arc<Semaphore>>,
    ) -> BoxStream<'a, Box<(Outcome<O>, Slot)>>
    where
        F: Fn(Context, T) -> Fut + Send + 'a,
        Fut: Future<Output = Result<O>> + Send + 'a,
        O: Send + 'a,
        S: 'a,
        T: 'a,
    {
        let parallelism = match self.work.is_parallel() {
            true => self.parallelism,
            false => Parallelism::Buffered(1),
        };
        let batch = match self.priority {
            Some(priority) => self.work.with_priority(priority),
            None => self.work,
        };
        let tracker = Arc::new(Tracker::new(
            &batch,
            Arc::clone(&self.label),
            exact_len(&self.inputs),
            self.on_progress,
        ));

        let limit_report = LimitReport::new(batch.clone(), parallelism, tracker.total);
        let limit_report = Arc::new(limit_report);
        let started = Arc::clone(&limit_report);
        let inputs = Intake::new(self.inputs.boxed(), stop);
        let inputs = match window {
            Some(window) => inputs
                .then(move |input| {
                    let slot = Arc::clone(&window).acquire_owned();
                    slot.map(|slot| (input, slot.ok()))
                })
                .boxed(),
            None => inputs.map(|input| (input, None)).boxed(),
        };

        let (key, label) = (self.key, self.label);
        let has_store = batch.scope().namespace.is_some();
        let repeats = has_store.then(Mutex::<DuplicateKeys>::default);
        let start = move |(index, (input, slot)): (usize, (T, Slot))| {
            let key = key
                .as_ref()
                .map(|key| caught(|| key(&input)).map(Arc::from))
                .transpose();
            let name = key.as_ref().ok().cloned().flatten();
            let repeat = match (&repeats, &name) {
                (Some(repeats), Some(name)) => {
                    let mut repeats = repeats.lock();
                    repeats.count(name)
                }
                _ => 0,
            };
            let cx = batch.item(Arc::clone(&label), index, name, repeat);
            let running = Running::new(&tracker);
            started.start(index);
            let scope = Arc::clone(cx.scope());
            let started = Instant::now();
            let item = cx
                .check()
                .and(key)
                // Boxed, because it is moved a dozen times on its way into the set of running items,
                // and it is as large as everything that the work awaits.
                .and_then(|_| caught(|| Box::pin(work(cx, input))));
            async move {
                let result = match item {
                    Ok(item) => AssertUnwindSafe(item)
                        .catch_unwind()
                        .await
                        .unwrap_or_else(|panic| Err(Error::panicked(panic))),
                    Err(error) => Err(error),
                };
                running.settle(&scope, index, started, result, slot)
            }
        };

        let inputs = inputs.enumerate();
        let outcomes = match parallelism {
            Parallelism::JoinAll => inputs.map(start).buffer_unordered(usize::MAX).boxed(),
            Parallelism::Unordered(n) => inputs.map(start).buffer_unordered(n).boxed(),
            Parallelism::Buffered(n) => inputs.map(start).buffered(n).boxed(),
            Parallelism::Chunks(n) => inputs
                .chunks(n)
                .flat_map(move |chunk| {
                    chunk
                        .into_iter()
                        .map(&start)
                        .collect::<FuturesUnordered<_>>()
                })
                .boxed(),
        };
        outcomes.inspect(move |_| limit_report.end()).boxed()
    }
}

fn caught<T>(f: impl FnOnce() -> T) -> Result<T> {
    catch_unwind(AssertUnwindSafe(f)).map_err(Error::panicked)
}

fn exact_len(inputs: &impl Stream) -> Option<usize> {
    match inputs.size_hint() {
        (lower, Some(upper)) if lower == upper => Some(upper),
        _ => None,
    }
}

/// Counts the items of one batch and reports each.
struct Tracker {
    batch: Context,
    began: Instant,
    label: Arc<str>,
    total: Option<usize>,
    done: AtomicUsize,
    failed: AtomicUsize,
    cancelled: AtomicUsize,
    on_progress: Option<ProgressFn>,
}

/// A running item. It is counted as dropped if it has no outcome when this is dropped.
struct Running {
    tracker: Arc<Tracker>,
    is_settled: bool,
}

impl Running {
    fn new(tracker: &Arc<Tracker>) -> Self {
        tracker.batch.item_started();
        Self {
            tracker: Arc::clone(tracker),
            is_settled: false,
        }
    }

    fn settle<O>(
        mut self,
        item: &Scope,
        index: usize,
        started: Instant,
        result: Result<O>,
        slot: Slot,
    ) -> Box<(Outcome<O>, Slot)> {
        self.is_settled = true;
        self.tracker.settle(item, index, started, result, slot)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.is_settled {
            self.tracker.batch.item_dropped();
        }
    }
}

impl Tracker {
    fn new(
        batch: &Context,
        label: Arc<str>,
        total: Option<usize>,
        on_progress: Option<ProgressFn>,
    ) -> Self {
        Self {
            batch: batch.clone(),
            began: Instant::now(),
            label,
            total,
            done: AtomicUsize::new(0),
            failed: AtomicUsize::new(0),
            cancelled: AtomicUsize::new(0),
            on_progress,
        }
    }

    fn settle<O>(
        &self,
        item: &Scope,
        index: usize,
        started: Instant,
        result: Result<O>,
        slot: Slot,
    ) -> Box<(Outcome<O>, Slot)> {
        let elapsed = started.elapsed();
        if let (Err(error), Some(namespace)) = (&result, &item.namespace) {
            namespace.record_failure(error);
        }
        self.batch.item_settled(result.as_ref().err());
        self.batch.observers().tell(|| Event::ItemSettled {
            path: item.path(),
            elapsed,
            error: result.as_ref().err().cloned(),
        });
        if let Some(on_progress) = &self.on_progress {
            let counter = match &result {
                Ok(_) => &self.done,
                Err(error) if error.is_cancelled() => &self.cancelled,
                Err(_) => &self.failed,
            };
            counter.fetch_add(1, Ordering::Relaxed);
            let progress = Progress {
                label: Arc::clone(&self.label),
                total: self.total,
                done: self.done.load(Ordering::Relaxed),
                failed: self.failed.load(Ordering::Relaxed),
                cancelled: self.cancelled.load(Ordering::Relaxed),
                index,
                key: item.key.clone(),
                ok: result.is_ok(),
                elapsed: self.began.elapsed(),
            };
            self.batch.observers().shield(|| on_progress(&progress));
        }
        let outcome = Outcome {
            index,
            key: item.key.clone(),
            result,
            tally: item.tally(),
            started: started.duration_since(self.began),
            elapsed,
        };
        // Boxed, because it is moved as often as the work.
        Box::new((outcome, slot))
    }
}

/// The state of a batch when one of its items has just ended ([`Batch::on_progress`]).
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Progress {
    /// The label of the fan-out, or the name of the pipeline.
    pub label: Arc<str>,
    /// The number of items, if the inputs know it.
    pub total: Option<usize>,
    /// The items that succeeded, including this one.
    pub done: usize,
    /// The items that failed, including this one and without cancelled items.
    pub failed: usize,
    /// The items that ended because the context was drained or cancelled, including this one.
    pub cancelled: usize,
    /// The index of the item that has just ended.
    pub index: usize,
    /// The key of the item that has just ended.
    pub key: Option<Arc<str>>,
    /// Whether that item succeeded.
    pub ok: bool,
    /// The time since the start of the batch.
    pub elapsed: Duration,
}

impl fmt::Display for Progress {
    /// Writes `river: 3 of 12 done, 1 failed, 2.5s`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.label, self.done)?;
        if let Some(total) = self.total {
            write!(f, " of {total}")?;
        }
        f.write_str(" done")?;
        if self.failed > 0 {
            write!(f, ", {} failed", self.failed)?;
        }
        if self.cancelled > 0 {
            write!(f, ", {} cancelled", self.cancelled)?;
        }
        write!(f, ", {:.1?}", self.elapsed)
    }
}

/// A stream of the outcomes of a batch, made by `stream`.
///
/// The items run in a task of their own, so calls in flight go on while the consumer is
/// busy. With a parallelism of n, at most 2n items are running or waiting to be taken; no
/// further item starts until the consumer takes one. [`join_all`](Batch::join_all) has no such bound.
///
/// When the context drains, is cancelled or reaches its deadline, the stream ends: items that
/// have started yield their outcome, and no further inputs are taken. Check
/// [`cut_short`](Self::cut_short) before you treat the result as complete:
///
/// ```
/// use futures::StreamExt;
/// use throughline::{Context, Error, testing::Scripted};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
/// # let cx = Context::builder(Scripted::new().reply("a").reply("b")).build();
/// let mut pages = cx
///     .fan_out("page", 0..1000)
///     .sequential()
///     .stream(async |cx, n| cx.generate(format!("page {n}")).await);
/// let first = pages.next().await.expect("a page").result?;
/// cx.drain(); // a stop signal
/// let others = pages.by_ref().count().await;
/// assert!(others < 999);
/// assert!(pages.cut_short().is_some_and(Error::is_cancelled));
/// # let _ = first;
/// # Ok(()) }
/// ```
///
/// # Cancel safety
/// Dropping the stream cancels its items: no further call is sent, permits go back, and the
/// runtime removes the task. Calls in flight may be billed.
///
/// # Panics
/// `poll_next` panics if the iterator or stream of inputs panics.
#[must_use = "a stream does nothing unless polled"]
pub struct Outcomes<T> {
    receiver: mpsc::UnboundedReceiver<Box<(Outcome<T>, Slot)>>,
    /// The task that drives the items, in a set, because a set aborts its tasks when it is dropped.
    driver: JoinSet<()>,
    cx: Context,
    cut_short: CutShort,
}

impl<T: Send + 'static> Outcomes<T> {
    /// Drives `running` in a task; `cx` is the context of all items.
    pub(super) fn spawn(
        cx: Context,
        mut running: BoxStream<'static, Box<(Outcome<T>, Slot)>>,
        cut_short: CutShort,
    ) -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            let mut outcomes = 0;
            while let Some(outcome) = running.next().await {
                if sender.send(outcome).is_err() {
                    break;
                }
                outcomes += 1;
                yield_after(outcomes).await;
            }
        });
        Self {
            receiver,
            driver,
            cx,
            cut_short,
        }
    }
}

impl<T> Outcomes<T> {
    /// Returns the reason why the stream ended before its inputs did: the context drained, was cancelled or reached its
    /// deadline ([`Error::is_cancelled`], [`Error::is_deadline_exceeded`]), or the runtime that drove
    /// the items shut down. `None` until the stream has ended, and if it ended with its inputs.
    ///
    /// Of a stream of inputs with unknown length, it is not known whether more inputs would have come; they count as not
    /// taken.
    pub fn cut_short(&self) -> Option<&Error> {
        self.cut_short.get()
    }
}

impl<T> Stream for Outcomes<T> {
    type Item = Outcome<T>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<Option<Outcome<T>>> {
        if let Some(item) = ready!(self.receiver.poll_recv(cx)) {
            let (outcome, _slot) = *item;
            return Poll::Ready(Some(outcome));
        }
        match ready!(self.driver.poll_join_next(cx)) {
            Some(Err(error)) if error.is_panic() => resume_unwind(error.into_panic()),
            Some(Err(_)) => {
                let message =
                    "the runtime that drove the batch has shut down while items were running";
                let error = Error::cancelled(message).with_billed(None);
                let _ = self.cut_short.set(error);
                Poll::Ready(None)
            }
            _ => Poll::Ready(None),
        }
    }
}

impl<T> Drop for Outcomes<T> {
    fn drop(&mut self) {
        // Takes effect at once; the task is aborted only when the runtime polls it next.
        self.cx.cancel();
    }
}

impl<T> fmt::Debug for Outcomes<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outcomes")
            .field("cx", &self.cx)
            .finish_non_exhaustive()
    }
}
