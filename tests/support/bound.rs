//! The lower bound on the makespan of a run, which no client can beat.
//!
//! T ≥ max( maxᵢ min{t : Bᵢ + ∫ rᵢ ≥ Wᵢ} + shortest call, Σ latency / C, longest path )
//!
//! Wᵢ is the amount charged to limit i until the last call is admitted. The shortest latency is added, because that
//! call still takes its time. Bᵢ is the burst of the provider's bucket, or of the caller's own limit if that is the
//! tighter one, because a lane does not exceed the limit that it was given.
#![allow(dead_code, missing_docs, unreachable_pub)] // Each test uses a part.

use std::time::Duration;

/// The amount that one limit lets pass over time.
#[derive(Debug, Clone)]
pub enum Curve {
    /// A bucket that starts full and holds `burst` seconds of its rate, one unit at least.
    Bucket {
        burst: f64,
        /// From which second on it refills with how much a second; the first from 0.
        rates: Vec<(f64, f64)>,
    },
    /// Windows of `length` seconds, each with a share of its own that does not keep; the first began `phase` before.
    Windows { length: f64, phase: f64, share: f64 },
}

impl Curve {
    pub fn bucket(per_minute: u64, burst: Duration) -> Self {
        Self::Bucket {
            burst: burst.as_secs_f64(),
            rates: vec![(0.0, per_minute as f64 / 60.0)],
        }
    }

    pub fn windows(per_minute: u64, length: Duration, phase: Duration) -> Self {
        let length = length.as_secs_f64();
        Self::Windows {
            length,
            phase: phase.as_secs_f64(),
            share: per_minute as f64 / 60.0 * length,
        }
    }

    /// The rate becomes another one `at` a time after those before.
    #[must_use]
    pub fn then(mut self, at: Duration, per_minute: u64) -> Self {
        match &mut self {
            Self::Bucket { rates, .. } => {
                rates.push((at.as_secs_f64(), per_minute as f64 / 60.0));
            }
            Self::Windows { .. } => panic!("windows keep their rate here"),
        }
        self
    }

    /// The most it lets through in `from..=to`, whatever came before.
    fn between(&self, from: f64, to: f64) -> f64 {
        match self {
            Self::Bucket { rates, .. } => {
                let ends = rates.iter().skip(1).map(|(at, _)| *at);
                let pieces = rates.iter().zip(ends.chain([f64::INFINITY]));
                let flow: f64 = pieces
                    .map(|((start, rate), end)| rate * (end.min(to) - start.max(from)).max(0.0))
                    .sum();
                self.holds(from) + flow
            }
            Self::Windows {
                length,
                phase,
                share,
            } => {
                let window = |at: f64| ((at + phase) / length).floor();
                share * (window(to) - window(from) + 1.0)
            }
        }
    }

    /// Returns the amount that may pass at one moment.
    fn holds(&self, at: f64) -> f64 {
        match self {
            Self::Bucket { burst, rates } => {
                let now = rates.iter().rev().find(|(from, _)| *from <= at);
                (now.expect("the first rate holds from 0").1 * burst).max(1.0)
            }
            Self::Windows { share, .. } => share.max(1.0),
        }
    }
}

/// One resource that several may limit at a time (the provider, the caller's own
/// configuration), and what a run takes of it.
#[derive(Debug, Clone)]
pub struct Limit {
    pub curves: Vec<Curve>,
    /// Charged by the time the last call is admitted.
    pub work: f64,
}

impl Limit {
    /// Creates a limit for calls that are charged `costs` when they are admitted.
    ///
    /// A call above the capacity is admitted when the limit is full and leaves a debt. The
    /// debt of the last call delays no other.
    pub fn new(curves: Vec<Curve>, costs: impl IntoIterator<Item = u64>) -> Self {
        let holds = curves.iter().map(|curve| curve.holds(0.0));
        let holds = holds.fold(f64::INFINITY, f64::min);
        let (mut work, mut debt) = (0.0, 0.0);
        for cost in costs {
            work += cost as f64;
            debt = f64::max(debt, cost as f64 - holds);
        }
        Self {
            curves,
            work: work - debt,
        }
    }

    /// Returns the most that passes in `0..=end`.
    ///
    /// In any interval, no more passes than the tightest curve allows. That is true for every way to divide the time
    /// into intervals, so the smallest sum counts. Intervals end where a rate changes.
    fn passes(&self, end: f64) -> f64 {
        let tightest = |from: f64, to: f64| {
            let each = self.curves.iter().map(|curve| curve.between(from, to));
            each.fold(f64::INFINITY, f64::min)
        };
        let changes = self.curves.iter().flat_map(|curve| match curve {
            Curve::Bucket { rates, .. } => rates.iter().map(|(at, _)| *at).collect(),
            Curve::Windows { .. } => vec![0.0],
        });
        let mut cuts: Vec<f64> = changes.filter(|at| (0.0..=end).contains(at)).collect();
        cuts.push(end);
        cuts.sort_by(f64::total_cmp);
        cuts.dedup();
        if cuts.len() == 1 {
            return tightest(0.0, end);
        }
        // The most that passes until each cut.
        let mut passed = vec![(0.0, 0.0)];
        for to in &cuts[1..] {
            let ways = passed
                .iter()
                .map(|(from, before)| before + tightest(*from, *to));
            passed.push((*to, ways.fold(f64::INFINITY, f64::min)));
        }
        passed.last().expect("the end").1
    }

