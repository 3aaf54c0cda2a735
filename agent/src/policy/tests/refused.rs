//! What is refused at load, and what is not.

use super::{load, peer, policy};

fn rule(inner: &str) -> String {
    policy("shop", &format!("{{rules: [{inner}]}}"))
}

fn tokens(rule: &str) -> String {
    policy("shop", &format!("{{jwtRules: [{rule}]}}"))
        .replace("AuthorizationPolicy", "RequestAuthentication")
}

fn source(inner: &str) -> String {
    rule(&format!("{{from: [{{source: {inner}}}]}}"))
}

fn operation(inner: &str) -> String {
    rule(&format!("{{to: [{{operation: {inner}}}]}}"))
}

fn when(inner: &str) -> String {
    rule(&format!("{{when: [{inner}]}}"))
}

fn custom(rule: &str) -> String {
    policy(
        "shop",
        &format!("{{action: CUSTOM, provider: {{name: x}}, rules: [{rule}]}}"),
    )
}

fn ours(kind: &str, spec: &str) -> String {
    policy("shop", spec)
        .replace("AuthorizationPolicy", kind)
        .replace("security.istio.io/v1", "postern.dev/v1alpha1")
}

const KEYS: &str = r#"'{"keys":[{"kty":"oct","k":"AAAA"}]}'"#;

