//! [`Intake`]: the inputs of a batch that is running.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{self, Poll};

use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt as _, Stream, StreamExt as _};
use tokio::task::yield_now;

use crate::context::Context;
use crate::error::Error;

/// The reason why a batch did not take all of its inputs, set when it stops.
pub(super) type CutShort = Arc<OnceLock<Error>>;

/// The number of items of a batch that may start, and that may end, before other tasks run: as many as the steps that
/// Tokio allows a task at a time.
const AT_A_TIME: usize = 128;

/// Lets other tasks run after every 128 outcomes. A batch whose items and inputs are all ready would otherwise never
/// return to the runtime. It does not use Tokio's own budget, because items that find it used up lose their place in the
/// queue of the lane.
pub(super) async fn yield_after(outcomes: usize) {
    if outcomes.is_multiple_of(AT_A_TIME) {
        yield_now().await;
    }
}

/// The inputs of a running batch. At most 128 are taken in a row, so that a batch without a limit on
/// its parallelism lets other tasks run before all of its items have started.
pub(super) struct Intake<'a, T> {
    inputs: BoxStream<'a, T>,
    taken: usize,
    in_a_row: usize,
    stop: Option<Stop>,
    has_ended: bool,
}

/// The condition under which no further input is taken.
struct Stop {
    cx: Context,
    stopped: BoxFuture<'static, ()>,
    cut_short: CutShort,
}

impl<'a, T> Intake<'a, T> {
    pub(super) fn new(inputs: BoxStream<'a, T>, stop: Option<(Context, CutShort)>) -> Self {
        let stop = stop.map(|(cx, cut_short)| Stop {
            stopped: cx.bounds().stopped().boxed(),
            cx,
            cut_short,
        });
        Self {
            inputs,
            taken: 0,
            in_a_row: 0,
            stop,
            has_ended: false,
        }
    }
}

impl<T> Stream for Intake<'_, T> {
    type Item = T;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<Option<T>> {
        let this = &mut *self;
        if this.has_ended {
            return Poll::Ready(None);
        }
        if let Some(stop) = &mut this.stop
            && stop.stopped.poll_unpin(cx).is_ready()
        {
            this.has_ended = true;
            // Another reader of the same source may need the next input, so it is not polled to see whether there is one.
            if this.inputs.size_hint().1 != Some(0) {
                let error = stop.cx.bounds().inputs_left(this.taken);
                let _ = stop.cut_short.set(error);
            }
            return Poll::Ready(None);
        }
        if this.in_a_row == AT_A_TIME {
            this.in_a_row = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let input = this.inputs.poll_next_unpin(cx);
        match &input {
            Poll::Ready(Some(_)) => {
                this.taken += 1;
                this.in_a_row += 1;
            }
            Poll::Ready(None) => this.has_ended = true,
            Poll::Pending => this.in_a_row = 0,
        }
        input
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        match self.stop {
            // It may end at any time.
            Some(_) => (0, self.inputs.size_hint().1),
            None => self.inputs.size_hint(),
        }
    }
}
