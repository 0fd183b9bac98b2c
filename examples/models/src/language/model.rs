//! A language model as a network: where every buffer is, and what one pass does.

use bdia_core::Real;
use bdia_core::arena::{Category, Ints, Layout, Reals, product};
use bdia_core::backend::Backend;
use bdia_core::error::{Error, Result, Site};
use bdia_core::layers::{
    Freeze, Gradients, LmHead, Parameter, Params, Residual, Room, RotaryAngles, Tensor, Tensors,
    TokenEmbedding,
};
use bdia_core::network::{
    self, Group, Loaded, Loss, Micro, Network, Outcome, Owner, Rebuilt, Step, exchanged, sum,
};
use bdia_core::plan::Choice;
use bdia_core::stack::{Config as StackConfig, Mode, Pass, Stack, Tail};
use bdia_core::update::FloatGamma;

use super::Family;
use crate::inference::{Inference, Probe, at_head};
use crate::named::{self, Adapters, Named, Saved};
use crate::plan::Plan;

/// How it is trained.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Setup<F> {
    /// The architecture.
    pub dims: F,
    /// Samples of a micro-batch.
    pub batch: usize,
    /// Micro-batches of a step.
    pub accumulate: usize,
    /// Tokens of a sample.
    pub context: usize,
    /// How activations are kept.
    pub mode: Mode,
    /// How gradients are kept, and the optimizer.
    pub gradients: Gradients,
    /// Blocks that the stack steps over at once ([`Residual::step_over`]).
    pub blocks_per_step: usize,
    /// Adapters, where those are trained.
    pub adapters: Option<Adapters>,
    /// Whether samples may have several texts ([`LanguageModel::train_packed`]).
    pub packed: bool,
    /// Label smoothing.
    pub smoothing: f64,
    /// Threads of the backend.
    pub threads: usize,
    /// Bytes that the libraries below the backend allocate for themselves, at most.
    pub library: usize,
}

impl<F: Family> Setup<F> {
    /// One that is not trained: of one sample of `context` tokens, without dropout.
    pub fn inference(dims: F, context: usize, threads: usize) -> Self {
        Self {
            dims: dims.undropped(),
            batch: 1,
            accumulate: 1,
            context,
            mode: Mode::Standard { grid: None },
            gradients: Gradients::None,
            blocks_per_step: 1,
            adapters: None,
            packed: false,
            smoothing: 0.0,
            threads,
            library: 0,
        }
    }
}

/// A language model laid out in the arenas of a backend.
#[derive(Debug, Clone)]
pub struct LanguageModel<F: Family> {
    setup: Setup<F>,
    /// The layout of what stays: parameters, gradients, optimizer state. Decoding has a layout of
    /// its own behind it.
    pub(crate) base: Layout,
    /// The stack.
    pub stack: Stack,
    /// The blocks.
    pub blocks: Residual<F::Branches>,
    /// Embedding.
    pub input: TokenEmbedding,
    /// Final norm, logits and loss.
    pub head: LmHead,
    ends: Params,
    /// The tensors that are there.
    outside: Vec<Tensor>,
    /// Tables of the angles of positions.
    tables: [(Option<RotaryAngles>, Reals); 2],
    /// `[B, T]`, where texts are packed: the position of every token, and where its text begins.
    places: [Ints; 2],
    /// Tokens, targets, places of a batch on the host.
    staging: [Vec<i32>; 4],
}

impl<F: Family> Plan for LanguageModel<F> {
    type Setup = Setup<F>;

    fn lay_out<B: Backend>(setup: &Setup<F>, choice: Choice) -> Result<(Self, Layout)> {
        Self::layout::<B>(setup, choice)
    }

    fn sizes(setup: &Setup<F>) -> [usize; 2] {
        [setup.batch, setup.context]
    }

    fn exchanged(&self) -> usize {
        exchanged(|each| self.groups(each))
    }
}

