//! [`Deployment`]: a provider with the lane of its account, one of those a context can call.

use std::fmt;
use std::sync::Arc;

use crate::provider::{OutputCharge, Provider};
use crate::ratelimit::{Lane, Pace};
use crate::request::Request;

/// A provider behind the limits of its own account, for a context that has several
/// ([`ContextBuilder::deployment`](crate::ContextBuilder::deployment),
/// [`fallback`](crate::ContextBuilder::fallback)).
///
/// ```
/// use throughline::{Context, Pace, testing::Scripted, call::Deployment};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
/// # let (west, east, small) = (Scripted::new(), Scripted::new(), Scripted::new());
/// let cx = Context::builder(west)
///     .pace(Pace::per_minute(600))
///     .deployment(Deployment::new(east).pace(Pace::per_minute(300)))
///     .fallback(Deployment::new(small).model("small-model"))
///     .build();
/// assert_eq!(cx.lanes().count(), 3);
/// # Ok(()) }
/// ```
#[derive(Clone)]
#[must_use = "a deployment does nothing until a context has it"]
pub struct Deployment {
    pub(crate) provider: Arc<dyn Provider>,
    pub(crate) lane: Lane,
    model: Option<Arc<str>>,
}

impl Deployment {
    /// `provider` without limits.
    pub fn new(provider: impl Provider) -> Self {
        Self {
            provider: Arc::new(provider),
            lane: Lane::new(Pace::unlimited()),
            model: None,
        }
    }

    /// The limits of the account, in a lane of its own.
    pub fn pace(self, pace: Pace) -> Self {
        self.lane(Lane::new(pace))
    }

    /// The lane of the account, which others may share.
    pub fn lane(mut self, lane: Lane) -> Self {
        self.lane = lane;
        self
    }

    /// The model of every request that goes here, whatever model it names: the same one may
    /// have another name here, and a fallback is often another one.
    pub fn model(mut self, model: impl Into<Arc<str>>) -> Self {
        self.model = Some(model.into());
        self
    }

    /// `request` as it is sent here, if that is another one.
    pub(crate) fn adapt(&self, request: &Request) -> Option<Box<Request>> {
        let model = self.model.as_ref();
        let model = model.filter(|model| request.model.as_ref() != Some(model))?;
        Some(Box::new(request.clone().model(Arc::clone(model))))
    }

    pub(crate) fn charge(&self) -> OutputCharge {
        self.provider.capabilities().output_charge
    }
}

impl fmt::Debug for Deployment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deployment")
            .field("provider", &self.provider.name())
            .field("model", &self.model)
            .field("lane", &self.lane)
            .finish()
    }
}
