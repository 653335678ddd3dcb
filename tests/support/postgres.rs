//! The Postgres of `scripts/services`, and schemas in it that no other test uses.
#![allow(dead_code, missing_docs, unreachable_pub)] // Each test uses its part of this.

use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use throughline::store::Postgres;

pub struct Schemas {
    pub url: String,
    names: Mutex<Vec<String>>,
}

impl Schemas {
    /// The server, if there is one. Says loudly if not.
    pub fn find() -> Option<Self> {
        let url = std::env::var("THROUGHLINE_TEST_POSTGRES").or_else(|_| {
            let file = std::env::temp_dir().join("throughline-services/url");
            std::fs::read_to_string(file).map(|url| url.trim().to_owned())
        });
        match url {
            Ok(url) => Some(Self {
                url,
                names: Mutex::default(),
            }),
            Err(_) => {
                let message =
                    "\n\n    POSTGRES WAS NOT TESTED: start one with `scripts/services start`\n\n";
                assert!(
                    std::env::var_os("THROUGHLINE_REQUIRE_POSTGRES").is_none(),
                    "{message}"
                );
                // Not `eprintln`: the test harness would swallow it.
                use std::io::Write as _;
                let _ = std::io::stderr().write_all(message.as_bytes());
                None
            }
        }
    }

    /// A schema name of its own.
    pub fn name(&self) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let mut names = self.names.lock().unwrap();
        let name = format!("t{}_{}_{}", std::process::id(), now.as_nanos(), names.len());
        names.push(name.clone());
        name
    }

    /// The schema that was named last.
    pub fn newest(&self) -> String {
        self.names.lock().unwrap().last().unwrap().clone()
    }

    /// A store in a schema of its own.
    pub async fn open(&self) -> Postgres {
        let builder = Postgres::builder(&self.url).schema(self.name());
        builder.connect().await.unwrap()
    }

    /// A connection beside the stores, that looks into the newest schema.
    pub async fn connection(&self) -> PgConnection {
        let mut connection = PgConnection::connect(&self.url).await.unwrap();
        let newest = self.names.lock().unwrap().last().cloned();
        if let Some(name) = newest {
            let look = AssertSqlSafe(format!("SET search_path TO {name}"));
            sqlx::raw_sql(look).execute(&mut connection).await.unwrap();
        }
        connection
    }

    /// Executes SQL beside the stores.
    pub async fn raw(&self, sql: &str) {
        let mut connection = self.connection().await;
        sqlx::raw_sql(AssertSqlSafe(sql))
            .execute(&mut connection)
            .await
            .unwrap();
    }

    /// Removes the schemas that were made.
    pub async fn clear(&self) {
        let names = std::mem::take(&mut *self.names.lock().unwrap());
        for name in names {
            self.raw(&format!("DROP SCHEMA IF EXISTS {name} CASCADE"))
                .await;
        }
    }
}
