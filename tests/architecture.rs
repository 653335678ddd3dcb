//! Imports go down only. The layers are those of `DESIGN.md`.

use std::fs;
use std::path::{Path, PathBuf};

/// Each room with its layer; a room may import from its own layer and from those below.
const LAYERS: &[(&str, u8)] = &[
    ("error", 0),
    ("request", 0),
    ("reply", 0),
    ("digest", 0),
    ("usage", 0),
    ("event", 0),
    ("json", 0),
    ("schema", 0),
    ("provider", 1),
    ("store", 1),
    ("scope", 2),
    ("pace", 2),
    ("deployment", 2),
    ("pool", 2),
    ("retry", 2),
    ("estimate", 2),
    ("tiktoken", 2),
    ("budget", 2),
    ("journal", 2),
    ("memo", 2),
    ("guard", 2),
    ("context", 3),
    ("join", 3),
    ("stream", 3),
    ("structured", 3),
    ("pipeline", 4),
    ("settled", 4),
    ("batch", 4),
    ("run", 5),
    ("worker", 5),
    ("bar", 5),
    ("stages", 5),
    ("timeline", 5),
    ("signal", 5),
    // For users' tests: sees everything, and nothing may see it.
    ("testing", 9),
];

fn layer(room: &str) -> Option<u8> {
    LAYERS
        .iter()
        .find(|(name, _)| *name == room)
        .map(|(_, layer)| *layer)
}

fn source_files(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            source_files(&path, files);
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            files.push(path);
        }
    }
}

/// The rooms that `source` imports from, comments and unit tests left out.
fn imports(source: &str) -> Vec<String> {
    let code = source.split("#[cfg(test)]").next().unwrap_or_default();
    let lines = code
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default());
    let code: String = lines.collect::<Vec<_>>().join("\n");
    let after = code.split("crate::").skip(1);
    after
        .map(|rest| {
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_');
            rest[..end.unwrap_or(rest.len())].to_owned()
        })
        .collect()
}

/// What is wrong with the imports of one file.
fn violations(room: &str, source: &str) -> Vec<String> {
    let Some(own) = layer(room) else {
        return vec![format!(
            "`{room}` has no layer: give it one here and in DESIGN.md"
        )];
    };
    let wrong = imports(source)
        .into_iter()
        .filter_map(|import| match layer(&import) {
            Some(theirs) if theirs <= own => None,
            Some(theirs) => Some(format!("`{room}` ({own}) imports `{import}` ({theirs})")),
            None => Some(format!(
                "`{room}` imports `crate::{import}`: name the room it is in"
            )),
        });
    wrong.collect()
}

#[test]
fn imports_go_down_only() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    source_files(&src, &mut files);
    let mut wrong = Vec::new();
    for file in &files {
        let relative = file.strip_prefix(&src).unwrap();
        let first = relative.components().next().unwrap().as_os_str();
        let room = Path::new(first).file_stem().unwrap().to_str().unwrap();
        if room == "lib" {
            continue;
        }
        wrong.extend(violations(room, &fs::read_to_string(file).unwrap()));
    }
    assert!(files.len() > 15, "only {} files found", files.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn an_import_that_goes_up_is_found() {
    let up = "use crate::error::Error;\nuse crate::context::Context; // why\n";
    assert_eq!(
        violations("retry", up),
        ["`retry` (2) imports `context` (3)"]
    );
    assert!(violations("batch", up).is_empty());
    assert_eq!(violations("retry", "use crate::Context;").len(), 1);
    assert_eq!(violations("attic", "").len(), 1);
    assert!(violations("retry", "/// See [`x`](crate::Context).").is_empty());
}

/// The five systems that the crate must be able to carry (`benches/cases.rs`).
const CASES: [&str; 5] = [
    "background_service",
    "card_stories",
    "coach_conversation",
    "practice_routines",
    "quality_log",
];
const LINES_OF_A_CASE: usize = 150;

/// Lines with code: neither blank nor a comment alone.
fn lines_of_code(source: &str) -> usize {
    let lines = source.lines().map(str::trim_start);
    lines
        .filter(|line| !line.is_empty() && !line.starts_with("//"))
        .count()
}

/// Counted are all Rust files of an example together, `NAME.rs` and those in the folder `NAME`, as rustfmt leaves
/// them. A web page is not Rust.
#[test]
fn what_two_users_would_write_is_in_the_crate_and_the_cases_are_short() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    for case in CASES {
        let mut files = vec![examples.join(case).with_extension("rs")];
        source_files(&examples.join(case), &mut files);
        let sources = files.iter().map(|file| fs::read_to_string(file).unwrap());
        let lines: usize = sources.map(|source| lines_of_code(&source)).sum();
        assert!(
            lines < LINES_OF_A_CASE,
            "{case} has {lines} lines of code in {files:?}: move what others would write too into the crate"
        );
        assert!(lines > 50, "{case}: only {lines} lines were found");
    }
}

#[test]
fn comments_and_blank_lines_are_not_code() {
    let source = "//! A page.\n\n/// One.\nfn one() -> u32 {\n    // Why.\n    1 // one\n}\n";
    assert_eq!(lines_of_code(source), 3);
}
