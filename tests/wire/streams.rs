//! Streamed replies over a real socket, with any chunk boundaries and any end.

use throughline::ErrorKind::{self, *};
use throughline::{OpenAi, Provider, request::FinishReason};

use crate::support::server::{Act, Script, Server};
use crate::support::{OPENAI_BODY, anthropic, both, collect, openai};

/// Returns a stream as OpenAI sends it.
fn chat(words: &[&str]) -> String {
    let mut wire = String::from(
        "data: {\"model\":\"gpt-x-1\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n",
    );
    for word in words {
        wire += &format!(
            "data: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{word}\"}},\"finish_reason\":null}}],\"usage\":null}}\n\n"
        );
    }
    wire += "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"length\"}]}\n\n";
    wire += "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":12,\"completion_tokens\":7,\"prompt_tokens_details\":{\"cached_tokens\":4},\"completion_tokens_details\":{\"reasoning_tokens\":5}}}\n\n";
    wire + "data: [DONE]\n\n"
}

/// Returns a stream as Anthropic sends it.
fn messages(words: &[&str]) -> String {
    let mut wire = String::from(
        "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"model\":\"claude-x-1\",\"content\":[],\"stop_reason\":null,\"usage\":{\"input_tokens\":5,\"cache_read_input_tokens\":4,\"cache_creation_input_tokens\":3,\"output_tokens\":1}}}\n\n\
         event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":0,\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n\
         event: ping\ndata: {\"type\": \"ping\"}\n\n",
    );
    for word in words {
        wire += &format!(
            "event: content_block_delta\ndata: {{\"type\":\"content_block_delta\",\"index\":0,\"delta\":{{\"type\":\"text_delta\",\"text\":\"{word}\"}}}}\n\n"
        );
    }
    wire += "event: content_block_stop\ndata: {\"type\":\"content_block_stop\",\"index\":0}\n\n";
    wire += "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"max_tokens\"},\"usage\":{\"output_tokens\":7}}\n\n";
    wire + "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n"
}

const WORDS: [&str; 3] = ["Rhône ", "και ", "🏞 長江"];

async fn check_whole(provider: &dyn Provider, what: &str) {
    let (texts, end) = collect(provider).await;
    let reply = end.unwrap_or_else(|error| panic!("{what}: {error:?}"));
    assert_eq!(texts, WORDS, "{what}");
    assert_eq!(reply.text, WORDS.concat(), "{what}");
    assert_eq!(reply.finish, FinishReason::Length, "{what}");
    assert_eq!(reply.usage.input_tokens, 12, "{what}");
    assert_eq!(reply.usage.output_tokens, 7, "{what}");
    assert_eq!(reply.usage.cached_input_tokens, 4, "{what}");
    assert!(reply.model.ends_with("x-1"), "{what}");
    assert_eq!(reply.request_id.as_deref(), Some("req_1"), "{what}");
    assert!(reply.raw.unwrap().contains('{'), "{what}");
}

#[tokio::test]
async fn line_endings_and_chunk_boundaries_do_not_change_the_reply() {
    for ending in ["\n", "\r\n", "\r"] {
        for bom in ["", "\u{feff}"] {
            for size in [1, 7, 100, 1 << 20] {
                let wire = |text: String| format!("{bom}{}", text.replace('\n', ending));
                let chat = wire(chat(&WORDS));
                let messages = wire(messages(&WORDS));
                let pieces = |wire: &str| {
                    wire.as_bytes()
                        .chunks(size)
                        .map(<[u8]>::to_vec)
                        .collect::<Vec<_>>()
                };
                let scripts = [&chat, &messages].map(|wire| Script::events(&pieces(wire)));
                let server = Server::scripted(scripts).await;
                for provider in both(&server) {
                    let what = format!("{} {ending:?} {bom:?} {size}", provider.name());
                    check_whole(provider.as_ref(), &what).await;
                }
            }
        }
    }
}

#[tokio::test]
async fn a_last_event_without_a_blank_line_is_parsed() {
    let wires = [chat(&WORDS), messages(&WORDS)];
    for cut in 0..3 {
        let scripts = wires
            .each_ref()
            .map(|wire| Script::events(&[&wire[..wire.len() - cut]]));
        let server = Server::scripted(scripts).await;
        for provider in both(&server) {
            check_whole(provider.as_ref(), &format!("{} -{cut}", provider.name())).await;
        }
    }
}

#[tokio::test]
async fn the_request_of_a_stream_asks_for_events_and_usage() {
    let server = Server::scripted([
        Script::events(&[chat(&WORDS)]),
        Script::events(&[messages(&WORDS)]),
    ])
    .await;
    for provider in both(&server) {
        collect(provider.as_ref()).await.1.unwrap();
    }
    let requests = server.requests();
    assert_eq!(requests[0].json()["stream_options"]["include_usage"], true);
    assert!(
        requests
            .iter()
            .all(|request| request.json()["stream"] == true)
    );
}

/// A stream that is cut before the finish reason is a temporary error, and it is unknown whether it is billed.
#[tokio::test]
async fn a_cut_stream_is_a_connection_error() {
    let wires = [chat(&WORDS), messages(&WORDS)];
    let ends = ["\"length\"", "\"max_tokens\""];
    for (endings, how) in [(Act::Close, "close"), (Act::Reset, "reset")] {
        for tenth in 0..10 {
            let scripts = [0, 1].map(|i| {
                let before = wires[i].find(ends[i]).unwrap();
                let cut = before * tenth / 10;
                Script::event_head()
                    .send(&wires[i].as_bytes()[..cut])
                    .then(endings.clone())
            });
            let server = Server::scripted(scripts).await;
            for provider in both(&server) {
                let (_, end) = collect(provider.as_ref()).await;
                let error = end.unwrap_err();
                let what = format!("{} {how} {tenth}: {error:?}", provider.name());
                assert_eq!(error.kind(), Connection, "{what}");
                assert!(error.is_temporary(), "{what}");
                assert_eq!(error.billed(), None, "{what}");
            }
            assert_eq!(server.requests().len(), 2, "no call is repeated");
        }
    }
}

#[tokio::test]
async fn a_chunked_stream_without_its_last_chunk_is_cut() {
    let head =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    let event = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n";
    let chunk = format!("{:x}\r\n{event}\r\n", event.len());
    let server = Server::scripted([Script::new().send(head).send(chunk).then(Act::Close)]).await;
    let (texts, end) = collect(&openai(&server)).await;
    let error = end.unwrap_err();
    assert_eq!(texts, ["a"]);
    assert_eq!((error.kind(), error.billed()), (Connection, None));
}

#[tokio::test]
async fn a_complete_text_is_returned_even_if_the_connection_breaks_afterwards() {
    for act in [Act::Close, Act::Reset] {
        let wires = [chat(&WORDS), messages(&WORDS)];
        let ends = ["data: {\"choices\":[],", "event: message_stop"];
        let scripts = [0, 1].map(|i| {
            let end = wires[i].find(ends[i]).unwrap();
            let wait = std::time::Duration::from_millis(20); // let it be read before the reset
            Script::event_head()
                .send(&wires[i].as_bytes()[..end])
                .then(Act::Wait(wait))
                .then(act.clone())
        });
        let server = Server::scripted(scripts).await;
        for provider in both(&server) {
            let reply = collect(provider.as_ref()).await.1.unwrap();
            assert_eq!(reply.text, WORDS.concat());
        }
    }
}

#[tokio::test]
async fn an_error_event_after_some_text_is_classified() {
    let text = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n";
    let block = "data: {\"type\":\"content_block_delta\",\"delta\":{\"type\":\"text_delta\",\"text\":\"a\"}}\n\n";
    let cases: [(&str, ErrorKind, Option<&str>); 5] = [
        (
            r#"{"error":{"message":"busy","code":502}}"#,
            Unavailable,
            Some("502"),
        ),
        (
            r#"{"error":{"message":"later","code":"rate_limit_exceeded"},"choices":[{"delta":{"content":""},"finish_reason":"error"}]}"#,
            Throttled,
            Some("rate_limit_exceeded"),
        ),
        (
            r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}"#,
            Overloaded,
            Some("overloaded_error"),
        ),
        (
            r#"{"type":"error","error":{"type":"api_error","message":"x"}}"#,
            Unavailable,
            Some("api_error"),
        ),
        (r#"{"error":"llama runner died"}"#, Unavailable, None),
    ];
    for (frame, kind, code) in cases {
        let scripts = [text, block]
            .map(|text| Script::events(&[format!("{text}event: error\ndata: {frame}\n\n")]));
        let server = Server::scripted(scripts).await;
        for provider in both(&server) {
            let (texts, end) = collect(provider.as_ref()).await;
            let error = end.unwrap_err();
            assert_eq!(texts, ["a"]);
            assert_eq!((error.kind(), error.code()), (kind, code), "{frame}");
            assert_eq!(
                error.billed(),
                None,
                "it is unknown whether the text is billed"
            );
            assert_eq!(error.request_id(), Some("req_1"));
        }
    }
}

#[tokio::test]
async fn a_refusal_by_the_model_is_a_reply() {
    let wire = "data: {\"choices\":[{\"delta\":{\"refusal\":\"I cannot.\"}}]}\n\n\
                data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n";
    let server = Server::scripted([Script::events(&[wire])]).await;
    let reply = collect(&openai(&server)).await.1.unwrap();
    assert_eq!(
        (reply.text.as_str(), reply.finish),
        ("I cannot.", FinishReason::ContentFilter)
    );
}

#[tokio::test]
async fn only_the_first_of_several_choices_is_returned() {
    let wire = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"}}]}\n\n\
                data: {\"choices\":[{\"index\":1,\"delta\":{\"content\":\"b\"},\"finish_reason\":\"length\"}]}\n\n\
                data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n";
    let server = Server::scripted([Script::events(&[wire])]).await;
    let reply = collect(&openai(&server)).await.1.unwrap();
    assert_eq!(
        (reply.text.as_str(), reply.finish),
        ("a", FinishReason::Stop)
    );
}

#[tokio::test]
async fn a_server_that_answers_a_stream_request_with_a_document_is_supported() {
    let server = Server::scripted([Script::json(200, OPENAI_BODY)]).await;
    let (texts, end) = collect(&openai(&server)).await;
    assert_eq!(texts, ["Rhône"]);
    assert_eq!(end.unwrap().usage.output_tokens, 7);
}

const DECLARED: [&str; 7] = [
    "text/event-stream",
    "TEXT/EVENT-STREAM; charset=utf-8",
    "application/json",
    "Application/JSON; charset=utf-8",
    "text/html; charset=utf-8",
    "text/plain",
    "application/x-ndjson",
];

/// Returns a reply with a wrong content type, sent in pieces.
fn declared(kind: &str, body: &str, size: usize) -> Script {
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\nx-request-id: req_1\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let pieces = body.as_bytes().chunks(size);
    pieces.fold(Script::new().send(head), |script, piece| script.send(piece))
}

#[tokio::test]
async fn a_stream_is_detected_by_its_content_whatever_its_content_type() {
    let cases = DECLARED.map(|kind| [(kind, 1), (kind, 1 << 20)]).concat();
    let scripts = [chat(&WORDS), messages(&WORDS)]
        .into_iter()
        .flat_map(|wire| {
            let twice = cases.iter().flat_map(|case| [case, case]);
            let scripts = twice.map(move |(kind, size)| declared(kind, &wire, *size));
            scripts.collect::<Vec<_>>()
        });
    let server = Server::scripted(scripts).await;
    for provider in both(&server) {
        for case in &cases {
            check_whole(provider.as_ref(), &format!("{} {case:?}", provider.name())).await;
            // A server may stream although the request does not ask for it.
            let reply = provider.generate(&crate::support::request()).await.unwrap();
            assert_eq!(reply.text, WORDS.concat(), "{case:?}");
            assert_eq!(reply.finish, FinishReason::Length, "{case:?}");
        }
    }
}

#[tokio::test]
async fn a_document_is_detected_by_its_content_whatever_its_content_type() {
    let error = r#"{"error":{"message":"The model is overloaded, please retry","type":"overloaded_error"}}"#;
    let pieces = [(1, ""), (1, "\n \n"), (1, "\u{feff}"), (1 << 20, "")];
    let cases = DECLARED
        .map(|kind| pieces.map(|(size, start)| (kind, size, start)))
        .concat();
    let scripts = [OPENAI_BODY, crate::support::ANTHROPIC_BODY]
        .into_iter()
        .flat_map(|body| {
            cases.iter().flat_map(move |(kind, size, start)| {
                [body, error].map(|body| declared(kind, &format!("{start}{body}"), *size))
            })
        });
    let server = Server::scripted(scripts).await;
    for provider in both(&server) {
        for case in &cases {
            let (texts, end) = collect(provider.as_ref()).await;
            let reply = end.unwrap_or_else(|error| panic!("{case:?}: {error:?}"));
            assert_eq!(
                (texts.concat(), reply.text),
                ("Rhône".into(), "Rhône".into())
            );
            let error = collect(provider.as_ref()).await.1.unwrap_err();
            assert_eq!(error.kind(), Overloaded, "{case:?}: {error:?}");
            assert_eq!(error.billed(), Some(false));
        }
    }
}

/// A retry would get a compressed reply again, and perhaps be billed again.
#[tokio::test]
async fn a_compressed_reply_is_a_permanent_error_that_names_the_compression() {
    let gzip = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xabV\xcaH\xcd\xc9\xc9\x07\x00";
    let brotli = b"\x8b\x04\x80{\"a\":1}\x03";
    for (coding, body) in [
        ("gzip", &gzip[..]),
        ("", gzip),
        ("br", brotli),
        ("BR", b"data: {}\n\n"),
    ] {
        for kind in ["application/json", "text/event-stream"] {
            let headers = [("content-type", kind), ("content-encoding", coding)];
            let server = Server::scripted([Script::reply(200, &headers, body)]).await;
            for provider in both(&server) {
                let error = collect(provider.as_ref()).await.1.unwrap_err();
                assert_eq!(
                    (error.kind(), error.billed()),
                    (MalformedReply, None),
                    "{error:?}"
                );
                assert!(error.is_permanent());
                assert!(error.message().contains("compressed"), "{error}");
            }
        }
        let headers = [("content-encoding", coding), ("retry-after", "2")];
        let server = Server::scripted([Script::reply(429, &headers, body)]).await;
        for provider in both(&server) {
            let error = provider
                .generate(&crate::support::request())
                .await
                .unwrap_err();
            assert_eq!(error.kind(), Throttled);
            assert!(
                error.wait().is_some() && error.message().contains("compressed"),
                "{error}"
            );
        }
        let asked = server.requests();
        assert_eq!(asked[0].header("accept-encoding"), Some("identity"));
    }
}

#[tokio::test]
async fn a_stream_without_a_reply_is_malformed() {
    let server = Server::scripted([Script::events(&["data: [DONE]\n\n"])]).await;
    for provider in both(&server) {
        let (texts, end) = collect(provider.as_ref()).await;
        assert!(texts.is_empty());
        assert_eq!(end.unwrap_err().kind(), MalformedReply);
    }
}

/// Older versions of Ollama and SGLang send an empty reason in every event where others send null.
#[tokio::test]
async fn an_empty_finish_reason_is_ignored() {
    let chunk = |reason: &str| {
        format!(
            "data: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"a\"}},\"finish_reason\":\"{reason}\"}}]}}\n\n"
        )
    };
    let delta = |reason: &str| {
        format!(
            "data: {{\"type\":\"message_delta\",\"delta\":{{\"text\":\"a\",\"stop_reason\":\"{reason}\"}}}}\n\n"
        )
    };
    let [cut, delta_cut] = [chunk("").repeat(3), delta("").repeat(3)];
    let whole = format!("{cut}{}", chunk("length"));
    let delta_whole = format!("{delta_cut}{}", delta("max_tokens"));
    let scripts = [cut, whole, delta_cut, delta_whole].map(|wire| Script::events(&[wire]));
    let server = Server::scripted(scripts).await;
    for provider in both(&server) {
        let (texts, end) = collect(provider.as_ref()).await;
        assert_eq!(texts, ["a"; 3]);
        let error = end.unwrap_err();
        assert_eq!((error.kind(), error.billed()), (Connection, None));
        let reply = collect(provider.as_ref()).await.1.unwrap();
        assert_eq!(
            (reply.text.as_str(), reply.finish),
            ("aaaa", FinishReason::Length)
        );
    }
}

#[tokio::test]
async fn events_that_are_not_json_are_a_malformed_reply() {
    let server = Server::scripted([Script::events(&["data: {nonsense\n\ndata: [DONE]\n\n"])]).await;
    for provider in both(&server) {
        let error = collect(provider.as_ref()).await.1.unwrap_err();
        assert_eq!((error.kind(), error.billed()), (MalformedReply, Some(true)));
    }
    let server = Server::scripted([Script::event_head()
        .send(b"data: \xff\xfe\n\n")
        .then(Act::Hang)])
    .await;
    let error = collect(&anthropic(&server)).await.1.unwrap_err();
    assert_eq!(error.kind(), MalformedReply);
}

#[tokio::test]
async fn the_sizes_of_events_and_texts_are_limited() {
    let long = format!(
        "data: {{\"choices\":[{{\"delta\":{{\"content\":\"{}\"}}}}]}}\n\n",
        "x".repeat(400)
    );
    let server =
        Server::scripted([Script::event_head().send(long.repeat(20)).then(Act::Hang)]).await;
    let with = |max_event, max_body| {
        let builder = OpenAi::builder()
            .base_url(server.url())
            .max_event(max_event);
        builder.max_body(max_body).build().unwrap()
    };
    for (openai, what, texts) in [
        (with(300, 1 << 20), "event", 0),
        (with(1000, 1000), "text", 2),
    ] {
        let (got, end) = collect(&openai).await;
        let error = end.unwrap_err();
        assert_eq!(got.len(), texts);
        assert_eq!(error.kind(), MalformedReply);
        assert!(error.is_permanent(), "it would be as large again");
        assert!(error.message().contains(what), "{error}");
    }
}

#[tokio::test]
async fn text_is_yielded_while_it_is_being_written() {
    use futures::StreamExt as _;
    let text = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n";
    let server = Server::scripted([Script::event_head().send(text).then(Act::Hang)]).await;
    let mut stream = openai(&server)
        .stream(&crate::support::request())
        .await
        .unwrap();
    assert_eq!(
        stream.next().await.unwrap().unwrap(),
        throughline::request::Delta::Text("a".into())
    );
}
