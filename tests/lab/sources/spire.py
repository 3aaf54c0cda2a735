"""A SPIRE agent's admin socket, written from its protocol alone: `spire.py SOCKET DIRECTORY`.

Messages are read and written by hand. Signs by DIRECTORY/root.{pem,key}, makes the keys
itself, and gives each pod the identity of its namespace and service account.
"""

import datetime
import sys
import threading
from concurrent import futures

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from wire import fields, message

socket, directory = sys.argv[1:]
root = x509.load_pem_x509_certificate(open(f"{directory}/root.pem", "rb").read())
root_key = serialization.load_pem_private_key(open(f"{directory}/root.key", "rb").read(), None)
DOMAIN = "cluster.local"
DER = serialization.Encoding.DER
SERVICE = "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/"


def svids(request, context):
    selectors = {}
    for selector in fields(request).get(1, []):
        parts = fields(selector)
        assert parts[1][0] == b"k8s", parts
        name, value = parts[2][0].decode().split(":", 1)
        selectors[name] = value
    assert "pod-uid" in selectors, selectors
    path = f"/ns/{selectors['ns']}/sa/{selectors['sa']}"
    now = datetime.datetime.now(datetime.timezone.utc)
    end = now + datetime.timedelta(hours=1)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.UniformResourceIdentifier(f"spiffe://{DOMAIN}{path}")
    leaf = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(root.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(seconds=10))
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName([name]), critical=True)
        .sign(root_key, hashes.SHA256())
    )
    private = key.private_bytes(
        DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    identity = message((1, DOMAIN.encode()), (2, path.encode()))
    svid = message((1, leaf.public_bytes(DER)), (2, identity), (3, int(end.timestamp())))
    print("gave", path, flush=True)
    yield message((1, message((1, svid), (2, private))))
    threading.Event().wait()


def bundles(request, context):
    entry = message((1, f"spiffe://{DOMAIN}".encode()), (2, root.public_bytes(DER)))
    yield message((1, entry))
    threading.Event().wait()


class Handler(grpc.GenericRpcHandler):
    def service(self, details):
        streams = {"SubscribeToX509SVIDs": svids, "SubscribeToX509Bundles": bundles}
        stream = streams.get(details.method.removeprefix(SERVICE))
        return stream and grpc.unary_stream_rpc_method_handler(stream)


server = grpc.server(futures.ThreadPoolExecutor(16), handlers=(Handler(),))
server.add_insecure_port(f"unix:{socket}")
server.start()
print("listening", flush=True)
server.wait_for_termination()
