//! [`SimBuilder`]: the settings of the simulated provider and their defaults.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::limits::{Change, Enforcement, Headers, LimitSet, Limits};
use super::model::{Fault, Model, ReplyFn, Tokens};
use super::{Policy, Sim};
use crate::error::ErrorKind;
use crate::provider::OutputCharge;
use crate::request::Request;

/// Builds a [`Sim`]. Returned by [`Sim::builder`].
///
/// By default there are no limits and no faults, and answers come at once.
#[must_use = "a builder does nothing until `build`"]
#[derive(Default)]
pub struct SimBuilder {
    limits: Limits,
    enforcement: Enforcement,
    hidden_enforcement: Option<Enforcement>,
    window_phase: Duration,
    schedule: Vec<(Duration, Change)>,
    policy: Policy,
    model: Model,
    unauthorized: bool,
    ledger_file: Option<PathBuf>,
}

/// # Limits
/// By default there are none. A limit of zero panics when the provider is built.
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

    /// Limits the calls in flight.
    pub fn in_flight(mut self, calls: usize) -> Self {
        self.limits.in_flight = Some(calls);
        self
    }

    /// Refuses calls as overloaded (503) while `calls` are in flight. No header reports this limit.
    pub fn overload_in_flight(mut self, calls: usize) -> Self {
        self.limits.overload_in_flight = Some(calls);
        self
    }

    /// Sets how the limits per minute are enforced. The default is a token bucket that holds a minute.
    pub fn enforcement(mut self, enforcement: Enforcement) -> Self {
        self.enforcement = enforcement;
        self
    }

    /// Enforces the same limits in a second way too, of which the metadata says nothing: a provider that promises a
    /// minute's burst and counts by seconds.
    pub fn hidden_enforcement(mut self, enforcement: Enforcement) -> Self {
        self.hidden_enforcement = Some(enforcement);
        self
    }

    /// Sets how long before the simulation the first of the [windows](Enforcement::FixedWindow) began. By default
    /// they begin with it.
    pub fn window_phase(mut self, phase: Duration) -> Self {
        self.window_phase = phase;
        self
    }

    /// Sets how output tokens are charged. By default `max_tokens` are charged on admission and
    /// not refunded. Tokens above that (without `max_tokens` or with
    /// [`OutputCharge::Produced`]: all of them) are charged when the call ends, and may leave a debt.
    pub fn output_charge(mut self, charge: OutputCharge) -> Self {
        self.policy.output_charge = charge;
        self
    }

    /// Sets whether a call refused by a rate limit counts against the requests per minute,
    /// as at OpenAI. Off by default.
    pub fn rejected_calls_count(mut self, count: bool) -> Self {
        self.policy.rejected_calls_count = count;
        self
    }

    /// Schedules a change of the limits, at a time after the provider was built. Changes
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

/// # Metadata and refusals
impl SimBuilder {
    /// Sets the rate-limit metadata of replies and errors. The default is all of it.
    pub fn headers(mut self, headers: Headers) -> Self {
        self.policy.headers = headers;
        self
    }

    /// Sets whether a 429 names a wait: the time after which the same call is admitted unless
    /// others come first. On by default.
    pub fn retry_after(mut self, tell: bool) -> Self {
        self.policy.hide_retry_after = !tell;
        self
    }

    /// Refuses every call as `insufficient_quota` after `calls` have been admitted.
    pub fn insufficient_quota_after(mut self, calls: u64) -> Self {
        self.limits.total_calls = Some(calls);
        self
    }

    /// Refuses every call as unauthorized (401), until
    /// [`Sim::set_unauthorized`] changes that.
    pub fn unauthorized(mut self) -> Self {
        self.unauthorized = true;
        self
    }
}

/// # Answers and latency
impl SimBuilder {
    /// Sets the seed of answers, jitter and faults. The default is 0. The same seed gives the
    /// same run, whatever the order in which calls arrive.
    pub fn seed(mut self, seed: u64) -> Self {
        self.model.seed = seed;
        self
    }

    /// Sets the part of the latency that does not depend on the answer. It is all of the
    /// latency unless one of the next two is set. A stream spreads its text over it.
    pub fn latency(mut self, latency: Duration) -> Self {
        self.model.latency = latency;
        self
    }

