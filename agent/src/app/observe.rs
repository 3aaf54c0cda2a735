//! Kernel events of enrolled pods, from the ring to the audit log. What the ring
//! did not take is counted in the kernel and becomes a gap record here.

use std::{sync::Arc, time::Duration};

use aya::maps::{MapData, RingBuf};
use postern_ebpf::Counter;
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    audit::{Lost, Record, event},
    kernel::{EventKind, decode},
    lifecycle::Watcher,
    proxy::Proxy,
};

const LOSSES: [(Counter, Lost); 10] = [
    (Counter::LostSocket, Lost::KernelSocket),
    (Counter::LostExec, Lost::KernelExec),
    (Counter::LostExit, Lost::KernelExit),
    (Counter::LostDatagram, Lost::KernelUdp),
    (Counter::LostRaw, Lost::KernelRaw),
    (Counter::LimitedSocket, Lost::KernelRate),
    (Counter::LimitedExec, Lost::KernelRate),
    (Counter::LimitedExit, Lost::KernelRate),
    (Counter::LimitedDatagram, Lost::KernelRate),
    (Counter::LimitedRaw, Lost::KernelRate),
];
/// How often losses are looked for.
const INTERVAL: Duration = Duration::from_secs(1);

pub async fn kernel_events(proxy: Arc<Proxy>, ring: RingBuf<MapData>, mut stop: Watcher) {
    // SAFETY: the ring owns its map's descriptor, one and the same until dropped.
    let ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) };
    let mut ring = match ring {
        Ok(ring) => ring,
        Err(error) => return tracing::error!(%error, "cannot wait for kernel events"),
    };
    let mut reported = LOSSES.map(|(counter, _)| proxy.kernel.counter(counter));
    let mut tick = tokio::time::interval(INTERVAL);
    loop {
        tokio::select! {
            ready = ring.readable_mut() => {
                let Ok(mut ready) = ready else { return };
                let ring = ready.get_inner_mut();
                while let Some(bytes) = ring.next() {
                    record(&proxy, &bytes);
                }
                ready.clear_ready();
            }
            _ = tick.tick() => {
                for ((counter, lost), reported) in LOSSES.into_iter().zip(&mut reported) {
                    let now = proxy.kernel.counter(counter);
                    if now > *reported {
                        proxy.audit.record(Record::gap(lost, now - *reported));
                        *reported = now;
                    }
                }
            }
            () = stop.triggered() => return,
        }
    }
}

fn record(proxy: &Proxy, bytes: &[u8]) {
    let Some(seen) = decode(bytes) else { return };
    let pods = proxy.pods.load();
    // A pod that has left since, or is not known yet: nobody to attribute it to.
    let workload = pods
        .in_netns(seen.netns)
        .map(|pod| pod.workload.load_full());
    let refused = matches!(seen.kind, EventKind::Failed { .. });
    if workload.is_some() || refused {
        proxy.audit.record(event(seen, workload.as_deref()));
    }
}
