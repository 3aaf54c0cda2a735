//! DPoP proofs, good and hostile (RFC 9449 4.3, 11).

use aws_lc_rs::digest::{SHA256, digest};

use super::*;

const TOKEN: &str = "Kz~8mXK1EalYznwH-LC-1fBAo.4Ljp~zsPE_NeO.gxU";

fn hash(token: &str) -> String {
    b64(digest(&SHA256, token.as_bytes()))
}

fn header() -> Value {
    json!({"typ": "dpop+jwt", "alg": "ES256", "jwk": P256.jwk()})
}

fn claims() -> Value {
    json!({
        "jti": "-BwC3ESc6acc2lTc", "htm": "GET", "htu": "https://api.example/orders",
        "iat": NOW, "ath": hash(TOKEN),
    })
}

/// With members changed; `null` takes one out.
fn with(mut object: Value, changes: Value) -> Value {
    let members = object.as_object_mut().expect("an object");
    for (name, value) in changes.as_object().expect("an object") {
        match value {
            Value::Null => members.remove(name),
            value => members.insert(name.clone(), value.clone()),
        };
    }
    object
}

fn jwk(changes: Value) -> Value {
    with(header(), json!({"jwk": with(P256.jwk(), changes)}))
}

fn signed(header: Value, claims: Value) -> String {
    P256.sign_raw("ES256", header.to_string(), claims.to_string())
}

fn check(proof: &str) -> Result<Proof, ProofError> {
    let proof = Proof::parse(proof)?;
    proof.check_use("GET", TOKEN)?;
    proof.check_time(now())?;
    Ok(proof)
}

#[test]
fn every_algorithm_proves_its_own_key() {
    let signers: [(&Signer, &[&str]); 5] = [
        (
            &RSA,
            &["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"],
        ),
        (&P256, &["ES256"]),
        (&P384, &["ES384"]),
        (&P521, &["ES512"]),
        (&ED, &["EdDSA"]),
    ];
    for (signer, algorithms) in signers {
        for alg in algorithms {
            let header = json!({"typ": "dpop+jwt", "alg": alg, "jwk": signer.jwk()});
            let proof = signer.sign_raw(alg, header.to_string(), claims().to_string());
            let proof = check(&proof).expect(alg);
            let own = EmbeddedKey::parse(&signer.jwk()).expect("a key");
            assert_eq!(proof.thumbprint(), own.thumbprint(), "{alg}");
        }
    }
}

