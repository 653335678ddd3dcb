//! One request on its way to a provider and back.
//!
//! # Words
//!
//! - A *request* is one prompt of the caller. It ends with one reply or one error.
//! - An *attempt* is one call to the provider for a request. Failed attempts are limited by [`Retry`].
//! - A *refused attempt* was refused by the rate limit. It does not count against that limit.
//!
//! "A call" without further words is a request in [`Tally::calls`], `Event::CallFailed` and the log line "call failed". In
//! `CallStarted`, `CallSucceeded`, `CallThrottled`, `CallRetried`, `call_timeout` and everything about permits, it is an
//! attempt.
//!
//! # The layers of a call
//!
//! ```text
//! Context::generate, Context::stream
//!     │
//!  memo       Is the reply stored already, or in flight for another caller?
//!     │
//!  retry      Makes one attempt after the other until one is answered or the request has failed for good.
//!     │
//!  admit      Chooses a deployment and waits for a permit of its lane.
//!     │
//!  attempt    Makes one provider call: deadline, cancellation, span, tally, events.
//!     │
//! Provider::generate, or `stream` for a caller that reads along
//! ```
//!
//! Each layer is a function `call(&mut Call) -> Result<Reply>` in the file of its name, and calls the next one. The order
//! matters. A retry *around* a call with a permit would hold the permit while it waits, and starve the others; a second
//! retry layer *below* would multiply the attempts. A request is adapted to the capabilities of its deployment in the
//! attempt, when the deployment has been chosen.
//!
//! The other files are used by the layers:
//!
//! | File | Contents |
//! |---|---|
//! | `scope` | the place of a call in the tree of work: labels, bounds (deadline, cancellation), tally, memo namespace |
//! | `entry` | the key under which the reply to a request is stored, and the intent of its call |
//! | `retry_policy`, `retry_budget` | [`Retry`], and the retries that all calls of a context may make together |
//! | `failures` | the meaning of a failed call: for the request, for its deployment, for the account |
//! | `deployments` | the deployments of a context and the choice between them |
//! | `estimate`, `tiktoken` | the tokens that a call will need |
//! | `delta_sender` | passes the pieces of a streamed reply on to the caller |
//!
//! The page on [`timeouts`](crate::timeouts) lists every timeout of these layers.

mod admit;
mod attempt;
mod delta_sender;
mod deployments;
mod entry;
mod estimate;
mod failures;
pub(crate) mod memo;
mod retry;
mod retry_budget;
mod retry_policy;
pub(crate) mod scope;
#[cfg(feature = "tiktoken")]
mod tiktoken;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

pub(crate) use self::delta_sender::DeltaSender;
pub use self::deployments::Deployment;
pub(crate) use self::deployments::{Deployments, FALLBACK_AFTER};
#[cfg(feature = "structured")]
pub(crate) use self::entry::FailedEntry;
pub use self::estimate::TokenCounter;
pub use self::retry_policy::Retry;
pub use self::scope::Tally;
#[cfg(feature = "tiktoken")]
pub use self::tiktoken::Tiktoken;

use self::deployments::{DeploymentPermit, Route};
use self::entry::MemoEntry;
use self::estimate::{Estimator, InputTokens};
use self::failures::{CallEnd, Health, History, PoisonDetector, Profile};
use self::memo::Memo;
use self::retry_budget::RetryBudget;
use self::scope::Scope;
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, Observers};
use crate::request::{Reply, Request};

/// The parts that all calls of a context share.
pub(crate) struct CallStack {
    deployments: Deployments,
    estimator: Estimator,
    retry: Retry,
    budget: RetryBudget,
    call_timeout: Duration,
    observers: Arc<Observers>,
    /// The number of answered calls: while it grows, the lane is not stalled.
    answers: AtomicU64,
    /// The health of each deployment, by its index.
    health: Vec<Health>,
    poison: PoisonDetector,
}

/// The optional parts of a call.
#[derive(Clone, Copy, Default)]
pub(crate) struct CallOptions<'a> {
    /// The receiver of the reply while it is being written.
    pub(crate) deltas: Option<&'a DeltaSender>,
    /// Takes the memo entry of the call if it fails, for a caller that can use a part of the reply.
    #[cfg(feature = "structured")]
    pub(crate) failed_entry: Option<&'a FailedEntry>,
}

