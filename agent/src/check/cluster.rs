//! The cluster: whether its API server answers, lets the agent ask what it asks, and knows
//! the kinds of policies; and what else it runs.

use std::time::{Duration, SystemTime};

use k8s_openapi::api::{apps::v1::DaemonSet, core::v1::ConfigMap};
use kube::{
    Api, Client,
    api::ListParams,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::Value;

use super::{Report, Scope, rights};
use crate::{config::Config, fetch::causes, kubernetes};

const LIMIT: Duration = Duration::from_secs(5);
/// From where on a clock is wrong, and from where on nothing works.
const SKEW: Duration = Duration::from_secs(30);
const BROKEN: Duration = Duration::from_secs(300);
/// Oldest that is supported: EndpointSlices with zones, bound tokens.
const OLDEST: (u32, u32) = (1, 27);

const KINDS: [&str; 4] = [
    "connectpolicies",
    "tokenbindings",
    "protectedresources",
    "outboundtokens",
];

pub async fn examine(config: &Config, scope: &Scope<'_>, report: &mut Report) {
    let why = "pods, Services and policies come from it";
    let (client, namespace) = match connect(config, scope).await {
        Ok(connected) => connected,
        Err(error) => {
            report.fail(
                format!("no way to the API server: {error}"),
                why,
                "name a kubeconfig, or run in a pod with a service account",
            );
            return;
        }
    };
    match ask(&client, "/version").await {
        Ok(version) => reached(&version, report),
        Err(error) => {
            report.fail(
                format!("the API server does not answer: {error}"),
                why,
                "see that this host reaches it, and that the credentials are good",
            );
            return;
        }
    }
    clock(&client, report).await;
    rights::examine(&client, &namespace, config, scope, report).await;
    definitions(&client, report).await;
    neighbours(&client, report).await;
}

/// A client, and the namespace that it lives in. Without a file that was named for this,
/// as the agent itself has it.
async fn connect(config: &Config, scope: &Scope<'_>) -> Result<(Client, String), String> {
    let Some(path) = scope.kubeconfig else {
        let connected = kubernetes::connect(&config.kubernetes).await;
        return connected.map_err(|e| causes(&e));
    };
    let file = Kubeconfig::read_from(path).map_err(|e| causes(&e))?;
    let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
    let mut config = config.map_err(|e| causes(&e))?;
    config.connect_timeout = Some(LIMIT);
    config.read_timeout = Some(LIMIT);
    config.default_retry = false;
    let namespace = config.default_namespace.clone();
    let client = Client::try_from(config).map_err(|e| causes(&e))?;
    Ok((client, namespace))
}

pub(super) async fn limited<T>(
    question: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, String> {
    match tokio::time::timeout(LIMIT, question).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(kube::Error::Api(status))) => Err(format!("{} {}", status.code, status.message)),
        Ok(Err(error)) => Err(causes(&error)),
        Err(_elapsed) => Err(format!("no answer within {LIMIT:?}")),
    }
}

async fn ask(client: &Client, path: &str) -> Result<Value, String> {
    let request = http::Request::get(path).body(Vec::new());
    let request = request.map_err(|e| e.to_string())?;
    limited(client.request(request)).await
}

fn reached(version: &Value, report: &mut Report) {
    let number = |key: &str| {
        // "33+" with some vendors.
        let text = version[key].as_str().unwrap_or_default();
        text.trim_end_matches(|c: char| !c.is_ascii_digit())
            .parse::<u32>()
            .unwrap_or(0)
    };
    let found = (number("major"), number("minor"));
    let (what, why) = (
        format!("the API server answers: Kubernetes {}.{}", found.0, found.1),
        "pods, Services and policies come from it",
    );
    match found >= OLDEST {
        true => report.ok(what, why),
        false => report.warn(
            what,
            format!("{}.{} is the oldest that is tested", OLDEST.0, OLDEST.1),
            "upgrade the cluster",
        ),
    }
}

/// By the date of an answer: to the second, which is enough.
async fn clock(client: &Client, report: &mut Report) {
    let Ok(request) = http::Request::get("/version").body(kube::client::Body::empty()) else {
        return;
    };
    let sent = client.send(request);
    let Ok(Ok(answer)) = tokio::time::timeout(LIMIT, sent).await else {
        return;
    };
    let date = answer.headers().get(http::header::DATE);
    let date = date.and_then(|date| date.to_str().ok()).and_then(http_date);
    let Some(theirs) = date else { return };
    let now = SystemTime::now();
    let apart = now
        .duration_since(theirs)
        .unwrap_or_else(|early| early.duration());
    skew(apart, report);
}

