//! What was granted: codes taken, refresh tokens, access tokens that are revocable,
//! and the ids of assertions that were used.
//!
//! A family is one agreement of a person and all that came of it (RFC 6749 4.1.2, RFC
//! 9700 4.14.2): its refresh tokens and its access tokens are void once it is revoked.
//! A client's own access tokens have no family. Every token here goes by a hash.

use sqlx::{Any, Row as _, any::AnyRow};

use super::{Code, Store, StoreError};

pub(super) const TABLES: &[&str] = &[
    "CREATE TABLE IF NOT EXISTS families (
        id TEXT PRIMARY KEY, code TEXT NOT NULL UNIQUE, client TEXT NOT NULL,
        subject TEXT NOT NULL, scopes TEXT NOT NULL, audiences TEXT NOT NULL,
        auth_time BIGINT NOT NULL, bound TEXT, expires BIGINT NOT NULL,
        revoked BIGINT NOT NULL DEFAULT 0)",
    "CREATE TABLE IF NOT EXISTS refresh_tokens (
        hash TEXT PRIMARY KEY, family TEXT NOT NULL, expires BIGINT NOT NULL,
        used BIGINT NOT NULL DEFAULT 0)",
    "CREATE INDEX IF NOT EXISTS refresh_tokens_family ON refresh_tokens (family)",
    // `claims` of opaque tokens alone: a JWT has them itself.
    "CREATE TABLE IF NOT EXISTS access_tokens (
        hash TEXT PRIMARY KEY, family TEXT, claims TEXT, expires BIGINT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS revoked_tokens (
        hash TEXT PRIMARY KEY, expires BIGINT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS used_ids (
        hash TEXT PRIMARY KEY, expires BIGINT NOT NULL)",
];

/// Longest time between taking a code and answering, seconds; far more than a request
/// may last.
const EXCHANGE: i64 = 3_600;

/// What a person agreed to.
#[derive(Clone, Debug)]
pub struct Family {
    pub id: String,
    pub client: String,
    /// `sub`.
    pub subject: String,
    pub scopes: Vec<String>,
    pub audiences: Vec<String>,
    /// Seconds since 1970.
    pub auth_time: u64,
    /// `cnf` that a public client's refresh tokens are bound to (RFC 9449 5).
    pub bound: Option<String>,
    /// Seconds since 1970.
    pub expires: u64,
}

/// What is handed out with one answer.
#[derive(Clone, Debug, Default)]
pub struct Issued {
    /// Hash of the access token's `jti`, or of the opaque token.
    pub access: String,
    pub access_expires: u64,
    /// Of an opaque token.
    pub claims: Option<String>,
    /// Hash of the refresh token, and when it is void if it is not used.
    pub refresh: Option<(String, u64)>,
}

/// What became of a code.
#[derive(Debug)]
pub enum Taken {
    Code(Box<Code>),
    /// It was used before; what came of it is revoked now.
    Again {
        subject: String,
    },
    /// Unknown, expired, or another client's.
    No,
}

/// What became of a refresh token.
#[derive(Debug)]
pub enum Refreshed {
    Family(Box<Family>),
    /// It was used before; its family is revoked now.
    Again {
        subject: String,
    },
    No,
}

/// What the store knows of an access token.
#[derive(Debug, Default)]
pub struct Known {
    pub family: Option<String>,
    pub claims: Option<String>,
    pub revoked: bool,
}

