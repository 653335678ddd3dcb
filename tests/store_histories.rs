//! Random histories of store calls: several actors on several handles, calls that are dropped at random
//! polls, connections that end in the middle, and afterwards an audit of everything that was acknowledged.
//!
//! A history follows from its seed as far as the interleaving of the actors does; a failure prints the seed.
//!
//! ```text
//! THROUGHLINE_SEED=17 cargo test --all-features --test store_histories sqlite      # one history
//! THROUGHLINE_STEPS=40 THROUGHLINE_ACTORS=2 THROUGHLINE_SEED=17 cargo test …       # a smaller one
//! THROUGHLINE_LONG=1 THROUGHLINE_MINUTES=12 cargo test …                           # for so long, per store
//! ```
#![cfg(all(feature = "sqlite", feature = "postgres", feature = "testing"))]

#[path = "support/postgres.rs"]
mod postgres;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fastrand::Rng;
use throughline::store::{
    Claim, Commit, Committed, Durability, Generation, Handling, Intent, IntentFilter, IntentName,
    Item, ItemId, LeaseId, MemoKey, Memory, NewItem, NewRun, Note, Postgres, Queue, QueueExt as _,
    RunFilter, RunId, Settlement, Sqlite, Status, StoreExt as _,
};
use throughline::testing::Counted;
use throughline::{Error, ErrorKind, Result, Runner, Usage, request::RequestDigest};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use self::postgres::Schemas;

const LONG: Duration = Duration::from_secs(3600);
/// Longer than any call takes, unless locks block it forever.
const PATIENCE: Duration = Duration::from_secs(45);
const HANDLINGS: [Handling; 4] = [
    Handling::Normal,
    Handling::Few,
    Handling::Alone,
    Handling::LastAttempt,
];
const TENANTS: [&str; 3] = ["", "a", "b"];

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

fn long_form() -> bool {
    std::env::var_os("THROUGHLINE_LONG").is_some()
}

/// The parameters of a history.
#[derive(Debug, Clone, Copy)]
struct Plan {
    seed: u64,
    actors: u64,
    steps: u64,
    /// Whether runs and generations are removed meanwhile: then less can be asked for at the end.
    purges: bool,
    /// Whether a call may fail with a temporary error, as when its connection is ended.
    outages: bool,
}

impl Plan {
    fn new(seed: u64, outages: bool) -> Self {
        Self {
            seed,
            actors: number("THROUGHLINE_ACTORS").unwrap_or(6),
            steps: number("THROUGHLINE_STEPS").unwrap_or(if long_form() { 120 } else { 60 }),
            purges: seed % 3 == 2,
            outages,
        }
    }
}

/// The requests and acknowledgements of all actors.
#[derive(Default)]
struct Books {
    /// Runs that were acknowledged, with the number of their items and their idempotency key.
    runs: BTreeMap<RunId, (usize, Option<(String, String)>)>,
    keys: HashMap<(String, String), RunId>,
    leases: Vec<LeaseId>,
    /// Claims that were acknowledged. None may come twice.
    claims: HashSet<(ItemId, i64)>,
    /// Outputs that were sent, and those that were acknowledged as committed.
    sent: HashSet<(ItemId, String)>,
    completed: HashMap<ItemId, String>,
    /// Replies that were sent under a key, and the one that was found there after an acknowledgement.
    bodies: HashMap<(String, MemoKey), HashSet<String>>,
    kept: HashMap<(String, MemoKey), String>,
    /// Notes that were sent by their text, with their run, and whether it was known to be there and the
    /// note was acknowledged.
    notes: HashMap<String, (RunId, bool, bool)>,
    /// Intents that were acknowledged, and those whose end was sent.
    intents: HashSet<IntentName>,
    over: HashSet<IntentName>,
    cancelled: HashSet<RunId>,
    /// Runs that an actor retried.
    retried: HashSet<RunId>,
    /// How many runs may have been removed.
    removed: u64,
    calls: u64,
    dropped: u64,
    failed: u64,
    /// The latest calls, for who has to find out.
    trail: VecDeque<String>,
}

