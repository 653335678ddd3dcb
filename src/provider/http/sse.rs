//! Server-sent events of a body, each of bounded size.
//!
//! `sse-stream` parses. This module adds a limit on the size of an event, and a blank line at the end of the body,
//! without which the parser drops a last event that the server did not terminate.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream};
use sse_stream::{Sse, SseByteStream};

use super::body::{Body, too_large};
use crate::error::{Error, ErrorKind, Result};

pub(super) struct Events {
    events: Pin<Box<dyn Stream<Item = Result<Sse, sse_stream::Error>> + Send>>,
    ended: Arc<AtomicBool>,
}

impl Events {
    pub(super) fn new(body: Body, max_event: usize) -> Self {
        let chunks = stream::unfold(Some(body), |body| async {
            let mut body = body?;
            match body.chunk().await {
                Ok(Some(chunk)) => Some((Ok(chunk), Some(body))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        });
        Self::from_chunks(chunks, max_event)
    }

    /// Parses the events of a complete body.
    pub(super) fn of_body(body: Bytes, max_event: usize) -> Self {
        Self::from_chunks(stream::iter([Ok(body)]), max_event)
    }

    fn from_chunks(
        chunks: impl Stream<Item = Result<Bytes>> + Send + 'static,
        max_event: usize,
    ) -> Self {
        let ended = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&ended);
        let last = stream::once(async move {
            flag.store(true, Ordering::Relaxed);
            Ok(Bytes::from_static(b"\n\n"))
        });
        let mut limit = SizeLimit::new(max_event);
        let chunks = chunks.map(move |chunk| {
            let chunk = chunk?;
            match limit.admits(&chunk) {
                true => Ok(chunk),
                false => Err(too_large("event", max_event)),
            }
        });
        // An error ends the parser before it asks for `last`.
        Self {
            events: Box::pin(SseByteStream::new(chunks.chain(last).boxed())),
            ended,
        }
    }

    /// Waits for the next event with data and returns that data; `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<String>> {
        loop {
            match self.events.next().await {
                None => return Ok(None),
                Some(Ok(event)) => match event.data {
                    Some(data) if !data.is_empty() => return Ok(Some(data)),
                    _ => continue,
                },
                Some(Err(sse_stream::Error::Body(error))) => {
                    return Err(match error.downcast::<Error>() {
                        Ok(ours) => *ours,
                        Err(other) => Error::new(ErrorKind::Connection, other.to_string()),
                    });
                }
                Some(Err(error)) => {
                    return Err(Error::new(ErrorKind::MalformedReply, error.to_string()));
                }
            }
        }
    }

    /// Whether the body has ended, so that its last event may be incomplete.
    pub(super) fn ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }
}

/// Counts the bytes of the current event. A blank line ends it.
struct SizeLimit {
    max: usize,
    event: usize,
    line: usize,
    after_cr: bool,
}

impl SizeLimit {
    fn new(max: usize) -> Self {
        Self {
            max,
            event: 0,
            line: 0,
            after_cr: false,
        }
    }

    fn admits(&mut self, chunk: &[u8]) -> bool {
        for &byte in chunk {
            let ends_crlf = self.after_cr && byte == b'\n';
            self.after_cr = byte == b'\r';
            match byte {
                b'\n' if ends_crlf => {}
                b'\n' | b'\r' => {
                    if self.line == 0 {
                        self.event = 0;
                    }
                    self.line = 0;
                }
                _ => {
                    self.line += 1;
                    self.event += 1;
                }
            }
            if self.event > self.max {
                return false;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(chunks: &[&[u8]], max: usize) -> (Vec<String>, Option<Error>) {
        let chunks: Vec<_> = chunks
            .iter()
            .map(|chunk| Ok(Bytes::copy_from_slice(chunk)))
            .collect();
        let mut events = Events::from_chunks(stream::iter(chunks), max);
        let mut out = Vec::new();
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.unwrap().block_on(async {
            loop {
                match events.next().await {
                    Ok(Some(data)) => out.push(data),
                    Ok(None) => return (out, None),
                    Err(error) => return (out, Some(error)),
                }
            }
        })
    }

    #[test]
    fn line_endings_comments_and_byte_order_marks_are_parsed() {
        let cases: [(&[u8], &[&str]); 9] = [
            (b"data: a\n\ndata: b\n\n", &["a", "b"]),
            (b"\xEF\xBB\xBFdata: a\n\n", &["a"]),
            (b"data: a\r\n\r\ndata: b\r\n\r\n", &["a", "b"]),
            (b"data: a\r\rdata: b\r\r", &["a", "b"]),
            (b"data: a\ndata: b\n\n", &["a\nb"]),
            (b": ping\n\nevent: x\nid: 1\ndata:a\n\n", &["a"]),
            (b"data: a\n\ndata: b", &["a", "b"]),
            (b"data: a\n\ndata: b\r", &["a", "b"]),
            (b"event: nothing\n\n", &[]),
        ];
        for (wire, expected) in cases {
            let (events, error) = decode(&[wire], 100);
            assert_eq!(events, expected, "{}", wire.escape_ascii());
            assert!(error.is_none());
        }
    }

    #[test]
    fn the_size_of_an_event_is_limited_and_that_of_a_stream_is_not() {
        let fits = b"data: 1234\n\n".repeat(1000);
        assert_eq!(decode(&[&fits], 10).0.len(), 1000);

        let (events, error) = decode(&[b"data: 1\n\ndata: 12\n", b"data: 345\n\n"], 10);
        assert_eq!(events, ["1"], "the event before is kept");
        assert!(error.unwrap().is_permanent());
        let error = decode(&[b"data: 123", b"45"], 10).1.unwrap();
        assert_eq!(error.kind(), ErrorKind::MalformedReply);
        assert!(error.is_permanent() && error.message().contains("10 bytes"));
    }

    proptest! {
        #[test]
        fn chunk_boundaries_do_not_change_the_events(
            texts in prop::collection::vec("[ -~é€😀]{1,12}", 1..6),
            ending in prop::sample::select(vec!["\n", "\r\n", "\r"]),
            cuts in prop::collection::vec(0_usize..200, 0..8),
        ) {
            let wire: String = texts.iter().map(|text| format!("data: {text}{ending}{ending}")).collect();
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut % wire.len()).collect();
            cuts.extend([0, wire.len()]);
            cuts.sort_unstable();
            let chunks: Vec<_> = cuts.windows(2).map(|w| &wire.as_bytes()[w[0]..w[1]]).collect();
            let (events, error) = decode(&chunks, 100);
            prop_assert!(error.is_none());
            prop_assert_eq!(events, texts);
        }

        #[test]
        fn no_input_panics(chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..6)) {
            let chunks: Vec<_> = chunks.iter().map(Vec::as_slice).collect();
            let _ = decode(&chunks, 20);
        }
    }
}
