//! Opens the store: an SQLite file, or a Postgres database by its URL.

use std::sync::Arc;

use throughline::Result;
use throughline::store::{Queue, Sqlite};

pub async fn open(place: &str) -> Result<Arc<dyn Queue>> {
    if place.starts_with("postgres://") || place.starts_with("postgresql://") {
        return postgres(place).await;
    }
    Ok(Arc::new(Sqlite::open(place).await?))
}

/// Connects to Postgres. The URL may end with `#name`, which names the schema.
#[cfg(feature = "postgres")]
async fn postgres(url: &str) -> Result<Arc<dyn Queue>> {
    use throughline::store::Postgres;
    let (url, schema) = url.split_once('#').unwrap_or((url, "throughline"));
    let store = Postgres::builder(url)
        .schema(schema)
        .connections(8)
        .connect();
    Ok(Arc::new(store.await?))
}

#[cfg(not(feature = "postgres"))]
async fn postgres(_url: &str) -> Result<Arc<dyn Queue>> {
    let message = "this build does not include Postgres: add `--features postgres`";
    Err(throughline::Error::new(
        throughline::ErrorKind::Config,
        message,
    ))
}
