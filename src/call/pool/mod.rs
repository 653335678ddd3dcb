//! [`Pool`]: several deployments, each with its own lane, behind one queue.

mod choose;
mod snapshot;

use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{self, FutureExt as _};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use self::choose::{Candidate, choose};
use crate::error::{Error, Result};
use crate::ratelimit::{
    Binding, CallOutcome, Lane, LaneChange, LaneSnapshot, Need, Permit, QueuePosition,
};
use crate::request::RateSnapshot;

/// Closed for longer than this, a lane is parked.
const PARKED: Duration = Duration::from_secs(600);

/// Several deployments of a model (accounts, regions, servers), each with the limits of
/// its own lane: a call goes where it can start first.
///
/// A call queues in the lanes of **all** deployments of its group at the same time, and the
/// first that has room takes it; it leaves the other queues in the same moment, and what
/// one of them may have granted meanwhile goes back whole. So nothing is predicted, no
/// deployment idles while calls wait, and nobody is rejected: the pool is as fast as its
/// lanes together. A lane that is closed for a while just does not come first.
///
/// - A deployment that can take no call any more (its credentials, its quota) is
///   [left out](Turn::leave_out). When all are, calls fail with the reason.
/// - Deployments added with [`fallback`](Pool::fallback) are another group, for which calls
///   wait only while all before it are out or parked: closed for longer than 10 minutes
///   ([`parked_after`](Pool::parked_after)). A call that has failed for good
///   can be sent there too ([`Visit::fall_back`]).
///
/// `T` is what stands behind a lane, a provider for example.
///
/// ```
/// use throughline::{Pace, call::Pool, ratelimit::{CallOutcome, Lane, Need}};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> throughline::Result<()> {
/// let pool = Pool::new("west", Lane::new(Pace::per_minute(60)))
///     .beside("east", Lane::new(Pace::per_minute(600)))
///     .fallback("older model", Lane::new(Pace::per_minute(60)));
///
/// let mut visit = pool.arrive();
/// let mut turn = pool.acquire(Need::new(1_000, 500), &mut visit).await?;
/// turn.mark_sent();
/// // ... the call to `turn.deployment()` ...
/// turn.finish(CallOutcome::Succeeded { usage: None });
/// # Ok(()) }
/// ```
pub struct Pool<T> {
    deployments: Vec<Deployment<T>>,
    parked_after: Duration,
    /// A deployment went out, came back or was parked: those who wait choose again.
    changed: Arc<Notify>,
}

#[derive(Debug)]
struct Deployment<T> {
    what: T,
    lane: Lane,
    group: usize,
}

impl<T> Pool<T> {
    /// A pool of one deployment, `what` behind `lane`.
    pub fn new(what: T, lane: Lane) -> Self {
        let pool = Self {
            deployments: Vec::new(),
            parked_after: PARKED,
            changed: Arc::default(),
        };
        pool.with(what, lane, 0)
    }

    /// Adds a deployment to the group of the one before.
    #[must_use]
    pub fn beside(self, what: T, lane: Lane) -> Self {
        let group = self.last_group();
        self.with(what, lane, group)
    }

    /// Adds a deployment that begins the next group: for when those before it cannot.
    #[must_use]
    pub fn fallback(self, what: T, lane: Lane) -> Self {
        let group = self.last_group() + 1;
        self.with(what, lane, group)
    }

    /// How long a lane must be closed until calls go on to the next group; 10 minutes unless set.
    #[must_use]
    pub fn parked_after(mut self, cooldown: Duration) -> Self {
        self.parked_after = cooldown;
        self
    }

    fn with(mut self, what: T, lane: Lane, group: usize) -> Self {
        lane.notify_on_change(&self.changed);
        self.deployments.push(Deployment { what, lane, group });
        self
    }

    fn last_group(&self) -> usize {
        self.deployments.last().map_or(0, |last| last.group)
    }

