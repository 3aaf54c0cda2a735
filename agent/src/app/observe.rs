//! Kernel events of enrolled pods, from the ring to the audit log. What the ring
//! did not take is counted in the kernel and becomes a gap record here.

pub mod tell;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use aya::maps::{MapData, RingBuf};
use postern_ebpf::Counter;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::oneshot,
};

use crate::{
    audit::{Lost, Record, chain::KINDS},
    kernel::decode,
    proxy::Proxy,
};
use tell::Teller;

/// What the kernel counts as lost, and why. Their order is the ledger's.
const LOSSES: [(Counter, Lost, &str); 10] = [
    (Counter::LostSocket, Lost::KernelSocket, "ring"),
    (Counter::LostExec, Lost::KernelExec, "ring"),
    (Counter::LostExit, Lost::KernelExit, "ring"),
    (Counter::LostDatagram, Lost::KernelUdp, "ring"),
    (Counter::LostRaw, Lost::KernelRaw, "ring"),
    (Counter::LimitedSocket, Lost::KernelSocket, "rate"),
    (Counter::LimitedExec, Lost::KernelExec, "rate"),
    (Counter::LimitedExit, Lost::KernelExit, "rate"),
    (Counter::LimitedDatagram, Lost::KernelUdp, "rate"),
    (Counter::LimitedRaw, Lost::KernelRaw, "rate"),
];
const _: () = assert!(LOSSES.len() <= KINDS);
/// How often losses are looked for.
const INTERVAL: Duration = Duration::from_secs(1);
/// How often stories that wait for their sockets are looked at.
const SWEEP: Duration = Duration::from_millis(250);

/// Runs until the last connection has ended: their sockets are to be told of.
pub async fn kernel_events(
    proxy: Arc<Proxy>,
    ring: RingBuf<MapData>,
    mut enough: oneshot::Receiver<()>,
) {
    // SAFETY: the ring owns its map's descriptor, one and the same until dropped.
    let ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) };
    let mut ring = match ring {
        Ok(ring) => ring,
        Err(error) => return tracing::error!(%error, "cannot wait for kernel events"),
    };
    let mut teller = Teller::new(proxy.clone());
    for (kind, (counter, ..)) in LOSSES.into_iter().enumerate() {
        // The kernel counts anew where its maps are new.
        let now = proxy.kernel.counter(counter);
        let reported = proxy.audit.reported(kind).min(now);
        proxy.audit.set_reported(kind, reported);
    }
    let mut tick = tokio::time::interval(INTERVAL);
    let mut sweep = tokio::time::interval(SWEEP);
    loop {
        tokio::select! {
            ready = ring.readable_mut() => {
                let Ok(mut ready) = ready else { return };
                let ring = ready.get_inner_mut();
                while let Some(bytes) = ring.next() {
                    if let Some(event) = decode(&bytes) {
                        teller.tell(event);
                    }
                }
                ready.clear_ready();
            }
            _ = tick.tick() => losses(&proxy),
            _ = sweep.tick() => {
                teller.retry(Instant::now());
                proxy.join.sweep(Instant::now(), false);
            }
            _ = &mut enough => {
                let ring = ring.get_mut();
                while let Some(bytes) = ring.next() {
                    if let Some(event) = decode(&bytes) {
                        teller.tell(event);
                    }
                }
                teller.retry(Instant::now());
                proxy.join.sweep(Instant::now(), true);
                return losses(&proxy);
            }
        }
    }
}

/// Tells what the kernel could not tell, also of the time without an agent.
fn losses(proxy: &Proxy) {
    for (kind, (counter, lost, reason)) in LOSSES.into_iter().enumerate() {
        let (now, before) = (proxy.kernel.counter(counter), proxy.audit.reported(kind));
        if now > before {
            proxy.audit.record(Record::gap(lost, now - before, reason));
            proxy.audit.set_reported(kind, now);
        }
    }
}
