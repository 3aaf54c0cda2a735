//! From the policies of the API server to what is enforced. Unlike a directory, which is
//! taken whole or not at all, objects here change one by one, by many hands: one that is
//! wrong must not hold up the others. It is refused, with the reason in its status, and
//!
//! 1. its last version that was taken stands, if this agent knows one (also from its
//!    disk), or else
//! 2. what it selects is closed (`policy/set/standin.rs`).
//!
//! Two objects that are wrong together: the older one is taken.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{held::Stored, scope::PolicyKind};
use crate::{
    objects::{Head, Located, Object as _},
    policy::{Mesh, PolicyObject, PolicySet},
};

/// `(kind, namespace, name)`.
pub type Id = (String, String, String);

pub fn id(stored: &Stored) -> Id {
    let text = |pointer| stored.text(pointer).to_owned();
    (
        text("/kind"),
        text("/metadata/namespace"),
        text("/metadata/name"),
    )
}

/// What became of one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub uid: String,
    pub generation: i64,
    pub refused: Option<Refusal>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Field and what is wrong with it.
    pub why: String,
    /// What stands instead.
    pub stands: &'static str,
    /// Whether that is its last version that was taken.
    pub last_good: bool,
}

pub struct Outcome {
    pub set: PolicySet,
    pub verdicts: BTreeMap<Id, Verdict>,
    /// The version of each object that is enforced, for when a later one is refused.
    pub good: BTreeMap<Id, Stored>,
}

/// Which version of an object is tried.
#[derive(Clone, Copy, PartialEq)]
enum Try {
    Now,
    LastGood,
    None,
}

pub fn compile(mut now: Vec<Stored>, before: &BTreeMap<Id, Stored>, mesh: &Mesh<'_>) -> Outcome {
    // The same order for every agent, whatever came first over the wire.
    now.sort_by_cached_key(|stored| {
        (
            stored.text("/metadata/creationTimestamp").to_owned(),
            id(stored),
        )
    });
    let ids: Vec<Id> = now.iter().map(id).collect();
    let last = |index: usize| -> Option<&Stored> {
        let last = before.get(&ids[index])?;
        (last.uid == now[index].uid).then_some(last)
    };
    let mut tries = vec![Try::Now; now.len()];
    let mut why: BTreeMap<usize, String> = BTreeMap::new();
    let set = loop {
        let mut wrong = Vec::new();
        let mut objects = Vec::new();
        for (index, tried) in tries.iter().enumerate() {
            let stored = match tried {
                Try::Now => &now[index],
                Try::LastGood => match last(index) {
                    Some(last) => last,
                    None => continue,
                },
                Try::None => continue,
            };
            match read(&stored.object) {
                Ok(object) => objects.push(located(object, index)),
                Err(error) => wrong.push((index, error)),
            }
        }
        let (set, errors) = PolicySet::gather(objects, mesh);
        wrong.extend(errors.into_iter().map(|error| {
            let said = format!("{}: {}", error.field, error.message);
            (error.line as usize, said)
        }));
        if wrong.is_empty() {
            break set;
        }
        // Each object goes down at most twice: this ends.
        for (index, error) in wrong {
            tries[index] = match tries[index] {
                Try::Now if last(index).is_some() => Try::LastGood,
                _ => Try::None,
            };
            why.entry(index).or_insert(error);
        }
    };
    finish(set, now, ids, &tries, why, before, mesh)
}

fn finish(
    mut set: PolicySet,
    now: Vec<Stored>,
    ids: Vec<Id>,
    tries: &[Try],
    mut why: BTreeMap<usize, String>,
    before: &BTreeMap<Id, Stored>,
    mesh: &Mesh<'_>,
) -> Outcome {
    let (mut verdicts, mut good) = (BTreeMap::new(), BTreeMap::new());
    for (index, (stored, id)) in now.into_iter().zip(ids).enumerate() {
        let (uid, generation) = (stored.uid.clone(), stored.generation);
        let stands = match tries[index] {
            Try::Now => None,
            Try::LastGood => Some("its last version that was taken stands"),
            Try::None => Some(match kind(&id.0) {
                Some(kind) => set.stand_in(kind.name(), &stored.object, mesh),
                None => "it is no policy",
            }),
        };
        match tries[index] {
            Try::Now => {
                good.insert(id.clone(), stored);
            }
            Try::LastGood => good.extend(before.get(&id).map(|last| (id.clone(), last.clone()))),
            Try::None => {}
        }
        let refused = stands.map(|stands| Refusal {
            why: why.remove(&index).unwrap_or_default(),
            stands,
            last_good: tries[index] == Try::LastGood,
        });
        verdicts.insert(
            id,
            Verdict {
                uid,
                generation,
                refused,
            },
        );
    }
    Outcome {
        set,
        verdicts,
        good,
    }
}

fn kind(name: &str) -> Option<PolicyKind> {
    PolicyKind::ALL.into_iter().find(|kind| kind.name() == name)
}

fn read(object: &Value) -> Result<PolicyObject, String> {
    let text = |field: &str| object[field].as_str().unwrap_or_default().to_owned();
    let head = Head {
        api_version: text("apiVersion"),
        kind: text("kind"),
    };
    let mut track = serde_path_to_error::Track::new();
    let from = serde_path_to_error::Deserializer::new(object, &mut track);
    match PolicyObject::read(&head, from) {
        Ok(Some(object)) => Ok(object),
        Ok(None) => Err("is no policy".into()),
        Err(error) => Err(match track.path().to_string().as_str() {
            "." | "" => error.to_string(),
            field => format!("{field}: {error}"),
        }),
    }
}

/// The line is the index, by which it is found again.
fn located(object: PolicyObject, index: usize) -> Located<PolicyObject> {
    Located {
        object,
        path: PathBuf::from(Path::new("kubernetes")),
        line: index as u64,
    }
}
