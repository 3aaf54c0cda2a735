//! Authorization: `schema` is Istio's API as YAML has it, `compile` turns it into
//! what is evaluated, `set` finds the policies of a workload, `selected` asks them in
//! order, `evaluate` is a pure function from facts to whether a rule matches.

mod compile;
mod evaluate;
mod extension;
mod normalize;
mod outbound;
mod partial;
mod pattern;
mod resource;
mod schema;
mod selected;
mod set;
#[cfg(test)]
mod tests;

pub use compile::{Mesh, Reading};
pub use evaluate::{Denial, Facts, Layer, Permitted, PolicyRef, RequestFacts, Rule, Verdict};
pub use extension::Caller;
pub use normalize::{BadPath, Normal, normalize};
pub use outbound::{Outbound, Unclear};
pub use partial::{Lean, Open, Partial, Token};
pub use resource::{ProtectedResource, Scheme, Unproven};
pub use schema::PolicyObject;
pub use selected::{Authorization, Selected};
pub use set::{PolicyError, PolicySet, Subject};
