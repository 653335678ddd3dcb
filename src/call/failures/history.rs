//! [`History`]: the failures of one request so far, and its next step after another one.

use std::time::Duration;

use tokio::time::Instant;

use super::FailureClass;
use super::health::{self, CountedIn, Failing, Health, Others, Refusal};
use super::poison::Streak;
use crate::call::deployments::DeploymentPermit;
use crate::call::retry_policy::{Backoff, Retry};
use crate::call::{Call, CallStack};
use crate::error::{Error, ErrorKind, Persistence};
use crate::event::Event;
use crate::ratelimit::LONGEST_RETRY_AFTER;

/// A refused account is tried again after this time, by one call.
const PROBE_AFTER: Duration = Duration::from_secs(5 * 60);
/// The shortest time after which a request is given up that only the rate limit refuses: most limits are per minute.
const REFUSED_FOR: Duration = Duration::from_secs(5 * 60);

/// The next step of a request after a failed call.
pub(in crate::call) enum NextStep {
    /// The request has failed for good.
    Fail {
        error: Error,
        /// Whether the call counts as an attempt; a refusal by the rate limit does not.
        is_attempt: bool,
    },
    /// The request is sent to another deployment at once.
    Elsewhere,
    /// The request is sent again after this time; if it is zero, after the wait of its lane or the one that the provider
    /// asks this call for, as the retry loop decides. The call does not count as an attempt.
    Refused { delay: Duration, error: Error },
    /// The request is sent again after this time.
    Retry { delay: Duration, error: Error },
}

/// The failures that count against the limits of [`Retry`].
#[derive(Debug, Clone, Copy, Default)]
struct Charged {
    attempts: u32,
    timeouts: u32,
}

/// The failures of one request.
pub(in crate::call) struct History<'a> {
    backoff: Backoff,
    /// Those at the group of deployments that the request is sent to now.
    charged: Charged,
    /// Those of them since it was last counted in a series of failures.
    in_series: Charged,
    /// The deployment whose health it was last counted in, by index, and in which series.
    counted: (usize, CountedIn),
    streak: Option<Streak<'a>>,
    refusals: Refusals,
    /// The last refusal, while it is not known whether it concerns the whole account.
    doubtful: Option<Error>,
}

/// Refusals in a row that do not count as attempts.
#[derive(Debug, Default)]
struct Refusals {
    count: u32,
    first: Option<Instant>,
    /// The time since which no call of the context was answered, and the number of answers by then.
    stalled: Option<(Instant, u64)>,
    /// The number of answers at the last refusal.
    answers: u64,
}

