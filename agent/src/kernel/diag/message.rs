//! Messages of `NETLINK_SOCK_DIAG`: `include/uapi/linux/{netlink,sock_diag,inet_diag}.h`.
//! Numbers are in this machine's order, ports and addresses in the network's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::TcpSocket;

const HEADER: usize = 16;
/// `struct inet_diag_msg`.
const MESSAGE: usize = 72;
/// Of `struct inet_diag_sockid`, in a request behind the header and 8 bytes, in a
/// message behind 4.
const SOCKET_ID: usize = 48;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_MINIMUM: u16 = 0x10;
const INET_DIAG_CGROUP_ID: u16 = 21;
const IPPROTO_TCP: u8 = 6;
const INET: u8 = libc::AF_INET as u8;
const INET6: u8 = libc::AF_INET6 as u8;
/// `INET_DIAG_NOCOOKIE`, twice.
const NO_COOKIE: u64 = u64::MAX;

pub enum Answer {
    Socket(TcpSocket),
    /// All was said: 0, or an error.
    End(i32),
}

/// The families that a socket's connection may be found in.
pub fn families(socket: &TcpSocket) -> &'static [u8] {
    match socket.local {
        SocketAddr::V4(_) => &[INET, INET6],
        SocketAddr::V6(_) => &[INET6],
    }
}

/// `struct inet_diag_req_v2`: for one socket, or for all in some states.
pub fn request(kind: u16, flags: u16, family: u8, states: u32, of: Option<&TcpSocket>) -> Vec<u8> {
    let mut message = Vec::with_capacity(HEADER + 8 + SOCKET_ID);
    let length = (HEADER + 8 + SOCKET_ID) as u32;
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]); // sequence, port
    message.extend([family, IPPROTO_TCP, 0, 0]);
    message.extend(states.to_ne_bytes());
    match of {
        Some(socket) => {
            message.extend(socket.local.port().to_be_bytes());
            message.extend(socket.remote.port().to_be_bytes());
            message.extend(octets(socket.local.ip(), family));
            message.extend(octets(socket.remote.ip(), family));
            message.extend([0; 4]); // any interface
            message.extend(socket.cookie.to_ne_bytes());
        }
        None => {
            message.extend([0; SOCKET_ID - 8]);
            message.extend(NO_COOKIE.to_ne_bytes());
        }
    }
    message
}

fn octets(ip: IpAddr, family: u8) -> [u8; 16] {
    match ip {
        IpAddr::V4(v4) if family == INET => {
            let mut octets = [0; 16];
            octets[..4].copy_from_slice(&v4.octets());
            octets
        }
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// What a datagram of the kernel's says. What it does not say whole is passed over.
pub fn answers(mut bytes: &[u8]) -> impl Iterator<Item = Answer> {
    std::iter::from_fn(move || {
        loop {
            let length = u32::from_ne_bytes(take(bytes, 0)?) as usize;
            let kind = u16::from_ne_bytes(take(bytes, 4)?);
            let body = bytes.get(HEADER..length)?;
            bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
            match kind {
                NLMSG_DONE => return Some(Answer::End(0)),
                NLMSG_ERROR => {
                    let negative = i32::from_ne_bytes(take(body, 0)?);
                    return Some(Answer::End(negative.saturating_neg()));
                }
                NLMSG_MINIMUM.. => {
                    if let Some(socket) = socket(body) {
                        return Some(Answer::Socket(socket));
                    }
                }
                _ => {}
            }
        }
    })
}

/// `struct inet_diag_msg` and the attributes behind it.
fn socket(body: &[u8]) -> Option<TcpSocket> {
    let family = *body.first()?;
    let state = *body.get(1)?;
    let id = body.get(4..4 + SOCKET_ID)?;
    let port = |at| Some(u16::from_be_bytes(take(id, at)?));
    let ip = |at| -> Option<IpAddr> {
        Some(match family {
            INET => Ipv4Addr::from(take::<4>(id, at)?).into(),
            INET6 => Ipv6Addr::from(take::<16>(id, at)?).to_canonical(),
            _ => return None,
        })
    };
    Some(TcpSocket {
        local: SocketAddr::new(ip(4)?, port(0)?),
        remote: SocketAddr::new(ip(20)?, port(2)?),
        state,
        uid: u32::from_ne_bytes(take(body, 64)?),
        cookie: u64::from_ne_bytes(take(id, 40)?),
        cgroup: cgroup(body.get(MESSAGE..)?).unwrap_or(0),
    })
}

fn cgroup(mut attributes: &[u8]) -> Option<u64> {
    loop {
        let length = usize::from(u16::from_ne_bytes(take(attributes, 0)?));
        let kind = u16::from_ne_bytes(take(attributes, 2)?);
        let value = attributes.get(4..length)?;
        if kind == INET_DIAG_CGROUP_ID {
            return Some(u64::from_ne_bytes(take(value, 0)?));
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

fn take<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed() -> TcpSocket {
        TcpSocket {
            local: "10.0.1.10:40000".parse().expect("an address"),
            remote: "10.0.2.10:80".parse().expect("an address"),
            state: 1,
            uid: 1000,
            cookie: 0x1_0000_0002,
            cgroup: 77,
        }
    }

    /// What the kernel says of that socket, with an attribute before its cgroup's.
    fn message() -> Vec<u8> {
        let own = listed();
        let mut body = vec![INET, own.state, 0, 0];
        body.extend(&request(0, 0, INET, 0, Some(&own))[HEADER + 8..]);
        body.extend([0; 12]);
        body.extend(own.uid.to_ne_bytes());
        body.extend([0; 4]);
        assert_eq!(body.len(), MESSAGE);
        body.extend([5, 0, 8, 0, 1, 0, 0, 0]);
        body.extend([12, 0, INET_DIAG_CGROUP_ID as u8, 0]);
        body.extend(own.cgroup.to_ne_bytes());
        framed(20, &body)
    }

    fn framed(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut whole = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        whole.extend(kind.to_ne_bytes());
        whole.extend([0; 10]);
        whole.extend(body);
        whole
    }

    #[test]
    fn sockets_are_read_until_the_end() {
        let all = [message(), message(), framed(NLMSG_DONE, &[0; 4])].concat();
        let read: Vec<Answer> = answers(&all).collect();
        let [
            Answer::Socket(first),
            Answer::Socket(second),
            Answer::End(0),
        ] = &read[..]
        else {
            panic!("{} answers", read.len());
        };
        assert_eq!((first, second), (&listed(), &listed()));
    }

    #[test]
    fn errors_are_told_and_cut_messages_end() {
        let error = framed(NLMSG_ERROR, &(-95_i32).to_ne_bytes());
        assert!(matches!(answers(&error).next(), Some(Answer::End(95))));
        let whole = message();
        assert_eq!(answers(&whole[..whole.len() - 1]).count(), 0);
        assert_eq!(answers(&[]).count(), 0);
        let short = framed(20, &[INET; 20]);
        assert_eq!(answers(&short).count(), 0);
    }

    #[test]
    fn an_ipv4_connection_is_looked_for_as_ipv6_too() {
        assert_eq!(families(&listed()), [INET, INET6]);
        let asked = request(21, 0, INET6, 0, Some(&listed()));
        let mapped: Ipv6Addr = "::ffff:10.0.1.10".parse().expect("an address");
        assert_eq!(asked[HEADER + 8 + 4..][..16], mapped.octets());
    }
}