impl Store {
    /// Takes a code for its client, once. Whatever the answer, nobody takes it again.
    pub async fn take_code(&self, hash: &str, client: &str, now: u64) -> Result<Taken, StoreError> {
        self.point()?;
        let row = sqlx::query::<Any>(
            "UPDATE codes SET used = 1 WHERE hash = $1 AND client = $2 AND used = 0
             AND expires > $3 RETURNING *",
        )
        .bind(hash.to_owned())
        .bind(client.to_owned())
        .bind(now as i64)
        .fetch_optional(&self.pool)
        .await?;
        self.point()?;
        if let Some(row) = row {
            return Ok(Taken::Code(Box::new(code(&row)?)));
        }
        let used = sqlx::query::<Any>(
            "SELECT subject FROM codes WHERE hash = $1 AND client = $2 AND used > 0
             UNION SELECT subject FROM families WHERE code = $3 AND client = $4",
        )
        .bind(hash.to_owned())
        .bind(client.to_owned())
        .bind(hash.to_owned())
        .bind(client.to_owned())
        .fetch_optional(&self.pool)
        .await?;
        let Some(used) = used else {
            return Ok(Taken::No);
        };
        // First the code: an exchange that is under way finds that it may not end.
        let query = sqlx::query::<Any>("UPDATE codes SET used = 2 WHERE hash = $1 AND used = 1")
            .bind(hash.to_owned());
        self.write_one(query).await?;
        let query = sqlx::query::<Any>("UPDATE families SET revoked = 1 WHERE code = $1")
            .bind(hash.to_owned());
        self.write_one(query).await?;
        Ok(Taken::Again {
            subject: used.try_get("subject")?,
        })
    }

