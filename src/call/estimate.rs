//! [`Estimator`]: the tokens and the time that a call will need, learned from replies. [`TokenCounter`] counts prompts.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::deployments::Deployments;
use super::scope::Scope;
use crate::error::{Error, ErrorKind};
use crate::provider::OutputCharge;
use crate::request::Request;
use crate::sync::Mutex;
use crate::usage::Usage;

/// Output tokens assumed for a request that does not limit them, until there are enough replies.
const ASSUMED_OUTPUT_TOKENS: u64 = 512;
/// The number of values that are kept for each label.
const REMEMBERED: usize = 64;
/// The number of values that a quantile needs.
const ENOUGH: usize = 8;
/// The number of first calls whose answers are all learned from.
const ALL_SAMPLED: u64 = 1_024;
/// Of the later calls, one in this number: quantiles need no more.
const SAMPLED: u64 = 8;
/// The least number of labels that are kept apart: those that were answered last.
const RECENT_LABELS: usize = 1_024;
/// Older latencies are ignored: providers have slow hours.
const LATENCIES_LAST: Duration = Duration::from_secs(10 * 60);

/// Counts the tokens of a prompt, for the limits on input tokens. Closures implement it.
///
/// Without one, [`Request::estimated_input_tokens`] is used: four bytes to a token. After each reply, the lane replaces
/// the estimate by the provider's count, so a counter need not be exact. It is worth its time where prompts are long and
/// far from prose.
///
/// ```
/// use throughline::{Context, Request, testing::Scripted};
///
/// // Any tokenizer fits in here.
/// let words = |request: &Request| {
///     let words = request.messages.iter().map(|m| m.content.split_whitespace().count());
///     words.sum::<usize>() as u64 * 4 / 3
/// };
/// let cx = Context::builder(Scripted::new()).token_counter(words).build();
/// # let _ = cx;
/// ```
pub trait TokenCounter: Send + Sync + 'static {
    /// Returns the tokens of the whole prompt. It is called once for each request, and for a request with a typed reply
    /// once for each deployment. It runs on the path of the call and must not block.
    fn count(&self, request: &Request) -> u64;
}

impl<F: Fn(&Request) -> u64 + Send + Sync + 'static> TokenCounter for F {
    fn count(&self, request: &Request) -> u64 {
        self(request)
    }
}

/// The input tokens of one request at each deployment.
#[derive(Debug, Clone, Default)]
pub(super) struct InputTokens {
    request: u64,
    /// For each deployment, if its form of the request depends on the deployment.
    adapted: Vec<u64>,
}

impl InputTokens {
    /// Returns the tokens of the request as the caller made it.
    pub(super) fn of_request(&self) -> u64 {
        self.request
    }

    /// Returns the tokens of the request in the form for the deployment with this index.
    pub(super) fn at(&self, index: usize) -> u64 {
        self.adapted.get(index).copied().unwrap_or(self.request)
    }
}

/// The last values of a series, in order of age and of size: every call asks for a quantile, which is one look at the
/// sorted values.
#[derive(Debug, Default)]
struct Recent {
    by_age: VecDeque<u64>,
    by_size: Vec<u64>,
}

impl Recent {
    fn add(&mut self, value: u64) {
        let place = |sizes: &[u64], value| sizes.partition_point(|other| *other < value);
        if self.by_age.len() == REMEMBERED
            && let Some(oldest) = self.by_age.pop_front()
        {
            self.by_size.remove(place(&self.by_size, oldest));
        }
        self.by_age.push_back(value);
        self.by_size.insert(place(&self.by_size, value), value);
    }

    /// Returns the quantile of this part (0..1) of the values; `None` while there are too few.
    fn quantile(&self, part: f64) -> Option<u64> {
        let len = self.by_size.len();
        let nth = ((len as f64 * part).ceil() as usize).clamp(1, len.max(1)) - 1;
        (len >= ENOUGH).then(|| self.by_size[nth])
    }
}

/// The latencies of the last calls, each with the time at which the call ended.
#[derive(Debug, Default)]
struct Latencies(VecDeque<(Instant, Duration)>);

impl Latencies {
    fn add(&mut self, now: Instant, latency: Duration) {
        if self.0.len() == REMEMBERED {
            self.0.pop_front();
        }
        self.0.push_back((now, latency));
    }

    fn quantile(&self, now: Instant, part: f64) -> Option<Duration> {
        let recent = |ended: Instant| now.saturating_duration_since(ended) <= LATENCIES_LAST;
        let recent = self.0.iter().filter(|(ended, _)| recent(*ended));
        let mut latencies: Vec<_> = recent.map(|(_, latency)| *latency).collect();
        latencies.sort_unstable();
        let nth = (latencies.len() as f64 * part).ceil() as usize;
        (latencies.len() >= ENOUGH).then(|| latencies[nth.max(1) - 1])
    }
}

/// The statistics of the calls under the same labels.
#[derive(Debug, Default)]
struct Label {
    outputs: Recent,
    latencies: Latencies,
}

