//! Streamed replies, on the paused clock.

use std::time::Duration;

use futures::StreamExt as _;
use throughline::testing::Scripted;
use throughline::{
    Context, Error, ErrorKind, Pace, Provider, Reply, Request, Result, Retry, Sim, Usage,
    async_trait, context::Deltas, observe::Event, request::Delta,
};
use tokio::time::{Instant, sleep};

const SECOND: Duration = Duration::from_secs(1);

fn broken(kind: ErrorKind) -> Error {
    Error::new(kind, "as scripted")
}

/// Reads a stream to its end, and returns each event as words with the second in which it came.
async fn read(mut deltas: Deltas) -> Vec<(u64, String)> {
    let began = Instant::now();
    let mut told = Vec::new();
    while let Some(delta) = deltas.next().await {
        let word = match delta {
            Ok(Delta::Text(text)) => text,
            Ok(Delta::Discard) => "(discard)".into(),
            Ok(Delta::End(reply)) => format!("(end: {})", reply.text),
            Ok(other) => panic!("{other:?}"),
            Err(error) => format!("({})", error.kind()),
        };
        told.push((began.elapsed().as_secs(), word));
    }
    told
}

fn words(told: &[(u64, String)]) -> Vec<(u64, &str)> {
    told.iter().map(|(at, word)| (*at, &**word)).collect()
}

