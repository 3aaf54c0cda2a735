//! Whose certificate an agent shows. TLS has proven that it has the key; the chain is
//! verified here, with the server's clock.

use webpki::KeyUsage;

use super::{csr::Key, problem::Problem, tokens};
use crate::{
    audit::AuthorityRecord,
    authority::{Peer, Server},
    identity::{AgentId, BACKDATE},
};

/// The agent, if it is one of this trust domain, not revoked, and not too eager.
pub async fn agent(
    server: &Server,
    peer: &Peer,
    record: &mut AuthorityRecord,
) -> Result<AgentId, Problem> {
    record.authentication = Some("certificate");
    let leaf = peer
        .certificates
        .first()
        .ok_or_else(|| Problem::unknown("an agent shows its certificate"))?;
    server
        .ca
        .own
        .verify(
            &peer.certificates,
            KeyUsage::client_auth(),
            server.clock.now(),
        )
        .map_err(|e| Problem::unknown(format!("the certificate is refused: {e}")))?;
    let agent = AgentId::of(leaf)
        .filter(|agent| *agent.trust_domain() == server.config.trust_domain)
        .ok_or_else(|| Problem::unknown("the certificate is no agent's of this trust domain"))?;
    record.client = Some(agent.to_string());
    let now = server.clock.seconds();
    if !server.ca.agents.take(agent.node().to_owned(), now) {
        return Err(Problem::slow_down("too many requests of this agent"));
    }
    if let Some(at) = tokens::revoked(&server.store, agent.node()).await?
        && made(leaf).is_none_or(|made| made <= at)
    {
        return Err(Problem::unknown("the node's certificates were revoked"));
    }
    Ok(agent)
}

/// Whether the certificate that is shown is for this key.
pub fn shows_key(peer: &Peer, key: &Key) -> bool {
    peer.certificates.first().is_some_and(|leaf| {
        let parsed = x509_parser::parse_x509_certificate(leaf);
        parsed.is_ok_and(|(_rest, leaf)| leaf.public_key().raw == key.der())
    })
}

/// When it was signed, seconds since 1970.
fn made(leaf: &[u8]) -> Option<u64> {
    let (_rest, leaf) = x509_parser::parse_x509_certificate(leaf).ok()?;
    let from = leaf.validity().not_before.timestamp();
    Some(u64::try_from(from).ok()? + BACKDATE.as_secs())
}
