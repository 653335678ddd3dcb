//! Where in the work a call stands: its path, what bounds it, and what it has cost.

use std::fmt::{self, Write as _};
use std::future::poll_fn;
use std::ops::AddAssign;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use futures::poll;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::error::{Error, ErrorKind, Result};
use crate::memo::Place;
use crate::pace::Who;
use crate::usage::Usage;

/// What some work has cost so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Tally {
    /// Requests that were answered or have failed for good.
    pub calls: u64,
    /// Calls that reached the provider, refused ones not counted.
    pub attempts: u64,
    /// Calls that the provider's rate limit refused. They are not attempts.
    pub throttled: u64,
    /// Attempts that a failed one had come before.
    #[serde(default)]
    pub retries: u64,
    /// Requests made once more because a reply could not be used: not the JSON that was asked
    /// for, cut, broken off. They are calls too.
    #[serde(default)]
    pub reasked: u64,
    /// Attempts that met an overloaded provider.
    #[serde(default)]
    pub overloaded: u64,
    /// Attempts that ran into one of their timeouts.
    #[serde(default)]
    pub timed_out: u64,
    /// Attempts that failed in another way that may pass: 5xx, a broken connection.
    #[serde(default)]
    pub transient: u64,
    /// Attempts that failed in a way that will not pass.
    #[serde(default)]
    pub failed: u64,
    /// Attempts that ended without anybody knowing whether they were paid for:
    /// a broken connection, a timeout, a cancelled call.
    pub ambiguous: u64,
    /// Requests that were answered out of the store: nothing was paid for them, and they count
    /// nowhere else.
    #[serde(default)]
    pub replayed: u64,
    /// The tokens of all answers that were paid for.
    pub usage: Usage,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.calls += other.calls;
        self.attempts += other.attempts;
        self.throttled += other.throttled;
        self.retries += other.retries;
        self.reasked += other.reasked;
        self.overloaded += other.overloaded;
        self.timed_out += other.timed_out;
        self.transient += other.transient;
        self.failed += other.failed;
        self.ambiguous += other.ambiguous;
        self.replayed += other.replayed;
        self.usage += other.usage;
    }
}

/// A [`Tally`] that many tasks add to.
#[derive(Default)]
struct Meter {
    calls: AtomicU64,
    attempts: AtomicU64,
    throttled: AtomicU64,
    retries: AtomicU64,
    reasked: AtomicU64,
    overloaded: AtomicU64,
    timed_out: AtomicU64,
    transient: AtomicU64,
    failed: AtomicU64,
    ambiguous: AtomicU64,
    replayed: AtomicU64,
    input_tokens: AtomicU64,
    output_tokens: AtomicU64,
    cached_input_tokens: AtomicU64,
    reasoning_tokens: AtomicU64,
}

impl Meter {
    fn pairs<'a>(&'a self, tally: &'a mut Tally) -> [(&'a AtomicU64, &'a mut u64); 15] {
        let usage = &mut tally.usage;
        [
            (&self.calls, &mut tally.calls),
            (&self.attempts, &mut tally.attempts),
            (&self.throttled, &mut tally.throttled),
            (&self.retries, &mut tally.retries),
            (&self.reasked, &mut tally.reasked),
            (&self.overloaded, &mut tally.overloaded),
            (&self.timed_out, &mut tally.timed_out),
            (&self.transient, &mut tally.transient),
            (&self.failed, &mut tally.failed),
            (&self.ambiguous, &mut tally.ambiguous),
            (&self.replayed, &mut tally.replayed),
            (&self.input_tokens, &mut usage.input_tokens),
            (&self.output_tokens, &mut usage.output_tokens),
            (&self.cached_input_tokens, &mut usage.cached_input_tokens),
            (&self.reasoning_tokens, &mut usage.reasoning_tokens),
        ]
    }

    fn add(&self, mut tally: Tally) {
        for (counter, amount) in self.pairs(&mut tally) {
            if *amount > 0 {
                counter.fetch_add(*amount, Ordering::Relaxed);
            }
        }
    }

    fn read(&self) -> Tally {
        let mut tally = Tally::default();
        for (counter, amount) in self.pairs(&mut tally) {
            *amount = counter.load(Ordering::Relaxed);
        }
        tally
    }
}

/// What ends work early.
#[derive(Clone)]
pub(crate) struct Bounds {
    /// Everything stops, calls in flight too.
    pub(crate) cancel: CancellationToken,
    /// Nothing new is sent; calls in flight finish.
    pub(crate) drain: CancellationToken,
    pub(crate) deadline: Option<Instant>,
    /// Whether something was refused or cut short because of the two tokens. Shared with all
    /// bounds below: what came out of it need not be what would have come out of the whole.
    cut: Arc<AtomicBool>,
    /// Whether a token of this tree may be cancelled. To ask a token takes a lock, and most
    /// contexts never end anything.
    uneasy: Arc<AtomicBool>,
}

