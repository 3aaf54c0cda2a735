use super::*;

const YAML: &str = "
node:
  name: a
  limits: { pods: 1 }
upstreams:
  - host: b
tls.ciphers: []
";

/// What is wrong in `text`, in a made-up repository.
fn wrong_in(name: &str, text: &str) -> Vec<String> {
    let flags = BTreeSet::from(["--tier".to_owned()]);
    let verbs = Verbs::from([
        ("setup".to_owned(), flags),
        ("lint".to_owned(), BTreeSet::new()),
    ]);
    let facts = Facts {
        verbs: &verbs,
        subcommand: &|name| name == "agent",
        exists: &|path| ["agent/src", "agent/src/main.rs", "README.md"].contains(&path),
        keys: keys(YAML).expect("the keys"),
    };
    check(name, text, &facts)
}

fn fine(text: &str) {
    assert_eq!(wrong_in("README.md", text), [""; 0], "{text}");
}

fn wrong(text: &str) {
    assert_eq!(wrong_in("README.md", text).len(), 1, "{text}");
}

#[test]
fn verbs_have_to_exist() {
    fine("Run `cargo xtask setup`, then `sudo cargo xtask lint`.");
    wrong("Run `cargo xtask setupp`.");
    wrong("```sh\ncargo xtask lint && RUST_LOG=debug cargo xtask fly\n```");
    fine("```yaml\ncargo xtask fly\n```");
}

#[test]
fn flags_have_to_exist() {
    fine("`cargo xtask setup --tier=lab`");
    fine("`cargo xtask setup -- --anything`");
    fine("```\n$ cargo xtask setup --tier lab  # not --all\n```");
    wrong("`cargo xtask lint --tier lab`");
}

#[test]
fn subcommands_have_to_exist() {
    fine("`postern agent --config x`, `postern --help`, `postern`");
    fine("`kubectl -n postern get pods`");
    wrong("`postern agnet`");
    wrong("```console\n$ sudo target/release/postern fly\n```");
}

#[test]
fn paths_have_to_exist() {
    fine("`agent/src/main.rs`, `agent/src/main.rs:12`, `agent/src/*.rs`, `/etc/agent/x`");
    wrong("`agent/src/gone.rs`");
    wrong("`tests/*.rs`");
    wrong("`NOTES.md`");
}

#[test]
fn links_have_to_lead_somewhere() {
    fine("[a](README.md#any) [b](https://example.org/x) [c](mailto:a@example.org)");
    fine("# The Lab\n[a](#the-lab)");
    wrong("[a](GONE.md)");
    wrong("# The Lab\n[a](#lab)");
}

#[test]
fn keys_have_to_exist() {
    fine("`node.name`, `node.limits.pods`, `upstreams.host`, `config: tls.ciphers`");
    fine("`example.org`, `node.yaml`, `other.key`");
    wrong("`node.nmae`");
    wrong("`config: other.key`");
}

#[test]
fn the_table_of_keys_is_held_to_the_file() {
    fine("## Configure\n| Key | Meaning |\n|---|---|\n| `node.name` | as `other` |");
    wrong("## Configure\n| `other.key` | meaning |");
    fine("## Other\n| `other.key` | meaning |");
}

#[test]
fn a_file_without_keys_is_no_configuration() {
    assert!(keys("").is_err());
    assert!(keys("- 1\n").is_err());
    assert!(keys("a: [").is_err());
}

#[test]
fn the_short_document_stays_short() {
    let long = "line\n".repeat(SHORT.1);
    assert_eq!(wrong_in(SHORT.0, &long).len(), 1);
    assert_eq!(wrong_in("README.md", &long).len(), 0);
    assert_eq!(wrong_in(SHORT.0, &long[5..]).len(), 0);
}