    /// Returns the smallest t at which all work has passed, by bisection.
    pub fn earliest(&self) -> Duration {
        if self.curves.is_empty() || self.passes(0.0) >= self.work {
            return Duration::ZERO;
        }
        let mut late = 1.0;
        while self.passes(late) < self.work {
            late *= 2.0;
            assert!(late < 1e12, "{self:?} never lets it through");
        }
        let mut early = 0.0;
        while late - early > 1e-7 {
            let middle = (early + late) / 2.0;
            if self.passes(middle) < self.work {
                early = middle;
            } else {
                late = middle;
            }
        }
        Duration::from_secs_f64(late)
    }
}

/// The time that the calls themselves take.
#[derive(Debug, Clone, Copy, Default)]
pub struct Calls {
    pub total: Duration,
    pub shortest: Duration,
    /// The longest chain of calls that wait for each other; of independent calls the longest.
    pub longest_path: Duration,
    /// How many may be in flight at one time.
    pub in_flight: Option<usize>,
}

/// Returns the time before which no client can be done.
pub fn lower_bound(limits: &[Limit], calls: Calls) -> Duration {
    let admitted = limits.iter().map(Limit::earliest).max().unwrap_or_default();
    let slots = calls.in_flight.map_or(Duration::ZERO, |slots| {
        calls.total / u32::try_from(slots).expect("a small number")
    });
    (admitted + calls.shortest)
        .max(slots)
        .max(calls.longest_path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn seconds(limit: &Limit) -> f64 {
        (limit.earliest().as_secs_f64() * 1e6).round() / 1e6
    }

    fn ones(n: usize) -> impl Iterator<Item = u64> {
        std::iter::repeat_n(1, n)
    }

    #[test]
    fn a_bucket_gives_its_burst_and_then_its_rate() {
        let bucket = || vec![Curve::bucket(600, 2 * SECOND)];
        assert_eq!(seconds(&Limit::new(bucket(), ones(20))), 0.0);
        assert_eq!(seconds(&Limit::new(bucket(), ones(21))), 0.1);
        assert_eq!(seconds(&Limit::new(bucket(), ones(1_000))), 98.0);
        let slow = vec![Curve::bucket(3, SECOND)];
        assert_eq!(seconds(&Limit::new(slow, ones(3))), 40.0, "it holds one");
    }

    #[test]
    fn a_drop_takes_its_time() {
        let dropped = Curve::bucket(600, Duration::ZERO)
            .then(10 * SECOND, 60)
            .then(20 * SECOND, 600);
        // 1 held, 100 in the first ten seconds, 10 in the next.
        let at = |n| seconds(&Limit::new(vec![dropped.clone()], ones(n)));
        assert_eq!(
            (at(101), at(106), at(111), at(121)),
            (10.0, 15.0, 20.0, 21.0)
        );
    }

    #[test]
    fn windows_open_with_a_share_each() {
        let windows = || vec![Curve::windows(60, 60 * SECOND, Duration::ZERO)];
        assert_eq!(seconds(&Limit::new(windows(), ones(60))), 0.0);
        assert_eq!(seconds(&Limit::new(windows(), ones(61))), 60.0);
        assert_eq!(seconds(&Limit::new(windows(), ones(180))), 120.0);
    }

    #[test]
    fn the_tighter_limit_binds_at_each_time() {
        // Half of the true limit is configured; for a while the truth is a tenth.
        let configured = Curve::bucket(300, Duration::ZERO);
        let truth = Curve::bucket(600, Duration::ZERO)
            .then(100 * SECOND, 60)
            .then(200 * SECOND, 600);
        let both = Limit::new(vec![configured.clone(), truth], ones(1_103));
        // 500, 100 and then 500 more, and one at once whenever the other takes over.
        assert_eq!(seconds(&both), 300.0);
        assert_eq!(seconds(&Limit::new(vec![configured], ones(1_101))), 220.0);
    }

    #[test]
    fn where_both_are_as_tight_the_smaller_burst_counts_until_the_change() {
        let configured = Curve::bucket(600, SECOND);
        let truth = Curve::bucket(600, 2 * SECOND).then(10 * SECOND, 150);
        // 110 in the first ten seconds; then 5 at once and 2.5 a second.
        let both = Limit::new(vec![truth, configured], ones(140));
        assert_eq!(seconds(&both), 20.0);
    }

    #[test]
    fn the_last_call_may_leave_a_debt() {
        let bucket = vec![Curve::bucket(600, SECOND)];
        let limit = Limit::new(bucket, [5, 5, 40]);
        assert_eq!(seconds(&limit), 1.0);
    }

    #[test]
    fn the_slowest_of_limits_slots_and_path_decides() {
        let limit = Limit::new(vec![Curve::bucket(600, SECOND)], ones(110));
        let mut calls = Calls {
            total: 220 * SECOND,
            shortest: SECOND,
            longest_path: 5 * SECOND,
            in_flight: None,
        };
        let ms = |d: Duration| d.as_secs_f64().round();
        assert_eq!(ms(lower_bound(std::slice::from_ref(&limit), calls)), 11.0);
        calls.in_flight = Some(10);
        assert_eq!(ms(lower_bound(std::slice::from_ref(&limit), calls)), 22.0);
        calls.longest_path = 30 * SECOND;
        assert_eq!(ms(lower_bound(&[limit], calls)), 30.0);
        assert_eq!(lower_bound(&[], Calls::default()), Duration::ZERO);
    }
}
