//! Translating: greedy and beam search, one token at a time, with a cache of keys and values.
//!
//! Memory and keys and values of cross-attention are computed once a sentence; a block keeps keys
//! and values of the tokens so far, so that a token costs the same wherever it is. The hypotheses
//! of a sentence are rows one after the other.

use bdia_core::Real;
use bdia_core::arena::{Category, Ints, Layout, Reals, product};
use bdia_core::backend::Backend;
use bdia_core::error::{Error, Result};
use bdia_core::layers::{Decoder as Blocks, EncoderOutput, LmHead, PreNorm, TokenEmbedding};
use bdia_core::stack::{Config as StackConfig, Context, Stack, Tail};

use super::model::{Shape, Translator};
use super::vocab::{BEGIN, END, PAD};
use crate::cache::{Cache, Next, part};
use crate::inference::Inference;
use crate::search::{self, Length, Stop};

/// How translations are searched.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Search {
    /// Hypotheses of a sentence; 1 takes the most probable token every time.
    pub beams: usize,
    /// Exponent `α` of the length: hypotheses are compared by `log p / ((5 + length) / 6)^α` (Wu et
    /// al., 2016, equation 14).
    pub alpha: f64,
    /// Arithmetic of the residual stream.
    pub inference: Inference,
}

/// Sizes of what is translated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Sentences.
    pub sentences: usize,
    /// Hypotheses of each.
    pub beams: usize,
    /// Most positions of a source, and of a translation.
    pub longest: usize,
}

/// The arenas behind the parameters, laid out for translating.
#[derive(Debug, Clone, Copy)]
struct Decoder {
    /// The encoder's, over whole sentences.
    stack: Stack,
    encoder: PreNorm,
    input: TokenEmbedding,
    output: EncoderOutput,
    /// The decoder's, over one token of every row.
    rows: Stack,
    blocks: Blocks,
    target: TokenEmbedding,
    head: LmHead,
    /// One length for each row.
    lens: Ints,
    /// `[blocks][sentences, S, 2 d]`.
    cross: Reals,
    cache: Cache,
}

impl Translator {
    /// The memory that translating takes.
    ///
    /// # Errors
    /// A typed error for sizes that do not fit together.
    pub fn decoding_layout<B: Backend>(&self, sizes: &Sizes) -> Result<Layout> {
        self.decoder::<B>(sizes, sizes.longest)?.1.checked()
    }

    fn decoder<B: Backend>(&self, sizes: &Sizes, source: usize) -> Result<(Decoder, Layout)> {
        let (s, d, mut layout) = (&self.setup, &self.setup.dims, self.base.clone());
        let l = &mut layout;
        let (n, target) = (sizes.sentences, sizes.longest);
        let rows = product("hypotheses", &[n, sizes.beams])?;
        let mut encoder = self.encoder.with_tokens(source).step_over(1)?;
        let mut blocks = self.decoder.with_tokens(1, source).step_over(1)?;
        let config = |id: u8, samples, tokens, needs, ends_scratch| {
            Ok::<_, Error>(StackConfig {
                id,
                batch: samples,
                per_sample: product("activations", &[tokens, d.width])?,
                blocks: d.layers[usize::from(id)],
                chunk: samples,
                tail: Tail::Head,
                needs,
                ends_scratch,
            })
        };
        // The only machine that can run on the grid and in float.
        let mode = s.mode.on_grid();
        let stack =
            Stack::layout(&config(0, n, source, encoder.needs::<B>(n, s.threads), 0)?, &mode, l)?;
        let one = Shape { samples: rows, source, target: 1, chunk: rows };
        let input = self.embedding(0, &Shape { samples: n, ..one }, l);
        let target_input = self.embedding(1, &one, l);
        let lens = l.ints(Category::Head, rows);
        let source_lens = l.ints(Category::Head, n);
        encoder.branches.0.key_lens = source_lens;
        blocks.branches.1.context_lens = source_lens;
        let mut needs = blocks.needs::<B>(rows, s.threads);
        // Attention over the cache, and of hypotheses over a source.
        let own = blocks.branches.0.cached_attention(target, lens);
        let cross = blocks.branches.1.attention(sizes.beams);
        needs.fixed = (needs.fixed)
            .max(B::attention_scratch(&own, rows, s.threads))
            .max(B::attention_scratch(&cross, n, s.threads));
        let at_head = LmHead::scratch(d.width, 1, rows);
        let rows_stack = Stack::layout(&config(1, rows, 1, needs, at_head)?, &mode, l)?;
        let logits = l.reals(Category::Head, product("logits", &[rows, d.vocab[1]])?);
        let cache = Cache::layout(d.layers[1], [rows, sizes.beams], target, d.width, l)?;
        let mut take = |what, sizes: &[usize]| {
            Ok::<_, Error>(l.reals(Category::Workspace, product(what, sizes)?))
        };
        let value = take("memory", &[n, source, d.width])?;
        let stats = take("statistics", &[n, source, 2])?;
        let decoder = Decoder {
            cross: take("keys and values", &[d.layers[1], n, source, 2, d.width])?,
            cache,
            head: LmHead { logits, ..self.head() },
            output: EncoderOutput { stats, ..self.output(Context { value, grad: Reals::EMPTY }) },
            stack,
            encoder,
            input,
            rows: rows_stack,
            blocks,
            target: target_input,
            lens,
        };
        // The logits on the host, and the scores of one row.
        l.outside(Category::Head, product("logits", &[rows, d.vocab[1], B::Real::BYTES])?);
        Ok((decoder, layout))
    }

