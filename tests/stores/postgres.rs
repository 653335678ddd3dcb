//! The Postgres store: the contract of all stores, and the properties of a server.
//!
//! `scripts/services` starts a server for these tests. If it cannot, they print a message and pass, unless
//! `THROUGHLINE_REQUIRE_POSTGRES` is set.
#![cfg(all(feature = "postgres", feature = "testing"))]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use sqlx::Connection as _;
use throughline::ErrorKind;
use throughline::store::{Claim, Handling, Postgres, Queue, Store, StoreExt as _};
use throughline::testing::store;

use crate::common::{self, LONG, run_of};
use crate::server::Schemas;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_store_passes_the_conformance_suite() {
    let Some(schemas) = Schemas::find() else {
        return;
    };
    store::conformance(async || Arc::new(schemas.open().await) as Arc<dyn Queue>).await;
    schemas.clear().await;
}

#[tokio::test]
async fn random_walks_agree_with_the_model() {
    let Some(schemas) = Schemas::find() else {
        return;
    };
    for seed in 0..12 {
        store::against_model(Arc::new(schemas.open().await), seed, 150).await;
    }
    schemas.clear().await;
}

#[tokio::test]
async fn a_batch_takes_one_round_trip() {
    let Some(schemas) = Schemas::find() else {
        return;
    };
    let store = schemas.open().await;
    common::a_batch_takes_one_round_trip(&store, || store.round_trips()).await;
    schemas.clear().await;
}

#[tokio::test]
async fn more_items_than_one_statement_takes_keep_their_order() {
    let Some(schemas) = Schemas::find() else {
        return;
    };
    let store = schemas.open().await;
    let run = store.create_run(run_of(25_000)).await.unwrap().run;
    store::audit(&store).await;
    let items = store.items(run, 9_998, 4).await.unwrap();
    let keys: Vec<_> = items.iter().map(|item| &*item.key).collect();
    assert_eq!(keys, ["k9998", "k9999", "k10000", "k10001"]);
    assert!(items.is_sorted_by_key(|item| item.id));
    schemas.clear().await;
}

#[tokio::test]
async fn concurrent_migrations_succeed_and_a_newer_version_is_refused() {
    let Some(schemas) = Schemas::find() else {
        return;
    };
    let name = schemas.name();
    let connect = || Postgres::builder(&schemas.url).schema(&name).connect();
    let all = futures::future::join_all((0..6).map(|_| connect())).await;
    assert!(all.iter().all(Result::is_ok), "{all:?}");
    assert!(
        all[0]
            .as_ref()
            .unwrap()
            .create_run(run_of(1))
            .await
            .unwrap()
            .new
    );

    schemas
        .raw(&format!("UPDATE {name}.schema_version SET version = 99"))
        .await;
    let newer = connect().await.unwrap_err();
    assert_eq!(newer.kind(), ErrorKind::Store);
    assert!(
        newer.message().contains("newer release (version 99"),
        "{newer}"
    );
    assert!(!newer.is_temporary());
    schemas.clear().await;
}

/// Writes the fixture of the newest version; not a test. See [`common::fill_fixture`].
#[tokio::test]
#[ignore = "it writes the file that the next test reads"]
async fn write_the_fixture_of_the_newest_version() {
    let path = common::fixture(common::VERSION, "sql");
    assert!(!Path::new(&path).exists(), "{path} exists already");
    let schemas = Schemas::find().unwrap();
    common::fill_fixture(&schemas.open().await).await;
    let name = schemas.newest();
    let mut command = Command::new("pg_dump");
    command.args(["--inserts", "--no-owner", "--schema", &name, &schemas.url]);
    let dump = command.output().unwrap();
    assert!(dump.status.success(), "{dump:?}");
    // The test loads it into a schema of another name.
    let is_of_the_session = |line: &str| {
        ["--", "\\", "SET ", "CREATE SCHEMA "]
            .iter()
            .any(|start| line.starts_with(start))
            || line.contains("'search_path'")
    };
    let dump = String::from_utf8(dump.stdout).unwrap();
    let dump = dump.replace(&format!("{name}."), "");
    let lines = dump
        .lines()
        .filter(|line| !line.is_empty() && !is_of_the_session(line));
    let text: String = lines.flat_map(|line| [line, "\n"]).collect();
    std::fs::write(path, text).unwrap();
    schemas.clear().await;
}

