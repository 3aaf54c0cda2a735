//! Providers that are asked over HTTP/1.1 with the request's own head: 200 allows,
//! 5xx is no decision, any other answer is the client's.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};

use super::{
    Check, CheckError, Decision,
    config::HttpProvider,
    headers::{Editor, Pattern, framing},
};
use crate::request::{Edits, Reply, Request};

/// Largest body of a denial, bytes.
const MAX_BODY: usize = 64 << 10;
/// Idle connections that are kept, and for how long.
const IDLE: usize = 32;
const IDLE_TIME: Duration = Duration::from_secs(30);
/// Names of headers that a provider wants removed of an allowed request (Envoy).
const TO_REMOVE: HeaderName = HeaderName::from_static("x-envoy-auth-headers-to-remove");

#[derive(Debug)]
pub struct Client {
    client: legacy::Client<HttpConnector, Empty<Bytes>>,
    provider: HttpProvider,
    base: String,
}

impl Client {
    pub fn new(provider: HttpProvider) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let client = legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIME)
            .pool_max_idle_per_host(IDLE)
            .build(connector);
        let authority = provider.service.authority(provider.port);
        let prefix = provider.path_prefix.as_ref().map_or("", |p| p.as_str());
        let base = format!("http://{authority}{prefix}");
        Self {
            client,
            provider,
            base,
        }
    }

    pub async fn check(&self, call: &Check<'_>) -> Result<Decision, CheckError> {
        let Some(request) = call.request else {
            return Err(CheckError::Request(
                "it is raw TCP, and the provider takes HTTP",
            ));
        };
        let question = self.question(request)?;
        let answer = self.client.request(question).await.map_err(|error| {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            CheckError::Unreachable(cause.unwrap_or_else(|| error.to_string()))
        })?;
        let (head, body) = answer.into_parts();
        if head.status == StatusCode::OK {
            return self.permission(&head.headers, request).map(Decision::Allow);
        }
        if head.status.is_server_error() || head.status.is_informational() {
            return Err(CheckError::Status(head.status));
        }
        // A denial stands without a body that is too large or cannot be read.
        let body = match Limited::new(body, MAX_BODY).collect().await {
            Ok(body) => String::from_utf8(body.to_bytes().into()).ok(),
            Err(_) => None,
        };
        Ok(Decision::Deny(self.denial(
            head.status,
            &head.headers,
            body,
        )))
    }

    fn question(&self, request: &Request<'_>) -> Result<http::Request<Empty<Bytes>>, CheckError> {
        let method = Method::from_bytes(request.method.as_bytes())
            .map_err(|_e| CheckError::Request("its method is none"))?;
        if method == Method::CONNECT || !request.path.starts_with('/') {
            return Err(CheckError::Request("it has no path"));
        }
        // What is asked about must be what the application would get.
        let uri = Uri::try_from(format!("{}{}", self.base, request.path))
            .ok()
            .filter(|uri| {
                let asked = uri.path_and_query();
                asked.is_some_and(|asked| asked.as_str().ends_with(request.path))
            })
            .ok_or(CheckError::Request("its path is none"))?;
        let mut question = http::Request::new(Empty::new());
        *question.method_mut() = method;
        *question.uri_mut() = uri;
        let headers = question.headers_mut();
        let wanted = &self.provider.include_request_headers_in_check;
        for (name, value) in &request.headers {
            let always = **name == header::AUTHORIZATION;
            if (always || matches(wanted, name)) && !framing(name) {
                headers.append((*name).clone(), (*value).clone());
            }
        }
        for (name, value) in &self.provider.include_additional_headers_in_check.0 {
            headers.insert(name, value.clone());
        }
        let host = HeaderValue::try_from(request.host)
            .map_err(|_e| CheckError::Request("its host is none"))?;
        headers.insert(header::HOST, host);
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
        Ok(question)
    }

    fn permission(&self, answer: &HeaderMap, request: &Request<'_>) -> Result<Edits, CheckError> {
        let mut editor = Editor::new(Some(request));
        let wanted = &self.provider.headers_to_upstream_on_allow;
        for name in answer.keys() {
            if !matches(wanted, name) || framing(name) || *name == TO_REMOVE {
                continue;
            }
            let mut values = answer.get_all(name).iter();
            if let Some(first) = values.next() {
                editor.set(name.clone(), first.clone());
            }
            for value in values {
                editor.append(name.clone(), value.clone());
            }
        }
        for value in answer.get_all(&TO_REMOVE) {
            let names = value.to_str().unwrap_or("?");
            for name in names.split(',').map(str::trim) {
                if name.is_empty() || name.starts_with(':') {
                    continue;
                }
                match HeaderName::try_from(name) {
                    Ok(name) => editor.remove(name),
                    Err(_) => return Err(CheckError::Answer(format!("{TO_REMOVE}: {names}"))),
                }
            }
        }
        Ok(editor.finish())
    }

    fn denial(&self, status: StatusCode, answer: &HeaderMap, body: Option<String>) -> Reply {
        let listed = &self.provider.headers_to_downstream_on_deny;
        let gone = body.is_none();
        let mut reply = Reply::new(status, body.unwrap_or_default());
        reply.headers = answer
            .iter()
            .filter(|(name, _)| {
                let always = **name == header::LOCATION || **name == header::WWW_AUTHENTICATE;
                let chosen = listed.is_empty() || always || matches(listed, name);
                // They tell of a body that is not sent.
                let of_body = **name == header::CONTENT_ENCODING || **name == header::CONTENT_TYPE;
                chosen && !framing(name) && !(gone && of_body)
            })
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        reply
    }
}

fn matches(patterns: &[Pattern], name: &HeaderName) -> bool {
    patterns.iter().any(|pattern| pattern.matches(name))
}