impl<F: Family> LanguageModel<F> {
    /// Lays a model out.
    ///
    /// # Errors
    /// A typed error for dimensions or settings that do not fit together.
    pub fn layout<B: Backend>(setup: &Setup<F>, choice: Choice) -> Result<(Self, Layout)> {
        let (d, mut layout) = (&setup.dims, Layout::new(B::Real::BYTES));
        let l = &mut layout;
        let (vocab, width) = (d.vocab(), d.width());
        for (what, n) in [("vocabulary", vocab), ("context", setup.context)] {
            if n == 0 {
                return Err(Error::setting(what, 0.0, "1 or more"));
            }
        }
        if setup.context > d.positions() {
            let (what, expected) = ("context (longest)", d.positions());
            return Err(Error::Shape { what, expected, found: setup.context });
        }
        let dropout = d.embedding_dropout();
        if !(0.0..1.0).contains(&dropout) {
            let possible = "0 up to, not including, 1";
            return Err(Error::setting("embedding dropout", dropout, possible));
        }
        d.check()?;
        product("parameters", &[vocab.max(d.positions()), width])?;

        let gradients = setup.gradients.of_steps(setup.blocks_per_step);
        let blocks = d.blocks(setup.context, setup.adapters, gradients, l)?;
        let blocks = blocks.step_over(setup.blocks_per_step)?;
        let mut blocks = blocks.in_token_chunks(choice.token_chunk);
        let freeze = Adapters::of_ends(setup.adapters);
        let (mut tensors, mut room) = (d.ends(), Room::NONE);
        for (i, t) in tensors.iter_mut().enumerate().filter(|(_, t)| !t.is_empty()) {
            // Learned positions are added, not looked up.
            let plain = if setup.adapters.is_some() { Freeze::All(None) } else { freeze };
            room = room.place(core::slice::from_mut(t), if i == 1 { plain } else { freeze });
        }
        let ends = Params::layout(1, room.in_pieces(), freeze, setup.gradients.full(), l)?;
        let embedding = ends.packed(0, &tensors[0]);
        let head = if d.tied() { embedding } else { ends.packed(0, &tensors[4]) };
        let tile = LmHead::tile(vocab, width, choice.head_rows);
        let head = head.map(|packed| (packed, l.reals(Category::Workspace, tile)));
        let mut tables = [(None, Reals::EMPTY); 2];
        for (table, angles) in tables.iter_mut().zip(d.angles()) {
            if let Some(angles) = angles {
                let size = product("rotary positions", &[setup.context, angles.head_dim])?;
                *table = (Some(angles), l.reals(Category::Workspace, size));
            }
        }
        F::set_tables(&mut blocks, tables.map(|(_, table)| table));
        l.outside(Category::Library, setup.library);
        let base = l.clone();

        let rows = product("tokens of a batch", &[setup.batch, setup.context])?;
        let (tokens, targets) = (l.ints(Category::Head, rows), l.ints(Category::Head, rows));
        let mut places = [Ints::EMPTY; 2];
        if setup.packed {
            if !F::PACKS {
                let possible = "samples of one text: this family does not pack several";
                return Err(Error::setting("packing", 1.0, possible));
            }
            places = [rows, rows].map(|n| l.ints(Category::Workspace, n));
            F::set_places(&mut blocks, places);
        }
        // The staging buffers on the host.
        let buffers = if setup.packed { 4 } else { 2 };
        l.outside(
            Category::Head,
            product("tokens of a batch", &[rows, buffers, size_of::<i32>()])?,
        );
        let losses = l.reals(Category::Head, product("losses", &[rows, setup.accumulate])?);
        let logits = l.reals(Category::Head, product("logits", &[choice.head_rows, vocab])?);

        let chunk = choice.chunk.min(setup.batch);
        let config = StackConfig {
            id: 0,
            batch: setup.batch,
            per_sample: product("activations", &[setup.context, width])?,
            blocks: blocks.steps(),
            chunk,
            tail: Tail::Head,
            needs: blocks.needs::<B>(chunk, setup.threads),
            ends_scratch: LmHead::scratch(width, setup.context, chunk),
        };
        let stack = Stack::layout(&config, &setup.mode, l)?;

        let empty = Parameter { value: Reals::EMPTY, grad: Reals::EMPTY };
        let [wte, wpe, norm, norm_bias, lm_head] =
            tensors.map(|t| if t.is_empty() { empty } else { ends.parameter(0, &t) });
        let input = TokenEmbedding {
            width,
            per_sample: setup.context,
            tokens,
            wte,
            packed: embedding,
            wpe,
            scale: d.embedding_scale(),
            dropout,
        };
        let head = LmHead {
            width,
            per_sample: setup.context,
            vocab,
            norm: d.norm([norm, norm_bias]),
            weight: if d.tied() { wte } else { lm_head },
            packed: head,
            targets,
            losses,
            micro_batch: 0,
            logits,
            scale: 1.0,
            smoothing: setup.smoothing,
        };
        let model = Self {
            setup: *setup,
            base,
            stack,
            blocks,
            input,
            head,
            ends,
            outside: tensors.into_iter().filter(|t| !t.is_empty()).collect(),
            tables,
            places,
            staging: [const { Vec::new() }; 4],
        };
        Ok((model, layout))
    }

