//! [`Health`]: whether a deployment has an outage, and whether it refuses the whole account.
//!
//! Two conditions are distinguished from the failures of single requests:
//!
//! - **An outage**: many calls of many requests have failed, one after the other, and no call that was sent
//!   with them or later has been answered. Then the failures say nothing about the requests, and cost them no attempt.
//! - **A refused account**: one refusal may concern its request alone, so it is confirmed by that of a different request
//!   before all calls fail.
//!
//! Calls are numbered in the order in which they are sent.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::doubling;
use crate::request::RequestDigest;
use crate::sync::Mutex;

/// The number of failures without a success that are an outage.
const OUTAGE_FAILURES: u32 = 20;
/// The number of different requests among them.
const OUTAGE_REQUESTS: u32 = 10;
/// The first pause between two probes. It doubles up to the longest, which is short enough for the calls to go on soon after
/// the outage has ended.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A suspicion that is not confirmed for this time is forgotten.
const SUSPICION_LASTS: Duration = Duration::from_secs(5 * 60);

/// Returns the pause after this number of failed probes.
pub(super) fn pause(probes: u32) -> Duration {
    let mut pauses = doubling(FIRST_PAUSE, LONGEST_PAUSE);
    // Beyond the longest pause, none differs.
    pauses.nth(probes.min(8) as usize).unwrap_or(LONGEST_PAUSE)
}

/// The series of failures and the suspicion in which a request was counted last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct CountedIn {
    series: u64,
    suspicion: u64,
}

/// The meaning of a transient failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failing {
    /// It concerns this call.
    Call,
    /// No call is answered.
    Outage {
        /// The time for which the lane should cool down, unless it does already.
        pause: Option<Duration>,
        since: Instant,
    },
}

/// The meaning of a refusal that may concern the whole account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It concerns this request, as far as is known: there is no other request to compare it with.
    Request,
    /// Different requests are refused, and none is answered.
    Account,
    /// Other calls will show it. With a pause, the lane should cool down and let one call at a time through.
    Unknown { pause: Option<Duration> },
}

/// Whether there are other calls in the lane of a call that was refused.
#[derive(Debug, Clone, Copy)]
pub(super) struct Others {
    pub(super) in_flight: bool,
    pub(super) waiting: bool,
}

/// The health of one deployment.
#[derive(Debug, Default)]
pub(in crate::call) struct Health {
    /// Whether there is a series of failures or a suspicion: each success reads it.
    troubled: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    last_id: u64,
    series: Option<Series>,
    last_outage: u64,
    suspicion: Option<Suspicion>,
    /// The last suspicion that was confirmed.
    last_refused: u64,
}

impl State {
    fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }
}

/// Failures without an answer to any call sent with the first of them or later.
#[derive(Debug)]
struct Series {
    id: u64,
    /// The lowest number of a call that failed.
    first_call: u64,
    failures: u32,
    requests: u32,
    outage: Option<Outage>,
}

#[derive(Debug)]
struct Outage {
    since: Instant,
    pauses: Pauses,
}

/// Refusals that may concern the account, without a success since.
#[derive(Debug)]
struct Suspicion {
    id: u64,
    /// The content of the first refused request.
    content: RequestDigest,
    /// Whether another refused request had a different content.
    differ: bool,
    requests: u32,
    last: Instant,
    pauses: Pauses,
}

/// The pauses between probes. Calls that were sent before a pause began do not prolong it.
#[derive(Debug, Default)]
struct Pauses {
    count: u32,
    next_call: u64,
}

impl Pauses {
    /// Returns the next pause. The first `short` ones do not grow.
    fn next(&mut self, call: u64, next_call: u64, short: u32) -> Option<Duration> {
        if self.count > 0 && call < self.next_call {
            return None;
        }
        let pause = pause(self.count.saturating_sub(short));
        (self.count, self.next_call) = (self.count + 1, next_call);
        Some(pause)
    }
}

impl Health {
    /// Records that a call was answered, and returns whether its lane may stop probing.
    pub(in crate::call) fn answered(&self, call: u64) -> bool {
        if !self.troubled.load(Ordering::Relaxed) {
            return false;
        }
        let mut state = self.state.lock();
        // Long calls may be answered for minutes after the provider has begun to fail new ones. A call that was sent before
        // all those that failed says nothing about them.
        state.series.take_if(|series| call >= series.first_call);
        let lifted = state.suspicion.take().is_some();
        self.publish(&state);
        let in_outage = matches!(&state.series, Some(series) if series.outage.is_some());
        (lifted || state.series.is_none()) && !in_outage
    }

