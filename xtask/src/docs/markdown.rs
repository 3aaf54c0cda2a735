//! As much of Markdown as the checks need.

use std::{collections::BTreeSet, mem};

pub struct Document {
    pub lines: Vec<Line>,
    /// What links within the document can point to.
    pub anchors: BTreeSet<String>,
}

/// What one line holds.
#[derive(Default)]
pub struct Line {
    /// Code: the spans of prose, or a command of a block of code.
    pub code: Vec<String>,
    /// The spans of code in prose.
    pub spans: Vec<String>,
    pub links: Vec<String>,
    pub row: Option<Row>,
}

/// A row of a table.
pub struct Row {
    /// The heading that the table is under.
    pub heading: String,
    /// The spans of code in the first cell.
    pub first_cell: Vec<String>,
}

impl Document {
    pub fn new(text: &str) -> Self {
        let mut reader = Reader::default();
        let lines = text.lines().map(|line| reader.line(line)).collect();
        Self {
            lines,
            anchors: reader.anchors,
        }
    }
}

#[derive(Default)]
struct Reader {
    /// The language of the block of code we are in.
    block: Option<String>,
    /// What a backslash at the end of a command left to be continued.
    pending: String,
    heading: String,
    anchors: BTreeSet<String>,
}

impl Reader {
    fn line(&mut self, text: &str) -> Line {
        if let Some(language) = text.trim_start().strip_prefix("```") {
            self.block = match self.block {
                Some(_) => None,
                None => Some(language.trim().to_owned()),
            };
            self.pending.clear();
            return Line::default();
        }
        if let Some(language) = &self.block {
            let shell = matches!(language.as_str(), "" | "sh" | "bash" | "shell" | "console");
            return if shell {
                self.command(text)
            } else {
                Line::default()
            };
        }
        if text.starts_with('#') {
            text.trim_start_matches('#')
                .trim()
                .clone_into(&mut self.heading);
            self.anchors.insert(anchor(&self.heading));
        }
        let spans = spans(text);
        Line {
            code: spans.clone(),
            links: links(text),
            row: self.row(text),
            spans,
        }
    }

    fn command(&mut self, text: &str) -> Line {
        if let Some(part) = text.strip_suffix('\\') {
            self.pending.push_str(part);
            return Line::default();
        }
        let command = mem::take(&mut self.pending) + text;
        let command = command.split(" # ").next().unwrap_or_default().to_owned();
        Line {
            code: vec![command],
            ..Line::default()
        }
    }

    fn row(&self, text: &str) -> Option<Row> {
        let row = text.trim().strip_prefix('|')?;
        let first = row.split('|').next().unwrap_or_default();
        Some(Row {
            heading: self.heading.clone(),
            first_cell: spans(first),
        })
    }
}

/// The code between backticks.
fn spans(text: &str) -> Vec<String> {
    let parts: Vec<&str> = text.split('`').collect();
    // Every second part is code, if a backtick follows it.
    let closed = parts.len() - 1;
    let inner = parts.iter().take(closed).skip(1).step_by(2);
    inner.map(|part| (*part).to_owned()).collect()
}

/// The targets of links and pictures, outside of code.
fn links(text: &str) -> Vec<String> {
    let prose: String = text.split('`').step_by(2).collect();
    let targets = prose.split("](").skip(1);
    let targets = targets.filter_map(|rest| rest.split([')', ' ']).next());
    targets.map(str::to_owned).collect()
}

/// The anchor that a heading gets where the documents are shown.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase();
    let kept = kept
        .chars()
        .filter(|c| c.is_alphanumeric() || "-_ ".contains(*c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_need_both_backticks() {
        assert_eq!(spans("a `b` c `d e` f"), ["b", "d e"]);
        assert_eq!(spans("`b`"), ["b"]);
        assert_eq!(spans("no code, one ` only"), [""; 0]);
    }

    #[test]
    fn links_are_seen_outside_of_code() {
        assert_eq!(links("[a](b.md) and ![c](d.png \"e\")"), ["b.md", "d.png"]);
        assert_eq!(links("`[a](b.md)`"), [""; 0]);
        assert_eq!(links("[`code`](b.md)"), ["b.md"]);
    }

    #[test]
    fn anchors_are_those_of_headings() {
        assert_eq!(anchor("What it's for: TLS"), "what-its-for-tls");
        assert!(Document::new("## The Lab\n").anchors.contains("the-lab"));
    }

    #[test]
    fn commands_are_continued_and_lose_comments() {
        let document = Document::new("```sh\na \\\n  b # c\n```\n");
        assert_eq!(document.lines[2].code, ["a   b"]);
    }

    #[test]
    fn other_languages_hold_no_commands() {
        let document = Document::new("```yaml\npostern x\n```\n`y`\n");
        assert!(document.lines[1].code.is_empty());
        assert_eq!(document.lines[3].spans, ["y"]);
    }

    #[test]
    fn rows_know_their_heading() {
        let document = Document::new("# Top\n## Configure\n| `a.b` | `c` |\n");
        let row = document.lines[2].row.as_ref().expect("a row");
        assert_eq!(
            (row.heading.as_str(), &row.first_cell[..]),
            ("Configure", &["a.b".to_owned()][..])
        );
    }
}
