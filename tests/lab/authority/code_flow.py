"""Authlib against the authorization server (argv: issuer, root certificate): code with
PKCE, ID token, refresh, userinfo, revocation. Prints what was seen as one JSON object."""

import html.parser
import json
import sys
import urllib.parse

import requests
from authlib.common.errors import AuthlibBaseError
from authlib.common.security import generate_token
from authlib.integrations.requests_client import OAuth2Session
from authlib.jose import JsonWebKey, jwt

issuer, root = sys.argv[1], sys.argv[2]
REDIRECT = "https://app.example/cb"
SCOPE = "openid profile offline_access"


def trusting(session):
    """Trusts the root alone: the environment's settings would go before it."""
    session.trust_env = False
    session.verify = root
    return session


class Form(html.parser.HTMLParser):
    """The one form of a page: where it goes, and its hidden fields."""

    def __init__(self, page):
        super().__init__()
        self.action, self.fields = None, {}
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "form":
            self.action = attributes["action"]
        if tag == "input" and attributes["type"] == "hidden":
            self.fields[attributes["name"]] = attributes["value"]


class Person:
    """Answers the pages; stops where a redirect leaves the server."""

    def __init__(self):
        self.session = trusting(requests.Session())

    def follow(self, answer):
        while answer.is_redirect:
            to = urllib.parse.urljoin(answer.url, answer.headers["location"])
            if not to.startswith(issuer + "/"):
                return to
            answer = self.session.get(to, allow_redirects=False)
        answer.raise_for_status()
        return answer

    def get(self, url):
        return self.follow(self.session.get(url, allow_redirects=False))

    def send(self, page, **typed):
        form = Form(page.text)
        url = urllib.parse.urljoin(page.url, form.action)
        answer = self.session.post(url, form.fields | typed, allow_redirects=False)
        return self.follow(answer)


def refused(call):
    try:
        return f"not refused: {call()}"
    except AuthlibBaseError as error:
        return error.error


anybody = trusting(requests.Session())
metadata = anybody.get(f"{issuer}/.well-known/openid-configuration")
metadata.raise_for_status()
metadata = metadata.json()
assert metadata["issuer"] == issuer
assert metadata["authorization_response_iss_parameter_supported"] is True

client = OAuth2Session(
    "web",
    scope=SCOPE,
    redirect_uri=REDIRECT,
    code_challenge_method="S256",
    token_endpoint_auth_method="none",
    revocation_endpoint_auth_method="none",
)
trusting(client)
verifier = generate_token(48)
url, state = client.create_authorization_url(
    metadata["authorization_endpoint"], code_verifier=verifier, nonce="a nonce"
)
person = Person()
consent = person.send(person.get(url), username="alice", password="correct horse battery")
arrived = person.send(consent, answer="allow")
answer = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(arrived).query))
assert (answer["state"], answer["iss"]) == (state, issuer)


def fetch():
    return client.fetch_token(
        metadata["token_endpoint"],
        authorization_response=arrived,
        state=state,
        code_verifier=verifier,
    )


token = fetch()
keys = anybody.get(metadata["jwks_uri"]).json()
identity = jwt.decode(token["id_token"], JsonWebKey.import_key_set(keys))
identity.validate()
userinfo = client.get(metadata["userinfo_endpoint"])
userinfo.raise_for_status()
refreshed = client.refresh_token(
    metadata["token_endpoint"], refresh_token=token["refresh_token"]
)
revocation = client.revoke_token(
    metadata["revocation_endpoint"],
    token=refreshed["refresh_token"],
    token_type_hint="refresh_token",
)
assert revocation.status_code == 200, revocation.text
revoked = refused(
    lambda: client.refresh_token(
        metadata["token_endpoint"], refresh_token=refreshed["refresh_token"]
    )
)
seen = {
    "identity": dict(identity),
    "userinfo": userinfo.json(),
    "second": refused(fetch),
    "revoked": revoked,
    "secrets": [
        answer["code"],
        verifier,
        token["access_token"],
        token["refresh_token"],
        refreshed["access_token"],
        refreshed["refresh_token"],
    ],
}
json.dump(seen, sys.stdout)
