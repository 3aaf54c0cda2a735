//! The main job, also in virtual machines of other kernels.

use anyhow::Result;
use postern_tests::{Capture, Lab, PodOptions, count_bytes, tshark};

const MARKER: &str = "THIS-IS-THE-APPLICATIONS-PAYLOAD";

#[test]
fn smoke_http_crosses_nodes_as_mutual_tls() -> Result<()> {
    let mut lab = Lab::started()?;
    let web = lab.pod(2, "web")?;
    let client = lab.pod(1, "client")?;
    let _nginx = web.nginx(8080, MARKER)?;
    let capture = Capture::start(&lab.nodes[0], lab.path().join("wire.pcap"))?;
    let (code, body) = client.curl(&[&format!("http://{}:8080/", web.ip)])?;
    assert_eq!(
        (code, body.trim()),
        (0, MARKER),
        "{}\n{}",
        lab.nodes[0].log(),
        lab.nodes[1].log()
    );
    let (_, peers) = client.curl(&[&format!("http://{}:8080/peer", web.ip)])?;
    assert!(
        peers.starts_with(&format!("::ffff:{}:", client.ip)),
        "{peers}"
    );
    let file = capture.stop()?;
    assert_eq!(count_bytes(&file, MARKER.as_bytes())?, 0);
    assert_eq!(count_bytes(&file, b"GET /")?, 0);
    let hellos = tshark(
        &file,
        "tls.handshake.type == 2",
        &[
            "tls.handshake.extensions.supported_version",
            "tls.handshake.extensions_key_share_group",
        ],
    )?;
    // TLS 1.3, and X25519MLKEM768 (IANA 4588).
    assert!(
        !hellos.is_empty() && hellos.iter().all(|h| h == "0x0304\t4588"),
        "{hellos:?}"
    );
    assert!(tshark(&file, "http", &["frame.number"])?.is_empty());
    Ok(())
}

/// The same without the mesh: were the check above blind, this would show it.
#[test]
fn smoke_without_the_mesh_the_eavesdropper_reads_all() -> Result<()> {
    let mut lab = Lab::started()?;
    let outside = || PodOptions {
        mesh: Some(false),
        ..PodOptions::default()
    };
    let web = lab.pod_with(2, "web", outside())?;
    let client = lab.pod_with(1, "client", outside())?;
    let _nginx = web.nginx(8080, MARKER)?;
    let capture = Capture::start(&lab.nodes[0], lab.path().join("wire.pcap"))?;
    let (code, body) = client.curl(&[&format!("http://{}:8080/", web.ip)])?;
    assert_eq!((code, body.trim()), (0, MARKER));
    let file = capture.stop()?;
    assert!(count_bytes(&file, MARKER.as_bytes())? > 0);
    assert!(count_bytes(&file, b"GET /")? > 0);
    assert!(tshark(&file, "tls", &["frame.number"])?.is_empty());
    Ok(())
}
