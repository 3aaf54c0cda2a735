//! What the agent reads and writes in the maps at run time.

use std::{
    collections::{HashMap as StdMap, HashSet},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd as _,
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
};

use aya::{
    Pod,
    maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, SockHash},
};
use postern_ebpf::{
    Address, Agent, COUNTERS, Client, Config, Counter, Dial, Endpoint, LISTENER_HBONE,
    LISTENER_PLAINTEXT, Listener, MESH_LOCAL, MESH_NODE, MESH_OUTSIDE, MESH_REMOTE, MeshKey, NODES,
    Probe, Tracked, Workload,
};

use socket2::Socket;

use super::pins::{Kernel, KernelError};

/// IPv4 as v4-mapped IPv6, as everywhere in the ABI.
pub fn to_abi(ip: IpAddr) -> Address {
    let v6 = match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    // Network order: each word keeps its bytes as they are.
    let octets = v6.octets();
    std::array::from_fn(|i| u32::from_ne_bytes([0, 1, 2, 3].map(|j| octets[4 * i + j])))
}

pub fn from_abi(address: Address) -> IpAddr {
    let words = address.map(u32::to_ne_bytes);
    Ipv6Addr::from(std::array::from_fn::<u8, 16, _>(|i| words[i / 4][i % 4])).to_canonical()
}

fn endpoint(netns: u64, address: SocketAddr) -> Endpoint {
    Endpoint {
        netns,
        address: to_abi(address.ip()),
        port: u32::from(address.port()),
        _pad: 0,
    }
}

pub(super) type Guarded<K, V> = Mutex<HashMap<MapData, K, V>>;

pub struct Maps {
    config: Mutex<Array<MapData, Config>>,
    pub(super) agents: Guarded<Agent, u32>,
    workloads: Guarded<u64, Workload>,
    cgroups: Guarded<u64, Workload>,
    mesh: Guarded<MeshKey, u32>,
    pub(super) ranges: Mutex<LpmTrie<MapData, Address, u32>>,
    pub(super) foreign: Guarded<Address, u64>,
    dials: Guarded<u64, Dial>,
    flows: Guarded<Endpoint, Dial>,
    clients: Guarded<Endpoint, Client>,
    probes: Guarded<Probe, u64>,
    listeners: Mutex<SockHash<MapData, Listener>>,
    pub(super) sockets: Guarded<u64, Tracked>,
    counters: PerCpuArray<MapData, u64>,
}

impl Maps {
    /// As they are pinned in a directory.
    pub fn open(pins: &Path) -> Result<Self, KernelError> {
        Ok(Self {
            config: Mutex::new(named(pins, "CONFIG")?),
            agents: Mutex::new(named(pins, "AGENTS")?),
            workloads: Mutex::new(named(pins, "WORKLOADS")?),
            cgroups: Mutex::new(named(pins, "CGROUPS")?),
            mesh: Mutex::new(named(pins, "MESH")?),
            ranges: Mutex::new(named(pins, "RANGES")?),
            foreign: Mutex::new(named(pins, "FOREIGN")?),
            dials: Mutex::new(named(pins, "DIALS")?),
            flows: Mutex::new(named(pins, "FLOWS")?),
            clients: Mutex::new(named(pins, "CLIENTS")?),
            probes: Mutex::new(named(pins, "PROBES")?),
            listeners: Mutex::new(named(pins, "LISTENERS")?),
            sockets: Mutex::new(named(pins, "SOCKETS")?),
            counters: named(pins, "COUNTERS")?,
        })
    }
}

fn named<T>(pins: &Path, name: &'static str) -> Result<T, KernelError>
where
    T: TryFrom<Map, Error = MapError>,
{
    let map = MapData::from_pin(pins.join(name)).and_then(Map::from_map_data);
    map.and_then(T::try_from).map_err(failed(name))
}

/// No code panics while it holds a map.
pub(super) fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no panic while a map is held")
}

pub(super) fn failed(name: &'static str) -> impl Fn(MapError) -> KernelError {
    move |source| KernelError::Map { name, source }
}

/// Removes what may not be there.
pub(super) fn forget<K: Pod, V: Pod>(map: &Guarded<K, V>, key: &K) {
    let _absent = hold(map).remove(key);
}

/// The maps that metrics report the fill of.
pub const FILLED: [&str; 9] = [
    "MESH",
    "RANGES",
    "FOREIGN",
    "WORKLOADS",
    "CGROUPS",
    "DIALS",
    "FLOWS",
    "CLIENTS",
    "SOCKETS",
];

