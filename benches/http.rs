//! Measures the client's CPU time for a call over a socket and compares it with hand-written code.
//!
//! ```sh
//! cargo bench --bench http --features openai
//! ```
//!
//! Both send the same chat completions to a server that answers at once, 64 at a time over persistent connections. The
//! hand-written code uses reqwest, `buffer_unordered(64)`, governor, and a serde struct each for the body and the reply.
//! The crate uses `Context` and `OpenAi` with retries, deadlines, settlement, rate-limit headers and detailed errors.
//!
//! The bench measures the CPU time of the client's thread, kernel included, by the clock of the thread (on Linux). The
//! server has a thread of its own, and waiting costs nothing. The runs are short and alternate, so that changes of the
//! machine's speed affect both. The bar is 1.15.

#[path = "../tests/support/server.rs"]
mod server;

use std::num::NonZeroU32;
use std::thread;
use std::time::Duration;

use futures::{StreamExt as _, stream};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE};
use serde::{Deserialize, Serialize};
use throughline::{Context, OpenAi, Pace, Provider as _, Request};
use tokio::runtime::Runtime;

use crate::server::{Server, reply, runtime};

const CALLS: u64 = 500;
const ROUNDS: usize = 165;
const PARALLEL: usize = 64;
const MODEL: &str = "some-model";
const BAR: f64 = 1.15;

fn prompt(n: u64) -> String {
    let facts = "It rises in the hills, turns twice and reaches the sea. ".repeat(8);
    format!("Describe river {n} in one sentence. {facts}")
}

/// Returns a chat completion with its headers.
fn answer() -> Vec<u8> {
    let text = "The river leaves the hills in the early morning, crosses a plain of reeds and \
                reaches the sea by evening. "
        .repeat(4);
    let body = serde_json::json!({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1_700_000_000, "model": MODEL,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text},
            "logprobs": null, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 128, "completion_tokens": 96, "total_tokens": 224,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0}},
        "system_fingerprint": "fp_1",
    });
    let headers = [
        ("content-type", "application/json"),
        ("x-request-id", "req_0123456789abcdef"),
        ("x-ratelimit-limit-requests", "10000"),
        ("x-ratelimit-remaining-requests", "9999"),
        ("x-ratelimit-reset-requests", "6ms"),
        ("x-ratelimit-limit-tokens", "2000000"),
        ("x-ratelimit-remaining-tokens", "1999800"),
        ("x-ratelimit-reset-tokens", "6ms"),
    ];
    reply(200, &headers, body.to_string().as_bytes())
}

#[derive(Serialize)]
struct Body {
    model: &'static str,
    messages: [Message; 1],
    max_tokens: u64,
}

#[derive(Serialize, Deserialize)]
struct Message {
    #[serde(skip_deserializing)]
    role: &'static str,
    content: String,
}

#[derive(Deserialize)]
struct Completion {
    choices: Vec<Choice>,
    usage: Tokens,
}

#[derive(Deserialize)]
struct Choice {
    message: Message,
}

#[derive(Deserialize)]
struct Tokens {
    prompt_tokens: u64,
    completion_tokens: u64,
}

/// The hand-written client, without retries.
struct ByHand {
    client: reqwest::Client,
    limiter: DefaultDirectRateLimiter,
    url: String,
}

impl ByHand {
    fn new(url: &str) -> Self {
        let quota = Quota::per_second(NonZeroU32::MAX).allow_burst(NonZeroU32::MAX);
        Self {
            client: reqwest::Client::new(),
            limiter: RateLimiter::direct(quota),
            url: format!("{url}/v1/chat/completions"),
        }
    }

    async fn call(&self, n: u64) -> (String, u64) {
        self.limiter.until_ready().await;
        let body = Body {
            model: MODEL,
            messages: [Message {
                role: "user",
                content: prompt(n),
            }],
            max_tokens: 200,
        };
        let response = self
            .client
            .post(&self.url)
            .header(CONTENT_TYPE, "application/json")
            .header(AUTHORIZATION, "Bearer sk-0123456789")
            .body(serde_json::to_vec(&body).expect("it is JSON"))
            .send()
            .await
            .and_then(reqwest::Response::error_for_status)
            .expect("a reply");
        let body = response.bytes().await.expect("its body");
        let mut completion: Completion = serde_json::from_slice(&body).expect("a completion");
        let tokens = completion.usage.prompt_tokens + completion.usage.completion_tokens;
        (completion.choices.swap_remove(0).message.content, tokens)
    }

