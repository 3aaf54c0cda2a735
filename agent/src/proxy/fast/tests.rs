use std::{
    future::poll_fn,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::StatusCode;
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};

use super::{Driver, Event, FastStream, Frame, Kind, Lane, MOST, NO_STREAM, NotOpened, Open};
use crate::{
    config::{Count, Span, Transport, Window},
    proxy::tls::{
        Records,
        tests::{flush, next, shaken},
    },
};

const OPEN: Open = Open {
    destination: SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)), 80),
    client: SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), 40_000),
};
const SOON: Duration = Duration::from_millis(50);

/// A lane between two tasks.
struct World {
    near: Arc<Lane>,
    far: Arc<Lane>,
    offers: mpsc::UnboundedReceiver<FastStream>,
    /// How each side ends.
    source: JoinHandle<io::Result<()>>,
    destination: JoinHandle<io::Result<()>>,
}

async fn drive(mut driver: Driver, offers: mpsc::UnboundedSender<FastStream>) -> io::Result<()> {
    loop {
        match driver.run().await? {
            Event::Offered(stream, open) => {
                assert_eq!(open, OPEN);
                offers.send(stream).expect("the test goes on");
            }
            Event::Leaves => {}
            Event::Over => return Ok(()),
        }
    }
}

impl World {
    async fn new() -> Self {
        Self::with(&Transport::default()).await
    }

    async fn with(transport: &Transport) -> Self {
        let (near, far) = shaken().await;
        let (source, destination) = (Lane::new(transport), Lane::new(transport));
        let (to, offers) = mpsc::unbounded_channel();
        Self {
            near: source.clone(),
            far: destination.clone(),
            offers,
            source: tokio::spawn(drive(
                Driver::dialled(source, near.records),
                mpsc::unbounded_channel().0,
            )),
            destination: tokio::spawn(drive(Driver::accepted(destination, far.records), to)),
        }
    }

    /// A stream that stands: ours, and the destination's.
    async fn stream(&mut self, first: &[u8]) -> (FastStream, FastStream) {
        let serve = async {
            let mut far = self.offers.recv().await.expect("offered");
            far.accept().await.expect("sent");
            far
        };
        let (near, far) = tokio::join!(FastStream::open(&self.near, OPEN, first), serve);
        (near.ok().expect("accepted"), far)
    }
}

async fn say(stream: &mut FastStream, bytes: &[u8], last: bool) {
    let (_, mut writer) = stream.split();
    let mut bytes = Bytes::copy_from_slice(bytes);
    let written = poll_fn(|cx| writer.poll_write(cx, &mut bytes));
    written.await.expect("written");
    if last {
        writer.end();
    }
    poll_fn(|cx| writer.poll_flush(cx)).await.expect("sent");
}

async fn hear(stream: &mut FastStream) -> io::Result<Option<Bytes>> {
    let (mut reader, _) = stream.split();
    poll_fn(|cx| reader.poll_read(cx)).await
}

/// All of them, to an orderly end.
async fn hear_all(stream: &mut FastStream) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(bytes) = hear(stream).await.expect("whole") {
        all.extend_from_slice(&bytes);
    }
    all
}

#[test]
fn what_a_stream_is_opened_with_survives_the_way() {
    assert_eq!(Open::decode(&OPEN.encode()), Some(OPEN));
    assert_eq!(Open::decode(&OPEN.encode()[1..]), None);
    assert_eq!(Open::decode(&[0; 37]), None);
}

#[test]
fn a_record_is_read_from_its_end() {
    let frame =
        |stream, kind, payload: &[u8]| Frame::new(stream, kind, Bytes::copy_from_slice(payload));
    let frames = [
        frame(1, Kind::Data, b"some"),
        frame(2, Kind::End, b""),
        frame(1, Kind::Data, &[9; 300]),
    ];
    let mut bytes = Vec::new();
    for frame in &frames {
        bytes.extend_from_slice(&frame.payload);
        bytes.extend_from_slice(&frame.trailer());
    }
    let mut record = Bytes::from(bytes.clone());
    for frame in frames.iter().rev() {
        let split = Frame::split_off(&mut record).expect("whole");
        assert_eq!(split.as_ref(), Some(frame));
    }
    assert_eq!(Frame::split_off(&mut record).expect("whole"), None);
    for wrong in [&bytes[..3], &[0, 9, 0, 0, 0, 1, 0], &[0, 0, 0, 0, 0, 1, 99]] {
        let mut record = Bytes::copy_from_slice(wrong);
        assert!(Frame::split_off(&mut record).is_err(), "{wrong:?}");
    }
}

