//! TCP sockets of a namespace as the kernel lists them (sock_diag(7)), and how one is
//! destroyed. Their cookies are those of kernel events.

mod message;

use std::{
    collections::HashSet,
    io,
    net::SocketAddr,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto,
        setsockopt, socket, sockopt,
    },
    time::TimeVal,
};

use self::message::{Answer, answers, request};
use super::Netns;

/// A TCP socket, or what is left of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpSocket {
    pub local: SocketAddr,
    pub remote: SocketAddr,
    /// `include/net/tcp_states.h`.
    pub state: u8,
    pub uid: u32,
    /// As kernel events have it.
    pub cookie: u64,
    /// The cgroup that it was made in; 0 where the kernel does not say.
    pub cgroup: u64,
}

const LISTEN: u32 = 10;
const ALL_BUT_LISTEN: u32 = !(1 << LISTEN);
const ESTABLISHED: u32 = 1;
/// `include/uapi/linux/sock_diag.h`.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// The kernel answers at once; this is for what cannot be.
const PATIENCE: TimeVal = TimeVal::new(2, 0);

/// All TCP sockets in a namespace, both families, but those that listen.
pub fn tcp_sockets(netns: &Netns) -> io::Result<Vec<TcpSocket>> {
    list(netns, ALL_BUT_LISTEN)
}

/// TCP connections that stand in a namespace, both families. Of a pod that dials and
/// leaves all the time they are few beside what is left of those before.
pub fn tcp_connections(netns: &Netns) -> io::Result<Vec<TcpSocket>> {
    list(netns, 1 << ESTABLISHED)
}

/// Ports that something listens on in a namespace.
pub fn tcp_listeners(netns: &Netns) -> io::Result<HashSet<u16>> {
    let found = list(netns, 1 << LISTEN)?;
    Ok(found.iter().map(|socket| socket.local.port()).collect())
}

fn list(netns: &Netns, states: u32) -> io::Result<Vec<TcpSocket>> {
    let socket = open(netns)?;
    let mut found = Vec::new();
    for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
        let wanted = request(SOCK_DIAG_BY_FAMILY, flags, family, states, None);
        exchange(&socket, &wanted, &mut found)?;
    }
    Ok(found)
}

/// Ends a connection: its owner sees ECONNABORTED, its peer a reset. Fails with
/// EOPNOTSUPP where the kernel lacks `CONFIG_INET_DIAG_DESTROY`, and with ENOENT where
/// the socket is gone.
pub fn destroy(netns: &Netns, victim: &TcpSocket) -> io::Result<()> {
    let socket = open(netns)?;
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
    // An IPv6 socket may have an IPv4 connection, and is found as what it is.
    let mut result = Ok(());
    for &family in message::families(victim) {
        let wanted = request(SOCK_DESTROY, flags, family, ALL_BUT_LISTEN, Some(victim));
        result = exchange(&socket, &wanted, &mut Vec::new());
        if !matches!(&result, Err(error) if error.kind() == io::ErrorKind::NotFound) {
            break;
        }
    }
    result
}

/// Whether the kernel can destroy sockets: asked for one that there cannot be.
pub fn can_destroy() -> io::Result<()> {
    let nobody = SocketAddr::from(([0, 0, 0, 0], 0));
    let nothing = TcpSocket {
        local: nobody,
        remote: nobody,
        state: 0,
        uid: 0,
        cookie: 0,
        cgroup: 0,
    };
    match destroy(&Netns::own()?, &nothing) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// A netlink socket stays in the namespace that it was made in.
fn open(netns: &Netns) -> io::Result<OwnedFd> {
    let socket = netns.run(|| {
        socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        )
    })??;
    setsockopt(&socket, sockopt::ReceiveTimeout, &PATIENCE)?;
    Ok(socket)
}

/// Sends a request and reads all that is answered.
fn exchange(socket: &OwnedFd, wanted: &[u8], found: &mut Vec<TcpSocket>) -> io::Result<()> {
    let kernel = NetlinkAddr::new(0, 0);
    sendto(socket.as_raw_fd(), wanted, &kernel, MsgFlags::empty())?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        for answer in answers(&buffer[..length]) {
            match answer {
                Answer::Socket(socket) => found.push(socket),
                Answer::End(0) => return Ok(()),
                Answer::End(errno) => return Err(io::Error::from_raw_os_error(errno)),
            }
        }
    }
}
