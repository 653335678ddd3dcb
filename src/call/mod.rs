//! One request, from the caller to the provider and back: memo, retry, deployment, attempt.

pub(crate) mod budget;
pub(crate) mod deployment;
pub(crate) mod estimate;
pub(crate) mod guard;
pub(crate) mod memo;
pub(crate) mod pool;
pub(crate) mod retry;
pub(crate) mod scope;
#[cfg(feature = "tiktoken")]
mod tiktoken;

pub use self::deployment::Deployment;
pub use self::estimate::TokenCounter;
pub use self::pool::{Pool, Turn, Visit};
pub use self::retry::Retry;
pub use self::scope::Tally;
#[cfg(feature = "tiktoken")]
pub use self::tiktoken::Tiktoken;
