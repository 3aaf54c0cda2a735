//! What leaves a pod beside TCP: UDP flows, raw and packet sockets. The first packet is
//! told, and the first after a long pause; a packet of a flow that is known costs one
//! look-up.

use postern_ebpf::{Address, EVENT_DATAGRAM, EVENT_PACKET, EVENT_RAW, Flow, SocketEvent};

use super::{Kind, calling, ends, field, header, now, offset, room, sockaddr, socket_netns, task};
use crate::{
    lookup::is_loopback,
    maps::{DATAGRAMS, RAWS, config},
};

/// After so long without a packet a flow is a new one, nanoseconds.
const IDLE: u64 = 300_000_000_000;

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
    let mut entry = room::<SocketEvent>(config, subject, Kind::Datagram)?;
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
    if crate::context::is_mapped(address) && address[3] == 0 {
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
    let mut entry = room::<SocketEvent>(config, subject, Kind::Raw)?;
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
