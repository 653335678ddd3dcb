//! [`SimBuilder`]: every setting of the simulated provider and its default.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::limits::{Change, Enforcement, Headers, Limiter, Limits};
use super::model::{Fault, Model, ReplyFn, Tokens};
use super::{Policy, Sim};
use crate::error::ErrorKind;
use crate::provider::OutputCharge;
use crate::request::Request;

/// Builds a [`Sim`]; made by [`Sim::builder`].
///
/// Without any setting there is no limit and no fault, and answers come at once.
#[must_use = "a builder does nothing until `build`"]
#[derive(Default)]
pub struct SimBuilder {
    limits: Limits,
    enforcement: Enforcement,
    schedule: Vec<(Duration, Change)>,
    policy: Policy,
    model: Model,
    unauthorized: bool,
    ledger_file: Option<PathBuf>,
}

/// # Limits
/// None by default. Zero panics when the provider is built: it never means "no limit".
impl SimBuilder {
    /// Limits the calls per minute.
    pub fn requests_per_minute(mut self, requests: u64) -> Self {
        self.limits.requests_per_minute = Some(requests);
        self
    }

    /// Limits input and output tokens together, per minute.
    pub fn tokens_per_minute(mut self, tokens: u64) -> Self {
        self.limits.tokens_per_minute = Some(tokens);
        self
    }

    /// Limits the input tokens per minute.
    pub fn input_tokens_per_minute(mut self, tokens: u64) -> Self {
        self.limits.input_tokens_per_minute = Some(tokens);
        self
    }

    /// Limits the output tokens per minute.
    pub fn output_tokens_per_minute(mut self, tokens: u64) -> Self {
        self.limits.output_tokens_per_minute = Some(tokens);
        self
    }

    /// Limits the calls in flight at one time.
    pub fn in_flight(mut self, calls: usize) -> Self {
        self.limits.in_flight = Some(calls);
        self
    }

    /// Refuses calls as overloaded (503) while `calls` are in flight: a number that no header tells.
    pub fn overload_in_flight(mut self, calls: usize) -> Self {
        self.limits.overload_in_flight = Some(calls);
        self
    }

    /// Says how the limits per minute are enforced: by default a bucket that holds a minute.
    pub fn enforcement(mut self, enforcement: Enforcement) -> Self {
        self.enforcement = enforcement;
        self
    }

    /// Says how the answer's tokens are charged: by default `max_tokens` on admission, of
    /// which nothing is given back. Tokens above what was reserved (all of them, without
    /// `max_tokens` or with [`OutputCharge::Produced`]) are charged when the call ends;
    /// they can bring a limit into debt.
    pub fn output_charge(mut self, charge: OutputCharge) -> Self {
        self.policy.output_charge = charge;
        self
    }

    /// Says whether a call refused by a rate limit counts against the requests per minute,
    /// as at OpenAI. Off by default.
    pub fn rejected_calls_count(mut self, count: bool) -> Self {
        self.policy.rejected_calls_count = count;
        self
    }

    /// Changes the limits once `after` has passed since the provider was built. Changes
    /// apply in the order of their times.
    ///
    /// ```
    /// use std::time::Duration;
    /// use throughline::provider::sim::Sim;
    ///
    /// // Three minutes at 40 % of the limit.
    /// let sim = Sim::builder()
    ///     .requests_per_minute(60)
    ///     .change_at(Duration::from_secs(60), |l| l.requests_per_minute = Some(24))
    ///     .change_at(Duration::from_secs(240), |l| l.requests_per_minute = Some(60))
    ///     .build();
    /// ```
    pub fn change_at(
        mut self,
        after: Duration,
        change: impl Fn(&mut Limits) + Send + 'static,
    ) -> Self {
        self.schedule.push((after, Box::new(change)));
        self
    }
}

/// # What the provider says
impl SimBuilder {
    /// Says what rate-limit metadata replies and errors carry: by default all there is.
    pub fn headers(mut self, headers: Headers) -> Self {
        self.policy.headers = headers;
        self
    }

