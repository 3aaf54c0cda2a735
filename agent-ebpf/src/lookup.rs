//! `sk_lookup`, attached to each enrolled pod's network namespace: hands every
//! new TCP connection that does not come from loopback to the agent.
//!
//! Fails closed: where the agent's listener is gone, or the address is
//! none that the agent knows in the pod, the packet is dropped.

use aya_ebpf::{
    bindings::sk_action::{SK_DROP, SK_PASS},
    programs::SkLookupContext,
};
use postern_ebpf::{Address, Counter, LISTENER_HBONE, LISTENER_PLAINTEXT, Listener};

use crate::{
    context::{is_mapped, mapped, read_address},
    maps::{LISTENERS, config, count},
};

const IPPROTO_TCP: u32 = 6;
const AF_INET: u32 = 2;

#[inline(always)]
pub fn inbound(ctx: &SkLookupContext) -> u32 {
    let lookup = ctx.lookup;
    // All reads at once, whatever the family: were they behind its test, the compiler
    // would join them into one read through a computed pointer, which the verifier
    // refuses.
    // SAFETY: the context's own fields.
    let (protocol, family, port, remote_v4, remote_v6, local_v4, local_v6) = unsafe {
        (
            (&raw const (*lookup).protocol).read_volatile(),
            (&raw const (*lookup).family).read_volatile(),
            (&raw const (*lookup).local_port).read_volatile(),
            (&raw const (*lookup).remote_ip4).read_volatile(),
            read_address((&raw const (*lookup).remote_ip6).cast()),
            (&raw const (*lookup).local_ip4).read_volatile(),
            read_address((&raw const (*lookup).local_ip6).cast()),
        )
    };
    let (remote, address) = if family == AF_INET {
        (mapped(remote_v4), mapped(local_v4))
    } else {
        (remote_v6, local_v6)
    };
    if protocol != IPPROTO_TCP || is_loopback(remote) || is_loopback(address) {
        // The agent's last hop, or the pod talking to itself (a steered connect whose
        // application chose the source address comes from the pod's own).
        return SK_PASS;
    }
    let Some(config) = config() else {
        return SK_DROP;
    };
    let kind = if port == config.hbone_port {
        LISTENER_HBONE
    } else {
        LISTENER_PLAINTEXT
    };
    if LISTENERS
        .redirect_sk_lookup(ctx, Listener { address, kind }, 0)
        .is_err()
    {
        count(Counter::DroppedNoListener);
        return SK_DROP;
    }
    SK_PASS
}

/// `::1`, or 127.0.0.0/8 as v4-mapped.
#[inline(always)]
pub fn is_loopback(address: Address) -> bool {
    const NET: u32 = 0x7f00_0000;
    address == [0, 0, 0, 1_u32.to_be()]
        || (is_mapped(address) && u32::from_be(address[3]) & 0xff00_0000 == NET)
}
