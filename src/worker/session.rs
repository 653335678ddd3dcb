//! [`Session`]: what a worker does under one lease.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{StreamExt as _, stream};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

use super::item::{End, Ready, UNKNOWN, sent_before, too_late};
use super::{Inner, count};
use crate::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Hold, Item, ItemId, LeaseId, RunId};

/// As many are claimed at a time at most.
const CLAIM: usize = 512;
/// As many runs are read at a time: no more than a pool has connections for.
const READS: usize = 16;
/// Between two claims that only fill a few places.
const BREATH: Duration = Duration::from_millis(20);
/// How often a worker asks whether somebody took its items away.
const LOOK: Duration = Duration::from_secs(1);
/// How much later than its time a worker may stop for a store that is slow or away: what is not written is
/// lost with the process.
const LATE: Duration = Duration::from_secs(10);

/// When to stop.
#[derive(Debug, Clone, Copy)]
pub(super) struct Until {
    /// When everything must be over.
    pub(super) end: Option<Instant>,
    /// Whether to stop where there is nothing to do.
    pub(super) idle: bool,
    /// How long calls in flight may finish.
    pub(super) drain: Duration,
}

/// Why a session ended.
#[derive(Debug)]
pub(super) enum Ended {
    Idle,
    Stopped,
    OutOfTime,
    LeaseLost,
}

pub(super) struct Session {
    worker: Arc<Inner>,
    lease: LeaseId,
    /// Above the contexts of all items: drained and cancelled with the session.
    cx: Context,
    /// The items that are being worked on.
    running: Mutex<HashMap<ItemId, Running>>,
}

struct Running {
    hold: Hold,
    cx: Context,
    lost: bool,
}

/// The items under way, also those of leases that were lost: their calls are paid for already, so they
/// go on to their end, and their replies are kept.
#[derive(Default)]
pub(super) struct Hands {
    tasks: JoinSet<Done>,
    release: HashMap<Duration, Vec<Hold>>,
    hopeless: Option<Error>,
}

struct Done {
    lease: LeaseId,
    item: ItemId,
    end: End,
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