impl<'a> History<'a> {
    pub(in crate::call) fn new(retry: &Retry) -> Self {
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

    /// Returns the id of the request among the suspects of the poison detector, if it is one.
    pub(in crate::call) fn suspect_id(&self) -> Option<u64> {
        self.streak.as_ref()?.suspect_id()
    }

    /// Returns whether the rate limit refuses this request again although other calls got through meanwhile. Then its
    /// refusal says nothing about the lane.
    pub(in crate::call) fn is_refused_alone(&self, call: &Call<'_>, error: &Error) -> bool {
        FailureClass::of(error) == FailureClass::Throttle
            && self.refusals.count > 0
            && call.stack.answers() > self.refusals.answers
    }

    /// Returns the last refusal, if it could have concerned the whole account and turned out to concern this request alone.
    pub(in crate::call) fn own_refusal(&mut self, health: &[Health]) -> Option<Error> {
        let (index, counted) = self.counted;
        let error = self.doubtful.take()?;
        if health[index].is_own_refusal(counted) {
            return Some(error.with_account_wide(false));
        }
        self.doubtful = Some(error);
        None
    }

    /// Decides the next step after a failed call, whose permit is still held.
    pub(in crate::call) fn judge(
        &mut self,
        call: &mut Call<'a>,
        permit: &DeploymentPermit<'_>,
        error: Error,
    ) -> NextStep {
        let class = FailureClass::of(&error);
        if self.counted.0 != permit.index() {
            self.counted = (permit.index(), CountedIn::default());
        }
        if class != FailureClass::Throttle {
            self.refusals = Refusals {
                first: self
                    .refusals
                    .first
                    .filter(|_| class == FailureClass::Doubtful),
                ..Refusals::default()
            };
        }
        self.doubtful = None;
        match class {
            FailureClass::Throttle => self.throttled(call, error),
            FailureClass::Transient => self.failed(call, permit, error),
            FailureClass::Doubtful => self.refused(call, permit, error),
            FailureClass::Account => stop(call, permit, error, PROBE_AFTER),
            FailureClass::Final => {
                // A provider that refuses a request for its content works.
                if error.kind() == ErrorKind::InvalidRequest
                    && call.health(permit).answered(call.number)
                {
                    permit.deployment().lane.end_probing();
                }
                fail(error)
            }
        }
    }

    /// Handles a refusal by the rate limit.
    fn throttled(&mut self, call: &mut Call<'a>, error: Error) -> NextStep {
        let stack = call.stack;
        let alone = self.is_refused_alone(call, &error);
        let (refusals, now, answers) = (&mut self.refusals, Instant::now(), stack.answers());
        refusals.count += 1;
        refusals.answers = answers;
        let since = *refusals.first.get_or_insert(now);
        let stalled = refusals.stalled.get_or_insert((now, answers));
        if stalled.1 != answers {
            *stalled = (now, answers);
        }
        let patience = stack.retry.longest_stall();
        let stalled = now.saturating_duration_since(stalled.0) >= patience;
        let behind = refusals.count > 1;
        let next_call = stack.estimator.next_call();
        Streak::extend(
            &mut self.streak,
            &stack.poison,
            next_call,
            call.profile(),
            &error,
        );
        let long = now.saturating_duration_since(since) >= REFUSED_FOR;
        let is_attempt = false;
        if long && self.is_poison(stack) {
            let error = error.with_persistence(Persistence::Permanent);
            return NextStep::Fail { error, is_attempt };
        }
        if stalled {
            return NextStep::Fail { error, is_attempt };
        }
        if behind {
            call.route.requeue(&stack.deployments);
        }
        // The lane cools down for all calls, unless the refusal concerns this call alone.
        let (own, lane) = match alone {
            true => {
                let own = self.backoff.next(fastrand::f64(), error.wait());
                (own, Duration::ZERO)
            }
            false => (Duration::ZERO, stack.deployments.cooldown(&call.route)),
        };
        match call.check_deadline_after(own.max(lane), &error) {
            Ok(()) => NextStep::Refused { delay: own, error },
            Err(error) => NextStep::Fail { error, is_attempt },
        }
    }

    /// Handles a transient failure.
    fn failed(
        &mut self,
        call: &mut Call<'a>,
        permit: &DeploymentPermit<'_>,
        error: Error,
    ) -> NextStep {
        let (stack, index, now) = (call.stack, permit.index(), Instant::now());
        call.route.avoid(index);
        let health = call.health(permit);
        let before = self.counted.1;
        let was_outage = health.was_outage(before);
        let next_call = stack.estimator.next_call();
        let failing = health.failed(now, call.number, next_call, &mut self.counted.1);
        if self.counted.1 != before {
            if was_outage {
                self.forgive(&stack.retry);
            }
            self.in_series = Charged::default();
        }
        Streak::extend(
            &mut self.streak,
            &stack.poison,
            next_call,
            call.profile(),
            &error,
        );
        // A request with a fallback goes there when its attempts are used up.
        if let Failing::Outage { pause, since } = failing
            && !call.route.has_fallback(&stack.deployments)
        {
            let lane = &permit.deployment().lane;
            if let Some(pause) = pause {
                cool_down(stack, permit, pause);
            }
            if now.saturating_duration_since(since) < stack.retry.longest_stall() {
                self.forgive(&stack.retry);
                // A different request is the next probe.
                call.route.requeue(&stack.deployments);
                return retry(call, error.wait().unwrap_or_default(), error);
            }
            if pause.is_some() {
                // The calls that wait fail. Later ones are let through.
                lane.stop_for(without_success(since, &error), Duration::ZERO);
            }
        }
        // A connection that was not made in time has cost neither a slot for long nor money.
        let timed_out = error.is_timeout() && error.billed() != Some(false);
        self.charge(timed_out);
        let is_poison = self.is_poison(stack);
        if is_poison || self.attempts_left(&stack.retry) == 0 {
            if self.fall_back(call, index) {
                return NextStep::Elsewhere;
            }
            return fail(match is_poison {
                true => error.with_persistence(Persistence::Permanent),
                false => error,
            });
        }
        if self.attempts_left(&stack.retry) == 1 {
            call.route.requeue(&stack.deployments);
        }
        let mut delay = self.backoff.next(fastrand::f64(), error.wait());
        if !stack.budget.spend(timed_out) {
            let slowed = stack.retry.slowed(fastrand::f64());
            // The budget alone makes no call miss its deadline.
            let longest = call.time_left().unwrap_or(Duration::MAX);
            delay = delay.max(slowed.min(longest.saturating_sub(Duration::from_millis(1))));
        }
        retry(call, delay, error)
    }

    /// Sends the request to the next group of deployments, if there is one that can take it, with all its attempts there.
    fn fall_back(&mut self, call: &mut Call<'a>, index: usize) -> bool {
        let deployments = &call.stack.deployments;
        let falls_back =
            call.route.fall_back(deployments, index) && deployments.can_take(&call.route);
        if falls_back {
            *self = Self::new(&call.stack.retry);
        }
        falls_back
    }

    /// Handles a refusal that may concern the whole account.
    fn refused(
        &mut self,
        call: &mut Call<'a>,
        permit: &DeploymentPermit<'_>,
        error: Error,
    ) -> NextStep {
        let (stack, index, now) = (call.stack, permit.index(), Instant::now());
        let lane = permit.deployment().lane.snapshot();
        let others = Others {
            in_flight: lane.in_flight > 1,
            waiting: lane.waiting > 0,
        };
        let next_call = stack.estimator.next_call();
        let health = call.health(permit);
        let content = call.request.digest();
        let counted = &mut self.counted.1;
        let refusal = health.refused(now, call.number, next_call, counted, content, others);
        let since = *self.refusals.first.get_or_insert(now);
        call.route.avoid(index);
        match refusal {
            Refusal::Account => {
                let long = error.wait().filter(|wait| *wait > LONGEST_RETRY_AFTER);
                let probe_after = long.map_or(PROBE_AFTER, |wait| wait.min(PROBE_AFTER));
                let error = match long {
                    Some(wait) => parked(wait, &error),
                    None => error,
                };
                stop(call, permit, error.with_account_wide(true), probe_after)
            }
            _ if stack.deployments.has_untried(&call.route) => NextStep::Elsewhere,
            Refusal::Unknown { pause }
                if now.saturating_duration_since(since) < stack.retry.longest_stall() =>
            {
                if let Some(pause) = pause {
                    cool_down(stack, permit, pause);
                }
                // Different requests show whether they are refused too.
                call.route.requeue(&stack.deployments);
                self.doubtful = Some(error.clone());
                self.refusals.count += 1;
                let delay = jittered(health::pause(self.refusals.count - 1));
                match error.kind() {
                    ErrorKind::Throttled => match call.check_deadline_after(delay, &error) {
                        Ok(()) => NextStep::Refused { delay, error },
                        Err(error) => fail(error),
                    },
                    _ => retry(call, delay, error),
                }
            }
            _ if self.fall_back(call, index) => NextStep::Elsewhere,
            _ => {
                let is_attempt = error.kind() != ErrorKind::Throttled;
                let error = error.with_account_wide(false);
                NextStep::Fail { error, is_attempt }
            }
        }
    }

    fn charge(&mut self, timed_out: bool) {
        for charged in [&mut self.charged, &mut self.in_series] {
            charged.attempts += 1;
            charged.timeouts += u32::from(timed_out);
        }
    }

    /// Does not count the failures that belong to an outage.
    fn forgive(&mut self, retry: &Retry) {
        let in_outage = std::mem::take(&mut self.in_series);
        self.charged.attempts -= in_outage.attempts;
        self.charged.timeouts -= in_outage.timeouts;
        self.backoff = retry.backoff();
    }

    fn attempts_left(&self, retry: &Retry) -> u32 {
        let attempts = retry.max_attempts().saturating_sub(self.charged.attempts);
        let timeouts = retry.max_timeouts().saturating_sub(self.charged.timeouts);
        // As long as no call has timed out, the next one may end in another way.
        match self.charged.timeouts {
            0 => attempts,
            _ => attempts.min(timeouts),
        }
    }

    fn is_poison(&self, stack: &CallStack) -> bool {
        let least = stack.retry.max_identical();
        let streak = self.streak.as_ref();
        streak.is_some_and(|streak| streak.is_evidence(least))
    }
}

fn fail(error: Error) -> NextStep {
    NextStep::Fail {
        error,
        is_attempt: true,
    }
}

fn retry(call: &Call<'_>, delay: Duration, error: Error) -> NextStep {
    match call.check_deadline_after(delay, &error) {
        Ok(()) => NextStep::Retry { delay, error },
        Err(error) => fail(error),
    }
}

/// Lets one call at a time through after a pause, until one is answered.
fn cool_down(stack: &CallStack, permit: &DeploymentPermit<'_>, pause: Duration) {
    let wait = jittered(pause);
    permit.deployment().lane.cool_down(wait);
    stack.observers.tell(|| Event::LaneCoolingDown { wait });
}

/// Disables the deployment, because no call of its account can succeed, until one call tries again. The request goes to
/// another deployment, if there is one.
fn stop(
    call: &Call<'_>,
    permit: &DeploymentPermit<'_>,
    error: Error,
    probe_after: Duration,
) -> NextStep {
    let stack = call.stack;
    let lane = &permit.deployment().lane;
    lane.stop_for(error.clone(), jittered(probe_after));
    stack.observers.tell(|| Event::LaneStopped {
        error: error.clone(),
    });
    match stack.deployments.can_take(&call.route) {
        true => NextStep::Elsewhere,
        false => fail(error),
    }
}

/// Adds up to a tenth, so that several processes do not call at the same moment.
fn jittered(pause: Duration) -> Duration {
    pause.saturating_add((pause / 10).mul_f64(fastrand::f64()))
}

/// Returns the error of the calls that wait for a lane whose provider asks for a wait that is too long.
fn parked(wait: Duration, error: &Error) -> Error {
    let message = format!(
        "the provider asks to wait so long that the lane is parked: {}",
        error.message()
    );
    Error::new(error.kind(), message)
        .with_wait(wait)
        .with_persistence(Persistence::Exhausted)
}

/// Returns the error of the calls that wait in an outage that lasts too long.
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
