//! [`Submit`]: the submission of a run, and the names of its items.

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
use crate::runs::quota::SubmissionQuota;
use crate::store::{MemoKey, NewItem, NewRun, RunId, Store};

/// The data in [`Run::spec`](crate::store::Run::spec).
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Spec {
    /// Whether the run ignores stored replies and keeps its own for itself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) fresh: bool,
    /// The deadline in milliseconds since 1970: a time of day, because it outlives the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) until: Option<u64>,
}

impl Spec {
    /// Returns the time to the deadline, zero if it has passed.
    pub(crate) fn left(&self) -> Option<Duration> {
        // A time that overflows the clock never comes.
        let until = UNIX_EPOCH.checked_add(Duration::from_millis(self.until?))?;
        Some(until.duration_since(SystemTime::now()).unwrap_or_default())
    }
}

type Key<I> = Box<dyn Fn(&I) -> String + Send>;

/// A run that is submitted when it is awaited, which returns its id ([`Runner::submit`](super::Runner::submit)).
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
/// If the future is dropped, the run may or may not have been created. An [idempotency key](Self::idempotency_key) makes
/// submitting it again harmless.
#[must_use = "a run is submitted when it is awaited"]
pub struct Submit<I> {
    store: Arc<dyn Store>,
    run: NewRun,
    inputs: Vec<I>,
    key: Option<Key<I>>,
    spec: Spec,
    timeout: Option<Duration>,
    only_for: Option<Arc<str>>,
    quota: Option<Arc<SubmissionQuota>>,
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
            quota: None,
            refusal: None,
        }
    }

    /// Makes the submission fail with this error, for a runner that must not submit.
    pub(super) fn refused_by(mut self, refusal: Option<Error>) -> Self {
        self.refusal = refusal;
        self
    }

    /// Counts the submission in the quota of its tenant.
    pub(super) fn within(mut self, quota: Option<Arc<SubmissionQuota>>) -> Self {
        self.quota = quota;
        self
    }

    /// Restricts the submission to one tenant.
    pub(super) fn only_for(mut self, tenant: Option<Arc<str>>) -> Self {
        if let Some(tenant) = &tenant {
            self.run.tenant = tenant.to_string();
        }
        self.only_for = tenant;
        self
    }

    /// Sets the function that names items. Replies are stored under the name of the item, so that a later run of the same
    /// pipeline and tenant replays them: choose a name that stays the same when the input is edited. Of several items with
    /// one key, the second is named `key~1`, the third `key~2`, and so on, without names that other items have as keys.
    ///
    /// Unless set, the name is a digest of the serialised input.
    pub fn key(mut self, f: impl Fn(&I) -> String + Send + 'static) -> Self {
        self.key = Some(Box::new(f));
        self
    }

    /// Sets the tenant; the empty name unless set. Tenants share workers fairly and share no replies.
    pub fn tenant(mut self, tenant: impl Into<String>) -> Self {
        self.run.tenant = tenant.into();
        self
    }

    /// Sets a key that makes the submission idempotent: with a key that the tenant has used before, the earlier run is
    /// returned, even if the rest differs.
    pub fn idempotency_key(mut self, key: impl Into<String>) -> Self {
        self.run.idempotency_key = Some(run_key(key.into()));
        self
    }

    /// Sets the priority among the items of the tenant, lowest first; 0 unless set.
    pub fn priority(mut self, priority: i32) -> Self {
        self.run.priority = priority;
        self
    }

    /// Sets the number of times that a worker may die while it holds only one item before that item fails; 3 unless set. The
    /// death of a worker that holds several items counts for none of them; they are retried beside fewer others
    /// ([`Handling`](crate::store::Handling)).
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.run.max_attempts = attempts;
        self
    }

    /// Ignores the replies of earlier runs. The replies of this run are still never paid for twice.
    pub fn fresh(mut self) -> Self {
        self.spec.fresh = true;
        self
    }

    /// Sets the deadline of the run, counted from its submission; none unless set. After the deadline no call is sent for the
    /// run and calls in flight are dropped. Open items fail with [`ErrorKind::DeadlineExceeded`] as soon as a worker
    /// claims them. [`retry_failed`](crate::Runner::retry_failed) does not extend the deadline.
    ///
    /// Submitter and workers read the time of day on their own machines.
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
        // Last, so that a run that cannot be submitted is not counted.
        if let Some(quota) = &self.quota {
            quota.take(&self.run.tenant)?;
        }
        Ok(self.store.create_run(self.run).await?.run)
    }
}

/// The prefix of the keys of logs. Runs and logs share the idempotency keys of the store.
const LOG: &str = "notes: ";
/// The prefix of the keys of runs that would otherwise begin like the key of a log.
const RUN: &str = "run\u{1f}";

/// Returns the idempotency key of a run in the store. Different keys stay different, and most are unchanged, because
/// existing stores contain them.
fn run_key(key: String) -> String {
    match key.starts_with(LOG) || key.starts_with(RUN) {
        true => format!("{RUN}{key}"),
        false => key,
    }
}

/// Returns the idempotency key of a log in the store.
pub(super) fn log_key(name: &str) -> String {
    format!("{LOG}{name}")
}

fn unusable(index: usize, why: &str) -> Error {
    let message = format!("input {index} cannot be written as JSON: {why}");
    Error::new(ErrorKind::Config, message)
}

/// Returns the name of an input without a key. It does not depend on the order of the fields of an object.
fn digest(text: &str) -> Result<String> {
    let mut canonical = String::with_capacity(text.len());
    write_canonical(&serde_json::from_str::<Value>(text)?, &mut canonical);
    let mut digest = MemoKey::new(Sha256::digest(canonical.as_bytes()).into()).to_string();
    // Half of the digits, 128 bits, are enough without an attacker.
    digest.truncate(32);
    Ok(digest)
}

/// Returns a unique name for each item. The first item with a key is named by it. The others are numbered among
/// themselves, so that items with other keys do not change their names.
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
    fn an_inserted_input_does_not_rename_others() {
        let names = |keys: &[&str]| unique(keys.iter().map(|key| (*key).to_owned()).collect());
        assert_eq!(names(&["a", "b", "a"]), ["a", "b", "a~1"]);
        assert_eq!(names(&["a", "new", "b", "a"]), ["a", "new", "b", "a~1"]);
    }

    #[test]
    fn a_numbered_name_is_never_the_key_of_another_item() {
        let names = |keys: &[&str]| unique(keys.iter().map(|key| (*key).to_owned()).collect());
        assert_eq!(names(&["a", "a", "a~1"]), ["a", "a~2", "a~1"]);
        assert_eq!(names(&["a~1", "a", "a", "a"]), ["a~1", "a", "a~2", "a~3"]);
        let doubled = names(&["a", "a", "a~1", "a~1", "a~1~1", "a"]);
        assert_eq!(doubled, ["a", "a~2", "a~1", "a~1~2", "a~1~1", "a~3"]);
    }

    #[test]
    fn the_keys_of_runs_and_logs_never_collide() {
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
    fn the_name_of_an_input_does_not_depend_on_the_order_of_its_fields() {
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
