//! [`Queue`]: the calls that wait, and which of them is next.
//!
//! Within a priority and a tenant, the order is that of arrival. Between tenants, and above
//! them between priorities, it is start-time fair queueing (Goyal, Vin and Cheng, 1996): the virtual time of a
//! flow grows by the cost of a served call over the weight of the flow, and the flow with the lowest virtual time
//! is next. So each flow gets its share while it wants it, none starves, and an idle flow saves nothing up.
//!
//! A tenant is known by its name. When its calls name different weights, the weight of the call
//! that joined the queue last holds.
//!
//! A flow whose tenant has used up its rate is parked until a time: others pass, and when it comes back it is as one that was
//! idle.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Bound;

use crate::ratelimit::bucket::Nanos;
use crate::ratelimit::types::{Charge, Priority, QueueKey, QueuePosition, Tenant, TenantId};

/// A map by small keys of our own: SipHash would take longer than the rest of a lookup.
pub(super) type Map<K, V> = HashMap<K, V, BuildHasherDefault<Multiplying>>;

/// Multiplicative hashing (Knuth, The Art of Computer Programming, vol. 3, section 6.4), by
/// 2⁶⁴ over the golden ratio.
#[derive(Debug, Default)]
pub(super) struct Multiplying(u64);

impl Hasher for Multiplying {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u32(&mut self, n: u32) {
        self.write_u64(u64::from(n));
    }

    fn write_u64(&mut self, n: u64) {
        self.0 = (self.0.rotate_left(5) ^ n).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }

