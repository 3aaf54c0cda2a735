//! The main job, also in virtual machines of other kernels.

use anyhow::Result;
use postern_tests::{Capture, Lab, count_bytes, tshark};

const MARKER: &str = "THIS-IS-THE-APPLICATIONS-PAYLOAD";

#[test]
fn smoke_http_crosses_nodes_as_mutual_tls() -> Result<()> {
    let mut lab = Lab::started()?;
    let web = lab.pod(2, "web")?;
    let client = lab.pod(1, "client")?;
    let _nginx = web.nginx(8080, MARKER)?;
    let capture = Capture::start(&lab.nodes[0], lab.path().join("wire.pcap"))?;
    let (code, body) = client.curl(&[&format!("http://{}:8080/", web.ip)])?;
    assert_eq!((code, body.trim()), (0, MARKER), "{}\n{}", lab.nodes[0].log(), lab.nodes[1].log());
    let (_, peers) = client.curl(&[&format!("http://{}:8080/peer", web.ip)])?;
    assert!(peers.contains(&format!("{}:", client.ip)), "{peers}");
    let file = capture.stop()?;
    assert_eq!(count_bytes(&file, MARKER.as_bytes())?, 0);
    assert_eq!(count_bytes(&file, b"GET /")?, 0);
    let versions = tshark(&file, "tls.handshake.type == 2", &["tls.handshake.extensions.supported_version"])?;
    assert!(!versions.is_empty() && versions.iter().all(|v| v == "0x0304"), "{versions:?}");
    Ok(())
}