#[tokio::test]
async fn tables_of_every_version_migrate_and_their_run_goes_on() {
    let Some(schemas) = Schemas::find() else {
        return;
    };
    for version in 1..=common::VERSION {
        println!("version {version}");
        let name = schemas.name();
        let dump = std::fs::read_to_string(common::fixture(version, "sql")).unwrap();
        let load = format!("CREATE SCHEMA {name}; SET search_path TO {name}; {dump}");
        schemas.raw(&load).await;
        let builder = Postgres::builder(&schemas.url).schema(name);
        let store = builder.connect().await.unwrap();
        common::the_run_of_the_fixture_goes_on(&store, version).await;
    }
    schemas.clear().await;
}

#[tokio::test]
async fn errors_and_debug_output_contain_no_password() {
    const SECRET: &str = "do-not-show-this";
    let urls = [
        format!("postgres://u:{SECRET}@127.0.0.1:1/d"),
        format!("postgres://u:{SECRET}@[::/d"),
        format!("postgres://u:{SECRET}@127.0.0.1:port/d?sslmode=maybe"),
        format!("mysql://u:{SECRET}@127.0.0.1/d?sslmode={SECRET}"),
    ];
    for url in urls {
        let builder = Postgres::builder(&url);
        assert!(!format!("{builder:?}").contains(SECRET));
        let Err(error) = builder.connect().await else {
            panic!("{url} connects")
        };
        assert!(!format!("{error:?} {error}").contains(SECRET), "{error:?}");
        let source = std::error::Error::source(&error);
        assert!(source.is_none_or(|source| !format!("{source:?}").contains(SECRET)));
    }
    let named = Postgres::builder("postgres://u@h/d")
        .schema("a\"; DROP")
        .connect()
        .await;
    assert_eq!(named.unwrap_err().kind(), ErrorKind::Config);
    let Some(schemas) = Schemas::find() else {
        return;
    };
    let password = schemas.url.split([':', '@']).nth(2).unwrap().to_owned();
    let store = schemas.open().await;
    assert!(!format!("{store:?}").contains(&password));
    let wrong = schemas.url.replace(&password, SECRET);
    let refused = Postgres::connect(wrong).await.unwrap_err();
    assert!(
        !format!("{refused:?} {refused}").contains(SECRET),
        "{refused:?}"
    );
    schemas.clear().await;
}

/// A connection that the server ends causes at most a temporary error, and the next call succeeds.
#[tokio::test]
async fn connections_that_the_server_ends_are_replaced() {
    let Some(schemas) = Schemas::find() else {
        return;
    };
    let name = schemas.name();
    let sign = if schemas.url.contains('?') { '&' } else { '?' };
    let url = format!("{}{sign}application_name={name}", schemas.url);
    let store = Postgres::builder(url).schema(&*name).connect().await;
    let store = store.unwrap();
    let run = store.create_run(run_of(1)).await.unwrap().run;
    let ended = format!(
        "SELECT 1 / count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = '{name}'"
    );
    schemas.raw(&ended).await;
    let mut tries = 0;
    loop {
        match store.run(run).await {
            Ok(kept) => break assert_eq!(kept.unwrap().total, 1),
            Err(error) => assert!(error.is_temporary() && tries < 10, "{error:?}"),
        }
        tries += 1;
    }
    schemas.clear().await;
}

/// A claim that commits between the two statements of a reap, under the lease that the reap removes, must not leave an item
/// without a worker.
#[tokio::test]
async fn a_reap_does_not_overlook_a_concurrent_claim() {
    let Some(schemas) = Schemas::find() else {
        return;
    };
    let store = schemas.open().await;
    let run = store.create_run(run_of(4)).await.unwrap().run;
    let dying = store.register("w", LONG).await.unwrap();

    // A claim that stays open after it has taken its items.
    let mut claimer = schemas.connection().await;
    let mut claim = claimer.begin().await.unwrap();
    let take = "UPDATE items SET status = 'processing', lease_id = $1, epoch = epoch + 1, \
                attempt = 1 FROM (SELECT id FROM leases WHERE id = $1 FOR KEY SHARE) AS lease WHERE run_id = $2";
    sqlx::query(take)
        .bind(dying.0)
        .bind(run.0)
        .execute(&mut *claim)
        .await
        .unwrap();

    assert!(store.heartbeat(dying, Duration::ZERO).await.unwrap());
    let store = Arc::new(store);
    let reaping = tokio::spawn({
        let store = Arc::clone(&store);
        async move { store.reap().await.unwrap() }
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!reaping.is_finished(), "the reaper waits for the claim");
    claim.commit().await.unwrap();
    let reaped = reaping.await.unwrap();
    assert_eq!((reaped.leases, reaped.requeued), (1, 4));
    let fresh = store.register("w", LONG).await.unwrap();
    let again = Claim::new(["p"], 10).handling(Handling::Few);
    assert_eq!(store.claim(fresh, again).await.unwrap().len(), 4);
    schemas.clear().await;
}
