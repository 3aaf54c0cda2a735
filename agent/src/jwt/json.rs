//! JSON where two readers must not disagree: no member twice, nothing after the end.

use std::fmt;

use serde::de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Levels of arrays and objects inside each other.
pub const MAX_DEPTH: usize = 32;

#[derive(Debug, thiserror::Error)]
pub enum JsonError {
    #[error("not UTF-8")]
    Encoding,
    /// Says where, never what stood there.
    #[error("not strict JSON: {0}")]
    Syntax(#[from] serde_json::Error),
}

/// Reads one value. A member named twice is an error at any depth: RFC 8259 leaves open
/// which one counts, and whoever signs may have meant the other.
pub fn parse(text: &[u8]) -> Result<Value, JsonError> {
    let text = std::str::from_utf8(text).map_err(|_| JsonError::Encoding)?;
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = Strict { depth: 0 }.deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(value)
}

#[derive(Clone, Copy)]
struct Strict {
    depth: usize,
}

impl Strict {
    fn deeper<E: de::Error>(self) -> Result<Self, E> {
        if self.depth == MAX_DEPTH {
            return Err(E::custom("nested too deep"));
        }
        Ok(Self {
            depth: self.depth + 1,
        })
    }
}

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value)
            .map(Value::Number)
            .ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Value, A::Error> {
        let inside = self.deeper()?;
        let mut list = Vec::new();
        while let Some(element) = elements.next_element_seed(inside)? {
            list.push(element);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let inside = self.deeper()?;
        let mut object = Map::new();
        while let Some(name) = members.next_key::<String>()? {
            let value = members.next_value_seed(inside)?;
            if object.insert(name, value).is_some() {
                return Err(de::Error::custom("a member is named twice"));
            }
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_is_strict() {
        let value = parse(br#" {"a":[1,-2,1.5,"x",null,true],"b":{"a":1}} "#).expect("strict");
        assert_eq!(value["a"][3], "x");
        assert_eq!(value["b"]["a"], 1);
    }

    #[test]
    fn refuses_what_is_not() {
        let deep = format!("{}{}", "[".repeat(33), "]".repeat(33));
        let very_deep = "[".repeat(100_000);
        let table: [(&str, &[u8]); 12] = [
            ("twice", br#"{"a":1,"a":2}"#),
            ("twice by escape", br#"{"a":1,"\u0061":2}"#),
            ("twice below", br#"{"x":[{"a":1,"b":2,"a":1}]}"#),
            ("trailing", br#"{"a":1}{"#),
            ("two values", br#"{} {}"#),
            ("not UTF-8", b"{\"a\":\"\xff\"}"),
            ("lone surrogate", br#"{"a":"\ud800"}"#),
            ("byte order mark", b"\xef\xbb\xbf{}"),
            ("out of range", br#"{"a":1e400}"#),
            ("not a number", br#"{"a":NaN}"#),
            ("deep", deep.as_bytes()),
            ("very deep", very_deep.as_bytes()),
        ];
        for (kind, text) in table {
            assert!(parse(text).is_err(), "{kind}");
        }
    }
}