impl Bounds {
    /// Bounds that nobody else can end, or whoever has the token.
    pub(crate) fn new(token: Option<CancellationToken>) -> Self {
        let uneasy = Arc::new(AtomicBool::new(token.is_some()));
        let cancel = token.unwrap_or_default();
        Self {
            drain: cancel.child_token(),
            cancel,
            deadline: None,
            cut: Arc::default(),
            uneasy,
        }
    }

    /// Bounds below these that know by themselves whether they cut something short.
    pub(crate) fn separate(&self) -> Self {
        Self {
            cut: Arc::default(),
            ..self.child()
        }
    }

    /// Whether something was refused or cut short by cancelling or draining.
    pub(crate) fn was_cut(&self) -> bool {
        self.cut.load(Ordering::Relaxed)
    }

    /// Ends everything. What is cancelled drains too, so that one look at `drain` says
    /// whether anything may still start.
    pub(crate) fn cancel(&self) {
        self.uneasy.store(true, Ordering::Release);
        self.cancel.cancel();
        self.drain.cancel();
    }

    /// Ends what has not been sent.
    pub(crate) fn drain(&self) {
        self.uneasy.store(true, Ordering::Release);
        self.drain.cancel();
    }

    /// Bounds that can be drawn tighter without touching these.
    pub(crate) fn child(&self) -> Self {
        Self {
            cancel: self.cancel.child_token(),
            drain: self.drain.child_token(),
            deadline: self.deadline,
            cut: Arc::clone(&self.cut),
            uneasy: Arc::clone(&self.uneasy),
        }
    }

    /// Whether new work may still start.
    pub(crate) fn check(&self) -> Result<()> {
        if self.uneasy.load(Ordering::Acquire) && self.drain.is_cancelled() {
            self.cut.store(true, Ordering::Relaxed);
            Err(Error::cancelled(if self.cancel.is_cancelled() {
                "the context was cancelled before the call was sent"
            } else {
                "the context is draining: nothing new is sent"
            }))
        } else if self
            .deadline
            .is_some_and(|deadline| deadline <= Instant::now())
        {
            Err(Error::new(
                ErrorKind::DeadlineExceeded,
                "the deadline passed before the call was sent",
            ))
        } else {
            Ok(())
        }
    }

    /// Waits for something that comes before a call is sent: cancel, drain and
    /// the deadline all end it, and nothing was paid.
    pub(crate) async fn before_send<F: Future>(&self, wait: F) -> Result<F::Output> {
        self.check()?;
        let mut wait = pin!(wait);
        if let Poll::Ready(done) = poll!(wait.as_mut()) {
            return Ok(done);
        }
        // In a box, so that the many calls that need not wait are not as large as this.
        let waited = Box::pin(async {
            tokio::select! {
                biased;
                () = self.drain.cancelled() => None,
                () = sleep_until(self.deadline.unwrap_or_else(Instant::now)), if self.deadline.is_some() => None,
                done = wait => Some(done),
            }
        });
        if let Some(done) = waited.await {
            return Ok(done);
        }
        Err(self.check().err().unwrap_or_else(|| Error::cancelled("")))
    }

    /// Runs a call that has been sent: cancel, the deadline and `limit` end it,
    /// and nobody can know whether it is paid for.
    pub(crate) async fn in_flight<T>(
        &self,
        limit: Duration,
        call: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let mut call = pin!(call);
        let mut end = None;
        poll_fn(|cx| {
            if let Poll::Ready(done) = call.as_mut().poll(cx) {
                return Poll::Ready(done);
            }
            // Only at need: a provider that answers at once (a cache, a test) arms no timer.
            let end = end.get_or_insert_with(|| Box::pin(self.ended(limit)));
            end.as_mut().poll(cx).map(Err)
        })
        .await
    }

    /// What ends a call in flight.
    async fn ended(&self, limit: Duration) -> Error {
        let end = Instant::now() + limit;
        let at = self.deadline.map_or(end, |deadline| deadline.min(end));
        let error = tokio::select! {
            biased;
            () = self.cancel.cancelled() => {
                self.cut.store(true, Ordering::Relaxed);
                Error::cancelled("cancelled while the call was in flight")
            }
            () = sleep_until(at) => if at < end {
                let message = "the deadline passed while the call was in flight";
                Error::new(ErrorKind::DeadlineExceeded, message)
            } else {
                Error::new(ErrorKind::Timeout, format!("no reply within {limit:?}"))
            },
        };
        error.with_billed(None)
    }
}

/// A place in the tree of work. What is added to its tally is added to its parents'.
pub(crate) struct Scope {
    parent: Option<Arc<Scope>>,
    pub(crate) label: Arc<str>,
    /// A number for the labels that lead here, keys and indices left out.
    pub(crate) labels: u64,
    index: Option<usize>,
    pub(crate) key: Option<Arc<str>>,
    pub(crate) bounds: Arc<Bounds>,
    /// In which line its calls wait.
    pub(crate) who: Who,
    /// What replies are remembered under here, where there is a store.
    pub(crate) place: Option<Arc<Place>>,
    meter: Meter,
}

impl Scope {
    pub(crate) fn root(bounds: Arc<Bounds>) -> Self {
        Self {
            parent: None,
            label: "".into(),
            labels: 0xcbf2_9ce4_8422_2325,
            index: None,
            key: None,
            bounds,
            who: Who::default(),
            place: None,
            meter: Meter::default(),
        }
    }

