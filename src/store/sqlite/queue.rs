//! Leases and claims.

use std::collections::BTreeSet;
use std::time::Duration;

use async_trait::async_trait;
use serde_json::json;

use super::write::{add_log, apply};
use super::{Inner, first, now, statements};
use crate::error::Result;
use crate::store::model::{Hold, Item, LeaseId, Reaped, RunId};
use crate::store::sql::{each, retrying, write_error};
use crate::store::transaction::{RunChanges, duration_millis, lease_lost, worker_died};
use crate::store::{Claim, Queue};

fn holds_json(holds: &[Hold]) -> String {
    let holds: Vec<_> = holds.iter().map(|hold| (hold.item.0, hold.epoch)).collect();
    json!(holds).to_string()
}

#[async_trait]
impl Queue for Inner {
    async fn register(&self, worker: &str, ttl: Duration) -> Result<LeaseId> {
        let write = async || {
            let mut transaction = self.begin().await?;
            let id = sqlx::query_scalar(
                "INSERT INTO leases (worker, expires_at) VALUES (?, ?) RETURNING id",
            )
            .bind(worker)
            .bind(now() + duration_millis(ttl))
            .fetch_one(&mut *transaction)
            .await?;
            transaction.commit().await?;
            Ok(LeaseId(id))
        };
        retrying!(self.is_busy(), write())
    }

    async fn heartbeat(&self, lease: LeaseId, ttl: Duration) -> Result<bool> {
        let write = async || {
            let mut transaction = self.begin().await?;
            let beat = sqlx::query(statements::HEARTBEAT)
                .bind(lease.0)
                .bind(now() + duration_millis(ttl));
            let beaten = beat.execute(&mut *transaction).await?;
            transaction.commit().await?;
            Ok(beaten.rows_affected() > 0)
        };
        retrying!(self.is_busy(), write())
    }

    async fn retire(&self, lease: LeaseId) -> Result<u64> {
        let write = async || {
            let mut transaction = self.begin().await?;
            sqlx::query(statements::RETIRE)
                .bind(lease.0)
                .execute(&mut *transaction)
                .await?;
            let release = sqlx::query(statements::RETIRE_ITEMS).bind(lease.0);
            let released = release.execute(&mut *transaction).await?;
            transaction.commit().await?;
            Ok(released.rows_affected())
        };
        retrying!(self.is_busy(), write())
    }

    async fn claim(&self, lease: LeaseId, claim: Claim) -> Result<Vec<Item>> {
        let cursor = self.cursor.get();
        let claimed = retrying!(self.is_busy(), self.take(lease, &claim, &cursor))?;
        let Some(items) = claimed else {
            return Err(lease_lost(lease));
        };
        Ok(self.cursor.deal(items, &cursor))
    }

    async fn has_suspects(&self, pipelines: &[String]) -> Result<bool> {
        let reader = self.reader()?;
        let names = json!(pipelines).to_string();
        retrying!(
            self.is_busy(),
            sqlx::query_scalar(statements::SUSPECTS)
                .bind(&names)
                .fetch_one(reader)
        )
    }

    async fn release(&self, holds: &[Hold], delay: Duration, charge: bool) -> Result<u64> {
        if holds.is_empty() {
            return Ok(0);
        }
        let json = holds_json(holds);
        let due = (!delay.is_zero()).then(|| now() + duration_millis(delay));
        let write = async || {
            let mut transaction = self.begin().await?;
            let release = sqlx::query(statements::RELEASE)
                .bind(&json)
                .bind(due)
                .bind(i64::from(!charge));
            let released = release.execute(&mut *transaction).await?;
            transaction.commit().await?;
            Ok(released.rows_affected())
        };
        retrying!(self.is_busy(), write())
    }

    async fn held(&self, lease: LeaseId) -> Result<Vec<Hold>> {
        let reader = self.reader()?;
        let held = retrying!(
            self.is_busy(),
            sqlx::query(statements::HELD)
                .bind(lease.0)
                .fetch_all(reader)
        )?;
        each(&held, statements::hold)
    }

