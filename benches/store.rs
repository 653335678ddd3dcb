//! Compares the cost of the durable stores with bare SQL for the same rows, in the same run.
//!
//! ```sh
//! scripts/services start   # for the part with Postgres
//! cargo bench --bench store --features sqlite,postgres
//! ```
//!
//! The bare SQL is one statement to claim 512 items, one to complete them and one for the run's counters, through
//! sqlx, in as many transactions (two), with the same tables and the same care for the disk. Ours
//! adds leases, epochs, tenants in turn, notes and a log. The bars: at most twice the cost of the bare SQL;
//! 20,000 items/s claimed and committed on SQLite with `synchronous = FULL` and 10,000 on Postgres;
//! 10,000 items submitted to SQLite in 150 ms; and a status poll at a million items in 1 ms.
//!
//! "The whole worker" is a `Worker` on a provider that answers at once: without a call, what is left is claim
//! and commit; with one, each item is also looked up and its reply kept; with intents, written down first.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::{
    AssertSqlSafe, Connection as _, PgConnection, QueryBuilder, Row as _, SqliteConnection,
};
use throughline::store::{
    Claim, Commit, Generation, Item, MemoKey, NewItem, NewRun, Postgres, Queue, RunId, Settlement,
    Sqlite, Store as _, StoreExt as _,
};
use throughline::{
    Context, Provider, Reply, Request, Result, Runner, Usage, Worker, runs::DriveOutcome,
};
use throughline::{async_trait, pipeline};

const BATCH: u32 = 512;
const BATCHES: u32 = 20;
const ITEMS: u32 = BATCH * BATCHES;
const LONG: Duration = Duration::from_secs(3600);

/// The length of an output, as of a sentence and of a page of text; inputs are half as long.
const LENGTHS: [usize; 2] = [200, 1000];

fn body(n: usize, length: usize) -> String {
    format!("{{\"n\":{n},\"text\":\"{}\"}}", "x".repeat(length))
}

fn run_of(n: u32, length: usize) -> NewRun {
    let items = (0..n as usize).map(|i| NewItem::new(format!("item-{i}"), body(i, length / 2)));
    NewRun::new("bench", "p").items(items)
}

fn commit(items: &[Item], length: usize, generations: bool) -> Commit {
    let settle = |item: &Item| Settlement::new(item.hold(), Ok(body(item.seq as usize, length)));
    let commit = Commit::new().settlements(items.iter().map(settle));
    if !generations {
        return commit;
    }
    let digest = Request::new("a").digest();
    commit.generations(items.iter().map(|item| {
        Generation::new(
            "bench",
            MemoKey::of([&item.id.0.to_be_bytes()[..]]),
            digest,
            body(item.seq as usize, length),
            Usage::new(100, 200),
        )
    }))
}

/// Submits, and claims and commits everything: how long the one and the other took.
async fn ours(store: &dyn Queue, length: usize, generations: bool) -> (Duration, Duration) {
    let new = run_of(ITEMS, length);
    let began = Instant::now();
    store.create_run(new).await.expect("create_run");
    let submitted = began.elapsed();
    let lease = store.register("bench", LONG).await.expect("register");
    // The texts are made outside of what is timed.
    let mut took = Duration::ZERO;
    loop {
        let began = Instant::now();
        let items = store
            .claim(lease, Claim::new(["p"], BATCH))
            .await
            .expect("claim");
        took += began.elapsed();
        if items.is_empty() {
            return (submitted, took);
        }
        let commit = commit(&items, length, generations);
        let began = Instant::now();
        store.commit(commit).await.expect("commit");
        took += began.elapsed();
    }
}

