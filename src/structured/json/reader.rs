//! [`Reader`]: returns the elements of an array, each as soon as it closes.

use super::scanner::{MAX_DEPTH, SPECIAL, Scanner, Stop};
use crate::error::{Error, ErrorKind, Result};

const MAX_ELEMENT: usize = 16 << 20;
/// The number of unneeded bytes from which it pays to move the rest of the buffer.
const SWEEP: usize = 1 << 10;
/// The longest piece that is checked for special bytes first: models write in pieces of a few bytes, and most have none.
const SHORT: usize = 32;
/// The length of the longest word that may be a value ("-Infinity").
const MAX_WORD: usize = 9;

/// Finds the elements of one array in a reply that is still being written.
///
/// Text before the array (prose, code fences, a byte order mark) and after it is skipped. Elements are separated by
/// brackets, strings and commas alone. So an element that is not JSON (`NaN`, single quotes) is returned like any other
/// and fails where it is parsed, without harm to the others. A trailing comma is ignored, and so is
/// a missing comma behind an object.
///
/// Reading takes time linear in the length of the text, whatever the pieces, and memory for one element.
///
/// ```
/// use throughline::structured::json::Reader;
///
/// let mut reader = Reader::field("rivers");
/// reader.push(r#"Here you are: {"continent": "Europe", "rivers": [{"name": "Dan"#);
/// assert!(reader.next_element().is_none());
/// reader.push(r#"ube"}, {"name": "#);
/// assert_eq!(reader.next_element().unwrap()?, r#"{"name": "Danube"}"#);
/// assert!(reader.finish().unwrap_err().is_truncated()); // the second one is open
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Reader {
    target: Target,
    max_depth: u32,
    max_element: usize,
    /// The open element, and text that has not been read.
    buf: Vec<u8>,
    /// The position up to which the text has been read.
    pos: usize,
    /// The position up to which the text is not needed any more.
    keep: usize,
    state: State,
    scanner: Scanner,
    /// The number of elements returned so far, including failures.
    elements: usize,
    /// Other values that were found, for the error if there is no array.
    met: Met,
    failed: Option<Error>,
}

#[derive(Debug, Clone)]
enum Target {
    Array,
    Field(String),
    First,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before the array, or the object that has it.
    Seek,
    /// Behind a bracket that may be one in prose (`see [below]`).
    Opened,
    /// In the object, before a key. `sure`: it is an object, not a brace in prose.
    Key { sure: bool },
    /// In a key that began at `keep`.
    InKey { sure: bool },
    /// After a key, which is the array's.
    Colon { sure: bool, ours: bool },
    /// Before the value of a key.
    Value { ours: bool },
    /// In the value of another field.
    Skip,
    /// In the array, before an element.
    Between { after_comma: bool },
    /// In an element that began at `keep`.
    Element,
    /// In an element that is too large; its text is not kept.
    TooLarge,
    /// The array has ended.
    Done,
}

#[derive(Debug, Clone, Default)]
struct Met {
    empty_array: bool,
    object: bool,
    other_value: bool,
}

impl Reader {
    fn new(target: Target) -> Self {
        Self {
            target,
            max_depth: MAX_DEPTH - 2,
            max_element: MAX_ELEMENT,
            buf: Vec::new(),
            pos: 0,
            keep: 0,
            state: State::Seek,
            scanner: Scanner::default(),
            elements: 0,
            met: Met::default(),
            failed: None,
        }
    }

    /// Makes a reader of the first array in the text.
    pub fn array() -> Self {
        Self::new(Target::Array)
    }

    /// Makes a reader of the array in this field of an object.
    pub fn field(name: impl Into<String>) -> Self {
        Self::new(Target::Field(name.into()))
    }

    /// Makes a reader of the first array that stands by itself or in any field of an object.
    pub fn first_array() -> Self {
        Self::new(Target::First)
    }

    /// Sets the most nested brackets of an element. The default is 126, which makes 128 with the
    /// array and its object: the limit of `serde_json`.
    ///
    /// # Panics
    /// If `depth` is above 128.
    #[must_use]
    #[track_caller]
    pub fn max_depth(mut self, depth: u32) -> Self {
        assert!(depth <= MAX_DEPTH, "Reader::max_depth is 128 at most");
        self.max_depth = depth;
        self
    }

