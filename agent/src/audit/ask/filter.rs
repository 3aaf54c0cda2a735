//! Which records are asked for. All filters must hold; of one that is repeated, any.

#[cfg(test)]
pub mod tests;

use clap::ValueEnum;
use time::OffsetDateTime;

use super::{
    entry::{Entry, number, text},
    values::{End, Identity, Kind, Name, PathOf, Process, Range, Status, Trace, When},
};

#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Filters")]
pub struct Filter {
    /// Written at this time or later: RFC 3339, or a span back from now such as 15m.
    #[arg(long, value_name = "TIME")]
    pub since: Option<When>,
    /// Written before this time.
    #[arg(long, value_name = "TIME")]
    pub until: Option<When>,
    /// Numbers, both ends within; one may be left out.
    #[arg(long, value_name = "FROM..TO")]
    pub seq: Option<Range>,
    #[arg(long)]
    kind: Vec<Kind>,
    #[arg(long, value_enum)]
    verdict: Vec<Verdict>,
    /// A pod at either end.
    #[arg(long, value_name = "[NS/]POD")]
    pod: Vec<Name>,
    /// A namespace at either end.
    #[arg(long, value_name = "NS")]
    namespace: Vec<String>,
    /// An identity at either end; a `*` at its end makes it a prefix.
    #[arg(long, value_name = "SPIFFE ID")]
    identity: Vec<Identity>,
    /// Who began it: a SPIFFE ID, a pod or an address.
    #[arg(long, value_name = "WHO")]
    source: Vec<End>,
    /// Who it went to: a SPIFFE ID, a pod or an address.
    #[arg(long, value_name = "WHO")]
    destination: Vec<End>,
    /// The policy that decided.
    #[arg(long, value_name = "[NS/]NAME")]
    policy: Vec<Name>,
    /// A process: pid, path of its executable, or its name.
    #[arg(long)]
    process: Vec<Process>,
    /// Of requests; a `*` at its end makes it a prefix.
    #[arg(long)]
    path: Vec<PathOf>,
    /// Of requests: a number, or a class such as 4xx.
    #[arg(long)]
    status: Vec<Status>,
    /// Of requests.
    #[arg(long)]
    method: Vec<String>,
    /// W3C trace id.
    #[arg(long, value_name = "ID")]
    trace: Vec<Trace>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Verdict {
    Allow,
    Deny,
    Failed,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Failed => "failed",
        }
    }
}

impl Filter {
    /// With spans counted back from now.
    #[must_use]
    pub fn settled(mut self, now: OffsetDateTime) -> Self {
        for when in [&mut self.since, &mut self.until].into_iter().flatten() {
            *when = When::At(when.at(now));
        }
        self
    }

    pub fn accepts(&self, entry: &Entry) -> bool {
        let value = &entry.value;
        let is =
            |pointer: &str, fits: &dyn Fn(&str) -> bool| text(value, pointer).is_some_and(fits);
        let at = |when: Option<When>| when.map(|when| when.at(entry.time));
        at(self.since).is_none_or(|since| entry.time >= since)
            && at(self.until).is_none_or(|until| entry.time < until)
            && self.seq.is_none_or(|range| range.contains(entry.line.seq))
            && any(&self.kind, |kind| kind.is(entry.kind()))
            && any(&self.verdict, |verdict| {
                is("/verdict", &|is| is == verdict.name())
            })
            && any(&self.pod, |pod| {
                entry.ends().any(|end| pod.fits(end, "pod"))
            })
            && any(&self.namespace, |namespace| {
                entry.ends().any(|end| end["namespace"] == **namespace)
            })
            && any(&self.identity, |id| entry.ends().any(|end| id.fits(end)))
            && any(&self.source, |who| {
                entry.source().is_some_and(|end| who.fits(end))
            })
            && any(&self.destination, |who| {
                entry.destination().is_some_and(|end| who.fits(end))
            })
            && any(&self.policy, |policy| policy.fits(&value["policy"], "name"))
            && any(&self.process, |process| {
                entry.processes().any(|one| process.fits(one))
            })
            && any(&self.path, |path| is("/path", &|own| path.fits(own)))
            && any(&self.status, |status| {
                number(value, "/status").is_some_and(|own| status.fits(own))
            })
            && any(&self.method, |method| is("/method", &|own| own == method))
            && any(&self.trace, |trace| is("/trace", &|own| trace.fits(own)))
    }
}

/// Whether one of them fits; none asks for nothing.
fn any<T>(all: &[T], fits: impl Fn(&T) -> bool) -> bool {
    all.is_empty() || all.iter().any(fits)
}
