//! A week of practice: a plan of routines, and an etude for each exercise of each routine.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use schemars::JsonSchema;
use serde::Deserialize;
use throughline::{Context, Error, ErrorKind, Request, Result, Sim};
use tokio::time::Instant;

/// A routine as the plan has it.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct Sketch {
    pub name: String,
    pub exercises: Vec<String>,
}

/// A routine to be practised.
#[derive(Debug, PartialEq, Eq)]
pub struct Routine {
    pub name: String,
    pub etudes: Vec<String>,
    /// Exercises whose etude could not be had.
    pub missing: Vec<String>,
}

/// How much runs at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// One call after the other.
    Sequential,
    /// The etudes of a routine together, one routine after the other.
    Batched,
    /// All etudes together, when the plan is there.
    Parallel,
    /// The etudes of a routine as soon as it stands in the plan that is still being written.
    Streamed,
}

pub const WAYS: [Way; 4] = [Way::Sequential, Way::Batched, Way::Parallel, Way::Streamed];

/// A week of practice and when each of its routines came.
pub struct Week {
    pub routines: Vec<Routine>,
    pub delivered: Vec<(String, Duration)>,
    pub took: Duration,
}

/// Plans a week and writes its etudes. `tell` hears of each routine as it is complete.
pub async fn week(
    cx: &Context,
    way: Way,
    tell: impl Fn(&str, Duration) + Send + Sync + 'static,
) -> Result<Week> {
    let began = Instant::now();
    let delivered = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&delivered);

    let plan = cx
        .child("plan")
        .generate_items::<Sketch>("Plan my week.")
        .field("routines");
    // Whole before the first etude, or while it is being written: the rest is the same.
    let plan = match way {
        Way::Streamed => plan.left_stream(),
        _ => stream::iter(plan.try_collect::<Vec<_>>().await?.into_iter().map(Ok)).right_stream(),
    };
    let routines = cx.fan_out("routine", plan);
    let routines = match way {
        Way::Sequential | Way::Batched => routines.sequential(),
        Way::Parallel | Way::Streamed => routines.buffer_unordered(8),
    };
    let settled = routines
        .key(|sketch: &Result<Sketch>| sketch.as_ref().map_or("?".into(), |s| s.name.clone()))
        .on_progress(move |progress| {
            let name = progress.key.as_deref().unwrap_or_default();
            tell(name, began.elapsed());
            heard
                .lock()
                .unwrap()
                .push((name.to_owned(), began.elapsed()));
        })
        .settle(move |cx, sketch| async move { Ok(routine(&cx, way, sketch?).await) })
        .await;
    let delivered = delivered.lock().unwrap().clone();
    Ok(Week {
        routines: settled.all()?,
        delivered,
        took: began.elapsed(),
    })
}

/// An etude that fails leaves the routine the others.
async fn routine(cx: &Context, way: Way, sketch: Sketch) -> Routine {
    let etudes = cx.fan_out("etude", sketch.exercises.clone());
    let etudes = match way {
        Way::Sequential => etudes.sequential(),
        _ => etudes.join_all(),
    };
    let settled = etudes
        .settle(|cx, exercise| async move {
            let request = Request::new(format!("Write an etude: {exercise}.")).max_tokens(400);
            Ok(cx.generate(request).await?.text)
        })
        .await;
    let failed = settled
        .failures()
        .map(|failed| sketch.exercises[failed.index].clone());
    Routine {
        missing: failed.collect(),
        name: sketch.name,
        etudes: settled.oks().cloned().collect(),
    }
}

const ROUTINES: [&str; 4] = ["scales", "chords", "rhythm", "sight-reading"];

/// The simulated model: 4 s for the plan, 3, 4 and 5 s for the etudes of a routine. `refused`
/// names an exercise that it refuses.
pub fn model(refused: Option<&'static str>) -> Sim {
    Sim::builder()
        .latency_of(|request| match request.last_text() {
            text if text.contains("slowly") => Duration::from_secs(3),
            text if text.contains("quickly") => Duration::from_secs(5),
            _ => Duration::from_secs(4),
        })
        .reply(|request| match request.last_text() {
            text if text.starts_with("Plan") => {
                let routine = |name: &str| {
                    let exercises = [
                        format!("{name} slowly"),
                        name.to_owned(),
                        format!("{name} quickly"),
                    ];
                    serde_json::json!({"name": name, "exercises": exercises})
                };
                serde_json::json!({"routines": ROUTINES.map(routine)}).to_string()
            }
            text => text.replace("Write an etude: ", "An etude: "),
        })
        .fail_when(move |request| {
            let refused = request.last_text().contains(refused?);
            refused.then(|| Error::new(ErrorKind::InvalidRequest, "refused"))
        })
        .build()
}