    /// Says whether a 429 tells how long to wait. On by default: the time after which
    /// the same call is let in unless others come first.
    pub fn retry_after(mut self, tell: bool) -> Self {
        self.policy.hide_retry_after = !tell;
        self
    }

    /// Refuses every call as `insufficient_quota` once `calls` have been let in.
    pub fn insufficient_quota_after(mut self, calls: u64) -> Self {
        self.limits.total_calls = Some(calls);
        self
    }

    /// Refuses every call as unauthorized (401), until
    /// [`Sim::set_unauthorized`] says otherwise.
    pub fn unauthorized(mut self) -> Self {
        self.unauthorized = true;
        self
    }
}

/// # Answers and latency
impl SimBuilder {
    /// Seeds the answers, the jitter and the faults; 0 by default. The same seed gives
    /// the same run, whatever the order in which calls arrive.
    pub fn seed(mut self, seed: u64) -> Self {
        self.model.seed = seed;
        self
    }

    /// Sets the part of the latency that does not depend on the answer: all of it, unless
    /// one of the other two is set. A stream spreads its text over it.
    pub fn latency(mut self, latency: Duration) -> Self {
        self.model.latency = latency;
        self
    }

    /// As [`latency`](Self::latency), for the calls whose last message has these `words`: to rehearse a
    /// pipeline whose steps take different times. Of several that fit, the one set last counts.
    ///
    /// ```
    /// use std::time::Duration;
    /// use throughline::{Context, Sim};
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() -> throughline::Result<()> {
    /// let sim = Sim::builder()
    ///     .latency(Duration::from_millis(300))
    ///     .latency_when("Plan", Duration::from_secs(4))
    ///     .reply_when("Plan", |_request| "scales, chords, rhythm");
    /// let cx = Context::builder(sim.build()).build();
    /// let began = tokio::time::Instant::now();
    /// assert_eq!(cx.generate("Plan my week.").await?.text, "scales, chords, rhythm");
    /// assert_eq!(began.elapsed(), Duration::from_secs(4));
    /// # Ok(()) }
    /// ```
    pub fn latency_when(mut self, words: impl Into<String>, latency: Duration) -> Self {
        self.model.latencies.add(words.into(), latency);
        self
    }

    /// Adds a time before the first token.
    pub fn time_to_first_token(mut self, time: Duration) -> Self {
        self.model.first_token = time;
        self
    }

    /// Adds a time for each token of the answer.
    pub fn time_per_token(mut self, time: Duration) -> Self {
        self.model.per_token = time;
        self
    }

    /// Makes each latency longer or shorter by up to this part of it: 0.2 is ±20 %.
    ///
    /// # Panics
    /// If it is not within 0.0 and 1.0.
    pub fn jitter(mut self, part: f64) -> Self {
        assert!(
            (0.0..=1.0).contains(&part),
            "jitter lies in 0.0..=1.0: {part}"
        );
        self.model.jitter = part;
        self
    }

    /// Sets how many tokens answers have, before `max_tokens` cuts them. By default 8 to
    /// 40, or with [`reply`](Self::reply) a token for every four bytes of its text.
    pub fn output_tokens(mut self, tokens: Tokens) -> Self {
        self.model.output = Some(tokens);
        self
    }

    /// Sets the text of the answers. By default it is prose without a meaning, drawn
    /// from the seed, the item key and the request's digest.
    ///
    /// It is called once for each call that is let in.
    pub fn reply<T: Into<String>>(
        mut self,
        reply: impl Fn(&Request) -> T + Send + Sync + 'static,
    ) -> Self {
        self.model.reply = Some(Arc::new(move |request| reply(request).into()));
        self
    }

    /// As [`reply`](Self::reply), for the calls whose last message has these `words`. Of several that
    /// fit, the one set last counts.
    pub fn reply_when<T: Into<String>>(
        mut self,
        words: impl Into<String>,
        reply: impl Fn(&Request) -> T + Send + Sync + 'static,
    ) -> Self {
        let reply: ReplyFn = Arc::new(move |request| reply(request).into());
        self.model.replies.add(words.into(), reply);
        self
    }
}

/// # Faults
/// They strike admitted calls, so they cost what a call costs of the limits. Rates lie in
/// 0.0..=1.0, as does their sum; each of these panics otherwise.
impl SimBuilder {
    fn fault(mut self, fault: Fault, rate: f64) -> Self {
        self.model.faults.set(fault, rate);
        self
    }

