//! One turn of the conversation: a graph of steps, each of which waits only for its own inputs.

use std::time::Duration;

use futures::FutureExt as _;
use schemars::JsonSchema;
use serde::Deserialize;
use throughline::provider::sim::SimBuilder;
use throughline::{Context, Result, Sim};
use tokio::time::sleep;

/// Returns the simulated model. A prompt begins with the name of its step.
pub fn model() -> SimBuilder {
    Sim::builder()
        .latency(Duration::from_millis(300))
        .latency_when("router:", Duration::from_millis(850))
        .latency_when("workout:", Duration::from_millis(600))
        .latency_when("answer:", Duration::from_secs(2))
        .reply(|request| format!("done: {}", request.last_text()))
        .reply_when("router:", |request| {
            let asked = request.last_text();
            let (workout, memory) = (asked.contains("plan my"), asked.contains("remember"));
            format!(r#"{{"workout": {workout}, "memory": {memory}}}"#)
        })
}

/// Simulates a read from the database.
async fn read(cx: &Context, step: &str, millis: u64) -> Result<String> {
    let read = sleep(Duration::from_millis(millis));
    cx.stage(step, |_| read.map(Ok)).await?;
    Ok(format!("the {step}"))
}

async fn ask(cx: &Context, step: &str, about: &str) -> Result<String> {
    let reply = cx.child(step).generate(format!("{step}: {about}")).await?;
    Ok(reply.text)
}

/// The router's decision about a message.
#[derive(Deserialize, JsonSchema)]
struct Verdict {
    workout: bool,
    memory: bool,
}

/// The result of a turn.
#[derive(Debug, PartialEq, Eq)]
pub struct Turn {
    pub answer: String,
    /// The workout, or `None` if the router decided against one.
    pub workout: Option<String>,
    /// The memory, or `None` if the router decided against one.
    pub memory: Option<String>,
    /// The updates that the user saw during the work.
    pub seen: Vec<String>,
}

/// The result of a branch and the update that the user saw.
type Branch = (Option<String>, Option<String>);

/// Runs the work of a branch and sends an update meanwhile. The update is best effort: if it fails, the work continues.
async fn branch(cx: &Context, step: &str, found: &str, message: &str) -> Result<Branch> {
    let update_step = format!("{step}-update");
    let update = ask(cx, &update_step, message);
    let (work, update) = cx.join_best_effort(ask(cx, step, found), update).await;
    Ok((Some(work?), update.ok()))
}

/// Answers one message.
pub async fn turn(cx: &Context, message: &str) -> Result<Turn> {
    let profile = read(cx, "profile", 292).await?;
    let router = cx.child("router");
    let verdict = router.generate_as::<Verdict>(format!("router: {message}"));
    let conversation = read(cx, "conversation", 150);
    let first = (verdict.into_future(), conversation, read(cx, "config", 125));
    let (verdict, conversation, config) = cx.join(first).await;
    let (verdict, known) = (verdict?, [profile, conversation?, config?].join(", "));

    let workout = async {
        let needed = verdict.workout || verdict.memory;
        let context = read(cx, "context", if needed { 200 } else { 50 }).await?;
        match verdict.workout {
            true => branch(cx, "workout", &context, message).await,
            false => Ok((None, None)),
        }
    };
    let memory = async {
        match verdict.memory {
            true => branch(cx, "memory", &read(cx, "memory-query", 450).await?, message).await,
            false => Ok((None, None)),
        }
    };
    let workout = cx.join_best_effort(workout, ask(cx, "pattern-update", message));
    let acknowledge = ask(cx, "acknowledgement", message);
    let branches = cx.join_best_effort(cx.join((workout, memory)), acknowledge);
    let (((workout, pattern), memory), acknowledged) = branches.await;

    // A failed branch is reported in the answer and does not affect the other branch.
    let unavailable = |_| (Some("not available now".to_owned()), None);
    let (workout, workout_update) = workout.unwrap_or_else(unavailable);
    let (memory, memory_update) = memory.unwrap_or_else(unavailable);

    // A service would use `stream` here and pass each piece on to its user.
    let prompt = format!("answer: {message} ({known}; {workout:?}, {memory:?})");
    let step = cx.child("answer");
    let answer = step.generate(prompt);
    let insights = ask(cx, "insights-update", message);
    let (answer, insights) = cx.join_best_effort(answer, insights).await;
    let updates = [acknowledged.ok(), pattern.ok(), insights.ok()];
    let updates = updates.into_iter().chain([workout_update, memory_update]);
    let (answer, seen) = (answer?.text, updates.flatten().collect());
    Ok(Turn {
        answer,
        workout,
        memory,
        seen,
    })
}

/// The four kinds of messages.
pub const MESSAGES: [(&str, &str); 4] = [
    ("both", "plan my legs, and remember my knee"),
    ("workout only", "plan my legs"),
    ("memory only", "what do you remember of my knee?"),
    ("neither", "good morning"),
];
