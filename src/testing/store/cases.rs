//! Cases about runs, commits, generations and logs.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::{LONG, all_items, create, lease, read};
use crate::error::{Error, ErrorKind, Result};
use crate::request::Request;
use crate::request::RequestDigest;
use crate::request::Usage;
use crate::store::{
    Claim, Commit, Generation, Hold, Intent, IntentFilter, Item, MemoKey, NewItem, NewRun, Note,
    Queue, QueueExt as _, RunFilter, RunId, Settlement, Status, StoreExt as _,
};

pub(super) type Store = Arc<dyn Queue>;

fn digest() -> RequestDigest {
    Request::new("a").digest()
}

pub(super) fn key(n: u8) -> MemoKey {
    MemoKey::new([n; 32])
}

pub(super) fn generation(tenant: &str, n: u8, body: &str) -> Generation {
    let mut usage = Usage::new(u64::from(n), 7);
    usage.reasoning_tokens = 3;
    Generation {
        tenant: tenant.to_owned(),
        key: key(n),
        request: digest(),
        body: body.to_owned(),
        usage,
        cost_micros: (n % 2 == 1).then_some(1_234_567),
    }
}

pub(super) fn settle(hold: Hold, result: Result<String>) -> Settlement {
    Settlement { hold, result }
}

pub(super) fn done(hold: Hold) -> Settlement {
    settle(hold, Ok("\"out\"".to_owned()))
}

pub(super) fn broken(why: &str) -> Error {
    Error::new(ErrorKind::MalformedReply, why).with_request_id("req_1")
}

pub(super) async fn commit(store: &Store, settlements: Vec<Settlement>) -> usize {
    let commit = Commit::new().settlements(settlements);
    store.commit(commit).await.unwrap().items.len()
}

pub(super) async fn claim(store: &Store, lease: crate::store::LeaseId, n: u32) -> Vec<Item> {
    store.claim(lease, Claim::new(["p"], n)).await.unwrap()
}

pub(super) async fn log(store: &Store, run: RunId) -> Vec<(String, Value)> {
    let entries = store.log(run, 0, 1000).await.unwrap();
    let data = |text: &str| serde_json::from_str(text).unwrap();
    entries
        .into_iter()
        .map(|e| (e.kind, data(&e.data)))
        .collect()
}

pub(super) fn entry(kind: &str, data: Value) -> (String, Value) {
    (kind.to_owned(), data)
}

pub(super) async fn a_run_is_stored_unchanged(store: Store) {
    let odd = "\u{1F30A} ' \" \\ \u{1} \u{7f} \u{feff} \n\r\t $1 ?1 {} %s -- \u{10FFFF}";
    let large = "x".repeat(1 << 20);
    let items = [
        NewItem::new(odd, json!({ "odd": odd }).to_string()),
        NewItem::new("", "\"\""),
        NewItem::new("k", json!(large).to_string()),
        NewItem::new("k", "{\"b\": 1.0, \"a\":1e400}"),
    ];
    let new = NewRun::new(odd, odd)
        .spec(json!([odd]).to_string())
        .items(items.clone());
    let created = store
        .create_run(new.priority(-5).max_attempts(9))
        .await
        .unwrap();
    assert!(created.new && created.run.0 > 0);

    let run = read(&*store, created.run).await;
    assert_eq!((&*run.tenant, &*run.name), (odd, odd));
    assert_eq!(run.spec, json!([odd]).to_string());
    assert_eq!(
        (run.status, run.total, run.ended()),
        (Status::Pending, 4, 0)
    );
    assert!(run.error.is_none() && run.ended_at.is_none());
    let kept = store.items(created.run, 0, 100).await.unwrap();
    for (item, new) in kept.iter().zip(&items) {
        assert_eq!((&item.key, &item.input), (&new.key, &new.input));
        assert_eq!(
            (item.status, item.epoch, item.attempt),
            (Status::Pending, 0, 0)
        );
        assert_eq!((&*item.tenant, item.max_attempts), (odd, 9));
    }
    let page = store.items(created.run, 1, 2).await.unwrap();
    assert_eq!(page.iter().map(|item| item.seq).collect::<Vec<_>>(), [1, 2]);
    assert!(store.items(created.run, 4, 2).await.unwrap().is_empty());
    assert_eq!(
        log(&store, created.run).await,
        [entry("created", json!({"total": 4}))]
    );

    let nobody = RunId(created.run.0 + 1000);
    assert!(store.run(nobody).await.unwrap().is_none());
    assert!(store.items(nobody, 0, 10).await.unwrap().is_empty());
    assert!(store.log(nobody, 0, 10).await.unwrap().is_empty());

    let out = json!([odd]).to_string();
    let pipelines = [odd];
    let claimed = Claim::new(pipelines, 1);
    let claimed = store.claim(lease(&*store).await, claimed).await.unwrap();
    assert_eq!(
        commit(&store, vec![settle(claimed[0].hold(), Ok(out.clone()))]).await,
        1
    );
    assert_eq!(
        store.items(created.run, 0, 1).await.unwrap()[0].output,
        Some(out)
    );
}

