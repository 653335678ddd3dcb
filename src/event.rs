//! [`Event`]: something that happens while work runs. [`Observer`]: receives events.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::error::Error;
use crate::usage::Usage;

/// Something that happened while work ran. `Display` writes it as one line for a person.
///
/// The path of an event names the [context](crate::Context) in which it happened: the labels of fan-outs with the key or
/// index of each item, as in `week-plan[3]/routine[0]`. It is empty for the context that the builder made.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event {
    /// A call is sent to the provider.
    #[non_exhaustive]
    CallStarted {
        /// The path of the context in which it happened.
        path: Arc<str>,
        /// Which attempt of the request this is, from 1.
        attempt: u32,
    },
    /// The provider answered a call.
    #[non_exhaustive]
    CallSucceeded {
        /// The path of the context in which it happened.
        path: Arc<str>,
        /// Which attempt of the request this is, from 1.
        attempt: u32,
        /// The duration of the call, without the wait for the lane.
        elapsed: Duration,
        /// The tokens it used.
        usage: Usage,
    },
    /// The provider's rate limit refused a call. The call is sent again.
    #[non_exhaustive]
    CallThrottled {
        /// The path of the context in which it happened.
        path: Arc<str>,
        /// The refusal, with the wait that the provider asks for.
        error: Error,
    },
    /// A call failed and is retried.
    #[non_exhaustive]
    CallRetried {
        /// The path of the context in which it happened.
        path: Arc<str>,
        /// The number of the attempt that failed, from 1.
        attempt: u32,
        /// The delay before the next attempt.
        delay: Duration,
        /// The failure.
        error: Error,
    },
    /// A call failed and is not retried.
    #[non_exhaustive]
    CallFailed {
        /// The path of the context in which it happened.
        path: Arc<str>,
        /// The failure, with the number of attempts.
        error: Error,
    },
    /// A reply could not be used, so the model is asked again.
    #[non_exhaustive]
    ReplyRejected {
        /// The path of the context in which it happened.
        path: Arc<str>,
        /// Which request for this value it answered: 1, then 2 for the first repeat.
        ask: u32,
        /// The problem with the reply.
        error: Error,
    },
    /// The lane sends nothing for a while, because the provider refused a call.
    #[non_exhaustive]
    LaneCoolingDown {
        /// The duration.
        wait: Duration,
    },
    /// The provider refused a call although the lane kept to the limit: the lane uses less of it for a while.
    #[non_exhaustive]
    LaneSlowed {
        /// The limit, as [`Binding`](crate::ratelimit::Binding) names it.
        limit: &'static str,
        /// The part of the limit that is used now. Above 1 where the limit itself is an estimate.
        factor: f64,
    },
    /// The provider refused calls because too many were in flight: the lane allows fewer for a while.
    #[non_exhaustive]
    LaneConcurrencyReduced {
        /// The number of calls that may be in flight now.
        in_flight: usize,
    },
    /// A limit of the lane is new or has changed: by the headers of a reply, or by
    /// [`Context::retune`](crate::Context::retune).
    #[non_exhaustive]
    LaneRetuned {
        /// The limit, as [`Binding`](crate::ratelimit::Binding) names it.
        limit: &'static str,
        /// The amount that is allowed in a minute.
        per_minute: u64,
    },
    /// The headers of the provider show that it stores more of an unused limit than the lane would use at once. The lane uses
    /// it in doubling steps ([`Pace::burst`](crate::Pace::burst)).
    #[non_exhaustive]
    LaneBurstLearned {
        /// The limit, as [`Binding`](crate::ratelimit::Binding) names it.
        limit: &'static str,
        /// The amount that the provider stores.
        stored: u64,
    },
    /// One call needs more of a limit than a minute allows, by its estimate (usually `max_tokens`) or by the usage that
    /// its reply reports. The lane charges the amount of one minute for it, so later calls wait for a minute at most.
    ///
    /// The provider usually refuses such a call. Lower `max_tokens`, or correct the limit.
    #[non_exhaustive]
    CallExceedsLimit {
        /// The limit, as [`Binding`](crate::ratelimit::Binding) names it.
        limit: &'static str,
        /// The amount that the call needs.
        needed: u64,
        /// The amount that a minute allows.
        per_minute: u64,
    },
    /// The lane stopped: calls fail at once until [`Lane::resume`](crate::ratelimit::Lane::resume) is called, or until the
    /// stop ends by itself (after five minutes for a refused account; [`Lane::stop`](crate::ratelimit::Lane::stop) never).
    #[non_exhaustive]
    LaneStopped {
        /// The reason.
        error: Error,
    },
    /// A [stage](crate::Context::stage) has ended.
    #[non_exhaustive]
    StageEnded {
        /// The path of the context in which it happened.
        path: Arc<str>,
        /// The duration of the stage.
        elapsed: Duration,
        /// The failure, if there was one.
        error: Option<Error>,
    },
    /// Results could not be written to the store. They stay in memory and are written later.
    #[non_exhaustive]
    StoreFailed {
        /// The reason.
        error: Error,
        /// The number of results that wait to be written.
        waiting: usize,
    },
    /// An item of a batch has its outcome.
    #[non_exhaustive]
    ItemSettled {
        /// The path of the context in which it happened.
        path: Arc<str>,
        /// The duration of the item.
        elapsed: Duration,
        /// The reason why it has no value: it failed, or it was cancelled ([`Error::is_cancelled`]).
        error: Option<Error>,
    },
}

