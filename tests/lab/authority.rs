//! The authorization server against a client library that others wrote: the real binary
//! over TLS, asked by Authlib in every way but a browser's.

use std::{
    net::{Ipv4Addr, TcpListener},
    path::Path,
    process::Command,
};

use anyhow::{Context as _, Result};
use postern_tests::{Running, audit_text, binary, output, text};

const PYTHON: &str = "/usr/bin/python3";
/// As registered by the configuration: the others are added by command.
const CLIENTS: &str = "
- id: keyed
  grants: [client_credentials]
  scopes: [read]
  audiences: [https://api.example]
  authentication: {privateKeyJwt: {jwksFile: DIR/client.jwks}}
- id: pinned
  grants: [client_credentials]
  audiences: [https://api.example]
  certificateBound: true
  authentication: {selfSignedTls: {certificateFile: DIR/pinned.pem}}
- id: named
  grants: [client_credentials]
  audiences: [https://api.example]
  authentication: {tlsClientAuth: {sanDns: client.example}}
";

/// Runs `postern authority ...` to its end; what it printed.
fn postern(config: &Path, arguments: &[&str]) -> Result<String> {
    let (group, rest) = arguments.split_first().context("a command")?;
    let mut command = Command::new(binary("postern")?);
    command.args(["authority", group, "--config"]).arg(config);
    Ok(text(&output(command.args(rest))?.stdout))
}

fn add_client(config: &Path, arguments: &[&str]) -> Result<String> {
    let all = [&["client", "add"], arguments].concat();
    let printed = postern(config, &all)?;
    let secret = printed
        .lines()
        .find_map(|line| line.strip_prefix("client_secret  "));
    Ok(secret.context("a secret")?.to_owned())
}

#[test]
fn authlib_gets_introspects_exchanges_and_revokes_tokens() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path();
    let at = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    let config = path.join("authority.yaml");
    let here = path.display();
    let clients = CLIENTS.replace("DIR", &here.to_string());
    std::fs::write(
        &config,
        format!(
            "issuer: https://{at}\nlisten: {at}\nstate: {here}/state\n\
             audit: {{directory: {here}/audit}}\nclients:{clients}"
        ),
    )?;
    let state = path.join("state");
    std::fs::create_dir(&state)?;
    let service = add_client(
        &config,
        &[
            "service",
            "--grant=client_credentials",
            "--scope=read",
            "--scope=write",
            "--audience=https://api.example",
        ],
    )?;
    let api = add_client(
        &config,
        &[
            "api",
            "--grant=token_exchange",
            "--scope=read",
            "--audience=https://behind.example",
            "--subject-audience=https://api.example",
        ],
    )?;
    let mut command = Command::new(binary("postern")?);
    command.args(["authority", "run", "--config"]).arg(&config);
    let server = Running::start(&mut command, path.join("authority.log"))?;
    server.says("ready")?;
    let script = path.join("clients.py");
    std::fs::write(&script, include_str!("authority/clients.py"))?;
    let mut python = Command::new(PYTHON);
    python.arg(&script).arg(path).arg(format!("https://{at}"));
    python
        .env("SERVICE_SECRET", &service)
        .env("API_SECRET", &api);
    let ran = output(&mut python).with_context(|| server.output())?;
    assert!(text(&ran.stdout).contains("all as it should be"));
    let listed = postern(&config, &["client", "list"])?;
    for line in ["keyed ", "service "] {
        assert!(listed.lines().any(|l| l.starts_with(line)), "{listed}");
    }
    assert!(!listed.contains("argon2"), "{listed}");
    postern(&config, &["client", "remove", "service"])?;
    postern(&config, &["keys", "rotate"])?;
    // Neither secret is anywhere but with its client.
    let audit = audit_text(&path.join("audit"))?.into_bytes();
    for file in ["authority.log", "audit", "state/authority.db"] {
        let content = match file {
            "audit" => audit.clone(),
            _ => std::fs::read(path.join(file))?,
        };
        for secret in [&service, &api] {
            let found = content
                .windows(secret.len())
                .any(|w| w == secret.as_bytes());
            assert!(!found, "a secret is in {file}");
        }
    }
    Ok(())
}
