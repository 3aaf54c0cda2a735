//! Subcommands and exit codes: 0 done, 1 failed, 2 wrong configuration.

use std::{
    io::{BufRead, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand, ValueEnum};
use postern::{
    app,
    audit::command::{self, AuditCommand},
    authority::{
        admin,
        people::{self, command::Change},
    },
    boot, bugtool, check,
    config::{Config, Normalization},
    crds, doctor,
    identity::TrustDomain,
    inspect, kernel, telemetry,
};

/// A connection is many small allocations on the thread that carries it: with this allocator
/// they cost a fraction of what they do with the C library's.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// How it is set: memory that is not in use goes back to the system within a second, and
/// not each thread has an arena of its own.
#[unsafe(export_name = "_rjem_malloc_conf")]
static ALLOCATOR_CONFIGURATION: &[u8; 78] =
    b"background_thread:true,max_background_threads:1,narenas:4,dirty_decay_ms:1000\0";

/// Node agent: mutual TLS, identity, policy and audit for every pod of a node.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Where the configuration is.
#[derive(clap::Args)]
struct ConfigFile {
    /// Configuration file.
    #[arg(long, short, default_value = "/etc/postern/agent.yaml")]
    config: PathBuf,
}

#[derive(Subcommand)]
enum Command {
    /// Run the agent of this node.
    Run {
        #[command(flatten)]
        file: ConfigFile,
        /// Name of this node, as pods name it; goes before the configuration's `node`.
        #[arg(long)]
        node: Option<String>,
    },
    /// Show what the running agent does, from its admin address.
    Status {
        #[command(flatten)]
        config: ConfigFile,
        #[arg(long, short, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Show what this kernel and host offer, and what the agent does without.
    Doctor(ConfigFile),
    /// Say whether this node, or a cluster, is fit for Postern, and what to do where it
    /// is not. Exit code 1: something must be done first.
    InstallCheck {
        #[command(flatten)]
        config: ConfigFile,
        /// Look at the cluster that this file names, instead of this node.
        #[arg(long, value_name = "FILE")]
        kubeconfig: Option<PathBuf>,
        /// Look at the rights of this service account instead of the asker's.
        #[arg(long, value_name = "NAMESPACE/NAME")]
        service_account: Option<String>,
        #[arg(long, short, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Write what others need to find out what is wrong here into one archive, without
    /// secrets.
    Bugtool {
        #[command(flatten)]
        config: ConfigFile,
        /// The archive; not replaced if it is there.
        #[arg(long, short, value_name = "FILE")]
        output: Option<PathBuf>,
        /// Last records of the audit log to put in: who spoke with whom.
        #[arg(long, value_name = "N", default_value_t = 0)]
        audit: usize,
        /// The agent's log, where it is in a file.
        #[arg(long, value_name = "FILE")]
        log: Option<PathBuf>,
    },
    /// Detach and remove everything that is pinned: traffic is direct again.
    Cleanup {
        #[command(flatten)]
        file: ConfigFile,
        /// Then wait for SIGTERM, as the container of a DaemonSet has to.
        #[arg(long)]
        stay: bool,
    },
    /// Refuse pods' TCP connects until an agent is ready: at boot, before the kubelet.
    Guard {
        #[command(flatten)]
        config: ConfigFile,
        /// Instead make the host whose directories are below DIR do so at its next boot:
        /// this program, its configuration and a systemd unit are copied there.
        #[arg(long, value_name = "DIR", conflicts_with = "remove")]
        install: Option<PathBuf>,
        /// Instead take away what `--install` put below DIR.
        #[arg(long, value_name = "DIR")]
        remove: Option<PathBuf>,
    },
    /// Work on policies, without an agent.
    Policy {
        #[command(subcommand)]
        command: PolicyCommand,
    },
    /// The authorization server, and the trust domain's certificate authority.
    Authority {
        #[command(flatten)]
        file: AuthorityFile,
        #[command(subcommand)]
        command: AuthorityCommand,
    },
    /// Ask the audit log, with or without an agent.
    Audit {
        #[command(subcommand)]
        command: Box<AuditCommand>,
    },
    /// Print the CustomResourceDefinitions of Postern's own policies, for Kubernetes.
    Crds,
    /// Work on the configuration.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Print the JSON schema of the configuration.
    Schema,
    /// Check a configuration file.
    Check(ConfigFile),
}

/// Where the authority's configuration is.
#[derive(clap::Args)]
struct AuthorityFile {
    /// Configuration file.
    #[arg(
        long,
        short,
        global = true,
        default_value = "/etc/postern/authority.yaml"
    )]
    config: PathBuf,
}

#[derive(Subcommand)]
enum AuthorityCommand {
    /// Run the server.
    Run,
    /// Check the configuration file.
    Check,
    /// Work on clients.
    Client {
        #[command(subcommand)]
        command: admin::ClientCommand,
    },
    /// Work on signing keys.
    Keys {
        #[command(subcommand)]
        command: admin::KeysCommand,
    },
    /// Tokens with which the agent of a node joins.
    JoinToken {
        #[command(subcommand)]
        command: JoinTokenCommand,
    },
    /// Agents of nodes.
    Node {
        #[command(subcommand)]
        command: NodeCommand,
    },
    /// People who can log in, beside those of the configuration file.
    User {
        #[command(subcommand)]
        command: Change,
    },
}

#[derive(Subcommand)]
enum JoinTokenCommand {
    /// Make one, for one node and to be used once, and print it.
    Create {
        /// As pods name it in `spec.nodeName`.
        #[arg(long)]
        node: String,
        /// How long it can be used.
        #[arg(long, default_value = "1h", value_parser = humantime::parse_duration)]
        ttl: std::time::Duration,
    },
    /// Print those that were made, a line each: id, state, node.
    List,
    /// Make one void, by its id.
    Revoke { id: String },
}

#[derive(Subcommand)]
enum NodeCommand {
    /// Refuse the certificates that a node's agent has: it must join anew.
    Revoke { node: String },
}

#[derive(Subcommand)]
enum PolicyCommand {
    /// Check a directory of policies: everything that is wrong, with file, line and field.
    Check {
        directory: PathBuf,
        #[command(flatten)]
        context: Context,
        #[arg(long, short, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Decide on requests as the agent would: a JSON line in, a JSON line out.
    Eval(Evaluate),
    /// Say of each request what was decided, which rules were tried, and where each
    /// failed.
    Explain(Evaluate),
}

/// How policies are read.
#[derive(clap::Args)]
struct Context {
    /// Namespace whose policies reach the whole mesh.
    #[arg(long, value_name = "NS", default_value = "istio-system")]
    root_namespace: String,
    #[arg(long, value_name = "TD", default_value_t, value_parser = trust_domain)]
    trust_domain: TrustDomain,
    /// Further trust domains that are ours. May be repeated.
    #[arg(long = "trust-domain-alias", value_name = "TD", value_parser = trust_domain)]
    trust_domain_aliases: Vec<TrustDomain>,
    #[arg(long, value_enum, default_value_t)]
    path_normalization: Normalization,
    /// Proxies whose X-Forwarded-For is believed.
    #[arg(long, value_name = "N", default_value_t = 0)]
    trusted_proxies: usize,
    /// Where the secrets are that policies name.
    #[arg(long, value_name = "DIR", default_value = "/etc/postern/secrets")]
    secrets: PathBuf,
}

fn trust_domain(text: &str) -> Result<TrustDomain, String> {
    TrustDomain::try_from(text.to_owned()).map_err(|e| e.to_string())
}

#[derive(clap::Args)]
struct Evaluate {
    /// Directory of policies.
    #[arg(long, value_name = "DIR")]
    policies: PathBuf,
    /// The workload: `{namespace, serviceAccount, labels}`, JSON or YAML.
    #[arg(long, value_name = "FILE")]
    workload: PathBuf,
    /// Requests, one JSON object a line; `-` is standard input.
    #[arg(long, value_name = "FILE")]
    requests: PathBuf,
    /// Seconds since 1970 instead of now, for tokens.
    #[arg(long, value_name = "UNIX")]
    now: Option<u64>,
    #[command(flatten)]
    context: Context,
    /// The agent's configuration, for its extension providers and its key sources.
    #[arg(long, short)]
    config: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Output {
    Text,
    Json,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("postern: {error:#}");
            if error.is::<app::Misconfigured>() {
                ExitCode::from(2)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Run { file, node } => agent(&file, node)?,
        Command::Status { config, output } => status(&load(&config)?, output)?,
        Command::Doctor(file) => return Ok(examine(&load_or_default(&file)?)),
        Command::InstallCheck {
            config,
            kubeconfig,
            service_account,
            output,
        } => {
            let scope = check::Scope {
                kubeconfig: kubeconfig.as_deref(),
                service_account: service_account.as_deref(),
            };
            return install_check(&load_or_default(&config)?, &scope, output);
        }
        Command::Bugtool {
            config,
            output,
            audit,
            log,
        } => {
            let config = load_or_default(&config)?;
            let name = || bugtool::name(&config.node_name(), std::time::SystemTime::now());
            let path = output.unwrap_or_else(name);
            bugtool::write(&config, &bugtool::Wanted { audit, log }, &path)?;
            println!("{}", path.display());
        }
        Command::Cleanup { file, stay } => {
            let config = load_or_default(&file)?;
            for path in app::cleanup(&config)? {
                println!("removed {}", path.display());
            }
            if stay {
                wait_for_end()?;
            }
        }
        Command::Guard {
            remove: Some(host), ..
        } => {
            for path in boot::remove(&host)? {
                println!("removed {}", path.display());
            }
        }
        Command::Guard {
            config, install, ..
        } => guard(&config, install.as_deref())?,
        Command::Policy { command } => return policy(command),
        Command::Authority { file, command } => authority(&file, command)?,
        Command::Audit { command } => {
            let code = command::run(*command).map_err(|error| match error {
                command::AuditError::Config(wrong) => {
                    anyhow::Error::from(app::Misconfigured(wrong.to_string()))
                }
                other => other.into(),
            })?;
            return Ok(ExitCode::from(code));
        }
        Command::Crds => print!("{}", crds::yaml()?),
        Command::Config {
            command: ConfigCommand::Schema,
        } => {
            println!(
                "{}",
                serde_json::to_string_pretty(&schemars::schema_for!(Config))?
            );
        }
        Command::Config {
            command: ConfigCommand::Check(file),
        } => {
            load(&file)?;
            println!("{}: valid", file.config.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn authority(file: &AuthorityFile, command: AuthorityCommand) -> Result<()> {
    use postern::authority::{self, ca::commands};
    if let AuthorityCommand::User {
        command: Change::Hash,
    } = command
    {
        println!("{}", people::command::hash()?);
        return Ok(());
    }
    let config =
        authority::Config::load(&file.config).map_err(|e| app::Misconfigured(e.to_string()))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("the async runtime")?;
    match command {
        AuthorityCommand::Check => {
            config.check().map_err(app::Misconfigured)?;
            println!("{}: valid", file.config.display());
        }
        AuthorityCommand::Run => {
            let _log = telemetry::start_log(&config.log).map_err(app::Misconfigured)?;
            runtime.block_on(authority::run(config))?;
        }
        AuthorityCommand::Client { command } => {
            runtime.block_on(admin::clients(config, command))?;
        }
        AuthorityCommand::Keys { command } => admin::keys(&config, &command)?,
        AuthorityCommand::User { command } => {
            for line in runtime.block_on(people::command::run(&config, command))? {
                println!("{line}");
            }
        }
        AuthorityCommand::JoinToken { command } => match command {
            JoinTokenCommand::Create { node, ttl } => {
                let made = commands::create_join_token(&config, &node, ttl);
                println!("{}", *runtime.block_on(made)?);
            }
            JoinTokenCommand::List => {
                for (token, state) in runtime.block_on(commands::join_tokens(&config))? {
                    println!("{}  {state:<8} {}", token.id, token.node);
                }
            }
            JoinTokenCommand::Revoke { id } => {
                runtime.block_on(commands::revoke_join_token(&config, &id))?;
            }
        },
        AuthorityCommand::Node {
            command: NodeCommand::Revoke { node },
        } => runtime.block_on(commands::revoke_node(&config, &node))?,
    }
    Ok(())
}

fn policy(command: PolicyCommand) -> Result<ExitCode> {
    let (file, readable) = match command {
        PolicyCommand::Check {
            directory,
            context,
            output,
        } => return check(&directory, &context.into(), output),
        PolicyCommand::Eval(file) => (file, false),
        PolicyCommand::Explain(file) => (file, true),
    };
    let config = match &file.config {
        Some(path) => Config::load(path).map_err(|e| app::Misconfigured(e.to_string()))?,
        None => Config::default(),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("the async runtime")?;
    runtime.block_on(async {
        let evaluation = inspect::Evaluation::new(
            &file.policies,
            &file.workload,
            &file.context.into(),
            file.now,
            &config,
        )?;
        evaluation.ready().await;
        let requests: Box<dyn BufRead> = if file.requests.as_os_str() == "-" {
            Box::new(std::io::stdin().lock())
        } else {
            let open = std::fs::File::open(&file.requests);
            let open = open.with_context(|| file.requests.display().to_string())?;
            Box::new(std::io::BufReader::new(open))
        };
        let mut out = std::io::stdout().lock();
        let unreadable = evaluation
            .answer_all(requests, |answer, explained| match readable {
                true => write!(out, "{}\n{explained}", answer.line()),
                false => writeln!(out, "{}", serde_json::to_string(answer)?),
            })
            .await?;
        Ok(match unreadable {
            0 => ExitCode::SUCCESS,
            _ => ExitCode::FAILURE,
        })
    })
}

fn check(directory: &Path, context: &inspect::Context, output: Output) -> Result<ExitCode> {
    let (valid, problems) = match inspect::load(directory, context) {
        Ok(set) => {
            if matches!(output, Output::Text) {
                for warning in set.warnings() {
                    println!("warning: {warning}");
                }
                println!("{}: {} policies, valid", directory.display(), set.len());
            }
            (true, Vec::new())
        }
        Err(problems) => (false, problems),
    };
    match output {
        Output::Text => problems.iter().for_each(|problem| println!("{problem}")),
        Output::Json => {
            let checked = inspect::Checked { valid, problems };
            println!("{}", serde_json::to_string(&checked)?);
        }
    }
    Ok(if valid {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

impl From<Context> for inspect::Context {
    fn from(context: Context) -> Self {
        Self {
            root_namespace: context.root_namespace,
            trust_domain: context.trust_domain,
            aliases: context.trust_domain_aliases,
            normalization: context.path_normalization,
            trusted_proxies: context.trusted_proxies,
            secrets: context.secrets,
        }
    }
}

fn load(file: &ConfigFile) -> Result<Config> {
    Config::load(&file.config).map_err(|e| app::Misconfigured(e.to_string()).into())
}

/// For commands that make sense on a host without configuration.
fn load_or_default(file: &ConfigFile) -> Result<Config> {
    if file.config.exists() {
        load(file)
    } else {
        Ok(Config::default())
    }
}

/// Until this process is told to end.
fn wait_for_end() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .context("the async runtime")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        Ok(())
    })
}

fn agent(file: &ConfigFile, node: Option<String>) -> Result<()> {
    let mut config = load(file)?;
    // One file serves all nodes of a DaemonSet.
    config.node = node.unwrap_or(config.node);
    let log = telemetry::start_log(&config.log).map_err(app::Misconfigured)?;
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("the async runtime")?
        .block_on(app::run(config, log))
}

fn guard(file: &ConfigFile, install: Option<&Path>) -> Result<()> {
    let config = load_or_default(file)?;
    if let Some(host) = install {
        for path in boot::install(host, &file.config)? {
            println!("installed {}", path.display());
        }
        return Ok(());
    }
    let (cgroup, _mounts) = app::hook_cgroup(&config)?;
    println!(
        "{}",
        match kernel::guard(&config.kernel, &cgroup)? {
            true => "pods cannot open TCP connections until an agent is ready",
            false => "an agent has been ready since boot: its hooks guard",
        }
    );
    Ok(())
}

fn status(config: &Config, output: Output) -> Result<()> {
    let body = telemetry::ask(&config.listen.admin, "/status")?;
    let status: telemetry::Status = serde_json::from_str(&body).context("the agent's answer")?;
    match output {
        Output::Json => println!("{body}"),
        Output::Text => {
            println!("node         {}", status.node);
            println!("version      {}", status.version);
            println!("ready        {}", if status.ready { "yes" } else { "no" });
            println!("connections  {}", status.connections);
            println!("policies     {}", status.policies);
            println!("trust roots  {}", status.roots);
            println!(
                "workloads    {} here, {} known",
                status.workloads.len(),
                status.known_workloads
            );
            for workload in &status.workloads {
                let addresses = workload.addresses.join(",");
                println!(
                    "  {:<32} {:<10} {} {}",
                    workload.pod, workload.state, addresses, workload.identity
                );
            }
            for problem in &status.problems {
                println!("problem      {problem}");
            }
        }
    }
    if !status.problems.is_empty() {
        bail!("the agent has problems");
    }
    Ok(())
}

fn install_check(config: &Config, scope: &check::Scope<'_>, output: Output) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("the async runtime")?;
    let report = runtime.block_on(check::run(config, scope));
    match output {
        Output::Text => print!("{report}"),
        Output::Json => println!("{}", serde_json::to_string(&report)?),
    }
    Ok(match report.fit() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn examine(config: &Config) -> ExitCode {
    let mut fit = true;
    for finding in doctor::examine(config) {
        let mark = match (finding.ok, finding.required) {
            (true, _) => "ok    ",
            (false, true) => "FAIL  ",
            (false, false) => "absent",
        };
        fit &= finding.ok || !finding.required;
        println!("{mark}  {}", finding.what);
    }
    if fit {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
