//! [`Session`]: the work of a worker under one lease. It claims items, starts them and collects their outcomes.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use futures::{FutureExt as _, StreamExt as _, stream};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::run_item::{ItemEnd, ReadyItem, sent_before, too_late};
use super::suspects::SuspectPolicy;
use super::{Inner, count, later};
use crate::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Claim, Handling, Hold, Item, ItemId, LeaseId, RunId};
use crate::sync::Mutex;

/// The most items in one claim.
const MAX_CLAIM: usize = 512;
/// The most runs that are read concurrently: a pool has no more connections.
const MAX_RUN_READS: usize = 16;
/// The shortest time between two claims that can start only a few items.
const MIN_CLAIM_INTERVAL: Duration = Duration::from_millis(20);
/// How often a worker looks for items that it has lost, and whether the run that it is driven for has ended.
pub(super) const LOST_ITEMS_INTERVAL: Duration = Duration::from_secs(1);
/// How often an idle worker looks for runs of pipelines that it does not have, to warn of them.
const UNKNOWN_PIPELINE_INTERVAL: Duration = Duration::from_secs(30);

/// The conditions under which a session stops.
#[derive(Debug, Clone, Copy)]
pub(super) struct StopCondition {
    /// The time when everything must have ended.
    pub(super) end: Option<Instant>,
    /// Whether to stop when there is nothing to do.
    pub(super) idle: bool,
    /// How long calls in flight may take to finish.
    pub(super) drain: Duration,
}

impl StopCondition {
    /// Returns the time from which on nothing is claimed.
    fn last_claim(&self) -> Option<Instant> {
        self.end.map(|end| end - self.drain)
    }
}

/// The reason why a session ended.
#[derive(Debug)]
pub(super) enum SessionEnd {
    Idle,
    Stopped,
    OutOfTime,
    LeaseLost,
}

pub(super) struct Session {
    pub(super) worker: Arc<Inner>,
    pub(super) lease: LeaseId,
    /// The parent of the contexts of all items, drained and cancelled with the session.
    pub(super) cx: Context,
    /// The items whose tasks run.
    running: Mutex<HashMap<ItemId, Running>>,
}

pub(super) struct Running {
    pub(super) hold: Hold,
    handling: Handling,
    pub(super) cx: Context,
    pub(super) lost: bool,
}

/// The tasks of items, including those of leases that were lost: their calls are paid for already, so they run to their
/// end and their replies are kept.
#[derive(Default)]
pub(super) struct InFlight {
    pub(super) tasks: JoinSet<FinishedTask>,
    /// Items to release, each with its delay. They stay here until the store has released them.
    release: Vec<(Hold, Duration)>,
    /// The error of a refused account, which stops the worker.
    account_error: Option<Error>,
}

/// A kind of look into the store.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lookup {
    /// Items that the lease holds and no task works on, because the answer to a claim was lost.
    Orphans,
    /// Items whose workers have died.
    Suspects,
    /// All other items.
    Normal,
}

pub(super) struct FinishedTask {
    lease: LeaseId,
    item: ItemId,
    end: ItemEnd,
}

impl Session {
    pub(super) fn new(worker: Arc<Inner>, lease: LeaseId) -> Self {
        Self {
            cx: worker.cx.child(""),
            worker,
            lease,
            running: Mutex::default(),
        }
    }

