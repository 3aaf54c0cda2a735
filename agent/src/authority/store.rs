//! What must outlive the process: SQLite in the state directory, or PostgreSQL where
//! several replicas share it. The same SQL serves both.
//!
//! Codes, refresh tokens and sessions are kept as SHA-256 of what was handed out: who
//! reads the database can present none of them. Whatever may be used once is taken by
//! one statement that changes one row or none, so that two replicas, or a process that
//! dies in between, never both take it.

mod clients;
mod grants;

use std::{str::FromStr as _, sync::Arc, time::Duration};

use sqlx::{
    Any, AnyConnection, AnyPool, Row as _, Transaction,
    any::{AnyArguments, AnyConnectOptions, AnyPoolOptions},
    query::Query,
};

use super::Config;
pub use grants::{Family, Issued, Refreshed, Taken};

/// How long a connection, or a lock of another process, is waited for.
const WAIT: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The URL may hold a password.
    #[error("database: {0}")]
    Database(#[from] sqlx::Error),
    #[error("database: {0}")]
    Config(String),
    /// Only tests stop at a fault point.
    #[error("database: stopped here by a test")]
    Fault,
}

#[derive(Clone)]
pub struct Store {
    pub(super) pool: AnyPool,
    /// Asked before and after each write and each commit; where it says so, nothing
    /// more happens, as if the process had died there. Only tests set it.
    fault: Option<Fault>,
}

/// Whether to stop here.
type Fault = Arc<dyn Fn() -> bool + Send + Sync>;

/// An authorization code before it is handed out (RFC 6749 4.1.2).
#[derive(Clone, Debug)]
pub struct Code {
    pub client: String,
    pub redirect_uri: String,
    /// `sub` of the person who agreed.
    pub subject: String,
    pub scopes: Vec<String>,
    /// Never empty: what the access token will be for.
    pub audiences: Vec<String>,
    pub nonce: Option<String>,
    /// S256 (RFC 7636 4.2).
    pub challenge: String,
    /// When the person logged in, seconds since 1970.
    pub auth_time: u64,
    /// `dpop_jkt` (RFC 9449 10).
    pub dpop_jkt: Option<String>,
    /// Seconds since 1970.
    pub expires: u64,
}

/// A person, as tokens tell of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// `sub`.
    pub id: String,
    pub username: String,
    pub name: Option<String>,
    pub email: Option<String>,
    pub disabled: bool,
}

/// Made where they are missing. Times are seconds since 1970; lists are JSON.
const TABLES: &[&str] = &[
    "CREATE TABLE IF NOT EXISTS users (
        id TEXT PRIMARY KEY, username TEXT NOT NULL UNIQUE, password_hash TEXT NOT NULL,
        name TEXT, email TEXT, disabled BIGINT NOT NULL DEFAULT 0)",
    "CREATE TABLE IF NOT EXISTS codes (
        hash TEXT PRIMARY KEY, client TEXT NOT NULL, redirect_uri TEXT NOT NULL,
        subject TEXT NOT NULL, scopes TEXT NOT NULL, audiences TEXT NOT NULL, nonce TEXT,
        challenge TEXT NOT NULL, auth_time BIGINT NOT NULL, dpop_jkt TEXT,
        expires BIGINT NOT NULL, used BIGINT NOT NULL DEFAULT 0)",
];

impl Store {
    pub async fn open(config: &Config) -> Result<Self, StoreError> {
        sqlx::any::install_default_drivers();
        let (url, most) = match &database_url(config)? {
            None => {
                let path = config.state.join("authority.db");
                // Nobody else reads it, from its first moment on.
                private(&path)
                    .map_err(|e| StoreError::Config(format!("{}: {e}", path.display())))?;
                // One writer is all that SQLite has; others would only wait.
                (format!("sqlite://{}", path.display()), 1)
            }
            Some(url) if url.starts_with("postgres://") || url.starts_with("postgresql://") => {
                (url.clone(), 8)
            }
            Some(_neither) => {
                let why = "not a postgres:// URL; leave it out for SQLite in the state directory";
                return Err(StoreError::Config(why.into()));
            }
        };
        let options = AnyConnectOptions::from_str(&url)?;
        let pool = AnyPoolOptions::new()
            .max_connections(most)
            .acquire_timeout(WAIT)
            .connect_with(options)
            .await?;
        let store = Self { pool, fault: None };
        if config.database.is_none() {
            for pragma in [
                "PRAGMA journal_mode = WAL",
                // What is committed survives a power cut.
                "PRAGMA synchronous = FULL",
                "PRAGMA foreign_keys = ON",
            ] {
                sqlx::query::<Any>(pragma).execute(&store.pool).await?;
            }
        }
        let tables = (TABLES.iter())
            .chain(super::people::TABLES)
            .chain(grants::TABLES)
            .chain(clients::TABLES);
        for table in tables {
            store.make(table).await?;
        }
        Ok(store)
    }

