//! [`Submit`]: a run on its way into the store, and what names its items.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::future::IntoFuture;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::FutureExt as _;
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::error::{Error, ErrorKind, Result};
use crate::request::digest::write_canonical;
use crate::store::{NewItem, NewRun, RunId, Store};

/// What a run's record says besides the store's own fields.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Spec {
    /// Whether it asks anew: its replies are remembered for this run alone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) fresh: bool,
    /// When its time is up, in milliseconds since 1970: a time of day, because it outlives the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) until: Option<u64>,
}

impl Spec {
    /// How long it has from now; nothing where its time is up.
    pub(crate) fn left(&self) -> Option<Duration> {
        // A time that no clock here can show never comes.
        let until = UNIX_EPOCH.checked_add(Duration::from_millis(self.until?))?;
        Some(until.duration_since(SystemTime::now()).unwrap_or_default())
    }
}

type Key<I> = Box<dyn Fn(&I) -> String + Send>;

/// A run to be submitted: await it to do so, and get its id at once ([`Runner::submit`](super::Runner::submit)).
///
/// ```
/// # use throughline::{Context, Runner, pipeline, store::Memory};
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
/// # let double = pipeline("double", async |_cx: Context, n: u32| Ok(2 * n));
/// # let runner = Runner::new(Memory::new());
/// let submit = || {
///     runner
///         .submit("double", &double, [1, 2, 3])
///         .key(|n| format!("number-{n}"))
///         .tenant("ada")
///         .idempotency_key("2026-07-01")
/// };
/// let run = submit().await?;
/// assert_eq!(submit().await?, run); // the same run, not a second one
/// # Ok(()) }
/// ```
///
/// # Cancel safety
/// Dropped while it is awaited, the run may be there or not; an
/// [idempotency key](Self::idempotency_key) makes submitting it again harmless.
#[must_use = "a run is submitted when it is awaited"]
pub struct Submit<I> {
    store: Arc<dyn Store>,
    run: NewRun,
    inputs: Vec<I>,
    key: Option<Key<I>>,
    spec: Spec,
    timeout: Option<Duration>,
    only_for: Option<Arc<str>>,
    refusal: Option<Error>,
}

impl<I: Serialize + Send> Submit<I> {
    pub(super) fn new(store: Arc<dyn Store>, name: String, inputs: Vec<I>) -> Self {
        Self {
            store,
            run: NewRun::new("", name),
            inputs,
            key: None,
            spec: Spec::default(),
            timeout: None,
            only_for: None,
            refusal: None,
        }
    }

    /// For a runner that may submit nothing.
    pub(super) fn refused_by(mut self, refusal: Option<Error>) -> Self {
        self.refusal = refusal;
        self
    }

    /// For a runner that is for one tenant.
    pub(super) fn only_for(mut self, tenant: Option<Arc<str>>) -> Self {
        if let Some(tenant) = &tenant {
            self.run.tenant = tenant.to_string();
        }
        self.only_for = tenant;
        self
    }

    /// Names each item. What is paid for an item is remembered under its name, so that a later run of the same
    /// name and tenant replays it: take what stays the same when the input is edited. Of several
    /// items with one key the second is called `key~1`, the third `key~2`, and so on, past names that other
    /// items have as their keys.
    ///
    /// Without it, the name is a digest of the serialised input.
    pub fn key(mut self, f: impl Fn(&I) -> String + Send + 'static) -> Self {
        self.key = Some(Box::new(f));
        self
    }

    /// Whose run it is; nobody's (the empty name) unless set. Tenants share a worker fairly and share no replies.
    pub fn tenant(mut self, tenant: impl Into<String>) -> Self {
        self.run.tenant = tenant.into();
        self
    }

    /// A second run of the tenant with the same key is the first one again, whatever else differs.
    pub fn idempotency_key(mut self, key: impl Into<String>) -> Self {
        self.run.idempotency_key = Some(run_key(key.into()));
        self
    }

