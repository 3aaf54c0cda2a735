//! A record that is taken apart: what nobody took is left.

use std::net::IpAddr;

use serde_json::Value;

pub struct Record(Value);

impl Record {
    pub fn new(record: &Value) -> Self {
        Self(record.clone())
    }

    pub fn take(&mut self, place: &str) -> Option<Value> {
        let (parent, name) = place.rsplit_once('/')?;
        self.0.pointer_mut(parent)?.as_object_mut()?.remove(name)
    }

    pub fn text(&mut self, place: &str) -> Option<String> {
        self.0.pointer(place)?.as_str()?;
        match self.take(place) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        }
    }

    pub fn number(&mut self, place: &str) -> Option<u64> {
        self.0.pointer(place)?.as_u64()?;
        self.take(place)?.as_u64()
    }

    /// Leaves it where it is.
    pub fn peek(&self, place: &str) -> Option<String> {
        self.0.pointer(place)?.as_str().map(str::to_owned)
    }

    /// `ip:port`, or an address alone.
    pub fn address(&mut self, place: &str) -> Option<(IpAddr, Option<u16>)> {
        let text = self.peek(place)?;
        let whole = text.parse::<std::net::SocketAddr>().ok();
        let found = match whole {
            Some(whole) => (whole.ip(), Some(whole.port())),
            None => (text.parse().ok()?, None),
        };
        self.take(place);
        Some((found.0.to_canonical(), found.1))
    }

    /// Without what is empty by now.
    pub fn rest(mut self) -> Option<Value> {
        prune(&mut self.0).then_some(self.0)
    }
}

fn prune(value: &mut Value) -> bool {
    let Some(map) = value.as_object_mut() else {
        return !value.is_null();
    };
    map.retain(|_, value| prune(value));
    !map.is_empty()
}
