//! Measures the cost of a batch per item and compares it with hand-written code.
//!
//! ```sh
//! cargo bench --bench batch
//! ```
//!
//! The items are no-ops, so only the overhead counts. The hand-written code has a boxed future, a semaphore and governor
//! under `buffer_unordered(64)`; a batch adds retries, settlement, a tally and a path for each item. The bar is 3 times the
//! hand-written cost.

use std::num::NonZeroU32;
use std::time::Instant;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use futures::{StreamExt as _, stream};
use governor::{Quota, RateLimiter};
use throughline::{Context, Provider, Reply, Request, Result, Usage, async_trait};
use tokio::runtime::Builder;
use tokio::sync::Semaphore;

const ITEMS: u64 = 10_000;

struct NoOp;

#[async_trait]
impl Provider for NoOp {
    fn name(&self) -> &str {
        "no-op"
    }

    async fn generate(&self, _: &Request) -> Result<Reply> {
        Ok(Reply::new(String::new(), Usage::default()))
    }
}

async fn by_hand() -> u64 {
    let slots = Semaphore::new(64);
    let quota = Quota::per_second(NonZeroU32::MAX).allow_burst(NonZeroU32::MAX);
    let limiter = RateLimiter::direct(quota);
    let provider: &dyn Provider = &NoOp;
    let (slots, limiter) = (&slots, &limiter);
    let calls = stream::iter(0..ITEMS).map(|_| async move {
        let _slot = slots.acquire().await.expect("the semaphore is open");
        limiter.until_ready().await;
        provider.generate(&Request::default()).await
    });
    let replies = calls.buffer_unordered(64);
    replies
        .filter(|reply| std::future::ready(reply.is_ok()))
        .count()
        .await as u64
}

async fn ours(cx: &Context) -> u64 {
    let batch = cx.fan_out("item", 0..ITEMS).buffer_unordered(64);
    let settled = batch.settle(|cx, _| async move { cx.generate(Request::default()).await });
    settled.await.oks().count() as u64
}

async fn without_calls(cx: &Context) -> u64 {
    let batch = cx.fan_out("item", 0..ITEMS).buffer_unordered(64);
    let settled = batch.settle(|_, n| async move { Ok(n) });
    settled.await.oks().count() as u64
}

fn batch(c: &mut Criterion) {
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let cx = Context::builder(NoOp).build();
    let mut group = c.benchmark_group("batch");
    group
        .throughput(Throughput::Elements(ITEMS))
        .sample_size(30);
    group.bench_function("by_hand", |b| b.iter(|| runtime.block_on(by_hand())));
    group.bench_function("ours", |b| b.iter(|| runtime.block_on(ours(&cx))));
    group.bench_function("ours_without_calls", |b| {
        b.iter(|| runtime.block_on(without_calls(&cx)));
    });
    group.finish();

    // Alternating, so that changes of the machine's speed affect both.
    let time = |work: &dyn Fn() -> u64| {
        let began = Instant::now();
        assert_eq!(work(), ITEMS);
        began.elapsed().as_secs_f64()
    };
    let mut ratios: Vec<_> = (0..101)
        .map(|_| {
            let theirs = time(&|| runtime.block_on(by_hand()));
            time(&|| runtime.block_on(ours(&cx))) / theirs
        })
        .collect();
    ratios.sort_by(f64::total_cmp);
    println!(
        "batch: ours / by hand, 101 pairs: median {:.2}, {:.2} to {:.2} (bar: 3)",
        ratios[50], ratios[5], ratios[95]
    );
}

criterion_group!(benches, batch);
criterion_main!(benches);
