//! Invariant 4: memory is O(in flight), not O(inputs). Alone in its file, because the
//! peak is the whole process's.
#![cfg(target_os = "linux")]

use futures::StreamExt as _;
use throughline::{Context, Provider, Reply, Request, Result, Usage, async_trait};

struct NoOp;

#[async_trait]
impl Provider for NoOp {
    fn name(&self) -> &str {
        "no-op"
    }

    async fn generate(&self, _: &Request) -> Result<Reply> {
        tokio::task::yield_now().await;
        Ok(Reply::new(
            "a text of some length".repeat(10),
            Usage::new(1, 1),
        ))
    }
}

/// The most memory that this process ever held, in KiB.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_million_inputs_in_less_than_16_mib() {
    let cx = Context::builder(NoOp).build();
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
    assert_eq!(run(1_000).await, 1_000);
    let before = peak();
    assert_eq!(run(1_000_000).await, 1_000_000);
    let grown = peak() - before;
    println!("peak memory grew by {grown} KiB");
    assert!(grown < 16 * 1024, "peak memory grew by {grown} KiB");
}
