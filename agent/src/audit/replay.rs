//! `postern audit replay`: what other policies would have said to the calls of the log.
//! Connections and requests are judged by the code of the data path, as far as their
//! records tell what it asks for; what they do not tell is not guessed.

mod call;
mod report;
#[cfg(test)]
mod tests;
mod workloads;

use std::collections::HashMap;

use crate::{
    judge::past::{self, Outcome},
    policy::{Denial, PolicyRef, PolicySet, Selected, Subject},
};

use super::ask::Entry;
use call::Was;
pub use report::Report;
use report::{Change, Key};
pub use workloads::Workloads;

/// Tries policies on the calls of a log.
pub struct Replay {
    sets: Sets,
    selected: HashMap<Destination, Chosen>,
    report: Report,
}

pub struct Sets {
    pub candidate: PolicySet,
    /// The policies that the calls were recorded under, where they are known.
    pub recorded_under: Option<PolicySet>,
    pub workloads: Workloads,
}

/// A workload as records name it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Destination {
    namespace: String,
    pod: String,
    workload: String,
}

/// The policies of a workload.
enum Chosen {
    Of {
        candidate: Box<Selected>,
        /// Those that its calls were recorded under, where they are known.
        recorded: Option<Box<Selected>>,
    },
    /// They depend on what is not known of it.
    Unknown(String),
}

impl Replay {
    pub fn new(sets: Sets) -> Self {
        Self {
            sets,
            selected: HashMap::new(),
            report: Report::default(),
        }
    }

    pub fn finish(self) -> Report {
        self.report
    }

    /// Judges what a record tells of. Records of other kinds, and those of the source's
    /// side, tell of nothing that is judged here.
    pub fn add(&mut self, entry: &Entry) {
        let mut call = match call::read(entry) {
            None => return,
            Some(Err(why)) => return self.report.unjudged(why),
            Some(Ok(call)) => call,
        };
        let chosen = self.selected.entry(call.destination.clone());
        let outcome = match chosen.or_insert_with(|| self.sets.choose(&call.destination)) {
            Chosen::Unknown(why) => Outcome::Undecidable(why.clone()),
            Chosen::Of {
                candidate,
                recorded,
            } => {
                if let Some(recorded) = recorded {
                    call.recorded_under(recorded, candidate);
                }
                past::judge(candidate, &call.facts, &call.carried)
            }
        };
        let (change, by, why) = match (call.was, outcome) {
            (_, Outcome::Malformed(why)) => return self.report.unjudged(why),
            (Was::Allowed, Outcome::Allow(_)) | (Was::Denied, Outcome::Deny(_)) => {
                return self.report.unchanged();
            }
            (Was::Allowed, Outcome::Deny(denial)) => {
                let by = denial.policy().clone();
                (Change::Denied, Some(by), reason(&denial))
            }
            (Was::Denied, Outcome::Allow(by)) => (Change::Allowed, by, String::new()),
            (_, Outcome::Undecidable(why)) => (Change::Undecidable, None, why),
        };
        self.report
            .add(Key::new(change, &call, by.as_ref(), why), entry.time);
    }
}

impl Sets {
    fn choose(&self, destination: &Destination) -> Chosen {
        let known = self.workloads.subject(destination);
        if known.is_none()
            && let Some(policy) = self.candidate.selective(&destination.namespace)
        {
            return Chosen::Unknown(format!(
                "{policy} selects by labels or services, and those of {} are not known",
                destination.name()
            ));
        }
        let subject = known.unwrap_or_else(|| Subject {
            namespace: destination.namespace.clone(),
            ..Subject::default()
        });
        let recorded = self.recorded_under.as_ref();
        Chosen::Of {
            candidate: Box::new(self.candidate.select(&subject)),
            recorded: recorded.map(|set| Box::new(set.select(&subject))),
        }
    }
}

impl Destination {
    fn name(&self) -> String {
        let name = match self.workload.is_empty() {
            true => &self.pod,
            false => &self.workload,
        };
        format!("{}/{name}", self.namespace)
    }
}

/// What the policy's name alone does not say.
fn reason(denial: &Denial) -> String {
    match denial {
        Denial::Rule(_) => String::new(),
        Denial::Implicit(_) => "no ALLOW policy matched".into(),
        other => other.to_string(),
    }
}

/// Kind, name and rule, as reports have them.
fn written(policy: &PolicyRef) -> String {
    match policy.rule {
        Some(rule) => format!("{}[{rule}]", policy.path()),
        None => policy.path(),
    }
}
