//! How a session ends: it finishes the calls in flight, writes their results and releases the rest.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::later;
use super::session::{InFlight, Session, StopCondition};
use crate::error::{Error, ErrorKind, Result};

/// How much later than its time a worker may stop to wait for a store that is slow or away, because results that are not
/// written are lost with the process.
const STORE_GRACE: Duration = Duration::from_secs(10);

impl Session {
    /// Lets calls in flight finish, writes everything and releases the rest.
    pub(super) async fn shut_down(
        &self,
        in_flight: &mut InFlight,
        stop_at: StopCondition,
    ) -> Result<()> {
        self.cx.drain();
        let now = Instant::now();
        // The last fifth of the drain is reserved for the store.
        let finish = match stop_at.end {
            Some(end) => end - stop_at.drain / 5,
            None => later(now, stop_at.drain),
        };
        self.finish(in_flight, finish).await;
        let written = later(stop_at.end.unwrap_or(finish).max(now), STORE_GRACE);
        let flushed = timeout_at(written, self.flush()).await;
        let flushed = flushed.unwrap_or_else(|_| Err(self.unwritten()));
        self.release(in_flight).await;
        let retired = self.worker.queue.retire(self.lease).await;
        flushed.and(retired.map(drop))
    }

    fn unwritten(&self) -> Error {
        let stats = self.worker.journal.stats();
        let message = format!("{} results could not be written in time", stats.waiting);
        let error = Error::new(ErrorKind::Store, message);
        match stats.last_error {
            Some(last) => error.with_source(last),
            None => error,
        }
    }

    /// Flushes until it succeeds. The caller sets a timeout.
    async fn flush(&self) -> Result<()> {
        loop {
            match self.worker.journal.flush().await {
                Err(error) if error.kind() != ErrorKind::Config => {
                    tracing::warn!(%error, "the worker waits for the store before it stops");
                }
                done => return done,
            }
        }
    }

    /// Waits for all items, and cancels their calls at `at`.
    async fn finish(&self, in_flight: &mut InFlight, at: Instant) {
        let all = async |in_flight: &mut InFlight| {
            while let Some(done) = in_flight.tasks.join_next().await {
                self.end(in_flight, done);
            }
        };
        if timeout_at(at, all(in_flight)).await.is_err() {
            self.cx.cancel();
            // Tasks that ignore the cancellation are aborted.
            let _ = timeout_at(later(at, Duration::from_secs(1)), all(in_flight)).await;
            in_flight.tasks.abort_all();
            all(in_flight).await;
        }
    }
}