    fn write_isize(&mut self, n: isize) {
        self.write_u64(n.cast_unsigned() as u64);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// One waiter: its flow, its position, and a unique ticket, because two calls may have one position.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct WaiterKey {
    flow: u32,
    pub(super) position: QueuePosition,
    pub(super) ticket: u64,
}

#[derive(Debug)]
pub(super) struct Waiter<W> {
    pub(super) charge: Charge,
    /// `None` while the caller is awake.
    pub(super) waker: Option<W>,
}

/// Served cost over a weight. In units of 2⁻⁴⁰ of a cost, so that weights count exactly
/// where every call costs the same: 33 and 64 were served alike when the unit was 2⁻⁶.
type VirtualTime = u128;

/// Returns the increase of the virtual time for a served cost.
fn step(cost: u64, weight: u32) -> VirtualTime {
    ((VirtualTime::from(cost.max(1)) << 40) / VirtualTime::from(weight)).max(1)
}

/// The calls of one priority and one tenant.
#[derive(Debug)]
struct Flow {
    who: QueueKey,
    waiting: usize,
    /// The flow with the lowest is served next.
    virtual_time: VirtualTime,
    parked_until: Option<Nanos>,
}

/// The calls of one priority.
#[derive(Debug, Default)]
struct Class {
    virtual_time: VirtualTime,
    /// The virtual time of the flow that was served last: a flow that was idle starts there.
    front: VirtualTime,
    /// The flows with waiters that are not parked, by virtual time.
    flows: BTreeSet<(VirtualTime, u32)>,
}

impl Class {
    /// Adds a flow that was idle or parked.
    fn add(&mut self, id: u32, flow: &mut Flow, front: VirtualTime) {
        if self.flows.is_empty() {
            self.virtual_time = self.virtual_time.max(front);
        }
        flow.virtual_time = flow.virtual_time.max(self.front);
        self.flows.insert((flow.virtual_time, id));
    }
}

#[derive(Debug)]
pub(super) struct Queue<W> {
    /// An ordered map rather than deques, because a retry comes back to the place
    /// it had and anybody may leave from anywhere, each in logarithmic time.
    waiters: BTreeMap<WaiterKey, Waiter<W>>,
    flows: Map<u32, Flow>,
    ids: Map<(Priority, Option<TenantId>), u32>,
    next_id: u32,
    /// The number of flows at which the idle ones are swept.
    sweep_at: usize,
    classes: [Class; Priority::ALL.len()],
    front: VirtualTime,
    /// The flows that are parked, by the end of that.
    parked: BTreeSet<(Nanos, u32)>,
}

impl<W> Queue<W> {
    pub(super) fn new() -> Self {
        Self {
            waiters: BTreeMap::new(),
            flows: Map::default(),
            ids: Map::default(),
            next_id: 0,
            sweep_at: 64,
            classes: Default::default(),
            front: 0,
            parked: BTreeSet::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.waiters.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiters.is_empty()
    }

    /// Whether a call waits that is not parked.
    pub(super) fn has_head(&self) -> bool {
        !self.waiters.is_empty() && self.classes.iter().any(|class| !class.flows.is_empty())
    }

    /// Whether a call of that priority and tenant waits.
    pub(super) fn has(&self, priority: Priority, tenant: Option<TenantId>) -> bool {
        let flow = self.ids.get(&(priority, tenant));
        let flow = flow.and_then(|id| self.flows.get(id));
        flow.is_some_and(|flow| flow.waiting > 0)
    }

    pub(super) fn tenant(&self, key: WaiterKey) -> Option<TenantId> {
        self.flows.get(&key.flow)?.who.tenant.map(Tenant::id)
    }

    /// Passes over the calls of the priority and tenant of `key` until a time, or until one of them comes or goes.
    pub(super) fn park(&mut self, key: WaiterKey, until: Nanos) {
        if let Some(flow) = self.flows.get_mut(&key.flow) {
            let class = &mut self.classes[flow.who.priority as usize];
            if class.flows.remove(&(flow.virtual_time, key.flow)) {
                flow.parked_until = Some(until);
                self.parked.insert((until, key.flow));
            }
        }
    }

    fn unpark(&mut self, id: u32) {
        if let Some(flow) = self.flows.get_mut(&id)
            && let Some(until) = flow.parked_until.take()
        {
            self.parked.remove(&(until, id));
            let class = &mut self.classes[flow.who.priority as usize];
            class.add(id, flow, self.front);
        }
    }

    /// Looks at the calls of a tenant again, because its limits have changed.
    pub(super) fn unpark_tenant(&mut self, tenant: TenantId) {
        for priority in Priority::ALL {
            if let Some(id) = self.ids.get(&(priority, Some(tenant))) {
                self.unpark(*id);
            }
        }
    }

    /// Looks again at the calls that were parked until now.
    pub(super) fn unpark_until(&mut self, now: Nanos) {
        while let Some((_, id)) = self.parked.first().filter(|(until, _)| *until <= now) {
            self.unpark(*id);
        }
    }

    /// Returns the end of the time for which the next calls are parked.
    pub(super) fn parked_until(&self) -> Option<Nanos> {
        self.parked.first().map(|(until, _)| *until)
    }

    pub(super) fn push(
        &mut self,
        who: QueueKey,
        position: QueuePosition,
        ticket: u64,
        charge: Charge,
    ) -> WaiterKey {
        let id = self.flow_of(who);
        let flow = self.flows.get_mut(&id).expect("just found or made");
        // With the weight that was named last.
        flow.who = who;
        flow.waiting += 1;
        if flow.waiting == 1 {
            self.classes[who.priority as usize].add(id, flow, self.front);
        } else if flow.parked_until.is_some() {
            // It may be before the others.
            self.unpark(id);
        }
        let key = WaiterKey {
            flow: id,
            position,
            ticket,
        };
        let waiter = Waiter {
            charge,
            waker: None,
        };
        self.waiters.insert(key, waiter);
        key
    }

    /// Returns the waiter that is next, and its charge.
    pub(super) fn head(&self) -> Option<(WaiterKey, Charge)> {
        if self.waiters.is_empty() {
            return None;
        }
        let busy = self.classes.iter().filter(|c| !c.flows.is_empty());
        let (_, flow) = busy.min_by_key(|class| class.virtual_time)?.flows.first()?;
        let first = WaiterKey {
            flow: *flow,
            position: QueuePosition(0),
            ticket: 0,
        };
        let (key, waiter) = self.waiters.range(first..).next()?;
        Some((*key, waiter.charge))
    }

    /// Returns the waiters behind `head`, in the order of the map.
    pub(super) fn behind(&self, head: WaiterKey) -> impl Iterator<Item = (WaiterKey, Charge)> {
        let behind = (Bound::Excluded(head), Bound::Unbounded);
        let behind = self.waiters.range(behind);
        behind.map(|(key, waiter)| (*key, waiter.charge))
    }

    pub(super) fn get_mut(&mut self, key: WaiterKey) -> Option<&mut Waiter<W>> {
        self.waiters.get_mut(&key)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Waiter<W>> {
        self.waiters.values_mut()
    }

    /// Removes all waiters.
    pub(super) fn clear(&mut self) -> impl Iterator<Item = Waiter<W>> {
        for class in &mut self.classes {
            class.flows.clear();
        }
        for flow in self.flows.values_mut() {
            flow.waiting = 0;
            flow.parked_until = None;
        }
        self.parked.clear();
        std::mem::take(&mut self.waiters).into_values()
    }

    /// Removes a waiter that goes away.
    pub(super) fn remove(&mut self, key: WaiterKey) -> Option<Waiter<W>> {
        self.take(key, None)
    }

    /// Removes a waiter that is served, at this cost.
    pub(super) fn serve(&mut self, key: WaiterKey, cost: u64) -> Option<Waiter<W>> {
        self.take(key, Some(cost))
    }

    fn take(&mut self, key: WaiterKey, cost: Option<u64>) -> Option<Waiter<W>> {
        let waiter = self.waiters.remove(&key)?;
        if !self.parked.is_empty() {
            self.unpark(key.flow);
        }
        let flow = self.flows.get_mut(&key.flow)?;
        let class = &mut self.classes[flow.who.priority as usize];
        class.flows.remove(&(flow.virtual_time, key.flow));
        if let Some(cost) = cost {
            self.front = self.front.max(class.virtual_time);
            class.front = class.front.max(flow.virtual_time);
            let by_priority = step(cost, flow.who.priority.weight());
            class.virtual_time = class.virtual_time.saturating_add(by_priority);
            flow.virtual_time = flow
                .virtual_time
                .saturating_add(step(cost, flow.who.weight()));
        }
        flow.waiting -= 1;
        if flow.waiting > 0 {
            class.flows.insert((flow.virtual_time, key.flow));
        } else if class.flows.is_empty() {
            // No flow waits: none was passed over for this call.
            class.front = class.front.max(flow.virtual_time);
        }
        Some(waiter)
    }

    /// Undoes the serving of a call at this cost, because the caller did not take it.
    pub(super) fn release(&mut self, key: WaiterKey, cost: u64) {
        // A flow that was swept would start as a new one does anyway.
        let Some(flow) = self.flows.get_mut(&key.flow) else {
            return;
        };
        let class = &mut self.classes[flow.who.priority as usize];
        let by_priority = step(cost, flow.who.priority.weight());
        class.virtual_time = class.virtual_time.saturating_sub(by_priority);
        let virtual_time = flow
            .virtual_time
            .saturating_sub(step(cost, flow.who.weight()));
        if class.flows.remove(&(flow.virtual_time, key.flow)) {
            class.flows.insert((virtual_time, key.flow));
        }
        flow.virtual_time = virtual_time;
    }

    fn flow_of(&mut self, who: QueueKey) -> u32 {
        let name = (who.priority, who.tenant.map(Tenant::id));
        if let Some(id) = self.ids.get(&name) {
            return *id;
        }
        if self.flows.len() >= self.sweep_at {
            self.sweep();
        }
        while self.flows.contains_key(&self.next_id) {
            self.next_id = self.next_id.wrapping_add(1);
        }
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        self.ids.insert(name, id);
        let flow = Flow {
            who,
            waiting: 0,
            virtual_time: 0,
            parked_until: None,
        };
        self.flows.insert(id, flow);
        id
    }

    /// Removes the idle flows that are not ahead: they would start as new ones do.
    fn sweep(&mut self) {
        let classes = &self.classes;
        self.flows.retain(|_, flow| {
            flow.waiting > 0 || flow.virtual_time > classes[flow.who.priority as usize].front
        });
        self.ids.retain(|_, id| self.flows.contains_key(id));
        self.sweep_at = (self.flows.len() * 2).max(64);
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use proptest::prelude::*;

    use super::*;

    fn who(priority: Priority, tenant: u64, weight: u32) -> QueueKey {
        QueueKey {
            priority,
            tenant: Some(Tenant::new(&tenant.to_string(), weight)),
        }
    }

    #[test]
    fn a_hundred_thousand_waiters_are_cheap() {
        assert!(size_of::<(WaiterKey, Waiter<Waker>)>() <= 64);
    }

    #[test]
    fn an_old_place_comes_before_newer_ones() {
        let mut queue = Queue::<()>::new();
        for (position, ticket) in [(2, 0), (3, 1), (1, 2), (2, 3)] {
            queue.push(
                QueueKey::default(),
                QueuePosition(position),
                ticket,
                Charge::default(),
            );
        }
        let mut order = Vec::new();
        while let Some((key, _)) = queue.head() {
            order.push((key.position.0, key.ticket));
            queue.serve(key, 1);
        }
        assert_eq!(order, [(1, 2), (2, 0), (2, 3), (3, 1)]);
    }

    /// Serves `n` and counts those of each.
    fn served<const N: usize>(queue: &mut Queue<()>, whos: [QueueKey; N], n: usize) -> [usize; N] {
        served_at(queue, whos, n, 1_000)
    }

    fn served_at<const N: usize>(
        queue: &mut Queue<()>,
        whos: [QueueKey; N],
        n: usize,
        cost: u64,
    ) -> [usize; N] {
        let mut counts = [0; N];
        for _ in 0..n {
            let (key, _) = queue.head().unwrap();
            let who = queue.flows[&key.flow].who;
            queue.serve(key, cost);
            counts[whos.iter().position(|w| *w == who).unwrap()] += 1;
        }
        counts
    }

    fn crowd(queue: &mut Queue<()>, who: QueueKey, n: u64) {
        for i in 0..n {
            queue.push(who, QueuePosition(i), i, Charge::default());
        }
    }

    #[test]
    fn a_heavy_tenant_gets_its_share_and_no_more() {
        let mut queue = Queue::new();
        let [heavy, light, double] =
            [(1, 1), (2, 1), (3, 2)].map(|(tenant, weight)| who(Priority::Normal, tenant, weight));
        crowd(&mut queue, heavy, 10_000);
        served(&mut queue, [heavy], 500);
        crowd(&mut queue, light, 100);
        crowd(&mut queue, double, 200);
        assert_eq!(
            served(&mut queue, [heavy, light, double], 400),
            [100, 100, 200]
        );
    }

    #[test]
    fn weights_count_exactly_whatever_a_call_costs() {
        for cost in [1, 1_000, 3_600_000_000_000] {
            for (a, b) in [(33, 64), (1, 100), (999, 1_000), (1_000_000, 1_000_001)] {
                let mut queue = Queue::new();
                let both = [who(Priority::Normal, 1, a), who(Priority::Normal, 2, b)];
                for who in both {
                    crowd(&mut queue, who, 2_000);
                }
                let served = served_at(&mut queue, both, 1_940, cost);
                let expected = 1_940.0 * f64::from(b) / f64::from(a + b);
                let off = (served[1] as f64 - expected).abs();
                assert!(off <= 1.0, "{a}:{b} at {cost}: {served:?}");
            }
        }
    }

    #[test]
    fn a_tenant_has_the_weight_that_was_named_last() {
        let mut queue = Queue::new();
        let [before, after, other] =
            [(1, 1), (1, 3), (2, 1)].map(|(tenant, weight)| who(Priority::Normal, tenant, weight));
        crowd(&mut queue, before, 100);
        crowd(&mut queue, other, 100);
        crowd(&mut queue, after, 1);
        assert_eq!(served(&mut queue, [before, after, other], 80), [0, 60, 20]);
        assert_eq!(queue.flows.len(), 2);
    }

    #[test]
    fn a_call_that_is_given_back_counts_as_not_served() {
        let mut queue = Queue::new();
        let both = [1, 2].map(|tenant| who(Priority::Normal, tenant, 1));
        for who in both {
            crowd(&mut queue, who, 10);
        }
        let first = queue.head().unwrap().0;
        queue.serve(first, 1_000);
        assert_ne!(queue.head().unwrap().0.flow, first.flow);
        queue.release(first, 1_000);
        assert_eq!(queue.head().unwrap().0.flow, first.flow);
        assert_eq!(served(&mut queue, both, 10), [5, 5]);
    }

    #[test]
    fn a_higher_priority_gets_more_and_a_low_one_some() {
        let mut queue = Queue::new();
        let all = Priority::ALL.map(|priority| who(priority, 1, 1));
        for who in all {
            crowd(&mut queue, who, 1_000);
        }
        assert_eq!(served(&mut queue, all, 730), [640, 80, 10]);
    }

    #[test]
    fn tenants_that_come_and_go_leave_nothing_behind() {
        let mut queue = Queue::new();
        for tenant in 0..10_000 {
            crowd(&mut queue, who(Priority::Normal, tenant, 1), 1);
            served(&mut queue, [who(Priority::Normal, tenant, 1)], 1);
        }
        assert!(queue.flows.len() <= 128 && queue.ids.len() <= 128);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10_000))]

        /// A waiting call is served before the other flows have taken more than their
        /// weights give them in the meantime, however they come, go and come back.
        #[test]
        fn no_call_starves(
            priority in 0..Priority::ALL.len(),
            weight in 1..8u32,
            others in proptest::collection::vec(
                (0..Priority::ALL.len(), 0..6u64, 1..8u32, 1..1_000u64, any::<bool>()),
                1..60,
            ),
        ) {
            let mut queue = Queue::<()>::new();
            let class = |i: usize| Priority::ALL[i];
            let mut ticket = 0;
            let mut push = |queue: &mut Queue<()>, who| {
                ticket += 1;
                queue.push(who, QueuePosition(ticket), ticket, Charge::default())
            };
            let patient = who(class(priority), 99, weight);
            for (i, tenant, weight, cost, _) in &others {
                push(&mut queue, who(class(*i), *tenant, *weight));
                let (key, _) = queue.head().unwrap();
                queue.serve(key, *cost);
            }
            let waiting = push(&mut queue, patient);
            // Its class is one of three, its tenant one of seven in it, each cost below 1,000.
            let most = (64 / class(priority).weight() * 2 + 2) * 1_000 * 3 * 7 * 64;
            let mut taken = 0;
            for (i, tenant, weight, cost, leaves) in others.iter().cycle() {
                let key = push(&mut queue, who(class(*i), *tenant, *weight));
                if *leaves {
                    queue.remove(key);
                }
                let (head, _) = queue.head().unwrap();
                queue.serve(head, *cost);
                if head == waiting {
                    break;
                }
                taken += cost;
                prop_assert!(taken < u64::from(most), "passed over for {taken}");
            }
        }
    }
}
