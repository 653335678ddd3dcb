//! [`PoisonDetector`]: finds requests that fail because of their content, as queues find poison messages.
//!
//! A request whose failure may be caused by its content is a suspect. Of the requests that are sent after its first
//! failure, the detector counts those that are answered and those that fail in the same way. If other requests fail at a
//! rate of `p`, chance explains `k` failures of the suspect in a row with a probability of pᵏ.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::error::{Error, ErrorKind};
use crate::request::Request;
use crate::sync::Mutex;

/// A request is given up when chance explains its failures with a lower probability than this. Of a million items that fail
/// independently of each other, none is given up by mistake.
const IMPROBABLE: f64 = 1e-9;
/// Each call that ends is compared with all suspects, so their number is limited. Further requests that fail are no
/// suspects, and have all their attempts.
const MAX_SUSPECTS: usize = 64;

/// The properties of a request by which other requests are comparable to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::call) struct Profile {
    model: u64,
    tokens: u64,
}

impl Profile {
    pub(in crate::call) fn new(request: &Request, input_tokens: u64) -> Self {
        let output = request.max_tokens.unwrap_or(0);
        Self {
            model: hash(&request.model),
            tokens: input_tokens.saturating_add(output),
        }
    }
}

/// The way in which a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::call) struct Signature {
    kind: ErrorKind,
    code: u64,
}

impl Signature {
    /// Returns `None` for failures that say nothing about the request: timeouts, broken connections, overload, and 5xx
    /// without a code. The message is left out, because it often contains a request id.
    pub(in crate::call) fn of(error: &Error) -> Option<Self> {
        let concerns_request = match error.kind() {
            ErrorKind::Unavailable => error.code().is_some(),
            ErrorKind::MalformedReply | ErrorKind::Throttled => true,
            _ => false,
        };
        concerns_request.then(|| Self {
            kind: error.kind(),
            code: hash(&error.code()),
        })
    }

    /// Returns whether a request may fail in this way because of its size.
    fn depends_on_size(self) -> bool {
        self.kind == ErrorKind::Throttled
    }
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// The end of a call, as far as it is evidence.
#[derive(Debug, Clone, Copy)]
pub(in crate::call) enum CallEnd {
    Answered,
    Failed(Signature),
}

#[derive(Debug)]
struct Suspect {
    id: u64,
    /// The number of the first call that was sent after the first failure.
    first_call: u64,
    profile: Profile,
    signature: Signature,
    answered: u64,
    failed: u64,
}

impl Suspect {
    fn record(&mut self, call: u64, profile: Profile, end: CallEnd) {
        let is_comparable = call >= self.first_call
            && profile.model == self.profile.model
            // Small requests are let through where a large one has to wait.
            && (!self.signature.depends_on_size()
                || profile.tokens >= self.profile.tokens / 2);
        if !is_comparable {
            return;
        }
        match end {
            CallEnd::Answered => self.answered += 1,
            CallEnd::Failed(signature) if signature == self.signature => self.failed += 1,
            CallEnd::Failed(_) => {}
        }
    }

    /// Returns the probability that a request fails `times` times in a row at the rate of the other requests.
    fn chance(&self, times: u32) -> f64 {
        let (failed, all) = (self.failed as f64, (self.failed + self.answered) as f64);
        let rate = (failed + 1.0) / (all + 2.0);
        rate.powf(f64::from(times))
    }
}

/// The requests of a context that are suspected to fail because of their content.
#[derive(Debug, Default)]
pub(in crate::call) struct PoisonDetector {
    /// The number of suspects: each call that ends reads it, and most often it is 0.
    count: AtomicUsize,
    next_id: AtomicU64,
    suspects: Mutex<Vec<Suspect>>,
}

impl PoisonDetector {
    /// Returns whether the ends of calls are to be [recorded](Self::record).
    pub(in crate::call) fn has_suspects(&self) -> bool {
        self.count.load(Ordering::Relaxed) > 0
    }

    /// Records the end of a call for all suspects but `own`, the one whose call it is.
    pub(in crate::call) fn record(
        &self,
        call: u64,
        profile: Profile,
        end: CallEnd,
        own: Option<u64>,
    ) {
        for suspect in self.suspects.lock().iter_mut() {
            if Some(suspect.id) != own {
                suspect.record(call, profile, end);
            }
        }
    }

    /// Makes a request that has failed for the first time a suspect, unless there are too many. `next_call` is the number
    /// of the next call to be sent.
    fn suspect(
        &self,
        next_call: u64,
        profile: Profile,
        signature: Signature,
    ) -> Option<Suspicion<'_>> {
        let mut suspects = self.suspects.lock();
        if suspects.len() >= MAX_SUSPECTS {
            return None;
        }
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        suspects.push(Suspect {
            id,
            first_call: next_call,
            profile,
            signature,
            answered: 0,
            failed: 0,
        });
        self.count.store(suspects.len(), Ordering::Relaxed);
        Some(Suspicion { detector: self, id })
    }
}

/// Keeps a request a suspect until it is dropped.
#[derive(Debug)]
struct Suspicion<'a> {
    detector: &'a PoisonDetector,
    id: u64,
}

impl Drop for Suspicion<'_> {
    fn drop(&mut self) {
        let mut suspects = self.detector.suspects.lock();
        suspects.retain(|suspect| suspect.id != self.id);
        self.detector.count.store(suspects.len(), Ordering::Relaxed);
    }
}

/// The failures of one request in a row that have the same signature.
#[derive(Debug)]
pub(super) struct Streak<'a> {
    signature: Signature,
    length: u32,
    suspicion: Option<Suspicion<'a>>,
}

