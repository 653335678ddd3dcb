//! Helpers for the tests of runs and workers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use throughline::store::{Queue, RunId, Store};
use throughline::{Context, Pipeline, Runner, Sim, Worker, runs::WorkerBuilder};

pub const MINUTE: Duration = Duration::from_secs(60);

pub fn sim(latency: u64) -> Sim {
    Sim::builder().latency(Duration::from_secs(latency)).build()
}

pub fn ask() -> impl Pipeline<Input = u32, Output = String> + Clone {
    #[derive(Clone)]
    struct Ask;
    impl Pipeline for Ask {
        type Input = u32;
        type Output = String;
        fn name(&self) -> &str {
            "ask"
        }
        async fn run(&self, cx: &Context, n: u32) -> throughline::Result<String> {
            Ok(cx.generate(format!("{n}")).await?.text)
        }
    }
    Ask
}

pub fn worker<S: Queue>(store: &Arc<S>, sim: &Sim) -> WorkerBuilder {
    let cx = Context::builder(sim.clone()).build();
    Worker::builder(Arc::clone(store), cx).register("ask", ask())
}

/// Checks that counters equal the rows, and that the log has no gap and ends each item once. Returns the number of
/// items by status.
pub async fn check(store: &(impl Store + Clone), run: RunId) -> BTreeMap<&'static str, u64> {
    let runner = Runner::new(store.clone());
    let audit = runner.audit(run).await.unwrap().unwrap();
    assert!(audit.is_sound(), "{audit}");
    let mut counts = BTreeMap::<_, u64>::new();
    for item in store.items(run, 0, u32::MAX).await.unwrap() {
        *counts.entry(item.status.as_str()).or_default() += 1;
    }
    counts
}
