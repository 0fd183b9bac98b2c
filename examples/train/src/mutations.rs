//! The functions of fuzz targets over committed seeds and a few thousand mutations of them, the
//! same ones every time: what `cargo test` does of fuzzing.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use bdia_core::rng::{Draw, Stream};

/// Of every seed.
const MUTATIONS: u32 = 2000;

/// Names and contents of the seeds of a target, in the order of their names.
///
/// # Panics
/// Where they cannot be read.
pub fn seeds(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut seeds: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap())
        .map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap()))
        .collect();
    seeds.sort();
    seeds
}

/// Random numbers below a bound.
struct Dice {
    stream: Stream,
    drawn: u32,
}

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.drawn += 1;
        self.stream.below(self.drawn, n.max(1) as u32) as usize
    }
}

/// Values at which careless readers fail: bytes, and numbers and names as text.
const BYTES: [u8; 10] = [0, 1, 0x7f, 0x80, 0xff, b'"', b'{', b'[', b'-', b'9'];
const TEXTS: [&str; 16] = [
    "0",
    "-1",
    "1e999",
    "18446744073709551615",
    "9223372036854775808",
    "4294967296",
    "1e-320",
    "null",
    "true",
    "[]",
    "{}",
    "\"\"",
    "\"..\"",
    "\"a\":1,",
    "\u{2003}",
    "<|endoftext|>\n",
];

fn mutate(bytes: &mut Vec<u8>, other: &[u8], dice: &mut Dice) {
    let at = dice.below(bytes.len());
    let end = at + dice.below((bytes.len() - at).min(16) + 1);
    match dice.below(9) {
        0 if !bytes.is_empty() => bytes[at] ^= 1 << dice.below(8),
        1 if !bytes.is_empty() => bytes[at] = BYTES[dice.below(BYTES.len())],
        2 => bytes.insert(at, BYTES[dice.below(BYTES.len())]),
        3 => drop(bytes.drain(at..end)),
        4 => {
            let piece = bytes[at..end].to_vec();
            let to = dice.below(bytes.len() + 1);
            drop(bytes.splice(to..to, piece));
        }
        5 => bytes.truncate(at),
        6 => {
            let from = dice.below(other.len());
            let piece = other[from..(from + dice.below(32)).min(other.len())].to_vec();
            drop(bytes.splice(at..end, piece));
        }
        7 => {
            // A whole number, or word, of a text.
            let same = |b: &&u8| b.is_ascii_alphanumeric() || **b == b'.';
            let len = bytes[at..].iter().take_while(same).count();
            let start = at - bytes[..at].iter().rev().take_while(same).count();
            drop(bytes.splice(start..at + len, TEXTS[dice.below(TEXTS.len())].bytes()));
        }
        _ => drop(bytes.splice(at..end, TEXTS[dice.below(TEXTS.len())].bytes())),
    }
}

/// Runs a target over its seeds and their mutations.
///
/// # Panics
/// Where the target does, with the input; where there are fewer than three seeds.
pub fn all(dir: &Path, target: fn(&[u8])) {
    let seeds = seeds(dir);
    let name = dir.display();
    assert!(seeds.len() >= 3, "{name} has seeds");
    target(&[]);
    for (i, (seed, bytes)) in seeds.iter().enumerate() {
        target(bytes);
        for n in 0..MUTATIONS {
            let mut dice = Dice { stream: Stream::new(1, n, i as u32, 0, 0, Draw::Data), drawn: 0 };
            let mut mutated = bytes.clone();
            for _ in 0..=dice.below(4) {
                let other = dice.below(seeds.len());
                mutate(&mut mutated, &seeds[other].1, &mut dice);
            }
            let result = std::panic::catch_unwind(|| target(&mutated));
            assert!(
                result.is_ok(),
                "{name}: mutation {n} of {seed}: {:?}",
                mutated.escape_ascii().to_string()
            );
        }
    }
}