/// The statistics by labels. Labels that were not answered for the longest time are dropped: when `recent` is full, it
/// becomes `older`, and a label in `older` moves back when one of its calls is answered.
#[derive(Debug, Default)]
struct Labels {
    recent: BTreeMap<u64, Label>,
    older: BTreeMap<u64, Label>,
    /// For labels with too few values of their own.
    all_outputs: Recent,
}

impl Labels {
    fn get(&self, labels: u64) -> Option<&Label> {
        self.recent.get(&labels).or_else(|| self.older.get(&labels))
    }

    fn learn(&mut self, labels: u64) -> &mut Label {
        if self.recent.len() >= RECENT_LABELS && !self.recent.contains_key(&labels) {
            self.older = std::mem::take(&mut self.recent);
        }
        let older = &mut self.older;
        let known = || older.remove(&labels).unwrap_or_default();
        self.recent.entry(labels).or_insert_with(known)
    }
}

/// Estimates the tokens and the latency of calls, and numbers them.
pub(super) struct Estimator {
    counter: Option<Box<dyn TokenCounter>>,
    labels: Mutex<Labels>,
    calls: AtomicU64,
}

impl Estimator {
    pub(super) fn new(counter: Option<Box<dyn TokenCounter>>) -> Self {
        Self {
            counter,
            labels: Mutex::default(),
            calls: AtomicU64::new(0),
        }
    }

    /// Returns the input tokens of a request at each deployment.
    pub(super) fn input(&self, request: &Request, deployments: &Deployments) -> InputTokens {
        if request.reply_type.is_none() {
            return InputTokens {
                request: self.count(request),
                adapted: Vec::new(),
            };
        }
        let adapted = deployments.iter().map(|it| it.adapt(request));
        let count = |it: Option<Box<Request>>| self.count(it.as_deref().unwrap_or(request));
        let adapted: Vec<_> = adapted.map(count).collect();
        InputTokens {
            request: adapted[0],
            adapted,
        }
    }

    fn count(&self, request: &Request) -> u64 {
        match &self.counter {
            Some(counter) => counter.count(request),
            None => request.estimated_input_tokens(),
        }
    }

    /// Returns the output tokens to reserve: `max_tokens` where the provider charges them, otherwise the 90th percentile of
    /// the answers under the same labels, and `max_tokens` at most.
    pub(super) fn output(&self, scope: &Scope, request: &Request, charge: OutputCharge) -> u64 {
        if let (OutputCharge::Reserved, Some(reserved)) = (charge, request.max_tokens) {
            return reserved;
        }
        let labels = self.labels.lock();
        let same = labels.get(scope.labels);
        let learned = same.and_then(|label| label.outputs.quantile(0.9));
        let learned = learned.or_else(|| labels.all_outputs.quantile(0.9));
        let most = request.max_tokens.unwrap_or(u64::MAX);
        learned.unwrap_or(ASSUMED_OUTPUT_TOKENS).min(most)
    }

