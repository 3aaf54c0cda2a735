//! The steps. Each shows what happened and checks that it is what should happen.

use std::time::Instant;

use anyhow::Result;
use serde_json::Value;

use crate::{
    Demo, SERVICE,
    record::{Wanted, policy, short, text},
    url,
};

const CALLERS: &str = "AuthorizationPolicy shop/payments-callers";
const CALLERS_YAML: &str = "\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: payments-callers, namespace: shop}
spec:
  selector: {matchLabels: {app: payments}}
  action: ALLOW
  rules: [{from: [{source: {serviceAccounts: [catalog]}}]}]
";
const STRICT: &str = "PeerAuthentication shop/mutual-tls-only";
const STRICT_YAML: &str = "\
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: mutual-tls-only, namespace: shop}
spec: {mtls: {mode: STRICT}}
";

const SENT: Wanted = Wanted {
    node: 1,
    reporter: "source",
    transport: "hbone",
    from: "web",
    to: "catalog",
    verdict: "allow",
};
const RECEIVED: Wanted = Wanted {
    node: 2,
    reporter: "destination",
    ..SENT
};
const LOCAL: Wanted = Wanted {
    node: 2,
    transport: "local",
    from: "catalog",
    to: "payments",
    ..SENT
};
const DENIED_WEB: Wanted = Wanted {
    to: "payments",
    verdict: "deny",
    ..RECEIVED
};
const DENIED_OUTSIDER: Wanted = Wanted {
    transport: "plaintext",
    from: "outsider",
    verdict: "deny",
    ..RECEIVED
};

impl Demo {
    pub fn without_postern(&mut self) -> Result<()> {
        self.step("Without Postern: a call between nodes");
        let (answer, wire) = self.ask_tapped("without", &self.web, &url(&self.catalog))?;
        self.check("web got the page", answer.is_page());
        self.check("the listener read the secret", wire.secrets > 0);
        Ok(())
    }

    pub fn start_agents(&mut self) -> Result<()> {
        self.step("Postern starts on both nodes; the pods run on as they are");
        for node in &mut self.lab.nodes {
            let began = Instant::now();
            node.start()?;
            let ready = format!("agent ready after {} ms", began.elapsed().as_millis());
            self.screen.row(&node.name, &ready);
        }
        for pod in [&self.web, &self.catalog, &self.payments] {
            self.lab.known(pod)?;
            let identity = self.identity(pod.node, &format!("shop/{}", pod.name))?;
            let row = format!("enrolled {:9} as {identity}", pod.name);
            self.screen.row(&format!("node{}", pod.node), &row);
        }
        Ok(())
    }

    /// What the agent of a node says a pod is.
    fn identity(&self, node: usize, pod: &str) -> Result<String> {
        let status = self.lab.nodes[node - 1].status()?;
        let mut all = status["workloads"].as_array().into_iter().flatten();
        let found = all.find(|workload| workload["pod"] == pod);
        Ok(found
            .map_or("-", |workload| text(&workload["identity"]))
            .to_owned())
    }

    pub fn across_nodes(&mut self) -> Result<()> {
        self.step("With Postern: the same call");
        let (answer, wire) = self.ask_tapped("with", &self.web, &url(&self.catalog))?;
        self.check("web got the same page", answer.is_page());
        let nothing = wire.secrets == 0 && !wire.is_silent();
        self.check("the listener read nothing", nothing);
        let hybrid = wire.is_postern_tls();
        self.check("it is TLS 1.3 with a post-quantum key exchange", hybrid);
        let answer = self.ask(&self.web, &format!("{}peer", url(&self.catalog)))?;
        let client = answer.body.split(' ').next().unwrap_or_default();
        let own = client.contains(&format!(":{}:", self.web.ip));
        self.check("nginx sees the address of web, not of an agent", own);
        Ok(())
    }

    pub fn on_one_node(&mut self) -> Result<()> {
        self.step("On one node: only catalog may call payments");
        self.apply("payments", CALLERS_YAML, 1)?;
        let (answer, wire) = self.ask_tapped("local", &self.catalog, SERVICE)?;
        self.check("catalog got the page", answer.is_page());
        self.check("nothing of it went over the wire", wire.is_silent());
        Ok(())
    }