macro_rules! bare {
    ($name:ident, $db:ty, $connection:ty, $begin:literal, $claim:literal, $complete:literal) => {
        async fn $name(connection: &mut $connection, length: usize) -> (Duration, Duration) {
            let texts: Vec<_> = (0..ITEMS as usize).map(|i| body(i, length / 2)).collect();
            let began = Instant::now();
            let mut transaction = connection.begin_with($begin).await.expect("begin");
            let run: i64 = sqlx::query_scalar(
                "INSERT INTO runs (v, tenant, name, status, spec, total, created_at) \
                 VALUES (1, 'bench', 'p', 'processing', 'null', 1000000000, 1) RETURNING id",
            )
            .fetch_one(&mut *transaction)
            .await
            .expect("run");
            for (chunk, texts) in texts.chunks(500).enumerate() {
                let mut insert = QueryBuilder::<$db>::new(
                    "INSERT INTO items (v, run_id, pipeline, tenant, priority, max_attempts, seq, key, input) ",
                );
                insert.push_values(texts.iter().enumerate(), |mut row, (i, text)| {
                    let seq = (chunk * 500 + i) as i64;
                    row.push("1").push_bind(run).push("'p', 'bench', 0, 3").push_bind(seq);
                    row.push_bind(format!("item-{seq}")).push_bind(text);
                });
                insert.build().execute(&mut *transaction).await.expect("items");
            }
            transaction.commit().await.expect("commit");
            let submitted = began.elapsed();

            let mut took = Duration::ZERO;
            loop {
                let began = Instant::now();
                let mut transaction = connection.begin_with($begin).await.expect("begin");
                let claim = sqlx::query($claim).bind(i64::from(BATCH));
                let rows = claim.fetch_all(&mut *transaction).await.expect("claim");
                transaction.commit().await.expect("commit");
                let claimed: Vec<(i64, i64, String)> =
                    rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect();
                took += began.elapsed();
                if claimed.is_empty() {
                    return (submitted, took);
                }
                let outputs: Vec<_> = claimed.iter().map(|item| body(item.0 as usize, length)).collect();
                let began = Instant::now();
                let mut transaction = connection.begin_with($begin).await.expect("begin");
                let mut complete = QueryBuilder::<$db>::new("WITH s (id, epoch, output) AS (");
                complete.push_values(claimed.iter().zip(&outputs), |mut row, (item, output)| {
                    row.push_bind(item.0).push_bind(item.1).push_bind(output);
                });
                complete.push($complete);
                let done = complete.build().fetch_all(&mut *transaction).await.expect("complete");
                sqlx::query("UPDATE runs SET completed = completed + $1, log_seq = log_seq + 1 WHERE id = $2")
                    .bind(done.len() as i64)
                    .bind(run)
                    .execute(&mut *transaction)
                    .await
                    .expect("count");
                transaction.commit().await.expect("commit");
                took += began.elapsed();
            }
        }
    };
}

bare!(
    bare_sqlite,
    sqlx::Sqlite,
    SqliteConnection,
    "BEGIN IMMEDIATE",
    "UPDATE items SET status = 'processing', lease_id = 1, epoch = epoch + 1, attempt = attempt + 1 \
     WHERE id IN (SELECT id FROM items INDEXED BY items_ready WHERE status = 'pending' \
     AND not_before IS NULL AND pipeline = 'p' AND handling = 0 AND tenant = 'bench' ORDER BY priority, id LIMIT $1) \
     RETURNING id, epoch, input",
    ") UPDATE items NOT INDEXED SET status = 'completed', output = s.output, lease_id = NULL FROM s \
     WHERE items.id = s.id AND items.epoch = s.epoch RETURNING id"
);

bare!(
    bare_postgres,
    sqlx::Postgres,
    PgConnection,
    "BEGIN",
    "UPDATE items SET status = 'processing', lease_id = 1, epoch = epoch + 1, attempt = attempt + 1 \
     WHERE id IN (SELECT id FROM items WHERE status = 'pending' \
     AND not_before IS NULL AND pipeline = 'p' AND handling = 0 AND tenant = 'bench' ORDER BY priority, id LIMIT $1 FOR UPDATE SKIP LOCKED) \
     RETURNING id, epoch, input",
    ") UPDATE items SET status = 'completed', output = s.output, lease_id = NULL FROM s \
     WHERE items.id = s.id AND items.epoch = s.epoch RETURNING items.id"
);

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn per_second(took: Duration) -> f64 {
    f64::from(ITEMS) / took.as_secs_f64()
}

