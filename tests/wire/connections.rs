//! Connections: their number and lifetime, and the errors of calls whose connection closes, breaks or cannot be opened.

use std::time::{Duration, Instant};

use futures::future::join_all;
use throughline::ErrorKind::*;
use throughline::{Anthropic, Context, OpenAi, Provider, Result};

use crate::support::http2::{Fate, Http2Server, Plan};
use crate::support::server::{Act, Script, Server};
use crate::support::{OPENAI_BODY, openai, request};

const PING: Duration = Duration::from_millis(150);

/// Returns the TLS client hello of a provider.
async fn client_hello(build: impl FnOnce(String) -> Box<dyn Provider>) -> Vec<u8> {
    use tokio::io::AsyncReadExt as _;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let provider = build(format!("https://{}", listener.local_addr().unwrap()));
    let call = tokio::spawn(async move { provider.generate(&request()).await });
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut hello = vec![0; 16 << 10];
    let length = stream.read(&mut hello).await.unwrap();
    call.abort();
    hello.truncate(length);
    hello
}

#[tokio::test]
async fn http2_is_offered_only_if_enabled() {
    let offers = |hello: &[u8], name: &[u8]| hello.windows(name.len()).any(|w| w == name);
    for http2 in [false, true] {
        for openai in [false, true] {
            let hello = client_hello(|url| match openai {
                true => Box::new(
                    OpenAi::builder()
                        .base_url(url)
                        .http2(http2)
                        .build()
                        .unwrap(),
                ),
                false => Box::new(
                    Anthropic::builder()
                        .base_url(url)
                        .http2(http2)
                        .build()
                        .unwrap(),
                ),
            })
            .await;
            assert!(offers(&hello, b"\x08http/1.1"));
            assert_eq!(offers(&hello, b"\x02h2"), http2);
        }
    }
}

async fn generate_concurrently(provider: &OpenAi, calls: usize) -> Vec<Result<String>> {
    join_all((0..calls).map(|_| async {
        let reply = provider.generate(&request()).await?;
        Ok(reply.text)
    }))
    .await
}

#[tokio::test]
async fn calls_in_flight_are_not_bounded_by_the_streams_of_one_connection() {
    let script = Script::new().then(Act::Wait(Duration::from_secs(1)));
    let reply = crate::support::server::reply(200, &[], OPENAI_BODY.as_bytes());
    let server = Server::scripted([script.send(reply)]).await;
    let replies = generate_concurrently(&openai(&server), 256).await;
    assert!(replies.iter().all(Result::is_ok));
    // All of them, unless the machine is so busy that some are answered before others are sent.
    assert!(server.connections() > 200, "{}", server.connections());
}

/// Common servers close a connection that was not used for five seconds.
#[tokio::test]
async fn an_unused_connection_is_dropped_before_servers_close_it() {
    let server = Server::scripted([Script::json(200, OPENAI_BODY)]).await;
    let openai = openai(&server);
    for (pause, connections) in [(0, 1), (100, 1), (4500, 2)] {
        tokio::time::sleep(Duration::from_millis(pause)).await;
        openai.generate(&request()).await.unwrap();
        assert_eq!(server.connections(), connections, "after {pause} ms");
    }
}

fn http2(server: &Http2Server) -> OpenAi {
    let builder = OpenAi::builder().base_url(server.url());
    builder.http2(true).build().unwrap()
}

/// A client that soon notices a silent server. On a busy machine it may take any server for silent.
fn http2_with_short_ping(server: &Http2Server) -> OpenAi {
    let builder = OpenAi::builder().base_url(server.url());
    builder.http2(true).http2_ping(PING).build().unwrap()
}

async fn http2_server(fate: fn(usize) -> Fate) -> Http2Server {
    let plan = Plan {
        max_streams: 100,
        delay: Duration::from_millis(20),
        fate,
    };
    Http2Server::start(plan, OPENAI_BODY).await
}

#[tokio::test]
async fn http2_shares_one_connection() {
    let server = http2_server(|_| Fate::Serves).await;
    let openai = http2_with_short_ping(&server);
    assert_eq!(openai.generate(&request()).await.unwrap().text, "Rhône");
    let replies = generate_concurrently(&openai, 150).await;
    assert!(replies.iter().all(Result::is_ok));
    assert_eq!((server.connections(), server.served()), (1, 151));
    // The server answers pings, so the connection stays open.
    tokio::time::sleep(5 * PING).await;
    openai.generate(&request()).await.unwrap();
    assert_eq!(server.connections(), 1);
}

