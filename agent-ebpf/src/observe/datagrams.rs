//! What leaves a pod beside TCP: UDP flows, raw and packet sockets. The first packet is
//! told, and the first after a long pause; a packet of a flow that is known costs one
//! look-up.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie},
    programs::SockAddrContext,
};
use postern_ebpf::{Address, Config, EVENT_DATAGRAM, EVENT_PACKET, EVENT_RAW, Flow, SocketEvent};

use super::{
    AF_INET, AF_INET6, At, Kind, Subject, calling, config, ends, field, header, now, offset, room,
    sockaddr, socket_netns, task, typed,
};
use crate::{
    context::{is_mapped, mapped, read_address},
    lookup::is_loopback,
    maps::{DATAGRAMS, RAWS},
};

/// After so long without a packet a flow is a new one, nanoseconds.
const IDLE: u64 = 300_000_000_000;

const AF_PACKET: u16 = 17;
const SOCK_STREAM: u16 = 1;
const SOCK_DGRAM: u16 = 2;
const SOCK_RAW: u16 = 3;
const IPPROTO_UDP: u16 = 17;

/// `udp_sendmsg` and `udpv6_sendmsg`, which calls the former for IPv4.
#[inline(always)]
pub fn udp(sk: u64, message: u64, cookie: impl FnOnce() -> u64) -> Option<()> {
    let config = config()?;
    let subject = calling(config, socket_netns(sk)?)?;
    let (local, connected) = ends(sk)?;
    // SAFETY: offset and type are those of the running kernel's BTF.
    let name: u64 = unsafe { field(message, offset!(msg_name))? };
    let remote = if name == 0 {
        connected
    } else {
        sockaddr(name)?
    };
    flow(config, subject, local, remote, cookie)
}

/// `cgroup/sendmsg4` and `sendmsg6`: a socket that is not connected sends.
#[inline(always)]
pub fn hooked(ctx: &SockAddrContext, remote: Address) -> Option<()> {
    let config = config()?;
    // SAFETY: helpers of this program type; the context outlives the call.
    let (netns, cookie) = unsafe {
        (
            bpf_get_netns_cookie(ctx.as_ptr()),
            bpf_get_socket_cookie(ctx.as_ptr()),
        )
    };
    let subject = calling(config, netns)?;
    // SAFETY: the context's own fields, and its socket's, which there always is.
    let (port, local) = unsafe {
        let sk = (&raw const (*ctx.sock_addr).__bindgen_anon_1.sk).read_volatile();
        let v4 = (&raw const (*sk).src_ip4).read_volatile();
        let v6 = read_address((&raw const (*sk).src_ip6).cast());
        let family = (&raw const (*sk).family).read_volatile();
        let local = At {
            address: if family == u32::from(AF_INET) {
                mapped(v4)
            } else {
                v6
            },
            port: (&raw const (*sk).src_port).read_volatile(),
        };
        let port = (&raw const (*ctx.sock_addr).user_port).read_volatile();
        (port, local)
    };
    let remote = At {
        address: remote,
        port: u32::from(u16::from_be(port as u16)),
    };
    flow(config, subject, local, remote, || cookie)
}

/// `sock:sock_send_length`: something was sent. What TCP sends is not looked at.
#[inline(always)]
pub fn sent(sk: *mut c_void, length: i32) -> Option<()> {
    let at = sk as u64;
    // SAFETY: offset and type are those of the running kernel's BTF.
    let kind: u16 = unsafe { typed(sk, offset!(sock_type)) };
    if kind == SOCK_STREAM || length < 0 {
        return None;
    }
    // SAFETY: as above.
    let (family, protocol): (u16, u16) = unsafe {
        (
            typed(sk, offset!(sock_family)),
            typed(sk, offset!(sock_protocol)),
        )
    };
    // SAFETY: the tracepoint's own argument; a helper that takes it.
    let cookie = || unsafe { bpf_get_socket_cookie(sk) };
    match (kind, family) {
        (_, AF_PACKET) => raw(at, true, cookie),
        (SOCK_RAW, AF_INET | AF_INET6) => raw(at, false, cookie),
        (SOCK_DGRAM, AF_INET | AF_INET6) if protocol == IPPROTO_UDP => {
            let config = config()?;
            let subject = calling(config, socket_netns(at)?)?;
            let (local, connected) = ends(at)?;
            if connected.port == 0 {
                return None; // the hooks have seen where it goes
            }
            flow(config, subject, local, connected, cookie)
        }
        _ => None,
    }
}

#[inline(always)]
fn flow(
    config: &Config,
    subject: Subject,
    local: At,
    remote: At,
    cookie: impl FnOnce() -> u64,
) -> Option<()> {
    if is_loopback(remote.address) {
        return None; // within the pod
    }
    let flow = Flow {
        netns: subject.netns,
        local: plain(local.address),
        remote: remote.address,
        local_port: local.port,
        remote_port: remote.port,
    };
    let now = now();
    if let Some(last) = DATAGRAMS.get_ptr_mut(flow) {
        // SAFETY: a word of a map; whichever write is lost, the time is about right.
        let before = unsafe { core::mem::replace(&mut *last, now) };
        if now.saturating_sub(before) < IDLE {
            return None;
        }
    } else {
        let _full = DATAGRAMS.insert(flow, now, 0);
    }
    let Some(mut entry) = room::<SocketEvent>(config, subject, Kind::Datagram) else {
        // Not told: its next packet is the first again, so that none is hidden by a flood.
        let _absent = DATAGRAMS.remove(flow);
        return None;
    };
    entry.write(SocketEvent {
        header: header(EVENT_DATAGRAM, subject),
        cookie: cookie(),
        local: flow.local,
        remote: flow.remote,
        local_port: flow.local_port,
        remote_port: flow.remote_port,
        protocol: 0,
        errno: 0,
        task: task(),
    });
    entry.submit(0);
    Some(())
}

/// `0.0.0.0` and `::` are one: an IPv6 socket that sends to IPv4 is seen as both.
#[inline(always)]
fn plain(address: Address) -> Address {
    if is_mapped(address) && address[3] == 0 {
        return [0; 4];
    }
    address
}

/// A raw or packet socket sends.
#[inline(always)]
pub fn raw(sk: u64, packet: bool, cookie: impl FnOnce() -> u64) -> Option<()> {
    let config = config()?;
    let subject = calling(config, socket_netns(sk)?)?;
    let cookie = cookie();
    // Where there is no cookie its place in memory has to do: one that comes to lie
    // there later may be passed over.
    let key = if cookie == 0 { sk } else { cookie };
    // SAFETY: a plain number.
    if unsafe { RAWS.get(key) }.is_some() {
        return None;
    }
    let _full = RAWS.insert(key, 1, 0);
    // SAFETY: offsets and types are those of the running kernel's BTF.
    let protocol: u16 = unsafe {
        if packet {
            u16::from_be(field(sk, offset!(packet_num))?)
        } else {
            field(sk, offset!(sock_num))?
        }
    };
    let Some(mut entry) = room::<SocketEvent>(config, subject, Kind::Raw) else {
        let _absent = RAWS.remove(key);
        return None;
    };
    entry.write(SocketEvent {
        header: header(if packet { EVENT_PACKET } else { EVENT_RAW }, subject),
        cookie,
        local: [0; 4],
        remote: [0; 4],
        local_port: 0,
        remote_port: 0,
        protocol: u32::from(protocol),
        errno: 0,
        task: task(),
    });
    entry.submit(0);
    Some(())
}
