//! A random walk over a store and [`Memory`], the model: both must answer alike.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use serde_json::Value;

use super::{LONG, all_items};
use crate::error::{Error, ErrorKind, Result};
use crate::request::Request;
use crate::request::Usage;
use crate::store::{
    Claim, Commit, Generation, Handling, Hold, Intent, Item, ItemId, LeaseId, MemoKey, Memory,
    NewItem, NewRun, Note, Queue, RunFilter, RunId, Settlement, Status, Store as _, StoreExt as _,
};

/// Takes `steps` random steps on `store`, which must be empty, and on a [`Memory`], and compares their answers and, every
/// few steps, all their rows. The same `seed` takes the same steps.
///
/// # Panics
/// At the first difference, with the steps that led to it.
pub async fn against_model(store: Arc<dyn Queue>, seed: u64, steps: usize) {
    let mut walk = Walk {
        rng: Rng::with_seed(seed),
        model: Memory::new(),
        store,
        runs: Vec::new(),
        leases: Vec::new(),
        holds: Vec::new(),
        items: HashMap::new(),
        trail: vec![format!("seed {seed}")],
    };
    for step in 0..steps {
        walk.step().await;
        if step % 16 == 15 || step + 1 == steps {
            walk.compare().await;
        }
    }
    super::audit(&*walk.store).await;
    super::audit(&walk.model).await;
}

/// The ids of one object in the model and in the store.
type Twin<T> = (T, T);

struct Walk {
    rng: Rng,
    model: Memory,
    store: Arc<dyn Queue>,
    runs: Vec<Twin<RunId>>,
    leases: Vec<Twin<LeaseId>>,
    /// All holds so far, most of them stale.
    holds: Vec<Twin<Hold>>,
    /// The number in the model of each item in the store.
    items: HashMap<ItemId, ItemId>,
    trail: Vec<String>,
}

macro_rules! both {
    ($walk:ident, |$side:ident, $pick:ident| $call:expr) => {{
        let model = {
            let $side = &$walk.model;
            let $pick = Pick(false);
            $call.await
        };
        let store = {
            let $side = &$walk.store;
            let $pick = Pick(true);
            $call.await
        };
        (model, store)
    }};
}

/// Selects one side of a [`Twin`].
#[derive(Clone, Copy)]
struct Pick(bool);

impl Pick {
    fn of<T: Copy>(self, twin: Twin<T>) -> T {
        if self.0 { twin.1 } else { twin.0 }
    }
}

impl Walk {
    fn same<T: PartialEq + std::fmt::Debug>(&self, (model, store): (T, T)) {
        assert!(
            model == store,
            "the model has {model:#?}\nand the store {store:#?}\nafter {:#?}",
            self.trail
        );
    }

    fn run(&mut self) -> Twin<RunId> {
        let nobody = (RunId(i64::MAX), RunId(i64::MAX));
        self.rng.choice(&self.runs).copied().unwrap_or(nobody)
    }

    fn lease(&mut self) -> Twin<LeaseId> {
        let nobody = (LeaseId(i64::MAX), LeaseId(i64::MAX));
        // Mostly the latest lease, because older ones expire.
        let last = self.leases.last().copied();
        let any = self.rng.choice(&self.leases).copied();
        if self.rng.u8(..4) > 0 { last } else { any }.unwrap_or(nobody)
    }

    /// Returns up to six holds of different items, most of them recent.
    fn some_holds(&mut self) -> Vec<Twin<Hold>> {
        let mut some: Vec<Twin<Hold>> = Vec::new();
        let recent = self.holds.len().saturating_sub(12);
        for _ in 0..self.rng.usize(..7) {
            let from = if self.rng.u8(..5) == 0 { 0 } else { recent };
            if let Some(hold) = self.rng.choice(&self.holds[from..])
                && some.iter().all(|other| other.0.item != hold.0.item)
            {
                some.push(*hold);
            }
        }
        some
    }

    fn key(&mut self) -> MemoKey {
        MemoKey::new([self.rng.u8(..6); 32])
    }

    /// Returns the comparable part of an item, with its number in the model.
    fn seen(&self, item: &Item, of_store: bool) -> String {
        let id = if of_store {
            self.items[&item.id]
        } else {
            item.id
        };
        let Item {
            seq,
            key,
            tenant,
            status,
            epoch,
            attempt,
            handling,
            ..
        } = item;
        let (output, error) = (&item.output, item.error.as_ref().map(ToString::to_string));
        format!(
            "{id} {seq} {key} {tenant} {status} {epoch} {attempt} {handling:?} {output:?} {error:?}"
        )
    }

