//! Leases and claims.

use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::Row as _;

use super::{Inner, is_conflict, statements};
use crate::error::Result;
use crate::store::model::{Hold, Item, LeaseId, Reaped};
use crate::store::sql::{each, failed, from_sql, retrying, write_error};
use crate::store::transaction::{duration_millis, lease_lost, worker_died};
use crate::store::{Claim, Queue};

fn columns(holds: &[Hold]) -> (Vec<i64>, Vec<i64>) {
    holds.iter().map(|hold| (hold.item.0, hold.epoch)).unzip()
}

#[async_trait]
impl Queue for Inner {
    async fn register(&self, worker: &str, ttl: Duration) -> Result<LeaseId> {
        let register = sqlx::query_scalar(statements::REGISTER)
            .bind(worker)
            .bind(duration_millis(ttl));
        let id = register.fetch_one(self.pool()).await.map_err(failed)?;
        Ok(LeaseId(id))
    }

    async fn heartbeat(&self, lease: LeaseId, ttl: Duration) -> Result<bool> {
        let beat = sqlx::query(statements::HEARTBEAT)
            .bind(lease.0)
            .bind(duration_millis(ttl));
        let beaten = beat.execute(self.pool()).await.map_err(failed)?;
        Ok(beaten.rows_affected() > 0)
    }

    async fn retire(&self, lease: LeaseId) -> Result<u64> {
        retrying!(is_conflict, self.give_back(lease))
    }

    async fn claim(&self, lease: LeaseId, claim: Claim) -> Result<Vec<Item>> {
        let cursor = self.cursor.get();
        let claimed = retrying!(is_conflict, {
            let take = sqlx::query(statements::CLAIM).bind(lease.0);
            take.bind(i64::from(claim.limit))
                .bind(&cursor)
                .bind(&claim.pipelines)
                .bind(claim.handling.as_i32())
                .fetch_all(self.pool())
        })?;
        if claimed.is_empty() {
            let live = sqlx::query_scalar(statements::LIVE)
                .bind(lease.0)
                .fetch_one(self.pool());
            return match live.await.map_err(failed)? {
                true => Ok(Vec::new()),
                false => Err(lease_lost(lease)),
            };
        }
        let items = each(&claimed, statements::item)?;
        Ok(self.cursor.deal(items, &cursor))
    }

    async fn has_suspects(&self, pipelines: &[String]) -> Result<bool> {
        let look = sqlx::query_scalar(statements::SUSPECTS).bind(pipelines);
        look.fetch_one(self.pool()).await.map_err(failed)
    }

    async fn release(&self, holds: &[Hold], delay: Duration, charge: bool) -> Result<u64> {
        if holds.is_empty() {
            return Ok(0);
        }
        let (ids, epochs) = columns(holds);
        let delay = (!delay.is_zero()).then(|| duration_millis(delay));
        let released = retrying!(is_conflict, {
            let release = sqlx::query(statements::RELEASE).bind(&ids).bind(&epochs);
            release
                .bind(delay)
                .bind(i32::from(!charge))
                .execute(self.pool())
        })?;
        Ok(released.rows_affected())
    }

    async fn held(&self, lease: LeaseId) -> Result<Vec<Hold>> {
        let list = sqlx::query(statements::HELD).bind(lease.0);
        let held = list.fetch_all(self.pool()).await.map_err(failed)?;
        each(&held, statements::hold)
    }

    async fn reap(&self) -> Result<Reaped> {
        let anything = sqlx::query_scalar(statements::ANYTHING_TO_REAP).fetch_one(self.pool());
        if !anything.await.map_err(failed)? {
            return Ok(Reaped::default());
        }
        retrying!(is_conflict, self.reap_expired())
    }
}

impl Inner {
    async fn give_back(&self, lease: LeaseId) -> sqlx::Result<u64> {
        let mut transaction = self.begin().await?;
        sqlx::query(statements::RETIRE)
            .bind(lease.0)
            .execute(&mut *transaction)
            .await?;
        self.round_trips.fetch_add(1, Ordering::Relaxed);
        let release = sqlx::query(statements::RETIRE_ITEMS).bind(lease.0);
        let released = release.execute(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(released.rows_affected())
    }

    async fn reap_expired(&self) -> sqlx::Result<Reaped> {
        let mut reaped = Reaped::default();
        let mut transaction = self.begin().await?;
        let dead = sqlx::query_scalar::<_, i64>(statements::REAP_LEASES);
        let dead = dead.fetch_all(&mut *transaction).await?;
        if !dead.is_empty() {
            reaped.leases = dead.len() as u64;
            self.round_trips.fetch_add(1, Ordering::Relaxed);
            let reap_expired = sqlx::query(statements::REAP_ITEMS)
                .bind(dead)
                .bind(write_error(&worker_died()));
            let counted = reap_expired.fetch_one(&mut *transaction).await?;
            reaped.requeued = from_sql(counted.try_get(0)?);
            reaped.failed = from_sql(counted.try_get(1)?);
        }
        self.round_trips.fetch_add(1, Ordering::Relaxed);
        let due = sqlx::query(statements::LET_IN)
            .execute(&mut *transaction)
            .await?;
        reaped.due = due.rows_affected();
        transaction.commit().await?;
        Ok(reaped)
    }
}