    /// Ends the calls whose last message has these `words` with an error of this `kind`, after their latency, however
    /// often they are sent; not billed. For tests of what becomes of the rest.
    ///
    /// ```
    /// use throughline::{Context, ErrorKind, Sim};
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
    /// let sim = Sim::builder().fail_when("etude 7", ErrorKind::InvalidRequest).build();
    /// let cx = Context::builder(sim).build();
    /// assert!(cx.generate("etude 6").await.is_ok());
    /// assert_eq!(cx.generate("etude 7").await.unwrap_err().kind(), ErrorKind::InvalidRequest);
    /// # }
    /// ```
    pub fn fail_when(mut self, words: impl Into<String>, kind: ErrorKind) -> Self {
        self.model.failures.add(words.into(), kind);
        self
    }

    /// How often a call ends with a 500, at a random time of its latency; not billed.
    pub fn error_rate(self, rate: f64) -> Self {
        self.fault(Fault::Error, rate)
    }

    /// How often the connection is reset, at a random time of the latency; not billed.
    pub fn reset_rate(self, rate: f64) -> Self {
        self.fault(Fault::Reset, rate)
    }

    /// How often a call is never answered. It stays in flight until it is dropped; not billed.
    pub fn hang_rate(self, rate: f64) -> Self {
        self.fault(Fault::Hang, rate)
    }

    /// How often an answer is cut in the middle: a stream ends without its
    /// [`Delta::End`](crate::request::Delta::End), a whole reply is malformed. What was generated
    /// until then is billed.
    pub fn cut_rate(self, rate: f64) -> Self {
        self.fault(Fault::Cut, rate)
    }

    /// How often a call is refused at once as overloaded (503); not billed.
    pub fn overload_rate(self, rate: f64) -> Self {
        self.fault(Fault::Overload, rate)
    }

    /// How often a call is refused at once with a 429 though it is within all limits; not billed. It names no
    /// wait, and its headers show what is left.
    pub fn throttle_rate(self, rate: f64) -> Self {
        self.fault(Fault::Throttle, rate)
    }
}

/// # Billing
impl SimBuilder {
    /// Says whether a call that the client drops is billed for what was generated until
    /// then, as real providers do. On by default.
    pub fn bill_cancelled(mut self, bill: bool) -> Self {
        self.policy.cancelled_is_free = !bill;
        self
    }

    /// Keeps the bills in a file too: a JSON line for each, appended in one write at the
    /// moment of billing, so that it survives the process. Read it with
    /// [`Ledger::read`](super::Ledger::read).
    ///
    /// What the file has already stays. If it cannot be opened or written, the call fails
    /// with [`ErrorKind::Io`](crate::ErrorKind::Io), and so does every later one.
    pub fn ledger_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.ledger_file = Some(path.into());
        self
    }

    /// Builds the provider. Its time begins now, on the clock of the runtime it is built in:
    /// build it inside the one whose clock is paused.
    ///
    /// # Panics
    /// If a limit is zero, at once or by a scheduled change, or a window has no length.
    #[must_use]
    pub fn build(self) -> Sim {
        assert!(
            self.enforcement != Enforcement::FixedWindow(Duration::ZERO),
            "a window must have a length"
        );
        let limiter = Limiter::new(self.limits, self.enforcement, self.schedule);
        let sim = Sim::new(limiter, self.policy, self.model, self.ledger_file);
        sim.set_unauthorized(self.unauthorized);
        sim
    }
}
