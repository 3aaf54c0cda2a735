//! What a replay says of a call is what the data path says to it, or nothing.

use std::{
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use http::{HeaderName, HeaderValue, header};
use serde_json::{Value, json};

use super::{report::form, *};
use crate::{
    audit::{TokenRecord, chain::Line},
    config::{Config, Mesh as Enrol},
    identity::TrustDomain,
    judge::{Destination as Own, Judge},
    jwt::{Algorithm, SigningKey},
    objects::load_text,
    policy::{Facts, Mesh, Reading},
    request::Request,
    workload::Table,
};

const NOW: u64 = 1_800_000_000;
const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

fn set(text: &str) -> PolicySet {
    let mesh = Mesh {
        root_namespace: "istio-system",
        trust_domain: &TrustDomain::default(),
        aliases: &[],
        secrets: Path::new("/"),
        requests: Reading::default(),
    };
    let objects = load_text(Path::new("p.yaml"), text).unwrap_or_else(|e| panic!("{e}: {text}"));
    PolicySet::compile(objects, &mesh).unwrap_or_else(|e| panic!("{}: {text}", e[0]))
}

fn object(kind: &str, name: &str, spec: &str) -> String {
    let api = match kind {
        "ProtectedResource" | "TokenBinding" | "ConnectPolicy" => "postern.dev/v1alpha1",
        _ => "security.istio.io/v1",
    };
    format!(
        "---\napiVersion: {api}\nkind: {kind}\nmetadata: {{name: {name}, namespace: shop}}\nspec: {spec}\n"
    )
}

fn authorization(spec: &str) -> String {
    object("AuthorizationPolicy", "p", spec)
}

/// The pod `api-1` of `api`, behind the service `front`.
fn workloads() -> Workloads {
    let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: api-1, namespace: shop, uid: a, labels: {app: api}, \
         ownerReferences: [{kind: StatefulSet, name: api, controller: true}]}\n\
         spec: {nodeName: n}\nstatus: {phase: Running, podIP: 10.0.0.2}\n---\n\
         apiVersion: v1\nkind: Service\nmetadata: {name: front, namespace: shop}\n\
         spec: {clusterIP: 10.96.0.1, selector: {app: api}, ports: [{port: 80}]}\n";
    let objects = load_text(Path::new("w.yaml"), text).expect("manifests");
    let objects: Vec<_> = objects.into_iter().map(|one| one.object).collect();
    Workloads::new(Table::build(&objects, Enrol::Enabled))
}

fn entry(record: &Value) -> Entry {
    Entry::parse(Line {
        seq: 1,
        text: record.to_string(),
        file: Path::new("log").into(),
        number: 1,
    })
    .expect("a record")
}

/// A record of a connection to that pod, with changes.
fn connection(changes: Value) -> Value {
    changed(
        json!({
            "seq": 1, "time": "2027-01-15T08:00:00Z", "kind": "connection",
            "reporter": "destination", "transport": "hbone", "verdict": "allow",
            "source": {"address": "10.0.0.1:999", "identity": WEB},
            "destination": {"address": "10.0.0.2:80", "namespace": "shop", "pod": "api-1", "workload": "api"},
        }),
        changes,
    )
}

fn request(changes: Value) -> Value {
    let own =
        json!({"kind": "request", "method": "GET", "path": "/a", "host": "api", "transport": null});
    changed(changed(connection(json!({})), own), changes)
}

/// `null` takes a member away.
fn changed(mut record: Value, changes: Value) -> Value {
    let members = record.as_object_mut().expect("an object");
    let Value::Object(changes) = changes else {
        panic!("changes are an object");
    };
    for (name, value) in changes {
        match value {
            Value::Null => members.remove(&name),
            value => members.insert(name, value),
        };
    }
    record
}

fn replayed(candidate: &str, recorded_under: Option<&str>, record: &Value) -> Value {
    let mut replay = Replay::new(Sets {
        candidate: set(candidate),
        recorded_under: recorded_under.map(set),
        workloads: workloads(),
    });
    replay.add(&entry(record));
    replay.finish().json()
}

