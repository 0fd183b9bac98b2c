//! Scores of corpora against those of Python's tools (`python/scores.py`).
#![allow(clippy::unwrap_used)]

use std::path::Path;

use bdia_train::scores::{Corpus, split};
use serde_json::Value;

fn corpora() -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/scores.json");
    let file: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    file["corpora"].as_array().unwrap().clone()
}

fn corpus(of: &Value) -> Corpus {
    let segments = of["segments"].as_array().unwrap().iter().map(|s| {
        let references: Vec<_> =
            s["references"].as_array().unwrap().iter().map(|r| r.as_str().unwrap()).collect();
        (s["hypothesis"].as_str().unwrap(), references)
    });
    Corpus::new(segments, split)
}

#[test]
fn scores_are_those_of_the_python_tools() {
    let corpora = corpora();
    assert!(corpora.len() >= 20);
    for of in corpora {
        let s = corpus(&of).scores();
        for (name, found) in [
            ("bleu", s.bleu),
            ("nist", s.nist),
            ("meteor", s.meteor),
            ("rouge_l", s.rouge_l),
            ("cider", s.cider),
        ] {
            let expected = of["scores"][name].as_f64().unwrap();
            // Both sum logarithms and ratios in f64, in different orders.
            assert!(
                (found - expected).abs() < 1e-9 * (1.0 + expected),
                "{}: {name} is {found}, {expected}",
                of["name"]
            );
        }
    }
}

/// Sums are taken in one order, so that a score has the same bits every time.
#[test]
fn scores_repeat_their_bits() {
    for of in corpora() {
        assert_eq!(corpus(&of).scores(), corpus(&of).scores(), "{}", of["name"]);
    }
}
