//! An HTTP service that generates training programs in the background: clients submit a program, then list, follow or
//! cancel it. If the service is killed and started again, it finishes the programs that were submitted.
//!
//! ```sh
//! cargo run --release --example background_service --features full,sqlite
//! curl -H 'authorization: Bearer ada-secret' --json '{"goal":"a 10 km run"}' localhost:3000/programs
//! ```
//!
//! The page at <http://localhost:3000> does the same. The service runs on the simulated provider.

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
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1:3000")]
    listen: String,
    /// SQLite file of the runs; the simulated provider writes its bills to a file next to it
    #[arg(long, default_value = "programs.db")]
    store: PathBuf,
    /// Latency of the simulated provider in milliseconds
    #[arg(long, default_value = "800")]
    latency: u64,
    /// Programs that one user may submit in a minute
    #[arg(long, default_value = "200", value_parser = clap::value_parser!(u32).range(1..))]
    quota: u32,
}

/// The tokens and names of the users. A real service would look up a digest of the token.
const USERS: [(&str, &str); 2] = [("ada-secret", "ada"), ("bob-secret", "bob")];

/// A runner that sees only the programs of the authenticated user, and the token that stops the service.
struct UserRunner(Runner, CancellationToken);

type Service = (Runner, CancellationToken);
type Answer<T> = Result<T, (StatusCode, String)>;

impl FromRequestParts<Service> for UserRunner {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, service: &Service) -> Result<Self, Response> {
        let header = parts.headers.get(header::AUTHORIZATION);
        let token = header.and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        let user = USERS.iter().find(|(secret, _)| Some(*secret) == token);
        let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
        let unauthorized = (StatusCode::UNAUTHORIZED, challenge);
        let (_, name) = user.ok_or_else(|| unauthorized.into_response())?;
        Ok(Self(service.0.for_tenant(*name), service.1.clone()))
    }
}

fn failed(error: Error) -> (StatusCode, String) {
    (StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
}

/// Answers a submission that failed. One above the quota is answered with the seconds to wait, rounded up.
fn refused(error: Error) -> Response {
    match error.wait().filter(|_| error.is_throttled()) {
        Some(wait) => {
            let seconds = wait.as_millis().div_ceil(1_000).to_string();
            let retry_after = [(header::RETRY_AFTER, seconds)];
            (
                StatusCode::TOO_MANY_REQUESTS,
                retry_after,
                error.to_string(),
            )
                .into_response()
        }
        None => failed(error).into_response(),
    }
}

async fn find(runner: &Runner, id: RunId) -> Answer<RunSnapshot> {
    let found = runner.snapshot(id).await.map_err(failed)?;
    found.ok_or((StatusCode::NOT_FOUND, format!("there is no program {id}")))
}

async fn submit(
    UserRunner(runner, _): UserRunner,
    Json(order): Json<Program>,
) -> Result<impl IntoResponse, Response> {
    let weeks = order.weeks.unwrap_or(4);
    if order.goal.trim().is_empty() || !(1..=52).contains(&weeks) {
        let message = "a program needs a goal and 1 to 52 weeks".to_owned();
        return Err((StatusCode::UNPROCESSABLE_ENTITY, message).into_response());
    }
    let weeks = (1..=weeks).map(|week| (order.goal.clone(), week));
    let timeout = Duration::from_millis(order.timeout_ms.unwrap_or(600_000));
    // `fresh`, because the same program submitted twice must give two results. A restart still pays for no reply again.
    let program = runner.submit("plan-week", &pipeline("", plan_week), weeks);
    let program = program.key(|(goal, _)| goal.clone());
    let run = program.timeout(timeout).fresh().await.map_err(refused)?;
    let location = [(header::LOCATION, format!("/programs/{run}"))];
    Ok((StatusCode::ACCEPTED, location, Json(json!({ "id": run }))))
}

async fn list(UserRunner(runner, _): UserRunner) -> Answer<Json<Vec<RunSnapshot>>> {
    let runs = runner.list(RunFilter::new(), 500).await.map_err(failed)?;
    Ok(Json(runs.into_iter().map(RunSnapshot::from).collect()))
}

/// Returns a program with its goal, which is the key of its first week, and with the weeks that are complete.
async fn show(UserRunner(runner, _): UserRunner, Path(id): Path<RunId>) -> Answer<Json<Value>> {
    let mut program = json!(find(&runner, id).await?);
    let weeks = runner.results::<Plan>(id, 0, 52).await.map_err(failed)?;
    program["goal"] = json!(weeks[0].key);
    program["weeks"] = weeks.iter().map(|week| json!(week.output())).collect();
    Ok(Json(program))
}

async fn cancel(UserRunner(runner, _): UserRunner, Path(id): Path<RunId>) -> Answer<Json<Value>> {
    find(&runner, id).await?;
    let stopped = runner.cancel(id).await.map_err(failed)?;
    Ok(Json(json!({ "stopped": stopped })))
}

async fn events(
    UserRunner(runner, stop): UserRunner,
    Path(id): Path<RunId>,
) -> Answer<impl IntoResponse> {
    find(&runner, id).await?;
    let snapshots = runner.watch(id).take_until(stop.cancelled_owned());
    let event = |snapshot| Ok::<_, BoxError>(Event::default().json_data(snapshot?)?);
    Ok(Sse::new(snapshots.map(event)))
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
        // ada is a paying user.
        .tenants(|user| match user {
            "ada" => (Priority::High, Some(Tenant::new(user, 1))),
            _ => (Priority::Normal, Some(Tenant::new(user, 1))),
        })
        .lease(Duration::from_secs(3))
        .build();

    let runner = Runner::new(store).quota(cli.quota, Duration::from_secs(60));
    let stop = throughline::context::stop_on_signal()?;
    let app = Router::new()
        .route("/", get(Html(include_str!("background_service/page.html"))))
        .route("/programs", get(list).post(submit))
        .route("/programs/{id}", get(show).delete(cancel))
        .route("/programs/{id}/events", get(events))
        .with_state((runner, stop.clone()));
    let listener = tokio::net::TcpListener::bind(&cli.listen).await?;
    println!("listening on http://{}", listener.local_addr()?);

    let serve = axum::serve(listener, app).with_graceful_shutdown(stop.clone().cancelled_owned());
    // When stopped, the worker lets calls in flight finish, commits their results and releases the other items.
    tokio::try_join!(
        async { Ok(serve.await?) },
        worker.run_until(stop.cancelled())
    )?;
    Ok(())
}
