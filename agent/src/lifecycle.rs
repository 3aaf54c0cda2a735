//! Drain: a trigger tells every watcher to stop taking work; shutdown is over when
//! all watchers are dropped. When its time is up, what is left is told to end.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::{
    sync::{Notify, mpsc},
    time::timeout,
};

const DRAINING: u8 = 1;
const ENDING: u8 = 2;

/// Who waits takes a lock of what it waits for whenever it is polled, which is at each wake
/// of its connection: threads have one of their own.
const PLACES: usize = 16;

thread_local! {
    static PLACE: usize = {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        NEXT.fetch_add(1, Ordering::Relaxed) % PLACES
    };
}

/// How far it has come.
#[derive(Default)]
struct Stage {
    reached: AtomicU8,
    changed: [Notify; PLACES],
}

pub struct Trigger {
    stage: Arc<Stage>,
    gone: mpsc::Receiver<()>,
}

/// Held by every task that must end before the agent does.
#[derive(Clone)]
pub struct Watcher {
    stage: Arc<Stage>,
    _alive: mpsc::Sender<()>,
}

pub fn drain() -> (Trigger, Watcher) {
    let stage = Arc::<Stage>::default();
    let (alive, gone) = mpsc::channel(1);
    let watcher = Watcher {
        stage: stage.clone(),
        _alive: alive,
    };
    (Trigger { stage, gone }, watcher)
}

impl Stage {
    fn reach(&self, stage: u8) {
        self.reached.store(stage, Ordering::SeqCst);
        self.changed.iter().for_each(Notify::notify_waiters);
    }

    fn has_reached(&self, stage: u8) -> bool {
        self.reached.load(Ordering::SeqCst) >= stage
    }

    /// A part of each connection's task: small.
    async fn wait_for(&self, stage: u8) {
        loop {
            // Before the look: what changes behind it is noticed.
            let changed = self.changed[PLACE.with(|place| *place)].notified();
            if self.has_reached(stage) {
                return;
            }
            changed.await;
        }
    }
}

impl Trigger {
    /// Tells all watchers and waits for them; when the time is up, tells them to end
    /// and gives them a moment for it. Returns whether all went by themselves.
    pub async fn drain(mut self, limit: Duration) -> bool {
        const MOMENT: Duration = Duration::from_secs(1);
        self.stage.reach(DRAINING);
        let drained = timeout(limit, self.gone.recv()).await.is_ok();
        if !drained {
            self.stage.reach(ENDING);
            let _some_are_stuck = timeout(MOMENT, self.gone.recv()).await;
        }
        drained
    }
}

/// Without it nobody would tell: that is the end, too.
impl Drop for Trigger {
    fn drop(&mut self) {
        self.stage.reach(ENDING);
    }
}

pin_project! {
    /// Work, and what is held until it is over: a watcher above all, whatever the work does
    /// with one of its own. A connection is over when its story is told, not when its last
    /// byte is carried.
    pub struct Held<F, H> {
        // In the order in which they are dropped.
        #[pin]
        work: F,
        held: H,
    }
}

impl<F, H> Held<F, H> {
    pub fn new(work: F, held: H) -> Self {
        Self { work, held }
    }
}

impl<F: Future, H> Future for Held<F, H> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        self.project().work.poll(cx)
    }
}

impl Watcher {
    /// Returns when the drain begins: take no more work.
    pub fn triggered(&self) -> impl Future<Output = ()> {
        self.stage.wait_for(DRAINING)
    }

    /// Whether the drain has begun.
    pub fn is_triggered(&self) -> bool {
        self.stage.has_reached(DRAINING)
    }

    /// Returns when its time is up: end what is left.
    pub fn time_is_up(&self) -> impl Future<Output = ()> {
        self.stage.wait_for(ENDING)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_drain_ends_with_its_last_watcher() {
        let (trigger, watcher) = drain();
        assert!(!watcher.is_triggered());
        let task = tokio::spawn(async move {
            watcher.triggered().await;
            watcher.is_triggered()
        });
        assert!(trigger.drain(Duration::from_secs(60)).await);
        assert!(task.await.expect("ended"));
    }

    #[tokio::test]
    async fn a_drain_ends_with_what_a_watcher_is_held_for() {
        let (trigger, watcher) = drain();
        let (tell, mut told) = mpsc::channel(1);
        let own = watcher.clone();
        let work = async move {
            drop(own);
            tokio::time::sleep(Duration::from_millis(20)).await;
            tell.send(()).await.expect("heard");
        };
        tokio::spawn(Held::new(work, watcher));
        assert!(trigger.drain(Duration::from_secs(60)).await);
        assert!(told.try_recv().is_ok());
    }

    #[tokio::test]
    async fn without_a_trigger_it_is_over() {
        let (trigger, watcher) = drain();
        let task = tokio::spawn(async move { watcher.time_is_up().await });
        tokio::task::yield_now().await;
        drop(trigger);
        task.await.expect("told");
    }

    #[tokio::test]
    async fn what_is_left_is_told_when_the_time_is_up() {
        let (trigger, watcher) = drain();
        let task = tokio::spawn(async move { watcher.time_is_up().await });
        assert!(!trigger.drain(Duration::from_millis(10)).await);
        task.await.expect("told");
    }
}
