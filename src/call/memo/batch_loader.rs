//! [`BatchLoader`]: combines the lookups of many callers into few round trips.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::task::yield_now;

use crate::error::Result;
use crate::store::{Generation, MemoKey, Store};
use crate::sync::Mutex;

/// The largest number of keys in one statement.
const MAX_KEYS: usize = 512;

type Answer = oneshot::Sender<Result<Option<Generation>>>;

/// Callers that come while a round trip is in progress wait, and the next round trip is for all of them: one of the waiting
/// callers makes it. There is no task, and a caller that is dropped does not take the others with it.
pub(super) struct BatchLoader {
    store: Arc<dyn Store>,
    waiting: Mutex<Vec<(Arc<str>, MemoKey, Answer)>>,
    /// Held by the caller that makes the round trip.
    round_trip: tokio::sync::Mutex<()>,
}

impl BatchLoader {
    pub(super) fn new(store: Arc<dyn Store>) -> Self {
        Self {
            store,
            waiting: Mutex::default(),
            round_trip: tokio::sync::Mutex::new(()),
        }
    }

    /// Looks up the reply under this key.
    pub(super) async fn load(&self, tenant: &Arc<str>, key: MemoKey) -> Result<Option<Generation>> {
        loop {
            let (sender, mut answer) = oneshot::channel();
            self.waiting.lock().push((Arc::clone(tenant), key, sender));
            loop {
                tokio::select! {
                    biased;
                    answered = &mut answer => match answered {
                        Ok(answered) => return answered,
                        // The caller that made the round trip was dropped in the middle.
                        Err(_) => break,
                    },
                    _guard = self.round_trip.lock() => {
                        // Callers that come at this moment need not wait for the next round trip.
                        // Twice, because a caller with a bound polls this again at once.
                        yield_now().await;
                        yield_now().await;
                        self.load_waiting().await;
                    }
                }
            }
        }
    }

    /// Makes one round trip for each tenant among the waiting callers.
    async fn load_waiting(&self) {
        let wanted = {
            let mut waiting = self.waiting.lock();
            let rest = waiting.len().min(MAX_KEYS);
            let rest = waiting.split_off(rest);
            std::mem::replace(&mut *waiting, rest)
        };
        let mut tenants = HashMap::<Arc<str>, Vec<(MemoKey, Answer)>>::new();
        for (tenant, key, answer) in wanted {
            tenants.entry(tenant).or_default().push((key, answer));
        }
        for (tenant, wanted) in tenants {
            let keys: Vec<_> = wanted.iter().map(|(key, _)| *key).collect();
            let found = self.store.generations(&tenant, &keys).await;
            let found = found.map(|found| {
                let found = found.into_iter();
                found
                    .map(|found| (found.key, found))
                    .collect::<HashMap<_, _>>()
            });
            for (key, answer) in wanted {
                let found = match &found {
                    Ok(found) => Ok(found.get(&key).cloned()),
                    Err(error) => Err(error.clone()),
                };
                // The caller may have gone meanwhile.
                let _ = answer.send(found);
            }
        }
    }
}
