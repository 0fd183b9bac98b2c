//! Text from a trained model: greedy, beam search and sampling, one token at a time, with a cache
//! of keys and values.
//!
//! A prompt takes `beams` rows of a batch. It goes through the model alone and as a whole, in the
//! shape that it has without a cache; its keys and values are kept in each of its rows. Then all
//! rows take one token at a time, at places of their own, since prompts have different lengths. A
//! prompt that is done makes room for the next one. Both passes are the stack's own inference, in
//! float or on the grid, around blocks that know the cache.
//!
//! A text that is longer than the model's context goes on as one without a cache: its last tokens
//! go through the model anew.

use core::ops::{ControlFlow, Range};

use bdia_core::Real;
use bdia_core::arena::{Category, Ints, Layout, Reals, product};
use bdia_core::backend::{Backend, Chunk, Columns};
use bdia_core::error::{Error, Result};
use bdia_core::layers::{LmHead, Parameter, Residual, TokenEmbedding};
use bdia_core::rng::{Draw, Stream};
use bdia_core::stack::{Blocks, Call, Config as StackConfig, Input, Needs, Stack, Tail};

use super::Family;
use super::model::{LanguageModel, Setup};
use crate::cache::{Cache, NO_TRAINING, Next};
use crate::inference::Inference;
use crate::sample::{SampleError, Sampler};
use crate::search::{self, Search, Stop, repeats};

/// Why there is no text.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Tokens outside the vocabulary, values that are not finite, more beams than there is room
    /// for, or a backend that refuses.
    #[error(transparent)]
    Core(#[from] Error),
    /// No token could be chosen.
    #[error(transparent)]
    Sample(#[from] SampleError),
}

/// Sizes of what is decoded together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Prompts.
    pub prompts: usize,
    /// Hypotheses of each.
    pub beams: usize,
    /// Most tokens that the model sees: of a prompt and what follows, or of its end.
    pub context: usize,
}

impl Sizes {
    /// The smallest that some prompts need: at most `together` of them at a time, `beams`
    /// hypotheses each, `tokens` more tokens, in a context of at most `context`.
    pub fn of(
        prompts: &[Vec<i32>],
        together: usize,
        beams: usize,
        tokens: usize,
        context: usize,
    ) -> Self {
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0).saturating_add(tokens);
        Self {
            prompts: together.clamp(1, prompts.len().max(1)),
            beams,
            context: longest.clamp(1, context.max(1)),
        }
    }

    const fn rows(&self) -> usize {
        self.prompts.saturating_mul(self.beams)
    }
}

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum How {
    /// Drawn; with one beam. The numbers follow from the seed, the index of the prompt and the
    /// place in the text.
    Sample(Sampler, u64),
    /// The most likely ones, with as many beams as [`Sizes`] says.
    Search(search::Length),
}

/// What is decoded from every prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoding {
    /// How tokens are chosen.
    pub how: How,
    /// Most tokens.
    pub tokens: usize,
    /// The tokens that end a text. They are not part of the result.
    pub ends: Vec<i32>,
    /// No `n` tokens occur twice in a row of this length, prompt included; 0 for no such rule.
    pub no_repeat: usize,
    /// The network.
    pub inference: Inference,
}

/// How far it is.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// Prompts that are finished.
    pub finished: usize,
    /// Tokens of all texts that have been taken.
    pub taken: usize,
    /// What follows the first of the prompts that are being decoded, so far.
    pub text: &'a [i32],
}

/// The arenas behind a model's parameters, laid out for decoding. What a training step keeps there
/// is overwritten.
#[derive(Debug, Clone)]
pub struct Decoder<F: Family> {
    setup: Setup<F>,
    sizes: Sizes,
    blocks: Residual<F::Branches>,
    input: TokenEmbedding,
    head: LmHead,
    /// All but the stacks, which take turns in what follows.
    base: Layout,
    /// One token of every row.
    rows: Stack,
    /// `[context]` or `[rows]`.
    tokens: Ints,
    /// One length for each row; its last place; the first one that a sliding window leaves.
    lens: Ints,
    last: Ints,
    starts: Ints,
    /// `[rows, d]`: the rows' position embeddings.
    places: Reals,
    cache: Cache,
}

