//! The types of the lane: [`Need`], [`QueuePosition`], [`CallOutcome`], [`LaneSnapshot`], [`Binding`].

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::num::NonZeroU64;
use std::time::Duration;

use crate::request::Usage;

/// The need of one call: a request, and its estimated tokens.
///
/// ```
/// use throughline::ratelimit::Need;
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
    /// The answer is charged when it is there, not with the request.
    pub(super) output_deferred: bool,
    pub(super) position: Option<QueuePosition>,
    pub(super) who: QueueKey,
}

impl Need {
    /// Makes the need of one request with these numbers of tokens.
    pub fn new(input_tokens: u64, output_tokens: u64) -> Self {
        Self {
            input_tokens,
            output_tokens,
            output_deferred: false,
            position: None,
            who: QueueKey::default(),
        }
    }

    /// Waits in the queue of that priority. [`Priority::Normal`] unless set.
    #[must_use]
    pub fn priority(mut self, priority: Priority) -> Self {
        self.who.priority = priority;
        self
    }

    /// Waits in the queue of that tenant. All calls without one are one tenant of weight 1.
    #[must_use]
    pub fn tenant(mut self, tenant: Tenant) -> Self {
        self.who.tenant = Some(tenant);
        self
    }

    /// The provider charges the answer when it is there, whatever the estimate.
    pub(crate) fn output_deferred(mut self, output_deferred: bool) -> Self {
        self.output_deferred = output_deferred;
        self
    }

    pub(crate) fn of(mut self, who: QueueKey) -> Self {
        self.who = who;
        self
    }

    /// Queues at `position` instead of at the end: how a retry keeps its turn.
    #[must_use]
    pub fn at(mut self, position: QueuePosition) -> Self {
        self.position = Some(position);
        self
    }
}

/// How urgent a call is, against others that wait for the same lane.
///
/// While all of them wait, of 73 calls 64 are high, 8 normal and 1 low: urgent work
/// goes first, and the rest still goes. An empty class delays no call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Priority {
    /// A person waits for the call.
    High,
    /// Work like any other.
    #[default]
    Normal,
    /// Work that can wait: backfills, evaluations.
    Low,
}

impl Priority {
    pub(super) const ALL: [Self; 3] = [Self::High, Self::Normal, Self::Low];

    pub(super) fn weight(self) -> u32 {
        match self {
            Self::High => 64,
            Self::Normal => 8,
            Self::Low => 1,
        }
    }
}

/// A tenant: calls that share a name, a weight in the distribution of the lane among tenants, and if it is to have them,
/// rates of its own.
///
/// A tenant with twice the weight gets twice as much of what is scarce, in requests or
/// tokens; one that asks for a thousand times as much gets no more for it.
///
/// The name alone says which tenant it is. When calls of one tenant name different weights,
/// the weight of the call that joined the queue last holds for all of them; so do the rates of the call that came last.
///
/// A tenant that has used up its rate holds up no other: its calls wait, and those of others pass. Each
/// [`Lane`](crate::ratelimit::Lane) keeps the rates by itself, so a tenant whose calls go to several deployments or
/// processes has them in each.
///
/// ```
/// use throughline::ratelimit::{Need, Tenant};
///
/// let acme = Tenant::new("acme", 2).requests_per_minute(60).tokens_per_minute(100_000);
/// let need = Need::new(1_000, 200).tenant(acme);
/// # let _ = need;
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tenant {
    id: TenantId,
    weight: u32,
    rates: TenantRates,
}

/// The rates of a tenant per minute, where it has its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(super) struct TenantRates {
    pub(super) requests: Option<NonZeroU64>,
    pub(super) tokens: Option<NonZeroU64>,
}

/// A hash of the name of a tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct TenantId(u64);

impl Tenant {
    /// The tenant of that name. Only a hash of the name is kept.
    ///
    /// # Panics
    ///
    /// If `weight` is zero: that tenant would never be served.
    #[track_caller]
    pub fn new(name: &str, weight: u32) -> Self {
        assert!(weight > 0, "a tenant of weight zero would never be served");
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        Self {
            id: TenantId(hasher.finish()),
            weight,
            rates: TenantRates::default(),
        }
    }

    /// Limits the requests of the tenant in a minute. One second of them, or one request, may go at once.
    ///
    /// # Panics
    ///
    /// If `requests` is zero: that tenant would never be served.
    #[must_use]
    #[track_caller]
    pub fn requests_per_minute(mut self, requests: u64) -> Self {
        let requests = NonZeroU64::new(requests);
        assert!(
            requests.is_some(),
            "a tenant with zero requests per minute would never be served"
        );
        self.rates.requests = requests;
        self
    }

    /// Limits the input and output tokens of the tenant in a minute. One second of them may go at once. A call that needs
    /// more waits until none of that second is used, and then the tenant owes the rest.
    ///
    /// # Panics
    ///
    /// If `tokens` is zero: that tenant would never be served.
    #[must_use]
    #[track_caller]
    pub fn tokens_per_minute(mut self, tokens: u64) -> Self {
        let tokens = NonZeroU64::new(tokens);
        assert!(
            tokens.is_some(),
            "a tenant with zero tokens per minute would never be served"
        );
        self.rates.tokens = tokens;
        self
    }

    pub(super) fn rates(self) -> TenantRates {
        self.rates
    }

    pub(super) fn id(self) -> TenantId {
        self.id
    }
}

/// The key of the queue that a call waits in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(crate) struct QueueKey {
    pub(crate) priority: Priority,
    pub(crate) tenant: Option<Tenant>,
}

impl QueueKey {
    pub(super) fn weight(self) -> u32 {
        self.tenant.map_or(1, |tenant| tenant.weight)
    }
}

