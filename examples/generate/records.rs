//! The input: records, their ids, and the prompt made of their fields.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::str::FromStr;

use serde_json::{Map, Value};
use throughline::{Error, ErrorKind};

/// A record that can be asked about.
pub struct Record {
    /// Its line in the input, from 1.
    pub line: usize,
    pub id: String,
    pub prompt: String,
}

/// Why a line is no use.
#[derive(Debug)]
pub struct Problem {
    line: usize,
    what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.line, self.what)
    }
}

/// The records of a file in turn, in memory O(ids).
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
            file.fill_buf()?; // A directory opens well and cannot be read.
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
            // Its line is always the first: ours is named in front of the message.
            let error = error.to_string().replace("line 1 column", "column");
            format!("not a JSON object: {error}")
        })?;
        let id = match record.get(&self.id_field) {
            Some(Value::String(id)) if !id.is_empty() => id.clone(),
            Some(Value::Number(id)) => id.to_string(),
            Some(other) => return Err(format!("{:?} is no id: {other}", self.id_field)),
            None => {
                return Err(format!(
                    "no field {:?} to name the record by",
                    self.id_field
                ));
            }
        };
        let prompt = self.template.render(&record)?;
        if !self.seen.insert(id.clone()) {
            return Err(format!(
                "{id:?} was there before: a second record of the same id"
            ));
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
                    self.lines = None; // It would fail again, without end.
                    Err(format!("the rest cannot be read: {error}"))
                }
            };
            let line = self.line;
            return Some(result.map_err(|what| Problem { line, what }));
        }
    }
}

/// A prompt with `{field}`s in it; `{{` and `}}` stand for the braces themselves.
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
                            Some('{') | None => return Err("a `{` without its `}`".into()),
                            Some(c) => field.push(c),
                        }
                    }
                    if field.is_empty() {
                        return Err("`{}` names no field; `{{` is a brace".into());
                    }
                    parts.push(Part::Text(std::mem::take(&mut text)));
                    parts.push(Part::Field(field));
                }
                '}' => return Err("a `}` without its `{`; `}}` is a brace".into()),
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
                    None => return Err(format!("no field {field:?}, which the prompt names")),
                    Some(Value::Null) => {
                        return Err(format!("field {field:?} is null, and the prompt names it"));
                    }
                    Some(Value::String(text)) => prompt.push_str(text),
                    Some(other) => prompt.push_str(&other.to_string()),
                },
            }
        }
        Ok(prompt)
    }
}
