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
    sync::{mpsc, oneshot},
};

use crate::{
    audit::{Lost, Record, chain::KINDS},
    kernel::decode,
    proxy::Proxy,
};
use tell::{EARLY, Teller};

/// Between two looks at an empty ring: of what comes meanwhile, only the first event wakes
/// this agent.
const REST: Duration = Duration::from_millis(10);
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
/// Events that are taken in one turn.
const TURN: usize = 4_096;
/// How often losses are looked for.
const INTERVAL: Duration = Duration::from_secs(1);
/// How often stories that wait for their sockets are looked at.
const SWEEP: Duration = Duration::from_millis(250);

/// What is asked of the task that reads the kernel's events.
pub enum Command {
    /// Another agent reads them from now on. Answered when all that was there is told.
    Pause(oneshot::Sender<()>),
    /// This one does again.
    Resume,
    /// The last connection has ended, and with it this.
    Enough,
}

/// Runs until the last connection has ended: their sockets are to be told of.
pub async fn kernel_events(proxy: Arc<Proxy>, mut commands: mpsc::Receiver<Command>) {
    let _when_it_ends = Blinded(proxy.clone());
    let mut teller = Teller::new(proxy.clone());
    let mut ring = match open(&proxy) {
        Ok(ring) => Some(ring),
        Err(error) => return tracing::error!(%error, "cannot wait for kernel events"),
    };
    let mut rested = tokio::time::Instant::now();
    let mut tick = tokio::time::interval(INTERVAL);
    let mut sweep = tokio::time::interval(SWEEP);
    loop {
        let events = async {
            match &mut ring {
                Some(ring) => {
                    tokio::time::sleep_until(rested).await;
                    ring.readable_mut().await
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ready = events => {
                let Ok(mut ready) = ready else { return };
                // Not for ever: the clock has its turn, too.
                if !take(ready.get_inner_mut(), &mut teller) {
                    ready.clear_ready();
                    rested = tokio::time::Instant::now() + REST;
                }
            }
            _ = tick.tick() => if ring.is_some() {
                losses(&proxy);
                proxy.elders.forget_dead();
            },
            _ = sweep.tick() => {
                teller.retry(Instant::now());
                proxy.join.sweep(Instant::now(), false);
            }
            command = commands.recv() => match command {
                Some(Command::Pause(done)) => {
                    if let Some(mut ring) = ring.take() {
                        while take(ring.get_mut(), &mut teller) {}
                        losses(&proxy);
                    }
                    let _gone = done.send(());
                }
                Some(Command::Resume) => match open(&proxy) {
                    Ok(again) => ring = Some(again),
                    Err(error) => {
                        return tracing::error!(%error, "cannot wait for kernel events again");
                    }
                },
                Some(Command::Enough) | None => {
                    if let Some(mut ring) = ring {
                        let _more = take(ring.get_mut(), &mut teller);
                        teller.retry(Instant::now() + EARLY);
                        losses(&proxy);
                    }
                    return;
                }
            },
        }
    }
}

/// Begins to read where the last reader has stopped.
fn open(proxy: &Proxy) -> anyhow::Result<AsyncFd<RingBuf<MapData>>> {
    for (kind, (counter, ..)) in LOSSES.into_iter().enumerate() {
        // The kernel counts anew where its maps are new.
        let now = proxy.kernel.counter(counter);
        let reported = proxy.audit.reported(kind).min(now);
        proxy.audit.set_reported(kind, reported);
    }
    let ring = proxy.kernel.events()?;
    // SAFETY: the ring owns its map's descriptor, one and the same until dropped.
    Ok(unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }?)
}

/// Takes so many events at most; whether there may be more.
fn take(ring: &mut RingBuf<MapData>, teller: &mut Teller) -> bool {
    for _ in 0..TURN {
        let Some(bytes) = ring.next() else {
            return false;
        };
        if let Some(event) = decode(&bytes) {
            teller.tell(event);
        }
    }
    true
}

/// However it ends, stories do not wait for what nobody tells.
struct Blinded(Arc<Proxy>);

impl Drop for Blinded {
    fn drop(&mut self) {
        self.0.join.sees_no_more();
    }
}

/// Tells what the kernel could not tell, also of the time without an agent.
fn losses(proxy: &Proxy) {
    for (kind, (counter, lost, reason)) in LOSSES.into_iter().enumerate() {
        let (now, before) = (proxy.kernel.counter(counter), proxy.audit.reported(kind));
        // A full queue is asked again.
        if now > before && proxy.audit.record(Record::gap(lost, now - before, reason)) {
            proxy.audit.set_reported(kind, now);
        }
    }
}