pub(super) async fn a_run_without_items_is_completed(store: Store) {
    let run = read(&*store, create(&*store, "", 0).await).await;
    assert_eq!((run.status, run.total), (Status::Completed, 0));
    assert!(run.ended_at.is_some());
    let ended = entry("ended", json!({"status": "completed"}));
    assert_eq!(
        log(&store, run.id).await,
        [entry("created", json!({"total": 0})), ended]
    );
}

pub(super) async fn creating_a_run_twice_is_harmless(store: Store) {
    let new = |tenant: &str, n: usize| {
        let items = (0..n).map(|i| NewItem::new(i.to_string(), "1"));
        NewRun::new(tenant, "p")
            .items(items)
            .idempotency_key("once")
    };
    let first = store.create_run(new("a", 2)).await.unwrap();
    let again = store.create_run(new("a", 3)).await.unwrap();
    let other = store.create_run(new("b", 1)).await.unwrap();
    assert!(first.new && !again.new && other.new);
    assert_eq!(first.run, again.run);
    assert_ne!(first.run, other.run);
    assert_eq!(read(&*store, first.run).await.total, 2);
    assert_eq!(claim(&store, lease(&*store).await, 10).await.len(), 3);
}

pub(super) async fn data_that_a_backend_cannot_keep_is_refused(store: Store) {
    let refused = |result: Result<()>| {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Config);
    };
    let create = async |new: NewRun| store.create_run(new).await.map(drop);
    refused(create(NewRun::new("a\0", "p")).await);
    refused(create(NewRun::new("a", "p").items([NewItem::new("k", "\0")])).await);
    refused(create(NewRun::new("a", "p").max_attempts(0)).await);
    refused(create(NewRun::new("a".repeat(1025), "p")).await);
    refused(create(NewRun::new("a", "p").idempotency_key("k".repeat(1025))).await);
    assert!(
        store
            .runs(RunFilter::default(), 10)
            .await
            .unwrap()
            .is_empty()
    );

    let run = super::create(&*store, "", 1).await;
    let hold = store.items(run, 0, 1).await.unwrap()[0].hold();
    let twice = Commit::new().settlements(vec![done(hold), settle(hold, Err(broken("b")))]);
    refused(store.commit(twice).await.map(drop));
    assert_eq!(read(&*store, run).await.ended(), 0);

    // An empty write is no error.
    assert!(
        store
            .commit(Commit::default())
            .await
            .unwrap()
            .items
            .is_empty()
    );
    store.put_intents(&[]).await.unwrap();
    assert!(store.generations("", &[]).await.unwrap().is_empty());
    assert_eq!(store.release(&[], LONG, true).await.unwrap(), 0);
    assert!(claim(&store, lease(&*store).await, 0).await.is_empty());
}

pub(super) async fn runs_are_listed_newest_first_and_by_page(store: Store) {
    let mut ids = Vec::new();
    for (tenant, n) in [("a", 0), ("b", 1), ("a", 1), ("a", 0), ("b", 0)] {
        ids.push(create(&*store, tenant, n).await);
    }
    let list = async |tenant: Option<&str>, status, before, limit| {
        let filter = RunFilter {
            tenant: tenant.map(str::to_owned),
            status,
            before,
            ..RunFilter::default()
        };
        let runs = store.runs(filter, limit).await.unwrap();
        runs.iter().map(|run| run.id).collect::<Vec<_>>()
    };
    let [a, b, c, d, e] = ids[..] else {
        unreachable!()
    };
    assert_eq!(list(None, None, None, 10).await, [e, d, c, b, a]);
    assert_eq!(list(None, None, None, 2).await, [e, d]);
    assert_eq!(list(None, None, Some(d), 2).await, [c, b]);
    assert_eq!(list(Some("a"), None, None, 10).await, [d, c, a]);
    assert_eq!(list(Some("a"), None, Some(d), 10).await, [c, a]);
    assert_eq!(
        list(Some("a"), Some(Status::Completed), None, 10).await,
        [d, a]
    );
    assert_eq!(list(None, Some(Status::Pending), None, 10).await, [c, b]);
    assert!(list(Some("c"), None, None, 10).await.is_empty());

    let by_id = async |filter: RunFilter| store.runs(filter, 10).await.unwrap().len();
    assert_eq!(by_id(RunFilter::new().id(b)).await, 1);
    assert_eq!(by_id(RunFilter::new().id(b).tenant("b")).await, 1);
    assert_eq!(by_id(RunFilter::new().id(b).tenant("a")).await, 0);
    assert_eq!(
        by_id(RunFilter::new().id(b).status(Status::Failed)).await,
        0
    );
    assert_eq!(by_id(RunFilter::new().id(b).before(b)).await, 0);
}

