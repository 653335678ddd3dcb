//! What is done for a week of a program, and the simulated provider it is done on.

use std::path::Path;
use std::time::{Duration, SystemTime};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use throughline::{Context, Pipeline, Result, Sim};

/// What is asked for.
#[derive(Deserialize)]
pub struct Program {
    goal: String,
    weeks: Option<u32>,
    timeout_ms: Option<u64>,
}

impl Program {
    /// The items of its run, or what is wrong with it.
    pub fn weeks(self) -> Result<Vec<Week>, String> {
        let weeks = self.weeks.unwrap_or(4);
        if self.goal.trim().is_empty() || !(1..=52).contains(&weeks) {
            return Err("a program has a goal and 1 to 52 weeks".to_owned());
        }
        let timeout = Duration::from_millis(self.timeout_ms.unwrap_or(600_000).min(3_600_000));
        let until = SystemTime::now() + timeout;
        let week = |number| Week {
            goal: self.goal.clone(),
            number,
            until,
        };
        Ok((1..=weeks).map(week).collect())
    }
}

/// One week of a program: an item of its run.
#[derive(Serialize, Deserialize)]
pub struct Week {
    goal: String,
    number: u32,
    /// When the program must be ready. A time of day, because it outlives the process.
    until: SystemTime,
}

#[derive(Serialize, Deserialize, JsonSchema)]
pub struct Plan {
    focus: String,
    sessions: Vec<String>,
}

pub struct PlanWeek;

impl Pipeline for PlanWeek {
    type Input = Week;
    type Output = Plan;

    fn name(&self) -> &str {
        "plan-week"
    }

    async fn run(&self, cx: &Context, week: Week) -> Result<Plan> {
        let left = week.until.duration_since(SystemTime::now());
        let cx = cx.with_timeout(left.unwrap_or_default());
        let about = format!("week {} of a program towards {}", week.number, week.goal);
        let needs = cx
            .generate(format!("Analyse what is needed in {about}."))
            .await?;
        cx.generate_as::<Plan>(format!("Plan {about}. It needs: {}", needs.text))
            .validate(|plan| match plan.sessions.is_empty() {
                true => Err("a week has sessions".into()),
                false => Ok(()),
            })
            .await
    }
}

pub fn provider(latency: Duration, ledger: &Path) -> Sim {
    let week = r#"{"focus":"endurance","sessions":["40 min easy","6 x 400 m","60 min long"]}"#;
    Sim::builder()
        .in_flight(64)
        .latency(latency)
        .jitter(0.5)
        .error_rate(0.01)
        .reply(
            move |request| match request.last_text().starts_with("Plan") {
                true => week.to_owned(),
                false => "More of it, and rest.".to_owned(),
            },
        )
        .ledger_file(ledger)
        .build()
}
