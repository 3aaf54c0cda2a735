//! Entry points of the observers. What is a tracepoint is one everywhere. Functions are
//! probed by fentry and fexit, or by kprobes where those are not to be had; where neither
//! is, hooks and another tracepoint see most of what leaves a pod: three ways in, one
//! logic. A part that cannot be attached is missing, and the agent says so.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext as _,
    helpers::{bpf_get_current_pid_tgid, generated::bpf_get_socket_cookie},
    macros::{btf_tracepoint, cgroup_sock_addr, fentry, fexit, kprobe, kretprobe},
    programs::{
        BtfTracePointContext, FEntryContext, FExitContext, ProbeContext, RetProbeContext,
        SockAddrContext,
    },
};
use postern_ebpf::Call;

use crate::{
    context::{mapped, read_address},
    maps::CALLS,
    observe::{self, datagrams, offset, processes, sockets},
};

/// What these programs return has no meaning.
const IGNORED: i32 = 0;
const IGNORED_BY_KPROBES: u32 = 0;
/// Hooks on datagrams look on, and never refuse.
const PASS: i32 = 1;

#[btf_tracepoint(function = "inet_sock_set_state")]
pub fn postern_state(ctx: BtfTracePointContext) -> i32 {
    let _told = sockets::state(ctx.arg(0), ctx.arg(1), ctx.arg(2));
    IGNORED
}

#[btf_tracepoint(function = "sched_process_exec")]
pub fn postern_exec(ctx: BtfTracePointContext) -> i32 {
    let _told = processes::exec(ctx.arg(2));
    IGNORED
}

#[btf_tracepoint(function = "sched_process_exit")]
pub fn postern_exit(_ctx: BtfTracePointContext) -> i32 {
    let _told = processes::exit();
    IGNORED
}

#[btf_tracepoint(function = "sock_send_length")]
pub fn postern_sent(ctx: BtfTracePointContext) -> i32 {
    let _told = datagrams::sent(ctx.arg(0), ctx.arg(1));
    IGNORED
}

#[cgroup_sock_addr(sendmsg4)]
pub fn postern_sendmsg4(ctx: SockAddrContext) -> i32 {
    // SAFETY: the context's own fields.
    let remote = mapped(unsafe { (&raw const (*ctx.sock_addr).user_ip4).read_volatile() });
    let _told = datagrams::hooked(&ctx, remote);
    PASS
}

#[cgroup_sock_addr(sendmsg6)]
pub fn postern_sendmsg6(ctx: SockAddrContext) -> i32 {
    // SAFETY: the context's own fields.
    let remote = unsafe { read_address((&raw const (*ctx.sock_addr).user_ip6).cast()) };
    let _told = datagrams::hooked(&ctx, remote);
    PASS
}

#[fexit(function = "inet_csk_accept")]
pub fn postern_accept(ctx: FExitContext) -> i32 {
    // How many arguments are before it differs between kernels.
    if let Ok(sk) = ctx.ret() {
        let _told = sockets::accept(sk);
    }
    IGNORED
}

#[kretprobe]
pub fn postern_k_accept(ctx: RetProbeContext) -> u32 {
    let _told = sockets::accept(ctx.ret());
    IGNORED_BY_KPROBES
}

#[fexit(function = "inet_stream_connect")]
pub fn postern_connect(ctx: FExitContext) -> i32 {
    let (socket, address, returned): (u64, u64, i32) = (ctx.arg(0), ctx.arg(1), ctx.arg(4));
    if returned < 0 {
        let _told =
            observe::socket_sk(socket).and_then(|sk| sockets::connect(sk, address, returned));
    }
    IGNORED
}

#[kprobe]
pub fn postern_k_connect_enter(ctx: ProbeContext) -> u32 {
    if let (Some(socket), Some(address)) = (ctx.arg(0), ctx.arg(1)) {
        let call = Call { socket, address };
        let _full = CALLS.insert(bpf_get_current_pid_tgid(), call, 0);
    }
    IGNORED_BY_KPROBES
}

