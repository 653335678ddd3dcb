//! The transactions that write runs and the outcomes of their items.

use std::collections::HashMap;

use serde_json::json;
use sqlx::{QueryBuilder, Sqlite as Db, SqliteConnection};

use super::{Inner, first, now, statements};
use crate::store::inputs::{Commit, NewItem, NewRun, Settlement};
use crate::store::model::{Committed, Created, Generation, Intent, ItemId, RunId, Status};
use crate::store::sql::{small, to_sql, write_error};
use crate::store::transaction::{RunChanges, ended_entry};

/// Rows in one statement. More are not faster, and SQLite allows at most 32,766 parameters.
const ROWS: usize = 500;

impl Inner {
    pub(super) async fn write_run(&self, run: &NewRun) -> sqlx::Result<Created> {
        let now = now();
        let mut transaction = self.begin().await?;
        let over = run.items.is_empty();
        let status = if over {
            Status::Completed
        } else {
            Status::Pending
        };
        let created = sqlx::query_scalar::<_, i64>(
            "INSERT INTO runs (v, tenant, name, status, spec, idempotency_key, total, created_at, \
             ended_at, log_seq) VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING RETURNING id",
        )
        .bind(&run.tenant)
        .bind(&run.name)
        .bind(status.as_str())
        .bind(&run.spec)
        .bind(&run.idempotency_key)
        .bind(to_sql(run.items.len() as u64))
        .bind(now)
        .bind(over.then_some(now))
        .bind(1 + i64::from(over))
        .fetch_optional(&mut *transaction)
        .await?;
        let Some(id) = created else {
            let known =
                sqlx::query_scalar("SELECT id FROM runs WHERE tenant = ? AND idempotency_key = ?")
                    .bind(&run.tenant)
                    .bind(&run.idempotency_key);
            let run = RunId(known.fetch_one(&mut *transaction).await?);
            transaction.commit().await?;
            return Ok(Created { run, new: false });
        };
        for (chunk, items) in run.items.chunks(ROWS).enumerate() {
            add_items(run, id, chunk * ROWS, items, &mut transaction).await?;
        }
        let created = (
            "created".to_owned(),
            json!({"total": run.items.len()}).to_string(),
        );
        let entries = [created]
            .into_iter()
            .chain(over.then(|| ended_entry(Status::Completed)));
        add_log(
            [(RunId(id), 1 + i64::from(over), entries.collect())],
            now,
            &mut transaction,
        )
        .await?;
        transaction.commit().await?;
        Ok(Created {
            run: RunId(id),
            new: true,
        })
    }

    pub(super) async fn write_commit(&self, commit: &Commit) -> sqlx::Result<Committed> {
        let now = now();
        let mut committed = Committed::default();
        let mut changes = RunChanges::new();
        for note in &commit.notes {
            let notes = &mut changes.entry(note.run).or_default().notes;
            notes.push((note.kind.clone(), note.data.clone()));
        }
        let mut transaction = self.begin().await?;
        for generations in commit.generations.chunks(ROWS) {
            committed.generations += add_generations(generations, now, &mut transaction).await?;
        }
        if !commit.intents.is_empty() {
            let row = |intent: &Intent| {
                let (attempt, key) = (small(intent.attempt), intent.key.to_string());
                json!((intent.item.0, attempt, key, &intent.provider_ref))
            };
            let rows: Vec<_> = commit.intents.iter().map(row).collect();
            let put = sqlx::query(statements::PUT_INTENTS).bind(json!(rows).to_string());
            put.bind(now).execute(&mut *transaction).await?;
        }
        if !commit.ended_intents.is_empty() {
            let names = commit.ended_intents.iter();
            let names: Vec<_> = names
                .map(|n| (n.item.0, small(n.attempt), n.key.to_string()))
                .collect();
            let end = sqlx::query(statements::END_INTENTS).bind(json!(names).to_string());
            end.execute(&mut *transaction).await?;
        }
        for settlements in commit.settlements.chunks(ROWS) {
            let results: HashMap<_, _> = settlements
                .iter()
                .map(|s| (s.hold.item, &s.result))
                .collect();
            for (item, run, seq) in settle(settlements, &mut transaction).await? {
                let error = results.get(&item).and_then(|result| result.as_ref().err());
                changes.entry(run).or_default().settle(seq as u64, error);
                committed.items.push(item);
            }
        }
        apply(changes, now, &mut transaction).await?;
        transaction.commit().await?;
        committed.items.sort_unstable();
        Ok(committed)
    }

