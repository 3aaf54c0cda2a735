//! What the agent asks of the API server, which is what `config/kubernetes` allows it: a
//! test holds both to be the same.

use kube::Client;
use serde_json::{Value, json};

use super::{Report, Scope, cluster::limited};
use crate::config::Config;

/// Something that the agent asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Right {
    pub group: &'static str,
    /// With its subresource.
    pub resources: &'static [&'static str],
    pub verbs: &'static [&'static str],
    /// In the agent's own namespace alone.
    pub own: bool,
    when: When,
    /// What is lost without.
    lost: &'static str,
}

/// With which configuration it asks.
#[derive(Clone, Copy, Debug)]
enum When {
    Always,
    Istio,
    StartupTaint,
}

const WATCHED: &[&str] = &["list", "watch"];
const ISTIO: &str = "security.istio.io";
const OURS: &str = "postern.dev";
const UNTOLD: &str = "it is not told whether they are in force";

const RIGHTS: [Right; 12] = [
    right(
        "",
        &["pods"],
        WATCHED,
        "no pod is known, and none is in the mesh",
    ),
    right(
        "",
        &["services"],
        WATCHED,
        "Services' addresses are not known",
    ),
    right(
        "",
        &["namespaces"],
        WATCHED,
        "labels of namespaces do not enrol",
    ),
    right(
        "",
        &["nodes"],
        WATCHED,
        "ranges of pods' addresses and zones are not known",
    ),
    Right {
        when: When::StartupTaint,
        ..right(
            "",
            &["nodes"],
            &["patch"],
            "the startup taint stays on nodes",
        )
    },
    right(
        "discovery.k8s.io",
        &["endpointslices"],
        WATCHED,
        "Services have no endpoints",
    ),
    Right {
        when: When::Istio,
        ..right(
            ISTIO,
            &[
                "authorizationpolicies",
                "peerauthentications",
                "requestauthentications",
            ],
            WATCHED,
            "no agent is ready: they may be there, and do not hold",
        )
    },
    Right {
        when: When::Istio,
        ..right(
            ISTIO,
            &[
                "authorizationpolicies/status",
                "peerauthentications/status",
                "requestauthentications/status",
            ],
            &["patch"],
            UNTOLD,
        )
    },
    right(
        OURS,
        &[
            "connectpolicies",
            "outboundtokens",
            "protectedresources",
            "tokenbindings",
        ],
        WATCHED,
        "no agent is ready: they may be there, and do not hold",
    ),
    right(
        OURS,
        &[
            "connectpolicies/status",
            "outboundtokens/status",
            "protectedresources/status",
            "tokenbindings/status",
        ],
        &["patch"],
        UNTOLD,
    ),
    right(
        "events.k8s.io",
        &["events"],
        &["create", "patch"],
        "nobody is told of pods that are not enrolled",
    ),
    Right {
        own: true,
        ..right(
            "coordination.k8s.io",
            &["leases"],
            &["get", "list", "create", "patch", "update"],
            "it is not told which policies are in force, nor on how many nodes",
        )
    },
];

/// One that is always asked for, everywhere.
const fn right(
    group: &'static str,
    resources: &'static [&'static str],
    verbs: &'static [&'static str],
    lost: &'static str,
) -> Right {
    Right {
        group,
        resources,
        verbs,
        own: false,
        when: When::Always,
        lost,
    }
}

/// All that an agent of this configuration asks for.
pub(super) fn asked(config: &Config) -> impl Iterator<Item = Right> {
    let (istio, taint) = (
        config.kubernetes.istio,
        config.kubernetes.startup_taint.is_some(),
    );
    RIGHTS.into_iter().filter(move |right| match right.when {
        When::Always => true,
        When::Istio => istio,
        When::StartupTaint => taint,
    })
}

/// `namespace`: the asker's own.
pub(super) async fn examine(
    client: &Client,
    namespace: &str,
    config: &Config,
    scope: &Scope<'_>,
    report: &mut Report,
) {
    let mut denied = 0;
    let account = match scope.service_account.map(|a| (a, a.split_once('/'))) {
        None => None,
        Some((_, Some(account))) => Some(account),
        Some((given, None)) => {
            report.fail(
                format!("--service-account {given} is not NAMESPACE/NAME"),
                "what the agent may ask is not known",
                "name it as in postern-system/postern-agent",
            );
            return;
        }
    };
    let own = account.map_or(namespace, |(namespace, _)| namespace);
    for right in asked(config) {
        let namespace = if right.own { own } else { "" };
        for (resource, verb) in each(right) {
            let what = match right.group {
                "" => format!("{verb} {resource}"),
                group => format!("{verb} {resource}.{group}"),
            };
            let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
            let attributes = json!({
                "group": right.group, "resource": resource, "subresource": subresource,
                "verb": verb, "namespace": namespace,
            });
            match allowed(client, account, attributes).await {
                Ok(true) => {}
                Ok(false) => {
                    denied += 1;
                    let (kind, at) = match right.own {
                        true => ("Role", format!(" in {own}")),
                        false => ("ClusterRole", String::new()),
                    };
                    report.fail(
                        format!("not allowed: {what}{at}"),
                        format!("without it: {}", right.lost),
                        format!("apply config/kubernetes as it is: {kind} postern-agent"),
                    );
                }
                Err(error) => {
                    report.fail(
                        format!("rights cannot be asked for: {error}"),
                        "what the agent may ask is not known",
                        "let the asker create SelfSubjectAccessReviews, or with \
                         --service-account SubjectAccessReviews",
                    );
                    return;
                }
            }
        }
    }
    if denied == 0 {
        let who = scope.service_account.unwrap_or("the asker");
        report.ok(
            format!("{who} may do all that the agent asks for"),
            "it asks for nothing else",
        );
    }
}

/// Resource and verb, one by one.
pub(super) fn each(right: Right) -> impl Iterator<Item = (&'static str, &'static str)> {
    let (resources, verbs) = (right.resources, right.verbs);
    let all = resources.iter();
    all.flat_map(move |resource| verbs.iter().map(move |verb| (*resource, *verb)))
}

async fn allowed(
    client: &Client,
    account: Option<(&str, &str)>,
    attributes: Value,
) -> Result<bool, String> {
    let (kind, mut spec) = ("AccessReview", json!({"resourceAttributes": attributes}));
    let (prefix, path) = match account {
        None => ("SelfSubject", "selfsubjectaccessreviews"),
        Some((namespace, name)) => {
            spec["user"] = format!("system:serviceaccount:{namespace}:{name}").into();
            spec["groups"] = json!([
                "system:serviceaccounts",
                format!("system:serviceaccounts:{namespace}"),
                "system:authenticated",
            ]);
            ("Subject", "subjectaccessreviews")
        }
    };
    let body = json!({
        "apiVersion": "authorization.k8s.io/v1", "kind": format!("{prefix}{kind}"), "spec": spec,
    });
    let request = http::Request::post(format!("/apis/authorization.k8s.io/v1/{path}"))
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(body.to_string().into_bytes())
        .map_err(|e| e.to_string())?;
    let answer: Value = limited(client.request(request)).await?;
    Ok(answer["status"]["allowed"] == true)
}