    #[inline]
    pub(crate) fn child(parent: &Arc<Self>, label: Arc<str>, bounds: Arc<Bounds>) -> Self {
        Self {
            parent: Some(Arc::clone(parent)),
            // FNV-1a: every item of a batch comes through here.
            labels: label.bytes().fold(parent.labels, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            }),
            label,
            index: None,
            key: None,
            bounds,
            who: parent.who,
            place: parent.place.clone(),
            meter: Meter::default(),
        }
    }

    /// The scope of one item of a batch.
    #[inline]
    pub(crate) fn item(
        batch: &Arc<Self>,
        label: Arc<str>,
        index: usize,
        key: Option<Arc<str>>,
    ) -> Self {
        let mut item = Self {
            index: Some(index),
            key,
            ..Self::child(batch, label, Arc::clone(&batch.bounds))
        };
        if let Some(place) = &batch.place {
            item.place = Some(place.item(&batch.labels_here(), &item.label, index, &item.key));
        }
        item
    }

    /// The labels between the place whose replies are remembered together and here.
    pub(crate) fn labels_here(&self) -> Vec<&Arc<str>> {
        let mut labels = Vec::new();
        let mut scope = self;
        // The label of the scope that opens a place is in the place's own name.
        while let Some(parent) = scope.parent.as_deref().filter(|parent| {
            let places = parent.place.as_ref().zip(scope.place.as_ref());
            places.is_some_and(|(above, here)| Arc::ptr_eq(above, here))
        }) {
            labels.extend(Some(&scope.label).filter(|label| !label.is_empty()));
            scope = parent;
        }
        labels.reverse();
        labels
    }

    pub(crate) fn add(&self, tally: Tally) {
        let mut scope = self;
        loop {
            scope.meter.add(tally);
            match &scope.parent {
                Some(parent) => scope = parent,
                None => break,
            }
        }
    }

    pub(crate) fn tally(&self) -> Tally {
        self.meter.read()
    }

    /// The key of the innermost item that has one.
    pub(crate) fn item_key(&self) -> Option<&Arc<str>> {
        self.key
            .as_ref()
            .or_else(|| self.parent.as_ref()?.item_key())
    }

    pub(crate) fn path(&self) -> Arc<str> {
        self.to_string().into()
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = &self.parent {
            fmt::Display::fmt(parent, f)?;
            if !parent.label.is_empty() && !self.label.is_empty() {
                f.write_char('/')?;
            }
        }
        f.write_str(&self.label)?;
        match (&self.key, self.index) {
            (Some(key), _) => write!(f, "[{key}]"),
            (None, Some(index)) => write!(f, "[{index}]"),
            (None, None) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested() -> (Arc<Scope>, Arc<Scope>) {
        let root = Arc::new(Scope::root(Arc::new(Bounds::new(None))));
        let item = Arc::new(Scope::item(&root, "plan".into(), 3, Some("k".into())));
        let inner = Arc::new(Scope::item(&item, "etude".into(), 0, None));
        (root, inner)
    }

    #[test]
    fn paths_name_labels_keys_and_indices() {
        let (root, inner) = nested();
        assert_eq!(root.to_string(), "");
        assert_eq!(inner.to_string(), "plan[k]/etude[0]");
        assert_eq!(inner.item_key().map(|key| &**key), Some("k"));
    }

    #[test]
    fn tallies_add_up_to_the_root() {
        let (root, inner) = nested();
        let cost = Tally {
            attempts: 2,
            usage: Usage::new(5, 7),
            ..Tally::default()
        };
        inner.add(cost);
        root.add(cost);
        assert_eq!(inner.tally(), cost);
        assert_eq!(root.tally().attempts, 4);
        assert_eq!(root.tally().usage, Usage::new(10, 14));
    }

    #[tokio::test(start_paused = true)]
    async fn draining_stops_what_waits_but_not_what_is_in_flight() {
        let bounds = Bounds::new(None);
        bounds.drain();
        let waiting = bounds.before_send(std::future::ready(())).await;
        assert!(waiting.unwrap_err().is_cancelled());
        let call = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Ok(())
        };
        assert!(bounds.in_flight(Duration::from_secs(2), call).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn the_nearer_of_deadline_and_limit_ends_a_call() {
        let mut bounds = Bounds::new(None);
        let forever = || std::future::pending::<Result<()>>();
        let limit = Duration::from_secs(2);
        let error = bounds.in_flight(limit, forever()).await.unwrap_err();
        assert!(error.is_timeout() && error.billed().is_none());
        bounds.deadline = Some(Instant::now() + Duration::from_secs(1));
        let started = Instant::now();
        let error = bounds.in_flight(limit, forever()).await.unwrap_err();
        assert!(error.is_deadline_exceeded());
        assert_eq!(started.elapsed(), Duration::from_secs(1));
        let error = bounds.before_send(forever()).await.unwrap_err();
        assert!(error.is_deadline_exceeded() && error.billed() == Some(false));
    }
}
