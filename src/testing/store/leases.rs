//! Cases about leases, cancellation, retries and intents.

use std::time::Duration;

use serde_json::json;

use super::cases::{Store, broken, claim, commit, done, entry, generation, key, log, settle};
use super::{LONG, create, lease, read};
use crate::error::{Error, ErrorKind};
use crate::store::{
    Claim, Commit, Handling, Intent, IntentFilter, Item, NewItem, NewRun, Queue as _,
    QueueExt as _, Reaped, RunId, Status, Store as _, StoreExt as _,
};

fn one() -> Claim {
    Claim::new(["p"], 1)
}

pub(super) async fn an_expired_lease_claims_nothing(store: Store) {
    create(&*store, "a", 2).await;
    let expired = store.register("w", Duration::ZERO).await.unwrap();
    let lost = store.claim(expired, one()).await.unwrap_err();
    assert_eq!(lost.kind(), ErrorKind::LeaseLost);
    assert!(
        store.heartbeat(expired, LONG).await.unwrap(),
        "it has not been reaped yet"
    );
    assert_eq!(claim(&store, expired, 1).await.len(), 1);

    assert!(store.heartbeat(expired, Duration::ZERO).await.unwrap());
    let reaped = store.reap().await.unwrap();
    assert_eq!((reaped.leases, reaped.requeued), (1, 1));
    assert!(!store.heartbeat(expired, LONG).await.unwrap());
    assert_eq!(
        store.claim(expired, one()).await.unwrap_err().kind(),
        ErrorKind::LeaseLost
    );
    let fresh = lease(&*store).await;
    assert_ne!(fresh, expired, "a number is not reused");
    assert_eq!(super::claim_any(&*store, fresh, 5).await.len(), 2);
    let never = crate::store::LeaseId(fresh.0 + 1000);
    assert_eq!(
        store.claim(never, one()).await.unwrap_err().kind(),
        ErrorKind::LeaseLost
    );
}

/// A restarted worker must not keep the items of its former process alive.
pub(super) async fn a_worker_of_the_same_name_has_another_lease(store: Store) {
    create(&*store, "a", 3).await;
    let dead = store.register("w", LONG).await.unwrap();
    assert_eq!(claim(&store, dead, 2).await.len(), 2);
    let again = store.register("w", LONG).await.unwrap();
    assert_ne!(dead, again);
    assert!(store.heartbeat(dead, Duration::ZERO).await.unwrap());
    assert!(store.heartbeat(again, LONG).await.unwrap());
    assert_eq!(store.reap().await.unwrap().requeued, 2);
    assert_eq!(super::claim_any(&*store, again, 5).await.len(), 3);
}

pub(super) async fn a_retired_lease_releases_its_items_without_charge(store: Store) {
    let run = create(&*store, "a", 3).await;
    let first = lease(&*store).await;
    let items = claim(&store, first, 3).await;
    assert_eq!(commit(&store, vec![done(items[0].hold())]).await, 1);
    let held = store.held(first).await.unwrap();
    assert_eq!(held, [items[1].hold(), items[2].hold()]);
    assert_eq!(store.retire(first).await.unwrap(), 2);
    assert!(store.held(first).await.unwrap().is_empty());
    assert!(!store.heartbeat(first, LONG).await.unwrap());
    assert_eq!(store.retire(first).await.unwrap(), 0);
    let items = claim(&store, lease(&*store).await, 3).await;
    assert_eq!(
        items.iter().map(|item| item.attempt).collect::<Vec<_>>(),
        [1, 1]
    );
    assert_eq!(read(&*store, run).await.completed, 1);
}

pub(super) async fn an_item_held_alone_by_dying_workers_fails_after_its_attempts(store: Store) {
    let items = ["a", "b"].map(|key| NewItem::new(key, "1"));
    let new = NewRun::new("t", "p").max_attempts(2).items(items);
    let run = store.create_run(new).await.unwrap().run;
    for (attempt, handling) in [(1, Handling::Normal), (2, Handling::LastAttempt)] {
        let dying = lease(&*store).await;
        let claim = Claim::new(["p"], 1).handling(handling);
        let held = store.claim(dying, claim).await.unwrap().remove(0);
        assert_eq!(
            (held.seq, held.attempt, held.handling),
            (0, attempt, handling)
        );
        assert_eq!(
            store.reap().await.unwrap(),
            Reaped::default(),
            "it is alive"
        );
        store.heartbeat(dying, Duration::ZERO).await.unwrap();
        let reaped = store.reap().await.unwrap();
        assert_eq!(reaped.requeued + reaped.failed, 1);
        assert_eq!(reaped.failed, u64::from(attempt == 2));
        assert_eq!(commit(&store, vec![done(held.hold())]).await, 0);
    }
    let kept = read(&*store, run).await;
    assert_eq!((kept.status, kept.failed), (Status::Processing, 1));
    let failed = store.items(run, 0, 1).await.unwrap().remove(0);
    assert_eq!(failed.error.unwrap().kind(), ErrorKind::LeaseLost);
    assert!(!store.has_suspects(&["p".into()]).await.unwrap());

    let last = claim(&store, lease(&*store).await, 5).await;
    assert_eq!(commit(&store, vec![done(last[0].hold())]).await, 1);
    assert_eq!(read(&*store, run).await.status, Status::Failed);
    // A retried item is still run alone.
    assert_eq!(store.retry_failed(run).await.unwrap(), 1);
    let again = super::claim_any(&*store, lease(&*store).await, 5).await;
    assert_eq!(
        (again.len(), again[0].attempt, again[0].handling),
        (1, 1, Handling::Alone)
    );
}

