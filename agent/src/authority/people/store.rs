//! What the store keeps of people: accounts, failures, sessions, consents, and which
//! forms were answered.

use sqlx::{Any, AnyConnection, Row as _, any::AnyRow};

use super::{
    super::store::{Store, StoreError, User},
    Account,
};

/// Times are seconds since 1970.
pub(in super::super) const TABLES: &[&str] = &[
    // Of people of the configuration too; `subject` is the user's id.
    "CREATE TABLE IF NOT EXISTS lockouts (
        subject TEXT PRIMARY KEY, failures BIGINT NOT NULL, locked_until BIGINT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS sessions (
        hash TEXT PRIMARY KEY, subject TEXT NOT NULL, auth_time BIGINT NOT NULL,
        seen BIGINT NOT NULL, expires BIGINT NOT NULL)",
    "CREATE INDEX IF NOT EXISTS sessions_subject ON sessions (subject)",
    "CREATE TABLE IF NOT EXISTS consents (
        subject TEXT NOT NULL, client TEXT NOT NULL, audience TEXT NOT NULL,
        scope TEXT NOT NULL, PRIMARY KEY (subject, client, audience, scope))",
    "CREATE TABLE IF NOT EXISTS answered (
        nonce TEXT PRIMARY KEY, expires BIGINT NOT NULL)",
];

/// A login as the store has it.
pub struct StoredSession {
    pub subject: String,
    pub auth_time: u64,
    pub seen: u64,
}

impl Store {
    pub(super) async fn account(&self, username: &str) -> Result<Option<Account>, StoreError> {
        let row = sqlx::query::<Any>(
            "SELECT id, username, name, email, disabled, password_hash
             FROM users WHERE username = $1",
        )
        .bind(username.to_owned())
        .fetch_optional(&self.pool)
        .await?;
        row.map(|row| {
            Ok(Account {
                user: user(&row)?,
                password_hash: row.try_get("password_hash")?,
                stored: true,
            })
        })
        .transpose()
    }

    /// All that the store has, by username.
    pub async fn users(&self) -> Result<Vec<User>, StoreError> {
        let rows = sqlx::query::<Any>(
            "SELECT id, username, name, email, disabled FROM users ORDER BY username",
        )
        .fetch_all(&self.pool)
        .await?;
        rows.iter().map(user).collect()
    }

