//! `postern authority client ...` and `keys ...`: work on the store and the keys beside a
//! server that runs, which sees it by itself.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};

use super::{
    Clock, Config, Keys, Store,
    client_auth::hash_secret,
    clients::{Authentication, Client, Grant, TokenFormat},
    issue,
};
use crate::app::Misconfigured;

#[derive(Subcommand)]
pub enum ClientCommand {
    /// Register a client. A secret is printed once, and only its hash is kept.
    Add(Box<NewClient>),
    /// List clients: those of the configuration and those of the store.
    List,
    /// Remove a client from the store; its refresh tokens are void.
    Remove { id: String },
}

#[derive(Subcommand)]
pub enum KeysCommand {
    /// Make the next signing key now. It signs after `keys.overlap`.
    Rotate {
        /// Sign with it at once and withdraw all others: their tokens are void. For keys
        /// that others may have.
        #[arg(long)]
        now: bool,
    },
}

#[derive(Args)]
pub struct NewClient {
    /// client_id
    id: String,
    /// What people read on the consent page.
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    proof: NewProof,
    /// authorization_code, refresh_token, client_credentials or token_exchange. May be
    /// repeated.
    #[arg(long = "grant", required = true, value_parser = grant)]
    grants: Vec<Grant>,
    #[arg(long = "redirect-uri", value_name = "URI")]
    redirect_uris: Vec<String>,
    #[arg(long = "scope")]
    scopes: Vec<String>,
    #[arg(long = "audience")]
    audiences: Vec<String>,
    /// Audiences of tokens that it may exchange and introspect.
    #[arg(long = "subject-audience", value_name = "AUDIENCE")]
    subject_audiences: Vec<String>,
    /// People are not asked for their consent.
    #[arg(long)]
    trusted: bool,
    /// Bind access tokens to the client's certificate.
    #[arg(long)]
    certificate_bound: bool,
    /// Issue only tokens that are bound by DPoP.
    #[arg(long)]
    dpop_bound: bool,
    /// Issue opaque access tokens.
    #[arg(long)]
    opaque: bool,
}

/// How it proves who it is. None of them: a secret is made.
#[derive(Args)]
#[group(multiple = false)]
struct NewProof {
    /// A public client.
    #[arg(long)]
    public: bool,
    /// A workload of the trust domain, by its certificate or JWT-SVID.
    #[arg(long, value_name = "ID")]
    spiffe_id: Option<String>,
    /// private_key_jwt with the keys of a JWK set.
    #[arg(long, value_name = "FILE")]
    jwks_file: Option<PathBuf>,
    /// self_signed_tls_client_auth with the certificates of a PEM file.
    #[arg(long, value_name = "FILE")]
    certificate_file: Option<PathBuf>,
    /// tls_client_auth with a certificate that has this DNS name.
    #[arg(long, value_name = "NAME")]
    san_dns: Option<String>,
    /// tls_client_auth with a certificate that has this URI.
    #[arg(long, value_name = "URI")]
    san_uri: Option<String>,
}

fn grant(text: &str) -> Result<Grant, String> {
    serde_json::from_value(text.into()).map_err(|_| {
        "authorization_code, refresh_token, client_credentials or token_exchange".into()
    })
}

/// Runs a command on clients; what is printed goes to standard output.
pub async fn clients(config: Config, command: ClientCommand) -> Result<()> {
    config.check().map_err(Misconfigured)?;
    let store = Store::open(&config).await;
    let store = store.map_err(|e| Misconfigured(e.to_string()))?;
    match command {
        ClientCommand::Add(new) => {
            let (client, secret) = new.client()?;
            client
                .check(config.keys.overlap.0)
                .map_err(anyhow::Error::msg)?;
            let listed = config.clients.iter().any(|known| known.id == client.id);
            let taken = config.users.iter().any(|user| user.id == client.id)
                || store.user(&client.id).await?.is_some();
            if listed || taken || !store.add_client(&client).await? {
                bail!("the id `{}` is taken", client.id);
            }
            println!("client_id      {}", client.id);
            if let Some(secret) = secret {
                println!("client_secret  {secret}");
                eprintln!("The secret is not shown again.");
            }
        }
        ClientCommand::List => {
            let stored = store.clients().await?;
            let all = config
                .clients
                .iter()
                .map(|client| ("configuration", client));
            for (source, client) in all.chain(stored.iter().map(|client| ("store", client))) {
                let grants = serde_json::to_value(&client.grants)?;
                let grants: Vec<_> = grants.as_array().into_iter().flatten().collect();
                let grants: Vec<_> = grants.iter().filter_map(|grant| grant.as_str()).collect();
                println!(
                    "{:<32} {:<13} {:<14} {}",
                    client.id,
                    source,
                    client.authentication.name(),
                    grants.join(",")
                );
            }
        }
        ClientCommand::Remove { id } => {
            if !store.remove_client(&id).await? {
                bail!("the store has no client `{id}`");
            }
        }
    }
    Ok(())
}

/// Runs a command on signing keys.
pub fn keys(config: &Config, command: &KeysCommand) -> Result<()> {
    config.check().map_err(Misconfigured)?;
    let KeysCommand::Rotate { now } = command;
    let keys = Keys::open(config, Clock::system()).map_err(|e| Misconfigured(e.to_string()))?;
    keys.rotate(*now).context("signing keys")
}

impl NewClient {
    /// The client, and its secret if it has one.
    fn client(self) -> Result<(Client, Option<String>)> {
        let proof = self.proof;
        let mut secret = None;
        let authentication = if proof.public {
            Authentication::None {}
        } else if let Some(spiffe_id) = proof.spiffe_id {
            Authentication::Workload { spiffe_id }
        } else if let Some(jwks_file) = proof.jwks_file {
            Authentication::PrivateKeyJwt { jwks_file }
        } else if let Some(certificate_file) = proof.certificate_file {
            Authentication::SelfSignedTls { certificate_file }
        } else if proof.san_dns.is_some() || proof.san_uri.is_some() {
            Authentication::TlsClientAuth {
                san_dns: proof.san_dns,
                san_uri: proof.san_uri,
            }
        } else {
            let made = issue::random()?;
            let secret_hash = hash_secret(&made).map_err(|e| anyhow::anyhow!("{e}"))?;
            secret = Some(made);
            Authentication::ClientSecret { secret_hash }
        };
        let client = Client {
            id: self.id,
            name: self.name,
            authentication,
            redirect_uris: self.redirect_uris,
            grants: self.grants,
            scopes: self.scopes,
            audiences: self.audiences,
            subject_audiences: self.subject_audiences,
            trusted: self.trusted,
            certificate_bound: self.certificate_bound,
            dpop_bound: self.dpop_bound,
            token_format: match self.opaque {
                true => TokenFormat::Opaque,
                false => TokenFormat::Jwt,
            },
            access_lifetime: None,
        };
        Ok((client, secret))
    }
}
