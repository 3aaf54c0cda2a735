"""A web application that knows OpenID Connect and nothing of the mesh: it sends people
to log in, gets their token, and shows what another service says to it.

front.py ISSUER ROOTS CLIENT NEXT PORT CERTIFICATE KEY
"""

import base64
import hashlib
import http.server
import json
import secrets
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request

ISSUER, ROOTS, CLIENT, NEXT, PORT, CERTIFICATE, KEY = sys.argv[1:]
TLS = ssl.create_default_context(cafile=ROOTS)
PENDING = {}


def fetch(url, form=None, headers=None, tls=None):
    data = urllib.parse.urlencode(form).encode() if form else None
    request = urllib.request.Request(url, data, headers or {})
    try:
        with urllib.request.urlopen(request, timeout=20, context=tls) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


class Front(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        own = f"https://{self.headers['Host']}/callback"
        if url.path == "/login":
            state, verifier = secrets.token_urlsafe(16), secrets.token_urlsafe(48)
            PENDING[state] = verifier
            digest = hashlib.sha256(verifier.encode()).digest()
            parameters = {
                "response_type": "code",
                "client_id": CLIENT,
                "redirect_uri": own,
                "scope": "openid profile orders.read",
                "state": state,
                "code_challenge": base64.urlsafe_b64encode(digest).rstrip(b"=").decode(),
                "code_challenge_method": "S256",
            }
            where = f"{ISSUER}/authorize?{urllib.parse.urlencode(parameters)}"
            return self.answer(302, "", Location=where)
        if url.path == "/callback":
            verifier = PENDING.pop(query.get("state"), None)
            if verifier is None or query.get("iss") != ISSUER:
                return self.answer(400, "not ours")
            return self.answer(200, json.dumps(self.orders(query, verifier, own)))
        return self.answer(404, "")

    def orders(self, query, verifier, own):
        trace = {"traceparent": self.headers["traceparent"]} if self.headers["traceparent"] else {}
        form = {
            "grant_type": "authorization_code",
            "client_id": CLIENT,
            "code": query["code"],
            "redirect_uri": own,
            "code_verifier": verifier,
        }
        status, body = fetch(f"{ISSUER}/token", form, trace, TLS)
        if status != 200:
            return {"token": status, "body": body}
        token = json.loads(body)["access_token"]
        asks = dict(trace, Authorization=f"Bearer {token}")
        status, body = fetch(f"http://{NEXT}/orders", headers=asks)
        # For the test alone: what the user's own token is worth elsewhere.
        with open("token", "w", encoding="ascii") as file:
            file.write(token)
        return {"status": status, "body": body}

    def answer(self, status, body, **headers):
        body = body.encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


server = http.server.ThreadingHTTPServer(("", int(PORT)), Front)
own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
own.load_cert_chain(CERTIFICATE, KEY)
server.socket = own.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
print("listening", flush=True)
server.serve_forever()