    async fn step(&mut self) {
        let kind = self.rng.u8(..100);
        match kind {
            0..12 => self.create().await,
            12..18 => {
                let ttl = *self
                    .rng
                    .choice([Duration::ZERO, LONG, LONG].iter())
                    .unwrap_or(&LONG);
                self.trail.push(format!("register {ttl:?}"));
                let (model, store) = both!(self, |side, _pick| side.register("w", ttl));
                self.leases.push((model.unwrap(), store.unwrap()));
            }
            18..45 => self.claim().await,
            45..70 => self.commit().await,
            70..76 => {
                let holds = self.some_holds();
                let delay = if self.rng.bool() {
                    Duration::ZERO
                } else {
                    LONG
                };
                let charge = self.rng.bool();
                self.trail
                    .push(format!("release {holds:?} {delay:?} {charge}"));
                let released = both!(self, |side, pick| {
                    let holds: Vec<_> = holds.iter().map(|hold| pick.of(*hold)).collect();
                    async move { side.release(&holds, delay, charge).await.unwrap() }
                });
                self.same(released);
            }
            76..80 => {
                let lease = self.lease();
                let ttl = if self.rng.bool() {
                    Duration::ZERO
                } else {
                    LONG
                };
                self.trail.push(format!("heartbeat {lease:?} {ttl:?}"));
                let (model, store) = both!(self, |side, pick| side.heartbeat(pick.of(lease), ttl));
                self.same((model.unwrap(), store.unwrap()));
            }
            80..83 => {
                let lease = self.lease();
                self.trail.push(format!("retire {lease:?}"));
                let (model, store) = both!(self, |side, pick| side.retire(pick.of(lease)));
                self.same((model.unwrap(), store.unwrap()));
            }
            83..90 => {
                self.trail.push("reap".to_owned());
                let (model, store) = both!(self, |side, _pick| side.reap());
                self.same((model.unwrap(), store.unwrap()));
            }
            90..92 => {
                let run = self.run();
                self.trail.push(format!("cancel {run:?}"));
                let (model, store) = both!(self, |side, pick| side.cancel(pick.of(run)));
                self.same((model.unwrap(), store.unwrap()));
            }
            92..96 => {
                let run = self.run();
                self.trail.push(format!("retry_failed {run:?}"));
                let (model, store) = both!(self, |side, pick| side.retry_failed(pick.of(run)));
                self.same((model.unwrap(), store.unwrap()));
            }
            _ => self.intend().await,
        }
    }

    async fn create(&mut self) {
        let tenant = ["", "a", "B", "\u{e9}"][self.rng.usize(..4)];
        let n = self.rng.usize(..6);
        let mut new = NewRun::new(tenant, ["p", "p", "q"][self.rng.usize(..3)])
            .priority(self.rng.i32(-1..2))
            .max_attempts(self.rng.u32(1..4))
            .items((0..n).map(|i| NewItem::new(format!("k{i}"), "1")));
        if self.rng.u8(..4) == 0 {
            new = new.idempotency_key(self.rng.u8(..3).to_string());
        }
        self.trail.push(format!("create {new:?}"));
        let (model, store) = both!(self, |side, _pick| side.create_run(new.clone()));
        let (model, store) = (model.unwrap(), store.unwrap());
        self.same((model.new, store.new));
        if model.new {
            self.runs.push((model.run, store.run));
            let theirs = all_items(&*self.store, store.run).await;
            for (ours, theirs) in all_items(&self.model, model.run).await.iter().zip(&theirs) {
                self.items.insert(theirs.id, ours.id);
                self.holds.push((ours.hold(), theirs.hold()));
            }
        }
    }

    async fn claim(&mut self) {
        let (lease, limit) = (self.lease(), self.rng.u32(..9));
        let names = [&["p", "q"][..], &["q", "p", "p"], &["p"], &["q"], &[]];
        let names = names[self.rng.usize(..names.len())];
        // Mostly the normal handling, which most items have.
        let handling = Handling::from_i32(self.rng.i32(-4..4).max(0));
        let claim = Claim::new(names, limit).handling(handling);
        self.trail.push(format!("{lease:?} {claim:?}"));
        let suspects = both!(self, |side, _pick| side.has_suspects(&claim.pipelines));
        self.same((suspects.0.unwrap(), suspects.1.unwrap()));
        let claimed = both!(self, |side, pick| side.claim(pick.of(lease), claim.clone()));
        match claimed {
            (Ok(model), Ok(store)) => {
                let seen = |items: &[Item], of_store| -> Vec<_> {
                    items.iter().map(|item| self.seen(item, of_store)).collect()
                };
                self.same((seen(&model, false), seen(&store, true)));
                let twins = model.iter().zip(&store);
                let twins: Vec<_> = twins.map(|(a, b)| (a.hold(), b.hold())).collect();
                self.holds.extend(twins);
            }
            (model, store) => {
                let kind = |result: Result<Vec<Item>>| {
                    result.map(|items| items.len()).map_err(|e| e.kind())
                };
                self.same((kind(model), kind(store)));
            }
        }
    }

