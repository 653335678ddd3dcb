//! Imports go down only. The layers are those of `DESIGN.md`.

use std::fs;
use std::path::{Path, PathBuf};

/// Each room with its layer; a room may import from its own layer and from those below.
const LAYERS: &[(&str, u8)] = &[
    ("usage", 0),
    ("error", 0),
    ("event", 0),
    ("request", 0),
    ("provider", 1),
    ("store", 1),
    ("ratelimit", 2),
    ("call", 3),
    ("context", 4),
    ("batch", 5),
    ("pipeline", 5),
    ("structured", 6),
    ("runs", 7),
    ("observe", 8),
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
    assert_eq!(violations("call", up), ["`call` (3) imports `context` (4)"]);
    assert!(violations("batch", up).is_empty());
    assert_eq!(violations("call", "use crate::Context;").len(), 1);
    assert_eq!(violations("attic", "").len(), 1);
    assert!(violations("call", "/// See [`x`](crate::Context).").is_empty());
}
