//! A coach answers a message: fifteen steps, most of which need not wait for each other.
//!
//! ```sh
//! cargo run --example coach_conversation --features full,stages
//! ```
//!
//! `turn.rs` is the graph. Here it is run in parallel, with the switch off, for each kind of
//! message, and with trouble. The clock is paused, so the times are exact and nobody waits.

#[path = "coach_conversation/turn.rs"]
mod turn;

use std::time::Duration;

use throughline::stages::Stages;
use throughline::{Context, Result, Switch, Timeline};

use crate::turn::{MESSAGES, Trouble, model, timed};

#[tokio::main(flavor = "current_thread", start_paused = true)]
async fn main() -> Result<()> {
    let parallel = Switch::new(true);
    let (timeline, stages) = (Timeline::new(), Stages::new());
    let cx = Context::builder(model(Trouble::default()))
        .parallel(&parallel)
        .alongside_grace(Duration::from_millis(300))
        .observer(timeline.clone())
        .observer(stages.clone())
        .build();

    let (_, both) = MESSAGES[0];
    let (ours, fast) = timed(&cx, both).await?;
    println!("in parallel: {} ms\n{timeline}", fast.as_millis());

    timeline.clear();
    parallel.set(false);
    let (theirs, slow) = timed(&cx, both).await?;
    println!("switched off: {} ms\n{timeline}", slow.as_millis());
    parallel.set(true);
    println!("the same result: {}\n", ours == theirs);

    println!("message        in turn  parallel");
    for (name, message) in MESSAGES {
        parallel.set(false);
        let (_, slow) = timed(&cx, message).await?;
        parallel.set(true);
        let (_, fast) = timed(&cx, message).await?;
        println!(
            "{name:13}  {:>7}  {:>8}",
            slow.as_millis(),
            fast.as_millis()
        );
    }

    println!("\ntrouble                 ms  seen of 5  workout");
    let troubles = [
        ("none", None, None),
        ("a failed update", Some("workout-update"), None),
        ("a slow update", None, Some("workout-update")),
        ("a failed workout", Some("workout"), None),
    ];
    for (name, fails, slow) in troubles {
        let cx = Context::builder(model(Trouble { fails, slow }))
            .alongside_grace(Duration::from_millis(300))
            .observer(stages.clone())
            .build();
        let (turn, took) = timed(&cx, both).await?;
        let workout = turn.workout.unwrap_or_default();
        println!(
            "{name:18}  {:>6}  {:>9}  {workout}",
            took.as_millis(),
            turn.seen.len()
        );
    }

    println!("\n{stages}");
    println!("{} calls in the first context", cx.tally().calls);
    Ok(())
}
