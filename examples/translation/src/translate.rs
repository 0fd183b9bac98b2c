//! What a trained model does: losses, translations and their scores; `eval` and `translate`.

use std::io::{BufRead, BufReader, Read};

use bdia_core::backend::Backend;
use bdia_core::layers::Gradients;
use bdia_core::stack::Mode;
use bdia_core::{Gamma, Grid, Layout, Policy, Sign};
use bdia_models::files::write_bytes;
use bdia_models::inference::Inference;
use bdia_models::seq2seq::config::TranslationConfig;
use bdia_models::seq2seq::decode::{Search, Sizes};
use bdia_models::seq2seq::files::load_weights;
use bdia_models::seq2seq::model::{Setup, Tokens, Translator};
use bdia_models::seq2seq::vocab::{Vocabularies, Vocabulary};
use bdia_models::weights;
use bdia_train::cli::{self, BackendKind};
use bdia_train::machine::{self, Work, for_kind};
use bdia_train::scores::{bleu, chrf};
use bdia_train::{Failure, checkpoint, report, run, trainer};

use crate::batch::{Batches, chunk_of};
use crate::cli::{EvalArgs, SearchArgs, TrainArgs, TranslateArgs};
use crate::data::{Dataset, Pair, Source, read, references};

/// Pairs as tokens, without those that are too long for the model.
#[derive(Debug, Clone, Default)]
pub struct Encoded {
    /// The pairs that are left, as text and as tokens.
    pub pairs: Vec<Pair>,
    /// The same as tokens.
    pub tokens: Vec<Tokens>,
    /// How many were left out.
    pub too_long: usize,
}

impl Encoded {
    /// Encodes pairs of at most `longest` positions.
    ///
    /// # Errors
    /// What the vocabulary reports.
    pub fn new(
        pairs: &[Pair],
        vocabularies: &Vocabularies,
        longest: usize,
    ) -> Result<Self, Failure> {
        let mut out = Self::default();
        for p in pairs {
            let tokens = Tokens {
                source: vocabularies.source.encode(&p.source)?,
                target: vocabularies.target().encode(&p.target)?,
            };
            if tokens.positions() > longest {
                out.too_long += 1;
            } else {
                out.pairs.push(p.clone());
                out.tokens.push(tokens);
            }
        }
        Ok(out)
    }

    /// Every source once, with all its translations; `most` of them, evenly spread.
    pub fn sentences(&self, most: usize) -> Vec<Sentence> {
        let all = references(&self.pairs);
        let mut tokens = std::collections::HashMap::new();
        for (p, t) in self.pairs.iter().zip(&self.tokens) {
            tokens.entry(p.source.as_str()).or_insert(&t.source);
        }
        let n = all.len().min(most);
        (0..n)
            .map(|i| &all[i * all.len() / n])
            .filter_map(|(source, references)| {
                Some(Sentence {
                    source: (*source).to_string(),
                    tokens: tokens.get(source)?.to_vec(),
                    references: references.iter().map(ToString::to_string).collect(),
                })
            })
            .collect()
    }
}

/// A sentence to translate and its known translations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sentence {
    /// The sentence.
    pub source: String,
    /// As tokens.
    pub tokens: Vec<i32>,
    /// Its translations; BLEU and chrF compare with the first.
    pub references: Vec<String>,
}

/// Scores of translations.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scores {
    /// 0 to 100.
    pub bleu: f64,
    /// 0 to 100.
    pub chrf: f64,
    /// Share of translations that are one of the known ones, letter by letter.
    pub exact: f64,
}

/// Compares translations with what is known.
pub fn score(sentences: &[Sentence], translations: &[String]) -> Scores {
    let first = |s: &'_ Sentence| s.references.first().cloned().unwrap_or_default();
    let firsts: Vec<_> = sentences.iter().map(first).collect();
    let pairs = || translations.iter().map(String::as_str).zip(firsts.iter().map(String::as_str));
    let exact =
        sentences.iter().zip(translations).filter(|(s, t)| s.references.contains(t)).count();
    Scores {
        bleu: bleu(pairs()),
        chrf: chrf(pairs()),
        exact: exact as f64 / sentences.len().max(1) as f64,
    }
}

