//! Outages of stores and callers that drop their calls: every acknowledged write is kept, and no call hangs.
#![cfg(all(feature = "sqlite", feature = "postgres", feature = "testing"))]

#[cfg(unix)]
#[path = "../support/postgres_server.rs"]
mod postgres_server;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fastrand::Rng;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use throughline::store::{
    Claim, Commit, Generation, Item, LeaseId, MemoKey, Memory, NewItem, NewRun, Note, Postgres,
    Queue, RunId, Settlement, Sqlite, Store, StoreExt as _,
};
use throughline::testing::{Counted, store};
use throughline::{
    Context, Error, ErrorKind, Runner, Sim, Usage, Worker, pipeline, request::RequestDigest,
    runs::DriveOutcome, store::Journal,
};
use tokio::time::{sleep, timeout};

use crate::server::{self as postgres, Schemas};

const LONG: Duration = Duration::from_secs(3600);
/// Longer than any call takes unless it hangs.
const PATIENCE: Duration = Duration::from_secs(60);

fn long_form() -> bool {
    std::env::var_os("THROUGHLINE_LONG").is_some()
}

fn run_of(n: usize) -> NewRun {
    let items = (0..n).map(|i| NewItem::new(format!("k{i}"), "1"));
    NewRun::new("a", "p").items(items)
}

fn settled(items: &[Item], result: &Result<String, Error>) -> Commit {
    Commit::new().settlements(
        items
            .iter()
            .map(|item| Settlement::new(item.hold(), result.clone())),
    )
}

// A journal that is full

/// Returns a worker whose store accepts claims but no commits, with more results than its journal holds.
async fn with_a_full_journal() -> Worker {
    let store = Arc::new(Counted::new(Memory::new()));
    let runner = Runner::new(Arc::clone(&store));
    let ask = pipeline("ask", async |cx: Context, n: u32| {
        Ok(cx.generate(format!("{n}")).await?.text)
    });
    runner.submit("ask", &ask, 0..5000).await.unwrap();
    store.set_stuck(true);
    let sim = Sim::builder().latency(Duration::from_millis(100)).build();
    Worker::builder(store, Context::builder(sim).build())
        .register("ask", ask)
        .intents(false)
        .build()
}