    async fn reap(&self) -> Result<Reaped> {
        let reader = self.reader()?;
        // Usually there is nothing to reap, and then the write lock is not taken.
        let anything = retrying!(
            self.is_busy(),
            sqlx::query_scalar::<_, bool>(statements::ANYTHING_TO_REAP)
                .bind(now())
                .fetch_one(reader)
        )?;
        if !anything {
            return Ok(Reaped::default());
        }
        retrying!(self.is_busy(), self.reap_expired())
    }
}

impl Inner {
    /// Claims items. Returns `None` if the lease is not live.
    async fn take(
        &self,
        lease: LeaseId,
        claim: &Claim,
        cursor: &str,
    ) -> sqlx::Result<Option<Vec<(Item, i32)>>> {
        let mut transaction = self.begin().await?;
        let now = now();
        let live = sqlx::query(statements::LIVE).bind(lease.0).bind(now);
        if live.fetch_optional(&mut *transaction).await?.is_none() {
            transaction.commit().await?;
            return Ok(None);
        }
        let take = sqlx::query(statements::CLAIM)
            .bind(lease.0)
            .bind(claim.limit)
            .bind(cursor)
            .bind(json!(claim.pipelines).to_string())
            .bind(claim.handling.as_i32());
        let claimed = take.fetch_all(&mut *transaction).await?;
        let items: Vec<_> = claimed
            .iter()
            .map(statements::item)
            .collect::<sqlx::Result<_>>()?;
        if items.is_empty() {
            transaction.commit().await?;
            return Ok(Some(items));
        }
        let runs: BTreeSet<_> = items.iter().map(|(item, _)| item.run.0).collect();
        let start =
            sqlx::query_as::<_, (i64, i64)>(statements::START_RUNS).bind(json!(runs).to_string());
        let started = start.fetch_all(&mut *transaction).await?;
        if !started.is_empty() {
            let entry = || vec![("started".to_owned(), "{}".to_owned())];
            let logs = started
                .into_iter()
                .map(|(run, last)| (RunId(run), last, entry()));
            add_log(logs, now, &mut transaction).await?;
        }
        transaction.commit().await?;
        Ok(Some(items))
    }

    async fn reap_expired(&self) -> sqlx::Result<Reaped> {
        let mut transaction = self.begin().await?;
        let now = now();
        let mut reaped = Reaped::default();
        let dead = sqlx::query_scalar::<_, i64>(statements::REAP_LEASES).bind(now);
        let dead = dead.fetch_all(&mut *transaction).await?;
        if !dead.is_empty() {
            reaped.leases = dead.len() as u64;
            let dead = json!(dead).to_string();
            let alone = sqlx::query_scalar::<_, i64>(statements::HELD_ALONE).bind(&dead);
            let alone = json!(alone.fetch_all(&mut *transaction).await?).to_string();
            let requeue = sqlx::query(statements::REQUEUE).bind(&dead).bind(&alone);
            reaped.requeued = requeue.execute(&mut *transaction).await?.rows_affected();
            let error = worker_died();
            let give_up = sqlx::query(statements::GIVE_UP)
                .bind(&alone)
                .bind(write_error(&error));
            let mut changes = RunChanges::new();
            for row in give_up.fetch_all(&mut *transaction).await? {
                use sqlx::Row as _;
                let seq: i64 = row.try_get(2)?;
                let change = changes.entry(RunId(row.try_get(1)?)).or_default();
                change.settle(seq as u64, Some(&error));
                reaped.failed += u64::from(first(&row)? > 0);
            }
            apply(changes, now, &mut transaction).await?;
        }
        let due = sqlx::query(statements::LET_IN).bind(now);
        reaped.due = due.execute(&mut *transaction).await?.rows_affected();
        transaction.commit().await?;
        Ok(reaped)
    }
}
