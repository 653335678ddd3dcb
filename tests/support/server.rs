//! An HTTP/1.1 server on a real socket with scripted answers.
//!
//! [`Server::scripted`] answers each request with the next script and records the requests,
//! [`Server::answering`] calls a closure for the script, and [`Server::fixed`] sends the same bytes
//! as fast as it can.
#![allow(dead_code, missing_docs, unreachable_pub)] // Each test uses a part.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::task::{JoinHandle, JoinSet};

/// Creates a runtime on the current thread.
pub fn runtime() -> Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().unwrap()
}

/// A step of the server's answer to a request.
#[derive(Debug, Clone)]
pub enum Act {
    Send(Vec<u8>),
    Wait(Duration),
    /// Stays silent and keeps the connection open.
    Hang,
    /// Closes the connection (FIN).
    Close,
    /// Resets the connection (RST).
    Reset,
}

/// The answer to one request.
#[derive(Debug, Clone, Default)]
pub struct Script(Vec<Act>);

impl Script {
    pub fn new() -> Self {
        Self::default()
    }

    /// Sends a whole reply with its length.
    pub fn reply(status: u16, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Self {
        Self::new().send(reply(status, headers, body.as_ref()))
    }

    /// Sends a whole JSON reply.
    pub fn json(status: u16, body: &str) -> Self {
        Self::reply(status, &[("content-type", "application/json")], body)
    }

    /// Sends a body in pieces, which are flushed separately, and closes the connection.
    pub fn events(pieces: &[impl AsRef<[u8]>]) -> Self {
        pieces
            .iter()
            .fold(Self::event_head(), |script, piece| script.send(piece))
            .then(Act::Close)
    }

    /// Sends the head of a stream that ends with the connection.
    pub fn event_head() -> Self {
        Self::new().send("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-request-id: req_1\r\nconnection: close\r\n\r\n")
    }

    #[must_use]
    pub fn send(self, bytes: impl AsRef<[u8]>) -> Self {
        self.then(Act::Send(bytes.as_ref().to_vec()))
    }

    #[must_use]
    pub fn then(mut self, act: Act) -> Self {
        self.0.push(act);
        self
    }
}

/// Returns the bytes of a whole reply.
pub fn reply(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut bytes = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n", body.len());
    for (name, value) in headers {
        bytes.push_str(&format!("{name}: {value}\r\n"));
    }
    bytes.push_str("\r\n");
    let mut bytes = bytes.into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

/// A received request.
#[derive(Debug, Clone)]
pub struct Recorded {
    pub line: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Recorded {
    pub fn header(&self, name: &str) -> Option<&str> {
        let pair = self.headers.iter().find(|(key, _)| key == name);
        pair.map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

#[derive(Default)]
struct Shared {
    scripts: Mutex<VecDeque<Script>>,
    requests: Mutex<Vec<Recorded>>,
    connections: AtomicUsize,
}

/// The server; it and its connections end when it is dropped.
pub struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

impl Server {
    /// Answers each request with the next script, and with the last one from then on.
    pub async fn scripted(scripts: impl IntoIterator<Item = Script>) -> Self {
        let shared = Arc::new(Shared {
            scripts: Mutex::new(scripts.into_iter().collect()),
            ..Shared::default()
        });
        Self::start(shared, |stream, shared| {
            play(stream, move |request| shared.next(request))
        })
        .await
    }

    /// Answers each request with the script that `answer` returns, without recording.
    pub async fn answering(answer: impl Fn(Recorded) -> Script + Send + Sync + 'static) -> Self {
        let answer = Arc::new(answer);
        Self::start(Arc::default(), move |stream, _| {
            let answer = Arc::clone(&answer);
            play(stream, move |request| answer(request))
        })
        .await
    }

    /// Answers every request with the same bytes, without recording, and keeps connections open.
    pub async fn fixed(reply: Vec<u8>) -> Self {
        let reply: Arc<[u8]> = reply.into();
        Self::start(Arc::default(), move |stream, _| {
            repeat(stream, Arc::clone(&reply))
        })
        .await
    }

    /// Starts a server on its own thread, which runs until the process ends, and returns its URL.
    pub fn apart<F: Future<Output = Self>>(start: impl FnOnce() -> F + Send + 'static) -> String {
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            runtime().block_on(async {
                let server = start().await;
                tell.send(server.url()).unwrap();
                std::future::pending::<()>().await;
            });
        });
        told.recv().unwrap()
    }

    async fn start<F>(
        shared: Arc<Shared>,
        serve: impl Fn(TcpStream, Arc<Shared>) -> F + Send + 'static,
    ) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::clone(&shared);
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                state.connections.fetch_add(1, Ordering::Relaxed);
                let _ = stream.set_nodelay(true);
                connections.spawn(serve(stream, Arc::clone(&state)));
                while connections.try_join_next().is_some() {}
            }
        });
        Self {
            address,
            shared,
            accepting,
        }
    }

    /// `http://127.0.0.1:…`, without a slash at the end.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn requests(&self) -> Vec<Recorded> {
        self.shared.requests.lock().unwrap().clone()
    }

    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Shared {
    /// Records the request and takes the next script; the last one stays.
    fn next(&self, request: Recorded) -> Script {
        self.requests.lock().unwrap().push(request);
        let mut scripts = self.scripts.lock().unwrap();
        match scripts.len() {
            0 => Script::default().then(Act::Close),
            1 => scripts[0].clone(),
            _ => scripts.pop_front().unwrap(),
        }
    }
}

async fn play(mut stream: TcpStream, answer: impl Fn(Recorded) -> Script) {
    let mut buffer = Vec::new();
    while let Some((head, length)) = read_head(&mut stream, &mut buffer).await {
        let (head, body) = buffer[..head + length].split_at(head);
        let script = answer(record(head, body));
        let end = head.len() + length;
        buffer.drain(..end);
        for act in script.0 {
            match act {
                // The client may have disconnected on purpose.
                Act::Send(bytes) => {
                    if stream.write_all(&bytes).await.is_err() {
                        return;
                    }
                    // A client on the same thread can read this piece separately.
                    tokio::task::yield_now().await;
                }
                Act::Wait(duration) => tokio::time::sleep(duration).await,
                Act::Hang => std::future::pending().await,
                Act::Close => return,
                Act::Reset => return stream.set_zero_linger().unwrap(),
            }
        }
    }
}

async fn repeat(mut stream: TcpStream, reply: Arc<[u8]>) {
    let mut buffer = Vec::with_capacity(16 << 10);
    while let Some((head, length)) = read_head(&mut stream, &mut buffer).await {
        buffer.drain(..head + length);
        if stream.write_all(&reply).await.is_err() {
            return;
        }
    }
}

/// Reads until the buffer holds a whole request. Returns the lengths of its head and its body.
async fn read_head(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<(usize, usize)> {
    let mut searched = 0;
    let head = loop {
        let end = buffer[searched..].windows(4).position(|w| w == b"\r\n\r\n");
        if let Some(end) = end {
            break searched + end + 4;
        }
        searched = buffer.len().saturating_sub(3);
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    };
    let length = std::str::from_utf8(&buffer[..head])
        .ok()?
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .map_or(Some(0), |(_, value)| value.trim().parse().ok())?;
    while buffer.len() < head + length {
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
    Some((head, length))
}

fn record(head: &[u8], body: &[u8]) -> Recorded {
    let head = String::from_utf8_lossy(head);
    let mut lines = head.lines();
    Recorded {
        line: lines.next().unwrap_or_default().to_owned(),
        headers: lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_lowercase(), value.trim().to_owned()))
            .collect(),
        body: body.to_vec(),
    }
}
