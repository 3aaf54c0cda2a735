//! HTTP/2 by hand (RFC 9113 4.1, RFC 7541): frames and header blocks that no library
//! would send.

use super::*;

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RESET: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const GOAWAY: u8 = 7;
pub const CONTINUATION: u8 = 9;
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a frame");
    let mut frame = length.to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// Literals without indexing, new names, no Huffman coding (RFC 7541 6.2.2).
pub fn block(fields: &[(&[u8], &[u8])]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            integer(&mut block, text.len());
            block.extend(*text);
        }
    }
    block
}

/// With a prefix of seven bits (RFC 7541 5.1).
fn integer(out: &mut Vec<u8>, value: usize) {
    if value < 127 {
        return out.push(value as u8);
    }
    out.push(127);
    let mut rest = value - 127;
    while rest >= 128 {
        out.push((rest % 128) as u8 | 128);
        rest /= 128;
    }
    out.push(rest as u8);
}

/// What becomes of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Status(u16),
    Reset(u32),
    GoAway(u32),
    Closed,
}

/// Whether any stream is complete in what a client has sent.
pub fn any_ends(sent: &[u8]) -> bool {
    let mut rest = sent.strip_prefix(PREFACE).unwrap_or(sent);
    while let [a, b, c, kind, flags, ..] = *rest {
        if matches!(kind, DATA | HEADERS) && flags & END_STREAM != 0 {
            return true;
        }
        let length = 9 + u32::from_be_bytes([0, a, b, c]) as usize;
        rest = rest.get(length..).unwrap_or_default();
    }
    false
}

/// Reads frames until one decides the fate of the stream.
pub async fn fate(client: &mut TcpStream, stream: u32) -> Fate {
    timeout(PATIENCE, async {
        loop {
            let mut head = [0; 9];
            if client.read_exact(&mut head).await.is_err() {
                return Fate::Closed;
            }
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; length as usize];
            if client.read_exact(&mut payload).await.is_err() {
                return Fate::Closed;
            }
            let number =
                |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().expect("four bytes"));
            let of = u32::from_be_bytes(head[5..9].try_into().expect("four bytes"));
            match head[3] {
                HEADERS if of == stream => return Fate::Status(status_of(&payload)),
                RESET if of == stream => return Fate::Reset(number(0)),
                // An announcement only, if it has no error.
                GOAWAY if number(4) != 0 => return Fate::GoAway(number(4)),
                _ => {}
            }
        }
    })
    .await
    .expect("its fate is decided")
}

/// `:status` comes first, from the static table (RFC 7541 A), or its name from there.
fn status_of(block: &[u8]) -> u16 {
    match block[0] {
        indexed @ 0x88..=0x8e => [200, 204, 206, 304, 400, 404, 500][usize::from(indexed - 0x88)],
        _ => {
            let huffman = block[1] & 0x80 != 0;
            let length = usize::from(block[1] & 0x7f);
            let value = &block[2..2 + length];
            if !huffman {
                return std::str::from_utf8(value)
                    .expect("digits")
                    .parse()
                    .expect("a number");
            }
            // Digits have five bits up to 2, and six from 3 on (RFC 7541 B).
            let bits = value.iter().fold(0u64, |bits, b| bits << 8 | u64::from(*b));
            let mut left = 8 * length;
            let mut status = 0;
            for _ in 0..3 {
                let five = bits >> (left - 5) & 31;
                let digit = if five < 3 {
                    left -= 5;
                    five
                } else {
                    left -= 6;
                    (bits >> left & 63) - 0x19 + 3
                };
                status = status * 10 + digit as u16;
            }
            status
        }
    }
}
