//! Which endpoint of a service a connection goes to: in turn, or where its service asks
//! for it, the one that this client had before (`sessionAffinity: ClientIP`).

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Mutex,
    time::{Duration, Instant},
};

use crate::workload::{Endpoint, NamespacedName, ServicePort};

/// Clients are this node's own pods: so many of them times services are not expected.
/// Beyond it, who was away longest is forgotten, as if its time were up.
const MOST: usize = 16_384;

/// What clients stay with. It outlives the tables: pods elsewhere come and go.
#[derive(Default)]
pub struct Choices(Mutex<HashMap<Client, Chosen>>);

#[derive(PartialEq, Eq, Hash)]
struct Client {
    service: NamespacedName,
    port: u16,
    address: IpAddr,
}

struct Chosen {
    endpoint: SocketAddr,
    last: Instant,
    stays: Duration,
}

impl Choices {
    /// One of the endpoints that the connection may go to; `None` where there is none.
    pub fn choose<'a>(
        &self,
        port: &ServicePort,
        among: &[&'a Endpoint],
        client: IpAddr,
        now: Instant,
    ) -> Option<&'a Endpoint> {
        let in_turn = *among.get(port.turn(among.len()))?;
        let Some(stays) = port.service.affinity else {
            return Some(in_turn);
        };
        let key = Client {
            service: port.service.name.clone(),
            port: port.port,
            address: client,
        };
        let mut known = self.0.lock().expect("no panic while it is held");
        let before = known
            .get(&key)
            .filter(|chosen| now.saturating_duration_since(chosen.last) < stays)
            .and_then(|chosen| among.iter().find(|e| e.address == chosen.endpoint));
        let endpoint = before.copied().unwrap_or(in_turn);
        if known.len() >= MOST && !known.contains_key(&key) {
            make_room(&mut known, now);
        }
        // Each connection begins its time anew, as kube-proxy has it.
        let chosen = Chosen {
            endpoint: endpoint.address,
            last: now,
            stays,
        };
        known.insert(key, chosen);
        Some(endpoint)
    }
}

