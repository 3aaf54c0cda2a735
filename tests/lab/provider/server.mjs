// A certified OpenID provider over TLS: argv is the directory of its packages, the one
// of its keys, an address and a port. It makes `provider.jwk` and `client.key` (of the
// client that signs its assertions) where they are not there yet. JWTs for the resource
// https://back; for https://opaque tokens that only introspection tells about.

import { createHash, createPrivateKey, createPublicKey, generateKeyPairSync } from "node:crypto";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { createServer } from "node:https";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [packages, directory, address, port] = process.argv.slice(2);
const library = join(packages, "node_modules/oidc-provider/lib/index.js");
const { Provider } = await import(pathToFileURL(library));
const at = (name) => join(directory, name);

function key(name, format) {
  if (!existsSync(at(name))) {
    const { privateKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
    const made = format === "jwk"
      ? JSON.stringify(privateKey.export({ format }))
      : privateKey.export({ format, type: "pkcs8" });
    writeFileSync(at(name), made, { mode: 0o600 });
  }
  return readFileSync(at(name), "utf8");
}

const signing = JSON.parse(key("provider.jwk", "jwk"));
const assertion = createPublicKey(createPrivateKey(key("client.key", "pem"))).export({ format: "jwk" });
// The agent's assertions name their key by its thumbprint (RFC 7638).
const { crv, kty, x, y } = assertion;
const kid = createHash("sha256").update(JSON.stringify({ crv, kty, x, y })).digest("base64url");

const client = (client_id, token_endpoint_auth_method, more) => ({
  client_id,
  token_endpoint_auth_method,
  grant_types: ["client_credentials"],
  response_types: [],
  id_token_signed_response_alg: "ES256",
  redirect_uris: [],
  scope: "orders.read orders.write",
  ...more,
});

const provider = new Provider(`https://${address}:${port}`, {
  jwks: { keys: [{ ...signing, alg: "ES256", use: "sig" }] },
  clients: [
    client("secret front", "client_secret_basic", { client_secret: "s3cret: with/odd+characters%" }),
    client("signing-front", "private_key_jwt", {
      jwks: { keys: [{ ...assertion, kid, alg: "ES256", use: "sig" }] },
      token_endpoint_auth_signing_alg: "ES256",
    }),
    client("spiffe://cluster.local/ns/shop/sa/front", "tls_client_auth", {
      tls_client_auth_san_uri: "spiffe://cluster.local/ns/shop/sa/front",
      tls_client_certificate_bound_access_tokens: true,
    }),
    client("resource-server", "client_secret_basic", { client_secret: "resource-server-secret" }),
  ],
  scopes: ["orders.read", "orders.write"],
  clientAuthMethods: ["client_secret_basic", "private_key_jwt", "tls_client_auth"],
  features: {
    devInteractions: { enabled: false },
    clientCredentials: { enabled: true },
    introspection: { enabled: true, allowedPolicy: () => true },
    mTLS: {
      enabled: true,
      tlsClientAuth: true,
      certificateBoundAccessTokens: true,
      getCertificate: (ctx) => ctx.socket.getPeerX509Certificate?.()?.toString(),
      certificateAuthorized: (ctx) => ctx.socket.authorized,
      certificateSubjectMatches: (ctx, property, expected) =>
        property === "tls_client_auth_san_uri" &&
        ctx.socket.getPeerX509Certificate()?.subjectAltName === `URI:${expected}`,
    },
    resourceIndicators: {
      enabled: true,
      getResourceServerInfo: (_ctx, resource) => ({
        scope: "orders.read orders.write",
        audience: resource,
        accessTokenTTL: 600,
        accessTokenFormat: resource === "https://opaque" ? "opaque" : "jwt",
        jwt: { sign: { alg: "ES256" } },
      }),
    },
  },
});
for (const event of ["grant.error", "server_error", "introspection.error"]) {
  provider.on(event, (_ctx, error) => console.log(event, error.error ?? "", error.error_detail ?? error));
}
provider.on("grant.success", (ctx) => console.log("granted", ctx.oidc.client.clientId));

const tls = {
  key: readFileSync(at("provider.tls.key")),
  cert: readFileSync(at("provider.tls.pem")),
  // The mesh's root: workloads may show their certificates.
  ca: readFileSync(at("root.pem")),
  requestCert: true,
  rejectUnauthorized: false,
};
createServer(tls, provider.callback()).listen(Number(port), address, () => console.log("listening"));
