//! One turn of the conversation: a graph of steps that wait only for what they need.

use std::time::Duration;

use futures::FutureExt as _;
use schemars::JsonSchema;
use serde::Deserialize;
use throughline::provider::sim::SimBuilder;
use throughline::{Context, Result, Sim};
use tokio::time::sleep;

/// The simulated model. A prompt begins with the name of its step.
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

/// A read from the database, simulated.
async fn read(cx: &Context, step: &str, millis: u64) -> Result<String> {
    let read = sleep(Duration::from_millis(millis));
    cx.stage(step, |_| read.map(Ok)).await?;
    Ok(format!("the {step}"))
}

async fn ask(cx: &Context, step: &str, about: &str) -> Result<String> {
    let reply = cx.child(step).generate(format!("{step}: {about}")).await?;
    Ok(reply.text)
}

/// What the router says of a message.
#[derive(Deserialize, JsonSchema)]
struct Verdict {
    workout: bool,
    memory: bool,
}

/// What a turn has come to.
#[derive(Debug, PartialEq, Eq)]
pub struct Turn {
    pub answer: String,
    /// `None` where the router saw no need.
    pub workout: Option<String>,
    pub memory: Option<String>,
    /// The updates that the user has seen while the work went on.
    pub seen: Vec<String>,
}

/// What a branch has come to, and the update that was seen.
type Branch = (Option<String>, Option<String>);

/// Runs a branch and, as a best effort, its update, which can neither fail the branch nor delay it by more than the grace.
async fn branch(cx: &Context, step: &str, found: &str, message: &str) -> Result<Branch> {
    let told = format!("{step}-update");
    let update = ask(cx, &told, message);
    let (work, update) = cx.join_best_effort(ask(cx, step, found), update).await;
    Ok((Some(work?), update.ok()))
}

/// One message, answered.
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

    // A branch that failed is said to have failed, and takes nothing with it.
    let sorry = |_| (Some("not available now".to_owned()), None);
    let (workout, workout_update) = workout.unwrap_or_else(sorry);
    let (memory, memory_update) = memory.unwrap_or_else(sorry);

    // As it is written: a service would pass each piece on to its user.
    let prompt = format!("answer: {message} ({known}; {workout:?}, {memory:?})");
    let answer = cx.child("answer").stream(prompt).for_each_text(|_piece| {});
    let insights = ask(cx, "insights-update", message);
    let (answer, insights) = cx.join_best_effort(answer, insights).await;
    let told = [acknowledged.ok(), pattern.ok(), insights.ok()];
    let told = told.into_iter().chain([workout_update, memory_update]);
    let (answer, seen) = (answer?.text, told.flatten().collect());
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