/// In one letter what became of a call that was allowed: Allow, Deny, Undecidable, or
/// Not judged.
fn said(report: &Value) -> char {
    let some = |name: &str| {
        report[name]
            .as_array()
            .is_some_and(|groups| !groups.is_empty())
    };
    match (
        some("newlyDenied"),
        some("undecidable"),
        report["unchanged"].as_u64(),
    ) {
        (true, ..) => 'D',
        (_, true, _) => 'U',
        (_, _, Some(1)) => 'A',
        _ => 'N',
    }
}

/// A call, and how a request of it looks on the wire.
struct Sent {
    method: &'static str,
    path: &'static str,
    header: Option<&'static str>,
    token: Option<Value>,
}

struct World {
    issuer: SigningKey,
    judge: Judge,
}

impl World {
    fn authentication(&self, audience: &str) -> String {
        let keys = json!({"keys": [self.issuer.jwk()]});
        let rule = format!(
            "{{jwtRules: [{{issuer: 'https://as.example', audiences: [{audience}], jwks: '{keys}'}}]}}"
        );
        object("RequestAuthentication", "tokens", &rule)
    }

    /// Whether it passes, and the record's token.
    async fn judge(&self, policies: &str, sent: &Sent) -> (bool, Value) {
        let set = set(policies);
        let selected = set.select(&Subject {
            namespace: "shop".into(),
            labels: [("app".into(), "api".into())].into(),
            services: vec!["front".into()],
        });
        let token = sent.token.as_ref().map(|changes| {
            let base = json!({"iss": "https://as.example", "sub": "alice", "aud": "api", "iat": NOW,
                "exp": NOW + 600, "jti": "1", "client_id": "app", "scope": "read write"});
            self.issuer
                .sign("at+jwt", &changed(base, changes.clone()))
                .expect("signs")
        });
        let mut headers = Vec::new();
        let env = HeaderName::from_static("x-env");
        if let Some(value) = sent.header {
            headers.push((env, HeaderValue::from_static(value)));
        }
        if let Some(token) = token {
            let value = HeaderValue::try_from(format!("Bearer {token}")).expect("a header");
            headers.push((header::AUTHORIZATION, value));
        }
        let request = Request {
            method: sent.method,
            path: sent.path,
            host: "api",
            headers: headers.iter().map(|(name, value)| (name, value)).collect(),
        };
        let identity = WEB.parse().expect("a SPIFFE ID");
        let source = "10.0.0.1:999".parse().expect("address");
        let to = "10.0.0.2:80".parse().expect("address");
        let facts = Facts::new(Some(identity), "10.0.0.1".parse().expect("address"), to);
        let now: SystemTime = UNIX_EPOCH + Duration::from_secs(NOW);
        let own = Own::default();
        let judged = (self.judge)
            .request(&selected, &facts, own, source, &request, now)
            .await;
        let (passes, claims) = match judged {
            Ok(allowed) => (true, allowed.claims),
            Err(refused) => (false, refused.claims),
        };
        let token = claims.map(|claims| TokenRecord::new(&claims));
        (passes, serde_json::to_value(token).expect("JSON"))
    }
}

