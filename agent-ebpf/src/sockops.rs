//! `sockops` learns a steered connection's source once it is chosen, so that the
//! agent can find it after `accept`; `cgroup/sock_release` forgets the socket.

use aya_ebpf::{
    EbpfContext as _,
    bindings::BPF_SOCK_OPS_TCP_CONNECT_CB,
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_ktime_get_ns},
    programs::{SockContext, SockOpsContext},
};
use postern_ebpf::{Address, Counter, Endpoint, Probe};

use crate::{
    connect::IPPROTO_TCP,
    context::{mapped, read_address},
    lookup::is_loopback,
    maps::{DIALS, FLOWS, ORIGINS, PROBES, count},
};

const AF_INET: u32 = 2;
/// `include/net/tcp_states.h`.
const TCP_SYN_SENT: u32 = 2;
const TCP_CLOSE: u32 = 7;

/// What sockops programs return has no meaning for this callback.
const IGNORED: u32 = 1;
/// `sock_release` cannot refuse.
const PASS: i32 = 1;

#[inline(always)]
pub fn connecting(ctx: &SockOpsContext) -> u32 {
    if ctx.op() != BPF_SOCK_OPS_TCP_CONNECT_CB {
        return IGNORED;
    }
    // SAFETY: a helper of this program type; the context outlives the call.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // What is steered goes to loopback, and nothing else is in `DIALS`.
    if is_loopback(remote(ctx)) {
        let Some(dial) = DIALS.get_ptr_mut(cookie) else {
            return IGNORED;
        };
        // SAFETY: a helper of this program type; the context outlives the call.
        let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
        let flow = Endpoint {
            netns,
            address: local(ctx),
            port: ctx.local_port(),
            _pad: 0,
        };
        // SAFETY: the socket is in `connect`; nobody else touches its entry.
        unsafe {
            (*dial).source = flow.address;
            (*dial).source_port = flow.port;
        }
        // Without the entry the agent refuses the connection: fails closed.
        // SAFETY: as above; the entry is copied.
        if FLOWS.insert(flow, unsafe { *dial }, 0).is_err() {
            count(Counter::RefusedFull);
        }
    // SAFETY: a plain number.
    } else if unsafe { ORIGINS.get(cookie) }.is_some() {
        let _absent = ORIGINS.remove(cookie);
        let probe = Probe {
            source: local(ctx),
            destination: remote(ctx),
            source_port: ctx.local_port(),
            destination_port: u32::from_be(ctx.remote_port()),
        };
        // SAFETY: a helper without arguments.
        let now = unsafe { bpf_ktime_get_ns() };
        // Losing it only turns a probe away under STRICT.
        let _full = PROBES.insert(probe, now, 0);
    }
    IGNORED
}

#[inline(always)]
pub fn released(ctx: &SockContext) -> i32 {
    let sock = ctx.sock;
    // SAFETY: the context's own fields, all read before any is looked at.
    let (protocol, family, state, port, v4, v6) = unsafe {
        (
            (&raw const (*sock).protocol).read_volatile(),
            (&raw const (*sock).family).read_volatile(),
            (&raw const (*sock).state).read_volatile(),
            (&raw const (*sock).dst_port).read_volatile(),
            (&raw const (*sock).dst_ip4).read_volatile(),
            read_address((&raw const (*sock).dst_ip6).cast()),
        )
    };
    if protocol != IPPROTO_TCP {
        return PASS;
    }
    let remote = if family == AF_INET { mapped(v4) } else { v6 };
    if port != 0 && !is_loopback(remote) {
        // Connected, or it was, and not to the agent; what was known of a try before that
        // is forgotten since then.
        return PASS;
    }
    // SAFETY: a helper of this program type; the context outlives the call.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    if state == TCP_CLOSE || state == TCP_SYN_SENT {
        // It never came to be: the agent will not ask for it.
        forget(cookie);
    } else {
        // The agent may not have accepted it yet, and the peer's bytes are on their
        // way: what it was dialled as stays in FLOWS.
        // SAFETY: only whether it is there: a removal takes a lock also where it is not.
        if unsafe { DIALS.get(cookie) }.is_some() {
            let _there = DIALS.remove(cookie);
        }
    }
    PASS
}

/// Removes all that is known of a socket's dial.
#[inline(always)]
pub fn forget(cookie: u64) {
    // SAFETY: the entry is read before it is removed.
    let Some(dial) = (unsafe { DIALS.get(cookie) }) else {
        return;
    };
    let flow = Endpoint {
        netns: dial.netns,
        address: dial.source,
        port: dial.source_port,
        _pad: 0,
    };
    // Its port may already belong to a newer connection of the same pod.
    // SAFETY: as above.
    if unsafe { FLOWS.get(flow) }.is_some_and(|known| known.cookie == cookie) {
        let _absent = FLOWS.remove(flow);
    }
    let _absent = DIALS.remove(cookie);
}

#[inline(always)]
fn local(ctx: &SockOpsContext) -> Address {
    // SAFETY: the context's own fields, both read before the family is looked at.
    let v6 = unsafe { read_address((&raw const (*ctx.ops).local_ip6).cast()) };
    let v4 = mapped(ctx.local_ip4());
    if ctx.family() == AF_INET { v4 } else { v6 }
}

#[inline(always)]
fn remote(ctx: &SockOpsContext) -> Address {
    // SAFETY: the context's own fields, both read before the family is looked at.
    let v6 = unsafe { read_address((&raw const (*ctx.ops).remote_ip6).cast()) };
    let v4 = mapped(ctx.remote_ip4());
    if ctx.family() == AF_INET { v4 } else { v6 }
}
