//! Conversations of the agent in charge with those that drain.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::Duration,
};

use super::wire::Channel;

/// Either one is here when all are dismissed, or it is not let in.
#[derive(Default)]
pub struct Links {
    state: Mutex<State>,
    left: Condvar,
}

#[derive(Default)]
struct State {
    dismissed: bool,
    open: Vec<Arc<Channel>>,
}

/// A conversation that is let in, as long as it lasts.
pub struct Admitted<'a> {
    links: &'a Links,
    channel: Arc<Channel>,
}

impl Links {
    /// `None`: all are dismissed.
    pub fn admit(&self, channel: &Arc<Channel>) -> Option<Admitted<'_>> {
        let mut state = self.lock();
        if state.dismissed {
            return None;
        }
        state.open.push(channel.clone());
        Some(Admitted {
            links: self,
            channel: channel.clone(),
        })
    }

    /// Nobody is heard any more. What was said until now is answered within the limit, as
    /// far as that goes; what is not, is for the next agent.
    pub fn dismiss(&self, limit: Duration) {
        let mut state = self.lock();
        state.dismissed = true;
        state.open.iter().for_each(|channel| channel.hear_no_more());
        let talking = |state: &mut State| !state.open.is_empty();
        let waited = self.left.wait_timeout_while(state, limit, talking);
        drop(waited.expect("no panic while it is held"));
    }

    pub fn dismissed(&self) -> bool {
        self.lock().dismissed
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while it is held")
    }
}

impl Drop for Admitted<'_> {
    fn drop(&mut self) {
        let mut state = self.links.lock();
        state
            .open
            .retain(|other| !Arc::ptr_eq(other, &self.channel));
        self.links.left.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_before_is_dismissed_and_who_comes_later_is_not_let_in() {
        let (links, (near, far)) = (Links::default(), Channel::pair());
        let near = Arc::new(near);
        let admitted = links.admit(&near).expect("let in");
        let heard = std::thread::scope(|scope| {
            let talk = scope.spawn(move || {
                let _here = admitted;
                near.receive::<u64>().is_ok()
            });
            // As long as it takes: who is here leaves.
            links.dismiss(Duration::from_secs(600));
            talk.join().expect("it left")
        });
        assert!(!heard, "it was told to hear no more");
        assert!(links.dismissed());
        assert!(links.admit(&Arc::new(far)).is_none());
    }
}