#[test]
fn errors_name_the_place_and_what_would_be_right() {
    let dry = |value: &str, text: String| {
        text.replace(
            "metadata: {",
            &format!("metadata: {{annotations: {{istio.io/dry-run: '{value}'}}, "),
        )
    };
    let mut wrong = Vec::new();
    for (text, parts) in [
        (rule("{form: []}"), ["p.yaml:5", "form"]),
        (
            policy("shop", "{action: DENY, rules: [{}]}") + "items: []\n",
            ["p.yaml:6", "items"],
        ),
        (
            operation("{paths: ['/users/{id}']}"),
            ["paths[0]", "whole segment"],
        ),
        (operation("{paths: ['/a}']}"), ["paths[0]", "whole segment"]),
        (
            operation("{paths: ['/a//{*}']}"),
            ["paths[0]", "a segment is empty"],
        ),
        (operation("{paths: /a}"), ["paths", "must be a list"]),
        (
            source("{ipBlocks: ['::ffff:10.0.0.0/104']}"),
            ["ipBlocks[0]", "write it as IPv4"],
        ),
        (
            when("{key: 'request.headers[:path]', values: [a]}"),
            ["when[0]", "use paths"],
        ),
        (
            peer("shop", "p", "{}").replace("name: p,", "name: p, creationTimestamp: yesterday,"),
            ["creationTimestamp", "RFC 3339"],
        ),
        (rule("null"), ["p.yaml:5", "rules[0]"]),
        (rule("{from: []}"), ["from", "empty list"]),
        (rule("{to: []}"), ["to", "empty list"]),
        (rule("{when: []}"), ["when", "empty list"]),
        (rule("{from: [{}]}"), ["from[0]", "source"]),
        (source("{}"), ["source", "without any field"]),
        (operation("{}"), ["operation", "without any field"]),
        (source("{principals: []}"), ["principals", "empty list"]),
        (
            source("{ipBlocks: [10.0.0.0/33]}"),
            ["ipBlocks[0]", "10.0.0.0/33"],
        ),
        (
            source("{remoteIpBlocks: [10.0.0]}"),
            ["remoteIpBlocks[0]", "CIDR"],
        ),
        (source("{namespaces: ['']}"), ["namespaces[0]", "empty"]),
        (
            source("{requestPrincipals: ['']}"),
            ["requestPrincipals[0]", "empty"],
        ),
        (
            source("{serviceAccounts: ['a/b/c']}"),
            ["serviceAccounts[0]", "a/b/c"],
        ),
        (
            source("{serviceAccounts: ['a*']}"),
            ["serviceAccounts[0]", "without `*`"],
        ),
        (
            source("{serviceAccounts: [a], namespaces: [b]}"),
            ["rules[0]", "beside"],
        ),
        (
            source("{notServiceAccounts: [a], principals: [b]}"),
            ["rules[0]", "beside"],
        ),
        (
            source("{trustDomains: ['a*b']}"),
            ["trustDomains[0]", "a*b"],
        ),
        (
            source("{trustDomains: ['*a*']}"),
            ["trustDomains[0]", "*a*"],
        ),
        (
            source("{trustDomains: ['a/b']}"),
            ["trustDomains[0]", "a/b"],
        ),
        (operation("{ports: ['70000']}"), ["ports[0]", "70000"]),
        (operation("{ports: ['8*']}"), ["ports[0]", "8*"]),
        (operation("{ports: ['+80']}"), ["ports[0]", "+80"]),
        (operation("{methods: ['']}"), ["methods[0]", "empty"]),
        (operation("{hosts: [1, '']}"), ["hosts[1]", "empty"]),
        (operation("{notPath: [/a]}"), ["p.yaml:5", "notPath"]),
        (
            operation("{paths: ['/a{*}']}"),
            ["paths[0]", "whole segment"],
        ),
        (
            operation("{paths: ['/{**}/{*}']}"),
            ["paths[0]", "last operator"],
        ),
        (
            operation("{paths: ['/{**}/{**}']}"),
            ["paths[0]", "last operator"],
        ),
        (
            operation("{paths: ['/{*}/*']}"),
            ["paths[0]", "whole segment"],
        ),
        (operation("{paths: ['{*}/a']}"), ["paths[0]", "begins with"]),
        (
            operation("{paths: ['/{*}/{x}']}"),
            ["paths[0]", "whole segment"],
        ),
        (when("{key: source.ip}"), ["when[0]", "values or notValues"]),
        (when("{values: [a]}"), ["when[0]", "key"]),
        (when("{key: '', values: [a]}"), ["when[0]", "no attribute"]),
        (
            when("{key: source.user, values: [a]}"),
            ["when[0]", "source.user"],
        ),
        (
            when("{key: destination.labels, values: [a]}"),
            ["when[0]", "no attribute"],
        ),
        (
            when("{key: request.headers, values: [a]}"),
            ["when[0]", "request.headers[name]"],
        ),
        (
            when("{key: 'request.headers[]', values: [a]}"),
            ["when[0]", "names no header"],
        ),
        (
            when("{key: 'request.headers[a b]', values: [a]}"),
            ["when[0]", "names no header"],
        ),
        (
            when("{key: request.auth.claims, values: [a]}"),
            ["when[0]", "no claim"],
        ),
        (
            when("{key: 'request.auth.claims[]', values: [a]}"),
            ["when[0]", "no claim"],
        ),
        (
            when("{key: 'request.auth.claims[a]b]', values: [a]}"),
            ["when[0]", "no claim"],
        ),
        (
            when("{key: 'request.auth.claims[a][]', values: [a]}"),
            ["when[0]", "no claim"],
        ),
        (when("{key: source.ip, values: [a]}"), ["when[0]", "CIDR"]),
        (
            when("{key: destination.port, values: [http]}"),
            ["when[0]", "no port"],
        ),
        (
            when("{key: source.serviceAccount, values: ['*']}"),
            ["when[0]", "service account"],
        ),
        (
            when("{key: 'experimental.envoy.filters.a[b]', values: [c]}"),
            ["when[0]", "Envoy's filters"],
        ),
        (
            policy("shop", "{action: DENY}"),
            ["p.yaml:5", "DENY without rules"],
        ),
        (
            policy("shop", "{action: BLOCK, rules: [{}]}"),
            ["action", "BLOCK"],
        ),
        (
            policy("shop", "{action: CUSTOM, rules: [{}]}"),
            ["p.yaml:5", "provider.name"],
        ),
        (
            policy("shop", "{action: CUSTOM, provider: {name: x}}"),
            ["rules", "CUSTOM without rules"],
        ),
        (
            policy("shop", "{provider: {name: x}, rules: [{}]}"),
            ["p.yaml:5", "for action CUSTOM only"],
        ),
        (
            custom("{from: [{source: {principals: [a]}}]}"),
            ["principals", "CUSTOM"],
        ),
        (
            custom("{from: [{source: {notRequestPrincipals: [a]}}]}"),
            ["requestPrincipals", "CUSTOM"],
        ),
        (
            custom("{when: [{key: 'request.auth.claims[a]', values: [b]}]}"),
            ["request.auth.claims", "CUSTOM"],
        ),
        (
            policy("shop", "{selector: {matchLabels: {app: 'w*'}}}"),
            ["selector", "exactly"],
        ),
        (
            policy("shop", "{selector: {matchLabels: {'': w}}}"),
            ["selector", "exactly"],
        ),
        (
            policy("shop", "{selector: {labels: {app: w}}}"),
            ["selector", "labels"],
        ),
        (
            policy(
                "shop",
                "{selector: {}, targetRefs: [{kind: Service, name: x}]}",
            ),
            ["p.yaml:5", "either selector or targetRefs"],
        ),
        (
            policy("shop", "{targetRefs: [{kind: Service}]}"),
            ["targetRefs[0]", "name is missing"],
        ),
        (
            policy("shop", "{targetRefs: [{kind: Pod, name: x}]}"),
            ["targetRefs[0]", "no target"],
        ),
        (
            policy(
                "shop",
                "{targetRefs: [{kind: Service, name: x, namespace: y}]}",
            ),
            ["targetRefs[0]", "namespace"],
        ),
        (
            dry("maybe", policy("shop", "{rules: [{}]}")),
            ["dry-run", "neither true nor false"],
        ),
        (dry("true", custom("{}")), ["dry-run", "ALLOW or DENY only"]),
        (
            dry("true", peer("shop", "p", "{}")),
            ["dry-run", "ALLOW or DENY only"],
        ),
        (
            dry("true", tokens("{issuer: a}")),
            ["dry-run", "ALLOW or DENY only"],
        ),
        (
            peer("shop", "p", "{mtls: {mode: LOOSE}}"),
            ["mtls.mode", "LOOSE"],
        ),
        (
            peer("shop", "p", "{mtsl: {mode: STRICT}}"),
            ["p.yaml:5", "mtsl"],
        ),
        (
            peer("shop", "p", "{portLevelMtls: {80: {mode: STRICT}}}"),
            ["portLevelMtls", "selector"],
        ),
        (
            peer(
                "shop",
                "p",
                "{selector: {matchLabels: {a: b}}, portLevelMtls: {}}",
            ),
            ["portLevelMtls", "empty"],
        ),
        (
            peer(
                "shop",
                "p",
                "{selector: {matchLabels: {a: b}}, portLevelMtls: {0: {}}}",
            ),
            ["portLevelMtls", "65535"],
        ),
        (tokens("{}"), ["jwtRules[0]", "issuer is missing"]),
        (tokens("{issuer: ''}"), ["jwtRules[0].issuer", "empty"]),
        (
            tokens("{issuer: a, jwks: '{}', jwksUri: 'https://a/'}"),
            ["jwtRules[0]", "Key Set"],
        ),
        (tokens("{issuer: a, jwks: nonsense}"), ["jwks", "Key Set"]),
        (
            tokens(&format!("{{issuer: a, jwks: {KEYS}}}")),
            ["jwks", "Key Set"],
        ),
        (
            tokens("{issuer: a, jwksUri: 'ftp://a/'}"),
            ["jwksUri", "http"],
        ),
        (
            tokens("{issuer: a, jwksUri: 'https://a:99999/'}"),
            ["jwksUri", "port"],
        ),
        (tokens("{issuer: a, jwksUri: /keys}"), ["jwksUri", "http"]),
        (
            tokens("{issuer: a, audiences: ['']}"),
            ["audiences[0]", "empty"],
        ),
        (
            tokens("{issuer: a, fromParams: ['']}"),
            ["fromParams[0]", "empty"],
        ),
        (
            tokens("{issuer: a, fromCookies: ['']}"),
            ["fromCookies[0]", "empty"],
        ),
        (
            tokens("{issuer: a, fromHeaders: [{name: ''}]}"),
            ["fromHeaders[0].name", "header name"],
        ),
        (
            tokens("{issuer: a, fromHeaders: [{prefix: x}]}"),
            ["fromHeaders[0]", "name"],
        ),
        (
            tokens("{issuer: a, outputPayloadToHeader: 'a b'}"),
            ["outputPayloadToHeader", "can be set"],
        ),
        (
            tokens("{issuer: a, outputClaimToHeaders: [{header: x}]}"),
            ["outputClaimToHeaders[0]", "claim"],
        ),
        (
            tokens("{issuer: a, outputClaimToHeaders: [{header: 'a.b', claim: c}]}"),
            ["header", "letters"],
        ),
        (
            tokens("{issuer: a, outputClaimToHeaders: [{header: Content-Length, claim: c}]}"),
            ["header", "frames"],
        ),
        (
            tokens("{issuer: a, spaceDelimitedClaims: ['']}"),
            ["spaceDelimitedClaims[0]", "empty"],
        ),
        (tokens("{issuer: a, timeout: 0s}"), ["timeout", "1ms"]),
        (tokens("{issuer: a, timeout: soon}"), ["timeout", "5s"]),
        (
            tokens("{issuer: a, presence: REQUIRED}"),
            ["presence", "requestPrincipals"],
        ),
        (
            tokens("{issuer: a, fromHeader: []}"),
            ["p.yaml:5", "fromHeader"],
        ),
        (
            ours("ConnectPolicy", "{action: DENY}"),
            ["spec.rules", "DENY without rules"],
        ),
        (
            ours("ConnectPolicy", "{rules: [{uids: [root]}]}"),
            ["uids[0]", "user ID"],
        ),
        (ours("TokenBinding", "{}"), ["spec", "presenter"]),
        (
            ours("TokenBinding", "{presenter: [face]}"),
            ["presenter[0]", "face"],
        ),
        (
            ours("AuthorizationPolicy", "{}"),
            ["AuthorizationPolicy", "is no policy"],
        ),
        (
            policy("shop", "{}").replace("security.istio.io", "security.istoi.io"),
            ["security.istoi.io/v1", "is no policy"],
        ),
        (
            policy("shop", "{}").replace("namespace:", "namepsace:"),
            ["p.yaml:4", "namepsace"],
        ),
        (
            policy("shop", "{}").replace("/v1\n", "/v2\n"),
            ["security.istio.io/v2", "use security.istio.io/v1"],
        ),
        (
            policy("shop", "{}").replace("name: p,", ""),
            ["metadata.name", "missing"],
        ),
        (
            policy("shop", "{}") + &policy("shop", "{}"),
            ["the same object", "p.yaml:2"],
        ),
    ] {
        let error = load(&text).expect_err(&text);
        let lacking = parts.iter().find(|part| !error.contains(**part));
        wrong.extend(lacking.map(|part| format!("{error:?} lacks {part:?} for {text}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn shapes_that_istio_takes_are_taken() {
    for text in [
        policy("shop", "{selector: {}}"),
        policy("shop", "{action: AUDIT}"),
        policy("shop", "{rules: [{}]}"),
        policy("shop", "null"),
        operation("{ports: ['0', '65535']}"),
        operation("{paths: ['*', '/a*', '*b', '/{*}/{**}/end', '/a*b']}"),
        source("{ipBlocks: [10.0.0.1/8, '::1', '2001:db8::/32']}"),
        source("{trustDomains: ['*', 'a*', '*b', c]}"),
        when("{key: 'request.headers[User-Agent]', values: ['Mozilla/*'], notValues: ['*bot']}"),
        when("{key: source.trustDomain, values: ['*']}"),
        peer(
            "shop",
            "p",
            "{selector: {matchLabels: {a: b}}, portLevelMtls: {80: {}, 443: {mode: UNSET}}}",
        ),
        tokens("{jwksUri: 'http://keys.example:8080/jwks'}"),
        tokens("{issuer: a, jwks_uri: 'https://[::1]:8443/'}"),
        tokens(
            "{issuer: a, presence: OPTIONAL, timeout: 1m0.5s, fromHeaders: [{name: X-T, prefix: 'T '}]}",
        ),
        tokens("{issuer: a, outputClaimToHeaders: [{header: x_sub-1, claim: a.b.c}]}"),
        ours(
            "ConnectPolicy",
            "{rules: [{executables: ['/usr/bin/*'], uids: ['0'], ports: ['5432']}]}",
        ),
        ours(
            "TokenBinding",
            "{issuers: [a], presenter: [certificate, authorizedParty, actor]}",
        ),
    ] {
        load(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    }
}

#[test]
fn protected_resources_that_are_refused() {
    let resource = |spec: &str| ours("ProtectedResource", spec);
    let introspection = |change: (&str, &str)| {
        let whole = "{introspection: {endpoint: 'https://as/i', issuer: 'https://as', clientId: a, \
                     clientAuthentication: {none: {}}, cache: 30s, timeout: 5s}}";
        resource(&whole.replacen(change.0, change.1, 1))
    };
    load(&introspection(("", ""))).expect("the table's own is right");
    let mut wrong = Vec::new();
    for (text, parts) in [
        (resource("{resource: api}"), ["resource", "https://"]),
        (
            resource("{resource: 'http://api'}"),
            ["resource", "https://"],
        ),
        (
            resource("{resource: 'https://api?x'}"),
            ["resource", "query"],
        ),
        (
            resource("{resource: 'https://api/#x'}"),
            ["resource", "fragment"],
        ),
        (
            resource("{resource: 'https://u@api'}"),
            ["resource", "credentials"],
        ),
        (
            resource("{resource: 'https:///x'}"),
            ["resource", "https://"],
        ),
        (
            resource("{resource: 'https://api:0'}"),
            ["resource", "https://"],
        ),
        (
            resource("{resource: 'https://api:99999'}"),
            ["resource", "https://"],
        ),
        (
            resource("{resource: 'https://api/a b'}"),
            ["resource", "https://"],
        ),
        (
            resource("{resource: 'https://api/%00'}"),
            ["spec.resource", "NUL"],
        ),
        (
            resource("{resuorce: 'https://api'}"),
            ["p.yaml:5", "resuorce"],
        ),
        (
            resource("{authorizationServers: ['https://as']}"),
            ["spec.resource", "is missing"],
        ),
        (
            resource("{resource: 'https://api', authorizationServers: [as]}"),
            ["authorizationServers[0]", "https://"],
        ),
        (
            resource("{resource: 'https://api', authorizationServers: []}"),
            ["authorizationServers", "empty list"],
        ),
        (resource("{scopes: ['a b']}"), ["scopes[0]", "spaces"]),
        (resource("{scopes: ['']}"), ["scopes[0]", "scope"]),
        (resource("{tokens: {type: JWT}}"), ["tokens.type", "at+jwt"]),
        (
            resource("{tokens: {binding: mtls}}"),
            ["tokens.binding", "certificate"],
        ),
        (
            resource("{tokens: {nonce: perhaps}}"),
            ["tokens.nonce", "p.yaml:5"],
        ),
        (
            resource("{introspection: {}}"),
            ["introspection", "endpoint"],
        ),
        (
            introspection(("https://as/i", "http://as/i")),
            ["endpoint", "https://"],
        ),
        (
            introspection(("clientId: a, ", "")),
            ["introspection", "clientId"],
        ),
        (
            introspection(("issuer: 'https://as'", "issuer: ''")),
            ["issuer", "empty"],
        ),
        (
            introspection(("{none: {}}", "{password: {}}")),
            ["clientAuthentication", "password"],
        ),
        (
            introspection(("{none: {}}", "{privateKeyJwt: {keyFlie: /k}}")),
            ["clientAuthentication", "keyFlie"],
        ),
        (
            introspection(("{none: {}}", "{spiffeJwt: {}}")),
            ["spec.introspection.clientAuthentication", "privateKeyJwt"],
        ),
        (
            introspection(("30s", "2h")),
            ["spec.introspection.cache", "3600s"],
        ),
        (
            introspection(("5s", "1m")),
            ["spec.introspection.timeout", "30s"],
        ),
        (introspection(("30s", "0s")), ["cache", "1ms"]),
        (
            resource("{}") + &resource("{}").replace("name: p,", "name: q,"),
            ["spec.selector", "ProtectedResource shop/p"],
        ),
        (
            resource("{}").replace(
                "metadata: {",
                "metadata: {annotations: {istio.io/dry-run: 'true'}, ",
            ),
            ["istio.io/dry-run", "ALLOW or DENY"],
        ),
    ] {
        let error = load(&text).expect_err(&text);
        let lacking = parts.iter().find(|part| !error.contains(**part));
        wrong.extend(lacking.map(|part| format!("{error:?} lacks {part:?} for {text}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_narrowest_protected_resource_counts() {
    let resource = |name: &str, namespace: &str, spec: &str| {
        ours("ProtectedResource", spec)
            .replace("name: p,", &format!("name: {name},"))
            .replace("namespace: shop", &format!("namespace: {namespace}"))
    };
    let web = "{selector: {matchLabels: {app: web}}}";
    let mesh = resource("m", "istio-system", "{}");
    let own = resource("n", "shop", "{}");
    let named = |text: &str| {
        let set = load(text).expect("loads");
        let selected = super::select(&set);
        selected
            .resource()
            .map(|resource| resource.policy.to_string())
    };
    let is = |name: &str| Some(format!("ProtectedResource {name}"));
    assert_eq!(named(&resource("o", "other", "{}")), None);
    assert_eq!(named(&mesh), is("istio-system/m"));
    assert_eq!(named(&(mesh.clone() + &own)), is("shop/n"));
    assert_eq!(
        named(&(mesh + &own + &resource("z", "shop", web))),
        is("shop/z")
    );
}