    pub(super) async fn write_cancel(&self, run: RunId) -> sqlx::Result<u64> {
        let now = now();
        let mut transaction = self.begin().await?;
        let cancel = sqlx::query(statements::CANCEL_ITEMS).bind(run.0);
        let stopped = cancel.execute(&mut *transaction).await?.rows_affected();
        if stopped == 0 {
            transaction.commit().await?;
            return Ok(0);
        }
        let cancel = sqlx::query_scalar(statements::CANCEL_RUN);
        let cancel = cancel.bind(run.0).bind(to_sql(stopped)).bind(now);
        let last = cancel.fetch_one(&mut *transaction).await?;
        let cancelled = (
            "cancelled".to_owned(),
            json!({"items": stopped}).to_string(),
        );
        let entries = vec![cancelled, ended_entry(Status::Cancelled)];
        add_log([(run, last, entries)], now, &mut transaction).await?;
        transaction.commit().await?;
        Ok(stopped)
    }

    pub(super) async fn write_retry(&self, run: RunId) -> sqlx::Result<u64> {
        let mut transaction = self.begin().await?;
        let cancelled =
            sqlx::query("SELECT 1 FROM runs WHERE id = ? AND status = 'cancelled'").bind(run.0);
        if cancelled.fetch_optional(&mut *transaction).await?.is_some() {
            transaction.commit().await?;
            return Ok(0);
        }
        let dismiss = sqlx::query(statements::RETRY_INTENTS).bind(run.0);
        dismiss.execute(&mut *transaction).await?;
        let retry = sqlx::query(statements::RETRY_ITEMS).bind(run.0);
        let again = retry.execute(&mut *transaction).await?.rows_affected();
        if again == 0 {
            transaction.commit().await?;
            return Ok(0);
        }
        let retry = sqlx::query_scalar(statements::RETRY_RUN)
            .bind(run.0)
            .bind(to_sql(again));
        let last = retry.fetch_one(&mut *transaction).await?;
        let retried = ("retried".to_owned(), json!({"items": again}).to_string());
        add_log([(run, last, vec![retried])], now(), &mut transaction).await?;
        transaction.commit().await?;
        Ok(again)
    }
}

async fn add_items(
    run: &NewRun,
    id: i64,
    start: usize,
    items: &[NewItem],
    connection: &mut SqliteConnection,
) -> sqlx::Result<()> {
    // Values that all items share are bound once.
    let mut insert =
        QueryBuilder::<Db>::new("WITH shared (run, pipeline, tenant, priority, most) AS (VALUES (");
    let mut shared = insert.separated(", ");
    shared
        .push_bind(id)
        .push_bind(&run.name)
        .push_bind(&run.tenant)
        .push_bind(run.priority)
        .push_bind(small(run.max_attempts));
    insert.push(
        ")) INSERT INTO items (v, run_id, pipeline, tenant, priority, max_attempts, seq, key, input) \
         SELECT 1, run, pipeline, tenant, priority, most, column1, column2, column3 FROM shared CROSS JOIN (",
    );
    insert.push_values(items.iter().enumerate(), |mut row, (i, item)| {
        row.push_bind((start + i) as i64)
            .push_bind(&item.key)
            .push_bind(&item.input);
    });
    insert.push(")");
    insert.build().execute(connection).await?;
    Ok(())
}

/// Writes generations. Returns the number of new ones.
async fn add_generations(
    generations: &[Generation],
    now: i64,
    connection: &mut SqliteConnection,
) -> sqlx::Result<u64> {
    let mut insert = QueryBuilder::<Db>::new(
        "INSERT INTO generations (v, tenant, memo_key, request_digest, body, input_tokens, \
         output_tokens, cached_input_tokens, reasoning_tokens, cost_micros, created_at) ",
    );
    insert.push_values(generations, |mut row, generation| {
        let usage = &generation.usage;
        row.push("1")
            .push_bind(&generation.tenant)
            .push_bind(&generation.key.as_bytes()[..])
            .push_bind(&generation.request.as_bytes()[..])
            .push_bind(&generation.body)
            .push_bind(to_sql(usage.input_tokens))
            .push_bind(to_sql(usage.output_tokens))
            .push_bind(to_sql(usage.cached_input_tokens))
            .push_bind(to_sql(usage.reasoning_tokens))
            .push_bind(generation.cost_micros.map(to_sql))
            .push_bind(now);
    });
    insert.push(" ON CONFLICT DO NOTHING");
    Ok(insert.build().execute(connection).await?.rows_affected())
}

