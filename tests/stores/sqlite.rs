//! The SQLite store: the contract of all stores, and the properties of a file.
#![cfg(all(feature = "sqlite", feature = "testing"))]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use sqlx::Connection as _;
use tempfile::TempDir;
use throughline::ErrorKind;
use throughline::store::{Claim, Durability, Queue, RunId, Sqlite, Status, Store, StoreExt as _};
use throughline::testing::store;

use crate::common::{self, LONG, done, run_of};

/// Returns a store in a new file.
async fn open(dir: &TempDir) -> Arc<Sqlite> {
    // The number of files does not serve, because the files beside a database are removed when its connections close, which
    // may be later.
    static OPENED: AtomicUsize = AtomicUsize::new(0);
    let nth = OPENED.fetch_add(1, Ordering::Relaxed);
    let path = dir.path().join(format!("{nth}.db"));
    Arc::new(Sqlite::open(path).await.unwrap())
}

/// Executes SQL on the file, past the store.
async fn raw(path: &Path, sql: &'static str) {
    let url = format!("sqlite://{}?mode=rwc", path.display());
    let mut connection = sqlx::SqliteConnection::connect(&url).await.unwrap();
    sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_store_passes_the_conformance_suite() {
    let dir = tempfile::tempdir().unwrap();
    store::conformance(async || open(&dir).await as Arc<dyn Queue>).await;
}

#[tokio::test]
async fn random_walks_agree_with_the_model() {
    let dir = tempfile::tempdir().unwrap();
    for seed in 0..12 {
        store::against_model(open(&dir).await, seed, 150).await;
    }
}

#[tokio::test]
async fn committed_data_survives_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("runs.db");
    let first = Sqlite::open(&path).await.unwrap();
    let run = first.create_run(run_of(3)).await.unwrap().run;
    let lease = first.register("w", LONG).await.unwrap();
    let items = first.claim(lease, Claim::new(["p"], 2)).await.unwrap();
    first.commit(done(&items[..1])).await.unwrap();
    drop(first);

    let quick = Sqlite::builder(&path).durability(Durability::Process);
    let second = quick.open().await.unwrap();
    let kept = second.run(run).await.unwrap().unwrap();
    assert_eq!((kept.status, kept.completed), (Status::Processing, 1));
    assert_eq!(
        second.commit(done(&items)).await.unwrap().items,
        [items[1].id]
    );
    store::audit(&second).await;
    second.close().await;
    let closed = second.run(run).await.unwrap_err();
    assert_eq!(closed.kind(), ErrorKind::Store);
}

#[tokio::test]
async fn a_file_of_another_program_or_a_newer_version_is_refused_and_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let refused = async |path: &Path| {
        let before = std::fs::read(path).unwrap();
        let error = Sqlite::open(path).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Store);
        assert!(!error.is_temporary());
        assert!(
            error.message().starts_with(&path.display().to_string()),
            "{error}"
        );
        assert_eq!(std::fs::read(path).unwrap(), before);
        error.message().to_owned()
    };

    let text = dir.path().join("notes.txt");
    std::fs::write(&text, "buy milk ".repeat(1000)).unwrap();
    assert!(refused(&text).await.contains("not a database"));

    let other = dir.path().join("other.db");
    raw(&other, "PRAGMA journal_mode = wal; CREATE TABLE runs (id)").await;
    assert!(
        refused(&other)
            .await
            .contains("not a store of this library")
    );

    let newer = dir.path().join("newer.db");
    Sqlite::open(&newer).await.unwrap().close().await;
    raw(&newer, "PRAGMA user_version = 99").await;
    let message = refused(&newer).await;
    assert!(message.contains("newer release (version 99"), "{message}");

    let nowhere = dir.path().join("no/such/folder.db");
    let error = Sqlite::open(&nowhere).await.unwrap_err();
    assert!(error.message().contains("folder.db"), "{error}");
}

#[tokio::test]
async fn a_batch_takes_one_round_trip() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir).await;
    common::a_batch_takes_one_round_trip(&*store, || store.round_trips()).await;
}

/// A dropped call takes effect wholly or not at all, and does not disturb the next one.
#[tokio::test]
async fn a_dropped_call_takes_effect_wholly_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir).await;
    let lease = store.register("w", LONG).await.unwrap();
    for pause in 0..40 {
        let run = store.create_run(run_of(50)).await.unwrap().run;
        let claimed = store.claim(lease, Claim::new(["p"], 50)).await.unwrap();
        assert_eq!(claimed.len(), 50);
        let limit = Duration::from_micros(50 * pause);
        let _ = tokio::time::timeout(limit, store.commit(done(&claimed))).await;
        let _ = tokio::time::timeout(limit, store.cancel(run)).await;
        let kept = store.run(run).await.unwrap().unwrap();
        assert!([0, 50].contains(&kept.ended()), "{kept:?}");
        store.cancel(run).await.unwrap();
    }
    store::audit(&*store).await;
}

#[tokio::test]
async fn a_database_in_memory_and_urls_are_refused() {
    for path in [
        "",
        ":memory:",
        "file:runs.db?mode=memory",
        "sqlite://runs.db",
    ] {
        let error = Sqlite::open(path).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{path:?}: {error}");
        assert!(!error.is_temporary());
    }
}

