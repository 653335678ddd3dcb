//! [`choose`]: the deployments that a call may wait for, as a pure function.

use std::time::Duration;

/// The state of one deployment, as far as the choice depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Candidate {
    /// Groups are tried in order.
    pub(super) group: usize,
    /// No call can succeed there any more.
    pub(super) disabled: bool,
    /// The time until its lane has cooled down.
    pub(super) cooldown: Duration,
    pub(super) in_flight: usize,
    /// This call has failed there before.
    pub(super) has_failed: bool,
}

/// Returns the indices of the deployments to wait for, the one to try first in front; none if all are disabled. The first
/// deployment that has room gets the call, so all usable ones of a group are chosen.
///
/// - The group is the first one, from `from` on, with a deployment that does not cool down for longer than
///   `fallback_after`. If the call has not failed at all deployments of the group, those where it has are left out.
/// - If all deployments cool down for longer, all of them are chosen: the first one that is ready takes the call.
pub(super) fn choose(
    candidates: &[Candidate],
    from: usize,
    fallback_after: Duration,
) -> Vec<usize> {
    let usable = || {
        let all = candidates.iter().enumerate();
        all.filter(move |(_, it)| !it.disabled && it.group >= from)
    };
    let ready = || usable().filter(|(_, it)| it.cooldown <= fallback_after);
    let group = ready().map(|(_, it)| it.group).min();
    let mut chosen: Vec<usize> = match group {
        None => usable().map(|(index, _)| index).collect(),
        Some(group) => {
            let members = || ready().filter(|(_, it)| it.group == group);
            let all_failed = members().all(|(_, it)| it.has_failed);
            let wanted = members().filter(|(_, it)| all_failed || !it.has_failed);
            wanted.map(|(index, _)| index).collect()
        }
    };
    chosen.sort_by_key(|index| (candidates[*index].cooldown, candidates[*index].in_flight));
    chosen
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PARKED: Duration = Duration::from_secs(600);
    const LONG: Duration = Duration::from_secs(3_600);

    fn open(group: usize) -> Candidate {
        Candidate {
            group,
            disabled: false,
            cooldown: Duration::ZERO,
            in_flight: 0,
            has_failed: false,
        }
    }

    fn closed(group: usize, seconds: u64) -> Candidate {
        Candidate {
            cooldown: Duration::from_secs(seconds),
            ..open(group)
        }
    }

    fn disabled(group: usize) -> Candidate {
        Candidate {
            disabled: true,
            ..open(group)
        }
    }

    fn failed(group: usize) -> Candidate {
        Candidate {
            has_failed: true,
            ..open(group)
        }
    }

    fn busy(group: usize, in_flight: usize) -> Candidate {
        Candidate {
            in_flight,
            ..open(group)
        }
    }

    #[test]
    fn the_first_group_with_a_usable_deployment_is_chosen() {
        for (candidates, chosen) in [
            (vec![open(0), open(0), open(1)], vec![0, 1]),
            (vec![busy(0, 5), busy(0, 2), open(1)], vec![1, 0]),
            // A wait that ends soon is no reason to fall back, but another deployment is tried first.
            (vec![closed(0, 20), busy(0, 9)], vec![1, 0]),
            (vec![closed(0, 20), open(1)], vec![0]),
            (vec![closed(0, 3_600), open(1)], vec![1]),
            (vec![disabled(0), open(0), open(1)], vec![1]),
            (vec![disabled(0), open(1)], vec![1]),
            (
                vec![closed(0, 3_600), closed(1, 4_000), disabled(1)],
                vec![0, 1],
            ),
            (vec![failed(0), open(0), open(1)], vec![1]),
            (vec![failed(0), failed(0), open(1)], vec![0, 1]),
            (vec![failed(0), disabled(0)], vec![0]),
            (vec![disabled(0), disabled(1)], vec![]),
        ] {
            assert_eq!(choose(&candidates, 0, PARKED), chosen, "{candidates:?}");
        }
        let groups = [open(0), open(1), open(2)];
        assert_eq!(choose(&groups, 1, PARKED), [1], "it has fallen back");
        assert!(choose(&groups, 3, PARKED).is_empty());
    }

    fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
        let cooldown = prop_oneof![
            Just(Duration::ZERO),
            Just(Duration::from_secs(5)),
            Just(LONG)
        ];
        let candidate = (0..3usize, any::<bool>(), cooldown, 0..9usize, any::<bool>()).prop_map(
            |(group, disabled, cooldown, in_flight, has_failed)| Candidate {
                group,
                disabled,
                cooldown,
                in_flight,
                has_failed,
            },
        );
        proptest::collection::vec(candidate, 1..8)
    }

    proptest! {
        #[test]
        fn calls_wait_for_no_disabled_deployment_and_fail_only_if_all_are_disabled(
            candidates in candidates(), from in 0..3usize,
        ) {
            let chosen = choose(&candidates, from, PARKED);
            let usable = |it: &Candidate| !it.disabled && it.group >= from;
            prop_assert!(chosen.iter().all(|index| usable(&candidates[*index])));
            prop_assert_eq!(chosen.is_empty(), !candidates.iter().any(usable));
            // A long cooldown is waited for only when all have one.
            let waits_for_parked = chosen.iter().any(|i| candidates[*i].cooldown > PARKED);
            let all_parked = candidates
                .iter()
                .filter(|it| usable(it))
                .all(|it| it.cooldown > PARKED);
            prop_assert!(!waits_for_parked || all_parked);
            if !all_parked {
                let group = candidates[chosen[0]].group;
                prop_assert!(chosen.iter().all(|index| candidates[*index].group == group));
            }
        }
    }
}