#[tokio::test(start_paused = true)]
async fn a_drive_ends_in_time_although_the_journal_is_full() {
    let worker = with_a_full_journal().await;
    let drive = worker.drive(Duration::from_secs(60));
    let ended = timeout(Duration::from_secs(75), drive).await;
    let error = ended.expect("it ends").expect_err("results are unwritten");
    assert!(error.message().contains("could not be written"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_worker_stops_on_request_although_the_journal_is_full() {
    let worker = with_a_full_journal().await;
    let run = worker.run_until(sleep(Duration::from_secs(60)));
    let ended = timeout(Duration::from_secs(60 + 60), run).await;
    let error = ended.expect("it ends").expect_err("results are unwritten");
    assert!(error.message().contains("could not be written"), "{error}");
}

// Stores that are away for a while

/// Returns a worker on `store` with a run of 300 items whose replies have 4 KB.
async fn at_work<S: Queue>(store: &Arc<S>, items: u32) -> (Runner, RunId, Worker, Sim) {
    let runner = Runner::new(Arc::clone(store));
    let ask = pipeline("ask", async |cx: Context, n: u32| {
        Ok(cx.generate(format!("{n}")).await?.text)
    });
    let run = runner.submit("ask", &ask, 0..items).await.unwrap();
    let sim = Sim::builder()
        .latency(Duration::from_millis(20))
        .reply(|_| "y".repeat(4000));
    let sim = sim.build();
    let worker = Worker::builder(Arc::clone(store), Context::builder(sim.clone()).build())
        .register("ask", ask)
        .in_flight(8)
        .poll_every(Duration::from_millis(200))
        .build();
    (runner, run, worker, sim)
}

/// Checks that every item is completed and that no call was paid for twice.
async fn all_is_there(runner: &Runner, run: RunId, worker: &Worker, sim: &Sim, items: u64) {
    let outputs: Vec<String> = runner.outputs(run).await.unwrap();
    assert_eq!(outputs.len() as u64, items);
    let audit = runner.audit(run).await.unwrap().unwrap();
    assert!(audit.is_sound() && audit.completed == items, "{audit}");
    let billed = sim.ledger().times_billed();
    assert_eq!(billed.values().sum::<u64>(), items, "paid for twice");
    let journal = worker.stats().journal;
    assert_eq!((journal.waiting, journal.given_up), (0, 0), "{journal:?}");
}

/// Waits until results wait for a store that is away, and a little longer.
async fn until_results_wait(worker: &Worker) {
    let failures = worker.stats().journal.failures;
    let noticed = async {
        while worker.stats().journal.failures < failures + 3 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, noticed).await.expect("nothing fails");
}

/// A disk of a few megabytes, larger than the write-ahead log before a checkpoint. Prints a message if it cannot be created.
#[cfg(target_os = "linux")]
struct Disk(tempfile::TempDir);

#[cfg(target_os = "linux")]
impl Disk {
    fn new() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mount = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=64m", "tmpfs"])
            .arg(dir.path())
            .output();
        let why = match mount {
            Ok(mount) if mount.status.success() => return Some(Self(dir)),
            Ok(mount) => String::from_utf8_lossy(&mount.stderr).into_owned(),
            Err(error) => error.to_string(),
        };
        // Not `eprintln`: the test harness would swallow it.
        use std::io::Write as _;
        let message = format!("\n\n    A FULL DISK WAS NOT TESTED, only a full file: {why}\n\n");
        let _ = std::io::stderr().write_all(message.as_bytes());
        None
    }

    /// Fills the disk.
    fn fill(&self) {
        use std::io::Write as _;
        let mut file = std::fs::File::create(self.0.path().join("filler")).unwrap();
        for size in [1 << 16, 1 << 12, 1 << 9, 1] {
            while file.write_all(&vec![0; size]).is_ok() {}
        }
    }

    fn free(&self) {
        std::fs::remove_file(self.0.path().join("filler")).unwrap();
    }
}

#[cfg(target_os = "linux")]
impl Drop for Disk {
    fn drop(&mut self) {
        // A lazy unmount, because a connection of the store may still be closing.
        let unmount = std::process::Command::new("umount")
            .arg("-l")
            .arg(self.0.path())
            .status();
        assert!(unmount.is_ok_and(|status| status.success()));
    }
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_is_full_for_a_while_costs_nothing() {
    let Some(disk) = Disk::new() else { return };
    let store = Sqlite::open(disk.0.path().join("runs.db")).await.unwrap();
    let store = Arc::new(store);
    let (rounds, items) = if long_form() { (10, 900) } else { (2, 300) };
    let (runner, run, worker, sim) = at_work(&store, items).await;
    let working = tokio::spawn({
        let worker = worker.clone();
        async move { worker.drive(LONG).await }
    });
    for round in 0..rounds {
        sleep(Duration::from_millis(150)).await;
        assert!(!working.is_finished(), "it is done before round {round}");
        disk.fill();
        until_results_wait(&worker).await;
        // Reads succeed, and another write fails at once with a temporary error.
        runner.snapshot(run).await.unwrap().unwrap();
        let error = store.create_run(run_of(50).spec("z".repeat(200_000))).await;
        assert!(error.unwrap_err().is_temporary());
        disk.free();
    }
    let driven = timeout(PATIENCE, working).await.expect("it hangs");
    assert_eq!(driven.unwrap().unwrap(), DriveOutcome::Done);
    all_is_there(&runner, run, &worker, &sim, items.into()).await;
    store.close().await;
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_postgres_that_is_killed_and_comes_back_costs_nothing() {
    // Prints a message if no server can be started.
    if Schemas::find().is_none() {
        return;
    }
    let server = Arc::new(
        tokio::task::spawn_blocking(postgres_server::Server::start)
            .await
            .unwrap(),
    );
    let store = Postgres::connect(server.script("url")).await.unwrap();
    let store = Arc::new(store);
    let (rounds, items) = if long_form() { (12, 3000) } else { (1, 300) };
    let (runner, run, worker, sim) = at_work(&store, items).await;
    let working = tokio::spawn({
        let worker = worker.clone();
        async move { worker.drive(LONG).await }
    });
    for round in 0..rounds {
        sleep(Duration::from_millis(300)).await;
        assert!(!working.is_finished(), "it is done before round {round}");
        let acknowledged = store.create_run(run_of(3)).await.unwrap().run;
        let killed = Arc::clone(&server);
        tokio::task::spawn_blocking(move || {
            killed.crash();
            std::thread::sleep(Duration::from_millis(500));
            killed.script("start");
        })
        .await
        .unwrap();
        let read = async {
            loop {
                match store.run(acknowledged).await {
                    Ok(run) => return run,
                    Err(error) => assert!(error.is_temporary(), "{error:?}"),
                }
            }
        };
        let read = timeout(PATIENCE, read).await.expect("a read hangs");
        assert!(read.is_some(), "an acknowledged run is lost");
        store.cancel(acknowledged).await.unwrap();
    }
    let driven = timeout(PATIENCE * 3, working).await.expect("it hangs");
    assert_eq!(driven.unwrap().unwrap(), DriveOutcome::Done);
    all_is_there(&runner, run, &worker, &sim, items.into()).await;
    store.close().await;
    tokio::task::spawn_blocking(move || drop(server))
        .await
        .unwrap();
}

// Entries that a store refuses

fn generation(tenant: &str, n: u32, body: String) -> Generation {
    Generation::new(
        tenant.to_owned(),
        MemoKey::of([n.to_be_bytes().as_slice()]),
        RequestDigest::from_bytes([0; 32]),
        body,
        Usage::new(1, 1),
    )
}

/// Returns a text that a database cannot compress.
fn noise(bytes: usize) -> String {
    let mut rng = Rng::with_seed(7);
    std::iter::repeat_with(|| rng.alphanumeric())
        .take(bytes)
        .collect()
}

#[tokio::test]
async fn a_reply_that_postgres_cannot_keep_blocks_no_other() {
    let Some(schemas) = Schemas::find() else {
        return;
    };
    let store = Arc::new(schemas.open().await);
    let journal = Journal::new(Arc::clone(&store) as Arc<dyn Store>);
    journal.write(Commit::new().generations([generation(&noise(9000), 1, "1".into())]));
    journal.write(Commit::new().generations([generation("ok", 2, "2".into())]));
    let refused = timeout(PATIENCE, journal.flush()).await.unwrap();
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Config);
    let _ = timeout(PATIENCE, journal.flush()).await.unwrap();
    let key = generation("ok", 2, String::new()).key;
    assert_eq!(store.generations("ok", &[key]).await.unwrap().len(), 1);
    let stats = journal.stats();
    assert_eq!(
        (stats.waiting, stats.written, stats.given_up),
        (0, 1, 1),
        "{stats:?}"
    );
    schemas.clear().await;
}

#[tokio::test]
async fn more_bytes_than_a_database_takes_at_once_are_written_in_several_commits() {
    // As many bytes as a batch holds; in the long form a hundred times as many, more than a message of a gigabyte.
    let replies = if long_form() { 110 } else { 5 };
    let Some(schemas) = Schemas::find() else {
        return;
    };
    let store = Arc::new(schemas.open().await);
    let journal = Journal::new(Arc::clone(&store) as Arc<dyn Store>);
    let body = "x".repeat(10 << 20);
    for n in 0..replies {
        journal.write(Commit::new().generations([generation("", n, body.clone())]));
    }
    let flushed = timeout(PATIENCE * 10, journal.flush()).await;
    flushed.expect("it hangs").unwrap();
    let stats = journal.stats();
    let expected = (u64::from(replies), u64::from(replies), 0);
    assert_eq!(
        (stats.commits, stats.written, stats.failures),
        expected,
        "{stats:?}"
    );
    schemas.clear().await;
}

fn note(run: RunId, kind: &str) -> Commit {
    let (kind, data) = (kind.to_owned(), "1".to_owned());
    Commit::new().notes([Note::new(run, kind, data)])
}

/// The store refuses one entry permanently, without an error that blames the data.
#[tokio::test(start_paused = true)]
async fn a_permanently_refused_entry_is_given_up_once_others_of_its_kind_are_accepted() {
    let store = Counted::new(Memory::new()).refuse(|commit| {
        let refused = commit.notes.iter().any(|note| note.kind == "bad");
        refused.then(|| Error::new(ErrorKind::Store, "no"))
    });
    let store = Arc::new(store);
    let run = store.create_run(NewRun::new("", "log")).await.unwrap().run;
    let journal = Journal::new(Arc::clone(&store) as Arc<dyn Store>);
    // While it is the only entry, the store may be the cause: the write is retried and reported.
    journal.write(note(run, "bad"));
    for _ in 0..3 {
        assert_eq!(journal.flush().await.unwrap_err().message(), "no");
        assert_eq!(journal.stats().given_up, 0);
    }
    for n in 0..700 {
        journal.write(note(run, if n == 300 { "bad" } else { "good" }));
    }
    while journal.stats().waiting > 0 {
        let _ = timeout(PATIENCE, journal.flush()).await.expect("it hangs");
    }
    let stats = journal.stats();
    assert_eq!((stats.written, stats.given_up), (699, 2), "{stats:?}");
    assert_eq!(store.run(run).await.unwrap().unwrap().log_seq, 2 + 699);
}

/// The store refuses everything, as after a privilege was revoked, until the privilege is granted again.
#[tokio::test(start_paused = true)]
async fn nothing_is_given_up_while_the_store_refuses_everything() {
    let allowed = Arc::new(AtomicBool::new(false));
    let store = Counted::new(Memory::new()).refuse({
        let allowed = Arc::clone(&allowed);
        move |_| {
            let refused = !allowed.load(Ordering::Relaxed);
            refused.then(|| Error::new(ErrorKind::Store, "permission denied"))
        }
    });
    let store = Arc::new(store);
    let run = store.create_run(NewRun::new("", "log")).await.unwrap().run;
    let journal = Journal::new(Arc::clone(&store) as Arc<dyn Store>);
    for _ in 0..2000 {
        journal.write(note(run, "good"));
    }
    sleep(Duration::from_secs(600)).await;
    // The journal does not retry in a tight loop.
    let tries = store.calls("commit");
    assert!(
        (300..40_000).contains(&tries),
        "{tries} commits in ten minutes"
    );
    assert_eq!(
        (journal.stats().waiting, journal.stats().given_up),
        (2000, 0)
    );
    allowed.store(true, Ordering::Relaxed);
    sleep(Duration::from_secs(5)).await;
    assert_eq!(
        (journal.stats().written, journal.stats().waiting),
        (2000, 0)
    );
    let entries = store.log(run, 2, 5000).await.unwrap();
    assert_eq!(entries.len(), 2000);
}

/// The writer runs in the runtime of the first caller. When that runtime stops, a caller in another one starts a new writer.
#[test]
fn a_journal_outlives_the_runtime_of_its_first_caller() {
    let runtime = || {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(1).enable_all().build().unwrap()
    };
    let store = Arc::new(Counted::new(Memory::new()));
    let (first, second) = (runtime(), runtime());
    let journal = Journal::new(Arc::clone(&store) as Arc<dyn Store>);
    let run =
        second.block_on(async { store.create_run(NewRun::new("", "log")).await.unwrap().run });
    store.set_stuck(true);
    let writing = journal.clone();
    first.block_on(async move {
        writing.write(note(run, "first"));
        sleep(Duration::from_millis(50)).await;
    });
    let flush = second.spawn({
        let journal = journal.clone();
        async move { timeout(PATIENCE, journal.flush()).await }
    });
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(store.calls("commit"), 1);
    store.set_stuck(false);
    first.shutdown_background();
    let flushed = second.block_on(flush).unwrap();
    flushed.expect("nobody writes").unwrap();
    assert_eq!(journal.stats().written, 1);
}

// Callers that go away

/// A call in progress.
type Call<'a> = BoxFuture<'a, Result<(), Error>>;

/// Starts a call and drops it at once or after some time.
async fn begin_and_drop(mut call: Call<'_>, patience: Duration) -> Option<Result<(), Error>> {
    if let Some(done) = (&mut call).now_or_never() {
        return Some(done);
    }
    match patience.is_zero() {
        true => None,
        false => timeout(patience, call).await.ok(),
    }
}

/// Drops a random call of `store` `rounds` times. After each, a write is acknowledged. In the end `other`, which shares only
/// the database with `store`, must see every one of these writes.
async fn callers_disconnect(store: Arc<dyn Queue>, other: Arc<dyn Queue>, rounds: u64, seed: u64) {
    println!("{} seed {seed}", store.name());
    let mut rng = Rng::with_seed(seed);
    let done = Ok("1".to_owned());
    let broken = Err(Error::new(ErrorKind::InvalidOutput, "b"));
    let mut acknowledged = Vec::new();
    let mut dropped = 0;
    let victim = store.create_run(run_of(8)).await.unwrap().run;
    for round in 0..rounds {
        let lease = timeout(PATIENCE, store.register("w", LONG)).await;
        let lease: LeaseId = lease.expect("register hangs").unwrap();
        let items = timeout(PATIENCE, store.claim(lease, Claim::new(["p"], 4))).await;
        let items = items.expect("claim hangs").unwrap();
        let large = rng.u8(..16) == 0;
        let store = &*store;
        let call: Call<'_> = match rng.u8(..9) {
            0 => Box::pin(async { store.cancel(RunId(rng_run(round))).await.map(drop) }),
            1 => Box::pin(async { store.retry_failed(victim).await.map(drop) }),
            2 => Box::pin(async { store.retire(lease).await.map(drop) }),
            3 => {
                store.heartbeat(lease, Duration::ZERO).await.unwrap();
                Box::pin(async { store.reap().await.map(drop) })
            }
            // More items than one statement takes.
            4 => {
                let n = if large { 12_000 } else { 3 };
                Box::pin(async move { store.create_run(run_of(n)).await.map(drop) })
            }
            5 => Box::pin(async { store.claim(lease, Claim::new(["p"], 3)).await.map(drop) }),
            6 => Box::pin(async { store.commit(settled(&items, &done)).await.map(drop) }),
            7 => Box::pin(async { store.commit(settled(&items, &broken)).await.map(drop) }),
            _ => Box::pin(async { store.purge(LONG, 3).await.map(drop) }),
        };
        let patience = Duration::from_micros(rng.u64(..6000).saturating_sub(2000));
        match timeout(PATIENCE, begin_and_drop(call, patience)).await {
            Err(_) => panic!("a call hangs in round {round} of seed {seed}"),
            Ok(None) => dropped += 1,
            Ok(Some(result)) => result.unwrap(),
        }
        // Like a service that continues with the next request.
        let write = store.create_run(run_of(2).spec(format!("{round}")));
        let written = timeout(PATIENCE, write).await.expect("a write hangs");
        acknowledged.push(written.unwrap().run);
        let last = acknowledged[acknowledged.len() - 1];
        let seen = timeout(PATIENCE, other.run(last)).await;
        assert!(
            seen.expect("a read hangs").unwrap().is_some(),
            "round {round} of seed {seed}: run {last} was acknowledged and is in no other's sight"
        );
        let _ = timeout(PATIENCE, other.retire(lease)).await.unwrap();
    }
    println!("{dropped} of {rounds} calls were dropped");
    assert!(dropped > rounds / 4, "{dropped} of {rounds} were dropped");
    drop(store);
    for run in acknowledged {
        assert!(other.run(run).await.unwrap().is_some(), "run {run} is lost");
    }
    // The audit reads every row.
    let audit = store::audit(&*other);
    timeout(PATIENCE * 10, audit).await.expect("an audit hangs");
}

/// Returns the number of an existing run.
fn rng_run(round: u64) -> i64 {
    1 + (round / 2) as i64
}

/// Starts a call and does not poll it, like a `buffer_unordered` whose consumer is busy with another call.
async fn start_a_call_and_do_not_poll_it(store: Arc<dyn Queue>) {
    for wait in 0..4 {
        let mut call = store.create_run(run_of(12_000));
        let begun = (&mut call).now_or_never();
        // Lets it run as far as it can without being polled.
        sleep(Duration::from_millis(10 * wait)).await;
        let other = async {
            let run = store.create_run(run_of(1)).await.unwrap().run;
            store.run(run).await.unwrap().unwrap();
            store.reap().await.unwrap();
        };
        let other = timeout(Duration::from_secs(20), other).await;
        other.expect("it waits for a call that nobody polls");
        match begun {
            Some(done) => done.unwrap(),
            None => call.await.unwrap(),
        };
    }
}

#[tokio::test]
async fn a_call_that_is_not_polled_blocks_no_other_on_sqlite() {
    let dir = tempfile::tempdir().unwrap();
    let store = Sqlite::open(dir.path().join("runs.db")).await.unwrap();
    start_a_call_and_do_not_poll_it(Arc::new(store)).await;
}

#[tokio::test]
async fn a_call_that_is_not_polled_blocks_no_other_on_postgres() {
    let Some(schemas) = Schemas::find() else {
        return;
    };
    let builder = Postgres::builder(&schemas.url).schema(schemas.name());
    let store = builder.connections(1).connect().await.unwrap();
    start_a_call_and_do_not_poll_it(Arc::new(store)).await;
    schemas.clear().await;
}

fn rounds() -> u64 {
    if long_form() { 1000 } else { 40 }
}

#[tokio::test]
async fn dropped_calls_on_sqlite_lose_no_acknowledged_write() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("runs.db");
    let store = Arc::new(Sqlite::open(&path).await.unwrap());
    let other = Arc::new(Sqlite::open(&path).await.unwrap());
    callers_disconnect(store, other, rounds(), 1).await;
}

#[tokio::test]
async fn dropped_calls_on_postgres_lose_no_acknowledged_write() {
    let Some(schemas) = Schemas::find() else {
        return;
    };
    // With one connection the next call gets that of the dropped one.
    for connections in if long_form() { vec![1, 8] } else { vec![1] } {
        let name = schemas.name();
        let connect = || {
            let builder = Postgres::builder(&schemas.url).schema(name.clone());
            builder.connections(connections).connect()
        };
        let store = Arc::new(connect().await.unwrap());
        let other = Arc::new(connect().await.unwrap());
        callers_disconnect(store, other, rounds(), 2).await;
    }
    schemas.clear().await;
}