    /// Translates sentences, at most `sizes.sentences` of them, none longer than `sizes.longest`
    /// with its end.
    ///
    /// # Errors
    /// [`Error::Shape`] for too many or too long ones; [`Error::Fault`] for values that are not
    /// finite.
    pub fn translate<B: Backend>(
        &self,
        be: &mut B,
        sources: &[&[i32]],
        sizes: &Sizes,
        search: &Search,
    ) -> Result<Vec<Vec<i32>>> {
        if sources.is_empty() {
            return Ok(Vec::new());
        }
        be.clear_fault()?;
        let longest = sources.iter().map(|s| s.len() + 1).max().unwrap_or(1);
        for (what, most, found) in [
            ("sentences", sizes.sentences, sources.len()),
            ("positions of a sentence", sizes.longest, longest),
        ] {
            if found > most {
                return Err(Error::Shape { what, expected: most, found });
            }
        }
        let sizes = Sizes { sentences: sources.len(), ..*sizes };
        let (mut decoder, _) = self.decoder::<B>(&sizes, longest)?;
        self.encode(be, &mut decoder, sources, longest, search.inference)?;

        let (beams, vocab) = (sizes.beams, self.setup.dims.vocab[1]);
        let rows = sources.len() * beams;
        let mut logits = vec![B::Real::of(0.0); rows * vocab];
        let mut searches: Vec<_> = (sources.iter())
            .map(|s| {
                let settings = search::Settings {
                    beams,
                    length: Length::Gnmt(search.alpha),
                    stop: Stop::Full,
                    // Much longer than its source is nothing but a loop.
                    tokens: sizes.longest.min(2 * s.len() + 16),
                    ends: vec![END],
                    no_repeat: 0,
                };
                search::Search::new(settings, &[])
            })
            .collect();
        let (mut tokens, mut order) = (vec![BEGIN; rows], vec![0; rows]);
        for position in 0..sizes.longest {
            if searches.iter().all(search::Search::finished) {
                break;
            }
            self.one_token(be, &decoder, &tokens, position, beams, search.inference)?;
            be.read_reals(decoder.head.logits, &mut logits)?;
            let places = order.chunks_mut(beams).zip(tokens.chunks_mut(beams));
            for (i, (search, (order, tokens))) in searches.iter_mut().zip(places).enumerate() {
                let logits = &logits[i * beams * vocab..(i + 1) * beams * vocab];
                search.advance(logits, &[PAD, BEGIN], order, tokens);
                decoder.cache.reorder(be, i * beams, order, 0..position + 1)?;
            }
        }
        if let Some(fault) = be.take_fault()? {
            return Err(fault.into());
        }
        Ok(searches.into_iter().map(search::Search::best).collect())
    }

    /// Memory, and the keys and values of cross-attention.
    fn encode<B: Backend>(
        &self,
        be: &mut B,
        d: &mut Decoder,
        sources: &[&[i32]],
        longest: usize,
        inference: Inference,
    ) -> Result<()> {
        let mut padded = Vec::with_capacity(sources.len() * longest);
        for (i, source) in sources.iter().enumerate() {
            padded.extend_from_slice(source);
            padded.push(END);
            padded.resize((i + 1) * longest, PAD);
        }
        be.write_ints(d.input.tokens, &padded)?;
        let lens: Vec<i32> = sources.iter().map(|s| s.len() as i32 + 1).collect();
        be.write_ints(d.encoder.branches.0.key_lens, &lens)?;
        let x = inference.run(be, &d.stack, &mut d.encoder, &mut d.input, sources.len())?;
        d.output.normalize(be, x, d.output.context.value, d.output.stats)?;
        for k in 0..self.setup.dims.layers[1] {
            let (memory, kv) =
                (d.output.context.value, part(d.cross, k, self.setup.dims.layers[1]));
            d.blocks.context_keys_values(be, k, memory, kv)?;
        }
        Ok(())
    }

    /// Logits of the token that follows `tokens`, which are at `position`.
    fn one_token<B: Backend>(
        &self,
        be: &mut B,
        d: &Decoder,
        tokens: &[i32],
        position: usize,
        beams: usize,
        inference: Inference,
    ) -> Result<()> {
        let (rows, width) = (tokens.len(), self.setup.dims.width);
        be.write_ints(d.target.tokens, tokens)?;
        be.write_ints(d.lens, &vec![position as i32 + 1; rows])?;
        // Every row is a sample of one token, at the same place.
        let mut wpe = d.target.wpe;
        wpe.value = wpe.value.sub(position * width, width);
        let mut input = TokenEmbedding { wpe, ..d.target };
        let mut blocks = Next {
            blocks: &d.blocks,
            cache: &d.cache,
            positions: &vec![position; rows],
            lens: d.lens,
            places: Ints::EMPTY,
            starts: Ints::EMPTY,
            context: Some((d.cross, beams)),
        };
        let x = inference.run(be, &d.rows, &mut blocks, &mut input, rows)?;
        d.head.logits(be, x, d.rows.scratch())?;
        Ok(())
    }
}
