//! Providers of `envoy.service.auth.v3.Authorization`, asked over one HTTP/2
//! connection that is opened at the first check and reopened when it breaks.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::OnceLock,
    time::{Duration, SystemTime},
};

use http::{HeaderName, HeaderValue, StatusCode, header, uri::PathAndQuery};
use tonic::{
    client::Grpc,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

use super::{
    Check, CheckError, Decision,
    config::GrpcProvider,
    headers::{Editor, framing},
    proto::{
        Address, AttributeContext, AttributeRequest, CheckRequest, CheckResponse,
        DeniedHttpResponse, HeaderField, HttpRequest, OkHttpResponse, Peer, SocketAddress,
        Timestamp, TlsSession,
    },
};
use crate::request::{Edits, Reply, Request};

const CHECK: &str = "/envoy.service.auth.v3.Authorization/Check";
/// Largest answer, bytes: a refusal may bring a page.
const MAX_ANSWER: usize = 256 << 10;
/// How soon a provider that is gone without a word is noticed.
const PING: Duration = Duration::from_secs(10);

pub struct Client {
    endpoint: Endpoint,
    /// Opened under the runtime that asks first.
    channel: OnceLock<Channel>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "grpc::Client({})", self.endpoint.uri())
    }
}

impl Client {
    pub fn new(provider: &GrpcProvider) -> Self {
        let authority = provider.service.authority(provider.port);
        let endpoint = Endpoint::from_shared(format!("http://{authority}"))
            .expect("host and port make an authority")
            .connect_timeout(provider.timeout.0)
            .http2_keep_alive_interval(PING)
            .keep_alive_timeout(PING)
            .http2_max_header_list_size(64 << 10)
            .tcp_nodelay(true);
        Self {
            endpoint,
            channel: OnceLock::new(),
        }
    }

    pub async fn check(&self, call: &Check<'_>) -> Result<Decision, CheckError> {
        let channel = self.channel.get_or_init(|| self.endpoint.connect_lazy());
        let mut grpc = Grpc::new(channel.clone()).max_decoding_message_size(MAX_ANSWER);
        let unreachable = |error: &dyn std::error::Error| {
            let mut text = error.to_string();
            let mut cause = error.source();
            while let Some(error) = cause {
                text = error.to_string();
                cause = error.source();
            }
            CheckError::Unreachable(text)
        };
        grpc.ready().await.map_err(|e| unreachable(&e))?;
        let path = PathAndQuery::from_static(CHECK);
        let codec: ProstCodec<CheckRequest, CheckResponse> = ProstCodec::default();
        let answer = grpc
            .unary(tonic::Request::new(question(call)), path, codec)
            .await
            .map_err(|status| {
                let code = status.code();
                CheckError::Unreachable(format!("{code:?}: {}", status.message()))
            })?;
        decide(answer.into_inner(), call.request)
    }
}

fn question(call: &Check<'_>) -> CheckRequest {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let attributes = AttributeContext {
        source: Some(peer(call.source, &call.source_principal)),
        destination: Some(peer(call.destination, &call.destination_principal)),
        request: call.request.map(|request| AttributeRequest {
            time: Some(Timestamp {
                seconds: now.as_secs() as i64,
                nanos: now.subsec_nanos() as i32,
            }),
            http: Some(http_request(request)),
        }),
        tls_session: call.sni.clone().map(|sni| TlsSession { sni }),
    };
    CheckRequest {
        attributes: Some(attributes),
    }
}

fn peer(address: SocketAddr, principal: &Option<String>) -> Peer {
    let socket_address = SocketAddress {
        address: address.ip().to_canonical().to_string(),
        port_value: Some(address.port().into()),
    };
    Peer {
        address: Some(Address {
            socket_address: Some(socket_address),
        }),
        principal: principal.clone().unwrap_or_default(),
    }
}

