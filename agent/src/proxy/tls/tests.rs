use std::{
    future::poll_fn,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::{Records, Shaken, accept, connect};
use crate::{
    config::Config,
    identity::{Authority, Bundle, Credentials, FAST, peer_identity},
};

const DATA: u8 = 23;

/// Credentials of a service account under one root, and under another one.
pub(in crate::proxy) fn credentials() -> (Credentials, Credentials) {
    let one = || {
        let dir = tempfile::tempdir().expect("a directory");
        let config = Config {
            state: dir.path().to_owned(),
            ..Config::default()
        };
        let authority = Authority::open(&config, "node").expect("opens");
        let id = "spiffe://cluster.local/ns/shop/sa/web"
            .parse()
            .expect("valid");
        let svid = authority.issue(&id, SystemTime::now()).expect("issued");
        let bundle = Bundle::new(vec![authority.root().certificate().clone()], None);
        Credentials::new(svid, Arc::new(bundle.expect("a bundle"))).expect("usable")
    };
    (one(), one())
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("listens");
    let address = listener.local_addr().expect("bound");
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    let (near, far) = (near.expect("connects"), far.expect("accepts").0);
    near.set_nodelay(true).expect("set");
    far.set_nodelay(true).expect("set");
    (near, far)
}

fn name() -> ServerName<'static> {
    ServerName::try_from("10.0.0.1").expect("an address")
}

pub(in crate::proxy) async fn shaken() -> (Shaken, Shaken) {
    let (own, _) = credentials();
    let (near, far) = pair().await;
    let (near, far) = tokio::join!(
        connect(near, own.fast_client.clone(), name()),
        accept(far, own.fast_server.clone())
    );
    (near.expect("the client's side"), far.expect("the server's"))
}

#[tokio::test]
async fn both_sides_know_each_other_and_what_they_speak() {
    let (near, far) = shaken().await;
    for side in [&near, &far] {
        assert_eq!(side.protocol.as_deref(), Some(FAST));
        let peer = peer_identity(&side.leaf).expect("an identity");
        assert_eq!(peer.to_string(), "spiffe://cluster.local/ns/shop/sa/web");
        assert_eq!(side.session.group, "X25519MLKEM768");
    }
}

#[tokio::test]
async fn a_peer_of_another_root_is_refused_and_told() {
    let (own, other) = credentials();
    let (near, far) = pair().await;
    let (near, far) = tokio::join!(
        connect(near, own.fast_client.clone(), name()),
        accept(far, other.fast_server.clone())
    );
    let error = near.err().expect("refused").to_string();
    assert!(error.contains("invalid peer certificate"), "{error}");
    let told = far.err().expect("told").to_string();
    assert!(told.contains("alert"), "{told}");
}

/// Records of other lengths than ours, in both directions, against rustls' own.
pub async fn next(records: &mut Records) -> std::io::Result<Option<Bytes>> {
    poll_fn(|cx| records.split().0.poll_next(cx)).await
}

pub async fn flush(records: &mut Records) -> std::io::Result<()> {
    poll_fn(|cx| records.split().1.poll_flush(cx)).await
}

#[tokio::test]
async fn records_are_those_of_rustls() {
    let (own, _) = credentials();
    let (near, far) = pair().await;
    let (near, far) = tokio::join!(
        connect(near, own.client.clone(), name()),
        TlsAcceptor::from(own.server.clone()).accept(far)
    );
    let (mut near, mut far) = (near.expect("ours").records, far.expect("rustls'"));
    let sent: Vec<u8> = (0..300_000_u32).map(|n| (n % 251) as u8).collect();
    let mut got = vec![0; sent.len()];
    let there = async {
        near.write_all(&sent).await.expect("written");
        near.flush().await.expect("flushed");
    };
    tokio::join!(there, async {
        far.read_exact(&mut got).await.expect("read")
    });
    assert!(got == sent);
    let back = async {
        for part in sent.chunks(17_001) {
            far.write_all(part).await.expect("written");
        }
        far.flush().await.expect("flushed");
        far.shutdown().await.expect("ended");
    };
    let mut got = Vec::new();
    tokio::join!(back, async {
        near.read_to_end(&mut got).await.expect("ends in order")
    });
    assert!(got == sent);
    near.shutdown().await.expect("ended");
    assert_eq!(far.read(&mut [0; 9]).await.expect("ends in order"), 0);
}

#[tokio::test]
async fn keys_are_renewed_by_either_side() {
    let (own, _) = credentials();
    let (near, far) = pair().await;
    let (near, far) = tokio::join!(
        TlsConnector::from(own.client.clone()).connect(name(), near),
        accept(far, own.server.clone())
    );
    let (mut near, mut far) = (near.expect("rustls'"), far.expect("ours").records);
    for round in 0..3_u8 {
        // rustls asks for our next key with its own.
        near.get_mut().1.refresh_traffic_keys().expect("TLS 1.3");
        near.write_all(&[round; 9]).await.expect("written");
        near.flush().await.expect("flushed");
        let mut got = [0; 9];
        far.read_exact(&mut got).await.expect("read");
        assert_eq!(got, [round; 9]);
        far.renew_soon();
        far.write_all(&[round; 7]).await.expect("written");
        far.flush().await.expect("flushed");
        let mut got = [0; 7];
        near.read_exact(&mut got).await.expect("read");
        assert_eq!(got, [round; 7]);
    }
}

#[tokio::test]
async fn a_record_that_was_changed_breaks_the_connection() {
    let (near, far) = shaken().await;
    let (mut near, mut far) = (near.records, far.records);
    {
        let (_, mut outgoing) = near.split();
        outgoing.seal(b"the bytes", &[DATA]).expect("sealed");
    }
    near.spoil();
    flush(&mut near).await.expect("sent");
    let error = next(&mut far).await.expect_err("not its sender's");
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidData);
}

#[tokio::test]
async fn an_end_without_a_word_is_none() {
    let (near, far) = shaken().await;
    let mut far = far.records;
    drop(near);
    let error = next(&mut far).await.expect_err("cut off");
    assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
}

#[tokio::test]
async fn an_idle_connection_keeps_no_buffers() {
    let (near, far) = shaken().await;
    let (mut near, mut far) = (near.records, far.records);
    for length in [1, 9_000, 16_000] {
        let (_, mut outgoing) = near.split();
        outgoing.seal(&vec![7; length], &[DATA]).expect("sealed");
        flush(&mut near).await.expect("sent");
        let got = next(&mut far).await.expect("a record");
        assert_eq!(got.map(|got| got.len()), Some(length));
    }
    let waiting = tokio::time::timeout(Duration::from_millis(20), next(&mut far));
    assert!(waiting.await.is_err(), "nothing was sent");
    assert_eq!((near.held(), far.held()), (0, 0));
}
