//! A log that the test writes, senders of this process, and their receivers.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use postern::{
    audit::send::{self, Progress, Senders},
    config::Config,
};
use postern_tests::Running;
use serde_json::{Value, json};

pub struct World {
    directory: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    senders: Option<Senders>,
    protocol: String,
    port: u16,
    sink: String,
    tls: bool,
    seq: u64,
    last: String,
    segment: PathBuf,
}

impl World {
    /// A sink of this protocol, with further keys of its own.
    pub fn new(protocol: &str, more: &str) -> Result<Self> {
        let mut world = Self::empty(protocol)?;
        let secrets = world.path("headers");
        fs::write(&secrets, "authorization: Bearer secret-of-file\n")?;
        private(&secrets)?;
        world.sink = format!(
            "otlp: {{endpoint: 'http://127.0.0.1:{}', protocol: {protocol}, \
             headers: {{x-tenant: mesh}}, headersFile: {}{more}}}",
            world.port,
            secrets.display()
        );
        Ok(world)
    }

    pub fn with_tls(protocol: &str) -> Result<Self> {
        use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
        let mut world = Self::empty(protocol)?;
        world.tls = true;
        for name in ["root", "other"] {
            let key = KeyPair::generate()?;
            let mut params = CertificateParams::new(vec![])?;
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let root = params.self_signed(&key)?;
            fs::write(world.path(&format!("{name}.pem")), root.pem())?;
            let issuer = Issuer::from_ca_cert_pem(&root.pem(), key)?;
            let key = KeyPair::generate()?;
            let made =
                CertificateParams::new(vec!["127.0.0.1".into()])?.signed_by(&key, &issuer)?;
            fs::write(world.path(&format!("{name}.tls.pem")), made.pem())?;
            fs::write(world.path(&format!("{name}.tls.key")), key.serialize_pem())?;
        }
        world.sink = format!(
            "otlp: {{endpoint: 'https://127.0.0.1:{}', protocol: {protocol}, roots: {}}}",
            world.port,
            world.path("root.pem").display()
        );
        Ok(world)
    }

    pub fn trust_another(&mut self) -> Result<()> {
        self.sink = self.sink.replace("root.pem", "other.pem");
        Ok(())
    }

    pub fn syslog() -> Result<Self> {
        let mut world = Self::empty("syslog")?;
        world.sink = format!("syslog: {{address: '127.0.0.1:{}'}}", world.port);
        Ok(world)
    }

