//! `postern authority user ...`: people in the store, by whoever may read its file.

use std::{
    fs::{DirBuilder, File},
    io::{BufRead as _, BufReader, IsTerminal as _, Read as _, Write as _},
    os::unix::fs::DirBuilderExt as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};
use zeroize::Zeroizing;

use super::{
    super::{Config, Store, User},
    login::LONGEST_NAME,
    password, random,
};
use crate::{
    app::Misconfigured,
    audit::{
        Audit, AuthorityRecord, Record,
        chain::{OpenError, Settings, Sync},
    },
};

/// Longest name and e-mail address, in bytes.
const LONGEST_TEXT: usize = 256;

/// Passwords are asked for on the terminal, or read from standard input: one line.
#[derive(clap::Subcommand)]
pub enum Change {
    /// Add a person; prints the `sub` of the person's tokens.
    Add {
        username: String,
        /// The name that applications show.
        #[arg(long)]
        name: Option<String>,
        #[arg(long)]
        email: Option<String>,
    },
    /// List all, those of the configuration file too.
    List,
    /// Let a person log in no more, and end the sessions.
    Disable { username: String },
    /// Let a person log in again.
    Enable { username: String },
    /// Set a new password, and end the sessions and a lockout.
    Password { username: String },
    /// Print the hash of a password, for the configuration file.
    Hash,
}

/// Makes the change; what is to be printed, by line.
pub async fn run(config: &Config, change: Change) -> Result<Vec<String>> {
    let mut directory = DirBuilder::new();
    directory
        .recursive(true)
        .mode(0o700)
        .create(&config.state)
        .with_context(|| config.state.display().to_string())?;
    let store = Store::open(config).await;
    let store = store.map_err(|e| Misconfigured(e.to_string()))?;
    let (subject, what) = match change {
        Change::List => return list(config, &store).await,
        Change::Hash => return Ok(vec![hash()?]),
        Change::Add {
            username,
            name,
            email,
        } => {
            let user = User {
                id: random::<16>()?,
                username,
                name,
                email,
                disabled: false,
            };
            check(config, &user)?;
            // Before the password is asked for; the store has the last word.
            let taken = store.account(&user.username).await?.is_some();
            ensure!(!taken, "`{}` is there already", user.username);
            let added = store.add_user(&user, &hash()?).await?;
            ensure!(added, "`{}` is there already", user.username);
            (user.id, "added")
        }
        Change::Disable { username } => {
            let id = stored(config, &store, &username).await?;
            store.set_disabled(&id, true).await?;
            (id, "disabled")
        }
        Change::Enable { username } => {
            let id = stored(config, &store, &username).await?;
            store.set_disabled(&id, false).await?;
            (id, "enabled")
        }
        Change::Password { username } => {
            let id = stored(config, &store, &username).await?;
            store.set_password(&id, &hash()?).await?;
            (id, "has a new password")
        }
    };
    record(config, &subject, what)?;
    Ok(vec![subject])
}

/// Asks for a password and hashes it.
pub fn hash() -> Result<String> {
    let password = ask()?;
    password::check_length(&password)?;
    Ok(password::hash(password.as_bytes())?)
}

async fn list(config: &Config, store: &Store) -> Result<Vec<String>> {
    let own = config.users.iter().map(super::user_of);
    let own = own.map(|user| (user, "configuration"));
    let stored = store.users().await?;
    let stored = stored.into_iter().map(|user| (user, "store"));
    let lines = own.chain(stored).map(|(user, place)| {
        let state = if user.disabled { "disabled" } else { "enabled" };
        let email = user.email.unwrap_or_default();
        let name = user.name.unwrap_or_default();
        // One column each, for `cut`.
        format!(
            "{}\t{}\t{state}\t{place}\t{email}\t{name}",
            user.username, user.id
        )
    });
    Ok(lines.collect())
}

fn check(config: &Config, user: &User) -> Result<()> {
    let plain = |text: &str| !text.is_empty() && !text.contains(char::is_control);
    let name = &user.username;
    ensure!(
        plain(name) && name.len() <= LONGEST_NAME && name.trim() == name,
        "the username must have 1 to {LONGEST_NAME} bytes, no control characters, and no \
         space at its ends"
    );
    for text in [&user.name, &user.email].into_iter().flatten() {
        ensure!(
            plain(text) && text.len() <= LONGEST_TEXT,
            "name and e-mail address must have 1 to {LONGEST_TEXT} bytes and no control characters"
        );
    }
    let theirs = config.users.iter().any(|u| u.username == *name);
    ensure!(!theirs, "`{name}` is in the configuration file already");
    Ok(())
}

async fn stored(config: &Config, store: &Store, username: &str) -> Result<String> {
    if config.users.iter().any(|u| u.username == username) {
        bail!("`{username}` is in the configuration file: change it there");
    }
    let account = store.account(username).await?;
    let account = account.with_context(|| format!("there is no user `{username}`"))?;
    Ok(account.user.id)
}

/// In a log of its own beside the server's, which has one writer: the server, if it runs.
fn record(config: &Config, subject: &str, what: &str) -> Result<()> {
    const PATIENCE: Duration = Duration::from_secs(5);
    let server = config.audit_log();
    let own = Settings {
        directory: server.directory.with_added_extension("commands"),
        ledger: server.ledger.with_added_extension("commands"),
        sync: Sync::Always,
        ..server
    };
    let began = Instant::now();
    let (audit, writer) = loop {
        match Audit::open("authority", own.clone(), 1) {
            // Another command is about to end.
            Err(OpenError::Busy(_)) if began.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(20));
            }
            opened => break opened.context("the audit log")?,
        }
    };
    audit.record(Record::Authority(Box::new(AuthorityRecord {
        event: "user",
        subject: Some(subject.to_owned()),
        reason: what.to_owned(),
        ..AuthorityRecord::default()
    })));
    audit.close(&writer, PATIENCE);
    if !writer.is_finished() || audit.written() != 1 {
        bail!("the audit log could not be written");
    }
    Ok(())
}

/// One line from the terminal, unseen and twice, or from standard input.
fn ask() -> Result<Zeroizing<String>> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return line(&mut stdin.lock());
    }
    // The terminal itself: standard output may be a file.
    let terminal = File::options().read(true).write(true).open("/dev/tty");
    let terminal = terminal.context("/dev/tty")?;
    let password = unseen(&terminal, "Password: ")?;
    ensure!(
        unseen(&terminal, "Again: ")? == password,
        "the two passwords are not the same"
    );
    Ok(password)
}

fn unseen(terminal: &File, prompt: &str) -> Result<Zeroizing<String>> {
    let before = tcgetattr(terminal)?;
    let mut quiet = before.clone();
    quiet.local_flags.remove(LocalFlags::ECHO);
    write!(&*terminal, "{prompt}")?;
    tcsetattr(terminal, SetArg::TCSAFLUSH, &quiet)?;
    let read = line(&mut BufReader::new(terminal));
    tcsetattr(terminal, SetArg::TCSAFLUSH, &before)?;
    writeln!(&*terminal)?;
    read
}

fn line(from: &mut dyn std::io::BufRead) -> Result<Zeroizing<String>> {
    let mut line = Zeroizing::new(String::with_capacity(password::LONGEST + 2));
    let mut from = from.take(password::LONGEST as u64 + 2);
    from.read_line(&mut line).context("no password")?;
    let end = line.trim_end_matches(['\r', '\n']).len();
    line.truncate(end);
    Ok(line)
}
