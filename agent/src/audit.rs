//! The audit log: one JSON object a line, one line for each connection at its end
//! and for each denial, and one for each kernel event of an enrolled pod.
//!
//! Nothing reads the log back, and it never slows traffic: a record that finds the
//! queue full, or a disk that takes no more, is counted, and the loss is written
//! as a record of kind `gap` as soon as writing works again.

pub mod chain;
mod record;

use std::{
    fs::OpenOptions,
    io::{self, BufWriter, Write},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    thread::JoinHandle,
    time::Duration,
};

pub use record::{
    AuthorityRecord, Bytes, Connection, GrantRecord, Lost, OutboundRecord, Peer, Process, Record,
    Reporter, RequestRecord, TokenRecord, Transport, Verdict, event,
};

/// How often a loss is looked for when nothing else is written.
const IDLE: Duration = Duration::from_secs(1);

/// Where records are handed in. Cheap to clone.
#[derive(Clone)]
pub struct Audit {
    node: Arc<str>,
    queue: SyncSender<Record>,
    losses: Arc<Losses>,
}

/// Records that were lost before they reached the log.
#[derive(Default)]
struct Losses {
    queue: AtomicU64,
    disk: AtomicU64,
    written: AtomicU64,
}

impl Audit {
    /// Opens the log and starts its writer, which ends when the last clone is dropped.
    pub fn open(
        node: &str,
        file: Option<&Path>,
        queue: usize,
    ) -> io::Result<(Self, JoinHandle<()>)> {
        let sink: Box<dyn Write + Send> = match file {
            None => Box::new(io::stdout()),
            Some(path) => Box::new(
                OpenOptions::new()
                    .create(true)
                    .append(true)
                    .mode(0o600)
                    .open(path)?,
            ),
        };
        let (sender, receiver) = sync_channel(queue);
        let losses = Arc::new(Losses::default());
        let writer = Writer {
            node: node.into(),
            sink: BufWriter::new(sink),
            losses: losses.clone(),
            reported: 0,
        };
        let thread = std::thread::Builder::new()
            .name("audit".into())
            .spawn(move || writer.run(&receiver))?;
        Ok((
            Self {
                node: node.into(),
                queue: sender,
                losses,
            },
            thread,
        ))
    }

    pub fn node(&self) -> &str {
        &self.node
    }

    pub fn record(&self, record: Record) {
        match self.queue.try_send(record) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.losses.queue.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Records lost so far, for metrics.
    pub fn lost(&self) -> u64 {
        self.losses.queue.load(Ordering::Relaxed) + self.losses.disk.load(Ordering::Relaxed)
    }

    pub fn written(&self) -> u64 {
        self.losses.written.load(Ordering::Relaxed)
    }
}

struct Writer<W: Write> {
    node: Box<str>,
    sink: BufWriter<W>,
    losses: Arc<Losses>,
    /// Losses that stand in the log already.
    reported: u64,
}

impl<W: Write> Writer<W> {
    fn run(mut self, queue: &Receiver<Record>) {
        loop {
            match queue.recv_timeout(IDLE) {
                Ok(record) => {
                    self.gap();
                    self.write(&record);
                    // One flush for all that is waiting.
                    while let Ok(next) = queue.try_recv() {
                        self.write(&next);
                    }
                }
                Err(RecvTimeoutError::Timeout) => self.gap(),
                Err(RecvTimeoutError::Disconnected) => {
                    self.gap();
                    let _nobody_left_to_tell = self.sink.flush();
                    return;
                }
            }
            // What cannot be written now stays in the buffer for the next time.
            let _disk_is_full = self.sink.flush();
        }
    }

    fn gap(&mut self) {
        let queue = self.losses.queue.load(Ordering::Relaxed);
        let disk = self.losses.disk.load(Ordering::Relaxed);
        let lost = queue + disk - self.reported;
        if lost > 0 && self.write(&Record::gap(Lost::Records, lost)) {
            self.reported += lost;
        }
    }

    fn write(&mut self, record: &Record) -> bool {
        let line = record.line(&self.node);
        let written = self.sink.write_all(line.as_bytes()).is_ok();
        if written {
            self.losses.written.fetch_add(1, Ordering::Relaxed);
        } else {
            self.losses.disk.fetch_add(1, Ordering::Relaxed);
        }
        written
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// A disk that is full until told otherwise.
    #[derive(Clone, Default)]
    struct Disk(Arc<Mutex<(bool, Vec<u8>)>>);

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut disk = self.0.lock().expect("lock");
            if disk.0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            disk.1.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn losses_become_gap_records() {
        let disk = Disk::default();
        let losses = Arc::new(Losses::default());
        let mut writer = Writer {
            node: "n".into(),
            sink: BufWriter::with_capacity(1, disk.clone()),
            losses: losses.clone(),
            reported: 0,
        };
        disk.0.lock().expect("lock").0 = true;
        assert!(!writer.write(&Record::gap(Lost::KernelExec, 1)));
        writer.gap();
        disk.0.lock().expect("lock").0 = false;
        losses.queue.fetch_add(3, Ordering::Relaxed);
        writer.gap();
        writer.gap();
        let written = String::from_utf8(disk.0.lock().expect("lock").1.clone()).expect("text");
        let lines: Vec<serde_json::Value> = written
            .lines()
            .map(|l| serde_json::from_str(l).expect("JSON"))
            .collect();
        assert_eq!(lines.len(), 1, "{written}");
        assert_eq!(lines[0]["kind"], "gap");
        assert_eq!(lines[0]["lost"], "records");
        // The first record, the gap that could not be written, and three of the queue.
        assert_eq!(lines[0]["count"], 5);
    }
}
