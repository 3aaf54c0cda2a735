//! Process ids: the kernel programs tell the machine's own, and `/proc` those of the
//! agent's namespace. Both are the same but on a node that is a container (kind).

use std::{path::Path, sync::OnceLock};

use postern_ebpf::ANY_TGID;

/// Whether ids that the kernel programs tell mean anything here.
pub fn shared() -> bool {
    static SHARED: OnceLock<bool> = OnceLock::new();
    // The first namespace has a fixed number (PROC_PID_INIT_INO, include/linux/proc_ns.h).
    let first = Path::new("pid:[4026531836]");
    let own = || std::fs::read_link("/proc/self/ns/pid");
    *SHARED.get_or_init(|| own().is_ok_and(|own| own == first))
}

/// The agent's id as the programs know it.
pub fn own() -> u32 {
    match shared() {
        true => std::process::id(),
        false => ANY_TGID,
    }
}