    /// Sets the most bytes of an element; the default is 16 MiB. A larger element is returned as an error, and the next
    /// one follows.
    #[must_use]
    pub fn max_element(mut self, bytes: usize) -> Self {
        self.max_element = bytes;
        self
    }

    /// Adds a piece of the text. A piece may end anywhere, also within a character.
    #[inline]
    pub fn push(&mut self, piece: impl AsRef<[u8]>) {
        if matches!(self.state, State::Done) {
            return;
        }
        if self.keep == self.buf.len() {
            self.buf.clear();
            (self.pos, self.keep) = (0, 0);
        } else if self.keep >= self.buf.len() / 2 && self.keep >= SWEEP {
            self.buf.drain(..self.keep);
            self.pos -= self.keep;
            self.keep = 0;
        }
        match piece.as_ref() {
            // Cheaper than to extend by a slice.
            [byte] => self.buf.push(*byte),
            piece => self.buf.extend_from_slice(piece),
        }
    }

    /// Returns the exact text of the next element that has closed; `None` until more text is pushed, and after the end
    /// of the array.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidOutput`] for an element that is too large or not UTF-8; the next element
    /// follows. Also for brackets that do not match or are too deep, which ends the reading.
    #[inline]
    pub fn next_element(&mut self) -> Option<Result<&str>> {
        if self.is_quiet() {
            return None;
        }
        self.take()
    }

    /// Skips a short piece within an element if it changes nothing, and returns whether it did.
    #[inline]
    fn is_quiet(&mut self) -> bool {
        let rest = &self.buf[self.pos..];
        let within = matches!(self.state, State::Element) && !self.scanner.escaped;
        if !within || rest.len() > SHORT || self.pos - self.keep >= self.max_element {
            return false;
        }
        let in_string = self.scanner.in_string;
        let special = |byte: &u8| match in_string {
            true => matches!(byte, b'"' | b'\\'),
            false => SPECIAL[*byte as usize],
        };
        let quiet = match rest {
            [b'"'] => {
                self.scanner.in_string = !self.scanner.in_string;
                true
            }
            [byte] => !special(byte),
            _ => !rest.iter().any(special),
        };
        if quiet {
            self.pos = self.buf.len();
        }
        quiet
    }

    #[inline(never)]
    fn take(&mut self) -> Option<Result<&str>> {
        let found = self.advance()?;
        self.elements += 1;
        Some(found.and_then(|(start, end)| {
            std::str::from_utf8(&self.buf[start..end])
                .map(str::trim_end)
                .map_err(|error| invalid(format!("element {}: {error}", self.elements)))
        }))
    }

