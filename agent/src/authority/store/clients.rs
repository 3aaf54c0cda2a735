//! Clients that `postern authority client add` registered.

use sqlx::{Any, Row as _};

use super::{Store, StoreError};
use crate::authority::clients::Client;

pub(super) const TABLES: &[&str] = &["CREATE TABLE IF NOT EXISTS clients (
        id TEXT PRIMARY KEY, document TEXT NOT NULL)"];

impl Store {
    /// Whether it was added: an id that is taken is left as it is.
    pub async fn add_client(&self, client: &Client) -> Result<bool, StoreError> {
        let document = serde_json::to_string(client).expect("a client has string keys only");
        let query = sqlx::query::<Any>(
            "INSERT INTO clients (id, document) VALUES ($1, $2) ON CONFLICT (id) DO NOTHING",
        )
        .bind(client.id.clone())
        .bind(document);
        Ok(self.write_one(query).await? == 1)
    }

    /// Whether there was one. Its codes and refresh tokens are void with it, and nobody's
    /// consent is left for another of this name.
    pub async fn remove_client(&self, id: &str) -> Result<bool, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let query = sqlx::query::<Any>("DELETE FROM clients WHERE id = $1").bind(id.to_owned());
        let removed = self.write(&mut transaction, query).await?;
        for statement in [
            "DELETE FROM codes WHERE client = $1 AND used < 2",
            "UPDATE families SET revoked = 1 WHERE client = $1",
            "DELETE FROM consents WHERE client = $1",
        ] {
            let query = sqlx::query::<Any>(statement).bind(id.to_owned());
            self.write(&mut transaction, query).await?;
        }
        self.commit(transaction).await?;
        Ok(removed == 1)
    }

    pub async fn client(&self, id: &str) -> Result<Option<Client>, StoreError> {
        let row = sqlx::query::<Any>("SELECT document FROM clients WHERE id = $1")
            .bind(id.to_owned())
            .fetch_optional(&self.pool)
            .await?;
        row.map(|row| read(&row)).transpose()
    }

    pub async fn clients(&self) -> Result<Vec<Client>, StoreError> {
        let rows = sqlx::query::<Any>("SELECT document FROM clients ORDER BY id")
            .fetch_all(&self.pool)
            .await?;
        rows.iter().map(read).collect()
    }
}

fn read(row: &sqlx::any::AnyRow) -> Result<Client, StoreError> {
    let document: String = row.try_get("document")?;
    serde_json::from_str(&document)
        .map_err(|e| StoreError::Config(format!("a client in the store cannot be read: {e}")))
}
