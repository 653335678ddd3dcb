//! [`History`]: the failures of one request so far, and what follows from the next one.

use std::time::Duration;

use tokio::time::Instant;

use super::evidence::Streak;
use super::health::{self, CountedIn, Failing, Others, Refusal};
use super::{Call, Guard};
use crate::call::deployment::Deployment;
use crate::call::pool::{Turn, Visit};
use crate::call::retry::{Backoff, Class, LONGEST_WAIT, Retry};
use crate::error::{Error, ErrorKind, Persistence};
use crate::event::Event;

/// A refused account is asked again after this time, by one call.
const PROBE_AFTER: Duration = Duration::from_secs(5 * 60);
/// A request that the rate limit alone refuses is not given up earlier: most limits are those of a minute.
const REFUSED_FOR: Duration = Duration::from_secs(5 * 60);

/// What a request does after a call has failed.
pub(super) enum Next {
    /// It has failed for good.
    End {
        error: Error,
        /// Whether the call was an attempt; refusals by the rate limit are none.
        attempt: bool,
    },
    /// It goes to another deployment at once.
    Elsewhere,
    /// It is sent again after this time. The call was no attempt.
    Refused { delay: Duration, error: Error },
    /// It is sent again after this time.
    Retry { delay: Duration, error: Error },
}

/// The failures that count against the limits of [`Retry`].
#[derive(Debug, Clone, Copy, Default)]
struct Charged {
    attempts: u32,
    timeouts: u32,
}

/// The failures of one request.
pub(super) struct History<'a> {
    backoff: Backoff,
    /// At the group of deployments that it is sent to now.
    charged: Charged,
    /// Those of them since it was last counted in a series of failures.
    in_series: Charged,
    /// By which deployment it was counted last, and in what.
    counted: (usize, CountedIn),
    streak: Option<Streak<'a>>,
    refusals: Refusals,
    /// The last refusal, while it is in doubt whether it means the whole account.
    doubtful: Option<Error>,
}

/// Refusals that are no attempts, one after the other.
#[derive(Debug, Default)]
struct Refusals {
    count: u32,
    first: Option<Instant>,
    /// Since when no call at all was answered, and how many had been by then.
    stalled: Option<(Instant, u64)>,
    /// How many calls had been answered at the last one.
    answers: u64,
}

impl<'a> History<'a> {
    pub(super) fn new(retry: &Retry) -> Self {
        Self {
            backoff: retry.backoff(),
            charged: Charged::default(),
            in_series: Charged::default(),
            counted: (0, CountedIn::default()),
            streak: None,
            refusals: Refusals::default(),
            doubtful: None,
        }
    }

    /// The number under which the request is watched, if it is.
    pub(super) fn watch_id(&self) -> Option<u64> {
        self.streak.as_ref()?.watch_id()
    }

    /// Whether the rate limit refuses this request once more although others got through meanwhile. Then its
    /// refusal says nothing of the lane.
    pub(super) fn is_refused_alone(&self, call: &Call<'a>, error: &Error) -> bool {
        Class::of(error) == Class::Throttle
            && self.refusals.count > 0
            && call.guard.answers() > self.refusals.answers
    }

    /// The last refusal, if it was in doubt and has turned out to mean this request alone.
    pub(super) fn own_refusal(&mut self, guard: &Guard) -> Option<Error> {
        let (index, counted) = self.counted;
        let error = self.doubtful.take()?;
        if guard.health[index].is_own_refusal(counted) {
            return Some(error.with_account_wide(false));
        }
        self.doubtful = Some(error);
        None
    }

    /// Decides what follows from a failure. The permit is still held.
    pub(super) fn judge(
        &mut self,
        call: &Call<'a>,
        visit: &mut Visit,
        turn: &Turn<'_, Deployment>,
        sent: u64,
        error: Error,
    ) -> Next {
        let class = Class::of(&error);
        if self.counted.0 != turn.index() {
            self.counted = (turn.index(), CountedIn::default());
        }
        if class != Class::Throttle {
            self.refusals = Refusals {
                first: self.refusals.first.filter(|_| class == Class::Doubtful),
                ..Refusals::default()
            };
        }
        self.doubtful = None;
        match class {
            Class::Throttle => self.throttled(call, visit, error),
            Class::Transient => self.failed(call, visit, turn, sent, error),
            Class::Doubtful => self.refused(call, visit, turn, sent, error),
            Class::Account => stop(call, visit, turn, error, PROBE_AFTER),
            Class::Final => {
                // To refuse a request for what it says, the provider has to be there.
                if error.kind() == ErrorKind::InvalidRequest
                    && call.guard.health[turn.index()].answered(sent)
                {
                    turn.deployment().lane.end_probing();
                }
                end(error)
            }
        }
    }

