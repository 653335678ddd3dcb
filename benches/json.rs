//! Measures the incremental JSON reader on a plan of 4 MB: in one piece, in pieces of the size of a packet, and byte by byte.
//! `serde_json` reads the whole document in the same run.
//!
//! The bench checks its bars: at least 200 MB/s in one thread, and byte by byte at most five times as long as in one
//! piece. It takes the best of its rounds, because other load only makes a round slower.

use std::hint::black_box;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde::de::IgnoredAny;
use throughline::structured::json::{Draft, Reader};

const ROUNDS: usize = 15;

#[derive(Deserialize)]
#[allow(dead_code)]
struct Routine {
    name: String,
    minutes: u32,
    notes: Vec<String>,
    tempo: f64,
}

#[derive(Deserialize)]
struct Plan {
    routines: Vec<Routine>,
}

/// A document of about 4 MB as models write them: prose in strings, some escapes, indented.
fn document() -> (String, usize) {
    let mut text = String::from("{\n  \"title\": \"A year\",\n  \"routines\": [");
    let mut count = 0;
    while text.len() < 4_000_000 {
        let comma = if count == 0 { "" } else { "," };
        text.push_str(&format!(
            r#"{comma}
    {{
      "name": "Routine {count}: scales & \"arpeggios\"",
      "minutes": {minutes},
      "notes": ["Start slowly — then faster.\n", "Keep the wrist loose [see {count}].", "{{}}"],
      "tempo": {minutes}.5
    }}"#,
            minutes = count % 60,
        ));
        count += 1;
    }
    text.push_str("\n  ]\n}\n");
    (text, count)
}

fn best(mut run: impl FnMut()) -> Duration {
    let times = (0..ROUNDS).map(|_| {
        let began = Instant::now();
        run();
        began.elapsed()
    });
    times.min().unwrap_or_default()
}

fn read(text: &str, piece: usize, mut each: impl FnMut(&str)) -> usize {
    let mut reader = Reader::field("routines");
    for piece in text.as_bytes().chunks(piece) {
        reader.push(piece);
        while let Some(element) = reader.next_element() {
            each(element.expect("the document is well formed"));
        }
    }
    reader.finish().expect("the array is whole");
    reader.elements()
}

fn main() {
    // `cargo test --benches` only checks that it runs.
    if std::env::args().any(|arg| arg == "--test") {
        return;
    }
    let (text, count) = document();
    let megabytes = text.len() as f64 / 1e6;
    let scan = |piece| {
        best(|| {
            assert_eq!(
                read(&text, piece, |element| {
                    black_box(element);
                }),
                count
            )
        })
    };
    let parse = |piece| {
        best(|| {
            let mut minutes = 0;
            read(&text, piece, |element| {
                minutes += serde_json::from_str::<Routine>(element).unwrap().minutes;
            });
            black_box(minutes);
        })
    };
    let (whole, network, bytes) = (scan(text.len()), scan(1_400), scan(1));
    let typed = parse(1_400);
    let serde = best(|| {
        assert_eq!(
            serde_json::from_str::<Plan>(&text).unwrap().routines.len(),
            count
        )
    });
    let skipped = best(|| {
        serde_json::from_str::<IgnoredAny>(&text).unwrap();
    });
    let draft = best(|| {
        let mut draft = Draft::new();
        text.as_bytes()
            .chunks(1_400)
            .for_each(|piece| draft.push(piece));
        assert!(draft.is_done());
    });

    println!("{megabytes:.1} MB, {count} elements, best of {ROUNDS} rounds");
    for (what, time) in [
        ("elements, one piece", whole),
        ("elements, 1,400-byte pieces", network),
        ("elements, 1-byte pieces", bytes),
        ("elements in 1,400-byte pieces, each parsed", typed),
        ("serde_json, whole document, same types", serde),
        ("serde_json, whole document, values ignored", skipped),
        ("draft, 1,400-byte pieces", draft),
    ] {
        let rate = megabytes / time.as_secs_f64();
        println!(
            "{what:<44} {:>8.2} ms {rate:>7.0} MB/s",
            time.as_secs_f64() * 1e3
        );
    }
    let slower = bytes.as_secs_f64() / whole.as_secs_f64();
    println!("1-byte pieces take {slower:.1} times as long as one piece");
    let rate = megabytes / whole.as_secs_f64();
    assert!(rate >= 200.0, "the bar is 200 MB/s, it is {rate:.0}");
    assert!(slower <= 5.0, "the bar is 5 times, it is {slower:.1}");
}
