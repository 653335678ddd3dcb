//! The pacing on the real clock and over a real socket, beside a loop around governor and reqwest.
//!
//! ```sh
//! cargo bench --bench pacing_socket --features openai
//! ```
//!
//! Each client makes the same calls to a server that enforces a token bucket of requests and tells its level in the
//! headers, as OpenAI does. The loop has a burst of a second, or of a minute; it does not retry, so a refused call is lost.
//! `Context` is told the limit and no burst. Each time stands beside the time that no client can beat
//! (`tests/support/bound.rs`).
//!
//! The bar: `Context` loses no call, has at most 1 % refused, and takes at most 1.02 times as long as the
//! faster of those loops that lost nothing and had at most 1 % refused. Only the loop knows before the first reply that a
//! minute is stored: there the bar is four round trips. A missed bar is marked, and the exit status is 1.

#[path = "../tests/support/account.rs"]
mod account;
#[path = "../tests/support/bound.rs"]
mod bound;
#[path = "../tests/support/server.rs"]
mod server;

use std::future::ready;
use std::num::NonZeroU32;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{StreamExt as _, stream};
use governor::{Quota, RateLimiter};
use serde_json::json;
use throughline::{Context, OpenAi, Pace};

use crate::account::{Account, Terms};
use crate::bound::{Calls, Curve, Limit, lower_bound};
use crate::server::{Server, runtime};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const IN_FLIGHT: usize = 64;
const MOST_REFUSED: f64 = 0.01;
const MOST_SLOWER: f64 = 1.02;
/// Between two rounds: what 13 calls take of 60 a minute flows in again.
const PAUSE: Duration = Duration::from_secs(15);

const COLD: &str = "13 calls, stores a minute";

struct Workload {
    name: &'static str,
    configured: u64,
    calls: usize,
    /// How often they are made. Only the last time counts.
    rounds: usize,
    terms: Terms,
}

fn workloads() -> [Workload; 6] {
    let terms = |per_minute, stores, latency| Terms {
        per_minute,
        burst: stores,
        latency,
        drop: None,
        faults: [0.0; 4],
    };
    let fast = terms(6_000, SECOND, Duration::from_millis(200));
    let workload = |name, configured, calls, terms| Workload {
        name,
        configured,
        calls,
        rounds: 1,
        terms,
    };
    let falls = Terms {
        drop: Some((5 * SECOND, 1_500)),
        ..fast
    };
    let half = Terms {
        burst: MINUTE / 2,
        ..fast
    };
    let small = terms(60, MINUTE, SECOND);
    [
        workload("stores a second", 6_000, 1_000, fast),
        workload(COLD, 60, 13, small),
        Workload {
            rounds: 2,
            ..workload("13 calls, for the second time", 60, 13, small)
        },
        workload("stores half a minute", 6_000, 5_000, half),
        workload("configured with twice the limit", 12_000, 1_500, fast),
        workload("falls to a quarter", 6_000, 1_000, falls),
    ]
}

/// How a client makes its calls.
#[derive(Clone, Copy)]
enum Client {
    Context,
    /// A loop around governor with this burst.
    Loop(Duration),
}

struct Row {
    makespan: Duration,
    bound: Duration,
    refused: f64,
    lost: usize,
}

impl Row {
    fn is_clean(&self) -> bool {
        self.lost == 0 && self.refused <= MOST_REFUSED
    }
}

/// Returns the number of answered calls, and the time that those of the last round took.
async fn rounds(workload: &Workload, round: impl AsyncFn() -> usize) -> (usize, Duration) {
    let mut answered = 0;
    for _ in 1..workload.rounds {
        answered += round().await;
        tokio::time::sleep(PAUSE).await;
    }
    let began = Instant::now();
    answered += round().await;
    (answered, began.elapsed())
}

async fn context(base_url: &str, workload: &Workload) -> (usize, Duration) {
    let provider = OpenAi::builder()
        .base_url(base_url)
        .build()
        .expect("a provider");
    let cx = Context::builder(provider)
        .model("some-model")
        .pace(Pace::per_minute(workload.configured))
        .build();
    let round = async || {
        let calls = cx.fan_out("call", 0..workload.calls);
        let calls = calls.buffer_unordered(IN_FLIGHT);
        let settled = calls.settle(async |cx, n| cx.generate(format!("river {n}")).await);
        settled.await.oks().count()
    };
    rounds(workload, round).await
}

