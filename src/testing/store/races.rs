//! Cases with many concurrent tasks on one store.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;

use super::{LONG, create, lease, read};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Claim, Commit, Item, NewItem, NewRun, Note, Queue, Settlement, Status};

type Store = Arc<dyn Queue>;

/// Runs `n` tasks, in parallel if the runtime has several threads.
async fn together<F>(n: usize, of: impl Fn(usize) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let tasks: Vec<_> = (0..n).map(|i| tokio::spawn(of(i))).collect();
    for task in join_all(tasks).await {
        if let Err(error) = task {
            std::panic::resume_unwind(error.into_panic());
        }
    }
}

fn settled(items: &[Item], fail: impl Fn(&Item) -> bool) -> Commit {
    let result = |item: &Item| -> Result<String> {
        match fail(item) {
            true => Err(Error::new(ErrorKind::Other, "no")),
            false => Ok("1".to_owned()),
        }
    };
    let settle = |item: &Item| Settlement {
        hold: item.hold(),
        result: result(item),
    };
    Commit::new().settlements(items.iter().map(settle))
}

pub(super) async fn claimers_never_share_an_item(store: Store) {
    for tenant in ["a", "b", "c"] {
        create(&*store, tenant, 200).await;
    }
    let (sender, mut claimed) = tokio::sync::mpsc::unbounded_channel();
    together(6, |_| {
        let (store, sender) = (Arc::clone(&store), sender.clone());
        async move {
            let lease = lease(&*store).await;
            loop {
                let items = store
                    .claim(lease, Claim::new(["p"], 7))
                    .await
                    .expect("claim");
                if items.is_empty() {
                    return;
                }
                for item in items {
                    sender.send(item.id).expect("the test listens");
                }
            }
        }
    })
    .await;
    drop(sender);
    let mut seen = HashSet::new();
    while let Some(id) = claimed.recv().await {
        assert!(seen.insert(id), "item {id} was claimed twice");
    }
    // A task may stop early if others hold locks on all remaining items. No item is lost by that.
    let rest = Claim::new(["p"], 600);
    let rest = store
        .claim(lease(&*store).await, rest)
        .await
        .expect("claim");
    assert_eq!(seen.len() + rest.len(), 600);
}

pub(super) async fn counters_and_logs_are_exact_under_concurrent_commits(store: Store) {
    let mut runs = Vec::new();
    for _ in 0..4 {
        runs.push(create(&*store, "a", 90).await);
    }
    let mut items = Vec::new();
    for run in &runs {
        items.extend(super::all_items(&*store, *run).await);
    }
    // Every commit changes every run, in one of two orders, and overlaps with its neighbours.
    let items = Arc::new(items);
    let runs = Arc::new(runs);
    together(6, |worker| {
        let (store, items, runs) = (Arc::clone(&store), Arc::clone(&items), Arc::clone(&runs));
        async move {
            for round in 0..10 {
                let mine = |item: &&Item| {
                    let part = item.seq as usize % 30;
                    part / 3 == round && (part + worker).is_multiple_of(2)
                };
                let mut some: Vec<Item> = items.iter().filter(mine).cloned().collect();
                let mut notes: Vec<_> = runs.iter().copied().collect();
                if worker % 2 == 1 {
                    some.reverse();
                    notes.reverse();
                }
                let commit = settled(&some, |item| item.seq.is_multiple_of(5));
                let note = |run| Note {
                    run,
                    kind: "round".to_owned(),
                    data: "{}".to_owned(),
                };
                let commit = commit.notes(notes.into_iter().map(note));
                store.commit(commit).await.expect("commit");
            }
        }
    })
    .await;
    for run in runs.iter() {
        let run = read(&*store, *run).await;
        assert_eq!(
            (run.status, run.completed, run.failed),
            (Status::Failed, 72, 18)
        );
        let log = store.log(run.id, 0, 1000).await.expect("log");
        let count = |kind: &str| log.iter().filter(|entry| entry.kind == kind).count();
        assert_eq!((count("round"), count("ended")), (60, 1));
    }
}

pub(super) async fn concurrent_creations_with_one_key_create_one_run(store: Store) {
    let created = Arc::new(AtomicUsize::new(0));
    together(8, |i| {
        let (store, created) = (Arc::clone(&store), Arc::clone(&created));
        async move {
            let items = (0..=i).map(|n| NewItem::new(n.to_string(), "1"));
            let new = NewRun::new("a", "p").idempotency_key("once").items(items);
            let outcome = store.create_run(new).await.expect("create_run");
            created.fetch_add(usize::from(outcome.new), Ordering::Relaxed);
        }
    })
    .await;
    assert_eq!(created.load(Ordering::Relaxed), 1);
    assert_eq!(
        store
            .runs(Default::default(), 10)
            .await
            .expect("runs")
            .len(),
        1
    );
}

/// Workers that die, reaps and late commits, all at the same time.
pub(super) async fn each_item_is_settled_once_although_workers_die(store: Store) {
    let mut runs = Vec::new();
    for tenant in ["a", "b"] {
        let items = (0..60).map(|n| NewItem::new(n.to_string(), "1"));
        let new = NewRun::new(tenant, "p").max_attempts(1000).items(items);
        runs.push(store.create_run(new).await.expect("create_run").run);
    }
    let ended = Arc::new(runs.clone());
    together(5, |worker| {
        let (store, runs) = (Arc::clone(&store), Arc::clone(&ended));
        async move {
            for turn in 0.. {
                let mut left = 0;
                for run in runs.iter() {
                    let run = read(&*store, *run).await;
                    left += run.total - run.ended();
                }
                if left == 0 {
                    return;
                }
                let mine = lease(&*store).await;
                let items = super::claim_any(&*store, mine, 9).await;
                match (worker + turn) % 4 {
                    // This worker dies. Its commit races with the reap.
                    0 => {
                        store
                            .heartbeat(mine, Duration::ZERO)
                            .await
                            .expect("heartbeat");
                        let late = settled(&items, |_| false);
                        let (reaped, committed) = tokio::join!(store.reap(), store.commit(late));
                        reaped.expect("reap");
                        committed.expect("commit");
                    }
                    1 => {
                        store.retire(mine).await.expect("retire");
                    }
                    _ => {
                        store
                            .commit(settled(&items, |item| item.seq == 3))
                            .await
                            .expect("commit");
                        store.heartbeat(mine, LONG).await.expect("heartbeat");
                    }
                }
            }
        }
    })
    .await;
    for run in runs {
        let run = read(&*store, run).await;
        assert_eq!(run.completed + run.failed, 60);
    }
}
