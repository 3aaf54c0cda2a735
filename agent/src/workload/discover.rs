//! Discovery on demand: where the table does not hold the whole cluster, who dials an
//! address that it lacks waits until the source of workloads has been asked about it.

use std::{collections::BTreeSet, future::Future, net::IpAddr, pin::Pin, sync::Arc};

use ipnet::IpNet;

/// Finds what is at an address that the table does not know.
pub trait Discover: Send + Sync {
    /// Addresses that pods may have. What is dialled there and is not known is asked
    /// about; everything else is outside the mesh unless the table has it.
    fn ranges(&self) -> Arc<BTreeSet<IpNet>>;

    /// What is at this address, of a pod or of a service. It may be asked at any time,
    /// many addresses at once, each once at a time.
    fn discover<'a>(&'a self, address: IpAddr) -> Pin<Box<dyn Future<Output = Found> + Send + 'a>>;

    /// A connection goes to this address, which the table knows: it is to stay known.
    /// Called for every connection to another node.
    fn used(&self, address: IpAddr);
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// It is in the table now (and stays, watched, while it is used).
    Known,
    /// The cluster has no pod there: not the mesh's.
    Foreign,
    /// Could not be asked in time: fail closed.
    Unknown(String),
}
