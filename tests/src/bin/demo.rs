//! The demonstration: two nodes, three services, and somebody who listens on the
//! wire between the nodes; first without Postern, then with it.

#[path = "demo/guard.rs"]
mod guard;
#[path = "demo/record.rs"]
mod record;
#[path = "demo/screen.rs"]
mod screen;
#[path = "demo/steps.rs"]
mod steps;
#[path = "demo/wire.rs"]
mod wire;

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use clap::Parser;
use postern_tests::{Lab, Pod, PodOptions, Running};

use screen::Screen;
use wire::Wire;

const LIMIT: Duration = Duration::from_secs(55);
const PORT: u16 = 8080;
/// Where payments is reached as a Service.
const SERVICE: &str = "http://10.96.0.3/";
/// Stands in the pages; the eavesdropper looks for it.
const SECRET: &str = "THE-SHOP-KEEPS-THIS-SECRET";

/// Show Postern at work on two nodes made of network namespaces.
#[derive(Parser)]
struct Cli {}

fn main() -> ExitCode {
    let Cli {} = Cli::parse();
    guard::run(LIMIT, || {
        let began = Instant::now();
        let mut demo = Demo::new()?;
        demo.without_postern()?;
        demo.start_agents()?;
        demo.across_nodes()?;
        demo.on_one_node()?;
        demo.denied_by_policy()?;
        demo.outsider_before_strict()?;
        demo.outsider_under_strict()?;
        demo.audit()?;
        let screen = demo.close();
        screen.finish(began.elapsed().as_secs_f64())
    })
}

/// What curl says of a connection that was reset: before its `connect` was
/// through, or after.
const RESET: [i32; 2] = [7, 56];

/// What a caller got.
struct Answer {
    code: i32,
    body: String,
}

impl Answer {
    fn is_reset(&self) -> bool {
        RESET.contains(&self.code)
    }

    fn is_page(&self) -> bool {
        self.code == 0 && self.body.contains(SECRET)
    }
}

// In the order in which things are taken down.
struct Demo {
    _servers: Vec<Running>,
    web: Pod,
    catalog: Pod,
    payments: Pod,
    outsider: Pod,
    lab: Lab,
    screen: Screen,
}

impl Demo {
    fn new() -> Result<Self> {
        let mut lab = Lab::new(2)?;
        let web = lab.pod(1, "web")?;
        let catalog = lab.pod(2, "catalog")?;
        let payments = lab.pod(2, "payments")?;
        let unmeshed = PodOptions {
            mesh: Some(false),
            ..PodOptions::default()
        };
        let outsider = lab.pod_with(1, "outsider", unmeshed)?;
        lab.service(
            "payments",
            3,
            &format!("selector: {{app: payments}}, ports: [{{port: 80, targetPort: {PORT}}}]"),
        )?;
        let servers = vec![
            catalog.nginx(PORT, &format!("teapot, blue, 12.50 EUR; {SECRET}\n"))?,
            payments.nginx(PORT, &format!("12.50 EUR paid by card; {SECRET}\n"))?,
        ];
        let demo = Self {
            _servers: servers,
            web,
            catalog,
            payments,
            outsider,
            lab,
            screen: Screen::new(),
        };
        demo.introduce();
        Ok(demo)
    }

    fn introduce(&self) {
        self.screen
            .title("Postern: two nodes, three services, and somebody who listens on the wire");
        for (pod, what) in [
            (&self.web, "calls the others with curl"),
            (&self.catalog, "nginx"),
            (&self.payments, "nginx, and the Service address 10.96.0.3"),
            (
                &self.outsider,
                "curl; not in the mesh (label postern.dev/mesh: disabled)",
            ),
        ] {
            self.screen.line(&format!(
                "node{}   {:10}{:12}{what}",
                pod.node, pod.name, pod.ip
            ));
        }
        self.screen
            .line("The pages hold a secret. The listener captures the link between the nodes.");
    }

    /// Runs curl in a pod, and shows what was asked and what came back.
    fn ask(&self, from: &Pod, url: &str) -> Result<Answer> {
        self.screen
            .row("asked", &format!("{}$ curl -sS {url}", from.name));
        let (code, body) = from.curl(&[url])?;
        self.screen.row("answer", &body);
        if code != 0 {
            self.screen
                .row("", &format!("(curl's exit code is {code})"));
        }
        Ok(Answer { code, body })
    }

    /// As [`Self::ask`], with the listener on the wire.
    fn ask_tapped(&self, name: &str, from: &Pod, url: &str) -> Result<(Answer, Wire)> {
        let (answer, wire) = Wire::tap(&self.lab, name, SECRET, || self.ask(from, url))?;
        wire.show(&self.screen);
        Ok((answer, wire))
    }

    fn access_log(&self, pod: &Pod) -> Result<String> {
        let path = pod.dir().join(format!("nginx-{PORT}/access.log"));
        std::fs::read_to_string(&path).with_context(|| path.display().to_string())
    }

    /// Takes the lab down.
    fn close(self) -> Screen {
        self.screen
    }
}

fn url(pod: &Pod) -> String {
    format!("http://{}:{PORT}/", pod.ip)
}
