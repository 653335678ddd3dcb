//! [`Draft`]: one value that is still being written, closed wherever it is open.

/// What may follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before the value's first bracket.
    Seek,
    /// After a brace that may be one in prose.
    Opened,
    Value,
    Key,
    InKey,
    Colon,
    InString,
    /// In a number or a word, which may go on.
    Scalar,
    /// A value has ended.
    After,
    /// The outermost bracket has closed.
    Done,
    /// What came is not JSON.
    Broken,
}

/// As deep as `serde_json` reads.
const MAX_DEPTH: usize = 127;

/// One object or array that is still being written, as JSON at any moment.
///
/// What is open is closed: strings where they end so far, brackets in their order. What cannot
/// be closed is left out until it can: half a key, a key without its value, half an escape, a
/// number that may have more digits. Text before the value and behind it is skipped.
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
    /// From the first bracket on.
    text: Vec<u8>,
    /// The bracket that closes each that is open.
    open: Vec<u8>,
    state: State,
    /// As much of the text can be closed; with a quote first, in a string.
    safe: usize,
    escape: Escape,
    max_bytes: usize,
}

/// Where in an escape of a string.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Escape {
    None,
    Backslash,
    /// In the digits of a `\u`: their value so far, and how many are missing.
    Unicode(u16, u8),
    /// A high surrogate is worth nothing without its low one.
    Half,
}

impl Default for Draft {
    fn default() -> Self {
        Self::new()
    }
}

impl Draft {
    /// Nothing yet. At most 16 MiB are taken in, and 127 brackets inside one another.
    pub fn new() -> Self {
        Self {
            text: Vec::new(),
            open: Vec::new(),
            state: State::Seek,
            safe: 0,
            escape: Escape::None,
            max_bytes: 16 << 20,
        }
    }

    /// How many bytes the value may have; what is larger counts as not JSON.
    #[must_use]
    pub fn max_bytes(mut self, bytes: usize) -> Self {
        self.max_bytes = bytes;
        self
    }

    /// Takes in more of the text. A piece may end anywhere, within a character too.
    pub fn push(&mut self, piece: impl AsRef<[u8]>) {
        let mut piece = piece.as_ref();
        while let Some((byte, rest)) = piece.split_first() {
            match self.state {
                State::Done | State::Broken => return,
                State::Seek if !matches!(byte, b'{' | b'[') => {}
                State::InString if self.escape == Escape::None => {
                    piece = self.plain(piece);
                    continue;
                }
                _ => {
                    self.text.push(*byte);
                    self.state = self.step(*byte);
                }
            }
            piece = rest;
        }
        if self.text.len() > self.max_bytes {
            self.state = State::Broken;
        }
    }

    /// The value so far, closed; `None` before it begins, and once it is known not to be JSON.
    pub fn closed(&self) -> Option<String> {
        if matches!(self.state, State::Seek | State::Opened | State::Broken) {
            return None;
        }
        let mut closed = self.text[..self.safe].to_vec();
        if self.state == State::InString {
            closed.push(b'"');
        }
        closed.extend(self.open.iter().rev());
        String::from_utf8(closed).ok()
    }

    /// Whether the value has ended: what is pushed from now on is ignored.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Whether what came cannot be JSON any more.
    pub fn is_broken(&self) -> bool {
        self.state == State::Broken
    }

    /// How many bytes the value has so far.
    pub fn len(&self) -> usize {
        self.text.len()
    }

