//! Durable runs in several processes that are killed, stopped and restarted, on SQLite and on Postgres. The ledger file of
//! the simulated provider shows which calls were billed.
//!
//! The tests use real processes and the real clock.
#![cfg(all(
    unix,
    feature = "signal",
    feature = "sim",
    feature = "sqlite",
    feature = "postgres"
))]

#[path = "../support/long.rs"]
mod long;
#[path = "../support/postgres.rs"]
mod postgres;
#[path = "../support/postgres_server.rs"]
mod postgres_server;
#[path = "../support/program.rs"]
mod program;
#[path = "../../examples/durable/store.rs"]
mod store;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;
use sqlx::Connection as _;
use tempfile::TempDir;
use throughline::provider::sim::Ledger;
use throughline::{Runner, request::RequestDigest};

use self::long::is_long;
use self::postgres::Schemas;
use self::postgres_server::Server;
use self::program::program;

/// Longer than any of the runs takes.
const PATIENCE: Duration = Duration::from_secs(60);
const IN_FLIGHT: usize = 16;

/// A folder with inputs, a ledger and the output of the processes, and a store in the folder or in Postgres.
struct Job {
    dir: TempDir,
    store: String,
}

impl Job {
    fn new(schemas: Option<&Schemas>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = match schemas {
            Some(schemas) => format!("{}#{}", schemas.url, schemas.name()),
            None => dir.path().join("runs.db").display().to_string(),
        };
        Self { dir, store }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(program("durable"));
        command.arg("--store").arg(&self.store);
        command
            .args(arguments.split_whitespace())
            .env_remove("OPENAI_API_KEY")
            .env_remove("OPENAI_BASE_URL")
            .env_remove("ANTHROPIC_API_KEY")
            .stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &str) -> Output {
        let output = self.command(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments}: {said}");
        output
    }

