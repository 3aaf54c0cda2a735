//! `cgroup/connect4` and `connect6`: steers a pod's TCP connect into the agent.
//!
//! The order decides the cost: a destination outside the mesh is two or three map
//! look-ups and passes; where not all pods are known, one more if it may be a pod's. Inside the mesh, a caller that is not known yet meets
//! `enrol.unknown`, and anything that cannot be carried is refused (`EPERM`):
//! this hook fails closed once a destination is known to be in the mesh.

use aya_ebpf::{
    EbpfContext as _,
    bindings::bpf_sock_addr,
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_ktime_get_ns},
    helpers::{bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_current_uid_gid},
    maps::lpm_trie::Key,
    programs::SockAddrContext,
};
use postern_ebpf::{
    Address, Counter, Dial, MESH_LOCAL, MESH_NODE, MESH_OUTSIDE, MESH_REMOTE, MeshKey, NODES,
    UNKNOWN_ALLOW,
};

use crate::{
    context::{Caller, caller, is_agent, is_mapped, mapped, read_address, write_address},
    lookup::is_loopback,
    maps::{DIALS, FOREIGN, MESH, ORIGINS, RANGES, config, count},
    observe::sockets,
    sockops::forget,
};

pub const REFUSE: i32 = 0;
pub const PASS: i32 = 1;

pub const IPPROTO_TCP: u32 = 6;
pub const IPPROTO_MPTCP: u32 = 262;

const LOOPBACK_V4: u32 = 0x7f00_0001_u32.to_be();

#[inline(always)]
pub fn v4(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the context's own fields.
    let destination = mapped(unsafe { (&raw const (*ctx.sock_addr).user_ip4).read_volatile() });
    match decide(ctx, destination) {
        Decision::Return(code) => code,
        Decision::Steer(port) => {
            // SAFETY: both fields are writable in this hook.
            unsafe {
                (&raw mut (*ctx.sock_addr).user_ip4).write_volatile(LOOPBACK_V4);
                set_port(ctx.sock_addr, port);
            }
            PASS
        }
    }
}

#[inline(always)]
pub fn v6(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the context's own fields.
    let address = unsafe { read_address((&raw const (*ctx.sock_addr).user_ip6).cast()) };
    match decide(ctx, address) {
        Decision::Return(code) => code,
        Decision::Steer(port) => {
            let loopback = if is_mapped(address) {
                mapped(LOOPBACK_V4)
            } else {
                [0, 0, 0, 1_u32.to_be()]
            };
            // SAFETY: the fields are writable in this hook, word by word.
            unsafe {
                write_address((&raw mut (*ctx.sock_addr).user_ip6).cast(), loopback);
                set_port(ctx.sock_addr, port);
            }
            PASS
        }
    }
}

enum Decision {
    Return(i32),
    /// To this port on loopback.
    Steer(u32),
}

