//! Answers a message to a coach in fifteen steps, most of which do not depend on each other.
//!
//! ```sh
//! cargo run --example coach_conversation --features full,stages
//! ```
//!
//! `turn.rs` has the graph of steps. The example runs it sequentially and in parallel for each kind of message, and then
//! with failing and slow steps. Tokio's clock is paused, so the times are exact and the example ends at once.

#[path = "coach_conversation/turn.rs"]
mod turn;

use std::time::Duration;

use throughline::observe::Stages;
use throughline::{Context, ErrorKind, Result, context::ParallelToggle, observe::Timeline};

use crate::turn::{MESSAGES, Turn, model, turn};

#[tokio::main(flavor = "current_thread", start_paused = true)]
async fn main() -> Result<()> {
    let (parallel, timeline, stages) = (ParallelToggle::new(true), Timeline::new(), Stages::new());
    let cx = Context::builder(model().build())
        .parallel(&parallel)
        .observer(timeline.clone())
        .observer(stages.clone())
        .build();

    let mut table = String::from("message        sequential  parallel  saved  same result\n");
    for (name, message) in MESSAGES {
        parallel.set(false);
        let (sequential_turn, slow) = timed(&cx, &timeline, message).await?;
        println!("{name}, sequential: {slow} ms\n{timeline}");

        parallel.set(true);
        let (parallel_turn, fast) = timed(&cx, &timeline, message).await?;
        println!("{name}, in parallel: {fast} ms\n{timeline}");

        let (saved, same) = (100 * (slow - fast) / slow, parallel_turn == sequential_turn);
        table += &format!("{name:13}  {slow:10}  {fast:8}  {saved:3} %  {same}\n");
    }
    println!("{table}\nfault                   ms  updates of 5  workout");

    let grace = Duration::from_millis(300);
    let failed = |step| model().fail_when(step, ErrorKind::InvalidRequest);
    let slow = |step| model().latency_when(step, Duration::from_secs(30));
    for (name, model) in [
        ("none", model()),
        ("a failed update", failed("workout-update:")),
        ("a slow update", slow("workout-update:")),
        ("a failed workout", failed("workout:")),
    ] {
        let cx = Context::builder(model.build()).best_effort_grace(grace);
        let cx = cx.observer(stages.clone()).observer(timeline.clone());
        let (turn, took) = timed(&cx.build(), &timeline, MESSAGES[0].1).await?;
        let (seen, workout) = (turn.seen.len(), turn.workout.unwrap_or_default());
        println!("{name:18}  {took:6}  {seen:12}  {workout}");
    }
    let calls = cx.tally().calls;
    println!("\n{stages}\n{calls} calls in the first context");
    Ok(())
}

/// Runs a turn on an empty timeline and returns it with its duration in milliseconds.
async fn timed(cx: &Context, timeline: &Timeline, message: &str) -> Result<(Turn, u128)> {
    timeline.clear();
    let turn = turn(cx, message).await?;
    Ok((turn, timeline.elapsed().as_millis()))
}
