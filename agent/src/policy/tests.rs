//! Tables of policies, facts and verdicts.

use std::path::Path;

mod outbound;
mod partial;
mod refused;
mod requests;

use super::*;
use crate::{identity::TrustDomain, objects::load_text};

fn load(text: &str) -> Result<PolicySet, String> {
    load_with(text, Reading::default())
}

fn load_with(text: &str, requests: Reading) -> Result<PolicySet, String> {
    let domain = TrustDomain::try_from("prod.example".to_owned()).expect("valid");
    let alias = TrustDomain::try_from("old.example".to_owned()).expect("valid");
    let objects = load_text(Path::new("p.yaml"), text).map_err(|e| e.to_string())?;
    let mesh = Mesh {
        root_namespace: "istio-system",
        trust_domain: &domain,
        aliases: &[alias],
        secrets: Path::new("/secrets"),
        requests,
    };
    let set = PolicySet::compile(objects, &mesh).map_err(|all| all[0].to_string())?;
    crate::crds::tests::takes(text);
    Ok(set)
}

/// The policies of a pod `app: web` in namespace `shop`, behind the service `front`.
fn select(set: &PolicySet) -> Selected {
    set.select(&Subject {
        namespace: "shop".into(),
        labels: [("app".to_owned(), "web".to_owned())].into(),
        services: vec!["front".into()],
    })
}

fn policy(namespace: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: {namespace}}}\nspec: {spec}\n"
    )
}

fn peer(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
    )
}

/// A connection to port 80 of that pod.
fn facts(source: Option<&str>, ip: &str) -> Facts {
    let source = source.map(|s| s.parse().expect("SPIFFE ID"));
    let ip = ip.parse().expect("address");
    Facts::new(source, ip, "10.9.9.9:80".parse().expect("address"))
}

const CART: Option<&str> = Some("spiffe://prod.example/ns/shop/sa/cart");

fn allowed(text: &str, source: Option<&str>, ip: &str) -> bool {
    let set = load(text).unwrap_or_else(|e| panic!("{text}: {e}"));
    matches!(select(&set).opaque(&facts(source, ip)), Verdict::Allow(_))
}

/// Renaming one must not change what is asked of tokens.
#[test]
fn two_resources_of_one_level_let_no_request_pass() {
    let one = |name: &str, selector: &str| {
        format!(
            "apiVersion: postern.dev/v1alpha1\nkind: ProtectedResource\n\
             metadata: {{name: {name}, namespace: shop}}\nspec: {{{selector}}}\n---\n"
        )
    };
    let web = one(
        "strict",
        "selector: {matchLabels: {app: web}}, tokens: {type: at+jwt}",
    );
    let tier = one("lax", "selector: {matchLabels: {tier: front}}");
    let whole = one("whole", "");
    for (text, passes) in [(web.clone() + &whole, true), (web + &tier + &whole, false)] {
        let set = load(&text).expect("they load");
        let labels = [("app", "web"), ("tier", "front")];
        let selected = set.select(&Subject {
            namespace: "shop".into(),
            labels: labels.map(|(k, v)| (k.into(), v.into())).into(),
            ..Subject::default()
        });
        let contested = selected.contested();
        assert_eq!(contested.is_ok(), passes, "{contested:?}");
    }
}

#[test]
fn the_shipped_examples_load() {
    let mut text = include_str!("../../../config/policies/example.yaml").to_owned();
    text += "\n---\n";
    text += include_str!("../../../config/policies/requests.yaml");
    text += "\n---\n";
    text += include_str!("../../../config/policies/resource.yaml");
    text += "\n---\n";
    text += include_str!("../../../config/policies/outbound.yaml");
    assert_eq!(load(&text).expect("they load").len(), 10);
}

