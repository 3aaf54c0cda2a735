use aws_lc_rs::hmac;

use super::*;

pub(super) const EXPECTED: Expected<'_> = Expected {
    issuer: Some(ISSUER),
    audiences: &[],
    space_delimited: &[],
};

fn check(token: &str, audiences: &[&str], keys: &KeySet) -> Result<Claims, TokenError> {
    let audiences: Vec<String> = audiences.iter().map(|a| (*a).to_owned()).collect();
    let expected = Expected {
        audiences: &audiences,
        ..EXPECTED
    };
    Token::parse(token)?.verify(expected, Some(keys), now())
}

#[test]
fn every_algorithm_is_accepted() {
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
    let mut seen = 0;
    for (signer, algorithms) in signers {
        for alg in algorithms {
            let token = signer.sign(alg, &payload());
            let claims = check(&token, &["api"], &KEYS).expect(alg);
            assert_eq!(claims.principal(), Some((ISSUER, "alice")), "{alg}");
            seen += 1;
        }
    }
    assert_eq!(seen, Algorithm::ALL.len());
}

#[test]
fn what_may_differ_is_accepted() {
    let header = |header: Value| P256.sign_raw("ES256", header.to_string(), payload().to_string());
    let with = |changes| P256.sign("ES256", &payload_with(changes));
    let table = [
        ("no kid", header(json!({"alg": "ES256"}))),
        ("empty kid", header(json!({"alg": "ES256", "kid": ""}))),
        ("no typ", header(json!({"alg": "ES256", "kid": "p256"}))),
        ("at+jwt", header(json!({"alg": "ES256", "typ": "at+jwt"}))),
        (
            "media type",
            header(json!({"alg": "ES256", "typ": "application/AT+JWT"})),
        ),
        ("cty", header(json!({"alg": "ES256", "cty": "x"}))),
        ("never expires", with(json!({"exp": null}))),
        ("expired within leeway", with(json!({"exp": NOW - 60}))),
        ("starts within leeway", with(json!({"nbf": NOW + 60}))),
        ("fractions", with(json!({"exp": NOW as f64 + 0.5}))),
        ("largest exp", with(json!({"exp": u64::MAX}))),
        ("issued in the future", with(json!({"iat": NOW + 9999}))),
        ("one audience of many", with(json!({"aud": ["x", "api"]}))),
        ("audience as URL", with(json!({"aud": "https://api/"}))),
        ("no subject", with(json!({"sub": null}))),
    ];
    for (kind, token) in table {
        assert!(check(&token, &["api"], &KEYS).is_ok(), "{kind}");
    }
    let loose = Expected {
        issuer: None,
        ..EXPECTED
    };
    for changes in [json!({"iss": null}), json!({"iss": "https://other"})] {
        let token = with(changes);
        let parsed = Token::parse(&token).expect("form");
        assert!(parsed.verify(loose, Some(&KEYS), now()).is_ok());
    }
}

/// A token that verifies a MAC made with public bytes.
fn mac(alg: &str, secret: &[u8]) -> String {
    let header = json!({"alg": alg});
    let signed = format!("{}.{}", b64(header.to_string()), b64(payload().to_string()));
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
    format!("{signed}.{}", b64(hmac::sign(&key, signed.as_bytes())))
}

fn pem(der: &[u8]) -> Vec<u8> {
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN PUBLIC KEY-----\n{body}\n-----END PUBLIC KEY-----\n").into_bytes()
}

/// The good token with another signature.
fn resigned(signature: impl FnOnce(&str) -> Vec<u8>) -> String {
    let good = good();
    let (signed, _) = good.rsplit_once('.').expect("three parts");
    format!("{signed}.{}", b64(signature(signed)))
}