/// A path as the beginning of a line; nothing for the empty path.
struct At<'a>(&'a str);

impl fmt::Display for At<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            "" => Ok(()),
            path => write!(f, "{path}: "),
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CallStarted { path, attempt } => {
                write!(f, "{}call {attempt} sent", At(path))
            }
            Self::CallSucceeded {
                path,
                attempt,
                elapsed,
                usage,
            } => write!(
                f,
                "{}call {attempt} answered in {elapsed:.1?}, {} + {} tokens",
                At(path),
                usage.input_tokens,
                usage.output_tokens
            ),
            Self::CallThrottled { path, error } => write!(f, "{}{error}", At(path)),
            Self::CallRetried {
                path,
                attempt,
                delay,
                error,
            } => write!(
                f,
                "{}call {attempt} failed, again in {delay:.1?}: {error}",
                At(path)
            ),
            Self::CallFailed { path, error } => write!(f, "{}call failed: {error}", At(path)),
            Self::ReplyRejected { path, ask, error } => {
                write!(f, "{}reply {ask} is asked for again: {error}", At(path))
            }
            Self::LaneCoolingDown { wait } => write!(f, "the lane cools down for {wait:.1?}"),
            Self::LaneSlowed { limit, factor } => match factor * 100.0 {
                percent if percent < 99.5 => {
                    write!(
                        f,
                        "the lane slows to {percent:.0} % of the limit on {limit}"
                    )
                }
                percent if percent < 100.5 => write!(f, "the lane slows to the limit on {limit}"),
                // The lane has estimated this limit: neither the user nor the provider has named it.
                _ => write!(
                    f,
                    "the lane slows to {factor:.1} times the estimated limit on {limit}"
                ),
            },
            Self::LaneConcurrencyReduced { in_flight } => {
                write!(f, "the lane allows {in_flight} calls in flight")
            }
            Self::LaneBurstLearned { limit, stored } => {
                write!(f, "the provider stores {stored} {limit}")
            }
            Self::LaneRetuned { limit, per_minute } => {
                write!(f, "the lane keeps to {per_minute} {limit} a minute")
            }
            Self::CallExceedsLimit {
                limit,
                needed,
                per_minute,
            } => write!(
                f,
                "one call takes {needed} {limit}, of which {per_minute} flow in within a minute"
            ),
            Self::LaneStopped { error } => write!(f, "the lane is stopped: {error}"),
            Self::StoreFailed { error, waiting } => {
                write!(f, "{waiting} results wait for the store: {error}")
            }
            Self::StageEnded {
                path,
                elapsed,
                error,
            }
            | Self::ItemSettled {
                path,
                elapsed,
                error,
            } => match error {
                None => write!(f, "{}done in {elapsed:.1?}", At(path)),
                // Cancelled work has not failed.
                Some(error) if error.is_cancelled() => write!(f, "{}{error}", At(path)),
                Some(error) => write!(f, "{}failed in {elapsed:.1?}: {error}", At(path)),
            },
        }
    }
}

