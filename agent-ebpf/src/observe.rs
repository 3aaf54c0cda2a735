//! Observers: what the kernel itself saw of enrolled pods, for the audit log.
//! They decide nothing, so they fail open; an event that finds the ring full is
//! counted by kind.

use aya_ebpf::{
    helpers::generated::{
        bpf_get_current_cgroup_id, bpf_get_current_task, bpf_get_socket_cookie, bpf_ktime_get_ns,
    },
    helpers::{
        bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_current_uid_gid,
        bpf_probe_read_kernel, bpf_probe_read_kernel_str_bytes,
    },
    programs::BtfTracePointContext,
};
use postern_ebpf::{
    Address, Counter, EVENT_EXEC, EVENT_EXIT, EVENT_SOCKET, EventHeader, ExecEvent, ExitEvent,
    Offsets, PATH_LEN, SocketEvent,
};

use crate::{
    context::{Caller, caller, mapped},
    maps::{EVENTS, WORKLOADS, config, count},
};

const IGNORED: i32 = 0;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// Set by the agent before load, from the kernel's BTF.
#[unsafe(no_mangle)]
static OFFSETS: Offsets = Offsets {
    sock_net: 0,
    sock_family: 0,
    sock_daddr: 0,
    sock_rcv_saddr: 0,
    sock_dport: 0,
    sock_num: 0,
    sock_v6_daddr: 0,
    sock_v6_rcv_saddr: 0,
    net_cookie: 0,
    task_nsproxy: 0,
    nsproxy_net: 0,
    binprm_filename: 0,
};

#[inline(always)]
fn offsets() -> Offsets {
    // SAFETY: a static; volatile, because the agent changes it before load.
    unsafe { (&raw const OFFSETS).read_volatile() }
}

/// Reads a field of a kernel structure.
///
/// # Safety
/// `T` is what lies at `offset` of the structure at `base`.
#[inline(always)]
unsafe fn field<T>(base: u64, offset: u32) -> Option<T> {
    // SAFETY: the helper checks the address; the caller promises the type.
    unsafe { bpf_probe_read_kernel((base + u64::from(offset)) as *const T) }.ok()
}

#[inline(always)]
pub fn socket_state(ctx: &BtfTracePointContext) -> i32 {
    let _seen = try_socket_state(ctx);
    IGNORED
}

#[inline(always)]
fn try_socket_state(ctx: &BtfTracePointContext) -> Option<()> {
    let sock: *const u8 = ctx.arg(0);
    let (old_state, new_state): (u32, u32) = (ctx.arg(1), ctx.arg(2));
    let at = offsets();
    let base = sock as u64;
    // SAFETY: offsets and types are those of the running kernel's BTF.
    unsafe {
        let net: u64 = field(base, at.sock_net)?;
        let netns: u64 = field(net, at.net_cookie)?;
        // Runs in any context (softirq too), so only the namespace can tell.
        if WORKLOADS.get(netns)?.enrolled == 0 {
            return None;
        }
        let family: u16 = field(base, at.sock_family)?;
        let (local, remote): (Address, Address) = match family {
            AF_INET => (
                mapped(field(base, at.sock_rcv_saddr)?),
                mapped(field(base, at.sock_daddr)?),
            ),
            AF_INET6 => (
                field(base, at.sock_v6_rcv_saddr)?,
                field(base, at.sock_v6_daddr)?,
            ),
            _ => return None,
        };
        let local_port: u16 = field(base, at.sock_num)?;
        let remote_port: u16 = field(base, at.sock_dport)?;
        let cookie = bpf_get_socket_cookie(sock.cast_mut().cast());
        let Some(mut entry) = EVENTS.reserve::<SocketEvent>(0) else {
            count(Counter::LostSocket);
            return None;
        };
        let mut header = header(EVENT_SOCKET, netns);
        // In softirq the current process is whichever was interrupted.
        if current_netns() != Some(netns) {
            header.tgid = 0;
            header.cgroup = 0;
            header.comm = [0; 16];
        }
        entry.write(SocketEvent {
            header,
            cookie,
            local,
            remote,
            local_port: u32::from(local_port),
            remote_port: u32::from(u16::from_be(remote_port)),
            old_state,
            new_state,
        });
        entry.submit(0);
    }
    Some(())
}

#[inline(always)]
pub fn process_exec(ctx: &BtfTracePointContext) -> i32 {
    let _seen = try_process_exec(ctx);
    IGNORED
}

#[inline(always)]
fn try_process_exec(ctx: &BtfTracePointContext) -> Option<()> {
    let netns = enrolled_process()?;
    let binprm: *const u8 = ctx.arg(2);
    let Some(mut entry) = EVENTS.reserve::<ExecEvent>(0) else {
        count(Counter::LostExec);
        return None;
    };
    let event = entry.as_mut_ptr();
    // SAFETY: the entry is ours until submitted, and every byte of it is written.
    unsafe {
        (*event).header = header(EVENT_EXEC, netns);
        (*event).uid = bpf_get_current_uid_gid() as u32;
        (*event).path_len = 0;
        (*event).path = [0; PATH_LEN];
        if let Some(name) = field::<u64>(binprm as u64, offsets().binprm_filename)
            && let Ok(path) = bpf_probe_read_kernel_str_bytes(name as *const u8, &mut (*event).path)
        {
            (*event).path_len = path.len() as u32;
        }
    }
    entry.submit(0);
    Some(())
}

#[inline(always)]
pub fn process_exit(_ctx: &BtfTracePointContext) -> i32 {
    let _seen = try_process_exit();
    IGNORED
}

#[inline(always)]
fn try_process_exit() -> Option<()> {
    let pid_tgid = bpf_get_current_pid_tgid();
    if pid_tgid as u32 != (pid_tgid >> 32) as u32 {
        return None; // a thread, not the process
    }
    let netns = enrolled_process()?;
    let Some(mut entry) = EVENTS.reserve::<ExitEvent>(0) else {
        count(Counter::LostExit);
        return None;
    };
    entry.write(ExitEvent {
        header: header(EVENT_EXIT, netns),
    });
    entry.submit(0);
    Some(())
}

/// The network namespace of the current process, if it belongs to an enrolled workload.
#[inline(always)]
fn enrolled_process() -> Option<u64> {
    let netns = current_netns()?;
    match caller(config()?, netns) {
        Caller::Known(workload, _) if workload.enrolled == 1 => Some(netns),
        _ => None,
    }
}

#[inline(always)]
fn current_netns() -> Option<u64> {
    let at = offsets();
    // SAFETY: offsets and types are those of the running kernel's BTF.
    unsafe {
        let nsproxy: u64 = field(bpf_get_current_task(), at.task_nsproxy)?;
        let net: u64 = field(nsproxy, at.nsproxy_net)?;
        field(net, at.net_cookie)
    }
}

#[inline(always)]
fn header(kind: u32, netns: u64) -> EventHeader {
    EventHeader {
        kind,
        tgid: (bpf_get_current_pid_tgid() >> 32) as u32,
        // SAFETY: helpers without arguments.
        at: unsafe { bpf_ktime_get_ns() },
        netns,
        // SAFETY: as above.
        cgroup: unsafe { bpf_get_current_cgroup_id() },
        comm: bpf_get_current_comm().unwrap_or_default(),
    }
}