#[kretprobe]
pub fn postern_k_connect(ctx: RetProbeContext) -> u32 {
    let thread = bpf_get_current_pid_tgid();
    let returned: i32 = ctx.ret();
    if returned < 0
        // SAFETY: the entry is copied out; it is this thread's own.
        && let Some(call) = unsafe { CALLS.get(thread) }.copied()
        && let Some(sk) = observe::socket_sk(call.socket)
    {
        let _told = sockets::connect(sk, call.address, returned);
    }
    let _absent = CALLS.remove(thread);
    IGNORED_BY_KPROBES
}

/// The cookie of a socket that the verifier knows to be one; it is made where there is
/// none yet.
#[inline(always)]
fn made_cookie(sk: *mut c_void) -> u64 {
    // SAFETY: a helper that takes what is passed to it.
    unsafe { bpf_get_socket_cookie(sk) }
}

#[inline(always)]
fn udp_entered(ctx: &FEntryContext) -> i32 {
    let sk: *mut c_void = ctx.arg(0);
    let _told = datagrams::udp(sk as u64, ctx.arg(1), || made_cookie(sk));
    IGNORED
}

#[inline(always)]
fn raw_entered(ctx: &FEntryContext) -> i32 {
    let sk: *mut c_void = ctx.arg(0);
    let _told = datagrams::raw(sk as u64, false, || made_cookie(sk));
    IGNORED
}

#[fentry(function = "udp_sendmsg")]
pub fn postern_udp4(ctx: FEntryContext) -> i32 {
    udp_entered(&ctx)
}

#[fentry(function = "udpv6_sendmsg")]
pub fn postern_udp6(ctx: FEntryContext) -> i32 {
    udp_entered(&ctx)
}

#[fentry(function = "raw_sendmsg")]
pub fn postern_raw4(ctx: FEntryContext) -> i32 {
    raw_entered(&ctx)
}

#[fentry(function = "rawv6_sendmsg")]
pub fn postern_raw6(ctx: FEntryContext) -> i32 {
    raw_entered(&ctx)
}

#[fentry(function = "packet_sendmsg")]
pub fn postern_packet(ctx: FEntryContext) -> i32 {
    // SAFETY: a `struct socket`, whose field the verifier knows to be a socket.
    let sk = unsafe {
        let at = ctx.as_ptr().cast::<*const u8>().read();
        at.add(offset!(socket_sk) as usize)
            .cast::<*mut c_void>()
            .read_volatile()
    };
    let _told = datagrams::raw(sk as u64, true, || made_cookie(sk));
    IGNORED
}

#[inline(always)]
fn udp_probed(ctx: &ProbeContext) -> u32 {
    if let (Some(sk), Some(message)) = (ctx.arg(0), ctx.arg(1)) {
        let _told = datagrams::udp(sk, message, || observe::cookie(sk));
    }
    IGNORED_BY_KPROBES
}

#[inline(always)]
fn raw_probed(sk: Option<u64>, packet: bool) -> u32 {
    if let Some(sk) = sk {
        let _told = datagrams::raw(sk, packet, || observe::cookie(sk));
    }
    IGNORED_BY_KPROBES
}

#[kprobe]
pub fn postern_k_udp4(ctx: ProbeContext) -> u32 {
    udp_probed(&ctx)
}

#[kprobe]
pub fn postern_k_udp6(ctx: ProbeContext) -> u32 {
    udp_probed(&ctx)
}

#[kprobe]
pub fn postern_k_raw4(ctx: ProbeContext) -> u32 {
    raw_probed(ctx.arg(0), false)
}

#[kprobe]
pub fn postern_k_raw6(ctx: ProbeContext) -> u32 {
    raw_probed(ctx.arg(0), false)
}

#[kprobe]
pub fn postern_k_packet(ctx: ProbeContext) -> u32 {
    raw_probed(ctx.arg(0).and_then(observe::socket_sk), true)
}
