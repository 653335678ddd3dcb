//! The example `generate` as a process that is killed, interrupted, restarted and given invalid input. The ledger file
//! of the simulated provider shows its bills.
//!
//! These tests need real processes and the real clock.
#![cfg(all(
    unix,
    feature = "sim",
    feature = "bar",
    feature = "openai",
    feature = "anthropic"
))]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use throughline::provider::sim::{Ended, Ledger};

use crate::program::program;
use crate::support::server::{Script, Server};
use crate::support::{KEY, OPENAI_BODY};

const RECORDS: usize = 1_707;

/// No run takes longer, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(60);

fn earthquakes() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data/earthquakes.jsonl")
}

/// A folder with an input, an output and a ledger.
struct Job {
    dir: TempDir,
    input: PathBuf,
}

impl Job {
    fn over(input: PathBuf) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            input,
        }
    }

    fn of(lines: impl AsRef<[u8]>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let input = dir.path().join("in.jsonl");
        std::fs::write(&input, lines).unwrap();
        Self { dir, input }
    }

    /// `n` records, named `r0` and so on.
    fn numbered(n: usize) -> Self {
        let lines: Vec<_> = (0..n).map(|i| format!("{{\"id\":\"r{i}\"}}\n")).collect();
        Self::of(lines.concat())
    }

    fn output(&self) -> PathBuf {
        self.dir.path().join("out.jsonl")
    }

    /// Returns the command, with a very high limit unless `arguments` set one.
    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(program("generate"));
        let ledger = self.dir.path().join("ledger");
        let defaults = [
            ("--output", self.output()),
            ("--ledger", ledger),
            ("--rpm", "600000".into()),
            ("--sim-rpm", "600000".into()),
            ("--prompt", "About {id}.".into()),
        ];
        let given = |flag: &str| arguments.split_whitespace().any(|word| word == flag);
        command.arg(&self.input).args(arguments.split_whitespace());
        for (flag, value) in defaults {
            let own = flag == "--prompt" && self.input == earthquakes();
            if !own && !given(flag) {
                command.arg(flag).arg(value);
            }
        }
        command
            .env_remove("OPENAI_API_KEY")
            .env_remove("OPENAI_BASE_URL")
            .env_remove("ANTHROPIC_API_KEY")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn run(&self, arguments: &str) -> Ran {
        Ran::waited(self.start(arguments))
    }

    fn start(&self, arguments: &str) -> Child {
        self.command(arguments).spawn().unwrap()
    }

    /// The whole lines of the output.
    fn lines(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.output()).unwrap_or_default();
        let whole = text
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n'));
        whole
            .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
            .collect()
    }

    /// The ids of the lines, each of which has a text; no id twice.
    fn ids(&self) -> BTreeSet<String> {
        let lines = self.lines();
        let ids: BTreeSet<_> = lines
            .iter()
            .map(|line| {
                assert!(!line["text"].as_str().unwrap().is_empty(), "{line}");
                line["id"].as_str().unwrap().to_owned()
            })
            .collect();
        assert_eq!(ids.len(), lines.len(), "an id has two lines");
        ids
    }

    fn ledger(&self) -> Ledger {
        Ledger::read(self.dir.path().join("ledger")).unwrap()
    }

    /// How often each id was billed.
    fn billed(&self) -> BTreeMap<String, u64> {
        let accounts = self.ledger().by_key;
        let billed = accounts.iter().map(|(id, a)| (id.to_string(), a.billed));
        billed.collect()
    }

    /// Waits until the output has `n` lines.
    fn wait_for_lines(&self, n: usize, child: &mut Child) {
        let patience = Instant::now() + PATIENCE;
        while std::fs::read(self.output())
            .map_or(0, |text| text.iter().filter(|byte| **byte == b'\n').count())
            < n
        {
            assert!(Instant::now() < patience, "{n} lines never came");
            assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
            sleep(Duration::from_millis(2));
        }
    }
}

/// How a process ended.
#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ran {
    /// Waits for the end, within [`PATIENCE`].
    fn waited(child: Child) -> Self {
        let id = child.id().to_string();
        let (over, ended) = mpsc::channel::<()>();
        let watchdog = std::thread::spawn(move || {
            if ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                Command::new("kill")
                    .args(["-s", "KILL", &id])
                    .status()
                    .unwrap();
            }
        });
        let output = child.wait_with_output().unwrap();
        drop(over);
        watchdog.join().unwrap();
        Self::from(output)
    }

    #[track_caller]
    fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        self
    }

    #[track_caller]
    fn says(self, what: &str) -> Self {
        assert!(self.err.contains(what), "no {what:?} in {self:#?}");
        self
    }

    /// The summary has this line, up to white space.
    #[track_caller]
    fn sums_up(self, line: &str) -> Self {
        let words: Vec<_> = line.split_whitespace().collect();
        let starts = |text: &str| {
            let mut theirs = text.split_whitespace();
            words.iter().all(|word| theirs.next() == Some(*word))
        };
        assert!(self.out.lines().any(starts), "no {line:?} in {self:#?}");
        self
    }
}

