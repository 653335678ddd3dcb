//! Runs and commits for the tests of both SQL stores, and a check that both pass.

use std::time::Duration;

use throughline::store::{
    Claim, Commit, Item, NewItem, NewRun, Queue, Settlement, Status, StoreExt as _,
};

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