/// A place in the order of arrival of one lane ([`Lane::next_position`](crate::ratelimit::Lane::next_position)).
///
/// It is a number: it holds nothing up and need not be given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueuePosition(pub(super) u64);

/// How a call ended, as far as the lane must know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum CallOutcome {
    /// The call was never sent: everything is given back.
    NotSent,
    /// The call was sent, and its end is unknown: the charge stays as estimated.
    Abandoned,
    /// A reply came.
    Succeeded {
        /// The usage: the estimate is settled to its input and output tokens.
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
    /// The call failed in any other way.
    Failed {
        /// The tokens that the provider charged all the same, where that is known. `None`
        /// leaves the charge as estimated.
        usage: Option<Usage>,
    },
}

/// The state of a lane at one moment.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct LaneSnapshot {
    /// The rate of requests per minute that the lane keeps now, if there is one: the
    /// limit, or less of it after a refusal.
    pub requests_per_minute: Option<u64>,
    /// The smallest share of a limit that is used: 1.0, or less after a refusal or while others
    /// use the account.
    pub rate_factor: f64,
    /// The limit on calls in flight now, if there is one.
    pub max_in_flight: Option<usize>,
    /// Calls that hold a permit.
    pub in_flight: usize,
    /// Calls that wait for one.
    pub waiting: usize,
    /// Of those, the calls that were granted a permit and did not collect it, because nothing polls their
    /// futures: a buffered stream whose consumer is busy, a `select!` whose other branch runs, a
    /// runtime that is blocked. They hold up no other call, and are next when they are polled.
    pub unpolled: usize,
    /// Permits granted so far, those given back unsent included.
    pub granted: u64,
    /// Calls that were refused for a rate limit so far.
    pub throttled: u64,
    /// Calls that met an overloaded provider so far.
    pub overloaded: u64,
    /// The bursts that the provider is seen to store, for each limit of which its headers show one.
    pub bursts: Vec<BurstSnapshot>,
    /// The remaining cooldown after a refusal.
    pub cooldown: Option<Duration>,
    /// The limiting factor of the call that is next.
    pub binding: Binding,
    /// The remaining wait of the call that is next. `None` if no call waits, or
    /// if that depends on when a call in flight ends.
    pub head_wait: Option<Duration>,
}

/// How much of a limit a provider stores while it is not used ([`Pace::burst`](crate::Pace::burst)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct BurstSnapshot {
    /// The limit.
    pub limit: Binding,
    /// The requests or tokens that the provider stores, by the headers of its replies.
    pub stored: u64,
    /// Of these, how many the lane uses at once. It starts with one call and may double with each round trip.
    pub usable: u64,
}

/// The limiting factor of the call that is next in a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Binding {
    /// Nothing: no call waits for the lane. The caller makes fewer calls at a time than the limits allow.
    Nothing,
    /// The number of items that a batch may have open (64 unless
    /// [`buffer_unordered`](crate::Batch::buffer_unordered) or its like says otherwise): it has inputs left, and no call
    /// waits for the lane. [`Lane::snapshot`](crate::ratelimit::Lane::snapshot) never returns it, only
    /// [`Context::snapshot`](crate::Context::snapshot).
    OpenItems,
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
    /// The rates of tenants ([`Tenant::requests_per_minute`], [`Tenant::tokens_per_minute`]): all calls that wait are of
    /// tenants that have used up their own.
    TenantRate,
    /// The provider refused a call, and the lane cools down.
    Cooldown,
    /// The retries of a context wait, because too many calls fail
    /// ([`Retry`](crate::Retry)). [`Lane::snapshot`](crate::ratelimit::Lane::snapshot) never returns it.
    Budget,
    /// The lane was stopped: calls fail at once until it is resumed, or until the stop ends by itself (after five minutes
    /// for a refused account).
    Stopped,
}

impl Binding {
    /// The binding as words for a person.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::OpenItems => "open items",
            Self::Requests => "requests",
            Self::Tokens => "tokens",
            Self::InputTokens => "input tokens",
            Self::OutputTokens => "output tokens",
            Self::Spacing => "spacing",
            Self::InFlight => "calls in flight",
            Self::TenantRate => "rate of the tenant",
            Self::Cooldown => "cooldown",
            Self::Budget => "retry budget",
            Self::Stopped => "stopped",
        }
    }
}

impl fmt::Display for Binding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The tokens a call is charged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Charge {
    pub(super) input: u64,
    pub(super) output: u64,
    /// The output is charged when the call ends: until then it is only reserved.
    pub(super) output_deferred: bool,
}

impl Charge {
    /// Returns the part that the provider charges when it admits the call.
    pub(super) fn on_admission(self) -> Self {
        let output = if self.output_deferred { 0 } else { self.output };
        Self { output, ..self }
    }
}

impl CallOutcome {
    /// Returns the charge of a call that was `estimated`; `None` if it was never sent.
    pub(super) fn charge(&self, estimated: Charge) -> Option<Charge> {
        match *self {
            Self::NotSent => None,
            Self::Succeeded { usage } | Self::Failed { usage } => {
                Some(usage.map_or(estimated, Charge::from))
            }
            Self::Abandoned => Some(estimated),
            Self::Throttled { .. } => Some(Charge::default()),
            Self::Overloaded { .. } => Some(estimated.on_admission()),
        }
    }
}

impl From<&Need> for Charge {
    fn from(need: &Need) -> Self {
        Self {
            input: need.input_tokens,
            output: need.output_tokens,
            output_deferred: need.output_deferred,
        }
    }
}

impl From<Usage> for Charge {
    fn from(usage: Usage) -> Self {
        Self {
            input: usage.input_tokens,
            output: usage.output_tokens,
            output_deferred: false,
        }
    }
}
