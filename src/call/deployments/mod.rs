//! [`Deployments`]: the deployments of a context, each with its own lane, behind one queue.

mod choose;
mod deployment;
mod snapshot;

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{self, FutureExt as _};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use self::choose::{Candidate, choose};
pub use self::deployment::Deployment;
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, Observers};
use crate::ratelimit::{Binding, CallOutcome, Lane, LaneSnapshot, Need, Permit, QueuePosition};
use crate::usage::RateSnapshot;

/// A deployment whose lane cools down for longer than this is passed over for a fallback.
pub(crate) const FALLBACK_AFTER: Duration = Duration::from_secs(600);

/// The deployments of a context. A call goes where it can start first.
///
/// A call queues in the lanes of **all** deployments of its group at the same time, and the first lane that has room takes
/// it. It leaves the other queues at that moment, and permits that they have granted meanwhile go back whole. So no
/// prediction is needed, no deployment is idle while calls wait, and the deployments are together as fast as their lanes.
///
/// - A deployment that can take no call any more (its credentials or its quota are refused) is disabled: its lane is
///   stopped. When all are, calls fail with the reason.
/// - A fallback begins the next group. Calls go there while all deployments before it are disabled or cooling down for
///   longer than `fallback_after`, and when they have used up their attempts.
pub(crate) struct Deployments {
    members: Vec<Member>,
    fallback_after: Duration,
    /// Notified when a deployment is disabled, enabled, or cools down for long: waiting calls choose again.
    changed: Arc<Notify>,
}

struct Member {
    deployment: Deployment,
    group: usize,
}

impl Deployments {
    /// Starts with one deployment.
    pub(crate) fn new(first: Deployment, fallback_after: Duration) -> Self {
        let mut deployments = Self {
            members: Vec::new(),
            fallback_after,
            changed: Arc::default(),
        };
        deployments.add(first, false);
        deployments
    }

    /// Adds a deployment to the group of the one before, or as a fallback to a group of its own. A name that another
    /// deployment has already gets a number.
    pub(crate) fn add(&mut self, deployment: Deployment, is_fallback: bool) {
        let name: Arc<str> = deployment.name_or_provider().into();
        let mut unique = Arc::clone(&name);
        let mut number = 1;
        while self.find(&unique).is_ok() {
            number += 1;
            unique = format!("{name}-{number}").into();
        }
        let deployment = deployment.named(unique);
        let group = match self.members.last() {
            Some(last) => last.group + usize::from(is_fallback),
            None => 0,
        };
        deployment.lane.notify_on_change(&self.changed);
        self.members.push(Member { deployment, group });
    }

    fn last_group(&self) -> usize {
        self.members.last().map_or(0, |last| last.group)
    }

    /// Returns the deployments in the order in which they were added.
    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = &Deployment> {
        self.members.iter().map(|member| &member.deployment)
    }

    pub(crate) fn first(&self) -> &Deployment {
        self.get(0)
    }

    pub(super) fn get(&self, index: usize) -> &Deployment {
        &self.members[index].deployment
    }

    /// Returns the deployment with this name.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if there is none.
    pub(crate) fn find(&self, name: &str) -> Result<&Deployment> {
        let found = self.iter().find(|it| it.name_or_provider() == name);
        found.ok_or_else(|| {
            let names: Vec<_> = self.iter().map(Deployment::name_or_provider).collect();
            let message = format!("no deployment is named {name:?}, only {}", names.join(", "));
            Error::new(ErrorKind::Config, message)
        })
    }

    /// Begins the route of one call and all its attempts, with a place in every queue.
    pub(super) fn route(&self) -> Route {
        let places = match &self.members[..] {
            // Taken when the call queues, because the lane is locked then anyway.
            [_] => Vec::new(),
            all => all
                .iter()
                .map(|it| it.deployment.lane.next_position())
                .collect(),
        };
        Route {
            places,
            ..Route::default()
        }
    }

