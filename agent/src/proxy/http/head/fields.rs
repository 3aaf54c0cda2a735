//! What the fields of a request's head mean, each and together: its framing, and what
//! is between client and agent only.

use bytes::Bytes;
use http::{HeaderName, StatusCode, Version, header};

use super::{
    super::rules::{self, BadRequest, bad, is_token, is_token_byte},
    Body, Field, Head, trim,
};

/// What is gathered of the fields before it can be judged as a whole.
#[derive(Default)]
pub(super) struct Framing {
    hosts: usize,
    length: Option<u64>,
    chunked: bool,
    close: bool,
    keep_alive: bool,
    upgrade: bool,
    protocols: Vec<Bytes>,
    nominated: Vec<HeaderName>,
}

impl Head {
    /// Takes one field up, or what it says.
    pub(super) fn sort(&mut self, field: Field, framing: &mut Framing) -> Result<(), BadRequest> {
        let value = field.value.as_bytes();
        match field.name {
            header::HOST => {
                framing.hosts += 1;
                rules::host(value)?;
                self.host = field_bytes(&field);
            }
            header::CONTENT_LENGTH => {
                if framing
                    .length
                    .replace(rules::content_length(value)?)
                    .is_some()
                {
                    return Err(bad("Content-Length is there twice"));
                }
            }
            header::TRANSFER_ENCODING => {
                if std::mem::replace(&mut framing.chunked, true) {
                    return Err(bad("Transfer-Encoding is there twice"));
                }
                transfer_encoding(value, self.version)?;
            }
            header::CONNECTION => return connection(value, framing),
            header::UPGRADE => {
                framing.protocols.push(field_bytes(&field));
                return Ok(());
            }
            header::TE => {
                // The only member that is not between client and agent.
                self.trailers |= self.version == Version::HTTP_11
                    && members(value).any(|m| m.eq_ignore_ascii_case(b"trailers"));
                return Ok(());
            }
            header::EXPECT => {
                rules::expect(value)?;
                // RFC 9110 10.1.1: HTTP/1.0 has no interim responses.
                if self.version == Version::HTTP_10 {
                    return Ok(());
                }
                self.expect = true;
            }
            ref name if matches!(name.as_str(), "keep-alive" | "proxy-connection") => {
                return Ok(());
            }
            // Part of an upgrade to HTTP/2, which would pass policy by.
            ref name if name == "http2-settings" => return Ok(()),
            ref name => rules::disguised(name)?,
        }
        self.fields.push(field);
        Ok(())
    }

    /// Judges the fields together.
    pub(super) fn conclude(
        &mut self,
        framing: &Framing,
        absolute: &Bytes,
    ) -> Result<(), BadRequest> {
        match (framing.hosts, self.version) {
            (1, _) | (0, Version::HTTP_10) => {}
            (0, _) => return Err(bad("there is no Host")),
            _ => return Err(bad("Host is there twice")),
        }
        // RFC 9112 3.2.2 lets the target win; applications differ.
        if !absolute.is_empty() && !absolute.eq_ignore_ascii_case(&self.host) {
            return Err(bad("Host is not the target's authority"));
        }
        self.body = match (framing.chunked, framing.length) {
            // RFC 9112 6.1 and 6.3: an attempt at smuggling.
            (true, Some(_)) => {
                return Err(bad(
                    "Transfer-Encoding and Content-Length exclude each other",
                ));
            }
            (true, None) => Body::Chunked,
            (false, Some(0) | None) => Body::None,
            (false, Some(length)) => Body::Length(length),
        };
        self.keep_alive = !framing.close && (self.keep_alive || framing.keep_alive);
        self.fields.retain(|f| !framing.nominated.contains(&f.name));
        // A body could be read as the new protocol's first bytes.
        if framing.upgrade && self.body == Body::None && self.version == Version::HTTP_11 {
            self.upgrade = upgrade(&framing.protocols);
        }
        Ok(())
    }
}

/// RFC 9112 6.1 and 7. Chunked alone is understood; it is no coding of HTTP/1.0.
fn transfer_encoding(value: &[u8], version: Version) -> Result<(), BadRequest> {
    if version == Version::HTTP_10 {
        return Err(bad("Transfer-Encoding is not HTTP/1.0's"));
    }
    if value.eq_ignore_ascii_case(b"chunked") {
        return Ok(());
    }
    let is_chunked = |m: &&[u8]| m.eq_ignore_ascii_case(b"chunked");
    let known_form = members(value).all(is_token)
        && members(value).filter(is_chunked).count() == 1
        && members(value).last().is_some_and(|last| is_chunked(&last))
        && members(value).count() > 1;
    Err(match known_form {
        true => BadRequest::new(
            StatusCode::NOT_IMPLEMENTED,
            "the transfer coding is not known",
        ),
        false => bad("Transfer-Encoding is not chunked"),
    })
}

/// RFC 9110 7.6.1.
fn connection(value: &[u8], framing: &mut Framing) -> Result<(), BadRequest> {
    for option in members(value) {
        if !is_token(option) {
            return Err(bad("a connection option is not a token"));
        }
        let name = HeaderName::from_bytes(option)
            .map_err(|_long| bad("a connection option is not a token"))?;
        match name.as_str() {
            "close" => framing.close = true,
            "keep-alive" => framing.keep_alive = true,
            "upgrade" => framing.upgrade = true,
            // Dropped, or written anew, whether they are named or not.
            "te" | "http2-settings" | "proxy-connection" => {}
            name if rules::is_protected(&name.replace('_', "-")) => {
                return Err(bad("Connection names a header of the request"));
            }
            _ => framing.nominated.push(name),
        }
    }
    Ok(())
}

/// What is left of the protocols asked for, without those that carry requests which
/// policy would not see.
fn upgrade(protocols: &[Bytes]) -> Option<Bytes> {
    let passes = |member: &&[u8]| {
        // token ["/" token] (RFC 9110 7.8); what is none is read by some as if it were.
        if !member.iter().all(|b| is_token_byte(*b) || *b == b'/') {
            return false;
        }
        let name = member.split(|b| *b == b'/').next().unwrap_or(member);
        !["h2c", "h2", "http", "tls", "spdy"]
            .iter()
            .any(|hidden| name.eq_ignore_ascii_case(hidden.as_bytes()))
    };
    let kept: Vec<&[u8]> = protocols
        .iter()
        .flat_map(|value| members(value))
        .filter(passes)
        .collect();
    (!kept.is_empty()).then(|| kept.join(&b", "[..]).into())
}

/// Members of a list (RFC 9110 5.6.1); empty ones do not count.
fn members(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value
        .split(|b| *b == b',')
        .map(trim)
        .filter(|m| !m.is_empty())
}

fn field_bytes(field: &Field) -> Bytes {
    Bytes::copy_from_slice(field.value.as_bytes())
}