/// Forgets those whose time is up, and the longest idle half if that is none.
fn make_room(known: &mut HashMap<Client, Chosen>, now: Instant) {
    known.retain(|_, chosen| now.saturating_duration_since(chosen.last) < chosen.stays);
    if known.len() >= MOST {
        let mut times: Vec<Instant> = known.values().map(|chosen| chosen.last).collect();
        let middle = times.len() / 2;
        let (_, median, _) = times.select_nth_unstable(middle);
        let median = *median;
        known.retain(|_, chosen| chosen.last > median);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        config::Mesh,
        objects::load_text,
        workload::{Table, WorkloadObject},
    };

    const CLIENT: &str = "10.0.0.9";

    fn service(affinity: &str, ready: &str) -> (Table, Arc<ServicePort>) {
        let text = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop}}\n\
             spec: {{clusterIP: 10.9.0.1, {affinity} ports: [{{port: 80}}]}}\n---\n\
             apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
             metadata: {{name: web-1, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}\n\
             ports: [{{name: '', port: 80}}]\n\
             endpoints: [{{addresses: [10.0.0.1], conditions: {{ready: {ready}}}}}, {{addresses: [10.0.0.2]}}, {{addresses: [10.0.0.3]}}]\n"
        );
        let objects = load_text(std::path::Path::new("t.yaml"), &text).expect("manifests parse");
        let objects: Vec<WorkloadObject> = objects.into_iter().map(|l| l.object).collect();
        let table = Table::build(&objects, Mesh::Disabled);
        let port = table.service("10.9.0.1:80".parse().expect("address"));
        let port = port.expect("a service").clone();
        (table, port)
    }

    fn ask(
        choices: &Choices,
        of: &(Table, Arc<ServicePort>),
        client: &str,
        now: Instant,
    ) -> String {
        let dialled = "10.9.0.1".parse().expect("address");
        let among = of.0.reachable(&of.1, dialled, "n1");
        let client = client.parse().expect("address");
        let chosen = choices.choose(&of.1, &among, client, now);
        chosen.expect("an endpoint").address.ip().to_string()
    }

    #[test]
    fn without_affinity_all_get_their_turn() {
        let (choices, service, now) = (Choices::default(), service("", "true"), Instant::now());
        let mut asked: Vec<String> = (0..6)
            .map(|_| ask(&choices, &service, CLIENT, now))
            .collect();
        assert_eq!(asked[..3], asked[3..]);
        asked.sort();
        asked.dedup();
        assert_eq!(asked, ["10.0.0.1", "10.0.0.2", "10.0.0.3"]);
        assert!(choices.0.lock().expect("no panic").is_empty());
    }

    #[test]
    fn a_new_table_goes_on_where_the_one_before_stopped() {
        let (choices, now) = (Choices::default(), Instant::now());
        let mut of = service("", "true");
        let mut asked = Vec::new();
        for _ in 0..30 {
            asked.push(ask(&choices, &of, CLIENT, now));
            let next = service("", "true");
            next.0.continue_from(&of.0);
            of = next;
        }
        for turns in asked.chunks(3) {
            assert_eq!(turns, &asked[..3]);
        }
        asked.truncate(3);
        asked.sort();
        assert_eq!(asked, ["10.0.0.1", "10.0.0.2", "10.0.0.3"]);
    }

    #[test]
    fn a_client_stays_with_its_endpoint_until_its_time_is_up_or_it_is_gone() {
        let affinity =
            "sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 10}},";
        let (choices, begin) = (Choices::default(), Instant::now());
        let at = |seconds| begin + Duration::from_secs(seconds);
        // Until it is the first one's turn.
        let mut of = service(affinity, "true");
        while ask(&choices, &of, CLIENT, begin) != "10.0.0.1" {
            choices.0.lock().expect("no panic").clear();
        }
        for seconds in [9, 18, 27] {
            // Tables come and go; others have their own.
            of = service(affinity, "true");
            let others: std::collections::BTreeSet<String> = (20..26)
                .map(|n| ask(&choices, &of, &format!("10.0.0.{n}"), at(seconds)))
                .collect();
            assert!(others.len() <= 3);
            assert_eq!(ask(&choices, &of, CLIENT, at(seconds)), "10.0.0.1");
        }
        let late: std::collections::BTreeSet<String> = (0..6)
            .map(|n| ask(&choices, &of, CLIENT, at(100 + n * 10)))
            .collect();
        assert_eq!(late.len(), 3, "each time its time was up");
        let gone = service(affinity, "false");
        let first = ask(&choices, &gone, CLIENT, at(200));
        assert_ne!(first, "10.0.0.1");
        for _ in 0..3 {
            assert_eq!(ask(&choices, &of, CLIENT, at(200)), first);
        }
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let affinity = "sessionAffinity: ClientIP,";
        let (choices, of) = (Choices::default(), service(affinity, "true"));
        let (begin, dialled) = (Instant::now(), "10.9.0.1".parse().expect("address"));
        let among = of.0.reachable(&of.1, dialled, "n1");
        for number in 0..MOST as u32 + 10 {
            let client = IpAddr::from(number.to_be_bytes());
            let now = begin + Duration::from_millis(u64::from(number));
            assert!(choices.choose(&of.1, &among, client, now).is_some());
        }
        let known = choices.0.lock().expect("no panic");
        assert!(
            known.len() <= MOST && known.len() > MOST / 3,
            "{}",
            known.len()
        );
        let newest = IpAddr::from((MOST as u32 + 9).to_be_bytes());
        assert!(known.keys().any(|key| key.address == newest));
        assert!(known.keys().all(|key| key.address != IpAddr::from([0; 4])));
    }
}
