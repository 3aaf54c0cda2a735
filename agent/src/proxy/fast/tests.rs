use std::{
    future::poll_fn,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::StatusCode;
use tokio::sync::oneshot;

use super::{
    FastStream, Fresh, Home, Kind, NotOpened, Open, Pool, PoolKey, Proven, frame, leave,
    pool::{KEPT, SOON},
};
use crate::{
    identity::SpiffeId,
    proxy::tls::{Records, tests::shaken},
};

const OPEN: Open = Open {
    destination: std::net::SocketAddr::new(
        std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1)),
        80,
    ),
    client: std::net::SocketAddr::new(std::net::IpAddr::V6(std::net::Ipv6Addr::LOCALHOST), 40_000),
};

struct World {
    pool: Arc<Pool>,
    key: PoolKey,
    peer: SpiffeId,
    until: SystemTime,
}

impl World {
    fn new(most: usize) -> Self {
        Self {
            pool: Arc::new(Pool::new(most)),
            key: PoolKey::new(1, OPEN.destination.ip()),
            peer: "spiffe://cluster.local/ns/shop/sa/web"
                .parse()
                .expect("valid"),
            until: SystemTime::now(),
        }
    }

    /// A new connection: ours, and the destination's.
    async fn connection(&self) -> (Fresh, Box<Records>) {
        let (near, far) = shaken().await;
        let proven = Proven {
            peer: self.peer.clone(),
            session: Arc::new(near.session),
            svid_until: self.until,
        };
        let room = self.pool.join().expect("room");
        (Fresh::new(near.records, proven, room), far.records)
    }

    fn take(&self) -> Option<Fresh> {
        self.pool.take(self.key, &self.peer, self.until)
    }

    async fn open(&self, fresh: Fresh, first: &[u8]) -> Result<FastStream, NotOpened> {
        let opened = self.pool.open(self.key, fresh, OPEN, first).await;
        opened.map(|opened| opened.stream)
    }
}

/// The destination's side of one stream, and where its connection comes back.
async fn offered(mut records: Box<Records>) -> (FastStream, oneshot::Receiver<Box<Records>>) {
    let (kind, payload) = frame(&mut records).await.expect("stands").expect("a frame");
    assert_eq!((kind, Open::decode(&payload)), (Kind::Open, Some(OPEN)));
    let (home, back) = oneshot::channel();
    (FastStream::new(records, Home::Serving(home)), back)
}

async fn say(stream: &mut FastStream, bytes: &[u8], last: bool) {
    let (_, mut writer) = stream.split();
    let mut left = bytes;
    while !left.is_empty() {
        let sealed = poll_fn(|cx| writer.poll_seal(cx, left))
            .await
            .expect("sealed");
        left = &left[sealed..];
    }
    if last {
        writer.end().expect("sealed");
    }
    poll_fn(|cx| writer.poll_flush(cx)).await.expect("sent");
}

async fn hear(stream: &mut FastStream) -> std::io::Result<Option<Bytes>> {
    let (mut reader, _) = stream.split();
    poll_fn(|cx| reader.poll_read(cx)).await
}

#[test]
fn what_a_stream_is_opened_with_survives_the_way() {
    assert_eq!(Open::decode(&OPEN.encode()), Some(OPEN));
    assert_eq!(Open::decode(&OPEN.encode()[1..]), None);
    assert_eq!(Open::decode(&[0; 37]), None);
}

#[tokio::test]
async fn a_connection_carries_one_stream_after_another() {
    let world = World::new(4);
    let (mut fresh, mut far) = world.connection().await;
    for round in 0..3_u8 {
        let serve = async {
            let (mut stream, back) = offered(far).await;
            stream.accept().expect("sent");
            assert_eq!(
                hear(&mut stream).await.expect("whole").as_deref(),
                Some(&[round; 5][..])
            );
            assert_eq!(hear(&mut stream).await.expect("in order"), None);
            say(&mut stream, &[round; 40_000], true).await;
            drop(stream);
            back.await.expect("comes back")
        };
        let ask = async {
            let mut stream = world.open(fresh, &[round; 5]).await.ok().expect("accepted");
            say(&mut stream, &[], true).await;
            let mut got = 0;
            while let Some(bytes) = hear(&mut stream).await.expect("whole") {
                assert!(bytes.iter().all(|byte| *byte == round));
                got += bytes.len();
            }
            assert_eq!(got, 40_000);
        };
        (far, ()) = tokio::join!(serve, ask);
        fresh = world.take().expect("it is free again");
    }
    drop(fresh);
    assert_eq!(world.pool.count(), 0);
}

#[tokio::test]
async fn a_refusal_has_a_reason_and_ends_the_stream_only() {
    let world = World::new(1);
    let (fresh, far) = world.connection().await;
    let serve = async {
        let (stream, back) = offered(far).await;
        stream.refuse(StatusCode::FORBIDDEN);
        let mut records = back.await.expect("comes back");
        // What had been sent at once is in front of the next stream.
        let (kind, _) = frame(&mut records).await.expect("stands").expect("a frame");
        assert_eq!(kind, Kind::Data);
        let (mut stream, _) = offered(records).await;
        stream.accept().expect("sent");
        stream
    };
    let ask = async {
        match world.open(fresh, b"let me in").await {
            Err(NotOpened::Refused(StatusCode::FORBIDDEN)) => {}
            _ => panic!("not refused"),
        }
        let again = world.take().expect("it is free again");
        world.open(again, &[]).await.ok().expect("accepted")
    };
    let (_far, _near) = tokio::join!(serve, ask);
}