impl Books {
    fn note(&mut self, line: String) {
        self.trail.push_back(line);
        if self.trail.len() > 80 {
            self.trail.pop_front();
        }
    }

    /// Panics with what led here.
    fn broken(&self, plan: Plan, what: &str) -> ! {
        let trail: Vec<_> = self.trail.iter().map(String::as_str).collect();
        panic!("{what}\n{plan:?}\nthe latest calls:\n{}", trail.join("\n"))
    }
}

struct History {
    plan: Plan,
    books: Mutex<Books>,
}

/// How a call ended.
enum Ended<T> {
    Acknowledged(T),
    /// It was dropped, or its connection ended: it may have happened.
    Unknown,
    LeaseLost,
}

impl History {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a call, and perhaps drops it: after some polls, or after some time.
    async fn call<T>(
        &self,
        rng: &mut Rng,
        what: String,
        call: impl Future<Output = Result<T>>,
    ) -> Ended<T> {
        let drop = rng.u8(..3) == 0;
        // Never begun, or begun and dropped at once; else after some time.
        let polls = if rng.bool() {
            rng.usize(..2)
        } else {
            usize::MAX
        };
        let limit = match drop && polls == usize::MAX {
            true => Duration::from_micros(rng.u64(..4000)),
            false => PATIENCE,
        };
        let polls = if drop { polls } else { usize::MAX };
        let done = timeout(limit, polled(call, polls)).await;
        let mut books = self.books();
        books.calls += 1;
        let (word, ended) = match done {
            Err(_) if limit == PATIENCE => books.broken(self.plan, &format!("{what} hangs")),
            Err(_) | Ok(None) => {
                books.dropped += 1;
                ("dropped".to_owned(), Ended::Unknown)
            }
            Ok(Some(Ok(done))) => ("done".to_owned(), Ended::Acknowledged(done)),
            Ok(Some(Err(error))) if error.kind() == ErrorKind::LeaseLost => {
                ("lease lost".to_owned(), Ended::LeaseLost)
            }
            Ok(Some(Err(error))) if self.plan.outages && error.is_temporary() => {
                books.failed += 1;
                (error.to_string(), Ended::Unknown)
            }
            Ok(Some(Err(error))) => {
                books.broken(self.plan, &format!("{what} fails: {error:?}"));
            }
        };
        books.note(format!("{what}: {word}"));
        ended
    }

    fn check(&self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.books().broken(self.plan, &what());
        }
    }
}