    /// Sets the [`latency`](Self::latency) of calls whose last message contains `words`, to rehearse a
    /// pipeline with steps of different latencies. If several match, the one set last applies.
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

    /// Varies each latency by up to this part of it: 0.2 is ±20 %.
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

    /// Sets the tokens of answers before `max_tokens` cuts them. The default is 8 to 40, or with
    /// [`reply`](Self::reply) one for every four bytes of the text.
    pub fn output_tokens(mut self, tokens: Tokens) -> Self {
        self.model.output = Some(tokens);
        self
    }

    /// Sets the text of the answers. The default is meaningless prose, drawn from the seed, the
    /// item key and the request's digest.
    ///
    /// The closure is called once for each admitted call.
    pub fn reply<T: Into<String>>(
        mut self,
        reply: impl Fn(&Request) -> T + Send + Sync + 'static,
    ) -> Self {
        self.model.reply = Some(Arc::new(move |request| reply(request).into()));
        self
    }

    /// Sets the [`reply`](Self::reply) to calls whose last message contains `words`. If several
    /// match, the one set last applies.
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
/// Faults happen to admitted calls, which are charged to the limits. Each rate is a probability, and
/// so is their sum; otherwise these methods panic.
impl SimBuilder {
    fn fault(mut self, fault: Fault, rate: f64) -> Self {
        self.model.faults.set(fault, rate);
        self
    }

    /// Fails every call whose last message contains `words` with an error of this `kind`, after its
    /// latency. It is not billed.
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

    /// Sets how often a call ends with a 500, at a random time of its latency. It is not billed.
    pub fn error_rate(self, rate: f64) -> Self {
        self.fault(Fault::Error, rate)
    }

    /// Sets how often the connection is reset, at a random time of the latency. The call is not
    /// billed.
    pub fn reset_rate(self, rate: f64) -> Self {
        self.fault(Fault::Reset, rate)
    }

    /// Sets how often a call is never answered. It stays in flight until it is dropped, and is not
    /// billed.
    pub fn hang_rate(self, rate: f64) -> Self {
        self.fault(Fault::Hang, rate)
    }

    /// Sets how often an answer is cut: a stream ends without its
    /// [`Delta::End`](crate::request::Delta::End), a whole reply is malformed. The tokens generated
    /// until then are billed.
    pub fn cut_rate(self, rate: f64) -> Self {
        self.fault(Fault::Cut, rate)
    }

    /// Sets how often a call is refused at once as overloaded (503). It is not billed.
    pub fn overload_rate(self, rate: f64) -> Self {
        self.fault(Fault::Overload, rate)
    }

    /// Sets how often a call is refused at once with a 429 although it is within all limits. It is
    /// not billed and names no wait, and its metadata shows the limits as they are.
    pub fn throttle_rate(self, rate: f64) -> Self {
        self.fault(Fault::Throttle, rate)
    }
}

/// # Billing
impl SimBuilder {
    /// Sets whether a call that the client drops is billed for the tokens generated until then, as
    /// by real providers. On by default.
    pub fn bill_cancelled(mut self, bill: bool) -> Self {
        self.policy.cancelled_is_free = !bill;
        self
    }

    /// Appends each bill to a file as a JSON line, in one write at the moment of billing, so that
    /// it survives the process. [`Ledger::read`](super::Ledger::read) reads the file.
    ///
    /// The existing content of the file is kept. If the file cannot be opened or written, the call
    /// fails with [`ErrorKind::Io`], and so does every later one.
    pub fn ledger_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.ledger_file = Some(path.into());
        self
    }

    /// Builds the provider. Its time starts now, on the clock of the current runtime: to use a
    /// paused clock, call this inside the runtime with that clock.
    ///
    /// # Panics
    /// If a limit is zero, at once or by a scheduled change, or a window has no length.
    #[must_use]
    pub fn build(self) -> Sim {
        let enforcements = [Some(self.enforcement), self.hidden_enforcement];
        assert!(
            !enforcements.contains(&Some(Enforcement::FixedWindow(Duration::ZERO))),
            "a window must have a length"
        );
        let limits = LimitSet::new(
            self.limits,
            self.enforcement,
            self.hidden_enforcement,
            self.window_phase,
            self.schedule,
        );
        let sim = Sim::new(limits, self.policy, self.model, self.ledger_file);
        sim.set_unauthorized(self.unauthorized);
        sim
    }
}
