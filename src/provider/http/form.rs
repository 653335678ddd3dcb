//! Whether a body is a document or a stream of events, by its first bytes: servers and the
//! gateways in front of them often declare the one and send the other.

/// What a body is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// JSON, a web page, or anything else that is read as a whole.
    Document,
    /// Server-sent events.
    Events,
}

impl Form {
    /// The form of a body that starts so; `None` while more bytes are needed, which they are
    /// not when the body is `over`. What cannot be told by its bytes is what it is declared as.
    pub(super) fn of(start: &[u8], over: bool, declared_events: bool) -> Option<Self> {
        const BOM: &[u8] = "\u{feff}".as_bytes();
        const FIELDS: [&[u8]; 4] = [b"data", b"event", b"id", b"retry"];
        let declared = match declared_events {
            true => Self::Events,
            false => Self::Document,
        };
        let undecided = over.then_some(declared);
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
            // Compressed: read as a whole, it is named as such.
            Some(0x1f) => Some(Self::Document),
            Some(b':') => Some(Self::Events),
            Some(_) => match start.iter().position(|byte| b":\r\n".contains(byte)) {
                Some(end) if FIELDS.contains(&&start[..end]) => Some(Self::Events),
                Some(_) => Some(declared),
                // It may yet become the name of a field.
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
    use Form::{Document, Events};

    #[test]
    fn the_first_bytes_tell() {
        let cases: [(&str, Form); 13] = [
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
                let form = Form::of(body.as_bytes(), true, declared);
                let open = body.is_empty() || body.starts_with("database");
                let expected = if open && declared { Events } else { expected };
                assert_eq!(form, Some(expected), "{body:?}, declared: {declared}");
            }
        }
    }

    proptest! {
        #[test]
        fn more_bytes_never_change_a_decision(
            body in "(\u{feff})?[ \n]{0,3}(data|event|id|retry|:|\\{|<|dat|x){0,2}[: \n{a]{0,4}",
            declared in any::<bool>(),
        ) {
            let whole = Form::of(body.as_bytes(), true, declared).unwrap();
            for end in 0..body.len() {
                let form = Form::of(&body.as_bytes()[..end], false, declared);
                prop_assert!(form.is_none_or(|form| form == whole), "{body:?} {end}");
            }
        }
    }
}
