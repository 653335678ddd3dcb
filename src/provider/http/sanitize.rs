//! Server texts, made fit for one line of a log or a terminal.

use std::borrow::Cow;

/// The longest message kept, in bytes.
const MAX_MESSAGE: usize = 2048;
/// The longest excerpt of a web page, in bytes.
const MAX_EXCERPT: usize = 200;

/// Returns the text as one line of at most [`MAX_MESSAGE`] bytes. Runs of white space and control characters become a
/// space and escape sequences are removed, so that no reply can forge lines of a log or colour a terminal.
pub(super) fn one_line(text: &str) -> String {
    let text = without_escapes(text);
    let mut out = String::with_capacity(text.len().min(MAX_MESSAGE + 4));
    for word in text.split(|c: char| c.is_whitespace() || c.is_control()) {
        if out.len() > MAX_MESSAGE {
            break;
        }
        if !word.is_empty() {
            if !out.is_empty() {
                out.push(' ');
            }
            out.push_str(word);
        }
    }
    truncate(out, MAX_MESSAGE)
}

/// Truncates a text to at most `max` bytes, between characters.
pub(super) fn truncate(text: String, max: usize) -> String {
    if text.len() <= max {
        return text;
    }
    let ellipsis = "…";
    let mut end = max - ellipsis.len();
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{ellipsis}", &text[..end])
}

/// Removes terminal escape sequences: ESC `[` … letter.
fn without_escapes(text: &str) -> Cow<'_, str> {
    if !text.contains("\u{1b}[") {
        return Cow::Borrowed(text);
    }
    let mut parts = text.split("\u{1b}[");
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let end = part.find(|c: char| ('\u{40}'..='\u{7e}').contains(&c));
        out.push_str(end.map_or("", |end| &part[end + 1..]));
    }
    Cow::Owned(out)
}

/// Whether a body is a web page, which no API sends.
pub(super) fn is_web_page(body: &str) -> bool {
    let body = body.trim_start_matches('\u{feff}').trim_start();
    body.starts_with('<') && {
        let start: String = body.chars().take(1000).collect();
        let start = start.to_ascii_lowercase();
        ["<html", "<!doctype html", "<head", "<body", "<title", "<h1"]
            .iter()
            .any(|tag| start.contains(tag))
    }
}

/// Returns the title of a web page, or the beginning of its text.
pub(super) fn web_page_excerpt(page: &str) -> String {
    let lower = page.to_ascii_lowercase();
    let title = lower.find("<title").and_then(|tag| {
        let start = tag + lower[tag..].find('>')? + 1;
        let end = start + lower[start..].find("</title")?;
        Some(one_line(&page[start..end])).filter(|title| !title.is_empty())
    });
    let text = title.unwrap_or_else(|| {
        let mut text = String::new();
        for part in page.split('<') {
            let (_, after) = part.split_once('>').unwrap_or_default();
            text.push_str(after);
            text.push(' ');
        }
        one_line(&text)
    });
    truncate(text, MAX_EXCERPT)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_message_is_one_line_without_escapes() {
        let cases = [
            ("as it is", "as it is"),
            ("two\r\nlines\tand  a tab", "two lines and a tab"),
            ("\u{1b}[2J\u{1b}[31mred\u{1b}[0m alert\u{7}", "red alert"),
            ("cut \u{1b}[3", "cut"),
            ("a\u{2028}b\u{85}c\u{0}d", "a b c d"),
            ("", ""),
        ];
        for (text, expected) in cases {
            assert_eq!(one_line(text), expected);
        }
    }

    #[test]
    fn a_web_page_is_detected_and_named_by_its_title() {
        let cases = [
            (
                "<html>\r\n<head><title>502 Bad Gateway</title></head>…",
                Some("502 Bad Gateway"),
            ),
            (
                "\u{feff} <!DOCTYPE HTML><TITLE>\nLog in\n</TITLE>",
                Some("Log in"),
            ),
            ("<html><h1>No <b>title</b></h1></html>", Some("No title")),
            ("<html><title></title>x", Some("x")),
            (
                "<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code></Error>",
                None,
            ),
            ("{\"error\": \"<html>\"}", None),
            ("", None),
        ];
        for (body, expected) in cases {
            let title = is_web_page(body).then(|| web_page_excerpt(body));
            assert_eq!(title.as_deref(), expected, "{body}");
        }
    }

    proptest! {
        #[test]
        fn any_text_becomes_a_bounded_line(text in "(\\PC|[\u{1b}\\[<>\r\n\t]|<title>|</title>){0,60}") {
            for line in [one_line(&text), web_page_excerpt(&text)] {
                prop_assert!(line.len() <= MAX_MESSAGE);
                prop_assert!(!line.chars().any(char::is_control), "{line:?}");
            }
        }
    }
}
