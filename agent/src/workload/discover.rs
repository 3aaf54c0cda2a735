//! Discovery on demand: where the table does not hold the whole cluster, who dials an
//! address that it lacks waits until the source of workloads has been asked about it.

use std::{
    collections::{BTreeSet, HashMap},
    future::Future,
    net::IpAddr,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use ipnet::IpNet;
use tokio::{
    sync::{OnceCell, Semaphore},
    time::{Instant, timeout},
};

/// Finds what is at an address that the table does not know.
pub trait Discover: Send + Sync + 'static {
    /// Addresses that pods may have. What is dialled there and is not known is asked
    /// about; everything else is outside the mesh unless the table has it.
    fn ranges(&self) -> Arc<BTreeSet<IpNet>>;

    /// What is at this address, of a pod or of a service. It may be asked at any time,
    /// many addresses at once, each once at a time.
    fn discover<'a>(&'a self, address: IpAddr) -> Pin<Box<dyn Future<Output = Found> + Send + 'a>>;

    /// A connection goes to this address, which the table knows: it is to stay known.
    /// Called for every connection to another node.
    fn used(&self, address: IpAddr);
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// It is in the table now (and stays, watched, while it is used).
    Known,
    /// The cluster has no pod there: not the mesh's.
    Foreign,
    /// Could not be asked in time: fail closed.
    Unknown(String),
}

/// How long is waited for what.
struct Times {
    /// Who dialled, for an answer.
    limit: Duration,
    /// An answer that brought nothing is good for so long: who dials again and again does
    /// not ask as often.
    holds: Duration,
    /// Who is dialled, to learn who dials, which only records and metrics want.
    briefly: Duration,
    /// Nobody waits for that so long after an answer did not come.
    rest: Duration,
    /// A client that is no pod is not asked about again: probes may come from one.
    stranger: Duration,
}

const TIMES: Times = Times {
    limit: Duration::from_secs(2),
    holds: Duration::from_secs(1),
    briefly: Duration::from_millis(500),
    rest: Duration::from_secs(5),
    stranger: Duration::from_secs(60),
};

/// Connections that wait at once: those that go out, and those that come in, which
/// anybody can open.
const WAITING: usize = 1_024;
const INTRODUCED: usize = 256;
/// Addresses that are asked about, or were just now.
const ADDRESSES: usize = 4_096;

/// Asks on behalf of connections: once at a time about an address, and not for long.
pub struct Discovery {
    source: Arc<dyn Discover>,
    times: Times,
    questions: Mutex<HashMap<IpAddr, Arc<Question>>>,
    waiting: Semaphore,
    introduced: Semaphore,
    /// Until then, it is not worth while to wait for names.
    resting: Mutex<Option<Instant>>,
}

#[derive(Default)]
struct Question(OnceCell<(Found, Instant)>);

impl Question {
    /// Whether who asks now is served by it.
    fn holds(&self, times: &Times) -> bool {
        match self.0.get() {
            // The table has it, or has lost it since.
            Some((Found::Known, _)) => false,
            Some((_, at)) => at.elapsed() < times.holds,
            None => true,
        }
    }
}

impl Discovery {
    pub fn new(source: Arc<dyn Discover>) -> Self {
        Self {
            source,
            times: TIMES,
            questions: Mutex::default(),
            waiting: Semaphore::new(WAITING),
            introduced: Semaphore::new(INTRODUCED),
            resting: Mutex::default(),
        }
    }

    pub fn ranges(&self) -> Arc<BTreeSet<IpNet>> {
        self.source.ranges()
    }

    pub fn used(&self, address: IpAddr) {
        self.source.used(address);
    }

    /// What is at an address that the table lacks. After `Known` it is to be looked up
    /// there again.
    pub async fn ask(&self, address: IpAddr) -> Found {
        let Ok(_turn) = self.waiting.try_acquire() else {
            return Found::Unknown(format!("{WAITING} connections wait for an answer already"));
        };
        self.answer(address).await
    }

    async fn answer(&self, address: IpAddr) -> Found {
        let Some(question) = self.question(address) else {
            return Found::Unknown(format!("{ADDRESSES} addresses are asked about already"));
        };
        let asking = async {
            let asked = timeout(self.times.limit, self.source.discover(address)).await;
            let found = asked.unwrap_or_else(|_elapsed| {
                Found::Unknown(format!("no answer within {:?}", self.times.limit))
            });
            (found, Instant::now())
        };
        let (found, _) = question.0.get_or_init(|| asking).await;
        if matches!(found, Found::Unknown(_)) {
            self.rest();
        }
        found.clone()
    }

    fn rest(&self) {
        let until = Instant::now() + self.times.rest;
        *self.resting.lock().expect("no panic while it is held") = Some(until);
    }

    /// Asks who a client is that the table lacks, for what is told of it. Nothing is
    /// decided by that: it takes little time, or is not waited for.
    pub async fn introduce(&self, client: IpAddr) {
        let resting = *self.resting.lock().expect("no panic while it is held");
        let rests = resting.is_some_and(|until| until > Instant::now());
        let may_be_a_pod = || self.ranges().iter().any(|range| range.contains(&client));
        if rests || self.is_stranger(client) || !may_be_a_pod() {
            return;
        }
        let Ok(_turn) = self.introduced.try_acquire() else {
            return;
        };
        if timeout(self.times.briefly, self.answer(client))
            .await
            .is_err()
        {
            self.rest();
        }
    }

    fn is_stranger(&self, client: IpAddr) -> bool {
        let questions = self.questions.lock().expect("no panic while it is held");
        let answer = questions.get(&client).and_then(|q| q.0.get());
        answer.is_some_and(|(found, at)| {
            *found == Found::Foreign && at.elapsed() < self.times.stranger
        })
    }

    fn question(&self, address: IpAddr) -> Option<Arc<Question>> {
        let mut questions = self.questions.lock().expect("no panic while it is held");
        if let Some(question) = questions.get(&address)
            && question.holds(&self.times)
        {
            return Some(question.clone());
        }
        if questions.len() >= ADDRESSES {
            // Some wait for it, or it was answered just now.
            questions.retain(|_, q| {
                Arc::strong_count(q) > 1 || q.0.initialized() && q.holds(&self.times)
            });
        }
        if questions.len() >= ADDRESSES {
            return None;
        }
        let question = Arc::<Question>::default();
        questions.insert(address, question.clone());
        Some(question)
    }
}

#[cfg(test)]
mod tests;
