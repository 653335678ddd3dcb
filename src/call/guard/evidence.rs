//! [`Watches`]: whether a request fails because of itself, or as other requests do.
//!
//! A request that has failed in a way that may be its own fault is watched: of the requests sent
//! after its first failure, those that are answered and those that fail in the same way are counted.
//! If it fails `k` times in a row where others fail at a rate of `p`, chance explains that with a
//! probability of pᵏ.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Error, ErrorKind};
use crate::request::Request;

/// A request is given up when chance explains its failures with a lower probability than this: of a
/// million items that fail independently of each other, none is given up by mistake.
const IMPROBABLE: f64 = 1e-9;
/// Each call that ends looks at all watches. While so many requests fail at the same time that there
/// are no more, the others are not watched, and have all their attempts.
const MOST_WATCHES: usize = 64;

/// The properties of a request by which others are comparable to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Profile {
    model: u64,
    tokens: u64,
}

impl Profile {
    pub(super) fn new(request: &Request, input_tokens: u64) -> Self {
        let output = request.max_tokens.unwrap_or(0);
        Self {
            model: hash(&request.model),
            tokens: input_tokens.saturating_add(output),
        }
    }
}

/// The way in which a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Signature {
    kind: ErrorKind,
    code: u64,
}

impl Signature {
    /// `None` for failures that carry no word about the request: timeouts, broken connections,
    /// overload, and 5xx without a code. The message is left out, for it often has a request id in it.
    pub(super) fn of(error: &Error) -> Option<Self> {
        let tells = match error.kind() {
            ErrorKind::Unavailable => error.code().is_some(),
            ErrorKind::MalformedReply | ErrorKind::Throttled => true,
            _ => false,
        };
        tells.then(|| Self {
            kind: error.kind(),
            code: hash(&error.code()),
        })
    }

    /// Whether the size of a request may be why it alone is refused.
    fn depends_on_size(self) -> bool {
        self.kind == ErrorKind::Throttled
    }
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// How a call ended, as far as it is evidence.
#[derive(Debug, Clone, Copy)]
pub(super) enum CallEnd {
    Answered,
    Failed(Signature),
}

#[derive(Debug)]
struct Watch {
    id: u64,
    /// Calls with this number and higher ones were sent after the first failure.
    first_call: u64,
    profile: Profile,
    signature: Signature,
    answered: u64,
    failed: u64,
}

impl Watch {
    fn note(&mut self, call: u64, profile: Profile, end: CallEnd) {
        let is_comparable = call >= self.first_call
            && profile.model == self.profile.model
            // Small requests get through where a large one has to wait.
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

    /// The probability that a request fails `times` in a row as others do.
    fn chance(&self, times: u32) -> f64 {
        let (failed, all) = (self.failed as f64, (self.failed + self.answered) as f64);
        let rate = (failed + 1.0) / (all + 2.0);
        rate.powf(f64::from(times))
    }
}

/// The requests that are watched now.
#[derive(Debug, Default)]
pub(super) struct Watches {
    /// Read by each call that ends, most often to see that there are none.
    open: AtomicUsize,
    next_id: AtomicU64,
    list: Mutex<Vec<Watch>>,
}

impl Watches {
    /// Whether the end of a call needs to be [noted](Self::note).
    pub(super) fn are_open(&self) -> bool {
        self.open.load(Ordering::Relaxed) > 0
    }

    /// Notes the end of a call for all requests watched but `own`, which is the call's own.
    pub(super) fn note(&self, call: u64, profile: Profile, end: CallEnd, own: Option<u64>) {
        for watch in self.lock().iter_mut() {
            if Some(watch.id) != own {
                watch.note(call, profile, end);
            }
        }
    }

    /// Watches a request that has failed for the first time. The next call to be sent has the number
    /// `next_call`.
    fn begin(
        &self,
        next_call: u64,
        profile: Profile,
        signature: Signature,
    ) -> Option<OpenWatch<'_>> {
        let mut list = self.lock();
        if list.len() >= MOST_WATCHES {
            return None;
        }
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        list.push(Watch {
            id,
            first_call: next_call,
            profile,
            signature,
            answered: 0,
            failed: 0,
        });
        self.open.store(list.len(), Ordering::Relaxed);
        Some(OpenWatch { watches: self, id })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Watch>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A watch that ends when this is dropped.
#[derive(Debug)]
struct OpenWatch<'a> {
    watches: &'a Watches,
    id: u64,
}

impl Drop for OpenWatch<'_> {
    fn drop(&mut self) {
        let mut list = self.watches.lock();
        list.retain(|watch| watch.id != self.id);
        self.watches.open.store(list.len(), Ordering::Relaxed);
    }
}

/// The failures of one request that are all of the same kind, one after the other.
#[derive(Debug)]
pub(super) struct Streak<'a> {
    signature: Signature,
    length: u32,
    watch: Option<OpenWatch<'a>>,
}

