//! A week of practice: a plan of four routines, and an etude for each of their twelve exercises.
//!
//! ```sh
//! cargo run --example practice_routines --features full
//! ```
//!
//! Thirteen calls of 3 to 5 s: one after the other, in batches, all together, and streamed, where
//! the etudes of a routine start while the rest of the plan is still being written. The clock is
//! paused, so the times are exact and nobody waits.

#[path = "practice_routines/practice.rs"]
mod practice;

use throughline::{Context, Result, Timeline};

use crate::practice::{WAYS, Way, model, week};

#[tokio::main(flavor = "current_thread", start_paused = true)]
async fn main() -> Result<()> {
    let mut table = String::from("way         calls  first routine     all\n");
    for way in WAYS {
        let (sim, timeline) = (model(None), Timeline::new());
        let cx = Context::builder(sim.clone())
            .observer(timeline.clone())
            .build();
        println!("{way:?}");
        let week = week(&cx, way, |name, at| {
            println!("  {:4.1} s  {name}", at.as_secs_f64())
        })
        .await?;
        println!("\n{timeline}");
        let [first, all] = [week.delivered[0].1, week.took].map(|time| time.as_secs_f64());
        let calls = sim.ledger().total.billed;
        table += &format!(
            "{:10}  {calls:5}  {first:11.1} s  {all:4.1} s\n",
            format!("{way:?}")
        );
    }
    println!("{table}");

    println!("Streamed, with one exercise that the model refuses:");
    let cx = Context::builder(model(Some("chords quickly"))).build();
    for routine in week(&cx, Way::Streamed, |_, _| {}).await?.routines {
        let partial = if routine.missing.is_empty() {
            ""
        } else {
            ", partial: without "
        };
        let (etudes, missing) = (routine.etudes.len(), routine.missing.join(", "));
        println!("  {:14} {etudes} etudes{partial}{missing}", routine.name);
    }
    Ok(())
}