    /// Returns the number of elements so far, including failures.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// Whether the array has ended: text that is pushed from now on is ignored.
    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// Checks at the end of the text that the array is complete. Take all elements first.
    ///
    /// # Errors
    /// [`ErrorKind::Truncated`] if the array is open; [`ErrorKind::InvalidOutput`] if there
    /// was none, or its brackets did not match.
    pub fn finish(&self) -> Result<()> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        match self.state {
            State::Done => Ok(()),
            State::Seek | State::Opened | State::Key { sure: false } => self.none_found(),
            State::InKey { sure: false } | State::Colon { sure: false, .. } => self.none_found(),
            State::Between { .. } | State::Element | State::TooLarge => {
                let n = self.elements;
                Err(truncated(format!("the array is open after {n} elements")))
            }
            _ => Err(truncated("the object that should have the array is open")),
        }
    }

    fn none_found(&self) -> Result<()> {
        let sought = match &self.target {
            Target::Field(name) => format!("an array in a field `{name}`"),
            _ => "an array".to_owned(),
        };
        Err(invalid(match &self.met {
            Met {
                empty_array: true, ..
            } => return Ok(()),
            Met {
                other_value: true, ..
            } => format!("the field that should be {sought} holds something else"),
            Met { object: true, .. } => format!("the reply's object does not have {sought}"),
            _ => format!("the reply does not hold {sought}"),
        }))
    }

    /// Reads to the end of an element or of the text.
    fn advance(&mut self) -> Option<Result<(usize, usize)>> {
        loop {
            match self.state {
                State::Done => return None,
                State::Seek => self.seek()?,
                State::Opened => self.opened()?,
                State::Key { .. } | State::Colon { .. } | State::Value { .. } => self.object()?,
                State::InKey { sure } => self.in_key(sure)?,
                State::Skip => {
                    self.keep = self.pos;
                    match self.scanner.run(&self.buf, &mut self.pos, self.max_depth) {
                        Stop::Open => {
                            self.keep = self.pos;
                            return None;
                        }
                        Stop::Closed => {}
                        Stop::At(b',') => self.go(State::Key { sure: true }),
                        Stop::At(b'}') => self.object_ended(),
                        stop => return Some(Err(self.fail(stop))),
                    }
                }
                State::Between { after_comma } => match self.non_space()? {
                    b']' => {
                        self.state = State::Done;
                        self.buf = Vec::new();
                        (self.pos, self.keep) = (0, 0);
                    }
                    b',' => {
                        self.go(State::Between { after_comma: true });
                        if after_comma || self.elements == 0 {
                            let n = self.elements + 1;
                            return Some(Err(invalid(format!("element {n} is missing"))));
                        }
                    }
                    _ => {
                        self.scanner = Scanner::default();
                        self.keep = self.pos;
                        self.state = State::Element;
                    }
                },
                State::Element | State::TooLarge => return self.element(),
            }
        }
    }

    fn element(&mut self) -> Option<Result<(usize, usize)>> {
        let stop = self.scanner.run(&self.buf, &mut self.pos, self.max_depth);
        let (start, end) = (self.keep, self.pos);
        if matches!(self.state, State::Element) && end - start > self.max_element {
            self.state = State::TooLarge;
        }
        let too_large = matches!(self.state, State::TooLarge);
        if too_large {
            self.keep = self.pos;
        }
        match stop {
            Stop::Open => return None,
            // `Between` reads the next byte.
            Stop::Closed | Stop::At(b']') => self.state = State::Between { after_comma: false },
            Stop::At(b',') => self.go(State::Between { after_comma: true }),
            stop => return Some(Err(self.fail(stop))),
        }
        self.keep = self.pos;
        if too_large {
            let (n, max) = (self.elements + 1, self.max_element);
            let message = format!("element {n} has more than the {max} bytes allowed");
            return Some(Err(invalid(message)));
        }
        Some(Ok((start, end)))
    }

    /// Looks for the bracket that may begin the array, or the object around it.
    fn seek(&mut self) -> Option<()> {
        let (array, object) = match self.target {
            Target::Array => (true, false),
            Target::Field(_) => (false, true),
            Target::First => (true, true),
        };
        let rest = &self.buf[self.pos..];
        let found = rest
            .iter()
            .position(|b| (array && *b == b'[') || (object && *b == b'{'));
        let Some(found) = found else {
            self.pos = self.buf.len();
            self.keep = self.pos;
            return None;
        };
        let brace = rest[found] == b'{';
        self.pos += found + 1;
        self.keep = self.pos;
        self.state = if brace {
            State::Key { sure: false }
        } else {
            State::Opened
        };
        Some(())
    }

    /// Distinguishes an array from a bracket in prose by its first byte.
    fn opened(&mut self) -> Option<()> {
        let sure = match self.non_space()? {
            b'{' | b'[' | b'"' | b'-' | b'0'..=b'9' => true,
            b']' => {
                // "[ ]" may be a checkbox.
                self.met.empty_array = true;
                false
            }
            _ => {
                let rest = &self.buf[self.pos..];
                let len = rest.iter().position(|b| !b.is_ascii_alphabetic());
                let word = match len {
                    Some(len) => &rest[..len],
                    None if rest.len() <= MAX_WORD => return None,
                    None => b"",
                };
                matches!(
                    word,
                    b"true"
                        | b"false"
                        | b"null"
                        | b"NaN"
                        | b"Infinity"
                        | b"None"
                        | b"True"
                        | b"False"
                )
            }
        };
        if sure {
            self.state = State::Between { after_comma: false };
        } else {
            self.again();
        }
        Some(())
    }

    fn object(&mut self) -> Option<()> {
        let byte = self.non_space()?;
        match self.state {
            State::Key { sure } => match byte {
                b'"' => {
                    self.pos += 1;
                    self.keep = self.pos;
                    self.scanner = Scanner::in_string();
                    self.state = State::InKey { sure };
                }
                b'}' => self.object_ended(),
                b',' if sure => self.go(State::Key { sure }),
                _ if sure => {
                    // Not JSON: continue behind the next comma.
                    self.scanner = Scanner::default();
                    self.state = State::Skip;
                }
                _ => self.again(),
            },
            State::Colon { sure, ours } => match byte {
                b':' => self.go(State::Value { ours }),
                _ if sure => {
                    self.scanner = Scanner::default();
                    self.state = State::Skip;
                }
                _ => self.again(),
            },
            State::Value { ours: true } if byte == b'[' => {
                self.go(State::Between { after_comma: false });
            }
            State::Value { ours } => {
                // With `First`, any array will do, and other fields do not matter.
                self.met.other_value |= ours && !matches!(self.target, Target::First);
                self.scanner = Scanner::default();
                self.state = State::Skip;
            }
            _ => unreachable!("only called in these states"),
        }
        Some(())
    }

    fn in_key(&mut self, sure: bool) -> Option<()> {
        let rest = &self.buf[self.pos..];
        // Keys are short, so they are read byte by byte.
        for (i, byte) in rest.iter().enumerate() {
            match byte {
                _ if self.scanner.escaped => self.scanner.escaped = false,
                b'\\' => self.scanner.escaped = true,
                b'"' => {
                    let key = &self.buf[self.keep..self.pos + i];
                    let ours = match &self.target {
                        Target::Field(name) => is_key(key, name),
                        _ => true,
                    };
                    self.pos += i;
                    self.go(State::Colon { sure, ours });
                    return Some(());
                }
                _ => {}
            }
        }
        self.pos = self.buf.len();
        if self.pos - self.keep > self.max_element {
            // Too long for the field that is sought.
            self.keep = self.pos;
        }
        None
    }

    /// Goes back to seeking, because a bracket was not the beginning.
    fn again(&mut self) {
        self.pos = self.keep;
        self.state = State::Seek;
    }

    fn object_ended(&mut self) {
        self.met.object = true;
        self.go(State::Seek);
    }

    /// Steps over the current byte.
    fn go(&mut self, state: State) {
        self.pos += 1;
        // A brace may be one in prose; then the text behind it is read again.
        if !matches!(state, State::Colon { sure: false, .. }) {
            self.keep = self.pos;
        }
        self.state = state;
    }

    /// Returns the next byte that is not white space.
    fn non_space(&mut self) -> Option<u8> {
        let rest = &self.buf[self.pos..];
        let spaces = rest
            .iter()
            .position(|b| !matches!(b, b' ' | b'\n' | b'\r' | b'\t'));
        self.pos += spaces.unwrap_or(rest.len());
        self.buf.get(self.pos).copied()
    }

    fn fail(&mut self, stop: Stop) -> Error {
        let what = match stop {
            Stop::TooDeep => format!("opens more than {} brackets", self.max_depth),
            Stop::Mismatch(byte) | Stop::At(byte) => {
                format!("has a `{}` that closes nothing", byte as char)
            }
            Stop::Open | Stop::Closed => "is open".to_owned(),
        };
        let n = self.elements + 1;
        let error = invalid(format!("element {n} {what}: the rest cannot be read"));
        self.failed = Some(error.clone());
        self.state = State::Done;
        error
    }
}

fn is_key(raw: &[u8], name: &str) -> bool {
    if !raw.contains(&b'\\') {
        return raw == name.as_bytes();
    }
    let quoted = [b"\"", raw, b"\""].concat();
    serde_json::from_slice::<String>(&quoted).is_ok_and(|key| key == name)
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOutput, message)
}

fn truncated(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Truncated, message)
}
