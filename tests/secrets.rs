//! No key is in a log, an error, a `Debug` or a span.
#![cfg(all(feature = "openai", feature = "anthropic"))]

mod support;

use std::error::Error as _;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use throughline::ErrorKind::*;
use throughline::{Anthropic, Context, Error, OpenAi, Provider};
use tracing_subscriber::fmt::format::FmtSpan;

use support::server::{Act, Script, Server};
use support::{KEY, OPENAI_BODY, both, collect, request};

/// The value of a header that a gateway expects.
const HIDDEN: &str = "gateway-secret";

#[tokio::test]
async fn redirects_are_not_followed_so_that_no_other_server_gets_the_key() {
    let elsewhere = Server::scripted([Script::json(200, OPENAI_BODY)]).await;
    for status in [301, 302, 303, 307, 308] {
        let location = format!("{}/v1?t=1", elsewhere.url());
        let headers = [("location", location.as_str())];
        let server = Server::scripted([Script::reply(status, &headers, "")]).await;
        for provider in both(&server) {
            let error = provider.generate(&request()).await.unwrap_err();
            assert_eq!(error.kind(), Config);
            assert!(error.message().contains(&elsewhere.url()), "{error}");
        }
    }
    assert_eq!(
        elsewhere.connections(),
        0,
        "the key is sent to no other server"
    );
}

/// Everything that can be printed of an error.
fn shown(error: &Error) -> String {
    let mut text = format!(
        "{error} {error:?} {error:#?} {}",
        serde_json::to_string(error).unwrap()
    );
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!("{cause} {cause:?}");
        source = cause.source();
    }
    text
}

/// The server repeats the key in every part of a reply that an error may quote.
#[tokio::test]
async fn no_key_is_in_an_error_or_in_debug_output() {
    let json = format!(r#"{{"error":{{"message":"bad key {KEY} or {HIDDEN}","code":"{KEY}"}}}}"#);
    let padded = format!("{} {KEY}", "x".repeat(2048 - 20)); // the cut falls into the key
    let echo = [
        ("x-request-id", KEY),
        ("location", KEY),
        ("retry-after", KEY),
    ];
    let frame = format!("data: {json}\n\n");
    let scripts = [
        Script::reply(401, &echo, &json),
        Script::reply(401, &echo, KEY),
        Script::reply(302, &echo, KEY),
        Script::reply(400, &echo, &padded),
        Script::reply(200, &echo, &json),
        Script::reply(200, &echo, KEY),
        Script::reply(200, &echo, format!("[{KEY}")),
        Script::reply(200, &echo, format!("\"{KEY}\"")),
        Script::reply(200, &echo, &padded),
        Script::events(&[&frame]),
        Script::events(&[format!("data: {{\"{KEY}\": {KEY}}}\n\ndata: [DONE]\n\n")]),
        Script::new()
            .send(format!("HTTP/1.1 {KEY}\r\n\r\n"))
            .then(Act::Close),
        Script::new()
            .send(format!(
                "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{KEY}\r\n"
            ))
            .then(Act::Close),
    ];
    for (index, script) in scripts.into_iter().enumerate() {
        let server = Server::scripted([script]).await;
        let (url, query) = (server.url(), format!("k={KEY}"));
        let openai = OpenAi::builder()
            .base_url(format!("{url}?{query}"))
            .api_key(KEY)
            .header("x-gateway", HIDDEN);
        let anthropic = Anthropic::builder()
            .base_url(url)
            .api_key(KEY)
            .header("x-gateway", HIDDEN)
            .query("k", KEY);
        for text in [format!("{openai:?}"), format!("{anthropic:#?}")] {
            assert!(!text.contains(KEY) && !text.contains(HIDDEN), "{text}");
            assert!(text.contains("x-gateway"), "names may be shown: {text}");
        }
        let (openai, anthropic) = (openai.build().unwrap(), anthropic.build().unwrap());
        for text in [format!("{openai:?}"), format!("{anthropic:#?}")] {
            assert!(!text.contains(KEY) && !text.contains(HIDDEN), "{text}");
        }
        let providers: [Arc<dyn Provider>; 2] = [Arc::new(openai), Arc::new(anthropic)];
        for provider in providers {
            let errors = [
                provider.generate(&request()).await.err(),
                collect(provider.as_ref()).await.1.err(),
            ];
            assert!(errors.iter().any(Option::is_some), "{index}");
            for error in errors.iter().flatten() {
                let text = shown(error);
                assert!(
                    !text.contains(KEY) && !text.contains(HIDDEN),
                    "{index}: {text}"
                );
                assert!(!text.contains(&KEY[..12]), "{index}, in part: {text}");
            }
        }
    }
}

/// The output of a subscriber to all events and spans of all crates.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn no_key_and_no_prompt_is_in_a_log_or_a_span() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_span_events(FmtSpan::FULL)
        .with_writer(move || writer.clone());
    let _guard = tracing::subscriber::set_default(subscriber.finish());

    let refusal = format!(r#"{{"error":{{"message":"bad key {KEY} or {HIDDEN}"}}}}"#);
    let scripts = [Script::json(200, OPENAI_BODY), Script::json(401, &refusal)];
    let server = Server::scripted(scripts).await;
    let openai = OpenAi::builder()
        .base_url(server.url())
        .api_key(KEY)
        .header("x-gateway", HIDDEN)
        .build()
        .unwrap();
    let cx = Context::builder(openai).model("m").build();
    assert!(cx.generate("the prompt").await.is_ok());
    assert!(cx.generate("the prompt").await.is_err());

    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert!(
        log.contains("chat") && log.contains("unauthorized"),
        "{log}"
    );
    for secret in [KEY, HIDDEN, "the prompt", "Rhône"] {
        assert!(!log.contains(secret), "{secret:?} in {log}");
    }
}
