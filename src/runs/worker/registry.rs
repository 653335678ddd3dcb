//! [`Registry`]: pipelines by name, their types hidden. The one place where inputs and outputs are JSON.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::pipeline::Pipeline;

/// A pipeline from text to text.
pub(super) trait Work: Send + Sync {
    /// Runs it; a panic is an error.
    fn run<'a>(&'a self, cx: &'a Context, input: &'a str) -> BoxFuture<'a, Result<String>>;
}

struct Typed<P>(P);

impl<P> Work for Typed<P>
where
    P: Pipeline,
    P::Input: DeserializeOwned,
    P::Output: Serialize,
{
    fn run<'a>(&'a self, cx: &'a Context, input: &'a str) -> BoxFuture<'a, Result<String>> {
        let run = async move {
            let input = serde_json::from_str(input).map_err(|error| {
                let message = format!("the input is not one of this pipeline: {error}");
                Error::new(ErrorKind::Config, message)
            })?;
            let output = self.0.run(cx, input).await?;
            serde_json::to_string(&output).map_err(|error| {
                let message = format!("the output cannot be written as JSON: {error}");
                Error::new(ErrorKind::Config, message)
            })
        };
        let run = AssertUnwindSafe(run).catch_unwind();
        run.map(|result| result.unwrap_or_else(|panic| Err(Error::panicked(panic))))
            .boxed()
    }
}

#[derive(Default)]
pub(super) struct Registry(HashMap<Arc<str>, Arc<dyn Work>>);

impl Registry {
    /// False if there is one of that name already.
    pub(super) fn add<P>(&mut self, name: Arc<str>, pipeline: P) -> bool
    where
        P: Pipeline + 'static,
        P::Input: DeserializeOwned,
        P::Output: Serialize,
    {
        self.0.insert(name, Arc::new(Typed(pipeline))).is_none()
    }

    pub(super) fn find(&self, name: &str) -> Option<(Arc<str>, Arc<dyn Work>)> {
        let (name, work) = self.0.get_key_value(name)?;
        Some((Arc::clone(name), Arc::clone(work)))
    }

    pub(super) fn names(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.0.keys().map(|name| &**name).collect();
        names.sort_unstable();
        names
    }
}