    /// Waits until one of the deployments has room. `need` returns what the call needs at a deployment.
    ///
    /// # Errors
    /// The reason of a disabled deployment, when all are disabled.
    ///
    /// # Cancel safety
    /// Dropping the future leaves every queue and gives back the permits that were granted.
    pub(super) async fn acquire(
        &self,
        need: impl Fn(usize) -> Need,
        route: &mut Route,
    ) -> Result<DeploymentPermit<'_>> {
        if let Some(only) = self.only(route) {
            let need = route.at_place(need(0), 0);
            let permit = only.lane.acquire(need).await?;
            return Ok(self.permit(0, permit, route));
        }
        loop {
            let mut changed = pin!(self.changed.notified());
            // From here on no change is missed.
            changed.as_mut().enable();
            let chosen = self.choose(route);
            if chosen.is_empty() {
                return Err(self.reason_for_none(route));
            }
            let wanted = |index: usize| (self.lane(index), route.at_place(need(index), index));
            for index in &chosen {
                let (lane, need) = wanted(*index);
                if let Some(permit) = lane.try_acquire(&need) {
                    return Ok(self.permit(*index, permit, route));
                }
            }
            let waits = chosen.iter().map(|index| {
                let (lane, need) = wanted(*index);
                let permit = lane.acquire(need);
                permit.map(|permit| (*index, permit)).boxed()
            });
            let mut race = future::select_all(waits);
            loop {
                let back = self.next_back(route, &chosen);
                tokio::select! {
                    biased;
                    ((index, permit), ..) = &mut race => match permit {
                        Ok(permit) => return Ok(self.permit(index, permit, route)),
                        // That lane was stopped: the others are left.
                        Err(_) => break,
                    },
                    () = changed.as_mut() => {}
                    // No notification comes when the cooldown of a lane gets short enough.
                    () = passed(back) => {}
                }
                changed.set(self.changed.notified());
                changed.as_mut().enable();
                // Their order alone is no reason to queue again.
                let now = self.choose(route);
                if now.len() != chosen.len() || now.iter().any(|it| !chosen.contains(it)) {
                    break;
                }
            }
        }
    }

    /// Returns a permit if there is only one deployment and it has room at once.
    pub(super) fn try_acquire(
        &self,
        need: impl Fn(usize) -> Need,
        route: &mut Route,
    ) -> Option<DeploymentPermit<'_>> {
        let only = self.only(route)?;
        let need = route.at_place(need(0), 0);
        let permit = only.lane.try_acquire(&need)?;
        Some(self.permit(0, permit, route))
    }

    /// Returns the only deployment, if there is nothing to choose.
    fn only(&self, route: &Route) -> Option<&Deployment> {
        match &self.members[..] {
            [only] if route.group == 0 => Some(&only.deployment),
            _ => None,
        }
    }

    fn lane(&self, index: usize) -> &Lane {
        &self.get(index).lane
    }

    /// Returns how long it takes until one of the deployments on the route has cooled down.
    pub(super) fn cooldown(&self, route: &Route) -> Duration {
        let lane = |index: usize| self.lane(index).snapshot();
        let chosen = self.choose(route).into_iter();
        let cooldowns = chosen.map(|index| lane(index).cooldown.unwrap_or_default());
        cooldowns.min().unwrap_or_default()
    }

    /// Returns whether the route leads to a deployment at which the call has not failed.
    pub(super) fn has_untried(&self, route: &Route) -> bool {
        let chosen = self.choose(route);
        chosen.iter().any(|index| !route.failed.contains(index))
    }

    /// Returns whether the route leads to any deployment.
    pub(super) fn can_take(&self, route: &Route) -> bool {
        !self.choose(route).is_empty()
    }

    fn permit(&self, index: usize, permit: Permit, route: &mut Route) -> DeploymentPermit<'_> {
        if route.places.is_empty() {
            route.first = Some(permit.position());
        }
        DeploymentPermit {
            deployments: self,
            index,
            permit,
        }
    }

    fn choose(&self, route: &Route) -> Vec<usize> {
        let members = self.members.iter().enumerate();
        let candidates: Vec<Candidate> = members
            .map(|(index, member)| {
                let lane = &member.deployment.lane;
                let snapshot = lane.snapshot();
                Candidate {
                    group: member.group,
                    disabled: lane.stopped().is_some(),
                    cooldown: snapshot.cooldown.unwrap_or_default(),
                    in_flight: snapshot.in_flight,
                    has_failed: route.failed.contains(&index),
                }
            })
            .collect();
        choose(&candidates, route.group, self.fallback_after)
    }

    /// Returns when the next deployment that is not `chosen` can take calls of the route again.
    fn next_back(&self, route: &Route, chosen: &[usize]) -> Option<Instant> {
        let others = self.members.iter().enumerate();
        let others =
            others.filter(|(index, it)| it.group >= route.group && !chosen.contains(index));
        let back_in = others.filter_map(|(_, it)| {
            let lane = it.deployment.lane.snapshot();
            let cooldown = lane.cooldown.unwrap_or_default();
            let parked_for = cooldown.saturating_sub(self.fallback_after);
            let stopped_for = match lane.binding {
                Binding::Stopped => lane.head_wait?,
                _ => Duration::ZERO,
            };
            Some(parked_for.max(stopped_for)).filter(|wait| !wait.is_zero())
        });
        // A wait that no clock can express is one without end.
        Instant::now().checked_add(back_in.min()?)
    }

    /// Returns the state of all lanes as that of one lane, from the view of the calls that come now.
    pub(crate) fn snapshot(&self) -> LaneSnapshot {
        let chosen = self.choose(&Route::default());
        let lanes = self.members.iter().enumerate();
        let lanes = lanes.map(|(index, it)| snapshot::Part {
            group: it.group,
            // Where all are disabled, all of them keep the calls from going.
            in_use: chosen.is_empty() || chosen.contains(&index),
            lane: it.deployment.lane.snapshot(),
        });
        snapshot::combine(&lanes.collect::<Vec<_>>())
    }

    /// Returns the reason of the last deployment on the route.
    fn reason_for_none(&self, route: &Route) -> Error {
        let mut within = self.members.iter().rev();
        within
            .find_map(|it| (it.group >= route.group).then(|| it.deployment.lane.stopped())?)
            .unwrap_or_else(|| Error::other("there is no further fallback"))
    }
}