#[tokio::test]
async fn a_call_waits_for_a_lock_as_long_as_the_busy_timeout() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("busy.db");
    let store = Sqlite::builder(&path).busy_timeout(Duration::from_secs(1));
    let store = store.open().await.unwrap();
    let url = format!("sqlite://{}", path.display());
    let mut writer = sqlx::SqliteConnection::connect(&url).await.unwrap();
    let begin = sqlx::raw_sql("BEGIN IMMEDIATE");
    begin.execute(&mut writer).await.unwrap();
    let began = std::time::Instant::now();
    let error = store.create_run(run_of(1)).await.unwrap_err();
    let waited = began.elapsed();
    assert!(
        error.is_temporary() && error.code() == Some("5"),
        "{error:?}"
    );
    let expected = Duration::from_millis(900)..Duration::from_millis(2500);
    assert!(expected.contains(&waited), "{waited:?}");
    // Readers do not wait, and later writes succeed.
    store.runs(Default::default(), 1).await.unwrap();
    let end = sqlx::raw_sql("COMMIT");
    end.execute(&mut writer).await.unwrap();
    store.create_run(run_of(1)).await.unwrap();
    let endless = Sqlite::builder(&path).busy_timeout(Duration::MAX);
    endless
        .open()
        .await
        .unwrap()
        .create_run(run_of(1))
        .await
        .unwrap();
}

/// Writes into a file without a name would be lost with the process.
#[cfg(unix)]
#[tokio::test]
async fn a_file_that_is_removed_or_replaced_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("runs.db");
    let store = Sqlite::open(&path).await.unwrap();
    store.create_run(run_of(1)).await.unwrap();
    let aside = dir.path().join("aside.db");
    std::fs::rename(&path, &aside).unwrap();
    let refused = async |why: &str| {
        let errors = [
            store.create_run(run_of(1)).await.map(drop),
            store.register("w", LONG).await.map(drop),
            store.runs(Default::default(), 1).await.map(drop),
            store.reap().await.map(drop),
        ];
        for error in errors {
            let error = error.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Store);
            assert!(
                !error.is_temporary() && error.message().contains(why),
                "{error}"
            );
        }
    };
    refused("the file was removed").await;
    // With the file back in its place the store works again.
    std::fs::rename(&aside, &path).unwrap();
    assert_eq!(store.create_run(run_of(1)).await.unwrap().run, RunId(2));
    std::fs::rename(&path, &aside).unwrap();
    drop(Sqlite::open(&path).await.unwrap());
    refused("another file was put in its place").await;
}

/// An earlier release wrote a number that exceeds the present type.
#[tokio::test]
async fn a_run_of_an_old_file_with_too_large_max_attempts_can_be_claimed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("old.db");
    let store = Sqlite::open(&path).await.unwrap();
    let run = store.create_run(run_of(2)).await.unwrap().run;
    store.close().await;
    raw(&path, "UPDATE items SET max_attempts = 4294967295").await;
    let store = Sqlite::open(&path).await.unwrap();
    let lease = store.register("w", LONG).await.unwrap();
    let items = store.claim(lease, Claim::new(["p"], 10));
    let items = items.await.unwrap();
    assert_eq!((items.len(), items[0].max_attempts), (2, u32::MAX));
    store.commit(done(&items)).await.unwrap();
    let kept = store.run(run).await.unwrap().unwrap();
    assert_eq!(kept.status, Status::Completed);
}

// Several processes on one file

const PROCESSES: usize = 4;
const ITEMS_EACH: usize = 600;

/// The work of each process of the test below, in a copy of this program; not a test.
#[tokio::test]
async fn process() {
    let Ok(path) = std::env::var("THROUGHLINE_TEST_FILE") else {
        return;
    };
    let store = Sqlite::open(path).await.unwrap();
    store.create_run(run_of(ITEMS_EACH)).await.unwrap();
    let lease = store.register("w", LONG).await.unwrap();
    loop {
        let claimed = store.claim(lease, Claim::new(["p"], 8)).await.unwrap();
        if claimed.is_empty() {
            break;
        }
        store.commit(done(&claimed)).await.unwrap();
        assert!(store.heartbeat(lease, LONG).await.unwrap());
        store.reap().await.unwrap();
    }
    store.retire(lease).await.unwrap();
}

#[tokio::test]
async fn four_processes_share_a_file_and_none_finds_it_locked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shared.db");
    // The file does not exist yet, so the processes also race to create it.
    let start = |_| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["sqlite::process", "--exact", "--nocapture"]);
        command
            .env("THROUGHLINE_TEST_FILE", &path)
            .env("RUST_BACKTRACE", "0");
        command
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped());
        command.spawn().unwrap()
    };
    let children: Vec<_> = (0..PROCESSES).map(start).collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        assert!(!said.contains("locked"), "{said}");
    }
    let store = Sqlite::open(&path).await.unwrap();
    let runs = store.runs(Default::default(), 100).await.unwrap();
    assert_eq!(runs.len(), PROCESSES);
    for run in runs {
        assert_eq!(
            (run.status, run.completed),
            (Status::Completed, ITEMS_EACH as u64)
        );
    }
    store::audit(&store).await;
    assert!(store.run(RunId(99)).await.unwrap().is_none());
}

// Files of every version of the tables

/// Writes the fixture of the newest version; not a test. See [`common::fill_fixture`].
#[tokio::test]
#[ignore = "it writes the file that the next test reads"]
async fn write_the_fixture_of_the_newest_version() {
    let path = common::fixture(common::VERSION, "db");
    assert!(!Path::new(&path).exists(), "{path} exists already");
    let store = Sqlite::open(&path).await.unwrap();
    common::fill_fixture(&store).await;
    store.close().await;
}

#[tokio::test]
async fn a_file_of_every_version_opens_and_its_run_goes_on() {
    for version in 1..=common::VERSION {
        println!("version {version}");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("old.db");
        std::fs::copy(common::fixture(version, "db"), &path).unwrap();
        let store = Sqlite::open(&path).await.unwrap();
        common::the_run_of_the_fixture_goes_on(&store, version).await;
    }
}