    pub fn denied_by_policy(&mut self) -> Result<()> {
        self.step("web calls payments, which the policy does not allow");
        let answer = self.ask(&self.web, SERVICE)?;
        self.explain(&DENIED_WEB, CALLERS)?;
        self.check("web got a reset and no page", answer.is_reset());
        let log = self.access_log(&self.payments)?;
        let only_catalog = log.contains(&self.catalog.ip) && !log.contains(&self.web.ip);
        self.check(
            "nginx of payments logged catalog's call and none of web's",
            only_catalog,
        );
        Ok(())
    }

    pub fn outsider_before_strict(&mut self) -> Result<()> {
        self.step("outsider, not in the mesh, calls catalog in plaintext: still accepted");
        let (answer, wire) = self.ask_tapped("outsider", &self.outsider, &url(&self.catalog))?;
        self.check("outsider got the page", answer.is_page());
        self.check("and the listener read it, too", wire.secrets > 0);
        Ok(())
    }

    pub fn outsider_under_strict(&mut self) -> Result<()> {
        self.step("The same call once mutual TLS is required, and then web's");
        self.apply("strict", STRICT_YAML, 2)?;
        let (answer, wire) = self.ask_tapped("strict", &self.outsider, &url(&self.catalog))?;
        self.explain(&DENIED_OUTSIDER, STRICT)?;
        let refused = answer.is_reset();
        self.check("outsider was refused", refused);
        self.check("no page left catalog in plaintext", wire.secrets == 0);
        let answer = self.ask(&self.web, &url(&self.catalog))?;
        self.check("web still gets the page", answer.is_page());
        Ok(())
    }

    /// Writes a policy, shows it, and waits until the agents have `count` of them.
    fn apply(&self, name: &str, yaml: &str, count: u64) -> Result<()> {
        self.lab.policy(name, yaml)?;
        self.screen.row("policy", yaml);
        self.lab.policies(count)
    }

    /// Shows why a connection was denied; it must have been by this policy.
    fn explain(&mut self, denied: &Wanted, by: &str) -> Result<()> {
        let record = denied.find(&self.lab)?;
        self.screen.row("why", text(&record["end"]));
        self.check(
            &format!("denied by {by}, says the audit log"),
            policy(&record) == by,
        );
        Ok(())
    }

    pub fn audit(&mut self) -> Result<()> {
        self.step("What the audit logs of the two nodes say of these calls");
        let mut records = Vec::new();
        for wanted in [SENT, RECEIVED, LOCAL, DENIED_WEB, DENIED_OUTSIDER] {
            let record = wanted.find(&self.lab)?;
            self.screen.row(text(&record["verdict"]), &short(&record));
            records.push(record);
        }
        let [sent, received, local, denied @ ..] = &records[..] else {
            unreachable!("five records were found")
        };
        let by_curl = |record: &Value| record["source"]["process"]["comm"] == "curl";
        self.check(
            "callers are named by process",
            by_curl(sent) && by_curl(local),
        );
        let same = |of: fn(&Value) -> &Value| of(sent) == of(received) && !of(sent).is_null();
        let identities =
            same(|r| &r["source"]["identity"]) && same(|r| &r["destination"]["identity"]);
        self.check("both nodes agree on both identities", identities);
        self.check(
            "and on the bytes",
            same(|r| &r["bytes"]) && sent["bytes"]["received"] != 0,
        );
        let hybrid = same(|r| &r["tls"]) && sent["tls"]["group"] == "X25519MLKEM768";
        self.check(
            "and on the key exchange, which is the one on the wire",
            hybrid,
        );
        let empty =
            |record: &Value| record["bytes"]["sent"] == 0 && record["bytes"]["received"] == 0;
        self.check("what was denied carried no byte", denied.iter().all(empty));
        Ok(())
    }

    fn step(&mut self, text: &str) {
        self.screen.step(text);
    }

    fn check(&mut self, what: &str, so: bool) {
        self.screen.check(what, so);
    }
}