pub(super) async fn items_are_dealt_fairly_and_by_priority(store: Store) {
    let new = |tenant: &str, priority, n: usize| {
        let items = (0..n).map(|i| NewItem::new(format!("{tenant}{priority}.{i}"), "1"));
        NewRun::new(tenant, "p").priority(priority).items(items)
    };
    for (tenant, priority, n) in [
        ("b", 0, 100),
        ("a", 1, 2),
        ("a", -1, 2),
        ("a", 0, 1),
        ("c", 0, 1),
    ] {
        store.create_run(new(tenant, priority, n)).await.unwrap();
    }
    let lease = lease(&*store).await;
    let dealt = async |n| {
        let items = claim(&store, lease, n).await;
        let keys: Vec<_> = items.iter().map(|item| item.key.clone()).collect();
        keys.join(" ")
    };
    // Each tenant gets one item before any gets two, although b submitted a hundred first.
    assert_eq!(dealt(4).await, "a-1.0 b0.0 c0.0 a-1.1");
    assert_eq!(dealt(3).await, "b0.1 a0.0 b0.2");
    assert_eq!(dealt(4).await, "a1.0 b0.3 a1.1 b0.4");
    assert_eq!(dealt(2).await, "b0.5 b0.6");
    assert_eq!(dealt(200).await.split(' ').count(), 93);
    assert_eq!(dealt(5).await, "");
}

pub(super) async fn a_claim_takes_only_items_of_the_pipelines_it_names(store: Store) {
    for (name, tenant) in [("p", "b"), ("q", "a"), ("q", "c"), ("r", "b")] {
        let items = (0..3).map(|i| NewItem::new(format!("{name}{tenant}{i}"), "1"));
        let new = NewRun::new(tenant, name).items(items);
        store.create_run(new).await.unwrap();
    }
    let lease = lease(&*store).await;
    let dealt = async |pipelines: &[&str], limit| {
        let claim = Claim::new(pipelines, limit);
        let items = store.claim(lease, claim).await.unwrap();
        let keys: Vec<_> = items.into_iter().map(|item| item.key).collect();
        keys.join(" ")
    };
    assert_eq!(dealt(&[], 9).await, "");
    assert_eq!(dealt(&["unheard of"], 9).await, "");
    // Tenants take turns across pipelines, and a repeated name counts once.
    assert_eq!(dealt(&["q", "p", "q"], 4).await, "qa0 pb0 qc0 qa1");
    assert_eq!(dealt(&["p"], 9).await, "pb1 pb2");
    // Within a tenant the lowest number goes first, whatever the pipeline.
    assert_eq!(dealt(&["r", "p", "q"], 9).await, "qc1 qa2 rb0 qc2 rb1 rb2");
}

pub(super) async fn more_tenants_than_the_limit_take_turns(store: Store) {
    for tenant in ["", "B", "a", "\u{e9}"] {
        create(&*store, tenant, 2).await;
    }
    let lease = lease(&*store).await;
    let mut tenants = Vec::new();
    for _ in 0..3 {
        let items = claim(&store, lease, 3).await;
        assert_eq!(items.len(), if tenants.len() < 6 { 3 } else { 2 });
        tenants.extend(items.into_iter().map(|item| item.tenant));
    }
    // In byte order, round after round.
    assert_eq!(tenants, ["B", "a", "\u{e9}", "", "B", "a", "\u{e9}", ""]);
}