/// However often the worker dies: one of the other items may have ended the process.
pub(super) async fn an_item_never_fails_for_a_worker_that_held_others_too(store: Store) {
    let items = (0..3).map(|n| NewItem::new(n.to_string(), "1"));
    let new = NewRun::new("t", "p").max_attempts(1).items(items);
    let run = store.create_run(new).await.unwrap().run;
    let mut seen = Vec::new();
    for _ in 0..4 {
        let dying = lease(&*store).await;
        let held = super::claim_any(&*store, dying, 3).await;
        assert_eq!(held.len(), 3);
        assert!(held.iter().all(|item| item.attempt == 1), "{held:?}");
        assert!(held.iter().all(|item| item.handling == held[0].handling));
        seen.push(held[0].handling);
        assert!(
            !store.has_suspects(&["p".into()]).await.unwrap(),
            "all are held"
        );
        store.heartbeat(dying, Duration::ZERO).await.unwrap();
        let reaped = store.reap().await.unwrap();
        assert_eq!((reaped.requeued, reaped.failed), (3, 0));
        assert!(store.has_suspects(&["q".into(), "p".into()]).await.unwrap());
        assert!(!store.has_suspects(&["q".into()]).await.unwrap());
        assert!(!store.has_suspects(&[]).await.unwrap());
    }
    let last = Handling::LastAttempt;
    assert_eq!(seen, [Handling::Normal, Handling::Few, last, last]);
    let left = store.items(run, 0, 3).await.unwrap();
    assert!(left.iter().all(|item| item.attempt == 0));
}

pub(super) async fn released_items_come_back_when_their_delay_is_over(store: Store) {
    create(&*store, "a", 3).await;
    let lease = lease(&*store).await;
    let items = claim(&store, lease, 3).await;
    let delays = [Duration::ZERO, Duration::from_millis(1), LONG];
    for (item, delay) in items.iter().zip(delays) {
        assert_eq!(
            store
                .release(&[item.hold()], delay, delay == LONG)
                .await
                .unwrap(),
            1
        );
    }
    let now = claim(&store, lease, 3).await;
    assert_eq!(
        now.iter()
            .map(|item| (item.seq, item.attempt))
            .collect::<Vec<_>>(),
        [(0, 1)]
    );
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert_eq!(
        store.reap().await.unwrap(),
        Reaped {
            due: 1,
            ..Reaped::default()
        }
    );
    let due = claim(&store, lease, 3).await;
    assert_eq!(
        due.iter()
            .map(|item| (item.seq, item.attempt))
            .collect::<Vec<_>>(),
        [(1, 1)]
    );
    let delayed = store.items(items[0].run, 2, 1).await.unwrap().remove(0);
    assert_eq!((delayed.status, delayed.attempt), (Status::Pending, 1));
    assert_eq!(store.cancel(items[0].run).await.unwrap(), 3);
}

pub(super) async fn a_cancelled_run_stops_at_once(store: Store) {
    let (run, other) = (create(&*store, "a", 4).await, create(&*store, "a", 1).await);
    let holder = lease(&*store).await;
    let items = claim(&store, holder, 2).await;
    assert_eq!(commit(&store, vec![done(items[0].hold())]).await, 1);
    assert_eq!(store.cancel(run).await.unwrap(), 3);
    let kept = read(&*store, run).await;
    assert_eq!(
        (kept.status, kept.completed, kept.cancelled),
        (Status::Cancelled, 1, 3)
    );
    let lost = store.lost(holder, &[items[1].hold()]).await.unwrap();
    assert_eq!(lost, [items[1].id]);
    assert_eq!(commit(&store, vec![done(items[1].hold())]).await, 0);
    assert_eq!(store.cancel(run).await.unwrap(), 0);
    assert_eq!(store.retry_failed(run).await.unwrap(), 0);
    assert_eq!(read(&*store, run).await.log_seq, kept.log_seq);
    let log = log(&store, run).await;
    assert_eq!(
        log[log.len() - 2..],
        [
            entry("cancelled", json!({"items": 3})),
            entry("ended", json!({"status": "cancelled"}))
        ]
    );
    let left = claim(&store, lease(&*store).await, 5).await;
    assert_eq!(
        left.iter().map(|item| item.run).collect::<Vec<_>>(),
        [other]
    );
    assert_eq!(store.cancel(RunId(other.0 + 1000)).await.unwrap(), 0);
}

