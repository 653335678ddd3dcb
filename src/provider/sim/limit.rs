//! The arithmetic of one limit, exact: whole units, whole nanoseconds, no rounding in
//! the caller's favour. It shares no code with `ratelimit`, which is tested against it.

use std::time::Duration;

/// Nanoseconds in a minute. An amount times this is a "level": a limit of `n` per minute
/// refills by exactly `n` levels a nanosecond.
const MINUTE: u128 = 60_000_000_000;

/// One limit at one moment. `advance` sets the time that the other methods refer to.
pub(super) trait Limit: Send {
    /// Advances to `now`, counted from the start of the simulation.
    fn advance(&mut self, now: Duration);

    /// Returns the nanoseconds until `amount` may pass, 0 if it may now.
    ///
    /// An amount above the capacity may pass when nothing is used, and leaves a debt. An amount of 0 may pass when 1
    /// may.
    fn wait(&self, amount: u64) -> u128;

    /// Charges `amount`, which may leave a debt.
    fn charge(&mut self, amount: u64);

    /// Charges 1 if it is available: the cost of a refused call, where refusals count.
    fn charge_refusal(&mut self);

    /// Returns the whole units that are available.
    fn remaining(&self) -> u64;

    /// Returns the nanoseconds until the limit is unused.
    fn reset(&self) -> u128;

    /// Changes the rate and keeps the used amount.
    fn set_rate(&mut self, per_minute: u64);
}

/// A token bucket, which refills continuously.
pub(super) struct TokenBucket {
    per_minute: u128,
    burst: u128,
    /// In levels; negative when in debt.
    level: i128,
    at: u128,
}

impl TokenBucket {
    /// Creates a full bucket with a capacity of `burst` at the rate, at least one unit.
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

impl Limit for TokenBucket {
    fn advance(&mut self, now: Duration) {
        let elapsed = now.as_nanos().saturating_sub(self.at);
        self.at += elapsed;
        self.level = (self.level + (self.per_minute * elapsed) as i128).min(self.capacity());
    }

    fn wait(&self, amount: u64) -> u128 {
        self.until(levels(amount.max(1)).min(self.capacity()))
    }

    fn charge(&mut self, amount: u64) {
        self.level -= levels(amount);
    }

    fn charge_refusal(&mut self) {
        // Not below zero: refused calls keep the bucket empty and leave no debt.
        self.level -= self.level.clamp(0, MINUTE as i128);
    }

    fn remaining(&self) -> u64 {
        (self.level.max(0) as u128 / MINUTE) as u64
    }

    fn reset(&self) -> u128 {
        self.until(self.capacity())
    }

    fn set_rate(&mut self, per_minute: u64) {
        self.per_minute = per_minute.into();
        self.level = self.level.min(self.capacity());
    }
}

/// Windows of a fixed length, the first of which began `phase` before the simulation. Each lets its share pass; an unused share is lost.
///
/// Until the end of window `k` at most `allowed(k + 1)` pass, the share of all windows rounded up. So 90 per minute in
/// windows of a second is 2, 1, 2, 1, …, and exact in the long run. A window without a unit of its own prolongs the one
/// before: 30 per minute in windows of a second is one call every two seconds.
pub(super) struct FixedWindow {
    per_minute: u128,
    length: u128,
    /// The current window.
    index: u128,
    /// The part of `allowed` that is used or lost. Above `allowed(index + 1)` it is a debt.
    used: u128,
    phase: u128,
    /// The time since the first window began.
    at: u128,
}

impl FixedWindow {
    pub(super) fn new(per_minute: u64, length: Duration, phase: Duration, now: Duration) -> Self {
        let mut window = Self {
            per_minute: per_minute.into(),
            length: length.as_nanos(),
            index: 0,
            used: 0,
            phase: phase.as_nanos(),
            at: 0,
        };
        window.advance(now);
        window
    }

    fn allowed(&self, windows: u128) -> u128 {
        (windows * self.per_minute * self.length).div_ceil(MINUTE)
    }

    /// Returns the units that window `index` has left, and whether none of it is used.
    fn left(&self, index: u128) -> (u128, bool) {
        let from = self.allowed(index);
        let to = self.allowed(index + 1);
        (to.saturating_sub(self.used.max(from)), self.used <= from)
    }

    /// Returns the first window of which `allowed(index + 1)` reaches `used`.
    fn reaching(&self, used: u128) -> u128 {
        // This is not above the result, and at most two below it.
        let share = self.per_minute * self.length;
        let mut index = (used.saturating_sub(1) * MINUTE / share).saturating_sub(1);
        while self.allowed(index + 1) < used {
            index += 1;
        }
        index
    }

    fn until(&self, index: u128) -> u128 {
        (index * self.length).saturating_sub(self.at)
    }
}

impl Limit for FixedWindow {
    fn advance(&mut self, now: Duration) {
        self.at = self.at.max(now.as_nanos() + self.phase);
        self.index = self.reaching(self.allowed(self.at / self.length + 1));
        self.used = self.used.max(self.allowed(self.index));
    }

