//! Findings, and how they are shown.

use std::fmt;

use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Ok,
    /// It runs, with less, or may collide with something.
    Warning,
    /// It does not run, or not safely.
    Failure,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    pub level: Level,
    pub what: String,
    /// Why it matters.
    pub why: String,
    /// What to do; nothing where all is well.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    pub findings: Vec<Finding>,
}

impl Report {
    pub fn ok(&mut self, what: impl Into<String>, why: impl Into<String>) {
        self.add(Level::Ok, what, why, "");
    }

    pub fn warn(
        &mut self,
        what: impl Into<String>,
        why: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.add(Level::Warning, what, why, remedy);
    }

    pub fn fail(
        &mut self,
        what: impl Into<String>,
        why: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.add(Level::Failure, what, why, remedy);
    }

    pub fn fit(&self) -> bool {
        self.findings.iter().all(|f| f.level != Level::Failure)
    }

    fn add(
        &mut self,
        level: Level,
        what: impl Into<String>,
        why: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.findings.push(Finding {
            level,
            what: what.into(),
            why: why.into(),
            remedy: remedy.into(),
        });
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            let mark = match finding.level {
                Level::Ok => "ok    ",
                Level::Warning => "warn  ",
                Level::Failure => "FAIL  ",
            };
            writeln!(f, "{mark}  {}", finding.what)?;
            if finding.level != Level::Ok {
                writeln!(f, "        why: {}", finding.why)?;
                writeln!(f, "        do:  {}", finding.remedy)?;
            }
        }
        Ok(())
    }
}