/// Settles items. Returns item, run and `seq` of those that were not fenced.
async fn settle(
    settlements: &[Settlement],
    connection: &mut SqliteConnection,
) -> sqlx::Result<Vec<(ItemId, RunId, i64)>> {
    let mut update = settle_statement(settlements);
    let settled = update
        .build_query_as::<(i64, i64, i64)>()
        .fetch_all(connection)
        .await?;
    Ok(settled
        .into_iter()
        .map(|(id, run, seq)| (ItemId(id), RunId(run), seq))
        .collect())
}

pub(super) fn settle_statement(settlements: &[Settlement]) -> QueryBuilder<Db> {
    let mut update = QueryBuilder::new("WITH s (id, epoch, output, error) AS (");
    update.push_values(settlements, |mut row, settlement| {
        let Settlement { hold, result } = settlement;
        row.push_bind(hold.item.0)
            .push_bind(hold.epoch)
            .push_bind(result.clone().ok())
            .push_bind(result.as_ref().err().map(write_error));
    });
    // Items are fenced by their epoch. The condition on the status is written so that no index matches it, because with
    // an index on the status the planner might read all items in process.
    update.push(
        ") UPDATE items NOT INDEXED SET status = iif(s.error IS NULL, 'completed', 'failed'), \
         output = s.output, error = s.error, lease_id = NULL, not_before = NULL, \
         epoch = items.epoch + 1 FROM s WHERE items.id = s.id AND items.epoch = s.epoch \
         AND items.status NOT IN ('completed', 'failed', 'cancelled') \
         RETURNING id, run_id, seq",
    );
    update
}

/// Updates the counters and logs of changed runs.
pub(super) async fn apply(
    mut changes: RunChanges,
    now: i64,
    connection: &mut SqliteConnection,
) -> sqlx::Result<()> {
    if changes.is_empty() {
        return Ok(());
    }
    let deltas: Vec<_> = changes
        .iter()
        .map(|(run, change)| {
            let (completed, failed) = (change.completed.len(), change.failed.len());
            (
                run.0,
                change.notes.len(),
                completed,
                failed,
                change.error.as_ref().map(write_error),
            )
        })
        .collect();
    let count = sqlx::query(statements::COUNT)
        .bind(json!(deltas).to_string())
        .bind(now);
    let counted = count.fetch_all(&mut *connection).await?;
    let mut logs = Vec::with_capacity(counted.len());
    for row in &counted {
        use sqlx::Row as _;
        let run = RunId(first(row)?);
        if let Some(change) = changes.remove(&run) {
            let settled = !change.completed.is_empty() || !change.failed.is_empty();
            let status = row.try_get::<&str, _>(2)?.parse::<Status>().ok();
            let entries = change.entries(status.filter(|status| settled && status.is_over()));
            logs.push((run, row.try_get(1)?, entries));
        }
    }
    add_log(logs, now, connection).await
}

/// Adds entries to logs, given the number of the last entry of each log.
pub(super) async fn add_log(
    logs: impl IntoIterator<Item = (RunId, i64, Vec<(String, String)>)>,
    now: i64,
    connection: &mut SqliteConnection,
) -> sqlx::Result<()> {
    let entries = logs
        .into_iter()
        .flat_map(|(run, last, entries)| numbered(run, last, entries));
    let add = sqlx::query(statements::ADD_LOG)
        .bind(log_rows(entries))
        .bind(now);
    add.execute(connection).await?;
    Ok(())
}

/// Numbers the log entries of one run, the last of which has the number `last`.
fn numbered(
    run: RunId,
    last: i64,
    entries: Vec<(String, String)>,
) -> impl Iterator<Item = (RunId, i64, String, String)> {
    let first = last - entries.len() as i64 + 1;
    let entries = entries.into_iter().zip(first..);
    entries.map(move |((kind, data), seq)| (run, seq, kind, data))
}

/// Returns rows for logs as one JSON text.
fn log_rows(rows: impl IntoIterator<Item = (RunId, i64, String, String)>) -> String {
    let rows: Vec<_> = rows
        .into_iter()
        .map(|(run, seq, kind, data)| (run.0, seq, kind, data))
        .collect();
    serde_json::to_string(&rows).unwrap_or_default()
}
