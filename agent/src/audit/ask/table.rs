//! Records for people: a line each, in columns.

use std::io::{self, IsTerminal as _, Write};

use serde_json::Value;

use super::entry::{Entry, number, text};

const HEADINGS: [&str; 8] = [
    "TIME",
    "KIND",
    "VERDICT",
    "SOURCE",
    "DESTINATION",
    "POLICY",
    "MS",
    "WHAT",
];
/// Rows that are looked at for how wide columns have to be.
const SAMPLE: usize = 200;
/// Of what people look at no column but the last takes more.
const WIDEST: usize = 48;

/// Writes rows as they come, once it has seen how wide the first of them are.
pub struct Table<W> {
    to: W,
    rows: Vec<Vec<String>>,
    widths: Option<Vec<usize>>,
    /// Of the terminal; `None`: nothing is cut.
    width: Option<usize>,
}

impl<W: Write> Table<W> {
    pub fn new(to: W, width: Option<usize>) -> Self {
        Self {
            to,
            rows: Vec::new(),
            widths: None,
            width,
        }
    }

    pub fn add(&mut self, entry: &Entry) -> io::Result<()> {
        self.rows.push(row(entry));
        match self.widths.is_some() || self.rows.len() >= SAMPLE {
            true => self.flush(),
            false => Ok(()),
        }
    }

    /// Writes what is held back.
    pub fn flush(&mut self) -> io::Result<()> {
        let rows = std::mem::take(&mut self.rows);
        if rows.is_empty() {
            return self.to.flush();
        }
        let known = self.widths.is_some();
        let widths = self.widths.get_or_insert_with(|| widths(&HEADINGS, &rows));
        if !known {
            let headings = HEADINGS.map(str::to_owned);
            self.to
                .write_all(line(&headings, widths, self.width).as_bytes())?;
        }
        for row in &rows {
            self.to
                .write_all(line(row, widths, self.width).as_bytes())?;
        }
        self.to.flush()
    }
}

/// A whole table.
pub fn grid(headings: &[&str], rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> = (rows.iter())
        .map(|row| row.iter().map(|cell| clean(cell)).collect())
        .collect();
    let mut widths = vec![0; headings.len()];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    for (width, heading) in widths.iter_mut().zip(headings) {
        *width = heading.len().max(*width);
    }
    let headings: Vec<String> = headings.iter().map(|&h| h.to_owned()).collect();
    let all = std::iter::once(&headings).chain(&rows);
    all.map(|row| line(row, &widths, None)).collect()
}

/// Of standard output, where that is a terminal.
pub fn terminal_width() -> Option<usize> {
    if !io::stdout().is_terminal() {
        return None;
    }
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the call fills in the structure that it is given, and keeps nothing.
    let known = unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &mut size) } == 0;
    (known && size.ws_col > 0).then(|| size.ws_col.into())
}

fn widths(headings: &[&str], rows: &[Vec<String>]) -> Vec<usize> {
    let longest = |index: usize| {
        let cells = rows.iter().map(|row| row[index].chars().count());
        cells.max().unwrap_or(0).min(WIDEST)
    };
    (headings.iter().enumerate())
        .map(|(index, heading)| heading.len().max(longest(index)))
        .collect()
}

fn line(cells: &[String], widths: &[usize], limit: Option<usize>) -> String {
    let mut out = String::new();
    for (index, (cell, width)) in cells.iter().zip(widths).enumerate() {
        match index + 1 == cells.len() {
            true => out.push_str(cell),
            false => out.push_str(&format!("{cell:<width$}  ")),
        }
    }
    let out = out.trim_end();
    let cut = limit.filter(|limit| out.chars().count() > *limit);
    let mut out = match cut {
        Some(limit) => {
            let kept = out.chars().take(limit.saturating_sub(1));
            kept.chain(['…']).collect()
        }
        None => out.to_owned(),
    };
    out.push('\n');
    out
}

/// What a process, a client or a file name says must not move the reader's cursor.
fn clean(cell: &str) -> String {
    let odd =
        |c: char| c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let mut out = String::with_capacity(cell.len());
    for c in cell.chars() {
        match odd(c) {
            true => out.extend(c.escape_unicode()),
            false => out.push(c),
        }
    }
    out
}

fn row(entry: &Entry) -> Vec<String> {
    let value = &entry.value;
    let own = |pointer: &str| text(value, pointer).unwrap_or_default().to_owned();
    let cells = [
        // As it stands in the log, to the millisecond.
        to_millisecond(&own("/time")),
        own("/kind"),
        own("/verdict"),
        entry.source().map(party).unwrap_or_default(),
        entry.destination().map(party).unwrap_or_default(),
        policy(&value["policy"]),
        number(value, "/durationMs").map_or_else(String::new, |ms| ms.to_string()),
        what(value),
    ];
    cells.iter().map(|cell| clean(cell)).collect()
}

fn to_millisecond(time: &str) -> String {
    match time.split_once('.') {
        Some((whole, fraction)) => {
            let digits = fraction.trim_end_matches(|c: char| !c.is_ascii_digit());
            format!("{whole}.{:0<3.3}Z", digits)
        }
        None => time.to_owned(),
    }
}

