//! What is done with arbitrary bytes, and what must then hold. Used by the fuzz targets, and by
//! `tests/fuzz_seeds.rs` for the seeds and mutations of them.
#![allow(dead_code)]

use core::sync::atomic::{AtomicU64, Ordering};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use bdia_lm::data::{Corpus, TokenType, token_layout};
use bdia_lm::pairs::{self, Examples, Format, Kind, LossOn, PairColumns, Reading};
use bdia_models::chat::{ChatTemplate, Message};
use bdia_models::gpt2::config::Gpt2Config;
use bdia_models::input;
use bdia_models::language::Config as _;
use bdia_models::llama::config::LlamaConfig;
use bdia_models::tokenizer::{EOT, SpecialTokens, Tokenizer, VOCAB};
use bdia_models::weights::{self, Weights, WeightsError};
use bdia_train::checkpoint;
use xxhash_rust::xxh3::xxh3_64;

/// A model's data may be large, a fuzzer's inputs are not.
const CONTEXT: usize = 4;

fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(Tokenizer::gpt2)
}

/// The bytes as a new file, in memory where the system has a place for that.
fn file(name: &str, bytes: &[u8]) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
    let path = dir.join(format!("bdia-fuzz-{}-{n}-{name}", std::process::id()));
    std::fs::write(&path, bytes).expect("the file for the input can be written");
    path
}

/// Does something with the bytes as a file.
fn with_file<T>(name: &str, bytes: &[u8], read: impl FnOnce(&Path) -> T) -> T {
    let path = file(name, bytes);
    let result = read(&path);
    let _ = std::fs::remove_file(path);
    result
}

/// A GGUF file: what is accepted can be read to the end, unless a value is not finite; as a model
/// it is one, or an error.
pub fn gguf(data: &[u8]) {
    let path = Path::new("model.gguf");
    for len in [u64::MAX, data.len() as u64 / 2] {
        let _ = bdia_models::gguf::read_header(path, data, len);
    }
    let Ok(header) = bdia_models::gguf::read_header(path, data, data.len() as u64) else { return };
    with_file("model.gguf", data, |path| {
        let file = bdia_models::gguf::Gguf::open(path).expect("the same bytes");
        assert_eq!(file.tensors, header.tensors);
        for (name, tensor) in &file.tensors {
            assert!(tensor.len() <= 2 * data.len());
            let mut found = 0;
            let read = file.stream(name, &mut |at, values| {
                assert_eq!(at, found);
                assert!(values.iter().all(|v| v.is_finite()));
                found += values.len();
                Ok(())
            });
            match read {
                Ok(()) => assert_eq!(found, tensor.len()),
                Err(WeightsError::NotFinite { .. }) => {}
                Err(e) => panic!("{e}"),
            }
        }
        let _ = bdia_models::llama::gguf::open(path);
    });
}

/// A `tokenizer.json`, or a GGUF file with a tokenizer: what is accepted encodes any text into its
/// own tokens, the same in parts and after writing and reading.
pub fn tokenizer_files(data: &[u8]) {
    let read = if data.starts_with(&bdia_models::gguf::MAGIC) {
        let path = Path::new("model.gguf");
        let header = bdia_models::gguf::read_header(path, data, data.len() as u64);
        let Ok(header) = header else { return };
        Tokenizer::of_gguf(&header)
    } else {
        Tokenizer::from_json(data)
    };
    let Ok(tokenizer) = read else { return };
    let texts = ["", "a b  c\n\n12 é 日本 ▁<s>", "<|im_end|> \u{0}x <s>hello hello"];
    for special in [SpecialTokens::Parse, SpecialTokens::Text] {
        let tokenizer = tokenizer.clone().with_special_tokens(special);
        let all = tokenizer.encode_all(&texts);
        for (text, tokens) in texts.iter().zip(&all) {
            assert!(tokens.iter().all(|&t| (t as usize) < tokenizer.vocab()));
            assert_eq!(tokenizer.encode(text), *tokens);
            let _ = tokenizer.decode(tokens);
        }
    }
    for id in [tokenizer.bos(), tokenizer.eos()].into_iter().flatten() {
        assert!((id as usize) < tokenizer.vocab());
    }
    let _ = (tokenizer.token("a"), tokenizer.chat().is_some());
}

