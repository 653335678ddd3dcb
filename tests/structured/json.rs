//! The incremental JSON reader against `serde_json` on whole documents, cut anywhere.

use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Value, json};
use throughline::structured::json::{Draft, Reader};
use throughline::{Error, Result};

/// JSON of any shape, with strings that need every kind of escape.
fn value() -> impl Strategy<Value = Value> {
    let text = prop_oneof![
        "[ -~]{0,12}",
        any::<String>(),
        Just("\"\\/\n\u{8}\u{1F600}\u{FFFF}é[]{},:".to_owned()),
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        text.clone().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 48, 6, move |inner| {
        prop_oneof![
            vec(inner.clone(), 0..6).prop_map(Value::from),
            vec((text.clone(), inner), 0..6)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

/// The text of a document as some writer may lay it out: spaces, escapes for all that is not ASCII.
fn written(value: &Value, pretty: bool, ascii: bool) -> String {
    let text = if pretty {
        serde_json::to_string_pretty(value).unwrap()
    } else {
        value.to_string()
    };
    if !ascii {
        return text;
    }
    text.chars().fold(String::new(), |mut out, c| {
        if c.is_ascii() {
            out.push(c);
        } else {
            let mut units = [0; 2];
            for unit in c.encode_utf16(&mut units) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        }
        out
    })
}

/// Cuts bytes at places given as parts of the rest.
fn pieces<'a>(mut text: &'a [u8], cuts: &[usize]) -> Vec<&'a [u8]> {
    let mut pieces = Vec::new();
    for cut in cuts {
        let (piece, rest) = text.split_at(cut % (text.len() + 1));
        pieces.push(piece);
        text = rest;
    }
    pieces.push(text);
    pieces
}

fn read(mut reader: Reader, pieces: &[&[u8]]) -> (Vec<Result<String>>, Result<()>) {
    let mut elements = Vec::new();
    for piece in pieces {
        reader.push(piece);
        while let Some(element) = reader.next_element() {
            elements.push(element.map(str::to_owned));
        }
    }
    let end = reader.finish();
    (elements, end)
}

fn parsed(elements: &[Result<String>]) -> Vec<Value> {
    let texts = elements.iter().map(|element| element.as_ref().unwrap());
    texts
        .map(|text| serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text:?}")))
        .collect()
}

fn cases() -> u32 {
    let cases = std::env::var("JSON_CASES").ok();
    cases.map_or(400, |cases| cases.parse().unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn elements_are_those_that_serde_json_reads(
        elements in vec(value(), 0..8),
        before in "[^\\[{]{0,20}",
        after in any::<String>(),
        (pretty, ascii) in any::<(bool, bool)>(),
        cuts in vec(any::<usize>(), 0..40),
    ) {
        let array = written(&Value::from(elements.clone()), pretty, ascii);
        // An empty array may be a box to tick: another one behind it would be the list.
        let after = match elements.is_empty() {
            true => after.replace(['[', '{'], ""),
            false => after,
        };
        let text = format!("{before}{array}{after}");
        for reader in [Reader::array(), Reader::first_array()] {
            let (read, end) = read(reader, &pieces(text.as_bytes(), &cuts));
            prop_assert!(end.is_ok(), "{end:?}: {text}");
            prop_assert_eq!(parsed(&read), elements.clone());
        }
    }

    #[test]
    fn the_named_field_is_found_among_others(
        elements in vec(value(), 0..6),
        others in vec((any::<String>(), value()), 0..5),
        at in any::<usize>(),
        (pretty, ascii) in any::<(bool, bool)>(),
        cuts in vec(any::<usize>(), 0..40),
    ) {
        // Written by hand, because a map would sort the fields.
        let mut fields: Vec<(String, Value)> = others;
        fields.retain(|(name, _)| name != "größe");
        fields.insert(at % (fields.len() + 1), ("größe".into(), elements.clone().into()));
        let fields: Vec<String> = fields
            .iter()
            .map(|(name, value)| {
                let name = written(&Value::from(name.as_str()), false, ascii);
                format!("{name} : {}", written(value, pretty, ascii))
            })
            .collect();
        let text = format!("```json\n{{{}}}\n```", fields.join(", "));
        let (read, end) = read(Reader::field("größe"), &pieces(text.as_bytes(), &cuts));
        prop_assert!(end.is_ok(), "{end:?}: {text}");
        prop_assert_eq!(parsed(&read), elements);
    }

    #[test]
    fn the_elements_do_not_depend_on_the_pieces(
        text in prop_oneof![
            "[\\[\\]{}\",:\\\\ 1a-]{0,40}".prop_map(String::into_bytes),
            vec(any::<u8>(), 0..60),
        ],
        cuts in vec(any::<usize>(), 0..40),
    ) {
        let show = |read: (Vec<Result<String>>, Result<()>)| {
            let elements = read.0.into_iter().map(|e| e.map_err(|e: Error| e.to_string()));
            (elements.collect::<Vec<_>>(), read.1.map_err(|e| e.to_string()))
        };
        for reader in [Reader::array(), Reader::field("a"), Reader::first_array()] {
            let whole = show(read(reader.clone(), &[&text]));
            prop_assert_eq!(&whole, &show(read(reader.clone(), &pieces(&text, &cuts))));
            let bytes: Vec<&[u8]> = text.chunks(1).collect();
            prop_assert_eq!(&whole, &show(read(reader, &bytes)));
        }
    }

    #[test]
    fn a_draft_is_json_at_every_moment_and_complete_at_the_end(
        value in value().prop_filter("a draft has brackets", |v| v.is_object() || v.is_array()),
        (pretty, ascii) in any::<(bool, bool)>(),
    ) {
        let text = written(&value, pretty, ascii);
        let mut draft = Draft::new();
        draft.push("Here it is:\n```json\n");
        let mut last = None;
        for byte in text.as_bytes().chunks(1) {
            draft.push(byte);
            prop_assert!(!draft.is_broken(), "{text}");
            if let Some(closed) = draft.closed() {
                let read: Value = serde_json::from_str(&closed)
                    .map_err(|e| TestCaseError::fail(format!("{e}: {closed}")))?;
                last = Some(read);
            }
        }
        prop_assert!(draft.is_done());
        draft.push("\n``` Anything else?");
        prop_assert_eq!(draft.closed().unwrap().len(), text.len());
        prop_assert_eq!(last.unwrap(), value);
    }

    #[test]
    fn a_draft_of_anything_is_none_or_json(
        text in "[\\[\\]{}\",:\\\\ 1atrue.u0D8é-]{0,40}",
    ) {
        let mut draft = Draft::new();
        for byte in text.as_bytes().chunks(1) {
            draft.push(byte);
            if let Some(closed) = draft.closed() {
                prop_assert!(serde_json::from_str::<Value>(&closed).is_ok(), "{closed}");
                prop_assert!(!draft.is_done() || text.contains(&closed), "{closed}");
            }
        }
    }

    #[test]
    fn a_draft_does_not_depend_on_the_pieces(
        text in "[\\[\\]{}\",:\\\\ 1atrue.u0D8é-]{0,40}",
        cuts in vec(any::<usize>(), 0..10),
    ) {
        let drafts = [vec![text.as_bytes()], pieces(text.as_bytes(), &cuts)].map(|pieces| {
            let mut draft = Draft::new();
            pieces.iter().for_each(|piece| draft.push(piece));
            (draft.closed(), draft.is_done(), draft.is_broken(), draft.len())
        });
        prop_assert_eq!(&drafts[0], &drafts[1]);
    }
}

#[test]
fn a_draft_leaves_out_a_part_that_cannot_be_closed_yet() {
    for (text, expected) in [
        ("[", None),
        ("[ ] to do", Some("[ ]")),
        ("see [below]: {\"a\"", Some("{}")),
        (r#"{"a": "x", "b"#, Some(r#"{"a": "x"}"#)),
        (r#"{"a": "x", "b":"#, Some(r#"{"a": "x"}"#)),
        (r#"{"a": [1, 2"#, Some(r#"{"a": [1]}"#)),
        (r#"{"a": [1, 2 "#, Some(r#"{"a": [1, 2 ]}"#)),
        (r#"{"a\"": tru"#, Some("{}")),
        (r#"["a\"#, Some(r#"["a"]"#)),
        (r#"["a\\"#, Some(r#"["a\\"]"#)),
        (r#"["a\u00e"#, Some(r#"["a"]"#)),
        (r#"["a\ud83d"#, Some(r#"["a"]"#)),
        (r#"["a\ud83d\ude0"#, Some(r#"["a"]"#)),
        (r#"["a\ud83d\ude00"#, Some(r#"["a\ud83d\ude00"]"#)),
        (r#"{"a" 1, "b": 2"#, None),
        ("[1, 2}", None),
    ] {
        let mut draft = Draft::new();
        draft.push(text);
        assert_eq!(draft.closed().as_deref(), expected, "{text}");
    }
    let mut draft = Draft::new();
    draft.push(&"[\"é".as_bytes()[..3]);
    assert_eq!(draft.closed().unwrap(), "[\"\"]");
    let mut draft = Draft::new();
    draft.push("[".repeat(200));
    assert!(draft.is_broken());
    let mut draft = Draft::new().max_bytes(3);
    draft.push("[1,2]");
    assert!(draft.is_broken() && draft.closed().is_none());
}

#[test]
fn elements_come_as_they_close() {
    let mut reader = Reader::array();
    let mut at = Vec::new();
    let text = r#" [ {"a": "]"} , "x\"", 12 ,[1,[2]] ] "#;
    for (i, byte) in text.bytes().enumerate() {
        reader.push([byte]);
        while let Some(element) = reader.next_element() {
            at.push((i, element.unwrap().to_owned()));
        }
    }
    let expected = [
        (12, r#"{"a": "]"}"#),
        (21, r#""x\"""#),
        (26, "12"),
        (33, "[1,[2]]"),
    ];
    let expected = expected.map(|(i, text)| (i, text.to_owned()));
    assert_eq!(at, expected);
    assert!(reader.is_done() && reader.finish().is_ok());
}

#[test]
fn an_object_is_complete_at_its_brace_and_a_number_at_the_next_delimiter() {
    let mut reader = Reader::array();
    reader.push(r#"[{"a": [1]}"#);
    assert_eq!(reader.next_element().unwrap().unwrap(), r#"{"a": [1]}"#);
    reader.push(r#" {"b": 2}"#);
    assert_eq!(reader.next_element().unwrap().unwrap(), r#"{"b": 2}"#);
    reader.push(", 1");
    assert!(reader.next_element().is_none(), "12 may follow");
    reader.push(" ]");
    assert_eq!(reader.next_element().unwrap().unwrap(), "1");
}

#[test]
fn prose_with_brackets_is_not_the_array() {
    for text in [
        "See [below] and [the list], [x](y): [1, 2]",
        "- [ ] to do\n[1,2]",
        "{curly} {} [1,2]",
        "\u{feff}[1,2,]",
        "```json\n[1,2]\n```\n[3]",
    ] {
        let (elements, end) = read(Reader::array(), &[text.as_bytes()]);
        assert_eq!(parsed(&elements), [json!(1), json!(2)], "{text}");
        end.unwrap();
    }
}

#[test]
fn an_element_that_is_not_json_does_not_affect_the_others() {
    let text = r#"[NaN, {'a': 1}, 1 2, , {"a": 1,}, "é"]"#;
    let (elements, end) = read(Reader::array(), &[text.as_bytes()]);
    end.unwrap();
    assert_eq!(elements.len(), 6);
    let json = |text: &Result<String>| {
        let text = text.as_ref().ok()?;
        serde_json::from_str::<Value>(text).ok()
    };
    let fit: Vec<_> = elements.iter().map(json).collect();
    assert_eq!(fit[..5], [None, None, None, None, None]);
    assert_eq!(fit[5], Some(json!("é")));
}

#[test]
fn elements_above_the_limits_are_failures() {
    let deep = format!("[{}1{}, 2]", "[".repeat(200), "]".repeat(200));
    let (elements, end) = read(Reader::array(), &[deep.as_bytes()]);
    assert!(elements[0].as_ref().unwrap_err().is_invalid_output());
    assert!(end.unwrap_err().to_string().contains("126 brackets"));
    assert_eq!(elements.len(), 1);

    let large = format!(r#"["{}", 2]"#, "x".repeat(1_000));
    for size in [1, 7, 2_000] {
        let pieces: Vec<&[u8]> = large.as_bytes().chunks(size).collect();
        let (elements, end) = read(Reader::array().max_element(100), &pieces);
        assert!(elements[0].as_ref().unwrap_err().is_invalid_output());
        assert_eq!(elements[1].as_ref().unwrap(), "2");
        end.unwrap();
    }
}

#[test]
fn the_error_names_what_is_missing() {
    let end = |reader, text: &str| read(reader, &[text.as_bytes()]).1;
    let error = |reader, text: &str| end(reader, text).unwrap_err();
    let field = || Reader::field("a");
    for (error, message) in [
        (error(Reader::array(), "No."), "does not hold an array"),
        (
            error(field(), r#"{"b": [1]}"#),
            "object does not have an array in a field `a`",
        ),
        (error(field(), r#"{"a": null}"#), "holds something else"),
        (error(Reader::array(), "[1}"), "a `}` that closes nothing"),
    ] {
        assert!(error.is_invalid_output(), "{error}");
        assert!(error.to_string().contains(message), "{error}");
    }
    for text in [
        r#"{"a": [1"#,
        r#"{"a": [{"#,
        r#"{"b": 1, "a"#,
        r#"{"a": ["x"#,
    ] {
        assert!(error(field(), text).is_truncated(), "{text}");
    }
    end(Reader::array(), "[]").unwrap();
    end(field(), r#"{"a": []}"#).unwrap();
}