/// Who an end is, by the best that is known: pod, identity, address.
pub fn party(end: &Value) -> String {
    let who = match (text(end, "/namespace"), text(end, "/pod")) {
        (Some(namespace), Some(pod)) => format!("{namespace}/{pod}"),
        _ => ["/identity", "/address", "/local"]
            .into_iter()
            .find_map(|pointer| text(end, pointer))
            .unwrap_or_default()
            .to_owned(),
    };
    match text(end, "/process/comm") {
        Some(comm) => format!("{who} ({comm})"),
        None => who,
    }
}

pub fn policy(policy: &Value) -> String {
    let (Some(namespace), Some(name)) = (text(policy, "/namespace"), text(policy, "/name")) else {
        return String::new();
    };
    match number(policy, "/rule") {
        Some(rule) => format!("{namespace}/{name}[{rule}]"),
        None => format!("{namespace}/{name}"),
    }
}

/// What it comes to, by kind; what is absent is left out.
fn what(value: &Value) -> String {
    let pointers: &[&str] = match value["kind"].as_str().unwrap_or_default() {
        "connection" => &["/transport", "/service", "/dialled", "/end"],
        "request" => &["/method", "/host", "/path", "/status", "/reason"],
        "flow" | "bypass" => &["/protocol", "/event", "/remote", "/socket/errno", "/why"],
        "process" => &["/event", "/process/exe", "/process/pid", "/code", "/signal"],
        "token" => &["/grant", "/object", "/issuer", "/error"],
        "authority" => &["/event", "/client", "/subject", "/error", "/reason"],
        "gap" => &["/count", "/lost", "/reason"],
        _ => &["/event", "/detail", "/reason"],
    };
    let said = pointers.iter().filter_map(|pointer| {
        let value = value.pointer(pointer)?;
        match value {
            Value::String(text) if text == "closed" && *pointer == "/end" => None,
            Value::String(text) => Some(text.clone()),
            Value::Null => None,
            other => Some(other.to_string()),
        }
    });
    said.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::audit::ask::filter::tests::entry;

    fn shown(records: &[Value], width: Option<usize>) -> String {
        let mut out = Vec::new();
        let mut table = Table::new(&mut out, width);
        for (seq, record) in (1..).zip(records) {
            table.add(&entry(seq, record)).expect("memory takes it");
        }
        table.flush().expect("memory takes it");
        String::from_utf8(out).expect("text")
    }

    fn request(path: &str) -> Value {
        json!({
            "time": "2026-01-31T11:00:00.1234567Z", "kind": "request", "verdict": "deny",
            "method": "GET", "host": "api", "path": path, "status": 403, "durationMs": 12,
            "policy": {"namespace": "shop", "name": "p", "rule": 0},
            "source": {"namespace": "shop", "pod": "cart-1", "process": {"comm": "c\u{1b}[2J\u{9b}1m\u{202e}x"}},
            "destination": {"address": "10.0.0.2:80"},
        })
    }

    #[test]
    fn columns_line_up_and_nothing_moves_the_cursor() {
        let gap = json!({"time": "2026-01-31T11:00:00Z", "kind": "gap", "count": 7, "lost": "records", "reason": "disk"});
        let text = shown(&[request("/a"), gap], None);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        let at = |line: &str, word: &str| line.find(word).expect("it stands there");
        assert_eq!(at(lines[0], "WHAT"), at(lines[1], "GET api /a 403"));
        assert_eq!(at(lines[0], "WHAT"), at(lines[2], "7 records disk"));
        assert_eq!(at(lines[0], "POLICY"), at(lines[1], "shop/p[0]"));
        assert!(
            lines[1].starts_with("2026-01-31T11:00:00.123Z  request  deny"),
            "{text}"
        );
        assert!(lines[1].contains(r"c\u{1b}[2J\u{9b}1m\u{202e}x"), "{text}");
    }

    #[test]
    fn rows_are_cut_to_a_terminal_only() {
        let long = request(&"/x".repeat(200));
        let cut = shown(std::slice::from_ref(&long), Some(80));
        assert!(cut.lines().all(|line| line.chars().count() <= 80), "{cut}");
        assert!(
            cut.lines().last().is_some_and(|line| line.ends_with('…')),
            "{cut}"
        );
        assert!(shown(&[long], None).contains(&"/x".repeat(200)));
    }

    /// Columns are as wide as the first rows ask; what comes later is whole all the same.
    #[test]
    fn rows_come_out_in_their_order_also_after_the_sample() {
        let many: Vec<Value> = (0..SAMPLE + 50)
            .map(|i| request(&format!("/{i}")))
            .collect();
        let text = shown(&many, None);
        let paths: Vec<String> = text
            .lines()
            .skip(1)
            .map(|line| {
                let words: Vec<&str> = line.split_whitespace().collect();
                words[words.len() - 2].to_owned()
            })
            .collect();
        let expected: Vec<String> = (0..SAMPLE + 50).map(|i| format!("/{i}")).collect();
        assert_eq!(paths, expected);
    }
}
