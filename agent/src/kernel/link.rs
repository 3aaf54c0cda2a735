//! Pinned links of the hooks. A link that stands where this agent's programs belong gets
//! the new program in place of the old one (`BPF_LINK_UPDATE`): no connect meets both, and
//! none meets neither.

use std::{
    fs,
    io::{self, Error},
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
    os::unix::ffi::OsStrExt as _,
    path::Path,
};

/// `enum bpf_cmd`, `include/uapi/linux/bpf.h`.
mod cmd {
    pub const OBJ_GET: libc::c_long = 7;
    pub const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
    pub const LINK_UPDATE: libc::c_long = 29;
    pub const LINK_DETACH: libc::c_long = 34;
}
/// `BPF_LINK_TYPE_CGROUP`.
const TYPE_CGROUP: u32 = 3;
/// `BPF_LINK_TYPE_NETNS`.
const TYPE_NETNS: u32 = 5;

/// What a link hangs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A cgroup, by its id.
    Cgroup(u64),
    /// A network namespace, by its inode.
    Netns(u32),
}

/// The beginning of `struct bpf_link_info`, with the part that tells where it hangs.
#[repr(C)]
#[derive(Default)]
struct Info {
    kind: u32,
    id: u32,
    program: u32,
    _pad: u32,
    /// Of a cgroup link: its id in both words; of a namespace's: its inode in the first.
    place: [u32; 2],
    attach_type: u32,
    _pad2: u32,
}

#[repr(C)]
#[derive(Default)]
struct Get {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct GetInfo {
    fd: u32,
    length: u32,
    info: u64,
}

#[repr(C)]
struct Update {
    link: u32,
    program: u32,
    flags: u32,
    old: u32,
}

/// Gives the link at this path the program, if it hangs where it should. `false`: there is
/// none, or it hangs elsewhere.
pub fn update(path: &Path, place: Place, program: BorrowedFd<'_>) -> io::Result<bool> {
    let Some(link) = get(path)? else {
        return Ok(false);
    };
    if hangs_on(&link)? != Some(place) {
        return Ok(false);
    }
    let mut update = Update {
        link: link.as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        flags: 0,
        old: 0,
    };
    bpf(cmd::LINK_UPDATE, &mut update)?;
    Ok(true)
}

/// A link, taken off its place at once by [`Link::detach`]: a hook whose last descriptor is
/// closed is called for some time still.
pub struct Link(OwnedFd);

impl Link {
    /// `None`: there is none at this path.
    pub fn at(path: &Path) -> Option<Self> {
        get(path).ok().flatten().map(Self)
    }

    pub fn detach(self) {
        let mut detach = self.0.as_raw_fd() as u32;
        // One of a namespace that has ended hangs on nothing.
        let _gone_already = bpf(cmd::LINK_DETACH, &mut detach);
    }
}

/// Whether a link at this path hangs on that place.
pub fn stands(path: &Path, place: Place) -> bool {
    let found = get(path).and_then(|link| link.map_or(Ok(None), |link| hangs_on(&link)));
    found.is_ok_and(|found| found == Some(place))
}

fn get(path: &Path) -> io::Result<Option<OwnedFd>> {
    if !fs::exists(path)? {
        return Ok(None);
    }
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let mut get = Get {
        path: path.as_ptr() as u64,
        ..Get::default()
    };
    let fd = bpf(cmd::OBJ_GET, &mut get)? as RawFd;
    // SAFETY: the kernel has just made it, for this process.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// `None`: on something else, or on what is gone (a namespace that ended).
fn hangs_on(link: &OwnedFd) -> io::Result<Option<Place>> {
    let mut info = Info::default();
    let mut ask = GetInfo {
        fd: link.as_raw_fd() as u32,
        length: size_of::<Info>() as u32,
        info: (&raw mut info) as u64,
    };
    bpf(cmd::OBJ_GET_INFO_BY_FD, &mut ask)?;
    let [low, high] = info.place;
    Ok(match info.kind {
        TYPE_CGROUP => {
            let mut bytes = [0; 8];
            bytes[..4].copy_from_slice(&low.to_ne_bytes());
            bytes[4..].copy_from_slice(&high.to_ne_bytes());
            Some(Place::Cgroup(u64::from_ne_bytes(bytes)))
        }
        TYPE_NETNS if low != 0 => Some(Place::Netns(low)),
        _ => None,
    })
}

fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_long> {
    let size = size_of::<T>();
    // SAFETY: `T` is the beginning of the command's part of `union bpf_attr`, and what it
    // points to outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, size) };
    match result {
        -1 => Err(Error::last_os_error()),
        result => Ok(result),
    }
}
