"""An authorization server that only introspects (RFC 7662), over TLS.

`server.py make DIRECTORY ADDRESS`: makes its certificate, as.pem and as.key.
`server.py serve DIRECTORY ADDRESS PORT`: answers what tokens.json has for a token;
asks for client certificates under root.pem, and prints the one that it is shown.
"""

import base64
import datetime
import hashlib
import http.server
import ipaddress
import json
import pathlib
import ssl
import sys
import urllib.parse

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

SECRET = base64.b64encode(b"orders:s3cret").decode()


def make(directory, address):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "as.example")])
    now = datetime.datetime.utcnow()
    own = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(own, critical=False)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    (directory / "as.pem").write_bytes(certificate.public_bytes(encoding))
    plain = serialization.NoEncryption()
    pkcs8 = serialization.PrivateFormat.PKCS8
    (directory / "as.key").write_bytes(key.private_bytes(encoding, pkcs8, plain))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        form = dict(urllib.parse.parse_qsl(body, strict_parsing=True))
        shown = self.connection.getpeercert(binary_form=True)
        known = self.headers.get("authorization") == f"Basic {SECRET}" or shown
        if self.path != "/introspect" or not known:
            return self.answer(401, {"error": "invalid_client"})
        digest = hashlib.sha256(shown).digest() if shown else b""
        print("shown", base64.urlsafe_b64encode(digest).decode().rstrip("="), flush=True)
        tokens = json.loads((self.server.directory / "tokens.json").read_text())
        self.answer(200, tokens.get(form["token"], {"active": False}))

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def serve(directory, address, port):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "as.pem", directory / "as.key")
    context.load_verify_locations(directory / "root.pem")
    context.verify_mode = ssl.CERT_OPTIONAL
    server = http.server.ThreadingHTTPServer((address, port), Handler)
    server.directory = directory
    server.socket = context.wrap_socket(server.socket, server_side=True)
    print("listening", flush=True)
    server.serve_forever()


if sys.argv[1] == "make":
    make(pathlib.Path(sys.argv[2]), sys.argv[3])
else:
    serve(pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