    fn groups(&self, each: &mut dyn FnMut(&Group<'_>) -> Result<()>) -> Result<()> {
        let (params, tensors) = (&self.blocks.params, &self.blocks);
        each(&Group { params, tensors, of: Owner::Blocks })?;
        let of = Owner::Ends(Site::Embedding);
        each(&Group { params: &self.ends, tensors: &self.outside.as_slice(), of })
    }

    /// The setup.
    pub const fn setup(&self) -> &Setup<F> {
        &self.setup
    }

    /// Writes the tables that the blocks read beside their parameters, as
    /// [`initialize`](Self::initialize) and reading weights do. Once is enough: nothing overwrites
    /// them.
    ///
    /// # Errors
    /// Constants that are out of range; those of writing.
    pub fn fill_tables<B: Backend>(&self, be: &mut B) -> Result<()> {
        self.tables.iter().try_for_each(|(angles, table)| match angles {
            Some(angles) => angles.fill(be, *table),
            None => Ok(()),
        })
    }

    /// All tensors, in the order of the file: embedding, blocks, norm, logits.
    fn all(&self) -> Vec<Named> {
        let d = &self.setup.dims;
        // What is before the blocks is not a norm.
        let [_, _, norm, ..] = d.ends();
        let before = self.outside.iter().take_while(|t| t.name != norm.name).count();
        let (first, last) = self.outside.split_at(before);
        let named = |params, k, block, t: &Tensor, tensors: &dyn Tensors| {
            let named = Named::new(d.name(block, t), params, k, t, tensors);
            let file_has_ours = !F::TRANSPOSED || block.is_none() || named.is_adapter_input();
            if file_has_ours { named } else { named.transposed() }
        };
        let end = |t: &Tensor| named(&self.ends, 0, None, t, &self.outside.as_slice());
        let blocks = (0..d.layers()).flat_map(|k| {
            named::of_block(&self.blocks, k)
                .into_iter()
                .map(move |(params, k, t)| named(params, k, Some(k), &t, &self.blocks))
        });
        first.iter().map(end).chain(blocks).chain(last.iter().map(end)).collect()
    }

    /// All tensors of the model, in the order of the file; adapters are not among them.
    pub fn tensors(&self) -> Vec<Named> {
        self.all().into_iter().filter(|t| !t.is_adapter()).collect()
    }

    /// The tensors that are trained: all, or the adapters.
    pub fn trained(&self) -> Vec<Named> {
        self.all().into_iter().filter(Named::is_trained).collect()
    }

    /// All tensors of a checkpoint, in order: what is trained, then the optimizer's state.
    pub fn saved(&self) -> Vec<Saved> {
        named::saved(&self.trained())
    }

    /// Number of the model's parameters, without adapters.
    pub fn parameters(&self) -> usize {
        self.tensors().iter().map(Named::len).sum()
    }

    /// Adapters as PEFT begins them: `A` uniform from -1/√d to 1/√d, `B` 0, so that the model is
    /// unchanged; optimizer state 0.
    ///
    /// # Errors
    /// Those of writing.
    pub fn initialize_adapters<B: Backend>(&self, be: &mut B, seed: u64) -> Result<()> {
        named::initialize(be, &self.trained(), seed, self.setup.threads)
    }

    /// The family's initial values; optimizer state 0.
    ///
    /// # Errors
    /// Those of writing.
    pub fn initialize<B: Backend>(&self, be: &mut B, seed: u64) -> Result<()> {
        self.fill_tables(be)?;
        named::initialize(be, &self.tensors(), seed, self.setup.threads)
    }

    /// One optimizer step. `fill` writes tokens and targets of micro-batch `i` (`[batch, context]`
    /// each) and may do so twice for one batch; of several ranks, this one's part of it. The
    /// outcome is that of all ranks.
    ///
    /// # Errors
    /// Those of [`network::step`]; what `fill` returns.
    pub fn train<B: Backend, E: From<Error>>(
        &mut self,
        be: &mut B,
        step: &Step,
        mut fill: impl FnMut(usize, &mut [i32], &mut [i32]) -> core::result::Result<(), E>,
    ) -> core::result::Result<Outcome, E> {
        self.train_packed(be, step, |i, [tokens, targets, starts]| {
            starts.fill(0);
            fill(i, tokens, targets)
        })
    }

    /// As [`train`](Self::train) with samples of several texts: `fill` also writes, as a third
    /// list, the place in the sample at which every token's text begins. Texts do not see each
    /// other, and positions begin anew with each. The places are empty where the setup packs
    /// nothing.
    ///
    /// # Errors
    /// As [`train`](Self::train).
    pub fn train_packed<B: Backend, E: From<Error>>(
        &mut self,
        be: &mut B,
        step: &Step,
        mut fill: impl FnMut(usize, [&mut [i32]; 3]) -> core::result::Result<(), E>,
    ) -> core::result::Result<Outcome, E> {
        self.prepare();
        let (rank, ranks) = (be.rank(), be.ranks());
        network::step(self, be, step, |net, be, i| {
            let [tokens, targets, positions, starts] = &mut net.staging;
            fill(i, [&mut tokens[..], &mut targets[..], &mut starts[..]])?;
            be.write_ints(net.input.tokens, tokens)?;
            be.write_ints(net.head.targets, targets)?;
            if net.setup.packed {
                let context = net.setup.context;
                for (t, (position, start)) in positions.iter_mut().zip(&*starts).enumerate() {
                    *position = (t % context) as i32 - start;
                }
                be.write_ints(net.places[0], positions)?;
                be.write_ints(net.places[1], starts)?;
            }
            Ok(Loaded {
                first: ((i * ranks + rank) * net.setup.batch) as u32,
                targets: targets.iter().filter(|&&t| t >= 0).count(),
                items: tokens.len(),
            })
        })
    }

    /// Makes the staging buffers, so that a step allocates nothing.
    pub fn prepare(&mut self) {
        let rows = self.setup.batch * self.setup.context;
        let buffers = if self.setup.packed { 4 } else { 2 };
        for buffer in &mut self.staging[..buffers] {
            buffer.resize(rows, 0);
            buffer.shrink_to_fit();
        }
    }

    /// Where the texts of some samples begin; without `starts`, with the samples.
    fn write_places<B: Backend>(&self, be: &mut B, samples: usize, starts: &[i32]) -> Result<()> {
        let (context, n) = (self.setup.context, samples * self.setup.context);
        if !self.setup.packed {
            let (what, found) = ("starts of texts in samples of one", starts.len());
            return if found == 0 {
                Ok(())
            } else {
                Err(Error::Shape { what, expected: 0, found })
            };
        }
        let none = vec![0; if starts.is_empty() { n } else { 0 }];
        let starts = if starts.is_empty() { &none } else { starts };
        let positions: Vec<_> =
            starts.iter().enumerate().map(|(t, start)| (t % context) as i32 - start).collect();
        be.write_ints(self.places[0].sub(0, n), &positions)?;
        be.write_ints(self.places[1].sub(0, n), starts)
    }

    /// Sum of losses and number of targets of some samples (at most a chunk, [`Stack::config`]) of
    /// `context` tokens.
    ///
    /// # Errors
    /// [`Error::Fault`] for values that are not finite or tokens outside the vocabulary.
    pub fn evaluate<B: Backend>(
        &mut self,
        be: &mut B,
        tokens: &[i32],
        targets: &[i32],
        inference: Inference,
    ) -> Result<(f64, usize)> {
        self.evaluate_packed(be, tokens, targets, &[], inference)
    }

    /// As [`evaluate`](Self::evaluate) with samples of several texts, whose tokens' texts begin at
    /// `starts` ([`train_packed`](Self::train_packed)); empty: every sample is one text.
    ///
    /// # Errors
    /// As [`evaluate`](Self::evaluate).
    pub fn evaluate_packed<B: Backend>(
        &mut self,
        be: &mut B,
        tokens: &[i32],
        targets: &[i32],
        starts: &[i32],
        inference: Inference,
    ) -> Result<(f64, usize)> {
        be.clear_fault()?;
        let samples = tokens.len() / self.setup.context;
        let n = samples * self.setup.context;
        be.write_ints(self.head.targets.sub(0, n), targets)?;
        self.write_places(be, samples, starts)?;
        let x = self.run(be, tokens, samples, inference)?;
        self.head.loss(be, &at_head(0, samples), x, self.stack.scratch())?;
        if let Some(fault) = be.take_fault()? {
            return Err(fault.into());
        }
        let loss = sum(be, self.head.losses.sub(0, n))?;
        Ok((loss, targets.iter().filter(|&&t| t >= 0).count()))
    }

    /// Largest magnitude among activations and residuals of the standard transformer on some
    /// samples (at most a chunk), with the `starts` of
    /// [`evaluate_packed`](Self::evaluate_packed): what the grid must hold.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn largest<B: Backend>(
        &mut self,
        be: &mut B,
        tokens: &[i32],
        starts: &[i32],
    ) -> Result<f64> {
        be.write_ints(self.input.tokens.sub(0, tokens.len()), tokens)?;
        let samples = tokens.len() / self.setup.context;
        self.write_places(be, samples, starts)?;
        let mut probe = Probe { blocks: &mut self.blocks, largest: 0.0 };
        self.stack.infer(be, &mut probe, &mut self.input, samples, FloatGamma::ZERO)?;
        Ok(probe.largest)
    }

