//! Generates a week of practice: a plan of four routines, and an etude for each of their twelve exercises.
//!
//! ```sh
//! cargo run --example practice_routines --features full
//! ```
//!
//! That is thirteen calls of 3 to 5 s. The example runs them one after the other, in batches, in parallel, and streamed:
//! then the etudes of a routine start while the rest of the plan is being written. Tokio's clock is paused, so the times
//! are exact and the example ends at once.

#[path = "practice_routines/practice.rs"]
mod practice;

use throughline::{Context, ErrorKind, Outcome, Result, observe::Timeline};

use crate::practice::{WAYS, Way, model, week};

#[tokio::main(flavor = "current_thread", start_paused = true)]
async fn main() -> Result<()> {
    let mut table = String::from("way         calls  first routine     all  saved\n");
    let mut sequential = None;
    for way in WAYS {
        println!("{way:?}");
        let (sim, timeline) = (model().build(), Timeline::new());
        let cx = Context::builder(sim.clone()).observer(timeline.clone());
        let week = week(&cx.build(), way, |routine| println!("  {routine}")).await;
        let first = week.outcomes().iter().map(Outcome::ended).min();
        let times = [first.unwrap_or_default(), week.elapsed()];
        let [first, all] = times.map(|time| time.as_secs_f64());
        let saved = 100.0 * (1.0 - all / *sequential.get_or_insert(all));
        let (name, calls) = (format!("{way:?}"), sim.ledger().total.billed);
        table += &format!("{name:10}  {calls:5}  {first:11.1} s  {all:4.1} s  {saved:3.0} %\n");
        println!("\n{timeline}");
    }
    println!("{table}");

    println!("Streamed, with one exercise that fails:");
    let model = model().fail_when("chords quickly", ErrorKind::InvalidRequest);
    let cx = Context::builder(model.build()).build();
    for routine in week(&cx, Way::Streamed, |_| {}).await.all()? {
        let (etudes, missing) = (routine.etudes.len(), routine.missing);
        println!("  {:14} {etudes} etudes, missing {missing:?}", routine.name);
    }
    Ok(())
}
