//! [`BodyFormat`]: detects by its first bytes whether a body is a document or a stream of events, because servers and
//! gateways often declare one and send the other.

/// The format of a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BodyFormat {
    /// JSON, a web page, or another body that is read as a whole.
    Document,
    /// Server-sent events.
    Events,
}

impl BodyFormat {
    /// Returns the format of a body with this `start`, or `None` while more bytes are needed and the body has not
    /// `ended`. If the bytes do not decide, the declared format does.
    pub(super) fn detect(start: &[u8], ended: bool, declared_events: bool) -> Option<Self> {
        const BOM: &[u8] = "\u{feff}".as_bytes();
        const FIELDS: [&[u8]; 4] = [b"data", b"event", b"id", b"retry"];
        let declared = match declared_events {
            true => Self::Events,
            false => Self::Document,
        };
        let undecided = ended.then_some(declared);
        let Some(start) = start
            .strip_prefix(BOM)
            .map(<[u8]>::trim_ascii_start)
            .or_else(|| {
                let half = BOM.starts_with(start);
                (!half).then(|| start.trim_ascii_start())
            })
        else {
            return undecided;
        };
        match start.first() {
            None => undecided,
            Some(b'{' | b'[' | b'"' | b'<') => Some(Self::Document),
            // Compressed: parsing it as a document reports the compression.
            Some(0x1f) => Some(Self::Document),
            Some(b':') => Some(Self::Events),
            Some(_) => match start.iter().position(|byte| b":\r\n".contains(byte)) {
                Some(end) if FIELDS.contains(&&start[..end]) => Some(Self::Events),
                Some(_) => Some(declared),
                // More bytes may complete the name of a field.
                None if FIELDS.iter().any(|field| field.starts_with(start)) => undecided,
                None => Some(declared),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use BodyFormat::{Document, Events};

    #[test]
    fn the_first_bytes_decide_whatever_is_declared() {
        let cases: [(&str, BodyFormat); 13] = [
            ("data: {}\n\n", Events),
            ("data:{}", Events),
            (": ping\n\n", Events),
            ("event: message_start\ndata: {}\n\n", Events),
            ("\u{feff}\r\n\r\nid: 1\n", Events),
            ("retry\n", Events),
            ("{\"choices\": []}", Document),
            (" \n\n{\"choices\": []}", Document),
            ("\u{feff}[{}]", Document),
            ("<html>", Document),
            ("\"overloaded\"", Document),
            ("database: down", Document),
            ("", Document),
        ];
        for (body, expected) in cases {
            for declared in [false, true] {
                let format = BodyFormat::detect(body.as_bytes(), true, declared);
                let open = body.is_empty() || body.starts_with("database");
                let expected = if open && declared { Events } else { expected };
                assert_eq!(format, Some(expected), "{body:?}, declared: {declared}");
            }
        }
    }

    proptest! {
        #[test]
        fn more_bytes_never_change_a_decision(
            body in "(\u{feff})?[ \n]{0,3}(data|event|id|retry|:|\\{|<|dat|x){0,2}[: \n{a]{0,4}",
            declared in any::<bool>(),
        ) {
            let whole = BodyFormat::detect(body.as_bytes(), true, declared).unwrap();
            for end in 0..body.len() {
                let format = BodyFormat::detect(&body.as_bytes()[..end], false, declared);
                prop_assert!(format.is_none_or(|format| format == whole), "{body:?} {end}");
            }
        }
    }
}
