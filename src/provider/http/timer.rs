//! The timer of one call: a deadline for each of its phases.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

use crate::error::{Error, ErrorKind};

/// A point in time, or none if it lies further ahead than a clock can express.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Deadline(Option<Instant>);

impl Deadline {
    pub(super) fn after(duration: Duration) -> Self {
        Self::from(Instant::now(), duration)
    }

    pub(super) fn from(start: Instant, duration: Duration) -> Self {
        Self(start.checked_add(duration))
    }

    pub(super) fn min(self, other: Self) -> Self {
        match (self.0, other.0) {
            (Some(a), Some(b)) => Self(Some(a.min(b))),
            (a, b) => Self(a.or(b)),
        }
    }
}

/// The one timer of a call, moved from deadline to deadline. Registering and removing a timer
/// costs more than moving it, and a future that is ready at once needs none.
#[derive(Default)]
pub(super) struct CallTimer(Option<Pin<Box<Sleep>>>);

impl CallTimer {
    /// Waits for `future`, or fails with the deadline if that comes first. The deadline is computed only
    /// if the future is not ready at once.
    pub(super) async fn timeout<F: Future>(
        &mut self,
        deadline: impl Fn() -> Deadline,
        future: F,
    ) -> Result<F::Output, Deadline> {
        let mut future = pin!(future);
        let mut end = None;
        poll_fn(|cx| {
            if let Poll::Ready(output) = future.as_mut().poll(cx) {
                return Poll::Ready(Ok(output));
            }
            let end = *end.get_or_insert_with(&deadline);
            match end.0 {
                Some(at) => self.set(at).poll(cx).map(|()| Err(end)),
                None => Poll::Pending,
            }
        })
        .await
    }

    fn set(&mut self, at: Instant) -> Pin<&mut Sleep> {
        let mut sleep = self
            .0
            .get_or_insert_with(|| Box::pin(sleep_until(at)))
            .as_mut();
        if sleep.deadline() != at {
            sleep.as_mut().reset(at);
        }
        sleep
    }
}

pub(super) fn timed_out(what: &str, after: Duration) -> Error {
    let message = format!("{what} took longer than {after:?}");
    Error::new(ErrorKind::Timeout, message)
}