/// A prompt that is being decoded.
struct Text<'a> {
    /// Its index.
    index: usize,
    prompt: &'a [i32],
    state: State,
}

enum State {
    Search(Search),
    Sample { tokens: Vec<i32>, finished: bool },
}

impl Text<'_> {
    fn finished(&self) -> bool {
        match &self.state {
            State::Search(search) => search.finished(),
            State::Sample { finished, .. } => *finished,
        }
    }

    /// Tokens of the prompt and of what follows.
    fn length(&self) -> usize {
        let own = match &self.state {
            State::Search(search) => search.length(),
            State::Sample { tokens, .. } => tokens.len(),
        };
        self.prompt.len() + own
    }

    /// Prompt and what follows, in each row in use.
    fn rows(&self) -> Vec<Vec<i32>> {
        match &self.state {
            State::Search(search) => {
                search.rows().map(|tokens| [self.prompt, tokens].concat()).collect()
            }
            State::Sample { tokens, .. } => vec![[self.prompt, tokens].concat()],
        }
    }

    /// What follows the prompt so far, in the first row.
    fn so_far(&self) -> &[i32] {
        match &self.state {
            State::Search(search) => search.rows().next().unwrap_or(&[]),
            State::Sample { tokens, .. } => tokens,
        }
    }

    fn result(self) -> Vec<i32> {
        match self.state {
            State::Search(search) => search.best(),
            State::Sample { tokens, .. } => tokens,
        }
    }

    /// Takes one more token in every row, from `[beams, vocab]` logits.
    fn advance<R: Real>(
        &mut self,
        d: &Decoding,
        logits: &[R],
        order: &mut [usize],
        next: &mut [i32],
    ) -> core::result::Result<(), SampleError> {
        let vocab = logits.len() / next.len().max(1);
        match &mut self.state {
            State::Search(search) => {
                // Where the search begins only the first row has logits.
                let rows = search.rows().count();
                if let Some(at) = logits[..rows * vocab].iter().position(|x| !x.wide().is_finite())
                {
                    return Err(SampleError::NotFinite {
                        token: at % vocab,
                        value: logits[at].wide() as f32,
                    });
                }
                search.advance(logits, &[], order, next);
            }
            State::Sample { tokens, finished } => {
                let How::Sample(sampler, seed) = d.how else { return Ok(()) };
                let mut own: Vec<f32> = logits.iter().map(|x| x.wide() as f32).collect();
                if let Some(token) = own.iter().position(|x| !x.is_finite()) {
                    return Err(SampleError::NotFinite { token, value: own[token] });
                }
                for token in repeats(d.no_repeat, self.prompt, tokens) {
                    // As unlikely as can be, and still a number.
                    if let Some(logit) = usize::try_from(token).ok().and_then(|t| own.get_mut(t)) {
                        *logit = f32::MIN;
                    }
                }
                let stream = Stream::new(seed, 0, self.index as u32, 0, 0, Draw::Sample);
                let place = (self.prompt.len() + tokens.len()) as u32;
                let token = sampler.choose(&own, &stream, place, &mut Vec::new())? as i32;
                *finished = d.ends.contains(&token);
                if !*finished {
                    tokens.push(token);
                    *finished = tokens.len() == d.tokens;
                }
                (order[0], next[0]) = (0, token);
            }
        }
        Ok(())
    }
}