    /// Keeps what a code was exchanged for. Whether it may be answered: not if the code
    /// was used again in the meantime.
    pub async fn add_family(
        &self,
        code: &str,
        family: &Family,
        issued: &Issued,
    ) -> Result<bool, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let query = sqlx::query::<Any>("UPDATE codes SET used = 3 WHERE hash = $1 AND used = 1")
            .bind(code.to_owned());
        if self.write(&mut transaction, query).await? == 0 {
            return Ok(false);
        }
        let query = sqlx::query::<Any>(
            "INSERT INTO families (id, code, client, subject, scopes, audiences, auth_time,
             bound, expires) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        )
        .bind(family.id.clone())
        .bind(code.to_owned())
        .bind(family.client.clone())
        .bind(family.subject.clone())
        .bind(list(&family.scopes))
        .bind(list(&family.audiences))
        .bind(family.auth_time as i64)
        .bind(family.bound.clone())
        .bind(family.expires as i64);
        self.write(&mut transaction, query).await?;
        self.add_issued(&mut transaction, Some(&family.id), issued)
            .await?;
        self.commit(transaction).await?;
        Ok(true)
    }

    /// Keeps a token that has no code behind it.
    pub async fn add_token(&self, family: Option<&str>, issued: &Issued) -> Result<(), StoreError> {
        let mut transaction = self.pool.begin().await?;
        self.add_issued(&mut transaction, family, issued).await?;
        self.commit(transaction).await
    }

    async fn add_issued(
        &self,
        connection: &mut sqlx::AnyConnection,
        family: Option<&str>,
        issued: &Issued,
    ) -> Result<(), StoreError> {
        let query = sqlx::query::<Any>(
            "INSERT INTO access_tokens (hash, family, claims, expires) VALUES ($1, $2, $3, $4)",
        )
        .bind(issued.access.clone())
        .bind(family.map(str::to_owned))
        .bind(issued.claims.clone())
        .bind(issued.access_expires as i64);
        self.write(connection, query).await?;
        if let (Some((hash, expires)), Some(family)) = (&issued.refresh, family) {
            let query = sqlx::query::<Any>(
                "INSERT INTO refresh_tokens (hash, family, expires) VALUES ($1, $2, $3)",
            )
            .bind(hash.clone())
            .bind(family.to_owned())
            .bind(*expires as i64);
            self.write(connection, query).await?;
        }
        Ok(())
    }

    /// The family of a client's refresh token that can be used now. Takes nothing.
    pub async fn refreshable(
        &self,
        hash: &str,
        client: &str,
        now: u64,
    ) -> Result<Refreshed, StoreError> {
        let row = sqlx::query::<Any>(
            "SELECT f.id, f.client, f.subject, f.scopes, f.audiences, f.auth_time, f.bound,
             f.expires, f.revoked, r.used, r.expires AS idle FROM refresh_tokens r
             JOIN families f ON f.id = r.family WHERE r.hash = $1 AND f.client = $2",
        )
        .bind(hash.to_owned())
        .bind(client.to_owned())
        .fetch_optional(&self.pool)
        .await?;
        let Some(row) = row else {
            return Ok(Refreshed::No);
        };
        let number = |name| row.try_get::<i64, _>(name);
        let family = family(&row)?;
        if number("used")? != 0 {
            self.revoke_family(&family.id).await?;
            return Ok(Refreshed::Again {
                subject: family.subject,
            });
        }
        let now = now as i64;
        let good = number("revoked")? == 0 && number("idle")? > now && number("expires")? > now;
        Ok(match good {
            true => Refreshed::Family(Box::new(family)),
            false => Refreshed::No,
        })
    }

    /// Takes a refresh token and keeps what it was exchanged for, both or neither.
    pub async fn rotate(
        &self,
        hash: &str,
        family: &Family,
        issued: &Issued,
        now: u64,
    ) -> Result<Refreshed, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let query = sqlx::query::<Any>(
            "UPDATE refresh_tokens SET used = 1 WHERE hash = $1 AND used = 0 AND expires > $2
             AND EXISTS (SELECT 1 FROM families f WHERE f.id = refresh_tokens.family
             AND f.client = $3 AND f.revoked = 0 AND f.expires > $4)",
        )
        .bind(hash.to_owned())
        .bind(now as i64)
        .bind(family.client.clone())
        .bind(now as i64);
        if self.write(&mut transaction, query).await? == 0 {
            drop(transaction);
            // Somebody was faster: it says what that makes of this one.
            return match self.refreshable(hash, &family.client, now).await? {
                Refreshed::Family(_) => Ok(Refreshed::No),
                other => Ok(other),
            };
        }
        self.add_issued(&mut transaction, Some(&family.id), issued)
            .await?;
        self.commit(transaction).await?;
        Ok(Refreshed::Family(Box::new(family.clone())))
    }

    /// A refresh token as introspection tells of it, whoever's it is.
    pub async fn refresh_token(
        &self,
        hash: &str,
        now: u64,
    ) -> Result<Option<(Family, bool)>, StoreError> {
        let row = sqlx::query::<Any>(
            "SELECT f.id, f.client, f.subject, f.scopes, f.audiences, f.auth_time, f.bound,
             f.expires, f.revoked, r.used, r.expires AS idle FROM refresh_tokens r
             JOIN families f ON f.id = r.family WHERE r.hash = $1",
        )
        .bind(hash.to_owned())
        .fetch_optional(&self.pool)
        .await?;
        let Some(row) = row else {
            return Ok(None);
        };
        let number = |name| row.try_get::<i64, _>(name);
        let now = now as i64;
        let idle = number("idle")?;
        let mut family = family(&row)?;
        let active = number("used")? == 0
            && number("revoked")? == 0
            && idle > now
            && number("expires")? > now;
        family.expires = family.expires.min(idle as u64);
        Ok(Some((family, active)))
    }

    pub async fn revoke_family(&self, id: &str) -> Result<(), StoreError> {
        let query =
            sqlx::query::<Any>("UPDATE families SET revoked = 1 WHERE id = $1").bind(id.to_owned());
        self.write_one(query).await?;
        Ok(())
    }

    /// What is known of an access token by the hash of its `jti`, or of itself.
    pub async fn access_token(&self, hash: &str) -> Result<Known, StoreError> {
        let revoked = sqlx::query::<Any>("SELECT hash FROM revoked_tokens WHERE hash = $1")
            .bind(hash.to_owned())
            .fetch_optional(&self.pool)
            .await?
            .is_some();
        let row = sqlx::query::<Any>(
            "SELECT a.family, a.claims, f.id AS alive FROM access_tokens a
             LEFT JOIN families f ON f.id = a.family AND f.revoked = 0 WHERE a.hash = $1",
        )
        .bind(hash.to_owned())
        .fetch_optional(&self.pool)
        .await?;
        let Some(row) = row else {
            return Ok(Known {
                revoked,
                ..Known::default()
            });
        };
        let family: Option<String> = row.try_get("family")?;
        let alive: Option<String> = row.try_get("alive")?;
        Ok(Known {
            revoked: revoked || (family.is_some() && alive.is_none()),
            family,
            claims: row.try_get("claims")?,
        })
    }

    /// Says until `expires` that a token is no longer good.
    pub async fn revoke_token(&self, hash: &str, expires: u64) -> Result<(), StoreError> {
        let query = sqlx::query::<Any>(
            "INSERT INTO revoked_tokens (hash, expires) VALUES ($1, $2)
             ON CONFLICT (hash) DO NOTHING",
        )
        .bind(hash.to_owned())
        .bind(expires as i64);
        self.write_one(query).await?;
        Ok(())
    }

    /// Whether an id that may be used once is used for the first time.
    pub async fn use_id(&self, hash: &str, expires: u64) -> Result<bool, StoreError> {
        let query = sqlx::query::<Any>(
            "INSERT INTO used_ids (hash, expires) VALUES ($1, $2) ON CONFLICT (hash) DO NOTHING",
        )
        .bind(hash.to_owned())
        .bind(expires as i64);
        Ok(self.write_one(query).await? == 1)
    }

    /// Removes what has expired. A family stays as long as any of it could be used, and
    /// with it the knowledge of its code and of its used refresh tokens.
    pub async fn purge(&self, now: u64) -> Result<(), StoreError> {
        // One that was just taken is still being exchanged.
        let query =
            sqlx::query::<Any>("DELETE FROM codes WHERE expires <= $1").bind(now as i64 - EXCHANGE);
        self.write_one(query).await?;
        for statement in [
            "DELETE FROM access_tokens WHERE expires <= $1",
            "DELETE FROM revoked_tokens WHERE expires <= $1",
            "DELETE FROM used_ids WHERE expires <= $1",
            "DELETE FROM refresh_tokens WHERE family IN
             (SELECT id FROM families WHERE expires <= $1)",
            "DELETE FROM families WHERE expires <= $1",
        ] {
            let query = sqlx::query::<Any>(statement).bind(now as i64);
            self.write_one(query).await?;
        }
        Ok(())
    }
}

