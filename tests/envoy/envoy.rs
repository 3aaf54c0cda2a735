//! Envoy as a process: one listener for each set of policies, an application
//! behind them that says what it got.

use std::{
    collections::BTreeMap,
    env, fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use postern_tests::{Running, eventually};
use serde_json::{Value, json};

use crate::{
    cases::Set,
    client::{Pki, exchange},
    translate::{self, typed},
};

const HTTP: &str = "envoy.extensions.filters.network.http_connection_manager.v3";
const LISTENER: &str = "envoy.extensions.filters.listener";
const TLS: &str = "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext";

pub struct Envoy {
    _process: Running,
    _directory: tempfile::TempDir,
    listeners: BTreeMap<String, SocketAddr>,
}

impl Envoy {
    /// Starts it and waits until it serves every set.
    pub fn start(sets: &[Set], pki: &Pki) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let config = directory.path().join("envoy.json");
        let admin = directory.path().join("admin");
        let listeners = sets
            .iter()
            .map(|set| listener(set, pki).with_context(|| format!("set {}", set.name)));
        let listeners = listeners.collect::<Result<Vec<_>>>()?;
        let bootstrap = bootstrap(listeners, application()?);
        fs::write(&config, bootstrap.to_string())?;

        let mut command = Command::new(program()?);
        command.arg("--config-path").arg(&config);
        command.arg("--admin-address-path").arg(&admin);
        command.args(["--disable-hot-restart", "--concurrency", "1"]);
        command.args(["--log-level", "error"]);
        let with_us = || {
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::SIGKILL)?;
            Ok(())
        };
        // SAFETY: the closure makes a system call only.
        unsafe { command.pre_exec(with_us) };
        let mut process = Running::start(&mut command, directory.path().join("log"))?;

        let mut found = BTreeMap::new();
        let mut ended = false;
        let serving = eventually("Envoy serves", Duration::from_secs(30), || {
            found = serving(&admin).unwrap_or_default();
            ended = matches!(process.child.try_wait(), Ok(Some(_)));
            found.len() == sets.len() || ended
        });
        if ended || serving.is_err() {
            bail!("Envoy does not serve: {}", process.output());
        }
        Ok(Self {
            _process: process,
            _directory: directory,
            listeners: found,
        })
    }

    /// Where the listener of a set is.
    pub fn address(&self, set: &Set) -> Result<SocketAddr> {
        let address = self.listeners.get(&set.name);
        address
            .copied()
            .with_context(|| format!("no listener {}", set.name))
    }
}

/// What `cargo xtask setup` put into `target/`, or another one that is named.
fn program() -> Result<PathBuf> {
    let path = env::var_os("POSTERN_ENVOY").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools/envoy/envoy/_bin/envoy"),
        PathBuf::from,
    );
    if !path.is_file() {
        bail!(
            "there is no Envoy at {}: run `cargo xtask setup --tier lab`",
            path.display()
        );
    }
    Ok(path)
}

/// The listeners by name, once all of them are bound.
fn serving(admin: &Path) -> Result<BTreeMap<String, SocketAddr>> {
    let admin: SocketAddr = fs::read_to_string(admin)?.trim().parse()?;
    let ask = |path: &str| {
        let request = format!("GET {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n");
        exchange(&mut TcpStream::connect(admin)?, request.as_bytes())
    };
    if ask("/ready")?.0 != 200 {
        bail!("not ready");
    }
    let listeners: Value = serde_json::from_str(&ask("/listeners?format=json")?.1)?;
    let mut found = BTreeMap::new();
    for listener in listeners["listener_statuses"]
        .as_array()
        .unwrap_or(&Vec::new())
    {
        let at = &listener["local_address"]["socket_address"];
        let port = at["port_value"].as_u64().context("a port")?;
        let name = listener["name"].as_str().context("a name")?;
        found.insert(name.to_owned(), format!("127.0.0.1:{port}").parse()?);
    }
    Ok(found)
}

