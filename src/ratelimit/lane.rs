//! [`Lane`] and [`Permit`]: the asynchronous handle of the scheduler.

mod timer;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, MutexGuard, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::Instant;

use self::timer::{TimerId, TimerTask, Timers};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::ratelimit::bucket::{Nanos, nanos};
use crate::ratelimit::pace::Pace;
use crate::ratelimit::queue::WaiterKey;
use crate::ratelimit::scheduler::{Admission, GrantId, Scheduler, Wakeups};
use crate::ratelimit::types::{CallOutcome, LaneSnapshot, Need, QueuePosition};
use crate::request::RateSnapshot;
use crate::sync::Mutex;

/// The queue in front of one provider account and group of models, and its limits.
///
/// Every call [acquires](Lane::acquire) a [`Permit`] first. Permits are granted in
/// order of arrival, each when **all** it needs is there: a request, its tokens and
/// a slot in flight. No call is refused and none overtakes, so large needs do not
/// starve; one larger than a limit's burst waits until that limit is full, goes,
/// and leaves a debt that those behind it wait for.
///
/// When the provider refuses a call ([`CallOutcome::Throttled`], [`CallOutcome::Overloaded`]),
/// the lane cools down for all calls, for the time the provider asks plus up to a tenth
/// of it (2 s at most), so that no call comes early and several processes do not
/// come at once. Without such a time it is half a second, doubled with every
/// refusal in a row, up to 30 s (5 s for overload). Then the lane resumes empty: waiting calls go
/// at its rate, not all at once. In a lane without a rate limit they all go.
///
/// A lane is a handle: clones share one queue. Give one to everything that shares
/// an account's limits.
///
/// # Guarantee
///
/// In any window, the calls sent are at most the limit's burst plus its rate times
/// the window (or one call that is larger than the burst). Tokens are booked when
/// they are known, as providers do it: the estimate with the permit, the
/// difference when the call [finishes](Permit::finish).
///
/// # Example
///
/// ```
/// use throughline::{Pace, Usage, ratelimit::{CallOutcome, Lane, Need}};
/// use tokio::time::{Duration, Instant};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> throughline::Result<()> {
/// let lane = Lane::new(Pace::per_minute(60).tokens(600_000));
/// let start = Instant::now();
/// for _ in 0..3 {
///     let mut permit = lane.acquire(Need::new(1_000, 500)).await?;
///     permit.mark_sent();
///     // ... the call ...
///     permit.finish(CallOutcome::Succeeded { usage: Some(Usage::new(990, 120)) });
/// }
/// // The first goes at once, then one goes every second.
/// assert_eq!(start.elapsed(), Duration::from_secs(2));
/// # Ok(()) }
/// ```
///
/// # Example: the provider asks to wait
///
/// ```
/// use throughline::{Pace, ratelimit::{Binding, CallOutcome, Lane, Need}};
/// use tokio::time::{Duration, Instant};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> throughline::Result<()> {
/// let lane = Lane::new(Pace::per_minute(60));
/// let permit = lane.acquire(Need::new(100, 100)).await?;
/// permit.finish(CallOutcome::Throttled { wait: Some(Duration::from_secs(20)) });
/// assert_eq!(lane.snapshot().binding, Binding::Cooldown);
///
/// let start = Instant::now();
/// let _permit = lane.acquire(Need::new(100, 100)).await?;
/// assert!(start.elapsed() >= Duration::from_secs(20));
/// # Ok(()) }
/// ```
#[doc(alias = "rate limiter")]
#[doc(alias = "semaphore")]
#[derive(Clone)]
pub struct Lane {
    shared: Arc<Shared>,
}

/// The state that the handles of a lane, its permits and its timers share.
struct Shared {
    start: Instant,
    state: Mutex<State>,
}

/// The state that the lock of a lane guards.
struct State {
    scheduler: Scheduler<Waker>,
    timers: Timers,
    /// Notified when the lane is stopped, resumed or retuned by its handle.
    watchers: Vec<Weak<Notify>>,
}

impl Lane {
    /// Makes a lane with the limits of `pace`, all of them unused so far.
    pub fn new(pace: Pace) -> Self {
        Self::seeded(pace, fastrand::u64(..))
    }

    /// Makes a lane whose jitter is reproducible, for tests and simulations.
    pub fn seeded(pace: Pace, seed: u64) -> Self {
        Self {
            shared: Arc::new(Shared {
                start: Instant::now(),
                state: Mutex::new(State {
                    scheduler: Scheduler::new(&pace, seed),
                    timers: Timers::default(),
                    watchers: Vec::new(),
                }),
            }),
        }
    }

