//! The fuzz targets' functions over the committed seeds and a few thousand mutations of them, the same ones every time.
//! `fuzz/README.md` says how to search further.
#![allow(clippy::unwrap_used)]

#[path = "../fuzz/targets.rs"]
mod targets;

use std::path::Path;

use bdia_core::rng::{Draw, Stream};

/// Of every seed.
const MUTATIONS: u32 = 2000;

fn seeds(name: &str) -> Vec<(String, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(name);
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

fn all(name: &str, target: fn(&[u8])) {
    let seeds = seeds(name);
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
            assert!(result.is_ok(), "{name}: mutation {n} of {seed}: {:?}", mutated.escape_ascii().to_string());
        }
    }
}

#[test]
fn weights() {
    all("weights", targets::weights);
}

#[test]
fn index() {
    all("index", targets::index);
}

#[test]
fn config() {
    all("config", targets::config);
}

#[test]
fn checkpoint() {
    all("checkpoint", targets::checkpoint);
}

#[test]
fn tokens() {
    all("tokens", targets::tokens);
}

#[test]
fn text() {
    all("text", targets::text);
}

/// Seeds that are meant to be good are: otherwise the search would begin at the door.
#[test]
fn good_seeds_are_accepted() {
    let seed = |target, name: &str| seeds(target).into_iter().find(|s| s.0 == name).unwrap().1;
    let path = Path::new("seed");
    let bytes = seed("weights", "f32_f16_bf16");
    assert_eq!(bdia_gpt2::weights::read_header(path, &mut &bytes[..], bytes.len() as u64, 0).unwrap().len(), 4);
    assert!(bdia_gpt2::weights::read_index(path, &seed("index", "shards")).is_ok());
    for name in ["hugging_face", "small", "ours"] {
        bdia_gpt2::config::Gpt2Config::from_json(&seed("config", name)).unwrap();
    }
    assert!(targets::accepted(&seed("checkpoint", "good")));
    for (name, offset) in [("plain", 0), ("llm_c", 1024)] {
        let bytes = seed("tokens", name);
        assert_eq!(bdia_gpt2::data::token_layout(path, &bytes, bytes.len() as u64).unwrap(), (offset, 24));
    }
}
