//! Sockets that an earlier agent followed and that are open still are followed on. Those
//! that closed while nobody looked are forgotten: nobody saw their end.

use std::collections::{HashMap, HashSet};

use super::{
    diag::tcp_sockets,
    load::Kernel,
    maps::{forget, hold},
    netns::Netns,
};

/// The socket is closed, and what is left keeps its cookie.
const TIME_WAIT: u8 = 6;

impl Kernel {
    /// What `SOCKETS` holds before this agent's observers are attached.
    pub(super) fn inherit_sockets(&self) {
        let mut by_netns: HashMap<u64, Vec<u64>> = HashMap::new();
        for (cookie, tracked) in hold(&self.maps.sockets).iter().flatten() {
            by_netns.entry(tracked.netns).or_default().push(cookie);
        }
        *hold(&self.inherited) = by_netns;
    }

    /// Forgets the sockets of a namespace that are closed.
    pub(super) fn forget_closed(&self, netns: &Netns) {
        let Some(inherited) = hold(&self.inherited).remove(&netns.cookie) else {
            return;
        };
        match tcp_sockets(netns) {
            Ok(open) => {
                let open: HashSet<u64> = open
                    .iter()
                    .filter(|socket| socket.state != TIME_WAIT)
                    .map(|socket| socket.cookie)
                    .collect();
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
