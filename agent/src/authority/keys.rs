//! Keys that tokens are signed with: files of mode 0600 in `keys/` of the state
//! directory, each named by the second since 1970 from which it signs. The names are
//! all that rotation needs to know:
//!
//! - the key with the latest start that is past signs;
//! - each next one is made, and so published, `overlap` before it starts;
//! - one is withdrawn, and its file removed, `overlap` after the next has started. No
//!   token lives longer than that ([`Config::check`]).
//!
//! A file appears whole, under a name that nobody had (`link`), so that a process that
//! dies leaves none half written, and replicas that share the directory agree on one.
//! With PostgreSQL, put the state directory on a volume that all replicas have: private
//! keys are not kept in the database, where whoever reads it could sign.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use aws_lc_rs::{digest, rand};
use serde_json::{Value, json};

use super::{Clock, Config, config::SigningAlgorithm};
use crate::jwt::{Algorithm, KeySet, LEEWAY, SigningKey, SigningKeyError};

#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    #[error("{path}: {message}")]
    File { path: PathBuf, message: String },
    #[error(transparent)]
    Key(#[from] SigningKeyError),
}

pub struct Keys {
    directory: PathBuf,
    algorithm: Algorithm,
    rotate: u64,
    overlap: u64,
    clock: Clock,
    held: ArcSwap<Held>,
    /// The first key was made just now, and nobody was told.
    untold: AtomicBool,
}

/// By the second from which each signs; never empty.
type Ring = BTreeMap<u64, Arc<SigningKey>>;

struct Held {
    ring: Ring,
    /// The same keys, to verify with.
    set: Arc<KeySet>,
}

/// What has changed, for the audit log: a key id, never a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It signs from this second on.
    Published {
        kid: String,
        starts: u64,
    },
    Withdrawn {
        kid: String,
    },
}

impl Keys {
    /// Opens the directory; the first key is made where there is none, and signs at once.
    pub fn open(config: &Config, clock: Clock) -> Result<Self, KeysError> {
        let directory = config.state.join("keys");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(|e| failed(&directory, e))?;
        let algorithm = match config.keys.algorithm {
            SigningAlgorithm::Es256 => Algorithm::Es256,
            SigningAlgorithm::EdDsa => Algorithm::EdDsa,
        };
        let mut ring = read(&directory, &Ring::new())?;
        let untold = ring.is_empty();
        if untold {
            make(&directory, algorithm, clock.seconds())?;
            ring = read(&directory, &ring)?;
        }
        Ok(Self {
            directory,
            algorithm,
            rotate: config.keys.rotate.0.as_secs(),
            overlap: config.keys.overlap.0.as_secs(),
            clock,
            held: ArcSwap::from_pointee(Held::new(ring)),
            untold: AtomicBool::new(untold),
        })
    }

    /// A token of these claims by the key that signs now.
    pub fn sign(&self, typ: &str, claims: &Value) -> Result<String, SigningKeyError> {
        self.current().sign(typ, claims)
    }

    /// What the key that signs now signs with.
    pub fn algorithm(&self) -> Algorithm {
        self.current().algorithm()
    }

    /// The public keys (RFC 7517 5).
    pub fn jwks(&self) -> Value {
        let held = self.held.load();
        let keys: Vec<_> = held.ring.values().map(|key| key.jwk()).collect();
        json!({"keys": keys})
    }

    /// The same, to verify our own tokens with.
    pub fn set(&self) -> Arc<KeySet> {
        self.held.load().set.clone()
    }

    /// How long others may keep the key set: short enough that a next key is known
    /// long before it signs.
    pub fn cache(&self) -> Duration {
        Duration::from_secs((self.overlap / 4).clamp(1, 3_600))
    }

