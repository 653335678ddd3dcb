//! [`ReplyStore`]: a store of replies and nothing else.

use std::time::Duration;

use async_trait::async_trait;

use super::{
    Commit, Committed, Created, Generation, Intent, IntentFilter, Item, LogEntry, MemoKey, NewRun,
    Purged, Run, RunFilter, RunId, Store,
};
use crate::error::{Error, ErrorKind, Result};

/// A store of replies: the two methods that a [`Context`](crate::Context) needs to pay for each reply once.
///
/// Implement it to keep replies where you keep other data, in a file, a cache server or a table of your own, and give it to
/// [`ContextBuilder::reply_store`](crate::ContextBuilder::reply_store). Durable runs need a [`Store`] and a
/// [`Queue`](super::Queue).
///
/// ```
/// use std::collections::HashMap;
/// use std::sync::{Arc, Mutex};
/// use throughline::store::{Generation, MemoKey, ReplyStore};
/// use throughline::{Context, Result, async_trait, testing::Scripted};
///
/// #[derive(Default)]
/// struct Replies(Mutex<HashMap<MemoKey, Generation>>);
///
/// #[async_trait]
/// impl ReplyStore for Replies {
///     async fn get(&self, keys: &[MemoKey]) -> Result<Vec<Generation>> {
///         let kept = self.0.lock().unwrap();
///         Ok(keys.iter().filter_map(|key| kept.get(key).cloned()).collect())
///     }
///
///     async fn put(&self, replies: &[Generation]) -> Result<()> {
///         let mut kept = self.0.lock().unwrap();
///         for reply in replies {
///             kept.entry(reply.key).or_insert_with(|| reply.clone());
///         }
///         Ok(())
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<()> {
/// let replies = Arc::new(Replies::default());
/// let provider = Scripted::new().reply("2,850 km"); // answers once
/// for _ in 0..2 {
///     let cx = Context::builder(provider.clone()).reply_store(Arc::clone(&replies)).build();
///     assert_eq!(cx.generate("How long is the Danube?").await?.text, "2,850 km");
///     cx.flush().await?;
/// }
/// # Ok(()) }
/// ```
///
/// A [`Generation`] is serialisable, so a file or a server can keep it as JSON under the text form of its key.
///
/// # Failures
///
/// - If [`get`](Self::get) fails, the request is not sent: the call waits up to a minute while the error is
///   [temporary](crate::Error::is_temporary), and then fails with it. A permanent error fails the call at once.
/// - If [`put`](Self::put) fails, the call succeeds all the same. The reply is written again until it is
///   stored, by the rules of the [`Journal`](super::Journal) in front of it:
///   [`Context::flush`](crate::Context::flush) reports the failure, and a reply that `put` refuses with
///   [`ErrorKind::Config`] is given up, counted and logged.
#[async_trait]
pub trait ReplyStore: Send + Sync + 'static {
    /// Returns the replies under these keys, in any order. Missing ones are left out.
    ///
    /// At most 512 keys are looked up at once. Keys of different tenants differ.
    async fn get(&self, keys: &[MemoKey]) -> Result<Vec<Generation>>;

    /// Keeps replies. The first reply under a key stays, so that putting a reply again changes nothing.
    async fn put(&self, replies: &[Generation]) -> Result<()>;
}

#[async_trait]
impl<R: ReplyStore + ?Sized> ReplyStore for std::sync::Arc<R> {
    async fn get(&self, keys: &[MemoKey]) -> Result<Vec<Generation>> {
        (**self).get(keys).await
    }

    async fn put(&self, replies: &[Generation]) -> Result<()> {
        (**self).put(replies).await
    }
}

/// A [`ReplyStore`] in the place of a [`Store`], for a context, which writes generations and reads them.
pub(crate) struct RepliesOnly<R>(pub(crate) R);

fn unsupported<T>() -> Result<T> {
    let message = "a reply store keeps replies only: runs need a `Store`";
    Err(Error::new(ErrorKind::Config, message))
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<R: ReplyStore> Store for RepliesOnly<R> {
    fn name(&self) -> &'static str {
        "replies"
    }

    async fn generations(&self, _tenant: &str, keys: &[MemoKey]) -> Result<Vec<Generation>> {
        self.0.get(keys).await
    }

    async fn commit(&self, commit: Commit) -> Result<Committed> {
        let Commit {
            generations,
            settlements,
            intents,
            ended_intents,
            notes,
        } = commit;
        if !(settlements.is_empty() && intents.is_empty() && notes.is_empty()) {
            return unsupported();
        }
        // There are no intents to end.
        drop(ended_intents);
        self.0.put(&generations).await?;
        Ok(Committed::default())
    }

    async fn create_run(&self, _run: NewRun) -> Result<Created> {
        unsupported()
    }

    async fn runs(&self, _filter: RunFilter, _limit: u32) -> Result<Vec<Run>> {
        unsupported()
    }

    async fn items(&self, _run: RunId, _from: u64, _limit: u32) -> Result<Vec<Item>> {
        unsupported()
    }

    async fn log(&self, _run: RunId, _after: u64, _limit: u32) -> Result<Vec<LogEntry>> {
        unsupported()
    }

    async fn intents(&self, _filter: IntentFilter, _limit: u32) -> Result<Vec<Intent>> {
        unsupported()
    }

    async fn cancel(&self, _run: RunId) -> Result<u64> {
        unsupported()
    }

    async fn retry_failed(&self, _run: RunId) -> Result<u64> {
        unsupported()
    }

    async fn purge(&self, _older_than: Duration, _limit: u32) -> Result<Purged> {
        unsupported()
    }
}