/// A chat template: it writes a conversation, the same every time, or says why not.
pub fn chat(data: &[u8]) {
    // The engine's own panics are caught and become errors; libFuzzer's hook would stop at them.
    static HOOK: OnceLock<()> = OnceLock::new();
    HOOK.get_or_init(|| std::panic::set_hook(Box::new(|info| eprintln!("{info}"))));
    let Ok(text) = core::str::from_utf8(data) else { return };
    let Ok(template) = ChatTemplate::parse(text, Some("<s>"), Some("</s>")) else { return };
    let said = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
    let all = [said("system", "Be brief."), said("user", " 1 < 2?\n"), said("assistant", "Yé</s>")];
    for messages in [&all[..], &all[1..], &all[1..2]] {
        for prompt in [false, true] {
            let _ = template.render(messages, prompt);
        }
        if let Ok((text, ranges)) = template.learned(messages) {
            assert!(ranges.iter().all(|r| r.0 <= r.1 && text.get(r.0..r.1).is_some()));
        }
    }
}

/// A configuration of Llama's family: what is accepted can be written and read again.
pub fn llama_config(data: &[u8]) {
    let Ok(config) = LlamaConfig::from_json(data) else { return };
    let again = LlamaConfig::from_json(config.to_json().as_bytes()).expect("our own file");
    assert_eq!(again.dims, config.dims);
    assert_eq!((again.kind, again.eos_token_ids), (config.kind, config.eos_token_ids));
}

/// A safetensors file: what is accepted has the bytes that its shapes need, is accepted by the
/// safetensors library, and can be read to the end.
pub fn weights(data: &[u8]) {
    let path = Path::new("model.safetensors");
    // A size that the content does not have: the file changed, or is a device.
    let _ = weights::read_header(path, &mut &data[..], u64::MAX, 0);
    let _ = weights::read_header(path, &mut &data[..], data.len() as u64 / 2, 0);
    let Ok(tensors) = weights::read_header(path, &mut &data[..], data.len() as u64, 0) else {
        return;
    };
    let elements: usize = tensors.iter().map(|(_, t)| t.len()).sum();
    assert!(elements <= data.len());
    let library = safetensors::SafeTensors::deserialize(data);
    // Whitespace before the header is all that the library minds and JSON does not.
    assert!(
        library.is_ok() || data[8] != b'{',
        "accepted here, refused by the library: {library:?}"
    );
    with_file("weights.safetensors", data, |path| {
        // The same name with and without its prefix is refused.
        let Ok(weights) = Weights::read_files(vec![path.into()]) else { return };
        let _ = weights.check(&[("wte.weight".into(), vec![2, 3])]);
        for (name, tensor) in weights.tensors() {
            let mut found = 0;
            let read = weights.stream::<WeightsError>(name, |at, values| {
                assert_eq!(at, found);
                assert!(values.iter().all(|v| v.is_finite()));
                found += values.len();
                Ok(())
            });
            match read {
                Ok(()) => assert_eq!(found, tensor.len()),
                Err(WeightsError::Dtype { .. } | WeightsError::NotFinite { .. }) => {}
                Err(e) => panic!("{e}"),
            }
        }
    });
}

/// The index of a sharded model: every file it names lies in its directory.
pub fn index(data: &[u8]) {
    let Ok(map) = weights::read_index(Path::new("model.safetensors.index.json"), data) else {
        return;
    };
    assert!(!map.is_empty());
    for file in map.values() {
        let path = Path::new("/a").join(file);
        assert_eq!(path.parent(), Some(Path::new("/a")), "{file:?}");
        assert_eq!(path.components().count(), 3, "{file:?}");
    }
}

/// `config.json`: what is accepted fits together, and is the same after writing and reading.
pub fn config(data: &[u8]) {
    let Ok(config) = Gpt2Config::from_json(data) else { return };
    config.check().expect("what was read is checked");
    let again =
        Gpt2Config::from_json(config.to_json().as_bytes()).expect("what is written can be read");
    assert_eq!(again, config);
    let parameters = config.parameters().expect("the parameters can be counted");
    if config.n_layer <= 64 {
        let sum: usize =
            config.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        assert_eq!(sum, parameters);
    }
}

