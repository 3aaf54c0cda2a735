//! `cgroup/getpeername4` and `getpeername6`: shows the application the peer that
//! it means. A client sees the destination that it dialled; a server sees the
//! real client, from `accept` too. Never refuses.

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie},
    programs::SockAddrContext,
};
use postern_ebpf::{Address, Client, Endpoint};

use crate::{
    context::{is_mapped, mapped, read_address, write_address},
    lookup::is_loopback,
    maps::{CLIENTS, DIALS},
    observe::sockets,
};

const PASS: i32 = 1;

#[inline(always)]
pub fn v4(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the context's own fields.
    let seen = mapped(unsafe { (&raw const (*ctx.sock_addr).user_ip4).read_volatile() });
    if let Some(real) = real_peer(ctx, seen)
        && is_mapped(real.address)
    {
        // SAFETY: both fields are writable in this hook.
        unsafe {
            (&raw mut (*ctx.sock_addr).user_ip4).write_volatile(real.address[3]);
            set_port(ctx, real.port);
        }
    }
    PASS
}

#[inline(always)]
pub fn v6(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the context's own fields.
    let seen = unsafe { read_address((&raw const (*ctx.sock_addr).user_ip6).cast()) };
    if let Some(real) = real_peer(ctx, seen) {
        // SAFETY: the fields are writable in this hook, word by word.
        unsafe {
            write_address((&raw mut (*ctx.sock_addr).user_ip6).cast(), real.address);
            set_port(ctx, real.port);
        }
    }
    PASS
}

#[inline(always)]
fn real_peer(ctx: &SockAddrContext, seen: Address) -> Option<Client> {
    // SAFETY: a helper of this program type; the context outlives the call.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    sockets::asked(cookie);
    if !is_loopback(seen) {
        // What is steered goes to loopback, and the agent's last hop comes from there.
        return None;
    }
    // SAFETY: the entry is copied out; it is written once, before the connect.
    if let Some(dial) = unsafe { DIALS.get(cookie) } {
        return Some(Client {
            address: dial.destination,
            port: dial.destination_port,
        });
    }
    // SAFETY: a helper of this program type; the context outlives the call.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: the context's own fields.
    let port =
        u16::from_be(unsafe { (&raw const (*ctx.sock_addr).user_port).read_volatile() } as u16);
    let last_hop = Endpoint {
        netns,
        address: seen,
        port: u32::from(port),
        _pad: 0,
    };
    // SAFETY: the entry is copied out; the agent writes it once.
    unsafe { CLIENTS.get(last_hop) }.copied()
}

/// # Safety
/// `ctx` is the context of a getpeername hook.
#[inline(always)]
unsafe fn set_port(ctx: &SockAddrContext, port: u32) {
    // SAFETY: the caller's promise; the port is writable in this hook.
    unsafe {
        (&raw mut (*ctx.sock_addr).user_port).write_volatile(u32::from((port as u16).to_be()));
    };
}
