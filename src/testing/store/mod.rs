//! What every [`Queue`] must do: a suite for backends of your own. Ours pass it.
//!
//! ```
//! use std::sync::Arc;
//! use throughline::store::{Memory, Queue};
//! use throughline::testing::store;
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() {
//! // Each call must give a store of its own that is empty.
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

/// Longer than any test.
const LONG: Duration = Duration::from_secs(3600);

/// Runs every case on an empty store of its own.
///
/// # Panics
/// Where the store does not keep the contract; the name of the case is printed before.
pub async fn conformance(open: impl AsyncFn() -> Arc<dyn Queue>) {
    macro_rules! run {
        ($($room:ident: $($case:ident),+;)+) => {$($(
            let name = concat!(stringify!($room), "::", stringify!($case));
            // Shown by the test harness if a case panics.
            println!("store conformance: {name}");
            let store = open().await;
            $room::$case(Arc::clone(&store)).await;
            audit(&*store).await;
        )+)+};
    }
    run! {
        cases:
            a_run_is_kept_as_it_was_given,
            a_run_without_items_is_completed,
            creating_a_run_twice_is_harmless,
            what_cannot_be_kept_is_refused,
            runs_are_listed_newest_first_and_by_page,
            items_are_dealt_fairly_and_by_priority,
            a_claim_takes_only_items_of_the_pipelines_it_names,
            more_tenants_than_places_take_turns,
            a_commit_counts_logs_and_ends_the_run,
            a_commit_sent_again_changes_nothing,
            who_lost_an_item_cannot_commit_it_but_its_generation_stays,
            the_first_generation_under_a_key_stays,
            unclaimed_items_can_be_committed_against_their_epoch,
            notes_are_logged_in_order,
            old_runs_and_generations_are_purged,
            a_purge_leaves_what_a_run_may_need_again,
            numbers_without_end_stop_nobody;
        leases:
            a_lease_that_is_over_claims_nothing,
            a_lease_of_the_same_name_is_another_lease,
            a_retired_lease_gives_its_items_back_without_charge,
            an_item_that_was_alone_when_its_workers_died_fails_after_its_attempts,
            an_item_never_fails_for_a_worker_that_held_others_too,
            released_items_come_back_when_their_delay_is_over,
            a_cancelled_run_stops_at_once,
            failed_items_can_be_tried_again,
            intents_of_items_that_nobody_holds_are_ambiguous;
        races:
            claimers_never_share_an_item,
            counters_and_logs_are_exact_under_concurrent_commits,
            one_of_many_that_create_the_same_run_creates_it,
            each_item_is_settled_once_whoever_dies;
    }
}

/// Counters equal what the items say, the log has no gap and tells the same story.
///
/// # Panics
/// Where that is not so.
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

/// All items of a run, by pages.
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

/// Items of the pipeline `p`, whatever their handling.
async fn claim_any(store: &dyn Queue, lease: LeaseId, limit: u32) -> Vec<Item> {
    let mut items = Vec::new();
    for handling in [
        Handling::Normal,
        Handling::Few,
        Handling::Alone,
        Handling::LastAttempt,
    ] {
        let left = limit - items.len() as u32;
        let claim = Claim::new(&["p"], left).handling(handling);
        items.extend(store.claim(lease, claim).await.expect("claim"));
    }
    items
}

/// A run of `n` items for `tenant`.
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
