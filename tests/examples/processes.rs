//! The examples of durable systems as processes that are killed and stopped.
//!
//! These tests need real processes, sockets and the real clock.
#![cfg(all(
    unix,
    feature = "signal",
    feature = "sim",
    feature = "sqlite",
    feature = "stages",
    feature = "structured"
))]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sqlx::Connection as _;
use tempfile::TempDir;
use throughline::provider::sim::Ledger;
use throughline::store::{Commit, Sqlite};
use throughline::{Runner, request::RequestDigest, store::Journal};

use crate::long::is_long;
use crate::program::program;

/// No run takes longer, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn card_stories() {
    let ran = Command::new(program("card_stories"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ran.stdout);
    eprintln!("{said}{}", String::from_utf8_lossy(&ran.stderr));
    assert!(ran.status.success());
    let has = |line: &str| said.lines().any(|said| said == line);
    assert!(has("864 of 864 items are completed, each once"));
    assert_eq!(said.matches("completed once each; sound").count(), 3);
    // It was killed during the last phase, and the provider has the bills until then.
    let (_, kept) = said
        .split_once("\n0 of ")
        .expect("nothing is paid for again");
    let kept: u32 = kept.split(' ').next().unwrap().parse().unwrap();
    assert!((384..800).contains(&kept), "{kept}");
    assert_eq!(said.matches(": killed").count(), 1);
    // The worker that lived was cut off twice, or more often on a slow machine.
    let cut_off = said.lines().filter(|line| line.starts_with("worker a"));
    assert!(cut_off.filter(|line| line.contains(": Continue;")).count() >= 2);
}

/// The service as a process, on files that outlive it.
struct Service {
    dir: TempDir,
    process: Child,
    at: SocketAddr,
}

impl Service {
    fn start(latency: u64) -> Self {
        Self::start_with(latency, &[])
    }

    fn start_with(latency: u64, more: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (process, at) = Self::spawn(&dir, latency, more);
        Self { dir, process, at }
    }

    fn spawn(dir: &TempDir, latency: u64, more: &[&str]) -> (Child, SocketAddr) {
        let mut process = Command::new(program("background_service"))
            .args(["--listen", "127.0.0.1:0", "--store", "programs.db"])
            .args(["--latency", &latency.to_string()])
            .args(more)
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        let mut stdout = BufReader::new(process.stdout.as_mut().unwrap());
        stdout.read_line(&mut said).unwrap();
        let at = said.trim().strip_prefix("listening on http://").unwrap();
        (process, at.parse().unwrap())
    }

    /// As `kill -9`.
    fn crash(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    fn start_again(&mut self, latency: u64) {
        (self.process, self.at) = Self::spawn(&self.dir, latency, &[]);
    }

    /// Stops the service as a supervisor does; false if it does not stop in time.
    fn terminate(&mut self) -> bool {
        let pid = self.process.id().to_string();
        let sent = Command::new("kill").args(["-TERM", &pid]).status();
        assert!(sent.unwrap().success());
        let until = Instant::now() + Duration::from_secs(20);
        while Instant::now() < until {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status.success();
            }
            sleep(Duration::from_millis(10));
        }
        false
    }

