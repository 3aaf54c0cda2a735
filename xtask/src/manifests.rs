//! `config/kubernetes`: what is generated there is what the chart and the agent say,
//! and what the chart renders is judged by the schemas of two versions of Kubernetes.
//! helm and kubectl are their makers' own, from a package (`tests/manifests`).

mod rights;
mod server;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{
    cmd,
    profile::Profile,
    setup::{self, Tier, tools},
};

const CHART: &str = "config/kubernetes/chart/postern";
const CRDS: &str = "config/kubernetes/chart/postern/crds/postern.dev.yaml";
const KUSTOMIZE: &str = "config/kubernetes/kustomize";
const NAMESPACE: &str = "postern-system";
/// The oldest that the chart takes, and the newest that schemas are at hand of.
const VERSIONS: [&str; 2] = ["1.30", "1.37"];
/// What the chart renders: values, and the file that holds it.
const RENDERED: [(&str, &str); 6] = [
    ("base", "config/kubernetes/kustomize/base/postern.yaml"),
    (
        "removal",
        "config/kubernetes/kustomize/removal/postern.yaml",
    ),
    ("everything", "tests/manifests/golden/everything.yaml"),
    ("nothing", "tests/manifests/golden/nothing.yaml"),
    ("custom", "tests/manifests/golden/custom.yaml"),
    ("leaving", "tests/manifests/golden/leaving.yaml"),
];
/// Values that are refused, and what is said.
const REFUSED: [(&str, &str); 11] = [
    ("agnet.log.level=info", "agnet"),
    ("mesh.default=enabeld", "mesh/default"),
    ("mesh.discovery=some", "mesh/discovery"),
    ("agent.log.format=xml", "agent/log/format"),
    ("agent.drainSeconds=soon", "agent/drainSeconds"),
    ("agent.updateStrategy.maxSurge=0", "maxSurge"),
    ("agent.startupTaint=key=value:NoSchedule", "startupTaint"),
    ("agent.guard.enabled=perhaps", "guard/enabled"),
    ("image.digest=latest", "image/digest"),
    ("authority.replicas=2", "SQLite has one server"),
    ("authority.persistence.accessMode=All", "accessMode"),
];

/// The check of `lint`.
pub fn run() -> Result<()> {
    setup::ensure(&[Tier::Lint])?;
    let mut stale = Vec::new();
    for (path, text) in generated()? {
        let there = fs::read_to_string(cmd::root().join(&path)).unwrap_or_default();
        if there != text {
            stale.push(path);
        }
    }
    if !stale.is_empty() {
        bail!(
            "{}: run `cargo xtask manifests` and look at what changes",
            stale.join(", ")
        );
    }
    cmd::run_quietly(helm().args(["lint", "--strict", CHART]))?;
    for (value, expected) in REFUSED {
        refused(value, expected)?;
    }
    let out = cmd::target().join("manifests");
    fs::create_dir_all(&out).with_context(|| out.display().to_string())?;
    let mut files: Vec<PathBuf> = RENDERED.iter().map(|(_, path)| path.into()).collect();
    files.push(write(&out, "defaults", &render(None)?)?);
    for overlay in ["base", "removal", "overlays/example"] {
        let directory = format!("{KUSTOMIZE}/{overlay}");
        let text = cmd::output(kubectl().args(["kustomize", &directory]))?;
        files.push(write(&out, &overlay.replace('/', "-"), &text)?);
    }
    let all = objects(&files)?;
    configurations(&out, &all)?;
    rights::told(&all)?;
    judge(&files)?;
    server::takes(&out, &all)
}

