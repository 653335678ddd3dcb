//! [`Notes`]: a log of values of one type, beside the work.

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

/// A log of values, as of what was generated and how good it was ([`Runner::notes`]): written behind the work
/// in batches, in order and without a gap, and read from its end.
///
/// It is a run without items. Write with a [`Journal`](crate::store::Journal), so that nobody waits for the store:
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
    /// The log of that name, made when it is asked for first; one round trip. Each tenant has its own
    /// ([`for_tenant`](Self::for_tenant)).
    ///
    /// To a [`purge`](Self::purge) it is a run that ended when it was made, and what is written behind its removal is lost: where you
    /// purge, give a name to each month and open the new one.
    ///
    /// # Errors
    /// The store's.
    pub async fn notes<T>(&self, name: &str) -> Result<Notes<T>> {
        self.has_tenant()?;
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
    /// The run that it is.
    pub fn run(&self) -> RunId {
        self.run
    }

    /// Adds values to what is about to be written, with whatever else is in `commit`: all of it or nothing.
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

    /// The last values, at most `limit`, in order: two round trips, however many there are.
    ///
    /// # Errors
    /// The store's, and where a value is not a `T`.
    pub async fn last(&self, limit: u32) -> Result<Vec<T>>
    where
        T: DeserializeOwned,
    {
        let entries = self.runner.log_last(self.run, limit).await?;
        // The store notes there too when the log was made.
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
