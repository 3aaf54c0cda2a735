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
    audit::{Lost, Record},
    kernel::decode,
    proxy::Proxy,
};
use tell::Teller;

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
    let mut reported = LOSSES.map(|(counter, _)| proxy.kernel.counter(counter));
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
            _ = tick.tick() => {
                for ((counter, lost), reported) in LOSSES.into_iter().zip(&mut reported) {
                    let now = proxy.kernel.counter(counter);
                    if now > *reported {
                        proxy.audit.record(Record::gap(lost, now - *reported));
                        *reported = now;
                    }
                }
            }
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
                return;
            }
        }
    }
}