    async fn commit(&mut self) {
        let holds = self.some_holds();
        let results: Vec<Result<String>> = holds
            .iter()
            .map(|_| match self.rng.u8(..4) {
                0 => Err(Error::new(ErrorKind::Other, self.rng.u8(..).to_string())),
                _ => Ok(self.rng.u8(..).to_string()),
            })
            .collect();
        let generations: Vec<_> = (0..self.rng.usize(..3))
            .map(|_| Generation {
                tenant: ["", "a"][self.rng.usize(..2)].to_owned(),
                key: self.key(),
                request: Request::new("a").digest(),
                body: self.rng.u8(..).to_string(),
                usage: Usage::new(1, 2),
                cost_micros: None,
            })
            .collect();
        let notes: Vec<_> = (0..self.rng.usize(..2)).map(|_| self.run()).collect();
        self.trail
            .push(format!("commit {holds:?} {results:?} {notes:?}"));
        let (model, store) = both!(self, |side, pick| {
            let settled = holds.iter().zip(&results).map(|(hold, result)| Settlement {
                hold: pick.of(*hold),
                result: result.clone(),
            });
            let note = |run: &Twin<RunId>| Note {
                run: pick.of(*run),
                kind: "note".to_owned(),
                data: "{}".to_owned(),
            };
            let commit = Commit::new()
                .generations(generations.clone())
                .settlements(settled)
                .notes(notes.iter().map(note));
            async move { side.commit(commit).await.unwrap() }
        });
        let ours: Vec<_> = store.items.iter().map(|id| self.items[id]).collect();
        self.same(((model.items, model.generations), (ours, store.generations)));
    }

    async fn intend(&mut self) {
        let Some(hold) = self.rng.choice(&self.holds).copied() else {
            return;
        };
        let (key, attempt) = (self.key(), self.rng.u32(1..3));
        self.trail.push(format!("intend {hold:?} {attempt}"));
        let (model, store) = both!(self, |side, pick| {
            let intent = Intent {
                item: pick.of(hold).item,
                attempt,
                key,
                provider_ref: None,
            };
            async move {
                side.put_intents(&[intent]).await.unwrap();
                side.ambiguous_intents(None, 1000).await.unwrap()
            }
        });
        let ours = |mut intent: Intent| {
            intent.item = self.items[&intent.item];
            intent
        };
        self.same((model, store.into_iter().map(ours).collect()));
    }

    /// Compares all runs, items, logs and generations of both sides.
    async fn compare(&self) {
        for (model, store) in &self.runs {
            let mut sides = Vec::new();
            for (of_store, run) in [(false, *model), (true, *store)] {
                let side: &dyn Queue = if of_store { &*self.store } else { &self.model };
                let run = side.run(run).await.unwrap().expect("the run is there");
                let error = run.error.as_ref().map(ToString::to_string);
                let counts = (
                    run.status,
                    run.total,
                    run.completed,
                    run.failed,
                    run.cancelled,
                );
                let items = all_items(side, run.id).await;
                let items: Vec<_> = items.iter().map(|item| self.seen(item, of_store)).collect();
                let log = side.log(run.id, 0, u32::MAX).await.unwrap();
                let entry = |data: &str| serde_json::from_str::<Value>(data).unwrap();
                let log: Vec<_> = log
                    .iter()
                    .map(|e| (e.seq, e.kind.clone(), entry(&e.data)))
                    .collect();
                sides.push((run.tenant, counts, run.log_seq, error, items, log));
            }
            let store = sides.remove(1);
            self.same((sides.remove(0), store));
        }
        for status in [None, Some(Status::Pending), Some(Status::Failed)] {
            let (model, store) = both!(self, |side, _pick| {
                let filter = RunFilter {
                    status,
                    ..RunFilter::default()
                };
                async move { side.runs(filter, 1000).await.unwrap() }
            });
            self.same((model.len(), store.len()));
        }
        let keys: Vec<_> = (0..6).map(|n| MemoKey::new([n; 32])).collect();
        for tenant in ["", "a"] {
            let (mut model, mut store) = both!(self, |side, _pick| {
                let keys = &keys;
                async move { side.generations(tenant, keys).await.unwrap() }
            });
            model.sort_by_key(|generation| generation.key);
            store.sort_by_key(|generation| generation.key);
            self.same((model, store));
        }
    }
}