    async fn run(&self) -> u64 {
        let calls = stream::iter(0..CALLS).map(|n| self.call(n));
        let replies: Vec<_> = calls.buffer_unordered(PARALLEL).collect().await;
        replies.iter().map(|(_, tokens)| tokens).sum()
    }
}

async fn ours(cx: &Context) -> u64 {
    let batch = cx.fan_out("river", 0..CALLS).buffer_unordered(PARALLEL);
    let settled = batch.settle(|cx, n| async move {
        let request = Request::new(prompt(n)).max_tokens(200);
        let reply = cx.generate(request).await?;
        // Like the hand-written client, keep the text and the tokens, not the raw body.
        Ok((reply.text, reply.usage.total()))
    });
    let replies = settled.await.all().expect("every reply");
    replies.iter().map(|(_, tokens)| tokens).sum()
}

/// Measures the provider without lane, retries and batch.
async fn provider_alone(provider: &OpenAi) -> u64 {
    let calls = stream::iter(0..CALLS).map(|n| async move {
        let request = Request::new(prompt(n)).model(MODEL).max_tokens(200);
        provider.generate(&request).await.expect("a reply")
    });
    let replies: Vec<_> = calls.buffer_unordered(PARALLEL).collect().await;
    replies.iter().map(|reply| reply.usage.total()).sum()
}

/// Returns the CPU time that this thread has used.
#[cfg(target_os = "linux")]
fn cpu_time() -> Option<Duration> {
    use rustix::time::{ClockId, clock_gettime};
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Some(Duration::new(
        time.tv_sec.unsigned_abs(),
        time.tv_nsec as u32,
    ))
}

#[cfg(not(target_os = "linux"))]
fn cpu_time() -> Option<Duration> {
    None
}

/// Returns the CPU time of one call in microseconds.
fn measure(runtime: &Runtime, work: impl Future<Output = u64>) -> f64 {
    let before = cpu_time().expect("Linux");
    let tokens = runtime.block_on(work);
    let used = cpu_time().expect("Linux") - before;
    assert_eq!(tokens, CALLS * (128 + 96));
    used.as_secs_f64() * 1e6 / CALLS as f64
}

fn client(url: &str) {
    // Each client has its own runtime: the connections of reqwest belong to the runtime in which they were made, and
    // the tasks of one client must not run during the time of another.
    let runtimes = [runtime(), runtime(), runtime()];
    let by_hand = ByHand::new(url);
    let provider = || {
        let builder = OpenAi::builder().base_url(format!("{url}/v1"));
        builder
            .api_key("sk-0123456789")
            .build()
            .expect("a provider")
    };
    let alone = provider();
    let cx = Context::builder(provider())
        .pace(Pace::per_minute(1 << 40).tokens(1 << 50))
        .model(MODEL)
        .build();

    let mut rounds = Vec::new();
    for round in 0..=ROUNDS {
        let mut times = [0.0; 3];
        // The order changes, because each run leaves warm or cold caches to the next.
        for turn in 0..3 {
            let which = (round + turn) % 3;
            times[which] = match which {
                0 => measure(&runtimes[0], by_hand.run()),
                1 => measure(&runtimes[1], ours(&cx)),
                _ => measure(&runtimes[2], provider_alone(&alone)),
            };
        }
        // The first round makes the connections.
        if round > 0 {
            rounds.push(times);
        }
    }
    let time = |which: usize| sorted(rounds.iter().map(|times| times[which]))[ROUNDS / 2];
    let ratios = |which: usize| sorted(rounds.iter().map(|times| times[which] / times[0]));
    let (ours, alone) = (ratios(1), ratios(2));
    let (low, high) = (ours[ROUNDS / 20], ours[ROUNDS - 1 - ROUNDS / 20]);
    println!(
        "client CPU of a call, {ROUNDS} rounds of {CALLS} calls, {PARALLEL} in flight\n\
         by hand {:.1} us, ours {:.1} us, our provider alone {:.1} us\n\
         provider alone / by hand: median {:.3}\n\
         ours / by hand: median {:.3}, {low:.3} to {high:.3} (bar: {BAR})",
        time(0),
        time(1),
        time(2),
        alone[ROUNDS / 2],
        ours[ROUNDS / 2],
    );
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

fn main() {
    if cpu_time().is_none() {
        println!("this platform does not report the CPU time of a thread");
        return;
    }
    let url = Server::apart(|| Server::fixed(answer()));
    let client = thread::spawn(move || client(&url));
    client.join().expect("the client's thread");
}