    /// Waits for its turn in the queue and for everything that `need` asks.
    ///
    /// The place in the queue is `need`'s ([`Need::at`]), or else taken when the
    /// returned future is first polled.
    ///
    /// A future that waits should be polled when it is woken, or be dropped. One that is not
    /// polled keeps no other from going: the lane keeps the time by a small task in each Tokio
    /// runtime in which callers wait, and takes back what it has granted to a caller that
    /// does not come for it within some 50 ms. The caller keeps its place in the queue: when it
    /// is polled again, it is next.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the queue and gives back whatever it had been
    /// granted. Nothing is lost but the place, and that only if it was not from
    /// [`next_position`](Lane::next_position).
    ///
    /// # Errors
    ///
    /// Why the lane is stopped ([`stop`](Lane::stop)), if it is or while this waits; and
    /// [`ErrorKind::Throttled`](crate::ErrorKind::Throttled) when a call ended as [`CallOutcome::Throttled`] with a
    /// wait of more than ten minutes: then the lane is parked until that is over. (A [`Context`](crate::Context) reports
    /// no such wait to its lanes; see [`timeouts`](crate::timeouts).) Nothing was sent.
    ///
    /// # Panics
    ///
    /// If it must wait in a Tokio runtime whose timer is not enabled; or for a limit to refill
    /// outside any runtime, while no other caller waits in one.
    pub fn acquire(&self, need: Need) -> impl Future<Output = Result<Permit>> + Send {
        Acquire {
            lane: self,
            need,
            stage: Stage::Arriving,
            timer: None,
        }
    }

    /// Returns a permit if one is available at once and no other call waits for it.
    pub fn try_acquire(&self, need: &Need) -> Option<Permit> {
        self.shared.step(|scheduler, now, _| {
            let grant = scheduler.try_enter(now, need)?;
            let position = need.position.unwrap_or_else(|| scheduler.next_position());
            Some(self.permit(grant, position))
        })
    }

    /// Takes the next place in the order of arrival, for [`Need::at`].
    ///
    /// A call that keeps its place over its retries comes before all that arrived
    /// after it first did, instead of behind them.
    ///
    /// ```
    /// use throughline::{Pace, ratelimit::{Lane, Need}};
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> throughline::Result<()> {
    /// let lane = Lane::new(Pace::normal());
    /// let position = lane.next_position();
    /// for _attempt in 0..3 {
    ///     let permit = lane.acquire(Need::new(100, 100).at(position)).await?;
    /// #   drop(permit);
    ///     // ... the call; leave the loop when it succeeds ...
    /// }
    /// # Ok(()) }
    /// ```
    pub fn next_position(&self) -> QueuePosition {
        self.shared.lock().scheduler.next_position()
    }

    /// Changes the limits, also for the calls that wait already.
    ///
    /// The level of each limit stays as it is, in requests and tokens, and grows
    /// at the new rate; a new limit starts unused. If there
    /// are more calls in flight than now allowed, they end in their own time. Everything that
    /// was learned of a limit whose rate changes is forgotten. A lane that is stopped, parked or cooling down
    /// starts again, as by [`resume`](Lane::resume).
    pub fn retune(&self, pace: Pace) {
        self.shared
            .step(|scheduler, now, wakeups| scheduler.retune(now, &pace, wakeups));
        self.shared.tell_watchers();
    }

    /// Stops the lane: all calls that wait or arrive fail with `why` at once,
    /// and nothing is sent. A [`Context`](crate::Context) does so by itself when the
    /// provider refuses the whole account (credentials, quota).
    ///
    /// Calls in flight end in their own time. [`resume`](Lane::resume) or
    /// [`retune`](Lane::retune) start it again.
    pub fn stop(&self, why: Error) {
        self.shared
            .step(|scheduler, _, wakeups| scheduler.stop(why, None, wakeups));
        self.shared.tell_watchers();
    }

    /// As [`stop`](Lane::stop), for as long as `time`. Then one call at a time is let through, until
    /// one succeeds.
    pub(crate) fn stop_for(&self, why: Error, time: Duration) {
        self.shared.step(|scheduler, now, wakeups| {
            let until = now.saturating_add(nanos(time));
            scheduler.stop(why, Some(until), wakeups);
        });
        self.shared.tell_watchers();
    }

    /// Sends nothing for as long as `wait`, and then one call at a time until one succeeds. Calls
    /// that wait go on waiting.
    pub(crate) fn cool_down(&self, wait: Duration) {
        self.shared
            .step(|scheduler, now, wakeups| scheduler.cool_down(now, wait, wakeups));
        self.shared.tell_watchers();
    }

    /// Lets calls through as usual after [`cool_down`](Lane::cool_down): the provider answers.
    pub(crate) fn end_probing(&self) {
        self.shared
            .step(|scheduler, now, wakeups| scheduler.end_probing(now, wakeups));
    }

    /// Resumes a lane that was stopped or parked, or that cools down because the provider
    /// refused a call. The wait that the provider asked for is forgotten; the lane resumes empty, at
    /// its rate, and cools down again when the provider refuses again.
    pub fn resume(&self) {
        self.shared
            .step(|scheduler, now, wakeups| scheduler.resume(now, wakeups));
        self.shared.tell_watchers();
    }

    /// Notifies `watcher` from now on when the lane is stopped, resumed, cooled down or retuned by other means
    /// than the end of a call.
    pub(crate) fn notify_on_change(&self, watcher: &Arc<Notify>) {
        let mut state = self.shared.lock();
        state.watchers.retain(|watcher| watcher.strong_count() > 0);
        state.watchers.push(Arc::downgrade(watcher));
    }

    /// Returns why the lane is stopped, if it is.
    pub fn stopped(&self) -> Option<Error> {
        self.shared
            .step(|scheduler, now, _| scheduler.stopped(now).cloned())
    }

    /// Returns the state of the lane now.
    pub fn snapshot(&self) -> LaneSnapshot {
        self.shared
            .step(|scheduler, now, _| scheduler.snapshot(now))
    }

    fn finish(
        &self,
        grant: GrantId,
        headers: Option<&RateSnapshot>,
        outcome: CallOutcome,
    ) -> Vec<Event> {
        self.shared
            .step(|scheduler, now, wakeups| scheduler.finish(now, grant, headers, outcome, wakeups))
    }

    fn permit(&self, grant: GrantId, position: QueuePosition) -> Permit {
        Permit {
            lane: self.clone(),
            grant: Some(grant),
            position,
            sent: false,
        }
    }
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Lane").field(&self.snapshot()).finish()
    }
}

