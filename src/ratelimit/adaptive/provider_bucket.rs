//! [`ProviderBucket`]: whether a provider keeps a limit as a bucket that refills evenly, and how much it holds, by its headers.
//!
//! A bucket that refills evenly gives its capacity away: `remaining + reset · rate` is the same at every level, because
//! `reset` is the time until it is full. In a fixed window the same sum changes, because `reset` falls for all callers
//! alike. So two readings at different levels tell the two apart.

use super::Reading;
use crate::ratelimit::bucket::Nanos;

/// A bucket and its readings may differ by this part.
const TOLERANCE: f64 = 0.25;
const SECOND: Nanos = 1_000_000_000;
/// Resets are given in milliseconds, and rounded in either direction; or else in whole seconds.
const RESET_UNIT: f64 = 0.002;
/// Some levels are rounded to thousands.
const ROUND: u64 = 1_000;
/// Readings of different windows of less than these seconds are not compared.
const SHORT: f64 = 5.0;
/// A contradiction counts as much as this many readings that agree.
const CONTRADICTION: i32 = 4;
const MOST_EVIDENCE: i32 = 8;

/// A level and the time until the limit is unused again.
#[derive(Debug, Clone, Copy)]
struct Sample {
    now: Nanos,
    left: u64,
    reset: Nanos,
}

impl Sample {
    fn reset_secs(self) -> f64 {
        self.reset as f64 / 1e9
    }
}

/// How the provider keeps the limit, by the readings so far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Shape {
    Unclear,
    Window,
    Bucket {
        /// The units that it holds, at least.
        capacity: f64,
    },
}

/// The state of the limit at the provider, by the last reading.
#[derive(Debug, Clone, Copy)]
pub(super) struct Estimate {
    pub(super) shape: Shape,
    /// The rate of the provider, in units per second.
    pub(super) rate: f64,
    /// The units that are left, at least.
    pub(super) left: f64,
}

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ProviderBucket {
    /// The reading that the next ones are compared with.
    sample: Option<Sample>,
    /// Whether a reset was not of whole seconds, and a level not of thousands.
    exact_resets: bool,
    exact_levels: bool,
    /// Above zero the readings are those of a bucket, below zero those of a window.
    evidence: i32,
    /// The rate of the provider in units per second, if the readings show it and the headers do not say it.
    fitted: Option<f64>,
    /// The units that the bucket holds.
    capacity: f64,
}

impl ProviderBucket {
    /// Adds a reading. `None` if it says nothing.
    pub(super) fn read(&mut self, reading: &Reading) -> Option<Estimate> {
        let sample = Sample {
            now: reading.now,
            left: reading.left,
            // A debt does not show in the level, only in the reset.
            reset: reading.reset.filter(|_| reading.left > 0)?,
        };
        self.exact_resets |= !sample.reset.is_multiple_of(SECOND);
        self.exact_levels |= !sample.left.is_multiple_of(ROUND);
        let named = reading.limit.map(|limit| limit.per_second());
        self.compare(sample, named);
        let rate = named.or(self.fitted)?;
        let (left, capacity) = self.least(sample, rate);
        let shape = match self.evidence {
            0 => Shape::Unclear,
            ..0 => Shape::Window,
            1.. => {
                // Each reading is rounded down, so the largest is the nearest. If it falls far, the bucket has changed.
                let changed = capacity < self.capacity * (1.0 - TOLERANCE);
                self.capacity = if changed {
                    capacity
                } else {
                    self.capacity.max(capacity)
                };
                Shape::Bucket {
                    capacity: self.capacity,
                }
            }
        };
        Some(Estimate { shape, rate, left })
    }

    /// Compares a reading with an earlier one: whether it looks like a bucket or like a window.
    fn compare(&mut self, sample: Sample, rate: Option<f64>) {
        let before = *self.sample.get_or_insert(sample);
        // Otherwise a window may have ended in between.
        let same_window = sample.now < before.now.saturating_add(before.reset);
        let units = before.left as f64 - sample.left as f64;
        let longer = sample.reset_secs() - before.reset_secs();
        let Some(rate) = rate.or(self.fitted) else {
            if longer.abs() > 2.0 * self.reset_unit() && units / longer > 0.0 {
                self.fitted = Some(units / longer);
                self.sample = Some(sample);
            }
            return;
        };
        let expected = units / rate;
        let unit = self.reset_unit() + self.level_unit() / rate;
        let agrees = (longer - expected).abs() <= TOLERANCE * expected.abs() + unit;
        // The difference of one unit may be that of a fraction, and a short window looks like anything.
        let holds = sample.left as f64 / rate + sample.reset_secs();
        let clear = units.abs() >= 2.0 * self.level_unit()
            && expected.abs() >= 2.0 * self.reset_unit()
            && holds >= SHORT;
        let vote = match agrees {
            true if longer * expected > 0.0 && (same_window || clear) => 1,
            false if same_window && expected.abs() > 2.0 * unit => -CONTRADICTION,
            _ if same_window => return,
            _ => 0,
        };
        self.sample = Some(sample);
        self.evidence = (self.evidence + vote).clamp(-MOST_EVIDENCE, MOST_EVIDENCE);
    }

    /// The units that are left and that the bucket holds, at least.
    fn least(&self, sample: Sample, rate: f64) -> (f64, f64) {
        if sample.reset == 0 {
            return (sample.left as f64, sample.left as f64);
        }
        // A level of whole units is rounded down, and so the capacity, of whole units too, is the next one.
        let left = sample.left as f64 - (self.level_unit() - 1.0);
        let reset = sample.reset_secs() - self.reset_unit();
        (left, (left + rate * reset.max(0.0)).ceil())
    }

    /// The seconds that the resets are rounded to.
    fn reset_unit(&self) -> f64 {
        if self.exact_resets { RESET_UNIT } else { 1.0 }
    }

    /// The units that the levels are rounded to.
    fn level_unit(&self) -> f64 {
        if self.exact_levels { 1.0 } else { ROUND as f64 }
    }
}
