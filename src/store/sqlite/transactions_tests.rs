//! Tests of transactions that do not complete: on a full disk, and when their future is dropped.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;

use sqlx::AssertSqlSafe;

use super::Sqlite;
use crate::store::{Commit, NewItem, NewRun, RunId, Settlement, Status, Store as _, StoreExt as _};

fn run_of(items: usize) -> NewRun {
    let input = format!("\"{}\"", "x".repeat(1000));
    let items = (0..items).map(|n| NewItem::new(format!("k{n}"), &*input));
    NewRun::new("a", "p").items(items)
}

/// Lets the file grow by at most this many pages, for the present connection of the writer.
async fn limit(store: &Sqlite, pages: i64) {
    let mut writer = store.0.writer.acquire().await.unwrap();
    let count = sqlx::query_scalar::<_, i64>("PRAGMA page_count");
    let count = count.fetch_one(&mut *writer).await.unwrap();
    let limit = AssertSqlSafe(format!("PRAGMA max_page_count = {}", count + pages));
    sqlx::raw_sql(limit).execute(&mut *writer).await.unwrap();
}

#[tokio::test]
async fn a_full_disk_is_a_temporary_error_and_later_writes_succeed() {
    let dir = tempfile::tempdir().unwrap();
    let store = Sqlite::open(dir.path().join("full.db")).await.unwrap();
    let first = store.create_run(run_of(3)).await.unwrap().run;
    let mut expected = vec![first];
    // The disk is full at the first statement of a transaction, or at a later one.
    for pages in [0, 1, 20, 200] {
        limit(&store, pages).await;
        let error = store.create_run(run_of(2000)).await.unwrap_err();
        assert!(error.is_temporary(), "{error:?}");
        assert_eq!(error.code(), Some("13"), "{error:?}");
        // The failed transaction has closed the connection with the limit, so the disk has space again.
        expected.push(store.create_run(run_of(3)).await.unwrap().run);
    }
    let mut kept: Vec<_> = store.runs(Default::default(), 100).await.unwrap();
    kept.reverse();
    let ids: Vec<RunId> = kept.iter().map(|run| run.id).collect();
    assert_eq!(ids, expected);
    assert!(kept.iter().all(|run| run.total == 3));

    let items = store.items(first, 0, 3).await.unwrap();
    limit(&store, 0).await;
    let settle = |text: String| {
        Commit::new().settlements(items.iter().map(|item| Settlement {
            hold: item.hold(),
            result: Ok(text.clone()),
        }))
    };
    let large = store.commit(settle("x".repeat(100_000))).await;
    assert!(large.unwrap_err().is_temporary());
    let settled = store.commit(settle("1".to_owned())).await.unwrap();
    assert_eq!(settled.items.len(), 3);
    let kept = store.run(first).await.unwrap().unwrap();
    assert_eq!((kept.completed, kept.log_seq), (3, 3));
}

/// Polls a future at most `polls` times, each time that it wakes, and drops it. Returns whether it was ready.
async fn polled(future: impl Future, polls: usize) -> bool {
    let mut future = pin!(future);
    let mut left = polls;
    poll_fn(|cx| {
        left -= 1;
        match future.as_mut().poll(cx) {
            Poll::Ready(_) => Poll::Ready(true),
            Poll::Pending if left == 0 => Poll::Ready(false),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

#[tokio::test]
async fn a_transaction_that_is_dropped_at_any_poll_is_rolled_back_and_disturbs_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let store = Sqlite::open(dir.path().join("dropped.db")).await.unwrap();
    let mut dropped = 0;
    let mut written = Vec::new();
    for polls in 1..60 {
        // At least four statements between `BEGIN` and `COMMIT`.
        let large = run_of(1200);
        let whole = polled(store.0.write_run(&large), polls).await;
        // A later write is acknowledged and visible to readers.
        let run = store.create_run(run_of(2)).await.unwrap().run;
        let read = store.run(run).await.unwrap().unwrap();
        assert_eq!(read.total, 2);
        written.push(run);
        let cancelled = polled(store.0.write_cancel(run), polls).await;
        let items = store.items(run, 0, 2).await.unwrap();
        let over = items.iter().filter(|item| item.status.is_over()).count();
        let read = store.run(run).await.unwrap().unwrap();
        assert!([0, 2].contains(&over), "half of a run is cancelled");
        assert!(!cancelled || read.status == Status::Cancelled);
        dropped += usize::from(!whole) + usize::from(!cancelled);
    }
    assert!(dropped > 10, "{dropped} were dropped");
    let kept = store.runs(Default::default(), 1000).await.unwrap();
    assert!(kept.iter().all(|run| [2, 1200].contains(&run.total)));
    let ids: Vec<_> = kept.iter().map(|run| run.id).collect();
    assert!(written.iter().all(|run| ids.contains(run)), "a run is lost");
}
