//! The run of one item, from its claim to its end.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use super::registry::Work;
use super::{AmbiguousPolicy, Inner, RunInfo, count};
use crate::call::scope::MemoNamespace;
use crate::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Commit, Hold, IntentFilter, Item, ItemId, Settlement};

/// The delay of an item that is released because the store did not answer.
const STORE_RETRY_DELAY: Duration = Duration::from_secs(5);

/// Returns the number of the item's intents: its epoch. The attempt does not serve, because a release takes it back, and
/// then ending a new intent would end an old one too.
fn number(item: &Item) -> u32 {
    u32::try_from(item.epoch).unwrap_or(u32::MAX)
}

/// Returns the error of an item that is not repeated because its last worker died, or stopped, with a call in flight.
pub(super) fn sent_before() -> Error {
    let message = "the worker died, or stopped, with a call in flight, which may have been paid for; \
                   the policy is not to send the call again, and `retry_failed` sends it";
    Error::new(ErrorKind::LeaseLost, message).with_billed(None)
}

/// Returns the error of an item that was not started before the deadline of its run. Its pipeline is not run, because a
/// fallback for failing calls would give it an output.
pub(super) fn too_late() -> Error {
    let message = "the deadline of the run passed before the item was started";
    Error::new(ErrorKind::DeadlineExceeded, message).with_billed(Some(false))
}

/// Returns the error of an item with an output although the deadline ended one of its batches early.
fn cut_by_deadline() -> Error {
    let message = "the deadline passed while a batch of the item was reading its inputs";
    Error::new(ErrorKind::DeadlineExceeded, message)
}

/// The end of an item's task.
pub(super) enum ItemEnd {
    /// The item has its outcome, which the journal writes.
    Settled,
    /// The item has no outcome and is released with this delay.
    Release(Hold, Duration),
    /// A part of the work was refused or cut short. The result may be a fallback, so not even an output is trusted.
    Interrupted(Hold, Result<String>),
    /// The account was refused, so no call can succeed. The item is released and the worker stops.
    AccountFailed(Hold, Error),
}

/// An item with everything that its run needs.
pub(super) struct ReadyItem {
    pub(super) item: Item,
    /// The parent of the contexts of its runs, cancelled with the item.
    pub(super) cx: Context,
    run: Arc<RunInfo>,
    name: Arc<str>,
    namespace: Arc<MemoNamespace>,
    work: Arc<dyn Work>,
}

impl Inner {
    /// Returns the item with its pipeline and context, or `None` if the pipeline is not registered.
    pub(super) fn ready(
        &self,
        parent: &Context,
        run: &Arc<RunInfo>,
        item: Item,
    ) -> Option<ReadyItem> {
        let (name, work) = self.registry.find(&run.name)?;
        let tenant = item.tenant.as_str().into();
        let mut namespace = MemoNamespace::durable_item(tenant, &name, &item.key);
        if run.spec.fresh {
            namespace = namespace.fresh(item.run.to_string());
        }
        if self.options.intents {
            namespace = namespace.with_intents(item.id, number(&item));
        }
        Some(ReadyItem {
            cx: parent.child(""),
            run: Arc::clone(run),
            name,
            namespace: Arc::new(namespace),
            work,
            item,
        })
    }

    /// Runs an item to its end. An item that fails on a stored reply is run again and asks for a new reply, because with the
    /// stored one it could never succeed. An item that fails on a new reply has failed.
    pub(super) async fn run_item(&self, mut ready: ReadyItem) -> ItemEnd {
        loop {
            let (cx, result) = self.run_once(&ready).await;
            let hold = ready.item.hold();
            if cx.bounds().was_cut() {
                return ItemEnd::Interrupted(hold, result);
            }
            // An output of a batch that the deadline cut short is not the output of the item.
            let result = result.and_then(|output| match cx.bounds().was_late() {
                true => Err(cut_by_deadline()),
                false => Ok(output),
            });
            let again = result
                .as_ref()
                .err()
                .and_then(|error| ready.namespace.reject_reply(error));
            if let Some(namespace) = again {
                tracing::debug!(item = %hold.item, "the item failed on a stored reply and asks for a new one");
                ready.namespace = Arc::new(namespace);
                continue;
            }
            return match result {
                Err(error) if error.is_account_wide() => ItemEnd::AccountFailed(hold, error),
                Err(error) if error.kind() == ErrorKind::Store && error.is_temporary() => {
                    ItemEnd::Release(hold, STORE_RETRY_DELAY)
                }
                result => {
                    self.settle(hold, result);
                    ItemEnd::Settled
                }
            };
        }
    }

    async fn run_once(&self, ready: &ReadyItem) -> (Context, Result<String>) {
        let ReadyItem {
            item,
            run,
            name,
            namespace,
            ..
        } = ready;
        let (priority, tenant) = (self.options.queue_of)(&item.tenant);
        let (key, namespace) = (item.key.as_str().into(), Arc::clone(namespace));
        let cx = ready
            .cx
            .durable_item(Arc::clone(name), key, namespace, run.deadline, |queue| {
                queue.priority = priority;
                queue.tenant = tenant.or(queue.tenant);
            });
        let result = ready.work.run(&cx, &item.input).await;
        let tally = cx.tally();
        let in_vain = tally.overloaded + tally.timed_out + tally.transient + tally.failed;
        count(&self.counters.paid, tally.attempts.saturating_sub(in_vain));
        count(&self.counters.replayed, tally.replayed);
        (cx, result)
    }

    /// Returns the items whose earlier attempts sent calls of unknown outcome, if the policy is not to repeat such items.
    pub(super) async fn ambiguous(&self, items: &[Item]) -> Result<HashSet<ItemId>> {
        let mut ambiguous = HashSet::new();
        if self.options.ambiguous == AmbiguousPolicy::Retry {
            return Ok(ambiguous);
        }
        // Also for first attempts: a worker that stops with a call in flight releases its item without charge.
        let known: HashMap<_, _> = items.iter().map(|item| (item.id, item)).collect();
        let filter = IntentFilter::items(known.keys().copied());
        for intent in self.queue.intents(filter, u32::MAX).await? {
            let earlier = |item: &&&Item| intent.attempt < number(item);
            let Some(item) = known.get(&intent.item).filter(earlier) else {
                continue;
            };
            // A worker that was only thought dead may have stored the reply.
            let kept = self.queue.generations(&item.tenant, &[intent.key]).await?;
            if kept.is_empty() {
                ambiguous.insert(intent.item);
            }
        }
        Ok(ambiguous)
    }

    pub(super) fn settle(&self, hold: Hold, result: Result<String>) {
        let counter = match &result {
            Ok(_) => &self.counters.completed,
            Err(error) => {
                tracing::debug!(item = %hold.item, %error, "item failed");
                &self.counters.failed
            }
        };
        count(counter, 1);
        let commit = Commit::new().settlements([Settlement { hold, result }]);
        self.journal.write(commit);
    }
}