impl Shared {
    /// Locks the state, also after a panic. A panic cannot leave the scheduler half changed, because nothing
    /// between two changes can fail.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Runs one step of the scheduler.
    fn step<R>(
        &self,
        step: impl FnOnce(&mut Scheduler<Waker>, Nanos, &mut Wakeups<Waker>) -> R,
    ) -> R {
        self.step_with_timers(|state, now, wakeups| step(&mut state.scheduler, now, wakeups))
    }

    /// Runs one step of the scheduler and its timers. The clock is read under the lock, so that
    /// the time of the scheduler never runs backwards; callers are woken after the lock is released.
    fn step_with_timers<R>(
        &self,
        step: impl FnOnce(&mut State, Nanos, &mut Wakeups<Waker>) -> R,
    ) -> R {
        let mut wakeups = Wakeups::default();
        let result = {
            let state = &mut *self.lock();
            let result = step(state, nanos(self.start.elapsed()), &mut wakeups);
            state.keep_time(&mut wakeups);
            result
        };
        wakeups.run(Waker::wake);
        result
    }

    fn tell_watchers(&self) {
        let watchers: Vec<_> = {
            let state = self.lock();
            state.watchers.iter().filter_map(Weak::upgrade).collect()
        };
        for watcher in watchers {
            watcher.notify_waiters();
        }
    }

    /// Converts a time of the scheduler; one that is too late becomes as good as never.
    fn instant(&self, at: Nanos) -> Instant {
        const DECADES: Duration = Duration::from_secs(30 * 365 * 86_400);
        let instant = self.start.checked_add(Duration::from_nanos(at));
        instant.unwrap_or_else(|| self.start + DECADES)
    }
}

impl State {
    /// Makes sure after each step that a timer looks at the deadline.
    fn keep_time(&mut self, wakeups: &mut Wakeups<Waker>) {
        if !self.timers.is_empty() {
            let waiting = !self.scheduler.is_empty();
            self.timers
                .notify(self.scheduler.deadline(), waiting, wakeups);
        } else if self.scheduler.head_ready_at().is_some() {
            // The head waits outside any runtime: it must panic.
            self.scheduler.wake_head(wakeups);
        }
    }
}

/// The future of a caller that waits for a permit.
struct Acquire<'a> {
    lane: &'a Lane,
    /// With the place in the queue, once the caller has come.
    need: Need,
    stage: Stage,
    /// The timer of the runtime in which this was polled last, while it waits.
    timer: Option<TimerId>,
}

#[derive(Clone, Copy)]
enum Stage {
    Arriving,
    Waiting(WaiterKey),
    Done,
}

