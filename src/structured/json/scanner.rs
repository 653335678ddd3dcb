//! [`Scanner`]: finds the end of one JSON value by its brackets and strings alone.

/// The most nested brackets that `serde_json` reads, and the bits of a `u128`.
pub(super) const MAX_DEPTH: u32 = 128;

/// How far one value has been scanned: the brackets and the string that are open.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Scanner {
    /// A bit for each open bracket: whether it is a brace.
    braces: u128,
    depth: u32,
    pub(super) in_string: bool,
    /// The last byte was a backslash in a string.
    pub(super) escaped: bool,
    /// The position of the last bracket or separating comma outside of strings.
    pub(super) mark: usize,
}

/// Why a scan stopped.
pub(super) enum Stop {
    /// The text ends first.
    Open,
    /// The outermost bracket of the value has closed.
    Closed,
    /// At this delimiter, which is not part of the value.
    At(u8),
    /// This bracket closes one of the other kind.
    Mismatch(u8),
    /// More brackets are open than are allowed.
    TooDeep,
}

/// Bytes outside of strings at which the scanner stops to look.
pub(super) const SPECIAL: [bool; 256] = {
    let mut table = [false; 256];
    let special = b"\"[]{},";
    let mut i = 0;
    while i < special.len() {
        table[special[i] as usize] = true;
        i += 1;
    }
    table
};

impl Scanner {
    /// A scanner behind the quote that opens a string.
    pub(super) fn in_string() -> Self {
        Self {
            in_string: true,
            ..Self::default()
        }
    }

    /// Whether the innermost open bracket is a brace.
    pub(super) fn is_in_object(&self) -> bool {
        self.braces & 1 == 1
    }

    /// The brackets that close those that are open, the innermost first.
    pub(super) fn closing_brackets(&self) -> impl Iterator<Item = u8> {
        let braces = self.braces;
        (0..self.depth).map(move |nth| if braces >> nth & 1 == 1 { b'}' } else { b']' })
    }

    /// Scans one value from `*pos` on, up to its last bracket or to the delimiter behind it. A string alone does not
    /// end the value: models forget to escape quotes, and the value would be cut short.
    pub(super) fn run(&mut self, text: &[u8], pos: &mut usize, max_depth: u32) -> Stop {
        let mut at = *pos;
        let stop = loop {
            if self.in_string {
                if self.escaped && at < text.len() {
                    self.escaped = false;
                    at += 1;
                }
                let rest = text.get(at..).unwrap_or_default();
                match rest.iter().position(|b| matches!(b, b'"' | b'\\')) {
                    Some(found) => {
                        at += found + 1;
                        self.escaped = rest[found] == b'\\';
                        self.in_string = self.escaped;
                        continue;
                    }
                    None => {
                        at = text.len();
                        break Stop::Open;
                    }
                }
            }
            let rest = &text[at..];
            let Some(found) = rest.iter().position(|b| SPECIAL[*b as usize]) else {
                at = text.len();
                break Stop::Open;
            };
            at += found;
            match text[at] {
                b'"' => self.in_string = true,
                open @ (b'[' | b'{') => {
                    if self.depth >= max_depth {
                        break Stop::TooDeep;
                    }
                    self.depth += 1;
                    self.mark = at;
                    self.braces = (self.braces << 1) | u128::from(open == b'{');
                }
                delimiter if self.depth == 0 => break Stop::At(delimiter),
                b',' => self.mark = at,
                close => {
                    if (self.braces & 1 == 1) != (close == b'}') {
                        break Stop::Mismatch(close);
                    }
                    self.depth -= 1;
                    self.mark = at;
                    self.braces >>= 1;
                    if self.depth == 0 {
                        at += 1;
                        break Stop::Closed;
                    }
                }
            }
            at += 1;
        };
        *pos = at;
        stop
    }
}

/// Returns the stretches of a text that begin with a bracket and end with the bracket that closes it, with one that
/// does not match, or with the text.
#[cfg(feature = "structured")]
pub(crate) fn spans(text: &str) -> impl Iterator<Item = std::ops::Range<usize>> {
    let mut pos = 0;
    std::iter::from_fn(move || {
        let start = pos + text.get(pos..)?.find(['[', '{'])?;
        pos = start;
        // The search goes on behind a bracket that does not match: the parts of a broken value are no values.
        match Scanner::default().run(text.as_bytes(), &mut pos, MAX_DEPTH) {
            Stop::Closed | Stop::Open => {}
            _ => pos += 1,
        }
        Some(start..pos)
    })
}