impl Kernel {
    pub fn configure(&self, config: Config) -> Result<(), KernelError> {
        hold(&self.maps.config)
            .set(0, config, 0)
            .map_err(failed("CONFIG"))
    }

    /// The configuration that the programs work by, all zero before the first.
    pub fn configured(&self) -> Config {
        hold(&self.maps.config).get(&0, 0).unwrap_or_default()
    }

    /// Makes exactly these workloads known: by namespace cookie, and by cgroup id.
    pub fn set_workloads(
        &self,
        by_netns: &StdMap<u64, Workload>,
        by_cgroup: &StdMap<u64, Workload>,
    ) -> Result<(), KernelError> {
        replace(&self.maps.workloads, by_netns).map_err(failed("WORKLOADS"))?;
        replace(&self.maps.cgroups, by_cgroup).map_err(failed("CGROUPS"))?;
        Ok(())
    }

    /// Makes exactly these destinations steered. `nodes`: ports that are steered at
    /// each of these addresses. `outside`: addresses that nobody has to ask about.
    pub fn set_mesh(
        &self,
        destinations: &HashSet<(IpAddr, Option<u16>)>,
        local: &HashSet<IpAddr>,
        nodes: &(HashSet<u16>, HashSet<IpAddr>),
        outside: &HashSet<IpAddr>,
    ) -> Result<(), KernelError> {
        let (ports, addresses) = nodes;
        let key = |ip: &IpAddr, port| MeshKey {
            address: to_abi(*ip),
            port,
        };
        let outside = outside.iter().map(|ip| (key(ip, 0), MESH_OUTSIDE));
        let addresses = addresses.iter().map(|ip| (key(ip, 0), MESH_NODE));
        let ports = ports.iter().map(|port| {
            let (address, port) = (NODES, u32::from(*port));
            (MeshKey { address, port }, MESH_REMOTE)
        });
        let inside = destinations.iter().map(|(ip, port)| {
            let place = if local.contains(ip) {
                MESH_LOCAL
            } else {
                MESH_REMOTE
            };
            (key(ip, u32::from(port.unwrap_or(0))), place)
        });
        // What is in the mesh stands last: it replaces the others.
        let others = outside.chain(addresses).chain(ports);
        let wanted = others.chain(inside).collect();
        let new = replace(&self.maps.mesh, &wanted).map_err(failed("MESH"))?;
        for key in new {
            forget(&self.maps.foreign, &key.address);
        }
        Ok(())
    }

    pub fn set_listener(
        &self,
        address: IpAddr,
        kind: u32,
        socket: &Socket,
    ) -> Result<(), KernelError> {
        let key = Listener {
            address: to_abi(address),
            kind,
        };
        hold(&self.maps.listeners)
            .insert(key, socket.as_raw_fd(), 0)
            .map_err(failed("LISTENERS"))
    }

    /// What an accepted connection was dialled as. Each answer is given once.
    pub fn take_dial(&self, netns: u64, source: SocketAddr) -> Option<Dial> {
        let flow = endpoint(netns, source);
        let mut flows = hold(&self.maps.flows);
        let dial = flows.get(&flow, 0).ok()?;
        let _absent = flows.remove(&flow);
        Some(dial)
    }

    /// Forgets what an earlier agent knew of connections that ended with it: what nobody
    /// had accepted, and with `all` what was carried, too.
    pub(super) fn forget_connections(&self, all: bool) -> Result<(), KernelError> {
        replace(&self.maps.flows, &StdMap::new()).map_err(failed("FLOWS"))?;
        if all {
            replace(&self.maps.clients, &StdMap::new()).map_err(failed("CLIENTS"))?;
        }
        replace(&self.maps.probes, &StdMap::new()).map_err(failed("PROBES"))?;
        Ok(())
    }

    /// What was dialled and not accepted yet.
    pub fn waiting_dials(&self) -> Vec<(Endpoint, Dial)> {
        hold(&self.maps.flows).iter().flatten().collect()
    }

    /// Dials of another agent's map: the first word of who dialled is the newer one's.
    pub fn add_dials(&self, dials: &[(Endpoint, Dial)]) {
        let mut flows = hold(&self.maps.flows);
        for (flow, dial) in dials {
            // One that is there already is the same, or newer. A full map refuses.
            let _known = flows.insert(flow, dial, NO_EXIST);
        }
    }

