//! The incremental JSON reader and the drafts against `serde_json`, on any bytes cut anywhere.
//!
//! The first byte decides how the others are cut into pieces. The properties:
//! - nothing panics, and cutting changes nothing;
//! - the elements of a text that is a JSON array are those that `serde_json` reads;
//! - each draft is JSON, and the last draft of a text that is JSON is the text.

#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use throughline::structured::json::{Draft, Reader};

/// The elements with the errors as text, and how it ended.
type Told = (Vec<Result<String, String>>, Result<(), String>);

fn read<'a>(mut reader: Reader, pieces: impl Iterator<Item = &'a [u8]>) -> Told {
    let mut elements = Vec::new();
    for piece in pieces {
        reader.push(piece);
        while let Some(element) = reader.next_element() {
            elements.push(element.map(str::to_owned).map_err(|e| e.to_string()));
        }
    }
    (elements, reader.finish().map_err(|e| e.to_string()))
}

fuzz_target!(|data: &[u8]| {
    let Some((cut, text)) = data.split_first() else {
        return;
    };
    let size = usize::from(*cut % 40) + 1;
    for reader in [
        Reader::array(),
        Reader::field("a"),
        Reader::first_array(),
        Reader::array().max_element(8).max_depth(2),
    ] {
        let whole = read(reader.clone(), [text].into_iter());
        assert_eq!(whole, read(reader.clone(), text.chunks(size)));
        assert_eq!(whole, read(reader, text.chunks(1)));
    }

    let Ok(value) = serde_json::from_slice::<Value>(text) else {
        let mut draft = Draft::new();
        for piece in text.chunks(size) {
            draft.push(piece);
            if let Some(closed) = draft.closed() {
                serde_json::from_str::<Value>(&closed).unwrap();
            }
        }
        return;
    };
    if let Value::Array(values) = &value {
        let (elements, end) = read(Reader::array(), text.chunks(size));
        assert_eq!(end, Ok(()));
        let texts = elements.iter().map(|element| element.as_deref().unwrap());
        let read: Vec<Value> = texts.map(|text| serde_json::from_str(text).unwrap()).collect();
        // Duplicate keys and rounding are the same: it is the same reader below.
        assert_eq!(&read, values);
    }
    if value.is_array() || value.is_object() {
        let mut draft = Draft::new();
        let mut last = None;
        for piece in text.chunks(size) {
            draft.push(piece);
            if let Some(closed) = draft.closed() {
                last = Some(serde_json::from_str::<Value>(&closed).unwrap());
            }
        }
        assert!(draft.is_done());
        assert_eq!(last, Some(value));
    }
});