    /// The deployments and their lanes, in the order in which they were added.
    pub fn deployments(&self) -> impl Iterator<Item = (&T, &Lane)> {
        let all = self.deployments.iter();
        all.map(|deployment| (&deployment.what, &deployment.lane))
    }

    /// A visit for one call and all its attempts, with a place in every queue.
    pub fn arrive(&self) -> Visit {
        let places = match &self.deployments[..] {
            // Taken when it queues: the lane is locked once for that anyway.
            [_] => Vec::new(),
            all => all.iter().map(|it| it.lane.next_position()).collect(),
        };
        Visit {
            places,
            ..Visit::default()
        }
    }

    /// Waits until one of the deployments has room for `need`.
    ///
    /// # Errors
    /// Why a deployment was left out, when all are.
    ///
    /// # Cancel safety
    /// Dropping the future leaves every queue and gives back whatever was granted.
    pub async fn acquire(&self, need: Need, visit: &mut Visit) -> Result<Turn<'_, T>> {
        self.acquire_by(|_| need, visit).await
    }

    /// As [`acquire`](Self::acquire), where what a call needs depends on the deployment.
    pub(crate) async fn acquire_by(
        &self,
        need: impl Fn(&T) -> Need,
        visit: &mut Visit,
    ) -> Result<Turn<'_, T>> {
        if let Some(only) = self.only(visit) {
            let need = visit.stand(need(&only.what), 0);
            let permit = only.lane.acquire(need).await?;
            return Ok(self.turn(0, permit, visit));
        }
        loop {
            let mut changed = pin!(self.changed.notified());
            // From here on no change is missed.
            changed.as_mut().enable();
            let chosen = self.choose(visit);
            if chosen.is_empty() {
                return Err(self.why_none(visit));
            }
            let wanted = |index: usize| {
                let it = &self.deployments[index];
                (&it.lane, visit.stand(need(&it.what), index))
            };
            for index in &chosen {
                let (lane, need) = wanted(*index);
                if let Some(permit) = lane.try_acquire(&need) {
                    return Ok(self.turn(*index, permit, visit));
                }
            }
            let waits = chosen.iter().map(|index| {
                let (lane, need) = wanted(*index);
                let permit = lane.acquire(need);
                permit.map(|permit| (*index, permit)).boxed()
            });
            let mut race = future::select_all(waits);
            loop {
                let back = self.next_back(visit, &chosen);
                tokio::select! {
                    biased;
                    ((index, permit), ..) = &mut race => match permit {
                        Ok(permit) => return Ok(self.turn(index, permit, visit)),
                        // That lane was stopped: the others are left.
                        Err(_) => break,
                    },
                    () = changed.as_mut() => {}
                    // Time alone has brought one back that was parked: nothing else tells of it.
                    () = passed(back) => {}
                }
                changed.set(self.changed.notified());
                changed.as_mut().enable();
                // Their order says only whom to ask first: not worth queueing anew.
                let now = self.choose(visit);
                if now.len() != chosen.len() || now.iter().any(|it| !chosen.contains(it)) {
                    break;
                }
            }
        }
    }

    /// A turn, if the only deployment there is has room at once. With several, who waits
    /// has to choose.
    pub(crate) fn try_acquire_by(
        &self,
        need: impl Fn(&T) -> Need,
        visit: &mut Visit,
    ) -> Option<Turn<'_, T>> {
        let only = self.only(visit)?;
        let need = visit.stand(need(&only.what), 0);
        let permit = only.lane.try_acquire(&need)?;
        Some(self.turn(0, permit, visit))
    }

    /// The only deployment there is: nothing to choose.
    fn only(&self, visit: &Visit) -> Option<&Deployment<T>> {
        match &self.deployments[..] {
            [only] if visit.group == 0 => Some(only),
            _ => None,
        }
    }

    /// How long until one of the deployments that the visit may go to is open again.
    pub(crate) fn cooldown(&self, visit: &Visit) -> Duration {
        let lane = |index: usize| self.deployments[index].lane.snapshot();
        let chosen = self.choose(visit).into_iter();
        let closed = chosen.map(|index| lane(index).cooldown.unwrap_or_default());
        closed.min().unwrap_or_default()
    }

    /// Whether a deployment that the visit may go to now is one that it has not failed at.
    pub(crate) fn has_untried(&self, visit: &Visit) -> bool {
        let chosen = self.choose(visit);
        chosen.iter().any(|index| !visit.failed.contains(index))
    }

    /// Whether there is any deployment that the visit may go to.
    pub(crate) fn is_open_to(&self, visit: &Visit) -> bool {
        !self.choose(visit).is_empty()
    }

    fn turn(&self, index: usize, permit: Permit, visit: &mut Visit) -> Turn<'_, T> {
        if visit.places.is_empty() {
            visit.first = Some(permit.position());
        }
        Turn {
            pool: self,
            index,
            permit,
        }
    }

    /// Takes the deployment with this [index](Turn::index) back in, after somebody has mended it.
    pub fn readmit(&self, index: usize) {
        if let Some(deployment) = self.deployments.get(index) {
            deployment.lane.resume();
        }
    }
}