    /// Does what is due: makes the next key, withdraws old ones, and takes in what other
    /// replicas or `postern authority keys rotate` did.
    pub fn tend(&self) -> Result<Vec<Change>, KeysError> {
        let now = self.clock.seconds();
        let mut ring = read(&self.directory, &self.held.load().ring)?;
        let newest = ring.keys().next_back().copied().unwrap_or(now);
        if ring.is_empty() || newest + self.rotate <= now + self.overlap {
            // After a long stop the next one is late; it is published first all the same.
            let starts = (newest + self.rotate).max(now + self.overlap);
            make(&self.directory, self.algorithm, starts)?;
            ring = read(&self.directory, &ring)?;
        }
        let starts: Vec<u64> = ring.keys().copied().collect();
        for pair in starts.windows(2) {
            if pair[1] + self.overlap + LEEWAY < now {
                let path = self.directory.join(file_name(pair[0]));
                match fs::remove_file(&path) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(&path, e)),
                    _ => ring.remove(&pair[0]),
                };
            }
        }
        let before = self.held.load_full();
        let kids = |ring: &Ring| -> Vec<String> {
            ring.values().map(|key| key.kid().to_owned()).collect()
        };
        let (mut old, new) = (kids(&before.ring), kids(&ring));
        if self.untold.swap(false, Ordering::Relaxed) {
            old.clear();
        }
        let published = ring
            .iter()
            .filter(|(_, key)| !old.iter().any(|kid| kid == key.kid()));
        let published = published.map(|(starts, key)| Change::Published {
            kid: key.kid().to_owned(),
            starts: *starts,
        });
        let withdrawn = old.iter().filter(|kid| !new.contains(kid));
        let withdrawn = withdrawn.map(|kid| Change::Withdrawn { kid: kid.clone() });
        let changes: Vec<_> = published.chain(withdrawn).collect();
        if !changes.is_empty() {
            self.held.store(Arc::new(Held::new(ring)));
        }
        Ok(changes)
    }

    /// Makes a next key ahead of its time; a server that runs takes it in by itself. It
    /// signs once it has been published for `overlap`, or `at_once`, where the old ones
    /// may be known to others: they are withdrawn, and every token of theirs is void.
    pub fn rotate(&self, at_once: bool) -> Result<(), KeysError> {
        let now = self.clock.seconds();
        if !at_once {
            return make(&self.directory, self.algorithm, now + self.overlap);
        }
        let old = read(&self.directory, &Ring::new())?;
        // A free name: the second may be taken.
        let starts = (now.saturating_sub(old.len() as u64 + 1)..=now)
            .rev()
            .find(|second| !old.contains_key(second))
            .expect("more seconds than keys");
        make(&self.directory, self.algorithm, starts)?;
        for second in old.keys() {
            let path = self.directory.join(file_name(*second));
            fs::remove_file(&path).map_err(|e| failed(&path, e))?;
        }
        Ok(())
    }

    fn current(&self) -> Arc<SigningKey> {
        let held = self.held.load();
        let now = self.clock.seconds();
        let current = held.ring.range(..=now).next_back();
        // A clock that was set back: the first signs, though it is early.
        let (_starts, key) = current
            .or_else(|| held.ring.first_key_value())
            .expect("never empty");
        key.clone()
    }
}

impl Held {
    fn new(ring: Ring) -> Self {
        let keys: Vec<_> = ring.values().map(|key| key.jwk()).collect();
        let text = json!({"keys": keys}).to_string();
        let set = KeySet::parse(text.as_bytes()).expect("our own public keys");
        Self {
            ring,
            set: Arc::new(set),
        }
    }
}

fn file_name(starts: u64) -> String {
    format!("{starts}.key")
}

/// The keys of the directory. Those that are known already are not read anew.
fn read(directory: &Path, known: &Ring) -> Result<Ring, KeysError> {
    let mut ring = Ring::new();
    let wrong = |e| failed(directory, e);
    for entry in fs::read_dir(directory).map_err(wrong)? {
        let name = entry.map_err(wrong)?.file_name();
        let starts = name.to_str().and_then(|name| name.strip_suffix(".key"));
        let Some(starts) = starts.and_then(|starts| starts.parse().ok()) else {
            continue;
        };
        let key = match known.get(&starts) {
            Some(key) => key.clone(),
            None => {
                let path = directory.join(&name);
                let der = match crate::oauth::private_file(&path) {
                    Ok(der) => der,
                    // Another replica withdrew it since it was listed.
                    Err(_) if !path.exists() => continue,
                    Err(e) => return Err(failed(&path, io::Error::other(e.to_string()))),
                };
                let key = SigningKey::from_pkcs8(&der)
                    .map_err(|e| failed(&path, io::Error::other(e.to_string())))?;
                Arc::new(key)
            }
        };
        ring.insert(starts, key);
    }
    Ok(ring)
}

/// Makes a key, unless there is one that starts then.
fn make(directory: &Path, algorithm: Algorithm, starts: u64) -> Result<(), KeysError> {
    let key = SigningKey::generate(algorithm)?;
    let der = key.to_pkcs8()?;
    let mut id = [0; 8];
    rand::fill(&mut id).map_err(|_| SigningKeyError::Randomness)?;
    let partial = directory.join(format!("{:016x}.new", u64::from_ne_bytes(id)));
    let path = directory.join(file_name(starts));
    let written = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&partial)
        .and_then(|mut file| file.write_all(&der).and_then(|()| file.sync_all()))
        .and_then(|()| match fs::hard_link(&partial, &path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        });
    let _it_may_not_be_there = fs::remove_file(&partial);
    written
        .and_then(|()| fs::File::open(directory)?.sync_all())
        .map_err(|e| failed(&path, e))
}

fn failed(path: &Path, error: io::Error) -> KeysError {
    KeysError::File {
        path: path.to_owned(),
        message: error.to_string(),
    }
}

/// SHA-256, as lower-case hexadecimal: how the store knows what it must not know.
pub fn hash(secret: &str) -> String {
    use std::fmt::Write as _;
    let digest = digest::digest(&digest::SHA256, secret.as_bytes());
    digest
        .as_ref()
        .iter()
        .fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").expect("memory");
            text
        })
}
