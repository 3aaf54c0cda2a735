"""A client with DPoP (RFC 9449).

`client.py key FILE`: makes a key, prints its thumbprint (RFC 7638).
`client.py get FILE URL HTU TOKEN`: asks in several ways, prints statuses as JSON.
"""

import base64
import hashlib
import json
import pathlib
import sys
import time
import urllib.error
import urllib.request
import uuid

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm


def b64(data):
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def public(key):
    jwk = json.loads(ECAlgorithm.to_jwk(key.public_key()))
    return {name: jwk[name] for name in ("crv", "kty", "x", "y")}


def proof(key, htu, token, **changes):
    claims = {
        "jti": str(uuid.uuid4()), "htm": "GET", "htu": htu, "iat": int(time.time()),
        "ath": b64(hashlib.sha256(token.encode()).digest()), **changes,
    }
    headers = {"typ": "dpop+jwt", "jwk": public(key)}
    return jwt.encode(claims, key, algorithm="ES256", headers=headers)


def ask(url, **headers):
    headers = {name: value for name, value in headers.items() if value}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


if sys.argv[1] == "key":
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    pathlib.Path(sys.argv[2]).write_bytes(pem)
    canonical = json.dumps(public(key), sort_keys=True, separators=(",", ":"))
    print(b64(hashlib.sha256(canonical.encode()).digest()))
else:
    path, url, htu, token = sys.argv[2:]
    key = serialization.load_pem_private_key(pathlib.Path(path).read_bytes(), None)
    first = proof(key, htu, token)
    dpop = f"DPoP {token}"
    status, body, headers = ask(url, Authorization=dpop, DPoP=first)
    nonce = headers.get("dpop-nonce")
    if nonce:
        fresh = proof(key, htu, token, nonce=nonce)
        status, body, _ = ask(url, Authorization=dpop, DPoP=fresh)
        first = fresh
    again, _, challenged = ask(url, Authorization=dpop, DPoP=first)
    thief = ec.generate_private_key(ec.SECP256R1())
    print(json.dumps({
        "nonce": bool(nonce),
        "first": status,
        "body": body,
        "again": again,
        "challenge": challenged.get("www-authenticate"),
        "bearer": ask(url, Authorization=f"Bearer {token}")[0],
        "unproven": ask(url, Authorization=dpop)[0],
        "other_key": ask(url, Authorization=dpop, DPoP=proof(thief, htu, token, nonce=nonce))[0],
        "other_target": ask(url, Authorization=dpop, DPoP=proof(key, htu + "x", token, nonce=nonce))[0],
    }))