#[tokio::test]
async fn http2_ping_accepts_any_interval() {
    let server = http2_server(|_| Fate::Serves).await;
    for ping in [Duration::ZERO, Duration::MAX] {
        let builder = OpenAi::builder().base_url(server.url()).http2(true);
        let openai = builder.http2_ping(ping).build().unwrap();
        openai.generate(&request()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        openai.generate(&request()).await.unwrap();
    }
    assert_eq!(server.connections(), 2);
}

#[tokio::test]
async fn a_silent_http2_connection_is_closed() {
    let server = http2_server(|connection| match connection {
        0 => Fate::SilentAfter(2),
        _ => Fate::Serves,
    })
    .await;
    let openai = http2_with_short_ping(&server);
    for _ in 0..2 {
        openai.generate(&request()).await.unwrap();
    }
    let start = Instant::now();
    for result in generate_concurrently(&openai, 10).await {
        let error = result.unwrap_err();
        assert_eq!(
            (error.kind(), error.billed()),
            (Connection, None),
            "{error:?}"
        );
        assert!(error.is_temporary());
    }
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
    let replies = generate_concurrently(&openai, 10).await;
    assert!(replies.iter().all(Result::is_ok));
    assert_eq!((server.connections(), server.served()), (2, 12));
}

#[tokio::test]
async fn an_http2_connection_that_dies_unused_costs_no_call() {
    let server = http2_server(|connection| match connection {
        0 => Fate::SilentAfter(1),
        _ => Fate::Serves,
    })
    .await;
    let openai = http2_with_short_ping(&server);
    openai.generate(&request()).await.unwrap();
    tokio::time::sleep(6 * PING).await;
    openai.generate(&request()).await.unwrap();
    assert_eq!((server.connections(), server.served()), (2, 2));
}

/// A server that closes its connections gracefully processes each request once, and no call fails.
#[tokio::test]
async fn requests_that_a_server_has_not_processed_are_resent() {
    let server = http2_server(|_| Fate::ClosesAfter(30)).await;
    let openai = http2(&server);
    // Less and more than the 100 streams of a connection.
    for calls in [60, 90, 250, 200] {
        for result in generate_concurrently(&openai, calls).await {
            assert_eq!(result.unwrap(), "Rhône");
        }
    }
    assert_eq!(server.served(), 600, "each once");
    assert!(server.connections() >= 600 / 30);
}

#[tokio::test]
async fn a_request_that_a_server_has_processed_is_not_resent() {
    let server = http2_server(|_| Fate::BreaksAfter(1)).await;
    let error = http2(&server).generate(&request()).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.billed()),
        (Connection, None),
        "{error:?}"
    );
    assert_eq!((server.connections(), server.served()), (1, 1));
}

#[tokio::test]
async fn a_request_that_is_never_processed_fails_unbilled() {
    let server = http2_server(|_| Fate::Refuses).await;
    let error = http2(&server).generate(&request()).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.billed()),
        (Connection, Some(false)),
        "{error:?}"
    );
    assert!(error.is_temporary());
    assert!((2..20).contains(&server.refused()), "{}", server.refused());
}

/// The test runs itself again as a second process with a limit on open files.
#[cfg(target_os = "linux")]
#[test]
fn running_out_of_file_descriptors_is_an_unbilled_error_that_names_the_limit() {
    const URL: &str = "THROUGHLINE_TEST_URL";
    const CALLS: usize = 100;
    let runtime = crate::support::server::runtime();
    if let Ok(url) = std::env::var(URL) {
        runtime.block_on(few_descriptors(&url, CALLS));
        return;
    }
    let port = Server::apart(|| async {
        let script = Script::new().then(Act::Wait(Duration::from_millis(300)));
        let reply = crate::support::server::reply(200, &[], OPENAI_BODY.as_bytes());
        Server::scripted([script.send(reply)]).await
    });
    let port = port.rsplit(':').next().unwrap();
    // The lookup of a name needs descriptors too.
    for host in ["127.0.0.1", "localhost"] {
        let output = std::process::Command::new("sh")
            .args(["-c", "ulimit -n 64; exec \"$0\" \"$@\""])
            .arg(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "connections::running_out_of_file_descriptors_is_an_unbilled_error_that_names_the_limit",
            ])
            .env(URL, format!("http://{host}:{port}"))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{host}: {said}");
        assert!(said.contains("1 passed"), "{host}: {said}");
    }
}

#[cfg(target_os = "linux")]
async fn few_descriptors(url: &str, calls: usize) {
    let openai = OpenAi::builder().base_url(url).build().unwrap();
    let results = generate_concurrently(&openai, calls).await;
    let failed: Vec<_> = results
        .iter()
        .filter_map(|result| result.as_ref().err())
        .collect();
    assert!((20..80).contains(&failed.len()), "{} failed", failed.len());
    for error in failed {
        assert_eq!(
            (error.kind(), error.billed()),
            (Io, Some(false)),
            "{error:?}"
        );
        assert!(error.is_temporary());
        assert!(
            error
                .message()
                .contains("limit of 64 open files (ulimit -n)"),
            "{error}"
        );
    }
    // Calls that end free their descriptors, so retries succeed.
    let cx = Context::builder(openai).model("m").build();
    let settled = cx
        .fan_out("call", 0..calls)
        .buffer_unordered(calls)
        .settle(async |cx, _| cx.generate("Name a river.").await)
        .await;
    assert_eq!(settled.failures().count(), 0, "{settled}");
}