fn http_request(request: &Request<'_>) -> HttpRequest {
    const SCHEME: &str = "http";
    // As Envoy: pseudo-headers among them, repeated ones joined.
    let mut headers = HashMap::from(
        [
            (":authority", request.host),
            (":method", request.method),
            (":path", request.path),
            (":scheme", SCHEME),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned())),
    );
    for (name, _) in &request.headers {
        if headers.contains_key(name.as_str()) {
            continue;
        }
        if let Some(value) = request.header(name) {
            headers.insert(name.as_str().to_owned(), value.into_owned());
        }
    }
    let text = |name: &HeaderName| request.header(name).map(|value| value.into_owned());
    HttpRequest {
        id: text(&HeaderName::from_static("x-request-id")).unwrap_or_default(),
        method: request.method.to_owned(),
        headers,
        path: request.path.to_owned(),
        host: request.host.to_owned(),
        scheme: SCHEME.to_owned(),
        // -1: not known.
        size: text(&header::CONTENT_LENGTH)
            .and_then(|length| length.parse().ok())
            .unwrap_or(-1),
        // What the connection speaks is not told of a request.
        protocol: String::new(),
    }
}

/// Permission takes a status of OK, no word of denial, and no change that cannot be
/// made. An answer that says nothing at all is no permission, unlike in Envoy.
fn decide(answer: CheckResponse, request: Option<&Request<'_>>) -> Result<Decision, CheckError> {
    let ok = answer.status.as_ref().is_none_or(|status| status.code == 0);
    match (ok, answer.denied_response, answer.ok_response) {
        (_, Some(denied), _) => Ok(Decision::Deny(denial(denied))),
        (false, None, _) => Ok(Decision::Deny(Reply::new(StatusCode::FORBIDDEN, ""))),
        (true, None, Some(allowed)) => permission(allowed, request).map(Decision::Allow),
        (true, None, None) if answer.status.is_some() => Ok(Decision::Allow(Edits::default())),
        (true, None, None) => Err(CheckError::Answer("it has no status".into())),
    }
}

fn denial(denied: DeniedHttpResponse) -> Reply {
    // Below 200 no answer is final (RFC 9110 15.2).
    let status = denied
        .status
        .and_then(|status| StatusCode::from_u16(status.code.try_into().ok()?).ok())
        .filter(|status| (200..600).contains(&status.as_u16()))
        .unwrap_or(StatusCode::FORBIDDEN);
    let mut reply = Reply::new(status, denied.body);
    // What cannot be sent is left out: the denial stands without it.
    reply.headers = denied
        .headers
        .into_iter()
        .filter_map(|option| parse(option.header?).ok())
        .collect();
    reply
}

fn permission(allowed: OkHttpResponse, request: Option<&Request<'_>>) -> Result<Edits, CheckError> {
    if !allowed.query_parameters_to_set.is_empty() || !allowed.query_parameters_to_remove.is_empty()
    {
        return Err(CheckError::Answer(
            "query parameters cannot be changed".into(),
        ));
    }
    if !allowed.response_headers_to_add.is_empty() {
        tracing::debug!("response_headers_to_add of an extension provider are left out");
    }
    let mut editor = Editor::new(request);
    for option in allowed.headers {
        let append = option.append == Some(true);
        let Some(field) = option.header else {
            return Err(CheckError::Answer("a header without name and value".into()));
        };
        let (name, value) = parse(field)?;
        // HeaderAppendAction; its default is the older field's, which is "replace".
        match option.append_action {
            _ if append => editor.append(name, value),
            1 if editor.has(&name) => {}
            3 if !editor.has(&name) => {}
            0..=3 => editor.set(name, value),
            action => return Err(CheckError::Answer(format!("append_action {action}"))),
        }
    }
    for name in &allowed.headers_to_remove {
        // Pseudo-headers stay (OkHttpResponse.headers_to_remove).
        if !name.starts_with(':') {
            editor.remove(header_name(name)?);
        }
    }
    Ok(editor.finish())
}

fn header_name(name: &str) -> Result<HeaderName, CheckError> {
    HeaderName::try_from(name)
        .map_err(|_e| CheckError::Answer(format!("`{}` is no header name", name.escape_debug())))
}

fn parse(field: HeaderField) -> Result<(HeaderName, HeaderValue), CheckError> {
    let name = header_name(&field.key)?;
    if framing(&name) {
        return Err(CheckError::Answer(format!("`{name}` cannot be set")));
    }
    let bytes = if field.raw_value.is_empty() {
        field.value.into_bytes()
    } else {
        field.raw_value
    };
    match HeaderValue::from_maybe_shared(bytes::Bytes::from(bytes)) {
        Ok(value) => Ok((name, value)),
        Err(_) => Err(CheckError::Answer(format!("the value of `{name}`"))),
    }
}
