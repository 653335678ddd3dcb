//! Runs from the view of their submitter: tenants, timeouts, notes and outputs. Uses the paused clock.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use serde_json::{Value, json};
use throughline::store::{Commit, Memory, RunFilter, RunId, Status, Store, StoreExt as _};
use throughline::testing::Counted;
use throughline::{
    Context, Error, ErrorKind, Pipeline, Result, Runner, Sim, Worker, pipeline,
    runs::{DriveOutcome, RunSnapshot},
};

const MINUTE: Duration = Duration::from_secs(60);

/// A page takes 10 s, and page 3 is refused.
fn worker<S: throughline::store::Queue>(store: &Arc<S>) -> Worker {
    let sim = Sim::builder()
        .latency(Duration::from_secs(10))
        .reply(|request| request.last_text().to_owned())
        .fail_when("page 3", ErrorKind::InvalidRequest);
    let cx = Context::builder(sim.build()).build();
    Worker::builder(Arc::clone(store), cx)
        .register("page", page())
        .in_flight(2)
        .build()
}

fn page() -> impl Pipeline<Input = u32, Output = String> + Clone {
    pipeline("page", |cx: Context, n: u32| async move {
        Ok(cx.generate(format!("page {n}")).await?.text)
    })
}

#[tokio::test(start_paused = true)]
async fn a_runner_for_a_tenant_sees_nothing_of_others() {
    let store = Arc::new(Memory::new());
    let all = Runner::new(Arc::clone(&store));
    let (ada, bob) = (all.for_tenant("ada"), all.for_tenant("bob"));
    let run = ada.submit("page", &page(), [1, 3]).await.unwrap();
    let _ = worker(&store).drive(MINUTE).await.unwrap();

    // Ada sees everything of her run.
    let record = &ada.list(RunFilter::new(), 10).await.unwrap()[0];
    assert_eq!((record.id, &*record.tenant), (run, "ada"));
    assert_eq!(ada.status(run).await.unwrap(), Some(Status::Failed));
    assert_eq!(ada.results::<String>(run, 0, 9).await.unwrap().len(), 2);
    assert_eq!(ada.outputs::<String>(run).await.unwrap(), ["page 1"]);
    assert!(ada.log_since(run, 0, 9).await.unwrap().len() > 2);
    assert!(ada.audit(run).await.unwrap().unwrap().is_sound());
    assert_eq!(ada.watch(run).count().await, 1);

    // For Bob the run does not exist.
    let nowhere = RunId(999);
    for run in [run, nowhere] {
        assert_eq!(bob.status(run).await.unwrap(), None);
        assert!(bob.snapshot(run).await.unwrap().is_none());
        assert!(bob.audit(run).await.unwrap().is_none());
        assert!(bob.log_since(run, 0, 9).await.unwrap().is_empty());
        assert!(bob.log_last(run, 9).await.unwrap().is_empty());
        assert!(bob.results::<String>(run, 0, 9).await.unwrap().is_empty());
        assert!(bob.outputs::<String>(run).await.unwrap().is_empty());
        assert_eq!(bob.watch(run).count().await, 0);
        assert_eq!(bob.retry_failed(run).await.unwrap(), 0);
        assert_eq!(bob.cancel(run).await.unwrap(), 0);
    }
    let hers = RunFilter::new().tenant("ada");
    assert!(bob.list(RunFilter::new(), 9).await.unwrap().is_empty());
    assert!(bob.list(hers.clone(), 9).await.unwrap().is_empty());
    assert_eq!(all.list(hers, 9).await.unwrap().len(), 1);
    assert_eq!(ada.retry_failed(run).await.unwrap(), 1);
    assert_eq!(ada.cancel(run).await.unwrap(), 1);

    // Calls that concern all tenants are refused, and so is a submission for another tenant.
    let refused = |error: Error| assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    refused(ada.purge(Duration::ZERO, 9).await.unwrap_err());
    refused(ada.ambiguous(None, 9).await.unwrap_err());
    refused(ada.dismiss([]).await.unwrap_err());
    refused(
        ada.submit("page", &page(), [1])
            .tenant("bob")
            .await
            .unwrap_err(),
    );
    assert_eq!(all.list(RunFilter::new(), 9).await.unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_run_past_its_deadline_fails_and_keeps_its_results() {
    let store = Arc::new(Counted::default());
    let runner = Runner::new(Arc::clone(&store));
    // Two at a time: four end after 20 s, two are cut off at 25 s, and two are not started.
    let submit = runner.submit("page", &page(), [1, 2, 4, 5, 6, 7, 8, 9]);
    let run = submit.timeout(Duration::from_secs(25)).await.unwrap();
    let patient = runner.submit("page", &page(), [1]).fresh().await.unwrap();
    let worker = worker(&store);
    assert_eq!(
        worker.drive_run(run, MINUTE).await.unwrap(),
        DriveOutcome::Done
    );
    assert_eq!(
        worker.drive_run(patient, MINUTE).await.unwrap(),
        DriveOutcome::Done
    );

    let snapshot = runner.snapshot(run).await.unwrap().unwrap();
    assert_eq!(snapshot.run.status, Status::Failed);
    let items = runner.results::<String>(run, 0, 9).await.unwrap();
    for item in &items {
        match item.result.as_ref().unwrap() {
            Ok(text) => assert!(text.starts_with("page ")),
            Err(error) => assert_eq!(error.kind(), ErrorKind::DeadlineExceeded),
        }
    }
    assert_eq!(runner.outputs::<String>(run).await.unwrap().len(), 4);
    let begun = |error: &&Error| error.billed() != Some(false);
    let errors = items.iter().filter_map(|item| item.error());
    assert_eq!(errors.filter(begun).count(), 2, "{items:?}");
    let audit = runner.audit(run).await.unwrap().unwrap();
    assert!(audit.is_sound(), "{audit}");
    assert_eq!((audit.items, audit.completed), (8, 4));
    // The other run has no deadline.
    assert_eq!(
        runner.status(patient).await.unwrap(),
        Some(Status::Completed)
    );
}

#[tokio::test(start_paused = true)]
async fn a_fallback_of_the_pipeline_does_not_make_a_late_item_end_well() {
    let store = Arc::new(Memory::new());
    let runner = Runner::new(Arc::clone(&store));
    let with_fallback = pipeline("page", |cx: Context, _: u32| async move {
        let reply = cx.generate("page 1").await;
        Ok(reply.map_or_else(|_| "none".to_owned(), |reply| reply.text))
    });
    let submit = runner.submit("page", &with_fallback, [1]);
    let run = submit.timeout(Duration::ZERO).await.unwrap();
    let cx = Context::builder(Sim::builder().build()).build();
    let worker = Worker::builder(store, cx).register("page", with_fallback);
    let _ = worker.build().drive(MINUTE).await.unwrap();
    let item = &runner.results::<String>(run, 0, 1).await.unwrap()[0];
    let error = item.error().unwrap();
    assert!(
        error.is_deadline_exceeded() && error.billed() == Some(false),
        "{error}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_is_a_flat_object_without_the_tenant() {
    let store = Arc::new(Memory::new());
    let runner = Runner::new(Arc::clone(&store)).for_tenant("ada");
    let run = runner.submit("page", &page(), [1, 3]).await.unwrap();
    let _ = worker(&store).drive(MINUTE).await.unwrap();
    let record = store.run(run).await.unwrap().unwrap();
    let mut told = serde_json::to_value(RunSnapshot::from(record)).unwrap();
    let error = told["error"].take();
    assert!(
        error.as_str().is_some_and(|error| error.contains("fail")),
        "{error}"
    );
    assert!(
        told["elapsed_s"]
            .take()
            .as_f64()
            .is_some_and(|elapsed| elapsed >= 10.0)
    );
    assert_eq!(
        told,
        json!({
            "id": run, "name": "page", "status": "failed", "total": 2, "completed": 1, "failed": 1,
            "cancelled": 0, "error": null, "elapsed_s": null, "eta_s": null,
        })
    );
}

#[tokio::test(start_paused = true)]
async fn notes_are_kept_by_name_and_tenant_and_read_from_their_end() -> Result<()> {
    let store = Arc::new(Counted::default());
    let runner = Runner::new(Arc::clone(&store));
    let (ada, bob) = (runner.for_tenant("ada"), runner.for_tenant("bob"));
    let hers = ada.notes::<u32>("marks").await?;
    let commit = hers.add(Commit::new(), (0..250).collect::<Vec<u32>>())?;
    store.commit(commit).await?;
    store.forget();
    assert_eq!(hers.last(3).await?, [247, 248, 249]);
    assert_eq!(store.trips(), 2);
    assert_eq!(hers.last(1_000).await?.len(), 250);

    let again = ada.notes::<u32>("marks").await?;
    assert_eq!((again.run(), again.last(1).await?), (hers.run(), vec![249]));
    assert!(bob.notes::<u32>("marks").await?.last(9).await?.is_empty());
    assert!(ada.notes::<u32>("others").await?.last(9).await?.is_empty());
    // A value of another type is an error.
    assert!(
        ada.notes::<Vec<Value>>("marks")
            .await?
            .last(1)
            .await
            .is_err()
    );
    // Runs and notes of one name are different.
    let run = ada.submit("marks", &page(), [1]).idempotency_key("marks");
    assert_ne!(run.await?, hers.run());
    Ok(())
}

#[tokio::test]
async fn a_runner_for_one_tenant_cannot_be_made_one_for_another() {
    let store = Arc::new(Memory::new());
    let runner = Runner::new(Arc::clone(&store));
    let (ada, bob) = (runner.for_tenant("ada"), runner.for_tenant("bob"));
    let theirs = bob.submit("page", &page(), [1]).await.unwrap();
    let beyond = ada.for_tenant("bob");
    assert!(beyond.snapshot(theirs).await.unwrap().is_none());
    assert_eq!(beyond.cancel(theirs).await.unwrap(), 0);
    assert_eq!(beyond.retry_failed(theirs).await.unwrap(), 0);
    assert!(beyond.list(RunFilter::new(), 9).await.unwrap().is_empty());
    assert!(beyond.log_last(theirs, 9).await.unwrap().is_empty());
    let errors = [
        beyond.submit("page", &page(), [1]).await.unwrap_err(),
        beyond
            .submit("page", &page(), [1])
            .tenant("ada")
            .await
            .unwrap_err(),
        beyond.notes::<u32>("log").await.unwrap_err(),
        beyond.purge(Duration::ZERO, 9).await.unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Config);
    }
    // Narrowing to the same tenant changes nothing, and does not undo an earlier conflict.
    assert!(
        bob.for_tenant("bob")
            .snapshot(theirs)
            .await
            .unwrap()
            .is_some()
    );
    let again = beyond.for_tenant("bob");
    assert!(again.snapshot(theirs).await.unwrap().is_none());
}

#[tokio::test]
async fn a_run_and_a_log_with_one_key_are_different() {
    let runner = Runner::new(Memory::new());
    let notes = runner.notes::<String>("classes").await.unwrap();
    let submit = || {
        let run = runner.submit("page", &page(), [1]);
        run.idempotency_key("notes: classes")
    };
    let run = submit().await.unwrap();
    assert_ne!(run, notes.run());
    assert_eq!(submit().await.unwrap(), run);
    let again = runner.notes::<String>("classes").await.unwrap();
    assert_eq!(again.run(), notes.run());
}

#[tokio::test(start_paused = true)]
async fn a_submission_above_the_quota_is_refused_and_can_be_repeated() {
    let runner = Runner::new(Memory::new()).quota(2, MINUTE);
    // The quota of the tenant, whichever runner it uses.
    let ada = runner.for_tenant("ada");
    let page = page();
    ada.submit("page", &page, [1]).await.unwrap();
    let second = runner.clone().submit("page", &page, [2]);
    second.tenant("ada").await.unwrap();

    let third = || ada.submit("page", &page, [4]).idempotency_key("third");
    let refused = third().await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Throttled, "{refused}");
    assert!(refused.is_temporary() && refused.to_string().contains("\"ada\""));
    assert_eq!(refused.wait(), Some(MINUTE / 2));
    assert_eq!(ada.list(RunFilter::new(), 9).await.unwrap().len(), 2);
    let bob = runner.for_tenant("bob");
    bob.submit("page", &page, [1]).await.unwrap();

    // A refused submission has used nothing, so the wait does not grow.
    tokio::time::advance(MINUTE / 2 - Duration::from_millis(1)).await;
    let wait = third().await.unwrap_err().wait();
    assert_eq!(wait, Some(Duration::from_millis(1)));
    tokio::time::advance(Duration::from_millis(1)).await;
    let run = third().await.unwrap();
    assert_eq!(ada.list(RunFilter::new(), 9).await.unwrap()[0].id, run);

    // One that could not be submitted anyway is not counted.
    tokio::time::advance(MINUTE / 2).await;
    let foreign = ada.submit("page", &page, [5]).tenant("bob").await;
    assert_eq!(foreign.unwrap_err().kind(), ErrorKind::Config);
    assert_eq!(third().await.unwrap(), run);
    assert!(third().await.unwrap_err().wait().is_some());
}
