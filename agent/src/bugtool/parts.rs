//! What goes into the archive. Files that hold secrets are not among it.

use std::{
    fmt::Write as _,
    fs,
    io::{Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{MAX_RECORDS, Wanted, redact};
use crate::{
    audit::ask::{Filter, tail},
    check::{self, Scope},
    config::Config,
    doctor, telemetry,
};

pub type Gather = Box<dyn FnOnce() -> String + Send>;

/// Lines of a listing.
const MOST_LINES: usize = 10_000;
/// Of the agent's log, from its end.
const MAX_LOG: u64 = 4 << 20;

pub fn all(config: &Config, wanted: &Wanted) -> Vec<(&'static str, Gather)> {
    let with = |gather: fn(&Config) -> String| -> Gather {
        let config = config.clone();
        Box::new(move || gather(&config))
    };
    let mut parts: Vec<(&'static str, Gather)> = vec![
        ("version.txt", Box::new(version)),
        ("config.json", with(configuration)),
        ("status.json", with(|c| asked(c, "/status"))),
        ("certificates.json", with(|c| asked(c, "/api/certificates"))),
        ("metrics.txt", with(metrics)),
        ("doctor.txt", with(examined)),
        ("install-check.txt", with(checked)),
        ("bpf.txt", with(bpf)),
        ("cgroups.txt", Box::new(cgroups)),
        ("mounts.txt", Box::new(mounts)),
        ("objects.txt", with(objects)),
        ("policies.json", with(|c| asked(c, "/policies"))),
    ];
    if let Some(path) = wanted.log.clone() {
        parts.push(("agent.log", Box::new(move || log(&path))));
    }
    if wanted.audit > 0 {
        let count = wanted.audit.min(MAX_RECORDS);
        let directory = config.audit.directory(&config.state);
        parts.push(("audit.jsonl", Box::new(move || records(&directory, count))));
    }
    parts
}

fn version() -> String {
    let kernel = fs::read_to_string("/proc/version").unwrap_or_default();
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    format!("postern {}\n{kernel}up {uptime}", env!("CARGO_PKG_VERSION"))
}

fn configuration(config: &Config) -> String {
    let mut value = serde_json::to_value(config).unwrap_or_default();
    redact::document(&mut value);
    serde_json::to_string_pretty(&value).unwrap_or_default()
}

fn asked(config: &Config, path: &str) -> String {
    telemetry::ask(&config.listen.admin, path).unwrap_or_else(|e| format!("no answer: {e}\n"))
}

/// They hold how full the maps are, too.
fn metrics(config: &Config) -> String {
    let listen = crate::config::Admin {
        address: config.listen.metrics,
        guard: None,
    };
    telemetry::ask(&listen, "/metrics").unwrap_or_else(|e| format!("no answer: {e}\n"))
}

fn examined(config: &Config) -> String {
    let mut text = String::new();
    for finding in doctor::examine(config) {
        let mark = match (finding.ok, finding.required) {
            (true, _) => "ok    ",
            (false, true) => "FAIL  ",
            (false, false) => "absent",
        };
        let _infallible = writeln!(text, "{mark}  {}", finding.what);
    }
    text
}

fn checked(config: &Config) -> String {
    let scope = Scope {
        kubeconfig: None,
        service_account: None,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(check::run(config, &scope)).to_string(),
        Err(error) => format!("{error}\n"),
    }
}

/// Programs of the kernel, and what this agent has pinned.
fn bpf(config: &Config) -> String {
    let mut text = String::from("programs: id, name, type, memory\n");
    for program in aya::programs::loaded_programs().take(MOST_LINES) {
        let _infallible = match program {
            Ok(program) => writeln!(
                text,
                "{} {} {:?} {}",
                program.id(),
                program.name_as_str().unwrap_or("?"),
                program.program_type(),
                program.memory_locked().unwrap_or(0),
            ),
            Err(error) => writeln!(text, "{error}"),
        };
    }
    text.push_str("\npins (programs, links, maps)\n");
    list(&config.kernel.pin, 3, &mut text);
    text
}

fn cgroups() -> String {
    let mut text = String::new();
    match crate::kernel::cgroup_mounts() {
        Ok(mounts) => {
            for mount in mounts {
                let version = if mount.v2 { "v2" } else { "v1" };
                let _infallible = writeln!(text, "{version} {}", mount.path.display());
                directories(&mount.path, 6, &mut text);
            }
        }
        Err(error) => text = format!("/proc/self/mounts: {error}\n"),
    }
    text
}

/// Without options, which may be passwords of network file systems.
fn mounts() -> String {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let lines = mounts.lines().take(MOST_LINES).map(|line| {
        let mut fields = line.split(' ');
        let source = fields.next().unwrap_or_default();
        let rest: Vec<_> = fields.take(2).collect();
        format!("{source} {}\n", rest.join(" "))
    });
    lines.collect()
}

/// Kind and name of every object in the directories, and nothing of what they say.
fn objects(config: &Config) -> String {
    let mut text = String::new();
    for directory in [&config.policies.directory, &config.workloads.directory] {
        let _infallible = writeln!(text, "{}", directory.display());
        let mut files: Vec<PathBuf> = fs::read_dir(directory)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .collect();
        files.sort();
        for path in files.into_iter().take(MOST_LINES) {
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let content = fs::read_to_string(&path).unwrap_or_default();
            let names = serde_saphyr::from_multiple::<Value>(&content);
            for object in names.unwrap_or_default() {
                let at = |pointer| {
                    object
                        .pointer(pointer)
                        .and_then(Value::as_str)
                        .unwrap_or("-")
                };
                let _infallible = writeln!(
                    text,
                    "  {name}: {} {}/{}",
                    at("/kind"),
                    at("/metadata/namespace"),
                    at("/metadata/name"),
                );
            }
        }
    }
    text
}

fn log(path: &Path) -> String {
    let read = || {
        let mut file = fs::File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(MAX_LOG)))?;
        let mut bytes = Vec::new();
        file.take(MAX_LOG).read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().unwrap_or_else(|e| format!("{}: {e}\n", path.display()))
}

fn records(directory: &Path, count: usize) -> String {
    match tail(directory, &Filter::default(), count) {
        Ok(tail) => {
            let lines = tail.last.into_iter().map(|entry| {
                let mut value = entry.value;
                redact::document(&mut value);
                format!("{value}\n")
            });
            lines.collect()
        }
        Err(error) => format!("{}: {error}\n", directory.display()),
    }
}

fn list(directory: &Path, depth: usize, text: &mut String) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if text.len() > MOST_LINES * 80 {
            return;
        }
        let path = entry.path();
        let _infallible = writeln!(text, "{}", path.display());
        if depth > 0 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            list(&path, depth - 1, text);
        }
    }
}

fn directories(directory: &Path, depth: usize, text: &mut String) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if depth == 0 || text.len() > MOST_LINES * 80 {
            return;
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let _infallible = writeln!(text, "{}", entry.path().display());
            directories(&entry.path(), depth - 1, text);
        }
    }
}
