use std::{
    io::Write as _,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
};

use super::*;

const TOKEN: &str = "correct-horse-battery-staple-0123456789";
const NOW: u64 = 1_000_000;

fn loopback() -> Access {
    let address = "127.0.0.1:15000".parse().expect("an address");
    Access::new(address, None).expect("nothing to read")
}

fn guard(dir: &Path, token: &str) -> Guard {
    let path = dir.join("token");
    let _of_before = std::fs::remove_file(&path);
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .expect("a file");
    file.write_all(token.as_bytes()).expect("written");
    Guard {
        token: path.clone(),
        certificate: path.clone(),
        key: path,
    }
}

fn guarded() -> Access {
    let dir = tempfile::tempdir().expect("a directory");
    let address = "192.0.2.1:15000".parse().expect("an address");
    let guard = guard(dir.path(), &format!("{TOKEN}\n"));
    Access::new(address, Some(&guard)).expect("a token")
}

struct Request<'a> {
    method: &'a str,
    path: &'a str,
    headers: Vec<(&'static str, String)>,
    from: &'a str,
    now: u64,
}

impl Default for Request<'_> {
    fn default() -> Self {
        Self {
            method: "GET",
            path: "/api/map",
            headers: Vec::new(),
            from: "198.51.100.1",
            now: NOW,
        }
    }
}

fn ask(access: &Access, request: &Request<'_>) -> Answer {
    let mut headers = HeaderMap::new();
    for (name, value) in &request.headers {
        headers.append(*name, value.parse().expect("a value"));
    }
    access.judge(&Asked {
        method: &request.method.parse().expect("a method"),
        path: request.path,
        headers: &headers,
        from: request.from.parse().expect("an address"),
        now: request.now,
    })
}

