//! Authorization: `schema` is Istio's API as YAML has it, `compile` turns it into
//! what is evaluated, `set` finds the policies of a workload, `evaluate` is a pure
//! function from facts to a verdict.

mod compile;
mod evaluate;
mod extension;
mod normalize;
mod pattern;
mod schema;
mod set;
#[cfg(test)]
mod tests;

pub use compile::{Mesh, Reading};
pub use evaluate::{Denial, Facts, Layer, Permitted, PolicyRef, RequestFacts, Rule, Verdict};
pub use extension::Caller;
pub use normalize::{BadPath, Normal, normalize};
pub use schema::PolicyObject;
pub use set::{Authorization, PolicyError, PolicySet, Selected, Subject};