/// A checkpoint, as it is and with the checksum that its bytes should have: what is accepted has
/// the size that its header says, and is not accepted with a bit flipped.
pub fn checkpoint(data: &[u8]) {
    accepted(data);
    if data.len() >= 8 {
        let mut sealed = data.to_vec();
        let end = sealed.len() - 8;
        let digest = xxh3_64(&sealed[..end]);
        sealed[end..].copy_from_slice(&digest.to_le_bytes());
        if accepted(&sealed) {
            sealed[end / 2] ^= 1;
            assert!(!accepted(&sealed), "damage is not seen");
        }
    }
}

/// Whether these bytes are a good checkpoint.
pub fn accepted(bytes: &[u8]) -> bool {
    let Ok(header) = with_file("step.ckpt", bytes, checkpoint::check) else { return false };
    let values: usize = header.lens.iter().sum();
    assert!(4 * values + 24 < bytes.len());
    true
}

/// A token file: what is accepted has as many tokens as it says, and gives batches of tokens within
/// the vocabulary.
pub fn tokens(data: &[u8]) {
    let path = Path::new("tokens.bin");
    let head = &data[..data.len().min(8192)];
    let claim = data.last_chunk::<8>().map_or(u64::MAX, |b| u64::from_le_bytes(*b));
    let types = [TokenType::U16, TokenType::U32, TokenType::I32, TokenType::I64].map(Some);
    for asked in types.into_iter().chain([None]) {
        for len in [data.len() as u64, claim, u64::MAX, u64::MAX - 1] {
            if let Ok(l) = token_layout(path, head, len, asked) {
                let bytes = l.tokens.checked_mul(l.token_type.bytes() as u64);
                assert!(l.tokens > 0 && bytes.and_then(|b| b.checked_add(l.offset)) == Some(len));
            }
        }
        with_file("tokens.bin", data, |path| {
            if let Ok(corpus) = Corpus::open(Some(path), asked, Some(tokenizer()), 1000, CONTEXT) {
                readable(&corpus, 1000);
            }
        });
    }
}

/// A data file, packed or plain. Accepted: no larger than it may be, and as text the bytes without
/// the mark before them.
pub fn packed(data: &[u8]) {
    const LIMIT: u64 = 1 << 16;
    let path = Path::new("data.txt.gz");
    let Ok(bytes) = input::unpack(path, data.to_vec(), LIMIT) else { return };
    assert!(input::is_gzip(data) || bytes == data);
    assert!(!input::is_gzip(data) || bytes.len() as u64 <= LIMIT);
    if let Ok(text) = input::text(path, bytes.clone()) {
        assert!(bytes == text.as_bytes() || bytes == ["\u{feff}", &text].concat().as_bytes());
    }
}

/// A file of `prepare`: what is accepted has samples of tokens of the vocabulary, and is the same
/// after writing and reading.
pub fn prepared(data: &[u8]) {
    let columns = PairColumns { prompt: "q".into(), completion: "a".into() };
    let reading =
        Reading { kind: Kind::Pairs(columns), format: Format::Plain, loss_on: LossOn::Completion };
    with_file("examples.safetensors", data, |path| {
        let open =
            |path: &Path| Examples::prepared(path, &reading, (tokenizer(), Some(EOT)), VOCAB);
        let Ok(Some(mut examples)) = open(path) else { return };
        let again = path.with_extension("again.safetensors");
        let whose = (tokenizer(), Some(EOT));
        examples.to_file(&again, &reading, whose).expect("the file can be written");
        let mut same = open(&again).expect("our own file").expect("it has our name");
        let _ = std::fs::remove_file(again);
        for pack in [false, true] {
            if examples.fit(CONTEXT, pack).is_err() {
                assert!(same.fit(CONTEXT, pack).is_err());
                continue;
            }
            same.fit(CONTEXT, pack).expect("the same tokens");
            let mut targets = 0;
            for i in 0..examples.len() {
                let of = |e: &Examples| {
                    let [mut x, mut y, mut s] = [[0; CONTEXT]; 3];
                    e.sample(i, &mut x, &mut y, &mut s).expect("nobody changes the file");
                    (x, y, s)
                };
                let (x, y, s) = of(&examples);
                assert_eq!((x, y, s), of(&same));
                let all = x.iter().chain(&y);
                assert!(all.into_iter().all(|&t| (-1..VOCAB as i32).contains(&t)));
                targets += y.iter().filter(|&&t| t >= 0).count() as u64;
            }
            assert_eq!(targets, examples.targets());
        }
    });
}

