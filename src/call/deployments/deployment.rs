//! [`Deployment`]: a provider with the lane of its account, one of those that a context can call.

use std::fmt;
use std::sync::Arc;

use crate::provider::{Capabilities, OutputCharge, Provider};
use crate::ratelimit::{Lane, Pace};
use crate::request::{Message, ReplyType, Request, ResponseFormat};

/// A provider behind the limits of its own account, for a context that has several
/// ([`ContextBuilder::deployment`](crate::ContextBuilder::deployment),
/// [`fallback`](crate::ContextBuilder::fallback)). Every provider can be turned into one, without limits.
///
/// ```
/// use throughline::{Context, Pace, testing::Scripted, call::Deployment};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
/// # let (west, east, small) = (Scripted::new(), Scripted::new(), Scripted::new());
/// let cx = Context::builder(Deployment::new(west).name("west"))
///     .pace(Pace::per_minute(600))
///     .deployment(Deployment::new(east).name("east").pace(Pace::per_minute(300)))
///     .fallback(Deployment::new(small).model("small-model"))
///     .build();
/// assert_eq!(cx.deployments().collect::<Vec<_>>(), ["west", "east", "scripted"]);
/// cx.retune("east", Pace::per_minute(400))?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
#[must_use = "a deployment does nothing until it is part of a context"]
pub struct Deployment {
    pub(crate) provider: Arc<dyn Provider>,
    pub(crate) lane: Lane,
    name: Option<Arc<str>>,
    model: Option<Arc<str>>,
}

impl Deployment {
    /// Makes a deployment of `provider`, without limits.
    pub fn new(provider: impl Provider) -> Self {
        Self {
            provider: Arc::new(provider),
            lane: Lane::new(Pace::unlimited()),
            name: None,
            model: None,
        }
    }

    /// Sets the name by which the context finds the deployment; that of the [provider](Provider::name) unless set. In a
    /// context, a second deployment with the same name gets `-2` behind it, and so on.
    pub fn name(self, name: impl Into<Arc<str>>) -> Self {
        self.named(name.into())
    }

    /// Sets the limits of the account, in a lane of its own.
    pub fn pace(self, pace: Pace) -> Self {
        self.lane(Lane::new(pace))
    }

    /// Sets the lane of the account, which others may share.
    pub fn lane(mut self, lane: Lane) -> Self {
        self.lane = lane;
        self
    }

    /// Sets the model of every request that is sent here, whatever model it names: the same model may have another name
    /// here, and a fallback often is another model.
    pub fn model(mut self, model: impl Into<Arc<str>>) -> Self {
        self.model = Some(model.into());
        self
    }

    pub(super) fn named(mut self, name: Arc<str>) -> Self {
        self.name = Some(name);
        self
    }

    pub(crate) fn name_or_provider(&self) -> &str {
        match &self.name {
            Some(name) => name,
            None => self.provider.name(),
        }
    }

    pub(crate) fn output_charge(&self) -> OutputCharge {
        self.provider.capabilities().output_charge
    }

    /// Returns the request in the form in which it is sent here, if that is another one: with this deployment's model, and
    /// with the schema of a typed reply in the form that the provider supports.
    pub(crate) fn adapt(&self, request: &Request) -> Option<Box<Request>> {
        let model = self.model.as_ref();
        let model = model.filter(|model| request.model.as_ref() != Some(model));
        let reply_type = request.reply_type.as_deref();
        if model.is_none() && reply_type.is_none() {
            return None;
        }
        let mut adapted = Box::new(request.clone());
        if let Some(model) = model {
            adapted.model = Some(Arc::clone(model));
        }
        if let Some(reply_type) = reply_type {
            ask_for(reply_type, &mut adapted, self.provider.capabilities());
        }
        Some(adapted)
    }
}

/// Puts the schema of a typed reply into the provider's own field if the provider enforces it, else into the prompt.
fn ask_for(reply_type: &ReplyType, request: &mut Request, can: Capabilities) {
    match &reply_type.enforceable {
        Some((name, schema)) if can.json_schema => {
            request.response_format = ResponseFormat::JsonSchema {
                name: name.clone(),
                schema: schema.clone(),
            };
        }
        _ => {
            let prompt = Message::system(reply_type.prompt.clone());
            request.messages.insert(0, prompt);
            request.has_schema_prompt = true;
            if can.json {
                request.response_format = ResponseFormat::Json;
            }
        }
    }
}

impl<P: Provider> From<P> for Deployment {
    fn from(provider: P) -> Self {
        Self::new(provider)
    }
}

impl fmt::Debug for Deployment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deployment")
            .field("name", &self.name_or_provider())
            .field("provider", &self.provider.name())
            .field("model", &self.model)
            .field("lane", &self.lane)
            .finish()
    }
}
