//! What clients find out by themselves: the server's metadata (RFC 8414, OpenID Connect
//! Discovery 1.0) and its public keys (RFC 7517).

use axum::{Json, Router, extract::State, response::IntoResponse, routing::get};
use http::header;
use serde_json::{Value, json};

use super::{Server, Shared, client_auth, token};
use crate::jwt::Algorithm;

pub fn routes() -> Router<Shared> {
    Router::new()
        .route("/jwks.json", get(jwks))
        // OpenID Connect Discovery 4: behind the issuer's path.
        .route("/.well-known/openid-configuration", get(metadata))
}

/// RFC 8414 3.1: between the issuer's host and its path.
pub fn at_the_host(path: &str) -> Router<Shared> {
    let inserted = format!("/.well-known/oauth-authorization-server{path}");
    let router = Router::new().route(&inserted, get(metadata));
    match path {
        "" => router,
        path => {
            let inserted = format!("/.well-known/openid-configuration{path}");
            router.route(&inserted, get(metadata))
        }
    }
}

async fn jwks(State(server): State<Shared>) -> impl IntoResponse {
    let cache = format!("public, max-age={}", server.keys.cache().as_secs());
    ([(header::CACHE_CONTROL, cache)], Json(server.keys.jwks()))
}

async fn metadata(State(server): State<Shared>) -> impl IntoResponse {
    let cache = [(header::CACHE_CONTROL, "public, max-age=300")];
    (cache, Json(document(&server)))
}

/// Every member is true of this server.
pub fn document(server: &Server) -> Value {
    let at = |path: &str| server.config.endpoint(path);
    let algorithms: Vec<_> = Algorithm::ALL.iter().map(|a| a.name()).collect();
    let of_keys = server.keys.jwks();
    let mut signing: Vec<&str> = of_keys["keys"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|key| key["alg"].as_str())
        .collect();
    signing.sort_unstable();
    signing.dedup();
    let without_public: Vec<_> = client_auth::METHODS
        .into_iter()
        .filter(|method| *method != "none")
        .collect();
    json!({
        "issuer": server.config.issuer,
        "authorization_endpoint": at("/authorize"),
        "token_endpoint": at("/token"),
        "introspection_endpoint": at("/introspect"),
        "revocation_endpoint": at("/revoke"),
        "userinfo_endpoint": at("/userinfo"),
        "jwks_uri": at("/jwks.json"),
        "scopes_supported": ["openid", "profile", "email", "offline_access"],
        "response_types_supported": ["code"],
        "response_modes_supported": ["query"],
        "grant_types_supported": [
            "authorization_code", "refresh_token", "client_credentials", token::EXCHANGE,
        ],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": signing,
        "claims_supported": [
            "iss", "sub", "aud", "exp", "iat", "auth_time", "nonce", "azp", "at_hash",
            "name", "preferred_username", "email",
        ],
        "claims_parameter_supported": false,
        "request_parameter_supported": false,
        "request_uri_parameter_supported": false,
        "code_challenge_methods_supported": ["S256"],
        "authorization_response_iss_parameter_supported": true,
        "token_endpoint_auth_methods_supported": client_auth::METHODS,
        "token_endpoint_auth_signing_alg_values_supported": algorithms,
        "introspection_endpoint_auth_methods_supported": without_public,
        "introspection_endpoint_auth_signing_alg_values_supported": algorithms,
        "revocation_endpoint_auth_methods_supported": client_auth::METHODS,
        "revocation_endpoint_auth_signing_alg_values_supported": algorithms,
        "tls_client_certificate_bound_access_tokens": true,
        "dpop_signing_alg_values_supported": algorithms,
    })
}