pub(super) async fn a_commit_counts_logs_and_ends_the_run(store: Store) {
    let (one, two) = (create(&*store, "a", 3).await, create(&*store, "a", 1).await);
    let lease = lease(&*store).await;
    let items = claim(&store, lease, 10).await;
    assert!(
        items
            .iter()
            .all(|item| (item.status, item.attempt) == (Status::Processing, 1))
    );
    assert_eq!(read(&*store, one).await.status, Status::Processing);

    let results = vec![
        settle(items[2].hold(), Err(broken("third"))),
        settle(items[0].hold(), Ok("[1]".to_owned())),
        settle(items[3].hold(), Ok("[4]".to_owned())),
    ];
    assert_eq!(commit(&store, results).await, 3);
    let run = read(&*store, one).await;
    assert_eq!(
        (run.status, run.completed, run.failed),
        (Status::Processing, 1, 1)
    );
    assert_eq!(
        run.error.as_ref().unwrap().to_string(),
        broken("third").to_string()
    );
    let run = read(&*store, two).await;
    assert_eq!(
        (run.status, run.completed, run.total),
        (Status::Completed, 1, 1)
    );
    assert!(run.ended_at.unwrap() >= run.created_at && run.error.is_none());

    assert_eq!(
        commit(&store, vec![settle(items[1].hold(), Err(broken("second")))]).await,
        1
    );
    let run = read(&*store, one).await;
    assert_eq!(
        (run.status, run.completed, run.failed),
        (Status::Failed, 1, 2)
    );
    assert_eq!(
        run.error.unwrap().message(),
        "third",
        "the error of the first item to fail, not of the first item"
    );
    let kept = all_items(&*store, one).await;
    assert_eq!(kept[0].output.as_deref(), Some("[1]"));
    assert_eq!(kept[1].error.as_ref().unwrap().request_id(), Some("req_1"));
    assert_eq!(
        log(&store, one).await,
        [
            entry("created", json!({"total": 3})),
            entry("started", json!({})),
            entry("settled", json!({"completed": [0], "failed": [2]})),
            entry("settled", json!({"completed": [], "failed": [1]})),
            entry("ended", json!({"status": "failed"})),
        ]
    );
    let page = store.log(one, 2, 2).await.unwrap();
    assert_eq!(
        page.iter().map(|entry| entry.seq).collect::<Vec<_>>(),
        [3, 4]
    );
}

pub(super) async fn a_commit_sent_again_changes_nothing(store: Store) {
    let run = create(&*store, "a", 2).await;
    let items = claim(&store, lease(&*store).await, 2).await;
    let first = Commit::new()
        .settlements(vec![done(items[0].hold())])
        .generations(vec![generation("a", 1, "1")]);
    let committed = store.commit(first.clone()).await.unwrap();
    assert_eq!(
        (committed.items, committed.generations),
        (vec![items[0].id], 1)
    );
    let before = read(&*store, run).await;
    let committed = store.commit(first).await.unwrap();
    assert_eq!((committed.items, committed.generations), (vec![], 0));
    let after = read(&*store, run).await;
    assert_eq!(
        (after.completed, after.log_seq),
        (before.completed, before.log_seq)
    );
    // Another result for the present epoch changes nothing either, because the item has ended.
    let now = store.items(run, 0, 1).await.unwrap()[0].hold();
    assert_eq!(
        commit(&store, vec![settle(now, Err(broken("late")))]).await,
        0
    );
    assert_eq!(
        store.release(&[now], Duration::ZERO, true).await.unwrap(),
        0
    );
}

pub(super) async fn a_lost_item_cannot_be_committed_but_its_generation_is_kept(store: Store) {
    let run = create(&*store, "a", 1).await;
    let lease = lease(&*store).await;
    let slow = claim(&store, lease, 1).await.remove(0);
    assert!(store.lost(lease, &[slow.hold()]).await.unwrap().is_empty());
    assert_eq!(
        store
            .release(&[slow.hold()], Duration::ZERO, true)
            .await
            .unwrap(),
        1
    );
    let quick = claim(&store, lease, 1).await.remove(0);
    assert!(quick.epoch > slow.epoch && quick.attempt == 2);
    assert_eq!(
        store
            .lost(lease, &[slow.hold(), quick.hold()])
            .await
            .unwrap(),
        [slow.id]
    );

    let late = Commit::new()
        .settlements(vec![done(slow.hold())])
        .generations(vec![generation("a", 1, "\"paid\"")]);
    let committed = store.commit(late).await.unwrap();
    assert_eq!((committed.items, committed.generations), (vec![], 1));
    let kept = store.generations("a", &[key(1)]).await.unwrap();
    assert_eq!(kept, [generation("a", 1, "\"paid\"")]);
    assert_eq!(
        store
            .release(&[slow.hold()], Duration::ZERO, true)
            .await
            .unwrap(),
        0
    );
    assert_eq!(commit(&store, vec![done(quick.hold())]).await, 1);
    assert_eq!(read(&*store, run).await.completed, 1);
}

