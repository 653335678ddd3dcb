//! The pipeline: a plan of routines, and an etude for each exercise of each routine.

use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;
use throughline::provider::sim::SimBuilder;
use throughline::{Context, Outcome, Request, Result, Settled, Sim, batch::Progress};

/// A routine in the plan.
#[derive(Deserialize, JsonSchema)]
pub struct Sketch {
    pub name: String,
    pub exercises: Vec<String>,
}

/// A routine with its etudes.
#[derive(Debug, PartialEq, Eq)]
pub struct Routine {
    pub name: String,
    pub etudes: Vec<String>,
    /// The exercises whose etude failed.
    pub missing: Vec<String>,
}

/// Which calls run at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// One call after the other.
    Sequential,
    /// The etudes of one routine, one routine after the other.
    Batched,
    /// All etudes, after the whole plan.
    Parallel,
    /// The etudes of a routine as soon as the routine is complete in the plan, while the rest is being written.
    Streamed,
}

pub const WAYS: [Way; 4] = [Way::Sequential, Way::Batched, Way::Parallel, Way::Streamed];

/// Plans a week and writes its etudes. Calls `on_progress` for each complete routine.
pub async fn week(
    cx: &Context,
    way: Way,
    on_progress: impl Fn(&Progress) + Send + Sync + 'static,
) -> Settled<Routine> {
    let plan = cx.child("plan").generate_items::<Sketch>("Plan my week.");
    let plan = plan.field("routines");
    // The other ways collect the whole plan before the first etude.
    let plan = match way {
        Way::Streamed => plan.left_stream(),
        _ => stream::once(plan.try_collect::<Vec<_>>())
            .map_ok(|plan| stream::iter(plan.into_iter().map(Ok)))
            .try_flatten()
            .right_stream(),
    };
    let routines = cx.fan_out("routine", plan);
    let routines = match way {
        Way::Sequential | Way::Batched => routines.sequential(),
        Way::Parallel | Way::Streamed => routines.buffer_unordered(8),
    };
    routines
        .key(|sketch: &Result<Sketch>| sketch.as_ref().map_or("?".into(), |s| s.name.clone()))
        .on_progress(on_progress)
        .settle(async |cx, sketch| Ok(routine(&cx, way, sketch?).await))
        .await
}

/// Writes the etudes of a routine. If one fails, the routine keeps the others.
async fn routine(cx: &Context, way: Way, sketch: Sketch) -> Routine {
    let etudes = cx.fan_out("etude", sketch.exercises.clone());
    let etudes = match way {
        Way::Sequential => etudes.sequential(),
        _ => etudes.join_all(),
    };
    let settled = etudes
        .settle(async |cx, exercise| {
            let request = Request::new(format!("Write an etude: {exercise}.")).max_tokens(400);
            Ok(cx.generate(request).await?.text)
        })
        .await;
    let exercise = |failed: &Outcome<String>| sketch.exercises[failed.index].clone();
    Routine {
        missing: settled.failures().map(exercise).collect(),
        name: sketch.name,
        etudes: settled.into_oks(),
    }
}

/// Returns the simulated model. The plan takes 4 s, the etudes of a routine 3, 4 and 5 s.
pub fn model() -> SimBuilder {
    let exercises = |name| ["slowly", "evenly", "quickly"].map(|how| format!("{name} {how}"));
    let routine = |name| json!({ "name": name, "exercises": exercises(name) });
    let plan = ["scales", "chords", "rhythm", "sight-reading"].map(routine);
    let plan = json!({ "routines": plan }).to_string();
    Sim::builder()
        .latency(Duration::from_secs(4))
        .latency_when("slowly", Duration::from_secs(3))
        .latency_when("quickly", Duration::from_secs(5))
        .reply(|request| request.last_text().replace("Write an", "An"))
        .reply_when("Plan", move |_| plan.clone())
}
