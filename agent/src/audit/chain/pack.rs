//! Segments that nothing is written to any more are compressed and, when retention says
//! so, removed: both in one thread, in this order, so that neither meets the other.

use std::{
    fs::{self, File},
    io::{self, BufReader, Read},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    sync::mpsc::{Receiver, Sender, channel},
};

use super::{key::sync_directory, segment::Segment};

const LEVEL: i32 = 1;

pub enum Job {
    Pack(Segment),
    Remove(Segment),
}

/// Starts the thread, which ends when the sender is dropped. Nobody waits for it: what it
/// had not finished, the next start finds.
pub fn start() -> io::Result<Sender<Job>> {
    let (sender, receiver) = channel();
    std::thread::Builder::new()
        .name("audit-pack".into())
        .spawn(move || run(&receiver))?;
    Ok(sender)
}

fn run(jobs: &Receiver<Job>) {
    for job in jobs {
        let (segment, done) = match &job {
            Job::Pack(segment) => (segment, pack(segment)),
            Job::Remove(segment) => (segment, remove(segment)),
        };
        // The plain file is as good; the next start tries again.
        if let Err(error) = done {
            tracing::warn!(%error, "{}: not compressed or removed", segment.path.display());
        }
    }
}

/// At any moment either file is whole; where both are, they say the same.
fn pack(segment: &Segment) -> io::Result<()> {
    let packed = segment.to_packed();
    let directory = segment.path.parent().unwrap_or(Path::new("."));
    if packed.path.exists() {
        // An agent ended in between. If they differ, `verify` says so: nothing is removed.
        if same(&segment.path, &packed.path)? {
            fs::remove_file(&segment.path)?;
        }
        return Ok(());
    }
    let mut plain = File::open(&segment.path)?;
    let modified = plain.metadata()?.modified()?;
    let temporary = packed.path.with_added_extension("tmp");
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    let mut encoder = zstd::Encoder::new(file, LEVEL)?;
    encoder.include_checksum(true)?;
    let written = io::copy(&mut plain, &mut encoder)
        .and_then(|_| encoder.finish())
        .and_then(|file| {
            // Retention goes by it.
            file.set_modified(modified)?;
            file.sync_all()
        });
    if let Err(error) = written {
        let _as_good_without = fs::remove_file(&temporary);
        return Err(error);
    }
    fs::rename(&temporary, &packed.path)?;
    sync_directory(directory)?;
    fs::remove_file(&segment.path)
}

fn remove(segment: &Segment) -> io::Result<()> {
    for path in [&segment.path, &segment.to_packed().path] {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Whether a compressed file has just what the plain one has.
pub fn same(plain: &Path, packed: &Path) -> io::Result<bool> {
    let mut plain = BufReader::new(File::open(plain)?);
    let mut packed = zstd::Decoder::new(File::open(packed)?)?;
    let (mut left, mut right) = (vec![0; 64 << 10], vec![0; 64 << 10]);
    loop {
        let read = packed.read(&mut right);
        // What cannot be decoded is not the same.
        let Ok(read) = read else { return Ok(false) };
        let left = &mut left[..read.max(1)];
        if read == 0 {
            return Ok(plain.read(left)? == 0);
        }
        match plain.read_exact(left) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            result => result?,
        }
        if left[..] != right[..read] {
            return Ok(false);
        }
    }
}