type Row = (&'static str, String, TokenError);

fn refused(rows: Vec<Row>) {
    for (kind, token, error) in rows {
        let got = check(&token, &["api"], &KEYS).expect_err(kind);
        assert_eq!(got, error, "{kind}");
        let status = if error == TokenError::Audience {
            403
        } else {
            401
        };
        assert_eq!(got.status().as_u16(), status, "{kind}");
    }
}

#[test]
fn forged_algorithms_are_refused() {
    let unsigned = |alg: &str| {
        let header = json!({ "alg": alg });
        format!(
            "{}.{}.",
            b64(header.to_string()),
            b64(payload().to_string())
        )
    };
    let named = |alg: &str| {
        let header = json!({"alg": alg, "kid": "p256"});
        P256.sign_raw("ES256", header.to_string(), payload().to_string())
    };
    let as_other = |signed_as: &str, named: &str| {
        let header = json!({"alg": named, "kid": "rsa"});
        RSA.sign_raw(signed_as, header.to_string(), payload().to_string())
    };
    let p256_point = match &P256.pair {
        Pair::Ec(pair, _) => pair.public_key().as_ref().to_vec(),
        _ => panic!("not an EC key"),
    };
    use TokenError::*;
    let mut rows = vec![
        ("unsigned", unsigned("none"), Algorithm),
        ("unsigned ES256", unsigned("ES256"), Form),
        ("HS256 RSA modulus", mac("HS256", &RSA.modulus()), Algorithm),
        ("HS256 RSA DER", mac("HS256", &RSA.spki()), Algorithm),
        ("HS256 RSA PEM", mac("HS256", &pem(&RSA.spki())), Algorithm),
        ("HS256 EC DER", mac("HS256", &P256.spki()), Algorithm),
        ("HS256 EC PEM", mac("HS256", &pem(&P256.spki())), Algorithm),
        ("HS256 EC point", mac("HS256", &p256_point), Algorithm),
        ("HS256 empty secret", mac("HS256", b""), Algorithm),
        ("MAC named RS256", mac("RS256", &RSA.spki()), Signature),
        ("MAC named ES256", mac("ES256", &P256.spki()), Signature),
        ("RS256 named PS256", as_other("RS256", "PS256"), Signature),
        ("PS256 named RS256", as_other("PS256", "RS256"), Signature),
        ("RS256 named RS512", as_other("RS256", "RS512"), Signature),
        ("RSA key, EC alg", as_other("RS256", "ES256"), UnknownKey),
        ("EC key, other curve", named("ES384"), UnknownKey),
        ("alg padded", named("ES256 "), Algorithm),
        ("alg empty", named(""), Algorithm),
        ("alg lower case", named("es256"), Algorithm),
        ("alg ES256K", named("ES256K"), Algorithm),
        ("alg of JWE", named("dir"), Algorithm),
    ];
    for alg in ["none", "None", "NONE", "nOnE", "HS384", "HS512"] {
        rows.push(("unsupported alg", named(alg), Algorithm));
    }
    refused(rows);
}

#[test]
fn forged_signatures_are_refused() {
    let fixed = |signed: &str| P256.sign_bytes("ES256", signed.as_bytes());
    let changed_payload = {
        let good = good();
        let parts: Vec<&str> = good.split('.').collect();
        let payload = payload_with(json!({"sub": "root"})).to_string();
        format!("{}.{}.{}", parts[0], b64(payload), parts[2])
    };
    let changed_header = {
        let good = good();
        let (_, rest) = good.split_once('.').expect("three parts");
        format!("{}.{rest}", b64(r#"{"alg":"ES256"}"#))
    };
    let ed = |change: fn(&mut Vec<u8>)| {
        let token = ED.sign("EdDSA", &payload());
        let (signed, signature) = token.rsplit_once('.').expect("three parts");
        let mut signature = URL_SAFE_NO_PAD.decode(signature).expect("base64url");
        change(&mut signature);
        format!("{signed}.{}", b64(signature))
    };
    let rsa = |signature: Vec<u8>| {
        let token = RSA.sign("RS256", &payload());
        let (signed, _) = token.rsplit_once('.').expect("three parts");
        format!("{signed}.{}", b64(signature))
    };
    let rsa_plus_zero = {
        let token = RSA.sign("RS256", &payload());
        let (_, signature) = token.rsplit_once('.').expect("three parts");
        let mut signature = URL_SAFE_NO_PAD.decode(signature).expect("base64url");
        signature.insert(0, 0);
        rsa(signature)
    };
    use TokenError::*;
    refused(vec![
        (
            "ES256 as DER",
            resigned(|signed| sign_der(&P256, signed.as_bytes())),
            Signature,
        ),
        ("ES256 zeros", resigned(|_| vec![0; 64]), Signature),
        ("ES256 ones", resigned(|_| vec![0xff; 64]), Signature),
        (
            "ES256 r = 1, s = 1",
            resigned(|_| {
                let mut bytes = vec![0; 64];
                (bytes[31], bytes[63]) = (1, 1);
                bytes
            }),
            Signature,
        ),
        (
            "ES256 truncated",
            resigned(|signed| fixed(signed)[..63].to_vec()),
            Signature,
        ),
        (
            "ES256 r only",
            resigned(|signed| fixed(signed)[..32].to_vec()),
            Signature,
        ),
        (
            "ES256 with more behind",
            resigned(|signed| [fixed(signed), vec![0]].concat()),
            Signature,
        ),
        (
            "ES256 r and s swapped",
            resigned(|signed| {
                let mut bytes = fixed(signed);
                bytes.rotate_left(32);
                bytes
            }),
            Signature,
        ),
        ("Ed25519 short", ed(|s| s.truncate(63)), Signature),
        ("Ed25519 long", ed(|s| s.push(0)), Signature),
        ("Ed25519 zeros", ed(|s| s.fill(0)), Signature),
        ("RSA zeros", rsa(vec![0; 256]), Signature),
        ("RSA one", rsa([vec![0; 255], vec![1]].concat()), Signature),
        ("RSA short", rsa(vec![1; 255]), Signature),
        ("RSA leading zero", rsa_plus_zero, Signature),
        ("RSA modulus", rsa(RSA.modulus()), Signature),
        ("payload changed", changed_payload, Signature),
        ("header changed", changed_header, Signature),
        (
            "key of another set, same kid",
            OTHER_RSA.sign("RS256", &payload()),
            Signature,
        ),
        (
            "key of another set",
            OTHER_P256.sign("ES256", &payload()),
            UnknownKey,
        ),
    ]);
}

#[test]
fn forged_headers_are_refused() {
    let header = |header: Value| P256.sign_raw("ES256", header.to_string(), payload().to_string());
    let text = |header: &str| P256.sign_raw("ES256", header, payload().to_string());
    // Signed by a key that only the token itself names.
    let own = |name: &str, value: Value| {
        let mut header = json!({"alg": "ES256"});
        header[name] = value;
        OTHER_P256.sign_raw("ES256", header.to_string(), payload().to_string())
    };
    let certificate = base64::engine::general_purpose::STANDARD.encode(OTHER_P256.spki());
    use TokenError::*;
    refused(vec![
        ("embedded jwk", own("jwk", OTHER_P256.jwk()), Signature),
        (
            "jku",
            own("jku", json!("https://evil.example/k")),
            Signature,
        ),
        (
            "x5u",
            own("x5u", json!("https://evil.example/c")),
            Signature,
        ),
        ("x5c", own("x5c", json!([certificate])), Signature),
        ("x5t", own("x5t", json!("AAAA")), Signature),
        (
            "kid of another key",
            header(json!({"alg": "ES256", "kid": "rsa"})),
            UnknownKey,
        ),
        (
            "kid path",
            header(json!({"alg": "ES256", "kid": "../../dev/null"})),
            UnknownKey,
        ),
        (
            "kid number",
            header(json!({"alg": "ES256", "kid": 1})),
            HeaderMember("kid"),
        ),
        (
            "kid list",
            header(json!({"alg": "ES256", "kid": ["p256"]})),
            HeaderMember("kid"),
        ),
        (
            "kid null",
            text(r#"{"alg":"ES256","kid":null}"#),
            HeaderMember("kid"),
        ),
        (
            "no alg",
            header(json!({"kid": "p256"})),
            HeaderMember("alg"),
        ),
        ("alg null", text(r#"{"alg":null}"#), HeaderMember("alg")),
        (
            "alg list",
            header(json!({"alg": ["ES256"]})),
            HeaderMember("alg"),
        ),
        (
            "typ number",
            header(json!({"alg": "ES256", "typ": 1})),
            HeaderMember("typ"),
        ),
        (
            "logout token",
            header(json!({"alg": "ES256", "typ": "logout+jwt"})),
            Type,
        ),
        (
            "security event",
            header(json!({"alg": "ES256", "typ": "application/secevent+JWT"})),
            Type,
        ),
        (
            "crit unknown",
            header(json!({"alg": "ES256", "crit": ["x"], "x": 1})),
            Extension("crit"),
        ),
        (
            "crit empty",
            header(json!({"alg": "ES256", "crit": []})),
            Extension("crit"),
        ),
        (
            "crit string",
            header(json!({"alg": "ES256", "crit": "exp"})),
            Extension("crit"),
        ),
        (
            "crit exp",
            header(json!({"alg": "ES256", "crit": ["exp"], "exp": NOW + 9})),
            Extension("crit"),
        ),
        (
            "crit null",
            text(r#"{"alg":"ES256","crit":null}"#),
            Extension("crit"),
        ),
        (
            "b64 false",
            header(json!({"alg": "ES256", "b64": false})),
            Extension("b64"),
        ),
        (
            "b64 false, crit",
            header(json!({"alg": "ES256", "b64": false, "crit": ["b64"]})),
            Extension("crit"),
        ),
        ("alg twice", text(r#"{"alg":"none","alg":"ES256"}"#), Header),
        (
            "alg twice by escape",
            text(r#"{"alg":"ES256","\u0061lg":"none"}"#),
            Header,
        ),
        (
            "kid twice",
            text(r#"{"alg":"ES256","kid":"p256","kid":"rsa"}"#),
            Header,
        ),
        ("header list", text(r#"["ES256"]"#), Header),
        ("header string", text(r#""ES256""#), Header),
        ("header trailing", text(r#"{"alg":"ES256"}{}"#), Header),
    ]);
}

#[test]
fn other_forms_are_refused() {
    let good = good();
    let parts: Vec<&str> = good.split('.').collect();
    let [header, body, signature] = parts[..] else {
        panic!("three parts");
    };
    let standard = {
        // Bytes whose base64 needs the two characters that differ.
        let payload = r#"{"iss":"https://issuer.example","x":"???>>>~~~"}"#;
        let token = P256.sign_raw("ES256", r#"{"alg":"ES256"}"#, payload);
        assert!(token.contains(['-', '_']));
        token.replace('-', "+").replace('_', "/")
    };
    // 64 bytes leave four bits in the last character.
    let trailing_bits = {
        let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        let (rest, last) = good.split_at(good.len() - 1);
        let at = alphabet.find(last).expect("base64url");
        format!("{rest}{}", &alphabet[at + 1..at + 2])
    };
    use TokenError::*;
    let mut rows = vec![
        ("empty", String::new(), Form),
        ("dots only", "..".to_owned(), Form),
        ("one part", header.to_owned(), Form),
        ("two parts", format!("{header}.{body}"), Form),
        ("four parts", format!("{good}.{signature}"), Form),
        ("JWE", format!("{good}.{body}.{signature}"), Form),
        ("leading dot", format!(".{good}"), Form),
        ("trailing dot", format!("{good}."), Form),
        ("double dot", format!("{header}..{body}.{signature}"), Form),
        ("empty header", format!(".{body}.{signature}"), Form),
        ("empty payload", format!("{header}..{signature}"), Form),
        ("empty signature", format!("{header}.{body}."), Form),
        ("padding", format!("{good}=="), Form),
        (
            "padded payload",
            format!("{header}.{body}=.{signature}"),
            Form,
        ),
        ("leading space", format!(" {good}"), Form),
        ("trailing space", format!("{good} "), Form),
        ("inner space", format!("{header}. {body}.{signature}"), Form),
        ("newline", format!("{good}\n"), Form),
        ("inner newline", good.replacen('.', ".\r\n", 1), Form),
        ("NUL", format!("{good}\0"), Form),
        ("standard alphabet", standard, Form),
        ("trailing bits", trailing_bits, Form),
        ("percent-encoded dot", good.replace('.', "%2E"), Form),
        ("two tokens", format!("{good},{good}"), Form),
        ("not ASCII", format!("{good}é"), Form),
        (
            "JSON serialization",
            format!(r#"{{"payload":"{body}"}}"#),
            Form,
        ),
        ("too large", "x".repeat(MAX_TOKEN + 1), TooLarge),
    ];
    let large = P256.sign("ES256", &payload_with(json!({"x": "x".repeat(MAX_TOKEN)})));
    rows.push(("large and good", large, TooLarge));
    refused(rows);
}

#[test]
fn forged_payloads_are_refused() {
    let raw = |payload: &[u8]| P256.sign_raw("ES256", r#"{"alg":"ES256"}"#, payload);
    let with = |changes| P256.sign("ES256", &payload_with(changes));
    let text =
        |members: &str| raw(format!(r#"{{"iss":"{ISSUER}","aud":"api",{members}}}"#).as_bytes());
    let deep = format!(r#""x":{}{}"#, "[".repeat(64), "]".repeat(64));
    use TokenError::*;
    refused(vec![
        ("not UTF-8", raw(b"{\"iss\":\"\xff\"}"), Payload),
        ("list", raw(br#"["iss"]"#), Payload),
        ("null", raw(b"null"), Payload),
        ("trailing JSON", raw(br#"{"iss":"x"}{"iss":"y"}"#), Payload),
        ("nested token", raw(good().as_bytes()), Payload),
        ("deep", text(&deep), Payload),
        (
            "iss twice",
            text(r#""iss":"https://evil.example""#),
            Payload,
        ),
        ("exp twice", text(r#""exp":1,"exp":99999999999"#), Payload),
        ("sub twice", text(r#""sub":"root","sub":"alice""#), Payload),
        (
            "sub twice by escape",
            text(r#""sub":"root","s\u0075b":"alice""#),
            Payload,
        ),
        (
            "twice below",
            text(r#""cnf":{"x5t#S256":"a","x5t#S256":"b"}"#),
            Payload,
        ),
        (
            "exp string",
            with(json!({"exp": "9999999999"})),
            Claim("exp"),
        ),
        ("exp bool", with(json!({"exp": true})), Claim("exp")),
        ("exp null", text(r#""exp":null"#), Claim("exp")),
        ("exp negative", with(json!({"exp": -1})), Claim("exp")),
        (
            "exp 2^64",
            text(r#""exp":18446744073709551616"#),
            Claim("exp"),
        ),
        ("exp 1e300", text(r#""exp":1e300"#), Claim("exp")),
        ("exp 1e400", text(r#""exp":1e400"#), Payload),
        ("exp NaN", text(r#""exp":NaN"#), Payload),
        ("exp zero", with(json!({"exp": 0})), Expired),
        ("exp past", with(json!({"exp": NOW - 61})), Expired),
        (
            "exp fraction",
            with(json!({"exp": NOW as f64 - 60.5})),
            Expired,
        ),
        ("nbf future", with(json!({"nbf": NOW + 61})), NotYetValid),
        ("nbf far", with(json!({"nbf": u64::MAX})), NotYetValid),
        ("nbf string", with(json!({"nbf": "0"})), Claim("nbf")),
        ("iat string", with(json!({"iat": "0"})), Claim("iat")),
        ("iat negative", with(json!({"iat": -5})), Claim("iat")),
        ("iss missing", with(json!({"iss": null})), Issuer),
        (
            "iss other",
            with(json!({"iss": "https://evil.example"})),
            Issuer,
        ),
        (
            "iss slash",
            with(json!({"iss": format!("{ISSUER}/")})),
            Issuer,
        ),
        (
            "iss case",
            with(json!({"iss": "https://ISSUER.example"})),
            Issuer,
        ),
        (
            "iss longer",
            with(json!({"iss": format!("{ISSUER}.evil")})),
            Issuer,
        ),
        ("iss empty", with(json!({"iss": ""})), Issuer),
        ("iss number", with(json!({"iss": 1})), Claim("iss")),
        ("iss list", with(json!({"iss": [ISSUER]})), Claim("iss")),
        ("sub number", with(json!({"sub": 0})), Claim("sub")),
        ("sub object", with(json!({"sub": {"a": 1}})), Claim("sub")),
        ("jti number", with(json!({"jti": 1})), Claim("jti")),
        ("aud missing", with(json!({"aud": null})), Audience),
        ("aud other", with(json!({"aud": "web"})), Audience),
        (
            "aud list of others",
            with(json!({"aud": ["web", "app"]})),
            Audience,
        ),
        ("aud empty list", with(json!({"aud": []})), Audience),
        ("aud empty", with(json!({"aud": ""})), Audience),
        ("aud case", with(json!({"aud": "API"})), Audience),
        ("aud prefix", with(json!({"aud": "api2"})), Audience),
        ("aud two slashes", with(json!({"aud": "api//"})), Audience),
        ("aud number", with(json!({"aud": 1})), Claim("aud")),
        ("aud object", with(json!({"aud": {"api": 1}})), Claim("aud")),
        ("aud nested", with(json!({"aud": [["api"]]})), Claim("aud")),
        ("aud mixed", with(json!({"aud": ["api", 1]})), Claim("aud")),
    ]);
}

#[test]
fn checks_come_in_order() {
    let forged = |changes| {
        let token = P256.sign("ES256", &payload_with(changes));
        let (signed, _) = token.rsplit_once('.').expect("three parts");
        format!("{signed}.{}", b64([1; 64]))
    };
    use TokenError::*;
    refused(vec![
        (
            "audience before signature",
            forged(json!({"aud": "x"})),
            Audience,
        ),
        (
            "time before audience",
            forged(json!({"aud": "x", "exp": 1})),
            Expired,
        ),
        (
            "issuer before time",
            forged(json!({"iss": "x", "exp": 1})),
            Issuer,
        ),
        (
            "form before issuer",
            forged(json!({"iss": "x", "sub": 1})),
            Claim("sub"),
        ),
    ]);
    let token = good();
    let parsed = Token::parse(&token).expect("form");
    let unavailable = parsed.verify(EXPECTED, None, now());
    assert_eq!(unavailable, Err(KeysUnavailable));
}

#[test]
fn the_key_says_which_algorithm_is_its_own() {
    let mut jwk = RSA.jwk();
    jwk["alg"] = json!("PS256");
    let keys = key_set(&[jwk.clone()]);
    assert!(check(&RSA.sign("PS256", &payload()), &[], &keys).is_ok());
    let other = check(&RSA.sign("RS256", &payload()), &[], &keys);
    assert_eq!(other, Err(TokenError::UnknownKey));

    // Keys that are skipped verify nothing, whatever else is in the set.
    jwk["alg"] = json!("RS256");
    jwk["use"] = json!("enc");
    let keys = key_set(&[jwk, P256.jwk()]);
    let token = RSA.sign("RS256", &payload());
    assert_eq!(check(&token, &[], &keys), Err(TokenError::UnknownKey));
}

#[test]
fn keys_without_id_are_tried() {
    let mut nameless = OTHER_P256.jwk();
    nameless.as_object_mut().expect("an object").remove("kid");
    let keys = key_set(&[P256.jwk(), nameless]);
    let token = OTHER_P256.sign("ES256", &payload());
    assert!(check(&token, &[], &keys).is_ok());
    // It may still be that the set is old.
    let forged = P384.sign_raw(
        "ES384",
        r#"{"alg":"ES256","kid":"new"}"#,
        payload().to_string(),
    );
    assert_eq!(check(&forged, &[], &keys), Err(TokenError::UnknownKey));
}

#[test]
fn claims_as_policy_reads_them() {
    let token = P256.sign(
        "ES256",
        &payload_with(json!({
            "aud": ["https://api/", "b"],
            "azp": "cli",
            "act": {"sub": "agent"},
            "cnf": {"x5t#S256": b64([9; 32])},
            "scope": "read  write ",
            "groups": ["a b", 7, "c", null, ["d"]],
            "roles": "x y",
            "https://x.y/z": {"in.ner": {"deep": "value"}, "scope": "p q"},
            "level": 5,
            "list": [{"a": "b"}],
        })),
    );
    let expected = Expected {
        space_delimited: &["roles".to_owned()],
        ..EXPECTED
    };
    let claims = Token::parse(&token)
        .expect("form")
        .verify(expected, Some(&KEYS), now())
        .expect("good");
    let values = |path: &[&str]| -> Vec<String> {
        let path: Vec<String> = path.iter().map(|p| (*p).to_owned()).collect();
        claims
            .values(&path)
            .into_iter()
            .map(str::to_owned)
            .collect()
    };
    assert_eq!(claims.audiences(), ["https://api/", "b"]);
    assert_eq!(claims.presenter(), Some("cli"));
    assert_eq!(claims.actor(), Some("agent"));
    assert_eq!(
        claims.confirmation(),
        Some(Confirmation::Certificate([9; 32]))
    );
    assert_eq!(claims.expires(), Some(at(NOW + 600)));
    assert_eq!(values(&["scope"]), ["read", "write"]);
    assert_eq!(values(&["roles"]), ["x", "y"]);
    assert_eq!(values(&["groups"]), ["a b", "c"]);
    assert_eq!(values(&["https://x.y/z", "in.ner", "deep"]), ["value"]);
    assert_eq!(values(&["https://x.y/z", "scope"]), ["p q"]);
    for absent in [
        &[][..],
        &["level"],
        &["SCOPE"],
        &["list", "a"],
        &["sub", "x"],
        &["https://x.y/z"],
        &["https://x.y/z", "in", "ner"],
    ] {
        assert!(values(absent).is_empty(), "{absent:?}");
    }
    let shown = format!("{claims:?}");
    assert!(
        !shown.contains("alice") && !shown.contains("issuer"),
        "{shown}"
    );
}

#[test]
fn half_a_principal_is_none() {
    for changes in [
        json!({"sub": null}),
        json!({"sub": ""}),
        json!({"iss": null}),
        json!({"iss": ""}),
    ] {
        let token = P256.sign("ES256", &payload_with(changes));
        let loose = Expected {
            issuer: None,
            ..EXPECTED
        };
        let claims = Token::parse(&token)
            .expect("form")
            .verify(loose, Some(&KEYS), now())
            .expect("good");
        assert_eq!(claims.principal(), None);
    }
}

#[test]
fn a_binding_that_is_not_understood_is_still_one() {
    for cnf in [
        json!({"jkt": "x"}),
        json!({"x5t#S256": "short"}),
        json!({"x5t#S256": 1}),
        json!("x"),
    ] {
        let token = P256.sign("ES256", &payload_with(json!({ "cnf": cnf })));
        let claims = check(&token, &["api"], &KEYS).expect("good");
        assert_eq!(claims.confirmation(), Some(Confirmation::Other));
    }
    let unbound = check(&good(), &["api"], &KEYS).expect("good");
    assert_eq!(unbound.confirmation(), None);
}
