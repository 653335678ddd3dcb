//! The log of generated classes: nine movements and a summary for each class.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use throughline::store::{Commit, Store};
use throughline::{Context, Result, Runner, Sim, runs::Notes, store::Journal};

/// Movements of a class.
const MOVEMENTS: usize = 9;

#[derive(Serialize, Deserialize)]
pub struct Class {
    pub number: usize,
    pub movements: Vec<String>,
}

/// The log in a store.
pub struct QualityLog {
    /// Writes the rows in the background. Must be flushed before the process ends.
    pub journal: Journal,
    pub movements: Notes<String>,
    pub classes: Notes<Class>,
}

impl QualityLog {
    /// Opens the log. Failures of the store are reported to the observers of `cx`.
    pub async fn open<S: Store>(cx: &Context, store: &Arc<S>) -> Result<Self> {
        let studio = Runner::new(Arc::clone(store)).for_tenant("studio");
        Ok(Self {
            journal: cx.journal_into(Arc::clone(store)),
            movements: studio.notes("movements").await?,
            classes: studio.notes("classes").await?,
        })
    }

    /// Returns the ten rows of a class as one commit.
    fn rows(&self, class: &Class) -> Result<Commit> {
        let movements = self.movements.add(Commit::new(), &class.movements)?;
        self.classes.add(movements, [class])
    }
}

/// Returns the simulated model, which takes 8 s for a class.
pub fn model() -> Sim {
    Sim::builder().latency(Duration::from_secs(8)).build()
}

/// Generates a class and hands its rows to the journal. The caller does not wait for the store.
pub async fn class(cx: &Context, log: &QualityLog, number: usize) -> Result<Class> {
    let class = generate(cx, number).await?;
    cx.stage("note", |_| async {
        log.journal.write(log.rows(&class)?);
        Ok(())
    })
    .await?;
    Ok(class)
}

/// Generates class 1, reads the history and writes the rows one by one, and waits for each round trip.
pub async fn class_row_by_row(cx: &Context, log: &QualityLog, store: &impl Store) -> Result<Class> {
    let class = generate(cx, 1).await?;
    let history = log.classes.run();
    cx.stage("history", |_| store.log(history, 0, u32::MAX))
        .await?;
    for note in log.rows(&class)?.notes {
        let row = Commit::new().notes([note]);
        cx.stage("row", |_| store.commit(row)).await?;
    }
    Ok(class)
}

async fn generate(cx: &Context, number: usize) -> Result<Class> {
    let prompt = format!("Write class {number}.");
    let text = cx.child("write").generate(prompt).await?.text;
    let words = text.split_whitespace().cycle().map(str::to_owned);
    let movements = words.take(MOVEMENTS).collect();
    Ok(Class { number, movements })
}