#[inline(always)]
fn decide(ctx: &SockAddrContext, destination: Address) -> Decision {
    let pass = Decision::Return(PASS);
    let refuse = Decision::Return(REFUSE);
    // SAFETY: the context's own fields.
    let protocol = unsafe { (&raw const (*ctx.sock_addr).protocol).read_volatile() };
    if protocol != IPPROTO_TCP && protocol != IPPROTO_MPTCP {
        return pass;
    }
    // Without configuration the programs are attached but not in charge yet.
    let Some(config) = config() else { return pass };
    if config.agent_tgid == 0 {
        return pass;
    }
    if is_agent(config) {
        return pass;
    }
    // SAFETY: a helper of this program type; the context outlives the call.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: the context's own fields.
    let port =
        u16::from_be(unsafe { (&raw const (*ctx.sock_addr).user_port).read_volatile() } as u16);
    let Some(place) = in_mesh(destination, u32::from(port)) else {
        if u32::from(port) == config.outbound_port && is_loopback(destination) {
            // Another agent's hook, beside this one for a moment, has steered it.
            return pass;
        }
        // The socket may have been steered before, by a connect that failed.
        forget(cookie);
        return pass;
    };
    // Whatever becomes of it now, it is not what it was steered to before.
    forget(cookie);
    // SAFETY: a helper of this program type; the context outlives the call.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let cgroup = match caller(config, netns) {
        Caller::Known(workload, cgroup) if workload.enrolled == 1 => cgroup,
        Caller::Known(..) | Caller::Foreign => return pass,
        Caller::Node => {
            if place == MESH_LOCAL {
                // Losing the mark only turns a probe away under STRICT.
                let _full = ORIGINS.insert(cookie, 1, 0);
            }
            return pass;
        }
        Caller::Unknown => {
            if config.unknown == UNKNOWN_ALLOW {
                return pass;
            }
            count(Counter::RefusedUnknown);
            sockets::refused(config, netns, cookie, destination, u32::from(port));
            return refuse;
        }
    };
    if protocol == IPPROTO_MPTCP {
        // Its subflows are sockets of the kernel that no hook sees.
        count(Counter::RefusedProtocol);
        sockets::refused(config, netns, cookie, destination, u32::from(port));
        return refuse;
    }
    let tgid = (bpf_get_current_pid_tgid() >> 32) as u32;
    let dial = dial(netns, cgroup, tgid, cookie, destination, u32::from(port));
    if DIALS.insert(cookie, dial, 0).is_err() {
        count(Counter::RefusedFull);
        sockets::refused(config, netns, cookie, destination, u32::from(port));
        return refuse;
    }
    count(Counter::Steered);
    Decision::Steer(config.outbound_port)
}

/// Whether the destination is in the mesh, or may be, and where.
#[inline(always)]
fn in_mesh(address: Address, port: u32) -> Option<u32> {
    let (mut outside, mut of_node) = (false, false);
    for port in [0, port] {
        // SAFETY: the map's values are only replaced whole, by the agent.
        match unsafe { MESH.get(MeshKey { address, port }) } {
            Some(&MESH_OUTSIDE) => outside = true,
            Some(&MESH_NODE) => of_node = true,
            Some(place) => return Some(*place),
            None => {}
        }
    }
    if of_node {
        let address = NODES;
        // SAFETY: the map's values are only replaced whole, by the agent.
        return unsafe { MESH.get(MeshKey { address, port }) }.copied();
    }
    if outside || !may_be_a_pod(address) {
        return None;
    }
    Some(MESH_REMOTE)
}

/// Whether nobody knows what an address is that a pod may have: the agent will ask.
#[inline(always)]
fn may_be_a_pod(address: Address) -> bool {
    if RANGES.get(Key::new(128, address)).is_none() {
        return false;
    }
    // SAFETY: the map's values are only replaced whole, by the agent.
    match unsafe { FOREIGN.get(address) } {
        // SAFETY: a helper without arguments.
        Some(until) => *until <= unsafe { bpf_ktime_get_ns() },
        None => true,
    }
}

#[inline(always)]
fn dial(netns: u64, cgroup: u64, tgid: u32, cookie: u64, destination: Address, port: u32) -> Dial {
    Dial {
        destination,
        source: [0; 4],
        netns,
        cgroup,
        // SAFETY: a helper without arguments.
        at: unsafe { bpf_ktime_get_ns() },
        cookie,
        destination_port: port,
        source_port: 0,
        tgid,
        uid: bpf_get_current_uid_gid() as u32,
        comm: bpf_get_current_comm().unwrap_or_default(),
    }
}

/// # Safety
/// `addr` is the context of a connect hook.
#[inline(always)]
unsafe fn set_port(addr: *mut bpf_sock_addr, port: u32) {
    // SAFETY: the caller's promise; the port is writable in this hook.
    unsafe { (&raw mut (*addr).user_port).write_volatile(u32::from((port as u16).to_be())) };
}