impl<'a> Streak<'a> {
    /// Adds a failure to a streak, or begins one.
    pub(super) fn extend(
        streak: &mut Option<Self>,
        detector: &'a PoisonDetector,
        next_call: u64,
        profile: Profile,
        error: &Error,
    ) {
        let Some(signature) = Signature::of(error) else {
            *streak = None;
            return;
        };
        match streak {
            Some(streak) if streak.signature == signature && streak.suspicion.is_some() => {
                streak.length += 1;
            }
            _ => {
                *streak = Some(Self {
                    signature,
                    length: 1,
                    suspicion: detector.suspect(next_call, profile, signature),
                });
            }
        }
    }

    /// Returns the id of the request among the suspects.
    pub(super) fn suspect_id(&self) -> Option<u64> {
        Some(self.suspicion.as_ref()?.id)
    }

    /// Returns whether the request fails because of its content: `least` times at least, and more often than others.
    pub(super) fn is_evidence(&self, least: u32) -> bool {
        let suspicion = self.suspicion.as_ref().filter(|_| self.length >= least);
        let Some(suspicion) = suspicion else {
            return false;
        };
        let suspects = suspicion.detector.suspects.lock();
        let suspect = suspects.iter().find(|suspect| suspect.id == suspicion.id);
        suspect.is_some_and(|suspect| suspect.chance(self.length) < IMPROBABLE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn coded(code: &str) -> Error {
        Error::new(ErrorKind::Unavailable, "failed, request 17").with_code(code)
    }

    fn profile(model: &str, tokens: u64) -> Profile {
        Profile::new(&Request::new("").model(model), tokens)
    }

    fn failed(error: &Error) -> CallEnd {
        CallEnd::Failed(Signature::of(error).unwrap())
    }

    /// Returns how many failures in a row it takes until a request is given up.
    fn failures_needed(record: impl Fn(&PoisonDetector)) -> u32 {
        let (detector, mut streak, this) = (PoisonDetector::default(), None, profile("m", 100));
        for failures in 1..1_000 {
            Streak::extend(&mut streak, &detector, 10, this, &coded("x"));
            if streak.as_ref().unwrap().is_evidence(1) {
                return failures;
            }
            if failures == 1 {
                record(&detector);
            }
        }
        1_000
    }

    #[test]
    fn the_more_others_succeed_the_fewer_failures_are_evidence() {
        let others = |answered: u64, as_this: u64| {
            failures_needed(move |detector| {
                for n in 0..answered + as_this {
                    let end = match n < answered {
                        true => CallEnd::Answered,
                        false => failed(&coded("x")),
                    };
                    detector.record(10 + n, profile("m", 100), end, None);
                }
            })
        };
        assert_eq!(others(0, 0), 30, "no other requests");
        assert_eq!(others(30, 0), 6);
        assert_eq!(others(1_000_000, 0), 2);
        // One in twenty others fails in the same way, or nearly all do.
        assert_eq!(others(950, 50), 7);
        assert_eq!(others(10, 990), 1_000);
    }

    #[test]
    fn only_comparable_requests_sent_after_the_first_failure_are_evidence() {
        let needed = |call, model: &str, end: CallEnd| {
            failures_needed(|detector| {
                (0..10_000).for_each(|_| detector.record(call, profile(model, 1), end, None));
            })
        };
        assert_eq!(needed(10, "m", CallEnd::Answered), 3);
        assert_eq!(needed(9, "m", CallEnd::Answered), 30, "sent before");
        assert_eq!(needed(10, "other", CallEnd::Answered), 30);
        assert_eq!(needed(10, "m", failed(&coded("y"))), 30);
        // Small requests are no evidence for a large one that the rate limit refuses.
        let refused = Error::new(ErrorKind::Throttled, "");
        for (tokens, evidence) in [(10, false), (60, true)] {
            let (detector, mut streak) = (PoisonDetector::default(), None);
            for _ in 0..5 {
                Streak::extend(&mut streak, &detector, 0, profile("m", 100), &refused);
            }
            (0..1_000)
                .for_each(|_| detector.record(1, profile("m", tokens), CallEnd::Answered, None));
            assert_eq!(streak.unwrap().is_evidence(3), evidence);
        }
    }

    #[test]
    fn a_streak_ends_with_another_code_and_its_own_failures_are_no_evidence() {
        let (detector, mut streak, this) = (PoisonDetector::default(), None, profile("m", 1));
        let extend = |streak: &mut Option<_>, error| {
            Streak::extend(streak, &detector, 0, this, &error);
            streak
                .as_ref()
                .map_or(0, |streak: &Streak<'_>| streak.length)
        };
        let lengths = ["a", "a", "b", "b"].map(|code| extend(&mut streak, coded(code)));
        assert_eq!(lengths, [1, 2, 1, 2]);
        let own = streak.as_ref().unwrap().suspect_id();
        detector.record(5, this, failed(&coded("b")), own);
        assert_eq!(detector.suspects.lock()[0].failed, 0);
        let uncoded = Error::new(ErrorKind::Unavailable, "500");
        for error in [uncoded, Error::new(ErrorKind::Timeout, "late")] {
            assert_eq!(
                extend(&mut streak, error),
                0,
                "it says nothing about the request"
            );
            assert!(!detector.has_suspects());
        }
    }

    #[test]
    fn the_number_of_suspects_is_bounded() {
        let detector = PoisonDetector::default();
        let mut streaks: Vec<_> = (0..MAX_SUSPECTS + 1).map(|_| None).collect();
        for streak in &mut streaks {
            Streak::extend(streak, &detector, 0, profile("m", 1), &coded("a"));
        }
        assert!(streaks[MAX_SUSPECTS].as_ref().unwrap().suspicion.is_none());
        streaks.truncate(1);
        assert_eq!(detector.suspects.lock().len(), 1);
        drop(streaks);
        assert!(!detector.has_suspects());
    }
}