#[tokio::test]
async fn streams_are_carried_side_by_side() {
    let mut world = World::new().await;
    let mut carried = Vec::new();
    for number in 0..8_u8 {
        let (mut near, mut far) = world.stream(&[number; 5]).await;
        carried.push(tokio::spawn(async move {
            let there = async {
                say(&mut near, &vec![number; 200_000], true).await;
                let heard = hear_all(&mut near).await;
                assert!(heard == vec![number; 300_000]);
            };
            let back = async {
                let heard = hear_all(&mut far).await;
                assert!(heard == vec![number; 200_005]);
                say(&mut far, &vec![number; 300_000], true).await;
            };
            tokio::join!(there, back);
        }));
    }
    for stream in carried {
        stream.await.expect("carried");
    }
    assert!(world.near.is_unused() && world.far.is_unused());
    assert!(!world.source.is_finished() && !world.destination.is_finished());
}

#[tokio::test]
async fn what_is_small_leaves_together() {
    let (near, mut far) = shaken().await;
    let lane = Lane::new(&Transport::default());
    let mut driver = Driver::dialled(lane.clone(), near.records);
    let _streams = [lane.begin(OPEN, b"one"), lane.begin(OPEN, b"two")];
    let large = lane.begin(OPEN, &[7; MOST]);
    assert!(timeout(SOON, driver.run()).await.is_err(), "nothing came");
    let record = next(&mut far.records).await.expect("whole");
    let mut record = record.expect("a record");
    let mut kinds = Vec::new();
    while let Some(frame) = Frame::split_off(&mut record).expect("whole") {
        kinds.insert(0, (frame.stream, frame.kind));
    }
    let all = |stream| [Kind::Open, Kind::Data, Kind::Credit].map(|kind| (stream, kind));
    let mut expected = [all(1), all(2)].concat();
    expected.push((3, Kind::Open));
    assert_eq!(kinds, expected);
    let record = next(&mut far.records).await.expect("whole");
    let mut record = record.expect("a record");
    let frame = Frame::split_off(&mut record).expect("whole");
    assert_eq!(frame.map(|frame| frame.payload.len()), Some(MOST));
    assert!(large.is_some() && record.is_empty());
}

#[tokio::test]
async fn a_refusal_has_a_reason_and_ends_the_stream_only() {
    let mut world = World::new().await;
    let refuse = async {
        let stream = world.offers.recv().await.expect("offered");
        stream.refuse(StatusCode::FORBIDDEN);
    };
    let ask = FastStream::open(&world.near, OPEN, b"let me in");
    let (refused, ()) = tokio::join!(ask, refuse);
    assert!(matches!(
        refused,
        Err(NotOpened::Refused(StatusCode::FORBIDDEN))
    ));
    assert!(world.near.is_unused() && world.far.is_unused());
    world.stream(b"and now?").await;
}

#[tokio::test]
async fn there_are_only_so_many_streams() {
    let transport = Transport {
        streams_per_tunnel: Count(1),
        ..Transport::default()
    };
    let mut world = World::with(&transport).await;
    let (_one, _two) = (world.stream(b"").await, world.stream(b"").await);
    assert!(matches!(
        FastStream::open(&world.near, OPEN, b"a third").await,
        Err(NotOpened::Broke(_))
    ));
}

#[tokio::test]
async fn what_ends_in_the_midst_is_broken_and_breaks_nothing_else() {
    let mut world = World::new().await;
    let (mut other, mut others) = world.stream(b"").await;
    let (mut near, mut far) = world.stream(b"").await;
    say(&mut far, b"half of it", false).await;
    assert_eq!(
        hear(&mut near).await.expect("whole").as_deref(),
        Some(&b"half of it"[..])
    );
    let broken = poll_fn(|cx| near.split().1.poll_broken(cx));
    let (_, ()) = tokio::join!(broken, async { drop(far) });
    assert!(hear(&mut near).await.is_err());
    let (_, mut writer) = near.split();
    let mut more = Bytes::from_static(b"more");
    assert!(
        poll_fn(|cx| writer.poll_write(cx, &mut more))
            .await
            .is_err()
    );
    say(&mut other, b"goes on", true).await;
    assert_eq!(hear_all(&mut others).await, b"goes on");
}