impl<'a> Streak<'a> {
    /// Adds a failure to a streak, or begins one.
    pub(super) fn extend(
        streak: &mut Option<Self>,
        watches: &'a Watches,
        next_call: u64,
        profile: Profile,
        error: &Error,
    ) {
        let Some(signature) = Signature::of(error) else {
            *streak = None;
            return;
        };
        match streak {
            Some(streak) if streak.signature == signature && streak.watch.is_some() => {
                streak.length += 1;
            }
            _ => {
                *streak = Some(Self {
                    signature,
                    length: 1,
                    watch: watches.begin(next_call, profile, signature),
                });
            }
        }
    }

    /// The number under which the request is watched.
    pub(super) fn watch_id(&self) -> Option<u64> {
        Some(self.watch.as_ref()?.id)
    }

    /// Whether it is the request that fails: `least` times at least, and not as others do.
    pub(super) fn is_evidence(&self, least: u32) -> bool {
        let Some(open) = self.watch.as_ref().filter(|_| self.length >= least) else {
            return false;
        };
        let list = open.watches.lock();
        let watch = list.iter().find(|watch| watch.id == open.id);
        watch.is_some_and(|watch| watch.chance(self.length) < IMPROBABLE)
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

    /// How many failures in a row it takes until a request is given up.
    fn failures_needed(note: impl Fn(&Watches)) -> u32 {
        let (watches, mut streak, this) = (Watches::default(), None, profile("m", 100));
        for failures in 1..1_000 {
            Streak::extend(&mut streak, &watches, 10, this, &coded("x"));
            if streak.as_ref().unwrap().is_evidence(1) {
                return failures;
            }
            if failures == 1 {
                note(&watches);
            }
        }
        1_000
    }

    #[test]
    fn the_more_others_succeed_the_fewer_failures_are_evidence() {
        let others = |answered: u64, as_this: u64| {
            failures_needed(move |watches| {
                for n in 0..answered + as_this {
                    let end = match n < answered {
                        true => CallEnd::Answered,
                        false => failed(&coded("x")),
                    };
                    watches.note(10 + n, profile("m", 100), end, None);
                }
            })
        };
        assert_eq!(others(0, 0), 30, "nothing is known of others");
        assert_eq!(others(30, 0), 6);
        assert_eq!(others(1_000_000, 0), 2);
        // Others fail in the same way as often as one in twenty, or nearly all do.
        assert_eq!(others(950, 50), 7);
        assert_eq!(others(10, 990), 1_000);
    }

    #[test]
    fn only_comparable_requests_sent_after_the_first_failure_are_evidence() {
        let needed = |call, model: &str, end: CallEnd| {
            failures_needed(|watches| {
                (0..10_000).for_each(|_| watches.note(call, profile(model, 1), end, None));
            })
        };
        assert_eq!(needed(10, "m", CallEnd::Answered), 3);
        assert_eq!(needed(9, "m", CallEnd::Answered), 30, "sent before");
        assert_eq!(needed(10, "other", CallEnd::Answered), 30);
        assert_eq!(needed(10, "m", failed(&coded("y"))), 30);
        // Small requests say nothing of a large one that the rate limit refuses.
        let refused = Error::new(ErrorKind::Throttled, "");
        for (tokens, evidence) in [(10, false), (60, true)] {
            let (watches, mut streak) = (Watches::default(), None);
            for _ in 0..5 {
                Streak::extend(&mut streak, &watches, 0, profile("m", 100), &refused);
            }
            (0..1_000).for_each(|_| watches.note(1, profile("m", tokens), CallEnd::Answered, None));
            assert_eq!(streak.unwrap().is_evidence(3), evidence);
        }
    }

    #[test]
    fn a_streak_is_of_failures_with_one_code_and_its_own_are_no_evidence() {
        let (watches, mut streak, this) = (Watches::default(), None, profile("m", 1));
        let extend = |streak: &mut Option<_>, error| {
            Streak::extend(streak, &watches, 0, this, &error);
            streak
                .as_ref()
                .map_or(0, |streak: &Streak<'_>| streak.length)
        };
        let lengths = ["a", "a", "b", "b"].map(|code| extend(&mut streak, coded(code)));
        assert_eq!(lengths, [1, 2, 1, 2]);
        let own = streak.as_ref().unwrap().watch_id();
        watches.note(5, this, failed(&coded("b")), own);
        assert_eq!(watches.lock()[0].failed, 0);
        let uncoded = Error::new(ErrorKind::Unavailable, "500");
        for error in [uncoded, Error::new(ErrorKind::Timeout, "late")] {
            assert_eq!(
                extend(&mut streak, error),
                0,
                "it says nothing of the request"
            );
            assert!(!watches.are_open());
        }
    }

    #[test]
    fn the_number_of_watches_is_bounded() {
        let watches = Watches::default();
        let mut streaks: Vec<_> = (0..MOST_WATCHES + 1).map(|_| None).collect();
        for streak in &mut streaks {
            Streak::extend(streak, &watches, 0, profile("m", 1), &coded("a"));
        }
        assert!(streaks[MOST_WATCHES].as_ref().unwrap().watch.is_none());
        streaks.truncate(1);
        assert_eq!(watches.lock().len(), 1);
        drop(streaks);
        assert!(!watches.are_open());
    }
}