/// Receives [`Event`]s. A closure `Fn(&Event)` is an observer.
///
/// Observers run on the path of the calls, so they must be quick: send slow work to a
/// channel. A panic in an observer is caught and counted
/// ([`Snapshot::observer_panics`](crate::context::Snapshot::observer_panics)); it never fails work.
pub trait Observer: Send + Sync + 'static {
    /// Receives an event, in the task where it happened. It is called once for each event.
    fn on_event(&self, event: &Event);
}

impl<F: Fn(&Event) + Send + Sync + 'static> Observer for F {
    fn on_event(&self, event: &Event) {
        self(event);
    }
}

/// The observers of a context.
#[derive(Default)]
pub(crate) struct Observers {
    list: Vec<Box<dyn Observer>>,
    panics: AtomicU64,
}

impl Observers {
    pub(crate) fn add(&mut self, observer: impl Observer) {
        self.list.push(Box::new(observer));
    }

    /// Whether there are observers.
    pub(crate) fn listen(&self) -> bool {
        !self.list.is_empty()
    }

    /// Passes an event to all observers; without observers the event is not made.
    pub(crate) fn tell(&self, event: impl FnOnce() -> Event) {
        if !self.listen() {
            return;
        }
        let event = event();
        for observer in &self.list {
            self.shield(|| observer.on_event(&event));
        }
    }

    /// Runs a callback of the user; a panic in it is caught and counted.
    pub(crate) fn shield(&self, callback: impl FnOnce()) {
        if catch_unwind(AssertUnwindSafe(callback)).is_err() {
            self.panics.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn panics(&self) -> u64 {
        self.panics.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_in_an_observer_is_counted_and_the_other_observers_get_the_event() {
        let told = Arc::new(AtomicU64::new(0));
        let mut observers = Observers::default();
        observers.add(|_: &Event| panic!("observer"));
        let count = Arc::clone(&told);
        observers.add(move |_: &Event| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        for _ in 0..2 {
            observers.tell(|| Event::CallStarted {
                path: "a".into(),
                attempt: 1,
            });
        }
        assert_eq!(observers.panics(), 2);
        assert_eq!(told.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn a_line_begins_with_the_path_if_there_is_one() {
        let sent = |path: &str| Event::CallStarted {
            path: path.into(),
            attempt: 1,
        };
        assert_eq!(sent("week[3]").to_string(), "week[3]: call 1 sent");
        assert_eq!(sent("").to_string(), "call 1 sent");
        let failed = Event::CallFailed {
            path: "".into(),
            error: Error::other("no"),
        };
        assert_eq!(failed.to_string(), "call failed: failed: no");
    }

    #[test]
    fn a_slower_lane_is_announced_as_slower() {
        let line = |factor| {
            let limit = "requests";
            Event::LaneSlowed { limit, factor }.to_string()
        };
        assert_eq!(
            line(0.784),
            "the lane slows to 78 % of the limit on requests"
        );
        assert_eq!(line(1.0), "the lane slows to the limit on requests");
        assert_eq!(
            line(1.7),
            "the lane slows to 1.7 times the estimated limit on requests"
        );
    }

    #[test]
    fn a_drained_item_is_reported_as_cancelled_and_not_as_failed() {
        let settled = |error| Event::ItemSettled {
            path: "page[3]".into(),
            elapsed: Duration::ZERO,
            error: Some(error),
        };
        let drained = settled(Error::cancelled("the context is draining"));
        assert_eq!(
            drained.to_string(),
            "page[3]: cancelled: the context is draining"
        );
        let failed = settled(Error::other("no"));
        assert_eq!(failed.to_string(), "page[3]: failed in 0.0ns: failed: no");
    }

    #[test]
    fn without_observers_no_event_is_made() {
        Observers::default().tell(|| unreachable!("no observer asked for it"));
    }
}
