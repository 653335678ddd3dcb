//! The arithmetic of one limit, exact: whole units, whole nanoseconds, no rounding in
//! the caller's favour. It shares nothing with the crate's own pacing, because it is
//! the witness that the pacing is tested against.

use std::time::Duration;

/// Nanoseconds in a minute. An amount times this is a "level": a limit of `n` per minute
/// then refills by exactly `n` levels a nanosecond.
const MINUTE: u128 = 60_000_000_000;

/// One limit at one moment. `advance` goes first; the rest speaks of the time it set.
pub(super) trait Meter: Send {
    /// Moves on to `now`, counted from the start of the simulation.
    fn advance(&mut self, now: Duration);

    /// Nanoseconds until `amount` may pass, 0 if it may now.
    ///
    /// An amount above what ever fits at once may pass when nothing is used, and is
    /// then owed. An amount of 0 may pass where 1 may.
    fn wait(&self, amount: u64) -> u128;

    /// Uses `amount`, in debt if need be.
    fn spend(&mut self, amount: u64);

    /// Uses 1 if it is there: what a refused call costs where refusals count.
    fn waste(&mut self);

    /// Whole units left.
    fn remaining(&self) -> u64;

    /// Nanoseconds until all is back.
    fn reset(&self) -> u128;

    /// Changes the limit, keeping what is used.
    fn retune(&mut self, per_minute: u64);
}

/// A bucket that refills continuously.
pub(super) struct Bucket {
    per_minute: u128,
    burst: u128,
    /// In levels; negative when in debt.
    level: i128,
    at: u128,
}

impl Bucket {
    /// A full bucket that holds `burst` worth of the limit, and one unit at least.
    pub(super) fn full(per_minute: u64, burst: Duration, now: Duration) -> Self {
        let mut bucket = Self {
            per_minute: per_minute.into(),
            burst: burst.as_nanos(),
            level: 0,
            at: now.as_nanos(),
        };
        bucket.level = bucket.capacity();
        bucket
    }

    fn capacity(&self) -> i128 {
        (self.per_minute * self.burst).max(MINUTE) as i128
    }

    fn until(&self, level: i128) -> u128 {
        ((level - self.level).max(0) as u128).div_ceil(self.per_minute)
    }
}

fn levels(amount: u64) -> i128 {
    (u128::from(amount) * MINUTE) as i128
}

impl Meter for Bucket {
    fn advance(&mut self, now: Duration) {
        let elapsed = now.as_nanos().saturating_sub(self.at);
        self.at += elapsed;
        self.level = (self.level + (self.per_minute * elapsed) as i128).min(self.capacity());
    }

    fn wait(&self, amount: u64) -> u128 {
        self.until(levels(amount.max(1)).min(self.capacity()))
    }

    fn spend(&mut self, amount: u64) {
        self.level -= levels(amount);
    }

    fn waste(&mut self) {
        // Not below zero: a crowd of refused calls keeps the bucket empty, not in debt.
        self.level -= self.level.clamp(0, MINUTE as i128);
    }

    fn remaining(&self) -> u64 {
        (self.level.max(0) as u128 / MINUTE) as u64
    }

    fn reset(&self) -> u128 {
        self.until(self.capacity())
    }

    fn retune(&mut self, per_minute: u64) {
        self.per_minute = per_minute.into();
        self.level = self.level.min(self.capacity());
    }
}

/// Windows of a fixed length that begin with the simulation; each lets its share through
/// and forgets what was not used.
///
/// By the end of window `k` the windows have let `allowed(k + 1)` through at most, the
/// share of all of them rounded up; so 90 per minute in windows of a second is 2, 1,
/// 2, 1, …, and the long run is exact. A window without a unit of its own prolongs the
/// one before: 30 per minute in windows of a second is one call in every two seconds.
pub(super) struct Window {
    per_minute: u128,
    length: u128,
    /// The window we are in.
    index: u128,
    /// How far along `allowed` the calls have come. Ahead of `allowed(index + 1)`: a debt.
    mark: u128,
    at: u128,
}

impl Window {
    pub(super) fn new(per_minute: u64, length: Duration, now: Duration) -> Self {
        let mut window = Self {
            per_minute: per_minute.into(),
            length: length.as_nanos(),
            index: 0,
            mark: 0,
            at: 0,
        };
        window.advance(now);
        window
    }

    fn allowed(&self, windows: u128) -> u128 {
        (windows * self.per_minute * self.length).div_ceil(MINUTE)
    }

    /// What window `index` still has, and whether nothing of it is used.
    fn left(&self, index: u128) -> (u128, bool) {
        let from = self.allowed(index);
        let to = self.allowed(index + 1);
        (to.saturating_sub(self.mark.max(from)), self.mark <= from)
    }

    /// The first window of which `allowed(index + 1)` reaches `mark`.
    fn reaching(&self, mark: u128) -> u128 {
        // Not above it, and two steps below at most.
        let share = self.per_minute * self.length;
        let mut index = (mark.saturating_sub(1) * MINUTE / share).saturating_sub(1);
        while self.allowed(index + 1) < mark {
            index += 1;
        }
        index
    }

    fn until(&self, index: u128) -> u128 {
        (index * self.length).saturating_sub(self.at)
    }
}

