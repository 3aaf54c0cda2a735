use super::*;

fn with(mut jwk: Value, name: &str, value: Value) -> Value {
    match value {
        Value::Null => jwk.as_object_mut().expect("an object").remove(name),
        value => jwk
            .as_object_mut()
            .expect("an object")
            .insert(name.to_owned(), value),
    };
    jwk
}

fn modulus(bits: usize) -> String {
    let mut bytes = vec![0xab; bits / 8];
    bytes[0] = 0xff;
    b64(bytes)
}

#[test]
fn unusable_keys_are_skipped_with_the_reason() {
    let (rsa, ec, ed) = (RSA.jwk(), P256.jwk(), ED.jwk());
    let off_curve = b64([1; 32]);
    let table = [
        ("a string", json!("key"), SkipReason::NotAnObject),
        ("no kty", json!({"kid": "x"}), SkipReason::Missing("kty")),
        ("kty number", json!({"kty": 1}), SkipReason::Type("kty")),
        (
            "kty unknown",
            json!({"kty": "AKP"}),
            SkipReason::KeyType("AKP".into()),
        ),
        (
            "shared secret",
            json!({"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"}),
            SkipReason::SharedSecret,
        ),
        (
            "kid number",
            with(ec.clone(), "kid", json!(7)),
            SkipReason::Type("kid"),
        ),
        (
            "for encryption",
            with(rsa.clone(), "use", json!("enc")),
            SkipReason::Use,
        ),
        (
            "for signing only",
            with(rsa.clone(), "key_ops", json!(["sign"])),
            SkipReason::Operations,
        ),
        (
            "key_ops string",
            with(rsa.clone(), "key_ops", json!("verify")),
            SkipReason::Type("key_ops"),
        ),
        (
            "RSA 1024",
            with(rsa.clone(), "n", json!(modulus(1024))),
            SkipReason::RsaSize(1024),
        ),
        (
            "RSA 16384",
            with(rsa.clone(), "n", json!(modulus(16384))),
            SkipReason::RsaSize(16384),
        ),
        (
            "RSA no n",
            with(rsa.clone(), "n", Value::Null),
            SkipReason::Missing("n"),
        ),
        (
            "RSA n padded",
            with(rsa.clone(), "n", json!("AQAB==")),
            SkipReason::Encoding("n"),
        ),
        (
            "RSA n is zero",
            with(rsa.clone(), "n", json!("AAAA")),
            SkipReason::RsaSize(0),
        ),
        (
            "RSA e even",
            with(rsa.clone(), "e", json!("Ag")),
            SkipReason::RsaNumbers,
        ),
        (
            "RSA e is one",
            with(rsa.clone(), "e", json!("AQ")),
            SkipReason::RsaNumbers,
        ),
        (
            "RSA e is zero",
            with(rsa.clone(), "e", json!("AA")),
            SkipReason::RsaNumbers,
        ),
        (
            "RSA e huge",
            with(rsa.clone(), "e", json!(b64([0xff; 9]))),
            SkipReason::RsaNumbers,
        ),
        (
            "alg of another kty",
            with(rsa.clone(), "alg", json!("ES256")),
            SkipReason::Algorithm("ES256".into()),
        ),
        (
            "alg of a secret",
            with(rsa, "alg", json!("HS256")),
            SkipReason::Algorithm("HS256".into()),
        ),
        (
            "alg of another curve",
            with(ec.clone(), "alg", json!("ES384")),
            SkipReason::Algorithm("ES384".into()),
        ),
        (
            "curve unknown",
            with(ec.clone(), "crv", json!("secp256k1")),
            SkipReason::Curve("secp256k1".into()),
        ),
        (
            "off the curve",
            with(ec.clone(), "x", json!(off_curve)),
            SkipReason::Point,
        ),
        (
            "short x",
            with(ec.clone(), "x", json!(b64([1; 31]))),
            SkipReason::Point,
        ),
        (
            "no y",
            with(ec.clone(), "y", Value::Null),
            SkipReason::Missing("y"),
        ),
        (
            "X25519",
            with(ed.clone(), "crv", json!("X25519")),
            SkipReason::Curve("X25519".into()),
        ),
        (
            "long Ed25519",
            with(ed.clone(), "x", json!(b64([1; 33]))),
            SkipReason::Point,
        ),
        (
            "Ed25519 as SubjectPublicKeyInfo",
            with(ed, "x", json!(b64(ED.spki()))),
            SkipReason::Point,
        ),
        (
            "long x",
            with(ec, "x", json!(b64([1; 33]))),
            SkipReason::Point,
        ),
    ];
    for (kind, jwk, reason) in table {
        let text = json!({"keys": [jwk, P384.jwk()]}).to_string();
        let keys = KeySet::parse(text.as_bytes()).expect("one key is left");
        let reasons: Vec<_> = keys.skipped().iter().map(|s| s.reason.clone()).collect();
        assert_eq!(reasons, std::slice::from_ref(&reason), "{kind}");
        assert!(keys.knows("p384"), "{kind}");

        let error = KeySet::parse(json!({ "keys": [jwk] }).to_string().as_bytes())
            .expect_err("no key is left")
            .to_string();
        assert!(error.contains(&reason.to_string()), "{kind}: {error}");
    }
}

