//! Authorization: `schema` is Istio's API as YAML has it, `compile` turns it into
//! what is evaluated, `evaluate` is a pure function from facts to a verdict.

mod compile;
mod evaluate;
mod schema;
#[cfg(test)]
mod tests;

pub use compile::{Mesh, PolicyError, PolicySet};
pub use evaluate::{Denial, Facts, Mode, Permitted, PolicyRef, Verdict};
pub use schema::PolicyObject;
