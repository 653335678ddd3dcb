//! [`Bar`]: a terminal progress bar over a context's [`Snapshot`].

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::Instant;

use crate::context::Snapshot;
use crate::ratelimit::Binding;

/// The time over which the rate is measured.
const RATE_WINDOW: Duration = Duration::from_secs(10);

/// The time at the start that does not count for the rate, because the lane spends its burst then.
const START: Duration = Duration::from_secs(1);

/// A progress bar with the rate of calls and the limiting factor.
///
/// It draws to standard error if that is a terminal. Update it several times a second; it redraws at most twenty
/// times a second.
///
/// ```text
/// [=====>              ]  512/1707  3 failed  48 in flight  5,980/6,000 rpm  bound by requests  ETA 12s
/// ```
///
/// ```no_run
/// # use std::time::Duration;
/// # use throughline::{Context, observe::Bar};
/// # async fn example(cx: Context) {
/// let mut bar = Bar::new(1_707);
/// let mut tick = tokio::time::interval(Duration::from_millis(100));
/// while cx.snapshot().items_done < 1_707 {
///     tick.tick().await;
///     bar.update(&cx.snapshot());
/// }
/// bar.finish();
/// # }
/// ```
#[derive(Debug)]
#[must_use = "a bar shows the snapshots it is given"]
pub struct Bar {
    bar: ProgressBar,
    total: u64,
    began: Instant,
    /// A time, with the calls granted and the items ended until then.
    history: VecDeque<(Instant, u64, u64)>,
}

impl Bar {
    /// Makes a bar for `total` items.
    pub fn new(total: u64) -> Self {
        Self::drawn_to(total, ProgressDrawTarget::stderr())
    }

    fn drawn_to(total: u64, target: ProgressDrawTarget) -> Self {
        let style = ProgressStyle::with_template("[{bar:20}] {pos:>6}/{len}  {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> ");
        Self {
            bar: ProgressBar::with_draw_target(Some(total), target).with_style(style),
            total,
            began: Instant::now(),
            history: VecDeque::new(),
        }
    }

    /// Shows the state of the work.
    pub fn update(&mut self, snapshot: &Snapshot) {
        let message = self.message(snapshot);
        self.bar.set_position(snapshot.items_ended());
        self.bar.set_message(message);
    }

    fn message(&mut self, snapshot: &Snapshot) -> String {
        let now = Instant::now();
        let ended = snapshot.items_ended();
        if now - self.began >= START {
            self.history.push_back((now, snapshot.lane.granted, ended));
        }
        while self.history.len() > 2 && now - self.history[1].0 >= RATE_WINDOW {
            self.history.pop_front();
        }
        let first = self.history.front().copied();
        let (since, granted, ended_then) = first.unwrap_or((now, 0, 0));
        let minutes = (now - since).as_secs_f64() / 60.0;
        let per_minute = |count: u64| (minutes > 0.0).then(|| count as f64 / minutes);

        let mut message = String::new();
        if snapshot.items_failed > 0 {
            let _ = write!(message, "{} failed  ", snapshot.items_failed);
        }
        if snapshot.items_cancelled > 0 {
            let _ = write!(message, "{} cancelled  ", snapshot.items_cancelled);
        }
        let _ = write!(message, "{} in flight", snapshot.lane.in_flight);
        if let Some(rate) = per_minute(snapshot.lane.granted.saturating_sub(granted)) {
            let _ = write!(message, "  {}", grouped(rate.round() as u64));
            if let Some(limit) = snapshot.lane.requests_per_minute {
                let _ = write!(message, "/{}", grouped(limit));
            }
            message.push_str(" rpm");
        }
        match snapshot.lane.binding {
            Binding::Nothing => message.push_str("  no call waits"),
            binding => {
                let _ = write!(message, "  bound by {binding}");
            }
        }
        if snapshot.lane.unpolled > 0 {
            let _ = write!(message, "  {} not polled", snapshot.lane.unpolled);
        }
        if let Some(cooldown) = snapshot.lane.cooldown {
            let _ = write!(message, " for {cooldown:.1?}");
        }
        if let Some(speed) = per_minute(ended.saturating_sub(ended_then)).filter(|s| *s > 0.0) {
            let left = self.total.saturating_sub(ended) as f64 / speed * 60.0;
            let _ = write!(message, "  ETA {}s", left.ceil() as u64);
        }
        message
    }

    /// Prints a line above the bar.
    pub fn println(&self, line: impl AsRef<str>) {
        // `suspend`, because `println` of indicatif prints nothing without a terminal.
        self.bar.suspend(|| eprintln!("{}", line.as_ref()));
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// Writes `1234567` as `1,234,567`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::Context;
    use crate::provider::sim::Sim;
    use crate::ratelimit::Pace;

    #[test]
    fn thousands_are_grouped() {
        let grouped = [0, 999, 1_000, 1_234_567].map(super::grouped);
        assert_eq!(grouped, ["0", "999", "1,000", "1,234,567"]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_message_names_open_items_as_the_limiting_factor() {
        let latency = Duration::from_millis(100);
        let cx = Context::builder(Sim::builder().latency(latency).build()).build();
        let mut bar = Bar::drawn_to(300, ProgressDrawTarget::hidden());
        let work = cx
            .fan_out("n", 0..300)
            .settle(async |cx, n| cx.generate(format!("{n}")).await);
        let mut work = std::pin::pin!(work);
        let begun = tokio::time::timeout(latency / 2, work.as_mut());
        assert!(begun.await.is_err());
        assert_eq!(
            bar.message(&cx.snapshot()),
            "64 in flight  bound by open items"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn the_message_has_the_rate_and_the_limiting_factor() {
        let latency = Duration::from_millis(100);
        let cx = Context::builder(Sim::builder().latency(latency).build())
            .pace(Pace::per_minute(600))
            .build();
        let mut bar = Bar::drawn_to(300, ProgressDrawTarget::hidden());
        let work = cx
            .fan_out("n", 0..300)
            .settle(async |cx, n| cx.generate(format!("{n}")).await);
        let mut work = std::pin::pin!(work);
        for _ in 0..60 {
            let second = tokio::time::timeout(Duration::from_millis(100), work.as_mut());
            assert!(second.await.is_err());
            bar.update(&cx.snapshot());
        }
        let message = bar.message(&cx.snapshot());
        assert_eq!(
            message,
            "1 in flight  600/600 rpm  bound by requests  ETA 24s"
        );
    }
}
