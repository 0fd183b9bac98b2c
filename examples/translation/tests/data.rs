//! Files of every kind, good and bad; the split; scores equal to sacreBLEU's.
#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use bdia_models::files::testing::TempDir;
use bdia_models::input::InputError;
use bdia_train::scores::{bleu, chrf};
use bdia_translate::data::{self, DataError, Dataset, Pair, Source, one_file, references};

fn read(files: &[PathBuf]) -> Result<Vec<Pair>, DataError> {
    data::read(files, None)
}

fn refused(files: &[PathBuf], parts: &[&str]) -> DataError {
    let error = read(files).unwrap_err();
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "expected {part:?} in: {text}");
    }
    error
}

fn pairs(of: &[(&str, &str)]) -> Vec<Pair> {
    of.iter().map(|(s, t)| Pair { source: (*s).into(), target: (*t).into() }).collect()
}

fn packed(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

#[test]
fn tables_of_two_columns() {
    let dir = TempDir::new();
    let good = "\u{feff}English,French\nHi.,Salut !\n\
        \"Well, no.\",\"Eh bien, \"\"non\"\".\"\n\"two\nlines\",deux\r\n";
    let expected =
        pairs(&[("Hi.", "Salut !"), ("Well, no.", "Eh bien, \"non\"."), ("two lines", "deux")]);
    assert_eq!(read(&[dir.file("a.csv", good.as_bytes())]).unwrap(), expected);
    assert_eq!(read(&[dir.file("a.csv.gz", &packed(good.as_bytes()))]).unwrap(), expected);

    refused(
        &[dir.file("b.csv", b"English\nHi.\n")],
        &["b.csv", "line 1", "1 column(s)", "two columns with a header"],
    );
    refused(&[dir.file("b.csv", b"E,F\na,b\nc\nd,e\n")], &["b.csv", "line 3", "1 column(s)"]);
    refused(&[dir.file("b.csv", b"E,F\na,b,c\n")], &["b.csv", "line 2", "3 column(s)"]);
    // What has a side less is skipped and counted, and so are lines that the library passes over.
    let skipping = b"E,F\na,b\n,\nc,\n\n \n\" \",f\ng,h\n";
    let e = refused(&[dir.file("b.csv", skipping)], &["b.csv", "line 6", "1 column(s)"]);
    assert!(matches!(e, DataError::Columns { line: 6, .. }));
    let skipping = b"E,F\na,b\n,\nc,\n\n\" \",f\ng,h\n";
    let found = one_file(Path::new("b.csv"), skipping.to_vec(), None).unwrap();
    assert_eq!((found.pairs, found.skipped), (pairs(&[("a", "b"), ("g", "h")]), Some((4, 3))));
    // A line break of two bytes is no empty line, and an empty line between two is one.
    for (text, skipped) in [
        ("E,F\r\na,b\r\ng,h\r\n", None),
        ("E,F\r\n\r\na,b\r\n\r\n\r\ng,h", Some((3, 2))),
        ("E,F\r\na,b\r\n,\r\ng,h\r\n", Some((1, 3))),
    ] {
        let found = one_file(Path::new("b.csv"), text.into(), None).unwrap();
        assert_eq!((found.pairs, found.skipped), (pairs(&[("a", "b"), ("g", "h")]), skipped));
    }
    let e = refused(
        &[dir.file("b.csv", b"E,F\na,b\nc,\"d\ne,f\ng,h\n")],
        &["b.csv", "line 3", "never closed"],
    );
    assert!(matches!(e, DataError::Csv { line: 3, .. }));
    let quotes = dir.file("q.csv", b"E,F\na \"b\",c\n\"\"\"d\"\"\",\"e\n\nf\"\n");
    assert_eq!(read(&[quotes]).unwrap(), pairs(&[("a \"b\"", "c"), ("\"d\"", "e f")]));
    let e = refused(&[dir.file("b.csv", b"E,F\na,b\nc,d\xff\n")], &["b.csv", "line 3", "UTF-8"]);
    assert!(matches!(e, DataError::Input(InputError::Encoding { line: 3, .. })));
}

#[test]
fn lines_with_tabs() {
    let dir = TempDir::new();
    let good = "Hi.\tSalut !\tCC-BY 2.0 (France)\r\nGo.\tVa !\n";
    let expected = pairs(&[("Hi.", "Salut !"), ("Go.", "Va !")]);
    assert_eq!(read(&[dir.file("fra.txt", good.as_bytes())]).unwrap(), expected);
    assert_eq!(read(&[dir.file("fra.tsv.gz", &packed(good.as_bytes()))]).unwrap(), expected);
    let numbered = "1276\tHi.\t3092\tSalut !\n1277\tGo.\t12\tVa !\n";
    assert_eq!(read(&[dir.file("tatoeba.tsv", numbered.as_bytes())]).unwrap(), expected);
    refused(&[dir.file("b.tsv", b"1\ta\t2\tb\nc\td\n")], &["line 2", "2 column(s)", "expected 4"]);
    refused(&[dir.file("b.tsv", b"a\tb\nno tab\n")], &["b.tsv", "line 2", "1 column(s)", "tabs"]);
    let skipping = b"a\tb\n\nc\t\n\td\n \ne\tf\n\n";
    let found = one_file(Path::new("b.tsv"), skipping.to_vec(), None).unwrap();
    assert_eq!((found.pairs, found.skipped), (pairs(&[("a", "b"), ("e", "f")]), Some((5, 2))));
    let found = one_file(Path::new("b.tsv"), b"a\tb\nc\t\n\ne\tf\n".to_vec(), None).unwrap();
    assert_eq!(found.skipped, Some((2, 2)));
    refused(&[dir.file("b.tsv", b"a\tb\n\xe9t\xe9\tsummer\n")], &["line 2", "UTF-8", "iconv"]);
}

#[test]
fn more_than_is_read() {
    let dir = TempDir::new();
    let large = dir.file("a.tsv", b"");
    // Nothing of it is on disk.
    std::fs::File::options().write(true).open(&large).unwrap().set_len((1 << 30) + 1).unwrap();
    let e = refused(core::slice::from_ref(&large), &["a.tsv", "more than 1 GiB when unpacked"]);
    assert!(matches!(e, DataError::TooLarge(path) if path == large));
}

#[test]
fn aligned_lines() {
    let dir = TempDir::new();
    let (en, fr) = (dir.file("a.en", b"one\ntwo\nthree\n"), dir.file("a.fr", b"un\ndeux\ntrois"));
    assert_eq!(
        read(&[en.clone(), fr]).unwrap(),
        pairs(&[("one", "un"), ("two", "deux"), ("three", "trois")])
    );
    let gz = dir.file("b.fr.gz", &packed(b"un\ndeux\ntrois\n"));
    assert_eq!(read(&[en.clone(), gz]).unwrap().len(), 3);
    let short = dir.file("c.fr", b"un\ndeux\n");
    let e = refused(&[en.clone(), short.clone()], &["c.fr", "line 3", "a.en goes on"]);
    assert!(matches!(e, DataError::Aligned { line: 3, .. }));
    refused(&[short, en.clone()], &["c.fr", "line 3", "a.en goes on"]);
    let gap = dir.file("d.fr", b"un\n\n\n \n");
    assert_eq!(read(&[en.clone(), gap]).unwrap(), pairs(&[("one", "un")]));
    let together = |en: &[u8], fr: &[u8]| {
        data::aligned([Path::new("d.en"), Path::new("e.fr")], [en.to_vec(), fr.to_vec()])
    };
    let found = together(b"one\n  \nthree\nfour\n", b"un\ndeux\ntrois\n");
    assert!(matches!(found, Err(DataError::Aligned { line: 4, .. })));
    // Empty lines at the end of one file are no sentences.
    let found = together(b"one\n  \nthree\n", b"un\ndeux\ntrois\n\n \n").unwrap();
    assert_eq!(found.pairs, pairs(&[("one", "un"), ("three", "trois")]));
    assert_eq!((found.skipped, found.header), (Some((1, 2)), None));
    let mut damaged = packed(b"un\ndeux\ntrois\n");
    damaged.truncate(12);
    refused(&[en.clone(), dir.file("f.fr.gz", &damaged)], &["f.fr.gz", "gzip"]);
    refused(&[en, dir.path().join("absent")], &["absent"]);
}

#[test]
fn columns_and_headers() {
    let of = |name: &str, text: &str, columns: &str| {
        let columns = (!columns.is_empty()).then(|| columns.parse().unwrap());
        one_file(Path::new(name), text.as_bytes().to_vec(), columns.as_ref())
    };
    let expected = pairs(&[("one cat", "un chat"), ("two", "deux")]);
    let with_id = "id\tsrc\ttgt\n7\tone cat\tun chat\n8\ttwo\tdeux\n";
    let table = with_id.replace('\t', ",");
    for (name, text, columns) in [
        ("a.tsv", with_id, "src,tgt"),
        ("a.tsv", with_id, "2,3"),
        ("a.csv", &table, "src,tgt"),
        ("a.csv", &table, "2,tgt"),
        // A header is noticed by the numbers under it, and by names of languages.
        ("a.tsv", "nr\tA\tB\n7\tone cat\tun chat\n8\ttwo\tdeux\n", "2,3"),
        ("a.txt", "English\tFrench\none cat\tun chat\ntwo\tdeux\n", ""),
        ("a.txt", "en\tFR\tby\none cat\tun chat\tme\ntwo\tdeux\tyou\n", ""),
    ] {
        let found = of(name, text, columns).unwrap();
        assert_eq!(found.pairs, expected, "{name}: {text}");
        assert_eq!(found.header.is_some(), name != "a.csv");
    }
    // The other way round, and without a header.
    let turned = of("a.tsv", &with_id[10..], "3,2").unwrap();
    assert_eq!(turned.pairs, pairs(&[("un chat", "one cat"), ("deux", "two")]));
    assert_eq!(turned.header, None);
    // Numbers are translated where they are asked for: they may be what is written as words.
    let words = pairs(&[("one cat", "7"), ("two", "8")]);
    assert_eq!(of("a.tsv", with_id, "2,1").unwrap().pairs, words);
    assert_eq!(of("a.csv", &table, "2,1").unwrap().pairs, words);
    // Many columns of many lines are read a few times, not once for each column.
    let [words, numbers] = ["a\t", "7\t"].map(|field| field.repeat(1 << 14) + "\n");
    let wide = [words.as_str(), &numbers.repeat(64), &words].concat();
    assert_eq!(of("a.tsv", &wide, "").unwrap().pairs.len(), 66);
    // Numbers are translated where there is nothing else.
    let numbers = of("a.tsv", "1\tun\n2\tdeux\n", "").unwrap();
    assert_eq!((numbers.pairs.len(), numbers.header), (2, None));
    for (name, text, columns, message) in [
        ("a.tsv", with_id, "", "has only numbers; name the two of 3 columns"),
        ("a.tsv", &with_id[10..], "", "--columns 2,3"),
        ("a.tsv", "0.9\ta\tb\n1e-3\tc\td\n", "", "has only numbers"),
        ("a.tsv", with_id, "3,tgt", "expected two different columns, 3,tgt is one; the columns"),
        ("a.csv", &table, "src,2", "expected two different columns, src,2 is one; the columns"),
        ("a.csv", "a,b,a\n1,2,3\n", "b,a", "several columns are called a; give its place"),
        ("a.tsv", "a\tb\ta\n1\t2\t3\n", "b,a", "several columns are called a; give its place"),
        ("a.tsv", with_id, "2,4", "expected the columns 2,4; the columns are \"id\", \"src\""),
        ("a.csv", &table, "src,fr", "expected the columns src,fr"),
        ("a.csv", &table, "", "line 1: 3 column(s), expected 2"),
        ("a.csv", "a,b,c\n1,2\n", "a,b", "line 2: 2 column(s), expected 3, as in the header"),
        ("a.tsv", "a\tb\tc\nd\te\n", "1,3", "line 2: 2 column(s), expected those of --columns"),
    ] {
        let e = of(name, text, columns).unwrap_err().to_string();
        assert!(e.contains(message) && e.contains(name), "{e}");
    }
}

fn open(
    files: &[PathBuf],
    pairs: Option<usize>,
    held: Option<usize>,
) -> Result<Dataset, DataError> {
    Dataset::open(&Source { files, held_files: &[], columns: None, pairs, held })
}

#[test]
fn no_source_sentence_is_on_both_sides() {
    let dir = TempDir::new();
    // 100 sentences with 3 translations each.
    let text: String = (0..300).map(|i| format!("sentence {}\tphrase {i}\n", i / 3)).collect();
    let files = [dir.file("a.tsv", text.as_bytes())];
    let d = open(&files, None, Some(10)).unwrap();
    assert_eq!((d.train.len(), d.held.len()), (270, 30));
    let sources = |p: &[Pair]| p.iter().map(|p| p.source.clone()).collect::<HashSet<_>>();
    assert!(sources(&d.train).is_disjoint(&sources(&d.held)));
    let known = references(&d.held);
    assert!(known.len() == 10 && known.iter().all(|(_, all)| all.len() == 3));
    // However many are used, the same are held out.
    let some = open(&files, Some(50), Some(10)).unwrap();
    assert_eq!((some.train.len(), &some.held), (50, &d.held));
    assert!(
        some.digest() != d.digest() && d.digest() == open(&files, None, Some(10)).unwrap().digest()
    );
    // A twentieth, where nothing is said.
    assert_eq!(references(&open(&files, None, None).unwrap().held).len(), 5);
    let e = open(&files, None, Some(100)).unwrap_err().to_string();
    assert!(e.contains("100 different source sentence(s), expected 101"), "{e}");
    assert!(
        open(&[dir.file("b.tsv", b"")], None, None).unwrap_err().to_string().contains("0 pair(s)")
    );

    // Held-out files of their own: what they have is not learned from.
    let held_files = [dir.file("h.tsv", b"sentence 7\tautre\nnew\tnouveau\n")];
    let d = Dataset::open(&Source {
        files: &files,
        held_files: &held_files,
        columns: None,
        pairs: None,
        held: None,
    })
    .unwrap();
    assert_eq!((d.train.len(), d.held.len()), (297, 2));
    // So many source sentences of them, with all their translations.
    let held_files = [dir.file("i.tsv", b"new\tnouveau\nother\tautre\nnew\tneuf\n")];
    let d = Dataset::open(&Source {
        files: &files,
        held_files: &held_files,
        columns: None,
        pairs: None,
        held: Some(1),
    })
    .unwrap();
    assert_eq!(d.held, pairs(&[("new", "nouveau"), ("new", "neuf")]));
}

#[test]
fn number_words_are_split() {
    let d = open(&[], Some(2000), Some(300)).unwrap();
    assert_eq!((d.train.len(), d.held.len()), (2000, 300));
    // What is held out does not depend on what is learned.
    let other = open(&[], Some(9000), Some(400)).unwrap();
    assert!(other.train[..2000] == d.train && other.held[..300] == d.held);
    let known: HashSet<_> = other.train.iter().map(|p| &p.source).collect();
    assert!(other.held.iter().all(|p| !known.contains(&p.source)));
    let e = open(&[], Some(2_000_000), Some(10)).unwrap_err().to_string();
    assert!(e.contains("number(s) to learn from, expected 2000000"), "{e}");
}

/// The hypotheses, the references, and what sacreBLEU says of them (`torch/scores.py` repeats it).
#[test]
fn scores_are_those_of_sacrebleu() {
    let file = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
        std::fs::read_to_string(path).unwrap()
    };
    let (hypotheses, references) = (file("scores.hypotheses.txt"), file("scores.references.txt"));
    let expected: serde_json::Value = serde_json::from_str(&file("scores.json")).unwrap();
    let pairs: Vec<_> = hypotheses.split('\n').zip(references.split('\n')).collect();
    let parts = expected["parts"].as_array().unwrap();
    assert!(parts.len() > 10);
    for part in parts {
        let at = |key: &str| part[key].as_u64().unwrap() as usize;
        let some = || pairs[at("from")..at("to")].iter().copied();
        for (what, found) in [("bleu", bleu(some())), ("chrf", chrf(some()))] {
            let expected = part[what].as_f64().unwrap();
            // Both sum some logarithms in f64.
            assert!((found - expected).abs() < 1e-9, "{part}: {what} is {found}");
        }
    }
}
