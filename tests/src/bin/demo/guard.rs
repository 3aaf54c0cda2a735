//! Runs the program proper as a child and clears up after it, whatever became of
//! it: Ctrl-C, another signal, a panic, or no end in time.

use std::{
    os::unix::{
        fs::MetadataExt as _,
        process::{CommandExt as _, ExitStatusExt as _},
    },
    process::{Child, Command, ExitCode, ExitStatus, Stdio},
    sync::atomic::{AtomicI32, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    errno::Errno,
    sys::{
        prctl,
        signal::{self, SaFlags, SigAction, SigHandler, SigSet, Signal},
        wait::{WaitPidFlag, waitpid},
    },
    unistd::{Pid, getppid},
};

/// Marks the child; its value is the process that waits for it, so that programs
/// which merely inherit the variable are not taken for it.
const MARK: &str = "POSTERN_LAB_PARENT";
/// How often the parent looks for a signal or for the child's end.
const PULSE: Duration = Duration::from_millis(20);
/// How long killed processes may take to vanish.
const FAREWELL: Duration = Duration::from_secs(5);

/// The signal that asked for the end; 0 while none did.
static ASKED: AtomicI32 = AtomicI32::new(0);

extern "C" fn note(signal: i32) {
    ASKED.store(signal, Ordering::Relaxed);
}

/// Runs `body` in a child for at most `limit`, then removes what it left.
pub fn run(limit: Duration, body: impl FnOnce() -> Result<()>) -> ExitCode {
    let is_child = std::env::var(MARK).is_ok_and(|pid| pid == getppid().to_string());
    let result = if is_child {
        as_child(body)
    } else {
        as_parent(limit)
    };
    result.unwrap_or_else(|error| {
        eprintln!("{error:#}");
        ExitCode::FAILURE
    })
}

fn as_child(body: impl FnOnce() -> Result<()>) -> Result<ExitCode> {
    // Nobody would clear up after a child without its parent.
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    body().map(|()| ExitCode::SUCCESS)
}

fn as_parent(limit: Duration) -> Result<ExitCode> {
    let owner = std::fs::metadata("/proc/self")?.uid();
    ensure!(
        owner == 0,
        "this makes network namespaces and loads kernel programs: run it as root"
    );
    catch_signals()?;
    // What the child leaves running becomes ours to wait for.
    prctl::set_child_subreaper(true)?;
    let mut child = spawn()?;
    let pid = child.id();
    let end = wait(&mut child, limit);
    // A group of its own, so that no half-done `ip` is left at work by a Ctrl-C.
    let _none_left = signal::killpg(Pid::from_raw(pid as i32), Signal::SIGKILL);
    let _reaped = child.wait();
    reap();
    postern_tests::sweep(pid);
    Ok(code(end?))
}

fn catch_signals() -> Result<()> {
    let action = SigAction::new(
        SigHandler::Handler(note),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    for caught in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler stores to an atomic and does nothing else.
        unsafe { signal::sigaction(caught, &action) }?;
    }
    Ok(())
}

fn spawn() -> Result<Child> {
    Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(MARK, std::process::id().to_string())
        // The lab's files must be where the sweep looks for them.
        .env_remove("TMPDIR")
        .stdin(Stdio::null())
        .process_group(0)
        .spawn()
        .context("cannot start the child")
}

/// The child's end, or `None` if it was told to end before that.
fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if ASKED.load(Ordering::Relaxed) != 0 {
            eprintln!("\nstopped; clearing up");
            return Ok(None);
        }
        if Instant::now() > deadline {
            eprintln!(
                "\nnot done after {} s: stopped; clearing up",
                limit.as_secs()
            );
            return Ok(None);
        }
        thread::sleep(PULSE);
    }
}

/// Waits until no descendant is left, so that the ground may be removed.
fn reap() {
    let deadline = Instant::now() + FAREWELL;
    while Instant::now() < deadline {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Err(Errno::ECHILD) => return,
            Ok(status) if status.pid().is_some() => {}
            _ => thread::sleep(PULSE),
        }
    }
}

/// As a shell would tell it: 128 and the signal, where there was one.
fn code(end: Option<ExitStatus>) -> ExitCode {
    let asked = ASKED.load(Ordering::Relaxed);
    let number = match end {
        Some(status) => status
            .code()
            .or_else(|| status.signal().map(|signal| 128 + signal)),
        None if asked != 0 => Some(128 + asked),
        None => None,
    };
    number
        .and_then(|number| u8::try_from(number).ok())
        .map_or(ExitCode::FAILURE, ExitCode::from)
}
