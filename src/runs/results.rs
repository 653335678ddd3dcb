//! [`ItemResult`]: the outcomes of a run's items, in pages or as a stream.

use futures::stream::{self, BoxStream, StreamExt as _, TryStreamExt as _};
use serde::de::DeserializeOwned;

use super::Runner;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Item, RunId, Status};

/// The number of items that a stream of results reads at a time.
const PAGE: u32 = 256;

/// An item of a run, with its output if it has one.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ItemResult<O> {
    /// The position among the inputs, from 0.
    pub index: u64,
    /// The name of the item.
    pub key: String,
    /// The status of the item.
    pub status: Status,
    /// The number of attempts.
    pub attempt: u32,
    /// The output or the error; `None` while the item is open, and if it was cancelled.
    pub result: Option<Result<O>>,
}

impl<O> ItemResult<O> {
    /// Returns the output of a completed item.
    pub fn output(&self) -> Option<&O> {
        self.result.as_ref()?.as_ref().ok()
    }

    /// Returns the error of a failed item.
    pub fn error(&self) -> Option<&Error> {
        self.result.as_ref()?.as_ref().err()
    }
}

impl<O: DeserializeOwned> From<Item> for ItemResult<O> {
    fn from(item: Item) -> Self {
        let result = match (item.status, item.output, item.error) {
            (Status::Completed, Some(output), _) => {
                Some(serde_json::from_str(&output).map_err(|error| {
                    let message = format!(
                        "the output of item {} is of another type: {error}",
                        item.seq
                    );
                    Error::new(ErrorKind::Config, message)
                }))
            }
            (Status::Failed, _, Some(error)) => Some(Err(error)),
            _ => None,
        };
        Self {
            index: item.seq,
            key: item.key,
            status: item.status,
            attempt: item.attempt,
            result,
        }
    }
}

impl Runner {
    /// Returns at most `limit` items of a run in input order, from the index `from` on, with their present status.
    ///
    /// # Errors
    /// Those of the store. An output of another type than `O` is an error of its item.
    pub async fn results<O: DeserializeOwned>(
        &self,
        run: RunId,
        from: u64,
        limit: u32,
    ) -> Result<Vec<ItemResult<O>>> {
        if !self.sees(run).await? {
            return Ok(Vec::new());
        }
        let items = self.store.items(run, from, limit).await?;
        Ok(items.into_iter().map(ItemResult::from).collect())
    }

    /// Returns a stream of all items of a run in input order. It reads 256 items at a time, so memory does not grow with the
    /// run.
    pub fn stream_results<O: DeserializeOwned + Send + 'static>(
        &self,
        run: RunId,
    ) -> BoxStream<'static, Result<ItemResult<O>>> {
        let runner = self.clone();
        let pages = stream::try_unfold((runner, 0), move |(runner, from)| async move {
            let page = runner.results::<O>(run, from, PAGE).await?;
            let next = from + page.len() as u64;
            Ok::<_, Error>((!page.is_empty()).then_some((page, (runner, next))))
        });
        pages
            .map_ok(|page| stream::iter(page.into_iter().map(Ok)))
            .try_flatten()
            .boxed()
    }

    /// Returns the outputs of a run's completed items in input order, for example for the next phase of the work.
    ///
    /// # Errors
    /// Those of the store, and that of an output of another type than `O`.
    pub async fn outputs<O: DeserializeOwned + Send + 'static>(
        &self,
        run: RunId,
    ) -> Result<Vec<O>> {
        let mut outputs = Vec::new();
        let mut items = self.stream_results::<O>(run);
        while let Some(item) = items.try_next().await? {
            if item.status == Status::Completed {
                outputs.extend(item.result.transpose()?);
            }
        }
        Ok(outputs)
    }
}
