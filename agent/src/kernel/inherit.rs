//! Sockets that an earlier agent followed and that are open still are followed on. Those
//! that closed while nobody looked are forgotten: nobody saw their end. Nor does anybody see
//! the end of one that is closed by an interrupt while the same program runs on that
//! processor for another: the kernel runs no program within itself.

use std::{
    collections::{HashMap, HashSet},
    io,
};

use super::{
    diag::tcp_sockets,
    maps::{forget, hold},
    netns::Netns,
    pins::Kernel,
};

/// The socket is closed, and what is left keeps its cookie.
const TIME_WAIT: u8 = 6;

impl Kernel {
    /// Forgets sockets of these namespaces that are closed, and were when this was asked
    /// last: one that is just being made, or told, is not there, either.
    pub fn forget_missed<'a>(&self, namespaces: impl Iterator<Item = &'a Netns>) {
        let mut by_netns = self.followed();
        let mut gone = HashSet::new();
        for netns in namespaces {
            let Some(followed) = by_netns.remove(&netns.cookie) else {
                continue;
            };
            match open_sockets(netns) {
                Ok(open) => gone.extend(followed.into_iter().filter(|c| !open.contains(c))),
                Err(error) => tracing::warn!(%error, "cannot list a pod's sockets"),
            }
        }
        let mut missed = hold(&self.missed);
        for cookie in gone.extract_if(|cookie| missed.contains(cookie)) {
            forget(&self.maps.sockets, &cookie);
        }
        *missed = gone;
    }

    /// Cookies of what `SOCKETS` holds, by namespace.
    fn followed(&self) -> HashMap<u64, Vec<u64>> {
        let mut by_netns: HashMap<u64, Vec<u64>> = HashMap::new();
        for (cookie, tracked) in hold(&self.maps.sockets).iter().flatten() {
            by_netns.entry(tracked.netns).or_default().push(cookie);
        }
        by_netns
    }

    /// What `SOCKETS` holds before this agent's observers are attached.
    pub(super) fn inherit_sockets(&self) {
        *hold(&self.inherited) = self.followed();
    }

    /// Forgets the sockets of a namespace that are closed.
    pub(super) fn forget_closed(&self, netns: &Netns) {
        let Some(inherited) = hold(&self.inherited).remove(&netns.cookie) else {
            return;
        };
        match open_sockets(netns) {
            Ok(open) => {
                for cookie in inherited.iter().filter(|cookie| !open.contains(cookie)) {
                    forget(&self.maps.sockets, cookie);
                }
            }
            Err(error) => tracing::warn!(
                %error,
                "cannot list a pod's sockets: those that closed while no agent ran stay in SOCKETS"
            ),
        }
    }

    /// Forgets the sockets of all namespaces but these.
    pub(super) fn forget_inherited(&self, keep: impl Fn(u64) -> bool) {
        hold(&self.inherited).retain(|netns, cookies| {
            let kept = keep(*netns);
            if !kept {
                cookies
                    .iter()
                    .for_each(|cookie| forget(&self.maps.sockets, cookie));
            }
            kept
        });
    }
}

fn open_sockets(netns: &Netns) -> io::Result<HashSet<u64>> {
    let sockets = tcp_sockets(netns)?.into_iter();
    let open = sockets.filter(|socket| socket.state != TIME_WAIT);
    Ok(open.map(|socket| socket.cookie).collect())
}