    fn wait(&self, amount: u64) -> u128 {
        let amount = u128::from(amount.max(1));
        // No amount passes before the debt is paid and a unit is left. The window with room, or the unused one, is one
        // or two further.
        let mut index = self.reaching(self.used + 1);
        loop {
            let (left, unused) = self.left(index);
            if left >= amount || (unused && left > 0) {
                return self.until(index);
            }
            index += 1;
        }
    }

    fn charge(&mut self, amount: u64) {
        self.used += u128::from(amount);
    }

    fn charge_refusal(&mut self) {
        self.used += self.left(self.index).0.min(1);
    }

    fn remaining(&self) -> u64 {
        self.left(self.index).0 as u64
    }

    fn reset(&self) -> u128 {
        if self.used <= self.allowed(self.index) {
            return 0;
        }
        // The window after the one that `used` ends in or exhausts.
        let last = self.reaching(self.used);
        self.until(self.reaching(self.allowed(last + 1) + 1))
    }

    fn set_rate(&mut self, per_minute: u64) {
        let in_window = self.used - self.allowed(self.index);
        self.per_minute = per_minute.into();
        self.index = self.reaching(self.allowed(self.at / self.length + 1));
        self.used = self.allowed(self.index) + in_window;
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
        let mut bucket = TokenBucket::full(7, SECOND, Duration::ZERO);
        bucket.charge(1);
        // A seventh of a minute is no whole number of nanoseconds: rounded up.
        let wait = 8_571_428_572;
        assert_eq!(bucket.wait(1), wait);
        bucket.advance(Duration::from_nanos(wait as u64 - 1));
        assert_eq!(bucket.wait(1), 1);
        bucket.advance(Duration::from_nanos(wait as u64));
        assert_eq!((bucket.wait(1), bucket.remaining()), (0, 1));
    }

    #[test]
    fn an_amount_above_the_capacity_waits_for_a_full_bucket_and_leaves_a_debt() {
        let mut bucket = TokenBucket::full(600, SECOND, Duration::ZERO);
        assert_eq!(bucket.remaining(), 10);
        assert_eq!(bucket.wait(25), 0);
        bucket.charge(25);
        assert_eq!(bucket.wait(1), nanos(Duration::from_millis(1600)));
        assert_eq!(bucket.wait(25), nanos(Duration::from_millis(2500)));
        assert_eq!(bucket.reset(), bucket.wait(25));
    }

    #[test]
    fn windows_with_a_fractional_share_keep_the_rate_in_the_long_run() {
        let mut window = FixedWindow::new(90, SECOND, Duration::ZERO, Duration::ZERO);
        let mut passed_by_second = Vec::new();
        for second in 0..4 {
            window.advance(SECOND * second);
            let mut passed = 0;
            while window.wait(1) == 0 {
                window.charge(1);
                passed += 1;
            }
            passed_by_second.push(passed);
        }
        assert_eq!(passed_by_second, [2, 1, 2, 1]);
    }

    #[test]
    fn a_window_loses_its_unused_share_but_not_its_debt() {
        let mut window = FixedWindow::new(120, SECOND, Duration::ZERO, Duration::ZERO);
        window.advance(SECOND * 10);
        assert_eq!((window.remaining(), window.reset()), (2, 0));
        window.charge(5);
        assert_eq!((window.remaining(), window.wait(1)), (0, nanos(SECOND * 2)));
        assert_eq!(window.reset(), nanos(SECOND * 3));
        window.advance(SECOND * 12);
        assert_eq!((window.remaining(), window.wait(2)), (1, nanos(SECOND)));
    }

    fn limit(bucket: bool, per_minute: u64, span: Duration) -> Box<dyn Limit> {
        if bucket {
            Box::new(TokenBucket::full(per_minute, span, Duration::ZERO))
        } else {
            Box::new(FixedWindow::new(
                per_minute,
                span,
                Duration::ZERO,
                Duration::ZERO,
            ))
        }
    }

    proptest! {
        /// The amount passes after the wait, and not a nanosecond before.
        #[test]
        fn the_wait_is_as_short_as_possible(
            bucket: bool,
            per_minute in 1_u64..5_000,
            span_ms in 1_u64..70_000,
            spends in prop::collection::vec((0_u64..3_000, 0_u64..200), 1..20),
            amount in 0_u64..300,
            later_ms in 0_u64..100_000,
        ) {
            let later = Duration::from_millis(later_ms);
            let mut limit = limit(bucket, per_minute, Duration::from_millis(span_ms));
            let mut now = Duration::ZERO;
            for (gap_ms, spend) in spends {
                now += Duration::from_millis(gap_ms);
                limit.advance(now);
                limit.charge(spend);
            }
            let wait = limit.wait(amount);
            if wait > 0 {
                limit.advance(now + Duration::from_nanos(wait as u64 - 1));
                prop_assert!(limit.wait(amount) > 0);
                limit.advance(now + Duration::from_nanos(wait as u64));
                prop_assert_eq!(limit.wait(amount), 0);
            }
            // It also passes later.
            limit.advance(now + Duration::from_nanos(wait as u64) + later);
            prop_assert_eq!(limit.wait(amount), 0);
        }
    }
}