pub(super) async fn failed_items_can_be_retried(store: Store) {
    let run = create(&*store, "a", 3).await;
    let lease = lease(&*store).await;
    let items = claim(&store, lease, 3).await;
    let fail = |item: &Item| settle(item.hold(), Err(broken("b")));
    commit(
        &store,
        vec![done(items[0].hold()), fail(&items[1]), fail(&items[2])],
    )
    .await;
    assert_eq!(read(&*store, run).await.status, Status::Failed);

    assert_eq!(store.retry_failed(run).await.unwrap(), 2);
    assert_eq!(store.retry_failed(run).await.unwrap(), 0);
    let kept = read(&*store, run).await;
    assert_eq!(
        (kept.status, kept.completed, kept.failed),
        (Status::Pending, 1, 0)
    );
    assert!(kept.error.is_none() && kept.ended_at.is_none());
    let again = claim(&store, lease, 3).await;
    assert_eq!(
        again
            .iter()
            .map(|item| (item.seq, item.attempt))
            .collect::<Vec<_>>(),
        [(1, 1), (2, 1)]
    );
    assert_eq!(
        commit(&store, again.iter().map(|item| done(item.hold())).collect()).await,
        2
    );
    let kept = read(&*store, run).await;
    assert_eq!((kept.status, kept.completed), (Status::Completed, 3));
    let kinds: Vec<_> = log(&store, run)
        .await
        .into_iter()
        .map(|(kind, _)| kind)
        .collect();
    assert_eq!(
        kinds,
        [
            "created", "started", "settled", "ended", "retried", "started", "settled", "ended"
        ]
    );
}

pub(super) async fn intents_of_items_without_a_live_lease_are_ambiguous(store: Store) {
    create(&*store, "a", 3).await;
    let (alive, dying) = (lease(&*store).await, lease(&*store).await);
    let mut items = claim(&store, alive, 1).await;
    items.extend(claim(&store, dying, 2).await);
    let intent = |n: usize, attempt, of: u8, provider_ref: Option<&str>| Intent {
        item: items[n].id,
        attempt,
        key: key(of),
        provider_ref: provider_ref.map(str::to_owned),
    };
    let intents = [
        intent(0, 1, 1, None),
        intent(1, 1, 3, None),
        intent(1, 1, 2, None),
        intent(2, 1, 4, None),
    ];
    store.put_intents(&intents).await.unwrap();
    store
        .put_intents(&[intent(2, 1, 4, Some("batch_1"))])
        .await
        .unwrap();
    assert!(
        store.ambiguous_intents(None, 10).await.unwrap().is_empty(),
        "all are held"
    );

    store.heartbeat(dying, Duration::ZERO).await.unwrap();
    let open = [
        intent(1, 1, 2, None),
        intent(1, 1, 3, None),
        intent(2, 1, 4, Some("batch_1")),
    ];
    assert_eq!(store.ambiguous_intents(None, 10).await.unwrap(), open);
    let of = async |filter: IntentFilter| store.intents(filter, 10).await.unwrap();
    let ids = open.iter().map(|intent| intent.item);
    assert_eq!(of(IntentFilter::items(ids.clone())).await, open);
    let second = IntentFilter::items(ids).after(open[0].name());
    assert_eq!(of(second).await, open[1..]);
    let held = IntentFilter::items([items[0].id]);
    assert_eq!(of(held.clone()).await, [intents[0].clone()]);
    let unheld = IntentFilter {
        unheld: true,
        ..held
    };
    assert!(of(unheld).await.is_empty());
    let unknown = crate::store::ItemId(i64::MAX);
    assert!(of(IntentFilter::items([unknown])).await.is_empty());
    assert!(of(IntentFilter::items([])).await.is_empty());
    store.reap().await.unwrap();
    assert_eq!(store.ambiguous_intents(None, 10).await.unwrap(), open);
    assert_eq!(store.ambiguous_intents(None, 2).await.unwrap(), open[..2]);
    assert_eq!(
        store
            .ambiguous_intents(Some(open[1].name()), 2)
            .await
            .unwrap(),
        open[2..]
    );

    let ended = Commit::new()
        .generations(vec![generation("a", 1, "1")])
        .ended_intents(vec![intents[0].name(), open[0].name(), open[2].name()]);
    store.commit(ended).await.unwrap();
    assert_eq!(store.ambiguous_intents(None, 10).await.unwrap(), open[1..2]);

    // A retry removes the intent of an item that failed because of its call, and no other.
    let items = super::claim_any(&*store, alive, 2).await;
    let other = items.iter().find(|item| item.id != open[1].item).unwrap();
    let stays = Intent {
        item: other.id,
        ..intents[0].clone()
    };
    store
        .put_intents(std::slice::from_ref(&stays))
        .await
        .unwrap();
    let failed = items.iter().find(|item| item.id == open[1].item).unwrap();
    let results = vec![
        settle(
            failed.hold(),
            Err(Error::new(ErrorKind::LeaseLost, "sent before")),
        ),
        settle(other.hold(), Err(broken("its parser"))),
    ];
    assert_eq!(commit(&store, results).await, 2);
    assert_eq!(store.retry_failed(failed.run).await.unwrap(), 2);
    assert_eq!(store.ambiguous_intents(None, 10).await.unwrap(), [stays]);
}