    /// False where the username is taken.
    pub async fn add_user(&self, user: &User, password_hash: &str) -> Result<bool, StoreError> {
        let done = sqlx::query::<Any>(
            "INSERT INTO users (id, username, password_hash, name, email, disabled)
             VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (username) DO NOTHING",
        )
        .bind(user.id.clone())
        .bind(user.username.clone())
        .bind(password_hash.to_owned())
        .bind(user.name.clone())
        .bind(user.email.clone())
        .bind(i64::from(user.disabled))
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() == 1)
    }

    /// False where nobody has this id. A disabled account loses its sessions and all
    /// that came of them for good: they do not return with the account.
    pub async fn set_disabled(&self, id: &str, disabled: bool) -> Result<bool, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let done = sqlx::query::<Any>("UPDATE users SET disabled = $2 WHERE id = $1")
            .bind(id.to_owned())
            .bind(i64::from(disabled))
            .execute(&mut *transaction)
            .await?;
        if disabled {
            end_all(&mut transaction, id).await?;
        }
        transaction.commit().await?;
        Ok(done.rows_affected() == 1)
    }

    /// A new password: the lock is off, and who was logged in with the old one is not
    /// any more, nor has what came of it. False where nobody has this id.
    pub async fn set_password(&self, id: &str, password_hash: &str) -> Result<bool, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let done = sqlx::query::<Any>("UPDATE users SET password_hash = $2 WHERE id = $1")
            .bind(id.to_owned())
            .bind(password_hash.to_owned())
            .execute(&mut *transaction)
            .await?;
        end_all(&mut transaction, id).await?;
        sqlx::query::<Any>("DELETE FROM lockouts WHERE subject = $1")
            .bind(id.to_owned())
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(done.rows_affected() == 1)
    }

    /// A better hash of the same password, unless it was changed meanwhile.
    pub(super) async fn replace_hash(
        &self,
        id: &str,
        old: &str,
        new: &str,
    ) -> Result<(), StoreError> {
        sqlx::query::<Any>(
            "UPDATE users SET password_hash = $3 WHERE id = $1 AND password_hash = $2",
        )
        .bind(id.to_owned())
        .bind(old.to_owned())
        .bind(new.to_owned())
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Counts an attempt to log in as failed until it proves right ([`Self::forgive`]),
    /// and locks the account where it is the `after`th in a row. `None`: it is locked,
    /// and this attempt does not count. One statement, so that parallel attempts
    /// queue up at the row.
    pub(super) async fn attempt(
        &self,
        subject: &str,
        now: u64,
        after: u64,
        lockout: u64,
    ) -> Result<Option<u64>, StoreError> {
        let until = now.saturating_add(lockout) as i64;
        let row = sqlx::query::<Any>(
            "INSERT INTO lockouts (subject, failures, locked_until) VALUES ($1, 1, $2)
             ON CONFLICT (subject) DO UPDATE SET
               failures = CASE WHEN lockouts.locked_until > 0 THEN 1
                               ELSE lockouts.failures + 1 END,
               locked_until = CASE WHEN lockouts.locked_until = 0
                                    AND lockouts.failures + 1 >= $3 THEN $4
                                   ELSE $2 END
             WHERE lockouts.locked_until <= $5
             RETURNING failures",
        )
        .bind(subject.to_owned())
        // What the first failure of all, or the first after a lock, leads to.
        .bind(if after <= 1 { until } else { 0 })
        .bind(after as i64)
        .bind(until)
        .bind(now as i64)
        .fetch_optional(&self.pool)
        .await?;
        row.map(|row| Ok(row.try_get::<i64, _>("failures")? as u64))
            .transpose()
    }

    /// The password was right: no failure counts any more.
    pub(super) async fn forgive(&self, subject: &str) -> Result<(), StoreError> {
        sqlx::query::<Any>("DELETE FROM lockouts WHERE subject = $1")
            .bind(subject.to_owned())
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Keeps a login until `expires`. Those that are over make room.
    pub(super) async fn add_session(
        &self,
        hash: &str,
        subject: &str,
        now: u64,
        expires: u64,
    ) -> Result<(), StoreError> {
        sqlx::query::<Any>("DELETE FROM sessions WHERE expires <= $1")
            .bind(now as i64)
            .execute(&self.pool)
            .await?;
        sqlx::query::<Any>(
            "INSERT INTO sessions (hash, subject, auth_time, seen, expires)
             VALUES ($1, $2, $3, $3, $4)",
        )
        .bind(hash.to_owned())
        .bind(subject.to_owned())
        .bind(now as i64)
        .bind(expires as i64)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// A login that is not over, and was used after `idle_since`.
    pub(super) async fn stored_session(
        &self,
        hash: &str,
        now: u64,
        idle_since: u64,
    ) -> Result<Option<StoredSession>, StoreError> {
        let row = sqlx::query::<Any>(
            "SELECT subject, auth_time, seen FROM sessions
             WHERE hash = $1 AND expires > $2 AND seen > $3",
        )
        .bind(hash.to_owned())
        .bind(now as i64)
        .bind(idle_since as i64)
        .fetch_optional(&self.pool)
        .await?;
        row.map(|row| {
            Ok(StoredSession {
                subject: row.try_get("subject")?,
                auth_time: row.try_get::<i64, _>("auth_time")? as u64,
                seen: row.try_get::<i64, _>("seen")? as u64,
            })
        })
        .transpose()
    }

    pub(super) async fn touch_session(&self, hash: &str, now: u64) -> Result<(), StoreError> {
        sqlx::query::<Any>("UPDATE sessions SET seen = $2 WHERE hash = $1 AND seen < $2")
            .bind(hash.to_owned())
            .bind(now as i64)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    pub(super) async fn end_session(&self, hash: &str) -> Result<(), StoreError> {
        sqlx::query::<Any>("DELETE FROM sessions WHERE hash = $1")
            .bind(hash.to_owned())
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Takes a form's nonce; true for one caller only. It is remembered until `expires`,
    /// when the form is void anyway.
    pub(in super::super) async fn answer_once(
        &self,
        nonce: &str,
        now: u64,
        expires: u64,
    ) -> Result<bool, StoreError> {
        sqlx::query::<Any>("DELETE FROM answered WHERE expires <= $1")
            .bind(now as i64)
            .execute(&self.pool)
            .await?;
        let done = sqlx::query::<Any>(
            "INSERT INTO answered (nonce, expires) VALUES ($1, $2)
             ON CONFLICT (nonce) DO NOTHING",
        )
        .bind(nonce.to_owned())
        .bind(expires as i64)
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() == 1)
    }

    /// Whether a code was handed out and not redeemed yet.
    pub(in super::super) async fn has_code(&self, hash: &str) -> Result<bool, StoreError> {
        let row = sqlx::query::<Any>("SELECT hash FROM codes WHERE hash = $1 AND used = 0")
            .bind(hash.to_owned())
            .fetch_optional(&self.pool)
            .await?;
        Ok(row.is_some())
    }

    /// Whether the person agreed to each of these scopes at each of these audiences.
    pub(in super::super) async fn has_consent(
        &self,
        subject: &str,
        client: &str,
        audiences: &[String],
        scopes: &[String],
    ) -> Result<bool, StoreError> {
        let rows = sqlx::query::<Any>(
            "SELECT audience, scope FROM consents WHERE subject = $1 AND client = $2",
        )
        .bind(subject.to_owned())
        .bind(client.to_owned())
        .fetch_all(&self.pool)
        .await?;
        let mut agreed = std::collections::HashSet::new();
        for row in &rows {
            agreed.insert((
                row.try_get::<String, _>("audience")?,
                row.try_get::<String, _>("scope")?,
            ));
        }
        let mut pairs = audiences
            .iter()
            .flat_map(|audience| scopes.iter().map(move |scope| (audience, scope)));
        Ok(pairs.all(|(audience, scope)| agreed.contains(&(audience.clone(), scope.clone()))))
    }

    pub(in super::super) async fn add_consent(
        &self,
        subject: &str,
        client: &str,
        audiences: &[String],
        scopes: &[String],
    ) -> Result<(), StoreError> {
        let mut transaction = self.pool.begin().await?;
        for audience in audiences {
            for scope in scopes {
                sqlx::query::<Any>(
                    "INSERT INTO consents (subject, client, audience, scope)
                     VALUES ($1, $2, $3, $4)
                     ON CONFLICT (subject, client, audience, scope) DO NOTHING",
                )
                .bind(subject.to_owned())
                .bind(client.to_owned())
                .bind(audience.clone())
                .bind(scope.clone())
                .execute(&mut *transaction)
                .await?;
            }
        }
        transaction.commit().await?;
        Ok(())
    }
}

/// Ends a person's sessions, codes and families. Codes first: an exchange that is under
/// way finds that it may not end.
async fn end_all(connection: &mut AnyConnection, subject: &str) -> Result<(), StoreError> {
    for statement in [
        "DELETE FROM codes WHERE subject = $1 AND used < 2",
        "UPDATE families SET revoked = 1 WHERE subject = $1",
        "DELETE FROM sessions WHERE subject = $1",
    ] {
        sqlx::query::<Any>(statement)
            .bind(subject.to_owned())
            .execute(&mut *connection)
            .await?;
    }
    Ok(())
}

fn user(row: &AnyRow) -> Result<User, StoreError> {
    Ok(User {
        id: row.try_get("id")?,
        username: row.try_get("username")?,
        name: row.try_get("name")?,
        email: row.try_get("email")?,
        disabled: row.try_get::<i64, _>("disabled")? != 0,
    })
}