fn list(list: &[String]) -> String {
    serde_json::to_string(list).expect("strings")
}

fn read_list(row: &AnyRow, name: &str) -> Result<Vec<String>, StoreError> {
    let text: String = row.try_get(name)?;
    serde_json::from_str(&text)
        .map_err(|e| StoreError::Config(format!("column {name} is no list: {e}")))
}

fn code(row: &AnyRow) -> Result<Code, StoreError> {
    Ok(Code {
        client: row.try_get("client")?,
        redirect_uri: row.try_get("redirect_uri")?,
        subject: row.try_get("subject")?,
        scopes: read_list(row, "scopes")?,
        audiences: read_list(row, "audiences")?,
        nonce: row.try_get("nonce")?,
        challenge: row.try_get("challenge")?,
        auth_time: row.try_get::<i64, _>("auth_time")? as u64,
        dpop_jkt: row.try_get("dpop_jkt")?,
        expires: row.try_get::<i64, _>("expires")? as u64,
    })
}

fn family(row: &AnyRow) -> Result<Family, StoreError> {
    Ok(Family {
        id: row.try_get("id")?,
        client: row.try_get("client")?,
        subject: row.try_get("subject")?,
        scopes: read_list(row, "scopes")?,
        audiences: read_list(row, "audiences")?,
        auth_time: row.try_get::<i64, _>("auth_time")? as u64,
        bound: row.try_get("bound")?,
        expires: row.try_get::<i64, _>("expires")? as u64,
    })
}