fn bootstrap(listeners: Vec<Value>, application: SocketAddr) -> Value {
    json!({
        "admin": {"address": address(0)},
        // As Istio runs it: a fragment is cut off instead of refused.
        "layered_runtime": {"layers": [{"name": "static", "static_layer": {
            "envoy.reloadable_features.http_reject_path_with_fragment": false,
            "envoy.features.enable_all_deprecated_features": true,
        }}]},
        "static_resources": {
            "listeners": listeners,
            "clusters": [{
                "name": "application",
                "load_assignment": {
                    "cluster_name": "application",
                    "endpoints": [{"lb_endpoints": [
                        {"endpoint": {"address": address(application.port())}},
                    ]}],
                },
            }],
        },
    })
}

fn address(port: u16) -> Value {
    json!({"socket_address": {"address": "127.0.0.1", "port_value": port}})
}

/// Plaintext and mutual TLS on one port. Who connects to whom is told by the PROXY
/// protocol, so that a case can come from anywhere.
fn listener(set: &Set, pki: &Pki) -> Result<Value> {
    let chains = [
        json!({"filter_chain_match": {"transport_protocol": "raw_buffer"}}),
        json!({
            "filter_chain_match": {"transport_protocol": "tls"},
            "transport_socket": typed("envoy.transport_sockets.tls", TLS, json!({
                "require_client_certificate": true,
                "common_tls_context": {
                    "tls_certificates": [{
                        "certificate_chain": {"inline_string": pki.server.certificate},
                        "private_key": {"inline_string": pki.server.key},
                    }],
                    "validation_context": {"trusted_ca": {"inline_string": pki.authority}},
                },
            })),
        }),
    ];
    let manager = manager(set)?;
    let chains = chains.map(|mut chain| {
        chain["filters"] = json!([manager]);
        chain
    });
    let inspect = |name: &str, kind: &str| {
        let kind = format!("{LISTENER}.{kind}");
        typed(&format!("envoy.filters.listener.{name}"), &kind, json!({}))
    };
    Ok(json!({
        "name": set.name,
        "address": address(0),
        "listener_filters": [
            inspect("proxy_protocol", "proxy_protocol.v3.ProxyProtocol"),
            inspect("tls_inspector", "tls_inspector.v3.TlsInspector"),
        ],
        "filter_chains": chains,
    }))
}

fn manager(set: &Set) -> Result<Value> {
    let (normalize, merge, escaped) = match set.normalization.as_str() {
        "NONE" => (false, false, "KEEP_UNCHANGED"),
        "BASE" => (true, false, "KEEP_UNCHANGED"),
        "MERGE_SLASHES" => (true, true, "KEEP_UNCHANGED"),
        "DECODE_AND_MERGE_SLASHES" => (true, true, "UNESCAPE_AND_FORWARD"),
        unknown => bail!("there is no normalization {unknown}"),
    };
    let config = json!({
        "stat_prefix": set.name,
        "normalize_path": normalize,
        "merge_slashes": merge,
        "path_with_escaped_slashes_action": escaped,
        "use_remote_address": true,
        "xff_num_trusted_hops": set.trusted_proxies,
        "skip_xff_append": true,
        // It would wait for the client to close first.
        "delayed_close_timeout": "0s",
        "generate_request_id": false,
        "http_protocol_options": {"allow_custom_methods": true},
        "http_filters": translate::filters(set)?,
        "route_config": {"virtual_hosts": [{
            "name": "all",
            "domains": ["*"],
            "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "application"}}],
        }]},
    });
    let kind = format!("{HTTP}.HttpConnectionManager");
    Ok(typed(
        "envoy.filters.network.http_connection_manager",
        &kind,
        config,
    ))
}

/// An application that answers every request with its headers.
fn application() -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let at = listener.local_addr()?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A connection that fails is one that Envoy has closed.
            thread::spawn(move || answer(stream));
        }
    });
    Ok(at)
}

fn answer(stream: TcpStream) -> std::io::Result<()> {
    let mut out = stream.try_clone()?;
    let mut lines = BufReader::new(stream).lines();
    while let Some(_request) = lines.next().transpose()? {
        let mut headers: BTreeMap<String, String> = BTreeMap::new();
        for line in &mut lines {
            let line = line?;
            let Some((name, value)) = line.split_once(':') else {
                break;
            };
            let known = headers.entry(name.to_lowercase()).or_default();
            if !known.is_empty() {
                known.push_str(if name == "cookie" { "; " } else { "," });
            }
            known.push_str(value.trim());
        }
        let body = json!(headers).to_string();
        let length = body.len();
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}");
        out.write_all(answer.as_bytes())?;
    }
    Ok(())
}
