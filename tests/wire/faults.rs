//! Faults of networks and servers over a real socket: silence, resets, wrong lengths and excessive sizes.

use std::time::{Duration, Instant};

use throughline::ErrorKind::*;
use throughline::{Anthropic, OpenAi, Provider};

use crate::support::server::{Act, Script, Server, reply};
use crate::support::{KEY, OPENAI_BODY, both, collect, openai, request};

const SHORT: Duration = Duration::from_millis(60);

/// Checks that a call to a silent server times out and that the message names the timeout.
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
async fn a_missing_first_byte_times_out() {
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
async fn a_pause_within_the_reply_times_out() {
    let head =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 999\r\n\r\n: hi\n";
    let server = Server::scripted([Script::new().send(head).then(Act::Hang)]).await;
    let openai = OpenAi::builder().base_url(server.url()).idle_timeout(SHORT);
    times_out(&openai.build().unwrap(), "next piece").await;
}

/// A server that never pauses for long is stopped by the timeout of the whole call.
#[tokio::test]
async fn an_endless_slow_reply_times_out() {
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
async fn timeouts_of_any_length_are_accepted() {
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
async fn a_refused_connection_is_not_billed() {
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

/// Connecting includes TLS: a server that accepts and stays silent is a connection timeout.
#[tokio::test]
async fn a_connection_timeout_is_not_billed() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let openai = OpenAi::builder().base_url(url).connect_timeout(SHORT);
    let error = openai.build().unwrap().generate(&request()).await;
    let error = error.unwrap_err();
    assert_eq!(error.kind(), Timeout, "{error:?}");
    assert_eq!(error.billed(), Some(false), "nothing was sent");
}

#[tokio::test]
async fn a_server_without_tls_is_not_billed() {
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
async fn it_is_unknown_whether_a_broken_call_is_billed() {
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

/// A pooled connection that the server has closed does not fail the next call.
#[tokio::test]
async fn a_closed_pooled_connection_is_replaced_before_the_request_is_sent() {
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
async fn an_error_response_is_classified_even_if_its_body_breaks_off() {
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
async fn the_size_of_a_body_is_limited_with_and_without_content_length() {
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
async fn long_messages_are_truncated_between_characters() {
    let body =
        serde_json::json!({"error": {"message": "é".repeat(5000), "code": "c".repeat(5000)}});
    let server = Server::scripted([Script::json(400, &body.to_string())]).await;
    let error = openai(&server).generate(&request()).await.unwrap_err();
    assert!(error.message().len() <= 2048 && error.message().ends_with("é…"));
    assert!(error.code().unwrap().len() <= 100);
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
async fn concurrent_calls_share_a_client() {
    let server = Server::fixed(reply(200, &[], OPENAI_BODY.as_bytes())).await;
    let openai = openai(&server);
    let calls = (0..50).map(|_| {
        let openai = openai.clone();
        async move { openai.generate(&request()).await.unwrap().text }
    });
    let texts = futures::future::join_all(calls).await;
    assert!(texts.iter().all(|text| text == "Rhône"));
}
