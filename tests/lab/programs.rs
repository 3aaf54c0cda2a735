//! Real programs with protocols of their own.

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result};
use postern_tests::{Capture, Lab, Pod, count_bytes, eventually, output, text};

#[test]
fn a_postgresql_session() -> Result<()> {
    let mut lab = Lab::started()?;
    let server = lab.pod(2, "postgres")?;
    let client = lab.pod(1, "client")?;
    let data = server.dir().join("data");
    let bin = postgres_bin()?;
    output(Command::new("chown").arg("postgres").arg(server.dir()))?;
    output(Command::new("chmod").args(["a+x"]).arg(lab.path()))?;
    let mut init = as_postgres(&server, &format!("{bin}/initdb"))?;
    output(init.arg("-D").arg(&data).args(["-A", "trust", "--no-sync"]))?;
    // By address of the client: PostgreSQL must see the pod's, not loopback.
    std::fs::write(
        data.join("pg_hba.conf"),
        format!(
            "host all all {}/32 trust\nhost all all 127.0.0.0/8 reject\n",
            client.ip
        ),
    )?;
    let mut run = as_postgres(&server, &format!("{bin}/postgres"))?;
    run.arg("-D")
        .arg(&data)
        .args(["-c", "listen_addresses=*", "-c", "unix_socket_directories="]);
    let postgres = server.start("postgres", &mut run)?;
    postgres.says("ready to accept connections")?;
    let capture = Capture::start(&lab.nodes[0], lab.path().join("wire.pcap"))?;
    let mut psql = client.command("psql")?;
    psql.args(["-h", &server.ip, "-U", "postgres", "-d", "postgres", "-At"]);
    psql.args([
        "-c",
        "create table t(x text); insert into t select 'SECRET'||i from generate_series(1,50000) i",
    ]);
    psql.args([
        "-c",
        "select count(*), max(length(x)), inet_client_addr() from t",
    ]);
    let said = text(&output(&mut psql)?.stdout);
    assert!(
        said.contains(&format!("50000|11|{}", client.ip)),
        "{said}\n{}",
        postgres.output()
    );
    assert_eq!(count_bytes(&capture.stop()?, b"SECRET")?, 0);
    Ok(())
}

fn as_postgres(pod: &Pod, program: &str) -> Result<Command> {
    let mut command = pod.command("setpriv")?;
    command.args([
        "--reuid=postgres",
        "--regid=postgres",
        "--clear-groups",
        program,
    ]);
    Ok(command)
}

fn postgres_bin() -> Result<String> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").context("package postgresql")?;
    let newest = versions
        .flatten()
        .map(|v| v.path())
        .max()
        .context("package postgresql")?;
    Ok(newest.join("bin").display().to_string())
}

#[test]
fn a_redis_session() -> Result<()> {
    let mut lab = Lab::started()?;
    let server = lab.pod(2, "redis")?;
    let client = lab.pod(1, "client")?;
    let mut redis = server.command("redis-server")?;
    redis.args([
        "--port",
        "6379",
        "--bind",
        "*",
        "-::*",
        "--save",
        "",
        "--protected-mode",
        "no",
    ]);
    let redis = server.start("redis", &mut redis)?;
    redis.says("Ready to accept connections")?;
    let cli = |arguments: &[&str]| -> Result<String> {
        let mut cli = client.command("redis-cli")?;
        Ok(text(
            &output(cli.args(["-h", &server.ip]).args(arguments))?.stdout,
        ))
    };
    assert_eq!(cli(&["set", "key", "value"])?.trim(), "OK");
    assert_eq!(cli(&["get", "key"])?.trim(), "value");
    assert!(cli(&["client", "list"])?.contains(&format!("addr={}:", client.ip)));
    let mut bench = client.command("redis-benchmark")?;
    bench.args([
        "-h",
        &server.ip,
        "-n",
        "5000",
        "-c",
        "20",
        "-P",
        "16",
        "-q",
        "-t",
        "set,get,lrange_300",
    ]);
    output(&mut bench)?;
    Ok(())
}

#[test]
fn iperf_both_ways() -> Result<()> {
    let mut lab = Lab::started()?;
    let server = lab.pod(2, "iperf")?;
    let client = lab.pod(1, "client")?;
    let mut iperf = server.command("iperf3")?;
    let _server = server.start("iperf", iperf.args(["-s", "-p", "5201"]))?;
    eventually("iperf3 listens", Duration::from_secs(10), || {
        server.listens(5201)
    })?;
    for reverse in [&["-P", "4"][..], &["-P", "4", "-R"][..]] {
        let mut result = serde_json::Value::Null;
        eventually(
            "iperf3 is not busy with the run before",
            Duration::from_secs(20),
            || {
                result = run_iperf(&client, &server, reverse).unwrap_or_default();
                !result["error"].to_string().contains("busy")
            },
        )?;
        let received = result["end"]["sum_received"]["bytes"].as_u64().unwrap_or(0);
        // iperf3 ends a run when all is sent, not when all has arrived.
        assert!(
            received >= 100 << 20,
            "{reverse:?} {} {}",
            result["error"],
            result["end"]
        );
    }
    Ok(())
}

fn run_iperf(client: &Pod, server: &Pod, reverse: &[&str]) -> Result<serde_json::Value> {
    let mut run = client.command("iperf3")?;
    run.args(["-c", &server.ip, "-p", "5201", "-n", "200M", "-J"])
        .args(reverse);
    // It fails with a result that says why.
    Ok(serde_json::from_slice(&run.output()?.stdout)?)
}
