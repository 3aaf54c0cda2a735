//! Addresses that are never connected to, and the resolver that leaves them out.
//! The connector uses the very addresses that were looked at here, so a name that
//! changes between a check and a connect gains nothing.

use std::{
    error::Error,
    future::Future,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    pin::Pin,
    task::{Context, Poll},
    vec,
};

use hyper_util::client::legacy::connect::dns::{GaiResolver, Name};
use tonic::codegen::Service;

/// Metadata services of clouds outside of the link-local ranges.
const METADATA: [IpAddr; 3] = [
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
];

/// Whether an address is link-local, a metadata service, or no host's at all.
pub fn refused(address: IpAddr) -> bool {
    let address = inner(address);
    METADATA.contains(&address)
        || address.is_unspecified()
        || address.is_multicast()
        || match address {
            // 0.0.0.0/8 is "this host" (RFC 6890 2.2.2).
            IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast() || v4.octets()[0] == 0,
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        }
}

/// The IPv4 address that an IPv6 address stands for: mapped and compatible ones
/// (RFC 4291 2.5.5), and those that a NAT64 translates (RFC 6052 2.1).
fn inner(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else {
        return address;
    };
    if v6.is_loopback() || v6.is_unspecified() {
        return address;
    }
    let [a, b, rest @ ..] = v6.segments();
    if (a, b) == (0x64, 0xff9b) && rest[..4] == [0; 4] {
        let [.., w, x, y, z] = v6.octets();
        return Ipv4Addr::new(w, x, y, z).into();
    }
    v6.to_ipv4().map_or(address, IpAddr::V4)
}

#[derive(Debug, thiserror::Error)]
#[error("{0} is not connected to")]
pub struct RefusedAddress(pub IpAddr);

/// Looks names up and leaves refused addresses out.
#[derive(Clone, Debug)]
pub struct Vetted(Names);

#[derive(Clone, Debug)]
enum Names {
    System(GaiResolver),
    #[cfg(test)]
    Fixed(Vec<SocketAddr>),
}

impl Vetted {
    pub fn system() -> Self {
        Self(Names::System(GaiResolver::new()))
    }

    /// Every name has these addresses.
    #[cfg(test)]
    pub fn fixed(addresses: Vec<SocketAddr>) -> Self {
        Self(Names::Fixed(addresses))
    }
}

impl Service<Name> for Vetted {
    type Response = vec::IntoIter<SocketAddr>;
    type Error = Box<dyn Error + Send + Sync>;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let mut names = self.0.clone();
        Box::pin(async move {
            let found: Vec<SocketAddr> = match &mut names {
                Names::System(resolver) => resolver.call(name).await?.collect(),
                #[cfg(test)]
                Names::Fixed(addresses) => addresses.clone(),
            };
            let first = found.first().map(SocketAddr::ip);
            let kept: Vec<_> = found.into_iter().filter(|a| !refused(a.ip())).collect();
            match first {
                Some(address) if kept.is_empty() => Err(RefusedAddress(address).into()),
                _ => Ok(kept.into_iter()),
            }
        })
    }
}
