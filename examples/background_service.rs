//! Training programs in the background, behind HTTP: submit and go on, look, follow, cancel. Killed and started
//! again, the service finishes what it was asked for.
//!
//! ```sh
//! cargo run --release --example background_service --features sim,sqlite,structured
//! curl -H 'authorization: Bearer ada-secret' --json '{"goal":"a 10 km run"}' localhost:3000/programs
//! ```
//!
//! Or open <http://localhost:3000>. It runs on the simulated provider.

#[path = "background_service/access.rs"]
mod access;
#[path = "background_service/program.rs"]
mod program;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{Html, IntoResponse};
use axum::{Json, Router, routing::get};
use clap::Parser;
use futures::{Stream, StreamExt as _};
use serde_json::{Value, json};
use throughline::store::{Run, RunFilter, RunId, Sqlite};
use throughline::{CancellationToken, Context, Pace, Result, Runner, Tenant, Worker};
use tokio::signal::unix::{SignalKind, signal};

use crate::access::{Refusal, Service, USERS, User};
use crate::program::{Plan, PlanWeek, Program};

/// Serves training programs.
#[derive(Parser)]
struct Cli {
    #[arg(long, default_value = "127.0.0.1:3000")]
    listen: String,
    #[arg(long, default_value = "programs.db")]
    store: PathBuf,
    /// Where the simulated provider keeps its bills
    #[arg(long, default_value = "programs.ledger")]
    ledger: PathBuf,
    /// Milliseconds until the simulated provider answers
    #[arg(long, default_value = "800")]
    latency: u64,
}

fn view(run: &Run) -> Value {
    let error = run.error.as_ref().map(ToString::to_string);
    json!({ "id": run.id, "status": run.status, "done": run.completed, "total": run.total, "error": error })
}

async fn submit(
    State(service): State<Service>,
    user: User,
    Json(program): Json<Program>,
) -> Result<impl IntoResponse, Refusal> {
    let weeks = program
        .weeks()
        .map_err(|why| Refusal(StatusCode::UNPROCESSABLE_ENTITY, why))?;
    // Fresh, because who asks twice wants two programs. What is paid for is still never paid for again.
    let run = service
        .runner
        .submit("plan-week", &PlanWeek, weeks)
        .tenant(user.name)
        .fresh()
        .await?;
    let place = [(header::LOCATION, format!("/programs/{run}"))];
    Ok((StatusCode::ACCEPTED, place, Json(json!({ "id": run }))))
}

async fn list(State(service): State<Service>, user: User) -> Result<Json<Vec<Value>>, Refusal> {
    let runs = service
        .runner
        .list(RunFilter::new().tenant(user.name), 500)
        .await?;
    Ok(Json(runs.iter().map(view).collect()))
}

async fn show(
    State(service): State<Service>,
    user: User,
    Path(id): Path<RunId>,
) -> Result<Json<Value>, Refusal> {
    let mut program = view(&service.run(user, id).await?);
    let weeks = service.runner.results::<Plan>(id, 0, 52).await?;
    program["weeks"] = weeks.iter().map(|week| json!(week.output())).collect();
    Ok(Json(program))
}

async fn cancel(
    State(service): State<Service>,
    user: User,
    Path(id): Path<RunId>,
) -> Result<Json<Value>, Refusal> {
    service.run(user, id).await?;
    let stopped = service.runner.cancel(id).await?;
    Ok(Json(json!({ "stopped": stopped })))
}

async fn events(
    State(service): State<Service>,
    user: User,
    Path(id): Path<RunId>,
) -> Result<Sse<impl Stream<Item = Result<Event, axum::Error>>>, Refusal> {
    service.run(user, id).await?;
    let seen = service
        .runner
        .watch(id)
        .take_until(service.stop.cancelled_owned());
    let events = seen.map(|seen| match seen {
        Ok(seen) => Event::default().json_data(view(&seen.run)),
        Err(error) => Ok(Event::default().event("problem").data(error.to_string())),
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::default()))
}

#[tokio::main]
async fn main() -> Result<()> {
    let cli = Cli::parse();
    let store = Arc::new(Sqlite::open(&cli.store).await?);
    let cx = Context::builder(program::provider(
        Duration::from_millis(cli.latency),
        &cli.ledger,
    ))
    .pace(Pace::per_minute(30_000).in_flight(64))
    .build();
    let tier = |name: &str| {
        USERS
            .into_iter()
            .find(|user| user.name == name)
            .map(|user| user.tier)
    };
    let worker = Worker::builder(Arc::clone(&store), cx)
        .register("plan-week", PlanWeek)
        .tenants(move |name| (tier(name).unwrap_or_default(), Some(Tenant::new(name, 1))))
        .lease(Duration::from_secs(3))
        .poll_every(Duration::from_millis(100))
        .drain_for(Duration::from_secs(5))
        .build();

    let stop = CancellationToken::new();
    let runner = Runner::new(store).poll_every(Duration::from_millis(100));
    let app = Router::new()
        .route("/", get(Html(include_str!("background_service/page.html"))))
        .route("/programs", get(list).post(submit))
        .route("/programs/{id}", get(show).delete(cancel))
        .route("/programs/{id}/events", get(events))
        .with_state(Service {
            runner,
            stop: stop.clone(),
        });
    let listener = tokio::net::TcpListener::bind(&cli.listen).await?;
    println!("listening on http://{}", listener.local_addr()?);

    let mut terminate = signal(SignalKind::terminate())?;
    let serve = axum::serve(listener, app).with_graceful_shutdown(stop.clone().cancelled_owned());
    let interrupted = async {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        }
        stop.cancel();
        Ok(())
    };
    // The worker lets calls in flight finish, writes what came of them and gives the rest back.
    let work = worker.run_until(stop.cancelled());
    tokio::try_join!(interrupted, async { Ok(serve.await?) }, work)?;
    println!("stopped; {} programs' weeks done", worker.stats().completed);
    Ok(())
}
