//! The pipeline that plans a week of a program, its input and output, and the simulated provider.

use std::path::Path;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use throughline::{Context, Result, Sim};

/// A program as submitted.
#[derive(Deserialize)]
pub struct Program {
    pub goal: String,
    pub weeks: Option<u32>,
    pub timeout_ms: Option<u64>,
}

/// The plan of a week.
#[derive(Serialize, Deserialize, JsonSchema)]
pub struct Plan {
    focus: String,
    sessions: Vec<String>,
}

/// Plans a week of a program. Each week is an item of the run.
pub async fn plan_week(cx: Context, (goal, week): (String, u32)) -> Result<Plan> {
    let about = format!("week {week} of a program towards {goal}");
    let analyse = format!("Analyse what is needed in {about}.");
    let needs = cx.generate(analyse).await?.text;
    cx.generate_as::<Plan>(format!("Plan {about}. It needs: {needs}"))
        .validate(|plan| plan.sessions.first().map(drop).ok_or("no sessions".into()))
        .await
}

/// Returns the simulated provider, which writes its bills to a file next to the store.
pub fn provider(latency: Duration, store: &Path) -> Sim {
    const WEEK: &str = r#"{"focus":"endurance","sessions":["40 min easy","6 x 400 m"]}"#;
    Sim::builder()
        .latency(latency)
        .jitter(0.5)
        .error_rate(0.01)
        .reply(|_| "More of it, and rest.")
        .reply_when("Plan week", |_| WEEK)
        .ledger_file(store.with_extension("ledger"))
        .build()
}