/// Mean loss of the target's tokens, and their number. `chunk` samples of `longest` positions at a
/// time.
///
/// # Errors
/// [`Failure`]
pub fn loss<B: Backend>(
    be: &mut B,
    model: &mut Translator,
    pairs: &[Tokens],
    batches: &Batches,
    (chunk, longest): (usize, usize),
    inference: Inference,
) -> Result<(f64, usize), Failure> {
    let (mut sum, mut count) = (0.0, 0);
    for batch in batches.in_order() {
        run::go_on()?;
        let tokens: Vec<&Tokens> = batch.members.iter().map(|&i| &pairs[i as usize]).collect();
        let chunk = chunk_of(chunk, longest, batch.longest);
        let (loss, n) = model.evaluate(be, &tokens, chunk, inference, |_, _, _, _| Ok(()))?;
        sum += loss;
        count += n;
    }
    Ok((sum / count.max(1) as f64, count))
}

/// Translations of sentences, in their order; those of about the same length are translated
/// together.
///
/// # Errors
/// [`Failure`]
pub fn translations<B: Backend>(
    be: &mut B,
    model: &Translator,
    vocabulary: &Vocabulary,
    sources: &[&[i32]],
    sizes: &Sizes,
    search: &Search,
) -> Result<Vec<String>, Failure> {
    let mut order: Vec<usize> = (0..sources.len()).collect();
    order.sort_by_key(|&i| sources[i].len());
    let mut out = vec![String::new(); sources.len()];
    for group in order.chunks(sizes.sentences) {
        run::go_on()?;
        let some: Vec<_> = group.iter().map(|&i| sources[i]).collect();
        for (&i, tokens) in group.iter().zip(model.translate(be, &some, sizes, search)?) {
            out[i] = vocabulary.decode(&tokens)?;
        }
    }
    Ok(out)
}

/// What a run left behind, ready to be laid out for translating.
struct Trained {
    config: TranslationConfig,
    vocabularies: Vocabularies,
    setup: Setup,
    search: Search,
    sizes: Sizes,
}

/// The most bytes of a line of `translate`: more than any sentence has.
const LONGEST_LINE: u64 = 1 << 20;

/// Sentences that are translated together, where memory is no question.
pub const TOGETHER: usize = 32;

impl Trained {
    fn read(args: &SearchArgs) -> Result<Self, Failure> {
        let config = TranslationConfig::read_dir(&args.weights)?;
        let vocabularies = Vocabularies::read(&args.weights, config.shared)?;
        if vocabularies.sizes() != config.vocab {
            let what = format!(
                "vocabularies of {:?} entries, which do not belong to the model of {:?}",
                vocabularies.sizes(),
                config.vocab
            );
            return Err(Failure::Run { path: args.weights.clone(), what });
        }
        let mode = Mode::Bdia {
            grid: Grid::new(config.bdia.frac_bits)?,
            gamma: Policy::fixed(Gamma::new(1, Sign::Plus)?),
            verify: false,
        };
        let threads = machine::threads(&args.machine);
        let setup = Setup {
            dims: config.dims(),
            mode,
            gradients: Gradients::None,
            blocks_per_step: 1,
            adapters: None,
            smoothing: 0.0,
            head_rows: machine::rows(args.machine.backend).head,
            threads,
            library: machine::library(&args.machine, threads),
        };
        let inference = match args.inference {
            cli::Inference::Float => Inference::STANDARD,
            cli::Inference::Quantized => Inference::Quantized(None),
        };
        let search = Search { beams: args.beams as usize, alpha: args.alpha, inference };
        let sizes = Sizes { sentences: TOGETHER, beams: search.beams, longest: config.positions };
        Ok(Self { config, vocabularies, setup, search, sizes })
    }

    /// Lays the model out for translating, and for losses of these batches: fewer sentences at a
    /// time where the budget, or what the machine has, is less.
    fn lay_out(
        &mut self,
        args: &SearchArgs,
        batches: Option<&Batches>,
    ) -> Result<(Translator, Layout), Failure> {
        let kind = args.machine.backend;
        let available = (kind != BackendKind::Cuda).then(machine::available_memory).flatten();
        let budget = args.machine.memory.or(available);
        loop {
            let shapes: Vec<_> =
                batches.iter().flat_map(|b| b.shapes(1, self.config.positions)).collect();
            let (setup, sizes) = (&self.setup, &self.sizes);
            let made = for_kind!(kind, B => Translator::layout::<B>(setup, &shapes, |m| {
                Ok(vec![m.decoding_layout::<B>(sizes)?])
            }))?;
            match budget {
                Some(budget) if made.1.total() as u64 > budget && self.sizes.sentences > 1 => {
                    self.sizes.sentences = self.sizes.sentences.div_ceil(2);
                }
                Some(budget) if made.1.total() as u64 > budget => {
                    let budget = usize::try_from(budget).unwrap_or(usize::MAX);
                    return Err(bdia_core::Error::Budget { budget, minimum: made.1.total() }.into());
                }
                _ => return Ok(made),
            }
        }
    }

