//! `sk_lookup`, attached to each enrolled pod's network namespace: hands every
//! new TCP connection that does not come from loopback to the agent.
//!
//! Fails closed: where the agent's listener is gone, or the address is
//! none that the agent knows in the pod, the packet is dropped.

use aya_ebpf::{
    bindings::{
        bpf_sk_lookup,
        sk_action::{SK_DROP, SK_PASS},
    },
    programs::SkLookupContext,
};
use postern_ebpf::{Address, Counter, LISTENER_HBONE, LISTENER_PLAINTEXT, Listener};

use crate::{
    context::{is_mapped, joined, mapped, read_words},
    maps::{LISTENERS, config, count},
};

const IPPROTO_TCP: u32 = 6;
const AF_INET: u32 = 2;

#[inline(always)]
pub fn inbound(ctx: &SkLookupContext) -> u32 {
    let lookup = ctx.lookup;
    // SAFETY: the context's own fields.
    if unsafe { (&raw const (*lookup).protocol).read_volatile() } != IPPROTO_TCP
        || from_loopback(lookup)
    {
        // The agent's last hop, or the pod talking to itself.
        return SK_PASS;
    }
    let Some(config) = config() else { return SK_DROP };
    // SAFETY: the context's own fields.
    let port = unsafe { (&raw const (*lookup).local_port).read_volatile() };
    let kind = if port == config.hbone_port { LISTENER_HBONE } else { LISTENER_PLAINTEXT };
    if LISTENERS.redirect_sk_lookup(ctx, Listener { address: dialled(lookup), kind }, 0).is_err() {
        count(Counter::DroppedNoListener);
        return SK_DROP;
    }
    SK_PASS
}

#[inline(always)]
fn dialled(lookup: *mut bpf_sk_lookup) -> Address {
    // SAFETY: the context's own fields.
    unsafe {
        if (&raw const (*lookup).family).read_volatile() == AF_INET {
            mapped((&raw const (*lookup).local_ip4).read_volatile())
        } else {
            joined(read_words((&raw const (*lookup).local_ip6).cast()))
        }
    }
}

#[inline(always)]
fn from_loopback(lookup: *mut bpf_sk_lookup) -> bool {
    const NET_127: u32 = 0x7f00_0000;
    // SAFETY: the context's own fields.
    unsafe {
        if (&raw const (*lookup).family).read_volatile() == AF_INET {
            let ip = (&raw const (*lookup).remote_ip4).read_volatile();
            u32::from_be(ip) & 0xff00_0000 == NET_127
        } else {
            let words = read_words((&raw const (*lookup).remote_ip6).cast());
            words == [0, 0, 0, 1_u32.to_be()]
                || (is_mapped(words) && u32::from_be(words[3]) & 0xff00_0000 == NET_127)
        }
    }
}