#[test]
fn thumbprints_are_those_of_the_rfcs() {
    for (jwk, expected) in [
        // RFC 7638 3.1.
        (
            json!({"kty": "RSA", "e": "AQAB", "alg": "RS256", "kid": "2011-04-29", "n":
                "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"}),
            "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs",
        ),
        // RFC 9449 4.1 and 6.1.
        (
            json!({"kty": "EC", "crv": "P-256",
                "x": "l8tFrhx-34tV3hRICRDY9zCkDlpBhF42UQUfWVAWBFs",
                "y": "9VE4jf_Ok_o64zbTTlcuNJajHmt6v9TDVrU0CdvGRDA"}),
            "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I",
        ),
        // RFC 8037 A.3.
        (
            json!({"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}),
            "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k",
        ),
    ] {
        let key = EmbeddedKey::parse(&jwk).expect("a key");
        assert_eq!(b64(key.thumbprint()), expected);
    }
    assert_eq!(hash(TOKEN), "fUHyO2r2Z3DZ53EsNrWBb0xWXoaNy59IiKCAqksmQEo");
}

#[test]
fn what_may_differ_is_accepted() {
    for (what, header, claims) in [
        ("plain", header(), claims()),
        (
            "kid",
            with(header(), json!({"kid": "x", "x5u": "https://x"})),
            claims(),
        ),
        (
            "jwk for signatures",
            jwk(json!({"use": "sig", "key_ops": ["verify"], "alg": "ES256"})),
            claims(),
        ),
        (
            "as early as may be",
            header(),
            with(claims(), json!({"iat": NOW - 60})),
        ),
        (
            "as late as may be",
            header(),
            with(claims(), json!({"iat": NOW + 60})),
        ),
        (
            "a fraction",
            header(),
            with(claims(), json!({"iat": NOW as f64 + 0.5})),
        ),
        (
            "others",
            header(),
            with(
                claims(),
                json!({"exp": NOW + 1, "nbf": NOW, "x": [1], "nonce": "n"}),
            ),
        ),
        (
            "long id",
            header(),
            with(claims(), json!({"jti": "x".repeat(512)})),
        ),
    ] {
        check(&signed(header, claims)).unwrap_or_else(|e| panic!("{what}: {e}"));
    }
}

#[test]
fn hostile_proofs_are_refused() {
    let good = signed(header(), claims());
    let parts: Vec<&str> = good.split('.').collect();
    let claim = |changes| signed(header(), with(claims(), changes));
    let head = |changes| signed(with(header(), changes), claims());
    let key = |changes| signed(jwk(changes), claims());
    let raw = |header: &str, claims: &str| P256.sign_raw("ES256", header, claims);
    let (own, text) = (header().to_string(), claims().to_string());
    let other_signature = {
        let other = OTHER_P256.sign_raw("ES256", &own, &text);
        let (_, signature) = other.rsplit_once('.').expect("parts");
        format!("{}.{}.{signature}", parts[0], parts[1])
    };
    let der = b64(sign_der(
        &P256,
        format!("{}.{}", parts[0], parts[1]).as_bytes(),
    ));
    let rsa = |changes| {
        let header = json!({"typ": "dpop+jwt", "alg": "RS256", "jwk": with(RSA.jwk(), changes)});
        RSA.sign_raw("RS256", header.to_string(), claims().to_string())
    };
    let mut wrong = Vec::new();
    let table: Vec<(&str, String)> = vec![
        ("nothing", String::new()),
        ("two parts", format!("{}.{}", parts[0], parts[1])),
        ("four parts", format!("{good}.x")),
        ("empty header", format!(".{}.{}", parts[1], parts[2])),
        ("empty payload", format!("{}..{}", parts[0], parts[2])),
        ("no signature", format!("{}.{}.", parts[0], parts[1])),
        (
            "padding",
            format!("{}=.{}.{}", parts[0], parts[1], parts[2]),
        ),
        (
            "white space",
            format!("{} .{}.{}", parts[0], parts[1], parts[2]),
        ),
        ("two proofs", format!("{good},{good}")),
        ("header is no object", raw("[]", &text)),
        (
            "header with a member twice",
            raw(&own.replacen('{', r#"{"typ":"dpop+jwt","#, 1), &text),
        ),
        ("header with more behind", raw(&format!("{own} x"), &text)),
        ("no typ", head(json!({"typ": null}))),
        ("an access token's typ", head(json!({"typ": "at+jwt"}))),
        ("any typ", head(json!({"typ": "JWT"}))),
        ("another spelling of typ", head(json!({"typ": "DPoP+JWT"}))),
        ("typ is no string", head(json!({"typ": 1}))),
        ("no alg", head(json!({"alg": null}))),
        ("alg none", head(json!({"alg": "none"}))),
        ("alg of a shared secret", head(json!({"alg": "HS256"}))),
        ("alg of another kind of key", head(json!({"alg": "RS256"}))),
        ("alg of another curve", head(json!({"alg": "ES384"}))),
        ("alg is no string", head(json!({"alg": ["ES256"]}))),
        ("crit", head(json!({"crit": ["exp"]}))),
        ("b64", head(json!({"b64": false}))),
        ("no jwk", head(json!({"jwk": null}))),
        ("jwk is no object", head(json!({"jwk": "x"}))),
        (
            "jwk by reference only",
            head(json!({"jwk": null, "jku": "https://x", "kid": "p256"})),
        ),
        (
            "a shared secret",
            head(json!({"jwk": {"kty": "oct", "k": "AAAA"}})),
        ),
        ("a private key", key(json!({"d": "AAAA"}))),
        ("a secret beside", key(json!({"k": "AAAA"}))),
        ("a private RSA key", rsa(json!({"p": "AAAA"}))),
        ("another private RSA key", rsa(json!({"d": "AAAA"}))),
        ("a short RSA key", rsa(json!({"n": b64([0xff; 128])}))),
        ("an exponent of one", rsa(json!({"e": "AQ"}))),
        ("unknown kty", key(json!({"kty": "AKP"}))),
        ("unknown curve", key(json!({"crv": "secp256k1"}))),
        ("another curve", key(json!({"crv": "P-384"}))),
        ("no point", key(json!({"y": b64([1; 32])}))),
        ("half a point", key(json!({"y": null}))),
        ("a short coordinate", key(json!({"x": b64([1; 31])}))),
        (
            "a padded coordinate",
            key(json!({"x": format!("{}=", b64([1; 32]))})),
        ),
        ("for encryption", key(json!({"use": "enc"}))),
        ("for signing only", key(json!({"key_ops": ["sign"]}))),
        ("jwk with another alg", key(json!({"alg": "ES384"}))),
        ("another key's jwk", key(OTHER_P256.jwk())),
        ("payload is no object", raw(&own, "[]")),
        (
            "payload with a member twice",
            raw(&own, &text.replacen('{', r#"{"htm":"GET","#, 1)),
        ),
        ("no jti", claim(json!({"jti": null}))),
        ("empty jti", claim(json!({"jti": ""}))),
        ("jti is a number", claim(json!({"jti": 7}))),
        ("very long jti", claim(json!({"jti": "x".repeat(513)}))),
        ("no htm", claim(json!({"htm": null}))),
        ("another method", claim(json!({"htm": "POST"}))),
        ("the method in lower case", claim(json!({"htm": "get"}))),
        ("several methods", claim(json!({"htm": ["GET"]}))),
        ("no htu", claim(json!({"htu": null}))),
        (
            "several targets",
            claim(json!({"htu": ["https://api.example/orders"]})),
        ),
        ("no iat", claim(json!({"iat": null}))),
        ("iat is a string", claim(json!({"iat": NOW.to_string()}))),
        ("negative iat", claim(json!({"iat": -1}))),
        ("too early", claim(json!({"iat": NOW - 61}))),
        ("too late", claim(json!({"iat": NOW + 61}))),
        ("at the end of time", claim(json!({"iat": u64::MAX}))),
        ("expired", claim(json!({"exp": NOW - 61}))),
        ("not valid yet", claim(json!({"nbf": NOW + 61}))),
        ("exp is a string", claim(json!({"exp": "never"}))),
        ("no ath", claim(json!({"ath": null}))),
        ("ath of another token", claim(json!({"ath": hash("other")}))),
        (
            "padded ath",
            claim(json!({"ath": format!("{}=", hash(TOKEN))})),
        ),
        (
            "the token instead of its hash",
            claim(json!({"ath": TOKEN})),
        ),
        ("nonce is a number", claim(json!({"nonce": 1}))),
        ("empty nonce", claim(json!({"nonce": ""}))),
        ("signed by another key", other_signature),
        (
            "signed in another form",
            format!("{}.{}.{der}", parts[0], parts[1]),
        ),
        (
            "signature of zeros",
            format!("{}.{}.{}", parts[0], parts[1], b64([0; 64])),
        ),
        ("signature cut short", good[..good.len() - 4].to_owned()),
        ("another payload", {
            let changed = b64(with(claims(), json!({"jti": "other"})).to_string());
            format!("{}.{changed}.{}", parts[0], parts[2])
        }),
        ("very long", claim(json!({"x": "x".repeat(MAX_PROOF)}))),
    ];
    assert!(table.len() >= 40);
    for (what, proof) in &table {
        if check(proof).is_ok() {
            wrong.push(*what);
        }
    }
    assert!(wrong.is_empty(), "taken: {wrong:?}");
    check(&good).expect("and the one that they were made from is good");
}

#[test]
fn one_id_is_another_by_another_key() {
    let once = |proof: &str| check(proof).expect("good").once();
    let first = once(&signed(header(), claims()));
    assert_eq!(
        first,
        once(&signed(header(), with(claims(), json!({"x": 1}))))
    );
    assert_eq!(first.1, NOW + PROOF_WINDOW);
    let other = json!({"typ": "dpop+jwt", "alg": "EdDSA", "jwk": ED.jwk()});
    let other = ED.sign_raw("EdDSA", other.to_string(), claims().to_string());
    assert_ne!(first.0, once(&other).0);
    assert_ne!(
        first.0,
        once(&signed(header(), with(claims(), json!({"jti": "b"})))).0
    );
    let shown = format!("{:?}", check(&other));
    assert!(!shown.contains("-BwC3"), "{shown}");
}
