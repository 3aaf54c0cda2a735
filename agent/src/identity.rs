//! Who a workload is: SPIFFE IDs, the certificates that prove them, and the
//! rustls configurations built on both.
//!
//! `spiffe` is a workload's name and `agent` an agent's; `authority` signs certificates
//! for the node's service accounts by a root that it holds (`intermediate`), `remote`
//! gets them from `postern authority`; `jwt` makes JWT-SVIDs; `tls` verifies peers and
//! hands certificates to rustls.

mod agent;
mod authority;
mod backoff;
mod intermediate;
mod jwt;
mod remote;
mod spiffe;
mod tls;
pub mod wire;

pub use agent::AgentId;

pub use authority::{Authority, IdentityError, Root, Svid};
pub use backoff::Backoff;
pub(crate) use intermediate::BACKDATE;
pub use intermediate::{Certified, Intermediates, Purpose};
pub use jwt::{JwtIssuer, JwtSvid};
pub use remote::Remote;
pub(crate) use remote::pem;
pub use spiffe::{SpiffeError, SpiffeId, TrustDomain};
pub use tls::{
    Bundle, Credentials, Session, fingerprint, hex, peer_identity, read_certificates, valid_for,
};