    pub(super) fn running(&self) -> MutexGuard<'_, HashMap<ItemId, Running>> {
        self.running.lock()
    }

    pub(super) async fn work(
        self,
        in_flight: &mut InFlight,
        stop: &CancellationToken,
        stop_at: StopCondition,
    ) -> Result<SessionEnd> {
        let ended = {
            let life = async {
                let ended = self.claim_and_run(in_flight, stop, stop_at).await;
                if !matches!(ended, SessionEnd::LeaseLost) {
                    self.shut_down(in_flight, stop_at).await?;
                }
                Ok::<_, Error>(ended)
            };
            tokio::select! {
                ended = life => ended?,
                () = self.keep_lease() => SessionEnd::LeaseLost,
                () = self.reap_regularly() => SessionEnd::LeaseLost,
            }
        };
        if matches!(ended, SessionEnd::LeaseLost) {
            self.cx.drain();
            in_flight.release.clear();
        }
        match in_flight.account_error.take() {
            Some(error) => Err(error),
            None => Ok(ended),
        }
    }

    /// Claims and starts items until there is a reason to end the session.
    async fn claim_and_run(
        &self,
        in_flight: &mut InFlight,
        stop: &CancellationToken,
        stop_at: StopCondition,
    ) -> SessionEnd {
        let worker = &self.worker;
        let last_claim = stop_at.last_claim();
        let most = worker.options.in_flight;
        let enough = (most / 4).clamp(1, MAX_CLAIM);
        let names = worker.registry.names();
        let now = Instant::now();
        let mut suspects = SuspectPolicy::new(
            most,
            worker.options.lease,
            worker.created_at,
            now,
            last_claim,
        );
        let (mut claim_at, mut release_at, mut unknown_at) = (now, now, now);
        // Whether the answer of a claim was lost, which may have taken items.
        let mut in_doubt = false;
        self.reap().await;
        let ended = loop {
            self.collect(in_flight, &mut suspects);
            if release_at <= Instant::now() && !self.release(in_flight).await {
                release_at = later(Instant::now(), worker.options.poll);
            }
            if in_flight.account_error.is_some() || stop.is_cancelled() || self.cx.is_draining() {
                break SessionEnd::Stopped;
            }
            let now = Instant::now();
            if last_claim.is_some_and(|last| last <= now) {
                break SessionEnd::OutOfTime;
            }
            if in_flight.tasks.is_empty()
                && let Some(item) = suspects.begin_isolated()
            {
                self.run_alone(in_flight, &mut suspects, item).await;
                continue;
            }
            let free = most - in_flight.tasks.len().min(most);
            let has_room = worker.journal.capacity().now_or_never().is_some();
            let may_claim = has_room && free > 0 && !suspects.is_isolating();
            let wanted = match may_claim {
                true if in_doubt => (claim_at <= now).then_some(Lookup::Orphans),
                true if suspects.look_at() <= now => Some(Lookup::Suspects),
                true => (free >= enough || claim_at <= now).then_some(Lookup::Normal),
                false => None,
            };
            let look = async {
                match wanted {
                    None => Ok(Vec::new()),
                    Some(Lookup::Orphans) => self
                        .release_orphans(in_flight, &suspects)
                        .await
                        .map(|()| Vec::new()),
                    Some(Lookup::Suspects) => self.claim_suspects(&mut suspects, names, free).await,
                    Some(Lookup::Normal) => {
                        let claim = Claim::new(names, free.min(MAX_CLAIM) as u32);
                        worker.queue.claim(self.lease, claim).await
                    }
                }
            };
            let found = tokio::select! {
                biased;
                found = look => found,
                // The items of a dropped claim are released with the lease.
                () = stop.cancelled() => continue,
                () = self.cx.bounds().drained() => continue,
                () = sleep_until(last_claim.unwrap_or(now)), if last_claim.is_some() => continue,
            };
            let found = match found {
                Ok(found) => found,
                Err(error) if error.kind() == ErrorKind::LeaseLost => break SessionEnd::LeaseLost,
                Err(error) => {
                    tracing::warn!(%error, "the worker cannot claim, and tries again");
                    in_doubt = true;
                    claim_at = later(Instant::now(), worker.options.poll);
                    Vec::new()
                }
            };
            if !found.is_empty() {
                in_doubt = false;
                if wanted == Some(Lookup::Normal) {
                    claim_at = now + MIN_CLAIM_INTERVAL;
                    suspects.nothing_else = false;
                }
                self.take(in_flight, &mut suspects, found).await;
                continue;
            }
            match wanted {
                Some(Lookup::Orphans) if claim_at <= now => {
                    in_doubt = false;
                    continue;
                }
                Some(Lookup::Suspects) if !in_doubt => continue,
                Some(Lookup::Normal) if !in_doubt => {
                    suspects.nothing_else = true;
                    if unknown_at <= now {
                        unknown_at = now + UNKNOWN_PIPELINE_INTERVAL;
                        worker.warn_of_unknown_pipelines(names).await;
                    }
                    if stop_at.idle && in_flight.tasks.is_empty() && in_flight.release.is_empty() {
                        match worker.queue.has_suspects(names).await {
                            Ok(false) => break SessionEnd::Idle,
                            Ok(true) => {}
                            Err(error) => tracing::warn!(%error, "the worker looks again"),
                        }
                    }
                    claim_at = later(Instant::now(), worker.options.poll);
                }
                _ => {}
            }
            let next = match in_doubt {
                true => claim_at,
                false => claim_at.min(suspects.look_at()),
            };
            tokio::select! {
                () = stop.cancelled() => {}
                () = self.cx.bounds().drained() => {}
                Some(done) = in_flight.tasks.join_next() => self.ended(in_flight, &mut suspects, done),
                () = worker.journal.capacity(), if !has_room => {}
                () = sleep_until(next), if may_claim => {}
                () = sleep_until(release_at), if !in_flight.release.is_empty() => {}
                () = sleep_until(last_claim.unwrap_or(now)), if last_claim.is_some() => {}
            }
            // An idle worker looks at once when its last task has ended.
            if in_flight.tasks.is_empty() && stop_at.idle && !in_doubt {
                claim_at = Instant::now();
            }
        };
        let waiting = suspects.waiting().map(Item::hold);
        in_flight
            .release
            .extend(waiting.map(|hold| (hold, Duration::ZERO)));
        ended
    }

    /// Claims suspects, as many as may be run now.
    async fn claim_suspects(
        &self,
        suspects: &mut SuspectPolicy,
        names: &[String],
        free: usize,
    ) -> Result<Vec<Item>> {
        let queue = &self.worker.queue;
        let wanted = suspects.wanted(Instant::now(), free);
        let mut items = Vec::new();
        if wanted.is_empty() || !queue.has_suspects(names).await? {
            return Ok(items);
        }
        for (handling, limit) in wanted {
            // One item that is run alone is enough.
            let alone = |item: &Item| item.handling >= Handling::Alone;
            if handling >= Handling::Alone && items.iter().any(alone) {
                break;
            }
            let claim = Claim::new(names, limit as u32).handling(handling);
            items.extend(queue.claim(self.lease, claim).await?);
        }
        Ok(items)
    }

    /// Starts claimed items, and sets an item aside that is to be run alone.
    async fn take(&self, in_flight: &mut InFlight, suspects: &mut SuspectPolicy, items: Vec<Item>) {
        count(&self.worker.counters.claimed, items.len() as u64);
        let mut others = Vec::with_capacity(items.len());
        for item in items {
            let back = match item.handling {
                Handling::Normal | Handling::Few => {
                    others.push(item);
                    None
                }
                Handling::Alone | Handling::LastAttempt => suspects.isolate(item, Instant::now()),
            };
            let back = back.map(|item| (item.hold(), Duration::ZERO));
            in_flight.release.extend(back);
        }
        if !others.is_empty() {
            self.start(in_flight, suspects, others).await;
        }
    }

    /// Starts an item that is to be run alone.
    async fn run_alone(&self, in_flight: &mut InFlight, suspects: &mut SuspectPolicy, item: Item) {
        // The lease still holds items whose outcome is not written, and a death with several items does not count. So
        // outcomes are written first, unless the store is away.
        let written = self.worker.journal.flush();
        let _ = timeout(self.worker.options.lease / 3, written).await;
        tracing::warn!(
            item = %item.id, key = item.key, attempt = item.attempt,
            "workers have died while they held this item: it is run alone"
        );
        let id = item.id;
        self.start(in_flight, suspects, vec![item]).await;
        if !self.running().contains_key(&id) {
            // The item ended or was released before it was started.
            suspects.end_isolation(Instant::now());
        }
    }

    /// Starts items. Settles items that must not be started, and releases items that this worker cannot run.
    async fn start(
        &self,
        in_flight: &mut InFlight,
        suspects: &mut SuspectPolicy,
        items: Vec<Item>,
    ) {
        let poll = self.worker.options.poll;
        let ambiguous = match self.worker.ambiguous(&items).await {
            Ok(ambiguous) => ambiguous,
            Err(error) => {
                tracing::warn!(%error, "intents cannot be read: the items are released");
                let back = items.iter().map(|item| (item.hold(), poll));
                in_flight.release.extend(back);
                return;
            }
        };
        // Reads concurrently, because the items of many small runs would otherwise wait for a round trip per run.
        let runs: HashSet<RunId> = items.iter().map(|item| item.run).collect();
        let read = |run| async move { (run, self.worker.run_info(run).await) };
        let runs = stream::iter(runs).map(read).buffer_unordered(MAX_RUN_READS);
        let runs: HashMap<_, _> = runs.collect().await;
        for item in items {
            let hold = item.hold();
            if ambiguous.contains(&item.id) {
                self.worker.settle(hold, Err(sent_before()));
                continue;
            }
            let info = match runs.get(&item.run) {
                Some(Ok(Some(info))) => info,
                gone => {
                    if let Some(Err(error)) = gone {
                        tracing::warn!(%error, run = %item.run, "a run cannot be read: its item is released");
                    }
                    in_flight.release.push((hold, poll));
                    continue;
                }
            };
            let handling = item.handling;
            match self.worker.ready(&self.cx, info, item) {
                Some(_) if info.is_late() => self.worker.settle(hold, Err(too_late())),
                Some(ready) => {
                    suspects.started(handling);
                    self.spawn(in_flight, ready);
                }
                None => {
                    tracing::error!(
                        pipeline = info.name,
                        "the store returned an item of a pipeline that was not asked for: it is released"
                    );
                    in_flight.release.push((hold, UNKNOWN_PIPELINE_INTERVAL));
                }
            }
        }
    }

    fn spawn(&self, in_flight: &mut InFlight, ready: ReadyItem) {
        let id = ready.item.id;
        let running = Running {
            hold: ready.item.hold(),
            handling: ready.item.handling,
            cx: ready.cx.clone(),
            lost: false,
        };
        self.running().insert(id, running);
        let (worker, lease) = (Arc::clone(&self.worker), self.lease);
        in_flight.tasks.spawn(async move {
            let end = worker.run_item(ready).await;
            FinishedTask {
                lease,
                item: id,
                end,
            }
        });
    }

    fn collect(&self, in_flight: &mut InFlight, suspects: &mut SuspectPolicy) {
        while let Some(done) = in_flight.tasks.try_join_next() {
            self.ended(in_flight, suspects, done);
        }
    }

    fn ended(
        &self,
        in_flight: &mut InFlight,
        suspects: &mut SuspectPolicy,
        done: Result<FinishedTask, JoinError>,
    ) {
        if let Some(handling) = self.end(in_flight, done) {
            suspects.ended(handling, Instant::now());
        }
    }

    /// Handles the outcome of a task. Returns the handling of its item, if this lease holds it.
    pub(super) fn end(
        &self,
        in_flight: &mut InFlight,
        done: Result<FinishedTask, JoinError>,
    ) -> Option<Handling> {
        // A panic of a pipeline is an error of its item, so a task fails only when it is aborted.
        let done = done.ok()?;
        if done.lease != self.lease {
            // Its lease was lost, so other workers have the item.
            if !matches!(done.end, ItemEnd::Settled) {
                count(&self.worker.counters.unfinished, 1);
            }
            return None;
        }
        let running = self.running().remove(&done.item);
        let handling = running.as_ref().map(|running| running.handling);
        match done.end {
            ItemEnd::Settled => {}
            ItemEnd::Interrupted(hold, result) => {
                let lost = running.is_some_and(|running| running.lost);
                if lost || self.cx.is_draining() {
                    // Another worker has the item, or it is released with the lease.
                    count(&self.worker.counters.unfinished, 1);
                } else {
                    // The pipeline itself has cut its work short.
                    self.worker.settle(hold, result);
                }
            }
            ItemEnd::Release(hold, delay) => {
                count(&self.worker.counters.unfinished, 1);
                in_flight.release.push((hold, delay));
            }
            ItemEnd::AccountFailed(hold, error) => {
                count(&self.worker.counters.unfinished, 1);
                in_flight.release.push((hold, Duration::ZERO));
                in_flight.account_error.get_or_insert(error);
            }
        }
        handling
    }

    /// Releases items. Returns false if the store failed; the remaining items are released next time.
    pub(super) async fn release(&self, in_flight: &mut InFlight) -> bool {
        let mut delays = HashMap::<Duration, Vec<Hold>>::new();
        for (hold, delay) in &in_flight.release {
            delays.entry(*delay).or_default().push(*hold);
        }
        for (delay, holds) in delays {
            match self.worker.queue.release(&holds, delay, false).await {
                // Items that the store did not release have changed hands.
                Ok(_) => in_flight.release.retain(|(_, other)| *other != delay),
                Err(error) => {
                    tracing::warn!(%error, items = holds.len(), "items could not be released");
                    return false;
                }
            }
        }
        true
    }

    /// Releases the items that this lease holds and no task works on: a claim took them whose answer was lost.
    async fn release_orphans(&self, in_flight: &InFlight, suspects: &SuspectPolicy) -> Result<()> {
        // The lease also holds items whose outcome is not written yet.
        self.worker.journal.flush().await?;
        let mut orphans = self.worker.queue.held(self.lease).await?;
        let mut known: HashSet<_> = self.running().keys().copied().collect();
        known.extend(in_flight.release.iter().map(|(hold, _)| hold.item));
        known.extend(suspects.waiting().map(|item| item.id));
        orphans.retain(|hold| !known.contains(&hold.item));
        self.worker
            .queue
            .release(&orphans, Duration::ZERO, false)
            .await?;
        Ok(())
    }
}
