//! Counters that outlive the agent, so that the next one can say how much was lost: a
//! page of shared memory in a file, which `kill -9` does not take away.
//!
//! A run makes a page of its own, with a number of its own that its first record in the
//! log names. The page keeps the counters of the run before as they were, until the log
//! has that record; so nothing is counted twice or forgotten, wherever an agent ends.

use std::{
    fs::File,
    io,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use aws_lc_rs::digest::{SHA256, digest};
use memmap2::MmapMut;

use super::key::write_whole;

const PAGE: usize = 4096;
const MAGIC: u64 = u64::from_le_bytes(*b"pstnldg1");
/// Kinds of kernel losses that are remembered.
pub const KINDS: usize = 16;

/// Connections that are open stand in the low bits of one word with the records that
/// were accepted, so that both change at once when a connection's record is handed in.
const ACCEPTED: u64 = 1 << 24;
/// Accepted records are counted modulo this.
const WRAP: u64 = u64::MAX / ACCEPTED + 1;

/// Where things are, in words. Those before `CHECK` never change.
mod at {
    pub const MAGIC: usize = 0;
    pub const BOOT: usize = 1;
    pub const RUN: usize = 3;
    pub const BEFORE_RUN: usize = 4;
    pub const BEFORE: usize = 5;
    pub const BEFORE_KNOWN: usize = 6;
    pub const CHECK: usize = 7;
    pub const NOW: usize = 8;
    pub const LAST: usize = 9;
    pub const REPORTED: usize = 16;
}

pub struct Ledger {
    page: MmapMut,
}

/// How much was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    Count(u64),
    Unknown,
}

/// What the log says of the run before.
#[derive(Debug, Default)]
pub struct Logged {
    /// Its number; `None`: no record names one.
    pub run: Option<u64>,
    /// Accepted records that are in the log, or counted in it as lost.
    pub settled: u64,
    /// Connections that are counted in it as lost.
    pub connections: u64,
    /// It ended in order.
    pub closed: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Losses {
    pub records: Loss,
    pub connections: Loss,
    /// The last `seq` that was written, as far as the ledger knows.
    pub last: u64,
}

/// Counters of a run that has ended.
struct Before {
    run: u64,
    counters: u64,
    known: bool,
}

impl Ledger {
    /// Makes the page of this run, and says what the one before left unsaid. The error is
    /// of its file: then it lives in memory alone.
    pub fn open(path: &Path, logged: &Logged) -> (Self, Losses, Option<io::Error>) {
        let boot = boot();
        let read = std::fs::read(path);
        let absent = matches!(&read, Err(e) if e.kind() == io::ErrorKind::NotFound);
        let old = read.ok().and_then(|bytes| Page::parse(&bytes));
        let same_boot = old.as_ref().is_some_and(|old| old.boot() == boot);
        let before = match &old {
            // After a reboot the page may be older than the log.
            _ if logged.closed && !same_boot && (old.is_some() || absent) => Before {
                run: logged.run.unwrap_or(0),
                counters: logged.settled.wrapping_mul(ACCEPTED),
                known: true,
            },
            Some(old) => old.ended(logged.run, same_boot),
            None => Before {
                run: logged.run.unwrap_or(0),
                counters: 0,
                known: absent && logged.run.is_none(),
            },
        };
        let mut losses = before.losses(logged);
        let mut page = Page([0; PAGE / 8]);
        page.0[at::MAGIC] = MAGIC;
        page.0[at::BOOT..at::RUN].copy_from_slice(&boot);
        page.0[at::RUN] = random();
        page.0[at::BEFORE_RUN] = before.run;
        page.0[at::BEFORE] = before.counters;
        page.0[at::BEFORE_KNOWN] = u64::from(before.known);
        page.0[at::CHECK] = page.check();
        if let Some(old) = old.filter(|_| same_boot) {
            losses.last = old.0[at::LAST];
            page.0[at::REPORTED..].copy_from_slice(&old.0[at::REPORTED..]);
        }
        let (page, error) = match page.map(path) {
            Ok(map) => (map, None),
            Err(error) => (page.in_memory(), Some(error)),
        };
        (Self { page }, losses, error)
    }

    /// In memory alone: of a test, or of an agent whose records another one writes.
    pub fn detached() -> Self {
        Self {
            page: Page([0; PAGE / 8]).in_memory(),
        }
    }

    /// The number of this run.
    pub fn run(&self) -> u64 {
        self.word(at::RUN).load(Ordering::Relaxed)
    }

    pub fn accept(&self) {
        self.word(at::NOW).fetch_add(ACCEPTED, Ordering::Relaxed);
    }

    pub fn opened(&self) {
        self.word(at::NOW).fetch_add(1, Ordering::Relaxed);
    }

    pub fn closed(&self) {
        self.word(at::NOW).fetch_sub(1, Ordering::Relaxed);
    }

    /// Both at once: no moment in which a connection is counted twice, or not at all.
    pub fn accept_closed(&self) {
        let now = self.word(at::NOW);
        now.fetch_add(ACCEPTED - 1, Ordering::Relaxed);
    }