    /// Among the tenant's items lower goes first; 0 unless set.
    pub fn priority(mut self, priority: i32) -> Self {
        self.run.priority = priority;
        self
    }

    /// How often a worker may die with an item alone in its hands before that item fails; 3 unless set. A worker's death
    /// with several items in its hands counts for none of them; they are tried again in smaller company
    /// ([`Handling`](crate::store::Handling)).
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.run.max_attempts = attempts;
        self
    }

    /// Asks anew: replies of earlier runs are not used. What this run has paid for is still
    /// never paid for twice.
    pub fn fresh(mut self) -> Self {
        self.spec.fresh = true;
        self
    }

    /// When the run must be over, counted from its submission; no limit unless set. From then on nothing is sent for it and calls in
    /// flight are dropped: items that are not over fail with [`ErrorKind::DeadlineExceeded`] as soon as a
    /// worker has them in hand. [`retry_failed`](crate::Runner::retry_failed) gives them no more time.
    ///
    /// Submitter and workers read the time of day on their own machines.
    ///
    /// ```
    /// # use std::{sync::Arc, time::Duration};
    /// # use throughline::{Context, Runner, Sim, Worker, pipeline, store::{Memory, Status}};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() -> throughline::Result<()> {
    /// # let page = pipeline("page", async |cx: Context, n: u32| Ok(cx.generate(format!("{n}")).await?.text));
    /// # let store = Arc::new(Memory::new());
    /// # let runner = Runner::new(Arc::clone(&store));
    /// # let cx = Context::builder(Sim::builder().latency(Duration::from_secs(9)).build()).build();
    /// # let worker = Worker::builder(store, cx).register("page", page.clone()).build();
    /// let run = runner.submit("page", &page, [1, 2, 3]).timeout(Duration::from_secs(5)).await?;
    /// worker.drive_run(run, Duration::from_secs(60)).await?; // a page takes 9 s
    /// let over = runner.snapshot(run).await?.expect("it is there").run;
    /// assert_eq!((over.status, over.failed), (Status::Failed, 3));
    /// assert!(over.error.is_some_and(|error| error.is_deadline_exceeded()));
    /// # Ok(()) }
    /// ```
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    async fn submit(mut self) -> Result<RunId> {
        if let Some(refusal) = self.refusal {
            return Err(refusal);
        }
        if let Some(tenant) = &self.only_for
            && **tenant != *self.run.tenant
        {
            let message = format!(
                "this runner is for {tenant:?} and submits nothing for {:?}",
                self.run.tenant
            );
            return Err(Error::new(ErrorKind::Config, message));
        }
        let mut texts = Vec::with_capacity(self.inputs.len());
        let mut keys = Vec::with_capacity(self.inputs.len());
        for (index, input) in self.inputs.iter().enumerate() {
            let text = serde_json::to_string(input)
                .map_err(|error| unusable(index, &error.to_string()))?;
            keys.push(match &self.key {
                Some(key) => key(input),
                None => digest(&text)?,
            });
            texts.push(text);
        }
        let names = unique(keys).into_iter();
        let items = names
            .zip(texts)
            .map(|(name, text)| NewItem::new(name, text))
            .collect();
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        self.spec.until = self.timeout.map(|timeout| {
            let until = now.unwrap_or_default().saturating_add(timeout);
            u64::try_from(until.as_millis()).unwrap_or(u64::MAX)
        });
        self.run.spec = serde_json::to_string(&self.spec)?;
        self.run.items = items;
        Ok(self.store.create_run(self.run).await?.run)
    }
}

/// What the key of a log begins with. Runs and logs share the store's idempotency keys.
const LOG: &str = "notes: ";
/// What is put in front of the key of a run that begins like the key of a log.
const RUN: &str = "run\u{1f}";

/// The store's idempotency key for a run. No two keys become one, and most stay as they are: stores have them.
fn run_key(key: String) -> String {
    match key.starts_with(LOG) || key.starts_with(RUN) {
        true => format!("{RUN}{key}"),
        false => key,
    }
}

/// The store's idempotency key for the log of that name.
pub(super) fn log_key(name: &str) -> String {
    format!("{LOG}{name}")
}

