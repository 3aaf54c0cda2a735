//! OAuth 2.0 as the agent speaks it to authorization servers: how it proves who
//! asks (`client_auth`). The server itself is `authority`.

mod client_auth;

pub use client_auth::{
    ClientAuthentication, ClientAuthenticationError, Prepared, Prover, private_file,
};
