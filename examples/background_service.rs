//! Training programs in the background, behind HTTP: submit and go on, look, follow, cancel. Killed and started
//! again, the service finishes what it was asked for.
//!
//! ```sh
//! cargo run --release --example background_service --features full,sqlite
//! curl -H 'authorization: Bearer ada-secret' --json '{"goal":"a 10 km run"}' localhost:3000/programs
//! ```
//!
//! Or open <http://localhost:3000>. It runs on the simulated provider.

#[path = "background_service/program.rs"]
mod program;

use std::{path::PathBuf, sync::Arc, time::Duration};

use axum::extract::{FromRequestParts, Path};
use axum::http::{StatusCode, header, request::Parts};
use axum::response::sse::{Event, Sse};
use axum::response::{Html, IntoResponse, Response};
use axum::{BoxError, Json, Router, routing::get};
use clap::Parser;
use futures::StreamExt as _;
use serde_json::{Value, json};
use throughline::store::{RunFilter, RunId, Sqlite};
use throughline::{
    CancellationToken, Context, Error, Pace, Result, ratelimit::Priority, runs::RunSnapshot,
};
use throughline::{Runner, Worker, pipeline, ratelimit::Tenant};

use crate::program::{Plan, Program, plan_week, provider};

/// Serves training programs.
#[derive(Parser)]
struct Cli {
    #[arg(long, default_value = "127.0.0.1:3000")]
    listen: String,
    /// The simulated provider keeps its bills beside it
    #[arg(long, default_value = "programs.db")]
    store: PathBuf,
    /// Milliseconds until the simulated provider answers
    #[arg(long, default_value = "800")]
    latency: u64,
}

/// Users by their tokens. A real service looks a digest of the token up somewhere.
const USERS: [(&str, &str); 2] = [("ada-secret", "ada"), ("bob-secret", "bob")];

/// The programs of who asks, and when the service stops. Those of others are not there.
struct Theirs(Runner, CancellationToken);

type Service = (Runner, CancellationToken);
type Answer<T> = Result<T, (StatusCode, String)>;

impl FromRequestParts<Service> for Theirs {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, service: &Service) -> Result<Self, Response> {
        let header = parts.headers.get(header::AUTHORIZATION);
        let token = header.and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        let user = USERS.iter().find(|(secret, _)| Some(*secret) == token);
        let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
        let stranger = (StatusCode::UNAUTHORIZED, challenge);
        let (_, name) = user.ok_or_else(|| stranger.into_response())?;
        Ok(Self(service.0.for_tenant(*name), service.1.clone()))
    }
}

fn failed(error: Error) -> (StatusCode, String) {
    (StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
}

async fn find(runner: &Runner, id: RunId) -> Answer<RunSnapshot> {
    let found = runner.snapshot(id).await.map_err(failed)?;
    found.ok_or((StatusCode::NOT_FOUND, format!("there is no program {id}")))
}

async fn submit(Theirs(runner, _): Theirs, Json(ask): Json<Program>) -> Answer<impl IntoResponse> {
    let weeks = ask.weeks.unwrap_or(4);
    if ask.goal.trim().is_empty() || !(1..=52).contains(&weeks) {
        let why = "a program has a goal and 1 to 52 weeks".to_owned();
        return Err((StatusCode::UNPROCESSABLE_ENTITY, why));
    }
    let weeks = (1..=weeks).map(|week| (ask.goal.clone(), week));
    let timeout = Duration::from_millis(ask.timeout_ms.unwrap_or(600_000));
    // Fresh, because who asks twice wants two programs. What is paid for is still never paid for again.
    let program = runner.submit("plan-week", &pipeline("", plan_week), weeks);
    let program = program.key(|(goal, _)| goal.clone());
    let run = program.timeout(timeout).fresh().await.map_err(failed)?;
    let place = [(header::LOCATION, format!("/programs/{run}"))];
    Ok((StatusCode::ACCEPTED, place, Json(json!({ "id": run }))))
}

async fn list(Theirs(runner, _): Theirs) -> Answer<Json<Vec<RunSnapshot>>> {
    let runs = runner.list(RunFilter::new(), 500).await.map_err(failed)?;
    Ok(Json(runs.into_iter().map(RunSnapshot::from).collect()))
}

/// A program with its goal, which is the key of its first week, and with what there is of its weeks.
async fn show(Theirs(runner, _): Theirs, Path(id): Path<RunId>) -> Answer<Json<Value>> {
    let mut program = json!(find(&runner, id).await?);
    let weeks = runner.results::<Plan>(id, 0, 52).await.map_err(failed)?;
    program["goal"] = json!(weeks[0].key);
    program["weeks"] = weeks.iter().map(|week| json!(week.output())).collect();
    Ok(Json(program))
}

async fn cancel(Theirs(runner, _): Theirs, Path(id): Path<RunId>) -> Answer<Json<Value>> {
    find(&runner, id).await?;
    let stopped = runner.cancel(id).await.map_err(failed)?;
    Ok(Json(json!({ "stopped": stopped })))
}

async fn events(Theirs(runner, stop): Theirs, Path(id): Path<RunId>) -> Answer<impl IntoResponse> {
    find(&runner, id).await?;
    let seen = runner.watch(id).take_until(stop.cancelled_owned());
    let event = |seen| Ok::<_, BoxError>(Event::default().json_data(seen?)?);
    Ok(Sse::new(seen.map(event)))
}

#[tokio::main]
async fn main() -> Result<()> {
    let cli = Cli::parse();
    let provider = provider(Duration::from_millis(cli.latency), &cli.store);
    let pace = Pace::per_minute(30_000).in_flight(64);
    let cx = Context::builder(provider).pace(pace).build();
    let store = Arc::new(Sqlite::open(&cli.store).await?);
    let worker = Worker::builder(Arc::clone(&store), cx)
        .register("plan-week", pipeline("plan-week", plan_week))
        // Paying users come first.
        .tenants(|user| match user {
            "ada" => (Priority::High, Some(Tenant::new(user, 1))),
            _ => (Priority::Normal, Some(Tenant::new(user, 1))),
        })
        .lease(Duration::from_secs(3))
        .build();

    let stop = throughline::context::stop_on_signal()?;
    let app = Router::new()
        .route("/", get(Html(include_str!("background_service/page.html"))))
        .route("/programs", get(list).post(submit))
        .route("/programs/{id}", get(show).delete(cancel))
        .route("/programs/{id}/events", get(events))
        .with_state((Runner::new(store), stop.clone()));
    let listener = tokio::net::TcpListener::bind(&cli.listen).await?;
    println!("listening on http://{}", listener.local_addr()?);

    let serve = axum::serve(listener, app).with_graceful_shutdown(stop.clone().cancelled_owned());
    // The worker lets calls in flight finish, writes what came of them and gives the rest back.
    tokio::try_join!(
        async { Ok(serve.await?) },
        worker.run_until(stop.cancelled())
    )?;
    Ok(())
}