    /// There was no room for what was just counted with [`Self::accept_closed`] (`story`),
    /// or [`Self::accept`].
    pub fn not_accepted(&self, story: bool) {
        let less = ACCEPTED - u64::from(story);
        self.word(at::NOW).fetch_sub(less, Ordering::Relaxed);
    }

    /// Connections that are open, and accepted records (modulo 2^40).
    pub fn counts(&self) -> (u64, u64) {
        let now = self.word(at::NOW).load(Ordering::Relaxed);
        (now % ACCEPTED, now / ACCEPTED)
    }

    /// Hands what is open over to another ledger. To be called when nobody else counts.
    pub fn move_open(&self, to: &Self) {
        let (open, _) = self.counts();
        to.word(at::NOW).fetch_add(open, Ordering::Relaxed);
        self.word(at::NOW).fetch_sub(open, Ordering::Relaxed);
    }

    pub fn set_last(&self, seq: u64) {
        self.word(at::LAST).store(seq, Ordering::Relaxed);
    }

    pub fn reported(&self, kind: usize) -> u64 {
        self.kind(kind).load(Ordering::Relaxed)
    }

    pub fn set_reported(&self, kind: usize, count: u64) {
        self.kind(kind).store(count, Ordering::Relaxed);
    }

    fn kind(&self, kind: usize) -> &AtomicU64 {
        assert!(kind < KINDS, "there is room for {KINDS} kinds");
        self.word(at::REPORTED + kind)
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at < PAGE / 8);
        // SAFETY: within the page, which is aligned, lives as long as `self`, and is
        // touched through atomics only.
        unsafe { &*self.page.as_ptr().cast::<AtomicU64>().add(at) }
    }
}

impl Before {
    fn losses(&self, logged: &Logged) -> Losses {
        let unknown = Losses {
            records: Loss::Unknown,
            connections: Loss::Unknown,
            last: 0,
        };
        let lost = (self.counters / ACCEPTED).wrapping_sub(logged.settled) % WRAP;
        // More was settled than accepted: it is not of this log.
        if !self.known || lost > WRAP / 2 {
            return unknown;
        }
        let open = self.counters % ACCEPTED;
        Losses {
            records: Loss::Count(lost),
            connections: Loss::Count(open.saturating_sub(logged.connections)),
            last: 0,
        }
    }
}

#[derive(PartialEq, Eq)]
struct Page([u64; PAGE / 8]);

impl Page {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut page = Self([0; PAGE / 8]);
        if bytes.len() != PAGE {
            return None;
        }
        for (word, bytes) in page.0.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_ne_bytes(bytes.try_into().ok()?);
        }
        let valid = page.0[at::MAGIC] == MAGIC && page.0[at::CHECK] == page.check();
        valid.then_some(page)
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    fn boot(&self) -> [u64; 2] {
        [self.0[at::BOOT], self.0[at::BOOT + 1]]
    }

    fn check(&self) -> u64 {
        let hash = digest(&SHA256, &self.bytes()[..at::CHECK * 8]);
        let first = hash.as_ref().first_chunk();
        u64::from_ne_bytes(*first.expect("SHA-256 has 32 bytes"))
    }

    /// What was left unsaid when its run ended.
    fn ended(&self, logged: Option<u64>, same_boot: bool) -> Before {
        let (run, now) = (self.0[at::RUN], self.0[at::NOW]);
        let (before_run, before) = (self.0[at::BEFORE_RUN], self.0[at::BEFORE]);
        if logged == Some(run) {
            return Before {
                run,
                counters: now,
                known: same_boot,
            };
        }
        // The log does not know of this run: what it accepted was lost, too.
        Before {
            run: before_run,
            counters: before.wrapping_add(now),
            known: logged.unwrap_or(0) == before_run && self.0[at::BEFORE_KNOWN] == 1 && same_boot,
        }
    }

    /// Its blocks are there before it is mapped: a full disk must not be met in a store.
    fn map(&self, path: &Path) -> io::Result<MmapMut> {
        write_whole(path, &self.bytes())?;
        let file = File::options().read(true).write(true).open(path)?;
        // SAFETY: a file of our own in a directory that nobody else may enter; nobody
        // makes it shorter.
        unsafe { MmapMut::map_mut(&file) }
    }

    fn in_memory(&self) -> MmapMut {
        let mut map = MmapMut::map_anon(PAGE).expect("a page of memory");
        map.copy_from_slice(&self.bytes());
        map
    }
}

/// Counters of the kernel, and pages that were not written back, end with a boot.
fn boot() -> [u64; 2] {
    let id = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let hash = digest(&SHA256, &id);
    let (words, _) = hash.as_ref().as_chunks::<8>();
    [words[0], words[1]].map(u64::from_ne_bytes)
}

/// Not 0, which is no run.
fn random() -> u64 {
    let mut bytes = [0; 8];
    aws_lc_rs::rand::fill(&mut bytes).expect("the system's random numbers");
    // JSON readers that have doubles only must not change it.
    (u64::from_ne_bytes(bytes) >> 12) | 1
}

#[cfg(test)]
mod tests;