    fn lines(&self, arguments: &str) -> Vec<Value> {
        let output = String::from_utf8(self.run(arguments).stdout).unwrap();
        output
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// Submits a run over `n` records whose names begin with `prefix`. Returns its number.
    fn submit(&self, prefix: &str, n: usize, arguments: &str) -> String {
        let input = self.path(&format!("{prefix}.jsonl"));
        let lines: Vec<_> = (0..n)
            .map(|i| format!("{{\"id\":\"{prefix}{i}\"}}\n"))
            .collect();
        std::fs::write(&input, lines.concat()).unwrap();
        let output = self.run(&format!("submit {} {arguments}", input.display()));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Starts a worker that stops when all runs have ended and writes its output into a file.
    fn work(&self, arguments: &str) -> Child {
        let said = File::options()
            .create(true)
            .append(true)
            .open(self.path("said"))
            .unwrap();
        let ledger = self.path("ledger");
        let lease = if arguments.contains("--lease") {
            ""
        } else {
            "--lease 2000"
        };
        let limits = format!("--rpm 600000 --sim-rpm 600000 {lease} --until-idle");
        self.command(&format!(
            "work {limits} --in-flight {IN_FLIGHT} {arguments}"
        ))
        .arg("--ledger")
        .arg(ledger)
        .stdout(Stdio::null())
        .stderr(said)
        .spawn()
        .unwrap()
    }

    fn said(&self) -> String {
        std::fs::read_to_string(self.path("said")).unwrap_or_default()
    }

    fn ledger(&self) -> Ledger {
        Ledger::read(self.path("ledger")).unwrap()
    }

    /// Returns the number of lines in the ledger, a cheap measure of progress.
    fn progress(&self) -> usize {
        let ledger = std::fs::read(self.path("ledger")).unwrap_or_default();
        ledger.iter().filter(|byte| **byte == b'\n').count()
    }

    /// Returns how often each request was billed.
    fn billed(&self) -> BTreeMap<RequestDigest, u64> {
        self.ledger().times_billed()
    }

    /// Returns the requests whose replies are committed, read past the store.
    fn committed(&self) -> BTreeSet<RequestDigest> {
        let look = async {
            let sql = "SELECT request_digest FROM generations";
            let digests: Vec<Vec<u8>> = match self.store.split_once('#') {
                Some((url, schema)) => {
                    let mut connection = sqlx::PgConnection::connect(url).await.unwrap();
                    let path = format!("SET search_path TO {schema}");
                    let path = sqlx::raw_sql(sqlx::AssertSqlSafe(path));
                    path.execute(&mut connection).await.unwrap();
                    sqlx::query_scalar(sql)
                        .fetch_all(&mut connection)
                        .await
                        .unwrap()
                }
                None => {
                    let url = format!("sqlite://{}?mode=ro", self.store);
                    let mut connection = sqlx::SqliteConnection::connect(&url).await.unwrap();
                    sqlx::query_scalar(sql)
                        .fetch_all(&mut connection)
                        .await
                        .unwrap()
                }
            };
            let digest = |bytes: Vec<u8>| RequestDigest::from_bytes(bytes.try_into().unwrap());
            digests.into_iter().map(digest).collect()
        };
        tokio::runtime::Runtime::new().unwrap().block_on(look)
    }

    fn is_over(&self, run: &str) -> bool {
        let said = String::from_utf8(self.run("status").stdout).unwrap();
        let line = said
            .lines()
            .find(|line| line.starts_with(&format!("{run} ")));
        ["completed", "failed", "cancelled"]
            .iter()
            .any(|word| line.unwrap().starts_with(&format!("{run} {word}")))
    }

    /// Checks that every item is completed and has a text, and that the log has no gap and reports each item once.
    fn check(&self, run: &str, n: usize) {
        let results = self.lines(&format!("results {run}"));
        assert_eq!(results.len(), n);
        for item in &results {
            assert_eq!(item["status"], "completed", "{item}");
            assert!(!item["text"].as_str().unwrap().is_empty(), "{item}");
        }
        let status = String::from_utf8(self.run(&format!("status {run}")).stdout).unwrap();
        assert!(status.contains(&format!("{n} of {n} done")), "{status}");
        let id = run.parse().unwrap();
        let audit = async {
            let store = store::open(&self.store).await.unwrap();
            Runner::new(store).audit(id).await.unwrap().unwrap()
        };
        let audit = tokio::runtime::Runtime::new().unwrap().block_on(audit);
        assert!(audit.is_sound(), "{audit}");
        assert_eq!(audit.completed, n as u64);
    }

    /// Checks that of each call that was paid for twice, the first one is listed as ambiguous. If the machine is so busy that
    /// a worker loses its lease, both replies arrive and no call is ambiguous.
    fn check_ambiguous(&self) -> usize {
        let listed = self.lines("ambiguous").len();
        let thought_dead = self.said().matches("lease lost").count();
        let again: u64 = self.billed().values().map(|times| times - 1).sum();
        assert!(
            again as usize <= listed + thought_dead * IN_FLIGHT,
            "{again} paid again, {listed} listed, {thought_dead} leases lost"
        );
        again as usize
    }

    /// Returns whether the write lock of the file is free.
    fn can_be_written(&self) -> bool {
        if self.store.contains('#') {
            return true;
        }
        let look = async {
            let url = format!("sqlite://{}", self.store);
            let mut connection = sqlx::SqliteConnection::connect(&url).await.unwrap();
            let sql = "PRAGMA busy_timeout = 0; BEGIN IMMEDIATE; ROLLBACK";
            sqlx::raw_sql(sql).execute(&mut connection).await.is_ok()
        };
        tokio::runtime::Runtime::new().unwrap().block_on(look)
    }
}

fn ends_well(worker: Child) {
    ends_within(worker, PATIENCE);
}

fn ends_within(mut worker: Child, patience: Duration) {
    let until = Instant::now() + patience;
    while Instant::now() < until {
        if let Some(status) = worker.try_wait().unwrap() {
            assert!(status.success(), "{status}");
            return;
        }
        sleep(Duration::from_millis(20));
    }
    let _ = worker.kill();
    panic!("a worker has not stopped");
}

fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill")
        .arg(format!("-{name}"))
        .arg(pid.to_string())
        .status();
    assert!(sent.unwrap().success());
}

/// Kills a random worker again and again, and starts another one in its place. Items have their usual three attempts: a
/// kill must not be charged to an item that the worker only happened to hold. The long form kills a hundred times.
fn killed_again_and_again(schemas: Option<&Schemas>, workers: usize, kills: usize) {
    let (kills, items) = if is_long() { (100, 500) } else { (kills, 200) };
    let began = Instant::now();
    let job = Job::new(schemas);
    let mut random = fastrand::Rng::with_seed(workers as u64);
    let submit = |round: usize| job.submit(&format!("r{round}-"), items, "");
    // The more workers, the slower, so that the items last for as many kills: 160 a second at most.
    let latency = format!("--sim-latency {}", 100 * workers);
    let start = || job.work(&latency);
    let mut runs = vec![submit(0)];
    let mut at_work: Vec<_> = (0..workers).map(|_| start()).collect();
    // How often a request had been billed when its reply was first seen in the store.
    let mut kept = BTreeMap::<RequestDigest, u64>::new();
    let mut paid_for = 0;
    let mut killed = 0;
    while killed < kills {
        let victim = random.usize(..workers);
        let (before, until) = (job.progress(), Instant::now() + PATIENCE);
        // Submits another run when there is little left to do.
        if paid_for + items / 2 > runs.len() * items {
            runs.push(submit(runs.len()));
        }
        // Restarts workers that stopped because they found nothing to do.
        for worker in &mut at_work {
            if worker.try_wait().unwrap().is_some() {
                *worker = start();
            }
        }
        sleep(Duration::from_millis(random.u64(50..250)));
        // Waits until the worker has calls in flight, which takes time on a busy machine.
        let mut done = || at_work[victim].try_wait().unwrap().is_some();
        while !done() && job.progress() < before + IN_FLIGHT && Instant::now() < until {
            sleep(Duration::from_millis(10));
        }
        if done() {
            paid_for = job.billed().len();
            continue;
        }
        killed += 1;
        at_work[victim].kill().unwrap();
        at_work[victim].wait().unwrap();
        let committed = job.committed();
        let billed = job.billed();
        paid_for = billed.len();
        for digest in committed {
            kept.entry(digest).or_insert(billed[&digest]);
        }
        at_work[victim] = start();
    }
    let killing = began.elapsed();
    // The items that killed workers held come last, a few at a time.
    at_work
        .into_iter()
        .for_each(|worker| ends_within(worker, PATIENCE * if is_long() { 10 } else { 1 }));

    for run in &runs {
        job.check(run, items);
    }
    let billed = job.billed();
    assert_eq!(billed.len(), runs.len() * items);
    assert!(kept.len() > 4 * kills, "{} kept", kept.len());
    // If the machine is so busy that a worker loses its lease, another worker may have sent the same call before the reply
    // was committed.
    let thought_dead = job.said().matches("lease lost").count();
    let paid_later = kept
        .iter()
        .filter(|(digest, times)| billed[digest] != **times)
        .count();
    assert!(
        paid_later <= thought_dead * IN_FLIGHT,
        "{paid_later} were paid for after they were committed, {thought_dead} leases were lost"
    );
    let again = job.check_ambiguous();
    let most = (kills + thought_dead) * IN_FLIGHT;
    assert!(again <= most, "{again} paid again");
    let said = job.said();
    assert!(
        !said.contains("locked") && !said.contains("panicked"),
        "{said}"
    );
    eprintln!(
        "{}: {workers} workers, {kills} kills, {} runs: {again} calls paid again, {thought_dead} leases lost; \
         killed for {killing:.1?}, over after {:.1?}",
        if schemas.is_some() {
            "Postgres"
        } else {
            "SQLite"
        },
        runs.len(),
        began.elapsed(),
    );
}

#[test]
fn one_worker_is_killed_again_and_again_on_sqlite() {
    killed_again_and_again(None, 1, 4);
}

#[test]
fn four_workers_are_killed_again_and_again_on_sqlite() {
    killed_again_and_again(None, 4, 4);
}

#[test]
fn eight_workers_are_killed_again_and_again_on_sqlite() {
    killed_again_and_again(None, 8, 3);
}

fn killed_on_postgres(workers: usize, kills: usize) {
    let Some(schemas) = Schemas::find() else {
        return;
    };
    killed_again_and_again(Some(&schemas), workers, kills);
    tokio::runtime::Runtime::new()
        .unwrap()
        .block_on(schemas.clear());
}

#[test]
fn one_worker_is_killed_again_and_again_on_postgres() {
    killed_on_postgres(1, 4);
}

#[test]
fn four_workers_are_killed_again_and_again_on_postgres() {
    killed_on_postgres(4, 4);
}

#[test]
fn eight_workers_are_killed_again_and_again_on_postgres() {
    killed_on_postgres(8, 3);
}

/// Suspends a worker for longer than its lease, and then lets it continue.
fn thought_dead(schemas: Option<&Schemas>) {
    const ITEMS: usize = 60;
    let job = Job::new(schemas);
    let run = job.submit("s", ITEMS, "--max-attempts 5");
    let stale = job.work("--sim-latency 500 --name stale --lease 1000");
    let until = Instant::now() + PATIENCE;
    while job.ledger().bills.len() < IN_FLIGHT && Instant::now() < until {
        sleep(Duration::from_millis(5));
    }
    // Suspends it during its next calls, but not during a transaction, because other writers of SQLite would wait for it.
    loop {
        sleep(Duration::from_millis(150));
        signal(stale.id(), "STOP");
        if job.can_be_written() {
            break;
        }
        signal(stale.id(), "CONT");
    }
    sleep(Duration::from_millis(1500));
    let other = job.work("--sim-latency 50 --name other --lease 1000");
    while !job.is_over(&run) && Instant::now() < until {
        sleep(Duration::from_millis(50));
    }
    let before = job.lines(&format!("results {run}"));
    let log = job.lines(&format!("log {run}"));
    signal(stale.id(), "CONT");
    ends_well(stale);
    ends_well(other);
    job.check(&run, ITEMS);
    // The late worker changed nothing.
    assert_eq!(job.lines(&format!("results {run}")), before);
    assert_eq!(job.lines(&format!("log {run}")), log);
    let said = job.said();
    assert!(said.contains("lease lost"), "{said}");
    assert!(job.ledger().bills.len() <= ITEMS + IN_FLIGHT);
    assert_eq!(job.committed().len(), ITEMS);
}

#[test]
fn a_suspended_worker_that_continues_after_its_lease_expired_is_refused() {
    thought_dead(None);
    if let Some(schemas) = Schemas::find() {
        thought_dead(Some(&schemas));
        tokio::runtime::Runtime::new()
            .unwrap()
            .block_on(schemas.clear());
    }
}

#[test]
fn an_interrupted_worker_releases_its_unfinished_items() {
    let job = Job::new(None);
    let run = job.submit("i", 200, "--max-attempts 1");
    let worker = job.work("--sim-latency 150 --lease 60000");
    let until = Instant::now() + PATIENCE;
    while job.ledger().bills.len() < 30 && Instant::now() < until {
        sleep(Duration::from_millis(5));
    }
    signal(worker.id(), "INT");
    ends_well(worker);
    let paid = job.ledger().bills.len();
    assert!((30..150).contains(&paid), "{paid}");
    assert_eq!(job.committed().len(), paid);
    assert!(job.lines("ambiguous").is_empty());
    // The next worker starts at once, although the lease was long.
    ends_well(job.work("--sim-latency 5"));
    job.check(&run, 200);
    assert_eq!(job.ledger().bills.len(), 200);
}

#[test]
fn a_postgres_that_crashes_and_comes_back_costs_nothing() {
    // Prints a message if no server can be started.
    if Schemas::find().is_none() {
        return;
    }
    const ITEMS: usize = 3000;
    let server = Server::start();
    let job = Job {
        dir: tempfile::tempdir().unwrap(),
        store: format!("{}#t", server.script("url")),
    };
    let run = job.submit("p", ITEMS, "--max-attempts 5");
    let workers: Vec<_> = (0..2)
        .map(|_| job.work("--sim-latency 60 --lease 20000"))
        .collect();
    for _ in 0..3 {
        sleep(Duration::from_millis(500));
        assert!(!job.is_over(&run), "it is over before the server crashed");
        server.crash();
        sleep(Duration::from_millis(700));
        server.script("start");
    }
    workers.into_iter().for_each(ends_well);
    job.check(&run, ITEMS);
    assert_eq!(
        job.ledger().bills.len(),
        ITEMS,
        "something was paid for twice"
    );
    assert!(job.lines("ambiguous").is_empty());
}
