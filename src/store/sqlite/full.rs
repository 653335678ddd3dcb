//! A file that may not grow: what SQLite does on a full disk, without one.

use sqlx::AssertSqlSafe;

use super::Sqlite;
use crate::store::{Commit, NewItem, NewRun, RunId, Settlement, Store as _};

fn run_of(items: usize) -> NewRun {
    let input = format!("\"{}\"", "x".repeat(1000));
    let items = (0..items).map(|n| NewItem::new(format!("k{n}"), &*input));
    NewRun::new("a", "p").items(items)
}

/// Lets the file of the writer's present connection grow by this many pages and no more.
async fn limit(store: &Sqlite, pages: i64) {
    let mut writer = store.writer.acquire().await.unwrap();
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
    // It ends in the first statement of a transaction, and in a later one.
    for pages in [0, 1, 20, 200] {
        limit(&store, pages).await;
        let error = store.create_run(run_of(2000)).await.unwrap_err();
        assert!(error.is_temporary(), "{error:?}");
        assert_eq!(error.code(), Some("13"), "{error:?}");
        // The connection that was told the limit is gone, as the disk's fullness would be.
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