/// The verb: writes what is generated.
pub fn update() -> Result<()> {
    setup::ensure(&[Tier::Lint])?;
    // The chart renders without them, and they without the chart.
    for (path, text) in generated()? {
        let path = cmd::root().join(path);
        if fs::read_to_string(&path).is_ok_and(|there| there == text) {
            continue;
        }
        println!("manifests: {}", path.display());
        fs::write(&path, text).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// All generated files and what has to be in them.
fn generated() -> Result<Vec<(String, String)>> {
    Profile::Quick.build()?;
    let crds = cmd::output(Command::new(postern()).arg("crds"))?;
    let mut files = vec![
        (CRDS.to_owned(), crds.clone()),
        (format!("{KUSTOMIZE}/base/crds.yaml"), crds),
    ];
    for (values, path) in RENDERED {
        files.push((path.to_owned(), render(Some(values))?));
    }
    Ok(files)
}

fn render(values: Option<&str>) -> Result<String> {
    let mut helm = helm();
    helm.args(["template", "postern", CHART, "--namespace", NAMESPACE]);
    helm.args(["--kube-version", VERSIONS[0]]);
    if let Some(values) = values {
        helm.arg("--values")
            .arg(format!("tests/manifests/values/{values}.yaml"));
    }
    let text = cmd::output(&mut helm)?;
    Ok(format!(
        "# Rendered from {CHART}; not to be edited.\n{text}"
    ))
}

fn refused(value: &str, expected: &str) -> Result<()> {
    let mut helm = helm();
    helm.args(["template", "postern", CHART, "--set", value]);
    let out = helm.output().context("helm")?;
    let said = String::from_utf8_lossy(&out.stderr);
    if out.status.success() || !said.contains(expected) {
        bail!("--set {value} should be refused with `{expected}`: {said}");
    }
    Ok(())
}

fn write(directory: &Path, name: &str, text: &str) -> Result<PathBuf> {
    let path = directory.join(format!("{name}.yaml"));
    fs::write(&path, text).with_context(|| path.display().to_string())?;
    Ok(path)
}

/// The objects of each file.
fn objects(files: &[PathBuf]) -> Result<Vec<(&Path, Vec<Value>)>> {
    let read = |file: &'_ PathBuf| -> Result<Vec<Value>> {
        let path = cmd::root().join(file);
        let text = fs::read_to_string(&path)?;
        let all: Vec<Value> = serde_saphyr::from_multiple(&text)?;
        Ok(all)
    };
    let all = files.iter().map(|file| {
        let all = read(file).with_context(|| file.display().to_string())?;
        Ok((file.as_path(), all))
    });
    all.collect()
}

/// The configurations in ConfigMaps and Secrets, as agent and authority read them.
fn configurations(out: &Path, all: &[(&Path, Vec<Value>)]) -> Result<()> {
    let mut checked = 0;
    for (file, objects) in all {
        for data in objects.iter().flat_map(|o| [&o["data"], &o["stringData"]]) {
            for (key, program) in [("agent.yaml", "config"), ("authority.yaml", "authority")] {
                let Some(text) = data[key].as_str() else {
                    continue;
                };
                let config = write(out, program, text)?;
                let mut check = Command::new(postern());
                check.args([program, "check", "--config"]).arg(&config);
                cmd::run_quietly(&mut check)
                    .with_context(|| format!("{key} of {}", file.display()))?;
                checked += 1;
            }
        }
    }
    if checked == 0 {
        bail!("no manifest has a configuration");
    }
    Ok(())
}

fn judge(files: &[PathBuf]) -> Result<()> {
    let mut python = cmd::in_root("/usr/bin/python3");
    python
        .arg("tests/manifests/check.py")
        .arg(tools().join("manifests"));
    python.args([CRDS, "tests/manifests/refused.yaml", "docs/kubernetes.md"]);
    let examples = cmd::root().join("config/policies");
    for entry in fs::read_dir(&examples).with_context(|| examples.display().to_string())? {
        python.arg(entry?.path());
    }
    python.arg("--").args(VERSIONS).arg("--").args(files);
    cmd::run(&mut python)
}

fn postern() -> PathBuf {
    cmd::target().join("quick/postern")
}

/// Where setup puts helm and kubectl.
pub fn programs() -> PathBuf {
    tools().join("kubernetes/programs")
}

fn helm() -> Command {
    let mut helm = cmd::in_root(programs().join("helm/helm"));
    // What it remembers is nobody else's.
    for (name, directory) in [
        ("HELM_CACHE_HOME", "cache"),
        ("HELM_CONFIG_HOME", "config"),
        ("HELM_DATA_HOME", "data"),
    ] {
        helm.env(name, programs().join(directory));
    }
    helm
}

fn kubectl() -> Command {
    let mut kubectl = cmd::in_root(programs().join("kubectl/kubectl"));
    kubectl.env("KUBECONFIG", "/dev/null");
    kubectl
}
