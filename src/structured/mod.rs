//! Replies as Rust values, as early as possible.
//!
//! - `form`: a type's JSON schema, and how a request asks for it;
//! - `extract`: the value in a reply, or what is wrong with it, in words a model can use;
//! - `typed`, `items`, `growing`: one value, the elements of an array as they close, one value
//!   while it grows.

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

/// How much of a reply is quoted to the model that wrote it.
const QUOTED: usize = 16 << 10;
/// How much of it is quoted to a person.
const SHOWN: usize = 120;

/// The beginning and the end of a text that may be long.
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

/// The beginning of the character at this byte.
fn boundary(text: &str, mut at: usize) -> usize {
    at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}
