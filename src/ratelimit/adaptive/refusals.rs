//! [`RefusalMonitor`]: the share of recent calls that were refused, and whether it depends on the rate.
//!
//! One refusal in a thousand calls says nothing of a limit, and a lane that reacts to each one is
//! slowed down by noise. So a share of the calls may be refused without consequence: an error
//! budget, kept as a token bucket that every granted call fills a little (as the retry budgets of
//! Finagle and gRPC do, with successes in place of calls).
//!
//! The lane learns that share from its own reductions. If a limit is the reason for the refusals,
//! sending less lowers their share. If a series of reductions does not, sending less is no
//! cure: the reductions are taken back, and refusals at that rate are expected from then on.

use std::collections::VecDeque;

use crate::ratelimit::bucket::Nanos;

/// The share of calls that an overloaded provider may refuse before the lane reacts.
const OVERLOADS: f64 = 0.03;
/// The refusals in a row that are within the budget. Where one call in a hundred is refused at random and three are
/// tolerated, a budget of eight is used up by about one refusal in a million: exp(-8θ), where θ > 0 solves 0.01 (e^θ - 1) = 0.03 θ
/// (Lundberg's inequality).
const DEPTH: f64 = 8.0;
/// The number of refusals over which the expected share is measured.
const REMEMBERED: usize = 32;
/// The number of refusals over which a majority is measured.
const RECENT: usize = 4;
/// The number of reductions that show whether they help.
const SERIES: usize = 8;
/// The rate in the later half of a series must have fallen to this part: a rate that hovers around a limit does
/// not fall.
const FALL: f64 = 0.6;
/// The reductions while the rate was high: fewer do not show the share of refusals at that rate.
const TELLING: usize = 3;
/// Where a larger share is refused, sending less is right for any reason.
const MOST: f64 = 0.3;
/// The tolerated share is this multiple of the measured one, because refusals come in clusters.
const MARGIN: f64 = 2.0;
/// A smaller tolerated share counts as none.
const LEAST: f64 = 0.02;
/// A refusal longer ago than this says nothing of today.
pub(in crate::ratelimit) const FORGOTTEN: Nanos = 600_000_000_000;

#[derive(Debug)]
pub(in crate::ratelimit) struct RefusalMonitor {
    /// The share that is tolerated at first.
    least: f64,
    /// The share that is tolerated now, and the most that it may be: what a series of reductions found.
    tolerated: f64,
    most: f64,
    /// How many refusals are left of the budget.
    budget: f64,
    /// The number of calls granted until each of the last refusals, the oldest first.
    granted: VecDeque<u64>,
    refused_at: Nanos,
    /// The last reductions.
    series: VecDeque<Reduction>,
}

/// The lane sends less since a refusal.
#[derive(Debug, Clone, Copy)]
pub(in crate::ratelimit) struct Reduction {
    /// How many calls had been granted.
    pub(in crate::ratelimit) granted: u64,
    /// How much was tried: a share of a rate, or a number of calls in flight.
    pub(in crate::ratelimit) tried: f64,
    /// It was a number of calls in flight, which is reduced to what was let in: a second refusal at
    /// once needs another reason.
    pub(in crate::ratelimit) in_flight: bool,
    /// The number had recovered from the reduction before.
    pub(in crate::ratelimit) recovered: bool,
}

impl RefusalMonitor {
    /// By a provider that is overloaded.
    pub(in crate::ratelimit) fn of_overload() -> Self {
        Self::tolerating(OVERLOADS)
    }

    /// By a rate limit: each one counts, until it is known that no rate is the reason.
    pub(in crate::ratelimit) fn of_rate() -> Self {
        Self::tolerating(0.0)
    }

    fn tolerating(share: f64) -> Self {
        Self {
            least: share,
            tolerated: share,
            most: share,
            budget: if share > 0.0 { DEPTH } else { 0.0 },
            granted: VecDeque::new(),
            refused_at: 0,
            series: VecDeque::new(),
        }
    }

