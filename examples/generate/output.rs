//! The output file: writes a line for each result and reads the results of earlier runs.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, BufWriter, ErrorKind as IoKind, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use throughline::{Error, ErrorKind, Outcome, Reply, request::FinishReason};

/// A line of the output file.
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

/// The fields of a line that say whether its record is done.
#[derive(Deserialize)]
struct EarlierLine {
    id: String,
    text: Option<IgnoredAny>,
    error: Option<IgnoredAny>,
}

/// The output file. Each result is one write, so a crash can cut only the last line.
pub struct Output {
    file: File,
    path: PathBuf,
    finished: Arc<HashSet<String>>,
}

impl Output {
    /// Opens the file and keeps its results that have a text. Failures and a line that was cut off are
    /// removed, so that their records are done again.
    ///
    /// # Errors
    ///
    /// If the file has other lines, it is left unchanged.
    pub fn resume(path: &Path) -> Result<Self, Error> {
        let failed = |error: std::io::Error| cannot_write(path, error);
        let mut finished = HashSet::new();
        match File::open(path) {
            Err(error) if error.kind() == IoKind::NotFound => {}
            Err(error) => return Err(failed(error)),
            Ok(old) if old.metadata().map_err(failed)?.is_file() => {
                // The kept lines go into a new file that then replaces the old one atomically.
                let temporary = path.with_extension("jsonl.resuming");
                let mut kept = BufWriter::new(File::create(&temporary).map_err(failed)?);
                for (number, line) in BufReader::new(old).split(b'\n').enumerate() {
                    let line = line.map_err(failed)?;
                    match serde_json::from_slice::<EarlierLine>(&line) {
                        Ok(found) if found.text.is_some() => {
                            if finished.insert(found.id) {
                                kept.write_all(&line).map_err(failed)?;
                                kept.write_all(b"\n").map_err(failed)?;
                            }
                        }
                        Ok(found) if found.error.is_some() => {}
                        Err(_) if is_cut_off(&line) => {}
                        _ => {
                            let _ = std::fs::remove_file(&temporary);
                            return Err(not_a_result(path, number + 1));
                        }
                    }
                }
                let kept = kept
                    .into_inner()
                    .map_err(|error| failed(error.into_error()))?;
                kept.sync_all().map_err(failed)?;
                std::fs::rename(&temporary, path).map_err(failed)?;
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

    /// Returns whether the record had its text when the file was opened.
    pub fn has(&self, id: &str) -> bool {
        self.finished.contains(id)
    }

    /// Returns the ids that had their text when the file was opened.
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
        written.map_err(|error| cannot_write(&self.path, error))
    }
}

/// Returns whether the line is the beginning of a result.
fn is_cut_off(line: &[u8]) -> bool {
    let beginning = br#"{"id":""#;
    let known = line.len().min(beginning.len());
    line[..known] == beginning[..known] && serde_json::from_slice::<IgnoredAny>(line).is_err()
}

fn not_a_result(path: &Path, line: usize) -> Error {
    let message = format!(
        "{}:{line}: not a result of this program; give it another --output",
        path.display()
    );
    Error::new(ErrorKind::Config, message)
}

fn cannot_write(path: &Path, error: std::io::Error) -> Error {
    let message = format!(
        "cannot write {}: {error}; the results in it are kept, and the next start continues from there",
        path.display()
    );
    Error::new(ErrorKind::Io, message).with_source(error)
}
