//! The pages that people see, in a real browser: the real server on loopback, Chromium
//! that trusts its root, and a keyboard.

use std::{
    io::Write as _,
    net::{Ipv4Addr, TcpListener},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use postern_tests::{Running, audit_text, binary, output, text};
use serde_json::Value;

const PYTHON: &str = "/usr/bin/python3";
const PASSWORD: &str = "correct horse battery";

/// A running authority with one person and one client.
pub struct Authority {
    pub issuer: String,
    pub dir: tempfile::TempDir,
    server: Running,
}

impl Authority {
    /// `clients` is the YAML list of the configuration.
    pub fn start(clients: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        // Free when it was asked for; what takes it in between makes the start fail.
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
            .local_addr()?
            .port();
        let issuer = format!("https://localhost:{port}");
        let path = dir.path().display();
        std::fs::write(
            dir.path().join("authority.yaml"),
            format!(
                "issuer: {issuer}\nlisten: 127.0.0.1:{port}\nstate: {path}/state\n\
                 audit: {{directory: {path}/audit}}\nclients: {clients}\n"
            ),
        )?;
        user(dir.path(), &["add", "alice", "--name", "Alice"], PASSWORD)?;
        let mut run = Command::new(binary("postern")?);
        run.args(["authority", "run", "--config"]);
        run.arg(dir.path().join("authority.yaml"));
        let server = Running::start(&mut run, dir.path().join("authority.log"))?;
        server.says("ready")?;
        Ok(Self {
            issuer,
            dir,
            server,
        })
    }

    /// The certificate that its clients trust.
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("state/root.pem")
    }

    pub fn log(&self) -> String {
        self.server.output()
    }

    pub fn audit(&self) -> Result<String> {
        let of_commands = audit_text(&self.dir.path().join("audit.commands"))?;
        Ok(audit_text(&self.dir.path().join("audit"))? + &of_commands)
    }
}

/// `postern authority user ...`, with a password on its standard input.
fn user(dir: &Path, arguments: &[&str], password: &str) -> Result<String> {
    let mut command = Command::new(binary("postern")?);
    command.args(["authority", "user"]).args(arguments);
    command.arg("--config").arg(dir.join("authority.yaml"));
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut input = child.stdin.take().context("a pipe")?;
    writeln!(input, "{password}")?;
    drop(input);
    let result = child.wait_with_output()?;
    ensure!(result.status.success(), "{}", text(&result.stderr));
    Ok(text(&result.stdout))
}

/// A HOME whose browser trusts this root. Chromium on Linux asks NSS.
pub fn trusting(dir: &Path, root: &Path) -> Result<PathBuf> {
    let home = dir.join("home");
    let database = home.join(".pki/nssdb");
    std::fs::create_dir_all(&database)?;
    let name = format!("sql:{}", database.display());
    let certutil = || Command::new("certutil");
    output(certutil().args(["-d", &name, "-N", "--empty-password"]))?;
    let mut add = certutil();
    add.args(["-d", &name, "-A", "-n", "root", "-t", "C,,", "-i"]);
    output(add.arg(root)).context("certutil (package libnss3-tools)")?;
    Ok(home)
}

pub fn script(dir: &Path, name: &str, content: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    std::fs::File::options()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(&path)?
        .write_all(content.as_bytes())?;
    Ok(path)
}