    fn empty(protocol: &str) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        fs::create_dir(directory.path().join("audit"))?;
        // Free now, and nobody else asks for it.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let mut world = Self {
            directory,
            runtime: runtime.worker_threads(2).enable_all().build()?,
            senders: None,
            protocol: protocol.into(),
            port,
            sink: String::new(),
            tls: false,
            seq: 0,
            last: String::new(),
            segment: PathBuf::new(),
        };
        world.rotate();
        Ok(world)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn start(&mut self) -> Result<()> {
        let file = self.path("agent.yaml");
        let state = self.path("state");
        let text = format!(
            "state: {}\naudit:\n  sinks:\n  - {{name: one, from: beginning, {}}}\n",
            state.display(),
            self.sink
        );
        fs::write(&file, text)?;
        let config = Config::load(&file)?;
        let _here = self.runtime.enter();
        self.senders = Some(send::start(&config, &self.path("audit"), "node1")?);
        Ok(())
    }

    pub fn finish(&mut self) {
        if let Some(senders) = self.senders.take() {
            self.runtime
                .block_on(senders.finish(Duration::from_secs(10)));
        }
    }

    pub fn progress(&self) -> Progress {
        let senders = self.senders.as_ref().expect("started");
        senders.progress().remove(0)
    }

    /// Appends records as the agent does.
    pub fn write(&mut self, count: u64) -> Result<()> {
        let mut text = fs::read_to_string(&self.segment).unwrap_or_default();
        for _ in 0..count {
            self.seq += 1;
            let prev = match self.seq {
                1 => "0".repeat(64),
                _ => sha256(&self.last),
            };
            let rest = json!({"time": "2026-01-01T00:00:00.25Z", "node": "node1",
                "kind": "agent", "event": "started", "detail": "ein Wörtchen"})
            .to_string();
            self.last = format!("{{\"seq\":{},\"prev\":\"{prev}\",{}", self.seq, &rest[1..]);
            text.push_str(&self.last);
            text.push('\n');
        }
        // As a whole: a reader sees whole lines only, and appending is what it expects.
        use std::io::Write as _;
        let before = fs::metadata(&self.segment).map_or(0, |m| m.len()) as usize;
        let mut file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.segment)?;
        Ok(file.write_all(&text.as_bytes()[before..])?)
    }

    /// The next records go into another file.
    pub fn rotate(&mut self) {
        let name = format!("audit-{:020}.jsonl", self.seq + 1);
        self.segment = self.path("audit").join(name);
    }

    /// Removes all files but the newest ones.
    pub fn retain(&self, newest: usize) -> Result<()> {
        let mut all: Vec<_> = fs::read_dir(self.path("audit"))?
            .map(|entry| entry.map(|e| e.path()))
            .collect::<Result<_, _>>()?;
        all.sort();
        for path in all.iter().rev().skip(newest) {
            fs::remove_file(path)?;
        }
        Ok(())
    }

    pub fn mode(&self, mode: &str) -> Result<()> {
        Ok(fs::write(self.path("mode"), mode)?)
    }

    pub fn receiver(&self) -> Result<Running> {
        let source = include_str!("receiver.py");
        let mut command = python("receiver.py", source, self.directory.path())?;
        command.arg(&self.protocol).arg(self.port.to_string());
        command.arg(self.directory.path());
        if self.tls {
            command.args([self.path("root.tls.pem"), self.path("root.tls.key")]);
        }
        let log = self.path("receiver.log");
        let _before = fs::remove_file(&log);
        let running = Running::start(&mut command, log)?;
        running.says("listening")?;
        Ok(running)
    }

    pub fn received(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.path("records")).unwrap_or_default();
        let lines = text.lines();
        lines.filter_map(|l| serde_json::from_str(l).ok()).collect()
    }

    pub fn attempts(&self) -> Vec<f64> {
        let text = fs::read_to_string(self.path("attempts")).unwrap_or_default();
        text.lines().filter_map(|l| l.parse().ok()).collect()
    }

    pub fn rsyslog(&self) -> Result<Running> {
        let here = self.directory.path().display();
        let config = self.path("rsyslog.conf");
        let text = format!(
            "global(workDirectory=\"{here}\" maxMessageSize=\"64k\")\n\
             module(load=\"imtcp\")\n\
             template(name=\"fields\" type=\"string\" string=\"%pri%|%hostname%|%app-name%|\
             %msgid%|%structured-data%|%timereported:::date-rfc3339%|%msg%\\n\")\n\
             input(type=\"imtcp\" address=\"127.0.0.1\" port=\"{}\" ruleset=\"audit\")\n\
             ruleset(name=\"audit\") {{ action(type=\"omfile\" file=\"{here}/syslog\" template=\"fields\") }}\n",
            self.port
        );
        fs::write(&config, text)?;
        let mut command = Command::new("/usr/sbin/rsyslogd");
        command.arg("-n").arg("-f").arg(&config);
        command.arg("-i").arg(self.path("rsyslog.pid"));
        let running = Running::start(&mut command, self.path("rsyslog.log"))?;
        postern_tests::eventually("rsyslog listens", Duration::from_secs(10), || {
            std::net::TcpStream::connect(("127.0.0.1", self.port)).is_ok()
        })?;
        Ok(running)
    }

    pub fn syslog_lines(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("syslog")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// As a service is stopped: it ends by itself.
    pub fn stop(&self, mut running: Running) -> Result<()> {
        kill(
            Pid::from_raw(running.child.id().try_into()?),
            Signal::SIGTERM,
        )?;
        running.child.wait()?;
        Ok(())
    }
}

/// Debian's Python with the packages that `cargo xtask setup` installs.
pub fn python(name: &str, source: &str, directory: &Path) -> Result<Command> {
    let tools = std::env::var_os("POSTERN_TOOLS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools"),
        PathBuf::from,
    );
    let packages = tools.join("audit");
    if !packages.join("opentelemetry").is_dir() {
        bail!(
            "{} is missing: run `cargo xtask setup --tier lab`",
            packages.display()
        );
    }
    let script = directory.join(name);
    fs::write(&script, source).with_context(|| name.to_owned())?;
    let mut python = Command::new("/usr/bin/python3");
    python.env("PYTHONPATH", packages).arg(script);
    Ok(python)
}

/// The line of the log in an OTLP record.
pub fn line_of(record: &Value) -> &str {
    record["body"]["stringValue"].as_str().unwrap_or_default()
}

/// Of records that are of the log.
pub fn sequences(records: &[Value]) -> Vec<u64> {
    let seq = |r: &Value| serde_json::from_str::<Value>(line_of(r)).ok()?["seq"].as_u64();
    records.iter().filter_map(seq).collect()
}

pub fn sha256(text: &str) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, text.as_bytes());
    digest
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn private(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    Ok(fs::set_permissions(
        path,
        fs::Permissions::from_mode(0o600),
    )?)
}
