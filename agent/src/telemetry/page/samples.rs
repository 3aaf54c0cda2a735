//! The agent's own metrics as the page shows them, from the text that Prometheus gets:
//! whatever is counted is shown, without a second list of it.

use std::collections::BTreeMap;

use serde::Serialize;

/// One number of `GET /api/health`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sample {
    /// Without `postern_` and without `_total`.
    pub name: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

/// The agent's own, without distributions.
pub fn samples(metrics: &str) -> Vec<Sample> {
    metrics
        .lines()
        .filter_map(|line| line.strip_prefix("postern_"))
        .filter_map(sample)
        .filter(|sample| !sample.name.ends_with("_bucket"))
        .collect()
}

fn sample(line: &str) -> Option<Sample> {
    let end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = BTreeMap::new();
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        while let Some((label, quoted)) = rest.split_once("=\"") {
            let (value, after) = unquote(quoted)?;
            labels.insert(label.trim_start_matches(',').to_owned(), value);
            rest = after;
            if rest.starts_with('}') {
                break;
            }
        }
        rest = rest.strip_prefix('}')?;
    }
    Some(Sample {
        name: name.trim_end_matches("_total").to_owned(),
        labels,
        value: rest.split_whitespace().next()?.parse().ok()?,
    })
}

/// A label's value up to its quotation mark, and what follows.
fn unquote(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    loop {
        match characters.next()? {
            (at, '"') => return Some((value, &text[at + 1..])),
            (_, '\\') => match characters.next()?.1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            (_, character) => value.push(character),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_numbers_are_read_with_their_labels() {
        let text = "# HELP postern_tunnels Open\n# TYPE postern_tunnels gauge\npostern_tunnels 3\n\
            postern_kernel_total{name=\"lost_exec_events\"} 7\n\
            postern_odd_total{a=\"x\\\"},b=\\\\\",c=\"2\\n3\"} 1.5\n\
            postern_tls_handshake_duration_seconds_bucket{le=\"0.1\"} 1\n\
            istio_tcp_sent_bytes_total{reporter=\"source\"} 9\npostern_broken{a=\"\npostern_broken\n# EOF\n";
        let found: Vec<_> = samples(text)
            .into_iter()
            .map(|s| (s.name, s.labels.into_iter().collect::<Vec<_>>(), s.value))
            .collect();
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(
            found,
            [
                ("tunnels".into(), vec![], 3.0),
                ("kernel".into(), vec![pair("name", "lost_exec_events")], 7.0),
                (
                    "odd".into(),
                    vec![pair("a", "x\"},b=\\"), pair("c", "2\n3")],
                    1.5
                ),
            ]
        );
    }

    #[test]
    fn what_prometheus_gets_can_be_read() {
        let metrics = crate::telemetry::Metrics::default();
        metrics.set_audit(5, 2);
        metrics.set_map_entries("MESH", 4);
        let found = samples(&metrics.text());
        let value = |name: &str| found.iter().find(|s| s.name == name).map(|s| s.value);
        assert_eq!(value("audit_records_written"), Some(5.0));
        assert_eq!(value("audit_records_lost"), Some(2.0));
        assert_eq!(value("map_entries"), Some(4.0));
    }
}
