//! [`RunSnapshot`]: the progress of a run, once or as a stream.

use std::fmt;
use std::time::{Duration, SystemTime};

use futures::stream::{self, BoxStream, StreamExt as _};
use serde::{Serialize, Serializer};
use tokio::time::sleep;

use super::Runner;
use crate::error::Result;
use crate::store::{Run, RunId, Status};

/// The progress of a run. `Display` returns one line for people, and `Serialize` a flat object for clients of a service:
///
/// ```json
/// {"id": 7, "name": "week-plan", "status": "processing", "total": 100, "completed": 30, "failed": 2,
///  "cancelled": 0, "error": "what the item that failed first said", "elapsed_s": 5.1, "eta_s": 12.0}
/// ```
///
/// `error` and `eta_s` may be null. [`run`](Self::run) is the whole record, which is serialisable too.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RunSnapshot {
    /// The run's record.
    pub run: Run,
    /// The time since the creation of the run, or until its end.
    pub elapsed: Duration,
}

impl From<Run> for RunSnapshot {
    fn from(run: Run) -> Self {
        let until = run.ended_at.unwrap_or_else(SystemTime::now);
        Self {
            elapsed: until.duration_since(run.created_at).unwrap_or_default(),
            run,
        }
    }
}

impl RunSnapshot {
    /// Returns the number of open items.
    pub fn remaining(&self) -> u64 {
        self.run.total - self.run.ended()
    }

    /// Returns the number of items that ended per second, on average. `None` before the first.
    pub fn per_second(&self) -> Option<f64> {
        let seconds = self.elapsed.as_secs_f64();
        (self.run.ended() > 0 && seconds > 0.0).then(|| self.run.ended() as f64 / seconds)
    }

    /// Returns the time that the open items take at the average rate.
    pub fn eta(&self) -> Option<Duration> {
        let rest = self.remaining() as f64 / self.per_second()?;
        Duration::try_from_secs_f64(rest).ok()
    }

    /// Returns the estimated seconds to the end of an open run.
    fn to_go(&self) -> Option<f64> {
        let eta = self.eta().filter(|_| !self.run.status.is_over());
        eta.map(|eta| eta.as_secs_f64())
    }
}

impl Serialize for RunSnapshot {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Flat<'a> {
            id: RunId,
            name: &'a str,
            status: Status,
            total: u64,
            completed: u64,
            failed: u64,
            cancelled: u64,
            error: Option<String>,
            elapsed_s: f64,
            eta_s: Option<f64>,
        }
        let run = &self.run;
        let flat = Flat {
            id: run.id,
            name: &run.name,
            status: run.status,
            total: run.total,
            completed: run.completed,
            failed: run.failed,
            cancelled: run.cancelled,
            error: run.error.as_ref().map(ToString::to_string),
            elapsed_s: self.elapsed.as_secs_f64(),
            eta_s: self.to_go(),
        };
        flat.serialize(serializer)
    }
}

impl fmt::Display for RunSnapshot {
    /// `week-plan: 30 of 100 done, 2 failed, 12.0 s to go`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let run = &self.run;
        write!(f, "{}: {} of {} done", run.name, run.completed, run.total)?;
        for (count, word) in [
            (run.failed, Status::Failed),
            (run.cancelled, Status::Cancelled),
        ] {
            if count > 0 {
                write!(f, ", {count} {word}")?;
            }
        }
        match self.to_go() {
            Some(seconds) => write!(f, ", {seconds:.1} s to go"),
            None => Ok(()),
        }
    }
}

impl Runner {
    /// Returns a stream of the progress of a run: now, and after each change until the run has ended. The stream of a run that
    /// does not exist is empty.
    ///
    /// It reads one row every 250 ms ([`poll_every`](Self::poll_every)). An error is yielded and does not end the stream.
    pub fn watch(&self, run: RunId) -> BoxStream<'static, Result<RunSnapshot>> {
        let runner = self.clone();
        let first: Option<Observed> = None;
        stream::unfold(Some((runner, first)), move |state| async move {
            let (runner, seen) = state?;
            loop {
                let found = match runner.snapshot(run).await {
                    Ok(found) => found?,
                    Err(error) => {
                        sleep(runner.poll).await;
                        return Some((Err(error), Some((runner, seen))));
                    }
                };
                let now = Observed::of(&found.run);
                if seen != Some(now) {
                    let more = !found.run.status.is_over();
                    return Some((Ok(found), more.then_some((runner, Some(now)))));
                }
                sleep(runner.poll).await;
            }
        })
        .boxed()
    }
}

/// The values whose changes a watcher reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Observed {
    status: Status,
    ended: u64,
    log_seq: u64,
}

impl Observed {
    fn of(run: &Run) -> Self {
        Self {
            status: run.status,
            ended: run.ended(),
            log_seq: run.log_seq,
        }
    }
}
