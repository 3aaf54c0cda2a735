//! The server name of a TLS connection that is passed on unread: what policy calls
//! `connection.sni`.

use std::io;

use rustls::server::Acceptor;

use super::io::{HEAD_CHUNK, Io};

/// Largest ClientHello that is looked at, bytes: post-quantum key shares make it a
/// few KiB.
const MAX_HELLO: usize = 16 << 10;
/// TLS record type `handshake` (RFC 8446 5.1).
const HANDSHAKE: u8 = 22;

/// Reads on until the ClientHello is whole. `None`: no TLS, or none that names a
/// server. An error: it begins as TLS does, and cannot be read.
pub async fn server_name(io: &mut Io) -> io::Result<Option<String>> {
    let unread = |why| io::Error::new(io::ErrorKind::InvalidData, why);
    while io.buffer.first() == Some(&HANDSHAKE) {
        match parse(&io.buffer) {
            Hello::Partial if io.buffer.len() > MAX_HELLO => {
                return Err(unread("a ClientHello of more than 16 KiB"));
            }
            Hello::Partial => {}
            Hello::Whole(name) => return Ok(name),
            Hello::Other => return Err(unread("no ClientHello that can be read")),
        }
        if io.fill(HEAD_CHUNK).await? == 0 {
            return Err(unread("the ClientHello is cut off"));
        }
    }
    Ok(None)
}

enum Hello {
    Partial,
    Whole(Option<String>),
    Other,
}

fn parse(mut bytes: &[u8]) -> Hello {
    let mut acceptor = Acceptor::default();
    while !bytes.is_empty() {
        if !acceptor.read_tls(&mut bytes).is_ok_and(|read| read > 0) {
            return Hello::Other;
        }
        match acceptor.accept() {
            Ok(None) => {}
            Ok(Some(accepted)) => {
                let hello = accepted.client_hello();
                return Hello::Whole(hello.server_name().map(str::to_owned));
            }
            Err(_) => return Hello::Other,
        }
    }
    Hello::Partial
}