    /// Records a transient failure. `next_call` is the number of the next call to be sent.
    pub(super) fn failed(
        &self,
        now: Instant,
        call: u64,
        next_call: u64,
        counted: &mut CountedIn,
    ) -> Failing {
        let mut state = self.state.lock();
        let mut series = state.series.take().unwrap_or_else(|| Series {
            id: state.next_id(),
            first_call: call,
            failures: 0,
            requests: 0,
            outage: None,
        });
        series.first_call = series.first_call.min(call);
        series.failures = series.failures.saturating_add(1);
        if counted.series != series.id {
            counted.series = series.id;
            series.requests += 1;
        }
        if series.outage.is_none()
            && series.failures >= OUTAGE_FAILURES
            && series.requests >= OUTAGE_REQUESTS
        {
            state.last_outage = series.id;
            series.outage = Some(Outage {
                since: now,
                pauses: Pauses::default(),
            });
        }
        let failing = match &mut series.outage {
            None => Failing::Call,
            Some(outage) => Failing::Outage {
                pause: outage.pauses.next(call, next_call, 0),
                since: outage.since,
            },
        };
        state.series = Some(series);
        self.publish(&state);
        failing
    }

    /// Returns whether the series of failures in which a request was counted last has become an outage.
    pub(super) fn was_outage(&self, counted: CountedIn) -> bool {
        counted.series > 0 && self.state.lock().last_outage == counted.series
    }

    /// Records a refusal that may concern the whole account.
    pub(super) fn refused(
        &self,
        now: Instant,
        call: u64,
        next_call: u64,
        counted: &mut CountedIn,
        content: RequestDigest,
        others: Others,
    ) -> Refusal {
        let mut state = self.state.lock();
        let recent = |it: &Suspicion| now.saturating_duration_since(it.last) <= SUSPICION_LASTS;
        let suspicion = state.suspicion.take().filter(recent);
        let mut suspicion = suspicion.unwrap_or_else(|| Suspicion {
            id: state.next_id(),
            content,
            differ: false,
            requests: 0,
            last: now,
            pauses: Pauses::default(),
        });
        suspicion.last = now;
        suspicion.differ |= suspicion.content != content;
        if counted.suspicion != suspicion.id {
            counted.suspicion = suspicion.id;
            suspicion.requests += 1;
        }
        let many = suspicion.requests >= OUTAGE_REQUESTS;
        let confirmed = many || suspicion.differ && !others.waiting;
        let refusal = match suspicion.requests {
            // The answers to calls in flight are better evidence than a count, and calls that wait can be sent as a test.
            _ if !others.in_flight && confirmed => Refusal::Account,
            _ if !others.in_flight && !others.waiting => Refusal::Request,
            1 => Refusal::Unknown { pause: None },
            _ => Refusal::Unknown {
                pause: suspicion.pauses.next(call, next_call, OUTAGE_REQUESTS),
            },
        };
        match refusal {
            Refusal::Account => state.last_refused = suspicion.id,
            _ => state.suspicion = Some(suspicion),
        }
        self.publish(&state);
        refusal
    }

    /// Returns whether the refusal of a request has turned out to concern it alone, because another one has been answered
    /// since.
    pub(super) fn is_own_refusal(&self, counted: CountedIn) -> bool {
        let state = self.state.lock();
        let open = state.suspicion.as_ref().map(|suspicion| suspicion.id);
        open != Some(counted.suspicion) && state.last_refused != counted.suspicion
    }

