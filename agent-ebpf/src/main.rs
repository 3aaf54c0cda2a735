//! The kernel programs. Each entry point is its attribute and one call; what it
//! does is in the module of the same theme; those of observers are in `probes`. No program fails open in silence:
//! every refusal is counted, every pass has its reason beside it.

#![no_std]
#![no_main]

mod connect;
mod context;
mod guard;
mod lookup;
mod maps;
mod observe;
mod peername;
mod probes;
mod sockops;

use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr, sk_lookup, sock_ops},
    programs::{SkLookupContext, SockAddrContext, SockContext, SockOpsContext},
};

#[cgroup_sock_addr(connect4)]
pub fn postern_connect4(ctx: SockAddrContext) -> i32 {
    connect::v4(&ctx)
}

#[cgroup_sock_addr(connect6)]
pub fn postern_connect6(ctx: SockAddrContext) -> i32 {
    connect::v6(&ctx)
}

#[cgroup_sock_addr(connect4)]
pub fn postern_guard4(ctx: SockAddrContext) -> i32 {
    guard::v4(&ctx)
}

#[cgroup_sock_addr(connect6)]
pub fn postern_guard6(ctx: SockAddrContext) -> i32 {
    guard::v6(&ctx)
}

#[cgroup_sock_addr(getpeername4)]
pub fn postern_peer4(ctx: SockAddrContext) -> i32 {
    peername::v4(&ctx)
}

#[cgroup_sock_addr(getpeername6)]
pub fn postern_peer6(ctx: SockAddrContext) -> i32 {
    peername::v6(&ctx)
}

#[sock_ops]
pub fn postern_sockops(ctx: SockOpsContext) -> u32 {
    sockops::connecting(&ctx)
}

#[cgroup_sock(sock_release)]
pub fn postern_release(ctx: SockContext) -> i32 {
    sockops::released(&ctx)
}

#[sk_lookup]
pub fn postern_lookup(ctx: SkLookupContext) -> u32 {
    lookup::inbound(&ctx)
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// Some helpers (ring buffer, tracing) are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
