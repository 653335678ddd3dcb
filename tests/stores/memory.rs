//! The store in memory: the contract of all stores.

use std::sync::Arc;

use throughline::store::{Memory, Queue};
use throughline::testing::store;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_store_passes_the_conformance_suite() {
    store::conformance(async || Arc::new(Memory::new()) as Arc<dyn Queue>).await;
}

/// Compares the model with itself, which checks the walk and the counters of the model.
#[tokio::test]
async fn random_walks_of_two_models_agree() {
    for seed in 0..64 {
        store::against_model(Arc::new(Memory::new()), seed, 300).await;
    }
}