impl<T> Pool<T> {
    fn choose(&self, visit: &Visit) -> Vec<usize> {
        let deployments = self.deployments.iter().enumerate();
        let candidates: Vec<Candidate> = deployments
            .map(|(index, deployment)| {
                let lane = deployment.lane.snapshot();
                Candidate {
                    group: deployment.group,
                    out: deployment.lane.stopped().is_some(),
                    cooldown: lane.cooldown.unwrap_or_default(),
                    in_flight: lane.in_flight,
                    avoided: visit.failed.contains(&index),
                }
            })
            .collect();
        choose(&candidates, visit.group, self.parked_after)
    }

    /// When the next deployment comes back that the visit may go to and is not `chosen`.
    fn next_back(&self, visit: &Visit, chosen: &[usize]) -> Option<Instant> {
        let others = self.deployments.iter().enumerate();
        let others =
            others.filter(|(index, it)| it.group >= visit.group && !chosen.contains(index));
        let back_in = others.filter_map(|(_, it)| {
            let lane = it.lane.snapshot();
            let cooldown = lane.cooldown.unwrap_or_default();
            let parked_for = cooldown.saturating_sub(self.parked_after);
            let stopped_for = match lane.binding {
                Binding::Stopped => lane.head_wait?,
                _ => Duration::ZERO,
            };
            Some(parked_for.max(stopped_for)).filter(|wait| !wait.is_zero())
        });
        // A wait that no clock can express is one without end.
        Instant::now().checked_add(back_in.min()?)
    }

    /// How the pool stands for the calls that come now, as if it were one lane.
    pub(crate) fn snapshot(&self) -> LaneSnapshot {
        let chosen = self.choose(&Visit::default());
        let lanes = self.deployments.iter().enumerate();
        let lanes = lanes.map(|(index, it)| snapshot::Part {
            group: it.group,
            // Where all are out, all of them keep the calls from going.
            in_use: chosen.is_empty() || chosen.contains(&index),
            lane: it.lane.snapshot(),
        });
        snapshot::combine(&lanes.collect::<Vec<_>>())
    }

    /// The reason of the last deployment that the visit could have gone to.
    fn why_none(&self, visit: &Visit) -> Error {
        let mut within = self.deployments.iter().rev();
        within
            .find_map(|it| (it.group >= visit.group).then(|| it.lane.stopped())?)
            .unwrap_or_else(|| Error::other("the pool has no deployment further down"))
    }
}

async fn passed(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => future::pending().await,
    }
}