/// Calls are recorded under a RequestAuthentication alone; a row is what is said of each
/// of them under other policies, and never another thing than what those come to.
#[tokio::test]
async fn what_is_decided_is_what_the_data_path_decides() {
    let world = World {
        issuer: SigningKey::generate(Algorithm::Es256).expect("key"),
        judge: Judge::new(&Config::default()).expect("a judge"),
    };
    let call = |method, path, header, token| Sent {
        method,
        path,
        header,
        token,
    };
    let calls = [
        call("GET", "/a", None, None),
        call("DELETE", "/a/../b", Some("prod"), None),
        call("GET", "/a", None, Some(json!({}))),
        call(
            "DELETE",
            "/b",
            Some("prod"),
            Some(json!({"sub": "bob", "scope": "read"})),
        ),
        call(
            "GET",
            "/b",
            None,
            Some(json!({"groups": ["ops"], "aud": ["api", "other"], "act": {"sub": "robot"}})),
        ),
    ];
    let tokens = world.authentication("api");
    let when = |action: &str, condition: &str| {
        authorization(&format!(
            "{{action: {action}, rules: [{{when: [{condition}]}}]}}"
        ))
    };
    let to = |action: &str, operation: &str| {
        authorization(&format!(
            "{{action: {action}, rules: [{{to: [{{operation: {operation}}}]}}]}}"
        ))
    };
    let with = |more: String| tokens.clone() + &more;
    let rows = [
        (String::new(), "AAAAA"),
        (tokens.clone(), "AAAAA"),
        (world.authentication("other"), "AADDA"),
        (authorization("{}"), "DDDDD"),
        (to("ALLOW", "{methods: [GET]}"), "ADADA"),
        (to("DENY", "{paths: [/b]}"), "ADADD"),
        (to("DENY", "{notPaths: ['/a*']}"), "ADADD"),
        (to("ALLOW", "{hosts: [API], ports: ['80']}"), "AAAAA"),
        (to("ALLOW", "{ports: ['81']}"), "DDDDD"),
        (
            when("DENY", "{key: 'request.headers[x-env]', values: [prod]}"),
            "UUUUU",
        ),
        (
            authorization(
                "{action: DENY, rules: [{to: [{operation: {methods: [DELETE]}}], \
                when: [{key: 'request.headers[x-env]', notValues: [test]}]}]}",
            ),
            "AUAUA",
        ),
        // No rule verifies a token: there is no principal.
        (
            when("ALLOW", "{key: request.auth.principal, values: ['*']}"),
            "DDDDD",
        ),
        (
            with(when(
                "ALLOW",
                "{key: request.auth.principal, values: ['*/alice']}",
            )),
            "DDADA",
        ),
        (
            with(when(
                "DENY",
                "{key: 'request.auth.claims[scope]', notValues: [write]}",
            )),
            "DDADA",
        ),
        (
            with(when(
                "ALLOW",
                "{key: 'request.auth.claims[groups]', values: [ops]}",
            )),
            "DDUUU",
        ),
        (
            with(when(
                "DENY",
                "{key: 'request.auth.claims[act][sub]', values: [robot]}",
            )),
            "AAAAD",
        ),
        (
            with(when(
                "ALLOW",
                "{key: request.auth.audiences, values: [other]}",
            )),
            "DDDDA",
        ),
        (
            with(object("TokenBinding", "b", "{presenter: [actor]}")),
            "AADDD",
        ),
        (
            with(object(
                "ProtectedResource",
                "r",
                "{resource: 'https://api.example'}",
            )),
            "AAAAA",
        ),
        (
            with(object("ProtectedResource", "r", "{tokens: {type: at+jwt}}")),
            "AAUUU",
        ),
        (
            object("PeerAuthentication", "m", "{mtls: {mode: STRICT}}")
                + &object(
                    "AuthorizationPolicy",
                    "s",
                    "{selector: {matchLabels: {app: other}}}",
                ),
            "AAAAA",
        ),
        (
            object(
                "AuthorizationPolicy",
                "s",
                "{targetRefs: [{kind: Service, group: '', name: front}]}",
            ),
            "DDDDD",
        ),
    ];
    for (candidate, expected) in &rows {
        let mut got = String::new();
        for sent in &calls {
            let (_, token) = world.judge(&tokens, sent).await;
            let record = request(json!({"method": sent.method, "path": sent.path, "token": token}));
            let answer = said(&replayed(candidate, Some(&tokens), &record));
            let (passes, _) = world.judge(candidate, sent).await;
            let real = if passes { 'A' } else { 'D' };
            assert!(
                answer == 'U' || answer == real,
                "{candidate}{} {}: {answer}, and it is {real}",
                sent.method,
                sent.path
            );
            got.push(answer);
        }
        assert_eq!(got, *expected, "{candidate}");
    }
}

