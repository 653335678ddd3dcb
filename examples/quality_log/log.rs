//! A log of the classes that were generated: 9 movements and a line for each class.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use throughline::store::{Commit, NewRun, Note, RunId, Store};
use throughline::{Context, Journal, Result, Runner, Sim};

/// Movements of a class.
pub const MOVEMENTS: usize = 9;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Class {
    pub number: usize,
    pub movements: Vec<String>,
}

/// Where classes are noted. A run without items is a log: it goes with a purge of its age.
pub struct QualityLog {
    journal: Journal,
    runner: Runner,
    movements: RunId,
    classes: RunId,
}

impl QualityLog {
    /// Opens the log; the observers of `cx` hear of the store's failures.
    pub async fn open<S: Store>(cx: &Context, store: Arc<S>) -> Result<Self> {
        let log = |name: &str| store.create_run(NewRun::new("studio", name).idempotency_key(name));
        Ok(Self {
            movements: log("movements").await?.run,
            classes: log("classes").await?.run,
            runner: Runner::new(Arc::clone(&store)),
            journal: cx.journal_into(store),
        })
    }

    /// Ten rows, one commit.
    pub fn rows(&self, class: &Class) -> Result<Commit> {
        let note = |run, kind: &str, data| Note {
            run,
            kind: kind.to_owned(),
            data,
        };
        let mut notes = Vec::with_capacity(MOVEMENTS + 1);
        for movement in &class.movements {
            notes.push(note(
                self.movements,
                "movement",
                serde_json::to_string(movement)?,
            ));
        }
        notes.push(note(self.classes, "class", serde_json::to_string(class)?));
        Ok(Commit::new().notes(notes))
    }

    /// Returns at once, whatever the store does.
    pub fn record(&self, class: &Class) -> Result<()> {
        self.journal.write(self.rows(class)?);
        Ok(())
    }

    /// The classes of late: a bounded read.
    pub async fn recent(&self, limit: u32) -> Result<Vec<Class>> {
        let entries = self.runner.log_last(self.classes, limit).await?;
        // The store notes there too when the log was made.
        let classes = entries.iter().filter(|entry| entry.kind == "class");
        classes
            .map(|entry| Ok(serde_json::from_str(&entry.data)?))
            .collect()
    }

    /// To be flushed before the process ends, and asked how it stands.
    pub fn journal(&self) -> &Journal {
        &self.journal
    }
}

/// The simulated model: 8 s for a class.
pub fn model() -> Sim {
    Sim::builder().latency(Duration::from_secs(8)).build()
}

/// Generates a class and notes it: what its caller waits for.
pub async fn class(cx: &Context, log: &QualityLog, number: usize) -> Result<Class> {
    let class = generate(cx, number).await?;
    cx.stage("note", |_| async { log.record(&class) }).await?;
    Ok(class)
}

/// As it was: the history, a row at a time, and the log row, each awaited.
pub async fn class_as_it_was(
    cx: &Context,
    log: &QualityLog,
    store: &impl Store,
    number: usize,
) -> Result<Class> {
    let class = generate(cx, number).await?;
    cx.stage("history", |_| store.log(log.classes, 0, u32::MAX))
        .await?;
    for note in log.rows(&class)?.notes {
        let row = Commit::new().notes([note]);
        cx.stage("row", |_| store.commit(row)).await?;
    }
    Ok(class)
}

async fn generate(cx: &Context, number: usize) -> Result<Class> {
    let reply = cx
        .child("write")
        .generate(format!("Write class {number}."))
        .await?;
    let mut words = reply.text.split_whitespace().cycle();
    let movements = (0..MOVEMENTS)
        .filter_map(|_| words.next().map(str::to_owned))
        .collect();
    Ok(Class { number, movements })
}