/// One call's way through a [`Pool`]: its places in the queues, and where it has failed.
#[derive(Debug, Clone, Default)]
pub struct Visit {
    /// Its place in the only queue there is, once it is known.
    first: Option<QueuePosition>,
    /// Its places in all of them, where there are several.
    places: Vec<QueuePosition>,
    /// The deployments it failed at.
    failed: Vec<usize>,
    group: usize,
}

impl Visit {
    /// `need`, where this visit stands in the queue of that deployment.
    fn stand(&self, need: Need, index: usize) -> Need {
        match self.places.get(index).copied().or(self.first) {
            Some(place) => need.at(place),
            None => need,
        }
    }

    /// The call failed at the deployment with this [index](Turn::index): its next attempt
    /// goes to another one of the group, if there is one.
    pub fn avoid(&mut self, index: usize) {
        if !self.failed.contains(&index) {
            self.failed.push(index);
        }
    }

    /// Its next attempt waits behind all those that wait now, instead of where it stood.
    pub(crate) fn go_behind<T>(&mut self, pool: &Pool<T>) {
        *self = Self {
            failed: std::mem::take(&mut self.failed),
            group: self.group,
            ..pool.arrive()
        };
    }

    /// Whether there is a later group that the call could [fall back](Self::fall_back) to.
    pub(crate) fn has_fallback<T>(&self, pool: &Pool<T>) -> bool {
        self.group < pool.last_group()
    }

    /// Gives up the group of the deployment with this [index](Turn::index): the call waits
    /// for the groups after it only. Whether there are any, the answer says.
    pub fn fall_back<T>(&mut self, pool: &Pool<T>, index: usize) -> bool {
        self.group = pool.deployments[index].group + 1;
        self.group <= pool.last_group()
    }
}

/// The right to make one call at one deployment, from [`Pool::acquire`]: a [`Permit`] of
/// its lane, which ends as a permit does.
#[must_use = "dropping a turn gives it back at once"]
pub struct Turn<'a, T> {
    pool: &'a Pool<T>,
    index: usize,
    permit: Permit,
}

impl<'a, T> Turn<'a, T> {
    /// What to call.
    pub fn deployment(&self) -> &'a T {
        &self.pool.deployments[self.index].what
    }

    /// The how-manieth deployment that is, in the order in which they were added, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// As [`Permit::mark_sent`].
    pub fn mark_sent(&mut self) {
        self.permit.mark_sent();
    }

    /// As [`Permit::observe`].
    pub fn observe(&mut self, said: &RateSnapshot) {
        self.permit.observe(said);
    }

    /// As [`Permit::finish`].
    pub fn finish(self, outcome: CallOutcome) {
        self.conclude(None, outcome);
    }

    pub(crate) fn conclude(
        self,
        said: Option<&RateSnapshot>,
        outcome: CallOutcome,
    ) -> Vec<LaneChange> {
        let changes = self.permit.conclude(said, outcome);
        let closed = |change: &LaneChange| matches!(change, LaneChange::CoolingDown { wait } if *wait > self.pool.parked_after);
        if changes.iter().any(closed) {
            self.pool.changed.notify_waiters();
        }
        changes
    }

    /// The call failed, and so will every other at this deployment
    /// ([`Error::is_account_wide`]): nobody is sent there until it is
    /// [readmitted](Pool::readmit), and those who wait for it choose again.
    pub fn leave_out(self, reason: Error) {
        self.pool.deployments[self.index].lane.stop(reason);
        self.permit.finish(CallOutcome::Failed { usage: None });
    }
}

impl<T: fmt::Debug> fmt::Debug for Pool<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut list = f.debug_list();
        for it in &self.deployments {
            list.entry(&(it.group, &it.what, &it.lane));
        }
        list.finish()
    }
}

impl<T: fmt::Debug> fmt::Debug for Turn<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Turn")
            .field("deployment", self.deployment())
            .field("permit", &self.permit)
            .finish_non_exhaustive()
    }
}
