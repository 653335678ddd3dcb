//! An HTTP/2 server without TLS. It is written by hand, because it must misbehave: it falls silent, closes connections
//! gracefully or not, and refuses streams.
//!
//! It answers every request with the same JSON and reads no header.
#![allow(dead_code, missing_docs, unreachable_pub)] // Each test uses a part.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep_until};

const PREFACE: usize = 24;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const REFUSED_STREAM: u32 = 7;

/// The behaviour of one connection.
#[derive(Debug, Clone, Copy)]
pub enum Fate {
    /// Serves all requests.
    Serves,
    /// Announces after this number of requests that it accepts no more (GOAWAY), answers those and closes.
    ClosesAfter(usize),
    /// The same, but it closes without an answer to the last one.
    BreaksAfter(usize),
    /// Stays open after this number of answers and neither reads nor writes.
    SilentAfter(usize),
    /// Refuses every stream.
    Refuses,
}

pub struct Plan {
    pub max_streams: u32,
    /// From the end of a request to its answer.
    pub delay: Duration,
    /// The behaviour of the connection with this index.
    pub fate: fn(usize) -> Fate,
}

pub struct Http2Server {
    address: SocketAddr,
    counts: Arc<Counts>,
    accepting: JoinHandle<()>,
}

#[derive(Default)]
struct Counts {
    connections: AtomicUsize,
    /// Requests that were processed, with or without an answer.
    served: AtomicUsize,
    refused: AtomicUsize,
}

impl Http2Server {
    pub async fn start(plan: Plan, body: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let counts = Arc::new(Counts::default());
        let shared = Arc::clone(&counts);
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let index = shared.connections.fetch_add(1, Ordering::Relaxed);
                let _ = stream.set_nodelay(true);
                let connection = Connection {
                    stream: BufReader::new(stream),
                    fate: (plan.fate)(index),
                    due: VecDeque::new(),
                    counts: Arc::clone(&shared),
                    body,
                };
                connections.spawn(connection.serve(plan.max_streams, plan.delay));
            }
        });
        Self {
            address,
            counts,
            accepting,
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn connections(&self) -> usize {
        self.counts.connections.load(Ordering::Relaxed)
    }

    pub fn served(&self) -> usize {
        self.counts.served.load(Ordering::Relaxed)
    }

    pub fn refused(&self) -> usize {
        self.counts.refused.load(Ordering::Relaxed)
    }
}

impl Drop for Http2Server {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

struct Connection {
    stream: BufReader<TcpStream>,
    fate: Fate,
    /// The streams to be answered, and when.
    due: VecDeque<(Instant, u32)>,
    counts: Arc<Counts>,
    body: &'static str,
}

struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

impl Connection {
    /// Serves until the client disconnects or the behaviour ends the connection.
    async fn serve(mut self, max_streams: u32, delay: Duration) -> Option<()> {
        let mut preface = [0; PREFACE];
        self.stream.read_exact(&mut preface).await.ok()?;
        let mut settings = vec![0, 3];
        settings.extend(max_streams.to_be_bytes());
        self.send(SETTINGS, 0, 0, &settings).await?;
        let (mut begun, mut answered, mut last) = (0, 0, None);
        loop {
            if matches!(self.fate, Fate::SilentAfter(after) if answered >= after) {
                std::future::pending::<()>().await;
            }
            if last.is_some() && self.due.is_empty() {
                if let Fate::ClosesAfter(_) = self.fate {
                    // Closing a socket with unread data would reset it.
                    self.stream.shutdown().await.ok()?;
                    while self.stream.read_u8().await.is_ok() {}
                }
                return None;
            }
            let next = self.due.front().map(|(at, _)| *at);
            let soon = async {
                match next {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            // `fill_buf` waits for a frame without taking a byte, so it may be dropped.
            tokio::select! {
                biased;
                () = soon => {
                    let (_, stream) = self.due.pop_front()?;
                    answered += 1;
                    self.answer(stream).await?;
                    continue;
                }
                filled = tokio::io::AsyncBufReadExt::fill_buf(&mut self.stream) => {
                    if filled.ok()?.is_empty() {
                        return None;
                    }
                }
            }
            let frame = self.read().await?;
            match frame.kind {
                SETTINGS if frame.flags & ACK == 0 => self.send(SETTINGS, ACK, 0, &[]).await?,
                PING if frame.flags & ACK == 0 => self.send(PING, ACK, 0, &frame.payload).await?,
                DATA if !frame.payload.is_empty() => {
                    let more = (frame.payload.len() as u32).to_be_bytes();
                    self.send(WINDOW_UPDATE, 0, 0, &more).await?;
                }
                _ => {}
            }
            let ends = matches!(frame.kind, DATA | HEADERS) && frame.flags & END_STREAM != 0;
            // Streams after the last one are ignored.
            if !ends || last.is_some_and(|last| frame.stream > last) {
                continue;
            }
            if let Fate::Refuses = self.fate {
                self.counts.refused.fetch_add(1, Ordering::Relaxed);
                let reason = REFUSED_STREAM.to_be_bytes();
                self.send(RST_STREAM, 0, frame.stream, &reason).await?;
                continue;
            }
            begun += 1;
            self.counts.served.fetch_add(1, Ordering::Relaxed);
            self.due.push_back((Instant::now() + delay, frame.stream));
            match self.fate {
                Fate::ClosesAfter(after) | Fate::BreaksAfter(after) if begun == after => {
                    last = Some(frame.stream);
                    let mut payload = frame.stream.to_be_bytes().to_vec();
                    payload.extend(0_u32.to_be_bytes()); // NO_ERROR
                    self.send(GOAWAY, 0, 0, &payload).await?;
                    if let Fate::BreaksAfter(_) = self.fate {
                        self.due.pop_back();
                    }
                }
                _ => {}
            }
        }
    }

    async fn answer(&mut self, stream: u32) -> Option<()> {
        // The eighth entry of the static table: `:status: 200`.
        self.send(HEADERS, END_HEADERS, stream, &[0x88]).await?;
        let body = self.body;
        self.send(DATA, END_STREAM, stream, body.as_bytes()).await
    }

    async fn read(&mut self) -> Option<Frame> {
        let mut head = [0; 9];
        self.stream.read_exact(&mut head).await.ok()?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length as usize];
        self.stream.read_exact(&mut payload).await.ok()?;
        Some(Frame {
            kind: head[3],
            flags: head[4],
            stream: u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]),
            payload,
        })
    }

    async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Option<()> {
        let length = (payload.len() as u32).to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, flags];
        frame.extend(stream.to_be_bytes());
        frame.extend_from_slice(payload);
        self.stream.write_all(&frame).await.ok()
    }
}
