//! What networks and servers do wrong, over a real socket: silence, resets, lies about
//! lengths, too much of everything, and keys where they must not be.

use std::error::Error as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use throughline::ErrorKind::*;
use throughline::{Anthropic, Error, OpenAi, Provider};

use crate::support::server::{Act, Script, Server, reply};
use crate::support::{KEY, OPENAI_BODY, both, collect, openai, request};

const SHORT: Duration = Duration::from_millis(60);

/// A silent server is waited for only so long, and the message says which patience ended.
async fn times_out(provider: &dyn Provider, what: &str) {
    let start = Instant::now();
    let whole = provider.generate(&request()).await.unwrap_err();
    let streamed = collect(provider).await.1.unwrap_err();
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
    for error in [whole, streamed] {
        assert_eq!(error.kind(), Timeout, "{error:?}");
        assert!(error.is_temporary());
        assert_eq!(error.billed(), None);
        assert!(error.message().contains(what), "{error}");
    }
}

#[tokio::test]
async fn no_first_byte() {
    let server = Server::scripted([Script::new().then(Act::Hang)]).await;
    let url = server.url();
    let openai = OpenAi::builder().base_url(&url).first_byte_timeout(SHORT);
    times_out(&openai.build().unwrap(), "first byte").await;
    let anthropic = Anthropic::builder()
        .base_url(&url)
        .first_byte_timeout(SHORT);
    times_out(&anthropic.build().unwrap(), "first byte").await;
}

#[tokio::test]
async fn silence_in_the_middle() {
    let head =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 999\r\n\r\n: hi\n";
    let server = Server::scripted([Script::new().send(head).then(Act::Hang)]).await;
    let openai = OpenAi::builder().base_url(server.url()).idle_timeout(SHORT);
    times_out(&openai.build().unwrap(), "next piece").await;
}

/// A server that is never silent for long is stopped by the call's own time.
#[tokio::test]
async fn a_trickle_without_end() {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 999\r\n\r\n";
    let drip = |script: Script, _| script.send(": hi\n").then(Act::Wait(SHORT / 6));
    let server = Server::scripted([(0..100).fold(Script::new().send(head), drip)]).await;
    let patient = OpenAi::builder().base_url(server.url());
    let hasty = patient.clone().timeout(SHORT).build().unwrap();
    times_out(&hasty, "the call").await;

    let patient = patient.build().unwrap();
    let request = request().timeout(SHORT);
    let error = patient.generate(&request).await.unwrap_err();
    assert!(
        error.is_timeout() && error.message().contains("60ms"),
        "{error}"
    );
    let longer = request.timeout(Duration::from_secs(60));
    let error = hasty.generate(&longer).await.unwrap_err();
    assert!(
        error.message().contains("60ms"),
        "a request can only shorten it: {error}"
    );
}

#[tokio::test]
async fn timeouts_of_any_length_are_allowed() {
    let server = Server::scripted([Script::json(200, OPENAI_BODY)]).await;
    let openai = OpenAi::builder()
        .base_url(server.url())
        .timeout(Duration::MAX)
        .connect_timeout(Duration::MAX)
        .idle_timeout(Duration::MAX)
        .first_byte_timeout(Duration::MAX);
    assert!(openai.build().unwrap().generate(&request()).await.is_ok());
}

#[tokio::test]
async fn nobody_there_costs_nothing() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let openai = OpenAi::builder()
        .base_url(url)
        .api_key(KEY)
        .query("key", "q-secret")
        .build()
        .unwrap();
    let error = openai.generate(&request()).await.unwrap_err();
    assert_eq!((error.kind(), error.billed()), (Connection, Some(false)));
    assert!(error.is_temporary());
    assert!(error.message().contains("refused"), "{error}");
    assert!(!format!("{error:?}").contains("q-secret"), "{error:?}");
}

/// A server that accepts and then says nothing is not connected to before TLS is made.
#[tokio::test]
async fn no_connection_in_time_costs_nothing() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let openai = OpenAi::builder().base_url(url).connect_timeout(SHORT);
    let error = openai.build().unwrap().generate(&request()).await;
    let error = error.unwrap_err();
    assert_eq!(error.kind(), Timeout, "{error:?}");
    assert_eq!(error.billed(), Some(false), "nothing was sent");
}

#[tokio::test]
async fn a_server_without_tls_costs_nothing() {
    use tokio::io::AsyncWriteExt as _;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let answer = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        answer.unwrap();
        std::future::pending::<()>().await; // the socket stays open
    });
    let openai = OpenAi::builder().base_url(url).build().unwrap();
    let error = openai.generate(&request()).await.unwrap_err();
    assert_eq!((error.kind(), error.billed()), (Connection, Some(false)));
    assert!(error.message().contains("begin with http://?"), "{error}");
}