pub(super) async fn the_first_generation_under_a_key_stays(store: Store) {
    let commit = Commit::new().generations(vec![
        generation("a", 1, "first"),
        generation("a", 1, "second"),
        generation("b", 1, "another tenant's"),
        generation("a", 2, "two"),
    ]);
    assert_eq!(store.commit(commit).await.unwrap().generations, 3);
    let commit =
        Commit::new().generations([generation("a", 2, "late"), generation("a", 3, "three")]);
    assert_eq!(store.commit(commit).await.unwrap().generations, 1);

    let keys = [key(3), key(9), key(1), key(2), key(1)];
    let mut found = store.generations("a", &keys).await.unwrap();
    found.sort_by_key(|generation| generation.key);
    let bodies = [
        generation("a", 1, "first"),
        generation("a", 2, "two"),
        generation("a", 3, "three"),
    ];
    assert_eq!(found, bodies);
    assert_eq!(
        store.generations("b", &keys).await.unwrap()[0].body,
        "another tenant's"
    );
    assert!(store.generations("c", &keys).await.unwrap().is_empty());
}

pub(super) async fn unclaimed_items_can_be_committed_against_their_epoch(store: Store) {
    let run = create(&*store, "a", 2).await;
    let items = all_items(&*store, run).await;
    assert_eq!(commit(&store, vec![done(items[1].hold())]).await, 1);
    assert_eq!(read(&*store, run).await.status, Status::Processing);
    let claimed = claim(&store, lease(&*store).await, 5).await;
    assert_eq!(claimed.iter().map(|item| item.seq).collect::<Vec<_>>(), [0]);
    assert_eq!(
        commit(&store, vec![done(items[0].hold())]).await,
        0,
        "it has been claimed since"
    );
}

pub(super) async fn notes_are_logged_in_order(store: Store) {
    let (run, other) = (create(&*store, "a", 1).await, create(&*store, "a", 0).await);
    let items = claim(&store, lease(&*store).await, 1).await;
    let note = |run, kind: &str, n: u32| Note {
        run,
        kind: kind.to_owned(),
        data: json!({ "n": n }).to_string(),
    };
    let commit = Commit::new()
        .notes(vec![
            note(run, "x", 1),
            note(other, "y", 2),
            note(run, "x", 3),
            note(RunId(other.0 + 99), "z", 4),
        ])
        .settlements(vec![done(items[0].hold())]);
    store.commit(commit).await.unwrap();
    assert_eq!(
        log(&store, run).await[2..],
        [
            entry("x", json!({"n": 1})),
            entry("x", json!({"n": 3})),
            entry("settled", json!({"completed": [0], "failed": []})),
            entry("ended", json!({"status": "completed"})),
        ]
    );
    assert_eq!(log(&store, other).await[2..], [entry("y", json!({"n": 2}))]);
}

pub(super) async fn old_runs_and_generations_are_purged(store: Store) {
    let (old, _older) = (create(&*store, "a", 2).await, create(&*store, "a", 0).await);
    let live = create(&*store, "b", 1).await;
    let items = all_items(&*store, old).await;
    let intent = Intent {
        item: items[0].id,
        attempt: 1,
        key: key(1),
        provider_ref: None,
    };
    store.put_intents(&[intent]).await.unwrap();
    let commit = Commit::new()
        .settlements(items.iter().map(|item| done(item.hold())))
        .generations(vec![generation("a", 1, "1"), generation("a", 2, "2")]);
    store.commit(commit).await.unwrap();

    let purged = store.purge(LONG, 10).await.unwrap();
    assert_eq!((purged.runs, purged.generations), (0, 0));
    let purged = store.purge(Duration::ZERO, 1).await.unwrap();
    assert_eq!((purged.runs, purged.generations), (1, 1));
    let purged = store.purge(Duration::ZERO, 10).await.unwrap();
    assert_eq!((purged.runs, purged.generations), (1, 1));
    let left = store.runs(RunFilter::default(), 10).await.unwrap();
    assert_eq!(left.iter().map(|run| run.id).collect::<Vec<_>>(), [live]);
    assert!(store.items(old, 0, 10).await.unwrap().is_empty());
    assert!(store.log(old, 0, 10).await.unwrap().is_empty());
    assert!(store.ambiguous_intents(None, 10).await.unwrap().is_empty());
    assert!(
        store
            .generations("a", &[key(1), key(2)])
            .await
            .unwrap()
            .is_empty()
    );
}

