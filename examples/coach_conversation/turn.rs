//! One turn of the conversation: a graph of steps that wait only for what they need.

use std::time::Duration;

use futures::StreamExt as _;
use schemars::JsonSchema;
use serde::Deserialize;
use throughline::{Context, Delta, Error, ErrorKind, Result, Sim};
use tokio::time::{Instant, sleep};

/// How long each step takes, in milliseconds.
const STEPS: [(&str, u64); 15] = [
    ("profile", 292),
    ("router", 850),
    ("conversation", 150),
    ("config", 125),
    ("context", 200),
    ("acknowledgement", 300),
    ("workout", 600),
    ("workout-update", 300),
    ("memory-query", 450),
    ("memory", 300),
    ("memory-update", 300),
    ("pattern-update", 300),
    ("insights-update", 300),
    ("answer", 2_000),
    ("no-context", 50),
];

fn latency(step: &str) -> Duration {
    let known = STEPS.iter().find(|(name, _)| *name == step);
    Duration::from_millis(known.map_or(0, |(_, millis)| *millis))
}

/// What goes wrong, to see that the rest goes on.
#[derive(Debug, Clone, Copy, Default)]
pub struct Trouble {
    /// A step whose call fails.
    pub fails: Option<&'static str>,
    /// A step whose call takes 30 s.
    pub slow: Option<&'static str>,
}

/// The simulated model. A prompt begins with the name of its step.
pub fn model(trouble: Trouble) -> Sim {
    fn step(text: &str) -> &str {
        text.split(':').next().unwrap_or_default()
    }
    Sim::builder()
        .latency_of(move |request| match step(request.last_text()) {
            slow if trouble.slow == Some(slow) => Duration::from_secs(30),
            step => latency(step),
        })
        .fail_when(move |request| {
            let fails = trouble.fails == Some(step(request.last_text()));
            fails.then(|| Error::new(ErrorKind::InvalidRequest, "refused"))
        })
        .reply(|request| match request.last_text() {
            text if step(text) == "router" => {
                // The question alone: behind it comes the schema.
                let asked = text.lines().next().unwrap_or_default();
                let (workout, memory) = (asked.contains("plan"), asked.contains("remember"));
                format!(r#"{{"workout": {workout}, "memory": {memory}}}"#)
            }
            text => format!("the {}", step(text)),
        })
        .build()
}

/// What the router says of a message.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
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

/// A read from the database, simulated.
async fn read(cx: &Context, step: &'static str, takes: &'static str) -> Result<String> {
    cx.stage(step, |_| async move {
        sleep(latency(takes)).await;
        Ok(format!("the {step}"))
    })
    .await
}

async fn ask(cx: &Context, step: &'static str, about: &str) -> Result<String> {
    let reply = cx.child(step).generate(format!("{step}: {about}")).await?;
    Ok(reply.text)
}

/// One message, answered. The updates run alongside the work: none of them can fail it, or delay
/// it by more than the grace.
pub async fn turn(cx: &Context, message: &str) -> Result<Turn> {
    let profile = read(cx, "profile", "profile").await?;
    let route = cx.child("router");
    let (verdict, conversation, config) = cx
        .join((
            async {
                route
                    .generate_as::<Verdict>(format!("router: {message}"))
                    .await
            },
            read(cx, "conversation", "conversation"),
            read(cx, "config", "config"),
        ))
        .await;
    let (verdict, known) = (verdict?, [profile, conversation?, config?].join(", "));

    let workout = async {
        let needed = verdict.workout || verdict.memory;
        let takes = if needed { "context" } else { "no-context" };
        let context = read(cx, "context", takes).await?;
        if !verdict.workout {
            return Ok((None, None));
        }
        let update = ask(cx, "workout-update", message);
        let (workout, update) = cx.alongside(update, ask(cx, "workout", &context)).await;
        Ok::<_, Error>((Some(workout?), update.ok()))
    };
    let memory = async {
        if !verdict.memory {
            return Ok((None, None));
        }
        let found = read(cx, "memory-query", "memory-query").await?;
        let update = ask(cx, "memory-update", message);
        let (memory, update) = cx.alongside(update, ask(cx, "memory", &found)).await;
        Ok::<_, Error>((Some(memory?), update.ok()))
    };
    let (workout, pattern) = (workout, ask(cx, "pattern-update", message));
    let branches = cx.join((cx.alongside(pattern, workout), memory));
    let acknowledge = ask(cx, "acknowledgement", message);
    let (((workout, pattern), memory), acknowledged) = cx.alongside(acknowledge, branches).await;

    // A branch that failed is said to have failed, and takes nothing with it.
    let sorry = |_| (Some("not available now".to_owned()), None);
    let (workout, workout_update) = workout.unwrap_or_else(sorry);
    let (memory, memory_update) = memory.unwrap_or_else(sorry);

    let prompt = format!("answer: {message} ({known}; {workout:?}, {memory:?})");
    let insights = ask(cx, "insights-update", message);
    let (answer, insights) = cx.alongside(insights, write(cx, prompt)).await;
    let updates = [
        acknowledged.ok(),
        pattern.ok(),
        workout_update,
        memory_update,
        insights.ok(),
    ];
    Ok(Turn {
        answer: answer?,
        workout,
        memory,
        seen: updates.into_iter().flatten().collect(),
    })
}

/// The answer, as it is written: a service would pass each piece on.
async fn write(cx: &Context, prompt: String) -> Result<String> {
    let mut deltas = cx.child("answer").stream(prompt);
    let mut answer = String::new();
    while let Some(delta) = deltas.next().await {
        if let Delta::Text(piece) = delta? {
            answer.push_str(&piece);
        }
    }
    Ok(answer)
}

/// The four kinds of messages.
pub const MESSAGES: [(&str, &str); 4] = [
    ("both", "plan my legs, and remember my knee"),
    ("workout only", "plan my legs"),
    ("memory only", "what do you remember of my knee?"),
    ("neither", "good morning"),
];

/// A turn and the time it took.
pub async fn timed(cx: &Context, message: &str) -> Result<(Turn, Duration)> {
    let began = Instant::now();
    let turn = turn(cx, message).await?;
    Ok((turn, began.elapsed()))
}
