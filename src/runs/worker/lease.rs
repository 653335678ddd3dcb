//! The lease of a session: heartbeats, items that were taken away, and the reaping of other leases.

use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval, sleep};

use super::session::{LOST_ITEMS_INTERVAL, Session};
use crate::store::QueueExt as _;

impl Session {
    /// Extends the lease and cancels items that were lost. Returns when the lease is lost.
    pub(super) async fn keep_lease(&self) {
        let worker = &self.worker;
        let tick = |every| {
            let mut interval = interval(every);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            interval
        };
        let mut beat = tick((worker.options.lease / 3).max(Duration::from_millis(1)));
        let mut look = tick(LOST_ITEMS_INTERVAL.min(worker.options.lease));
        loop {
            tokio::select! {
                biased;
                _ = beat.tick() => {
                    match worker.queue.heartbeat(self.lease, worker.options.lease).await {
                        Ok(true) => {}
                        Ok(false) => return,
                        Err(error) => tracing::warn!(%error, "a heartbeat failed"),
                    }
                }
                _ = look.tick() => self.cancel_lost_items().await,
            }
        }
    }

    /// Cancels the calls of items that the lease no longer holds.
    async fn cancel_lost_items(&self) {
        let holds: Vec<_> = self.running().values().map(|item| item.hold).collect();
        if holds.is_empty() {
            return;
        }
        match self.worker.queue.lost(self.lease, &holds).await {
            Ok(lost) => {
                let mut running = self.running();
                for id in lost {
                    if let Some(item) = running.get_mut(&id) {
                        item.lost = true;
                        item.cx.cancel();
                    }
                }
            }
            Err(error) => tracing::warn!(%error, "the worker cannot look for lost items"),
        }
    }

    /// Reaps other leases regularly, and never returns.
    pub(super) async fn reap_regularly(&self) {
        let every = (self.worker.options.lease / 2)
            .clamp(Duration::from_millis(10), Duration::from_secs(5));
        loop {
            sleep(every.mul_f64(0.75 + fastrand::f64() / 2.0)).await;
            self.reap().await;
        }
    }

    pub(super) async fn reap(&self) {
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
            Err(error) => tracing::warn!(%error, "a reap failed"),
        }
    }
}
