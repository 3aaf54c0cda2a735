//! Paths: policy and the application see the same one, however it was written.

#![no_main]

use libfuzzer_sys::fuzz_target;
use postern::{
    config::Normalization::{self, *},
    policy::normalize,
};

fuzz_target!(|target: &str| {
    for degree in [None, Base, MergeSlashes, DecodeAndMergeSlashes] {
        check(target, degree);
    }
});

fn check(target: &str, degree: Normalization) {
    let Ok(normal) = normalize(target, degree) else {
        return;
    };
    let path = &*normal.path;
    assert!(path.starts_with('/') || path == "*", "{path}");
    let once = normal.target();
    let twice = normalize(&once, degree).expect("it was normal");
    assert_eq!(twice, normal, "{degree:?} is not done in one go");
    if degree == None {
        assert!(target.starts_with(path));
        return;
    }
    assert!(!path.contains('\\'), "{path}");
    assert!(!path.split('/').any(|s| s == "." || s == ".."), "{path}");
    assert!(degree == Base || !path.contains("//"), "{path}");
    for byte in escapes(path) {
        assert!(byte != 0, "{path}");
        let unreserved = byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
        assert!(!unreserved, "{path} can be decoded further");
        let slash = byte == b'/' || byte == b'\\';
        assert!(!slash || degree != DecodeAndMergeSlashes, "{path}");
    }
}

/// The bytes that are written as escapes, as one reading of the path has them.
fn escapes(path: &str) -> Vec<u8> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16).map(|digit| digit as u8);
    let mut rest = path.as_bytes();
    let mut found = Vec::new();
    while let [first, after @ ..] = rest {
        rest = after;
        if let (b'%', [high, low, behind @ ..]) = (first, after)
            && let (Some(high), Some(low)) = (digit(high), digit(low))
        {
            found.push(high << 4 | low);
            rest = behind;
        }
    }
    found
}