#[test]
fn a_person_logs_in_with_a_browser_and_a_keyboard() -> Result<()> {
    let authority = Authority::start(
        "[{id: web, name: The Shop, authentication: {none: {}}, \
         redirectUris: ['http://127.0.0.1/cb'], grants: [authorization_code], \
         scopes: [openid, profile, 'orders:read'], audiences: ['https://api.example']}, \
         {id: trusted, trusted: true, authentication: {clientSecret: {secretHash: \
         '$argon2id$v=19$m=19456,t=2,p=1$bXQRmhxFbrVQkUj1RjQu2w$XyV/46fNJGQifVMFPf3VJoCrEoOCfHQzpT45ZTBTpeM'}}, \
         redirectUris: ['http://127.0.0.1/cb'], grants: [authorization_code], \
         scopes: [openid, profile, 'orders:read']}]",
    )?;
    let dir = authority.dir.path();
    let home = trusting(dir, &authority.root())?;
    script(dir, "webdriver.py", include_str!("login/webdriver.py"))?;
    let drive = script(dir, "drive.py", include_str!("login/drive.py"))?;
    let mut python = Command::new(PYTHON);
    let driven = output(python.arg(drive).arg(&authority.issuer).arg(home));
    let driven = driven.with_context(|| authority.log())?;
    let seen: Value = serde_json::from_slice(&driven.stdout)?;

    for (page, heading) in [
        ("login", "Log in"),
        ("wrong", "Log in"),
        ("consent", "Allow access?"),
    ] {
        let page = &seen[page];
        assert_eq!(page["headings"], serde_json::json!([heading]));
        assert_eq!(page["lang"], "en");
        assert_eq!((&page["mains"], &page["scripts"]), (&1.into(), &0.into()));
        assert_eq!(page["styled"], 1);
        // Nothing is cut off at 200 %, nor on a small screen.
        assert_eq!(page["overflow"], serde_json::json!([0, 0]), "{page}");
        // The page's own colours, and something on it.
        assert_eq!(page["light"]["corner"], "#f3f4f6");
        assert_eq!(page["dark"]["corner"], "#14171b");
        for scheme in ["light", "dark"] {
            assert!(page[scheme]["count"].as_u64() > Some(10), "{page}");
        }
    }
    let input = |page: &str, i: usize, key: &str| seen[page]["inputs"][i][key].clone();
    for page in ["login", "wrong"] {
        assert_eq!(input(page, 0, "label"), "User name");
        assert_eq!(input(page, 0, "autocomplete"), "username");
        assert_eq!(input(page, 1, "label"), "Password");
        assert_eq!(input(page, 1, "autocomplete"), "current-password");
        assert_eq!(input(page, 1, "type"), "password");
        assert_eq!(input(page, 1, "value"), "");
    }
    assert_eq!(seen["login"]["focus"], "username");
    assert_eq!(seen["login"]["alert"], Value::Null);
    assert_eq!(seen["wrong"]["focus"], "password");
    assert_eq!(input("wrong", 0, "value"), "alice");
    for i in [0, 1] {
        assert_eq!(input("wrong", i, "invalid"), "true");
        assert_eq!(input("wrong", i, "described"), seen["wrong"]["alert"]);
    }
    let consent = seen["consent"]["text"].as_str().unwrap_or_default();
    for shown in [
        "The Shop",
        "alice",
        "know who you are",
        "orders:read",
        "api.example",
    ] {
        assert!(consent.contains(shown), "{shown} in {consent}");
    }
    assert_eq!(
        seen["consent"]["buttons"],
        serde_json::json!(["Allow", "Deny"])
    );
    assert_eq!(seen["order"], serde_json::json!(["Allow"]));

    let called = &seen["called"];
    assert_eq!(called.as_array().map(Vec::len), Some(1), "{called}");
    let query = &called[0]["query"];
    let code = query["code"][0].as_str().unwrap_or_default();
    assert_eq!(code.len(), 43, "{query}");
    assert_eq!(query["state"][0], "a state & more");
    assert_eq!(query["iss"][0], authority.issuer.as_str());
    assert_eq!(called[0]["referer"], Value::Null);
    let trusted = &seen["trusted"][0]["query"]["code"][0];
    assert!(trusted.is_string() && trusted != code, "{seen}");
    assert_eq!(seen["after"], serde_json::json!([]));
    let cookie = &seen["cookies"][0];
    assert_eq!(cookie["name"], "__Host-postern");
    assert_eq!(
        (&cookie["httpOnly"], &cookie["secure"]),
        (&true.into(), &true.into())
    );
    assert_eq!(
        (&cookie["sameSite"], &cookie["path"]),
        (&"Lax".into(), &"/".into())
    );

    let violates = |messages: &str| seen[messages].to_string().contains("Security Policy");
    assert!(!violates("console"), "{}", seen["console"]);
    assert!(violates("violations"), "{}", seen["violations"]);
    assert!(violates("framed"), "{}", seen["framed"]);

    let (log, audit) = (authority.log(), authority.audit()?);
    let session = cookie["value"].as_str().context("a cookie")?;
    for secret in [PASSWORD, "not the password", code, session] {
        assert!(!log.contains(secret) && !audit.contains(secret));
    }
    assert!(audit.contains(r#""event":"code""#), "{audit}");
    Ok(())
}

/// The whole code flow by a client that is not ours, without a browser's help.
#[test]
fn authlib_gets_tokens_for_a_person() -> Result<()> {
    let authority = Authority::start(
        "[{id: web, name: The Shop, authentication: {none: {}}, \
         redirectUris: ['https://app.example/cb'], \
         grants: [authorization_code, refresh_token], \
         scopes: [openid, profile, offline_access], audiences: ['https://api.example']}]",
    )?;
    let flow = script(
        authority.dir.path(),
        "code_flow.py",
        include_str!("authority/code_flow.py"),
    )?;
    let mut python = Command::new(PYTHON);
    let root = authority.root();
    let ran = output(python.arg(flow).arg(&authority.issuer).arg(root));
    let ran = ran.with_context(|| authority.log())?;
    let seen: Value = serde_json::from_slice(&ran.stdout)?;
    let sub = &seen["identity"]["sub"];
    assert!(sub.is_string(), "{seen}");
    assert_eq!(seen["identity"]["iss"], authority.issuer.as_str());
    assert_eq!(seen["identity"]["aud"], "web");
    assert_eq!(seen["identity"]["nonce"], "a nonce");
    assert_eq!(&seen["userinfo"]["sub"], sub);
    assert_eq!(seen["userinfo"]["name"], "Alice");
    // A code is good once, a revoked token no more.
    assert_eq!(seen["second"], "invalid_grant");
    assert_eq!(seen["revoked"], "invalid_grant");
    let (log, audit) = (authority.log(), authority.audit()?);
    for secret in seen["secrets"].as_array().context("secrets")? {
        let secret = secret.as_str().context("a secret")?;
        assert!(!secret.is_empty() && !log.contains(secret) && !audit.contains(secret));
    }
    Ok(())
}

#[test]
fn people_are_managed_by_command() -> Result<()> {
    let authority = Authority::start("[]")?;
    let dir = authority.dir.path();
    let run = |arguments: &[&str], password: &str| user(dir, arguments, password);
    let refused = |arguments: &[&str], password: &str| {
        let error = run(arguments, password).err().context("it was not refused");
        error.map(|error| error.to_string())
    };
    let sub = run(
        &["add", "carol", "--email", "carol@example.org"],
        "long enough",
    )?;
    let list = run(&["list"], "")?;
    let carol = format!("carol\t{}\tenabled\tstore\tcarol@example.org\t", sub.trim());
    assert!(list.lines().any(|line| line == carol), "{list}");
    assert_eq!(list.lines().count(), 2);
    assert!(refused(&["add", "carol"], "long enough")?.contains("already"));
    assert!(refused(&["add", "dave"], "short")?.contains("8 to 1024"));
    assert!(refused(&["add", " dave"], "long enough")?.contains("space"));
    assert!(refused(&["password", "dave"], "long enough")?.contains("no user"));
    run(&["disable", "carol"], "")?;
    assert!(run(&["list"], "")?.contains("\tdisabled\t"));
    run(&["enable", "carol"], "")?;
    run(&["password", "carol"], "another one")?;
    assert!(!run(&["list"], "")?.contains("\tdisabled\t"));
    let mut hash = Command::new("sh");
    hash.args(["-c", r#"echo "long enough" | "$0" authority user hash"#]);
    let hash = output(hash.arg(binary("postern")?))?;
    assert!(text(&hash.stdout).starts_with("$argon2id$v=19$m=19456,t=2,p=1$"));
    let audit = authority.audit()?;
    assert_eq!(audit.matches(r#""event":"user""#).count(), 5, "{audit}");
    for secret in ["long enough", "another one", "argon2"] {
        assert!(!audit.contains(secret));
    }
    Ok(())
}
