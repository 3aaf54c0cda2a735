//! `cgroup/connect4` and `connect6` while no agent has been ready since the machine
//! booted: which destinations are in the mesh nobody knows yet, so nothing outside of
//! the node's own network namespace opens a TCP connection but to loopback. Fails
//! closed. What is in the node's namespace passes, host-network pods among it: without
//! some of them (the network's, the agent itself) there would never be an agent.

use aya_ebpf::{
    EbpfContext as _, helpers::generated::bpf_get_netns_cookie, programs::SockAddrContext,
};
use postern_ebpf::Address;

use crate::{
    connect::{IPPROTO_MPTCP, IPPROTO_TCP, PASS, REFUSE},
    context::{mapped, read_address},
    lookup::is_loopback,
};

/// Cookie of the node's network namespace; set before load.
#[unsafe(no_mangle)]
static NODE_NETNS: u64 = 0;

#[inline(always)]
pub fn v4(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the context's own fields.
    let destination = mapped(unsafe { (&raw const (*ctx.sock_addr).user_ip4).read_volatile() });
    decide(ctx, destination)
}

#[inline(always)]
pub fn v6(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the context's own fields.
    let destination = unsafe { read_address((&raw const (*ctx.sock_addr).user_ip6).cast()) };
    decide(ctx, destination)
}

#[inline(always)]
fn decide(ctx: &SockAddrContext, destination: Address) -> i32 {
    // SAFETY: the context's own fields.
    let protocol = unsafe { (&raw const (*ctx.sock_addr).protocol).read_volatile() };
    if protocol != IPPROTO_TCP && protocol != IPPROTO_MPTCP {
        // Nothing that the mesh would carry.
        return PASS;
    }
    // SAFETY: a helper of this program type; the context outlives the call.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: a plain number, which the agent sets before load.
    let node = unsafe { (&raw const NODE_NETNS).read_volatile() };
    if netns == node || is_loopback(destination) {
        return PASS;
    }
    REFUSE
}
