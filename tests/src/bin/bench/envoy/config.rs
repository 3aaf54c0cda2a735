//! What each Envoy is configured with. Limits are lifted that a test of load would run
//! into; TLS is 1.3 with X25519, and each side wants the other's SPIFFE ID.

use serde_json::{Value, json};

use super::{
    Role,
    pki::{Identity, Pki},
};
use crate::tokens::ISSUER;

const FILTER: &str = "envoy.extensions.filters";
const TLS: &str = "envoy.extensions.transport_sockets.tls.v3";
const OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
/// Where CONNECT requests go, as agents have it.
const HBONE: u16 = 15008;
/// Verified tokens that the one that remembers them has room for.
const REMEMBERED: u32 = 10_000;

/// What a request is held to on its way to a port.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Tokens {
    Unread,
    Verified,
    /// And remembered.
    Cached,
}

/// A port of the server's, as the client's Envoy has it.
#[derive(Clone, Copy)]
pub struct Port {
    pub server: u16,
    pub local: u16,
    pub tokens: Tokens,
}

/// The client's Envoy: from a port of the loopback to the server's Envoy.
pub fn client(role: Role, ports: &[Port], pki: &Pki, server: &str) -> Value {
    let tls = tls(
        "Upstream",
        &pki.client,
        &pki.server,
        pki,
        alpn(role),
        json!({}),
    );
    let upstream = |port: &Port| {
        let to = match role {
            Role::Hbone => HBONE,
            Role::Tcp | Role::Http => port.local,
        };
        let mut cluster = cluster(&name(port), server, to);
        cluster["transport_socket"] = tls.clone();
        if role == Role::Hbone {
            cluster["typed_extension_protocol_options"] = json!({OPTIONS: {
                "@type": format!("type.googleapis.com/{OPTIONS}"),
                "explicit_http_config": {"http2_protocol_options": {"allow_connect": true}},
            }});
        }
        cluster
    };
    let listen = |port: &Port| {
        let filter = match role {
            Role::Tcp => tcp_proxy(json!({"cluster": name(port)})),
            Role::Hbone => tcp_proxy(json!({
                "cluster": name(port),
                "tunneling_config": {"hostname": format!("{server}:{}", port.server)},
            })),
            Role::Http => manager(&[], vec![host(json!(["*"]), forward(port))]),
        };
        listener("127.0.0.1", port.local, json!({"filters": [filter]}))
    };
    bootstrap(
        ports.iter().map(listen).collect(),
        ports.iter().map(upstream).collect(),
    )
}

/// The server's Envoy: from mutual TLS to the application on the loopback.
pub fn server(role: Role, ports: &[Port], pki: &Pki, server: &str, jwks: &str) -> Value {
    let tls = tls(
        "Downstream",
        &pki.server,
        &pki.client,
        pki,
        alpn(role),
        json!({"require_client_certificate": true}),
    );
    let listen = |port: u16, filter: Value| {
        listener(
            "0.0.0.0",
            port,
            json!({"filters": [filter], "transport_socket": tls}),
        )
    };
    let listeners = match role {
        Role::Tcp => ports
            .iter()
            .map(|port| listen(port.local, tcp_proxy(json!({"cluster": name(port)}))))
            .collect(),
        Role::Http => ports
            .iter()
            .map(|port| {
                let filters = checks(port.tokens, &pki.client, jwks);
                let hosts = vec![host(json!(["*"]), forward(port))];
                listen(port.local, manager(&filters, hosts))
            })
            .collect(),
        Role::Hbone => {
            let hosts = ports.iter().map(|port| {
                let domain = format!("{server}:{}", port.server);
                host(json!([domain]), connect(port))
            });
            let mut manager = manager(&[], hosts.collect());
            let config = &mut manager["typed_config"];
            config["codec_type"] = "HTTP2".into();
            config["http2_protocol_options"] = json!({"allow_connect": true});
            config["upgrade_configs"] = json!([{"upgrade_type": "CONNECT"}]);
            vec![listen(HBONE, manager)]
        }
    };
    let clusters = ports
        .iter()
        .map(|port| cluster(&name(port), "127.0.0.1", port.server));
    bootstrap(listeners, clusters.collect())
}

fn name(port: &Port) -> String {
    format!("port-{}", port.local)
}

fn alpn(role: Role) -> &'static str {
    match role {
        Role::Hbone => "h2",
        Role::Http => "http/1.1",
        Role::Tcp => "tcp",
    }
}

fn bootstrap(listeners: Vec<Value>, clusters: Vec<Value>) -> Value {
    json!({"static_resources": {"listeners": listeners, "clusters": clusters}})
}

fn address(host: &str, port: u16) -> Value {
    json!({"socket_address": {"address": host, "port_value": port}})
}

