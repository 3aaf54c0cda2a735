//! The eavesdropper: captures the link between the nodes and tells what is in it.

use std::{collections::BTreeSet, path::Path};

use anyhow::Result;
use postern_tests::{Capture, Lab, count_bytes, tshark};

use crate::screen::Screen;

/// How much of a packet is shown.
const SAMPLE: usize = 64;
const CLIENT_HELLO: &str = "1";
const SERVER_HELLO: &str = "2";
/// As tshark prints the value of the extension `supported_versions`.
const TLS13: &str = "0x0304";
/// X25519MLKEM768 in IANA's registry of TLS supported groups.
const HYBRID: &str = "4588";

/// What an eavesdropper learned.
pub struct Wire {
    packets: usize,
    protocols: BTreeSet<String>,
    /// Version and key exchange group of each TLS handshake, as the server chose.
    handshakes: BTreeSet<(String, String)>,
    /// The end of the last packet of some size, bytes that are no text as dots.
    sample: String,
    pub secrets: usize,
}

impl Wire {
    /// Listens while `act` runs, and looks for `secret` in all that went by.
    pub fn tap<T>(
        lab: &Lab,
        name: &str,
        secret: &str,
        act: impl FnOnce() -> Result<T>,
    ) -> Result<(T, Self)> {
        let capture = Capture::start(&lab.nodes[0], lab.path().join(format!("{name}.pcap")))?;
        let result = act()?;
        let wire = Self::read(&capture.stop()?, secret)?;
        Ok((result, wire))
    }

    fn read(file: &Path, secret: &str) -> Result<Self> {
        let fields = [
            "_ws.col.Protocol",
            "tls.handshake.type",
            "tls.handshake.extensions.supported_version",
            "tls.handshake.extensions_key_share_group",
            "tcp.payload",
        ];
        let mut wire = Self {
            packets: 0,
            protocols: BTreeSet::new(),
            handshakes: BTreeSet::new(),
            sample: String::new(),
            secrets: count_bytes(file, secret.as_bytes())?,
        };
        for line in tshark(file, "tcp", &fields)? {
            let mut values = line.split('\t').map(str::to_owned);
            let mut next = || values.next().unwrap_or_default();
            wire.add([next(), next(), next(), next(), next()]);
        }
        Ok(wire)
    }

    fn add(&mut self, [protocol, handshake, version, group, payload]: [String; 5]) {
        self.packets += 1;
        // A ClientHello bears an old version by design (RFC 8446, 5.1), and tshark
        // titles it after that.
        if handshake != CLIENT_HELLO {
            self.protocols.insert(protocol);
        }
        if handshake.split(',').any(|kind| kind == SERVER_HELLO) {
            self.handshakes.insert((version, group));
        }
        if payload.len() / 2 >= SAMPLE {
            self.sample = readable(&payload);
        }
    }

    /// Only TLS 1.3, its keys agreed on by the hybrid of X25519 and ML-KEM.
    pub fn is_postern_tls(&self) -> bool {
        let wanted = (TLS13.to_owned(), HYBRID.to_owned());
        !self.handshakes.is_empty() && self.handshakes.iter().all(|seen| *seen == wanted)
    }

    pub fn is_silent(&self) -> bool {
        self.packets == 0
    }

    pub fn show(&self, screen: &Screen) {
        if self.is_silent() {
            return screen.row("wire", "no TCP packet");
        }
        let protocols: Vec<&str> = self.protocols.iter().map(String::as_str).collect();
        let mut lines = vec![format!(
            "{} TCP packets; tshark names {}",
            self.packets,
            protocols.join(", ")
        )];
        lines.extend(self.handshakes.iter().map(handshake));
        if !self.sample.is_empty() {
            lines.push(format!("a packet:  {}", self.sample));
        }
        lines.push(format!("occurrences of the secret: {}", self.secrets));
        screen.row("wire", &lines.join("\n"));
    }
}

fn handshake((version, group): &(String, String)) -> String {
    let version = if version == TLS13 { "TLS 1.3" } else { version };
    let name = if group == HYBRID {
        " (X25519MLKEM768)"
    } else {
        ""
    };
    format!("handshake: {version}, key exchange group {group}{name}")
}

/// The end of a packet's payload, given in hexadecimal digits.
fn readable(payload: &str) -> String {
    let bytes = payload.as_bytes().chunks_exact(2).map(|digits| {
        let digits = std::str::from_utf8(digits).unwrap_or_default();
        u8::from_str_radix(digits, 16).unwrap_or_default()
    });
    let text: Vec<char> = bytes
        .map(|byte| {
            if byte == b' ' || byte.is_ascii_graphic() {
                byte as char
            } else {
                '.'
            }
        })
        .collect();
    text[text.len().saturating_sub(SAMPLE)..].iter().collect()
}