#[test]
fn what_a_record_does_not_tell_is_not_guessed() {
    let tokens = object(
        "RequestAuthentication",
        "tokens",
        "{jwtRules: [{issuer: 'https://as.example', jwksUri: 'https://as.example/keys'}]}",
    );
    let get = authorization("{rules: [{to: [{operation: {methods: [GET]}}]}]}");
    let not_web =
        authorization("{action: DENY, rules: [{from: [{source: {serviceAccounts: [web]}}]}]}");
    let token = |more: Value| {
        let base = json!({"iss": "https://as.example", "sub": "a", "checked": "jwt"});
        json!({"token": changed(base, more)})
    };
    let long = "/x".repeat(256);
    for (candidate, record, expected) in [
        // Whether there was a token.
        (tokens.clone(), request(json!({})), 'U'),
        (tokens.clone() + &not_web, request(json!({})), 'D'),
        (tokens.clone(), request(token(json!({}))), 'A'),
        (
            tokens.clone(),
            request(token(json!({"iss": "https://other"}))),
            'U',
        ),
        (
            tokens.clone(),
            request(token(json!({"checked": "introspection"}))),
            'U',
        ),
        // Whether its bytes were HTTP.
        (get.clone(), connection(json!({})), 'U'),
        (
            get.clone() + &object("AuthorizationPolicy", "q", "{action: DENY, rules: [{}]}"),
            connection(json!({})),
            'D',
        ),
        (tokens.clone(), connection(json!({})), 'U'),
        (not_web.clone(), connection(json!({})), 'D'),
        // The rest of a long path.
        (get.clone(), request(json!({"path": long})), 'A'),
        (
            authorization("{rules: [{to: [{operation: {paths: ['*/end']}}]}]}"),
            request(json!({"path": long})),
            'U',
        ),
        // Who is asked.
        (
            authorization("{action: CUSTOM, provider: {name: p}, rules: [{}]}"),
            request(json!({})),
            'U',
        ),
        (
            authorization(
                "{action: CUSTOM, provider: {name: p}, rules: [{to: [{operation: {methods: [PUT]}}]}]}",
            ),
            request(json!({})),
            'A',
        ),
        // What the workload's labels are.
        (
            object(
                "AuthorizationPolicy",
                "s",
                "{selector: {matchLabels: {app: api}}}",
            ),
            request(
                json!({"destination": {"address": "10.0.0.3:80", "namespace": "shop", "pod": "gone-1", "workload": "gone"}}),
            ),
            'U',
        ),
        (
            object(
                "AuthorizationPolicy",
                "s",
                "{selector: {matchLabels: {app: api}}}",
            ),
            request(
                json!({"destination": {"address": "10.0.0.3:80", "namespace": "shop", "pod": "api-2", "workload": "api"}}),
            ),
            'D',
        ),
        (
            authorization("{}"),
            request(
                json!({"destination": {"address": "10.0.0.3:80", "namespace": "shop", "pod": "gone-1"}}),
            ),
            'D',
        ),
        (
            object("PeerAuthentication", "m", "{mtls: {mode: STRICT}}"),
            connection(json!({"transport": "plaintext", "source": {"address": "10.0.0.1:9"}})),
            'D',
        ),
        // What was not judged, or is not judged here.
        (
            not_web.clone(),
            connection(json!({"protocol": "http/1"})),
            'N',
        ),
        (
            not_web.clone(),
            connection(json!({"transport": "probe"})),
            'N',
        ),
        (
            not_web.clone(),
            connection(json!({"verdict": "failed"})),
            'N',
        ),
        (
            not_web.clone(),
            connection(json!({"reporter": "source"})),
            'N',
        ),
        (
            not_web.clone(),
            connection(json!({"reporter": "source", "transport": "local"})),
            'D',
        ),
        (not_web.clone(), request(json!({"verdict": "deny"})), 'N'),
        (
            not_web.clone(),
            request(json!({"verdict": "deny", "reason": "its token has expired"})),
            'D',
        ),
        (
            not_web,
            json!({"kind": "flow", "time": "2027-01-15T08:00:00Z"}),
            'N',
        ),
    ] {
        let report = replayed(&candidate, None, &record);
        assert_eq!(said(&report), expected, "{candidate}{record}: {report}");
    }
}

