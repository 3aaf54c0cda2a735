//! Where the answer goes: a redirect URI that the client registered, and no other.

use url::{Host, Url};

use super::super::clients::{Authentication, Client};

/// Longest redirect URI, in bytes.
const LONGEST: usize = 2048;

/// A redirect URI of the client's, as it was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedirectUri {
    text: String,
    source: String,
    web: bool,
}

impl RedirectUri {
    /// `asked`, if it is one of the client's and may be redirected to at all.
    pub fn of(client: &Client, asked: &str) -> Option<Self> {
        let known = client
            .redirect_uris
            .iter()
            .any(|registered| registered == asked || same_loopback(registered, asked));
        known.then(|| Self::usable(asked)).flatten()
    }

    /// Even what was registered must be https, http on this host (RFC 9700 2.1 and RFC
    /// 8252 7.3), or a scheme of the application's own with a dot in it (RFC 8252 7.1):
    /// never `javascript:`, `data:` or a fragment.
    fn usable(text: &str) -> Option<Self> {
        let plain = text.bytes().all(|b| (0x21..0x7f).contains(&b)) && !text.contains(['#', '\\']);
        let url = Url::parse(text).ok()?;
        let none = url.username().is_empty() && url.password().is_none();
        if !plain || !none || text.len() > LONGEST {
            return None;
        }
        let local = match url.host() {
            Some(Host::Ipv4(v4)) => v4.is_loopback(),
            Some(Host::Ipv6(v6)) => v6.is_loopback(),
            Some(Host::Domain(name)) => name == "localhost",
            None => false,
        };
        let web = url.scheme() == "https";
        let source = match url.scheme() {
            // CSP has no word for an IPv6 address (CSP 3 2.3.1, host-source).
            "https" | "http" if matches!(url.host(), Some(Host::Ipv6(_))) => {
                format!("{}:", url.scheme())
            }
            "https" => url.origin().ascii_serialization(),
            "http" if local => url.origin().ascii_serialization(),
            "http" => return None,
            own if own.contains('.') => format!("{own}:"),
            _ => return None,
        };
        if url.scheme() == "http" && !local {
            return None;
        }
        let letter = |b: u8| b.is_ascii_alphanumeric() || b".-+:/_".contains(&b);
        source.bytes().all(letter).then(|| Self {
            text: text.to_owned(),
            source,
            web,
        })
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// For `form-action`; no character of it means anything else in a CSP.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether it is sure that this client alone gets the answer: it has a secret of its
    /// own, or an https address. Any program of the device can be at the others, so that
    /// people are asked each time (RFC 8252 8.6).
    pub fn assures(&self, client: &Client) -> bool {
        self.web || !matches!(client.authentication, Authentication::None {})
    }

    /// With these parameters added to its query.
    pub fn with(&self, parameters: &[(&str, &str)]) -> String {
        let joint = match self.text.contains('?') {
            true => '&',
            false => '?',
        };
        let mut added = form_urlencoded::Serializer::new(String::new());
        added.extend_pairs(parameters);
        format!("{}{joint}{}", self.text, added.finish())
    }
}

/// The same but for the port, on a loopback address by number (RFC 8252 7.3).
fn same_loopback(registered: &str, asked: &str) -> bool {
    ["http://127.0.0.1", "http://[::1]"].iter().any(|host| {
        let rest = |text: &str| {
            text.strip_prefix(host)
                .and_then(without_port)
                .map(str::to_owned)
        };
        let asked = rest(asked);
        asked.is_some() && rest(registered) == asked
    })
}

/// What follows `:port`, where there is one; `None` where the host went on.
fn without_port(rest: &str) -> Option<&str> {
    let after = match rest.strip_prefix(':') {
        Some(port) => {
            let end = port
                .find(|c: char| !c.is_ascii_digit())
                .unwrap_or(port.len());
            port[..end].parse::<u16>().ok().filter(|&p| p != 0)?;
            &port[end..]
        }
        None => rest,
    };
    (after.is_empty() || after.starts_with(['/', '?'])).then_some(after)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::clients::{Grant, TokenFormat};

    fn client(uris: &[&str], authentication: Authentication) -> Client {
        Client {
            id: "c".into(),
            name: None,
            authentication,
            redirect_uris: uris.iter().map(|&u| u.to_owned()).collect(),
            grants: vec![Grant::AuthorizationCode],
            scopes: Vec::new(),
            audiences: Vec::new(),
            subject_audiences: Vec::new(),
            trusted: false,
            certificate_bound: false,
            dpop_bound: false,
            token_format: TokenFormat::Jwt,
            access_lifetime: None,
        }
    }

    #[test]
    fn only_what_is_registered_letter_by_letter() {
        let client = client(
            &[
                "https://app.example/cb?a=b",
                "http://127.0.0.1/cb",
                "http://[::1]:1/cb",
            ],
            Authentication::None {},
        );
        for good in [
            "https://app.example/cb?a=b",
            "http://127.0.0.1/cb",
            "http://127.0.0.1:51004/cb",
            "http://[::1]:51004/cb",
            "http://[::1]/cb",
        ] {
            let uri = RedirectUri::of(&client, good).expect(good);
            assert_eq!(uri.as_str(), good);
        }
        for bad in [
            "",
            "https://app.example/cb",
            "https://app.example/cb?a=b&c=d",
            "https://app.example/cb?a=b#",
            "https://APP.example/cb?a=b",
            "https://app.example:443/cb?a=b",
            "https://app.example/../cb?a=b",
            "https://app.example@evil.example/cb?a=b",
            "https://app.example.evil.example/cb?a=b",
            "http://app.example/cb?a=b",
            "//app.example/cb?a=b",
            "http://localhost/cb",
            "http://127.0.0.1.evil.example/cb",
            "http://127.0.0.1:80@evil.example/cb",
            "http://127.0.0.1@evil.example/cb",
            "http://127.0.0.1:/cb",
            "http://127.0.0.1:0/cb",
            "http://127.0.0.1:99999/cb",
            "http://127.0.0.1:1/cb/",
            "http://127.0.0.1:1/cb?x",
            "http://127.0.0.1:1/cb#x",
            "http://127.0.0.1:1\\@evil.example/cb",
            "https://127.0.0.1:1/cb",
            "http://127.0.0.2/cb",
        ] {
            assert_eq!(RedirectUri::of(&client, bad), None, "{bad}");
        }
    }

    #[test]
    fn some_are_not_redirected_to_even_if_registered() {
        for bad in [
            "javascript:alert(1)",
            "data:text/html,x",
            "file:///etc/passwd",
            "myapp:/cb",
            "http://app.example/cb",
            "https://app.example/cb#x",
            "https://user@app.example/cb",
            "https://app.example/c b",
            "https://app.example/\r\nset-cookie:a=b",
            "https://app;script-src *.example/cb",
            "/cb",
        ] {
            let client = client(&[bad], Authentication::None {});
            assert_eq!(RedirectUri::of(&client, bad), None, "{bad}");
        }
    }

    #[test]
    fn the_form_action_and_who_is_assured() {
        let secret = Authentication::ClientSecret {
            secret_hash: String::new(),
        };
        for (uri, source, assured) in [
            ("https://app.example/cb", "https://app.example", true),
            (
                "https://app.example:8443/cb",
                "https://app.example:8443",
                true,
            ),
            ("http://127.0.0.1:5000/cb", "http://127.0.0.1:5000", false),
            ("http://localhost:5000/cb", "http://localhost:5000", false),
            ("http://[::1]:5000/cb", "http:", false),
            ("com.example.app:/cb", "com.example.app:", false),
        ] {
            let public = client(&[uri], Authentication::None {});
            let found = RedirectUri::of(&public, uri).expect(uri);
            assert_eq!(found.source(), source);
            assert_eq!(found.assures(&public), assured, "{uri}");
            assert!(found.assures(&client(&[uri], secret.clone())));
        }
    }

    #[test]
    fn parameters_join_the_query() {
        let with = |uri: &str| {
            let client = client(&[uri], Authentication::None {});
            let uri = RedirectUri::of(&client, uri).expect(uri);
            uri.with(&[("state", "a&b=\"<")])
        };
        assert_eq!(with("https://a.b/c"), "https://a.b/c?state=a%26b%3D%22%3C");
        assert_eq!(
            with("https://a.b/c?d=e"),
            "https://a.b/c?d=e&state=a%26b%3D%22%3C"
        );
    }
}
