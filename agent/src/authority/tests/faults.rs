//! A process that dies at any write of any grant: what was answered is good afterwards,
//! and nothing is good twice.

use std::sync::Arc;

use http::StatusCode;
use serde_json::json;
use sqlx::Row as _;
use tempfile::TempDir;

use super::kit::{ACCESS_TOKEN, EXCHANGE, JWT_BEARER, Kit, assertion, client, posted, write_jwks};
use crate::{
    authority::{
        Clock, Config,
        clients::{Authentication, Grant},
    },
    jwt::{Algorithm, SigningKey},
};

/// More points than any grant has.
const MANY: usize = 100;

/// A state directory, a time, and a key of a client there.
struct Place {
    directory: Arc<TempDir>,
    clock: Clock,
    key: SigningKey,
}

impl Place {
    fn new() -> Self {
        Self {
            directory: Arc::new(tempfile::tempdir().expect("directory")),
            clock: Clock::fixed(Clock::system().seconds()),
            key: SigningKey::generate(Algorithm::Es256).expect("a key"),
        }
    }

    /// A process on it.
    async fn start(&self, fault: Option<usize>) -> Kit {
        let change = |config: &mut Config, directory: &std::path::Path| {
            let way = Authentication::PrivateKeyJwt {
                jwks_file: write_jwks(directory, &self.key),
            };
            let grants = [Grant::ClientCredentials];
            config.clients.push(client("keyed", way, &grants));
        };
        Kit::at(self.directory.clone(), self.clock.clone(), change, fault).await
    }

    /// How many refresh tokens can be used.
    async fn usable(&self, kit: &Kit) -> i64 {
        let row = sqlx::query::<sqlx::Any>(
            "SELECT COUNT(*) AS n FROM refresh_tokens r JOIN families f ON f.id = r.family
             WHERE r.used = 0 AND f.revoked = 0",
        )
        .fetch_one(&kit.store().pool)
        .await;
        row.expect("counted").try_get("n").expect("a number")
    }
}

#[tokio::test]
async fn a_code_survives_the_end_of_the_process_at_every_write() {
    for point in 0..MANY {
        let place = Place::new();
        let kit = place.start(None).await;
        let (code, verifier) = kit.code("app", &["read"]).await;
        let _closed = kit.close().await;
        let kit = place.start(Some(point)).await;
        let answer = kit.redeem("app", &code, &verifier).await;
        let _closed = kit.close().await;
        let kit = place.start(None).await;
        assert!(place.usable(&kit).await <= 1, "point {point}");
        if answer.status == StatusCode::OK {
            let next = kit.refresh(&answer.text("refresh_token")).await.ok();
            assert!(kit.active("app", &next.text("access_token")).await);
            kit.redeem("app", &code, &verifier)
                .await
                .refused("invalid_grant");
            assert!(point > 5, "only {point} points were met");
            return;
        }
        assert_eq!(
            answer.status,
            StatusCode::SERVICE_UNAVAILABLE,
            "point {point}"
        );
        let again = kit.redeem("app", &code, &verifier).await;
        if again.status == StatusCode::OK {
            assert!(
                point == 0,
                "point {point}: the code was taken, and taken again"
            );
            kit.redeem("app", &code, &verifier)
                .await
                .refused("invalid_grant");
        } else {
            again.refused("invalid_grant");
            assert_eq!(place.usable(&kit).await, 0, "point {point}");
        }
    }
    panic!("it never ends");
}