pub(super) async fn a_purge_keeps_generations_that_a_run_may_need(store: Store) {
    let age = Duration::from_secs(1);
    let (slow, failed) = (create(&*store, "a", 2).await, create(&*store, "b", 1).await);
    let (slow, failed) = (
        all_items(&*store, slow).await,
        all_items(&*store, failed).await,
    );
    let bodies = ["a", "b", "c"].map(|tenant| generation(tenant, 1, "1"));
    let first = Commit::new().generations(bodies);
    let first = first.settlements([done(slow[0].hold())]);
    assert_eq!(store.commit(first).await.unwrap().generations, 3);
    let kept = async |tenant: &str| {
        let kept = store.generations(tenant, &[key(1)]).await;
        kept.unwrap().len()
    };
    tokio::time::sleep(age + Duration::from_millis(100)).await;

    // The run of `a` is open, that of `b` has just failed and can be retried, and `c` has none.
    let ended = std::time::Instant::now();
    let error = Err(broken("b"));
    assert_eq!(
        commit(&store, vec![settle(failed[0].hold(), error)]).await,
        1
    );
    let purged = store.purge(age, 100).await.unwrap();
    assert_eq!(purged.runs, 0);
    assert_eq!((kept("a").await, kept("c").await), (1, 0));
    // On a machine that stalls for this long the failed run is old enough to be purged.
    if ended.elapsed() < age {
        assert_eq!(kept("b").await, 1);
    }

    // No run needs the generations any more, so their age decides.
    assert_eq!(commit(&store, vec![done(slow[1].hold())]).await, 1);
    store.purge(Duration::ZERO, 100).await.unwrap();
    assert_eq!((kept("a").await, kept("b").await), (0, 0));
}

pub(super) async fn the_largest_numbers_are_accepted(store: Store) {
    let items = || [NewItem::new("k", "1")];
    let endless = NewRun::new("a", "p").max_attempts(u32::MAX).items(items());
    let run = store.create_run(endless).await.unwrap().run;
    let other = store.create_run(NewRun::new("b", "p").items(items()));
    let other = other.await.unwrap().run;
    let lease = store.register("worker", Duration::MAX).await.unwrap();
    assert!(store.heartbeat(lease, Duration::MAX).await.unwrap());
    let claimed = claim(&store, lease, u32::MAX).await;
    let most: Vec<_> = claimed
        .iter()
        .map(|item| (item.run, item.max_attempts))
        .collect();
    assert_eq!(most, [(run, i32::MAX as u32), (other, 3)]);

    let intent = Intent {
        item: claimed[0].id,
        attempt: u32::MAX,
        key: key(1),
        provider_ref: None,
    };
    let put = store.put_intents(std::slice::from_ref(&intent));
    put.await.unwrap();
    let of_item = || IntentFilter::items([claimed[0].id]);
    let listed = store.intents(of_item(), 10).await.unwrap();
    assert_eq!(listed.len(), 1);
    assert!(listed[0].attempt >= i32::MAX as u32);
    let mut usage = Usage::new(u64::MAX, u64::MAX);
    usage.reasoning_tokens = u64::MAX;
    let huge = Generation {
        usage,
        cost_micros: Some(u64::MAX),
        ..generation("a", 1, "1")
    };
    let over = Commit::new()
        .ended_intents([intent.name()])
        .generations([huge]);
    assert_eq!(store.commit(over).await.unwrap().generations, 1);
    assert!(store.intents(of_item(), 10).await.unwrap().is_empty());
    let kept = store.generations("a", &[key(1)]).await.unwrap();
    assert!(kept[0].usage.input_tokens >= i64::MAX as u64);
    assert!(kept[0].cost_micros >= Some(i64::MAX as u64));

    let holds: Vec<_> = claimed.iter().map(Item::hold).collect();
    assert_eq!(store.release(&holds, Duration::MAX, true).await.unwrap(), 2);
    assert_eq!(store.reap().await.unwrap().due, 0);
    assert!(
        store
            .items(run, u64::MAX, u32::MAX)
            .await
            .unwrap()
            .is_empty()
    );
    assert!(store.log(run, u64::MAX, u32::MAX).await.unwrap().is_empty());
    let purged = store.purge(Duration::MAX, u32::MAX).await.unwrap();
    assert_eq!((purged.runs, purged.generations), (0, 0));
}
