//! Connections and requests: who asks, whether they may, and what becomes of it.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Limited};
use hyper::{Method, Response, body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio_rustls::TlsAcceptor;

use crate::{
    Request, Shared,
    access::{Attributes, User, allowed},
    body::{self, Body},
    chaos::Fate,
    discovery, lock,
    objects::{self, Write},
    review,
    route::{Query, Target},
    select::Selector,
    status::Refusal,
    watch,
};

/// Largest request, bytes: as the real one has it.
const LARGEST: usize = 3 << 20;

/// Until the server is to stop.
pub async fn serve(
    shared: Arc<Shared>,
    tls: Arc<rustls::ServerConfig>,
    first: TcpListener,
    address: SocketAddr,
) {
    let mut stop = shared.stop.subscribe();
    let mut away = shared.away.subscribe();
    let mut listener = listening(first).ok();
    let acceptor = TlsAcceptor::from(tls);
    loop {
        if *stop.borrow_and_update() {
            return;
        }
        if *away.borrow_and_update() {
            listener = None;
        } else if listener.is_none() {
            listener = (shared.options.bind)(address).and_then(listening).ok();
            if listener.is_none() {
                // The address is another's for a moment.
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
        }
        let accept = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            accepted = accept => {
                if let Ok((stream, _)) = accepted {
                    tokio::spawn(connection(shared.clone(), acceptor.clone(), stream));
                }
            }
            _ = stop.changed() => {}
            _ = away.changed() => {}
        }
    }
}

fn listening(socket: TcpListener) -> io::Result<tokio::net::TcpListener> {
    socket.set_nonblocking(true)?;
    tokio::net::TcpListener::from_std(socket)
}

/// Ends when the client does, or when the server goes away.
async fn connection(shared: Arc<Shared>, acceptor: TlsAcceptor, stream: tokio::net::TcpStream) {
    let mut away = shared.away.subscribe();
    let serving = async {
        let _only_latency = stream.set_nodelay(true);
        let limit = Duration::from_secs(10);
        let Ok(Ok(stream)) = tokio::time::timeout(limit, acceptor.accept(stream)).await else {
            return;
        };
        let service = service_fn(|request| answer(shared.clone(), request));
        let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
        // How it ends is the client's matter.
        let _ended = builder
            .serve_connection(TokioIo::new(stream), service)
            .await;
    };
    tokio::select! {
        () = serving => {}
        _ = away.wait_for(|away| *away) => {}
    }
}

/// An error hangs up.
async fn answer(
    shared: Arc<Shared>,
    request: hyper::Request<Incoming>,
) -> io::Result<Response<Body>> {
    let (head, body) = request.into_parts();
    let header = |name: &str| {
        let value = head.headers.get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or_default().to_owned()
    };
    let body = match Limited::new(body, LARGEST).collect().await {
        Ok(body) => body.to_bytes(),
        Err(_) => return Err(io::ErrorKind::InvalidData.into()),
    };
    let asked = Asked {
        method: head.method,
        path: head.uri.path().to_owned(),
        query: head.uri.query().unwrap_or_default().to_owned(),
        authorization: header("authorization"),
        content_type: header("content-type")
            .split(';')
            .next()
            .unwrap_or_default()
            .to_owned(),
        agent: header("user-agent"),
        body,
    };
    let delay = shared.delay()
        + shared
            .with_chaos(|chaos| chaos.pause(20))
            .unwrap_or_default();
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
    let result = asked.answer(&shared).await?;
    let response = result.unwrap_or_else(|refusal| body::refusal(&refusal));
    if let Body::Whole(Some(bytes)) = response.body() {
        shared.sent(bytes.len());
    }
    Ok(response)
}

struct Asked {
    method: Method,
    path: String,
    query: String,
    authorization: String,
    content_type: String,
    agent: String,
    body: Bytes,
}

impl Asked {
    async fn answer(&self, shared: &Arc<Shared>) -> io::Result<Result<Response<Body>, Refusal>> {
        let Some(user) = self.user(shared) else {
            return Ok(Err(Refusal::new(401, "Unauthorized", "Unauthorized")));
        };
        let query = Query::parse(&self.query);
        let target = Target::parse(&self.path);
        let watch = query.flag("watch");
        let verb = target
            .as_ref()
            .and_then(|target| target.verb(&self.method, watch));
        let verb = verb.map_or_else(|| self.method.as_str().to_lowercase(), str::to_owned);
        lock(&shared.requests).push(Request {
            verb: verb.clone(),
            path: self.path.clone(),
            query: self.query.clone(),
            user: user.name.clone(),
            group: target
                .as_ref()
                .map_or_else(String::new, |t| t.group.clone()),
            resource: target.as_ref().map_or_else(String::new, Target::resource),
        });
        if self.method == Method::GET {
            let resumes = watch.then(|| {
                query
                    .text("resourceVersion")
                    .parse()
                    .ok()
                    .filter(|v| *v > 0)
            });
            let fate = shared.with_chaos(|chaos| chaos.fate(&self.path, resumes.flatten()));
            match fate {
                None | Some(Fate::Answer) => {}
                Some(Fate::HangUp) => return Err(io::ErrorKind::ConnectionReset.into()),
                Some(Fate::Refuse(refusal)) => return Ok(Err(refusal)),
            }
        }
        let Some(target) = target else {
            return Ok(self.document(shared));
        };
        Ok(self.resource(shared, &user, &target, &query, &verb))
    }

    fn user(&self, shared: &Shared) -> Option<User> {
        let token = self.authorization.strip_prefix("Bearer ")?;
        let store = shared.store();
        shared
            .tokens()
            .user(&store, token, &[])
            .map(|(user, ..)| user)
    }

    fn document(&self, shared: &Shared) -> Result<Response<Body>, Refusal> {
        if self.method != Method::GET {
            return Err(Refusal::new(
                405,
                "MethodNotAllowed",
                "the server does not allow this method on the requested resource",
            ));
        }
        discovery::answer(&shared.store(), &self.path).map(|document| body::json(200, &document))
    }

    fn resource(
        &self,
        shared: &Arc<Shared>,
        user: &User,
        target: &Target,
        query: &Query,
        verb: &str,
    ) -> Result<Response<Body>, Refusal> {
        if shared.options.rbac {
            self.permit(shared, user, target, query, verb)?;
        }
        if self.content_type == "application/vnd.kubernetes.protobuf" {
            // Some of kubectl's subcommands know no other form.
            let message = "the body of the request was in an unknown format - accepted media types include: application/json, application/yaml";
            return Err(Refusal::new(415, "UnsupportedMediaType", message));
        }
        if self.method == Method::POST
            && let Some(review) = review::answer(shared, user, target, &self.body)
        {
            return review.map(|review| body::json(201, &review));
        }
        let write = Write {
            target,
            query,
            content_type: &self.content_type,
            agent: &self.agent,
            body: &self.body,
        };
        let force = query.flag("force");
        let (code, value): (u16, Value) = match verb {
            "watch" => {
                let in_stream = shared.expired.fetch_add(1, Ordering::Relaxed) % 2 == 1;
                return watch::start(shared, target, query, in_stream);
            }
            "get" => objects::get(&shared.store(), target)?,
            "list" => objects::list(&shared.store(), target, query)?,
            "create" => shared.write(|store| objects::create(store, &write))?,
            "update" => shared.write(|store| objects::replace(store, &write))?,
            "patch" => shared.write(|store| objects::patch(store, &write, force))?,
            "delete" => shared.write(|store| objects::delete(store, &write))?,
            _ => {
                return Err(Refusal::new(
                    405,
                    "MethodNotAllowed",
                    "the server does not allow this method on the requested resource",
                ));
            }
        };
        Ok(body::json(code, &value))
    }

    fn permit(
        &self,
        shared: &Shared,
        user: &User,
        target: &Target,
        query: &Query,
        verb: &str,
    ) -> Result<(), Refusal> {
        let named = || {
            let selector = Selector::parse("", query.text("fieldSelector"), "").ok()?;
            selector.name().map(str::to_owned)
        };
        let wanted = Attributes {
            verb: verb.to_owned(),
            group: target.group.clone(),
            resource: target.resource(),
            namespace: target.namespace.clone(),
            name: target.name.clone().or_else(named).unwrap_or_default(),
        };
        let store = shared.store();
        // To apply what is not there is to create it.
        let creates = verb == "patch"
            && self.content_type.starts_with("application/apply-patch")
            && objects::get(&store, target).is_err();
        let also = Attributes {
            verb: "create".into(),
            ..wanted.clone()
        };
        if allowed(&store, user, &wanted) && (!creates || allowed(&store, user, &also)) {
            return Ok(());
        }
        let scope = match target.namespace.as_str() {
            "" => "at the cluster scope".to_owned(),
            namespace => format!("in the namespace {namespace:?}"),
        };
        let why = format!(
            "{} is forbidden: User {:?} cannot {verb} resource {:?} in API group {:?} {scope}",
            target.plural,
            user.name,
            target.resource(),
            target.group,
        );
        lock(&shared.forbidden).push(why.clone());
        Err(Refusal::new(403, "Forbidden", why))
    }
}
