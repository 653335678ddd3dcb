//! Logs every generated class in a store without making users wait for the store.
//!
//! ```sh
//! cargo run --example quality_log --features full,testing,stages
//! ```
//!
//! Each class writes ten rows, nine movements and a summary, into a store that takes 75 ms for a round trip. The example
//! counts the round trips. Tokio's clock is paused, so the times are exact.

#[path = "quality_log/log.rs"]
mod log;

use std::sync::Arc;
use std::time::Duration;

use throughline::observe::Stages;
use throughline::store::Memory;
use throughline::testing::Counted;
use throughline::{Context, Result};
use tokio::time::Instant;

use crate::log::{QualityLog, class, class_row_by_row, model};

#[tokio::main(flavor = "current_thread", start_paused = true)]
async fn main() -> Result<()> {
    let store = Arc::new(Counted::new(Memory::new()).latency(Duration::from_millis(75)));
    let stages = Stages::new();
    let cx = Context::builder(model()).observer(stages.clone()).build();
    let log = &QualityLog::open(&cx, &store).await?;

    store.forget();
    let began = Instant::now();
    class_row_by_row(&cx, log, &*store).await?;
    let (took, waited) = (began.elapsed(), store.trips());
    println!("one class, row by row  {took:>7.3?}, {waited} round trips before the result");

    for (what, classes) in [
        ("one class, journal", 2..3),
        ("100 classes at once", 3..103),
    ] {
        store.forget();
        let classes = cx.fan_out("class", classes).join_all();
        let ended = classes.settle(async |cx, number| class(&cx, log, number).await);
        let ended = ended.await;
        let (took, waited) = (ended.elapsed(), store.trips());
        log.journal.flush().await?;
        let written = store.trips();
        println!(
            "{what:22} {took:>7.3?}, {waited} round trips before the result, {written} after it"
        );
        ended.all()?;
    }

    store.forget();
    let (recent, trips) = (log.classes.last(100).await?.len(), store.trips());
    println!("history                the last {recent} of 102 classes in {trips} round trips");

    store.set_down(true);
    let began = Instant::now();
    class(&cx, log, 103).await?;
    let (took, shutdown) = (began.elapsed(), log.journal.flush().await.unwrap_err());
    println!("\nstore down: a class    {took:>7.3?}; flush returns: {shutdown}");
    store.set_down(false);
    log.journal.flush().await?;
    let stats = log.journal.stats();
    let (written, lost, failures) = (stats.written, stats.given_up, stats.failures);
    println!(
        "store up again: {written} rows written, {lost} lost, after {failures} failed writes\n"
    );

    println!("{stages}");
    Ok(())
}