/// Policies that were in force tell what was looked for and not found.
#[test]
fn what_was_looked_for_and_not_found_was_not_there() {
    let tokens = |places: &str| {
        object(
            "RequestAuthentication",
            "tokens",
            &format!(
                "{{jwtRules: [{{issuer: 'https://as.example', jwksUri: 'https://as.example/keys'{places}}}]}}"
            ),
        )
    };
    let cookie = tokens(", fromCookies: [t]");
    let tokens = tokens("");
    let by_port = authorization("{rules: [{to: [{operation: {ports: ['80']}}]}]}");
    let refused =
        json!({"kind": "RequestAuthentication", "namespace": "shop", "name": "tokens", "rule": 0});
    let refused = json!({"verdict": "deny", "policy": refused});
    for (recorded, candidate, record, expected) in [
        (&tokens, &tokens, request(json!({})), 'A'),
        (&tokens, &cookie, request(json!({})), 'U'),
        (&by_port, &tokens, request(json!({})), 'U'),
        (&tokens, &tokens, request(refused), 'U'),
        // Bytes that were looked at are no HTTP.
        (&tokens, &by_port, connection(json!({})), 'A'),
        (
            &tokens,
            &(tokens.clone() + &by_port),
            connection(json!({})),
            'A',
        ),
        (
            &by_port,
            &(tokens.clone() + &by_port),
            connection(json!({})),
            'U',
        ),
    ] {
        let report = replayed(candidate, Some(recorded), &record);
        assert_eq!(
            said(&report),
            expected,
            "{recorded}{candidate}{record}: {report}"
        );
    }
}

#[test]
fn calls_are_grouped_by_who_what_and_why() {
    let candidate = "{rules: [{to: [{operation: {methods: [GET]}}]}]}";
    let mut replay = Replay::new(Sets {
        candidate: set(&authorization(candidate)),
        recorded_under: None,
        workloads: workloads(),
    });
    let denied = json!({"kind": "AuthorizationPolicy", "namespace": "shop", "name": "old"});
    for (time, changes) in [
        ("10", json!({"method": "PUT", "path": "/orders/17"})),
        ("30", json!({"method": "PUT", "path": "/orders/4"})),
        ("20", json!({"method": "PUT", "path": "/carts/4"})),
        ("40", json!({"verdict": "deny", "policy": denied})),
        ("50", json!({"verdict": "deny"})),
        ("55", json!({})),
    ] {
        let time = json!({"time": format!("2027-01-15T08:00:{time}Z")});
        replay.add(&entry(&changed(request(changes), time)));
    }
    let report = replay.finish();
    assert!(report.changes() && !report.has_undecidable());
    let group = |call: &str, calls: u64, first: &str, last: &str| {
        json!({"source": WEB, "destination": "shop/api", "call": call, "calls": calls,
            "first": format!("2027-01-15T08:00:{first}Z"), "last": format!("2027-01-15T08:00:{last}Z")})
    };
    let by_default =
        json!({"policy": "AuthorizationPolicy/shop/p", "why": "no ALLOW policy matched"});
    let by_rule = json!({"policy": "AuthorizationPolicy/shop/p[0]"});
    let expected = json!({
        "newlyDenied": [
            changed(group("PUT /carts/{*}", 1, "20", "20"), by_default.clone()),
            changed(group("PUT /orders/{*}", 2, "10", "30"), by_default),
        ],
        "newlyAllowed": [changed(group("GET /a", 1, "40", "40"), by_rule)],
        "undecidable": [],
        "unchanged": 1,
        "unjudged": {"refused by no policy": 1},
    });
    assert_eq!(report.json(), expected);
    let text = report.text();
    assert!(
        text.contains("newly denied: 3 calls\nCALLS  SOURCE"),
        "{text}"
    );
    assert!(
        text.ends_with("unchanged: 1 calls\nnot judged: 1: refused by no policy\n"),
        "{text}"
    );
}

#[test]
fn names_of_single_things_are_left_out_of_paths() {
    for (path, expected) in [
        ("/", "/"),
        ("/orders/17/items", "/orders/{*}/items"),
        ("/v1/users", "/v1/users"),
        ("/u/550e8400-e29b-41d4-a716-446655440000", "/u/{*}"),
        ("/c/deadbeef", "/c/deadbeef"),
        ("/c/deadbee1", "/c/{*}"),
        ("/s/eyJhbGciOiJIUzI1NiIsInR5cCI6", "/s/{*}"),
        (
            "/well-known/a-very-long-name-without",
            "/well-known/a-very-long-name-without",
        ),
    ] {
        assert_eq!(form(path), expected, "{path}");
    }
}
