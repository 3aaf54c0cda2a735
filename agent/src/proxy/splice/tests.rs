use std::{sync::Arc, time::Duration};

use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    task::JoinHandle,
};

use super::*;

/// Both applications, and what is between them.
struct World {
    client: TcpStream,
    server: TcpStream,
    counters: Arc<Counters>,
    carried: JoinHandle<Result<(), Broken>>,
}

impl World {
    async fn new() -> Self {
        let ((client, source), (server, destination)) = (pair().await, pair().await);
        let counters = Arc::<Counters>::default();
        let own = counters.clone();
        let carried = tokio::spawn(async move {
            let (mut source, mut destination) = (End::Tcp(source), End::Tcp(destination));
            splice(&mut source, &mut destination, &own).await
        });
        Self {
            client,
            server,
            counters,
            carried,
        }
    }

    /// How it ended.
    async fn end(self) -> Result<(), Broken> {
        let limit = Duration::from_secs(10);
        let ended = tokio::time::timeout(limit, self.carried).await;
        ended.expect("it ends").expect("it does not panic")
    }
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("bound");
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    (near.expect("connected"), far.expect("accepted").0)
}

fn reset(stream: TcpStream) {
    let linger = Some(Duration::ZERO);
    SockRef::from(&stream).set_linger(linger).expect("set");
}

#[tokio::test]
async fn an_end_is_an_end_and_the_other_side_goes_on() {
    let mut world = World::new().await;
    world.client.write_all(b"asked").await.expect("taken");
    world.client.shutdown().await.expect("ended");
    let mut heard = Vec::new();
    let read = world.server.read_to_end(&mut heard).await;
    assert_eq!((read.ok(), &heard[..]), (Some(5), &b"asked"[..]));

    // More than fits anywhere on the way.
    let answer = vec![7; 8 << 20];
    let (server, client) = (&mut world.server, &mut world.client);
    let saying = async {
        server.write_all(&answer).await.expect("taken");
        server.shutdown().await.expect("ended");
    };
    let mut heard = Vec::new();
    let (read, ()) = tokio::join!(client.read_to_end(&mut heard), saying);
    assert!(read.is_ok() && heard == answer);
    let count = world.counters.get();
    assert_eq!((count.sent, count.received), (5, answer.len() as u64));
    assert!(world.end().await.is_ok());
}

/// Both applications say as much as they can.
#[tokio::test]
async fn both_directions_move_while_both_are_full() {
    let World {
        client,
        server,
        counters,
        carried,
    } = World::new().await;
    let busy = |stream: TcpStream| {
        tokio::spawn(async move {
            let (mut from, mut to) = stream.into_split();
            let (said, mut room) = (vec![7; 1 << 20], vec![0; 1 << 20]);
            let saying = async { while to.write_all(&said).await.is_ok() {} };
            let hearing = async { while from.read(&mut room).await.is_ok_and(|read| read > 0) {} };
            tokio::join!(saying, hearing);
        })
    };
    let (client, server) = (busy(client), busy(server));
    const ENOUGH: u64 = 256 << 20;
    let enough = async {
        loop {
            let count = counters.get();
            if count.sent.min(count.received) > ENOUGH {
                return count;
            }
            tokio::task::yield_now().await;
        }
    };
    let limit = Duration::from_secs(60);
    let count = tokio::time::timeout(limit, enough)
        .await
        .expect("both move");
    let (least, most) = (
        count.sent.min(count.received),
        count.sent.max(count.received),
    );
    assert!(most < 8 * least, "{count:?}");
    client.abort();
    server.abort();
    carried.abort();
}

#[tokio::test]
async fn who_has_ended_its_side_may_still_break() {
    let mut world = World::new().await;
    world.client.shutdown().await.expect("ended");
    let mut nothing = [0];
    assert_eq!(world.server.read(&mut nothing).await.ok(), Some(0));
    reset(std::mem::replace(&mut world.client, pair().await.0));
    let broken = world.end().await.expect_err("it is broken");
    assert_eq!(broken.side, Side::Source);
}

#[tokio::test]
async fn who_does_not_read_holds_up_until_it_breaks() {
    let mut world = World::new().await;
    let chunk = vec![7; 1 << 20];
    let full = async {
        loop {
            world.client.write_all(&chunk).await.expect("taken");
        }
    };
    let stuck = tokio::time::timeout(Duration::from_millis(500), full).await;
    assert!(stuck.is_err());
    reset(std::mem::replace(&mut world.server, pair().await.0));
    let broken = world.end().await.expect_err("it is broken");
    assert_eq!(broken.side, Side::Destination);
}
