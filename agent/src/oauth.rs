//! OAuth 2.0 as the agent speaks it to authorization servers: how it proves who
//! asks (`client_auth`), which token is wanted (`wanted`), where it is asked for
//! (`endpoint`), how (`grant`), and what is kept of it (`client`). The server itself
//! is `authority`.

mod client;
mod client_auth;
mod endpoint;
mod grant;
mod wanted;

pub use client::{Call, Got, Issued, Report, Subject, Svids, TokenClient, Witness};
pub use client_auth::{
    ClientAuthentication, ClientAuthenticationError, Prepared, Prover, private_file,
};
pub use endpoint::EndpointError;
pub use grant::{GrantError, is_token};
pub use wanted::{Grant, Server, SubjectKind, Wanted, is_secret_safe};