async fn passed(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => future::pending().await,
    }
}

/// The route of one call: its places in the queues, and the deployments at which it has failed.
#[derive(Debug, Clone, Default)]
pub(super) struct Route {
    /// Its place in the only queue there is, once it is known.
    first: Option<QueuePosition>,
    /// Its places in all queues, where there are several.
    places: Vec<QueuePosition>,
    /// The deployments at which it has failed, by index.
    failed: Vec<usize>,
    /// The first group that it may still go to.
    group: usize,
}

impl Route {
    /// Returns `need` at the place of this call in the queue of a deployment.
    fn at_place(&self, need: Need, index: usize) -> Need {
        match self.places.get(index).copied().or(self.first) {
            Some(place) => need.at(place),
            None => need,
        }
    }

    /// Sends the next attempt to another deployment of the group, if there is one.
    pub(super) fn avoid(&mut self, index: usize) {
        if !self.failed.contains(&index) {
            self.failed.push(index);
        }
    }

    /// Lets the next attempt wait behind all calls that wait now, instead of at its own place.
    pub(super) fn requeue(&mut self, deployments: &Deployments) {
        *self = Self {
            failed: std::mem::take(&mut self.failed),
            group: self.group,
            ..deployments.route()
        };
    }

    /// Returns whether there is a later group that the call could [fall back](Self::fall_back) to.
    pub(super) fn has_fallback(&self, deployments: &Deployments) -> bool {
        self.group < deployments.last_group()
    }

    /// Gives up the group of the deployment with this index, and returns whether there is a group after it.
    pub(super) fn fall_back(&mut self, deployments: &Deployments, index: usize) -> bool {
        self.group = deployments.members[index].group + 1;
        self.group <= deployments.last_group()
    }
}

/// The permit of a deployment's lane to make one call there.
#[must_use = "dropping a permit gives it back at once"]
pub(super) struct DeploymentPermit<'a> {
    deployments: &'a Deployments,
    index: usize,
    permit: Permit,
}

impl<'a> DeploymentPermit<'a> {
    pub(super) fn deployment(&self) -> &'a Deployment {
        self.deployments.get(self.index)
    }

    /// The index of the deployment, in the order in which they were added.
    pub(super) fn index(&self) -> usize {
        self.index
    }

    /// Marks the call as sent, as [`Permit::mark_sent`] does.
    pub(super) fn mark_sent(&mut self) {
        self.permit.mark_sent();
    }

    /// Gives the permit back with the headers and the outcome of its call, and reports what that changes for all calls of
    /// the lane.
    pub(super) fn conclude(
        self,
        headers: Option<&RateSnapshot>,
        outcome: CallOutcome,
        observers: &Observers,
    ) {
        let events = self.permit.conclude(headers, outcome);
        let cools_down = |event: &Event| matches!(event, Event::LaneCoolingDown { wait } if *wait > self.deployments.fallback_after);
        if events.iter().any(cools_down) {
            self.deployments.changed.notify_waiters();
        }
        for event in events {
            observers.tell(|| event);
        }
    }
}
