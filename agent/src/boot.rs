//! `postern guard --install` and `--remove`: what a host needs to guard its pods at every later boot,
//! for those that have the agent from a DaemonSet. Nothing of it runs before the next
//! boot; each file is replaced whole.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
};

/// The unit that runs the guard; names where it finds the program and its configuration.
const UNIT: &str = include_str!("../../config/systemd/postern-guard.service");
const UNIT_NAME: &str = "postern-guard.service";
const UNITS: &str = "etc/systemd/system";
const PROGRAM: &str = "opt/postern/postern";
const CONFIG: &str = "opt/postern/agent.yaml";

#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}")]
pub struct InstallError {
    path: PathBuf,
    source: io::Error,
}

/// Writes all that is needed below `host`; returns what it wrote. A configuration that is
/// not there is one of defaults.
pub fn install(host: &Path, config: &Path) -> Result<Vec<PathBuf>, InstallError> {
    let read = |path: &Path| fs::read(path).map_err(at(path));
    let units = host.join(UNITS);
    let mut files = vec![
        (
            host.join(PROGRAM),
            0o755,
            read(Path::new("/proc/self/exe"))?,
        ),
        (units.join(UNIT_NAME), 0o644, UNIT.into()),
    ];
    if config.exists() {
        files.push((host.join(CONFIG), 0o600, read(config)?));
    }
    let mut written = Vec::new();
    for (path, mode, content) in files {
        write(&path, mode, &content).map_err(at(&path))?;
        written.push(path);
    }
    for (directory, unit) in wanted(UNIT) {
        let link = units.join(format!("{unit}.{directory}")).join(UNIT_NAME);
        enable(&link).map_err(at(&link))?;
        written.push(link);
    }
    Ok(written)
}

/// Takes away what [`install`] wrote below `host`; returns what was there. The links
/// first: a boot at any time finds all that it is told to run.
pub fn remove(host: &Path) -> Result<Vec<PathBuf>, InstallError> {
    let units = host.join(UNITS);
    let links = wanted(UNIT).into_iter();
    let mut paths: Vec<PathBuf> = links
        .map(|(directory, unit)| units.join(format!("{unit}.{directory}")).join(UNIT_NAME))
        .collect();
    paths.extend([units.join(UNIT_NAME), host.join(PROGRAM), host.join(CONFIG)]);
    let mut removed = Vec::new();
    for path in paths {
        match fs::remove_file(&path) {
            Ok(()) => removed.push(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(at(&path)(error)),
        }
    }
    Ok(removed)
}

/// What `systemctl enable` would link the unit to: `requires` or `wants`, and of which.
fn wanted(unit: &str) -> Vec<(&'static str, &str)> {
    let lines = unit.lines().filter_map(|line| line.split_once('='));
    lines
        .filter_map(|(key, units)| match key {
            "RequiredBy" => Some(("requires", units)),
            "WantedBy" => Some(("wants", units)),
            _ => None,
        })
        .flat_map(|(directory, units)| units.split(' ').map(move |unit| (directory, unit)))
        .collect()
}

/// Beside and renamed, so that a boot at any time finds a whole one.
fn write(path: &Path, mode: u32, content: &[u8]) -> io::Result<()> {
    let directory = path.parent().expect("a file has a directory");
    fs::create_dir_all(directory)?;
    let partial = path.with_extension("partial");
    let _absent = fs::remove_file(&partial);
    fs::write(&partial, content)?;
    fs::set_permissions(&partial, fs::Permissions::from_mode(mode))?;
    fs::File::open(&partial)?.sync_all()?;
    fs::rename(&partial, path)
}

fn enable(link: &Path) -> io::Result<()> {
    let directory = link.parent().expect("a link has a directory");
    fs::create_dir_all(directory)?;
    let _absent = fs::remove_file(link);
    symlink(Path::new("..").join(UNIT_NAME), link)
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> InstallError {
    let path = path.to_owned();
    move |source| InstallError { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_gets_the_program_its_configuration_and_an_enabled_unit() {
        let tmp = tempfile::tempdir().expect("directory");
        let config = tmp.path().join("given.yaml");
        fs::write(&config, "trustDomain: example.org\n").expect("written");
        // Twice: an upgrade replaces what is there.
        for _ in 0..2 {
            let written = install(tmp.path(), &config).expect("installed");
            assert!(written.iter().all(|path| path.exists()), "{written:?}");
        }
        let at = |name: &str| tmp.path().join(name);
        let mode = |name: &str| fs::metadata(at(name)).expect(name).permissions().mode() & 0o777;
        assert_eq!(mode(PROGRAM), 0o755);
        assert_eq!(mode(CONFIG), 0o600);
        assert_eq!(
            fs::read_to_string(at(CONFIG)).expect("there"),
            "trustDomain: example.org\n"
        );
        for unit in ["kubelet", "k3s", "k3s-agent", "rke2-server", "rke2-agent"] {
            let link = at(&format!("{UNITS}/{unit}.service.requires/{UNIT_NAME}"));
            assert_eq!(fs::read_to_string(link).expect(unit), UNIT);
        }
        let others = at(&format!("{UNITS}/kubelet.service"));
        fs::write(&others, "").expect("written");
        let removed = remove(tmp.path()).expect("removed");
        assert_eq!(removed.len(), 8, "{removed:?}");
        assert!(removed.iter().all(|path| path.symlink_metadata().is_err()));
        assert!(others.exists(), "what is the host's own stays");
        assert_eq!(remove(tmp.path()).expect("nothing"), Vec::<PathBuf>::new());
    }

    #[test]
    fn the_unit_runs_what_is_installed() {
        let start = format!("ExecStart=/{PROGRAM} guard --config /{CONFIG}\n");
        assert!(UNIT.contains(&start));
        let before = UNIT.lines().find_map(|line| line.strip_prefix("Before="));
        let before: Vec<&str> = before.expect("an order").split(' ').collect();
        for (_directory, unit) in wanted(UNIT).iter().filter(|(how, _)| *how == "requires") {
            assert!(before.contains(unit), "{unit} may start before it");
        }
    }
}
