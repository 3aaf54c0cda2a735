//! Joins what getting tokens for pods takes: identities, the audit log, metrics.

use std::{sync::Arc, time::Duration};

use crate::{
    audit::{Audit, GrantRecord, OutboundRecord, Record},
    fetch::Trust,
    lifecycle::Watcher,
    oauth::{Report, Subject, TokenClient},
    proxy::{Identities, Proxy, describe},
    telemetry::{GrantLabels, Metrics},
};

pub fn client(
    trust: Trust,
    identities: &Arc<Identities>,
    audit: &Audit,
    metrics: &Metrics,
) -> TokenClient {
    let identities = identities.clone();
    let (audit, grants) = (audit.clone(), metrics.grants.clone());
    TokenClient::new(
        trust,
        Box::new(move |id, audience| {
            let identities = identities.clone();
            Box::pin(async move { identities.jwt_svid(&id, &audience).await })
        }),
        Box::new(move |report| {
            let grant = report.call.wanted.grant_name();
            let result = match &report.result {
                Ok(_) => "granted",
                Err(error) => {
                    let object = &report.call.wanted.object;
                    let workload = &report.call.credentials.id;
                    tracing::warn!(object, %workload, %error, "no token");
                    "failed"
                }
            };
            grants.get_or_create(&GrantLabels { grant, result }).inc();
            audit.record(Record::Token(Box::new(record(report))));
        }),
    )
}

fn record(report: &Report<'_>) -> GrantRecord {
    let call = report.call;
    let on_behalf_of = match &call.subject {
        Subject::Token { name, .. } => name.clone(),
        Subject::None | Subject::Pod(..) => None,
    };
    GrantRecord {
        identity: call.credentials.id.clone(),
        what: OutboundRecord {
            on_behalf_of,
            error: report.result.as_ref().err().map(ToString::to_string),
            ..describe(&call.wanted)
        },
        client_authentication: (call.wanted.server.as_ref())
            .map(|_| call.wanted.authentication.name()),
        trace: call.trace.as_ref().map(|trace| trace.id.to_string()),
        duration_ms: report.took.as_millis() as u64,
        lifetime: report.result.as_ref().ok().map(Duration::as_secs),
    }
}

/// Wipes tokens whose time is over.
pub async fn sweep(proxy: Arc<Proxy>, stop: Watcher) {
    const PAUSE: Duration = Duration::from_secs(15);
    loop {
        tokio::select! {
            () = tokio::time::sleep(PAUSE) => {}
            () = stop.triggered() => return,
        }
        proxy.tokens.sweep();
        for pod in &proxy.pods.load().all {
            pod.behalf.sweep();
        }
    }
}
