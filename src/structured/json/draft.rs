//! [`Draft`]: one value that is still being written, closed wherever it is open.

use serde::de::IgnoredAny;

use super::scanner::{MAX_DEPTH, Scanner, Stop};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before the first bracket.
    Seek,
    /// Behind a first bracket that may be one in prose.
    Opened,
    /// In the value.
    Open,
    /// The outermost bracket has closed.
    Done,
    /// The brackets do not match, or the value is too large or too deep.
    Broken,
}

/// One object or array that is still being written, as JSON at any moment.
///
/// [`closed`](Self::closed) ends open strings where they end so far and closes open brackets in their order. It leaves
/// out a part that cannot be closed yet: half a key, a key without its value, half an escape, a number that may have
/// more digits. Text before the value and behind it is skipped.
///
/// ```
/// use throughline::structured::json::Draft;
///
/// let mut draft = Draft::new();
/// draft.push(r#"Sure: {"title": "Two ri"#);
/// assert_eq!(draft.closed().unwrap(), r#"{"title": "Two ri"}"#);
/// draft.push(r#"vers", "length": 12"#);
/// assert_eq!(draft.closed().unwrap(), r#"{"title": "Two rivers"}"#);
/// draft.push(r#"30, "names": ["Po", "#);
/// assert_eq!(draft.closed().unwrap(), r#"{"title": "Two rivers", "length": 1230, "names": ["Po"]}"#);
/// ```
#[derive(Debug, Clone)]
pub struct Draft {
    /// The value so far, from its first bracket on.
    text: Vec<u8>,
    scanner: Scanner,
    /// The number of bytes that the scanner has read.
    scanned: usize,
    state: State,
    max_bytes: usize,
}

impl Default for Draft {
    fn default() -> Self {
        Self::new()
    }
}

impl Draft {
    /// Makes an empty draft, which takes at most 16 MiB and as many nested brackets as `serde_json`.
    pub fn new() -> Self {
        Self {
            text: Vec::new(),
            scanner: Scanner::default(),
            scanned: 0,
            state: State::Seek,
            max_bytes: 16 << 20,
        }
    }

    /// Sets the most bytes that the value may have; a larger one is [broken](Self::is_broken).
    #[must_use]
    pub fn max_bytes(mut self, bytes: usize) -> Self {
        self.max_bytes = bytes;
        self
    }

    /// Adds a piece of the text. A piece may end anywhere, also within a character.
    pub fn push(&mut self, piece: impl AsRef<[u8]>) {
        let mut piece = piece.as_ref();
        loop {
            match self.state {
                State::Seek => {
                    let Some(at) = piece.iter().position(|b| matches!(b, b'{' | b'[')) else {
                        return;
                    };
                    self.text.push(piece[at]);
                    self.state = State::Opened;
                    piece = &piece[at + 1..];
                }
                State::Opened => {
                    let at = piece.iter().position(|b| !b.is_ascii_whitespace());
                    let (space, rest) = piece.split_at(at.unwrap_or(piece.len()));
                    self.text.extend_from_slice(space);
                    let Some(first) = rest.first() else {
                        return;
                    };
                    if begins(self.text[0], *first) {
                        self.state = State::Open;
                    } else {
                        // A bracket in prose. This byte may be a better one.
                        self.text.clear();
                        self.state = State::Seek;
                    }
                    piece = rest;
                }
                State::Open => {
                    self.text.extend_from_slice(piece);
                    let depth = MAX_DEPTH - 1;
                    let stop = self.scanner.run(&self.text, &mut self.scanned, depth);
                    self.text.truncate(self.scanned);
                    self.state = match stop {
                        _ if self.text.len() > self.max_bytes => State::Broken,
                        Stop::Open => State::Open,
                        Stop::Closed => State::Done,
                        _ => State::Broken,
                    };
                    return;
                }
                State::Done | State::Broken => return,
            }
        }
    }

    /// Returns the value so far, closed: JSON in any case. `None` before the value begins and where it is not JSON.
    pub fn closed(&self) -> Option<String> {
        if !matches!(self.state, State::Open | State::Done) {
            return None;
        }
        let (end, is_text) = self.end();
        let mut closed = self.text[..end].to_vec();
        if is_text {
            closed.push(b'"');
        }
        closed.extend(self.scanner.closing_brackets());
        let closed = String::from_utf8(closed).ok()?;
        let is_json = serde_json::from_str::<IgnoredAny>(&closed).is_ok();
        is_json.then_some(closed)
    }

    /// Whether the value has ended: text that is pushed from now on is ignored.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Whether the value can never be closed: its brackets do not match, or it is too large or too deep.
    pub fn is_broken(&self) -> bool {
        self.state == State::Broken
    }

    /// Returns the number of bytes that the value has so far.
    pub fn len(&self) -> usize {
        self.text.len()
    }

    /// Whether the value has not begun.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty()
    }

    /// How much of the text can be closed, and whether a string is open there.
    fn end(&self) -> (usize, bool) {
        let len = self.text.len();
        let mark = self.scanner.mark;
        let before = match self.text[mark] {
            b']' | b'}' => return (len, false),
            b',' => mark,
            _ => mark + 1,
        };
        let part = &self.text[mark + 1..];
        let value = match self.scanner.is_in_object() {
            true => after_key(part),
            false => Some(part),
        };
        let value = value.unwrap_or_default().trim_ascii_start();
        match value {
            [b'"', text @ ..] if self.scanner.in_string => {
                (len - text.len() + whole_characters(text), true)
            }
            [b'"', ..] => (len, false),
            // A number or a word has ended where a space follows.
            [.., last] if last.is_ascii_whitespace() => (len, false),
            _ => (before, false),
        }
    }
}

/// Whether a value can begin with this bracket and this byte, the first behind it that is no white space.
fn begins(bracket: u8, first: u8) -> bool {
    match bracket {
        b'{' => matches!(first, b'"' | b'}'),
        _ => matches!(
            first,
            b']' | b'{' | b'[' | b'"' | b'-' | b'0'..=b'9' | b't' | b'f' | b'n'
        ),
    }
}

/// The value of an object's member, behind its key and colon.
fn after_key(member: &[u8]) -> Option<&[u8]> {
    let key = member.trim_ascii_start().strip_prefix(b"\"")?;
    let mut escaped = false;
    let quote = key.iter().position(|byte| {
        let is_quote = *byte == b'"' && !escaped;
        escaped = *byte == b'\\' && !escaped;
        is_quote
    })?;
    key[quote + 1..].trim_ascii_start().strip_prefix(b":")
}

/// The number of bytes before an incomplete character or escape at the end of a string.
fn whole_characters(text: &[u8]) -> usize {
    let mut at = 0;
    while let Some(first) = text.get(at) {
        let len = match first {
            b'\\' => escape_len(&text[at..]),
            0xC0..=0xDF => 2,
            0xE0..=0xEF => 3,
            0xF0.. => 4,
            _ => 1,
        };
        if at + len > text.len() {
            break;
        }
        at += len;
    }
    at
}

/// How long the escape at the beginning of `text` is, where its end may be missing. A high surrogate is nothing
/// without the low one that follows it.
fn escape_len(text: &[u8]) -> usize {
    match text {
        [
            _,
            b'u',
            b'd' | b'D',
            b'8' | b'9' | b'a' | b'b' | b'A' | b'B',
            ..,
        ] => 12,
        [_, b'u', ..] => 6,
        _ => 2,
    }
}
