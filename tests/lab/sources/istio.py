"""A CA as istiod's, written from its protocol alone: `istio.py ADDRESS PORT DIRECTORY`.

Messages are read and written by hand. Signs by DIRECTORY/root.{pem,key}, shows a TLS
certificate of the same root, and wants the token in DIRECTORY/token.
"""

import datetime
import ipaddress
import sys
from concurrent import futures

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from wire import fields, message

address, port, directory = sys.argv[1:]
root = x509.load_pem_x509_certificate(open(f"{directory}/root.pem", "rb").read())
root_key = serialization.load_pem_private_key(open(f"{directory}/root.key", "rb").read(), None)


def sign(key, name):
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(root.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=2))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([name]), critical=True)
        .sign(root_key, hashes.SHA256())
    )


def pem(certificate):
    return certificate.public_bytes(serialization.Encoding.PEM)


def create(request, context):
    shown = dict(context.invocation_metadata()).get("authorization", "")
    if shown != "Bearer " + open(f"{directory}/token").read().strip():
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "authentication failure")
    asked = fields(request)
    # metadata.fields["ImpersonatedIdentity"].string_value
    entry = fields(fields(asked[4][0])[1][0])
    assert entry[1][0] == b"ImpersonatedIdentity", entry
    name = fields(entry[2][0])[3][0].decode()
    csr = x509.load_pem_x509_csr(asked[1][0])
    assert csr.is_signature_valid
    leaf = sign(csr.public_key(), x509.UniformResourceIdentifier(name))
    print("signed", name, flush=True)
    return message((1, pem(leaf)), (1, pem(root)))


class Handler(grpc.GenericRpcHandler):
    def service(self, details):
        if details.method == "/istio.v1.auth.IstioCertificateService/CreateCertificate":
            return grpc.unary_unary_rpc_method_handler(create)


key = ec.generate_private_key(ec.SECP256R1())
own = sign(key.public_key(), x509.IPAddress(ipaddress.ip_address(address)))
private = key.private_bytes(
    serialization.Encoding.PEM,
    serialization.PrivateFormat.PKCS8,
    serialization.NoEncryption(),
)
server = grpc.server(futures.ThreadPoolExecutor(4), handlers=(Handler(),))
server.add_secure_port(
    f"{address}:{port}", grpc.ssl_server_credentials([(private, pem(own) + pem(root))])
)
server.start()
print("listening", flush=True)
server.wait_for_termination()