    /// Records a refusal, when the lane had `granted` that number of calls in all. Returns whether it is within the budget.
    pub(in crate::ratelimit) fn tolerates(&mut self, now: Nanos, granted: u64) -> bool {
        if now.saturating_sub(self.refused_at) > FORGOTTEN {
            *self = Self::tolerating(self.least);
        }
        self.refused_at = now;
        if let Some(before) = self.granted.back() {
            let sent = granted.saturating_sub(*before) as f64;
            self.budget = (self.budget + self.tolerated * sent).min(DEPTH);
        }
        if self.granted.len() > REMEMBERED {
            self.granted.pop_front();
            self.adjust();
        }
        self.granted.push_back(granted);
        let within = self.budget >= 1.0;
        if within {
            self.budget -= 1.0;
        }
        within
    }

    /// Expects the share of the last refusals. Only another series of reductions raises it above what the last one
    /// found: where too many calls are tried, more tolerance means more refusals.
    fn adjust(&mut self) {
        let share = share(self.granted.iter().copied()).unwrap_or(1.0);
        self.tolerated = tolerance(share, REMEMBERED).clamp(self.least, self.most);
        if self.tolerated < LEAST {
            (self.tolerated, self.most, self.budget) = (0.0, self.least, 0.0);
        }
    }

    /// Whether calls are refused for no reason that the lane could find, more than is usual.
    pub(in crate::ratelimit) fn is_random(&self) -> bool {
        self.tolerated > self.least
    }

    /// Whether at least half of the calls were refused lately.
    pub(in crate::ratelimit) fn is_majority(&self) -> bool {
        let recent = self.granted.iter().rev().take(RECENT + 1).rev();
        recent.len() > RECENT && share(recent.copied()).is_some_and(|share| share >= 0.5)
    }

    /// The lane was made to send less by a refusal beyond the budget. If reductions turn out not
    /// to help, returns the most that was tried, and tolerates such refusals from now on.
    pub(in crate::ratelimit) fn record_reduction(&mut self, reduction: Reduction) -> Option<f64> {
        if reduction.recovered {
            self.series.clear();
        }
        if self.series.len() == REMEMBERED {
            self.series.pop_front();
        }
        self.series.push_back(reduction);
        let tolerance = [SERIES, 2 * SERIES, REMEMBERED]
            .into_iter()
            .find_map(|length| Some(tolerance(self.in_spite_of(length)?, length)))?;
        let tried = self.series.iter().map(|reduction| reduction.tried);
        let before = tried.fold(0.0, f64::max);
        self.series.clear();
        self.most = tolerance.max(self.least);
        self.tolerated = self.most;
        self.budget = DEPTH;
        Some(before)
    }

    /// The share of calls that is refused in spite of the last `length` reductions, if they did not lower
    /// it.
    fn in_spite_of(&self, length: usize) -> Option<f64> {
        let series = self
            .series
            .iter()
            .skip(self.series.len().checked_sub(length)?);
        let granted = || series.clone().map(|reduction| reduction.granted);
        let tried = || series.clone().map(|reduction| reduction.tried);
        let first = tried().next()?;
        let half = length / 2;
        let in_flight = series.clone().all(|reduction| reduction.in_flight);
        let half = match in_flight {
            true => half,
            false => {
                let last = tried().skip(half).sum::<f64>() / (length - half) as f64;
                let middle = (first * last).sqrt();
                let high = tried().take_while(|tried| *tried > middle).count();
                (last <= FALL * first && high >= TELLING).then_some(high)?
            }
        };
        let early = share(granted().take(half + 1))?;
        let late = share(granted().skip(half))?;
        let all = share(granted())?;
        let telling = self.least < all && all <= MOST;
        (telling && late >= early / 2.0).then_some(all)
    }
}

/// Returns the tolerated share for one that was measured over a number of refusals: the true share may be two standard
/// deviations higher.
fn tolerance(share: f64, refusals: usize) -> f64 {
    MARGIN * share * (1.0 + 2.0 / (refusals as f64).sqrt())
}