    fn publish(&self, state: &State) {
        let troubled = state.series.is_some() || state.suspicion.is_some();
        self.troubled.store(troubled, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Request;

    const ALONE: Others = Others {
        in_flight: false,
        waiting: false,
    };
    const IN_FLIGHT: Others = Others {
        in_flight: true,
        waiting: true,
    };
    const WAITING: Others = Others {
        in_flight: false,
        waiting: true,
    };

    /// Fails `each` calls of `requests` requests in turn, and returns the meaning of the last failure.
    fn fail(health: &Health, requests: usize, each: usize) -> Failing {
        let mut counted = vec![CountedIn::default(); requests];
        let mut last = Failing::Call;
        for round in 0..each {
            for (n, counted) in counted.iter_mut().enumerate() {
                let call = 100 + (round * requests + n) as u64;
                last = health.failed(Instant::now(), call, call + 1, counted);
            }
        }
        last
    }

    fn is_outage(failing: Failing) -> bool {
        matches!(failing, Failing::Outage { .. })
    }

    #[test]
    fn an_outage_is_twenty_failures_of_ten_requests() {
        assert!(!is_outage(fail(&Health::default(), 1, 1_000)));
        assert!(!is_outage(fail(&Health::default(), 9, 1_000)));
        assert!(!is_outage(fail(&Health::default(), 19, 1)));
        assert!(is_outage(fail(&Health::default(), 20, 1)));
        assert!(is_outage(fail(&Health::default(), 10, 2)));
    }

    #[test]
    fn only_the_answer_to_a_call_sent_with_those_that_failed_ends_a_series() {
        let health = Health::default();
        fail(&health, 19, 1);
        health.answered(99);
        assert!(is_outage(fail(&health, 1, 1)));
        assert!(!health.answered(99), "sent before all that failed");
        assert!(health.answered(101), "sent with them");
        assert!(!is_outage(fail(&health, 19, 1)));
        let mut counted = CountedIn::default();
        health.failed(Instant::now(), 101, 102, &mut counted);
        assert!(health.was_outage(counted));
        assert!(!health.was_outage(CountedIn::default()));
    }

    #[test]
    fn pauses_grow_from_probe_to_probe_and_not_with_calls_sent_before() {
        let mut pauses = Pauses::default();
        let seconds = |pause: Option<Duration>| pause.map_or(0.0, |pause| pause.as_secs_f64());
        assert_eq!(seconds(pauses.next(5, 10, 0)), 0.5);
        assert_eq!(seconds(pauses.next(9, 10, 0)), 0.0);
        let next = (10..15).map(|call| seconds(pauses.next(call, call + 1, 0)));
        assert_eq!(next.collect::<Vec<_>>(), [1.0, 2.0, 4.0, 5.0, 5.0]);
    }

    fn ask(health: &Health, prompt: &str, counted: &mut CountedIn, others: Others) -> Refusal {
        let content = Request::new(prompt).digest();
        health.refused(Instant::now(), 1, 2, counted, content, others)
    }

    /// Each request has a prompt of its own.
    fn refuse(health: &Health, counted: &mut CountedIn, others: Others) -> Refusal {
        let prompt = match counted.suspicion {
            0 => fastrand::u64(..).to_string(),
            _ => return ask(health, "again", counted, others),
        };
        ask(health, &prompt, counted, others)
    }

    #[test]
    fn a_second_different_request_confirms_a_refused_account() {
        let (health, mut first) = (Health::default(), CountedIn::default());
        for other in [&mut first, &mut CountedIn::default()] {
            assert_eq!(ask(&health, "same", other, ALONE), Refusal::Request);
        }
        assert_eq!(ask(&health, "same", &mut first, ALONE), Refusal::Request);
        let mut second = CountedIn::default();
        assert_eq!(refuse(&health, &mut second, ALONE), Refusal::Account);
        assert!(!health.is_own_refusal(first) && !health.is_own_refusal(second));
    }

    #[test]
    fn calls_in_flight_are_waited_for_and_one_answer_ends_the_suspicion() {
        let (health, mut first) = (Health::default(), CountedIn::default());
        refuse(&health, &mut first, IN_FLIGHT);
        for _ in 0..100 {
            let refusal = refuse(&health, &mut CountedIn::default(), IN_FLIGHT);
            assert!(matches!(refusal, Refusal::Unknown { .. }), "{refusal:?}");
        }
        assert!(!health.is_own_refusal(first));
        assert!(health.answered(0));
        assert!(health.is_own_refusal(first));
        let refusal = refuse(&health, &mut CountedIn::default(), IN_FLIGHT);
        assert_eq!(refusal, Refusal::Unknown { pause: None }, "a new suspicion");
    }

    #[test]
    fn while_others_wait_as_many_requests_are_tried_as_for_an_outage() {
        let health = Health::default();
        let refusals: Vec<_> = (0..10)
            .map(|_| refuse(&health, &mut CountedIn::default(), WAITING))
            .collect();
        let unknown = |refusal: &&Refusal| matches!(refusal, Refusal::Unknown { .. });
        assert_eq!(refusals.iter().filter(unknown).count(), 9);
        assert_eq!(refusals[9], Refusal::Account);
    }

    #[tokio::test(start_paused = true)]
    async fn a_suspicion_that_is_not_confirmed_is_forgotten() {
        let health = Health::default();
        refuse(&health, &mut CountedIn::default(), ALONE);
        tokio::time::advance(SUSPICION_LASTS + FIRST_PAUSE).await;
        let refusal = refuse(&health, &mut CountedIn::default(), ALONE);
        assert_eq!(refusal, Refusal::Request);
    }
}