    /// Makes a table or an index where it is missing. PostgreSQL's `IF NOT EXISTS` fails
    /// where another replica makes the same one at that moment; it is there the next time.
    pub(super) async fn make(&self, table: &'static str) -> Result<(), StoreError> {
        let mut tries = 1;
        loop {
            let Err(error) = sqlx::query::<Any>(table).execute(&self.pool).await else {
                return Ok(());
            };
            let code = error.as_database_error().and_then(|error| error.code());
            // unique_violation, duplicate_table, duplicate_object
            let raced = matches!(code.as_deref(), Some("23505" | "42P07" | "42710"));
            if !raced || tries > 5 {
                return Err(error.into());
            }
            tokio::time::sleep(Duration::from_millis(50) * tries).await;
            tries += 1;
        }
    }

    /// One that stops for good where `fault` first says so.
    #[cfg(test)]
    pub(super) fn with_fault(self, fault: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        use std::sync::atomic::{AtomicBool, Ordering};
        let dead = AtomicBool::new(false);
        let fault = move || {
            dead.load(Ordering::SeqCst)
                || (fault() && {
                    dead.store(true, Ordering::SeqCst);
                    true
                })
        };
        Self {
            fault: Some(Arc::new(fault)),
            ..self
        }
    }

    fn point(&self) -> Result<(), StoreError> {
        match &self.fault {
            Some(fault) if fault() => Err(StoreError::Fault),
            _ => Ok(()),
        }
    }

    /// A statement of a transaction: how many rows it changed.
    async fn write(
        &self,
        connection: &mut AnyConnection,
        query: Query<'static, Any, AnyArguments>,
    ) -> Result<u64, StoreError> {
        self.point()?;
        let done = query.execute(connection).await?;
        self.point()?;
        Ok(done.rows_affected())
    }

    /// A statement by itself.
    async fn write_one(&self, query: Query<'static, Any, AnyArguments>) -> Result<u64, StoreError> {
        let mut connection = self.pool.acquire().await?;
        self.write(&mut connection, query).await
    }

    async fn commit(&self, transaction: Transaction<'static, Any>) -> Result<(), StoreError> {
        self.point()?;
        transaction.commit().await?;
        self.point()
    }

    /// Keeps a code by its hash.
    pub async fn add_code(&self, hash: &str, code: &Code) -> Result<(), StoreError> {
        let list = |list: &[String]| serde_json::to_string(list).expect("strings");
        let query = sqlx::query::<Any>(
            "INSERT INTO codes (hash, client, redirect_uri, subject, scopes, audiences, nonce,
             challenge, auth_time, dpop_jkt, expires)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
        )
        .bind(hash.to_owned())
        .bind(code.client.clone())
        .bind(code.redirect_uri.clone())
        .bind(code.subject.clone())
        .bind(list(&code.scopes))
        .bind(list(&code.audiences))
        .bind(code.nonce.clone())
        .bind(code.challenge.clone())
        .bind(code.auth_time as i64)
        .bind(code.dpop_jkt.clone())
        .bind(code.expires as i64);
        self.write_one(query).await?;
        Ok(())
    }

    pub async fn user(&self, id: &str) -> Result<Option<User>, StoreError> {
        let row = sqlx::query::<Any>(
            "SELECT id, username, name, email, disabled FROM users WHERE id = $1",
        )
        .bind(id.to_owned())
        .fetch_optional(&self.pool)
        .await?;
        row.map(|row| {
            Ok(User {
                id: row.try_get("id")?,
                username: row.try_get("username")?,
                name: row.try_get("name")?,
                email: row.try_get("email")?,
                disabled: row.try_get::<i64, _>("disabled")? != 0,
            })
        })
        .transpose()
    }
}

/// The URL: as it is configured, or from the private file that it names.
fn database_url(config: &Config) -> Result<Option<String>, StoreError> {
    match config.database.as_deref() {
        Some(named) if named.starts_with('@') => {
            let content = crate::oauth::private_file(named[1..].as_ref())
                .map_err(|e| StoreError::Config(e.to_string()))?;
            let text = std::str::from_utf8(&content)
                .map_err(|_| StoreError::Config(format!("{named} is not UTF-8")))?;
            Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned()))
        }
        other => Ok(other.map(str::to_owned)),
    }
}

fn private(path: &std::path::Path) -> std::io::Result<()> {
    use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
    let file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)?;
    file.set_permissions(std::fs::Permissions::from_mode(0o600))
}
