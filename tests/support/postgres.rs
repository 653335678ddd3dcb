//! The Postgres server of `scripts/services`, with a schema for each test.
#![allow(dead_code, missing_docs, unreachable_pub)] // Each test uses a part.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use throughline::store::Postgres;

pub struct Schemas {
    pub url: String,
    names: Mutex<Vec<String>>,
}

impl Schemas {
    /// Finds the server, and starts it if necessary. Prints a warning if there is none.
    pub fn find() -> Option<Self> {
        static SERVER: OnceLock<Result<String, String>> = OnceLock::new();
        let server = || match std::env::var("THROUGHLINE_TEST_POSTGRES") {
            Ok(none) if none == "none" => Err("THROUGHLINE_TEST_POSTGRES is `none`".to_owned()),
            Ok(url) => Ok(url),
            Err(_) => start(),
        };
        match SERVER.get_or_init(server) {
            Ok(url) => Some(Self {
                url: url.clone(),
                names: Mutex::default(),
            }),
            Err(why) => {
                let message = format!("\n\n    POSTGRES WAS NOT TESTED: {why}\n\n");
                assert!(
                    std::env::var_os("THROUGHLINE_REQUIRE_POSTGRES").is_none(),
                    "{message}"
                );
                // `eprintln` would be captured by the test harness.
                use std::io::Write as _;
                let _ = std::io::stderr().write_all(message.as_bytes());
                None
            }
        }
    }

    /// Returns the name of a new schema.
    pub fn name(&self) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let mut names = self.names.lock().unwrap();
        let name = format!("t{}_{}_{}", std::process::id(), now.as_nanos(), names.len());
        names.push(name.clone());
        name
    }

    /// Returns the newest schema.
    pub fn newest(&self) -> String {
        self.names.lock().unwrap().last().unwrap().clone()
    }

    /// Opens a store in a new schema.
    pub async fn open(&self) -> Postgres {
        let builder = Postgres::builder(&self.url).schema(self.name());
        builder.connect().await.unwrap()
    }

    /// Opens a separate connection to the newest schema.
    pub async fn connection(&self) -> PgConnection {
        let mut connection = PgConnection::connect(&self.url).await.unwrap();
        let newest = self.names.lock().unwrap().last().cloned();
        if let Some(name) = newest {
            let look = AssertSqlSafe(format!("SET search_path TO {name}"));
            sqlx::raw_sql(look).execute(&mut connection).await.unwrap();
        }
        connection
    }

    /// Executes SQL on a separate connection.
    pub async fn raw(&self, sql: &str) {
        let mut connection = self.connection().await;
        sqlx::raw_sql(AssertSqlSafe(sql))
            .execute(&mut connection)
            .await
            .unwrap();
    }

    /// Drops all schemas.
    pub async fn clear(&self) {
        let names = std::mem::take(&mut *self.names.lock().unwrap());
        for name in names {
            self.raw(&format!("DROP SCHEMA IF EXISTS {name} CASCADE"))
                .await;
        }
    }
}

/// Starts the server if necessary and returns its URL.
fn start() -> Result<String, String> {
    services("start", &[])?;
    services("url", &[])
}

/// Runs `scripts/services` with this word and these variables. Returns its output, or the error.
pub fn services(word: &str, variables: &[(&str, &OsStr)]) -> Result<String, String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/services");
    let mut command = Command::new(&script);
    command.arg(word).stdin(Stdio::null());
    let ran = command.envs(variables.iter().copied()).output();
    let ran = ran.map_err(|error| format!("{}: {error}", script.display()))?;
    let text = |bytes| String::from_utf8_lossy(bytes).trim().to_owned();
    match ran.status.success() {
        true => Ok(text(&ran.stdout)),
        false => Err(text(&ran.stderr)),
    }
}
