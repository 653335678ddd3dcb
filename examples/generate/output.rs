//! The output: a line for each result, and what a restart finds of it.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, BufWriter, ErrorKind as IoKind, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use throughline::{Error, ErrorKind, Outcome, Reply, request::FinishReason};

/// A result as it is written.
#[derive(Serialize)]
struct Line<'a> {
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    finish: Option<&'a FinishReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a Error>,
    attempts: u64,
    input_tokens: u64,
    output_tokens: u64,
}

/// What of a result says whether its record is done.
#[derive(Deserialize)]
struct Found {
    id: String,
    text: Option<IgnoredAny>,
    error: Option<IgnoredAny>,
}

/// The results file. Each result is one write, so a crash can cut the last line only.
pub struct Output {
    file: File,
    path: PathBuf,
    finished: Arc<HashSet<String>>,
}

impl Output {
    /// Opens the file and keeps what it holds of whole results with a text. Failures and a line
    /// that was cut in half are taken out, so that their records are done again. A file of
    /// something else is refused and left as it is.
    pub fn resume(path: &Path) -> Result<Self, Error> {
        let failed = |error: std::io::Error| unwritable(path, error);
        let mut finished = HashSet::new();
        match File::open(path) {
            Err(error) if error.kind() == IoKind::NotFound => {}
            Err(error) => return Err(failed(error)),
            Ok(old) if old.metadata().map_err(failed)?.is_file() => {
                // The kept lines go into a new file that takes the old one's place in one step.
                let beside = path.with_extension("jsonl.resuming");
                let mut kept = BufWriter::new(File::create(&beside).map_err(failed)?);
                for (number, line) in BufReader::new(old).split(b'\n').enumerate() {
                    let line = line.map_err(failed)?;
                    match serde_json::from_slice::<Found>(&line) {
                        Ok(found) if found.text.is_some() => {
                            if finished.insert(found.id) {
                                kept.write_all(&line).map_err(failed)?;
                                kept.write_all(b"\n").map_err(failed)?;
                            }
                        }
                        Ok(found) if found.error.is_some() => {}
                        Err(_) if cut(&line) => {}
                        _ => {
                            let _ = std::fs::remove_file(&beside);
                            return Err(foreign(path, number + 1));
                        }
                    }
                }
                let kept = kept
                    .into_inner()
                    .map_err(|error| failed(error.into_error()))?;
                kept.sync_all().map_err(failed)?;
                std::fs::rename(&beside, path).map_err(failed)?;
            }
            Ok(_) => {}
        }
        let append = OpenOptions::new().append(true).create(true).open(path);
        Ok(Self {
            file: append.map_err(failed)?,
            path: path.to_owned(),
            finished: Arc::new(finished),
        })
    }

    /// Whether a record had its text when the file was opened.
    pub fn has(&self, id: &str) -> bool {
        self.finished.contains(id)
    }

    /// The ids that had their text when the file was opened.
    pub fn finished(&self) -> Arc<HashSet<String>> {
        Arc::clone(&self.finished)
    }

    pub fn write(&mut self, outcome: &Outcome<(usize, Reply)>) -> Result<(), Error> {
        let ok = outcome.result.as_ref().ok();
        let mut line = serde_json::to_vec(&Line {
            id: crate::name(outcome),
            line: ok.map(|(line, _)| *line),
            text: ok.map(|(_, reply)| &*reply.text),
            finish: ok.map(|(_, reply)| &reply.finish),
            error: outcome.error(),
            attempts: outcome.tally.attempts,
            input_tokens: outcome.tally.usage.input_tokens,
            output_tokens: outcome.tally.usage.output_tokens,
        })?;
        line.push(b'\n');
        let written = self.file.write_all(&line);
        written.map_err(|error| unwritable(&self.path, error))
    }
}

/// Whether a line that is no result is a part of one: its beginning.
fn cut(line: &[u8]) -> bool {
    let beginning = br#"{"id":""#;
    let known = line.len().min(beginning.len());
    line[..known] == beginning[..known] && serde_json::from_slice::<IgnoredAny>(line).is_err()
}

fn foreign(path: &Path, line: usize) -> Error {
    let message = format!(
        "{}:{line}: not a result of this program; give it another --output",
        path.display()
    );
    Error::new(ErrorKind::Config, message)
}

fn unwritable(path: &Path, error: std::io::Error) -> Error {
    let message = format!(
        "cannot write {}: {error}; what it holds is kept, and starting again goes on from there",
        path.display()
    );
    Error::new(ErrorKind::Io, message).with_source(error)
}
