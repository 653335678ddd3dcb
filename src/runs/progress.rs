//! [`RunSnapshot`]: how a run stands, once or as a stream.

use std::fmt;
use std::time::{Duration, SystemTime};

use futures::stream::{self, BoxStream, StreamExt as _};
use serde::{Serialize, Serializer};
use tokio::time::sleep;

use super::Runner;
use crate::error::Result;
use crate::store::{Run, RunId, Status};

/// How a run stands. `Display` gives one line for a person, `Serialize` a flat object for who has submitted it:
///
/// ```json
/// {"id": 7, "name": "week-plan", "status": "processing", "total": 100, "completed": 30, "failed": 2,
///  "cancelled": 0, "error": "what the item that failed first said", "elapsed_s": 5.1, "eta_s": 12.0}
/// ```
///
/// `error` and `eta_s` are null where there is none. The whole record is [`run`](Self::run), which is serialised with all its fields.
///
/// ```
/// # use throughline::{Context, Runner, pipeline, store::Memory};
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
/// # let double = pipeline("double", async |_cx: Context, n: u32| Ok(2 * n));
/// # let runner = Runner::new(Memory::new());
/// let run = runner.submit("double", &double, [1, 2, 3]).await?;
/// let snapshot = runner.snapshot(run).await?.expect("it is there");
/// assert_eq!(snapshot.to_string(), "double: 0 of 3 done");
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RunSnapshot {
    /// The run's record.
    pub run: Run,
    /// How long it has been there, or took until it ended.
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
    /// Items that are not over.
    pub fn remaining(&self) -> u64 {
        self.run.total - self.run.ended()
    }

    /// Items that ended in a second, over the whole time. `None` before the first.
    pub fn per_second(&self) -> Option<f64> {
        let seconds = self.elapsed.as_secs_f64();
        (self.run.ended() > 0 && seconds > 0.0).then(|| self.run.ended() as f64 / seconds)
    }

    /// How long the rest takes if it goes on as it went so far.
    pub fn eta(&self) -> Option<Duration> {
        let rest = self.remaining() as f64 / self.per_second()?;
        Duration::try_from_secs_f64(rest).ok()
    }

    /// What there is to say of the time to its end while it is not over.
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
    /// How a run stands, now and each time that has changed, until it is over. Ends at once if there is no such run.
    ///
    /// It looks every 250 ms ([`poll_every`](Self::poll_every)) and reads one row each time. An error is
    /// yielded and does not end the stream.
    ///
    /// ```
    /// use futures::TryStreamExt as _;
    /// # use throughline::{Context, Runner, pipeline, store::Memory};
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
    /// # let double = pipeline("double", async |_cx: Context, n: u32| Ok(2 * n));
    /// # let runner = Runner::new(Memory::new());
    /// let run = runner.submit("double", &double, [1, 2, 3]).await?;
    /// runner.cancel(run).await?;
    /// let seen: Vec<_> = runner.watch(run).try_collect().await?;
    /// assert_eq!(seen.last().unwrap().run.cancelled, 3);
    /// # Ok(()) }
    /// ```
    pub fn watch(&self, run: RunId) -> BoxStream<'static, Result<RunSnapshot>> {
        let runner = self.clone();
        let first: Option<Seen> = None;
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
                let now = Seen::of(&found.run);
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

/// What a watcher is told of when it changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    status: Status,
    ended: u64,
    log_seq: u64,
}

impl Seen {
    fn of(run: &Run) -> Self {
        Self {
            status: run.status,
            ended: run.ended(),
            log_seq: run.log_seq,
        }
    }
}
