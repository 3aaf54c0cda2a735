//! Who a workload is: SPIFFE IDs, the certificates that prove them, and the
//! rustls configurations built on both.
//!
//! `spiffe` is the name, `authority` signs certificates for the node's service
//! accounts, `tls` verifies peers and hands certificates to rustls.

mod authority;
mod jwt;
mod spiffe;
mod tls;

pub use authority::{Authority, IdentityError, Root, Svid};
pub use jwt::{JwtIssuer, JwtSvid};
pub use spiffe::{SpiffeError, SpiffeId, TrustDomain};
pub use tls::{Bundle, Credentials, Session, fingerprint, peer_identity, valid_for};