fn signal(child: &Child, name: &str) {
    let mut kill = Command::new("kill");
    let sent = kill.args(["-s", name, &child.id().to_string()]).status();
    assert!(sent.unwrap().success());
}

// Complete runs

#[test]
fn each_record_gets_one_line_and_the_figures_are_right() {
    let job = Job::over(earthquakes());
    let first = job.run("--sim-latency 5 --limit 300").exits(0);
    let lines = job.lines();
    let sum = |field: &str| {
        lines
            .iter()
            .map(|l| l[field].as_u64().unwrap())
            .sum::<u64>()
    };
    let (input, output) = (sum("input_tokens"), sum("output_tokens"));
    let total = job.ledger().total;
    assert_eq!(
        (total.usage.input_tokens, total.usage.output_tokens),
        (input, output)
    );
    first
        .sums_up(&format!("results 300 in {}", job.output().display()))
        .sums_up("this run 300 done in")
        .sums_up(&format!("tokens {input} in, {output} out"))
        .sums_up("calls 300 attempts, 0 refused by the rate limit (429), 0 of unknown cost");

    // They are the first 300 of the input, each with the line it came from.
    let input = std::fs::read_to_string(earthquakes()).unwrap();
    let asked: Vec<Value> = input
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(asked.len(), RECORDS);
    for line in &lines {
        let place = line["line"].as_u64().unwrap() as usize - 1;
        assert!(place < 300);
        assert_eq!(line["id"], asked[place]["id"]);
        assert_eq!(
            (&line["finish"], &line["attempts"]),
            (&json!("stop"), &json!(1))
        );
    }

    let rest = job.run("--sim-latency 5").exits(0);
    rest.says("1407 records on sim (sim-1), 300 done before")
        .sums_up(&format!("results {RECORDS} in"))
        .sums_up("calls 1407 attempts, 0 refused");
    assert_eq!(job.ids().len(), RECORDS);

    // All records are done, so no call is made.
    let nothing = job.run("").exits(0);
    nothing
        .sums_up("calls 0 attempts, 0 refused")
        .sums_up("results 1707 in");
    assert_eq!(job.ids().len(), RECORDS);
    assert_eq!(job.ledger().total.billed as usize, RECORDS);
}

// Kills and interrupts

#[test]
fn a_job_that_is_killed_repeatedly_completes_and_pays_for_no_result_twice() {
    const IN_FLIGHT: u64 = 64;
    let job = Job::over(earthquakes());
    let arguments = format!("--in-flight {IN_FLIGHT} --sim-latency 80");

    // (lines to wait for beyond those there are, milliseconds after them)
    let kills = [
        (0, 3),
        (1, 0),
        (150, 1),
        (0, 25),
        (300, 7),
        (64, 0),
        (400, 13),
    ];
    let mut kept = BTreeMap::new();
    for (more, after) in kills {
        let before = job.lines().len();
        let mut child = job.start(&arguments);
        // Fewer by the failures that starting takes out: none here.
        job.wait_for_lines(before + more, &mut child);
        sleep(Duration::from_millis(after));
        child.kill().unwrap();
        child.wait().unwrap();
        let billed = job.billed();
        for id in job.ids() {
            kept.entry(id.clone()).or_insert(billed[&id]);
        }
    }
    assert!(kept.len() > 900 && kept.len() < RECORDS, "{}", kept.len());

    let last = job.run(&arguments).exits(0);
    last.sums_up(&format!("results {RECORDS} in"));
    assert_eq!(job.ids().len(), RECORDS);
    let billed = job.billed();
    assert_eq!(billed.len(), RECORDS);
    for (id, times) in kept {
        assert_eq!(
            billed[&id], times,
            "{id} was paid for after its line was written"
        );
    }
    let again: u64 = billed.values().map(|times| times - 1).sum();
    assert!(
        again <= kills.len() as u64 * IN_FLIGHT,
        "{again} paid again"
    );
}

