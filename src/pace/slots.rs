//! [`Slots`]: the calls in flight, and how many there may be while the provider is overloaded.

use std::time::Duration;

#[derive(Debug)]
pub(super) struct Slots {
    most: usize,
    used: usize,
    /// Fewer than `most` since an overload.
    eased: Option<usize>,
    eased_at: Option<Duration>,
    successes: usize,
}

impl Slots {
    pub(super) fn new(most: Option<usize>) -> Self {
        Self {
            most: most.unwrap_or(usize::MAX),
            used: 0,
            eased: None,
            eased_at: None,
            successes: 0,
        }
    }

    pub(super) fn used(&self) -> usize {
        self.used
    }

    /// How many there may be now.
    pub(super) fn limit(&self) -> usize {
        self.most.min(self.eased.unwrap_or(usize::MAX))
    }

    pub(super) fn free(&self) -> usize {
        self.limit().saturating_sub(self.used)
    }

    pub(super) fn take(&mut self) {
        self.used += 1;
    }

    pub(super) fn give_back(&mut self) {
        self.used -= 1;
    }

    pub(super) fn retune(&mut self, most: Option<usize>) {
        self.most = most.unwrap_or(usize::MAX);
        self.eased = None;
    }

    /// The provider is overloaded: half of what is in flight, once for each cohort.
    /// Says whether the limit was lowered. The refused call still holds its slot.
    pub(super) fn overloaded(&mut self, now: Duration, sent_at: Duration) -> bool {
        if self.eased_at.is_some_and(|at| sent_at < at) {
            return false;
        }
        self.eased = Some((self.used.min(self.limit()) / 2).max(1));
        self.eased_at = Some(now);
        self.successes = 0;
        true
    }

    /// One more for every so many successes as there are slots.
    pub(super) fn succeeded(&mut self, sent_at: Duration) {
        let Some(eased) = self.eased else {
            return;
        };
        if self.eased_at.is_some_and(|at| sent_at < at) {
            return;
        }
        self.successes += 1;
        if self.successes >= eased {
            self.successes = 0;
            self.eased = Some(eased + 1).filter(|more| *more < self.most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overload_halves_once_a_cohort_and_successes_bring_it_back() {
        let at = Duration::from_secs;
        let mut slots = Slots::new(Some(10));
        (0..8).for_each(|_| slots.take());
        assert!(slots.overloaded(at(10), at(5)));
        assert_eq!((slots.limit(), slots.free()), (4, 0));
        assert!(!slots.overloaded(at(11), at(6)), "the same cohort");
        assert!(slots.overloaded(at(20), at(15)));
        assert_eq!(slots.limit(), 2);
        slots.succeeded(at(15));
        for expected in [2, 3, 3, 3, 4] {
            slots.succeeded(at(21));
            assert_eq!(slots.limit(), expected);
        }
        (0..100).for_each(|_| slots.succeeded(at(22)));
        assert_eq!(slots.limit(), 10);
    }

    #[test]
    fn one_always_goes() {
        let mut slots = Slots::new(None);
        slots.take();
        assert!(slots.overloaded(Duration::ZERO, Duration::ZERO));
        assert_eq!(slots.limit(), 1);
    }
}
