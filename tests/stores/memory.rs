//! The store in memory, held to the contract of all stores.

use std::sync::Arc;

use throughline::store::{Memory, Queue};
use throughline::testing::store;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_conforms() {
    store::conformance(async || Arc::new(Memory::new()) as Arc<dyn Queue>).await;
}

/// Itself against itself: the walk is sound, and its own counters equal what is derived.
#[tokio::test]
async fn it_walks_with_itself() {
    for seed in 0..64 {
        store::against_model(Arc::new(Memory::new()), seed, 300).await;
    }
}