async fn governor(url: &str, workload: &Workload, burst: Duration) -> (usize, Duration) {
    let client = reqwest::Client::new();
    let period = MINUTE / u32::try_from(workload.configured).expect("a small rate");
    let holds = (burst.as_nanos() / period.as_nanos()).max(1) as u32;
    let quota = Quota::with_period(period).expect("a period");
    let limiter = RateLimiter::direct(quota.allow_burst(NonZeroU32::new(holds).expect("one")));
    let call = async |n: usize| {
        limiter.until_ready().await;
        let messages = json!([{"role": "user", "content": format!("river {n}")}]);
        let body = json!({"model": "some-model", "messages": messages}).to_string();
        let response = client.post(url).body(body).send().await?;
        response.error_for_status()?.bytes().await
    };
    let round = async || {
        let replies = stream::iter(0..workload.calls).map(&call);
        let replies = replies.buffer_unordered(IN_FLIGHT);
        let answered = replies.filter(|reply| ready(reply.is_ok()));
        answered.count().await
    };
    rounds(workload, round).await
}

fn run(workload: &Workload, client: Client) -> Row {
    let terms = workload.terms;
    let account = Account::new(terms);
    let asked = Arc::clone(&account);
    let url = Server::apart(|| Server::answering(move |request| asked.answer(&request)));
    let base = format!("{url}/v1");
    let (answered, makespan) = runtime().block_on(async {
        match client {
            Client::Context => context(&base, workload).await,
            Client::Loop(burst) => {
                governor(&format!("{base}/chat/completions"), workload, burst).await
            }
        }
    });
    let seen = account.seen();
    let mut truth = Curve::bucket(terms.per_minute, terms.burst);
    if let Some((at, rate)) = terms.drop {
        truth = truth.then(at, rate);
    }
    let limit = Limit::new(vec![truth], std::iter::repeat_n(1, workload.calls));
    let calls = Calls {
        shortest: terms.latency,
        longest_path: terms.latency,
        ..Calls::default()
    };
    Row {
        makespan,
        bound: lower_bound(&[limit], calls),
        refused: seen.rejected as f64 / (seen.admitted + seen.rejected).max(1) as f64,
        lost: workload.rounds * workload.calls - answered,
    }
}

fn main() -> ExitCode {
    let clients = [
        ("throughline", Client::Context),
        ("loop, a second", Client::Loop(SECOND)),
        ("loop, a minute", Client::Loop(MINUTE)),
    ];
    println!(
        "{:<32} {:<16} {:>10} {:>8} {:>6} {:>9} {:>5}",
        "workload", "client", "makespan s", "bound s", "ratio", "refused", "lost"
    );
    let mut holds = true;
    for workload in workloads() {
        let rows = clients.map(|(name, client)| (name, run(&workload, client)));
        let [(_, ours), loops @ ..] = &rows;
        let clean = loops.iter().filter(|(_, row)| row.is_clean());
        let best = clean.map(|(_, row)| row.makespan).min();
        let most = match workload.name {
            COLD => Some(4 * workload.terms.latency),
            _ => best,
        };
        let slower = most.is_some_and(|most| ours.makespan > most.mul_f64(MOST_SLOWER));
        let held = ours.is_clean() && !slower;
        holds &= held;
        for (i, (client, row)) in rows.iter().enumerate() {
            println!(
                "{:<32} {client:<16} {:>10.2} {:>8.2} {:>6.3} {:>7.2} % {:>5}{}",
                workload.name,
                row.makespan.as_secs_f64(),
                row.bound.as_secs_f64(),
                row.makespan.as_secs_f64() / row.bound.as_secs_f64(),
                100.0 * row.refused,
                row.lost,
                if i == 0 && !held { "  *" } else { "" },
            );
        }
    }
    println!("* slower than the best clean loop, or refused or lost too many");
    match holds {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}
