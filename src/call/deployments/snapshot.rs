//! [`combine`]: the state of several lanes as that of one, as a pure function.

use crate::ratelimit::{Binding, BurstSnapshot, LaneSnapshot};

/// One lane of several.
pub(super) struct Part {
    pub(super) group: usize,
    /// Whether calls that come now may go there.
    pub(super) in_use: bool,
    pub(super) lane: LaneSnapshot,
}

impl Part {
    /// Returns whether callers wait there and take their permits when they are granted.
    fn is_waited_for(&self) -> bool {
        self.lane.waiting > self.lane.unpolled
    }
}

/// Combines the snapshots of several lanes. Counts of all lanes add up, and so do the limits of the lanes in use. The
/// binding is that of the lane where calls wait and can go first; an idle lane that no waiting call may go to, as that of a
/// fallback, does not count.
///
/// There must be at least one part, one of them in use.
pub(super) fn combine(parts: &[Part]) -> LaneSnapshot {
    let in_use = || parts.iter().filter(|part| part.in_use).map(|it| &it.lane);
    let all = || parts.iter().map(|part| &part.lane);
    // A call waits in all lanes of its group at the same time.
    let waiting = |count: fn(&LaneSnapshot) -> usize| {
        let last = parts.iter().map(|part| part.group).max().unwrap_or(0);
        let group = |group| parts.iter().filter(move |part| part.group == group);
        let counts = |n| group(n).map(|part| count(&part.lane)).max();
        (0..=last).filter_map(counts).sum()
    };
    let waited_for = parts.iter().filter(|part| part.is_waited_for());
    let waited_for = waited_for.min_by_key(|part| (!part.in_use, ends_last(&part.lane)));
    let idle = in_use().min_by_key(|lane| (lane.binding != Binding::Nothing, ends_last(lane)));
    let first = waited_for.map(|part| &part.lane).or(idle);
    LaneSnapshot {
        requests_per_minute: in_use().map(|lane| lane.requests_per_minute).sum(),
        rate_factor: in_use().map(|lane| lane.rate_factor).fold(1.0, f64::min),
        max_in_flight: in_use().map(|lane| lane.max_in_flight).sum(),
        in_flight: all().map(|lane| lane.in_flight).sum(),
        waiting: waiting(|lane| lane.waiting),
        unpolled: waiting(|lane| lane.unpolled),
        granted: all().map(|lane| lane.granted).sum(),
        throttled: all().map(|lane| lane.throttled).sum(),
        overloaded: all().map(|lane| lane.overloaded).sum(),
        bursts: sum_bursts(in_use()),
        cooldown: in_use()
            .map(|lane| lane.cooldown)
            .reduce(|a, b| Some(a?.min(b?)))
            .flatten(),
        binding: first.map_or(Binding::Nothing, |lane| lane.binding),
        head_wait: first.and_then(|lane| lane.head_wait),
    }
}

/// Adds up the bursts of each limit.
fn sum_bursts<'a>(lanes: impl Iterator<Item = &'a LaneSnapshot>) -> Vec<BurstSnapshot> {
    let mut sums: Vec<BurstSnapshot> = Vec::new();
    for burst in lanes.flat_map(|lane| &lane.bursts) {
        match sums.iter_mut().find(|sum| sum.limit == burst.limit) {
            Some(sum) => {
                sum.stored += burst.stored;
                sum.usable += burst.usable;
            }
            None => sums.push(*burst),
        }
    }
    sums
}

/// Orders lanes by the time at which the next call can go there; lanes where it is not known come last.
fn ends_last(lane: &LaneSnapshot) -> (bool, Option<std::time::Duration>) {
    (lane.head_wait.is_none(), lane.head_wait)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::ratelimit::{Lane, Pace};

    fn part(group: usize, in_use: bool, waiting: usize, binding: Binding, wait: u64) -> Part {
        let lane = Lane::new(Pace::per_minute(60).in_flight(4)).snapshot();
        Part {
            group,
            in_use,
            lane: LaneSnapshot {
                waiting,
                granted: 1,
                binding,
                head_wait: (waiting > 0).then(|| Duration::from_secs(wait)),
                ..lane
            },
        }
    }

    #[tokio::test]
    async fn an_idle_lane_that_no_waiting_call_may_go_to_does_not_bind() {
        use Binding::{InFlight, Nothing, Requests, Stopped};
        for (parts, binding, waiting) in [
            (
                vec![
                    part(0, true, 94, Requests, 3),
                    part(1, false, 0, Nothing, 0),
                ],
                Requests,
                94,
            ),
            // Two lanes of a group: the one that has room first.
            (
                vec![part(0, true, 9, Requests, 3), part(0, true, 9, InFlight, 2)],
                InFlight,
                9,
            ),
            // Calls that have fallen back wait apart from the others.
            (
                vec![
                    part(0, true, 5, Requests, 3),
                    part(1, false, 2, InFlight, 1),
                ],
                Requests,
                7,
            ),
            (
                vec![part(0, true, 0, Nothing, 0), part(1, false, 2, InFlight, 1)],
                InFlight,
                2,
            ),
            (
                vec![part(0, false, 0, Stopped, 0), part(1, true, 0, Nothing, 0)],
                Nothing,
                0,
            ),
            (
                vec![part(0, true, 0, Stopped, 0), part(0, true, 0, Nothing, 0)],
                Nothing,
                0,
            ),
            (
                vec![part(0, true, 0, Stopped, 0), part(1, true, 0, Stopped, 0)],
                Stopped,
                0,
            ),
        ] {
            let whole = combine(&parts);
            assert_eq!((whole.binding, whole.waiting), (binding, waiting));
            assert_eq!(whole.granted, parts.len() as u64);
            let used = parts.iter().filter(|part| part.in_use).count();
            assert_eq!(whole.requests_per_minute, Some(60 * used as u64));
            assert_eq!(whole.max_in_flight, Some(4 * used));
        }
    }
}
