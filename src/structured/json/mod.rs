//! JSON while it is still being written: [`Reader`] hands out the elements of an array as
//! they close, [`Draft`] closes what is open.
//!
//! Both take the text in pieces that may break anywhere, in time linear in the text, and
//! neither knows of providers or of time. They find where values begin and end and leave
//! to `serde_json` what is in them.

mod draft;
mod reader;
mod scanner;

pub use self::draft::Draft;
pub use self::reader::Reader;
pub(crate) use self::scanner::spans;
