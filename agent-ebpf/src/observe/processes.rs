//! Programs that a pod starts, and processes that end.

use core::hint::black_box;

use aya_ebpf::{
    helpers::generated::{bpf_get_current_task, bpf_probe_read_user},
    helpers::{bpf_get_current_pid_tgid, bpf_probe_read_kernel_str_bytes},
};
use postern_ebpf::{ARGV_LEN, Config, EVENT_EXEC, EVENT_EXIT, ExecEvent, ExitEvent, PATH_LEN};

use super::{
    Kind, Subject, allowed, calling, config, current_netns, field, header, offset, room, task,
};
use crate::maps::{EVENTS, EXEC, count};

/// An event while it is put together: path and arguments have no fixed place in it, and
/// the verifier wants room for the most that either could be.
#[repr(C)]
pub struct ExecScratch {
    event: ExecEvent,
    bytes: [u8; PATH_LEN + 2 * ARGV_LEN],
}

const PATH_MASK: usize = PATH_LEN - 1;
const ARGV_MASK: usize = 2 * ARGV_LEN - 1;

/// `sched:sched_process_exec`: the new program is in place and has not run yet.
#[inline(always)]
pub fn exec(binprm: u64) -> Option<()> {
    let (config, subject) = enrolled_process()?;
    if !allowed(config, subject, Kind::Exec) {
        return None;
    }
    let scratch = EXEC.get_ptr_mut(0)?;
    // SAFETY: this CPU's own, and the kernel runs no program within itself.
    let (event, bytes) = unsafe { (&mut (*scratch).event, &raw mut (*scratch).bytes) };
    event.header = header(EVENT_EXEC, subject);
    event.task = task();
    // SAFETY: offsets and types are those of the running kernel's BTF.
    let (name, parent, mm) = unsafe {
        let current = bpf_get_current_task();
        (
            field::<u64>(binprm, offset!(binprm_filename))?,
            field::<u64>(current, offset!(task_real_parent))?,
            field::<u64>(current, offset!(task_mm))?,
        )
    };
    // SAFETY: as above.
    unsafe {
        event.parent_tgid = field(parent, offset!(task_tgid)).unwrap_or(0);
        event.parent_comm = field(parent, offset!(task_comm)).unwrap_or_default();
    }
    // SAFETY: the first bytes of the scratch.
    let path = unsafe { &mut *bytes.cast::<[u8; PATH_LEN]>() };
    // SAFETY: a string of the kernel's; the helper checks the address.
    let path = unsafe { bpf_probe_read_kernel_str_bytes(name as *const u8, path) };
    // Masked, after the compiler has forgotten what it knows: so that the verifier does.
    let path_len = black_box(path.map_or(0, <[u8]>::len)) & PATH_MASK;
    // SAFETY: as above.
    let (start, end): (u64, u64) = unsafe {
        (
            field(mm, offset!(mm_arg_start))?,
            field(mm, offset!(mm_arg_end))?,
        )
    };
    let there = end.saturating_sub(start);
    let wanted = if there > ARGV_LEN as u64 {
        ARGV_LEN
    } else {
        there as usize
    };
    let mut argv_len = black_box(wanted) & ARGV_MASK;
    // SAFETY: behind the path there is room for more than the mask lets through.
    let read = unsafe {
        let to = bytes.cast::<u8>().add(path_len);
        bpf_probe_read_user(to.cast(), argv_len as u32, start as *const _)
    };
    if read != 0 {
        argv_len = 0; // they were paged out
    }
    event.path_len = path_len as u32;
    event.argv_len = argv_len as u32;
    event.truncated = u32::from(there > argv_len as u64);
    let size = size_of::<ExecEvent>() + path_len + argv_len;
    // SAFETY: event and bytes follow each other, and so much of them was written.
    let whole = unsafe { core::slice::from_raw_parts(scratch.cast::<u8>(), size) };
    if EVENTS.output::<[u8]>(whole, 0).is_err() {
        count(Kind::Exec.lost());
    }
    Some(())
}

/// `sched:sched_process_exit`.
#[inline(always)]
pub fn exit() -> Option<()> {
    let pid_tgid = bpf_get_current_pid_tgid();
    if pid_tgid as u32 != (pid_tgid >> 32) as u32 {
        return None; // a thread, not the process
    }
    let (config, subject) = enrolled_process()?;
    // SAFETY: offsets and types are those of the running kernel's BTF.
    let (status, replaced): (u32, u64) = unsafe {
        let current = bpf_get_current_task();
        let signal = field(current, offset!(task_signal))?;
        (
            field(current, offset!(task_exit_code))?,
            field(signal, offset!(signal_group_exec))?,
        )
    };
    if replaced != 0 {
        return None; // another thread starts a program: the process goes on in it
    }
    let mut entry = room::<ExitEvent>(config, subject, Kind::Exit)?;
    entry.write(ExitEvent {
        header: header(EVENT_EXIT, subject),
        task: task(),
        status,
        _pad: 0,
    });
    entry.submit(0);
    Some(())
}

#[inline(always)]
fn enrolled_process() -> Option<(&'static Config, Subject)> {
    let config = config()?;
    Some((config, calling(config, current_netns()?)?))
}
