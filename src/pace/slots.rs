//! [`Slots`]: the calls in flight, and how many there may be while the provider is overloaded
//! or lets in fewer than it was said to.

use slab::Slab;

use super::bucket::Nanos;

/// Where it was their number that was refused, one more is tried after so many rounds of
/// successes: while nothing has changed, the one is refused, and the lane closes for it.
const PATIENCE: usize = 16;

/// Each slot holds what there is to know of its call while that is made.
#[derive(Debug)]
pub(super) struct Slots<T> {
    most: usize,
    taken: Slab<T>,
    /// Fewer than `most` since an overload.
    eased: Option<usize>,
    eased_at: Option<Nanos>,
    /// It was the number of calls that was refused.
    crowded: bool,
    successes: usize,
}

impl<T> Slots<T> {
    pub(super) fn new(most: Option<usize>) -> Self {
        Self {
            most: most.unwrap_or(usize::MAX),
            taken: Slab::new(),
            eased: None,
            eased_at: None,
            crowded: false,
            successes: 0,
        }
    }

    pub(super) fn used(&self) -> usize {
        self.taken.len()
    }

    /// How many there may be now.
    pub(super) fn limit(&self) -> usize {
        self.most.min(self.eased.unwrap_or(usize::MAX))
    }

    pub(super) fn free(&self) -> usize {
        self.limit().saturating_sub(self.used())
    }

    /// The number of the slot that `call` has taken.
    pub(super) fn take(&mut self, call: T) -> usize {
        self.taken.insert(call)
    }

    pub(super) fn get_mut(&mut self, slot: usize) -> &mut T {
        &mut self.taken[slot]
    }

    pub(super) fn give_back(&mut self, slot: usize) -> T {
        self.taken.remove(slot)
    }

    pub(super) fn retune(&mut self, most: Option<usize>) {
        self.most = most.unwrap_or(usize::MAX);
        self.eased = None;
    }

    /// The provider is overloaded: half of what is in flight, once for each cohort.
    /// Says whether the limit was lowered. The refused call still holds its slot.
    pub(super) fn overloaded(&mut self, now: Nanos, sent_at: Nanos) -> bool {
        if self.eased_at.is_some_and(|at| sent_at < at) {
            return false;
        }
        self.eased = Some((self.used().min(self.limit()) / 2).max(1));
        self.eased_at = Some(now);
        self.crowded = false;
        self.successes = 0;
        true
    }

    /// Whether so many are in flight that it may be their number that is refused.
    pub(super) fn are_many(&self) -> bool {
        self.limit() < usize::MAX && self.used() > self.limit() / 2
    }

    /// A call was refused for the number in flight, of which it still is one: it was one too
    /// many, and so is each that went with it and is refused. What is left is what
    /// the provider let in.
    pub(super) fn crowded(&mut self, now: Nanos, sent_at: Nanos) {
        let most = match self.eased {
            Some(eased) if self.was_crowded(sent_at) => eased,
            _ => {
                self.eased_at = Some(now);
                self.used().min(self.limit())
            }
        };
        self.eased = Some(most.saturating_sub(1).max(1));
        self.crowded = true;
        self.successes = 0;
    }

    /// Whether calls sent then went with those that were too many.
    pub(super) fn was_crowded(&self, sent_at: Nanos) -> bool {
        self.crowded && self.eased_at.is_some_and(|at| sent_at <= at)
    }

    /// One more for every so many successes as there are slots.
    pub(super) fn succeeded(&mut self, sent_at: Nanos) {
        let Some(eased) = self.eased else {
            return;
        };
        if self.eased_at.is_some_and(|at| sent_at < at) {
            return;
        }
        self.successes += 1;
        let rounds = if self.crowded { PATIENCE } else { 1 };
        if self.successes >= eased.saturating_mul(rounds) {
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
        let at = |second: u64| second * 1_000_000_000;
        let mut slots = Slots::new(Some(10));
        for _ in 0..8 {
            slots.take(());
        }
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
    fn a_crowd_leaves_as_many_as_were_let_in() {
        let at = |second: u64| second * 1_000_000_000;
        let mut slots = Slots::new(Some(16));
        let taken: Vec<_> = (0..16).map(|_| slots.take(())).collect();
        assert!(slots.are_many());
        for slot in &taken[..8] {
            slots.crowded(at(1), at(1));
            slots.give_back(*slot);
        }
        assert_eq!(slots.limit(), 8);
        (0..8 * PATIENCE - 1).for_each(|_| slots.succeeded(at(2)));
        assert_eq!(slots.limit(), 8);
        slots.succeeded(at(2));
        assert_eq!(slots.limit(), 9);
        slots.take(());
        slots.crowded(at(3), at(3));
        assert_eq!(slots.limit(), 8);
    }

    #[test]
    fn without_a_limit_nobody_is_many() {
        let mut slots = Slots::new(None);
        for _ in 0..1_000 {
            slots.take(());
        }
        assert!(!slots.are_many());
    }

    #[test]
    fn one_always_goes() {
        let mut slots = Slots::new(None);
        slots.take(());
        assert!(slots.overloaded(0, 0));
        assert_eq!(slots.limit(), 1);
    }
}
