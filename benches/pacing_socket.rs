//! The pacing on the real clock, over a real socket.
//!
//! ```sh
//! cargo bench --bench pacing_socket --features openai
//! ```
//!
//! `Context` and `OpenAi` against a server that enforces a token bucket of requests and
//! takes 200 ms for an answer. Each row stands beside the time that no client can beat
//! (`tests/support/bound.rs`); a missed bar is marked, and the exit status is 1.
//!
//! The server's bucket holds two seconds of its rate and the lane's one: over a socket
//! calls arrive closer together than they were sent, and a bucket without any slack would
//! refuse for that.

#[path = "../tests/support/account.rs"]
mod account;
#[path = "../tests/support/bound.rs"]
mod bound;
#[path = "../tests/support/server.rs"]
mod server;

use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use throughline::{Context, OpenAi, Pace, Request, observe::Event};

use crate::account::{Account, Terms};
use crate::bound::{Calls, Curve, Limit, lower_bound};
use crate::server::{Server, runtime};

const SECOND: Duration = Duration::from_secs(1);
const TRUE: u64 = 6_000;
const PARALLEL: usize = 64;
/// After this long a call that hangs is given up.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);

struct Scenario {
    name: &'static str,
    told: u64,
    calls: usize,
    terms: Terms,
    most_ratio: f64,
    most_rejected: f64,
}

fn scenarios() -> [Scenario; 4] {
    let terms = Terms {
        per_minute: TRUE,
        burst: 2 * SECOND,
        latency: Duration::from_millis(200),
        drop: None,
        faults: [0.0; 4],
    };
    [
        Scenario {
            name: "told the truth",
            told: TRUE,
            calls: 1_000,
            terms,
            most_ratio: 1.02,
            most_rejected: 0.0,
        },
        Scenario {
            name: "told double",
            told: 2 * TRUE,
            calls: 3_000,
            terms,
            most_ratio: 1.10,
            most_rejected: 0.02,
        },
        Scenario {
            name: "falls to a quarter",
            told: TRUE,
            calls: 1_500,
            terms: Terms {
                drop: Some((10 * SECOND, TRUE / 4)),
                ..terms
            },
            most_ratio: 1.10,
            most_rejected: 0.02,
        },
        Scenario {
            name: "faults",
            told: TRUE,
            calls: 1_000,
            terms: Terms {
                faults: [0.05, 0.02, 0.01, 0.01],
                ..terms
            },
            most_ratio: 1.10,
            most_rejected: 0.0,
        },
    ]
}

struct Row {
    makespan: Duration,
    bound: Duration,
    /// The most that hung calls add to the makespan.
    hung: Duration,
    sent: u64,
    rejected: u64,
    lost: usize,
    paid_again: usize,
}

impl Row {
    fn ratio(&self) -> f64 {
        self.makespan.saturating_sub(self.hung).as_secs_f64() / self.bound.as_secs_f64()
    }

    fn rejected_share(&self) -> f64 {
        self.rejected as f64 / self.sent.max(1) as f64
    }

    fn holds(&self, scenario: &Scenario) -> bool {
        self.ratio() <= scenario.most_ratio
            && self.rejected_share() <= scenario.most_rejected
            && self.lost == 0
            && self.paid_again == 0
    }
}

async fn run(scenario: &Scenario) -> Row {
    let terms = scenario.terms;
    let account = Account::new(terms);
    let asked = Arc::clone(&account);
    let url = Server::apart(|| Server::answering(move |request| asked.answer(&request)));
    let provider = OpenAi::builder()
        .base_url(format!("{url}/v1"))
        .build()
        .expect("a provider");
    let calls = Arc::new(Mutex::new(Calls::default()));
    let told = Arc::clone(&calls);
    let cx = Context::builder(provider)
        .model("some-model")
        // Told, as the bound has it: the default burst must first be saved up.
        .pace(Pace::per_minute(scenario.told).burst(SECOND))
        .call_timeout(CALL_TIMEOUT)
        .on_event(move |event| {
            if let Event::CallSucceeded { elapsed, .. } = event {
                let mut calls = told.lock().expect("nobody panics");
                calls.total += *elapsed;
                calls.longest_path = calls.longest_path.max(*elapsed);
            }
        })
        .build();

    let began = Instant::now();
    let settled = cx
        .fan_out("call", 0..scenario.calls)
        .buffer_unordered(PARALLEL)
        .settle(|cx, n| async move { cx.generate(Request::new(format!("river {n}"))).await })
        .await;
    let makespan = began.elapsed();
    for failure in settled.failures().take(3) {
        eprintln!("{}: {:?}", scenario.name, failure.error());
    }

    let seen = account.seen();
    let mut truth = Curve::bucket(terms.per_minute, terms.burst);
    if let Some((at, rate)) = terms.drop {
        truth = truth.then(at, rate);
    }
    // Calls that a fault ended cost what others cost of the limit.
    let costs = std::iter::repeat_n(1, seen.admitted as usize);
    let limit = Limit::new(vec![truth, Curve::bucket(scenario.told, SECOND)], costs);
    let mut calls = *calls.lock().expect("nobody panics");
    calls.shortest = terms.latency;
    let hangs = seen.hung.values().max().copied().unwrap_or(0);
    Row {
        makespan,
        bound: lower_bound(&[limit], calls),
        hung: CALL_TIMEOUT * hangs,
        sent: seen.admitted + seen.rejected,
        rejected: seen.rejected,
        lost: settled.failures().count(),
        paid_again: seen.answered.values().filter(|n| **n > 1).count(),
    }
}

fn main() -> ExitCode {
    println!(
        "{:<20} {:>6} {:>10} {:>8} {:>7} {:>6} {:>5} {:>6} {:>9} {:>5} {:>5} {:>6}",
        "scenario",
        "calls",
        "makespan s",
        "bound s",
        "hung s",
        "ratio",
        "bar",
        "sent",
        "rejected",
        "bar",
        "lost",
        "twice"
    );
    let mut holds = true;
    for scenario in scenarios() {
        let row = runtime().block_on(run(&scenario));
        holds &= row.holds(&scenario);
        println!(
            "{:<20} {:>6} {:>10.2} {:>8.2} {:>7.0} {:>6.3} {:>5.2} {:>6} {:>7.2} % {:>3.0} % {:>5} {:>6}{}",
            scenario.name,
            scenario.calls,
            row.makespan.as_secs_f64(),
            row.bound.as_secs_f64(),
            row.hung.as_secs_f64(),
            row.ratio(),
            scenario.most_ratio,
            row.sent,
            100.0 * row.rejected_share(),
            100.0 * scenario.most_rejected,
            row.lost,
            row.paid_again,
            if row.holds(&scenario) { "" } else { "  *" },
        );
    }
    println!(
        "ratio: makespan without what the hung calls of one item took, to the bound; twice: \
         answered, and paid for again; * misses a bar"
    );
    if holds {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