impl Future for Acquire<'_> {
    type Output = Result<Permit>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Permit>> {
        let this = &mut *self;
        let shared = &this.lane.shared;
        let mut needs_timer = Ok(None);
        let turn = shared.step_with_timers(|state, now, wakeups| {
            let State {
                scheduler, timers, ..
            } = state;
            let turn = match this.stage {
                Stage::Arriving => {
                    let position = this
                        .need
                        .position
                        .unwrap_or_else(|| scheduler.next_position());
                    this.need.position = Some(position);
                    scheduler.enter(now, &this.need, cx.waker(), wakeups)
                }
                Stage::Waiting(key) => scheduler.poll(now, key, &this.need, cx.waker(), wakeups),
                Stage::Done => panic!("polled after it was ready"),
            };
            if let Admission::Queued(key) = turn {
                this.stage = Stage::Waiting(key);
                needs_timer = match Handle::try_current() {
                    Ok(runtime) => Ok(timers.join(runtime, &mut this.timer)),
                    Err(_) if timers.is_empty() && scheduler.head_ready_at().is_some() => Err(()),
                    Err(_) => Ok(None),
                };
            } else {
                this.stage = Stage::Done;
                timers.leave(this.timer.take());
            }
            turn
        });
        match needs_timer {
            Ok(None) => {}
            Ok(Some((runtime, id))) => TimerTask::spawn(&runtime, shared, id),
            Err(()) => panic!("a call must wait for its lane outside a Tokio runtime"),
        }
        match turn {
            Admission::Granted(grant) => {
                let position = this.need.position.expect("it has come");
                Poll::Ready(Ok(this.lane.permit(grant, position)))
            }
            Admission::Stopped(why) => Poll::Ready(Err(why)),
            Admission::Queued(_) => Poll::Pending,
        }
    }
}

impl Drop for Acquire<'_> {
    fn drop(&mut self) {
        if let Stage::Waiting(key) = self.stage {
            let timer = self.timer.take();
            self.lane.shared.step_with_timers(|state, now, wakeups| {
                state.timers.leave(timer);
                state.scheduler.leave(now, key, wakeups);
            });
        }
    }
}

/// The right to make one call now, from [`Lane::acquire`].
///
/// A permit settles with its lane exactly once, however it ends:
///
/// | ends by | request | tokens | slot in flight |
/// |---|---|---|---|
/// | drop before [`mark_sent`](Permit::mark_sent) | given back | given back | free |
/// | drop after it | stays charged | stay charged | free |
/// | [`finish`](Permit::finish) | stays charged | by [`CallOutcome`] | free |
///
/// An unsent permit gives back the units that have not flowed in again while it was
/// held: all of them if it is dropped soon, none if the limit has recovered in the meantime.
#[must_use = "dropping a permit gives it back at once"]
pub struct Permit {
    lane: Lane,
    /// `None` once it has ended.
    grant: Option<GrantId>,
    position: QueuePosition,
    sent: bool,
}

impl Permit {
    /// Returns the position of its call in the queue: with [`Need::at`], a retry takes it again
    /// and comes before all calls that arrived since.
    pub fn position(&self) -> QueuePosition {
        self.position
    }

    /// Marks the call as sent: from here on a drop does not give its charge back.
    pub fn mark_sent(&mut self) {
        self.sent = true;
    }

    /// Ends the permit with the outcome of its call.
    ///
    /// - [`Succeeded`](CallOutcome::Succeeded): the tokens are settled to the usage. Too high an estimate is given
    ///   back; too low an estimate becomes a debt.
    /// - [`Throttled`](CallOutcome::Throttled): the tokens are given back, the request
    ///   stays charged, because providers count it. The lane cools down for all calls.
    /// - [`Overloaded`](CallOutcome::Overloaded): everything stays charged. If most calls are refused, the lane
    ///   cools down, more briefly.
    /// - [`Failed`](CallOutcome::Failed): the tokens are settled to the charge; the
    ///   estimate stays where that is not known.
    /// - [`NotSent`](CallOutcome::NotSent) and [`Abandoned`](CallOutcome::Abandoned): as a drop before and after
    ///   [`mark_sent`](Permit::mark_sent).
    pub fn finish(mut self, outcome: CallOutcome) {
        self.end(outcome);
    }

    /// Does [`observe`](Permit::observe) and [`finish`](Permit::finish) in one step of the lane.
    /// Returns what that changed for all callers.
    pub(crate) fn conclude(
        mut self,
        headers: Option<&RateSnapshot>,
        outcome: CallOutcome,
    ) -> Vec<Event> {
        let Some(grant) = self.grant.take() else {
            return Vec::new();
        };
        self.lane.finish(grant, headers, outcome)
    }

