//! What goes wrong, by seed. Bounded, so that whoever tries again gets through.

use std::{collections::HashMap, time::Duration};

use crate::status::Refusal;

/// Faults in a row that one kind of request may meet.
const IN_A_ROW: u8 = 2;

pub struct Chaos {
    state: u64,
    faults: HashMap<String, u8>,
}

/// What becomes of a request.
pub enum Fate {
    Answer,
    Refuse(Refusal),
    HangUp,
}

impl Chaos {
    pub fn new(seed: u64) -> Self {
        Self {
            state: seed,
            faults: HashMap::new(),
        }
    }

    /// Splitmix64: short, and the same everywhere.
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    pub fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }

    pub fn pause(&mut self, up_to_ms: u64) -> Duration {
        Duration::from_millis(self.below(up_to_ms))
    }

    /// Of a request to `path`; `resumes`: it goes on from something that may be too old.
    pub fn fate(&mut self, path: &str, resumes: Option<u64>) -> Fate {
        let draw = self.below(100);
        let faults = self.faults.entry(path.to_owned()).or_default();
        let fate = match (draw, resumes) {
            _ if *faults >= IN_A_ROW => Fate::Answer,
            (0..2, _) => Fate::HangUp,
            (2..4, _) => Fate::Refuse(Refusal {
                retry_after: Some(1),
                ..Refusal::new(
                    429,
                    "TooManyRequests",
                    "too many requests, please try again later",
                )
            }),
            (4..6, _) => Fate::Refuse(Refusal::new(
                503,
                "ServiceUnavailable",
                "etcdserver: leader changed",
            )),
            (6..8, _) => Fate::Refuse(Refusal::new(
                500,
                "InternalError",
                "Internal error occurred: etcdserver: request timed out",
            )),
            (8..16, Some(asked)) => Fate::Refuse(Refusal::expired(asked, asked + 1)),
            _ => Fate::Answer,
        };
        *faults = match fate {
            Fate::Answer => 0,
            _ => *faults + 1,
        };
        fate
    }

    /// Cuts what is sent into pieces.
    pub fn pieces(&mut self, mut bytes: bytes::Bytes) -> Vec<bytes::Bytes> {
        let mut pieces = Vec::new();
        while bytes.len() > 1 && pieces.len() < 4 && self.percent(60) {
            let at = 1 + self.below(bytes.len() as u64 - 1) as usize;
            pieces.push(bytes.split_to(at));
        }
        pieces.push(bytes);
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_end() {
        let mut chaos = Chaos::new(7);
        let (mut row, mut all) = (0, 0);
        for _ in 0..1000 {
            match chaos.fate("/api/v1/pods", Some(1)) {
                Fate::Answer => row = 0,
                Fate::Refuse(_) | Fate::HangUp => (row, all) = (row + 1, all + 1),
            }
            assert!(row <= IN_A_ROW);
        }
        assert!(all > 50, "{all}");
    }

    #[test]
    fn pieces_are_the_whole() {
        let mut chaos = Chaos::new(3);
        let text = bytes::Bytes::from_static(b"{\"type\":\"ADDED\"}\n");
        for _ in 0..100 {
            assert_eq!(chaos.pieces(text.clone()).concat(), text);
        }
    }
}
