//! Reads the input: the records, their ids, and the prompts made of their fields.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::str::FromStr;

use serde_json::{Map, Value};
use throughline::{Error, ErrorKind};

/// A record of the input.
pub struct Record {
    /// The line number in the input, from 1.
    pub line: usize,
    pub id: String,
    pub prompt: String,
}

/// Why a line cannot be used.
#[derive(Debug)]
pub struct Problem {
    line: usize,
    reason: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.line, self.reason)
    }
}

/// An iterator over the records of a file. It keeps only the ids in memory.
pub struct Records {
    lines: Option<std::io::Split<BufReader<File>>>,
    line: usize,
    id_field: String,
    template: Template,
    seen: HashSet<String>,
}

impl Records {
    pub fn open(path: &Path, id_field: &str, template: &Template) -> Result<Self, Error> {
        let open = || {
            let mut file = BufReader::new(File::open(path)?);
            file.fill_buf()?; // A directory can be opened but not read.
            Ok(file)
        };
        let file = open().map_err(|error: std::io::Error| {
            let message = format!("cannot read {}: {error}", path.display());
            Error::new(ErrorKind::Io, message).with_source(error)
        })?;
        Ok(Self {
            lines: Some(file.split(b'\n')),
            line: 0,
            id_field: id_field.to_owned(),
            template: template.clone(),
            seen: HashSet::new(),
        })
    }

    fn record(&mut self, line: &str) -> Result<Record, String> {
        let record: Map<String, Value> = serde_json::from_str(line).map_err(|error| {
            // The message always says line 1, because each line is parsed by itself.
            let error = error.to_string().replace("line 1 column", "column");
            format!("not a JSON object: {error}")
        })?;
        let id = match record.get(&self.id_field) {
            Some(Value::String(id)) if !id.is_empty() => id.clone(),
            Some(Value::Number(id)) => id.to_string(),
            Some(other) => return Err(format!("field {:?} is not an id: {other}", self.id_field)),
            None => {
                return Err(format!(
                    "no field {:?}, which should have the id",
                    self.id_field
                ));
            }
        };
        let prompt = self.template.render(&record)?;
        if !self.seen.insert(id.clone()) {
            return Err(format!("a second record with the id {id:?}"));
        }
        Ok(Record {
            line: self.line,
            id,
            prompt,
        })
    }
}

impl Iterator for Records {
    type Item = Result<Record, Problem>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let bytes = self.lines.as_mut()?.next()?;
            self.line += 1;
            let result = match bytes.map(String::from_utf8) {
                Ok(Ok(line)) if line.trim_start_matches('\u{feff}').trim().is_empty() => continue,
                Ok(Ok(line)) => self.record(line.trim_start_matches('\u{feff}')),
                Ok(Err(error)) => Err(format!("not UTF-8: {error}")),
                Err(error) => {
                    self.lines = None; // Reading on would fail again and again.
                    Err(format!("the rest cannot be read: {error}"))
                }
            };
            let line = self.line;
            return Some(result.map_err(|reason| Problem { line, reason }));
        }
    }
}

/// A prompt with placeholders `{field}`. `{{` and `}}` stand for braces.
#[derive(Debug, Clone)]
pub struct Template(Vec<Part>);

#[derive(Debug, Clone)]
enum Part {
    Text(String),
    Field(String),
}

impl FromStr for Template {
    type Err = String;

    fn from_str(template: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut text = String::new();
        let mut chars = template.chars().peekable();
        while let Some(c) = chars.next() {
            match c {
                '{' | '}' if chars.peek() == Some(&c) => {
                    chars.next();
                    text.push(c);
                }
                '{' => {
                    let mut field = String::new();
                    loop {
                        match chars.next() {
                            Some('}') => break,
                            Some('{') | None => return Err("a `{` without a `}`".into()),
                            Some(c) => field.push(c),
                        }
                    }
                    if field.is_empty() {
                        return Err("`{}` names no field; write `{{` for a brace".into());
                    }
                    parts.push(Part::Text(std::mem::take(&mut text)));
                    parts.push(Part::Field(field));
                }
                '}' => return Err("a `}` without a `{`; write `}}` for a brace".into()),
                c => text.push(c),
            }
        }
        parts.push(Part::Text(text));
        Ok(Self(parts))
    }
}

impl Template {
    fn render(&self, record: &Map<String, Value>) -> Result<String, String> {
        let mut prompt = String::new();
        for part in &self.0 {
            match part {
                Part::Text(text) => prompt.push_str(text),
                Part::Field(field) => match record.get(field) {
                    None => return Err(format!("no field {field:?}, which the prompt uses")),
                    Some(Value::Null) => {
                        return Err(format!("field {field:?} is null, and the prompt uses it"));
                    }
                    Some(Value::String(text)) => prompt.push_str(text),
                    Some(other) => prompt.push_str(&other.to_string()),
                },
            }
        }
        Ok(prompt)
    }
}
