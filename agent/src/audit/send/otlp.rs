//! OTLP logs, by gRPC or by HTTP with protobuf (OTLP specification 1.x).

mod answer;
mod attributes;
mod message;

use std::{io::Write as _, path::PathBuf, time::Duration};

use bytes::Bytes;
use flate2::{Compression as Level, write::GzEncoder};
use http::{HeaderMap, HeaderValue, Uri, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use opentelemetry_proto::tonic::collector::logs::v1::{
    ExportLogsServiceRequest, ExportLogsServiceResponse, logs_service_client::LogsServiceClient,
};
use prost::Message as _;
use tonic::{
    Request,
    codec::CompressionEncoding,
    metadata::{KeyAndValueRef, MetadataMap},
};

use self::message::Resource;
use super::{
    Cause,
    config::{Compression, Format, Headers, Otlp, Protocol, header},
    deliver::{Failure, Taken},
    follow::Entry,
    tls,
};
use crate::{identity::TrustDomain, oauth::private_file};

/// Largest answer, bytes.
const MAX_ANSWER: usize = 256 << 10;
/// How soon a receiver that is gone without a word is noticed.
const PING: Duration = Duration::from_secs(10);
const USER_AGENT: &str = concat!("postern/", env!("CARGO_PKG_VERSION"));

pub struct Exporter {
    resource: Resource,
    format: Format,
    headers: Headers,
    headers_file: Option<PathBuf>,
    timeout: Duration,
    client: Exchange,
}

enum Exchange {
    Grpc(Box<LogsServiceClient<Client<HttpsConnector<HttpConnector>, tonic::body::Body>>>),
    Http {
        client: Box<Client<HttpsConnector<HttpConnector>, Full<Bytes>>>,
        url: Uri,
        gzip: bool,
    },
}

impl Exporter {
    pub fn new(
        config: &Otlp,
        format: Format,
        node: &str,
        domain: &TrustDomain,
    ) -> Result<Self, Cause> {
        let exporter = Self {
            resource: Resource::new(node, domain),
            format,
            headers: config.headers.clone(),
            headers_file: config.headers_file.clone(),
            timeout: config.timeout.0,
            client: Exchange::new(config)?,
        };
        // A wrong file is told at the start.
        exporter.headers().map(|_headers| exporter)
    }

    pub async fn send(&mut self, entries: &[Entry]) -> Result<Taken, Failure> {
        let headers = self.headers().map_err(Failure::later)?;
        let request = self.resource.request(entries, self.format);
        let limit = self.timeout;
        let exchange = self.client.send(request, headers);
        match tokio::time::timeout(limit, exchange).await {
            Ok(result) => result,
            Err(_elapsed) => Err(Failure::later(format!("no answer within {limit:?}"))),
        }
    }

    /// The file is read each time: a token in it may be renewed.
    fn headers(&self) -> Result<HeaderMap, Cause> {
        let mut headers = self.headers.0.clone();
        let Some(path) = &self.headers_file else {
            return Ok(headers);
        };
        let wrong = |message: String| Cause::File {
            path: path.clone(),
            message,
        };
        let content = private_file(path).map_err(|e| wrong(e.to_string()))?;
        let text = std::str::from_utf8(&content).map_err(|_e| wrong("is not UTF-8".into()))?;
        let lines = text.lines().map(str::trim);
        for line in lines.filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let pair = line.split_once(':');
            let (name, value) = pair.ok_or_else(|| wrong("a line is no `name: value`".into()))?;
            let (name, mut value) = header(name.trim(), value.trim()).map_err(wrong)?;
            value.set_sensitive(true);
            headers.insert(name, value);
        }
        Ok(headers)
    }
}

impl Exchange {
    fn new(config: &Otlp) -> Result<Self, Cause> {
        let tls = tls::client(
            config.roots.as_deref(),
            config.certificate.as_deref(),
            config.key.as_deref(),
        )?;
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http();
        let mut builder = Client::builder(TokioExecutor::new());
        let gzip = config.compression == Compression::Gzip;
        let url = &config.endpoint.0;
        if config.protocol == Protocol::Http {
            let client = builder.build(connector.enable_http1().wrap_connector(tcp));
            let base = url.as_str().trim_end_matches('/');
            let whole = match base.strip_suffix("/v1/logs") {
                Some(_) => base.to_owned(),
                None => format!("{base}/v1/logs"),
            };
            let url = whole.parse().expect("a URL is a URI");
            let client = Box::new(client);
            return Ok(Self::Http { client, url, gzip });
        }
        let client = builder
            .timer(TokioTimer::new())
            .http2_only(true)
            .http2_keep_alive_interval(PING)
            .http2_keep_alive_timeout(PING)
            .build(connector.enable_http2().wrap_connector(tcp));
        let origin = url.as_str().parse().expect("a URL is a URI");
        let mut client =
            LogsServiceClient::with_origin(client, origin).max_decoding_message_size(MAX_ANSWER);
        if gzip {
            client = client.send_compressed(CompressionEncoding::Gzip);
        }
        Ok(Self::Grpc(Box::new(client)))
    }

    async fn send(
        &mut self,
        message: ExportLogsServiceRequest,
        headers: HeaderMap,
    ) -> Result<Taken, Failure> {
        match self {
            Self::Grpc(client) => {
                let mut request = Request::new(message);
                merge(request.metadata_mut(), headers);
                match client.export(request).await {
                    Ok(answer) => Ok(answer::taken(answer.into_inner())),
                    Err(status) => Err(answer::grpc(&status)),
                }
            }
            Self::Http { client, url, gzip } => post(client, url, *gzip, message, headers).await,
        }
    }
}

fn merge(metadata: &mut MetadataMap, headers: HeaderMap) {
    for pair in MetadataMap::from_headers(headers).iter() {
        // Binary values would have to be base64; they go as they are written.
        if let KeyAndValueRef::Ascii(key, value) = pair {
            metadata.insert(key, value.clone());
        }
    }
}

async fn post(
    client: &Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    url: &Uri,
    gzip: bool,
    message: ExportLogsServiceRequest,
    headers: HeaderMap,
) -> Result<Taken, Failure> {
    let mut body = message.encode_to_vec();
    let mut request = http::Request::post(url)
        .header(header::CONTENT_TYPE, "application/x-protobuf")
        .header(header::USER_AGENT, USER_AGENT);
    if gzip {
        let mut encoder = GzEncoder::new(Vec::new(), Level::fast());
        let packed = encoder.write_all(&body).and_then(|()| encoder.finish());
        body = packed.map_err(Failure::later)?;
        request = request.header(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    let mut request = request
        .body(Full::new(Bytes::from(body)))
        .expect("its parts are valid");
    request.headers_mut().extend(headers);
    let answer = client.request(request).await;
    let answer = answer.map_err(|e| Failure::later(crate::fetch::causes(&e)))?;
    let (head, body) = answer.into_parts();
    let body = Limited::new(body, MAX_ANSWER).collect().await;
    let body = body.map_err(|e| Failure::later(format!("the answer: {e}")))?;
    let body = body.to_bytes();
    if !head.status.is_success() {
        return Err(answer::http(head.status, &head.headers, &body));
    }
    // Receivers exist that answer with nothing, or with JSON: it was taken all the same.
    let answer = ExportLogsServiceResponse::decode(body).unwrap_or_default();
    Ok(answer::taken(answer))
}
