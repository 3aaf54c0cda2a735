//! Drain: a trigger tells every watcher to stop taking work; shutdown is over when
//! all watchers are dropped. When its time is up, what is left is told to end.

use std::time::Duration;

use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
enum Stage {
    Running,
    Draining,
    Ending,
}

pub struct Trigger {
    stage: watch::Sender<Stage>,
    gone: mpsc::Receiver<()>,
}

/// Held by every task that must end before the agent does.
#[derive(Clone)]
pub struct Watcher {
    stage: watch::Receiver<Stage>,
    _alive: mpsc::Sender<()>,
}

pub fn drain() -> (Trigger, Watcher) {
    let (sender, stage) = watch::channel(Stage::Running);
    let (alive, gone) = mpsc::channel(1);
    (
        Trigger {
            stage: sender,
            gone,
        },
        Watcher {
            stage,
            _alive: alive,
        },
    )
}

impl Trigger {
    /// Tells all watchers and waits for them; when the time is up, tells them to end
    /// and gives them a moment for it. Returns whether all went by themselves.
    pub async fn drain(mut self, limit: Duration) -> bool {
        const MOMENT: Duration = Duration::from_secs(1);
        let _nobody_listening = self.stage.send(Stage::Draining);
        let drained = timeout(limit, self.gone.recv()).await.is_ok();
        if !drained {
            let _nobody_listening = self.stage.send(Stage::Ending);
            let _some_are_stuck = timeout(MOMENT, self.gone.recv()).await;
        }
        drained
    }
}

impl Watcher {
    /// Held until `work` is over, whatever that does with a watcher of its own: a
    /// connection is over when its story is told, not when its last byte is carried.
    pub async fn hold<T>(self, work: impl Future<Output = T>) -> T {
        let done = work.await;
        drop(self);
        done
    }

    /// Returns when the drain begins: take no more work.
    pub async fn triggered(&mut self) {
        self.reached(Stage::Draining).await;
    }

    /// Whether the drain has begun.
    pub fn is_triggered(&self) -> bool {
        *self.stage.borrow() >= Stage::Draining
    }

    /// Returns when its time is up: end what is left.
    pub async fn time_is_up(&mut self) {
        self.reached(Stage::Ending).await;
    }

    async fn reached(&mut self, wanted: Stage) {
        // An error means that the trigger is gone: that is the end, too.
        let _gone = self.stage.wait_for(|stage| *stage >= wanted).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_drain_ends_with_its_last_watcher() {
        let (trigger, mut watcher) = drain();
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
        tokio::spawn(watcher.hold(async move {
            drop(own);
            tokio::time::sleep(Duration::from_millis(20)).await;
            tell.send(()).await.expect("heard");
        }));
        assert!(trigger.drain(Duration::from_secs(60)).await);
        assert!(told.try_recv().is_ok());
    }

    #[tokio::test]
    async fn what_is_left_is_told_when_the_time_is_up() {
        let (trigger, mut watcher) = drain();
        let task = tokio::spawn(async move { watcher.time_is_up().await });
        assert!(!trigger.drain(Duration::from_millis(10)).await);
        task.await.expect("told");
    }
}
