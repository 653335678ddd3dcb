//! Where in the work a call stands: its path, what bounds it, and what it has cost.

use std::fmt::{self, Write as _};
use std::future::poll_fn;
use std::ops::AddAssign;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::Duration;

use futures::poll;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

use crate::call::memo::Place;
use crate::error::{Error, ErrorKind, Result};
use crate::ratelimit::QueueKey;
use crate::request::Usage;

/// What some work has cost so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Tally {
    /// Requests that reached the provider, once or more often, and were answered or have failed for good.
    pub calls: u64,
    /// Requests that ended without anything being sent for them: the context was drained, cancelled or out of
    /// time before, the account is refused, or the same request of somebody else failed for both.
    #[serde(default)]
    pub unsent: u64,
    /// Calls that reached the provider, refused ones not counted.
    pub attempts: u64,
    /// Calls that the provider's rate limit refused. They are not attempts.
    pub throttled: u64,
    /// Attempts that a failed one had come before.
    #[serde(default)]
    pub retries: u64,
    /// Requests made once more because a reply could not be used: not the JSON that was asked
    /// for, cut, broken off. They are calls too; those that were answered out of the store are not counted here.
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

impl fmt::Display for Tally {
    /// `12 calls, 228 replayed, 1200 + 340 tokens; 2 retries, 1 ambiguous`: counters that are 0 are left out, but for
    /// the calls and the tokens.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Usage {
            input_tokens,
            output_tokens,
            ..
        } = self.usage;
        let calls = if self.calls == 1 { "call" } else { "calls" };
        write!(f, "{} {calls}", self.calls)?;
        for (count, name) in [(self.replayed, "replayed"), (self.unsent, "unsent")] {
            if count > 0 {
                write!(f, ", {count} {name}")?;
            }
        }
        write!(f, ", {input_tokens} + {output_tokens} tokens")?;
        let mut separator = "; ";
        for (count, name) in [
            (self.retries, "retries"),
            (self.reasked, "asked again"),
            (self.throttled, "throttled"),
            (self.overloaded, "overloaded"),
            (self.timed_out, "timed out"),
            (self.transient, "transient"),
            (self.failed, "failed"),
            (self.ambiguous, "ambiguous"),
        ] {
            if count > 0 {
                write!(f, "{separator}{count} {name}")?;
                separator = ", ";
            }
        }
        Ok(())
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.calls += other.calls;
        self.unsent += other.unsent;
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
    unsent: AtomicU64,
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
    fn pairs<'a>(&'a self, tally: &'a mut Tally) -> [(&'a AtomicU64, &'a mut u64); 16] {
        let usage = &mut tally.usage;
        [
            (&self.calls, &mut tally.calls),
            (&self.unsent, &mut tally.unsent),
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

/// What ends work early. Bounds form a tree: what ends one ends all below it.
pub(crate) struct Bounds {
    parent: Option<Arc<Bounds>>,
    /// Everything stops, calls in flight too. Made when it is first cancelled or waited for,
    /// because most items of a batch do neither.
    cancel: OnceLock<CancellationToken>,
    /// Nothing new is sent; calls in flight finish. Made like `cancel`.
    drain: OnceLock<CancellationToken>,
    pub(crate) deadline: Option<Instant>,
    unit: Arc<Unit>,
    /// Whether a token of this tree may be cancelled. To ask a token takes a lock, and most
    /// contexts never end anything.
    uneasy: Arc<AtomicBool>,
}

/// What the bounds of one unit of work know together: those of an item that a worker runs and
/// of everything below it.
#[derive(Default)]
struct Unit {
    /// Something was refused or cut short because of the two tokens: what came out of it need not
    /// be what would have come out of the whole.
    cut: AtomicBool,
    /// Inputs were left because `deadline` had passed.
    late: AtomicBool,
    deadline: Option<Instant>,
}

impl Bounds {
    /// Bounds that nobody else can end, or whoever has the token.
    pub(crate) fn new(token: Option<CancellationToken>) -> Self {
        let uneasy = Arc::new(AtomicBool::new(token.is_some()));
        let cancel = token.unwrap_or_default();
        Self {
            parent: None,
            drain: cancel.child_token().into(),
            cancel: cancel.into(),
            deadline: None,
            unit: Arc::default(),
            uneasy,
        }
    }

    /// Bounds below these that can be drawn tighter without touching these.
    pub(crate) fn child(self: &Arc<Self>) -> Self {
        Self {
            parent: Some(Arc::clone(self)),
            cancel: OnceLock::new(),
            drain: OnceLock::new(),
            deadline: self.deadline,
            unit: Arc::clone(&self.unit),
            uneasy: Arc::clone(&self.uneasy),
        }
    }

    /// Bounds below these that end at `deadline`, if that comes first.
    pub(crate) fn until(self: &Arc<Self>, deadline: Instant) -> Self {
        let mut child = self.child();
        child.deadline = Some(child.deadline.map_or(deadline, |ours| ours.min(deadline)));
        child
    }

    /// Makes these the bounds of a unit of work, which knows by itself whether it was cut short.
    pub(crate) fn into_unit(mut self) -> Self {
        self.unit = Arc::new(Unit {
            deadline: self.deadline,
            ..Unit::default()
        });
        self
    }

    /// Whether something in this unit of work was refused or cut short by cancelling or draining.
    pub(crate) fn was_cut(&self) -> bool {
        self.unit.cut.load(Ordering::Relaxed)
    }

    /// Whether a batch in this unit of work left inputs because the unit's deadline had passed.
    pub(crate) fn was_late(&self) -> bool {
        self.unit.late.load(Ordering::Relaxed)
    }

    /// Ends everything. What is cancelled drains too, so that one look at `drain` says
    /// whether anything may still start.
    pub(crate) fn cancel(&self) {
        self.uneasy.store(true, Ordering::Release);
        self.token(|bounds| &bounds.cancel).cancel();
        self.token(|bounds| &bounds.drain).cancel();
    }

    /// Ends what has not been sent.
    pub(crate) fn drain(&self) {
        self.uneasy.store(true, Ordering::Release);
        self.token(|bounds| &bounds.drain).cancel();
    }

    /// Whether everything was ended, here or above.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.has_ended(|bounds| &bounds.cancel)
    }

    /// Whether nothing new may be sent, because of a call here or above.
    pub(crate) fn is_draining(&self) -> bool {
        self.has_ended(|bounds| &bounds.drain)
    }

    /// Waits until everything is ended.
    pub(crate) fn cancelled(&self) -> WaitForCancellationFuture<'_> {
        self.token(|bounds| &bounds.cancel).cancelled()
    }

    /// Waits until nothing new may be sent.
    pub(crate) fn drained(&self) -> WaitForCancellationFuture<'_> {
        self.token(|bounds| &bounds.drain).cancelled()
    }

    /// Waits until nothing new may start, for whatever reason.
    pub(crate) fn stopped(&self) -> impl Future<Output = ()> + Send + 'static {
        let drained = self.token(|bounds| &bounds.drain).clone().cancelled_owned();
        let deadline = self.deadline;
        async move {
            tokio::select! {
                () = drained => {}
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {}
            }
        }
    }

    /// Bounds whose token was never made were never ended themselves: those above decide.
    fn has_ended(&self, which: fn(&Self) -> &OnceLock<CancellationToken>) -> bool {
        let mut bounds = self;
        loop {
            match (which(bounds).get(), &bounds.parent) {
                (Some(token), _) => return token.is_cancelled(),
                (None, Some(parent)) => bounds = parent,
                (None, None) => return false,
            }
        }
    }

    /// The token, made if there is none yet, below those of all bounds above.
    fn token(&self, which: fn(&Self) -> &OnceLock<CancellationToken>) -> &CancellationToken {
        if let Some(token) = which(self).get() {
            return token;
        }
        let mut missing = vec![self];
        let mut bounds = self;
        let mut token = loop {
            let parent = bounds.parent.as_deref();
            bounds = parent.expect("the outermost bounds are made with their tokens");
            match which(bounds).get() {
                Some(token) => break token,
                None => missing.push(bounds),
            }
        };
        for bounds in missing.into_iter().rev() {
            token = which(bounds).get_or_init(|| token.child_token());
        }
        token
    }

    /// Whether new work may still start.
    pub(crate) fn check(&self) -> Result<()> {
        if self.uneasy.load(Ordering::Acquire) && self.is_draining() {
            self.unit.cut.store(true, Ordering::Relaxed);
            Err(Error::cancelled(if self.is_cancelled() {
                "the context was cancelled before the call was sent"
            } else {
                "the context is draining: nothing new is sent"
            }))
        } else if self.is_over() {
            Err(Error::new(
                ErrorKind::DeadlineExceeded,
                "the deadline passed before the call was sent",
            ))
        } else {
            Ok(())
        }
    }

    fn is_over(&self) -> bool {
        let deadline = self.deadline;
        deadline.is_some_and(|deadline| deadline <= Instant::now())
    }

    /// Why a batch takes no more inputs after `taken` of them, once [`stopped`](Self::stopped) is
    /// ready. The unit of work remembers that it was cut short.
    pub(crate) fn inputs_left(&self, taken: usize) -> Error {
        let (kind, why) = if self.is_draining() {
            self.unit.cut.store(true, Ordering::Relaxed);
            let why = match self.is_cancelled() {
                true => "the context was cancelled",
                false => "the context is draining",
            };
            (ErrorKind::Cancelled, why)
        } else {
            let unit = self.unit.deadline;
            if unit.is_some_and(|deadline| deadline <= Instant::now()) {
                self.unit.late.store(true, Ordering::Relaxed);
            }
            (ErrorKind::DeadlineExceeded, "the deadline passed")
        };
        let message = format!("{why}: the batch took {taken} of its inputs and left the others");
        Error::new(kind, message)
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
                () = self.drained() => None,
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
        // No moment is later than a limit of `Duration::MAX` from now.
        let end = Instant::now().checked_add(limit);
        let at = [end, self.deadline].into_iter().flatten().min();
        let error = tokio::select! {
            biased;
            () = self.cancelled() => {
                self.unit.cut.store(true, Ordering::Relaxed);
                Error::cancelled("cancelled while the call was in flight")
            }
            () = sleep_until(at.unwrap_or_else(Instant::now)), if at.is_some() => if at != end {
                let message = "the deadline passed while the call was in flight";
                Error::new(ErrorKind::DeadlineExceeded, message)
            } else {
                Error::new(ErrorKind::Timeout, format!("no reply within {limit:?}"))
            },
        };
        error.with_billed(None)
    }
}

