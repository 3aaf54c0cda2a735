"""Asks the authorization server as Authlib does. Arguments: a directory to work in,
and the issuer. Secrets come in the environment."""

import datetime
import json
import os
import sys
import time

import requests
from authlib.integrations.base_client.errors import OAuthError
from authlib.integrations.requests_client import OAuth2Session
from authlib.jose import JsonWebKey, JsonWebToken
from authlib.oauth2.rfc7523 import PrivateKeyJWT
from authlib.oauth2.rfc8414 import AuthorizationServerMetadata
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

directory, issuer = sys.argv[1:]
root = f"{directory}/state/root.pem"
EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"


def write(name, content, mode=0o600):
    path = f"{directory}/{name}"
    with open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode), "wb") as file:
        file.write(content)
    return path


def pem(key):
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def certificate(name, key, issuer_name, issuer_key):
    now = datetime.datetime.utcnow()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer_name or subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False)
        .sign(issuer_key or key, hashes.SHA384())
        .public_bytes(serialization.Encoding.PEM)
    )


def session(client, method, secret=None, cert=None):
    made = OAuth2Session(client, secret, token_endpoint_auth_method=method)
    made.verify, made.cert = root, cert
    # Or the environment's certificates go before these.
    made.trust_env = False
    return made


def expect(answer, status, error=None):
    assert answer.status_code == status, (answer.status_code, answer.text)
    if error:
        assert answer.json()["error"] == error, answer.text


# What the server says of itself.
metadata = requests.get(f"{issuer}/.well-known/oauth-authorization-server", verify=root)
metadata = AuthorizationServerMetadata(metadata.json())
metadata.validate()
assert metadata["issuer"] == issuer
keys = JsonWebKey.import_key_set(requests.get(metadata["jwks_uri"], verify=root).json())
token_endpoint = metadata["token_endpoint"]


def claims(token):
    read = JsonWebToken(["ES256"]).decode(token["access_token"], keys)
    assert read.header["typ"] == "at+jwt"
    assert read["iss"] == issuer
    read.validate()
    return read


# A secret, in the header and in the body.
for method in ["client_secret_basic", "client_secret_post"]:
    service = session("service", method, os.environ["SERVICE_SECRET"])
    token = service.fetch_token(
        token_endpoint, grant_type="client_credentials", scope="read"
    )
    said = claims(token)
    assert (said["sub"], said["scope"]) == ("service", "read"), said
    assert said["aud"] == ["https://api.example"], said

# A key of its own.
key = ec.generate_private_key(ec.SECP256R1())
jwk = JsonWebKey.import_key(pem(key))
write("client.jwks", json.dumps({"keys": [jwk.as_dict(is_private=False)]}).encode())
keyed = session("keyed", "private_key_jwt", pem(key))
# Authlib's assertions last an hour if they are left alone: that is refused.
keyed.register_client_auth_method(PrivateKeyJWT(token_endpoint, alg="ES256"))
try:
    keyed.fetch_token(token_endpoint, grant_type="client_credentials")
    sys.exit("an assertion for an hour was taken")
except OAuthError as error:
    assert error.error == "invalid_client", error
soon = {"exp": int(time.time()) + 60}
keyed.register_client_auth_method(
    PrivateKeyJWT(token_endpoint, claims=soon, alg="ES256")
)
token = keyed.fetch_token(token_endpoint, grant_type="client_credentials")
assert claims(token)["sub"] == "keyed"

# A certificate that is registered, and one of the trust domain's root.
own = ec.generate_private_key(ec.SECP256R1())
pinned = write("pinned.pem", certificate("pinned.example", own, None, None))
pinned = (pinned, write("pinned.key", pem(own)))
token = session("pinned", "none", cert=pinned).fetch_token(
    token_endpoint, grant_type="client_credentials"
)
assert "x5t#S256" in claims(token)["cnf"]
with open(root, "rb") as file:
    above = x509.load_pem_x509_certificate(file.read())
with open(f"{directory}/state/root.key", "rb") as file:
    above_key = serialization.load_pem_private_key(file.read(), None)
issued = certificate("client.example", own, above.subject, above_key)
issued = (write("named.pem", issued), f"{directory}/pinned.key")
token = session("named", "none", cert=issued).fetch_token(
    token_endpoint, grant_type="client_credentials"
)
assert claims(token)["sub"] == "named"
form = {"grant_type": "client_credentials", "client_id": "named"}
for cert in [None, pinned]:
    expect(requests.post(token_endpoint, form, verify=root, cert=cert), 401, "invalid_client")

# The API that the token is for asks what it is good for, and exchanges it.
token = service.fetch_token(token_endpoint, grant_type="client_credentials")
api = session("api", "client_secret_basic", os.environ["API_SECRET"])


def introspected():
    answer = api.introspect_token(metadata["introspection_endpoint"], token["access_token"])
    expect(answer, 200)
    return answer.json()


assert introspected()["active"] and introspected()["sub"] == "service"
exchanged = api.fetch_token(
    token_endpoint,
    grant_type=EXCHANGE,
    subject_token=token["access_token"],
    subject_token_type=ACCESS_TOKEN,
)
assert exchanged["issued_token_type"] == ACCESS_TOKEN
said = claims(exchanged)
assert (said["sub"], said["act"]) == ("service", {"sub": "api"}), said
assert said["aud"] == ["https://behind.example"] and said["scope"] == "read", said

# Revoked by its client, it is good for nothing.
expect(service.revoke_token(metadata["revocation_endpoint"], token["access_token"]), 200)
assert introspected() == {"active": False}
form = {
    "grant_type": EXCHANGE,
    "subject_token": token["access_token"],
    "subject_token_type": ACCESS_TOKEN,
}
auth = ("api", os.environ["API_SECRET"])
expect(requests.post(token_endpoint, form, auth=auth, verify=root), 400, "invalid_request")
auth = ("service", "wrong")
answer = requests.post(token_endpoint, form, auth=auth, verify=root)
expect(answer, 401, "invalid_client")
assert answer.headers["WWW-Authenticate"].startswith("Basic ")
print("all as it should be")