    fn run<B: Backend>(
        &mut self,
        be: &mut B,
        tokens: &[i32],
        samples: usize,
        inference: Inference,
    ) -> Result<Reals> {
        be.write_ints(self.input.tokens.sub(0, tokens.len()), tokens)?;
        inference.run(be, &self.stack, &mut self.blocks, &mut self.input, samples)
    }

    /// Logits of the tokens at `positions` of one sample; `tokens` may be shorter than the context.
    ///
    /// # Errors
    /// [`Error::Fault`] for values that are not finite or tokens outside the vocabulary.
    pub fn logits<B: Backend>(
        &mut self,
        be: &mut B,
        tokens: &[i32],
        positions: core::ops::Range<usize>,
        inference: Inference,
    ) -> Result<Vec<B::Real>> {
        let expected = self.setup.context;
        if tokens.is_empty() || tokens.len() > expected || positions.end > tokens.len() {
            let (what, found) = ("tokens (at most)", tokens.len());
            return Err(Error::Shape { what, expected, found });
        }
        // Attention is causal: what follows the last token changes nothing before it.
        let mut padded = tokens.to_vec();
        padded.resize(self.setup.context, 0);
        let (d, vocab) = (self.setup.dims.width(), self.setup.dims.vocab());
        self.write_places(be, 1, &[])?;
        let x = self.run(be, &padded, 1, inference)?;
        let at_once = (self.head.logits.len() / vocab).max(1);
        let mut all = vec![B::Real::of(0.0); positions.len() * vocab];
        for (i, out) in all.chunks_mut(at_once * vocab).enumerate() {
            let (first, rows) = (positions.start + i * at_once, out.len() / vocab);
            let x = x.sub(first * d, rows * d);
            let logits = self.head.logits(be, x, self.stack.scratch())?;
            be.read_reals(logits, out)?;
        }
        if let Some(fault) = be.take_fault()? {
            return Err(fault.into());
        }
        Ok(all)
    }

    /// The places of a batch's tokens.
    pub const fn tokens(&self) -> Ints {
        self.input.tokens
    }
}

impl<B: Backend, F: Family> Network<B> for LanguageModel<F> {
    fn groups(&self, each: &mut dyn FnMut(&Group<'_>) -> Result<()>) -> Result<()> {
        self.groups(each)
    }

    fn trained(&self) -> usize {
        self.base.trained()
    }

    fn micro_batches(&self) -> usize {
        self.setup.accumulate
    }

    fn pass(&mut self, be: &mut B, pass: &Pass, micro: &Micro) -> Result<()> {
        Loss::<B>::begin(&mut self.head, micro);
        self.blocks.begin(micro.updater, micro.last);
        self.stack.train(be, &mut self.blocks, &mut self.input, &mut self.head, pass)
    }

    fn loss(&self, be: &B) -> Result<f64> {
        Loss::<B>::loss(&self.head, be, self.setup.accumulate)
    }

    fn rebuilt(&self, be: &B) -> Result<Rebuilt> {
        Rebuilt::of(be, &self.stack)
    }
}