#[test]
fn cut_lines_and_failures_are_repeated() {
    let job = Job::numbered(6);
    job.run("--limit 5").exits(0);
    let text = std::fs::read_to_string(job.output()).unwrap();
    let mut lines: Vec<_> = text.lines().collect();
    let failed = r#"{"id":"r1","error":{"kind":"timeout","persistence":"exhausted","message":"late"},"attempts":5,"input_tokens":0,"output_tokens":0}"#;
    let (half, whole) = (lines.pop().unwrap(), lines.clone());
    let redone: Value = serde_json::from_str(half).unwrap();
    let r1 = lines.iter().position(|line| line.contains(r#""r1""#));
    if let Some(r1) = r1 {
        lines[r1] = failed;
    }
    let cut = format!("{}\n{}", lines.join("\n"), &half[..half.len() / 2]);
    std::fs::write(job.output(), cut).unwrap();

    job.run("").exits(0).sums_up("results 6 in");
    assert_eq!(job.ids().len(), 6);
    let text = std::fs::read_to_string(job.output()).unwrap();
    for line in whole
        .iter()
        .filter(|line| r1.is_none() || !line.contains(r#""r1""#))
    {
        assert!(text.contains(line), "a good line was lost: {line}");
    }
    let twice: BTreeSet<_> = job.billed().into_iter().filter(|(_, n)| *n > 1).collect();
    let expected = [redone["id"].as_str().unwrap(), "r1"].map(|id| (id.to_owned(), 2));
    assert_eq!(twice, BTreeSet::from(expected));
}

#[test]
fn an_interrupted_job_finishes_calls_in_flight_and_resumes_later() {
    for name in ["INT", "TERM"] {
        let job = Job::numbered(200);
        let mut child = job.start("--in-flight 16 --sim-latency 150");
        job.wait_for_lines(20, &mut child);
        signal(&child, name);
        let stopped = Ran::waited(child).exits(130);
        stopped
            .says("waiting for the calls in flight")
            .says("stopped: interrupted; start again");

        let (kept, ledger) = (job.ids(), job.ledger());
        assert!(kept.len() < 100, "it went on: {}", kept.len());
        assert_eq!(
            ledger.total.billed as usize,
            kept.len(),
            "paid and not kept"
        );
        assert!(
            ledger
                .bills
                .iter()
                .all(|bill| bill.ended == Ended::Complete)
        );

        job.run("--sim-latency 5")
            .exits(0)
            .sums_up("results 200 in");
        assert_eq!(job.ids().len(), 200);
        assert_eq!(job.ledger().total.billed, 200);
    }
}

#[test]
fn a_second_interrupt_drops_calls_in_flight() {
    let job = Job::numbered(8);
    let child = job.start("--sim-latency 60000");
    sleep(Duration::from_millis(500));
    signal(&child, "INT");
    sleep(Duration::from_millis(100));
    signal(&child, "INT");
    let began = Instant::now();
    let stopped = Ran::waited(child).exits(130);
    assert!(began.elapsed() < Duration::from_secs(5));
    stopped.sums_up("this run 0 done in").says("start again");
    assert!(job.ids().is_empty());
    job.run("--sim-latency 5").exits(0).sums_up("results 8 in");
}

// Invalid input

#[test]
fn unusable_lines_are_reported_and_the_others_processed() {
    let lines: [(&[u8], &str); 11] = [
        (b"\xef\xbb\xbf{\"id\": \"a\", \"x\": 1}", ""),
        (
            b"{\"id\": \"b\", \"x\": ",
            "not a JSON object: EOF while parsing a value at column 17",
        ),
        (b"[1, 2]", "not a JSON object: "),
        (b"", ""),
        (b"{\"id\": \"c\"}", "no field \"x\", which the prompt uses"),
        (b"{\"x\": 5}", "no field \"id\", which should have the id"),
        (
            b"{\"id\": \"d\", \"x\": null}",
            "field \"x\" is null, and the prompt uses it",
        ),
        (
            b"{\"id\": \"a\", \"x\": 2}",
            "a second record with the id \"a\"",
        ),
        (b"{\"id\": \"\xff\", \"x\": 3}", "not UTF-8: "),
        (b"  \t\r", ""),
        (b"{\"id\": 7, \"x\": {\"y\": [\"z\"]}}\r", ""),
    ];
    let job = Job::of(lines.map(|(line, _)| line).join(&b'\n'));
    let ran = job.run("--prompt About_{x}.").exits(1);
    for (place, (_, problem)) in lines.iter().enumerate() {
        let name = format!("{}:{}:", job.input.display(), place + 1);
        let said = ran.err.lines().find(|said| said.starts_with(&name));
        match said {
            Some(said) => assert!(
                !problem.is_empty() && said.starts_with(&format!("{name} {problem}")),
                "{said}"
            ),
            None => assert!(problem.is_empty(), "{name} {problem} is not said: {ran:#?}"),
        }
    }
    ran.sums_up("results 2 in")
        .sums_up("unusable 7 lines of the input, listed above");
    assert_eq!(job.ids(), BTreeSet::from(["7".to_owned(), "a".to_owned()]));
}

#[test]
fn invalid_arguments_print_an_error_and_exit_with_2() {
    let job = Job::numbered(3);
    let refuses = |arguments: &str, why: &str| {
        job.run(arguments).exits(2).says(why);
        assert_eq!(job.ledger().total.billed, 0);
    };
    refuses("--prompt a{b", "a `{` without a `}`");
    refuses("--prompt a}b", "a `}` without a `{`");
    refuses("--prompt {}", "names no field");
    refuses("--rpm 0", "0 is not in 1..");
    refuses("--in-flight 0", "0 is not in 1..");
    refuses("--sim-errors 2", "--sim-errors must be from 0 to 1, not 2");
    refuses("--model", "--model");

    // A directory is no output, and no input either.
    let folder = job.dir.path().display().to_string();
    refuses(
        &format!("--output {folder}"),
        &format!("cannot write {folder}: "),
    );
    let reads = |input: &Path| {
        let job = Job::over(input.to_owned());
        let ran = job.run("--prompt x").exits(2);
        ran.says(&format!(
            "error: input/output failed: cannot read {}: ",
            input.display()
        ));
    };
    reads(job.dir.path());
    reads(&job.dir.path().join("missing.jsonl"));

    let full = job.run("--output /dev/full").exits(2);
    full.says("cannot write /dev/full: No space left")
        .says("the next start continues");
}

/// A file of another program given as `--output` by mistake.
#[test]
fn a_foreign_output_file_is_not_overwritten() {
    let job = Job::numbered(3);
    let notes = job.dir.path().join("notes");
    std::fs::write(&notes, "\nbuy milk\n").unwrap();
    for (path, line) in [(&job.input, 1), (&notes, 2)] {
        let before = std::fs::read(path).unwrap();
        let ran = job.run(&format!("--output {}", path.display())).exits(2);
        ran.says(&format!(
            "{}:{line}: not a result of this program",
            path.display()
        ));
        assert_eq!(std::fs::read(path).unwrap(), before);
    }
    assert_eq!(job.ledger().total.billed, 0);
    let left = std::fs::read_dir(job.dir.path()).unwrap().count();
    assert_eq!(left, 2, "there is a file beside the input and the notes");
}

// Failures of the provider

#[test]
fn failures_are_stored_counted_by_kind_and_repeated() {
    // With more failures the retry budget would be exhausted, and retries would wait for half a minute.
    let job = Job::numbered(24);
    let ran = job
        .run("--sim-errors 0.75 --sim-seed 3 --sim-latency 1")
        .exits(1);
    let failed: Vec<_> = job
        .lines()
        .into_iter()
        .filter(|line| line["text"].is_null())
        .collect();
    assert!(!failed.is_empty() && failed.len() < 16, "{}", failed.len());
    for line in &failed {
        assert_eq!(line["error"]["kind"], "unavailable", "{line}");
        assert_eq!(line["error"]["persistence"], "exhausted", "{line}");
        assert!(line["attempts"].as_u64() >= Some(5), "{line}");
    }
    assert_eq!(job.lines().len(), 24);
    let n = failed.len();
    ran.sums_up(&format!("failed {n}: {n} unavailable"))
        .sums_up(&format!("results {} in", 24 - n))
        .says(&format!(
            "{}: provider unavailable (HTTP 500",
            failed[0]["id"].as_str().unwrap()
        ));

    job.run("")
        .exits(0)
        .says(&format!("{n} records on sim"))
        .sums_up("results 24 in");
    assert_eq!(job.ids().len(), 24);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_refused_key_ends_the_run_and_a_valid_one_resumes_it() {
    let job = Job::numbered(300);
    let run = async |server: &Server| {
        let mut command = job.command("--provider openai --in-flight 4");
        command.env("OPENAI_BASE_URL", format!("{}/v1", server.url()));
        command.env("OPENAI_API_KEY", KEY);
        let child = command.spawn().unwrap();
        tokio::task::spawn_blocking(|| Ran::waited(child))
            .await
            .unwrap()
    };

    let refusal = r#"{"error":{"message":"Incorrect API key provided","code":"invalid_api_key"}}"#;
    let ok = Script::json(200, OPENAI_BODY);
    let scripts = [
        ok.clone(),
        ok.clone(),
        ok.clone(),
        Script::json(401, refusal),
    ];
    let refusing = Server::scripted(scripts).await;
    let ran = run(&refusing)
        .await
        .exits(1)
        .says("no call can succeed any more: credentials refused");
    // At most the items that were open: 4 in flight, and the ones that wait for them.
    let asked = refusing.requests().len();
    assert!(
        asked < 50,
        "{asked} calls to a provider that refuses the key"
    );
    assert!(!ran.err.contains(KEY) && !ran.out.contains(KEY));
    ran.says("start again").sums_up("results 3 in");

    let good = Server::scripted([ok]).await;
    run(&good).await.exits(0).sums_up("results 300 in");
    assert_eq!(good.requests().len(), 297);
    assert_eq!(job.ids().len(), 300);
}
