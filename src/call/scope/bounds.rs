//! [`Bounds`]: the deadline and the cancellation of some work.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::Duration;

use futures::poll;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

use crate::error::{Error, ErrorKind, Result};

/// The deadline and the cancellation of some work. Bounds form a tree: the end of one is the end of all below it.
pub(crate) struct Bounds {
    parent: Option<Arc<Bounds>>,
    /// Cancelled when everything stops, calls in flight too. Made when it is first cancelled or waited for,
    /// because most items of a batch do neither.
    cancel: OnceLock<CancellationToken>,
    /// Cancelled when nothing new is sent and calls in flight finish. Made like `cancel`.
    drain: OnceLock<CancellationToken>,
    pub(crate) deadline: Option<Instant>,
    unit: Arc<WorkUnit>,
    /// Whether a token of this tree may be cancelled. A look at a token takes a lock, and most
    /// contexts are never cancelled or drained.
    may_be_cancelled: Arc<AtomicBool>,
}

/// The shared state of the bounds of one unit of work: an item that a worker runs, and everything below it.
#[derive(Default)]
struct WorkUnit {
    /// Whether a part was refused or interrupted by cancelling or draining. Then the result may differ from that of the
    /// whole work.
    was_cut: AtomicBool,
    /// Whether a batch left inputs because `deadline` had passed.
    was_late: AtomicBool,
    deadline: Option<Instant>,
}

impl Bounds {
    /// Makes the outermost bounds, cancelled with `token` if there is one.
    pub(crate) fn new(token: Option<CancellationToken>) -> Self {
        let may_be_cancelled = Arc::new(AtomicBool::new(token.is_some()));
        let cancel = token.unwrap_or_default();
        Self {
            parent: None,
            drain: cancel.child_token().into(),
            cancel: cancel.into(),
            deadline: None,
            unit: Arc::default(),
            may_be_cancelled,
        }
    }

    /// Makes bounds below these, which can be narrowed without a change to these.
    pub(crate) fn child(self: &Arc<Self>) -> Self {
        Self {
            parent: Some(Arc::clone(self)),
            cancel: OnceLock::new(),
            drain: OnceLock::new(),
            deadline: self.deadline,
            unit: Arc::clone(&self.unit),
            may_be_cancelled: Arc::clone(&self.may_be_cancelled),
        }
    }

    /// Makes bounds below these that end at `deadline`, if that comes first.
    pub(crate) fn until(self: &Arc<Self>, deadline: Instant) -> Self {
        let mut child = self.child();
        child.deadline = Some(child.deadline.map_or(deadline, |ours| ours.min(deadline)));
        child
    }

    /// Makes these the bounds of a unit of work, which records whether it was interrupted.
    pub(crate) fn into_unit(mut self) -> Self {
        self.unit = Arc::new(WorkUnit {
            deadline: self.deadline,
            ..WorkUnit::default()
        });
        self
    }

    /// Returns whether a part of this unit of work was refused or interrupted by cancelling or draining.
    pub(crate) fn was_cut(&self) -> bool {
        self.unit.was_cut.load(Ordering::Relaxed)
    }

    /// Returns whether a batch in this unit of work left inputs because the unit's deadline had passed.
    pub(crate) fn was_late(&self) -> bool {
        self.unit.was_late.load(Ordering::Relaxed)
    }

    /// Ends everything. Cancelled bounds drain too, so that one look at `drain` shows whether new work may start.
    pub(crate) fn cancel(&self) {
        self.may_be_cancelled.store(true, Ordering::Release);
        self.token(|bounds| &bounds.cancel).cancel();
        self.token(|bounds| &bounds.drain).cancel();
    }

    /// Ends the calls that have not been sent.
    pub(crate) fn drain(&self) {
        self.may_be_cancelled.store(true, Ordering::Release);
        self.token(|bounds| &bounds.drain).cancel();
    }

