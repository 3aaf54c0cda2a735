//! Subcommands and exit codes: 0 done, 1 failed, 2 wrong configuration.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand, ValueEnum};
use postern::{app, config::Config, doctor, kernel, telemetry};

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
    Run(ConfigFile),
    /// Show what the running agent does, from its admin address.
    Status {
        #[command(flatten)]
        config: ConfigFile,
        #[arg(long, short, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Show what this kernel and host offer, and what the agent does without.
    Doctor(ConfigFile),
    /// Detach and remove everything that is pinned: traffic is direct again.
    Cleanup(ConfigFile),
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
        Command::Run(file) => agent(&file)?,
        Command::Status { config, output } => status(&load(&config)?, output)?,
        Command::Doctor(file) => return Ok(examine(&load_or_default(&file)?)),
        Command::Cleanup(file) => {
            let config = load_or_default(&file)?;
            for path in kernel::cleanup(&config.kernel.pin, &config.state)? {
                println!("removed {}", path.display());
            }
        }
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

fn agent(file: &ConfigFile) -> Result<()> {
    let config = load(file)?;
    let log = telemetry::start_log(&config.log).map_err(app::Misconfigured)?;
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("the async runtime")?
        .block_on(app::run(config, log))
}

fn status(config: &Config, output: Output) -> Result<()> {
    let body = get(config.listen.admin.0, "/status")?;
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

/// One HTTP/1.0 request to loopback: too little to want a client library for.
fn get(address: std::net::SocketAddr, path: &str) -> Result<String> {
    use std::io::{Read as _, Write as _};
    let limit = std::time::Duration::from_secs(5);
    let mut stream = std::net::TcpStream::connect_timeout(&address, limit)
        .with_context(|| format!("no agent at {address}"))?;
    stream.set_read_timeout(Some(limit))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.contains(" 200 ") => Ok(body.to_owned()),
        _ => bail!(
            "the agent at {address} answered {:?}",
            answer.lines().next().unwrap_or("")
        ),
    }
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