/// Returns the share of refused calls from the number of granted calls at each refusal; the first one only marks
/// the beginning.
fn share(granted: impl ExactSizeIterator<Item = u64> + Clone) -> Option<f64> {
    let refused = granted.len().checked_sub(1).filter(|n| *n > 0)? as u64;
    let first = granted.clone().next()?;
    let sent = granted.last()?.saturating_sub(first);
    Some(refused as f64 / sent.max(refused) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Nanos = 1_000_000_000;

    #[test]
    fn isolated_refusals_are_within_the_budget_for_ever() {
        let mut refusals = RefusalMonitor::of_overload();
        assert!((1..=1_000).all(|n| refusals.tolerates(n * SECOND, 40 * n)));
        assert!(!refusals.is_majority());
    }

    #[test]
    fn a_series_uses_the_budget_up_and_prevails() {
        let mut refusals = RefusalMonitor::of_overload();
        let within = (1..=20)
            .filter(|n| refusals.tolerates(SECOND, 100 + n))
            .count();
        assert_eq!(within, 8);
        assert!(refusals.is_majority());
        assert!(
            !refusals.tolerates(2 * SECOND, 130),
            "ten calls are too few"
        );
        assert!(
            refusals.tolerates(3 * SECOND, 170),
            "one of forty is tolerated"
        );
    }

    #[test]
    fn a_long_time_without_a_refusal_restores_the_budget() {
        let mut refusals = RefusalMonitor::of_overload();
        while refusals.tolerates(SECOND, 1) {}
        let later = SECOND + FORGOTTEN + 1;
        assert!(refusals.tolerates(later, 1));
        assert!(!refusals.is_majority());
    }

    fn reduction(granted: u64, tried: f64) -> Reduction {
        Reduction {
            granted,
            tried,
            in_flight: false,
            recovered: false,
        }
    }

    /// The rate after `n` refusals, each of which takes a fifth.
    fn cut(n: u64) -> f64 {
        0.8_f64.powi(n as i32)
    }

    #[test]
    fn reductions_that_help_are_kept() {
        let mut refusals = RefusalMonitor::of_rate();
        // A limit that has fallen to a quarter refuses three of four calls, then two, then fewer.
        let falling = [1, 1, 2, 2, 3, 4, 25];
        let mut granted = 0;
        for n in 0..60 {
            let calls = falling.get(n).copied().unwrap_or(150);
            granted += calls;
            let tried = cut(n.min(falling.len()) as u64);
            assert_eq!(
                refusals.record_reduction(reduction(granted, tried)),
                None,
                "{n}"
            );
            assert!(!refusals.tolerates(SECOND, granted));
        }
    }

    #[test]
    fn reductions_that_do_not_help_are_taken_back_and_such_refusals_are_tolerated() {
        let mut refusals = RefusalMonitor::of_rate();
        let restored = (0..8).find_map(|n| refusals.record_reduction(reduction(10 * n, cut(n))));
        assert_eq!(restored, Some(1.0));
        assert!(refusals.is_random());
        let every = |refusals: &mut RefusalMonitor, calls: u64, from: u64| {
            let granted = (1..=100).map(move |n| from + calls * n);
            granted
                .filter(|granted| refusals.tolerates(SECOND, *granted))
                .count()
        };
        assert_eq!(every(&mut refusals, 10, 70), 100);
        let tolerated = every(&mut refusals, 2, 1_070);
        assert!(
            tolerated < 90,
            "{tolerated}: every second call is more than was found"
        );
        every(&mut refusals, 500, 1_370);
        assert!(!refusals.is_random(), "one in 500 is none");
    }

    #[test]
    fn where_most_calls_are_refused_less_is_sent_for_whatever_reason() {
        let mut refusals = RefusalMonitor::of_rate();
        let restored = (0..40).find_map(|n| refusals.record_reduction(reduction(2 * n, cut(n))));
        assert_eq!(restored, None);
    }
}
