//! The trust domain's certificate authority, for agents: they join with a proof of
//! which node they are, and get certificates (X509-SVID) and tokens (JWT-SVID) for the
//! service accounts of that node's pods, and for no others. JSON over TLS; refusals are
//! problem details (RFC 9457); each is on record, and so is what was signed.
//!
//! `problem` and `peer` guard the door, `kubernetes` and `tokens` say which node joins,
//! `placement` what runs there, `cluster` both where there is one; `csr` takes the key out of a request, `bundle` tells the roots.
//! The root's key signs intermediates alone; theirs are in memory, new at each start.

mod bundle;
mod cluster;
pub mod commands;
mod csr;
mod kubernetes;
mod limits;
mod peer;
mod placement;
mod problem;
#[cfg(test)]
mod tests;
mod tokens;

use std::{net::IpAddr, sync::Mutex, time::Duration};

use axum::{
    Extension, Json, Router,
    extract::{Request, State},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{StatusCode, header};
use serde_json::json;

use super::{Config, Peer, Server, Shared, Store, client_auth::part, config::SigningAlgorithm};
use crate::{
    app::Misconfigured,
    audit::AuthorityRecord,
    identity::{
        AgentId, Bundle, Certified, Intermediates, Purpose, Root, SpiffeId,
        wire::{
            self, CertificateAnswer, CertificateRequest, JoinRequest, RenewRequest, TokenAnswer,
            TokenRequest,
        },
    },
};
use cluster::Cluster;
use kubernetes::Kubernetes;
use limits::Limits;
use placement::Placement;
use problem::{Problem, read};

/// Requests to join of one address in a minute.
const JOINS_PER_MINUTE: u32 = 60;
/// Audiences of one JWT-SVID, and the longest of them in bytes.
const MAX_AUDIENCES: usize = 8;
const MAX_AUDIENCE: usize = 1024;

pub struct Ca {
    intermediates: Intermediates,
    /// The root alone: what agents' certificates end at. Further roots of the bundle are
    /// other authorities', who have no agents here.
    own: Bundle,
    placement: Placement,
    kubernetes: Option<Kubernetes>,
    cluster: Option<Cluster>,
    agents: Limits<String>,
    joins: Limits<IpAddr>,
    /// What the last bundle was, and its number.
    sequence: Mutex<Option<(String, u64)>>,
}

impl Ca {
    /// Opens what the configuration names. Needs a runtime: keys are fetched by tasks.
    pub async fn open(config: &Config, root: &Root, store: &Store) -> Result<Self, Misconfigured> {
        let wrong = |e: &dyn std::fmt::Display| Misconfigured(e.to_string());
        tokens::make_tables(store).await.map_err(|e| wrong(&e))?;
        bundle::further(config).map_err(|e| wrong(&e))?;
        if config.keys.algorithm == SigningAlgorithm::EdDsa {
            tracing::warn!(
                "JWT-SVIDs are signed with EdDSA, which SPIFFE's standard does not name"
            );
        }
        let own = vec![root.certificate().clone()];
        Ok(Self {
            intermediates: Intermediates::new(
                format!("Postern authority of {}", config.trust_domain),
                config.certificates.intermediate_lifetime.0,
            ),
            own: Bundle::new(own, None).map_err(|e| wrong(&e))?,
            placement: Placement::open(config.nodes.manifests.clone()).map_err(|e| wrong(&e))?,
            kubernetes: Kubernetes::open(config).map_err(|e| wrong(&e))?,
            cluster: Cluster::open(config).await.map_err(|e| wrong(&e))?,
            agents: Limits::new(config.certificates.per_minute.0),
            joins: Limits::new(JOINS_PER_MINUTE),
            sequence: Mutex::default(),
        })
    }
}

pub fn routes() -> Router<Shared> {
    Router::new()
        .route("/v1/agents/join", post(join))
        .route("/v1/agents/renew", post(renew))
        .route("/v1/certificates", post(certificate))
        .route("/v1/jwt-svids", post(jwt_svid))
        .route("/v1/bundle", get(spiffe_bundle))
        .route("/v1/roots.pem", get(roots_pem))
}

/// Keeps the table of what runs where, or tells the cluster the roots, until the process
/// ends.
pub async fn watch(server: Shared) {
    match &server.ca.cluster {
        Some(cluster) => cluster.publish(&server).await,
        None => server.ca.placement.watch().await,
    }
}

async fn join(
    State(server): State<Shared>,
    Extension(peer): Extension<Peer>,
    request: Request,
) -> Response {
    let mut record = begun("join", &peer);
    let answer = joined(&server, &peer, request, &mut record).await;
    ended(&server, record, answer)
}

async fn joined(
    server: &Server,
    peer: &Peer,
    request: Request,
    record: &mut AuthorityRecord,
) -> Result<CertificateAnswer, Problem> {
    let now = server.clock.seconds();
    if !server.ca.joins.take(peer.address.ip(), now) {
        return Err(Problem::slow_down("too many requests to join"));
    }
    let proof = problem::bearer(&request)?;
    let JoinRequest { node, csr } = read(request).await?;
    let id = AgentId::new(server.config.trust_domain.clone(), &node)
        .ok_or_else(|| Problem::invalid("`node` is no name that can stand in a SPIFFE ID"))?;
    record.client = Some(id.to_string());
    // What is wrong with the request is found before its proof is used up.
    let key = csr::public_key(&csr)?;
    if proof.starts_with(tokens::PREFIX) {
        record.authentication = Some("join_token");
        let token = tokens::take(&server.store, &proof, &node, now).await?;
        record.reason = format!("join token {token}");
    } else {
        record.authentication = Some("kubernetes");
        match (&server.ca.cluster, &server.ca.kubernetes) {
            (Some(cluster), _) => cluster.verify(&proof, &node).await?,
            (None, Some(keys)) => keys.verify(&proof, &node, server.clock.now()).await?,
            (None, None) => return Err(Problem::no_proof()),
        }
        // What the cluster signed before does not undo a revocation.
        let made = part(&proof, 1).and_then(|claims| claims.get("iat")?.as_u64());
        if let Some(at) = tokens::revoked(&server.store, &node).await?
            && made.is_none_or(|made| made <= at)
        {
            let why = "the node was revoked after the token was made";
            return Err(Problem::proof(why));
        }
    }
    agent_certificate(server, &id, &key)
}

async fn renew(
    State(server): State<Shared>,
    Extension(peer): Extension<Peer>,
    request: Request,
) -> Response {
    let mut record = begun("certificate", &peer);
    let answer = renewed(&server, &peer, request, &mut record).await;
    ended(&server, record, answer)
}

async fn renewed(
    server: &Server,
    peer: &Peer,
    request: Request,
    record: &mut AuthorityRecord,
) -> Result<CertificateAnswer, Problem> {
    let agent = peer::agent(server, peer, record).await?;
    let RenewRequest { csr } = read(request).await?;
    let key = csr::public_key(&csr)?;
    if peer::shows_key(peer, &key) {
        return Err(Problem::invalid("a renewal is for a new key"));
    }
    record.subject = Some(agent.to_string());
    agent_certificate(server, &agent, &key)
}

fn agent_certificate(
    server: &Server,
    id: &AgentId,
    key: &csr::Key,
) -> Result<CertificateAnswer, Problem> {
    let lifetime = server.config.certificates.agent_lifetime.0;
    certified(server, &id.to_string(), key, Purpose::Agent, lifetime)
}

async fn certificate(
    State(server): State<Shared>,
    Extension(peer): Extension<Peer>,
    request: Request,
) -> Response {
    let mut record = begun("certificate", &peer);
    let answer = signed(&server, &peer, request, &mut record).await;
    ended(&server, record, answer)
}

async fn signed(
    server: &Server,
    peer: &Peer,
    request: Request,
    record: &mut AuthorityRecord,
) -> Result<CertificateAnswer, Problem> {
    let agent = peer::agent(server, peer, record).await?;
    let CertificateRequest { csr, identity } = read(request).await?;
    let id = permitted(server, &agent, &identity, record).await?;
    let key = csr::public_key(&csr)?;
    let lifetime = server.config.certificates.leaf_lifetime.0;
    certified(server, &id.to_string(), &key, Purpose::Workload, lifetime)
}

async fn jwt_svid(
    State(server): State<Shared>,
    Extension(peer): Extension<Peer>,
    request: Request,
) -> Response {
    let mut record = begun("token", &peer);
    let answer = token(&server, &peer, request, &mut record).await;
    ended(&server, record, answer)
}

/// A JWT-SVID (SPIFFE JWT-SVID 3), with `iss` besides, by which others find its keys.
async fn token(
    server: &Server,
    peer: &Peer,
    request: Request,
    record: &mut AuthorityRecord,
) -> Result<TokenAnswer, Problem> {
    let agent = peer::agent(server, peer, record).await?;
    let TokenRequest { identity, audience } = read(request).await?;
    let id = permitted(server, &agent, &identity, record).await?;
    let fits = |audience: &String| !audience.is_empty() && audience.len() <= MAX_AUDIENCE;
    if audience.is_empty() || audience.len() > MAX_AUDIENCES || !audience.iter().all(fits) {
        let why = "`audience` has one to eight strings, of 1024 bytes at most each";
        return Err(Problem::invalid(why));
    }
    let mut jti = [0; 16];
    aws_lc_rs::rand::fill(&mut jti).map_err(|_| Problem::failed("no randomness"))?;
    let jti = URL_SAFE_NO_PAD.encode(jti);
    let now = server.clock.seconds();
    let expires = now + server.config.certificates.jwt_svid.0.as_secs();
    let claims = json!({
        "iss": server.config.issuer,
        "sub": id.to_string(),
        "aud": audience,
        "iat": now,
        "exp": expires,
        "jti": jti,
    });
    let token = server.keys.sign("JWT", &claims);
    let token = token.map_err(|e| Problem::failed(e.to_string()))?;
    record.audience = audience;
    record.jti = Some(tokens::hex(&tokens::digest(jti.as_bytes())[..16]));
    Ok(TokenAnswer { token, expires })
}

/// The identity, if one of its pods runs on the agent's node.
async fn permitted(
    server: &Server,
    agent: &AgentId,
    identity: &str,
    record: &mut AuthorityRecord,
) -> Result<SpiffeId, Problem> {
    let id: SpiffeId = identity
        .parse()
        .map_err(|_form| Problem::invalid("`identity` is no workload's SPIFFE ID"))?;
    record.subject = Some(id.to_string());
    let ours = id.trust_domain == server.config.trust_domain;
    let runs = match &server.ca.cluster {
        _ if !ours => false,
        Some(cluster) => cluster.runs(agent.node(), &id).await?,
        None => server.ca.placement.runs(agent.node(), &id),
    };
    if !runs {
        let why = format!("no pod of {id} runs on node {}", agent.node());
        return Err(Problem::denied(why));
    }
    Ok(id)
}

fn certified(
    server: &Server,
    uri: &str,
    key: &csr::Key,
    purpose: Purpose,
    lifetime: Duration,
) -> Result<CertificateAnswer, Problem> {
    let signed = server.ca.intermediates.certify(
        &server.root,
        uri,
        key.info(),
        purpose,
        lifetime,
        server.clock.now(),
    );
    let Certified {
        chain, not_after, ..
    } = signed.map_err(|e| Problem::failed(e.to_string()))?;
    let roots = bundle::roots(server).map_err(|e| Problem::failed(e.to_string()))?;
    let since = not_after.duration_since(std::time::UNIX_EPOCH);
    Ok(CertificateAnswer {
        chain: wire::encode(&chain),
        roots: wire::encode(&roots),
        expires: since.unwrap_or_default().as_secs(),
    })
}

async fn spiffe_bundle(State(server): State<Shared>) -> Response {
    match bundle::document(&server).await {
        Ok(document) => Json(document).into_response(),
        Err(problem) => problem.into_response(),
    }
}

async fn roots_pem(State(server): State<Shared>) -> Response {
    const PEM: &str = "application/pem-certificate-chain";
    match bundle::roots(&server) {
        Ok(roots) => ([(header::CONTENT_TYPE, PEM)], crate::identity::pem(&roots)).into_response(),
        Err(error) => Problem::failed(error.to_string()).into_response(),
    }
}

fn begun(event: &'static str, peer: &Peer) -> AuthorityRecord {
    AuthorityRecord {
        event,
        address: Some(peer.address.ip()),
        ..AuthorityRecord::default()
    }
}

/// Writes the record, then answers.
fn ended(
    server: &Server,
    mut record: AuthorityRecord,
    answer: Result<impl serde::Serialize, Problem>,
) -> Response {
    match answer {
        Ok(answer) => {
            server.told(record);
            let headers = [(header::CACHE_CONTROL, "no-store")];
            (StatusCode::OK, headers, Json(answer)).into_response()
        }
        Err(problem) => {
            record.event = "refusal";
            record.error = Some(problem.code);
            record.reason = problem.reason.clone();
            server.told(record);
            problem.into_response()
        }
    }
}
