//! Files of a pod, seen from outside: through the root of a process in its cgroup.
//! What a pod puts in the way (links, pipes, files without end) leads nowhere else
//! and holds nobody up for ever.

use std::{
    fs::File,
    io::{self, Read as _},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat, openat2},
    sys::stat::{Mode, SFlag, fstat},
};
use zeroize::Zeroizing;

use super::processes;

/// Processes of a pod that are tried: its containers differ in what is mounted.
const MOST: usize = 64;

/// The content of a regular file, no longer than `limit` bytes, as the first process
/// that has it sees it. It may wait for the pod's own file systems: not for the
/// runtime's threads.
pub fn read_in_pod(dirs: &[PathBuf], path: &Path, limit: u64) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the pod has no process");
    for dir in dirs {
        for pid in processes(dir).into_iter().take(MOST) {
            let found = root_of(pid).and_then(|root| {
                // The number may have become another's: whose root is held by now is
                // known to be the pod's only if it still is in its cgroup.
                match processes(dir).contains(&pid) {
                    true => read_below(&root, path, limit),
                    false => Err(io::ErrorKind::NotFound.into()),
                }
            });
            match found {
                Ok(content) => return Ok(content),
                Err(error) => last = error,
            }
        }
    }
    Err(last)
}

fn root_of(pid: i32) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let process = open(Path::new(&format!("/proc/{pid}")), flags, Mode::empty())?;
    Ok(openat(&process, "root", flags, Mode::empty())?)
}

/// Links are followed within the root only, and none of procfs (openat2(2)).
fn read_below(root: impl AsFd, path: &Path, limit: u64) -> io::Result<Zeroizing<Vec<u8>>> {
    let how = OpenHow::new()
        // A pipe without a writer must not hold us.
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file = openat2(root, path, how)?;
    let kind = SFlag::from_bits_truncate(fstat(&file)?.st_mode) & SFlag::S_IFMT;
    if kind != SFlag::S_IFREG {
        return Err(io::Error::other("not a regular file"));
    }
    let mut content = Zeroizing::new(Vec::with_capacity(limit as usize + 1));
    File::from(file).take(limit + 1).read_to_end(&mut content)?;
    match content.len() as u64 > limit {
        true => Err(io::Error::other(format!("longer than {limit} bytes"))),
        false => Ok(content),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn nothing_leads_out_of_the_root() {
        let tmp = tempfile::tempdir().expect("directory");
        let root = tmp.path().join("root");
        let at = |name: &str| root.join(name);
        std::fs::create_dir_all(at("run/..data")).expect("made");
        std::fs::write(tmp.path().join("secret"), "out").expect("written");
        std::fs::write(at("run/..data/token"), "in").expect("written");
        // As the kubelet projects, and as Debian has /var/run.
        symlink("..data/token", at("run/token")).expect("linked");
        symlink("/run", at("var")).expect("linked");
        symlink("../../secret", at("relative")).expect("linked");
        symlink(tmp.path().join("secret"), at("absolute")).expect("linked");
        symlink("/proc/self/root/etc/passwd", at("magic")).expect("linked");
        nix::unistd::mkfifo(&at("pipe"), Mode::S_IRWXU).expect("made");
        std::fs::write(at("large"), "x".repeat(17)).expect("written");
        let opened = File::open(&root).expect("opened");
        let read = |path: &str| {
            read_below(&opened, Path::new(path), 16)
                .map(|content| String::from_utf8_lossy(&content).into_owned())
                .map_err(|e| e.to_string())
        };
        assert_eq!(read("/run/token").as_deref(), Ok("in"));
        assert_eq!(read("/var/token").as_deref(), Ok("in"));
        for path in ["/relative", "/absolute", "/magic", "/../secret", "/none"] {
            assert!(read(path).is_err(), "{path}");
        }
        for path in ["/pipe", "/run"] {
            assert_eq!(read(path).expect_err(path), "not a regular file");
        }
        assert_eq!(read("/large").expect_err("large"), "longer than 16 bytes");
    }

    #[test]
    fn a_process_that_is_in_no_pod_is_not_read() {
        let tmp = tempfile::tempdir().expect("directory");
        let dirs = [tmp.path().to_owned()];
        std::fs::write(tmp.path().join("cgroup.procs"), "").expect("written");
        assert!(read_in_pod(&dirs, Path::new("/etc/hostname"), 100).is_err());
        let own = std::process::id().to_string();
        std::fs::write(tmp.path().join("cgroup.procs"), own).expect("written");
        std::fs::write(tmp.path().join("token"), "t").expect("written");
        let content = read_in_pod(&dirs, &tmp.path().join("token"), 100).expect("read");
        assert_eq!(*content, b"t");
    }
}
