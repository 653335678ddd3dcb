//! A conformance suite for stores: it checks the contract of [`Store`] and [`Queue`]. Every backend of the crate passes
//! it, and a backend of your own should.
//!
//! ```
//! use std::sync::Arc;
//! use throughline::store::{Memory, Queue};
//! use throughline::testing::store;
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() {
//! // Each call must return a new, empty store.
//! let open = async || Arc::new(Memory::new()) as Arc<dyn Queue>;
//! store::conformance(open).await;
//! for seed in 0..8 {
//!     store::against_model(open().await, seed, 100).await;
//! }
//! # }
//! ```

mod cases;
mod leases;
mod model;
mod races;

use std::sync::Arc;
use std::time::Duration;

use crate::runs::Audit;
use crate::store::{
    Claim, Handling, Item, LeaseId, NewItem, NewRun, Queue, Run, RunId, Store, StoreExt as _,
};

pub use self::model::against_model;

/// A time that is longer than any test.
const LONG: Duration = Duration::from_secs(3600);

/// Runs every case on a new, empty store, and audits the store after each.
///
/// # Panics
/// If the store violates the contract. The name of the case is printed before.
pub async fn conformance(open: impl AsyncFn() -> Arc<dyn Queue>) {
    macro_rules! run {
        ($($module:ident: $($case:ident),+;)+) => {$($(
            let name = concat!(stringify!($module), "::", stringify!($case));
            // Shown by the test harness if a case panics.
            println!("store conformance: {name}");
            let store = open().await;
            $module::$case(Arc::clone(&store)).await;
            audit(&*store).await;
        )+)+};
    }
    run! {
        cases:
            a_run_is_stored_unchanged,
            a_run_without_items_is_completed,
            creating_a_run_twice_is_harmless,
            data_that_a_backend_cannot_keep_is_refused,
            runs_are_listed_newest_first_and_by_page,
            items_are_dealt_fairly_and_by_priority,
            a_claim_takes_only_items_of_the_pipelines_it_names,
            more_tenants_than_the_limit_take_turns,
            a_commit_counts_logs_and_ends_the_run,
            a_commit_sent_again_changes_nothing,
            a_lost_item_cannot_be_committed_but_its_generation_is_kept,
            the_first_generation_under_a_key_stays,
            unclaimed_items_can_be_committed_against_their_epoch,
            notes_are_logged_in_order,
            old_runs_and_generations_are_purged,
            a_purge_keeps_generations_that_a_run_may_need,
            the_largest_numbers_are_accepted;
        leases:
            an_expired_lease_claims_nothing,
            a_worker_of_the_same_name_has_another_lease,
            a_retired_lease_releases_its_items_without_charge,
            an_item_held_alone_by_dying_workers_fails_after_its_attempts,
            an_item_never_fails_for_a_worker_that_held_others_too,
            released_items_come_back_when_their_delay_is_over,
            a_cancelled_run_stops_at_once,
            failed_items_can_be_retried,
            intents_of_items_without_a_live_lease_are_ambiguous;
        races:
            claimers_never_share_an_item,
            counters_and_logs_are_exact_under_concurrent_commits,
            concurrent_creations_with_one_key_create_one_run,
            each_item_is_settled_once_although_workers_die;
    }
}

/// Checks of every run that its counters equal those of its items and that its log agrees with them.
///
/// # Panics
/// If they do not agree.
pub async fn audit(store: &dyn Store) {
    let mut before = None;
    loop {
        let page = crate::store::RunFilter {
            before,
            ..Default::default()
        };
        let runs = store.runs(page, 100).await.expect("runs");
        let Some(last) = runs.last() else { break };
        before = Some(last.id);
        for run in runs {
            let audit = Audit::of(store, &run).await.expect("audit");
            assert!(audit.is_sound(), "{audit}\n{run:?}");
        }
    }
}

/// Returns all items of a run, page by page.
async fn all_items(store: &dyn Store, run: RunId) -> Vec<Item> {
    let mut items = Vec::new();
    loop {
        let page = store
            .items(run, items.len() as u64, 500)
            .await
            .expect("items");
        if page.is_empty() {
            return items;
        }
        items.extend(page);
    }
}

/// Claims items of the pipeline `p`, whatever their handling.
async fn claim_any(store: &dyn Queue, lease: LeaseId, limit: u32) -> Vec<Item> {
    let mut items = Vec::new();
    for handling in [
        Handling::Normal,
        Handling::Few,
        Handling::Alone,
        Handling::LastAttempt,
    ] {
        let left = limit - items.len() as u32;
        let claim = Claim::new(["p"], left).handling(handling);
        items.extend(store.claim(lease, claim).await.expect("claim"));
    }
    items
}

/// Creates a run of `n` items for `tenant`.
async fn create(store: &dyn Queue, tenant: &str, n: usize) -> RunId {
    let items = (0..n).map(|i| NewItem::new(format!("k{i}"), format!("{{\"n\":{i}}}")));
    let new = NewRun::new(tenant, "p").items(items);
    store.create_run(new).await.expect("create_run").run
}

async fn read(store: &dyn Queue, run: RunId) -> Run {
    store
        .run(run)
        .await
        .expect("run")
        .expect("the run is there")
}

async fn lease(store: &dyn Queue) -> LeaseId {
    store.register("worker", LONG).await.expect("register")
}