#[tokio::test]
async fn a_connection_that_breaks_may_have_been_paid_for() {
    let cut = b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n{\"choices\":";
    let scripts = [
        Script::new().then(Act::Reset),
        Script::new().then(Act::Close),
        Script::new().send("HTTP/1.1 2").then(Act::Reset),
        Script::new().send(cut).then(Act::Close),
        Script::new().send(cut).then(Act::Reset),
        Script::new()
            .send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n")
            .then(Act::Close),
        Script::new()
            .send("SSH-2.0-OpenSSH_9.6\r\n")
            .then(Act::Close),
    ];
    for (index, script) in scripts.into_iter().enumerate() {
        let server = Server::scripted([script]).await;
        for provider in both(&server) {
            let error = provider.generate(&request()).await.unwrap_err();
            assert_eq!(error.kind(), Connection, "{index}: {error:?}");
            assert_eq!(error.billed(), None, "{index}: {error:?}");
            assert!(error.is_temporary());
        }
        assert_eq!(server.requests().len(), 2, "{index}: no call is repeated");
    }
}

/// A pooled connection that the server has closed meanwhile is not a failed call.
#[tokio::test]
async fn a_closed_connection_is_replaced_before_anything_is_sent() {
    let script = Script::json(200, OPENAI_BODY).then(Act::Close);
    let server = Server::scripted([script]).await;
    let openai = openai(&server);
    for _ in 0..5 {
        openai.generate(&request()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!((server.requests().len(), server.connections()), (5, 5));
}

#[tokio::test]
async fn a_refusal_stands_whatever_happens_to_its_body() {
    let head = "HTTP/1.1 429 X\r\nretry-after: 3\r\ncontent-length: 999999\r\n\r\n";
    for script in [
        Script::new().send(head).then(Act::Close),
        Script::new()
            .send(head)
            .send("{\"error\":{")
            .then(Act::Reset),
        Script::new()
            .send(head)
            .send("x".repeat(200_000))
            .then(Act::Close),
    ] {
        let server = Server::scripted([script]).await;
        for provider in both(&server) {
            let error = provider.generate(&request()).await.unwrap_err();
            assert_eq!(error.kind(), Throttled);
            assert_eq!(error.wait(), Some(Duration::from_secs(3)));
            assert_eq!(error.billed(), Some(false));
            assert!(error.message().len() <= 2048);
        }
    }
}

#[tokio::test]
async fn bodies_are_bounded_announced_or_not() {
    let big = format!("{{\"x\":\"{}\"}}", "y".repeat(5000));
    let endless = format!("HTTP/1.1 200 OK\r\n\r\n{big}");
    for script in [
        Script::json(200, &big),
        Script::new().send(endless).then(Act::Hang),
        Script::new()
            .send("HTTP/1.1 200 OK\r\ncontent-length: 1000000000000000\r\n\r\n")
            .then(Act::Hang),
    ] {
        let server = Server::scripted([script]).await;
        let openai = OpenAi::builder()
            .base_url(server.url())
            .max_body(1000)
            .build()
            .unwrap();
        let error = openai.generate(&request()).await.unwrap_err();
        assert_eq!(
            (error.kind(), error.billed()),
            (MalformedReply, Some(true)),
            "{error:?}"
        );
        assert!(
            error.is_permanent(),
            "it would be as large, and cost as much, again"
        );
        assert!(error.message().contains("1000 bytes"), "{error}");
    }
}

#[tokio::test]
async fn long_messages_are_cut_at_a_character() {
    let body =
        serde_json::json!({"error": {"message": "é".repeat(5000), "code": "c".repeat(5000)}});
    let server = Server::scripted([Script::json(400, &body.to_string())]).await;
    let error = openai(&server).generate(&request()).await.unwrap_err();
    assert!(error.message().len() <= 2048 && error.message().ends_with("é…"));
    assert!(error.code().unwrap().len() <= 100);
}

#[tokio::test]
async fn redirects_are_not_followed() {
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
    assert_eq!(elsewhere.connections(), 0, "the key goes to nobody else");
}

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

/// The server says the key back in every place that ends in an error.
#[tokio::test]
async fn keys_are_never_shown() {
    const HIDDEN: &str = "gateway-secret";
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

#[tokio::test]
async fn dropping_a_call_closes_its_connection() {
    use tokio::io::AsyncReadExt as _;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let openai = OpenAi::builder().base_url(url).build().unwrap();
    let call = tokio::spawn(async move { openai.generate(&request()).await });
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut buffer = [0; 4096];
    assert!(stream.read(&mut buffer).await.unwrap() > 0);
    call.abort();
    let closed = async { while stream.read(&mut buffer).await.unwrap_or(0) > 0 {} };
    tokio::time::timeout(Duration::from_secs(5), closed)
        .await
        .unwrap();
}

#[tokio::test]
async fn many_calls_at_once_share_a_client() {
    let server = Server::fixed(reply(200, &[], OPENAI_BODY.as_bytes())).await;
    let openai = openai(&server);
    let calls = (0..50).map(|_| {
        let openai = openai.clone();
        async move { openai.generate(&request()).await.unwrap().text }
    });
    let texts = futures::future::join_all(calls).await;
    assert!(texts.iter().all(|text| text == "Rhône"));
}