    /// The rate limit refused the call.
    fn throttled(&mut self, call: &Call<'a>, visit: &mut Visit, error: Error) -> Next {
        let guard = call.guard;
        let alone = self.is_refused_alone(call, &error);
        let (refusals, now, answers) = (&mut self.refusals, Instant::now(), guard.answers());
        refusals.count += 1;
        refusals.answers = answers;
        let since = *refusals.first.get_or_insert(now);
        let stalled = refusals.stalled.get_or_insert((now, answers));
        if stalled.1 != answers {
            *stalled = (now, answers);
        }
        let patience = guard.retry.longest_stall();
        let stalled = now.saturating_duration_since(stalled.0) >= patience;
        let behind = refusals.count > 1;
        let next_call = guard.estimator.next_call();
        Streak::extend(
            &mut self.streak,
            &guard.watches,
            next_call,
            call.profile(),
            &error,
        );
        let long = now.saturating_duration_since(since) >= REFUSED_FOR;
        let attempt = false;
        if long && self.is_hopeless(guard) {
            let error = error.with_persistence(Persistence::Permanent);
            return Next::End { error, attempt };
        }
        if stalled {
            return Next::End { error, attempt };
        }
        if behind {
            visit.go_behind(&guard.pool);
        }
        // The lane waits for everybody, unless it was not told.
        let (own, lane) = match alone {
            true => {
                let own = self.backoff.next(fastrand::f64(), error.wait());
                (own, Duration::ZERO)
            }
            false => (Duration::ZERO, guard.pool.cooldown(visit)),
        };
        match call.in_time(own.max(lane), &error) {
            Ok(()) => Next::Refused { delay: own, error },
            Err(error) => Next::End { error, attempt },
        }
    }

    /// The call failed in a way that may pass.
    fn failed(
        &mut self,
        call: &Call<'a>,
        visit: &mut Visit,
        turn: &Turn<'_, Deployment>,
        sent: u64,
        error: Error,
    ) -> Next {
        let (guard, index, now) = (call.guard, turn.index(), Instant::now());
        visit.avoid(index);
        let health = &guard.health[index];
        let before = self.counted.1;
        let was_outage = health.was_outage(before);
        let next_call = guard.estimator.next_call();
        let failing = health.failed(now, sent, next_call, &mut self.counted.1);
        if self.counted.1 != before {
            if was_outage {
                self.forgive(&guard.retry);
            }
            self.in_series = Charged::default();
        }
        Streak::extend(
            &mut self.streak,
            &guard.watches,
            next_call,
            call.profile(),
            &error,
        );
        // Whoever can go elsewhere does, as soon as its attempts are used up.
        if let Failing::Outage { pause, since } = failing
            && !visit.has_fallback(&guard.pool)
        {
            let lane = &turn.deployment().lane;
            if let Some(pause) = pause {
                cool_down(guard, turn, pause);
            }
            if now.saturating_duration_since(since) < guard.retry.longest_stall() {
                self.forgive(&guard.retry);
                // A different request is the next probe.
                visit.go_behind(&guard.pool);
                return again(call, error.wait().unwrap_or_default(), error);
            }
            if pause.is_some() {
                // Those that wait are told. What comes later may try.
                lane.stop_for(without_success(since, &error), Duration::ZERO);
            }
        }
        // A connection that was not made in time has cost neither a slot for long nor money.
        let timed_out = error.is_timeout() && error.billed() != Some(false);
        self.charge(timed_out);
        let hopeless = self.is_hopeless(guard);
        if hopeless || self.attempts_left(&guard.retry) == 0 {
            if visit.fall_back(&guard.pool, index) && guard.pool.is_open_to(visit) {
                *self = Self::new(&guard.retry);
                return Next::Elsewhere;
            }
            return end(match hopeless {
                true => error.with_persistence(Persistence::Permanent),
                false => error,
            });
        }
        if self.attempts_left(&guard.retry) == 1 {
            visit.go_behind(&guard.pool);
        }
        let mut delay = self.backoff.next(fastrand::f64(), error.wait());
        if !guard.budget.spend(timed_out) {
            let slowed = guard.retry.slowed(fastrand::f64());
            // The budget does not decide about deadlines.
            let longest = call
                .time_left()
                .map_or(Duration::MAX, Option::unwrap_or_default);
            delay = delay.max(slowed.min(longest.saturating_sub(Duration::from_millis(1))));
        }
        again(call, delay, error)
    }