fn unusable(index: usize, why: &str) -> Error {
    let message = format!("input {index} cannot be written as JSON: {why}");
    Error::new(ErrorKind::Config, message)
}

/// The name of an input without a key. By its meaning, so that a map in another order is the same input.
fn digest(text: &str) -> Result<String> {
    let mut canonical = String::with_capacity(text.len());
    write_canonical(&serde_json::from_str::<Value>(text)?, &mut canonical);
    let digest = Sha256::digest(canonical.as_bytes());
    // Half of it: 128 bits are enough for what nobody tries to forge.
    Ok(digest[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

/// A name of its own for each item. The first with a key is called by it; the others are told apart by their
/// order among themselves, so that what comes between does not matter.
fn unique(keys: Vec<String>) -> Vec<String> {
    let taken: HashSet<String> = keys.iter().cloned().collect();
    let mut counts = HashMap::new();
    let name = |key: String| match counts.get_mut(&key) {
        None => {
            counts.insert(key.clone(), 0_u64);
            key
        }
        Some(count) => loop {
            *count += 1;
            let name = format!("{key}~{count}");
            if !taken.contains(&name) {
                break name;
            }
        },
    };
    keys.into_iter().map(name).collect()
}

impl<I: Serialize + Send + Sync + 'static> IntoFuture for Submit<I> {
    type Output = Result<RunId>;
    type IntoFuture = BoxFuture<'static, Result<RunId>>;

    fn into_future(self) -> Self::IntoFuture {
        self.submit().boxed()
    }
}

impl<I> fmt::Debug for Submit<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Submit")
            .field("name", &self.run.name)
            .field("tenant", &self.run.tenant)
            .field("inputs", &self.inputs.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_inserted_input_names_nobody_anew() {
        let names = |keys: &[&str]| unique(keys.iter().map(|key| (*key).to_owned()).collect());
        assert_eq!(names(&["a", "b", "a"]), ["a", "b", "a~1"]);
        assert_eq!(names(&["a", "new", "b", "a"]), ["a", "new", "b", "a~1"]);
    }

    #[test]
    fn a_made_name_is_never_the_key_of_another_item() {
        let names = |keys: &[&str]| unique(keys.iter().map(|key| (*key).to_owned()).collect());
        assert_eq!(names(&["a", "a", "a~1"]), ["a", "a~2", "a~1"]);
        assert_eq!(names(&["a~1", "a", "a", "a"]), ["a~1", "a", "a~2", "a~3"]);
        let doubled = names(&["a", "a", "a~1", "a~1", "a~1~1", "a"]);
        assert_eq!(doubled, ["a", "a~2", "a~1", "a~1~2", "a~1~1", "a~3"]);
    }

    #[test]
    fn the_keys_of_runs_and_logs_are_apart() {
        let keys = ["x", "notes: x", "run\u{1f}x", "run\u{1f}notes: x", ""];
        let mut stored: Vec<_> = keys.map(|key| run_key(key.to_owned())).into();
        stored.extend(["x", "notes: x", "run\u{1f}x", ""].map(log_key));
        let all = stored.len();
        stored.sort_unstable();
        stored.dedup();
        assert_eq!(stored.len(), all, "{stored:?}");
        // Stores keep these.
        assert_eq!(run_key("2026-07-01".to_owned()), "2026-07-01");
        assert_eq!(log_key("classes"), "notes: classes");
    }

    #[test]
    fn an_input_is_named_by_what_it_means() {
        let same = digest(r#"{"a":1,"b":[2.0]}"#).unwrap();
        assert_eq!(digest(r#"{"b":[2],"a":1.0}"#).unwrap(), same);
        assert_ne!(digest(r#"{"b":[2],"a":2}"#).unwrap(), same);
        // Stores keep these: printf '"river"' | sha256sum | cut -c1-32
        assert_eq!(
            digest("\"river\"").unwrap(),
            "ae274f67c7461b99981eb34dd01761d8"
        );
    }
}
