//! Addresses that are asked about when they are dialled, and those that were.

use std::{
    collections::{BTreeSet, HashSet},
    net::IpAddr,
    time::Duration,
};

use aya::maps::lpm_trie::Key;
use ipnet::IpNet;
use postern_ebpf::{Address, RANGES};

use super::{
    maps::{failed, hold, monotonic, to_abi},
    pins::{Kernel, KernelError},
};

/// A v4-mapped address has so many bits before those of IPv4.
const MAPPED_BITS: u32 = 96;

impl Kernel {
    /// Makes exactly these the ranges in which unknown addresses are steered.
    pub fn set_ranges(&self, ranges: &BTreeSet<IpNet>) -> Result<(), KernelError> {
        let wanted = keys(ranges);
        // Without the others they would be outside the mesh: rather nothing changes.
        if wanted.len() > RANGES as usize {
            return Err(KernelError::TooManyRanges(wanted.len()));
        }
        let failed = || failed("RANGES");
        let mut map = hold(&self.maps.ranges);
        let present: HashSet<(u32, Address)> = map
            .keys()
            .map(|key| key.map(|key| (key.prefix_len(), key.data())))
            .collect::<Result<_, _>>()
            .map_err(failed())?;
        let new: Vec<_> = wanted.difference(&present).collect();
        // An address that stays is never without a range, unless there is no room.
        let full = present.len() + new.len() > RANGES as usize;
        let old = present.difference(&wanted);
        if full {
            for (bits, address) in old.clone() {
                let _gone_by_itself = map.remove(&Key::new(*bits, *address));
            }
        }
        for (bits, address) in new {
            map.insert(&Key::new(*bits, *address), 1, 0)
                .map_err(failed())?;
        }
        for (bits, address) in old.filter(|_| !full) {
            let _gone_by_itself = map.remove(&Key::new(*bits, *address));
        }
        Ok(())
    }

    /// Lets what is dialled at an address pass for some time: it is no pod's. Losing the
    /// entry, or having no room for it, only means that somebody asks again.
    pub fn set_foreign(&self, address: IpAddr, lasting: Duration) {
        let until = monotonic().saturating_add(lasting.as_nanos() as u64);
        let _asked_again = hold(&self.maps.foreign).insert(to_abi(address), until, 0);
    }

    /// Asks about an address again before its time is over.
    pub fn forget_foreign(&self, address: IpAddr) {
        super::maps::forget(&self.maps.foreign, &to_abi(address));
    }
}

/// As the map has them: as few as cover the same addresses.
fn keys(ranges: &BTreeSet<IpNet>) -> HashSet<(u32, Address)> {
    let ranges: Vec<IpNet> = ranges.iter().copied().collect();
    IpNet::aggregate(&ranges)
        .into_iter()
        .map(|range| {
            let before = match range {
                IpNet::V4(_) => MAPPED_BITS,
                IpNet::V6(_) => 0,
            };
            (
                before + u32::from(range.prefix_len()),
                to_abi(range.network()),
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_range_and_families_are_kept_apart() {
        let ranges = ["10.1.0.0/24", "10.1.1.7/24", "10.9.0.0/24", "fd00::/64"];
        let ranges = ranges
            .iter()
            .map(|range| range.parse().expect("a range"))
            .collect();
        let address = |text: &str| to_abi(text.parse().expect("an address"));
        let expected = [
            (96 + 23, address("10.1.0.0")),
            (96 + 24, address("10.9.0.0")),
            (64, address("fd00::")),
        ];
        assert_eq!(keys(&ranges), expected.into());
    }
}
