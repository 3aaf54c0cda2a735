//! Watches: what has changed since a version, then what changes.

use std::{io, sync::Arc, time::Duration};

use bytes::Bytes;
use hyper::Response;
use serde_json::{Value, json};
use tokio::{sync::mpsc, time::Instant};

use crate::{
    Shared,
    body::{self, Body},
    kinds::Kind,
    objects::{place, shown},
    route::{Query, Target},
    select::Selector,
    status::Refusal,
    store::{Change, Store},
};

struct Watch {
    shared: Arc<Shared>,
    kind: Kind,
    resource: String,
    target: Target,
    selector: Selector,
    bookmarks: bool,
    /// All up to here is told.
    position: u64,
    out: mpsc::Sender<io::Result<Bytes>>,
}

/// Why a stream ends early.
struct Cut;

/// `in_stream`: an expired version is told by an event instead of by the answer's
/// code. Clients meet both.
pub fn start(
    shared: &Arc<Shared>,
    target: &Target,
    query: &Query,
    in_stream: bool,
) -> Result<Response<Body>, Refusal> {
    let store = shared.store();
    let (kind, _) = place(&store, target)?;
    let resource = kind.resource();
    let fields = match &target.name {
        // A watch of one object, as old clients ask for it.
        Some(name) => format!("metadata.name={name}"),
        None => query.text("fieldSelector").to_owned(),
    };
    let selector = Selector::parse(&resource, &fields, query.text("labelSelector"))?;
    let asked = query.number("resourceVersion")?.unwrap_or(0);
    let bookmarks = query.flag("allowWatchBookmarks");
    let initial = match query.text("sendInitialEvents") {
        "" => None,
        _ if !shared.options.watch_list => {
            return Err(Refusal::invalid(
                "ListOptions.meta.k8s.io \"\" is invalid: sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled",
            ));
        }
        _ if query.text("resourceVersionMatch") != "NotOlderThan" => {
            return Err(Refusal::invalid(
                "ListOptions.meta.k8s.io \"\" is invalid: resourceVersionMatch: Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            ));
        }
        _ => Some(query.flag("sendInitialEvents")),
    };
    let (out, parts) = mpsc::channel(1);
    let mut watch = Watch {
        shared: shared.clone(),
        kind,
        resource,
        target: target.clone(),
        selector,
        bookmarks,
        position: asked,
        out,
    };
    let mut first = Vec::new();
    // Without a version, what is there comes first.
    if initial.unwrap_or(asked == 0) {
        watch.position = store.revision();
        first = watch.state(&store);
        if initial.is_some() && bookmarks {
            first.push(watch.bookmark(true));
        }
    } else if let Err(expired) = store.since(&watch.resource, asked) {
        if !in_stream {
            return Err(expired);
        }
        first.push(event("ERROR", &expired.object()));
        first.push(Bytes::new());
    }
    drop(store);
    let limit = shared.with_chaos(|chaos| Duration::from_secs(1 + chaos.below(10)));
    let asked = Duration::from_secs(query.number("timeoutSeconds")?.unwrap_or(1800));
    let limit = limit.map_or(asked, |limit| limit.min(asked));
    tokio::spawn(async move {
        if let Err(Cut) = watch.run(first, limit).await {
            let cut = io::Error::new(io::ErrorKind::ConnectionReset, "cut");
            let _gone_too = watch.out.send(Err(cut)).await;
        }
    });
    let mut response = body::json(200, &Value::Null);
    *response.body_mut() = Body::Stream(parts);
    Ok(response)
}

impl Watch {
    async fn run(&mut self, first: Vec<Bytes>, limit: Duration) -> Result<(), Cut> {
        let mut changed = self.shared.changed.subscribe();
        let mut cut = self.shared.cut.subscribe();
        let end = Instant::now() + limit;
        for event in first {
            if event.is_empty() {
                return Ok(());
            }
            self.tell(event).await?;
        }
        loop {
            let bookmark = self.shared.options.bookmarks;
            let pause = self.shared.with_chaos(|chaos| chaos.pause(40));
            let pause = pause.unwrap_or_default() + self.shared.delay();
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
            for event in self.news()? {
                self.tell(event).await?;
            }
            tokio::select! {
                _ = changed.changed() => {}
                _ = cut.changed() => {
                    // In the midst of an event, which then is none.
                    let _gone_too = self.send(Bytes::from_static(b"{\"type\":\"MODIFIED\",\"obj")).await;
                    return Err(Cut);
                }
                () = tokio::time::sleep(bookmark), if self.bookmarks => {
                    let bookmark = self.bookmark(false);
                    self.tell(bookmark).await?;
                }
                () = tokio::time::sleep_until(end) => {
                    if self.bookmarks {
                        let bookmark = self.bookmark(false);
                        self.tell(bookmark).await?;
                    }
                    return Ok(());
                }
                () = self.out.closed() => return Ok(()),
            }
        }
    }

    /// What is there, as if it were new.
    fn state(&self, store: &Store) -> Vec<Bytes> {
        let ours = store
            .list(&self.resource)
            .filter(|(key, object)| self.within(&key.namespace) && self.selector.matches(object));
        ours.map(|(_, object)| event("ADDED", &shown(&self.kind, &self.target.version, object)))
            .collect()
    }

    fn within(&self, namespace: &str) -> bool {
        self.target.namespace.is_empty() || self.target.namespace == namespace
    }

    fn news(&mut self) -> Result<Vec<Bytes>, Cut> {
        let store = self.shared.store();
        if !store.kinds.contains(&self.kind) {
            return Err(Cut);
        }
        let changes = match store.since(&self.resource, self.position) {
            Ok(changes) => changes,
            // Who was told everything may stay.
            Err(_) if self.position + 1 >= store.compacted() => store
                .since(&self.resource, store.compacted())
                .unwrap_or_default(),
            // Too slow for the window: the client must begin anew, as it will learn.
            Err(_) => return Err(Cut),
        };
        self.position = store.revision();
        drop(store);
        let within = changes.iter().filter(|c| self.within(&c.key.namespace));
        Ok(within.filter_map(|change| self.event(change)).collect())
    }

    /// What a change is to this watch: an object that comes to fit is added, one that
    /// no longer fits is deleted.
    fn event(&self, change: &Change) -> Option<Bytes> {
        let fitting =
            |object: &Option<Arc<Value>>| object.clone().filter(|o| self.selector.matches(o));
        let (what, object) = match (fitting(&change.old), fitting(&change.new)) {
            (None, None) => return None,
            (None, Some(new)) => ("ADDED", new),
            (Some(_), Some(new)) => ("MODIFIED", new),
            (Some(old), None) => ("DELETED", old),
        };
        let mut object = shown(&self.kind, &self.target.version, &object);
        object["metadata"]["resourceVersion"] = json!(change.revision.to_string());
        Some(event(what, &object))
    }

    fn bookmark(&self, initial: bool) -> Bytes {
        let mut object = json!({
            "kind": self.kind.kind, "apiVersion": self.kind.api_version(&self.target.version),
            "metadata": {"resourceVersion": self.position.to_string(), "creationTimestamp": null},
        });
        if self.kind.kind == "Pod" {
            object["spec"] = json!({"containers": null});
            object["status"] = json!({});
        }
        if initial {
            object["metadata"]["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        event("BOOKMARK", &object)
    }

    async fn tell(&self, event: Bytes) -> Result<(), Cut> {
        let fate = self.shared.with_chaos(|chaos| {
            let cut = chaos.percent(2);
            (chaos.pieces(event.clone()), cut, chaos.pause(5))
        });
        let Some((pieces, cut, pause)) = fate else {
            return self.send(event).await;
        };
        let whole = pieces.len();
        for (number, piece) in pieces.into_iter().enumerate() {
            // Before the last piece, so that the event is never whole.
            if cut && number + 1 == whole {
                return Err(Cut);
            }
            self.send(piece).await?;
            tokio::time::sleep(pause).await;
        }
        Ok(())
    }

    async fn send(&self, bytes: Bytes) -> Result<(), Cut> {
        self.shared.sent(bytes.len());
        self.out.send(Ok(bytes)).await.map_err(|_| Cut)
    }
}

fn event(what: &str, object: &Value) -> Bytes {
    format!("{}\n", json!({"type": what, "object": object})).into()
}
