//! The words of the lane: [`Need`], [`Place`], [`CallOutcome`], [`LaneSnapshot`], [`Binding`].

use std::fmt;
use std::time::Duration;

use crate::usage::Usage;

/// What one call needs: a request, and its tokens as far as they can be foreseen.
///
/// ```
/// use throughline::Need;
///
/// let need = Need::new(1_200, 400);
/// assert_eq!((need.input_tokens, need.output_tokens), (1_200, 400));
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Need {
    /// Tokens of the prompt, estimated.
    pub input_tokens: u64,
    /// Tokens of the answer, estimated; `max_tokens` where the provider charges that.
    pub output_tokens: u64,
    pub(super) place: Option<Place>,
}

impl Need {
    /// One request of so many tokens.
    pub fn new(input_tokens: u64, output_tokens: u64) -> Self {
        Self {
            input_tokens,
            output_tokens,
            place: None,
        }
    }

    /// Queues at `place` instead of at the end: how a retry keeps its turn.
    #[must_use]
    pub fn at(mut self, place: Place) -> Self {
        self.place = Some(place);
        self
    }
}

/// A place in the order of arrival of one lane ([`Lane::arrive`](crate::Lane::arrive)).
///
/// It is a number: it holds nothing up and need not be given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place(pub(super) u64);

/// How a call ended, as far as the lane must know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum CallOutcome {
    /// A reply came.
    Done {
        /// What it used: the estimate is settled to its input and output tokens.
        /// `None` leaves the charge as estimated, for a provider that does not
        /// say, or does not give back what it reserved.
        usage: Option<Usage>,
    },
    /// The provider refused the call for its rate limit (429).
    Throttled {
        /// How long it asks to wait.
        wait: Option<Duration>,
    },
    /// The provider is overloaded (503, 529).
    Overloaded {
        /// How long it asks to wait.
        wait: Option<Duration>,
    },
    /// The call failed in any other way. The charge stays.
    Failed,
}

/// What a lane looks like at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LaneSnapshot {
    /// The limit on requests per minute, if there is one.
    pub requests_per_minute: Option<u64>,
    /// Calls that hold a permit.
    pub in_flight: usize,
    /// Calls that wait for one.
    pub waiting: usize,
    /// Permits granted so far, those given back unsent included.
    pub granted: u64,
    /// Calls that were refused for a rate limit so far.
    pub throttled: u64,
    /// Calls that met an overloaded provider so far.
    pub overloaded: u64,
    /// How long the lane stays closed because the provider refused a call.
    pub closed_for: Option<Duration>,
    /// What holds up the call that is next.
    pub binding: Binding,
    /// How long the call that is next must still wait. `None` if nobody waits, or
    /// if that depends on when a call in flight ends.
    pub head_wait: Option<Duration>,
}

/// What holds up the call that is next in a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Binding {
    /// Nothing: whoever comes goes at once.
    Nothing,
    /// The limit on requests.
    Requests,
    /// The limit on input and output tokens together.
    Tokens,
    /// The limit on input tokens.
    InputTokens,
    /// The limit on output tokens.
    OutputTokens,
    /// The time between two calls.
    Spacing,
    /// The limit on calls in flight.
    InFlight,
    /// The provider refused a call; the lane is closed for a while.
    Gate,
}

impl fmt::Display for Binding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => "nothing",
            Self::Requests => "requests",
            Self::Tokens => "tokens",
            Self::InputTokens => "input tokens",
            Self::OutputTokens => "output tokens",
            Self::Spacing => "spacing",
            Self::InFlight => "calls in flight",
            Self::Gate => "closed by the provider",
        })
    }
}

/// The tokens a call is charged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Charge {
    pub(super) input: u64,
    pub(super) output: u64,
}

impl From<&Need> for Charge {
    fn from(need: &Need) -> Self {
        Self {
            input: need.input_tokens,
            output: need.output_tokens,
        }
    }
}

impl From<Usage> for Charge {
    fn from(usage: Usage) -> Self {
        Self {
            input: usage.input_tokens,
            output: usage.output_tokens,
        }
    }
}