#[tokio::test(start_paused = true)]
async fn text_is_yielded_while_it_is_written_and_the_call_is_counted() {
    let script = Scripted::new().streamed(2 * SECOND, ["The ", "Po."]);
    let (sender, events) = std::sync::mpsc::channel();
    let cx = Context::builder(script)
        .pace(Pace::unlimited().in_flight(1))
        .on_event(move |event| sender.send(event.to_string()).unwrap())
        .build();
    let told = read(cx.stream("Name a river.")).await;
    assert_eq!(
        words(&told),
        [(1, "The "), (2, "Po."), (2, "(end: The Po.)")]
    );
    let tally = cx.tally();
    assert_eq!((tally.calls, tally.attempts), (1, 1));
    assert!(tally.usage.output_tokens > 0);
    let lane = cx.snapshot().lane;
    assert_eq!((lane.in_flight, lane.granted), (0, 1));
    let events: Vec<String> = events.try_iter().collect();
    assert_eq!(events.len(), 2, "{events:?}");
    assert!(events[1].contains("answered in 2.0s"), "{events:?}");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_sent_before_the_stream_is_polled() {
    let script = Scripted::new().reply("a");
    let cx = Context::builder(script.clone()).build();
    let deltas = cx.stream("a");
    sleep(SECOND).await;
    assert_eq!(script.requests().len(), 0);
    drop(deltas);
    assert_eq!(cx.tally().attempts, 0);
}

#[tokio::test(start_paused = true)]
async fn a_failure_before_the_first_piece_is_tried_again() {
    let none: [&str; 0] = [];
    let script = Scripted::new()
        .error(broken(ErrorKind::Unavailable))
        .broken(SECOND, none, broken(ErrorKind::Connection))
        .reply("third");
    let cx = Context::builder(script).build();
    let told = read(cx.stream("a")).await;
    let words: Vec<&str> = told.iter().map(|(_, word)| &**word).collect();
    assert_eq!(words, ["third", "(end: third)"]);
    assert_eq!((cx.tally().attempts, cx.tally().retries), (3, 2));
}

#[tokio::test(start_paused = true)]
async fn a_failure_after_the_first_piece_is_yielded() {
    let script = Scripted::new()
        .broken(SECOND, ["half "], broken(ErrorKind::Connection))
        .reply("never");
    let cx = Context::builder(script.clone()).build();
    let mut deltas = cx.stream("a");
    assert_eq!(
        deltas.next().await.unwrap().unwrap(),
        Delta::Text("half ".into())
    );
    let error = deltas.next().await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Connection);
    assert!(error.is_exhausted() && error.attempts() == 1);
    assert!(deltas.next().await.is_none());
    assert_eq!(script.lines_left(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_allows_it_gets_the_reply_again_from_the_beginning() {
    let script = Scripted::new()
        .broken(SECOND, ["half "], broken(ErrorKind::Connection))
        .reply("whole");
    let cx = Context::builder(script).build();
    let told = read(cx.stream("a").discarding()).await;
    let words: Vec<&str> = told.iter().map(|(_, word)| &**word).collect();
    assert_eq!(words, ["half ", "(discard)", "whole", "(end: whole)"]);
}

/// Streams two words and then never ends.
struct Stalls;

#[async_trait]
impl Provider for Stalls {
    fn name(&self) -> &str {
        "stalls"
    }
    async fn generate(&self, _: &Request) -> Result<Reply> {
        Ok(Reply::new("", Usage::default()))
    }
    async fn stream(&self, _: &Request) -> Result<throughline::request::ReplyStream> {
        let words = futures::stream::iter(["a", "b"]).then(|word| async move {
            sleep(10 * SECOND).await;
            Ok(Delta::Text(word.into()))
        });
        Ok(words.chain(futures::stream::pending()).boxed())
    }
}

#[tokio::test(start_paused = true)]
async fn the_idle_timeout_starts_with_the_first_piece() {
    let cx = Context::builder(Stalls).build();
    let told = read(cx.stream("a").idle_timeout(11 * SECOND)).await;
    assert_eq!(words(&told), [(10, "a"), (20, "b"), (31, "(timeout)")]);
    assert_eq!(cx.tally().timed_out, 1);
}

#[tokio::test(start_paused = true)]
async fn timeout_deadline_and_cancellation_end_a_stream() {
    let cx = Context::builder(Stalls).call_timeout(15 * SECOND).build();
    assert_eq!(
        words(&read(cx.stream("a")).await),
        [(10, "a"), (15, "(timeout)")]
    );
    let cx = Context::builder(Stalls).build();
    let bounded = cx.with_timeout(12 * SECOND);
    let end = (12, "(deadline_exceeded)");
    assert_eq!(words(&read(bounded.stream("a")).await), [(10, "a"), end]);
    let stop = async {
        sleep(13 * SECOND).await;
        cx.cancel();
    };
    let (told, ()) = tokio::join!(read(cx.stream("a")), stop);
    assert_eq!(words(&told), [(10, "a"), (13, "(cancelled)")]);
    assert_eq!(cx.snapshot().lane.in_flight, 0);
}

#[tokio::test(start_paused = true)]
async fn dropping_a_stream_settles_the_permit_and_counts_the_attempt() {
    let sim = Sim::builder().latency(10 * SECOND).build();
    let cx = Context::builder(sim.clone())
        .pace(Pace::unlimited().in_flight(1))
        .build();
    let mut deltas = cx.stream("a");
    deltas.next().await.unwrap().unwrap();
    assert_eq!((sim.in_flight(), cx.snapshot().lane.in_flight), (1, 1));
    drop(deltas);
    tokio::task::yield_now().await;
    assert_eq!((sim.in_flight(), cx.snapshot().lane.in_flight), (0, 0));
    let tally = cx.tally();
    assert_eq!((tally.attempts, tally.ambiguous), (1, 1));
    cx.generate("the context is not cancelled").await.unwrap();

    // A dropped stream that waits for a permit leaves the queue.
    let mut first = cx.stream("a");
    first.next().await.unwrap().unwrap();
    let mut second = cx.stream("b");
    assert!(futures::poll!(second.next()).is_pending());
    tokio::task::yield_now().await;
    assert_eq!(cx.snapshot().lane.waiting, 1);
    drop(second);
    tokio::task::yield_now().await;
    assert_eq!(cx.snapshot().lane.waiting, 0);
}

#[tokio::test(start_paused = true)]
async fn a_busy_reader_does_not_hold_a_permit() {
    let script = Scripted::new()
        .streamed(2 * SECOND, ["a", "b"])
        .reply("other");
    let cx = Context::builder(script)
        .pace(Pace::unlimited().in_flight(1))
        .build();
    let mut deltas = cx.stream("plan");
    deltas.next().await.unwrap().unwrap();
    // The reader makes another call with the only permit, and reads on afterwards.
    let began = Instant::now();
    assert_eq!(cx.generate("b").await.unwrap().text, "other");
    assert_eq!(began.elapsed(), SECOND);
    assert_eq!(read(deltas).await.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_panic_of_the_provider_comes_out_of_the_stream() {
    struct Panics;
    #[async_trait]
    impl Provider for Panics {
        fn name(&self) -> &str {
            "panics"
        }
        async fn generate(&self, _: &Request) -> Result<Reply> {
            panic!("in the provider")
        }
    }
    let cx = Context::builder(Panics).build();
    let read = tokio::spawn(async move { cx.stream("a").next().await.is_some() });
    assert!(read.await.unwrap_err().is_panic());
}

#[tokio::test(start_paused = true)]
async fn a_refused_stream_waits_for_the_lane_like_any_call() {
    let throttled = broken(ErrorKind::Throttled).with_wait(5 * SECOND);
    let script = Scripted::new().error(throttled).reply("late");
    let (sender, events) = std::sync::mpsc::channel();
    let cx = Context::builder(script)
        .on_event(move |event| {
            if matches!(event, Event::CallThrottled { .. }) {
                sender.send(()).unwrap();
            }
        })
        .retry(Retry::none())
        .build();
    let told = read(cx.stream("a")).await;
    assert_eq!(told[0].1, "late");
    assert!((5..=6).contains(&told[0].0), "{told:?}");
    assert_eq!(events.try_iter().count(), 1);
    assert_eq!((cx.tally().attempts, cx.tally().throttled), (1, 1));
}
