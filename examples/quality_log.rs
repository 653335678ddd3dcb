//! A log of every class that was generated, for which no user waits.
//!
//! ```sh
//! cargo run --example quality_log --features full,testing,stages
//! ```
//!
//! Each class leaves 9 movements and a line in a store that takes 75 ms for a round trip. Round trips
//! are counted; the clock is paused, so the times are exact too.

#[path = "quality_log/log.rs"]
mod log;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use throughline::stages::Stages;
use throughline::store::Memory;
use throughline::testing::Counted;
use throughline::{Context, Event, Result};
use tokio::time::Instant;

use crate::log::{QualityLog, class, class_as_it_was, model};

#[tokio::main(flavor = "current_thread", start_paused = true)]
async fn main() -> Result<()> {
    let store = Arc::new(Counted::new(Memory::new()).latency(Duration::from_millis(75)));
    let (stages, refused) = (Stages::new(), Arc::new(AtomicU64::new(0)));
    let counter = Arc::clone(&refused);
    let cx = Context::builder(model())
        .observer(stages.clone())
        .on_event(move |event| {
            if let Event::StoreFailed { .. } = event {
                counter.fetch_add(1, Ordering::Relaxed);
            }
        })
        .build();
    let log = QualityLog::open(&cx, Arc::clone(&store)).await?;
    store.forget();

    let began = Instant::now();
    class_as_it_was(&cx, &log, &*store, 1).await?;
    let (took, trips) = (began.elapsed(), store.trips());
    println!("one class, as it was   {took:>7.3?}, {trips} round trips waited for");

    store.forget();
    let began = Instant::now();
    class(&cx, &log, 2).await?;
    let (took, waited) = (began.elapsed(), store.trips());
    log.journal().flush().await?;
    let behind = store.trips();
    println!("one class, ours        {took:>7.3?}, {waited} waited for, {behind} behind it");

    store.forget();
    let began = Instant::now();
    let classes = cx.fan_out("class", 3..103).join_all();
    let classes = classes
        .settle(|cx, number| class_of(cx, &log, number))
        .await;
    let (took, waited) = (began.elapsed(), store.trips());
    log.journal().flush().await?;
    let (ok, behind) = (classes.oks().count(), store.trips());
    println!("{ok} classes at once    {took:>7.3?}, {waited} waited for, {behind} behind them");

    store.forget();
    let recent = log.recent(100).await?;
    let (n, trips) = (recent.len(), store.trips());
    println!("history                the last {n} of 102 classes in {trips} round trips");

    store.set_down(true);
    let began = Instant::now();
    class(&cx, &log, 103).await?;
    let took = began.elapsed();
    let shutdown = log.journal().flush().await;
    println!(
        "\nstore down: a class    {took:>7.3?}, and the flush says: {}",
        shutdown.unwrap_err()
    );
    store.set_down(false);
    log.journal().flush().await?;
    let stats = log.journal().stats();
    let (written, failures, given_up) = (stats.written, stats.failures, stats.given_up);
    let told = refused.load(Ordering::Relaxed);
    println!(
        "store up again: {written} rows written, {given_up} lost; {failures} failures, {told} told\n"
    );

    println!("{stages}");
    Ok(())
}

async fn class_of(cx: Context, log: &QualityLog, number: usize) -> Result<log::Class> {
    class(&cx, log, number).await
}