    /// Whether the value has not begun.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty()
    }

    /// Takes in what is plain text of a string, and the byte behind it.
    fn plain<'a>(&mut self, piece: &'a [u8]) -> &'a [u8] {
        let special = piece.iter().position(|b| matches!(b, b'"' | b'\\'));
        let (plain, rest) = piece.split_at(special.unwrap_or(piece.len()));
        self.text.extend_from_slice(plain);
        let Some((byte, rest)) = rest.split_first() else {
            // A character of several bytes, four at most, is whole when the next one begins.
            let len = self.text.len();
            let tail = self.text.iter().enumerate().rev().take(4);
            self.safe = match tail.into_iter().find(|(_, b)| **b & 0xC0 != 0x80) {
                Some((last, b)) if *b >= 0x80 => last,
                _ => len,
            };
            return rest;
        };
        self.text.push(*byte);
        self.state = self.step(*byte);
        rest
    }

    /// Takes in the byte that was pushed last.
    fn step(&mut self, byte: u8) -> State {
        let space = matches!(byte, b' ' | b'\n' | b'\r' | b'\t');
        match (self.state, byte) {
            (State::InString, _) => self.in_string(byte),
            (State::InKey, _) => self.in_key(byte),
            (State::Scalar, b',' | b'}' | b']') => {
                self.safe = self.text.len() - 1;
                self.after(byte)
            }
            (State::Scalar, _) if space => self.ended(1),
            (State::Scalar, b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'+' | b'.') => {
                State::Scalar
            }
            (state, _) if space => state,
            (State::Seek | State::Value, b'{') => self.opened(b'}'),
            (State::Seek | State::Value, b'[') => self.opened(b']'),
            (State::Opened, b'"') if self.open == b"}" => {
                self.safe = 1;
                State::InKey
            }
            (State::Opened, b'}' | b']') if self.open == [byte] => self.closed_by(byte),
            (State::Opened, b'{' | b'[' | b'"' | b'-' | b'0'..=b'9' | b't' | b'f' | b'n')
                if self.open == b"]" =>
            {
                self.safe = 1;
                self.value(byte)
            }
            (State::Opened, _) => {
                // A bracket in prose. This byte may be a better one.
                self.text.clear();
                self.open.clear();
                match byte {
                    b'{' | b'[' => {
                        self.text.push(byte);
                        self.opened(if byte == b'{' { b'}' } else { b']' })
                    }
                    _ => State::Seek,
                }
            }
            (State::Value, b']')
                if self.text[..self.text.len() - 1]
                    .trim_ascii_end()
                    .ends_with(b"[") =>
            {
                self.closed_by(byte)
            }
            (State::Value, _) => self.value(byte),
            (State::Key, b'"') => State::InKey,
            (State::Key, b'}')
                if self.text[..self.text.len() - 1]
                    .trim_ascii_end()
                    .ends_with(b"{") =>
            {
                self.closed_by(byte)
            }
            (State::Colon, b':') => State::Value,
            (State::After, _) => self.after(byte),
            _ => State::Broken,
        }
    }

    fn value(&mut self, byte: u8) -> State {
        match byte {
            b'{' => self.opened(b'}'),
            b'[' => self.opened(b']'),
            b'"' => {
                self.safe = self.text.len();
                State::InString
            }
            b'-' | b'0'..=b'9' | b't' | b'f' | b'n' => State::Scalar,
            _ => State::Broken,
        }
    }

    fn opened(&mut self, close: u8) -> State {
        if self.open.len() == MAX_DEPTH {
            return State::Broken;
        }
        self.open.push(close);
        self.safe = self.text.len();
        match (self.open.len(), close) {
            (1, _) => State::Opened,
            (_, b'}') => State::Key,
            _ => State::Value,
        }
    }

    fn after(&mut self, byte: u8) -> State {
        match byte {
            b',' if self.open.last() == Some(&b'}') => State::Key,
            b',' => State::Value,
            b'}' | b']' => self.closed_by(byte),
            _ => State::Broken,
        }
    }

    fn closed_by(&mut self, byte: u8) -> State {
        if self.open.pop() != Some(byte) {
            return State::Broken;
        }
        self.ended(0);
        if self.open.is_empty() {
            State::Done
        } else {
            State::After
        }
    }

    /// A value has ended, so many bytes ago.
    fn ended(&mut self, ago: usize) -> State {
        self.safe = self.text.len() - ago;
        State::After
    }

    fn in_key(&mut self, byte: u8) -> State {
        match (self.escape, byte) {
            (Escape::Backslash, _) => self.escape = Escape::None,
            (_, b'\\') => self.escape = Escape::Backslash,
            (_, b'"') => return State::Colon,
            _ => {}
        }
        State::InKey
    }

    fn in_string(&mut self, byte: u8) -> State {
        let len = self.text.len();
        let before = self.escape;
        self.escape = match (before, byte) {
            (Escape::None | Escape::Half, b'\\') => {
                if before == Escape::None {
                    self.safe = len - 1;
                }
                Escape::Backslash
            }
            (Escape::None | Escape::Half, b'"') => {
                self.escape = Escape::None;
                return self.ended(0);
            }
            // The rest of a string is taken in by `plain`.
            (Escape::None, _) => Escape::None,
            (Escape::Backslash, b'u') => Escape::Unicode(0, 4),
            (Escape::Backslash, _) => {
                self.safe = len;
                Escape::None
            }
            (Escape::Unicode(value, missing), _) => {
                let Some(digit) = (byte as char).to_digit(16) else {
                    return State::Broken;
                };
                let value = (value << 4) | digit as u16;
                match (missing, value) {
                    (2.., _) => Escape::Unicode(value, missing - 1),
                    (_, 0xD800..=0xDBFF) => Escape::Half,
                    _ => {
                        self.safe = len;
                        Escape::None
                    }
                }
            }
            // Nothing but the other half may follow.
            (Escape::Half, _) => return State::Broken,
        };
        State::InString
    }
}