    /// Status, head and body of an answer, read to its end.
    fn ask(&self, token: &str, method: &str, path: &str, body: &str) -> (u16, String, String) {
        let mut stream = TcpStream::connect(self.at).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: {token}\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, head.to_owned(), body.to_owned())
    }

    fn json(&self, token: &str, method: &str, path: &str) -> Value {
        let (status, _, body) = self.ask(token, method, path, "");
        assert_eq!(status, 200, "{method} {path}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    fn submit(&self, token: &str, program: &Value) -> i64 {
        let (status, head, body) = self.ask(token, "POST", "/programs", &program.to_string());
        assert_eq!(status, 202, "{body}");
        let id = serde_json::from_str::<Value>(&body).unwrap()["id"]
            .as_i64()
            .unwrap();
        assert!(
            head.contains(&format!("location: /programs/{id}")),
            "{head}"
        );
        id
    }

    /// All programs of a user, when none is pending or processing any more.
    fn all_over(&self, token: &str) -> Vec<Value> {
        self.all_over_within(token, PATIENCE)
    }

    fn all_over_within(&self, token: &str, patience: Duration) -> Vec<Value> {
        let until = Instant::now() + patience;
        loop {
            let programs = self.json(token, "GET", "/programs");
            let programs = programs.as_array().unwrap();
            let open =
                |it: &&Value| matches!(it["status"].as_str(), Some("pending" | "processing"));
            match programs.iter().find(open) {
                None => return programs.clone(),
                Some(stuck) => assert!(Instant::now() < until, "stuck: {stuck}"),
            }
            sleep(Duration::from_millis(50));
        }
    }

    /// How often each request was billed.
    fn billed(&self) -> BTreeMap<RequestDigest, u64> {
        let ledger = Ledger::read(self.dir.path().join("programs.ledger"));
        ledger.unwrap().times_billed()
    }

    /// Reads the requests with committed replies from the store.
    fn committed(&self) -> Vec<RequestDigest> {
        let look = async {
            let url = format!(
                "sqlite://{}?mode=ro",
                self.dir.path().join("programs.db").display()
            );
            let mut connection = sqlx::SqliteConnection::connect(&url).await.unwrap();
            let digests: Vec<Vec<u8>> =
                sqlx::query_scalar("SELECT request_digest FROM generations")
                    .fetch_all(&mut connection)
                    .await
                    .unwrap();
            let digest = |bytes: Vec<u8>| RequestDigest::from_bytes(bytes.try_into().unwrap());
            digests.into_iter().map(digest).collect()
        };
        tokio::runtime::Runtime::new().unwrap().block_on(look)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

const ADA: &str = "Bearer ada-secret";
const BOB: &str = "Bearer bob-secret";

#[test]
fn requests_need_a_user_and_each_user_sees_only_their_own_programs() {
    let mut service = Service::start(20);
    for token in [
        "",
        "Bearer ",
        "Bearer wrong",
        "ada-secret",
        "Basic ada-secret",
    ] {
        for (method, path) in [
            ("GET", "/programs"),
            ("POST", "/programs"),
            ("GET", "/programs/1"),
            ("GET", "/programs/1/events"),
            ("DELETE", "/programs/1"),
        ] {
            let (status, head, _) = service.ask(token, method, path, "{}");
            assert_eq!(status, 401, "{method} {path} with {token:?}");
            assert!(head.contains("www-authenticate: Bearer"), "{head}");
        }
    }
    let id = service.submit(ADA, &json!({"goal": "a swim", "weeks": 3}));
    let path = format!("/programs/{id}");
    for (method, path) in [
        ("GET", path.clone()),
        ("GET", format!("{path}/events")),
        ("DELETE", path.clone()),
        ("GET", "/programs/999".to_owned()),
    ] {
        assert_eq!(
            service.ask(BOB, method, &path, "").0,
            404,
            "{method} {path}"
        );
    }
    assert_eq!(service.json(BOB, "GET", "/programs"), json!([]));
    let unusable = json!({"goal": " ", "weeks": 3}).to_string();
    assert_eq!(service.ask(ADA, "POST", "/programs", &unusable).0, 422);

    let done = service.all_over(ADA);
    assert_eq!(done.len(), 1);
    for (field, value) in [
        ("id", json!(id)),
        ("name", json!("plan-week")),
        ("status", json!("completed")),
        ("completed", json!(3)),
        ("total", json!(3)),
        ("error", json!(null)),
        ("tenant", json!(null)), // not told
    ] {
        assert_eq!(done[0][field], value, "{field}");
    }
    let program = service.json(ADA, "GET", &path);
    assert_eq!(program["goal"], "a swim");
    assert_eq!(program["weeks"][2]["focus"], "endurance");
    let (status, _, page) = service.ask("", "GET", "/", "");
    assert!(status == 200 && page.contains("Training programs"));
    assert!(service.terminate());
}

#[test]
fn a_user_above_the_quota_is_asked_to_wait_and_others_are_not() {
    let service = Service::start_with(20, &["--quota", "2"]);
    let program = json!({"goal": "a row", "weeks": 1});
    service.submit(ADA, &program);
    service.submit(ADA, &program);
    let (status, head, body) = service.ask(ADA, "POST", "/programs", &program.to_string());
    assert_eq!(status, 429, "{body}");
    let wait = head
        .lines()
        .find_map(|line| line.strip_prefix("retry-after: "));
    let wait: u64 = wait.unwrap().parse().unwrap();
    assert!((1..=30).contains(&wait), "{wait}");
    service.submit(BOB, &program);
    assert_eq!(service.all_over(ADA).len(), 2);
}

#[test]
fn programs_can_be_followed_and_cancelled_and_time_out() {
    let mut service = Service::start(300);
    // Its events end when it is over.
    let id = service.submit(ADA, &json!({"goal": "a climb", "weeks": 6}));
    let (status, head, events) = service.ask(ADA, "GET", &format!("/programs/{id}/events"), "");
    assert!(
        status == 200 && head.contains("text/event-stream"),
        "{head}"
    );
    let seen = events
        .lines()
        .filter_map(|line| line.strip_prefix("data: "));
    let seen: Vec<Value> = seen
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let done: Vec<_> = seen
        .iter()
        .map(|it| it["completed"].as_u64().unwrap())
        .collect();
    assert!(done.is_sorted() && done.len() >= 3, "{done:?}");
    let last = seen.last().unwrap();
    assert_eq!(
        (&last["status"], &last["completed"]),
        (&json!("completed"), &json!(6))
    );

    // Two calls of 150 to 450 ms for each week do not fit.
    let late = service.submit(
        ADA,
        &json!({"goal": "a dive", "weeks": 2, "timeout_ms": 200}),
    );
    let program = &service.all_over(ADA)[0];
    assert_eq!(
        (&program["id"], &program["status"]),
        (&json!(late), &json!("failed"))
    );
    let why = program["error"].as_str().unwrap();
    assert!(why.contains("deadline"), "{why}");

    let id = service.submit(ADA, &json!({"goal": "a walk", "weeks": 52}));
    let stopped = service.json(ADA, "DELETE", &format!("/programs/{id}"));
    assert!(stopped["stopped"].as_u64().unwrap() > 0);
    assert_eq!(service.all_over(ADA)[0]["status"], "cancelled");
    assert_eq!(
        service.json(ADA, "DELETE", &format!("/programs/{id}"))["stopped"],
        0
    );

    // A stop during the work ends open streams, and paid replies are stored.
    service.submit(BOB, &json!({"goal": "a ride", "weeks": 52}));
    sleep(Duration::from_millis(300));
    thread::scope(|scope| {
        let id = service.json(BOB, "GET", "/programs")[0]["id"].clone();
        let (at, path) = (service.at, format!("/programs/{id}/events"));
        scope.spawn(move || {
            let mut stream = TcpStream::connect(at).unwrap();
            let head =
                format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: {BOB}\r\n\r\n");
            stream.write_all(head.as_bytes()).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            assert!(stream.read_to_end(&mut Vec::new()).unwrap() > 0);
        });
        sleep(Duration::from_millis(100));
        assert!(service.terminate());
    });
    let (billed, mut committed) = (service.billed(), service.committed());
    committed.sort_unstable();
    committed.dedup();
    assert!(committed.len() >= 12, "{}", committed.len());
    // Dropped calls are billed too: those of the program that was cancelled and of the one that was late.
    assert!(committed.iter().all(|digest| billed[digest] == 1));
}

#[test]
fn two_hundred_programs_survive_kill_9() {
    const PROGRAMS: usize = 200;
    let mut service = Service::start(150);
    let mut taken = Vec::new();
    thread::scope(|scope| {
        let service = &service;
        let client = |client: usize| {
            let submit = move |n: usize| {
                let token = [ADA, BOB][n % 2];
                let program = json!({"goal": format!("goal {n}"), "weeks": 2});
                let began = Instant::now();
                service.submit(token, &program);
                began.elapsed()
            };
            scope.spawn(move || {
                (client..PROGRAMS)
                    .step_by(8)
                    .map(submit)
                    .collect::<Vec<_>>()
            })
        };
        let clients: Vec<_> = (0..8).map(client).collect();
        taken.extend(
            clients
                .into_iter()
                .flat_map(|client| client.join().unwrap()),
        );
    });
    taken.sort_unstable();
    let (median, slowest) = (taken[PROGRAMS / 2], taken[PROGRAMS - 1]);
    eprintln!(
        "{PROGRAMS} programs submitted by 8 clients: {median:.1?} at the median, {slowest:.1?} at most"
    );

    // During the work.
    let until = Instant::now() + PATIENCE;
    while service.committed().len() < 2 * PROGRAMS / 3 && Instant::now() < until {
        sleep(Duration::from_millis(10));
    }
    service.crash();
    let before = service.billed();
    let committed = service.committed();
    service.start_again(50);

    let again = Instant::now();
    for token in [ADA, BOB] {
        let programs = service.all_over(token);
        assert_eq!(programs.len(), PROGRAMS / 2);
        for program in programs {
            assert_eq!(
                (&program["status"], &program["completed"]),
                (&json!("completed"), &json!(2)),
                "{program}"
            );
        }
    }
    let billed = service.billed();
    assert_eq!(billed.len(), 2 * 2 * PROGRAMS);
    for digest in &committed {
        assert_eq!(
            billed[digest], before[digest],
            "{digest} was paid for after it was committed"
        );
    }
    let twice: u64 = billed.values().map(|times| times - 1).sum();
    assert!(
        twice <= 64,
        "{twice} calls paid twice, of at most 64 in flight"
    );
    eprintln!(
        "killed with {} replies committed: 0 of them paid again, {twice} of those in flight; all over {:.1?} later",
        committed.len(),
        again.elapsed()
    );

    // One after the other, while the worker does what it is given.
    let one = |n: usize| {
        let program = json!({"goal": format!("later {n}"), "weeks": 2});
        let began = Instant::now();
        service.submit(ADA, &program);
        began.elapsed()
    };
    let mut taken: Vec<_> = (0..40).map(one).collect();
    taken.sort_unstable();
    eprintln!(
        "submit, one client: {:.2?} at the median, {:.2?} at most",
        taken[20], taken[39]
    );
    assert_eq!(service.all_over(ADA).len(), PROGRAMS / 2 + 40);
}

/// The service is killed repeatedly during its work and loses no program.
#[test]
fn no_program_is_lost_however_often_the_service_is_killed() {
    let (programs, weeks, kills) = if is_long() { (60, 4, 50) } else { (12, 2, 4) };
    let began = Instant::now();
    let mut random = fastrand::Rng::with_seed(7);
    let mut service = Service::start(400);
    for n in 0..programs {
        let program = json!({"goal": format!("goal {n}"), "weeks": weeks, "timeout_ms": 3_600_000});
        service.submit([ADA, BOB][n % 2], &program);
    }
    for kill in 1..=kills {
        // Mostly before it has lived for a lease, and now and then after.
        let life = match kill % 10 {
            0 => random.u64(3_500..8_000),
            _ => random.u64(100..1_500),
        };
        sleep(Duration::from_millis(life));
        service.crash();
        service.start_again(400);
    }
    let killing = began.elapsed();
    let mut over = Vec::new();
    for token in [ADA, BOB] {
        over.extend(service.all_over_within(token, 20 * PATIENCE));
    }
    assert_eq!(over.len(), programs);
    for program in over {
        assert_eq!(
            (&program["status"], &program["completed"]),
            (&json!("completed"), &json!(weeks)),
            "{program}"
        );
    }
    let billed = service.billed();
    assert_eq!(billed.len(), 2 * weeks * programs);
    let twice: u64 = billed.values().map(|times| times - 1).sum();
    assert!(twice <= 64 * kills, "{twice} calls paid twice");
    eprintln!(
        "{kills} kills in {killing:.1?}: {programs} programs completed after {:.1?}, {twice} calls paid twice",
        began.elapsed()
    );
}

/// Notes classes of ten rows for ever, and prints the number of acknowledged rows.
async fn note_classes(store: OsString) {
    let store = Arc::new(Sqlite::open(store).await.unwrap());
    let runner = Runner::new(Arc::clone(&store));
    let notes = runner.notes::<usize>("classes").await.unwrap();
    let journal = Journal::new(store);
    for class in 1.. {
        let rows = (class - 1) * 10..class * 10;
        journal.write(notes.add(Commit::new(), rows).unwrap());
        // Most are on their way when it is killed, some are acknowledged.
        if class % 200 == 0 {
            journal.flush().await.unwrap();
            println!("\nacknowledged {}", class * 10);
        }
    }
}

/// A process is killed while it writes in the background. All acknowledged rows are stored, in order, and no class in
/// part. The killed process is this test, which starts itself.
#[test]
fn acknowledged_rows_survive_kill_9() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    if let Some(store) = std::env::var_os("THROUGHLINE_NOTES") {
        return runtime.block_on(note_classes(store));
    }
    let dir = tempfile::tempdir().unwrap();
    let (store, mut least) = (dir.path().join("notes.db"), 0);
    for _ in 0..5 {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "processes::acknowledged_rows_survive_kill_9"])
            .arg("--nocapture")
            .env("THROUGHLINE_NOTES", &store)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(process.stdout.take().unwrap()).lines();
        let mut acknowledged = || loop {
            let line = said.next()?.unwrap();
            if let Some(rows) = line.strip_prefix("acknowledged ") {
                return rows.parse::<usize>().ok();
            }
        };
        let mut rows = 0;
        for _ in 0..fastrand::usize(1..4) {
            rows = acknowledged().unwrap();
        }
        process.kill().unwrap();
        process.wait().unwrap();
        // It may have printed more before it died.
        while let Some(more) = acknowledged() {
            rows = more;
        }
        least += rows;
    }
    let look = async {
        let runner = Runner::new(Sqlite::open(&store).await.unwrap());
        let notes = runner.notes::<usize>("classes").await.unwrap();
        assert!(runner.audit(notes.run()).await.unwrap().unwrap().is_sound());
        notes.last(u32::MAX).await.unwrap()
    };
    let noted = runtime.block_on(look);
    assert!(
        noted.len() >= least && least > 500,
        "{} of {least}",
        noted.len()
    );
    for class in noted.chunks(10) {
        assert!(
            class.iter().copied().eq(class[0]..class[0] + 10),
            "{class:?}"
        );
    }
    eprintln!(
        "killed 5 times: {least} rows acknowledged, {} there",
        noted.len()
    );
}
