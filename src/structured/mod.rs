//! Replies as Rust values: whole, element by element, and growing.
//!
//! - `form`: the JSON schema of a type, in the form that a request asks for;
//! - `extract`: the value of a reply, or its problem in words that help a model to correct it;
//! - `typed`, `items`, `growing`: one value, the elements of a list as they close, and drafts of a value that is still
//!   being written;
//! - [`json`]: readers of JSON that is still being written.

mod extract;
mod form;
mod growing;
mod items;
pub mod json;
mod typed;

pub use self::growing::{Drafts, Growing};
pub use self::items::{Items, OnBreak};
pub use self::typed::{GenerateAs, Generated, OnLength, Rejection};

use std::fmt::Write as _;

/// The most bytes of a reply that are quoted to the model that wrote it.
const QUOTED: usize = 16 << 10;
/// The most bytes of a reply that an error message quotes.
const SHOWN: usize = 120;

/// Shortens a long text to its beginning and its end.
fn quote(text: &str, most: usize) -> String {
    if text.len() <= most {
        return text.to_owned();
    }
    let head = boundary(text, most / 2);
    let tail = boundary(text, text.len() - most / 2);
    let mut quote = text[..head].to_owned();
    let _ = write!(quote, " [{} bytes left out] ", tail - head);
    quote.push_str(&text[tail..]);
    quote
}

/// Returns the beginning of the character at this byte.
fn boundary(text: &str, mut at: usize) -> usize {
    at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}
