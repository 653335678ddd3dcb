//! Runs and commits for the tests of both SQL stores, and checks that both pass.

use std::time::Duration;

use throughline::store::{
    Claim, Commit, Generation, Handling, Intent, IntentName, Item, MemoKey, NewItem, NewRun, Queue,
    Settlement, Status, StoreExt as _,
};
use throughline::testing::store;
use throughline::{Error, ErrorKind, Request, Usage};

pub const LONG: Duration = Duration::from_secs(3600);

pub fn run_of(n: usize) -> NewRun {
    let items = (0..n).map(|i| NewItem::new(format!("k{i}"), format!("{{\"n\":{i}}}")));
    NewRun::new("a", "p").items(items)
}

pub fn done(items: &[Item]) -> Commit {
    Commit::new().settlements(
        items
            .iter()
            .map(|item| Settlement::new(item.hold(), Ok("1".to_owned()))),
    )
}

/// N results take ⌈N / batch⌉ round trips.
pub async fn a_batch_takes_one_round_trip(store: &dyn Queue, round_trips: impl Fn() -> u64) {
    const N: u64 = 1_000;
    const BATCH: u32 = 256;
    let lease = store.register("w", LONG).await.unwrap();
    let before = round_trips();
    let run = store.create_run(run_of(N as usize)).await.unwrap().run;
    assert_eq!(round_trips() - before, 1);
    for expected in 1..=N.div_ceil(BATCH.into()) {
        let claimed = store.claim(lease, Claim::new(["p"], BATCH)).await.unwrap();
        store.commit(done(&claimed)).await.unwrap();
        assert_eq!(round_trips() - before, 1 + 2 * expected);
    }
    let kept = store.run(run).await.unwrap().unwrap();
    assert_eq!((kept.status, kept.completed), (Status::Completed, N));
}

/// The newest version of the tables.
pub const VERSION: u32 = 2;

/// The path of what a release with this version of the tables has written. `store-v1.sql` is an exception: it has the rows
/// of `store-v1.db` in the tables of Postgres' first migration.
pub fn fixture(version: u32, extension: &str) -> String {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");
    format!("{folder}/store-v{version}.{extension}")
}

fn generation(n: u8) -> Generation {
    let mut generation = Generation::new(
        "a",
        MemoKey::new([n; 32]),
        Request::new("a").digest(),
        "\"paid\"",
        Usage::new(1, 2),
    );
    generation.cost_micros = Some(3);
    generation
}

/// Writes the content of a fixture into an empty store. Write fixtures once after the version was raised, before the
/// release. A fixture is never written again, because it must show how that release wrote its tables.
pub async fn fill_fixture(store: &dyn Queue) {
    // Two items whose worker died, which workers take a few at a time since version 2.
    let suspects = NewRun::new("a", "q").items(["x", "y"].map(|key| NewItem::new(key, "1")));
    store.create_run(suspects).await.unwrap();
    let dying = store.register("dying", LONG).await.unwrap();
    let held = store.claim(dying, Claim::new(["q"], 2)).await.unwrap();
    assert_eq!(held.len(), 2);
    store.heartbeat(dying, Duration::ZERO).await.unwrap();
    assert_eq!(store.reap().await.unwrap().requeued, 2);

    let run = run_of(6).idempotency_key("once");
    store.create_run(run).await.unwrap();
    let lease = store.register("w", Duration::from_secs(1)).await.unwrap();
    let items = store.claim(lease, Claim::new(["p"], 4)).await.unwrap();
    let name = IntentName {
        item: items[3].id,
        attempt: 1,
        key: MemoKey::new([9; 32]),
    };
    let intent = Intent::new(name).provider_ref("batch_1");
    store.put_intents(&[intent]).await.unwrap();
    let error = Error::new(ErrorKind::Timeout, "late").with_http_status(504);
    let commit = done(&items[..1])
        .settlements([Settlement::new(items[1].hold(), Err(error))])
        .generations([generation(1)]);
    store.commit(commit).await.unwrap();
    let soon = Duration::from_millis(1);
    store.release(&[items[2].hold()], soon, true).await.unwrap();
}

/// A store that was opened on a fixture has the run that [`fill_fixture`] wrote, and workers complete it.
pub async fn the_run_of_the_fixture_goes_on(store: &dyn Queue, version: u32) {
    let same = run_of(1).idempotency_key("once");
    let again = store.create_run(same).await.unwrap();
    assert!(!again.new);
    let run = store.run(again.run).await.unwrap().unwrap();
    assert_eq!(
        (run.status, run.total, run.completed, run.failed),
        (Status::Processing, 6, 1, 1)
    );
    let error = run.error.unwrap();
    assert_eq!(
        (error.kind(), error.http_status()),
        (ErrorKind::Timeout, Some(504))
    );
    let key = MemoKey::new([1; 32]);
    let kept = store.generations("a", &[key]).await.unwrap();
    assert_eq!(kept, [generation(1)]);
    let open = store.ambiguous_intents(None, 10).await.unwrap();
    assert_eq!(open[0].provider_ref.as_deref(), Some("batch_1"));
    let suspects = store.has_suspects(&["q".to_owned()]).await.unwrap();
    assert_eq!(suspects, version > 1);
    store::audit(store).await;

    // The lease of its worker expired long ago.
    let reaped = store.reap().await.unwrap();
    assert_eq!((reaped.leases, reaped.requeued, reaped.due), (1, 1, 1));
    let lease = store.register("w", LONG).await.unwrap();
    let claim = Claim::new(["p"], 10);
    let mut rest = store.claim(lease, claim.clone()).await.unwrap();
    // The worker held one item only.
    let alone = claim.handling(Handling::Alone);
    rest.extend(store.claim(lease, alone).await.unwrap());
    let attempts: Vec<_> = rest.iter().map(|item| item.attempt).collect();
    assert_eq!(attempts, [2, 1, 1, 2]);
    store.commit(done(&rest)).await.unwrap();
    assert_eq!(store.retry_failed(run.id).await.unwrap(), 1);
    let failed = store.claim(lease, Claim::new(["p"], 10)).await.unwrap();
    store.commit(done(&failed)).await.unwrap();
    let run = store.run(run.id).await.unwrap().unwrap();
    assert_eq!((run.status, run.completed), (Status::Completed, 6));
    store::audit(store).await;
}