#[test]
fn unusable_sets_are_errors() {
    let many = vec![P256.jwk(); 257];
    let table = [
        ("empty", json!({"keys": []}).to_string()),
        ("no keys", json!({}).to_string()),
        ("keys object", json!({"keys": {}}).to_string()),
        ("a list", json!([P256.jwk()]).to_string()),
        ("a lone key", P256.jwk().to_string()),
        ("not JSON", "<html>".to_owned()),
        ("many", json!({ "keys": many }).to_string()),
        ("large", format!("{{\"x\":\"{}\"}}", "x".repeat(1 << 20))),
        (
            "keys twice",
            format!("{{\"keys\":[{}],\"keys\":[]}}", P256.jwk()),
        ),
    ];
    for (kind, text) in table {
        assert!(KeySet::parse(text.as_bytes()).is_err(), "{kind}");
    }
}

#[test]
fn private_members_are_noticed_and_not_kept() {
    let leaked = with(P256.jwk(), "d", json!(b64([7; 32])));
    let keys = key_set(&[leaked]);
    assert!(keys.has_private());
    assert!(!KEYS.has_private());
    let shown = format!("{keys:?}");
    assert!(
        !shown.contains(&b64([7; 32])) && !shown.contains("bytes"),
        "{shown}"
    );
}

#[test]
fn leading_zeros_of_a_modulus_do_no_harm() {
    let mut n = RSA.modulus();
    n.insert(0, 0);
    let keys = key_set(&[with(RSA.jwk(), "n", json!(b64(n)))]);
    let token = RSA.sign("RS256", &payload());
    let verified = Token::parse(&token)
        .expect("form")
        .verify(tokens::EXPECTED, Some(&keys), now());
    assert!(verified.is_ok());
}

#[test]
fn a_coordinate_may_lack_its_leading_zeros() {
    let x = |signer: &Signer| match &signer.pair {
        Pair::Ec(pair, _) => pair.public_key().as_ref()[1..33].to_vec(),
        _ => panic!("not on a curve"),
    };
    let mut signers = std::iter::repeat_with(|| Signer::ec("p256"));
    let signer = signers.find(|signer| x(signer)[0] == 0).expect("endless");
    let short = with(signer.jwk(), "x", json!(b64(&x(&signer)[1..])));
    let keys = key_set(&[short]);
    let token = signer.sign("ES256", &payload());
    let verified = Token::parse(&token)
        .expect("form")
        .verify(tokens::EXPECTED, Some(&keys), now());
    assert!(verified.is_ok());
}

#[test]
fn the_same_text_is_the_same_set() {
    assert_eq!(key_set(&[P256.jwk()]), key_set(&[P256.jwk()]));
    assert_ne!(key_set(&[P256.jwk()]), key_set(&[P384.jwk()]));
}
