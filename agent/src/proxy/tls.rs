//! TLS between agents. rustls shakes hands and proves who is there; after that the records
//! are sealed and opened here, with the keys that it agreed on (as for TLS in the kernel),
//! so that bytes are copied nowhere on their way and an idle connection keeps no buffers.

mod record;

use std::{io, sync::Arc};

use bytes::{Buf as _, BytesMut};
use rustls::{
    ClientConfig, ServerConfig,
    client::UnbufferedClientConnection,
    kernel::KernelConnection,
    pki_types::{CertificateDer, ServerName},
    server::UnbufferedServerConnection,
    unbuffered::{ConnectionState, EncodeError, UnbufferedStatus},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::identity::Session;

pub use record::{MOST_PLAIN, Outgoing, Records};

/// A handshake message is no longer than this, and rustls asks for no more.
const MOST: usize = 64 << 10;

/// What a finished handshake leaves.
pub struct Shaken {
    pub records: Box<Records>,
    pub session: Session,
    /// Of the other side; verified.
    pub leaf: CertificateDer<'static>,
    /// What both sides speak now, as agreed by ALPN.
    pub protocol: Option<Vec<u8>>,
}

/// Shakes hands as the side that dialled.
pub async fn connect(
    tcp: TcpStream,
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
) -> io::Result<Shaken> {
    let client = UnbufferedClientConnection::new(config, name).map_err(io::Error::other)?;
    shake(tcp, client).await
}

/// Shakes hands as the side that was dialled.
pub async fn accept(tcp: TcpStream, config: Arc<ServerConfig>) -> io::Result<Shaken> {
    let server = UnbufferedServerConnection::new(config).map_err(io::Error::other)?;
    shake(tcp, server).await
}

/// Either side of a handshake.
trait Handshake {
    fn step(&mut self, incoming: &mut [u8]) -> (usize, Result<Step, rustls::Error>);
    fn common(&self) -> &rustls::CommonState;
    fn into_keys(self) -> Result<(rustls::ExtractedSecrets, Keys), rustls::Error>;
}

/// What a handshake wants next.
enum Step {
    /// These bytes are to be sent.
    Send(Vec<u8>),
    /// All of them were sent.
    Sent,
    Receive,
    Done,
}

/// Makes the next keys of a connection (RFC 8446 7.2).
pub enum Keys {
    Client(KernelConnection<rustls::client::ClientConnectionData>),
    Server(KernelConnection<rustls::server::ServerConnectionData>),
}

macro_rules! handshake {
    ($connection:ty, $keys:path) => {
        impl Handshake for $connection {
            fn step(&mut self, incoming: &mut [u8]) -> (usize, Result<Step, rustls::Error>) {
                let UnbufferedStatus { discard, state } = self.process_tls_records(incoming);
                let step = match state {
                    Err(error) => return (discard, Err(error)),
                    Ok(ConnectionState::EncodeTlsData(mut data)) => {
                        let mut bytes = Vec::new();
                        if let Err(EncodeError::InsufficientSize(size)) = data.encode(&mut bytes) {
                            bytes.resize(size.required_size, 0);
                            data.encode(&mut bytes).expect("as large as it asked for");
                        }
                        Step::Send(bytes)
                    }
                    Ok(ConnectionState::TransmitTlsData(data)) => {
                        data.done();
                        Step::Sent
                    }
                    Ok(ConnectionState::BlockedHandshake) => Step::Receive,
                    Ok(ConnectionState::WriteTraffic(_)) => Step::Done,
                    // Of records that come after the handshake.
                    Ok(_) => return (discard, Err(rustls::Error::HandshakeNotComplete)),
                };
                (discard, Ok(step))
            }

            fn common(&self) -> &rustls::CommonState {
                self
            }

            fn into_keys(self) -> Result<(rustls::ExtractedSecrets, Keys), rustls::Error> {
                let (secrets, connection) = self.dangerous_into_kernel_connection()?;
                Ok((secrets, $keys(connection)))
            }
        }
    };
}

handshake!(UnbufferedClientConnection, Keys::Client);
handshake!(UnbufferedServerConnection, Keys::Server);

async fn shake(mut tcp: TcpStream, mut side: impl Handshake) -> io::Result<Shaken> {
    let mut incoming = BytesMut::new();
    // What rustls is shown of it: record by record, so that none is opened by it that comes
    // after the handshake.
    let mut shown = 0;
    let mut outgoing = Vec::new();
    loop {
        let (used, step) = side.step(&mut incoming[..shown]);
        incoming.advance(used);
        shown -= used;
        match step {
            Ok(Step::Send(bytes)) => outgoing.extend_from_slice(&bytes),
            Ok(Step::Sent) => {
                tcp.write_all(&outgoing).await?;
                outgoing.clear();
            }
            Ok(Step::Receive) => {
                if let Some(length) = record::length(&incoming[shown..]) {
                    shown += length;
                    continue;
                }
                if incoming.len() >= MOST {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                incoming.reserve(4 << 10);
                if tcp.read_buf(&mut incoming).await? == 0 {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the peer left during the handshake",
                    ));
                }
            }
            Ok(Step::Done) => break,
            Err(error) => {
                // The peer is told why.
                if let (_, Ok(Step::Send(alert))) = side.step(&mut incoming[..shown]) {
                    let _gone = tcp.write_all(&alert).await;
                }
                return Err(io::Error::new(io::ErrorKind::InvalidData, error));
            }
        }
    }
    let common = side.common();
    let chain = common.peer_certificates();
    let leaf = chain.and_then(|chain| chain.first()).cloned();
    let leaf = leaf.ok_or_else(|| io::Error::other("the peer showed no certificate"))?;
    let (session, protocol) = (
        Session::of(common),
        common.alpn_protocol().map(<[u8]>::to_vec),
    );
    let (secrets, keys) = side.into_keys().map_err(io::Error::other)?;
    let records = Records::new(tcp, secrets, keys, incoming).map_err(io::Error::other)?;
    Ok(Shaken {
        records: Box::new(records),
        session,
        leaf: leaf.into_owned(),
        protocol,
    })
}

#[cfg(test)]
pub(in crate::proxy) mod tests;