    fn file(args: &SearchArgs) -> std::path::PathBuf {
        args.weights.join(if args.best { "best.safetensors" } else { weights::FILE })
    }
}

/// What a checkpoint notes of the data: a number that changes with the pairs and with the
/// vocabulary.
///
/// # Errors
/// What the vocabulary reports.
pub fn digest(data: &Dataset, vocabularies: &Vocabularies) -> Result<u64, Failure> {
    Ok(data.digest() ^ vocabularies.digest()?.rotate_left(1))
}

/// `eval`.
///
/// # Errors
/// [`Failure`]
pub fn eval(args: &EvalArgs) -> Result<(), Failure> {
    struct Eval<'a> {
        args: &'a EvalArgs,
        trained: Trained,
        model: Translator,
        encoded: Encoded,
        batches: Batches,
    }
    impl Work for Eval<'_> {
        fn on<B: Backend<Real = f32>>(mut self, be: &mut B, _: usize) -> Result<(), Failure> {
            let Trained { vocabularies, search, sizes, config, .. } = &self.trained;
            load_weights(&Trained::file(&self.args.search), be, &self.model)?;
            let at_once = (1, config.positions);
            let (loss, tokens) = loss(
                be,
                &mut self.model,
                &self.encoded.tokens,
                &self.batches,
                at_once,
                search.inference,
            )?;
            let sentences = self.encoded.sentences(usize::MAX);
            let sources: Vec<_> = sentences.iter().map(|s| s.tokens.as_slice()).collect();
            let found =
                translations(be, &self.model, vocabularies.target(), &sources, sizes, search)?;
            if let Some(path) = &self.args.output {
                write_bytes(path, (found.join("\n") + "\n").as_bytes())?;
            }
            let s = score(&sentences, &found);
            report::tell!(
                "loss {loss:.4} over {tokens} tokens; {} sentences: BLEU {:.2}, chrF {:.2}, \
                 exactly right {:.2} %",
                sentences.len(),
                s.bleu,
                s.chrf,
                100.0 * s.exact
            );
            if self.args.json {
                let json = serde_json::json!({
                    "loss": loss, "bleu": s.bleu, "chrf": s.chrf, "exact": s.exact,
                    "sentences": sentences.len(),
                    "too_long": self.encoded.too_long,
                });
                report::tell!("{json}");
            }
            Ok(())
        }
    }
    let mut trained = Trained::read(&args.search)?;
    let pairs = if args.data.is_empty() {
        let dir = &args.search.weights;
        let args = run::saved::<TrainArgs>(dir)?;
        let data = dataset(&args)?;
        let own = || {
            let data = digest(&data, &trained.vocabularies)?;
            trainer::digest(data, &args.method, args.weights.as_deref())
        };
        // What was learned from must not be what is asked for. The network of merged adapters may
        // be gone: then that is not known.
        if let Ok(Some((path, header, _))) = checkpoint::newest(dir)
            && own().is_ok_and(|own| header.data != own)
        {
            let what =
                "the pairs or the vocabulary have changed since; --data names pairs to evaluate";
            return Err(Failure::Run { path, what: what.into() });
        }
        data.held
    } else {
        read(&args.data, args.columns.as_ref())?
    };
    let encoded = Encoded::new(&pairs, &trained.vocabularies, trained.config.positions)?;
    if encoded.too_long > 0 {
        let longest = trained.config.positions;
        report::note!("{} pairs of more than {longest} tokens are left out", encoded.too_long);
    }
    if encoded.tokens.is_empty() {
        return Err(Failure::Other(format!(
            "{} pairs, and none that the model could translate",
            pairs.len()
        )));
    }
    let batches =
        Batches::new(&encoded.tokens, 1024.max(trained.config.positions), trained.config.positions);
    let (model, layout) = trained.lay_out(&args.search, Some(&batches))?;
    let machine = &args.search.machine;
    let threads = trained.setup.threads;
    machine::run(machine, threads, &layout, Eval { args, trained, model, encoded, batches })
}

/// The pairs that a run's flags name.
///
/// # Errors
/// [`Failure`], for files that cannot be used.
pub fn dataset(args: &TrainArgs) -> Result<Dataset, Failure> {
    let source = Source {
        files: &args.data,
        held_files: &args.held_out,
        columns: args.columns.as_ref(),
        pairs: args.pairs.map(|n| n as usize),
        held: args.held.map(|n| n as usize),
    };
    Ok(Dataset::open(&source)?)
}

