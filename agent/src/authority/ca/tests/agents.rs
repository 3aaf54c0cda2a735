//! The agent's side, against the whole server over TLS.

use std::{path::PathBuf, time::SystemTime};

use tokio::sync::oneshot;

use super::*;
use crate::{
    config::{self, RemoteAuthority},
    identity::SpiffeId,
    proxy::Identities,
};

/// A server at an address of its own, until this is dropped.
struct Serving {
    authority: Authority,
    _stop: oneshot::Sender<()>,
}

/// An address that nothing listens on.
fn free() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
    listener.local_addr().expect("bound")
}

async fn serve(listen: SocketAddr, change: impl FnOnce(&mut Config, &Path)) -> Serving {
    let authority = Authority::with(|config, dir| {
        config.listen = listen;
        config.issuer = format!("https://{listen}");
        change(config, dir);
    })
    .await;
    let (stop, stopped) = oneshot::channel::<()>();
    let server = authority.server.clone();
    let serving = crate::authority::serve::serve(server.clone(), routes(server), async {
        let _dropped = stopped.await;
    });
    tokio::spawn(async move { serving.await.expect("serves") });
    let limit = std::time::Instant::now() + Duration::from_secs(10);
    while tokio::net::TcpStream::connect(listen).await.is_err() {
        assert!(
            std::time::Instant::now() < limit,
            "the server does not listen"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Serving {
        authority,
        _stop: stop,
    }
}

/// An agent's configuration, with a new join token where there is an authority.
async fn agent_config(serving: &Serving, state: &Path) -> config::Config {
    let server = &serving.authority.server;
    let token = state.join("token");
    write_private(&token, &serving.authority.token("node1").await);
    let mut config = config::Config {
        node: "node1".into(),
        state: state.to_owned(),
        ..config::Config::default()
    };
    config.identity.authority = Some(RemoteAuthority {
        url: server.config.issuer.clone(),
        roots: Some(server.config.state.join("root.pem")),
        join_token_file: Some(token),
        service_account_token_file: None,
    });
    config
}

fn write_private(path: &PathBuf, text: &str) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::write(path, text).expect("written");
    let private = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(path, private).expect("changed");
}

fn cart() -> SpiffeId {
    CART.parse().expect("valid")
}

#[tokio::test]
async fn an_agent_joins_keeps_its_place_and_makes_no_root() {
    let serving = serve(free(), |_, _| {}).await;
    let state = tempfile::tempdir().expect("directory");
    let config = agent_config(&serving, state.path()).await;
    let identities = Identities::open(&config, "node1").expect("opens");
    // Nobody is trusted, and nothing is there, before it has joined.
    assert_eq!(identities.bundle.roots(), 0);
    assert!(identities.get(&cart(), "u1").expect("asked for").is_none());
    let round = identities.renew(SystemTime::now()).await;
    assert!(
        round.fresh && round.problem.is_none(),
        "{:?}",
        round.problem
    );
    let credentials = identities
        .get(&cart(), "u1")
        .expect("asked for")
        .expect("there");
    assert_eq!(credentials.id, cart());
    assert_eq!(identities.bundle.roots(), 1);
    assert!(!state.path().join("root.key").exists());
    assert!(identities.jwks().is_none());
    // What does not run here is refused, and told.
    let other: SpiffeId = "spiffe://cluster.local/ns/shop/sa/other"
        .parse()
        .expect("valid");
    assert!(identities.get(&other, "u1").expect("asked for").is_none());
    let round = identities.renew(SystemTime::now()).await;
    assert!(round.problem.is_some_and(|p| p.contains("403")));
    assert!(
        identities
            .why_not(&other)
            .is_some_and(|why| why.contains("no pod of"))
    );
    // Its certificate is of its own making at half of its life.
    let before = credentials.fingerprint();
    let later = credentials.renew_at() + Duration::from_secs(1);
    identities.renew(later).await;
    assert_ne!(credentials.fingerprint(), before);
    drop(identities);
    // The token is used; the place is not given up.
    let again = Identities::open(&config, "node1").expect("opens");
    assert_eq!(again.bundle.roots(), 1);
    again.get(&cart(), "u1").expect("asked for");
    let round = again.renew(SystemTime::now()).await;
    assert!(round.fresh, "{:?}", round.problem);
    // In its state another node's agent has no place.
    let other = Identities::open(&config, "node2").expect("opens");
    let round = other.renew(SystemTime::now()).await;
    assert!(round.problem.is_some_and(|p| p.contains("401")));
}

#[tokio::test]
async fn a_revoked_agent_joins_anew() {
    let serving = serve(free(), |_, _| {}).await;
    let state = tempfile::tempdir().expect("directory");
    let config = agent_config(&serving, state.path()).await;
    let identities = Identities::open(&config, "node1").expect("opens");
    identities.renew(SystemTime::now()).await;
    let server = &serving.authority.server;
    let now = server.clock.seconds();
    tokens::revoke_node(&server.store, "node1", now)
        .await
        .expect("done");
    identities.get(&cart(), "u1").expect("asked for");
    let refused = identities.renew(SystemTime::now()).await;
    assert!(refused.problem.is_some_and(|p| p.contains("revoked")));
    serving.authority.advance(Duration::from_secs(1)).await;
    write_private(
        &state.path().join("token"),
        &serving.authority.token("node1").await,
    );
    let limit = std::time::Instant::now() + Duration::from_secs(10);
    loop {
        let round = identities.renew(SystemTime::now()).await;
        if round.fresh {
            break;
        }
        assert!(std::time::Instant::now() < limit, "{:?}", round.problem);
        tokio::time::sleep(round.next).await;
    }
}

#[tokio::test]
async fn jwt_svids_are_kept_and_asked_for_once() {
    let listen = free();
    let serving = serve(listen, |_, _| {}).await;
    let state = tempfile::tempdir().expect("directory");
    let config = agent_config(&serving, state.path()).await;
    let identities = Identities::open(&config, "node1").expect("opens");
    identities
        .jwt_svid(&cart(), "shop")
        .await
        .expect_err("not joined yet");
    identities.renew(SystemTime::now()).await;
    // The refusal is remembered for a moment, for that audience.
    let id = cart();
    let ask = || identities.jwt_svid(&id, "books");
    let all = futures_util::future::join_all((0..20).map(|_| ask())).await;
    let tokens: std::collections::HashSet<String> = all
        .into_iter()
        .map(|token| token.expect("a token").token.to_string())
        .collect();
    assert_eq!(tokens.len(), 1);
    assert!(
        !format!("{:?}", ask().await.expect("kept")).contains(tokens.iter().next().expect("one"))
    );
    let other: SpiffeId = "spiffe://cluster.local/ns/shop/sa/other"
        .parse()
        .expect("valid");
    let refused = identities
        .jwt_svid(&other, "books")
        .await
        .expect_err("refused");
    assert!(refused.to_string().contains("403"), "{refused}");
    let Serving { authority, _stop } = serving;
    drop(_stop);
    ask().await.expect("kept without the authority");
    let told = authority.audit_now("token");
    assert_eq!(told, 1);
}

#[tokio::test]
async fn who_is_not_the_authority_is_not_believed() {
    let serving = serve(free(), |_, _| {}).await;
    let state = tempfile::tempdir().expect("directory");
    let mut config = agent_config(&serving, state.path()).await;
    let stranger = Authority::new().await;
    let authority = config.identity.authority.as_mut().expect("set");
    authority.roots = Some(stranger.server.config.state.join("root.pem"));
    let identities = Identities::open(&config, "node1").expect("opens");
    let round = identities.renew(SystemTime::now()).await;
    let problem = round.problem.expect("not believed");
    assert!(problem.contains("invalid peer certificate"), "{problem}");
    assert_eq!(identities.bundle.roots(), 0);
}

#[test]
fn half_a_configuration_is_refused() {
    let state = tempfile::tempdir().expect("directory");
    let complete = RemoteAuthority {
        url: "https://authority.example".into(),
        roots: None,
        join_token_file: Some("/token".into()),
        service_account_token_file: None,
    };
    type Change = fn(&mut config::Identity, &mut RemoteAuthority);
    let open = |change: Change| {
        let mut config = config::Config {
            state: state.path().to_owned(),
            ..config::Config::default()
        };
        let mut authority = complete.clone();
        change(&mut config.identity, &mut authority);
        config.identity.authority = Some(authority);
        Identities::open(&config, "node1")
            .err()
            .map(|e| e.to_string())
    };
    assert_eq!(open(|_, _| {}), None);
    for (change, expected) in [
        (
            (|_, a| a.url = "http://authority.example".into()) as Change,
            "https",
        ),
        (|_, a| a.join_token_file = None, "one of"),
        (
            |_, a| a.service_account_token_file = Some("/x".into()),
            "one of",
        ),
        (|i, _| i.root_key = Some("/root.key".into()), "exclude"),
        (|_, a| a.roots = Some("/nowhere".into()), "/nowhere"),
    ] {
        let error = open(change).expect(expected);
        assert!(
            error.contains(expected) && error.contains("identity.authority"),
            "{error}"
        );
    }
}