/// Pairs, read as each kind of file: what is accepted has completions, can be written as a table
/// and read again, and makes samples in which every target is the token after it.
pub fn pairs(data: &[u8]) {
    let columns = PairColumns { prompt: "q".into(), completion: "a".into() };
    for kind in ["csv", "tsv", "jsonl"] {
        let name = format!("pairs.{kind}");
        let Ok(read) = pairs::parse(Path::new(&name), data.to_vec(), &columns) else { continue };
        let read = read.pairs;
        assert!(!read.is_empty() && read.iter().all(|p| !p.completion.trim().is_empty()));
        let quoted = |s: &str| format!("\"{}\"", s.replace('"', "\"\""));
        let rows: String = read
            .iter()
            .map(|p| format!("{},{}\n", quoted(&p.prompt), quoted(&p.completion)))
            .collect();
        let table = format!("q,a\n{rows}");
        let again = pairs::parse(Path::new("pairs.csv"), table.into_bytes(), &columns)
            .expect("a table that we wrote");
        assert_eq!(again.pairs, read);
        with_file(&name, data, |path| {
            for loss_on in [LossOn::Completion, LossOn::All] {
                let kind = Kind::Pairs(columns.clone());
                let reading = Reading { kind, format: Format::Plain, loss_on };
                let open = Examples::open(path, &reading, (tokenizer(), Some(EOT)), VOCAB);
                let mut examples = open.expect("what is parsed can be opened");
                assert_eq!(examples.examples(), read.len());
                if examples.fit(CONTEXT, false).is_err() {
                    continue;
                }
                let (_, dropped) = examples.truncated();
                assert_eq!(examples.len() + dropped, read.len());
                let mut targets = 0;
                for i in 0..examples.len() {
                    let (mut x, mut y) = ([0; CONTEXT], [0; CONTEXT]);
                    examples.sample(i, &mut x, &mut y, &mut []).expect("in memory");
                    let learned = y.iter().filter(|&&t| t >= 0).count();
                    assert!(learned > 0);
                    targets += learned as u64;
                    assert!((0..CONTEXT - 1).all(|t| y[t] < 0 || y[t + 1] < 0 || y[t] == x[t + 1]));
                }
                assert_eq!(targets, examples.targets());
            }
        });
    }
}

/// Text: tokens stand for the same text again, encoding in pieces changes no token, and a text file
/// gives batches.
pub fn text(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let tokens = tokenizer().encode(&text);
    assert!(tokens.iter().all(|&t| t < EOT));
    assert_eq!(tokenizer().decode(&tokens), text);
    assert_eq!(tokens, tiktoken_rs::r50k_base_singleton().encode_ordinary(&text));
    let any: Vec<u32> = data.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
    let _ = tokenizer().decode(&any);
    let parse = tokenizer().clone().with_special_tokens(SpecialTokens::Parse);
    assert_eq!(parse.decode(&parse.encode(&text)), text);
    with_file("text.txt", data, |path| {
        for tokenizer in [tokenizer(), &parse] {
            if let Ok(corpus) = Corpus::open(Some(path), None, Some(tokenizer), VOCAB, CONTEXT) {
                readable(&corpus, VOCAB);
            }
        }
    });
}

fn readable(corpus: &Corpus, vocab: usize) {
    for part in [&corpus.train, &corpus.validation] {
        for start in part.windows(CONTEXT) {
            let (mut x, mut y) = ([0; CONTEXT], [0; CONTEXT]);
            part.window(start, &mut x, &mut y).expect("a window that there is can be read");
            assert!(x.iter().chain(&y).all(|&t| (0..vocab as i32).contains(&t)));
            assert_eq!(x[1..], y[..CONTEXT - 1]);
        }
    }
    assert!(corpus.train.len() > CONTEXT as u64);
}
