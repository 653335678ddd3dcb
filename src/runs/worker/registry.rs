//! [`Registry`]: pipelines by name, with their types erased. Only here inputs and outputs are JSON.

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
    /// Runs the pipeline. A panic becomes an error.
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
                let message =
                    format!("the input does not have the type of this pipeline's inputs: {error}");
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

/// The pipelines of a worker by name.
#[derive(Default)]
pub(super) struct Registry {
    pipelines: HashMap<Arc<str>, Arc<dyn Work>>,
    /// Their names in order.
    names: Vec<String>,
}

impl Registry {
    /// Adds a pipeline. Returns false if the name is taken.
    pub(super) fn add<P>(&mut self, name: Arc<str>, pipeline: P) -> bool
    where
        P: Pipeline + 'static,
        P::Input: DeserializeOwned,
        P::Output: Serialize,
    {
        let Err(place) = self.names.binary_search_by(|known| (**known).cmp(&*name)) else {
            return false;
        };
        self.names.insert(place, name.to_string());
        self.pipelines.insert(name, Arc::new(Typed(pipeline)));
        true
    }

    pub(super) fn find(&self, name: &str) -> Option<(Arc<str>, Arc<dyn Work>)> {
        let (name, work) = self.pipelines.get_key_value(name)?;
        Some((Arc::clone(name), Arc::clone(work)))
    }

    pub(super) fn names(&self) -> &[String] {
        &self.names
    }
}