/// Drops a chain of parents one by one: dropped by recursion, a long one would overflow the stack.
fn drop_chain<T>(parent: Option<Arc<T>>, next: fn(&mut T) -> Option<Arc<T>>) {
    let mut parent = parent;
    while let Some(mut last) = parent.and_then(Arc::into_inner) {
        parent = next(&mut last);
    }
}

impl Drop for Bounds {
    fn drop(&mut self) {
        drop_chain(self.parent.take(), |bounds| bounds.parent.take());
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
    pub(crate) who: QueueKey,
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
            who: QueueKey::default(),
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

    /// The scope of one item of a batch, with bounds of its own. `repeat` is how many items before it in
    /// the batch had the same key.
    #[inline]
    pub(crate) fn item(
        batch: &Arc<Self>,
        label: Arc<str>,
        index: usize,
        key: Option<Arc<str>>,
        repeat: u32,
    ) -> Self {
        let bounds = Arc::new(batch.bounds.child());
        let mut item = Self::child(batch, label, bounds);
        item.index = Some(index);
        item.key = key;
        if let Some(place) = &batch.place {
            let labels = batch.labels_here();
            let item_place = place.item(&labels, &item.label, index, item.key.as_deref(), repeat);
            item.place = Some(Arc::new(item_place));
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

    /// This scope and those above it, the innermost first.
    fn outwards(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |scope| scope.parent.as_deref())
    }

    /// The key of the innermost item that has one.
    pub(crate) fn item_key(&self) -> Option<&Arc<str>> {
        self.outwards().find_map(|scope| scope.key.as_ref())
    }

    pub(crate) fn path(&self) -> Arc<str> {
        self.to_string().into()
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        drop_chain(self.parent.take(), |scope| scope.parent.take());
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut scopes: Vec<_> = self.outwards().collect();
        scopes.reverse();
        let mut is_first = true;
        for scope in scopes {
            if !scope.label.is_empty() {
                if !is_first {
                    f.write_char('/')?;
                }
                f.write_str(&scope.label)?;
            }
            match (&scope.key, scope.index) {
                (Some(key), _) => write!(f, "[{key}]")?,
                (None, Some(index)) => write!(f, "[{index}]")?,
                (None, None) if scope.label.is_empty() => continue,
                (None, None) => {}
            }
            is_first = false;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested() -> (Arc<Scope>, Arc<Scope>) {
        let root = Arc::new(Scope::root(Arc::new(Bounds::new(None))));
        let item = Arc::new(Scope::item(&root, "plan".into(), 3, Some("k".into()), 0));
        let inner = Arc::new(Scope::item(&item, "etude".into(), 0, None, 0));
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

    #[test]
    fn a_tally_reads_as_a_line() {
        assert_eq!(Tally::default().to_string(), "0 calls, 0 + 0 tokens");
        let tally = Tally {
            calls: 12,
            replayed: 228,
            retries: 2,
            ambiguous: 1,
            usage: Usage::new(1200, 340),
            ..Tally::default()
        };
        let line = "12 calls, 228 replayed, 1200 + 340 tokens; 2 retries, 1 ambiguous";
        assert_eq!(tally.to_string(), line);
    }

    #[test]
    fn paths_have_a_slash_between_labels_whatever_is_in_between() {
        let root = Arc::new(Scope::root(Arc::new(Bounds::new(None))));
        let child = |parent: &Arc<Scope>, label: &str| {
            let bounds = Arc::new(parent.bounds.child());
            Arc::new(Scope::child(parent, label.into(), bounds))
        };
        let a = child(&root, "a");
        let b = child(&child(&child(&a, ""), ""), "b");
        assert_eq!(b.to_string(), "a/b");
        let week = Arc::new(Scope::item(&root, "week".into(), 0, None, 0));
        let day = Scope::item(&child(&week, ""), "day".into(), 0, None, 0);
        assert_eq!(day.to_string(), "week[0]/day[0]");
        let nameless = Scope::item(&a, "".into(), 3, None, 0);
        assert_eq!(nameless.to_string(), "a[3]");
    }

    #[tokio::test]
    async fn what_is_ended_below_ends_nothing_above_or_beside() {
        let root = Arc::new(Bounds::new(None));
        let (left, right) = (Arc::new(root.child()), Arc::new(root.child()));
        let below = Arc::new(Arc::new(left.child()).child());
        left.drain();
        assert!(left.is_draining() && below.is_draining() && !below.is_cancelled());
        assert!(!root.is_draining() && !right.is_draining());
        below.drained().await;
        let waits = right.drained();
        root.cancel();
        waits.await;
        assert!(right.is_cancelled() && below.is_cancelled() && below.check().is_err());
        // Made only afterwards.
        assert!(right.child().is_cancelled());
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
