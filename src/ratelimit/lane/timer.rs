//! Timers: the tasks that let callers through when their time comes.
//!
//! A lane has one timer in each Tokio runtime in which callers wait for it. It sleeps until the
//! next moment at which anything changes by itself (the next call can go, an offer expires), lets
//! everybody through who can go by then, and ends when no caller waits there any more.
//!
//! - Not in the future of a caller, because that may not be polled for long.
//! - One in each runtime, because any runtime may be blocked, idle or gone; then its own callers
//!   cannot go either, and those of the others have their own timer.
//! - Only while callers wait, and with a weak reference to the lane, so that nothing keeps a
//!   paused clock from standing still or a lane from being dropped. A runtime that shuts down
//!   drops the timer as it drops any task.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker, ready};

use tokio::runtime::{self, Handle};
use tokio::time::{Sleep, sleep_until};

use super::Shared;
use crate::ratelimit::bucket::Nanos;
use crate::ratelimit::scheduler::Wakeups;

/// Names one timer of a lane. It is not used again when that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TimerId(u64);

/// The timers of one lane.
#[derive(Debug, Default)]
pub(super) struct Timers {
    running: Vec<Timer>,
    next_id: u64,
}

#[derive(Debug)]
struct Timer {
    id: TimerId,
    runtime: runtime::Id,
    /// The callers that wait in its runtime.
    waiters: usize,
    /// When it looks next by itself.
    wakes_at: Option<Nanos>,
    /// `None` while it is awake.
    waker: Option<Waker>,
}

impl Timers {
    pub(super) fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    /// A caller waits in `runtime`: afterwards `member` names the timer there. Returns it if
    /// that must be spawned first.
    pub(super) fn join(
        &mut self,
        runtime: Handle,
        member: &mut Option<TimerId>,
    ) -> Option<(Handle, TimerId)> {
        let id = runtime.id();
        let timer = self.running.iter_mut().find(|timer| timer.runtime == id);
        if let Some(timer) = timer {
            if *member != Some(timer.id) {
                timer.waiters += 1;
                let before = member.replace(timer.id);
                self.leave(before);
            }
            return None;
        }
        self.leave(member.take());
        self.next_id += 1;
        let new = TimerId(self.next_id);
        self.running.push(Timer {
            id: new,
            runtime: id,
            waiters: 1,
            wakes_at: None,
            waker: None,
        });
        *member = Some(new);
        Some((runtime, new))
    }

    /// A caller waits no more.
    pub(super) fn leave(&mut self, member: Option<TimerId>) {
        // The timer may have ended before.
        if let Some(timer) = member.and_then(|id| self.get_mut(id)) {
            timer.waiters -= 1;
        }
    }

    /// Wakes the timers that would look too late, and those that have nothing left to do.
    pub(super) fn notify(
        &mut self,
        deadline: Option<Nanos>,
        waiting: bool,
        wakeups: &mut Wakeups<Waker>,
    ) {
        for timer in &mut self.running {
            let done = !waiting || timer.waiters == 0;
            let late = deadline.is_some_and(|at| timer.wakes_at.is_none_or(|then| at < then));
            if done || late {
                wakeups.wake(timer.waker.take());
            }
        }
    }

    fn get_mut(&mut self, id: TimerId) -> Option<&mut Timer> {
        self.running.iter_mut().find(|timer| timer.id == id)
    }

    /// Ends a timer. Says whether it was still there.
    fn remove(&mut self, id: TimerId) -> bool {
        let before = self.running.len();
        self.running.retain(|timer| timer.id != id);
        self.running.len() < before
    }
}

/// The next step of a timer.
enum Next {
    /// Looks again when the other tasks of its runtime that are ready have had their turn.
    Yield,
    Sleep(Nanos),
    /// Sleeps until it is woken: only the end of a call changes anything.
    Idle,
    End,
}

/// The task of a timer.
pub(super) struct TimerTask {
    lane: Weak<Shared>,
    id: TimerId,
    sleep: Option<Pin<Box<Sleep>>>,
    /// Offers have run out, and callers that are about to be polled had their turn.
    yielded: bool,
}

impl TimerTask {
    /// # Panics
    /// If the runtime, which must be the current one, has no timer.
    pub(super) fn spawn(runtime: &Handle, lane: &Arc<Shared>, id: TimerId) {
        let mut task = Self {
            lane: Arc::downgrade(lane),
            id,
            sleep: None,
            yielded: false,
        };
        // Here, so that a runtime without a timer panics in the caller and not in the task.
        task.sleep = Some(Box::pin(sleep_until(lane.instant(0))));
        runtime.spawn(task);
    }

    fn look(&mut self, lane: &Shared, waker: &Waker) -> Next {
        lane.step_with_timers(|state, now, wakeups| {
            let scheduler = &mut state.scheduler;
            let expired = scheduler.has_expired(now);
            let expire = expired && self.yielded;
            scheduler.tick(now, expire, wakeups);
            self.yielded = expired && !self.yielded;
            if self.yielded {
                return Next::Yield;
            }
            let deadline = scheduler.deadline();
            let done = scheduler.is_empty();
            let Some(timer) = state.timers.get_mut(self.id) else {
                return Next::End;
            };
            if done || timer.waiters == 0 {
                state.timers.remove(self.id);
                return Next::End;
            }
            timer.wakes_at = deadline;
            wakeups.discard(timer.waker.replace(waker.clone()));
            deadline.map_or(Next::Idle, Next::Sleep)
        })
    }
}

impl Future for TimerTask {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let Some(lane) = self.lane.upgrade() else {
                return Poll::Ready(());
            };
            match self.look(&lane, cx.waker()) {
                Next::End => return Poll::Ready(()),
                Next::Idle => {
                    self.sleep = None;
                    return Poll::Pending;
                }
                Next::Yield => {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Next::Sleep(at) => {
                    let at = lane.instant(at);
                    let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep_until(at)));
                    sleep.as_mut().reset(at);
                    // Polled without the lock of the lane.
                    ready!(sleep.as_mut().poll(cx));
                }
            }
        }
    }
}

impl Drop for TimerTask {
    /// Its runtime shuts down, or a waker that it called has panicked. The callers that wait in
    /// other runtimes have their own timers. Where there is none, callers must see to one.
    fn drop(&mut self) {
        let Some(lane) = self.lane.upgrade() else {
            return;
        };
        lane.step_with_timers(|state, _, wakeups| {
            if state.timers.remove(self.id) && state.timers.is_empty() {
                state.scheduler.wake_all(wakeups);
            }
        });
    }
}