    /// Returns whether these bounds, or bounds above, were cancelled.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.has_ended(|bounds| &bounds.cancel)
    }

    /// Returns whether these bounds, or bounds above, were drained or cancelled.
    pub(crate) fn is_draining(&self) -> bool {
        self.has_ended(|bounds| &bounds.drain)
    }

    /// Waits until these bounds are cancelled.
    pub(crate) fn cancelled(&self) -> WaitForCancellationFuture<'_> {
        self.token(|bounds| &bounds.cancel).cancelled()
    }

    /// Waits until these bounds are drained or cancelled.
    pub(crate) fn drained(&self) -> WaitForCancellationFuture<'_> {
        self.token(|bounds| &bounds.drain).cancelled()
    }

    /// Waits until nothing new may start: drained, cancelled, or after the deadline.
    pub(crate) fn stopped(&self) -> impl Future<Output = ()> + Send + 'static {
        let drained = self.token(|bounds| &bounds.drain).clone().cancelled_owned();
        let deadline = self.deadline;
        async move {
            tokio::select! {
                () = drained => {}
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {}
            }
        }
    }

    /// Bounds whose token was never made were never ended themselves, so those above decide.
    fn has_ended(&self, which: fn(&Self) -> &OnceLock<CancellationToken>) -> bool {
        let mut bounds = self;
        loop {
            match (which(bounds).get(), &bounds.parent) {
                (Some(token), _) => return token.is_cancelled(),
                (None, Some(parent)) => bounds = parent,
                (None, None) => return false,
            }
        }
    }

    /// Returns the token, and makes it below those of all bounds above if there is none yet.
    fn token(&self, which: fn(&Self) -> &OnceLock<CancellationToken>) -> &CancellationToken {
        if let Some(token) = which(self).get() {
            return token;
        }
        let mut missing = vec![self];
        let mut bounds = self;
        let mut token = loop {
            let parent = bounds.parent.as_deref();
            bounds = parent.expect("the outermost bounds are made with their tokens");
            match which(bounds).get() {
                Some(token) => break token,
                None => missing.push(bounds),
            }
        };
        for bounds in missing.into_iter().rev() {
            token = which(bounds).get_or_init(|| token.child_token());
        }
        token
    }

    /// Fails if no new work may start.
    pub(crate) fn check(&self) -> Result<()> {
        if self.may_be_cancelled.load(Ordering::Acquire) && self.is_draining() {
            self.unit.was_cut.store(true, Ordering::Relaxed);
            Err(Error::cancelled(if self.is_cancelled() {
                "the context was cancelled before the call was sent"
            } else {
                "the context is draining: nothing new is sent"
            }))
        } else if self.is_over() {
            Err(Error::new(
                ErrorKind::DeadlineExceeded,
                "the deadline passed before the call was sent",
            ))
        } else {
            Ok(())
        }
    }

    fn is_over(&self) -> bool {
        let deadline = self.deadline;
        deadline.is_some_and(|deadline| deadline <= Instant::now())
    }

    /// Returns why a batch takes no more inputs after `taken` of them, once [`stopped`](Self::stopped) is
    /// ready. The unit of work records that it was interrupted.
    pub(crate) fn inputs_left(&self, taken: usize) -> Error {
        let (kind, why) = if self.is_draining() {
            self.unit.was_cut.store(true, Ordering::Relaxed);
            let why = match self.is_cancelled() {
                true => "the context was cancelled",
                false => "the context is draining",
            };
            (ErrorKind::Cancelled, why)
        } else {
            let unit = self.unit.deadline;
            if unit.is_some_and(|deadline| deadline <= Instant::now()) {
                self.unit.was_late.store(true, Ordering::Relaxed);
            }
            (ErrorKind::DeadlineExceeded, "the deadline passed")
        };
        let message = format!("{why}: the batch took {taken} of its inputs and left the others");
        Error::new(kind, message)
    }

    /// Waits for a future before a call is sent: cancelling, draining and the deadline end the wait, and nothing was
    /// paid.
    pub(crate) async fn before_send<F: Future>(&self, wait: F) -> Result<F::Output> {
        self.check()?;
        let mut wait = pin!(wait);
        if let Poll::Ready(done) = poll!(wait.as_mut()) {
            return Ok(done);
        }
        // In a box, so that the many calls that need not wait are not as large as this.
        let waited = Box::pin(async {
            tokio::select! {
                biased;
                () = self.drained() => None,
                () = sleep_until(self.deadline.unwrap_or_else(Instant::now)), if self.deadline.is_some() => None,
                done = wait => Some(done),
            }
        });
        if let Some(done) = waited.await {
            return Ok(done);
        }
        Err(self.check().err().unwrap_or_else(|| Error::cancelled("")))
    }

    /// Waits for a call that has been sent: cancelling, the deadline and `limit` end the wait, and it is not known whether
    /// the call is billed.
    pub(crate) async fn in_flight<T>(
        &self,
        limit: Duration,
        call: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let mut call = pin!(call);
        let mut end = None;
        poll_fn(|cx| {
            if let Poll::Ready(done) = call.as_mut().poll(cx) {
                return Poll::Ready(done);
            }
            // Made only when it is needed: a provider that answers at once (a cache, a test) starts no timer.
            let end = end.get_or_insert_with(|| Box::pin(self.ended(limit)));
            end.as_mut().poll(cx).map(Err)
        })
        .await
    }

    /// Waits for the end of a call in flight that does not answer, and returns the error.
    async fn ended(&self, limit: Duration) -> Error {
        // No moment is later than a limit of `Duration::MAX` from now.
        let end = Instant::now().checked_add(limit);
        let at = [end, self.deadline].into_iter().flatten().min();
        let error = tokio::select! {
            biased;
            () = self.cancelled() => {
                self.unit.was_cut.store(true, Ordering::Relaxed);
                Error::cancelled("cancelled while the call was in flight")
            }
            () = sleep_until(at.unwrap_or_else(Instant::now)), if at.is_some() => if at != end {
                let message = "the deadline passed while the call was in flight";
                Error::new(ErrorKind::DeadlineExceeded, message)
            } else {
                Error::new(ErrorKind::Timeout, format!("no reply within {limit:?}"))
            },
        };
        error.with_billed(None)
    }
}

