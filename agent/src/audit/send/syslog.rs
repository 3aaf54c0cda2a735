//! Syslog (RFC 5424) over TCP with octet counting (RFC 6587), TLS (RFC 5425), UDP
//! (RFC 5426), and to a socket of this machine.
//!
//! Syslog has no acknowledgement. Over TCP and TLS a batch counts as sent when the
//! receiver's kernel has acknowledged all of it and the connection stands: what the
//! receiver has not read when it dies is lost, and nobody knows. Datagrams are gone when
//! they leave.

mod message;
mod stream;

use std::{path::PathBuf, sync::Arc, time::Duration};

use rustls::{ClientConfig, pki_types::ServerName};
use tokio::net::{UdpSocket, UnixDatagram};

use self::{message::Header, stream::Stream};
use super::{
    Cause,
    config::{Format, Syslog, Transport},
    deliver::{Failure, Taken},
    follow::Entry,
    tls,
};

/// What a UDP datagram holds over IPv4 is 65,507 bytes; the head needs some of them.
const MOST_IN_DATAGRAM: usize = 64_000;

pub struct Sender {
    header: Header,
    format: Format,
    message_bytes: usize,
    timeout: Duration,
    place: Place,
    open: Option<Open>,
}

enum Place {
    Tcp(String, u16),
    Tls(String, u16, ServerName<'static>, Arc<ClientConfig>),
    Udp(String, u16),
    Unix(PathBuf),
}

enum Open {
    Stream(Box<Stream>),
    Udp(UdpSocket),
    Unix(UnixDatagram),
}

impl Sender {
    pub fn new(config: &Syslog, format: Format, node: &str) -> Result<Self, Cause> {
        let (host, port) = config.host_and_port().unwrap_or_default();
        let host = host.to_owned();
        let place = match config.transport {
            Transport::Tcp => Place::Tcp(host, port),
            Transport::Udp => Place::Udp(host, port),
            Transport::Unix => Place::Unix(config.address.clone().into()),
            Transport::Tls => {
                let name = ServerName::try_from(host.clone()).map_err(|e| Cause::File {
                    path: config.address.clone().into(),
                    message: e.to_string(),
                })?;
                let tls = tls::client(
                    config.roots.as_deref(),
                    config.certificate.as_deref(),
                    config.key.as_deref(),
                )?;
                Place::Tls(host, port, name, Arc::new(tls))
            }
        };
        Ok(Self {
            header: Header::new(config.facility.0, node),
            format,
            // One datagram has a message, whole.
            message_bytes: match config.transport {
                Transport::Udp | Transport::Unix => {
                    (config.message_bytes.0 as usize).min(MOST_IN_DATAGRAM)
                }
                Transport::Tcp | Transport::Tls => config.message_bytes.0 as usize,
            },
            timeout: config.timeout.0,
            place,
            open: None,
        })
    }

    pub async fn send(&mut self, entries: &[Entry]) -> Result<Taken, Failure> {
        let messages: Vec<String> = (entries.iter())
            .filter_map(|e| self.header.message(e, self.format, self.message_bytes))
            .collect();
        let limit = self.timeout;
        let result = match tokio::time::timeout(limit, self.hand_over(&messages)).await {
            Ok(result) => result.map_err(|e| e.to_string()),
            Err(_elapsed) => Err(format!("not taken within {limit:?}")),
        };
        // What is in a connection that failed, or hangs, is sent again over another.
        result.map(|()| Taken::default()).map_err(|why| {
            self.open = None;
            Failure::later(why)
        })
    }

    pub async fn close(&mut self) {
        if let Some(Open::Stream(mut stream)) = self.open.take() {
            let _gone = tokio::time::timeout(self.timeout, stream.close()).await;
        }
    }

    async fn hand_over(&mut self, messages: &[String]) -> std::io::Result<()> {
        // A receiver that went away while there was nothing to send.
        let gone = match &mut self.open {
            Some(Open::Stream(stream)) => stream.is_closed(),
            _ => false,
        };
        if gone {
            self.open = None;
        }
        let open = match &mut self.open {
            Some(open) => open,
            none => none.insert(self.place.connect().await?),
        };
        match open {
            Open::Stream(stream) => stream.send(messages).await,
            Open::Udp(socket) => {
                for message in messages {
                    socket.send(message.as_bytes()).await?;
                }
                Ok(())
            }
            Open::Unix(socket) => {
                for message in messages {
                    socket.send(message.as_bytes()).await?;
                }
                Ok(())
            }
        }
    }
}

impl Place {
    async fn connect(&self) -> std::io::Result<Open> {
        Ok(match self {
            Self::Tcp(host, port) => Open::Stream(Box::new(Stream::tcp(host, *port).await?)),
            Self::Tls(host, port, name, tls) => {
                let stream = Stream::tls(host, *port, name.clone(), tls.clone());
                Open::Stream(Box::new(stream.await?))
            }
            Self::Udp(host, port) => {
                let mut addresses = tokio::net::lookup_host((host.as_str(), *port)).await?;
                let nowhere = || std::io::Error::other(format!("{host} has no address"));
                let address = addresses.next().ok_or_else(nowhere)?;
                let any = match address {
                    std::net::SocketAddr::V4(_) => "0.0.0.0:0",
                    std::net::SocketAddr::V6(_) => "[::]:0",
                };
                let socket = UdpSocket::bind(any).await?;
                socket.connect(address).await?;
                Open::Udp(socket)
            }
            Self::Unix(path) => {
                let socket = UnixDatagram::unbound()?;
                socket.connect(path)?;
                Open::Unix(socket)
            }
        })
    }
}