    fn running(&self) -> MutexGuard<'_, HashMap<ItemId, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn work(
        self,
        hands: &mut Hands,
        stop: &CancellationToken,
        until: Until,
    ) -> Result<Ended> {
        let ended = {
            let life = async {
                let ended = self.claim_and_run(hands, stop, until).await;
                if !matches!(ended, Ended::LeaseLost) {
                    self.wind_up(hands, until).await?;
                }
                Ok::<_, Error>(ended)
            };
            tokio::select! {
                ended = life => ended?,
                () = self.keep_lease() => Ended::LeaseLost,
                () = self.keep_reaping() => Ended::LeaseLost,
            }
        };
        if matches!(ended, Ended::LeaseLost) {
            self.cx.drain();
            hands.release.clear();
        }
        match hands.hopeless.take() {
            Some(error) => Err(error),
            None => Ok(ended),
        }
    }

    /// Claims and runs until there is a reason not to.
    async fn claim_and_run(
        &self,
        hands: &mut Hands,
        stop: &CancellationToken,
        until: Until,
    ) -> Ended {
        let worker = &self.worker;
        let last_claim = until.end.map(|end| end - until.drain);
        let most = worker.options.in_flight;
        let enough = (most / 4).clamp(1, CLAIM);
        let mut claim_at = Instant::now();
        // Whether an answer got lost that may have given us items.
        let mut in_doubt = false;
        self.reap().await;
        loop {
            self.collect(hands);
            self.release(hands).await;
            if hands.hopeless.is_some() || stop.is_cancelled() || self.cx.is_draining() {
                return Ended::Stopped;
            }
            let now = Instant::now();
            if last_claim.is_some_and(|last| last <= now) {
                return Ended::OutOfTime;
            }
            let free = most - hands.tasks.len().min(most);
            if free >= enough || (free > 0 && claim_at <= now) {
                worker.memo.journal().room().await;
                let items = if in_doubt {
                    self.forgotten().await
                } else {
                    worker.queue.claim(self.lease, free.min(CLAIM) as u32).await
                };
                match items {
                    Ok(items) if !items.is_empty() => {
                        in_doubt = false;
                        claim_at = now + BREATH;
                        self.start(hands, items).await;
                        continue;
                    }
                    Ok(_) if in_doubt => {
                        in_doubt = false;
                        continue;
                    }
                    Ok(_) if until.idle && hands.tasks.is_empty() => return Ended::Idle,
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::LeaseLost => return Ended::LeaseLost,
                    Err(error) => {
                        tracing::warn!(%error, "the worker cannot claim, and tries again");
                        in_doubt = true;
                    }
                }
                claim_at = Instant::now() + worker.options.poll;
            }
            tokio::select! {
                () = stop.cancelled() => {}
                () = self.cx.bounds().drained() => {}
                Some(done) = hands.tasks.join_next() => self.ended(hands, done),
                () = sleep_until(claim_at), if hands.tasks.len() < most => {}
                () = sleep_until(last_claim.unwrap_or(now)), if last_claim.is_some() => {}
            }
            // Room for many is worth a look, unless the last one found nothing.
            if hands.tasks.is_empty() && until.idle {
                claim_at = Instant::now();
            }
        }
    }

    /// Starts what was claimed. What must not be begun ends here, and what nobody here can do goes back.
    async fn start(&self, hands: &mut Hands, items: Vec<Item>) {
        count(&self.worker.counters.claimed, items.len() as u64);
        let ambiguous = match self.worker.ambiguous(&items).await {
            Ok(ambiguous) => ambiguous,
            Err(error) => {
                tracing::warn!(%error, "intents cannot be read: the items go back");
                let holds = items.iter().map(Item::hold);
                let poll = self.worker.options.poll;
                hands.release.entry(poll).or_default().extend(holds);
                return;
            }
        };
        // Several at a time: else the last of many small runs starts a round trip for each later.
        let runs: HashSet<RunId> = items.iter().map(|item| item.run).collect();
        let read = |run| async move { (run, self.worker.run_info(run).await) };
        let runs = stream::iter(runs).map(read).buffer_unordered(READS);
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
                        tracing::warn!(%error, run = %item.run, "a run cannot be read: its item goes back");
                    }
                    hands
                        .release
                        .entry(self.worker.options.poll)
                        .or_default()
                        .push(hold);
                    continue;
                }
            };
            match self.worker.ready(&self.cx, info, item) {
                Some(_) if info.is_late() => self.worker.settle(hold, Err(too_late())),
                Some(ready) => self.spawn(hands, ready),
                None => {
                    count(&self.worker.counters.unknown, 1);
                    tracing::error!(
                        pipeline = info.name,
                        known = ?self.worker.registry.names(),
                        "no pipeline of that name is registered here: its items are left for another worker"
                    );
                    hands.release.entry(UNKNOWN).or_default().push(hold);
                }
            }
        }
    }

    fn spawn(&self, hands: &mut Hands, ready: Ready) {
        let id = ready.item.id;
        let running = Running {
            hold: ready.item.hold(),
            cx: ready.cx.clone(),
            lost: false,
        };
        self.running().insert(id, running);
        let (worker, lease) = (Arc::clone(&self.worker), self.lease);
        hands.tasks.spawn(async move {
            let end = worker.run_item(ready).await;
            Done {
                lease,
                item: id,
                end,
            }
        });
    }

    fn collect(&self, hands: &mut Hands) {
        while let Some(done) = hands.tasks.try_join_next() {
            self.ended(hands, done);
        }
    }

    fn ended(&self, hands: &mut Hands, done: Result<Done, JoinError>) {
        // Panics of pipelines are caught where they are run.
        let Ok(done) = done else { return };
        if done.lease != self.lease {
            // Of a lease that was lost: others have it.
            if !matches!(done.end, End::Settled) {
                count(&self.worker.counters.unfinished, 1);
            }
            return;
        }
        let running = self.running().remove(&done.item);
        match done.end {
            End::Settled => {}
            End::Cut(hold, result) => {
                let lost = running.is_some_and(|running| running.lost);
                if lost || self.cx.is_draining() {
                    // Somebody else's by now, or given back with the lease.
                    count(&self.worker.counters.unfinished, 1);
                } else {
                    // The pipeline itself has ended a part of its work.
                    self.worker.settle(hold, result);
                }
            }
            End::Release(hold, delay) => {
                count(&self.worker.counters.unfinished, 1);
                hands.release.entry(delay).or_default().push(hold);
            }
            End::Hopeless(hold, error) => {
                count(&self.worker.counters.unfinished, 1);
                hands.release.entry(Duration::ZERO).or_default().push(hold);
                hands.hopeless.get_or_insert(error);
            }
        }
    }

    /// Gives back what is not to be kept. What cannot be given back now goes back with the lease.
    async fn release(&self, hands: &mut Hands) {
        for (delay, holds) in hands.release.drain() {
            if let Err(error) = self.worker.queue.release(&holds, delay, false).await {
                tracing::warn!(%error, items = holds.len(), "items could not be given back");
            }
        }
    }

    /// What this lease holds and nobody works on.
    async fn forgotten(&self) -> Result<Vec<Item>> {
        // What has ended and is not written yet is held too.
        self.worker.memo.journal().flush().await?;
        let held = self.worker.queue.held(self.lease).await?;
        let running: HashSet<_> = self.running().keys().copied().collect();
        Ok(held
            .into_iter()
            .filter(|item| !running.contains(&item.id))
            .collect())
    }

    /// Lets calls in flight finish, writes everything and gives the rest back.
    async fn wind_up(&self, hands: &mut Hands, until: Until) -> Result<()> {
        self.cx.drain();
        let now = Instant::now();
        // The last fifth of the drain is for the store.
        let finish = match until.end {
            Some(end) => end - until.drain / 5,
            None => now + until.drain,
        };
        self.finish(hands, finish).await;
        let written = until.end.unwrap_or(finish).max(now) + LATE;
        let flushed = timeout_at(written, self.flush()).await;
        let flushed = flushed.unwrap_or_else(|_| Err(self.unwritten()));
        self.release(hands).await;
        let retired = self.worker.queue.retire(self.lease).await;
        flushed.and(retired.map(drop))
    }

    fn unwritten(&self) -> Error {
        let stats = self.worker.memo.journal().stats();
        let message = format!("{} results could not be written in time", stats.waiting);
        let error = Error::new(ErrorKind::Store, message);
        match stats.last_error {
            Some(last) => error.with_source(last),
            None => error,
        }
    }

    /// Until it succeeds: who calls it bounds it.
    async fn flush(&self) -> Result<()> {
        loop {
            match self.worker.memo.journal().flush().await {
                Err(error) if error.kind() != ErrorKind::Config => {
                    tracing::warn!(%error, "the worker waits for the store before it stops");
                }
                done => return done,
            }
        }
    }

    /// Waits for all items, and drops their calls when it is time.
    async fn finish(&self, hands: &mut Hands, at: Instant) {
        let all = async |hands: &mut Hands| {
            while let Some(done) = hands.tasks.join_next().await {
                self.ended(hands, done);
            }
        };
        if timeout_at(at, all(hands)).await.is_err() {
            self.cx.cancel();
            // Who does not listen is not waited for.
            let _ = timeout_at(at + Duration::from_secs(1), all(hands)).await;
            hands.tasks.abort_all();
            all(hands).await;
        }
    }

    /// Keeps the lease, and aborts the items that were taken away. Returns when the lease is lost.
    async fn keep_lease(&self) {
        let worker = &self.worker;
        let tick = |every| {
            let mut interval = interval(every);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            interval
        };
        let mut beat = tick((worker.options.lease / 3).max(Duration::from_millis(1)));
        let mut look = tick(LOOK.min(worker.options.lease));
        loop {
            tokio::select! {
                biased;
                _ = beat.tick() => {
                    match worker.queue.heartbeat(self.lease, worker.options.lease).await {
                        Ok(true) => {}
                        Ok(false) => return,
                        Err(error) => tracing::warn!(%error, "no heartbeat"),
                    }
                }
                _ = look.tick() => self.look().await,
            }
        }
    }

    async fn look(&self) {
        let holds: Vec<_> = self.running().values().map(|item| item.hold).collect();
        if holds.is_empty() {
            return;
        }
        match self.worker.queue.lost(&holds).await {
            Ok(lost) => {
                let mut running = self.running();
                for id in lost {
                    if let Some(item) = running.get_mut(&id) {
                        item.lost = true;
                        item.cx.cancel();
                    }
                }
            }
            Err(error) => tracing::warn!(%error, "the worker cannot ask for lost items"),
        }
    }

    async fn keep_reaping(&self) {
        let every = (self.worker.options.lease / 2)
            .clamp(Duration::from_millis(10), Duration::from_secs(5));
        loop {
            sleep(every.mul_f64(0.75 + fastrand::f64() / 2.0)).await;
            self.reap().await;
        }
    }

    async fn reap(&self) {
        match self.worker.queue.reap().await {
            Ok(reaped) if reaped.leases > 0 => {
                let (requeued, failed) = (reaped.requeued, reaped.failed);
                tracing::warn!(
                    requeued,
                    failed,
                    "workers died: their items are pending again"
                );
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "no reaping"),
        }
    }
}
