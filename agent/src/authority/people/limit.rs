//! Login attempts of one address in a minute. An IPv6 address counts by its /64, which
//! one customer has whole.
//!
//! Bounded: with more than [`MOST`] addresses in a minute some are forgotten and may try
//! again. That fails open on purpose, or whoever has many addresses could shut all
//! others out; the lockout of accounts and the turns for hashing still hold.

use std::{
    net::{IpAddr, Ipv6Addr},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use moka::sync::Cache;

const MOST: u64 = 65_536;

pub struct Limit {
    most: u32,
    /// By address and minute.
    counts: Cache<(IpAddr, u64), Arc<AtomicU32>>,
}

impl Limit {
    pub fn new(per_minute: u32) -> Self {
        Self {
            most: per_minute,
            counts: Cache::builder()
                .max_capacity(MOST)
                .time_to_live(Duration::from_secs(120))
                .build(),
        }
    }

    /// Counts one attempt at this second since 1970; false where it is one too many.
    pub fn admits(&self, address: IpAddr, now: u64) -> bool {
        let key = (network(address), now / 60);
        let count = self.counts.get_with(key, Arc::default);
        // Saturates long after everything was refused.
        let before = count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_add(1));
        before.is_ok_and(|before| before < self.most)
    }

    /// Whether the next attempt would be one too many; counts nothing.
    pub fn spent(&self, address: IpAddr, now: u64) -> bool {
        let count = self.counts.get(&(network(address), now / 60));
        count.is_some_and(|count| count.load(Ordering::Relaxed) >= self.most)
    }
}

pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.into(),
        IpAddr::V6(v6) => Ipv6Addr::from(u128::from(v6) & !u128::from(u64::MAX)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_counted_by_network_and_minute() {
        let limit = Limit::new(2);
        let at = |address: &str, now| limit.admits(address.parse().expect("an address"), now);
        assert!(at("192.0.2.1", 60) && at("::ffff:192.0.2.1", 61));
        assert!(!at("192.0.2.1", 119));
        assert!(at("192.0.2.1", 120));
        assert!(at("192.0.2.2", 60));
        assert!(at("2001:db8::1", 0) && at("2001:db8::2", 0));
        assert!(!at("2001:db8::3", 0));
        assert!(at("2001:db8:0:1::3", 0));
    }
}
