//! Who may come in, which programs are theirs, and what those are told who may not.

use axum::Json;
use axum::extract::FromRequestParts;
use axum::http::{HeaderName, StatusCode, header, request::Parts};
use axum::response::{IntoResponse, Response};
use serde_json::json;
use throughline::store::{Run, RunId};
use throughline::{CancellationToken, Error, Priority, Result, Runner};

/// Who may come in. A real service looks a digest of the token up somewhere.
#[derive(Clone, Copy)]
pub struct User {
    pub name: &'static str,
    token: &'static str,
    /// Paying users come first.
    pub tier: Priority,
}

pub const USERS: [User; 2] = [
    User {
        name: "ada",
        token: "ada-secret",
        tier: Priority::High,
    },
    User {
        name: "bob",
        token: "bob-secret",
        tier: Priority::Normal,
    },
];

impl<S: Sync> FromRequestParts<S> for User {
    type Rejection = (StatusCode, [(HeaderName, &'static str); 1]);

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        let header = parts.headers.get(header::AUTHORIZATION);
        let token = header.and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        let user = USERS.into_iter().find(|user| Some(user.token) == token);
        user.ok_or((
            StatusCode::UNAUTHORIZED,
            [(header::WWW_AUTHENTICATE, "Bearer")],
        ))
    }
}

/// An answer that is none.
pub struct Refusal(pub StatusCode, pub String);

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(json!({ "error": self.1 }))).into_response()
    }
}

/// What the routes share.
#[derive(Clone)]
pub struct Service {
    pub runner: Runner,
    pub stop: CancellationToken,
}

impl Service {
    /// The user's run. That of somebody else is not there.
    pub async fn run(&self, user: User, id: RunId) -> Result<Run, Refusal> {
        let run = self.runner.snapshot(id).await?.map(|found| found.run);
        let theirs = run.filter(|run| run.tenant == user.name);
        theirs.ok_or(Refusal(
            StatusCode::NOT_FOUND,
            format!("there is no program {id}"),
        ))
    }
}
