//! [`Lookups`]: many that look for a reply at a time, in few round trips.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Mutex as Turn, oneshot};
use tokio::task::yield_now;

use crate::error::Result;
use crate::store::{Generation, MemoKey, Store};

/// As many as one statement may ask for.
const MOST: usize = 512;

type Answer = oneshot::Sender<Result<Option<Generation>>>;

/// Who comes while a round trip is under way waits, and all who wait go together: one of them asks
/// for all. There is no task, and who is dropped takes nobody with it.
pub(super) struct Lookups {
    store: Arc<dyn Store>,
    waiting: Mutex<Vec<(Arc<str>, MemoKey, Answer)>>,
    turn: Turn<()>,
}

impl Lookups {
    pub(super) fn new(store: Arc<dyn Store>) -> Self {
        Self {
            store,
            waiting: Mutex::default(),
            turn: Turn::new(()),
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<(Arc<str>, MemoKey, Answer)>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn find(&self, tenant: &Arc<str>, key: MemoKey) -> Result<Option<Generation>> {
        loop {
            let (sender, mut answer) = oneshot::channel();
            self.waiting().push((Arc::clone(tenant), key, sender));
            loop {
                tokio::select! {
                    biased;
                    answered = &mut answer => match answered {
                        Ok(answered) => return answered,
                        // Who asked for us was dropped in the middle.
                        Err(_) => break,
                    },
                    _turn = self.turn.lock() => {
                        // Those who come in this moment need not wait for the next round trip.
                        // Twice, because who bounds a wait polls it once more at once.
                        yield_now().await;
                        yield_now().await;
                        self.ask().await;
                    }
                }
            }
        }
    }

    /// One round trip for each tenant among those who wait.
    async fn ask(&self) {
        let asked = {
            let mut waiting = self.waiting();
            let rest = waiting.len().min(MOST);
            let rest = waiting.split_off(rest);
            std::mem::replace(&mut *waiting, rest)
        };
        let mut tenants = HashMap::<Arc<str>, Vec<(MemoKey, Answer)>>::new();
        for (tenant, key, answer) in asked {
            tenants.entry(tenant).or_default().push((key, answer));
        }
        for (tenant, asked) in tenants {
            let keys: Vec<_> = asked.iter().map(|(key, _)| *key).collect();
            let found = self.store.generations(&tenant, &keys).await;
            let found = found.map(|found| {
                let found = found.into_iter();
                found
                    .map(|found| (found.key, found))
                    .collect::<HashMap<_, _>>()
            });
            for (key, answer) in asked {
                let found = match &found {
                    Ok(found) => Ok(found.get(&key).cloned()),
                    Err(error) => Err(error.clone()),
                };
                // One who has gone in the meantime wants to know nothing.
                let _ = answer.send(found);
            }
        }
    }
}
