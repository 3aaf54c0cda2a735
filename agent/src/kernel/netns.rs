//! Network namespaces: found by a process in them, known by their cookie.

use std::{
    fs::File,
    io,
    net::IpAddr,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd},
        unix::fs::MetadataExt as _,
    },
    path::Path,
    sync::OnceLock,
};

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Socket, Type};

/// `SO_NETNS_COOKIE`, Linux 5.14.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// The agent's own namespace, to come back to.
static HOME: OnceLock<File> = OnceLock::new();

/// A network namespace, held open: it lives at least as long as this value.
#[derive(Debug)]
pub struct Netns {
    file: File,
    pub cookie: u64,
    pub inode: u64,
}

impl Netns {
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let inode = file.metadata()?.ino();
        let cookie = within(&file, cookie)??;
        Ok(Self {
            file,
            cookie,
            inode,
        })
    }

    /// The agent's own.
    pub fn own() -> io::Result<Self> {
        Self::open(Path::new("/proc/self/ns/net"))
    }

    /// Runs something with this namespace as the thread's own. It must not wait:
    /// the thread is one of the runtime's.
    pub fn run<T>(&self, action: impl FnOnce() -> T) -> io::Result<T> {
        within(&self.file, action)
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn within<T>(namespace: &File, action: impl FnOnce() -> T) -> io::Result<T> {
    let home = match HOME.get() {
        Some(home) => home,
        None => {
            let own = File::open("/proc/self/ns/net")?;
            HOME.get_or_init(|| own)
        }
    };
    setns(namespace, CloneFlags::CLONE_NEWNET)?;
    let _back = Return(home);
    Ok(action())
}

/// Brings the thread home, also from a panic.
struct Return<'a>(&'a File);

impl Drop for Return<'_> {
    fn drop(&mut self) {
        if let Err(error) = setns(self.0, CloneFlags::CLONE_NEWNET) {
            // A thread in a pod's namespace would open the next pod's sockets there.
            eprintln!("cannot return to the node's network namespace: {error}");
            std::process::abort();
        }
    }
}

fn cookie() -> io::Result<u64> {
    let socket = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
    let mut cookie = 0_u64;
    let mut size = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the pointers are to locals of the stated size.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut size,
        )
    };
    if result == 0 {
        Ok(cookie)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Inode of a process's network namespace.
pub fn namespace_inode(pid: i32) -> io::Result<u64> {
    Ok(std::fs::metadata(format!("/proc/{pid}/ns/net"))?.ino())
}

/// All addresses in the current namespace but loopback's.
pub fn addresses() -> io::Result<Vec<IpAddr>> {
    let mut all = Vec::new();
    for interface in nix::ifaddrs::getifaddrs()? {
        let Some(address) = interface.address else {
            continue;
        };
        let ip = if let Some(v4) = address.as_sockaddr_in() {
            IpAddr::V4(v4.ip())
        } else if let Some(v6) = address.as_sockaddr_in6() {
            IpAddr::V6(v6.ip())
        } else {
            continue;
        };
        if !ip.is_loopback() && !all.contains(&ip) {
            all.push(ip);
        }
    }
    Ok(all)
}
