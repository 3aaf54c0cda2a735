//! A connection that carries messages with their lengths before them.

use std::{
    io,
    os::fd::{AsRawFd as _, RawFd},
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt as _;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// How often it is looked whether the receiver has all.
const LOOK: Duration = Duration::from_millis(5);
/// How long a receiver may take to refuse the agent's certificate: in TLS 1.3 it is sent
/// with the handshake's last message, and the answer to it comes when it comes
/// (RFC 8446, 4.6.2).
const REFUSAL: Duration = Duration::from_millis(500);

pub enum Stream {
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Stream {
    pub async fn tcp(host: &str, port: u16) -> io::Result<Self> {
        let tcp = TcpStream::connect((host, port)).await?;
        tcp.set_nodelay(true)?;
        Ok(Self::Tcp(tcp))
    }

    pub async fn tls(
        host: &str,
        port: u16,
        name: ServerName<'static>,
        config: Arc<ClientConfig>,
    ) -> io::Result<Self> {
        let tcp = TcpStream::connect((host, port)).await?;
        tcp.set_nodelay(true)?;
        let with_certificate = config.client_auth_cert_resolver.has_certs();
        let tls = TlsConnector::from(config).connect(name, tcp).await?;
        let mut stream = Self::Tls(Box::new(tls));
        if with_certificate {
            tokio::time::sleep(REFUSAL).await;
            if stream.is_closed() {
                return Err(io::Error::new(
                    io::ErrorKind::ConnectionRefused,
                    "the receiver closed the connection after the handshake: does it take the agent's certificate?",
                ));
            }
        }
        Ok(stream)
    }

    /// Until the receiver's kernel has all of it.
    pub async fn send(&mut self, messages: &[String]) -> io::Result<()> {
        let mut frames = Vec::new();
        for message in messages {
            frames.extend_from_slice(message.len().to_string().as_bytes());
            frames.push(b' ');
            frames.extend_from_slice(message.as_bytes());
        }
        let socket = match self {
            Self::Tcp(tcp) => {
                tcp.write_all(&frames).await?;
                tcp.as_raw_fd()
            }
            Self::Tls(tls) => {
                tls.write_all(&frames).await?;
                tls.flush().await?;
                tls.get_ref().0.as_raw_fd()
            }
        };
        loop {
            let left = unacknowledged(socket)?;
            // What is left of a reset connection stays so.
            if self.is_closed() {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            if left == 0 {
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Whether the receiver has gone. What it says is nothing to us.
    pub fn is_closed(&mut self) -> bool {
        let mut ignored = [0; 512];
        loop {
            let read = match self {
                Self::Tcp(tcp) => tcp.read(&mut ignored).now_or_never(),
                Self::Tls(tls) => tls.read(&mut ignored).now_or_never(),
            };
            match read {
                None => return false,
                Some(Ok(0) | Err(_)) => return true,
                Some(Ok(_)) => {}
            }
        }
    }

    pub async fn close(&mut self) -> io::Result<()> {
        match self {
            Self::Tcp(tcp) => tcp.shutdown().await,
            Self::Tls(tls) => tls.shutdown().await,
        }
    }
}

/// Bytes that the other side's TCP has not acknowledged (tcp(7), SIOCOUTQ).
fn unacknowledged(socket: RawFd) -> io::Result<libc::c_int> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the socket is open, and the kernel writes one int where there is one.
    let result = unsafe { libc::ioctl(socket, libc::TIOCOUTQ, &raw mut bytes) };
    match result {
        0 => Ok(bytes),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    async fn pair() -> (Stream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("port");
        let port = listener.local_addr().expect("address").port();
        let (stream, peer) = tokio::join!(Stream::tcp("127.0.0.1", port), listener.accept());
        (stream.expect("connected"), peer.expect("accepted").0)
    }

    #[tokio::test]
    async fn lengths_are_of_bytes() {
        let (mut stream, mut peer) = pair().await;
        stream.send(&["ab".into(), "é".into()]).await.expect("sent");
        stream.close().await.expect("closed");
        let mut text = String::new();
        peer.read_to_string(&mut text).await.expect("read");
        assert_eq!(text, "2 ab2 é");
    }

    #[tokio::test]
    async fn what_the_peers_kernel_has_not_taken_is_not_sent() {
        let (mut stream, peer) = pair().await;
        let much = vec!["x".repeat(1 << 20); 32];
        let sent = tokio::time::timeout(Duration::from_millis(200), stream.send(&much));
        assert!(sent.await.is_err(), "nobody reads");
        drop(peer);
    }

    #[tokio::test]
    async fn a_peer_that_is_gone_is_noticed() {
        let (mut stream, peer) = pair().await;
        assert!(!stream.is_closed());
        drop(peer);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(stream.is_closed());
        assert!(stream.send(&["a".into()]).await.is_err());
    }
}