/// Prints what the rounds of ours and of the bare SQL, taken in turn, come to.
/// Returns what claim and commit took the bare SQL.
fn report(name: &str, rounds: &[[(Duration, Duration); 2]], kept: Duration) -> Duration {
    let of = |side: usize, part: fn(&(Duration, Duration)) -> Duration| {
        median(rounds.iter().map(|round| part(&round[side])).collect())
    };
    let ratio = |part: fn(&(Duration, Duration)) -> Duration| {
        let mut ratios: Vec<_> = rounds
            .iter()
            .map(|[ours, bare]| part(ours).as_secs_f64() / part(bare).as_secs_f64())
            .collect();
        ratios.sort_by(f64::total_cmp);
        ratios[ratios.len() / 2]
    };
    println!(
        "{name}: submit {ITEMS}: {:.0?}, bare {:.0?}, ratio {:.2}",
        of(0, |round| round.0),
        of(1, |round| round.0),
        ratio(|round| round.0)
    );
    println!(
        "{name}: claim + commit by {BATCH}: {:.0} items/s, bare {:.0}, ratio {:.2}; with a generation each: {:.0}",
        per_second(of(0, |round| round.1)),
        per_second(of(1, |round| round.1)),
        ratio(|round| round.1),
        per_second(kept)
    );
    of(1, |round| round.1)
}

/// Answers at once.
struct Noop;

#[async_trait]
impl Provider for Noop {
    fn name(&self) -> &str {
        "noop"
    }

    async fn generate(&self, _request: &Request) -> Result<Reply> {
        Ok(Reply::new("x".repeat(200), Usage::new(100, 50)))
    }
}

/// A run through the whole worker: claims, lookups, replies, outcomes, and intents if wanted. With `calls` false the
/// pipeline asks nothing: what is left is claim and commit.
async fn worker(store: &Arc<dyn Queue>, calls: bool, intents: bool) -> Duration {
    let work = pipeline("bench", move |cx: Context, n: u32| async move {
        if !calls {
            return Ok("x".repeat(200));
        }
        Ok(cx.generate(format!("Describe the number {n}.")).await?.text)
    });
    let runner = Runner::new(Arc::clone(store));
    let submit = runner.submit("bench", &work, 0..ITEMS).fresh();
    let run = submit.await.expect("submit");
    let cx = Context::builder(Noop).build();
    let worker = Worker::builder(Arc::clone(store), cx)
        .register("bench", work)
        .in_flight(2048)
        .intents(intents)
        .build();
    let began = Instant::now();
    let drive = worker.drive(LONG).await.expect("drive");
    let took = began.elapsed();
    assert_eq!(drive, DriveOutcome::Done);
    let found = store.run(run).await.expect("run").expect("it is there");
    assert_eq!(found.completed, u64::from(ITEMS));
    took
}

async fn workers(name: &str, store: &Arc<dyn Queue>, bare: Duration) {
    for (what, calls, intents) in [
        ("claim + commit", false, false),
        ("with a call each", true, false),
        ("with a call and its intent", true, true),
    ] {
        let mut times = Vec::new();
        for _ in 0..5 {
            times.push(worker(store, calls, intents).await);
        }
        let took = median(times);
        println!(
            "{name}: the whole worker, {what}: {:.0} items/s, ratio {:.2} to the bare claim + commit",
            per_second(took),
            took.as_secs_f64() / bare.as_secs_f64()
        );
    }
}

