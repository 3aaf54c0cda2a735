//! Signing keys: their rotation in time, their files, and several replicas of them.

use std::{os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use serde_json::json;

use super::kit::{ISSUER, Kit, part};
use crate::{
    authority::{Change, Clock, Config, Keys, config::SigningAlgorithm},
    jwt::{Expected, KeySet, Token},
};

const DAY: u64 = 24 * 3_600;

fn open(directory: &Path, clock: &Clock) -> Keys {
    let config = Config {
        state: directory.to_owned(),
        ..Config::default()
    };
    Keys::open(&config, clock.clone()).expect("opens")
}

fn kid(keys: &Keys) -> String {
    let token = keys.sign("JWT", &json!({})).expect("signed");
    part(&token, 0)["kid"].as_str().expect("a kid").to_owned()
}

fn published(keys: &Keys) -> Vec<String> {
    let set = keys.jwks();
    let kids = set["keys"].as_array().expect("a list").iter();
    kids.map(|key| key["kid"].as_str().expect("a kid").to_owned())
        .collect()
}

#[test]
fn a_key_is_published_before_it_signs_and_after() {
    let directory = tempfile::tempdir().expect("directory");
    let clock = Clock::fixed(1_000_000);
    let keys = open(directory.path(), &clock);
    let first = kid(&keys);
    let made = Change::Published {
        kid: first.clone(),
        starts: 1_000_000,
    };
    assert_eq!(keys.tend().expect("tended"), [made]);
    clock.advance(Duration::from_secs(29 * DAY - 1));
    assert_eq!(keys.tend().expect("tended"), []);
    clock.advance(Duration::from_secs(1));
    let changes = keys.tend().expect("tended");
    let [
        Change::Published {
            kid: second,
            starts,
        },
    ] = &changes[..]
    else {
        panic!("{changes:?}");
    };
    assert_eq!(*starts, 1_000_000 + 30 * DAY);
    assert_eq!(kid(&keys), first);
    assert_eq!(published(&keys), [first.clone(), second.clone()]);
    clock.advance(Duration::from_secs(DAY));
    assert_eq!(&kid(&keys), second);
    assert_eq!(keys.tend().expect("tended"), []);
    clock.advance(Duration::from_secs(DAY + 60));
    assert_eq!(keys.tend().expect("tended"), []);
    clock.advance(Duration::from_secs(1));
    let withdrawn = Change::Withdrawn { kid: first };
    assert_eq!(keys.tend().expect("tended"), [withdrawn]);
    assert_eq!(published(&keys), std::slice::from_ref(second));
    let files = std::fs::read_dir(directory.path().join("keys")).expect("listed");
    let files: Vec<_> = files.map(|file| file.expect("a file")).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    let mode = files[0].metadata().expect("metadata").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn after_a_long_stop_the_next_key_is_published_first_all_the_same() {
    let directory = tempfile::tempdir().expect("directory");
    let clock = Clock::fixed(1_000_000);
    let first = kid(&open(directory.path(), &clock));
    clock.advance(Duration::from_secs(400 * DAY));
    let keys = open(directory.path(), &clock);
    let changes = keys.tend().expect("tended");
    assert!(
        matches!(changes[..], [Change::Published { .. }]),
        "{changes:?}"
    );
    assert_eq!(kid(&keys), first);
    clock.advance(Duration::from_secs(DAY));
    assert_ne!(kid(&keys), first);
}

#[test]
fn replicas_agree_and_a_rotation_by_hand_reaches_them() {
    let directory = tempfile::tempdir().expect("directory");
    let clock = Clock::fixed(1_000_000);
    let (one, two) = (
        open(directory.path(), &clock),
        open(directory.path(), &clock),
    );
    assert_eq!(kid(&one), kid(&two));
    clock.advance(Duration::from_secs(29 * DAY));
    one.tend().expect("tended");
    two.tend().expect("tended");
    assert_eq!(published(&one), published(&two));
    clock.advance(Duration::from_secs(5 * DAY));
    one.tend().expect("tended");
    two.tend().expect("tended");
    let old = kid(&two);
    open(directory.path(), &clock)
        .rotate(false)
        .expect("rotated");
    for keys in [&one, &two] {
        assert_eq!(keys.tend().expect("tended").len(), 1);
        assert_eq!(kid(keys), old);
    }
    clock.advance(Duration::from_secs(DAY));
    assert_ne!(kid(&one), old);
    assert_eq!(kid(&one), kid(&two));
    // At once: what others may have is worth nothing from now on.
    let stolen = kid(&one);
    open(directory.path(), &clock)
        .rotate(true)
        .expect("rotated");
    for keys in [&one, &two] {
        keys.tend().expect("tended");
        assert_eq!(published(keys), [kid(keys)]);
        assert!(!published(keys).contains(&stolen));
    }
}

#[test]
fn half_a_file_is_no_key_and_one_that_others_read_is_refused() {
    let directory = tempfile::tempdir().expect("directory");
    let clock = Clock::fixed(1_000_000);
    let first = kid(&open(directory.path(), &clock));
    let keys = directory.path().join("keys");
    std::fs::write(keys.join("0123456789abcdef.new"), [0x30]).expect("written");
    assert_eq!(kid(&open(directory.path(), &clock)), first);
    let path = keys.join("1000000.key");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("chmod");
    let config = Config {
        state: directory.path().to_owned(),
        ..Config::default()
    };
    let error = Keys::open(&config, clock)
        .err()
        .expect("refused")
        .to_string();
    assert!(
        error.contains("1000000.key") && error.contains("0600"),
        "{error}"
    );
}

#[tokio::test]
async fn tokens_outlive_the_change_of_keys_and_of_algorithms() {
    let kit = Kit::new().await;
    let before = kit.login(&["read"]).await.text("access_token");
    let (directory, clock) = (kit.directory.clone(), kit.clock.clone());
    let _closed = kit.close().await;
    let change = |config: &mut Config, _: &Path| config.keys.algorithm = SigningAlgorithm::EdDsa;
    let kit = Kit::at(directory, clock, change, None).await;
    kit.server.keys.rotate(false).expect("rotated");
    kit.server.tend_keys();
    assert!(kit.active("app", &before).await);
    let set = kit.get("/jwks.json").await.ok().body;
    assert_eq!(set["keys"].as_array().map(Vec::len), Some(2));
    // Whoever has this set verifies what is signed after the change.
    let set = KeySet::parse(set.to_string().as_bytes()).expect("a key set");
    kit.clock.advance(Duration::from_secs(DAY));
    let after = kit.login(&["openid"]).await;
    assert_eq!(part(&after.text("access_token"), 0)["alg"], "EdDSA");
    let expected = Expected {
        issuer: Some(ISSUER),
        audiences: &[],
        space_delimited: &[],
    };
    let text = after.text("access_token");
    let token = Token::parse(&text).expect("a token");
    token
        .verify(expected, Some(&set), kit.clock.now())
        .expect("verifies");
    let (_directory, log) = kit.close().await;
    assert!(log.contains(r#""event":"keys""#), "{log}");
}
