//! Who a workload is: SPIFFE IDs, the certificates that prove them, and the
//! rustls configurations built on both.
//!
//! `spiffe` is a workload's name and `agent` an agent's; `authority` signs certificates
//! for the node's service accounts by a root that it holds (`intermediate`), `remote`
//! gets them from `postern authority`, `spire` from the SPIRE agent and `istio` from
//! Istio's CA; `issuer` is any of these, and `issued` checks what they hand out. `jwt`
//! makes JWT-SVIDs; `bundle` and `tls` verify peers and hand certificates to rustls.

mod agent;
mod authority;
mod backoff;
mod bundle;
#[cfg(test)]
mod double;
mod grpc;
mod intermediate;
mod issued;
mod issuer;
mod istio;
mod jwt;
mod remote;
mod spiffe;
mod spire;
mod tls;
mod token_file;
mod tokens;
pub mod wire;

pub use agent::AgentId;

pub use authority::{Authority, IdentityError, Root, Svid};
pub use backoff::Backoff;
pub use bundle::{Bundle, read_certificates};
pub(crate) use intermediate::BACKDATE;
pub use intermediate::{Certified, Intermediates, Purpose};
pub use issuer::Issuer;
pub use jwt::{JwtIssuer, JwtSvid};
pub use remote::Remote;
pub(crate) use remote::pem;
pub use spiffe::{SpiffeError, SpiffeId, TrustDomain};
pub use tls::{Credentials, FAST, Session, fingerprint, hex, peer_identity, valid_for};
