//! Which deployments a call may wait for: the choice as a pure function.

use std::time::Duration;

/// What the choice needs to know of one deployment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Candidate {
    /// Groups are asked in order.
    pub(super) group: usize,
    /// No call can succeed there any more.
    pub(super) out: bool,
    /// How long its lane stays closed.
    pub(super) cooldown: Duration,
    pub(super) in_flight: usize,
    /// This call has failed there before.
    pub(super) avoided: bool,
}

/// The deployments to wait for, by index, the one to try first in front. Whoever has room
/// first gets the call, so all but hopeless ones of a group are in. Empty: all are out.
///
/// - The first group, from `from` on, that has one not parked: closed for longer
///   than `parked`. Those the call has not failed at, if there are any.
/// - All are parked: all of them, for one will be the first to open.
pub(super) fn choose(candidates: &[Candidate], from: usize, parked: Duration) -> Vec<usize> {
    let usable = || {
        let all = candidates.iter().enumerate();
        all.filter(move |(_, it)| !it.out && it.group >= from)
    };
    let ready = || usable().filter(|(_, it)| it.cooldown <= parked);
    let group = ready().map(|(_, it)| it.group).min();
    let mut chosen: Vec<usize> = match group {
        None => usable().map(|(index, _)| index).collect(),
        Some(group) => {
            let members = || ready().filter(|(_, it)| it.group == group);
            let all_failed = members().all(|(_, it)| it.avoided);
            let wanted = members().filter(|(_, it)| all_failed || !it.avoided);
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
            out: false,
            cooldown: Duration::ZERO,
            in_flight: 0,
            avoided: false,
        }
    }

    fn closed(group: usize, seconds: u64) -> Candidate {
        Candidate {
            cooldown: Duration::from_secs(seconds),
            ..open(group)
        }
    }

    fn out(group: usize) -> Candidate {
        Candidate {
            out: true,
            ..open(group)
        }
    }

    fn avoided(group: usize) -> Candidate {
        Candidate {
            avoided: true,
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
    fn the_first_group_that_can_take_it() {
        for (candidates, chosen) in [
            (vec![open(0), open(0), open(1)], vec![0, 1]),
            (vec![busy(0, 5), busy(0, 2), open(1)], vec![1, 0]),
            // A wait that ends soon is no reason to go elsewhere, but another is asked first.
            (vec![closed(0, 20), busy(0, 9)], vec![1, 0]),
            (vec![closed(0, 20), open(1)], vec![0]),
            (vec![closed(0, 3_600), open(1)], vec![1]),
            (vec![out(0), open(0), open(1)], vec![1]),
            (vec![out(0), open(1)], vec![1]),
            (vec![closed(0, 3_600), closed(1, 4_000), out(1)], vec![0, 1]),
            (vec![avoided(0), open(0), open(1)], vec![1]),
            (vec![avoided(0), avoided(0), open(1)], vec![0, 1]),
            (vec![avoided(0), out(0)], vec![0]),
            (vec![out(0), out(1)], vec![]),
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
            |(group, out, cooldown, in_flight, avoided)| Candidate {
                group,
                out,
                cooldown,
                in_flight,
                avoided,
            },
        );
        proptest::collection::vec(candidate, 1..8)
    }

    proptest! {
        #[test]
        fn nobody_waits_for_what_is_out_and_nobody_is_turned_away_without_need(
            candidates in candidates(), from in 0..3usize,
        ) {
            let chosen = choose(&candidates, from, PARKED);
            let usable = |it: &Candidate| !it.out && it.group >= from;
            prop_assert!(chosen.iter().all(|index| usable(&candidates[*index])));
            prop_assert_eq!(chosen.is_empty(), !candidates.iter().any(usable));
            // A parked one is waited for only when all are.
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
