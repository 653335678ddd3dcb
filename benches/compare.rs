//! Compares the crate with a loop around governor and reqwest. The README quotes its table.
//!
//! ```sh
//! cargo bench --bench compare --features openai
//! ```
//!
//! Each client makes the same calls over a socket, 64 at a time, to a server that enforces a token bucket of
//! requests, answers after 200 ms and names its limit in the headers. The server's limit is 6,000 requests a minute.
//!
//! - `governor` waits for the limiter, sends the request and reads the reply.
//! - `governor + backon` also retries each failure, up to 5 attempts with exponential backoff and jitter.
//! - `throughline` is a `Context` with a `Pace`.

#[path = "../tests/support/account.rs"]
mod account;
#[path = "../tests/support/server.rs"]
mod server;

use std::error::Error;
use std::future::ready;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use backon::{ExponentialBuilder, Retryable as _};
use futures::{StreamExt as _, stream};
use governor::{Quota, RateLimiter};
use serde_json::{Value, json};
use throughline::{Context, OpenAi, Pace};

use crate::account::{Account, Terms};
use crate::server::{Server, runtime};

const LIMIT: u64 = 6_000;
const CALLS: usize = 1_000;
const IN_FLIGHT: usize = 64;
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
const CLIENTS: [&str; 3] = ["governor", "governor + backon", "throughline"];

fn prompt(n: usize) -> String {
    format!("Describe river {n}.")
}

/// Returns the number of answered calls.
async fn governor(url: &str, per_minute: u64, attempts: usize) -> usize {
    let client = reqwest::Client::builder()
        .timeout(CALL_TIMEOUT)
        .build()
        .expect("a client");
    let per_second = NonZeroU32::new(per_minute as u32 / 60).expect("a rate");
    let limiter = RateLimiter::direct(Quota::per_second(per_second));
    let backoff = ExponentialBuilder::new()
        .with_jitter()
        .with_max_times(attempts - 1);
    let call = &async |n: usize| {
        limiter.until_ready().await;
        let messages = json!([{"role": "user", "content": prompt(n)}]);
        let body = json!({"model": "some-model", "messages": messages}).to_string();
        let response = client.post(url).body(body).send().await?;
        let body = response.error_for_status()?.bytes().await?;
        Ok::<_, Box<dyn Error>>(serde_json::from_slice::<Value>(&body)?)
    };
    let calls =
        stream::iter(0..CALLS).map(|n| (move || call(n)).retry(backoff).sleep(tokio::time::sleep));
    let replies = calls.buffer_unordered(IN_FLIGHT);
    replies.filter(|reply| ready(reply.is_ok())).count().await
}

/// Returns the number of answered calls.
async fn throughline(base_url: &str, per_minute: u64) -> usize {
    let provider = OpenAi::builder()
        .base_url(base_url)
        .build()
        .expect("a provider");
    let cx = Context::builder(provider)
        .model("some-model")
        .pace(Pace::per_minute(per_minute).burst(Duration::from_secs(1)))
        .call_timeout(CALL_TIMEOUT)
        .build();
    let settled = cx
        .fan_out("river", 0..CALLS)
        .buffer_unordered(IN_FLIGHT)
        .settle(async |cx, n| cx.generate(prompt(n)).await)
        .await;
    settled.oks().count()
}

fn main() {
    let right = Terms {
        per_minute: LIMIT,
        burst: Duration::from_secs(2),
        latency: Duration::from_millis(200),
        drop: None,
        faults: [0.0; 4],
    };
    let falls = Terms {
        drop: Some((Duration::from_secs(3), LIMIT / 2)),
        ..right
    };
    let faults = Terms {
        faults: [0.05, 0.02, 0.0, 0.01],
        ..right
    };
    println!(
        "| {CALLS} calls, of which the server allows {LIMIT} a minute | {} |",
        CLIENTS.join(" | ")
    );
    println!("|---|---|---|---|");
    for (scenario, configured, terms) in [
        ("configured with the true limit", LIMIT, right),
        ("configured with twice the limit", 2 * LIMIT, right),
        ("the limit halves after 3 s", LIMIT, falls),
        ("8 % of the calls fail", LIMIT, faults),
    ] {
        print!("| {scenario} |");
        for client in CLIENTS {
            let account = Account::new(terms);
            let answering = Arc::clone(&account);
            let url =
                Server::apart(|| Server::answering(move |request| answering.answer(&request)));
            let base = format!("{url}/v1");
            let completions = format!("{base}/chat/completions");
            let began = Instant::now();
            let answered = runtime().block_on(async {
                match client {
                    "governor" => governor(&completions, configured, 1).await,
                    "governor + backon" => governor(&completions, configured, 5).await,
                    _ => throughline(&base, configured).await,
                }
            });
            let (took, refused) = (began.elapsed().as_secs_f64(), account.seen().rejected);
            print!(" {answered} answered in {took:.1} s, {refused} refused |");
        }
        println!();
    }
}
