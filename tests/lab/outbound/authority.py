"""A token endpoint (argv: port, directory, its issuer's name): client credentials
and token exchange, with JWTs of its own key, whose set it writes into the directory.
It says what it was asked, and does as `mode` in the directory says (ok, fail, wait).

`authority.py user DIRECTORY SUB`: prints a user's token of the same key."""

import http.server
import json
import pathlib
import sys
import threading
import time
import urllib.parse

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
ISSUER = "https://as.example"


def mint(key, **claims):
    now = int(time.time())
    claims = {"iss": ISSUER, "iat": now, "exp": now + 3600, **claims}
    return jwt.encode(claims, key, algorithm="ES256", headers={"kid": "as"})


def read_key(directory):
    pem = (directory / "as.key").read_bytes()
    return serialization.load_pem_private_key(pem, None)


if sys.argv[1] == "user":
    print(mint(read_key(pathlib.Path(sys.argv[2])), sub=sys.argv[3], aud="front"))
    sys.exit()

port, directory = int(sys.argv[1]), pathlib.Path(sys.argv[2])
key = ec.generate_private_key(ec.SECP256R1())
(directory / "as.key").write_bytes(key.private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
public = {**json.loads(ECAlgorithm.to_jwk(key.public_key())), "kid": "as", "use": "sig"}
(directory / "as.jwks").write_text(json.dumps({"keys": [public]}))
count, lock = 0, threading.Lock()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, members):
        body = json.dumps(members).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        global count
        with lock:
            count += 1
            own = count
        length = int(self.headers["content-length"])
        form = dict(urllib.parse.parse_qsl(self.rfile.read(length).decode()))
        mode = directory / "mode"
        mode = mode.read_text() if mode.exists() else "ok"
        who = subject = form.get("client_id")
        claims = {}
        if form["grant_type"] == EXCHANGE:
            given = jwt.decode(form["subject_token"], options={"verify_signature": False})
            subject = given["sub"]
            if "actor_token" in form:
                actor = jwt.decode(form["actor_token"], options={"verify_signature": False})
                claims["act"] = {"sub": actor["sub"]}
        print(f"asked {own} {form['grant_type'].rsplit(':', 1)[-1]} client={who} subject={subject} "
              f"scope={form.get('scope')} trace={self.headers.get('traceparent')}", flush=True)
        if mode == "fail":
            return self.answer(400, {"error": "invalid_scope", "error_description": "as told"})
        if mode == "wait":
            time.sleep(60)
        token = mint(key, sub=subject, aud=form.get("audience", "back"), jti=str(own),
                     scope=form.get("scope", ""), **claims)
        self.answer(200, {"access_token": token, "token_type": "Bearer", "expires_in": 600,
                          "issued_token_type": "urn:ietf:params:oauth:token-type:access_token"})

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
print("listening", flush=True)
server.serve_forever()
