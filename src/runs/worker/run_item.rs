//! One item: from a claim to its end.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use super::registry::Work;
use super::{AmbiguousPolicy, Inner, RunInfo, count};
use crate::call::memo::Place;
use crate::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Commit, Hold, IntentFilter, Item, ItemId, Settlement};

/// How long an item rests that the store did not answer.
const STORE_RETRY_DELAY: Duration = Duration::from_secs(5);

/// What its intents are numbered by. Not the attempt: that is given back with an item, and an intent of before
/// would end with one of after.
fn number(item: &Item) -> u32 {
    u32::try_from(item.epoch).unwrap_or(u32::MAX)
}

/// Why an item is not done again whose last worker died, or stopped, with a call in flight.
pub(super) fn sent_before() -> Error {
    let message = "its worker died, or stopped, with a call in flight, which may have been paid for; \
                   the policy is not to send it again, and `retry_failed` does";
    Error::new(ErrorKind::LeaseLost, message).with_billed(None)
}

/// How an item ends that was not begun before its run's time was up. It is not tried: a pipeline with a
/// fallback for calls that fail would end well.
pub(super) fn too_late() -> Error {
    let message = "the deadline of its run passed before it was begun";
    Error::new(ErrorKind::DeadlineExceeded, message).with_billed(Some(false))
}

/// How an item ends whose pipeline gave an output although the deadline had ended one of its batches early.
fn cut_by_deadline() -> Error {
    let message = "the deadline passed while a batch of the item was reading its inputs";
    Error::new(ErrorKind::DeadlineExceeded, message)
}

/// What an item came to for who claimed it.
pub(super) enum ItemEnd {
    /// It has its outcome, which is on its way into the store.
    Settled,
    /// It has none, and others may have it after a while.
    Release(Hold, Duration),
    /// A part of it was refused or cut short, so what came of it may be a fallback: not even
    /// an output is to be trusted.
    Interrupted(Hold, Result<String>),
    /// Nobody's calls can succeed any more: it goes back, and the worker stops.
    AccountFailed(Hold, Error),
}

/// An item that can be run.
pub(super) struct ReadyItem {
    pub(super) item: Item,
    /// Above the contexts of its runs: cancelled with the item.
    pub(super) cx: Context,
    run: Arc<RunInfo>,
    name: Arc<str>,
    place: Arc<Place>,
    work: Arc<dyn Work>,
}

impl Inner {
    /// The item with its pipeline and its context; `None` if there is no such pipeline here.
    pub(super) fn ready(
        &self,
        parent: &Context,
        run: &Arc<RunInfo>,
        item: Item,
    ) -> Option<ReadyItem> {
        let (name, work) = self.registry.find(&run.name)?;
        let mut place = Place::durable(
            Arc::clone(&self.memo),
            item.tenant.as_str().into(),
            &name,
            &item.key,
        );
        if run.spec.fresh {
            place = place.fresh(item.run.to_string());
        }
        if self.options.intents {
            place = place.with_intents(item.id, number(&item));
        }
        Some(ReadyItem {
            cx: parent.child(""),
            run: Arc::clone(run),
            name,
            place: Arc::new(place),
            work,
            item,
        })
    }

    /// Runs it to its end. An item that fails on a reply which was kept is run again and asks for another one: as it
    /// is, it could never succeed. Once it has failed on a reply that is new, it has failed.
    pub(super) async fn run_item(&self, mut ready: ReadyItem) -> ItemEnd {
        loop {
            let (cx, result) = self.run_once(&ready).await;
            let hold = ready.item.hold();
            if cx.bounds().was_cut() {
                return ItemEnd::Interrupted(hold, result);
            }
            // An output made of the inputs that a batch had taken when the time was up is not the item's.
            let result = result.and_then(|output| match cx.bounds().was_late() {
                true => Err(cut_by_deadline()),
                false => Ok(output),
            });
            let again = result
                .as_ref()
                .err()
                .and_then(|error| ready.place.retake(error));
            if let Some(place) = again {
                tracing::debug!(item = %hold.item, "it failed on a reply that was kept, and asks for another");
                ready.place = Arc::new(place);
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
            place,
            ..
        } = ready;
        let (priority, tenant) = (self.options.queue_of)(&item.tenant);
        let (key, place) = (item.key.as_str().into(), Arc::clone(place));
        let cx = ready
            .cx
            .durable_item(Arc::clone(name), key, place, run.deadline, |who| {
                who.priority = priority;
                who.tenant = tenant.or(who.tenant);
            });
        let result = ready.work.run(&cx, &item.input).await;
        let tally = cx.tally();
        let in_vain = tally.overloaded + tally.timed_out + tally.transient + tally.failed;
        count(&self.counters.paid, tally.attempts.saturating_sub(in_vain));
        count(&self.counters.replayed, tally.replayed);
        (cx, result)
    }

    /// Those of the items whose earlier attempts sent calls of which nobody knows the end, where
    /// such an item is not to be done again.
    pub(super) async fn ambiguous(&self, items: &[Item]) -> Result<HashSet<ItemId>> {
        let mut ambiguous = HashSet::new();
        if self.options.ambiguous == AmbiguousPolicy::Retry {
            return Ok(ambiguous);
        }
        // Of all of them: a worker that stopped with a call in flight has given its item back without charge.
        let known: HashMap<_, _> = items.iter().map(|item| (item.id, item)).collect();
        let filter = IntentFilter::items(known.keys().copied());
        for intent in self.queue.intents(filter, u32::MAX).await? {
            let earlier = |item: &&&Item| intent.attempt < number(item);
            let Some(item) = known.get(&intent.item).filter(earlier) else {
                continue;
            };
            // Its reply may have been kept by a worker that was only thought dead.
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
        self.memo.journal().write(commit);
    }
}
