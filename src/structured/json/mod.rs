//! JSON that is still being written: [`Reader`] returns the elements of an array as
//! they close, [`Draft`] closes all that is open.
//!
//! Both take the text in pieces that may end anywhere, in time linear in its length. They find where values begin and
//! end with a common scanner of brackets and strings; `serde_json` parses the values.

mod draft;
mod reader;
mod scanner;

pub use self::draft::Draft;
pub use self::reader::Reader;
pub(crate) use self::scanner::spans;