    /// The request was refused in a way that may concern the whole account.
    fn refused(
        &mut self,
        call: &Call<'a>,
        visit: &mut Visit,
        turn: &Turn<'_, Deployment>,
        sent: u64,
        error: Error,
    ) -> Next {
        let (guard, index, now) = (call.guard, turn.index(), Instant::now());
        let lane = turn.deployment().lane.snapshot();
        let others = Others {
            in_flight: lane.in_flight > 1,
            waiting: lane.waiting > 0,
        };
        let next_call = guard.estimator.next_call();
        let health = &guard.health[index];
        let content = call.request.digest();
        let counted = &mut self.counted.1;
        let refusal = health.refused(now, sent, next_call, counted, content, others);
        let since = *self.refusals.first.get_or_insert(now);
        visit.avoid(index);
        match refusal {
            Refusal::Account => {
                let long = error.wait().filter(|wait| *wait > LONGEST_WAIT);
                let probe_after = long.map_or(PROBE_AFTER, |wait| wait.min(PROBE_AFTER));
                let error = match long {
                    Some(wait) => parked(wait, &error),
                    None => error,
                };
                stop(
                    call,
                    visit,
                    turn,
                    error.with_account_wide(true),
                    probe_after,
                )
            }
            _ if guard.pool.has_untried(visit) => Next::Elsewhere,
            Refusal::Unknown { pause }
                if now.saturating_duration_since(since) < guard.retry.longest_stall() =>
            {
                if let Some(pause) = pause {
                    cool_down(guard, turn, pause);
                }
                // Different requests show whether they are refused too.
                visit.go_behind(&guard.pool);
                self.doubtful = Some(error.clone());
                self.refusals.count += 1;
                let delay = jittered(health::pause(self.refusals.count - 1));
                match error.kind() {
                    ErrorKind::Throttled => match call.in_time(delay, &error) {
                        Ok(()) => Next::Refused { delay, error },
                        Err(error) => end(error),
                    },
                    _ => again(call, delay, error),
                }
            }
            _ if visit.fall_back(&guard.pool, index) && guard.pool.is_open_to(visit) => {
                *self = Self::new(&guard.retry);
                Next::Elsewhere
            }
            _ => {
                let attempt = error.kind() != ErrorKind::Throttled;
                let error = error.with_account_wide(false);
                Next::End { error, attempt }
            }
        }
    }

    fn charge(&mut self, timed_out: bool) {
        for charged in [&mut self.charged, &mut self.in_series] {
            charged.attempts += 1;
            charged.timeouts += u32::from(timed_out);
        }
    }

    /// Takes the failures back that belong to an outage.
    fn forgive(&mut self, retry: &Retry) {
        let in_outage = std::mem::take(&mut self.in_series);
        self.charged.attempts -= in_outage.attempts;
        self.charged.timeouts -= in_outage.timeouts;
        self.backoff = retry.backoff();
    }

    fn attempts_left(&self, retry: &Retry) -> u32 {
        let attempts = retry.max_attempts().saturating_sub(self.charged.attempts);
        let timeouts = retry.max_timeouts().saturating_sub(self.charged.timeouts);
        // Without a timeout so far, the next call need not end in one.
        match self.charged.timeouts {
            0 => attempts,
            _ => attempts.min(timeouts),
        }
    }

    fn is_hopeless(&self, guard: &Guard) -> bool {
        let least = guard.retry.max_identical();
        let streak = self.streak.as_ref();
        streak.is_some_and(|streak| streak.is_evidence(least))
    }
}

fn end(error: Error) -> Next {
    Next::End {
        error,
        attempt: true,
    }
}

fn again(call: &Call<'_>, delay: Duration, error: Error) -> Next {
    match call.in_time(delay, &error) {
        Ok(()) => Next::Retry { delay, error },
        Err(error) => end(error),
    }
}

/// Lets one call at a time through after a pause, until one is answered.
fn cool_down(guard: &Guard, turn: &Turn<'_, Deployment>, pause: Duration) {
    let wait = jittered(pause);
    turn.deployment().lane.cool_down(wait);
    guard.observers.tell(|| Event::LaneCoolingDown { wait });
}

/// No call of this account can succeed: nobody is sent there, until one call asks again. The request goes to another
/// deployment, if there is one.
fn stop(
    call: &Call<'_>,
    visit: &Visit,
    turn: &Turn<'_, Deployment>,
    error: Error,
    probe_after: Duration,
) -> Next {
    let guard = call.guard;
    let lane = &turn.deployment().lane;
    lane.stop_for(error.clone(), jittered(probe_after));
    guard.observers.tell(|| Event::LaneStopped {
        error: error.clone(),
    });
    match guard.pool.is_open_to(visit) {
        true => Next::Elsewhere,
        false => end(error),
    }
}

/// Up to a tenth is added, so that several processes do not come at once.
fn jittered(pause: Duration) -> Duration {
    pause.saturating_add((pause / 10).mul_f64(fastrand::f64()))
}

/// What those are told that wait for a lane whose provider asks for a wait that is too long.
fn parked(wait: Duration, error: &Error) -> Error {
    let message = format!(
        "the provider asks to wait so long that the lane is parked: {}",
        error.message()
    );
    Error::new(error.kind(), message)
        .with_wait(wait)
        .with_persistence(Persistence::Exhausted)
}

/// What those are told that wait in an outage that lasts for too long.
fn without_success(since: Instant, error: &Error) -> Error {
    let message = format!(
        "no call was answered for {:.0?}; the last one: {}",
        since.elapsed(),
        error.message()
    );
    Error::new(error.kind(), message)
        .with_billed(Some(false))
        .with_persistence(Persistence::Exhausted)
        .with_account_wide(true)
}
