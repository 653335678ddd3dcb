//! Runs the calls and measures them.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use throughline::provider::sim::{Enforcement, Second};
use throughline::{Context, Pace, Sim, observe::Event, ratelimit::Lane};
use tokio::time::Instant;

use crate::bound::{Calls, Curve, Limit, lower_bound};

pub const CALLS: usize = 2_400;
/// Calls per minute: the configured limit, the true limit, and the true limit after it falls.
pub const CONFIGURED: u64 = 1_200;
pub const TRUE: u64 = 600;
pub const FALLEN: u64 = 150;
pub const FALLS_AT: Duration = Duration::from_secs(120);

const BURST: Duration = Duration::from_secs(1);

pub struct Run {
    /// The number of granted calls for each second.
    granted: Vec<u32>,
    /// The provider's own counts for each second.
    seconds: Vec<Second>,
    pub makespan: Duration,
    pub bound: Duration,
    pub answered: usize,
    pub accepted: u64,
    pub rejected: u64,
}

/// A column of the chart. Rates are in calls per second.
pub struct Bin {
    pub from: f64,
    pub to: f64,
    pub granted: f64,
    pub accepted: f64,
    pub rejected: f64,
}

/// Measurements from events.
#[derive(Default)]
struct Seen {
    granted: Vec<u32>,
    calls: Calls,
}

impl Seen {
    fn observe(&mut self, at: Duration, event: &Event) {
        match event {
            Event::CallStarted { .. } => {
                let second = at.as_secs() as usize;
                if second >= self.granted.len() {
                    self.granted.resize(second + 1, 0);
                }
                self.granted[second] += 1;
            }
            Event::CallSucceeded { elapsed, .. } => {
                let calls = &mut self.calls;
                calls.longest_path = calls.longest_path.max(*elapsed);
                if calls.total.is_zero() || *elapsed < calls.shortest {
                    calls.shortest = *elapsed;
                }
                calls.total += *elapsed;
            }
            _ => {}
        }
    }
}

impl Run {
    /// Runs the calls on the clock of the current runtime.
    pub async fn new(seed: u64) -> Self {
        let sim = Sim::builder()
            .requests_per_minute(TRUE)
            .enforcement(Enforcement::TokenBucket { burst: BURST })
            .change_at(FALLS_AT, |limits| limits.requests_per_minute = Some(FALLEN))
            .latency(Duration::from_secs(2))
            .jitter(0.5)
            .seed(seed)
            .build();
        let began = Instant::now();
        let seen = Arc::new(Mutex::new(Seen::default()));
        let observed = Arc::clone(&seen);
        let cx = Context::builder(sim.clone())
            .lane(Lane::seeded(Pace::per_minute(CONFIGURED), seed))
            .on_event(move |event| observed.lock().unwrap().observe(began.elapsed(), event))
            .build();

        let settled = cx
            .fan_out("call", 0..CALLS)
            .buffer_unordered(64)
            .settle(async |cx, n| cx.generate(format!("Describe river {n}.")).await)
            .await;

        let makespan = began.elapsed();
        let Seen { granted, calls } = std::mem::take(&mut *seen.lock().unwrap());
        let truth = Curve::bucket(TRUE, BURST).then(FALLS_AT, FALLEN);
        let configured = Curve::bucket(CONFIGURED, BURST);
        let limit = Limit::new(vec![truth, configured], std::iter::repeat_n(1, CALLS));
        let ledger = sim.ledger();
        Self {
            granted,
            seconds: ledger.seconds,
            makespan,
            bound: lower_bound(&[limit], calls),
            answered: settled.oks().count(),
            accepted: ledger.total.admitted,
            rejected: ledger.total.rejected,
        }
    }

    pub fn ratio(&self) -> f64 {
        self.makespan.as_secs_f64() / self.bound.as_secs_f64()
    }

    pub fn rejected_share(&self) -> f64 {
        self.rejected as f64 / (self.accepted + self.rejected).max(1) as f64
    }

    /// Returns at most `columns` columns, each of a whole number of seconds.
    pub fn bins(&self, columns: usize) -> Vec<Bin> {
        let seconds = self.makespan.as_secs_f64().ceil() as usize;
        let width = seconds.div_ceil(columns).max(1);
        let bin = |from: usize| {
            let to = (from + width).min(seconds);
            let span = (to - from) as f64;
            let rate = |count: &dyn Fn(&Second) -> u32| {
                let seconds = self.seconds.iter().take(to).skip(from);
                f64::from(seconds.map(count).sum::<u32>()) / span
            };
            let granted = self.granted.iter().take(to).skip(from);
            Bin {
                from: from as f64,
                to: to as f64,
                granted: f64::from(granted.sum::<u32>()) / span,
                accepted: rate(&|second| second.accepted),
                rejected: rate(&|second| second.rejected),
            }
        };
        (0..seconds).step_by(width).map(bin).collect()
    }
}

/// Returns the true limit at a time, in calls per second.
pub fn limit_at(second: f64) -> f64 {
    let fallen = second >= FALLS_AT.as_secs_f64();
    per_second(if fallen { FALLEN } else { TRUE })
}

pub fn per_second(per_minute: u64) -> f64 {
    per_minute as f64 / 60.0
}