#[test]
fn every_field_and_its_not_form() {
    let from = |source: &str| {
        policy(
            "shop",
            &format!("{{rules: [{{from: [{{source: {source}}}]}}]}}"),
        )
    };
    let to = |op: &str| {
        policy(
            "shop",
            &format!("{{rules: [{{to: [{{operation: {op}}}]}}]}}"),
        )
    };
    for (text, expected) in [
        (from("{principals: [prod.example/ns/shop/sa/cart]}"), true),
        (from("{principals: [prod.example/ns/shop/sa/car]}"), false),
        (from("{principals: [cluster.local/ns/shop/sa/cart]}"), true),
        (from("{principals: [old.example/ns/shop/sa/cart]}"), true),
        (from("{principals: [else.example/ns/shop/sa/cart]}"), false),
        (
            from("{principals: ['spiffe://prod.example/ns/shop/sa/cart']}"),
            false,
        ),
        (from("{principals: ['prod.example/ns/shop/*']}"), true),
        (from("{principals: ['*/sa/cart']}"), true),
        (from("{principals: ['*']}"), true),
        (from("{notPrincipals: ['*/sa/cart']}"), false),
        (from("{notPrincipals: ['*/sa/other']}"), true),
        (from("{namespaces: [shop]}"), true),
        (from("{namespaces: [sho]}"), false),
        (from("{namespaces: ['sh*', other]}"), true),
        (from("{notNamespaces: [shop]}"), false),
        (from("{serviceAccounts: [cart]}"), true),
        (from("{serviceAccounts: [shop/cart]}"), true),
        (from("{serviceAccounts: [other/cart]}"), false),
        (from("{notServiceAccounts: [cart]}"), false),
        (from("{ipBlocks: [10.0.0.0/8]}"), true),
        (from("{ipBlocks: [10.1.2.3]}"), true),
        (from("{ipBlocks: [10.1.2.4, 'fd00::/8']}"), false),
        (from("{notIpBlocks: [10.1.0.0/16]}"), false),
        (from("{namespaces: [shop], ipBlocks: [11.0.0.0/8]}"), false),
        (to("{ports: ['80']}"), true),
        (to("{ports: ['8080']}"), false),
        (to("{notPorts: ['80']}"), false),
        (policy("shop", "{}"), false),
        (policy("shop", "{rules: [{}]}"), true),
        (
            policy("shop", "{selector: {matchLabels: {app: web}}, rules: []}"),
            false,
        ),
        (
            policy("shop", "{selector: {matchLabels: {app: db}}, rules: []}"),
            true,
        ),
        (policy("other", "{}"), true),
        (policy("istio-system", "{}"), false),
        (
            policy("istio-system", "{selector: {matchLabels: {app: web}}}"),
            false,
        ),
    ] {
        assert_eq!(allowed(&text, CART, "10.1.2.3"), expected, "{text}");
    }
}

#[test]
fn plaintext_fails_positive_and_passes_negative_matches() {
    let allow_any = policy("shop", "{rules: [{from: [{source: {principals: ['*']}}]}]}");
    assert!(!allowed(&allow_any, None, "10.1.2.3"));
    let deny_plain = policy(
        "shop",
        "{action: DENY, rules: [{from: [{source: {notPrincipals: ['*']}}]}]}",
    );
    assert!(!allowed(&deny_plain, None, "10.1.2.3"));
    assert!(allowed(&deny_plain, CART, "10.1.2.3"));
}

#[test]
fn deny_comes_before_allow_and_the_verdict_names_the_rule() {
    let text = policy("shop", "{rules: [{}]}")
        + &policy(
            "istio-system",
            "{action: DENY, rules: [{to: [{operation: {ports: ['1']}}]}, {from: [{source: {namespaces: [shop]}}]}]}",
        );
    let set = load(&text).expect("loads");
    let Verdict::Deny(denial) = select(&set).opaque(&facts(CART, "10.0.0.1")) else {
        panic!("allowed")
    };
    assert_eq!(
        denial.to_string(),
        "denied by AuthorizationPolicy istio-system/p rule 1"
    );
}

#[test]
fn the_narrowest_peer_authentication_decides() {
    let strict = "{mtls: {mode: STRICT}}";
    let web = "selector: {matchLabels: {app: web}}";
    for (text, expected) in [
        (String::new(), true),
        (peer("istio-system", "m", strict), false),
        (
            peer("istio-system", "m", strict) + &peer("shop", "n", "{mtls: {mode: PERMISSIVE}}"),
            true,
        ),
        (
            peer("istio-system", "m", strict) + &peer("shop", "n", "{mtls: {mode: DISABLE}}"),
            true,
        ),
        (
            peer("istio-system", "m", strict) + &peer("shop", "n", "{}"),
            false,
        ),
        (
            peer("shop", "n", strict)
                + &peer(
                    "shop",
                    "w",
                    &format!("{{{web}, mtls: {{mode: PERMISSIVE}}}}"),
                ),
            true,
        ),
        (
            peer(
                "shop",
                "w",
                &format!(
                    "{{{web}, mtls: {{mode: STRICT}}, portLevelMtls: {{80: {{mode: DISABLE}}}}}}"
                ),
            ),
            true,
        ),
        (
            peer(
                "shop",
                "w",
                &format!("{{{web}, portLevelMtls: {{'80': {{mode: STRICT}}}}}}"),
            ),
            false,
        ),
        (
            peer(
                "shop",
                "w",
                &format!("{{{web}, portLevelMtls: {{81: {{mode: STRICT}}}}}}"),
            ),
            true,
        ),
        (
            peer("shop", "n", strict)
                + &peer(
                    "shop",
                    "w",
                    &format!("{{{web}, portLevelMtls: {{80: {{mode: UNSET}}}}}}"),
                ),
            false,
        ),
        (
            peer(
                "istio-system",
                "m",
                &format!("{{{web}, mtls: {{mode: STRICT}}}}"),
            ),
            true,
        ),
        (peer("other", "n", strict), true),
    ] {
        assert_eq!(allowed(&text, None, "10.0.0.1"), expected, "{text}");
        assert!(allowed(&text, CART, "10.0.0.1"), "{text}");
    }
}
