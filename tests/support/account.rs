//! An account behind [`Server::answering`](super::server::Server::answering): a token bucket
//! on the real clock that refuses with 429, calls that take their time, and faults.
#![allow(dead_code, missing_docs, unreachable_pub)] // Each test uses a part.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fastrand::Rng;

use crate::server::{Act, Recorded, Script};

/// The limits and faults of the account.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    pub per_minute: u64,
    pub burst: Duration,
    pub latency: Duration,
    /// A later time, counted from the first call, and the rate from then on.
    pub drop: Option<(Duration, u64)>,
    /// Shares of the admitted calls that end with a 500, with a reset, never, and with
    /// half a reply.
    pub faults: [f64; 4],
}

/// The calls that the account has seen.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    pub admitted: u64,
    pub rejected: u64,
    /// Calls that were never answered, by prompt.
    pub hung: HashMap<String, u32>,
    /// Whole replies that were sent and billed, by prompt.
    pub answered: HashMap<String, u32>,
}

pub struct Account {
    terms: Terms,
    state: Mutex<State>,
}

struct State {
    seen: Seen,
    level: f64,
    /// The time of the first call, and the time of `level`.
    times: Option<(Instant, Instant)>,
    luck: Rng,
}

impl Account {
    pub fn new(terms: Terms) -> Arc<Self> {
        let state = State {
            seen: Seen::default(),
            level: capacity(terms.per_minute, terms.burst),
            times: None,
            luck: Rng::with_seed(7),
        };
        Arc::new(Self {
            terms,
            state: Mutex::new(state),
        })
    }

    pub fn seen(&self) -> Seen {
        self.state.lock().unwrap().seen.clone()
    }

    /// Admits the request or refuses it.
    pub fn answer(&self, request: &Recorded) -> Script {
        let prompt = request.json()["messages"][0]["content"].to_string();
        let mut state = self.state.lock().unwrap();
        let per_minute = state.refill(&self.terms);
        let limit = per_minute.to_string();
        if state.level < 1.0 {
            state.seen.rejected += 1;
            let wait = (1.0 - state.level) * 60_000.0 / per_minute as f64;
            let wait = wait.ceil().to_string();
            let headers = [
                ("content-type", "application/json"),
                ("retry-after-ms", &*wait),
                ("x-ratelimit-limit-requests", &*limit),
                ("x-ratelimit-remaining-requests", "0"),
            ];
            let body = r#"{"error":{"message":"slow down","code":"rate_limit_exceeded"}}"#;
            return Script::reply(429, &headers, body);
        }
        state.level -= 1.0;
        state.seen.admitted += 1;
        let remaining = state.level.floor().to_string();
        let used = capacity(per_minute, self.terms.burst) - state.level;
        let reset = (used * 60_000.0 / per_minute as f64).ceil();
        let reset = format!("{reset}ms");
        let headers = [
            ("content-type", "application/json"),
            ("x-ratelimit-limit-requests", &*limit),
            ("x-ratelimit-remaining-requests", &*remaining),
            ("x-ratelimit-reset-requests", &*reset),
        ];
        let begun = Script::new().then(Act::Wait(self.terms.latency));
        match state.fault(&self.terms) {
            Some(0) => begun.send(crate::server::reply(500, &headers, b"{}")),
            Some(1) => begun.then(Act::Reset),
            Some(2) => {
                *state.seen.hung.entry(prompt).or_default() += 1;
                Script::new().then(Act::Hang)
            }
            Some(_) => begun.send(crate::server::reply(200, &headers, &ANSWER[..60])),
            None => {
                *state.seen.answered.entry(prompt).or_default() += 1;
                begun.send(crate::server::reply(200, &headers, ANSWER))
            }
        }
    }
}

impl State {
    /// Refills the bucket up to now and returns the current rate.
    fn refill(&mut self, terms: &Terms) -> u64 {
        let now = Instant::now();
        let (first, at) = *self.times.get_or_insert((now, now));
        let drops_at = terms.drop.map(|(after, _)| first + after);
        let flow = |level: f64, rate: u64, time: Duration| {
            let flowed = rate as f64 / 60.0 * time.as_secs_f64();
            (level + flowed).min(capacity(rate, terms.burst))
        };
        let before = drops_at.map_or(now, |drop| drop.clamp(at, now));
        self.level = flow(self.level, terms.per_minute, before - at);
        let mut rate = terms.per_minute;
        if let (Some((_, dropped)), true) = (terms.drop, drops_at.is_some_and(|drop| drop <= now)) {
            rate = dropped;
            self.level = flow(self.level, rate, now - before);
        }
        self.times = Some((first, now));
        rate
    }

    fn fault(&mut self, terms: &Terms) -> Option<usize> {
        let mut point = self.luck.f64();
        terms.faults.iter().position(|rate| {
            let strikes = point < *rate;
            point -= rate;
            strikes
        })
    }
}

fn capacity(per_minute: u64, burst: Duration) -> f64 {
    (per_minute as f64 / 60.0 * burst.as_secs_f64()).max(1.0)
}

const ANSWER: &[u8] = br#"{"id":"c","object":"chat.completion","model":"some-model","choices":
    [{"index":0,"message":{"role":"assistant","content":"To the sea."},"finish_reason":"stop"}],
    "usage":{"prompt_tokens":12,"completion_tokens":4,"total_tokens":16}}"#;
