//! `score`: what a model writes after the prompts of a file, and how near it comes to the
//! completions there.
//!
//! Prompts that are equal are one, with all of their completions as references, as in the E2E
//! challenge. Texts are compared in lower case, cut into words as `13a` does ([`scores::words`]).

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use bdia_core::backend::Backend;
use bdia_models::files::write_bytes;
use bdia_models::for_family;
use bdia_models::language::decode::{Decoder, Decoding, How, Sizes};
use bdia_models::language::model::LanguageModel;
use bdia_models::language::{Config, Family};
use bdia_models::search::Length;
use bdia_models::tokenizer::Tokenizer;
use bdia_train::Failure;
use bdia_train::machine::{self, Work};
use bdia_train::report;
use bdia_train::run;
use bdia_train::scores::{self, Corpus, Scores};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::cli::{DecodingArgs, PairArgs, ScoreArgs};
use crate::hub;
use crate::inference;
use crate::pairs::{self, Kind, Pair, PairsError, Reading};
use crate::train::end_tokens;

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Found {
    /// 0 to 100.
    pub bleu: f64,
    /// 0 or more.
    pub nist: f64,
    /// 0 to 1, exact and stem matches.
    pub meteor: f64,
    /// 0 to 1.
    pub rouge_l: f64,
    /// 0 to 10.
    pub cider: f64,
    /// Prompts.
    pub prompts: usize,
    /// Their references.
    pub references: usize,
}

/// Prompts that differ, in the order of the file, with their references.
fn grouped(pairs: &[Pair]) -> Vec<(&str, Vec<&str>)> {
    let (mut groups, mut places) = (Vec::<(&str, Vec<&str>)>::new(), HashMap::new());
    for pair in pairs {
        let place = *places.entry(pair.prompt.as_str()).or_insert_with(|| {
            groups.push((&pair.prompt, Vec::new()));
            groups.len() - 1
        });
        groups[place].1.push(&pair.completion);
    }
    groups
}

/// At most `most` of them, taken at equal distances.
fn some<T>(all: Vec<T>, most: Option<u64>) -> Vec<T> {
    let len = all.len();
    let n = most.map_or(len, |n| usize::try_from(n).unwrap_or(usize::MAX).min(len));
    let mut wanted =
        (0..n).map(|i| (i as u128 * len as u128 / n.max(1) as u128) as usize).peekable();
    all.into_iter()
        .enumerate()
        .filter(|(i, _)| wanted.next_if_eq(i).is_some())
        .map(|(_, x)| x)
        .collect()
}

/// Scores of texts against the references of their prompts.
fn compare(texts: &[String], groups: &[(&str, Vec<&str>)]) -> Found {
    let words = |text: &str| scores::words(&text.to_lowercase());
    let segments = texts
        .iter()
        .zip(groups)
        .map(|(text, (_, references))| (text.as_str(), references.iter().copied()));
    let Scores { bleu, nist, meteor, rouge_l, cider } = Corpus::new(segments, words).scores();
    let references = groups.iter().map(|(_, r)| r.len()).sum();
    Found { bleu, nist, meteor, rouge_l, cider, prompts: groups.len(), references }
}

/// Decodes, scores, and tells.
///
/// # Errors
/// [`Failure`]
pub fn score(args: &ScoreArgs) -> Result<(), Failure> {
    let Some(found) = measure(args)? else {
        return Err(Failure::Other(
            "stopped before all texts were written: nothing to score".into(),
        ));
    };
    let Found { bleu, nist, meteor, rouge_l, cider, prompts, references } = found;
    report::tell!(
        "BLEU {bleu:.2}, NIST {nist:.3}, METEOR (exact, stem) {meteor:.4}, ROUGE-L {rouge_l:.4}, \
         CIDEr {cider:.4}: {prompts} \
         prompts with {references} references of {}",
        args.data.display()
    );
    if args.json {
        report::tell!("{}", json!(found));
    }
    Ok(())
}

/// The texts of a model and their scores; `None` where Ctrl-C came first.
struct Scoring<'a, F: Family> {
    weights: &'a Path,
    adapter: Option<&'a Path>,
    model: LanguageModel<F>,
    decoder: Decoder<F>,
    tokenizer: &'a Tokenizer,
    prompts: &'a [Vec<i32>],
    decoding: Decoding,
    texts: &'a mut Option<Vec<String>>,
}

impl<F: Family> Work for Scoring<'_, F> {
    fn on<B: Backend<Real = f32>>(self, be: &mut B, _: usize) -> Result<(), Failure> {
        inference::load(self.weights, self.adapter, be, &self.model)?;
        let found = inference::decode(be, &self.decoder, self.prompts, &self.decoding)?;
        if run::interrupted() {
            return Ok(());
        }
        let text = |tokens: Vec<i32>| {
            let tokens: Vec<u32> = tokens.into_iter().map(|t| t as u32).collect();
            // One line each, whatever the model writes.
            self.tokenizer.decode(&tokens).split_whitespace().collect::<Vec<_>>().join(" ")
        };
        *self.texts = Some(found.into_iter().map(text).collect());
        Ok(())
    }
}