fn listener(host: &str, port: u16, chain: Value) -> Value {
    json!({
        "name": format!("{host}:{port}"),
        "address": address(host, port),
        "filter_chains": [chain],
    })
}

fn cluster(name: &str, host: &str, port: u16) -> Value {
    const MANY: u32 = 1_000_000;
    json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "10s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [
            {"endpoint": {"address": address(host, port)}},
        ]}]},
        "circuit_breakers": {"thresholds": [{
            "max_connections": MANY, "max_pending_requests": MANY,
            "max_requests": MANY, "max_retries": MANY,
        }]},
    })
}

fn tls(
    side: &str,
    own: &Identity,
    peer: &Identity,
    pki: &Pki,
    alpn: &str,
    mut context: Value,
) -> Value {
    context["common_tls_context"] = json!({
        "tls_params": {
            "tls_minimum_protocol_version": "TLSv1_3",
            "tls_maximum_protocol_version": "TLSv1_3",
            "ecdh_curves": ["X25519"],
        },
        "alpn_protocols": [alpn],
        "tls_certificates": [{
            "certificate_chain": {"inline_string": own.certificate},
            "private_key": {"inline_string": own.key},
        }],
        "validation_context": {
            "trusted_ca": {"inline_string": pki.root},
            "match_typed_subject_alt_names": [
                {"san_type": "URI", "matcher": {"exact": peer.id}},
            ],
        },
    });
    let kind = format!("{TLS}.{side}TlsContext");
    typed("envoy.transport_sockets.tls", &kind, context)
}

fn tcp_proxy(mut config: Value) -> Value {
    config["stat_prefix"] = "tcp".into();
    let kind = format!("{FILTER}.network.tcp_proxy.v3.TcpProxy");
    typed("envoy.filters.network.tcp_proxy", &kind, config)
}

fn manager(filters: &[Value], hosts: Vec<Value>) -> Value {
    let router = format!("{FILTER}.http.router.v3.Router");
    let mut filters = filters.to_vec();
    filters.push(typed("envoy.filters.http.router", &router, json!({})));
    let kind = format!("{FILTER}.network.http_connection_manager.v3.HttpConnectionManager");
    let config = json!({
        "stat_prefix": "http",
        "generate_request_id": false,
        "http_filters": filters,
        "route_config": {"virtual_hosts": hosts},
    });
    typed(
        "envoy.filters.network.http_connection_manager",
        &kind,
        config,
    )
}

fn host(domains: Value, route: Value) -> Value {
    json!({"name": domains.to_string(), "domains": domains, "routes": [route]})
}

fn forward(port: &Port) -> Value {
    json!({"match": {"prefix": "/"}, "route": {"cluster": name(port), "timeout": "0s"}})
}

fn connect(port: &Port) -> Value {
    json!({
        "match": {"connect_matcher": {}},
        "route": {
            "cluster": name(port),
            "timeout": "0s",
            "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}],
        },
    })
}

/// A token of the issuer's, and a rule about it and the peer.
fn checks(tokens: Tokens, peer: &Identity, jwks: &str) -> Vec<Value> {
    if tokens == Tokens::Unread {
        return Vec::new();
    }
    let mut provider = json!({
        "issuer": ISSUER,
        "audiences": ["shop"],
        "local_jwks": {"inline_string": jwks},
        "payload_in_metadata": "payload",
    });
    if tokens == Tokens::Cached {
        provider["jwt_cache_config"] = json!({"jwt_cache_size": REMEMBERED});
    }
    let authentication = json!({
        "providers": {"issuer": provider},
        "rules": [{"match": {"prefix": "/"}, "requires": {"provider_name": "issuer"}}],
    });
    let issued = json!({"sourced_metadata": {"metadata_matcher": {
        "filter": "envoy.filters.http.jwt_authn",
        "path": [{"key": "payload"}, {"key": "iss"}],
        "value": {"string_match": {"exact": ISSUER}},
    }}});
    let presented = json!({"authenticated": {"principal_name": {"exact": peer.id}}});
    let rules = json!({"rules": {"action": "ALLOW", "policies": {"issued": {
        "permissions": [{"header": {"name": ":method", "string_match": {"exact": "GET"}}}],
        "principals": [{"and_ids": {"ids": [presented, issued]}}],
    }}}});
    let kind = |name: &str| format!("{FILTER}.http.{name}");
    vec![
        typed(
            "envoy.filters.http.jwt_authn",
            &kind("jwt_authn.v3.JwtAuthentication"),
            authentication,
        ),
        typed("envoy.filters.http.rbac", &kind("rbac.v3.RBAC"), rules),
    ]
}

fn typed(name: &str, kind: &str, mut config: Value) -> Value {
    config["@type"] = format!("type.googleapis.com/{kind}").into();
    json!({"name": name, "typed_config": config})
}
