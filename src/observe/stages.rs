//! [`Stages`]: the duration of each kind of work, in percentiles.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use hdrhistogram::Histogram;

use crate::error::Error;
use crate::event::{Event, Observer};
use crate::sync::Mutex;

/// The most kinds of work that are kept; durations of others are only counted.
const MOST: usize = 1_024;

/// An observer that measures the durations of calls, items and [stages](crate::Context::stage) by
/// their labels and reports percentiles. Clones share their state.
///
/// Keys and indices are left out of a path, so `plan[3]/routine[0]` counts as `plan/routine`. Durations are kept to
/// three digits, in memory that does not grow with their number.
///
/// ```
/// use throughline::{Context, testing::Scripted, observe::Stages};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
/// let stages = Stages::new();
/// # let provider = Scripted::new().reply("a").reply("b");
/// let cx = Context::builder(provider).observer(stages.clone()).build();
/// for name in ["Rhine", "Po"] {
///     cx.stage("describe", async |cx| cx.generate(name).await).await?;
/// }
/// let describe = &stages.report()[1];
/// assert_eq!((describe.label.as_str(), describe.count), ("describe", 2));
/// println!("{stages}");
/// # Ok(()) }
/// ```
#[derive(Clone, Default)]
pub struct Stages(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    kinds: BTreeMap<(String, StageKind), Durations>,
    left_out: u64,
}

/// A kind of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum StageKind {
    /// A call to the provider, without the wait for the lane and between attempts.
    Call,
    /// A [stage](crate::Context::stage), with all work inside it.
    Stage,
    /// An item of a batch, with all work inside it.
    Item,
}

impl fmt::Display for StageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Call => "call",
            Self::Stage => "stage",
            Self::Item => "item",
        })
    }
}

struct Durations {
    /// In microseconds.
    taken: Histogram<u64>,
    failed: u64,
}

/// The durations of one kind of work ([`Stages::report`]).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stage {
    /// The labels of the path.
    pub label: String,
    /// The kind.
    pub kind: StageKind,
    /// The number of durations, including those of failures.
    pub count: u64,
    /// The number of failures. Events of failed calls have no duration, so failed calls count only in the stages and
    /// items around them.
    pub failed: u64,
    /// The median.
    pub p50: Duration,
    /// The 95th percentile.
    pub p95: Duration,
    /// The 99th percentile.
    pub p99: Duration,
    /// The longest.
    pub max: Duration,
}

impl Stages {
    /// Makes an observer without durations.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the durations so far, in the order of the labels.
    pub fn report(&self) -> Vec<Stage> {
        let state = self.lock();
        let stage = |((label, kind), durations): (&(String, StageKind), &Durations)| {
            let taken = &durations.taken;
            let quantile = |part| Duration::from_micros(taken.value_at_quantile(part));
            Stage {
                label: label.clone(),
                kind: *kind,
                count: taken.len(),
                failed: durations.failed,
                p50: quantile(0.5),
                p95: quantile(0.95),
                p99: quantile(0.99),
                max: Duration::from_micros(taken.max()),
            }
        };
        state.kinds.iter().map(stage).collect()
    }

    /// Returns the number of durations that were left out because there were more than 1,024 kinds.
    pub fn left_out(&self) -> u64 {
        self.lock().left_out
    }

    fn add(&self, path: &str, kind: StageKind, elapsed: Duration, error: Option<&Error>) {
        // The duration of cancelled work has no meaning.
        if error.is_some_and(Error::is_cancelled) {
            return;
        }
        let key = (labels(path), kind);
        let mut state = self.lock();
        if state.kinds.len() >= MOST && !state.kinds.contains_key(&key) {
            state.left_out += 1;
            return;
        }
        let durations = state.kinds.entry(key).or_insert_with(|| Durations {
            taken: Histogram::new(3).expect("three digits are allowed"),
            failed: 0,
        });
        let micros = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        // The histogram grows; a duration that it cannot hold counts as the longest that it can.
        if durations.taken.record(micros).is_err() {
            durations.taken.saturating_record(micros);
        }
        durations.failed += u64::from(error.is_some());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock()
    }
}

/// Removes keys and indices from a path. A key may contain brackets.
fn labels(path: &str) -> String {
    let mut depth = 0_usize;
    let outside = |c: &char| {
        match c {
            '[' => depth += 1,
            ']' => depth = depth.saturating_sub(1),
            _ => return depth == 0,
        }
        false
    };
    path.chars().filter(outside).collect()
}

impl Observer for Stages {
    fn on_event(&self, event: &Event) {
        match event {
            Event::CallSucceeded { path, elapsed, .. } => {
                self.add(path, StageKind::Call, *elapsed, None);
            }
            Event::StageEnded {
                path,
                elapsed,
                error,
                ..
            } => self.add(path, StageKind::Stage, *elapsed, error.as_ref()),
            Event::ItemSettled {
                path,
                elapsed,
                error,
                ..
            } => self.add(path, StageKind::Item, *elapsed, error.as_ref()),
            _ => {}
        }
    }
}

impl fmt::Display for Stages {
    /// Writes a table with a line for each kind.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let report = self.report();
        let width = report.iter().map(|stage| stage.label.chars().count());
        let width = width.max().unwrap_or_default().max("label".len());
        writeln!(
            f,
            "{:width$}  kind   count  failed       p50       p95       p99",
            "label"
        )?;
        for stage in report {
            let [p50, p95, p99] = [stage.p50, stage.p95, stage.p99].map(|it| format!("{it:.1?}"));
            writeln!(
                f,
                "{:width$}  {:5}  {:5}  {:6}  {p50:>8}  {p95:>8}  {p99:>8}",
                stage.label, stage.kind, stage.count, stage.failed
            )?;
        }
        Ok(())
    }
}

impl fmt::Debug for Stages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Stages").field(&self.report()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(path: &str, millis: u64, error: Option<Error>) -> Event {
        Event::StageEnded {
            path: path.into(),
            elapsed: Duration::from_millis(millis),
            error,
        }
    }

    #[test]
    fn durations_are_reported_as_percentiles_by_label() {
        let stages = Stages::new();
        for n in 1..=100 {
            stages.on_event(&ended(&format!("plan[{n}]/step[a[b]c]"), n * 10, None));
        }
        stages.on_event(&ended("other", 5, Some(Error::other("no"))));
        let report = stages.report();
        assert_eq!(report.len(), 2);
        assert_eq!((report[0].label.as_str(), report[0].failed), ("other", 1));
        let plan = &report[1];
        assert_eq!((plan.label.as_str(), plan.count), ("plan/step", 100));
        let millis = |it: Duration| it.as_millis();
        let all = [plan.p50, plan.p95, plan.p99, plan.max].map(millis);
        // Three digits: 950 ms is told apart from 951.
        assert_eq!(all, [500, 950, 990, 1_000]);
        assert_eq!(stages.to_string().lines().count(), 3);
    }

    #[test]
    fn durations_of_too_many_kinds_are_counted_only() {
        let stages = Stages::new();
        for n in 0..MOST + 5 {
            stages.on_event(&ended(&format!("label-{n}"), 1, None));
        }
        assert_eq!(stages.report().len(), MOST);
        assert_eq!(stages.left_out(), 5);
    }
}
