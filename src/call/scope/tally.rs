//! [`Tally`]: the cost of some work so far.

use std::fmt;
use std::ops::AddAssign;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::usage::Usage;

/// Defines [`Tally`] and [`AtomicTally`] from one list of counters.
macro_rules! counters {
    ($($(#[$attribute:meta])* $counter:ident),+ $(,)?) => {
        /// The calls that some work has made so far, and their tokens.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        #[non_exhaustive]
        pub struct Tally {
            $($(#[$attribute])* pub $counter: u64,)+
            /// The tokens of all answers that were paid for.
            pub usage: Usage,
        }

        impl AddAssign for Tally {
            fn add_assign(&mut self, other: Self) {
                $(self.$counter += other.$counter;)+
                self.usage += other.usage;
            }
        }

        /// A [`Tally`] that many tasks add to.
        #[derive(Default)]
        pub(super) struct AtomicTally {
            $($counter: AtomicU64,)+
            usage: AtomicUsage,
        }

        impl AtomicTally {
            pub(super) fn add(&self, tally: &Tally) {
                $(add(&self.$counter, tally.$counter);)+
                self.usage.add(&tally.usage);
            }

            pub(super) fn read(&self) -> Tally {
                Tally {
                    $($counter: self.$counter.load(Ordering::Relaxed),)+
                    usage: self.usage.read(),
                }
            }
        }
    };
}

counters! {
    /// Requests that reached the provider, once or more often, and were answered or have failed for good.
    calls,
    /// Requests that ended before anything was sent: the context was drained, cancelled or out of time, the account is
    /// refused, or an identical shared request failed.
    unsent,
    /// Calls that reached the provider, without those that its rate limit refused.
    attempts,
    /// Calls that the provider's rate limit refused. They are not attempts.
    throttled,
    /// Attempts after a failed one.
    retries,
    /// Requests made once more because a reply could not be used: it was not the JSON that was asked for, or it was cut or
    /// broke off. They are calls too. Requests that were answered from the store are not counted here.
    reasked,
    /// Attempts that failed because the provider was overloaded.
    overloaded,
    /// Attempts that reached a timeout.
    timed_out,
    /// Attempts that failed with another transient error: 5xx, a broken connection.
    transient,
    /// Attempts that failed with a permanent error.
    failed,
    /// Attempts that ended without it being known whether they are billed: a broken connection, a timeout, a cancelled
    /// call.
    ambiguous,
    /// Requests that were answered from the store. They cost nothing and count nowhere else.
    replayed,
}

/// A [`Usage`] that many tasks add to.
#[derive(Default)]
struct AtomicUsage {
    input_tokens: AtomicU64,
    output_tokens: AtomicU64,
    cached_input_tokens: AtomicU64,
    reasoning_tokens: AtomicU64,
}

impl AtomicUsage {
    fn add(&self, usage: &Usage) {
        add(&self.input_tokens, usage.input_tokens);
        add(&self.output_tokens, usage.output_tokens);
        add(&self.cached_input_tokens, usage.cached_input_tokens);
        add(&self.reasoning_tokens, usage.reasoning_tokens);
    }

    fn read(&self) -> Usage {
        Usage {
            input_tokens: self.input_tokens.load(Ordering::Relaxed),
            output_tokens: self.output_tokens.load(Ordering::Relaxed),
            cached_input_tokens: self.cached_input_tokens.load(Ordering::Relaxed),
            reasoning_tokens: self.reasoning_tokens.load(Ordering::Relaxed),
        }
    }
}

/// Most counters of a call are 0, and a write is much slower than a comparison.
#[inline]
fn add(counter: &AtomicU64, amount: u64) {
    if amount > 0 {
        counter.fetch_add(amount, Ordering::Relaxed);
    }
}

impl fmt::Display for Tally {
    /// Writes `12 calls, 228 replayed, 1200 + 340 tokens; 2 retries, 1 ambiguous`: counters that are 0 are left out, except
    /// for the calls and the tokens.
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