/// The result of a future that is polled so often at most, and dropped then.
async fn polled<T>(call: impl Future<Output = T>, polls: usize) -> Option<T> {
    let mut call = pin!(call);
    let mut left = polls;
    poll_fn(|cx| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        match call.as_mut().poll(cx) {
            Poll::Ready(done) => Poll::Ready(Some(done)),
            Poll::Pending if left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// Takes items whatever became of their workers before.
async fn claim(
    store: &dyn Queue,
    lease: LeaseId,
    handling: Handling,
    limit: u32,
) -> Result<Vec<Item>> {
    let claim = Claim::new(["p"], limit).handling(handling);
    store.claim(lease, claim).await
}

/// One of those who call the store, with a lease and what it has claimed.
struct Actor {
    name: u64,
    history: Arc<History>,
    store: Arc<dyn Queue>,
    rng: Rng,
    lease: Option<LeaseId>,
    items: Vec<Item>,
    made: u64,
}

impl Actor {
    fn unique(&mut self) -> String {
        self.made += 1;
        format!("\"{}.{}\"", self.name, self.made)
    }

    /// A run that there is or was, mostly a recent one.
    fn run(&mut self) -> RunId {
        let books = self.history.books();
        let last = books.runs.keys().next_back().map_or(1, |run| run.0);
        RunId((last - self.rng.i64(..12)).max(1))
    }

    /// Some of its items, each once; they stay its own with `keep`.
    fn some_items(&mut self, keep: bool) -> Vec<Item> {
        let many = self.rng.usize(..5).min(self.items.len());
        let from = self.items.len() - many;
        let some = match keep {
            true => self.items[from..].to_vec(),
            false => self.items.split_off(from),
        };
        let mut seen = HashSet::new();
        some.into_iter()
            .filter(|item| seen.insert(item.id))
            .collect()
    }

    async fn act(mut self) {
        for _ in 0..self.history.plan.steps {
            let Some(lease) = self.lease else {
                self.register().await;
                continue;
            };
            match self.rng.u8(..100) {
                0..8 => self.create().await,
                8..30 => self.claim(lease).await,
                30..58 => self.commit().await,
                58..64 => self.intend().await,
                64..70 => self.release().await,
                70..74 => {
                    let run = self.run();
                    let what = format!("{} cancel {run}", self.name);
                    let (history, store) = (Arc::clone(&self.history), Arc::clone(&self.store));
                    let ended = history.call(&mut self.rng, what, store.cancel(run)).await;
                    if matches!(ended, Ended::Acknowledged(stopped) if stopped > 0) {
                        history.books().cancelled.insert(run);
                    }
                }
                74..78 => {
                    let run = self.run();
                    let what = format!("{} retry {run}", self.name);
                    self.history.books().retried.insert(run);
                    let call = self.store.retry_failed(run);
                    self.history.call(&mut self.rng, what, call).await;
                }
                78..84 => {
                    let what = format!("{} reap", self.name);
                    let call = self.store.reap();
                    self.history.call(&mut self.rng, what, call).await;
                }
                84..88 => {
                    let ttl = if self.rng.bool() {
                        LONG
                    } else {
                        Duration::from_millis(5)
                    };
                    let what = format!("{} heartbeat {lease} {ttl:?}", self.name);
                    let call = self.store.heartbeat(lease, ttl);
                    let ended = self.history.call(&mut self.rng, what, call).await;
                    if matches!(ended, Ended::Acknowledged(false)) {
                        self.lease = None;
                    }
                }
                88..90 => {
                    let what = format!("{} retire {lease}", self.name);
                    let call = self.store.retire(lease);
                    self.history.call(&mut self.rng, what, call).await;
                    self.lease = None;
                }
                90..92 => self.purge().await,
                _ => self.read(lease).await,
            }
        }
    }

    async fn register(&mut self) {
        let what = format!("{} register", self.name);
        let call = self.store.register("actor", LONG);
        if let Ended::Acknowledged(lease) = self.history.call(&mut self.rng, what, call).await {
            self.history.books().leases.push(lease);
            self.lease = Some(lease);
        }
    }

    async fn create(&mut self) {
        let tenant = self.rng.choice(TENANTS).unwrap_or_default();
        let total = match self.rng.u8(..120) {
            0 => 10_050, // More than one statement takes.
            _ => self.rng.usize(..9),
        };
        let items = (0..total).map(|n| NewItem::new(format!("k{n}"), "1"));
        let mut new = NewRun::new(tenant, "p")
            .max_attempts(self.rng.u32(1..4))
            .priority(self.rng.i32(-1..2))
            .items(items);
        let key = (self.rng.u8(..4) == 0).then(|| format!("key {}", self.rng.u8(..12)));
        new.idempotency_key = key.clone();
        let what = format!("{} create {total} {key:?}", self.name);
        let call = self.store.create_run(new);
        let Ended::Acknowledged(created) = self.history.call(&mut self.rng, what, call).await
        else {
            return;
        };
        let key = key.map(|key| (tenant.to_owned(), key));
        let history = &self.history;
        let mut books = history.books();
        if created.new {
            let before = books.runs.insert(created.run, (total, key.clone()));
            if before.is_some() {
                books.broken(
                    history.plan,
                    &format!("run {} was created twice", created.run),
                );
            }
        }
        if let Some(key) = key {
            let known = *books.keys.entry(key.clone()).or_insert(created.run);
            if known != created.run && !history.plan.purges {
                books.broken(
                    history.plan,
                    &format!("{key:?} names {known} and {}", created.run),
                );
            }
            books.keys.insert(key, created.run);
        }
    }

    async fn claim(&mut self, lease: LeaseId) {
        let limit = self.rng.u32(..9);
        let what = format!("{} claim {limit} for {lease}", self.name);
        let store = Arc::clone(&self.store);
        let handling = match self.rng.u8(..2) {
            0 => Handling::Normal,
            _ => self.rng.choice(HANDLINGS).unwrap_or_default(),
        };
        let call = claim(&*store, lease, handling, limit);
        match self.history.call(&mut self.rng, what, call).await {
            Ended::Acknowledged(items) => {
                let mut books = self.history.books();
                books.note(format!("{} has {:?}", self.name, holds(&items)));
                for item in &items {
                    if !books.claims.insert((item.id, item.epoch)) {
                        let what = format!("item {} epoch {} was dealt twice", item.id, item.epoch);
                        books.broken(self.history.plan, &what);
                    }
                }
                self.items.extend(items);
            }
            Ended::LeaseLost => self.lease = None,
            Ended::Unknown => {}
        }
        // The older ones stay as they are, until their lease runs out.
        if self.items.len() > 40 {
            self.items.drain(..20);
        }
    }

    async fn commit(&mut self) {
        let keep = self.rng.u8(..4) == 0;
        let items = self.some_items(keep);
        let mut commit = Commit::new();
        let mut outputs = HashMap::new();
        for item in &items {
            let result = match self.rng.u8(..3) {
                0 => Err(Error::new(ErrorKind::InvalidOutput, "broken")),
                _ => Ok(self.unique()),
            };
            if let Ok(output) = &result {
                outputs.insert(item.id, output.clone());
            }
            let hold = item.hold();
            commit.settlements.push(Settlement::new(hold, result));
        }
        let mut keys = Vec::new();
        for _ in 0..self.rng.usize(..3) {
            let tenant = self.rng.choice(TENANTS).unwrap_or_default().to_owned();
            let key = MemoKey::new([self.rng.u8(..40); 32]);
            keys.push((tenant.clone(), key));
            commit.generations.push(Generation::new(
                tenant,
                key,
                RequestDigest::from_bytes([1; 32]),
                self.unique(),
                Usage::new(1, 1),
            ));
        }
        for _ in 0..self.rng.usize(..2) {
            let (run, data) = (self.run(), self.unique());
            let kind = "note".to_owned();
            commit.notes.push(Note::new(run, kind, data));
        }
        commit.ended_intents = items.iter().filter(|_| keep).map(intent_of).collect();
        {
            let mut books = self.history.books();
            books
                .sent
                .extend(outputs.iter().map(|(id, text)| (*id, text.clone())));
            books.over.extend(&commit.ended_intents);
            for g in &commit.generations {
                let bodies = books.bodies.entry((g.tenant.clone(), g.key)).or_default();
                bodies.insert(g.body.clone());
            }
            for note in &commit.notes {
                let known = books.runs.contains_key(&note.run);
                books
                    .notes
                    .insert(note.data.clone(), (note.run, known, false));
            }
        }
        let notes: Vec<_> = commit.notes.iter().map(|note| note.data.clone()).collect();
        let what = format!("{} commit {:?} keep {keep}", self.name, holds(&items));
        let call = self.store.commit(commit);
        let Ended::Acknowledged(committed) = self.history.call(&mut self.rng, what, call).await
        else {
            return;
        };
        self.acknowledge(&committed, outputs, notes);
        for (tenant, key) in keys {
            self.look(tenant, key).await;
        }
    }

    fn acknowledge(
        &self,
        committed: &Committed,
        outputs: HashMap<ItemId, String>,
        notes: Vec<String>,
    ) {
        let mut books = self.history.books();
        for id in &committed.items {
            let Some(output) = outputs.get(id) else {
                continue;
            };
            if let Some(before) = books.completed.insert(*id, output.clone()) {
                let what = format!("item {id} was completed with {before} and with {output}");
                books.broken(self.history.plan, &what);
            }
        }
        for note in notes {
            if let Some((_, _, acknowledged)) = books.notes.get_mut(&note) {
                *acknowledged = true;
            }
        }
    }

    /// A reply that was acknowledged is there, and stays the same.
    async fn look(&mut self, tenant: String, key: MemoKey) {
        let what = format!("{} generation of {tenant:?}", self.name);
        let keys = [key];
        let call = self.store.generations(&tenant, &keys);
        let Ended::Acknowledged(found) = self.history.call(&mut self.rng, what, call).await else {
            return;
        };
        let plan = self.history.plan;
        let mut books = self.history.books();
        let Some(found) = found.first() else {
            if plan.purges {
                return;
            }
            books.broken(
                plan,
                &format!("a reply of {tenant:?} was acknowledged and is not there"),
            );
        };
        let place = (tenant, key);
        let before = books.kept.insert(place, found.body.clone());
        if before.is_some_and(|before| before != found.body) && !plan.purges {
            books.broken(plan, "a reply has become another one");
        }
    }

    async fn intend(&mut self) {
        let items = self.some_items(true);
        let intents: Vec<_> = items.iter().map(intent_of).map(Intent::new).collect();
        let what = format!("{} intend {:?}", self.name, holds(&items));
        let call = self.store.put_intents(&intents);
        if let Ended::Acknowledged(()) = self.history.call(&mut self.rng, what, call).await {
            let names = intents.iter().map(Intent::name);
            self.history.books().intents.extend(names);
        }
    }

    async fn release(&mut self) {
        let items = self.some_items(false);
        let delay = Duration::from_millis(self.rng.u64(..2) * 10);
        let charge = self.rng.bool();
        let what = format!("{} release {:?} {delay:?}", self.name, holds(&items));
        let held: Vec<_> = items.iter().map(Item::hold).collect();
        let call = self.store.release(&held, delay, charge);
        self.history.call(&mut self.rng, what, call).await;
    }

    async fn purge(&mut self) {
        if !self.history.plan.purges {
            return;
        }
        let (age, limit) = (Duration::from_millis(self.rng.u64(..60)), self.rng.u32(..4));
        let what = format!("{} purge {limit} of {age:?}", self.name);
        let call = self.store.purge(age, limit);
        let ended = self.history.call(&mut self.rng, what, call).await;
        self.history.books().removed += match ended {
            Ended::Acknowledged(purged) => purged.runs,
            _ => u64::from(limit),
        };
    }

    async fn read(&mut self, lease: LeaseId) {
        let run = self.run();
        let what = format!("{} read", self.name);
        let (store, items) = (Arc::clone(&self.store), self.some_items(true));
        let holds: Vec<_> = items.iter().map(Item::hold).collect();
        let ids: Vec<_> = items.iter().map(|item| item.id).collect();
        let which = self.rng.u8(..7);
        let call = async {
            match which {
                0 => store.run(run).await.map(drop),
                1 => store.runs(RunFilter::new(), 20).await.map(drop),
                2 => store.items(run, 0, 50).await.map(drop),
                3 => store.log(run, 0, 50).await.map(drop),
                4 => store.ambiguous_intents(None, 20).await.map(drop),
                5 => {
                    let filter = IntentFilter::items(ids.iter().copied());
                    store.intents(filter, 100).await.map(drop)
                }
                _ => {
                    store.lost(lease, &holds).await?;
                    store.held(lease).await.map(drop)
                }
            }
        };
        self.history.call(&mut self.rng, what, call).await;
    }
}

fn intent_of(item: &Item) -> IntentName {
    IntentName {
        item: item.id,
        attempt: item.epoch as u32,
        key: MemoKey::new([7; 32]),
    }
}

fn holds(items: &[Item]) -> Vec<(i64, i64)> {
    items.iter().map(|item| (item.id.0, item.epoch)).collect()
}

/// Lets the actors of a plan act, on these handles in turn.
async fn act(plan: Plan, handles: &[Arc<dyn Queue>]) -> Arc<History> {
    let history = Arc::new(History {
        plan,
        books: Mutex::default(),
    });
    let mut actors = JoinSet::new();
    for name in 0..plan.actors {
        let actor = Actor {
            name,
            history: Arc::clone(&history),
            store: Arc::clone(&handles[name as usize % handles.len()]),
            rng: Rng::with_seed(plan.seed.wrapping_mul(1000).wrapping_add(name)),
            lease: None,
            items: Vec::new(),
            made: 0,
        };
        actors.spawn(actor.act());
    }
    while let Some(done) = actors.join_next().await {
        if let Err(failed) = done {
            // The other actors go on in the middle of what they do: say why it fails, not what they meet.
            actors.shutdown().await;
            std::panic::resume_unwind(failed.into_panic());
        }
    }
    history
}

/// Ends everything that the actors left open, to check that no lock remains.
async fn finish(history: &History, store: &dyn Queue) {
    let until = Instant::now() + PATIENCE;
    let leases = history.books().leases.clone();
    for lease in leases {
        store.heartbeat(lease, Duration::ZERO).await.unwrap();
    }
    let lease = store.register("last", LONG).await.unwrap();
    loop {
        store.reap().await.unwrap();
        let mut items = Vec::new();
        for handling in HANDLINGS {
            items.extend(claim(store, lease, handling, 500).await.unwrap());
        }
        let settled = items
            .iter()
            .map(|item| Settlement::new(item.hold(), Ok("\"last\"".to_owned())));
        let commit = Commit::new().settlements(settled);
        let committed = store.commit(commit).await.unwrap();
        {
            let mut books = history.books();
            let last = || "\"last\"".to_owned();
            books
                .sent
                .extend(items.iter().map(|item| (item.id, last())));
            books
                .completed
                .extend(committed.items.iter().map(|id| (*id, last())));
        }
        if !items.is_empty() {
            continue;
        }
        let open = [Status::Pending, Status::Processing];
        let mut left = Vec::new();
        for status in open {
            left.extend(
                store
                    .runs(RunFilter::new().status(status), 5)
                    .await
                    .unwrap(),
            );
        }
        if left.is_empty() {
            return;
        }
        history.check(Instant::now() < until, || {
            format!("these come to no end: {left:?}")
        });
        sleep(Duration::from_millis(10)).await;
    }
}

/// Looks at everything that is there, and compares it to what was acknowledged. `store` is a handle
/// of its own.
async fn audit(history: &History, store: Arc<dyn Queue>) {
    let runner = Runner::new(Arc::clone(&store));
    let plan = history.plan;
    let mut runs = BTreeMap::new();
    let mut filter = RunFilter::new();
    loop {
        let page = store.runs(filter.clone(), 500).await.unwrap();
        let Some(last) = page.last() else { break };
        filter = RunFilter::new().before(last.id);
        runs.extend(page.into_iter().map(|run| (run.id, run)));
    }
    let mut items = HashMap::new();
    let mut notes: HashMap<String, usize> = HashMap::new();
    for id in runs.keys() {
        let audit = runner.audit(*id).await.unwrap().unwrap();
        history.check(audit.is_sound(), || audit.to_string());
        for item in store.items(*id, 0, u32::MAX).await.unwrap() {
            items.insert(item.id, item);
        }
        for entry in store.log(*id, 0, u32::MAX).await.unwrap() {
            if entry.kind == "note" {
                *notes.entry(entry.data).or_default() += 1;
            }
        }
    }
    let kept: BTreeSet<_> = {
        let books = history.books();
        books
            .bodies
            .keys()
            .map(|(tenant, key)| (tenant.clone(), *key))
            .collect()
    };
    let mut bodies = HashMap::new();
    for (tenant, key) in kept {
        let found = store.generations(&tenant, &[key]).await.unwrap();
        bodies.extend(
            found
                .into_iter()
                .map(|found| ((tenant.clone(), key), found.body)),
        );
    }
    let ids: Vec<_> = items.keys().copied().collect();
    let intents = store
        .intents(IntentFilter::items(ids), u32::MAX)
        .await
        .unwrap();
    let intents: HashSet<_> = intents.iter().map(Intent::name).collect();

    let books = history.books();
    let fail = |what: String| -> ! { books.broken(plan, &what) };
    let missing = books.runs.keys().filter(|run| !runs.contains_key(run));
    if missing.clone().count() as u64 > books.removed {
        fail(format!(
            "acknowledged and not there: runs {:?}",
            missing.collect::<Vec<_>>()
        ));
    }
    for (id, (total, _)) in &books.runs {
        match runs.get(id) {
            Some(run) if run.total != *total as u64 => fail(format!("{run:?} had {total} items")),
            _ => {}
        }
    }
    for run in &books.cancelled {
        if runs
            .get(run)
            .is_some_and(|run| run.status != Status::Cancelled)
        {
            fail(format!("run {run} was cancelled and is {:?}", runs[run]));
        }
    }
    for (id, output) in &books.completed {
        match items.get(id) {
            Some(item) if item.output.as_ref() != Some(output) => {
                fail(format!("completed with {output}, and is {item:?}"));
            }
            None if !plan.purges => fail(format!("item {id} is completed and not there")),
            _ => {}
        }
    }
    for item in items.values() {
        if let Some(output) = &item.output
            && !books.sent.contains(&(item.id, output.clone()))
        {
            fail(format!("nobody has sent this output: {item:?}"));
        }
    }
    for (place, body) in &books.kept {
        match bodies.get(place) {
            Some(found) if found != body && !plan.purges => fail(format!("{body} became {found}")),
            None if !plan.purges => fail(format!("a reply is lost: {place:?}")),
            _ => {}
        }
    }
    for (place, body) in &bodies {
        if !books.bodies[place].contains(body) {
            fail(format!("nobody has sent the reply {body}"));
        }
    }
    for (note, (run, known, acknowledged)) in &books.notes {
        let times = notes.get(note).copied().unwrap_or(0);
        let expected = *acknowledged && *known && runs.contains_key(run);
        if times > 1 || (expected && !plan.purges && times == 0) {
            fail(format!(
                "note {note} on run {run} ({acknowledged}) is there {times} times"
            ));
        }
    }
    for name in &books.intents {
        // Trying an item again decides about its calls.
        let item = items.get(&name.item);
        let there = item.is_none_or(|item| books.retried.contains(&item.run));
        if !there && !intents.contains(name) && !books.over.contains(name) {
            fail(format!("an intent is lost: {name:?}"));
        }
    }
}

/// Plays histories until the time is up. `open` gives the handles of the actors and one for the audit.
async fn play<H: Future<Output = (Vec<Arc<dyn Queue>>, Arc<dyn Queue>)>>(
    name: &str,
    outages: bool,
    short: u64,
    open: impl Fn(u64) -> H,
) {
    let long = long_form();
    let minutes = number("THROUGHLINE_MINUTES").unwrap_or(12);
    let until = Instant::now() + Duration::from_secs(60 * minutes);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let one = number("THROUGHLINE_SEED");
    let first = one.unwrap_or(if long { now.as_secs() } else { 1 });
    let (mut histories, mut calls, mut dropped, mut failed, mut runs) = (0, 0, 0, 0, 0);
    for seed in first.. {
        let enough = match (one, long) {
            (Some(_), _) => histories == 1,
            (None, true) => Instant::now() >= until,
            (None, false) => histories == short,
        };
        if enough {
            break;
        }
        let plan = Plan::new(seed, outages);
        // Shown by the test harness if the history fails.
        println!("{name}: {plan:?}");
        let (handles, auditor) = open(seed).await;
        let history = act(plan, &handles).await;
        // Their connections end with the sessions.
        drop(handles);
        finish(&history, &*auditor).await;
        audit(&history, auditor).await;
        let books = history.books();
        histories += 1;
        calls += books.calls;
        dropped += books.dropped;
        failed += books.failed;
        runs += books.runs.len();
    }
    println!(
        "{name}: {histories} histories from seed {first}, {calls} calls, {dropped} of them dropped, \
         {failed} cut off, {runs} runs: sound"
    );
}

#[tokio::test]
async fn histories_in_memory() {
    play("memory", false, 4, async |_| {
        // It answers at the first poll, so there is something to drop only before it.
        let latency = Duration::from_micros(200);
        let store = Arc::new(Counted::new(Memory::new()).latency(latency));
        (
            vec![Arc::clone(&store) as Arc<dyn Queue>],
            store as Arc<dyn Queue>,
        )
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn histories_on_sqlite() {
    let dir = tempfile::tempdir().unwrap();
    play("sqlite", false, 2, async |seed| {
        let path = dir.path().join(format!("{seed}.db"));
        // The disk's own waits are not what is looked for here.
        let open = async || {
            let builder = Sqlite::builder(&path).durability(Durability::Process);
            Arc::new(builder.open().await.unwrap()) as Arc<dyn Queue>
        };
        (vec![open().await, open().await, open().await], open().await)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn histories_on_postgres() {
    let Some(schemas) = Schemas::find() else {
        return;
    };
    play("postgres", false, 1, async |_| {
        let name = schemas.name();
        let open = async |connections: u32| {
            let builder = Postgres::builder(&schemas.url).schema(name.clone());
            let builder = builder.connections(connections);
            Arc::new(builder.connect().await.unwrap()) as Arc<dyn Queue>
        };
        (
            vec![open(1).await, open(2).await, open(4).await],
            open(2).await,
        )
    })
    .await;
    schemas.clear().await;
}

/// As before, while the server ends one connection after the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn histories_on_postgres_whose_connections_end() {
    let Some(schemas) = Schemas::find() else {
        return;
    };
    let word = schemas.name();
    let sign = if schemas.url.contains('?') { '&' } else { '?' };
    let url = format!("{}{sign}application_name={word}", schemas.url);
    let end = async {
        let mut admin = schemas.connection().await;
        let end = format!(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = '{word}' \
             ORDER BY random() LIMIT 1"
        );
        loop {
            sleep(Duration::from_millis(150)).await;
            let end = sqlx::raw_sql(sqlx::AssertSqlSafe(end.as_str()));
            end.execute(&mut admin).await.unwrap();
        }
    };
    let play = play("postgres, ended", true, 1, async |_| {
        let name = schemas.name();
        let open = async |url: &str| {
            let builder = Postgres::builder(url).schema(name.clone()).connections(2);
            Arc::new(builder.connect().await.unwrap()) as Arc<dyn Queue>
        };
        let auditor = open(&schemas.url).await;
        let mut handles = Vec::new();
        for _ in 0..3 {
            // It may be ended while it is made.
            handles.push(loop {
                let builder = Postgres::builder(&url).schema(name.clone()).connections(2);
                match builder.connect().await {
                    Ok(store) => break Arc::new(store) as Arc<dyn Queue>,
                    Err(error) => assert!(error.is_temporary(), "{error:?}"),
                }
            });
        }
        (handles, auditor)
    });
    tokio::select! {
        () = play => {}
        () = end => unreachable!(),
    }
    schemas.clear().await;
}