    /// Stops handing over connections to an address.
    pub fn remove_listener(&self, address: IpAddr) {
        for kind in [LISTENER_PLAINTEXT, LISTENER_HBONE] {
            let key = Listener {
                address: to_abi(address),
                kind,
            };
            let _absent = hold(&self.maps.listeners).remove(&key);
        }
    }

    /// Shows the application behind a last hop its real client, until dropped.
    pub fn show_client(
        self: &Arc<Self>,
        netns: u64,
        last_hop: SocketAddr,
        client: SocketAddr,
    ) -> Result<ClientEntry, KernelError> {
        let key = endpoint(netns, last_hop);
        let value = Client {
            address: to_abi(client.ip()),
            port: u32::from(client.port()),
        };
        hold(&self.maps.clients)
            .insert(key, value, 0)
            .map_err(failed("CLIENTS"))?;
        Ok(ClientEntry {
            kernel: self.clone(),
            key,
        })
    }

    /// Whether the kernel saw a process of the node itself open this connection.
    pub fn is_probe(&self, source: SocketAddr, destination: SocketAddr) -> bool {
        let key = Probe {
            source: to_abi(source.ip()),
            destination: to_abi(destination.ip()),
            source_port: u32::from(source.port()),
            destination_port: u32::from(destination.port()),
        };
        let mut probes = hold(&self.maps.probes);
        let Ok(at) = probes.get(&key, 0) else {
            return false;
        };
        // Each proof counts once, and not for long: the port may be another's next.
        let _absent = probes.remove(&key);
        monotonic().saturating_sub(at) < PROBE_LIFETIME
    }

    /// Sum over all CPUs of each counter.
    pub fn counters(&self) -> [u64; COUNTERS as usize] {
        std::array::from_fn(|index| {
            let values = self.maps.counters.get(&(index as u32), 0);
            values.map_or(0, |per_cpu| per_cpu.iter().sum())
        })
    }

    pub fn counter(&self, counter: Counter) -> u64 {
        self.counters()[counter as usize]
    }

    /// Entries in each of [`FILLED`].
    pub fn fill(&self) -> [(&'static str, usize); 9] {
        let maps = &self.maps;
        let counts = [
            hold(&maps.mesh).keys().count(),
            hold(&maps.ranges).keys().count(),
            hold(&maps.foreign).keys().count(),
            hold(&maps.workloads).keys().count(),
            hold(&maps.cgroups).keys().count(),
            hold(&maps.dials).keys().count(),
            hold(&maps.flows).keys().count(),
            hold(&maps.clients).keys().count(),
            hold(&maps.sockets).keys().count(),
        ];
        std::array::from_fn(|i| (FILLED[i], counts[i]))
    }
}

/// `BPF_NOEXIST`.
const NO_EXIST: u64 = 1;

/// How long after its `connect` a probe's proof is good, nanoseconds.
const PROBE_LIFETIME: u64 = 5_000_000_000;

/// `CLOCK_MONOTONIC`, nanoseconds, as `bpf_ktime_get_ns` has it.
pub fn monotonic() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    now.map_or(0, |now| {
        now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
    })
}

/// Makes a map hold exactly what is wanted, touching only what differs: entries
/// that stay are never absent in between. Returns what is new.
fn replace<K: Pod + std::hash::Hash + Eq, V: Pod + PartialEq>(
    map: &Guarded<K, V>,
    wanted: &StdMap<K, V>,
) -> Result<Vec<K>, MapError> {
    let mut map = hold(map);
    let mut new = Vec::new();
    let present: StdMap<K, V> = map.iter().collect::<Result<_, _>>()?;
    // Removed first, so that a map that is nearly full has room for what comes.
    for key in present.keys().filter(|key| !wanted.contains_key(key)) {
        let _gone_by_itself = map.remove(key);
    }
    for (key, value) in wanted {
        if present.get(key) != Some(value) {
            map.insert(key, value, 0)?;
            new.push(*key);
        }
    }
    Ok(new)
}

/// Entry of a last hop in `CLIENTS`; removed when dropped.
pub struct ClientEntry {
    kernel: Arc<Kernel>,
    key: Endpoint,
}

impl Drop for ClientEntry {
    fn drop(&mut self) {
        forget(&self.kernel.maps.clients, &self.key);
    }
}
