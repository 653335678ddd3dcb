//! Extracts the value of a reply, or describes its problem in words that help a model to correct it.

use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::error::Category;

use super::{SHOWN, boundary, quote};
use crate::structured::json;

/// Returns the `T` in a reply. It may be in a code fence, have prose around it, and be JSON within a
/// JSON string. Two values that fit are an error, and broken JSON is not repaired.
pub(super) fn value<T: DeserializeOwned>(text: &str, wrapped: bool) -> Result<T, String> {
    let text = text.trim_start_matches('\u{feff}').trim();
    if text.is_empty() {
        return Err("the reply is empty".into());
    }
    if let Some(json) = whole(text) {
        return match typed(json, wrapped) {
            Ok(value) => Ok(value),
            // The model may have written the JSON as a string.
            Err(problem) => match serde_json::from_str::<String>(json) {
                Ok(inner) => whole(&inner).map_or(Err(problem), |inner| typed(inner, wrapped)),
                Err(_) => Err(problem),
            },
        };
    }

    let spans: Vec<&str> = json::spans(text).map(|span| &text[span]).collect();
    let valid: Vec<&str> = spans.iter().copied().filter(|span| is_json(span)).collect();
    let mut fitting = valid.iter().filter_map(|json| typed(json, wrapped).ok());
    match (fitting.next(), fitting.count()) {
        (Some(value), 0) => Ok(value),
        (Some(_), more) => {
            let n = more + 1;
            Err(format!(
                "the reply holds {n} JSON values that fit: send one alone"
            ))
        }
        (None, _) => Err(match longest(&spans) {
            Some(json) if is_json(json) => typed::<T>(json, wrapped).err().unwrap_or_default(),
            Some(broken) => syntax(broken).unwrap_or_default(),
            None => format!("the reply holds no JSON: {:?}", quote(text, SHOWN)),
        }),
    }
}

/// Parses the whole text as a `T`, or describes what does not fit and where.
pub(super) fn typed<T: DeserializeOwned>(json: &str, wrapped: bool) -> Result<T, String> {
    // serde reads structs from arrays too; the wrapper must be an object.
    if wrapped && json.starts_with('{') && serde_json::from_str::<Wrapper<IgnoredAny>>(json).is_ok()
    {
        return bare::<Wrapper<T>>(json).map(|wrapper| wrapper.value);
    }
    bare(json)
}

fn bare<T: DeserializeOwned>(json: &str) -> Result<T, String> {
    let mut reader = serde_json::Deserializer::from_str(json);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let path = error.path().to_string();
        let error = error.into_inner();
        match error.classify() {
            Category::Data if path == "." => error.to_string(),
            Category::Data => format!("at `{path}`: {error}"),
            // Too deep for this type, although the syntax is right.
            _ => syntax(json).unwrap_or_else(|| error.to_string()),
        }
    })?;
    reader
        .end()
        .map_err(|error| syntax(json).unwrap_or_else(|| error.to_string()))?;
    Ok(value)
}

/// Returns the text without a code fence, if that is JSON.
fn whole(text: &str) -> Option<&str> {
    let text = text.trim();
    let fenced = text
        .strip_prefix("```")
        .and_then(|text| text.strip_suffix("```"));
    let inside = fenced.map_or(text, |text| {
        let language = text.find(|c: char| !c.is_ascii_alphanumeric());
        text[language.unwrap_or(0)..].trim()
    });
    is_json(inside).then_some(inside)
}

fn is_json(text: &str) -> bool {
    serde_json::from_str::<IgnoredAny>(text).is_ok()
}

fn longest<'a>(spans: &[&'a str]) -> Option<&'a str> {
    spans.iter().copied().max_by_key(|span| span.len())
}

/// Describes the first syntax error of a text; `None` if it is JSON.
fn syntax(json: &str) -> Option<String> {
    let error = serde_json::from_str::<IgnoredAny>(json).err()?;
    let place = format!("line {} column {}", error.line(), error.column());
    if error.is_eof() {
        return Some(format!("the JSON ends in the middle, at {place}"));
    }
    // serde_json reports the position of the unexpected byte or the one behind it.
    let line = json.lines().nth(error.line().saturating_sub(1));
    let line = line.unwrap_or_default();
    let at = boundary(line, error.column().saturating_sub(1));
    let rest = &line[at..];
    let back = line[..at]
        .rfind(|c: char| !c.is_alphabetic())
        .map_or(0, |i| i + 1);
    let word: String = line[back.min(at)..]
        .chars()
        .take_while(|c| c.is_alphanumeric())
        .collect();
    let what = match (&*word, rest.chars().next()) {
        ("NaN" | "Infinity" | "undefined", _) => {
            format!("`{word}` is not JSON: write a number or null")
        }
        ("True" | "False" | "None", _) => {
            format!("`{word}` is Python, not JSON: write true, false or null")
        }
        (_, Some('}' | ']')) if line[..at].trim_end().ends_with(',') => "a trailing comma".into(),
        (_, Some('\'')) => "a single quote where JSON has double quotes".into(),
        (_, Some('/')) => "a comment, which JSON does not have".into(),
        (_, Some('.')) if rest.starts_with("...") => "an ellipsis in the place of values".into(),
        _ if error.to_string().starts_with("control character") => {
            "a line break or control character within a string: write it as an escape".into()
        }
        _ if error.to_string().starts_with("key must be") => "a key without quotes".into(),
        _ => {
            let words = error.to_string();
            words.split(" at line").next().unwrap_or(&words).to_owned()
        }
    };
    Some(format!("it is not JSON: {what}, at {place}"))
}

#[derive(serde::Deserialize)]
struct Wrapper<T> {
    value: T,
}