impl Meter for Window {
    fn advance(&mut self, now: Duration) {
        self.at = self.at.max(now.as_nanos());
        self.index = self.reaching(self.allowed(self.at / self.length + 1));
        self.mark = self.mark.max(self.allowed(self.index));
    }

    fn wait(&self, amount: u64) -> u128 {
        let amount = u128::from(amount.max(1));
        // Nothing passes before the debt is paid and a unit is left; from there it is
        // a step or two to a window with room, or to an untouched one.
        let mut index = self.reaching(self.mark + 1);
        loop {
            let (left, untouched) = self.left(index);
            if left >= amount || (untouched && left > 0) {
                return self.until(index);
            }
            index += 1;
        }
    }

    fn spend(&mut self, amount: u64) {
        self.mark += u128::from(amount);
    }

    fn waste(&mut self) {
        self.mark += self.left(self.index).0.min(1);
    }

    fn remaining(&self) -> u64 {
        self.left(self.index).0 as u64
    }

    fn reset(&self) -> u128 {
        if self.mark <= self.allowed(self.index) {
            return 0;
        }
        // The window after the one that `mark` ends in or exhausts.
        let last = self.reaching(self.mark);
        self.until(self.reaching(self.allowed(last + 1) + 1))
    }

    fn retune(&mut self, per_minute: u64) {
        let used = self.mark - self.allowed(self.index);
        self.per_minute = per_minute.into();
        self.index = self.reaching(self.allowed(self.at / self.length + 1));
        self.mark = self.allowed(self.index) + used;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn nanos(duration: Duration) -> u128 {
        duration.as_nanos()
    }

    #[test]
    fn a_bucket_refills_to_the_nanosecond() {
        let mut bucket = Bucket::full(7, SECOND, Duration::ZERO);
        bucket.spend(1);
        // A seventh of a minute is no whole number of nanoseconds: rounded up.
        let wait = 8_571_428_572;
        assert_eq!(bucket.wait(1), wait);
        bucket.advance(Duration::from_nanos(wait as u64 - 1));
        assert_eq!(bucket.wait(1), 1);
        bucket.advance(Duration::from_nanos(wait as u64));
        assert_eq!((bucket.wait(1), bucket.remaining()), (0, 1));
    }

    #[test]
    fn more_than_a_bucket_waits_for_a_full_one_and_is_owed() {
        let mut bucket = Bucket::full(600, SECOND, Duration::ZERO);
        assert_eq!(bucket.remaining(), 10);
        assert_eq!(bucket.wait(25), 0);
        bucket.spend(25);
        assert_eq!(bucket.wait(1), nanos(Duration::from_millis(1600)));
        assert_eq!(bucket.wait(25), nanos(Duration::from_millis(2500)));
        assert_eq!(bucket.reset(), bucket.wait(25));
    }

    #[test]
    fn windows_of_a_broken_share_keep_the_rate_in_the_long_run() {
        let mut window = Window::new(90, SECOND, Duration::ZERO);
        let mut let_through = Vec::new();
        for second in 0..4 {
            window.advance(SECOND * second);
            let mut passed = 0;
            while window.wait(1) == 0 {
                window.spend(1);
                passed += 1;
            }
            let_through.push(passed);
        }
        assert_eq!(let_through, [2, 1, 2, 1]);
    }

    #[test]
    fn a_window_forgets_what_was_not_used_but_not_what_is_owed() {
        let mut window = Window::new(120, SECOND, Duration::ZERO);
        window.advance(SECOND * 10);
        assert_eq!((window.remaining(), window.reset()), (2, 0));
        window.spend(5);
        assert_eq!((window.remaining(), window.wait(1)), (0, nanos(SECOND * 2)));
        assert_eq!(window.reset(), nanos(SECOND * 3));
        window.advance(SECOND * 12);
        assert_eq!((window.remaining(), window.wait(2)), (1, nanos(SECOND)));
    }

    fn meter(bucket: bool, per_minute: u64, span: Duration) -> Box<dyn Meter> {
        if bucket {
            Box::new(Bucket::full(per_minute, span, Duration::ZERO))
        } else {
            Box::new(Window::new(per_minute, span, Duration::ZERO))
        }
    }

    proptest! {
        /// What it says to wait is enough, and a nanosecond less is not.
        #[test]
        fn the_wait_is_tight(
            bucket: bool,
            per_minute in 1_u64..5_000,
            span_ms in 1_u64..70_000,
            spends in prop::collection::vec((0_u64..3_000, 0_u64..200), 1..20),
            amount in 0_u64..300,
            later_ms in 0_u64..100_000,
        ) {
            let later = Duration::from_millis(later_ms);
            let mut meter = meter(bucket, per_minute, Duration::from_millis(span_ms));
            let mut now = Duration::ZERO;
            for (gap_ms, spend) in spends {
                now += Duration::from_millis(gap_ms);
                meter.advance(now);
                meter.spend(spend);
            }
            let wait = meter.wait(amount);
            if wait > 0 {
                meter.advance(now + Duration::from_nanos(wait as u64 - 1));
                prop_assert!(meter.wait(amount) > 0);
                meter.advance(now + Duration::from_nanos(wait as u64));
                prop_assert_eq!(meter.wait(amount), 0);
            }
            // And whoever comes later finds no less.
            meter.advance(now + Duration::from_nanos(wait as u64) + later);
            prop_assert_eq!(meter.wait(amount), 0);
        }
    }
}
