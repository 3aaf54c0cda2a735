//! Messages between two agents: JSON in packets of a unix socket, file descriptors beside
//! them. Bounded in size, and every wait has an end.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::{
        fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::fs::PermissionsExt as _,
    },
    path::Path,
    time::Duration,
};

use nix::{
    cmsg_space,
    sys::{
        socket::{
            AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, Shutdown,
            SockFlag, SockType, UnixAddr, accept4, bind, connect, getsockopt, listen, recvmsg,
            sendmsg, setsockopt, shutdown, socket, sockopt,
        },
        time::TimeVal,
    },
};
use serde::{Serialize, de::DeserializeOwned};

/// The largest message, bytes; a socket takes that much at once (`net.core.wmem_default`).
pub const LARGEST: usize = 128 << 10;
/// File descriptors of one message (`SCM_MAX_FD`).
pub const MOST_FDS: usize = 253;

/// One end of a conversation.
pub struct Channel(OwnedFd);

impl Channel {
    /// `Ok(None)`: nobody listens there.
    pub fn connect(path: &Path, patience: Duration) -> io::Result<Option<Self>> {
        let fd = new_socket()?;
        match connect(fd.as_raw_fd(), &UnixAddr::new(path)?) {
            Ok(()) => {}
            Err(nix::Error::ENOENT | nix::Error::ECONNREFUSED) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        Self::new(fd, patience).map(Some)
    }

    fn new(fd: OwnedFd, patience: Duration) -> io::Result<Self> {
        let channel = Self(fd);
        channel.set_patience(Some(patience))?;
        setsockopt(&channel.0, sockopt::SendTimeout, &time(patience))?;
        Ok(channel)
    }

    /// Both ends.
    #[cfg(test)]
    pub fn pair() -> (Self, Self) {
        use nix::sys::socket::socketpair;
        let (kind, flags) = (SockType::SeqPacket, SockFlag::SOCK_CLOEXEC);
        let (near, far) = socketpair(AddressFamily::Unix, kind, None, flags).expect("sockets");
        (Self(near), Self(far))
    }

    /// How long [`Self::receive`] waits; `None`: for ever.
    pub fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        let time = time(patience.unwrap_or_default());
        Ok(setsockopt(&self.0, sockopt::ReceiveTimeout, &time)?)
    }

    /// The process at the other end, if it is of the agent's own user.
    pub fn peer(&self) -> io::Result<i32> {
        let peer = getsockopt(&self.0, sockopt::PeerCredentials)?;
        if peer.uid() != nix::unistd::geteuid().as_raw() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Ok(peer.pid())
    }

    pub fn send<T: Serialize>(&self, message: &T, fds: &[impl AsFd]) -> io::Result<()> {
        let text = serde_json::to_vec(message)?;
        if text.len() > LARGEST || fds.len() > MOST_FDS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let raw: Vec<RawFd> = fds.iter().map(|fd| fd.as_fd().as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        let parts = [IoSlice::new(&text)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(self.0.as_raw_fd(), &parts, control, flags, None)?;
        Ok(())
    }

    /// The next message. An end of the conversation is an error: nobody leaves without a
    /// word.
    pub fn receive<T: DeserializeOwned>(&self) -> io::Result<(T, Vec<OwnedFd>)> {
        let mut buffer = vec![0; LARGEST];
        let mut control = cmsg_space!([RawFd; MOST_FDS]);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let got = recvmsg::<()>(self.0.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
        let mut fds = Vec::new();
        for message in got.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = message {
                // SAFETY: the kernel has just made them, for this process.
                fds.extend(
                    raw.into_iter()
                        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                );
            }
        }
        let (length, cut) = (got.bytes, MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
        if got.flags.intersects(cut) {
            return Err(io::Error::other("a message is larger than may be"));
        }
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok((serde_json::from_slice(&buffer[..length])?, fds))
    }

    /// Takes nothing that is not here yet; that, and the answers to it, may go on.
    pub fn hear_no_more(&self) {
        let _ended_already = shutdown(self.0.as_raw_fd(), Shutdown::Read);
    }
}

/// Where other agents come to.
pub struct Door(OwnedFd);

impl Door {
    /// Opens it in the place of an earlier one: at no time is there none.
    pub fn open(path: &Path) -> io::Result<Self> {
        let fresh = path.with_added_extension("new");
        let _stale = std::fs::remove_file(&fresh);
        let fd = new_socket()?;
        bind(fd.as_raw_fd(), &UnixAddr::new(&fresh)?)?;
        std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600))?;
        listen(&fd, Backlog::new(16)?)?;
        std::fs::rename(&fresh, path)?;
        Ok(Self(fd))
    }

    /// Waits for the next who comes; an error once it is closed.
    pub fn next(&self, patience: Duration) -> io::Result<Channel> {
        let fd = accept4(self.0.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
        // SAFETY: the kernel has just made it, for this process.
        Channel::new(unsafe { OwnedFd::from_raw_fd(fd) }, patience)
    }

    /// Nobody is let in any more.
    pub fn close(&self) {
        let _closed_already = shutdown(self.0.as_raw_fd(), Shutdown::Both);
    }
}

fn time(duration: Duration) -> TimeVal {
    TimeVal::new(duration.as_secs() as i64, duration.subsec_micros().into())
}

fn new_socket() -> io::Result<OwnedFd> {
    let (kind, flags) = (SockType::SeqPacket, SockFlag::SOCK_CLOEXEC);
    Ok(socket(AddressFamily::Unix, kind, flags, None)?)
}

#[cfg(test)]
mod tests {
    use std::os::fd::BorrowedFd;

    use super::*;

    const NO_FDS: [BorrowedFd<'static>; 0] = [];
    const SOON: Duration = Duration::from_millis(200);

    fn pair() -> (tempfile::TempDir, Door, Channel, Channel) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("door");
        let door = Door::open(&path).expect("a door");
        let near = Channel::connect(&path, SOON)
            .expect("connect")
            .expect("somebody");
        let far = door.next(SOON).expect("accept");
        (dir, door, near, far)
    }

    #[test]
    fn files_go_with_their_message() {
        let (_dir, _door, near, far) = pair();
        assert_eq!(far.peer().expect("a peer"), std::process::id() as i32);
        let file = std::fs::File::open("/proc/self/status").expect("a file");
        near.send(&vec![1, 2, 3], &[&file]).expect("sent");
        let (numbers, fds) = far.receive::<Vec<u32>>().expect("received");
        assert_eq!((numbers, fds.len()), (vec![1, 2, 3], 1));
    }

    #[test]
    fn what_is_too_large_or_never_comes_is_an_error() {
        let (_dir, _door, near, far) = pair();
        let large = "x".repeat(LARGEST);
        assert!(near.send(&large, &NO_FDS).is_err());
        assert!(far.receive::<String>().is_err(), "nothing came in time");
        drop(near);
        let ended = far.receive::<String>().expect_err("it has left");
        assert_eq!(ended.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_later_door_takes_the_earlier_ones_place() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("door");
        assert!(Channel::connect(&path, SOON).expect("no error").is_none());
        let first = Door::open(&path).expect("a door");
        let second = Door::open(&path).expect("another");
        first.close();
        assert!(first.next(SOON).is_err());
        assert!(Channel::connect(&path, SOON).expect("no error").is_some());
        second.next(SOON).expect("it came to the second");
        let mode = std::fs::metadata(&path)
            .expect("it is there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(second);
        assert!(Channel::connect(&path, SOON).expect("no error").is_none());
    }
}
