//! One admitted call: a guard that settles with the account when the call ends or is dropped.

use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, stream};
use tokio::time::Instant;

use super::Inner;
use super::ledger::Ended;
use super::model::{Fault, Plan};
use crate::error::{Error, ErrorKind, Result};
use crate::request::RequestDigest;
use crate::request::reply::{Delta, Reply, ReplyStream};
use crate::usage::{RateSnapshot, Usage};

/// A call in flight. Dropping it before it is settled cancels it.
pub(super) struct Call {
    pub(super) inner: Arc<Inner>,
    /// The key in the ledger.
    pub(super) key: Arc<str>,
    pub(super) digest: RequestDigest,
    pub(super) input_tokens: u64,
    /// Output tokens that were charged on admission.
    pub(super) reserved: u64,
    pub(super) model: String,
    pub(super) request_id: String,
    pub(super) admitted: Instant,
    pub(super) plan: Plan,
    pub(super) settled: bool,
}

impl Call {
    /// Waits for a fault that precedes the answer.
    pub(super) async fn begin(mut self) -> Result<Self> {
        if let Some(kind) = self.plan.failure {
            self.until(self.plan.total).await;
            let rate = self.settle(None)?;
            return Err(Error::new(kind, "it is made to fail").with_rate(rate));
        }
        let kind = match self.plan.fault {
            None | Some(Fault::Cut) => return Ok(self),
            Some(Fault::Hang) => return std::future::pending().await,
            Some(Fault::Error) => ErrorKind::Unavailable,
            Some(Fault::Reset) => ErrorKind::Connection,
            Some(Fault::Overload) => ErrorKind::Overloaded,
            Some(Fault::Throttle) => ErrorKind::Throttled,
        };
        self.until(self.plan.fault_at).await;
        let rate = self.settle(None)?;
        let error = Error::new(kind, "a fault of the simulation");
        // A broken connection has neither a status nor headers.
        Err(match kind {
            ErrorKind::Connection => error,
            ErrorKind::Overloaded => error.with_http_status(503).with_rate(rate),
            ErrorKind::Throttled => error.with_http_status(429).with_rate(rate),
            _ => error.with_http_status(500).with_rate(rate),
        })
    }

    /// Waits for the whole answer.
    pub(super) async fn whole(mut self) -> Result<Reply> {
        if self.plan.fault == Some(Fault::Cut) {
            self.until(self.plan.fault_at).await;
            let rate = self.settle(Some(Ended::Cut))?;
            let error = Error::new(ErrorKind::MalformedReply, "the reply ends in the middle");
            return Err(error.with_http_status(200).with_rate(rate));
        }
        self.until(self.plan.total).await;
        self.reply()
    }

    /// Yields the answer while it is being written.
    pub(super) fn pieces(self) -> ReplyStream {
        let mut pieces = self.plan.pieces();
        if self.plan.fault == Some(Fault::Cut) {
            pieces.retain(|(at, _)| *at < self.plan.fault_at);
        }
        let state = Some((self, pieces.into_iter()));
        let deltas = stream::unfold(state, |state| async {
            let (mut call, mut pieces) = state?;
            if let Some((at, text)) = pieces.next() {
                call.until(at).await;
                return Some((Ok(Delta::Text(text)), Some((call, pieces))));
            }
            let end = if call.plan.fault == Some(Fault::Cut) {
                call.until(call.plan.fault_at).await;
                Err(call.settle(Some(Ended::Cut)).err()?)
            } else {
                call.until(call.plan.total).await;
                call.reply().map(|reply| Delta::End(Box::new(reply)))
            };
            Some((end, None))
        });
        deltas.boxed()
    }

    async fn until(&self, after_admission: Duration) {
        tokio::time::sleep_until(self.admitted + after_admission).await;
    }

    /// Bills the call as complete and returns its reply.
    fn reply(&mut self) -> Result<Reply> {
        let rate = self.settle(Some(Ended::Complete))?;
        let usage = Usage::new(self.input_tokens, self.plan.output_tokens);
        let mut reply = Reply::new(std::mem::take(&mut self.plan.text), usage);
        reply.finish = self.plan.finish();
        reply.model = std::mem::take(&mut self.model);
        reply.request_id = Some(std::mem::take(&mut self.request_id));
        reply.rate = (!rate.is_empty()).then(|| Box::new(rate));
        Ok(reply)
    }

    fn settle(&mut self, ended: Option<Ended>) -> Result<RateSnapshot> {
        self.settled = true;
        self.inner.settle(self, ended)
    }

    /// Returns the tokens that the call has used until `now`.
    pub(super) fn used(&self, ended: Ended, now: Instant) -> Usage {
        let output = match ended {
            Ended::Complete => self.plan.output_tokens,
            Ended::Cut => self.plan.generated(self.plan.fault_at),
            Ended::Cancelled => self
                .plan
                .generated(now.saturating_duration_since(self.admitted)),
        };
        Usage::new(self.input_tokens, output)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if !self.settled {
            // Calls with these faults are not billed.
            let free = self.plan.failure.is_some()
                || matches!(self.plan.fault, Some(fault) if fault != Fault::Cut);
            // The caller is gone. If the ledger file fails, the next call reports it.
            let _ = self.settle((!free).then_some(Ended::Cancelled));
        }
    }
}
