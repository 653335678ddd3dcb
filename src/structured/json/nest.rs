//! Where one value of a text ends, told by brackets and strings alone.

/// As deep as `serde_json` reads, which is as deep as the bits of a `u128`.
pub(super) const MAX_DEPTH: u32 = 128;

/// Where in brackets and strings one value is.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Nest {
    /// A bit for each open bracket: whether it is a brace.
    braces: u128,
    depth: u32,
    pub(super) in_string: bool,
    pub(super) escaped: bool,
}

/// What the end of a value looks like.
pub(super) enum Stop {
    /// The text ends first.
    Open,
    /// Its last bracket has closed.
    Closed,
    /// At this delimiter, which is not part of it.
    At(u8),
    Mismatch(u8),
    TooDeep,
}

/// Bytes that mean something outside strings.
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

impl Nest {
    /// Behind the quote that opens a string.
    pub(super) fn in_string() -> Self {
        Self {
            in_string: true,
            ..Self::default()
        }
    }

    /// Goes through the text of one value from `*pos` on, up to its last bracket or to the
    /// delimiter behind it. Strings are not done with their quote: those that are not escaped
    /// would cut the value short.
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
                    self.braces = (self.braces << 1) | u128::from(open == b'{');
                }
                delimiter if self.depth == 0 => break Stop::At(delimiter),
                b',' => {}
                close => {
                    if (self.braces & 1 == 1) != (close == b'}') {
                        break Stop::Mismatch(close);
                    }
                    self.depth -= 1;
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

/// The stretches of a text between a bracket and the one that closes it, or that should
/// have and does not fit, or the end.
#[cfg(feature = "structured")]
pub(crate) fn spans(text: &str) -> impl Iterator<Item = std::ops::Range<usize>> {
    let mut pos = 0;
    std::iter::from_fn(move || {
        let start = pos + text.get(pos..)?.find(['[', '{'])?;
        pos = start;
        // What follows a bracket that does not fit is looked at anew, what is before it is not:
        // the parts of a broken value are no values.
        match Nest::default().run(text.as_bytes(), &mut pos, MAX_DEPTH) {
            Stop::Closed | Stop::Open => {}
            _ => pos += 1,
        }
        Some(start..pos)
    })
}