#[tokio::test]
async fn who_has_ended_and_goes_breaks_what_still_comes() {
    let mut world = World::new().await;
    let (mut near, mut far) = world.stream(b"").await;
    say(&mut near, b"the last word", true).await;
    drop(near);
    let broken = poll_fn(|cx| far.split().1.poll_broken(cx)).await;
    assert_eq!(broken.kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(hear_all(&mut far).await, b"the last word");
}

#[tokio::test]
async fn who_does_not_read_holds_up_nobody_else() {
    let mut world = World::new().await;
    let (mut stalled, mut deaf) = world.stream(b"").await;
    let bytes = vec![3; 1 << 20];
    let full = timeout(SOON, say(&mut stalled, &bytes, false)).await;
    assert!(full.is_err(), "there is room for a window");
    let (mut near, mut far) = world.stream(b"").await;
    say(&mut near, &bytes[..200], true).await;
    assert_eq!(hear_all(&mut far).await.len(), 200);
    let mut heard = 0;
    while let Ok(more) = timeout(SOON, hear(&mut deaf)).await {
        heard += more.expect("stands").expect("goes on").len();
    }
    let Window(window) = Transport::default().stream_window;
    assert_eq!(heard, window as usize, "and no more than that is kept");
}

#[tokio::test]
async fn the_window_of_who_keeps_up_grows() {
    let mut world = World::new().await;
    let (mut near, mut far) = world.stream(b"").await;
    let sent = vec![1; 64 << 20];
    let Window(window) = Transport::default().stream_window;
    let kept_up = async {
        let mut heard = 0;
        while heard < 16 * window as usize {
            heard += hear(&mut far)
                .await
                .expect("stands")
                .expect("goes on")
                .len();
        }
    };
    {
        let saying = say(&mut near, &sent, false);
        tokio::pin!(saying);
        tokio::select! {
            () = &mut saying => panic!("it is more than was heard"),
            () = kept_up => {}
        }
        assert!(timeout(SOON, saying).await.is_err(), "nobody reads");
    }
    let mut kept = 0;
    while let Ok(more) = timeout(SOON, hear(&mut far)).await {
        kept += more.expect("stands").expect("goes on").len();
    }
    let kept = kept / window as usize;
    assert!((2..=8).contains(&kept), "{kept} windows");
}

#[tokio::test]
async fn who_leaves_gets_no_other_lane_and_streams_go_on() {
    let mut world = World::new().await;
    let (mut near, mut far) = world.stream(b"").await;
    world.far.leave();
    tokio::time::sleep(SOON).await;
    say(&mut near, b"still here", true).await;
    assert_eq!(hear_all(&mut far).await, b"still here");
    assert!(!world.source.is_finished());
    say(&mut far, b"and I", true).await;
    assert_eq!(hear_all(&mut near).await, b"and I");
    drop((near, far));
    assert!(world.source.await.expect("no panic").is_ok());
    assert!(
        world.destination.await.expect("no panic").is_err(),
        "closed"
    );
}

#[tokio::test]
async fn a_lane_that_ends_breaks_its_streams() {
    let mut world = World::new().await;
    let (mut near, _far) = world.stream(b"").await;
    world.destination.abort();
    assert!(hear(&mut near).await.is_err());
    assert!(world.source.await.expect("no panic").is_err());
    assert!(matches!(
        FastStream::open(&world.near, OPEN, b"").await,
        Err(NotOpened::Broke(_))
    ));
}

#[tokio::test]
async fn a_lane_that_ends_breaks_no_stream_that_has_ended() {
    let mut world = World::new().await;
    let (mut near, mut far) = world.stream(b"").await;
    say(&mut near, b"the last word", true).await;
    assert_eq!(hear_all(&mut far).await, b"the last word");
    say(&mut far, b"as well", true).await;
    drop(far);
    tokio::time::sleep(SOON).await;
    world.destination.abort();
    assert!(world.source.await.expect("no panic").is_err());
    let broken = poll_fn(|cx| near.split().1.poll_broken(cx));
    assert!(timeout(SOON, broken).await.is_err(), "it is whole");
    assert_eq!(hear_all(&mut near).await, b"as well");
}

#[tokio::test]
async fn a_peer_without_a_word_is_noticed() {
    let transport = Transport {
        keepalive_interval: Span(SOON),
        keepalive_timeout: Span(SOON),
        ..Transport::default()
    };
    // One that answers is waited for,
    let world = World::with(&transport).await;
    let silent = world.near.silent(&transport);
    assert!(timeout(SOON * 6, silent).await.is_err());
    // one that does not is not.
    let (near, _far) = shaken().await;
    let lane = Lane::new(&transport);
    let mut driver = Driver::dialled(lane.clone(), near.records);
    tokio::select! {
        _ = driver.run() => panic!("nothing was sent"),
        () = lane.silent(&transport) => {}
    }
}

/// What a destination makes of a record with these frames.
async fn told(frames: &[Frame]) -> io::Result<Event> {
    let (mut near, far) = shaken().await;
    let mut record = Vec::new();
    for frame in frames {
        record.extend_from_slice(&frame.payload);
        record.extend_from_slice(&frame.trailer());
    }
    send(&mut near.records, &record).await;
    let lane = Lane::new(&Transport::default());
    let mut driver = Driver::accepted(lane, far.records);
    let mut kept = Vec::new();
    loop {
        match timeout(SOON, driver.run()).await {
            Ok(Ok(Event::Offered(stream, _))) => kept.push(stream),
            Ok(event) => return event,
            Err(_elapsed) => return Ok(Event::Over),
        }
    }
}

async fn send(records: &mut Records, plain: &[u8]) {
    let (_, mut outgoing) = records.split();
    outgoing.seal(plain, &[23]).expect("sealed");
    flush(records).await.expect("sent");
}

#[tokio::test]
async fn what_a_peer_may_not_say_ends_the_lane() {
    let open = |stream| Frame::new(stream, Kind::Open, OPEN.encode());
    let frame = |stream, kind, payload: &'static [u8]| {
        Frame::new(stream, kind, Bytes::from_static(payload))
    };
    for (why, frames) in [
        ("a stream again", vec![open(1), open(1)]),
        ("a stream of old", vec![open(2), open(1)]),
        ("no stream", vec![open(NO_STREAM)]),
        ("a stream to nowhere", vec![frame(1, Kind::Open, b"?")]),
        (
            "bytes behind their end",
            vec![
                open(1),
                frame(1, Kind::End, b""),
                frame(1, Kind::Data, b"and"),
            ],
        ),
        (
            "credit without end",
            vec![open(1), frame(1, Kind::Credit, &[0xff; 4])],
        ),
        (
            "a credit that is none",
            vec![open(1), frame(1, Kind::Credit, b"1")],
        ),
    ] {
        assert!(told(&frames).await.is_err(), "{why}");
    }
    // What is of a stream that has been is nobody's.
    assert!(told(&[frame(9, Kind::Data, b"late")]).await.is_ok());
}

#[tokio::test]
async fn who_sends_more_than_there_is_room_for_ends_the_lane() {
    let (mut near, far) = shaken().await;
    let mut driver = Driver::accepted(Lane::new(&Transport::default()), far.records);
    let first = Frame::new(1, Kind::Open, OPEN.encode());
    let mut record = first.payload.to_vec();
    record.extend_from_slice(&first.trailer());
    send(&mut near.records, &record).await;
    let Ok(Event::Offered(_stream, _)) = driver.run().await else {
        panic!("not offered");
    };
    let data = Frame::new(1, Kind::Data, Bytes::from_static(&[0; 16_000]));
    let record = [&data.payload[..], &data.trailer()].concat();
    let Window(window) = Transport::default().stream_window;
    for _ in 0..window / 16_000 {
        send(&mut near.records, &record).await;
        let quiet = timeout(Duration::from_millis(5), driver.run()).await;
        assert!(quiet.is_err(), "there is room");
    }
    send(&mut near.records, &record).await;
    assert!(driver.run().await.is_err());
}