    /// Returns the number of the next call, in the order in which calls are sent.
    pub(super) fn next_call(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// Numbers a call that is sent now, and returns whether its answer is to be learned from.
    pub(super) fn number(&self) -> (u64, bool) {
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        (
            number,
            number < ALL_SAMPLED || number.is_multiple_of(SAMPLED),
        )
    }

    pub(super) fn learn(&self, scope: &Scope, usage: Usage, sent: Instant) {
        let now = Instant::now();
        let mut labels = self.labels.lock();
        labels.all_outputs.add(usage.output_tokens);
        let label = labels.learn(scope.labels);
        label.outputs.add(usage.output_tokens);
        label
            .latencies
            .add(now, now.saturating_duration_since(sent));
    }

    /// Returns the quantile of the recent latencies under the same labels, if there are enough.
    pub(super) fn latency(&self, scope: &Scope, part: f64) -> Option<Duration> {
        let labels = self.labels.lock();
        labels
            .get(scope.labels)?
            .latencies
            .quantile(Instant::now(), part)
    }
}

/// Returns the tokens that an answered call takes of the rate limit: a provider that reserves
/// `max_tokens` gives nothing back for a shorter answer.
pub(super) fn charged(charge: OutputCharge, request: &Request, mut usage: Usage) -> Usage {
    if charge == OutputCharge::Reserved {
        let reserved = request.max_tokens.unwrap_or(0);
        usage.output_tokens = usage.output_tokens.max(reserved);
    }
    usage
}

/// Returns the tokens that a failed call takes of the rate limit; `None` if that is not known.
///
/// A request that is refused for its content was never admitted and takes no tokens. After any
/// other failure the reservation is spent, except for an answer that was not produced where only
/// produced tokens are charged.
pub(super) fn charged_for_failure(
    charge: OutputCharge,
    input_tokens: u64,
    error: &Error,
) -> Option<Usage> {
    match (error.billed(), error.kind(), charge) {
        (Some(false), ErrorKind::InvalidRequest, _) => Some(Usage::default()),
        (Some(false), _, OutputCharge::Produced) => Some(Usage::new(input_tokens, 0)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::call::scope::Bounds;

    fn scope() -> Arc<Scope> {
        let bounds = Bounds::new(None);
        Arc::new(Scope::root(Arc::new(bounds)))
    }

    fn answered(estimator: &Estimator, scope: &Scope, outputs: impl Iterator<Item = u64>) {
        for output in outputs {
            let sent = Instant::now() - Duration::from_secs(output);
            estimator.learn(scope, Usage::new(1, output), sent);
        }
    }

    #[test]
    fn a_provider_that_reserves_max_tokens_charges_them() {
        let estimator = Estimator::new(None);
        let scope = scope();
        let charge = OutputCharge::Reserved;
        answered(&estimator, &scope, 1..=20);
        let request = Request::new("a").max_tokens(900);
        assert_eq!(estimator.output(&scope, &request, charge), 900);
        let usage = charged(charge, &request, Usage::new(1, 5));
        assert_eq!(usage.output_tokens, 900);
        let failed = Error::new(ErrorKind::Unavailable, "500");
        assert_eq!(charged_for_failure(charge, 1, &failed), None);
    }

    #[test]
    fn an_invalid_request_is_charged_no_tokens() {
        let refused = Error::new(ErrorKind::InvalidRequest, "max_tokens is too large");
        let billed = refused.clone().with_billed(Some(true));
        for charge in [OutputCharge::Reserved, OutputCharge::Produced] {
            let charged = charged_for_failure(charge, 7, &refused);
            assert_eq!(charged, Some(Usage::default()));
            assert_eq!(charged_for_failure(charge, 7, &billed), None);
        }
    }

    #[test]
    fn output_is_learned_by_label_and_never_above_max_tokens() {
        let estimator = Estimator::new(None);
        let root = scope();
        let short = Scope::item(&root, "short".into(), 0, None, 0);
        let other = Scope::item(&root, "short".into(), 7, Some("key".into()), 0);
        let long = Scope::item(&root, "long".into(), 0, None, 0);
        answered(&estimator, &short, 1..=7);
        let request = Request::new("a");
        let charge = OutputCharge::Produced;
        let output = |scope: &Scope, request| estimator.output(scope, request, charge);
        assert_eq!(output(&short, &request), ASSUMED_OUTPUT_TOKENS, "too few");
        answered(&estimator, &short, 8..=20);
        answered(&estimator, &long, (1..=200).map(|n| n * 10));
        assert_eq!(
            output(&other, &request),
            18,
            "keys and indices are one label"
        );
        assert!(output(&long, &request) >= 1_900, "the last 64 count");
        assert_eq!(output(&long, &Request::new("a").max_tokens(50)), 50);
        let failed = Error::new(ErrorKind::Unavailable, "500");
        let free = charged_for_failure(charge, 7, &failed);
        assert_eq!(free, Some(Usage::new(7, 0)));
        let lost = Error::new(ErrorKind::Connection, "reset");
        assert_eq!(charged_for_failure(charge, 7, &lost), None);
    }

    #[tokio::test(start_paused = true)]
    async fn latencies_are_kept_by_label_and_for_the_last_minutes() {
        let estimator = Estimator::new(None);
        let root = scope();
        let label = |label: &str| Scope::child(&root, label.into(), Arc::new(Bounds::new(None)));
        let (slow, fast) = (label("slow"), label("fast"));
        tokio::time::advance(Duration::from_secs(100)).await;
        answered(&estimator, &slow, 1..=7);
        assert_eq!(estimator.latency(&slow, 0.5), None, "too few");
        answered(&estimator, &slow, 8..=9);
        let seconds = |part| estimator.latency(&slow, part).map(|it| it.as_secs());
        assert_eq!((seconds(0.5), seconds(0.1)), (Some(5), Some(1)));
        assert_eq!(estimator.latency(&fast, 0.5), None);
        tokio::time::advance(LATENCIES_LAST + Duration::from_secs(1)).await;
        assert_eq!(seconds(0.5), None, "long ago");
    }

    #[test]
    fn many_labels_do_not_displace_the_estimates_of_a_label_in_use() {
        let estimator = Estimator::new(None);
        let root = scope();
        let label = |n: u32| Scope::item(&root, format!("user-{n}").into(), 0, None, 0);
        (0..10_000).for_each(|n| answered(&estimator, &label(n), [20].into_iter()));
        let output =
            |label: &Scope| estimator.output(label, &Request::new("a"), OutputCharge::Produced);
        assert_eq!(
            output(&label(10_000)),
            20,
            "that of all labels, for a label without values"
        );
        let work = label(10_001);
        answered(&estimator, &work, [7; 64].into_iter());
        for n in 0..10_000 {
            // A label in use is kept although many labels come once.
            answered(&estimator, &label(20_000 + n), [20].into_iter());
            if n % 100 == 0 {
                answered(&estimator, &work, [7].into_iter());
            }
        }
        assert_eq!(output(&work), 7);
        let labels = estimator.labels.lock();
        assert!(labels.recent.len() + labels.older.len() <= 2 * RECENT_LABELS);
    }
}
