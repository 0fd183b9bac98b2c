//! What is done with arbitrary bytes, and what must then hold. Used by the fuzz targets, and by
//! `tests/fuzz_seeds.rs` for the seeds and mutations of them.
#![allow(dead_code)]

use std::path::Path;

use bdia_models::seq2seq::config::TranslationConfig;
use bdia_translate::data::{Columns, Pairs, aligned, one_file};

fn check(pairs: &Pairs) {
    for text in pairs.pairs.iter().flat_map(|p| [&p.source, &p.target]) {
        assert!(
            !text.is_empty() && text.trim() == text && !text.contains(['\n', '\r']),
            "{text:?}"
        );
    }
}

/// A table, lines with tabs, both with columns by place and by name, and two aligned files (the
/// halves of what is there), each plain or packed. Accepted: every sentence is one line that is not
/// empty.
pub fn pairs(data: &[u8]) {
    for name in ["pairs.csv", "pairs.tsv"] {
        for columns in [None, Some("2,3"), Some("src,tgt")] {
            let columns: Option<Columns> = columns.map(|c| c.parse().expect("two columns"));
            if let Ok(pairs) = one_file(Path::new(name), data.to_vec(), columns.as_ref()) {
                check(&pairs);
            }
        }
    }
    let (a, b) = data.split_at(data.len() / 2);
    if let Ok(pairs) = aligned([Path::new("a.en"), Path::new("a.fr")], [a.to_vec(), b.to_vec()]) {
        check(&pairs);
    }
}

/// A `config.json`. Accepted: written and read again, it is the same.
pub fn translation_config(data: &[u8]) {
    let path = Path::new("config.json");
    if let Ok(config) = TranslationConfig::from_json(path, data) {
        let again = serde_json::to_vec(&config).expect("it was read");
        assert_eq!(TranslationConfig::from_json(path, &again).expect("it was written"), config);
    }
}
