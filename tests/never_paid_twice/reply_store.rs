//! A context with a store that keeps replies and nothing else.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use throughline::store::{Generation, MemoKey, ReplyStore};
use throughline::testing::Scripted;
use throughline::{Context, Error, ErrorKind, Persistence, Result, async_trait};

/// Replies as JSON texts, as a cache server would keep them, and the number of calls that are to fail.
#[derive(Default)]
struct Replies {
    texts: Mutex<HashMap<String, String>>,
    failing_gets: AtomicU32,
    failing_puts: AtomicU32,
    /// Whether failures are permanent.
    permanent: bool,
}

impl Replies {
    fn fail(&self, failures: &AtomicU32) -> Result<()> {
        let left = |left: u32| left.checked_sub(1);
        match failures.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left) {
            Err(_) => Ok(()),
            Ok(_) => Err(
                Error::new(ErrorKind::Store, "the cache is away").with_persistence(
                    match self.permanent {
                        true => Persistence::Permanent,
                        false => Persistence::Temporary,
                    },
                ),
            ),
        }
    }
}

#[async_trait]
impl ReplyStore for Replies {
    async fn get(&self, keys: &[MemoKey]) -> Result<Vec<Generation>> {
        self.fail(&self.failing_gets)?;
        let texts = self.texts.lock().unwrap();
        let kept = keys.iter().filter_map(|key| texts.get(&key.to_string()));
        Ok(kept
            .map(|text| serde_json::from_str(text))
            .collect::<Result<_, _>>()?)
    }

    async fn put(&self, replies: &[Generation]) -> Result<()> {
        self.fail(&self.failing_puts)?;
        for reply in replies {
            let text = serde_json::to_string(reply)?;
            let mut texts = self.texts.lock().unwrap();
            texts.entry(reply.key.to_string()).or_insert(text);
        }
        Ok(())
    }
}

/// A context whose provider answers `replies` calls and fails all further ones.
fn context(replies: &Arc<Replies>, provider: &Scripted) -> Context {
    Context::builder(provider.clone())
        .reply_store(Arc::clone(replies))
        .build()
}

async fn answers(cx: &Context) -> Vec<String> {
    let rivers = ["Danube", "Rhine", "Po"];
    let settled = cx
        .fan_out("river", rivers)
        .key(|river| river.to_string())
        .settle(async |cx, river| cx.generate(format!("How long is the {river}?")).await)
        .await;
    let mut texts: Vec<_> = settled
        .all()
        .unwrap()
        .into_iter()
        .map(|reply| reply.text)
        .collect();
    texts.sort_unstable();
    texts
}

#[tokio::test]
async fn a_rerun_is_answered_from_the_reply_store_and_pays_for_nothing() {
    let replies = Arc::new(Replies::default());
    let provider = Scripted::new().reply("1").reply("2").reply("3");
    let first = context(&replies, &provider);
    assert_eq!(answers(&first).await, ["1", "2", "3"]);
    first.flush().await.unwrap();

    let second = context(&replies, &provider);
    assert_eq!(answers(&second).await, ["1", "2", "3"]);
    assert_eq!(provider.requests().len(), 3);
    assert_eq!(second.tally().replayed, 3);
}

#[tokio::test(start_paused = true)]
async fn a_call_waits_for_a_reply_store_that_fails_for_a_while() {
    let replies = Arc::new(Replies::default());
    replies.failing_gets.store(3, Ordering::Relaxed);
    let provider = Scripted::new().reply("1");
    let reply = context(&replies, &provider).generate("a").await.unwrap();
    assert_eq!(reply.text, "1");
}

#[tokio::test(start_paused = true)]
async fn a_request_is_not_sent_while_the_reply_store_cannot_be_read() {
    for permanent in [true, false] {
        let replies = Arc::new(Replies {
            failing_gets: AtomicU32::new(u32::MAX),
            permanent,
            ..Replies::default()
        });
        let provider = Scripted::new().reply("1");
        let started = tokio::time::Instant::now();
        let error = context(&replies, &provider)
            .generate("a")
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Store);
        assert_eq!(provider.requests().len(), 0);
        assert_eq!(started.elapsed() >= Duration::from_secs(60), !permanent);
    }
}

#[tokio::test(start_paused = true)]
async fn a_reply_that_could_not_be_put_is_returned_and_put_again() {
    let replies = Arc::new(Replies::default());
    replies.failing_puts.store(2, Ordering::Relaxed);
    let provider = Scripted::new().reply("1");
    let cx = context(&replies, &provider);
    assert_eq!(cx.generate("a").await.unwrap().text, "1");
    assert_eq!(cx.flush().await.unwrap_err().kind(), ErrorKind::Store);
    while cx.flush().await.is_err() {}
    assert_eq!(replies.texts.lock().unwrap().len(), 1);
    assert_eq!(cx.journal().unwrap().stats().given_up, 0);
}