    /// Applies the rate-limit headers of the reply, or of the error. Call it
    /// before [`finish`](Permit::finish).
    ///
    /// A limit that has more left than the headers say is lowered to that, less the calls sent
    /// since this one; a limit that is not configured is kept from now on; and
    /// when this call is [throttled](CallOutcome::Throttled), they show for which limit. The headers of
    /// an older call are ignored, and a lane that is not [adaptive](Pace::adaptive) ignores all.
    pub fn observe(&mut self, headers: &RateSnapshot) {
        if let Some(grant) = &self.grant {
            self.lane
                .shared
                .step(|scheduler, now, wakeups| scheduler.observe(now, grant, headers, wakeups));
        }
    }

    #[inline]
    fn end(&mut self, outcome: CallOutcome) -> Vec<Event> {
        match self.grant.take() {
            Some(grant) => self.lane.finish(grant, None, outcome),
            None => Vec::new(),
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.end(if self.sent {
            CallOutcome::Abandoned
        } else {
            CallOutcome::NotSent
        });
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Permit")
            .field("sent", &self.sent)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_poisoned_lock_is_recovered() {
        let lane = Lane::new(Pace::per_minute(60));
        let poisoner = lane.clone();
        let panicked = std::thread::spawn(move || {
            let _guard = poisoner.shared.state.lock();
            panic!("while holding the lock");
        });
        assert!(panicked.join().is_err());
        assert!(lane.shared.state.is_poisoned());
        lane.acquire(Need::new(1, 1)).await.unwrap().mark_sent();
        lane.acquire(Need::new(1, 1)).await.unwrap().mark_sent();
        assert_eq!(lane.shared.start.elapsed(), Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_cooldown_one_call_at_a_time_goes_until_one_succeeds() {
        let lane = Lane::new(Pace::unlimited());
        let need = Need::new(1, 1);
        lane.cool_down(Duration::from_secs(3));
        let mut probe = lane.acquire(need).await.unwrap();
        assert_eq!(lane.shared.start.elapsed(), Duration::from_secs(3));
        probe.mark_sent();
        let mut second = queued(&lane, need);
        assert!(second.as_mut().now_or_never().is_none());
        probe.finish(CallOutcome::Failed { usage: None });
        let probe = second.await.unwrap();
        let mut others = [(); 2].map(|()| queued(&lane, need));
        for other in &mut others {
            assert!(other.as_mut().now_or_never().is_none());
        }
        drop(probe);
        let [next, last] = others;
        let probe = next.await.unwrap();
        probe.finish(CallOutcome::Succeeded { usage: None });
        let _both = (last.await.unwrap(), lane.acquire(need).await.unwrap());
        assert_eq!(lane.snapshot().in_flight, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_that_does_not_end_lets_another_one_go() {
        let lane = Lane::new(Pace::unlimited());
        let need = Need::new(1, 1);
        lane.cool_down(Duration::from_secs(3));
        let mut stuck = lane.acquire(need).await.unwrap();
        stuck.mark_sent();
        let probe = lane.acquire(need).await.unwrap();
        assert_eq!(lane.shared.start.elapsed(), Duration::from_secs(63));
        drop(stuck);
        assert!(lane.try_acquire(&need).is_none(), "the other is under way");
        probe.finish(CallOutcome::Succeeded { usage: None });
        assert!(lane.try_acquire(&need).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_that_ends_by_itself_lets_one_probe_through() {
        let lane = Lane::new(Pace::unlimited());
        let need = Need::new(1, 1);
        let why = || Error::other("refused");
        lane.stop_for(why(), Duration::from_secs(300));
        assert!(lane.acquire(need).await.is_err());
        tokio::time::sleep(Duration::from_secs(301)).await;
        let probe = lane.acquire(need).await.unwrap();
        let waiting = queued(&lane, need);
        assert!(lane.try_acquire(&need).is_none());
        lane.stop_for(why(), Duration::from_secs(300));
        drop(probe);
        assert!(waiting.await.is_err());
        lane.resume();
        let _both = [lane.try_acquire(&need), lane.try_acquire(&need)].map(Option::unwrap);
    }

    type Waiting<'a> = Pin<Box<dyn Future<Output = Result<Permit>> + Send + 'a>>;

    /// A call that has queued already.
    fn queued(lane: &Lane, need: Need) -> Waiting<'_> {
        let mut waiting: Waiting<'_> = Box::pin(lane.acquire(need));
        assert!(waiting.as_mut().now_or_never().is_none());
        waiting
    }
}