#[tokio::test]
async fn what_ends_in_the_midst_is_broken() {
    let world = World::new(1);
    let (fresh, far) = world.connection().await;
    let serve = async {
        let (mut stream, back) = offered(far).await;
        stream.accept().expect("sent");
        say(&mut stream, b"half of it", false).await;
        (stream, back)
    };
    let (near, (far, back)) = tokio::join!(world.open(fresh, &[]), serve);
    let mut near = near.ok().expect("accepted");
    assert_eq!(
        hear(&mut near).await.expect("whole").as_deref(),
        Some(&b"half of it"[..])
    );
    drop(far);
    assert!(hear(&mut near).await.is_err());
    assert!(back.await.is_err(), "no other stream comes on it");
    drop(near);
    assert!(world.take().is_none());
    assert_eq!(world.pool.count(), 0);
}

#[tokio::test]
async fn who_leaves_gets_no_other_stream() {
    let world = World::new(2);
    // While it is idle:
    let (fresh, far) = world.connection().await;
    let serve = async {
        let (mut stream, back) = offered(far).await;
        stream.accept().expect("sent");
        say(&mut stream, &[], true).await;
        assert_eq!(hear(&mut stream).await.expect("in order"), None);
        drop(stream);
        back.await.expect("comes back")
    };
    let ask = async {
        let mut stream = world.open(fresh, &[]).await.ok().expect("accepted");
        say(&mut stream, &[], true).await;
        assert_eq!(hear(&mut stream).await.expect("in order"), None);
    };
    let (mut far, ()) = tokio::join!(serve, ask);
    leave(&mut far).await.expect("sent");
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(world.take().is_none());
    // And while a stream was on its way, which is served all the same:
    let (fresh, mut far) = world.connection().await;
    leave(&mut far).await.expect("sent");
    let serve = async {
        let (mut stream, _back) = offered(far).await;
        stream.accept().expect("sent");
        say(&mut stream, b"served", true).await;
        stream
    };
    let ask = async {
        let mut stream = world.open(fresh, &[]).await.ok().expect("accepted");
        assert_eq!(
            hear(&mut stream).await.expect("whole").as_deref(),
            Some(&b"served"[..])
        );
        assert_eq!(hear(&mut stream).await.expect("in order"), None);
        say(&mut stream, &[], true).await;
    };
    let (_far, ()) = tokio::join!(serve, ask);
    assert!(world.take().is_none());
}

#[tokio::test]
async fn only_what_fits_is_taken_and_only_so_many_are_open() {
    let world = World::new(1);
    let (fresh, mut far) = world.connection().await;
    assert!(world.pool.join().is_none(), "there is room for one");
    let serve = async {
        let (stream, back) = offered(far).await;
        stream.refuse(StatusCode::FORBIDDEN);
        back.await.expect("comes back")
    };
    let (refused, back) = tokio::join!(world.open(fresh, &[]), serve);
    far = back;
    assert!(refused.is_err());
    let other = "spiffe://cluster.local/ns/shop/sa/other"
        .parse()
        .expect("valid");
    assert!(world.pool.take(world.key, &other, world.until).is_none());
    assert_eq!(world.pool.count(), 0, "who is someone else now is not kept");
    assert!(frame(&mut far).await.expect("in order").is_none());
}

#[tokio::test]
async fn what_nobody_uses_is_closed() {
    let world = World::new(1);
    let (fresh, far) = world.connection().await;
    let serve = async {
        let (stream, back) = offered(far).await;
        stream.refuse(StatusCode::FORBIDDEN);
        back.await.expect("comes back")
    };
    let (refused, mut far) = tokio::join!(world.open(fresh, &[]), serve);
    assert!(refused.is_err());
    world.pool.sweep(Duration::from_secs(60));
    assert_eq!(world.pool.count(), 1);
    world.pool.sweep(Duration::ZERO);
    assert_eq!(world.pool.count(), 0);
    assert!(frame(&mut far).await.expect("in order").is_none());
}

#[tokio::test]
async fn what_a_burst_has_left_is_closed_soon() {
    let world = World::new(KEPT + 2);
    let mut ends = Vec::new();
    let mut free = Vec::new();
    let mut held_open = Vec::new();
    for _ in 0..KEPT + 2 {
        let (fresh, far) = world.connection().await;
        free.push(fresh);
        ends.push(far);
    }
    for (fresh, far) in free.into_iter().zip(ends) {
        let serve = async {
            let (stream, back) = offered(far).await;
            stream.refuse(StatusCode::FORBIDDEN);
            back.await.expect("comes back")
        };
        let (refused, far) = tokio::join!(world.open(fresh, &[]), serve);
        assert!(refused.is_err());
        held_open.push(far);
    }
    tokio::time::sleep(SOON).await;
    world.pool.sweep(Duration::from_secs(60));
    assert_eq!(world.pool.count(), KEPT);
}
