//! What is asked, how often, and what becomes of who waits.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

/// Answers when it is told to, in order, with what it holds; without an answer, never.
#[derive(Default)]
struct Source {
    asked: AtomicUsize,
    used: Mutex<Vec<IpAddr>>,
    answers: Mutex<Vec<Found>>,
    go: tokio::sync::Notify,
}

impl Discover for Source {
    fn ranges(&self) -> Arc<BTreeSet<IpNet>> {
        Arc::new(["10.1.0.0/16".parse().expect("a range")].into())
    }

    fn discover<'a>(&'a self, _: IpAddr) -> Pin<Box<dyn Future<Output = Found> + Send + 'a>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let answer = self.answers.lock().expect("held").pop();
        Box::pin(async move {
            let Some(answer) = answer else {
                return std::future::pending().await;
            };
            self.go.notified().await;
            answer
        })
    }

    fn used(&self, address: IpAddr) {
        self.used.lock().expect("held").push(address);
    }
}

const LONG: Duration = Duration::from_secs(3_600);
const SHORT: Duration = Duration::from_millis(20);

/// What takes time takes long, and waiting for nothing does not.
fn asking(answers: &[Found]) -> (Arc<Source>, Arc<Discovery>) {
    let times = Times {
        limit: LONG,
        holds: LONG,
        briefly: SHORT,
        rest: LONG,
        stranger: LONG,
    };
    asking_with(times, answers)
}

fn asking_with(times: Times, answers: &[Found]) -> (Arc<Source>, Arc<Discovery>) {
    let source = Arc::new(Source::default());
    let mut answers = answers.to_vec();
    answers.reverse();
    *source.answers.lock().expect("held") = answers;
    let discovery = Discovery {
        times,
        ..Discovery::new(source.clone())
    };
    (source, Arc::new(discovery))
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Asks as many times at once, and answers once all wait.
async fn at_once(
    discovery: &Arc<Discovery>,
    source: &Source,
    ip: &str,
    times: usize,
) -> Vec<Found> {
    let ip = address(ip);
    let asking: Vec<_> = (0..times)
        .map(|_| {
            let discovery = discovery.clone();
            tokio::spawn(async move { discovery.ask(ip).await })
        })
        .collect();
    tokio::task::yield_now().await;
    source.go.notify_one();
    let mut found = Vec::new();
    for one in asking {
        found.push(one.await.expect("no panic"));
    }
    found
}

#[tokio::test]
async fn who_dials_the_same_address_waits_for_the_same_answer() {
    let (source, discovery) = asking(&[Found::Known, Found::Known]);
    let found = at_once(&discovery, &source, "10.1.0.1", 5).await;
    assert_eq!(found, vec![Found::Known; 5]);
    assert_eq!(source.asked.load(Ordering::Relaxed), 1);
    // Who asks again has found the table without it.
    assert_eq!(
        at_once(&discovery, &source, "10.1.0.1", 1).await,
        [Found::Known]
    );
    assert_eq!(source.asked.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn that_there_is_nothing_holds_for_a_moment_only() {
    for (holds, asked) in [(LONG, 1), (Duration::ZERO, 2)] {
        let times = Times { holds, ..TIMES };
        let (source, discovery) = asking_with(times, &[Found::Foreign, Found::Foreign]);
        for _ in 0..2 {
            let found = at_once(&discovery, &source, "10.1.0.1", 1).await;
            assert_eq!(found, [Found::Foreign]);
        }
        assert_eq!(source.asked.load(Ordering::Relaxed), asked);
    }
}

/// Never answers.
fn silent() -> (Arc<Source>, Arc<Discovery>) {
    let times = Times {
        limit: SHORT,
        ..TIMES
    };
    asking_with(times, &[])
}

#[tokio::test]
async fn without_an_answer_it_is_unknown() {
    let (source, discovery) = silent();
    let found = discovery.ask(address("10.1.0.1")).await;
    assert_eq!(found, Found::Unknown("no answer within 20ms".into()));
    assert_eq!(source.asked.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn if_who_asked_goes_away_another_asks_anew() {
    let (source, discovery) = asking(&[Found::Known, Found::Foreign]);
    let ip = address("10.1.0.1");
    let first = tokio::spawn({
        let discovery = discovery.clone();
        async move { discovery.ask(ip).await }
    });
    tokio::task::yield_now().await;
    let second = tokio::spawn({
        let discovery = discovery.clone();
        async move { discovery.ask(ip).await }
    });
    tokio::task::yield_now().await;
    first.abort();
    tokio::task::yield_now().await;
    source.go.notify_one();
    assert_eq!(second.await.expect("no panic"), Found::Foreign);
    assert_eq!(source.asked.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn so_many_wait_and_no_more() {
    let (_source, discovery) = silent();
    let asking: Vec<_> = (0..=WAITING)
        .map(|_| {
            let discovery = discovery.clone();
            tokio::spawn(async move { discovery.ask(address("10.1.0.1")).await })
        })
        .collect();
    let mut turned_away = 0;
    for one in asking {
        match one.await.expect("no panic") {
            Found::Unknown(why) => turned_away += usize::from(why.contains("already")),
            other => panic!("{other:?} without an answer"),
        }
    }
    assert_eq!(turned_away, 1);
}

#[tokio::test]
async fn addresses_that_were_asked_about_do_not_pile_up() {
    let (source, discovery) = asking(&vec![Found::Known; 3 * ADDRESSES]);
    for low in 0..=(ADDRESSES as u32) {
        let ip = IpAddr::from((0x0a01_0000 + low).to_be_bytes());
        source.go.notify_one();
        assert_eq!(discovery.ask(ip).await, Found::Known);
    }
    let kept = discovery.questions.lock().expect("held").len();
    assert!(kept <= 2, "{kept} questions are kept");
}

#[tokio::test]
async fn strangers_are_not_waited_for_again_and_again() {
    let (source, discovery) = asking(&[Found::Foreign, Found::Foreign]);
    // No pod can have it.
    discovery.introduce(address("192.0.2.1")).await;
    assert_eq!(source.asked.load(Ordering::Relaxed), 0);
    for _ in 0..2 {
        source.go.notify_one();
        discovery.introduce(address("10.1.0.1")).await;
    }
    assert_eq!(source.asked.load(Ordering::Relaxed), 1);
    // There is no more answer: once it is waited for, and then nobody waits.
    source.answers.lock().expect("held").clear();
    for low in 2..9 {
        discovery.introduce(address(&format!("10.1.0.{low}"))).await;
    }
    assert_eq!(source.asked.load(Ordering::Relaxed), 2);
    discovery.used(address("10.1.0.1"));
    assert_eq!(*source.used.lock().expect("held"), [address("10.1.0.1")]);
}