fn with(access: &Access, headers: &[(&'static str, &str)]) -> Answer {
    let headers = headers.iter().map(|(n, v)| (*n, (*v).to_owned())).collect();
    ask(
        access,
        &Request {
            headers,
            ..Request::default()
        },
    )
}

#[test]
fn on_loopback_only_its_own_names_lead_here() {
    let access = loopback();
    assert_eq!(with(&access, &[]), Answer::Pass);
    for name in [
        "localhost",
        "LOCALHOST:15000",
        "127.0.0.1:15000",
        "127.0.0.1",
        "[::1]:15000",
        "localhost:8080",
        "127.0.0.2",
    ] {
        assert_eq!(with(&access, &[("host", name)]), Answer::Pass, "{name}");
    }
    for name in [
        "evil.example",
        "evil.example:15000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "192.0.2.1:15000",
        "",
        "a b",
        "0.0.0.0:15000",
        "localhost@evil.example",
    ] {
        let answer = with(&access, &[("host", name)]);
        let refused = matches!(answer, Answer::Refused(StatusCode::MISDIRECTED_REQUEST, _));
        assert!(refused, "{name}: {answer:?}");
    }
}

#[test]
fn what_other_sites_send_is_refused() {
    let forbidden = |answer: &Answer| matches!(answer, Answer::Refused(StatusCode::FORBIDDEN, _));
    for (method, path, headers, refused) in [
        (
            "GET",
            "/api/map",
            vec![("sec-fetch-site", "same-origin")],
            false,
        ),
        (
            "POST",
            "/log",
            vec![("sec-fetch-site", "same-origin")],
            false,
        ),
        ("POST", "/log", vec![("sec-fetch-site", "none")], false),
        ("POST", "/log", vec![], false),
        ("POST", "/log", vec![("sec-fetch-site", "cross-site")], true),
        ("POST", "/log", vec![("sec-fetch-site", "same-site")], true),
        // Another port of this machine is the same site.
        (
            "GET",
            "/config",
            vec![
                ("sec-fetch-site", "same-site"),
                ("sec-fetch-mode", "no-cors"),
            ],
            true,
        ),
        (
            "GET",
            "/",
            vec![
                ("sec-fetch-site", "cross-site"),
                ("sec-fetch-mode", "navigate"),
            ],
            false,
        ),
        (
            "GET",
            "/",
            vec![
                ("sec-fetch-site", "cross-site"),
                ("sec-fetch-mode", "no-cors"),
            ],
            true,
        ),
        (
            "GET",
            "/config",
            vec![
                ("sec-fetch-site", "cross-site"),
                ("sec-fetch-mode", "navigate"),
            ],
            true,
        ),
        (
            "POST",
            "/",
            vec![
                ("sec-fetch-site", "cross-site"),
                ("sec-fetch-mode", "navigate"),
            ],
            true,
        ),
        // Without Sec-Fetch-Site.
        (
            "POST",
            "/log",
            vec![("origin", "http://localhost:15000")],
            false,
        ),
        (
            "POST",
            "/log",
            vec![("origin", "http://localhost:8000")],
            true,
        ),
        (
            "POST",
            "/log",
            vec![("origin", "http://evil.example")],
            true,
        ),
        ("POST", "/log", vec![("origin", "null")], true),
    ] {
        let mut headers: Vec<_> = headers.iter().map(|(n, v)| (*n, (*v).to_owned())).collect();
        headers.push(("host", "localhost:15000".into()));
        let about = format!("{method} {path} {headers:?}");
        let request = Request {
            method,
            path,
            headers,
            ..Request::default()
        };
        assert_eq!(forbidden(&ask(&loopback(), &request)), refused, "{about}");
    }
}

#[test]
fn elsewhere_it_takes_the_token() {
    let access = guarded();
    let bearer = |scheme: &str, token: &str| {
        with(&access, &[("authorization", &format!("{scheme} {token}"))])
    };
    assert_eq!(bearer("Bearer", TOKEN), Answer::Pass);
    assert_eq!(bearer("bearer", TOKEN), Answer::Pass);
    for (scheme, token) in [
        ("Bearer", &TOKEN[1..]),
        ("Bearer", &TOKEN[..TOKEN.len() - 1]),
        ("Bearer", ""),
        ("Basic", TOKEN),
        ("", TOKEN),
    ] {
        let answer = bearer(scheme, token);
        assert!(
            matches!(answer, Answer::Refused(StatusCode::UNAUTHORIZED, _)),
            "{answer:?}"
        );
    }
    // Nothing but the way in is open.
    for (path, passes) in [
        ("/", false),
        ("/api/map", false),
        ("/status", false),
        ("/config", false),
        ("/log", false),
        ("/app.js", false),
        ("/login", true),
        ("/style.css", true),
        ("/login/", false),
        ("//login", false),
    ] {
        for method in ["GET", "POST"] {
            let request = Request {
                method,
                path,
                ..Request::default()
            };
            assert_eq!(
                ask(&access, &request) == Answer::Pass,
                passes,
                "{method} {path}"
            );
        }
    }
    assert_eq!(with(&access, &[("accept", "text/html,*/*")]), Answer::LogIn);
    // A foreign name gets in by the token alone.
    assert_eq!(
        with(
            &access,
            &[
                ("host", "node1.example"),
                ("authorization", &format!("Bearer {TOKEN}"))
            ]
        ),
        Answer::Pass
    );
}

#[test]
fn people_log_in_for_a_while_and_out() {
    let access = guarded();
    let from: IpAddr = "198.51.100.1".parse().expect("an address");
    let Login::In(cookie) = access.log_in(&format!(" {TOKEN} "), from, NOW) else {
        panic!("not let in");
    };
    for part in [
        "__Host-postern-admin=",
        "; Path=/",
        "; Secure",
        "; HttpOnly",
        "; SameSite=Strict",
    ] {
        assert!(cookie.contains(part), "{cookie}");
    }
    assert!(!cookie.contains(TOKEN) && !cookie.contains("Domain"));
    let value = cookie.split(';').next().expect("a value").to_owned();
    assert_eq!(value.split_once('=').expect("a value").1.len(), 43);
    let shown = |now: u64, cookie: &str| {
        let headers = vec![("cookie", format!("other=1; {cookie}"))];
        ask(
            &access,
            &Request {
                headers,
                now,
                ..Request::default()
            },
        )
    };
    assert_eq!(shown(NOW + SESSION - 1, &value), Answer::Pass);
    assert_ne!(shown(NOW + SESSION, &value), Answer::Pass);
    assert_ne!(shown(NOW, &format!("{value}x")), Answer::Pass);
    assert_ne!(shown(NOW, "__Host-postern-admin="), Answer::Pass);
    let mut headers = HeaderMap::new();
    headers.insert(COOKIE, value.parse().expect("a value"));
    assert!(access.log_out(&headers).contains("Max-Age=0"));
    assert_ne!(shown(NOW, &value), Answer::Pass);
}

#[test]
fn sessions_are_bounded_and_the_oldest_ends() {
    let access = guarded();
    let from: IpAddr = "198.51.100.1".parse().expect("an address");
    let cookies: Vec<String> = (0..=MOST_SESSIONS)
        .map(|_| match access.log_in(TOKEN, from, NOW) {
            Login::In(cookie) => cookie.split(';').next().expect("a value").to_owned(),
            other => panic!("{other:?}"),
        })
        .collect();
    let passes = |cookie: &String| with(&access, &[("cookie", cookie)]) == Answer::Pass;
    assert!(!passes(&cookies[0]));
    assert!(cookies[1..].iter().all(passes));
}

#[test]
fn wrong_tokens_are_bounded_by_address() {
    let access = guarded();
    let attempt = |from: &str, token: &str, now: u64| {
        let headers = vec![("authorization", format!("Bearer {token}"))];
        ask(
            &access,
            &Request {
                headers,
                from,
                now,
                ..Request::default()
            },
        )
    };
    for _ in 0..ATTEMPTS {
        let answer = attempt("192.0.2.9", "wrong", NOW);
        assert!(matches!(
            answer,
            Answer::Refused(StatusCode::UNAUTHORIZED, _)
        ));
    }
    // Not even the right one, or guesses could go on.
    for token in ["wrong", TOKEN] {
        let answer = attempt("192.0.2.9", token, NOW);
        assert!(matches!(
            answer,
            Answer::Refused(StatusCode::TOO_MANY_REQUESTS, _)
        ));
    }
    let from: IpAddr = "192.0.2.9".parse().expect("an address");
    assert_eq!(access.log_in(TOKEN, from, NOW), Login::TooMany);
    // Others, and the same a minute later, are not in its way.
    assert_eq!(attempt("192.0.2.10", TOKEN, NOW), Answer::Pass);
    assert_eq!(attempt("192.0.2.9", TOKEN, NOW + 60), Answer::Pass);
    // Right ones are no attempts.
    for _ in 0..2 * ATTEMPTS {
        assert_eq!(attempt("192.0.2.10", TOKEN, NOW), Answer::Pass);
    }
}

#[test]
fn a_weak_or_open_token_is_refused_with_its_key() {
    let dir = tempfile::tempdir().expect("a directory");
    let address = "192.0.2.1:15000".parse().expect("an address");
    let refused = |guard: &Guard| match Access::new(address, Some(guard)) {
        Ok(_) => panic!("taken"),
        Err(error) => error,
    };
    for token in [
        "",
        "short",
        "0123456789012345678901234567890",
        &"a b".repeat(20),
        &"ä".repeat(40),
    ] {
        let error = refused(&guard(dir.path(), token));
        assert!(
            error.contains("listen.adminToken") && error.contains("32"),
            "{error}"
        );
        assert!(token.is_empty() || !error.contains(token));
    }
    let open = guard(dir.path(), TOKEN);
    let mode = std::fs::Permissions::from_mode(0o644);
    std::fs::set_permissions(&open.token, mode).expect("its mode");
    assert!(refused(&open).contains("0600"));
    std::fs::remove_file(&open.token).expect("gone");
    assert!(refused(&open).contains("listen.adminToken"));
}