#[tokio::test]
async fn a_refresh_token_survives_the_end_of_the_process_at_every_write() {
    for point in 0..MANY {
        let place = Place::new();
        let kit = place.start(None).await;
        let old = kit.login(&["read"]).await.text("refresh_token");
        let _closed = kit.close().await;
        let kit = place.start(Some(point)).await;
        let answer = kit.refresh(&old).await;
        let _closed = kit.close().await;
        let kit = place.start(None).await;
        assert_eq!(place.usable(&kit).await, 1, "point {point}");
        if answer.status == StatusCode::OK {
            kit.refresh(&answer.text("refresh_token")).await.ok();
            kit.refresh(&old).await.refused("invalid_grant");
            assert_eq!(place.usable(&kit).await, 0);
            assert!(point > 5, "only {point} points were met");
            return;
        }
        assert_eq!(
            answer.status,
            StatusCode::SERVICE_UNAVAILABLE,
            "point {point}"
        );
        // Either nothing happened, and the old one is good, once; or it was taken, and
        // the new one, which nobody has, dies with its family.
        let again = kit.refresh(&old).await;
        if again.status == StatusCode::OK {
            assert_eq!(place.usable(&kit).await, 1, "point {point}");
            kit.refresh(&old).await.refused("invalid_grant");
        }
        kit.refresh(&old).await.refused("invalid_grant");
        assert_eq!(place.usable(&kit).await, 0, "point {point}");
    }
    panic!("it never ends");
}

#[tokio::test]
async fn exchanged_and_opaque_tokens_that_were_answered_are_good() {
    for point in 0..MANY {
        let place = Place::new();
        let kit = place.start(None).await;
        let token = kit.login(&["read"]).await.text("access_token");
        let _closed = kit.close().await;
        let kit = place.start(Some(point)).await;
        let form = [
            ("grant_type", EXCHANGE),
            ("subject_token", token.as_str()),
            ("subject_token_type", ACCESS_TOKEN),
        ];
        let exchanged = kit.token_as("opaque", &form).await;
        let form = [("grant_type", "client_credentials")];
        let own = kit.token_as("opaque", &form).await;
        let _closed = kit.close().await;
        let kit = place.start(None).await;
        for answer in [&exchanged, &own] {
            if answer.status == StatusCode::OK {
                assert!(kit.active("opaque", &answer.text("access_token")).await);
            }
        }
        if exchanged.status == StatusCode::OK && own.status == StatusCode::OK {
            assert!(point > 7, "only {point} points were met");
            return;
        }
        assert_eq!(own.status, StatusCode::SERVICE_UNAVAILABLE, "point {point}");
    }
    panic!("it never ends");
}

#[tokio::test]
async fn an_assertion_that_was_answered_is_not_taken_again() {
    for point in 0..MANY {
        let place = Place::new();
        let kit = place.start(Some(point)).await;
        let proof = assertion(&place.key, "keyed", &place.clock, json!({}));
        let form = [
            ("grant_type", "client_credentials"),
            ("client_assertion_type", JWT_BEARER),
            ("client_assertion", proof.as_str()),
        ];
        let answer = kit.send(posted("/token", &form)).await;
        let _closed = kit.close().await;
        let kit = place.start(None).await;
        let again = kit.post("/token", &form).await;
        if answer.status == StatusCode::OK {
            again.refused("invalid_client");
            assert!(point > 1, "only {point} points were met");
            return;
        }
        if again.status == StatusCode::OK {
            kit.post("/token", &form).await.refused("invalid_client");
        }
    }
    panic!("it never ends");
}

#[tokio::test]
async fn a_revocation_that_was_answered_holds() {
    for point in 0..MANY {
        let place = Place::new();
        let kit = place.start(None).await;
        let login = kit.login(&["read"]).await;
        let _closed = kit.close().await;
        let kit = place.start(Some(point)).await;
        let access = login.text("access_token");
        let one = kit.post_as("app", "/revoke", &[("token", &access)]).await;
        let refresh = login.text("refresh_token");
        let all = kit.post_as("app", "/revoke", &[("token", &refresh)]).await;
        let _closed = kit.close().await;
        let kit = place.start(None).await;
        if one.status == StatusCode::OK {
            assert!(!kit.active("app", &access).await, "point {point}");
        }
        if all.status == StatusCode::OK {
            assert!(!kit.active("app", &refresh).await, "point {point}");
            assert!(point > 3, "only {point} points were met");
            return;
        }
    }
    panic!("it never ends");
}