/// `translate`: every line of standard input, to standard output. Lines that wait are translated
/// together. A line that cannot be translated is told, and its translation is an empty line, so
/// that those of the others stay in their places.
///
/// # Errors
/// [`Failure`], also where there were lines that could not be translated.
pub fn translate(args: &TranslateArgs) -> Result<(), Failure> {
    struct Lines<'a> {
        args: &'a TranslateArgs,
        trained: Trained,
        model: Translator,
        /// Lines that were read, and of those the ones that could not be translated.
        read: usize,
        bad: usize,
    }
    impl Work for Lines<'_> {
        fn on<B: Backend<Real = f32>>(mut self, be: &mut B, _: usize) -> Result<(), Failure> {
            load_weights(&Trained::file(&self.args.search), be, &self.model)?;
            let mut input = BufReader::new(std::io::stdin());
            loop {
                let mut lines = Vec::new();
                while lines.len() < self.trained.sizes.sentences
                    && let Some(tokens) = self.line(&mut input)?
                {
                    lines.push(tokens);
                    // Whoever has written a line may wait for its translation.
                    if input.buffer().is_empty() {
                        break;
                    }
                }
                if lines.is_empty() {
                    break;
                }
                let out = self.some(be, &lines)?;
                report::out(format_args!("{out}"));
                if report::lost().is_some() {
                    // Nobody reads on.
                    return Ok(());
                }
            }
            if self.bad > 0 {
                return Err(Failure::Other(format!(
                    "{} of {} lines could not be translated; an empty line stands for each",
                    self.bad, self.read
                )));
            }
            Ok(())
        }
    }
    impl Lines<'_> {
        /// The next line's tokens, none where it is empty or cannot be translated; nothing at the
        /// end.
        fn line(&mut self, input: &mut impl BufRead) -> Result<Option<Vec<i32>>, Failure> {
            let failed = |e| Failure::Other(format!("standard input: {e}"));
            let mut bytes = Vec::new();
            let mut some = input.by_ref().take(LONGEST_LINE + 1);
            if some.read_until(b'\n', &mut bytes).map_err(failed)? == 0 {
                return Ok(None);
            }
            self.read += 1;
            let tokens = if bytes.len() as u64 > LONGEST_LINE && !bytes.ends_with(b"\n") {
                input.skip_until(b'\n').map_err(failed)?;
                Err(format!("more than {LONGEST_LINE} bytes; split the sentence"))
            } else {
                self.tokens(bytes)
            };
            Ok(Some(tokens.unwrap_or_else(|what| {
                report::note!("standard input, line {}: {what}", self.read);
                self.bad += 1;
                Vec::new()
            })))
        }

        /// The tokens of a line, or why it cannot be translated.
        fn tokens(&self, line: Vec<u8>) -> Result<Vec<i32>, String> {
            let text = String::from_utf8(line)
                .map_err(|_| "not valid UTF-8; convert it, for example with iconv".to_string())?;
            let text = text.trim_start_matches('\u{feff}').trim();
            let tokens =
                self.trained.vocabularies.source.encode(text).map_err(|e| e.to_string())?;
            let longest = self.trained.sizes.longest;
            if tokens.len() >= longest {
                let found = tokens.len();
                return Err(format!(
                    "{found} tokens, expected less than {longest}; split the sentence"
                ));
            }
            Ok(tokens)
        }

        /// The translations of some lines; empty ones stay empty.
        fn some<B: Backend>(&self, be: &mut B, lines: &[Vec<i32>]) -> Result<String, Failure> {
            let Trained { vocabularies, sizes, search, .. } = &self.trained;
            let sources: Vec<_> =
                lines.iter().map(Vec::as_slice).filter(|l| !l.is_empty()).collect();
            let mut found =
                translations(be, &self.model, vocabularies.target(), &sources, sizes, search)?
                    .into_iter();
            let mut out = String::new();
            for line in lines {
                if !line.is_empty() {
                    out += &found.next().unwrap_or_default();
                }
                out.push('\n');
            }
            Ok(out)
        }
    }
    let mut trained = Trained::read(&args.search)?;
    let (model, layout) = trained.lay_out(&args.search, None)?;
    let threads = trained.setup.threads;
    machine::run(
        &args.search.machine,
        threads,
        &layout,
        Lines { args, trained, model, read: 0, bad: 0 },
    )
}
