//! [`Notes`]: a durable log of values of one type.

use std::borrow::Borrow;
use std::fmt;
use std::marker::PhantomData;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Runner;
use super::submit::log_key;
use crate::error::Result;
use crate::store::{Commit, NewRun, Note, RunId};

/// The kind of its entries.
const KIND: &str = "note";

/// A durable log of values of one type, for example of generated texts and their quality ([`Runner::notes`]). It is
/// written in order and without a gap, and read from its end.
///
/// The log is a run without items. A [`Journal`](crate::store::Journal) writes it in the background, in batches:
///
/// ```
/// # use std::sync::Arc;
/// # use throughline::{Context, Runner, testing::Scripted, store::{Commit, Memory}};
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
/// # let (store, cx) = (Arc::new(Memory::new()), Context::builder(Scripted::new()).build());
/// let runner = Runner::new(Arc::clone(&store)).for_tenant("studio");
/// let classes = runner.notes::<String>("classes").await?;
/// let journal = cx.journal_into(store);
///
/// journal.write(classes.add(Commit::new(), ["legs".to_owned(), "back".to_owned()])?); // returns at once
/// journal.flush().await?; // before the process ends
/// assert_eq!(classes.last(100).await?, ["legs", "back"]);
/// # Ok(()) }
/// ```
pub struct Notes<T> {
    runner: Runner,
    run: RunId,
    values: PhantomData<fn() -> T>,
}

impl Runner {
    /// Returns the log with this name, and creates it if it does not exist; one round trip. Each tenant has logs of its own
    /// ([`for_tenant`](Self::for_tenant)).
    ///
    /// [`purge`](Self::purge) treats the log as a run that ended at its creation. Values that are written after its
    /// removal are lost. A service that purges should start a log with a new name regularly, for example each month.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn notes<T>(&self, name: &str) -> Result<Notes<T>> {
        self.check_tenant()?;
        let tenant = self.tenant.as_deref().unwrap_or_default();
        let run = NewRun::new(tenant, name).idempotency_key(log_key(name));
        Ok(Notes {
            run: self.store.create_run(run).await?.run,
            runner: self.clone(),
            values: PhantomData,
        })
    }
}

impl<T> Notes<T> {
    /// Returns the run that holds the log.
    pub fn run(&self) -> RunId {
        self.run
    }

    /// Adds values to a commit, which writes them in one transaction with its other rows.
    ///
    /// # Errors
    /// If a value cannot be written as JSON.
    pub fn add<V: Borrow<T>>(
        &self,
        commit: Commit,
        values: impl IntoIterator<Item = V>,
    ) -> Result<Commit>
    where
        T: Serialize,
    {
        let note = |value: V| {
            Ok(Note {
                run: self.run,
                kind: KIND.to_owned(),
                data: serde_json::to_string(value.borrow())?,
            })
        };
        let notes: Result<Vec<_>> = values.into_iter().map(note).collect();
        Ok(commit.notes(notes?))
    }

    /// Returns at most `limit` of the last values, in order. Two round trips, however many values there are.
    ///
    /// # Errors
    /// Those of the store, and that of a value that is not a `T`.
    pub async fn last(&self, limit: u32) -> Result<Vec<T>>
    where
        T: DeserializeOwned,
    {
        let entries = self.runner.log_last(self.run, limit).await?;
        // The log also has the store's entry about its creation.
        let notes = entries.iter().filter(|entry| entry.kind == KIND);
        notes
            .map(|entry| Ok(serde_json::from_str(&entry.data)?))
            .collect()
    }
}

impl<T> fmt::Debug for Notes<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Notes")
            .field("run", &self.run)
            .finish_non_exhaustive()
    }
}
