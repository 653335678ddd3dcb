//! Memory is O(in flight), not O(inputs). This test has a process of its own, because it measures the peak of the process.
#![cfg(target_os = "linux")]

use futures::StreamExt as _;
use throughline::{Context, Provider, Reply, Request, Result, Usage, async_trait};

#[path = "support/long.rs"]
mod long;

/// The peak may grow by so much for each input: less than any record of it, even an index.
const BYTES_PER_INPUT: u64 = 8;

struct Immediate;

#[async_trait]
impl Provider for Immediate {
    fn name(&self) -> &str {
        "immediate"
    }

    async fn generate(&self, _: &Request) -> Result<Reply> {
        tokio::task::yield_now().await;
        Ok(Reply::new(
            "a text of some length".repeat(10),
            Usage::new(1, 1),
        ))
    }
}

/// Returns the peak memory of this process in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib * 1024
}

#[tokio::test]
async fn memory_does_not_grow_with_the_number_of_inputs() {
    let cx = Context::builder(Immediate).build();
    let run = async |inputs: u64| {
        let outcomes = cx
            .fan_out("n", 0..inputs)
            .key(|n| format!("key-{n}"))
            .buffer_unordered(64)
            .stream(|cx, _| async move { cx.generate("a").await });
        outcomes
            .filter(|outcome| std::future::ready(outcome.is_ok()))
            .count()
            .await as u64
    };
    let inputs = if long::is_long() { 1_000_000 } else { 100_000 };
    assert_eq!(run(1_000).await, 1_000);
    let before = peak();
    assert_eq!(run(inputs).await, inputs);
    let grown = peak() - before;
    println!("{inputs} inputs: peak memory grew by {grown} bytes");
    assert!(
        grown < BYTES_PER_INPUT * inputs,
        "{inputs} inputs: peak memory grew by {grown} bytes"
    );
}