impl<F: Family> Decoder<F> {
    /// Lays the arenas of a model out for decoding, behind its parameters and what its optimizer
    /// has. The layout is the whole plan of a program that only decodes; one that trains covers it
    /// ([`Layout::cover`]).
    ///
    /// # Errors
    /// A typed error for sizes that do not fit together.
    pub fn layout<B: Backend>(model: &LanguageModel<F>, sizes: &Sizes) -> Result<(Self, Layout)> {
        let (s, d, mut base) = (*model.setup(), model.setup().dims, model.base.clone());
        let l = &mut base;
        for (what, n) in
            [("prompts", sizes.prompts), ("beams", sizes.beams), ("context", sizes.context)]
        {
            if n == 0 {
                return Err(Error::setting(what, 0.0, "1 or more"));
            }
        }
        // Tables of angles end where the model's samples do.
        let turns = d.angles().iter().any(Option::is_some);
        let expected = if turns { s.context } else { d.positions() };
        if sizes.context > expected {
            let (what, found) = ("context (longest)", sizes.context);
            return Err(Error::Shape { what, expected, found });
        }
        let (width, layers) = (d.width(), d.layers());
        let rows = product("hypotheses", &[sizes.prompts, sizes.beams])?;
        let logits = product("logits", &[rows, d.vocab()])?;
        let tile = LmHead::tile(d.vocab(), width, rows);
        let input = TokenEmbedding { dropout: 0.0, ..model.input };
        let mut decoder = Self {
            setup: s,
            sizes: *sizes,
            blocks: model.blocks.step_over(1)?,
            input,
            tokens: l.ints(Category::Head, rows.max(sizes.context)),
            lens: l.ints(Category::Head, rows),
            last: l.ints(Category::Head, if turns { rows } else { 0 }),
            starts: l.ints(Category::Head, if d.window().is_some() { rows } else { 0 }),
            head: LmHead {
                logits: l.reals(Category::Head, logits),
                packed: (model.head.packed)
                    .map(|(packed, _)| (packed, l.reals(Category::Workspace, tile))),
                ..model.head
            },
            places: l.reals(Category::Workspace, product("activations", &[rows, width])?),
            cache: Cache::layout(layers, [rows, sizes.beams], sizes.context, d.kv_width(), l)?,
            rows: model.stack,
            base: Layout::new(B::Real::BYTES),
        };
        // The logits on the host.
        l.outside(Category::Head, product("logits", &[logits, B::Real::BYTES])?);
        decoder.base = base;
        F::set_places(&mut decoder.blocks, [Ints::EMPTY; 2]);
        let one = F::with_tokens(&decoder.blocks, 1);
        let attention = F::cached_attention(&one, sizes.context, decoder.lens);
        let mut needs = one.needs::<B>(rows, s.threads);
        needs.fixed = needs.fixed.max(B::attention_scratch(&attention, rows, s.threads));
        let mut plan = decoder.base.clone();
        decoder.rows = decoder.stack(rows, 1, needs, LmHead::scratch(width, 1, rows), &mut plan)?;
        plan.cover(&decoder.alone::<B>(sizes.context)?.1);
        Ok((decoder, plan.checked()?))
    }

    /// What it was laid out for.
    pub const fn sizes(&self) -> &Sizes {
        &self.sizes
    }

    fn stack(
        &self,
        samples: usize,
        tokens: usize,
        needs: Needs,
        ends: usize,
        layout: &mut Layout,
    ) -> Result<Stack> {
        let config = StackConfig {
            id: 0,
            batch: samples,
            per_sample: product("activations", &[tokens, self.setup.dims.width()])?,
            blocks: self.setup.dims.layers(),
            chunk: samples,
            tail: Tail::Head,
            needs,
            ends_scratch: ends,
        };
        // The only machine that can run on the grid and in float.
        Stack::layout(&config, &self.setup.mode.on_grid(), layout)
    }

    /// The stack of one sample of some tokens.
    fn alone<B: Backend>(&self, tokens: usize) -> Result<(Stack, Layout)> {
        let mut layout = self.base.clone();
        let needs = F::with_tokens(&self.blocks, tokens).needs::<B>(1, self.setup.threads);
        let width = self.setup.dims.width();
        // The embedding is scaled there.
        let ends = LmHead::scratch(width, 1, 1).max(tokens.saturating_mul(width));
        let stack = self.stack(1, tokens, needs, ends, &mut layout)?;
        Ok((stack, layout))
    }