impl Drop for Bounds {
    fn drop(&mut self) {
        super::drop_chain(self.parent.take(), |bounds| bounds.parent.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_end_of_bounds_ends_those_below_and_not_those_above_or_beside() {
        let root = Arc::new(Bounds::new(None));
        let (left, right) = (Arc::new(root.child()), Arc::new(root.child()));
        let below = Arc::new(Arc::new(left.child()).child());
        left.drain();
        assert!(left.is_draining() && below.is_draining() && !below.is_cancelled());
        assert!(!root.is_draining() && !right.is_draining());
        below.drained().await;
        let waits = right.drained();
        root.cancel();
        waits.await;
        assert!(right.is_cancelled() && below.is_cancelled() && below.check().is_err());
        // Made after the end.
        assert!(right.child().is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn draining_ends_waits_and_not_calls_in_flight() {
        let bounds = Bounds::new(None);
        bounds.drain();
        let waiting = bounds.before_send(std::future::ready(())).await;
        assert!(waiting.unwrap_err().is_cancelled());
        let call = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Ok(())
        };
        assert!(bounds.in_flight(Duration::from_secs(2), call).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn the_earlier_of_deadline_and_limit_ends_a_call() {
        let mut bounds = Bounds::new(None);
        let forever = || std::future::pending::<Result<()>>();
        let limit = Duration::from_secs(2);
        let error = bounds.in_flight(limit, forever()).await.unwrap_err();
        assert!(error.is_timeout() && error.billed().is_none());
        bounds.deadline = Some(Instant::now() + Duration::from_secs(1));
        let started = Instant::now();
        let error = bounds.in_flight(limit, forever()).await.unwrap_err();
        assert!(error.is_deadline_exceeded());
        assert_eq!(started.elapsed(), Duration::from_secs(1));
        let error = bounds.before_send(forever()).await.unwrap_err();
        assert!(error.is_deadline_exceeded() && error.billed() == Some(false));
    }
}
