//! Policies mean to Postern what they mean to Envoy: the same policies and requests
//! are given to both. Where Postern's answer is another on purpose, the case says
//! why, and the test fails when that is no longer so.

mod cases;
mod client;
mod envoy;
mod postern;
mod tokens;
mod translate;

use std::{collections::BTreeSet, path::Path};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Map, Value};

use cases::{Case, Differs, Set};
use client::{Answer, Pki};
use envoy::Envoy;
use postern::Verdict;
use tokens::Keys;

/// Fewer requests than these say too little.
const REQUESTS: usize = 120;

/// Headers that one hop adds or removes, whatever policy says.
const OF_A_HOP: &[&str] = &["host", "connection", "content-length", "x-forwarded-proto"];

#[test]
fn envoy_and_postern_answer_alike() -> Result<()> {
    let keys = Keys::generate()?;
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("envoy/cases");
    let sets = cases::load(&directory, &keys)?;
    let pki = Pki::new(&sets)?;
    let envoy = Envoy::start(&sets, &pki)?;

    let mut wrong = Vec::new();
    let (mut asked, mut explained) = (0, 0);
    for set in &sets {
        let address = envoy.address(set)?;
        let verdicts = postern::verdicts(set)?;
        for (index, (case, verdict)) in set.requests.iter().zip(&verdicts).enumerate() {
            let answer = pki.ask(address, case);
            let answer = answer.with_context(|| format!("{} {}", set.name, case.title(index)))?;
            asked += 1;
            explained += usize::from(case.differs.is_some());
            for what in complaints(case, &answer, verdict) {
                wrong.push(complaint(set, index, &what, &answer, verdict));
            }
        }
    }
    println!(
        "{asked} requests, {} sets, {explained} explained differences",
        sets.len()
    );
    ensure!(
        wrong.is_empty(),
        "{} complaints:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    ensure!(asked >= REQUESTS, "only {asked} requests");
    Ok(())
}

/// All that is not as the case has it.
fn complaints(case: &Case, answer: &Answer, verdict: &Verdict) -> Vec<String> {
    let mut wrong = Vec::new();
    if verdict.status != case.is {
        wrong.push(format!("Postern was to answer {}", case.is));
    }
    let differs = case.differs.as_ref();
    let expected = differs.and_then(|differs| differs.envoy).unwrap_or(case.is);
    if answer.status != expected {
        let because = differs.map_or("the same", |differs| &differs.because);
        wrong.push(format!("Envoy was to answer {expected}: {because}"));
    }
    let idle = |differs: &Differs| match differs.envoy {
        Some(status) => status == case.is,
        None => differs.headers.is_empty(),
    };
    if differs.is_some_and(idle) {
        wrong.push("an explanation explains nothing".into());
    }
    let (Some(theirs), Some(ours)) = (&answer.headers, &verdict.headers) else {
        return wrong;
    };
    let excused = differs.map_or(&[][..], |differs| &differs.headers);
    let excused: BTreeSet<&str> = excused.iter().map(String::as_str).collect();
    let unlike = unlike(theirs, ours);
    for name in unlike.symmetric_difference(&excused) {
        let (theirs, ours) = (theirs.get(*name), ours.get(*name));
        wrong.push(format!(
            "header {name}: {theirs:?} of Envoy, {ours:?} of Postern"
        ));
    }
    for (name, wanted) in &case.app {
        let got = ours.get(name).and_then(Value::as_str);
        if got != wanted.as_deref() {
            wrong.push(format!("header {name} was to be {wanted:?}, is {got:?}"));
        }
    }
    wrong
}

/// Headers that are not the same in both.
fn unlike<'a>(one: &'a Map<String, Value>, other: &'a Map<String, Value>) -> BTreeSet<&'a str> {
    one.keys()
        .chain(other.keys())
        .map(String::as_str)
        .filter(|name| !OF_A_HOP.contains(name) && !name.starts_with("x-envoy-"))
        .filter(|name| one.get(*name) != other.get(*name))
        .collect()
}

fn complaint(set: &Set, index: usize, what: &str, answer: &Answer, verdict: &Verdict) -> String {
    format!(
        "{} {}: {what}\n    Envoy {}: {}\n    Postern {}: {}",
        set.name,
        set.requests[index].title(index),
        answer.status,
        answer.body,
        verdict.status,
        verdict.reason
    )
}