/// One request on its way through the layers.
struct Call<'a> {
    stack: &'a CallStack,
    scope: &'a Scope,
    request: &'a Request,
    deltas: Option<&'a DeltaSender>,
    memo: Option<(&'a Memo, &'a MemoEntry)>,
    input: InputTokens,
    /// The place of the call in the queues, and the deployments at which it has failed.
    route: Route,
    /// The permit of the attempt that is being made or has just failed.
    permit: Option<DeploymentPermit<'a>>,
    /// The deployment of that attempt.
    deployment: &'a Deployment,
    /// The number of that attempt among all calls of the context, in the order in which they are sent.
    number: u64,
    /// The time at which it was sent, if an observer or the estimator needs it.
    sent_at: Option<Instant>,
    /// The failed attempts so far.
    attempts: u32,
    /// In a box that most calls do not need, because most are answered at the first attempt.
    history: Option<Box<History<'a>>>,
    was_sent: bool,
}

impl CallStack {
    pub(crate) fn new(
        deployments: Deployments,
        counter: Option<Box<dyn TokenCounter>>,
        retry: Retry,
        call_timeout: Duration,
        observers: Arc<Observers>,
    ) -> Self {
        let health = deployments.iter().map(|_| Health::default()).collect();
        Self {
            deployments,
            estimator: Estimator::new(counter),
            retry,
            budget: RetryBudget::new(),
            call_timeout,
            observers,
            answers: AtomicU64::new(0),
            health,
            poison: PoisonDetector::default(),
        }
    }

    pub(crate) fn deployments(&self) -> &Deployments {
        &self.deployments
    }

    /// Returns whether retries wait longer because a large part of the calls fails.
    pub(crate) fn is_budget_empty(&self) -> bool {
        self.budget.is_empty()
    }

    /// Sends a request through all layers.
    pub(crate) async fn generate(
        &self,
        memo: Option<&Memo>,
        scope: &Scope,
        request: &Request,
        options: CallOptions<'_>,
    ) -> Result<Reply> {
        // In a box, so that calls without a store are not as large as those with one.
        let entry = memo.and_then(|memo| MemoEntry::new(memo.journal(), scope, request));
        let entry = entry.map(Box::new);
        let mut call = Call {
            stack: self,
            scope,
            request,
            deltas: options.deltas,
            memo: memo.zip(entry.as_deref()),
            input: self.estimator.input(request, &self.deployments),
            route: self.deployments.route(),
            permit: None,
            deployment: self.deployments.first(),
            number: 0,
            sent_at: None,
            attempts: 0,
            history: None,
            was_sent: false,
        };
        let result = memo::call(&mut call).await;
        let was_sent = call.was_sent;
        drop(call);
        if was_sent && request.asks_again {
            scope.add(&Tally {
                reasked: 1,
                ..Tally::default()
            });
        }
        if let Err(error) = &result {
            self.report_failure(scope, was_sent, error);
            #[cfg(feature = "structured")]
            if let (Some(failed), Some(entry)) = (options.failed_entry, entry) {
                failed.put(entry);
            }
        }
        result
    }

    /// Counts and reports a request that has failed for good, after calls to the provider or without any.
    fn report_failure(&self, scope: &Scope, was_sent: bool, error: &Error) {
        scope.add(&Tally {
            calls: u64::from(was_sent),
            unsent: u64::from(!was_sent),
            ..Tally::default()
        });
        tracing::debug!(path = %scope, %error, "call failed");
        self.observers.tell(|| Event::CallFailed {
            path: scope.path(),
            error: error.clone(),
        });
    }

    fn answers(&self) -> u64 {
        self.answers.load(Ordering::Relaxed)
    }
}

impl<'a> Call<'a> {
    fn health(&self, permit: &DeploymentPermit<'_>) -> &'a Health {
        &self.stack.health[permit.index()]
    }

    /// Records the end of the attempt as evidence for the requests that are suspected to fail by themselves.
    fn record_end(&self, end: CallEnd) {
        let own = self.history.as_ref().and_then(|it| it.suspect_id());
        let (number, profile) = (self.number, self.profile());
        self.stack.poison.record(number, profile, end, own);
    }

    fn profile(&self) -> Profile {
        Profile::new(self.request, self.input.of_request())
    }

    /// Fails if an attempt after this wait could not be answered before the deadline.
    fn check_deadline_after(&self, wait: Duration, error: &Error) -> Result<()> {
        match self.time_left() {
            None => Ok(()),
            Some(left) if wait < left => Ok(()),
            Some(_) => {
                let message = "the next attempt would not be answered before the deadline";
                Err(Error::new(ErrorKind::DeadlineExceeded, message)
                    .with_billed(error.billed())
                    .with_source(error.clone()))
            }
        }
    }

    /// Returns how long the call may wait until its next attempt in order to be answered before the deadline, by the
    /// median of the latencies under its labels; `None` without a deadline.
    fn time_left(&self) -> Option<Duration> {
        let deadline = self.scope.bounds.deadline?;
        let latency = self.stack.estimator.latency(self.scope, 0.5);
        let left = deadline.saturating_duration_since(Instant::now());
        Some(left.saturating_sub(latency.unwrap_or_default()))
    }
}