async fn poll(name: &str, store: &dyn Queue, run: RunId) {
    let mut times = Vec::new();
    for _ in 0..1001 {
        let began = Instant::now();
        let found = store.run(run).await.expect("run").expect("it is there");
        times.push(began.elapsed());
        assert_eq!(found.total, 1_000_000);
    }
    times.sort_unstable();
    println!(
        "{name}: status poll at 1,000,000 items: P50 {:.0?}, P99 {:.0?}",
        times[500], times[990]
    );
}

#[tokio::main]
async fn main() {
    // Beside the build, because the usual place for short-lived files may be in memory.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let file = |name: &str| dir.path().join(name);

    let store = Sqlite::open(file("ours.db")).await.expect("open");
    Sqlite::open(file("bare.db"))
        .await
        .expect("open")
        .close()
        .await;
    let url = format!("sqlite://{}", file("bare.db").display());
    let mut connection = SqliteConnection::connect(&url).await.expect("connect");
    let same =
        "PRAGMA synchronous = FULL; PRAGMA cache_size = -32768; PRAGMA wal_autocheckpoint = 4096";
    sqlx::raw_sql(same)
        .execute(&mut connection)
        .await
        .expect("pragma");
    let mut bare = Vec::new();
    for length in LENGTHS {
        let mut rounds = Vec::new();
        for _ in 0..7 {
            let ours = ours(&store, length, false).await;
            rounds.push([ours, bare_sqlite(&mut connection, length).await]);
        }
        let kept = ours(&store, length, true).await.1;
        bare.push(report(&format!("sqlite, texts of {length}"), &rounds, kept));
    }
    let store: Arc<dyn Queue> = Arc::new(store);
    // Its texts are of the first length.
    workers("sqlite", &store, bare[0]).await;
    let million = store
        .create_run(run_of(1_000_000, 2))
        .await
        .expect("create_run")
        .run;
    poll("sqlite", &*store, million).await;
    drop(store);

    let url = std::env::var("THROUGHLINE_TEST_POSTGRES").or_else(|_| {
        std::fs::read_to_string(std::env::temp_dir().join("throughline-services/url"))
    });
    let Ok(url) = url else {
        println!("postgres: NOT MEASURED, there is none: `scripts/services start`");
        return;
    };
    let url = url.trim();
    let open = async |schema: &str| {
        let mut connection = PgConnection::connect(url).await.expect("connect");
        let clear = format!("DROP SCHEMA IF EXISTS {schema} CASCADE");
        sqlx::raw_sql(AssertSqlSafe(clear))
            .execute(&mut connection)
            .await
            .expect("drop");
        let store = Postgres::builder(url)
            .schema(schema)
            .connect()
            .await
            .expect("connect");
        let look = format!("SET search_path TO {schema}; SET jit = off");
        sqlx::raw_sql(AssertSqlSafe(look))
            .execute(&mut connection)
            .await
            .expect("set");
        (store, connection)
    };
    let (store, mut cleaner) = open("bench_ours").await;
    let (_, mut connection) = open("bench_bare").await;
    let mut bare = Vec::new();
    for length in LENGTHS {
        let mut rounds = Vec::new();
        for _ in 0..7 {
            let ours = ours(&store, length, false).await;
            rounds.push([ours, bare_postgres(&mut connection, length).await]);
        }
        let kept = ours(&store, length, true).await.1;
        bare.push(report(
            &format!("postgres, texts of {length}"),
            &rounds,
            kept,
        ));
    }
    let store: Arc<dyn Queue> = Arc::new(store);
    // Its texts are of the first length.
    workers("postgres", &store, bare[0]).await;
    let million = store
        .create_run(run_of(1_000_000, 2))
        .await
        .expect("create_run")
        .run;
    poll("postgres", &*store, million).await;
    let clear = "DROP SCHEMA bench_ours CASCADE; DROP SCHEMA bench_bare CASCADE";
    sqlx::raw_sql(clear)
        .execute(&mut cleaner)
        .await
        .expect("drop");
}
