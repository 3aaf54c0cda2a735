//! Drain: a trigger tells every watcher to stop taking work; shutdown is over when
//! all watchers are dropped, or when its time is up.

use std::time::Duration;

use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};

pub struct Trigger {
    signal: watch::Sender<bool>,
    gone: mpsc::Receiver<()>,
}

/// Held by every task that must end before the agent does.
#[derive(Clone)]
pub struct Watcher {
    signal: watch::Receiver<bool>,
    _alive: mpsc::Sender<()>,
}

pub fn drain() -> (Trigger, Watcher) {
    let (sender, signal) = watch::channel(false);
    let (alive, gone) = mpsc::channel(1);
    (Trigger { signal: sender, gone }, Watcher { signal, _alive: alive })
}

impl Trigger {
    /// Tells all watchers and waits for them; `false` when the time ran out.
    pub async fn drain(mut self, limit: Duration) -> bool {
        let _nobody_listening = self.signal.send(true);
        timeout(limit, self.gone.recv()).await.is_ok()
    }
}

impl Watcher {
    /// Returns when the drain begins.
    pub async fn triggered(&mut self) {
        // An error means that the trigger is gone: that is a drain, too.
        let _gone = self.signal.wait_for(|draining| *draining).await;
    }

    pub fn is_triggered(&self) -> bool {
        *self.signal.borrow()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_drain_ends_with_its_last_watcher_or_its_time() {
        let (trigger, mut watcher) = drain();
        let task = tokio::spawn(async move {
            watcher.triggered().await;
            tokio::time::sleep(Duration::from_secs(5)).await;
        });
        assert!(trigger.drain(Duration::from_secs(10)).await);
        task.await.expect("ended");

        let (trigger, watcher) = drain();
        assert!(!trigger.drain(Duration::from_secs(1)).await);
        assert!(watcher.is_triggered());
    }
}