pub(super) fn skew(apart: Duration, report: &mut Report) {
    let what = format!(
        "this clock and the API server's are {} s apart",
        apart.as_secs()
    );
    let why = "tokens and certificates are refused by those whose clock differs";
    let remedy = "synchronize both by NTP";
    match apart {
        _ if apart < SKEW => report.ok(what, why),
        _ if apart < BROKEN => report.warn(what, why, remedy),
        _ => report.fail(what, why, remedy),
    }
}

/// RFC 9110 5.6.7, the form that is sent.
pub(super) fn http_date(text: &str) -> Option<SystemTime> {
    const FORM: &[time::format_description::BorrowedFormatItem<'_>] = time::macros::format_description!(
        "[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT"
    );
    let parsed = time::PrimitiveDateTime::parse(text, FORM).ok()?;
    Some(parsed.assume_utc().into())
}

async fn definitions(client: &Client, report: &mut Report) {
    let names = |list: &Value| -> Vec<String> {
        let all = list["resources"].as_array().cloned().unwrap_or_default();
        let names = all
            .iter()
            .filter_map(|r| Some(r["name"].as_str()?.to_owned()));
        names.collect()
    };
    let why = "Postern's own policies are objects of these kinds";
    match ask(client, "/apis/postern.dev/v1alpha1").await {
        Ok(list) => {
            let there = names(&list);
            let missing: Vec<_> = KINDS
                .iter()
                .filter(|k| !there.iter().any(|t| t == *k))
                .collect();
            let no_status: Vec<_> = KINDS
                .iter()
                .filter(|k| there.iter().any(|t| t == *k))
                .filter(|k| !there.contains(&format!("{k}/status")))
                .collect();
            match (missing.is_empty(), no_status.is_empty()) {
                (true, true) => report.ok("the kinds of postern.dev/v1alpha1 are installed", why),
                (false, _) => report.fail(
                    format!("kinds of postern.dev/v1alpha1 are missing: {missing:?}"),
                    why,
                    "apply the CRDs of this version: `postern crds | kubectl apply -f -`",
                ),
                (true, false) => report.warn(
                    format!("kinds without a status: {no_status:?}"),
                    "whether a policy is in force is not written there",
                    "apply the CRDs of this version: `postern crds | kubectl apply -f -`",
                ),
            }
        }
        Err(error) => report.fail(
            format!("postern.dev/v1alpha1 is not there: {error}"),
            why,
            "apply the CRDs: `postern crds | kubectl apply -f -`",
        ),
    }
    match ask(client, "/apis/security.istio.io/v1").await {
        Ok(_list) => report.ok(
            "the kinds of security.istio.io/v1 are installed",
            "they hold in Postern as well",
        ),
        Err(_not_there) => report.warn(
            "security.istio.io/v1 is not there",
            "AuthorizationPolicy, PeerAuthentication and RequestAuthentication cannot be written",
            "apply Istio's CRDs if you want them; Istio itself is not needed",
        ),
    }
}

/// As far as the asker may look: who may not learns nothing here.
async fn neighbours(client: &Client, report: &mut Report) {
    let sets: Api<DaemonSet> = Api::all(client.clone());
    let list = limited(sets.list(&ListParams::default().limit(500))).await;
    let sets = list.map(|list| list.items).unwrap_or_default();
    let has = |name: &str| {
        sets.iter()
            .any(|s| s.metadata.name.as_deref() == Some(name))
    };
    if has("ztunnel") {
        report.warn(
            "Istio's ambient mode is in this cluster (DaemonSet ztunnel)",
            "a pod in both meshes would have its connections taken twice",
            "keep namespaces apart by their labels: `istio.io/dataplane-mode` and \
             `postern.dev/mesh`",
        );
    }
    if has("cilium") {
        let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "kube-system");
        let data = limited(maps.get("cilium-config"))
            .await
            .ok()
            .and_then(|map| map.data);
        let data = data.unwrap_or_default();
        let on = |key: &str| {
            data.get(key)
                .is_some_and(|value| value == "true" || value == "strict")
        };
        let balances = on("kube-proxy-replacement") || on("bpf-lb-sock");
        match balances && !on("bpf-lb-sock-hostns-only") {
            true => report.warn(
                "Cilium balances Services in pods' sockets",
                "it rewrites a Service's address in `connect` before Postern sees it",
                "set `socketLB.hostNamespaceOnly: true` in Cilium",
            ),
            false => report.ok("Cilium leaves pods' sockets alone", "hooks have an order"),
        }
    }
}
