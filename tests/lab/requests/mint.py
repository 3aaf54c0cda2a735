"""Mints keys and tokens with PyJWT: prints {"jwks": .., "tokens": {name: token}}.

argv: the presenter's SPIFFE ID, for bound tokens.
"""

import json
import sys
import time

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

ISSUER = "https://issuer.example"
now = int(time.time())
keys = {
    "rsa": (rsa.generate_private_key(public_exponent=65537, key_size=2048), "RS256", RSAAlgorithm),
    "ec": (ec.generate_private_key(ec.SECP256R1()), "ES256", ECAlgorithm),
    "other": (rsa.generate_private_key(public_exponent=65537, key_size=2048), "RS256", RSAAlgorithm),
}


def public(kid):
    key, algorithm, kind = keys[kid]
    jwk = json.loads(kind.to_jwk(key.public_key()))
    return {**jwk, "kid": kid, "alg": algorithm, "use": "sig"}


def token(kid="rsa", **changes):
    claims = {"iss": ISSUER, "sub": "alice", "aud": "shop", "iat": now, "exp": now + 3600}
    claims = {k: v for k, v in {**claims, **changes}.items() if v is not None}
    key, algorithm, _ = keys[kid]
    return jwt.encode(claims, key, algorithm=algorithm, headers={"kid": kid})


print(json.dumps({
    "jwks": {"keys": [public("rsa"), public("ec")]},
    "rotated": {"keys": [public("other")]},
    "tokens": {
        "good": token(),
        "elliptic": token("ec"),
        "wrong_subject": token(sub="mallory"),
        "unattached_issuer": token(iss="https://elsewhere.example"),
        "wrong_audience": token(aud="bank"),
        "expired": token(exp=now - 120),
        # Within the leeway of 60 s, for another few seconds.
        "lapsing": token(exp=now - 60 + int(sys.argv[2])),
        "foreign_key": token("other"),
        "bound": token(azp=sys.argv[1]),
    },
}))
