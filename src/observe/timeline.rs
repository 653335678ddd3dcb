//! [`Timeline`]: a drawing of the calls and stages over time.

use std::fmt;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use tokio::time::Instant;

use crate::event::{Event, Observer};
use crate::sync::Mutex;

/// The most lines that are kept; later ones are only counted.
const MOST: usize = 10_000;
/// The width of the bars, in characters.
const WIDTH: usize = 60;
/// The width of a path, in characters. A longer one loses its beginning.
const LABEL: usize = 36;

/// An observer that draws a bar over time for each call and each [stage](crate::Context::stage). `Display` writes the
/// drawing. Clones share their state.
///
/// ```text
/// plan                █████████████                                0.0 to 4.0 s
/// routine[0]/etude[0]     ████████████████                         1.0 to 6.0 s
/// routine[0]/etude[1]     ██████████x                              1.0 to 4.2 s
/// ```
///
/// The bar of a failure ends with `x`. Time begins with the first call or stage. At most 10,000 lines are kept.
///
/// ```
/// use throughline::{Context, testing::Scripted, observe::Timeline};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
/// let timeline = Timeline::new();
/// # let provider = Scripted::new().reply("a");
/// let cx = Context::builder(provider).observer(timeline.clone()).build();
/// cx.child("plan").generate("What first?").await?;
/// assert!(timeline.to_string().starts_with("plan "));
/// # Ok(()) }
/// ```
#[derive(Clone, Default)]
pub struct Timeline(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    lines: Vec<Line>,
    left_out: u64,
}

struct Line {
    path: Arc<str>,
    started: Instant,
    ended: Option<Instant>,
    failed: bool,
}

impl Timeline {
    /// Makes an empty timeline.
    pub fn new() -> Self {
        Self::default()
    }

    /// Removes all lines.
    pub fn clear(&self) {
        *self.lock() = State::default();
    }

    /// Returns the time from the first start to the last end, or to now while a call runs.
    pub fn elapsed(&self) -> Duration {
        let state = self.lock();
        let first = state.lines.iter().map(|line| line.started).min();
        let ends = state.lines.iter().map(|line| line.ended);
        let last = ends.map(|end| end.unwrap_or_else(Instant::now)).max();
        let both = last.zip(first);
        both.map_or(Duration::ZERO, |(last, first)| last - first)
    }

    fn add(&self, line: Line) {
        let mut state = self.lock();
        if state.lines.len() < MOST {
            state.lines.push(line);
        } else {
            state.left_out += 1;
        }
    }

    fn end_call(&self, path: &str, failed: bool) {
        let mut state = self.lock();
        let mut open = state.lines.iter_mut().rev();
        if let Some(line) = open.find(|line| line.ended.is_none() && *line.path == *path) {
            line.ended = Some(Instant::now());
            line.failed = failed;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock()
    }
}

impl Observer for Timeline {
    fn on_event(&self, event: &Event) {
        match event {
            Event::CallStarted { path, .. } => self.add(Line {
                path: Arc::clone(path),
                started: Instant::now(),
                ended: None,
                failed: false,
            }),
            Event::CallSucceeded { path, .. } => self.end_call(path, false),
            Event::CallRetried { path, .. }
            | Event::CallThrottled { path, .. }
            | Event::CallFailed { path, .. } => self.end_call(path, true),
            Event::StageEnded {
                path,
                elapsed,
                error,
                ..
            } => {
                let ended = Instant::now();
                self.add(Line {
                    path: Arc::clone(path),
                    started: ended.checked_sub(*elapsed).unwrap_or(ended),
                    ended: Some(ended),
                    failed: error.is_some(),
                });
            }
            _ => {}
        }
    }
}

/// The end of a path, which distinguishes it best from others.
fn label(path: &str) -> String {
    let count = path.chars().count();
    match count.checked_sub(LABEL) {
        None | Some(0) => path.to_owned(),
        Some(over) => format!("…{}", path.chars().skip(over + 1).collect::<String>()),
    }
}

impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        let now = Instant::now();
        let mut lines: Vec<_> = state.lines.iter().collect();
        // Of two that start together, the longer one encloses the other.
        lines.sort_by_key(|line| (line.started, std::cmp::Reverse(line.ended)));
        let Some(first) = lines.first().map(|line| line.started) else {
            return writeln!(f, "nothing has run");
        };
        let ends = lines.iter().map(|line| line.ended.unwrap_or(now));
        let whole = ends.max().unwrap_or(first) - first;
        let column = |at: Duration| {
            let part = at.as_secs_f64() / whole.as_secs_f64().max(f64::MIN_POSITIVE);
            ((part * WIDTH as f64).round() as usize).min(WIDTH)
        };
        let width = lines.iter().map(|line| label(&line.path).chars().count());
        let width = width.max().unwrap_or_default();
        for line in lines {
            let (from, to) = (line.started - first, line.ended.unwrap_or(now) - first);
            let start = column(from).min(WIDTH - 1);
            let mut bar = " ".repeat(start) + &"█".repeat((column(to) - start).max(1));
            if line.failed {
                bar.pop();
                bar.push('x');
            }
            let (from, to) = (from.as_secs_f64(), to.as_secs_f64());
            writeln!(
                f,
                "{:width$}  {bar:WIDTH$}  {from:.2} to {to:.2} s",
                label(&line.path)
            )?;
        }
        match state.left_out {
            0 => Ok(()),
            more => writeln!(f, "and {more} more"),
        }
    }
}

impl fmt::Debug for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.debug_struct("Timeline")
            .field("lines", &state.lines.len())
            .field("left_out", &state.left_out)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;
    use crate::error::Error;

    fn started(path: &str) -> Event {
        Event::CallStarted {
            path: path.into(),
            attempt: 1,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn each_call_and_stage_is_a_bar_over_time() {
        let timeline = Timeline::new();
        assert_eq!(timeline.to_string(), "nothing has run\n");
        assert_eq!(timeline.elapsed(), Duration::ZERO);
        timeline.on_event(&started("plan"));
        sleep(Duration::from_secs(1)).await;
        timeline.on_event(&started("plan/step[3]"));
        sleep(Duration::from_secs(2)).await;
        timeline.on_event(&Event::CallFailed {
            path: "plan/step[3]".into(),
            error: Error::other("no"),
        });
        sleep(Duration::from_secs(3)).await;
        timeline.on_event(&Event::CallSucceeded {
            path: "plan".into(),
            attempt: 1,
            elapsed: Duration::from_secs(6),
            usage: Default::default(),
        });
        timeline.on_event(&Event::StageEnded {
            path: "a path that is longer than there is room for".into(),
            elapsed: Duration::from_secs(1),
            error: None,
        });
        assert_eq!(timeline.elapsed(), Duration::from_secs(6));
        let drawing = timeline.to_string();
        let lines: Vec<_> = drawing.lines().collect();
        assert_eq!(lines.len(), 3, "{drawing}");
        let bars = |line: &str| line.matches('█').count();
        assert!(lines[0].starts_with("plan  ") && bars(lines[0]) == 60);
        assert!(lines[1].starts_with("plan/step[3] ") && lines[1].contains("█x"));
        assert_eq!(bars(lines[1]), 19, "{drawing}");
        assert!(lines[2].starts_with("…at is longer") && bars(lines[2]) == 10);
        assert!(lines[2].ends_with("5.00 to 6.00 s"), "{drawing}");
        timeline.clear();
        assert_eq!(timeline.to_string(), "nothing has run\n");
    }
}