    /// What follows each prompt. Prompts are not empty; one that is longer than the context is seen
    /// from its end. Where `progress` breaks, texts end where they are.
    ///
    /// # Errors
    /// [`DecodeError`]
    pub fn decode<B: Backend>(
        &self,
        be: &mut B,
        prompts: &[Vec<i32>],
        d: &Decoding,
        mut progress: impl FnMut(Progress<'_>) -> ControlFlow<()>,
    ) -> core::result::Result<Vec<Vec<i32>>, DecodeError> {
        let (beams, vocab) = (self.sizes.beams, self.setup.dims.vocab());
        if prompts.iter().any(Vec::is_empty) {
            return Err(Error::Shape { what: "tokens of a prompt", expected: 1, found: 0 }.into());
        }
        if matches!(d.how, How::Sample(..)) && beams != 1 {
            return Err(
                Error::Shape { what: "beams of a sample", expected: 1, found: beams }.into()
            );
        }
        be.take_fault()?;
        let mut results = vec![Vec::new(); prompts.len()];
        if d.tokens == 0 {
            return Ok(results);
        }
        let per = beams * vocab;
        let mut waiting = (prompts.iter().enumerate()).map(|(index, prompt)| Text {
            index,
            prompt,
            state: d.begin(beams, prompt),
        });
        let mut texts: Vec<Option<Text<'_>>> = (0..self.sizes.prompts).map(|_| None).collect();
        let mut logits = vec![B::Real::of(0.0); self.sizes.prompts * per];
        let (mut order, mut next) = (vec![0; self.sizes.rows()], vec![0; self.sizes.rows()]);
        let (mut finished, mut taken) = (0, 0);
        loop {
            for (slot, place) in texts.iter_mut().enumerate().filter(|(_, place)| place.is_none()) {
                let Some(text) = waiting.next() else { break };
                let first = &mut logits[slot * per..][..vocab];
                self.prompt(be, text.prompt, slot * beams..(slot + 1) * beams, d.inference, first)?;
                *place = Some(text);
            }
            if texts.iter().all(Option::is_none) {
                break;
            }
            if let Err(error) = self.advance(&mut texts, d, &logits, &mut order, &mut next) {
                // What went wrong before the logits says more.
                return Err(be
                    .take_fault()?
                    .map_or_else(|| error.into(), |fault| Error::from(fault).into()));
            }
            taken += texts.iter().flatten().count();
            finished += texts.iter().flatten().filter(|text| text.finished()).count();
            let text = texts.iter().flatten().next().map_or(&[][..], Text::so_far);
            let stop = progress(Progress { finished, taken, text }).is_break();
            for place in &mut texts {
                if let Some(text) = place.take_if(|text| stop || text.finished()) {
                    let index = text.index;
                    results[index] = text.result();
                }
            }
            if stop {
                break;
            }
            if texts.iter().any(Option::is_some) {
                self.reorder(be, &texts, &order)?;
                self.one_token(be, &texts, &next, d.inference)?;
                be.read_reals(self.head.logits, &mut logits)?;
            }
            for (slot, text) in
                texts.iter().enumerate().filter_map(|(slot, text)| Some((slot, text.as_ref()?)))
            {
                if text.length() > self.sizes.context {
                    for (row, all) in (slot * beams..).zip(text.rows()) {
                        let logits = &mut logits[row * vocab..(row + 1) * vocab];
                        self.prompt(be, &all, row..row + 1, d.inference, logits)?;
                    }
                }
            }
        }
        if let Some(fault) = be.take_fault()? {
            return Err(Error::from(fault).into());
        }
        Ok(results)
    }

    /// A text as a whole: keys and values go to the cache of some rows, the logits of what follows
    /// to `logits`. Of a text that is longer than the context it is the end.
    fn prompt<B: Backend>(
        &self,
        be: &mut B,
        text: &[i32],
        rows: Range<usize>,
        inference: Inference,
        logits: &mut [B::Real],
    ) -> Result<()> {
        let text = &text[text.len().saturating_sub(self.sizes.context)..];
        let (stack, _) = self.alone::<B>(text.len())?;
        let tokens = self.tokens.sub(0, text.len());
        be.write_ints(tokens, text)?;
        let mut input = TokenEmbedding { tokens, per_sample: text.len(), ..self.input };
        let mut blocks = Whole {
            decoder: self,
            blocks: F::with_tokens(&self.blocks, text.len()),
            tokens: text.len(),
            rows,
        };
        let x = inference.run(be, &stack, &mut blocks, &mut input, 1)?;
        let d = self.setup.dims.width();
        let found = self.head.logits(be, x.sub((text.len() - 1) * d, d), stack.scratch())?;
        be.read_reals(found, logits)
    }

    /// One more token in every row, after those that are in the cache; the logits are on the
    /// backend.
    fn one_token<B: Backend>(
        &self,
        be: &mut B,
        texts: &[Option<Text<'_>>],
        next: &[i32],
        inference: Inference,
    ) -> Result<()> {
        // Rows without a text, and those of texts that have outgrown the context, compute something
        // that nobody reads.
        let place = |text: &Option<Text<'_>>| {
            text.as_ref().map_or(1, Text::length).min(self.sizes.context) - 1
        };
        let positions: Vec<_> = texts
            .iter()
            .flat_map(|text| core::iter::repeat_n(place(text), self.sizes.beams))
            .collect();
        let lens: Vec<_> = positions.iter().map(|&p| p as i32 + 1).collect();
        be.write_ints(self.tokens.sub(0, next.len()), next)?;
        be.write_ints(self.lens, &lens)?;
        if !self.last.is_empty() {
            let last: Vec<_> = positions.iter().map(|&p| p as i32).collect();
            be.write_ints(self.last, &last)?;
        }
        if let Some(n) = self.setup.dims.window() {
            let starts: Vec<_> =
                positions.iter().map(|&p| (p + 1).saturating_sub(n) as i32).collect();
            be.write_ints(self.starts, &starts)?;
        }
        let mut input = Places { decoder: self, positions: &positions };
        let mut blocks = Next {
            blocks: &F::with_tokens(&self.blocks, 1),
            cache: &self.cache,
            positions: &positions,
            lens: self.lens,
            places: self.last,
            starts: self.starts,
            context: None,
        };
        let x = inference.run(be, &self.rows, &mut blocks, &mut input, next.len())?;
        self.head.logits(be, x, self.rows.scratch())?;
        Ok(())
    }

    /// Chooses the next tokens of all texts; a text is one thread's.
    fn advance<R: Real>(
        &self,
        texts: &mut [Option<Text<'_>>],
        d: &Decoding,
        logits: &[R],
        order: &mut [usize],
        next: &mut [i32],
    ) -> core::result::Result<(), SampleError> {
        /// A text and its rows.
        struct Share<'s, 't, R> {
            text: &'s mut Text<'t>,
            logits: &'s [R],
            order: &'s mut [usize],
            next: &'s mut [i32],
        }
        let (beams, per) = (self.sizes.beams, self.sizes.beams * self.setup.dims.vocab());
        let places = logits.chunks(per).zip(order.chunks_mut(beams)).zip(next.chunks_mut(beams));
        let mut work: Vec<_> = (texts.iter_mut().zip(places))
            .filter_map(|(text, ((logits, order), next))| {
                Some(Share { text: text.as_mut()?, logits, order, next })
            })
            .collect();
        let some = |work: &mut [Share<'_, '_, R>]| {
            work.iter_mut().try_for_each(|s| s.text.advance(d, s.logits, s.order, s.next))
        };
        let share = work.len().div_ceil(self.setup.threads.max(1));
        if share == work.len() {
            return some(&mut work);
        }
        std::thread::scope(|scope| {
            let threads: Vec<_> =
                work.chunks_mut(share).map(|work| scope.spawn(move || some(work))).collect();
            threads
                .into_iter()
                .try_for_each(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })
    }

    /// Row `r` of every cache becomes what row `order[r]` of its text was. The prompt is the same
    /// in all.
    fn reorder<B: Backend>(
        &self,
        be: &mut B,
        texts: &[Option<Text<'_>>],
        order: &[usize],
    ) -> Result<()> {
        let beams = self.sizes.beams;
        for (slot, text) in
            texts.iter().enumerate().filter_map(|(slot, text)| Some((slot, text.as_ref()?)))
        {
            // The newest token has no keys yet. A text that has outgrown the context goes through
            // the model anew.
            let tokens = text.prompt.len()..text.length() - 1;
            if tokens.end < self.sizes.context {
                let order = &order[slot * beams..(slot + 1) * beams];
                self.cache.reorder(be, slot * beams, order, tokens)?;
            }
        }
        Ok(())
    }
}

impl Decoding {
    fn begin(&self, beams: usize, prompt: &[i32]) -> State {
        match self.how {
            How::Sample(..) => State::Sample { tokens: Vec::new(), finished: false },
            How::Search(length) => {
                let settings = search::Settings {
                    beams,
                    length,
                    stop: Stop::NoBetter,
                    tokens: self.tokens,
                    ends: self.ends.clone(),
                    no_repeat: self.no_repeat,
                };
                State::Search(Search::new(settings, prompt))
            }
        }
    }
}

/// The blocks for a whole text, which leave its keys and values in the cache of some rows.
struct Whole<'a, F: Family> {
    decoder: &'a Decoder<F>,
    blocks: Residual<F::Branches>,
    tokens: usize,
    rows: Range<usize>,
}

impl<B: Backend, F: Family> Blocks<B> for Whole<'_, F> {
    fn residual(&mut self, be: &mut B, call: &Call, h: Reals) -> Result<()> {
        self.blocks.residual(be, call, h)?;
        let found = F::keys_values::<B>(&self.blocks, call);
        let (cache, width) = (&self.decoder.cache, self.decoder.setup.dims.kv_width());
        let row = |row| cache.tokens(call.block, row, 0..self.tokens);
        let first = row(self.rows.start);
        be.fill_reals(first, B::Real::of(0.0))?;
        for (i, from) in found.into_iter().enumerate() {
            let to = Columns { of: first, stride: 2 * width, at: i * width };
            be.add_columns(width, 1.0, from, to)?;
        }
        for other in self.rows.clone().skip(1) {
            be.copy_reals(first, row(other))?;
        }
        Ok(())
    }

    fn vjp(&mut self, _: &mut B, _: &Call, _: Reals, _: Reals) -> Result<()> {
        Err(NO_TRAINING)
    }

    fn done(&mut self, _: &mut B, _: usize) -> Result<()> {
        Err(NO_TRAINING)
    }
}

/// The embedding of one token of every row, at places of their own.
struct Places<'a, F: Family> {
    decoder: &'a Decoder<F>,
    positions: &'a [usize],
}

impl<B: Backend, F: Family> Input<B> for Places<'_, F> {
    fn forward(&mut self, be: &mut B, chunk: &Chunk, _: bool, x: Reals, s: Reals) -> Result<()> {
        let Decoder { input, places, tokens, .. } = self.decoder;
        let d = input.width;
        if input.wpe.value.is_empty() {
            let mut input = TokenEmbedding { tokens: *tokens, per_sample: 1, ..*input };
            return input.forward(be, chunk, false, x, s);
        }
        for (row, &position) in self.positions.iter().enumerate() {
            be.copy_reals(input.wpe.value.sub(position * d, d), places.sub(row * d, d))?;
        }
        // As the tokens of one sample, each of which has its place.
        let (one, n) = (Chunk { samples: 1, first: 0, ..*chunk }, self.positions.len());
        let wpe = Parameter { value: places.sub(0, n * d), grad: Reals::EMPTY };
        let tokens = tokens.sub(0, n);
        TokenEmbedding { tokens, per_sample: n, wpe, ..*input }.forward(be, &one, false, x, s)
    }

    fn vjp(&mut self, _: &mut B, _: &Chunk, _: Reals, _: Reals) -> Result<()> {
        Err(NO_TRAINING)
    }
}
