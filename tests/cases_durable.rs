//! The examples of durable systems, as processes: killed, cut off, and looked at from outside.
//!
//! Real processes, sockets and the real clock: that is what is tested here.
#![cfg(all(
    unix,
    feature = "sim",
    feature = "sqlite",
    feature = "stages",
    feature = "structured"
))]

use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Cargo builds the examples before it runs the tests, beside them.
fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test.ancestors().nth(2).unwrap().join("examples").join(name);
    assert!(
        program.is_file(),
        "\n\n{} IS MISSING: build it with `cargo build --example {name} --all-features`\n\
         (`cargo test --all-features` does that by itself; `--test cases_durable` alone does not)\n",
        program.display()
    );
    program
}

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
    assert!(has("ok:    864 of 864 items completed, each once"));
    assert!(has("ok:    the counters equal the rows"));
    assert!(has("ok:    the logs have no gap"));
    // It was killed in the middle of the last phase, and the provider has the bills of what was done by then.
    let (_, kept) = said
        .split_once("ok:    0 of ")
        .expect("nothing is paid for again");
    let kept: u32 = kept.split(' ').next().unwrap().parse().unwrap();
    assert!((384..800).contains(&kept), "{kept}");
    assert_eq!(said.matches(": killed").count(), 1);
    // The worker that lived was cut off twice, or more often on a slow machine.
    let cut_off = said.lines().filter(|line| line.starts_with("worker a"));
    assert!(cut_off.filter(|line| line.contains(": Continue;")).count() >= 2);
}