/// Decodes and scores; writes the texts where [`ScoreArgs::output`] says so. `None` where Ctrl-C
/// stopped it.
///
/// # Errors
/// [`Failure`]
pub fn measure(args: &ScoreArgs) -> Result<Option<Found>, Failure> {
    let opened = hub::open(&args.weights)?;
    let run = inference::run_data(&opened.path, args.adapter.as_deref())?;
    let tokenizer = args.text.of(inference::shown(&opened)?, run.special_tokens);
    let pairs = PairArgs { format: args.pairs.format.or(run.pairs.format), ..args.pairs.clone() };
    for_family!(opened.config, config => {
        measure_on(args, &pairs, &opened.path, &config, tokenizer)
    })
}

fn measure_on<C: Config>(
    args: &ScoreArgs,
    pairs: &PairArgs,
    path: &Path,
    config: &C,
    tokenizer: Tokenizer,
) -> Result<Option<Found>, Failure> {
    let reading = pairs.reading(args.task, tokenizer.chat().is_some());
    let Some(Reading { kind: Kind::Pairs(columns), format, .. }) = reading else {
        return Err(Failure::Other(
            "--task text and chat have no references; expected --task e2e or pairs".into(),
        ));
    };
    let pairs = pairs::read(&args.data, &columns)?;
    let groups = some(grouped(&pairs), args.decoding.prompts);
    let prompts = (groups.iter().enumerate())
        .map(|(i, (prompt, _))| {
            let tokens = pairs::prompt_tokens(&tokenizer, format, prompt).map_err(|error| {
                PairsError::Chat { path: args.data.clone(), example: i + 1, error }
            })?;
            Ok(tokens.into_iter().map(|t| t as i32).collect())
        })
        .collect::<Result<Vec<Vec<i32>>, PairsError>>()?;
    let positions = config.dims().positions();
    inference::tell_long(&prompts, positions);
    let DecodingArgs { beams, length_penalty, no_repeat_ngram, tokens, prompts_at_once, .. } =
        args.decoding;
    let decoding = Decoding {
        how: How::Search(Length::Power(length_penalty)),
        tokens: tokens as usize,
        ends: end_tokens(config, &tokenizer),
        no_repeat: no_repeat_ngram as usize,
        inference: inference::inference(args.inference, args.gamma.unwrap_or(0.0))?,
    };
    let sizes =
        Sizes::of(&prompts, prompts_at_once as usize, beams as usize, decoding.tokens, positions);
    let (model, decoder, layout) = inference::lay_out_decoder(config, &args.machine, sizes)?;
    let mut texts = None;
    let work = Scoring {
        weights: path,
        adapter: args.adapter.as_deref(),
        model,
        decoder,
        tokenizer: &tokenizer,
        prompts: &prompts,
        decoding,
        texts: &mut texts,
    };
    machine::run(&args.machine, machine::threads(&args.machine), &layout, work)?;
    let Some(texts) = texts else { return Ok(None) };
    if let Some(path) = &args.output {
        write_bytes(path, texts.iter().map(|t| format!("{t}\n")).collect::<String>().as_bytes())?;
    }
    Ok(Some(compare(&texts, &groups)))
}

/// The model and the adapter whose scores are wanted: a run's directory is one or the other.
pub fn of_run(dir: &Path, base: Option<&PathBuf>) -> (PathBuf, Option<PathBuf>) {
    match base {
        Some(base) if dir.join("adapter_config.json").exists() => (base.clone(), Some(dir.into())),
        _ => (dir.into(), None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(prompt: &str, completion: &str) -> Pair {
        Pair { prompt: prompt.into(), completion: completion.into() }
    }

    #[test]
    fn equal_prompts_are_one_with_all_references() {
        let pairs = [pair("a", "1"), pair("b", "2"), pair("a", "3"), pair("a", "1")];
        assert_eq!(grouped(&pairs), [("a", vec!["1", "3", "1"]), ("b", vec!["2"])]);
        assert_eq!(some((0..10).collect(), Some(4)), [0, 2, 5, 7]);
        assert_eq!(some((0..3).collect(), None), [0, 1, 2]);
        assert_eq!(some((0..3).collect(), Some(9)), [0, 1, 2]);
        assert_eq!(some((0..3).collect::<Vec<_>>(), Some(0)), [0; 0]);
    }

    #[test]
    fn case_and_punctuation_do_not_hide_a_match() {
        let pairs = [pair("a", "The inn is cheap."), pair("b", "Eat at Zizzi , by the river .")];
        let found = compare(
            &["the inn is cheap .".into(), "Eat at Zizzi, by the river.".into()],
            &grouped(&pairs),
        );
        assert!(
            (found.bleu - 100.0).abs() < 1e-9 && (found.rouge_l - 1.0).abs() < 1e-9,
            "{found:?}"
        );
        assert_eq!((found.prompts, found.references), (2, 2));
        let other = compare(&["no".into(), "nothing".into()], &grouped(&pairs));
        assert_eq!((other.bleu, other.rouge_l, other.cider), (0.0, 0.0, 0.0));
    }
}
