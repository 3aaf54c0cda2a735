//! Two replicas on one PostgreSQL (Debian's, started here): what can be used once is
//! used once, whichever of them is asked, and both at the same time.

use std::{
    os::unix::fs::chown,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use http::StatusCode;
use tempfile::TempDir;

use super::kit::{JWT_BEARER, Kit, assertion, client, write_jwks};
use crate::{
    authority::{
        Clock, Config,
        clients::{Authentication, Grant},
        store::Store,
    },
    jwt::{Algorithm, SigningKey},
};

struct Postgres {
    directory: TempDir,
    child: Child,
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // SIGQUIT: at once, with all its children.
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        let _it_may_have_ended = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGQUIT);
        let _status = self.child.wait();
    }
}

impl Postgres {
    fn start() -> Self {
        let bin = programs();
        let directory = tempfile::tempdir().expect("directory");
        let owner = nix::unistd::User::from_name("postgres").expect("users");
        let owner = owner.expect("no user `postgres`: apt-get install postgresql");
        let root = nix::unistd::geteuid().is_root();
        if root {
            let (uid, gid) = (owner.uid.as_raw(), owner.gid.as_raw());
            chown(directory.path(), Some(uid), Some(gid)).expect("chown");
        }
        let command = |program: &str| {
            let program = bin.join(program);
            // PostgreSQL does not run as root.
            let mut command = match root {
                true => {
                    let mut command = Command::new("setpriv");
                    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
                    command.arg(program);
                    command
                }
                false => Command::new(program),
            };
            command.current_dir(directory.path());
            command
        };
        let data = directory.path().join("data");
        let made = command("initdb")
            .args(["-A", "trust", "-U", "postgres", "--no-sync", "-D"])
            .arg(&data)
            .output()
            .expect("initdb runs");
        assert!(made.status.success(), "{made:?}");
        let child = command("postgres")
            .arg("-D")
            .arg(&data)
            .args(["-c", "listen_addresses=", "-c", "fsync=off"])
            .arg("-c")
            .arg(format!(
                "unix_socket_directories={}",
                directory.path().display()
            ))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("postgres runs");
        Self { directory, child }
    }

    fn url(&self) -> String {
        let host = self.directory.path().display();
        format!("postgres://postgres@localhost/postgres?host={host}")
    }
}

fn programs() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").ok();
    let found = versions.into_iter().flatten().flatten();
    let mut found: Vec<_> = found
        .map(|version| version.path().join("bin"))
        .filter(|bin| bin.join("initdb").exists() && bin.join("postgres").exists())
        .collect();
    found.sort();
    found
        .pop()
        .expect("no PostgreSQL in /usr/lib/postgresql: apt-get install postgresql")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn replicas_share_codes_refresh_tokens_and_assertions() {
    let postgres = Postgres::start();
    let url = postgres.url();
    let key = SigningKey::generate(Algorithm::Es256).expect("a key");
    let directory = Arc::new(tempfile::tempdir().expect("directory"));
    let clock = Clock::fixed(Clock::system().seconds());
    let deadline = Instant::now() + Duration::from_secs(60);
    let ready = Config {
        database: Some(url.clone()),
        ..Config::default()
    };
    while let Err(error) = Store::open(&ready).await {
        assert!(
            Instant::now() < deadline,
            "PostgreSQL does not start: {error}"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // One reads the URL from a file, as it should be where it has a password.
    let file = directory.path().join("database.url");
    std::fs::write(&file, format!("{url}\n")).expect("written");
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).expect("chmod");
    let change = |database: String| {
        let key = &key;
        move |config: &mut Config, directory: &Path| {
            config.database = Some(database);
            let way = Authentication::PrivateKeyJwt {
                jwks_file: write_jwks(directory, key),
            };
            let grants = [Grant::ClientCredentials];
            config.clients.push(client("keyed", way, &grants));
        }
    };
    let one = Kit::at(directory.clone(), clock.clone(), change(url), None).await;
    let by_file = change(format!("@{}", file.display()));
    let two = Kit::at(directory.clone(), clock.clone(), by_file, None).await;
    let won = |answers: Vec<super::kit::Answer>| {
        let won = answers
            .iter()
            .filter(|answer| answer.status == StatusCode::OK);
        won.map(|answer| answer.body["refresh_token"].as_str().map(str::to_owned))
            .collect::<Vec<_>>()
    };
    for round in 0..20 {
        let (code, verifier) = one.code("app", &["read"]).await;
        let redeem = |kit| Kit::redeem(kit, "app", &code, &verifier);
        let (a, b, c, d) = tokio::join!(redeem(&one), redeem(&two), redeem(&one), redeem(&two));
        assert!(
            won(vec![a, b, c, d]).len() <= 1,
            "round {round}: a code was taken twice"
        );
        let old = one.login(&["read"]).await.text("refresh_token");
        let (a, b, c, d) = tokio::join!(
            one.refresh(&old),
            two.refresh(&old),
            one.refresh(&old),
            two.refresh(&old)
        );
        let won = won(vec![a, b, c, d]);
        assert!(
            won.len() <= 1,
            "round {round}: a refresh token was taken twice"
        );
        // The others were reuse: nothing of the family is left.
        for token in won.into_iter().flatten() {
            two.refresh(&token).await.refused("invalid_grant");
        }
    }
    // Alone, each works, and the other replica knows.
    let login = one.login(&["openid", "read"]).await;
    assert!(two.active("app", &login.text("access_token")).await);
    let next = two.refresh(&login.text("refresh_token")).await.ok();
    one.post_as("app", "/revoke", &[("token", &next.text("refresh_token"))])
        .await
        .ok();
    assert!(!two.active("app", &next.text("access_token")).await);
    let proof = assertion(&key, "keyed", &clock, serde_json::json!({}));
    let form = [
        ("grant_type", "client_credentials"),
        ("client_assertion_type", JWT_BEARER),
        ("client_assertion", proof.as_str()),
    ];
    let (a, b) = tokio::join!(one.post("/token", &form), two.post("/token", &form));
    let fine = [a.status, b.status]
        .iter()
        .filter(|s| **s == StatusCode::OK)
        .count();
    assert_eq!(fine, 1, "{a:?} {b:?}");
    let new = client(
        "stored",
        super::kit::with_secret(),
        &[Grant::ClientCredentials],
    );
    assert!(one.store().add_client(&new).await.expect("added"));
    assert!(!two.store().add_client(&new).await.expect("taken"));
    let form = [("grant_type", "client_credentials")];
    two.token_as("stored", &form).await.ok();
    clock.advance(Duration::from_secs(40 * 24 * 3_600));
    two.store().purge(clock.seconds()).await.expect("purged");
    let _closed = (one.close().await, two.close().await);
}
