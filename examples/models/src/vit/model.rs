//! A vision transformer assembled from the layers and the stack of `bdia-core`: where every buffer
//! is, and one optimizer step.

use bdia_core::Real;
use bdia_core::arena::{Category, Layout, Reals, product};
use bdia_core::backend::{Backend, Columns, Gelu, Mask};
use bdia_core::error::{Error, Result, Site};
use bdia_core::layers::{
    BlockShape, ClassHead, Freeze, Gradients, Mixup, Params, PatchEmbedding, Patches, PreNorm,
    Room, Scheme, Tensor,
};
use bdia_core::network::{
    self, Group, Loaded, Micro, Network, Outcome, Owner, Rebuilt, Step, exchanged, sum,
};
use bdia_core::plan::Choice;
use bdia_core::rng::Draw;
use bdia_core::stack::{Blocks, Call, Config as StackConfig, LastStep, Mode, Pass, Stack, Tail};
use bdia_core::update::{FloatGamma, Sign};

use super::revvit::RevStack;
use crate::inference::{Inference, Probe, at_head};
use crate::named::{self, Adapters, Named, Saved};
use crate::plan::Plan;

/// The architecture.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dims {
    /// Images and how they are cut.
    pub patches: Patches,
    /// Classes.
    pub classes: usize,
    /// Width `d`.
    pub width: usize,
    /// Blocks `K`.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Hidden width of the MLP.
    pub inner: usize,
    /// `ε` of the norms.
    pub eps: f64,
    /// Locality self-attention: the diagonal is masked, the temperature learned, q, k and v have no
    /// bias.
    pub locality: bool,
    /// Dropout: of the embedding, of attention probabilities, of the branches' outputs, inside the
    /// MLP.
    pub dropout: [f64; 4],
    /// The two-stream reversible network in place of the ordinary one.
    pub two_streams: bool,
}

/// How it is trained.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Setup {
    /// The architecture.
    pub dims: Dims,
    /// Images of a micro-batch.
    pub batch: usize,
    /// Micro-batches of a step.
    pub accumulate: usize,
    /// Images processed together inside a block.
    pub chunk: usize,
    /// How activations are kept. The network with two streams has a way of its own, and of this
    /// only whether it verifies.
    pub mode: Mode,
    /// How gradients are kept, and the optimizer.
    pub gradients: Gradients,
    /// Blocks that the stack steps over at once ([`Residual::step_over`]): 1 with two streams or
    /// stochastic depth.
    ///
    /// [`Residual::step_over`]: bdia_core::layers::Residual::step_over
    pub blocks_per_step: usize,
    /// Adapters, where they and the head are trained.
    pub adapters: Option<Adapters>,
    /// Stochastic depth (Huang et al., 2016): probability of dropping the last block's residual;
    /// those below it have less, in proportion.
    pub drop_path: f64,
    /// Label smoothing.
    pub smoothing: f64,
    /// Whether batches are mixed.
    pub mixup: bool,
    /// Threads of the backend.
    pub threads: usize,
    /// Bytes that the libraries below the backend allocate for themselves, at most.
    pub library: usize,
}

/// What carries activations from the embedding to the head.
#[derive(Debug, Clone, Copy, PartialEq)]
// Handles only, of which a network has one.
#[allow(clippy::large_enum_variant)]
enum Trunk {
    One(Stack),
    Two(RevStack),
}

/// Parameter tensors outside the blocks: embedding, then head (4).
const ENDS: usize = 10;
/// Those of the embedding.
const INPUT: usize = 6;

/// A vision transformer laid out in the arenas of a backend.
#[derive(Debug, Clone)]
pub struct Vit {
    setup: Setup,
    trunk: Trunk,
    /// The blocks.
    pub blocks: PreNorm,
    /// Patches, class token, positions.
    pub input: PatchEmbedding,
    /// Final norm, classes, loss.
    pub head: ClassHead,
    ends: Params,
    outside: [Tensor; ENDS],
    trained: usize,
    /// One for each image of each micro-batch, and for its second label.
    losses: [Reals; 2],
    mixup: Option<Mixup>,
    /// Host: one image and its patches; two labels of every sample.
    pixels: Vec<f64>,
    staging: Vec<f64>,
    labels: [Vec<i32>; 2],
}

impl Plan for Vit {
    type Setup = Setup;

    fn lay_out<B: Backend>(setup: &Setup, choice: Choice) -> Result<(Self, Layout)> {
        Self::layout::<B>(&Setup { chunk: choice.chunk, ..*setup })
    }

    fn sizes(setup: &Setup) -> [usize; 2] {
        [setup.batch, setup.dims.patches.count() + 1]
    }

    fn exchanged(&self) -> usize {
        exchanged(|each| self.groups(each))
    }
}

impl Vit {
    /// Lays a model out.
    ///
    /// # Errors
    /// A typed error for dimensions or settings that do not fit together.
    pub fn layout<B: Backend>(setup: &Setup) -> Result<(Self, Layout)> {
        let (d, mut layout) = (&setup.dims, Layout::new(B::Real::BYTES));
        let l = &mut layout;
        d.patches.check()?;
        if d.classes == 0 {
            return Err(Error::setting("classes", 0.0, "1 or more"));
        }
        for (what, p) in
            [("embedding dropout", d.dropout[0]), ("stochastic depth", setup.drop_path)]
        {
            if !(0.0..1.0).contains(&p) {
                return Err(Error::setting(what, p, "0 up to, not including, 1"));
            }
        }
        let together = setup.blocks_per_step;
        if together > 1 && (d.two_streams || setup.drop_path > 0.0) {
            let possible = "1 with two streams or stochastic depth";
            return Err(Error::setting("blocks of a step", together as f64, possible));
        }
        if d.two_streams && setup.drop_path > 0.0 {
            return Err(Error::setting("stochastic depth", setup.drop_path, "0 with two streams"));
        }
        let (count, values) = (d.patches.count(), d.patches.values());
        let tokens = count + 1;
        let shape = BlockShape {
            tokens,
            width: d.width,
            heads: d.heads,
            inner: d.inner,
            eps: d.eps,
            gelu: Gelu::Exact,
            mask: if d.locality { Mask::Others } else { Mask::Full },
            attention_dropout: d.dropout[1],
            residual_dropout: d.dropout[2],
            hidden_dropout: d.dropout[3],
            qkv_bias: !d.locality,
            temperature: d.locality,
            init: Scheme::InverseRoot,
        };
        product("parameters", &[values.max(d.classes).max(tokens), d.width])?;

        let (lora, freeze) = Adapters::of_blocks(setup.adapters);
        let kept = setup.gradients.of_steps(together);
        let blocks = PreNorm::layout(&shape, d.layers, lora, freeze, kept, l)?;
        let blocks = blocks.step_over(together)?;
        let mut tensors = Self::outside(d);
        // The head is trained in any case.
        let (input, head) = tensors.split_at_mut(INPUT);
        let freeze = Adapters::of_ends(setup.adapters);
        let room = Room::NONE.place(input, freeze).place(head, Freeze::Nothing);
        let ends = Params::layout(1, room, freeze, setup.gradients.full(), l)?;
        let trained = l.trained();
        let patches =
            l.reals(Category::Head, product("patches of a batch", &[setup.batch, count, values])?);
        let all = product("losses", &[setup.batch, setup.accumulate])?;
        let mut of_samples = || (l.ints(Category::Head, setup.batch), l.reals(Category::Head, all));
        let (labels, losses) = of_samples();
        let mixup = setup.mixup.then(|| {
            let (labels, losses) = of_samples();
            Mixup { share: 1.0, labels, losses }
        });
        // The staging buffers on the host: one image and its patches, two labels a sample.
        let pixels = product("pixels", &[d.patches.channels, d.patches.height, d.patches.width])?;
        l.outside(Category::Head, product("patches", &[count, values, size_of::<f64>()])?);
        l.outside(Category::Head, product("pixels", &[pixels, size_of::<f64>()])?);
        l.outside(Category::Head, product("labels", &[setup.batch, 2, size_of::<i32>()])?);
        l.outside(Category::Library, setup.library);

        let chunk = setup.chunk.clamp(1, setup.batch.max(1));
        let config = StackConfig {
            id: 0,
            batch: setup.batch,
            per_sample: product("activations", &[tokens, d.width])?,
            blocks: blocks.steps(),
            chunk,
            tail: Tail::Head,
            needs: blocks.needs::<B>(chunk, setup.threads),
            ends_scratch: PatchEmbedding::scratch(values, count, d.width, chunk)
                .max(ClassHead::scratch(d.width, d.classes, chunk)),
        };
        let trunk = if d.two_streams {
            let verify = matches!(
                setup.mode,
                Mode::Bdia { verify: true, .. } | Mode::BdiaFloat { verify: true, .. }
            );
            Trunk::Two(RevStack::layout(config, verify, l)?)
        } else {
            Trunk::One(Stack::layout(&config, &setup.mode, l)?)
        };

        let [norm, norm_bias, weight, bias, class, positions, ln, ln_bias, head, head_bias] =
            tensors.map(|t| ends.parameter(0, &t));
        let input = PatchEmbedding {
            width: d.width,
            count,
            patches,
            eps: d.eps,
            norm: [norm, norm_bias],
            weight,
            bias,
            class,
            positions,
            dropout: d.dropout[0],
        };
        let head = ClassHead {
            width: d.width,
            per_sample: tokens,
            eps: d.eps,
            norm: [ln, ln_bias],
            weight: head,
            bias: head_bias,
            labels,
            losses: losses.sub(0, setup.batch),
            scale: 1.0,
            smoothing: setup.smoothing,
            mixup: None,
        };
        let (pixels, staging, labels) = (Vec::new(), Vec::new(), [Vec::new(), Vec::new()]);
        let model = Self {
            setup: *setup,
            trunk,
            blocks,
            input,
            head,
            ends,
            outside: tensors,
            trained,
            losses: [losses, mixup.map_or(Reals::EMPTY, |m| m.losses)],
            mixup,
            pixels,
            staging,
            labels,
        };
        Ok((model, layout))
    }

    fn outside(d: &Dims) -> [Tensor; ENDS] {
        let [norm, norm_bias, weight, bias, class, positions] =
            PatchEmbedding::tensors(&d.patches, d.width);
        let [ln, ln_bias, head, head_bias] = ClassHead::tensors(d.width, d.classes);
        [norm, norm_bias, weight, bias, class, positions, ln, ln_bias, head, head_bias]
    }

    fn groups(&self, each: &mut dyn FnMut(&Group<'_>) -> Result<()>) -> Result<()> {
        let (params, tensors) = (&self.blocks.params, &self.blocks);
        each(&Group { params, tensors, of: Owner::Blocks })?;
        let of = Owner::Ends(Site::Embedding);
        each(&Group { params: &self.ends, tensors: &self.outside, of })
    }

    /// The setup.
    pub const fn setup(&self) -> &Setup {
        &self.setup
    }

    /// Images processed together inside a block, and at most so many at inference.
    pub const fn chunk(&self) -> usize {
        match &self.trunk {
            Trunk::One(s) => s.config().chunk,
            Trunk::Two(s) => s.config().chunk,
        }
    }

    const fn scratch(&self) -> Reals {
        match &self.trunk {
            Trunk::One(s) => s.scratch(),
            Trunk::Two(s) => s.scratch(),
        }
    }

    /// All parameter tensors, in the order of the file: embedding, blocks, head; adapters after
    /// the matrix that they belong to.
    pub(super) fn all(&self) -> Vec<Named> {
        let (first, last) = self.outside.split_at(INPUT);
        let end = |t: &&Tensor| {
            let named = Named::new(t.name.into(), &self.ends, 0, t, &self.outside);
            match t.name {
                "cls_token" => Named { shape: vec![1, 1, t.cols], ..named },
                "pos_embed" => Named { shape: vec![1, t.rows, t.cols], ..named },
                _ => named.transposed(),
            }
        };
        let blocks = (0..self.setup.dims.layers).flat_map(|k| {
            named::of_block(&self.blocks, k).into_iter().map(move |(params, k, t)| {
                let name = format!("blocks.{k}.{}", file_name(t.name));
                Named::new(name, params, k, &t, &self.blocks).transposed()
            })
        });
        let there = |t: &&Tensor| !t.is_empty();
        let (first, last) = (first.iter().filter(there), last.iter().filter(there));
        first.map(|t| end(&t)).chain(blocks).chain(last.map(|t| end(&t))).collect()
    }

    /// All tensors of the model, in the order of the file; adapters are not among them. Names are
    /// those of timm's vision transformers.
    pub fn tensors(&self) -> Vec<Named> {
        self.all().into_iter().filter(|t| !t.is_adapter()).collect()
    }

    /// The tensors that are trained: all, or adapters and head.
    pub fn trained(&self) -> Vec<Named> {
        self.all().into_iter().filter(Named::is_trained).collect()
    }

    /// All tensors of a checkpoint, in order: the parameters, then the optimizer's state.
    pub fn saved(&self) -> Vec<Saved> {
        named::saved(&self.trained())
    }

    /// What becomes of the last step, in mode `bdia`.
    pub const fn last_step(&self) -> Option<LastStep> {
        match &self.trunk {
            Trunk::One(stack) => stack.last_step(),
            Trunk::Two(_) => None,
        }
    }

    /// Number of the model's parameters, without adapters.
    pub fn parameters(&self) -> usize {
        self.tensors().iter().map(Named::len).sum()
    }

    /// Initial values: linear layers as PyTorch begins them; class token and positions: normal,
    /// σ = 0.02; temperatures: `log(head_dim^-½)`; biases 0, norms 1; optimizer state 0.
    ///
    /// # Errors
    /// Those of writing.
    pub fn initialize<B: Backend>(&self, be: &mut B, seed: u64) -> Result<()> {
        named::initialize(be, &self.all(), seed, self.setup.threads)
    }

    /// One optimizer step. `image` writes the pixels `[C, height, width]` of a sample of a
    /// micro-batch and returns its label, and its second label where batches are mixed, of which
    /// `share` is the first one's; of several ranks, the samples of this one. The outcome is that
    /// of all ranks.
    ///
    /// # Errors
    /// Those of [`network::step`]; what `image` returns.
    pub fn train<B: Backend, E: From<Error>>(
        &mut self,
        be: &mut B,
        step: &Step,
        share: f64,
        mut image: impl FnMut(usize, usize, &mut [f64]) -> core::result::Result<[i32; 2], E>,
    ) -> core::result::Result<Outcome, E> {
        let (rank, ranks, own) = (be.rank(), be.ranks(), self.setup.batch);
        self.mixup = self.mixup.map(|m| Mixup { share, ..m });
        network::step(self, be, step, |net, be, micro| {
            net.put(be, own, |i, pixels| image(micro, i, pixels))?;
            let first = ((micro * ranks + rank) * own) as u32;
            Ok(Loaded { first, targets: own, items: own })
        })
    }

    /// Makes the staging buffers, so that a step allocates nothing that grows.
    pub fn prepare(&mut self) {
        let d = &self.setup.dims.patches;
        self.pixels.resize(d.channels * d.height * d.width, 0.0);
        self.staging.resize(d.count() * d.values(), 0.0);
        for labels in &mut self.labels {
            labels.resize(self.setup.batch, 0);
        }
    }

    /// Cuts and writes `samples` images and their labels.
    fn put<B: Backend, E: From<Error>>(
        &mut self,
        be: &mut B,
        samples: usize,
        mut image: impl FnMut(usize, &mut [f64]) -> core::result::Result<[i32; 2], E>,
    ) -> core::result::Result<(), E> {
        self.prepare();
        let p = self.setup.dims.patches;
        let (len, mut piece) = (self.staging.len(), [B::Real::of(0.0); 256]);
        for i in 0..samples {
            let labels = image(i, &mut self.pixels)?;
            p.cut(&self.pixels, &mut self.staging)?;
            let patches = self.input.patches.sub(i * len, len);
            for (at, values) in self.staging.chunks(piece.len()).enumerate() {
                let piece = &mut piece[..values.len()];
                piece.iter_mut().zip(values).for_each(|(r, &x)| *r = B::Real::of(x));
                be.write_reals(patches.sub(at * 256, values.len()), piece)?;
            }
            for (all, label) in self.labels.iter_mut().zip(labels) {
                all[i] = label;
            }
        }
        be.write_ints(self.head.labels.sub(0, samples), &self.labels[0][..samples])?;
        if let Some(m) = self.mixup {
            be.write_ints(m.labels.sub(0, samples), &self.labels[1][..samples])?;
        }
        Ok(())
    }

    /// Largest magnitude among activations and residuals of some images, with γ = ±0.5 in turn:
    /// what the grid must hold.
    ///
    /// # Errors
    /// What the backend reports; what `image` returns.
    pub fn largest<B: Backend, E: From<Error>>(
        &mut self,
        be: &mut B,
        samples: usize,
        image: impl FnMut(usize, &mut [f64]) -> core::result::Result<[i32; 2], E>,
    ) -> core::result::Result<f64, E> {
        self.put(be, samples, image)?;
        let Trunk::One(stack) = &self.trunk else {
            return Err(Error::unfit("network", "one of two streams", "vit").into());
        };
        let mut probe = Probe { blocks: &mut self.blocks, largest: 0.0 };
        for sign in [Sign::Plus, Sign::Minus] {
            let gamma = FloatGamma::new(0.5, sign)?;
            stack.infer(be, &mut probe, &mut self.input, samples, gamma)?;
        }
        Ok(probe.largest)
    }

    /// Logits of some images (at most a [chunk](Self::chunk)), `[samples, classes]`, and the sum of
    /// their losses.
    ///
    /// # Errors
    /// [`Error::Fault`] for values that are not finite or labels that do not exist; what `image`
    /// returns.
    pub fn evaluate<B: Backend, E: From<Error>>(
        &mut self,
        be: &mut B,
        samples: usize,
        inference: Inference,
        image: impl FnMut(usize, &mut [f64]) -> core::result::Result<[i32; 2], E>,
    ) -> core::result::Result<(Vec<f64>, f64), E> {
        be.clear_fault()?;
        self.put(be, samples, image)?;
        let (blocks, input) = (&mut self.blocks, &mut self.input);
        let x = match &self.trunk {
            Trunk::Two(stack) => stack.infer(be, blocks, input, samples)?,
            Trunk::One(stack) => inference.run(be, stack, blocks, input, samples)?,
        };
        let chunk = at_head(0, samples);
        let logits = self.head.logits(be, &chunk, x, self.scratch())?;
        let mut out = vec![B::Real::of(0.0); logits.len()];
        be.read_reals(logits, &mut out)?;
        self.head.loss(be, &chunk, logits)?;
        if let Some(fault) = be.take_fault()? {
            return Err(Error::from(fault).into());
        }
        Ok((out.iter().map(|x| x.wide()).collect(), sum(be, self.head.losses.sub(0, samples))?))
    }
}

impl<B: Backend> Network<B> for Vit {
    fn groups(&self, each: &mut dyn FnMut(&Group<'_>) -> Result<()>) -> Result<()> {
        self.groups(each)
    }

    fn trained(&self) -> usize {
        self.trained
    }

    fn micro_batches(&self) -> usize {
        self.setup.accumulate
    }

    fn pass(&mut self, be: &mut B, pass: &Pass, micro: &Micro) -> Result<()> {
        let n = self.setup.batch;
        let [losses, others] = self.losses.map(|all| all.sub(micro.index * n, n));
        (self.head.losses, self.head.scale) = (losses, micro.scale);
        self.head.mixup = self.mixup.map(|m| Mixup { losses: others, ..m });
        self.blocks.begin(micro.updater, micro.last);
        let (blocks, input, head) = (&mut self.blocks, &mut self.input, &mut self.head);
        match &mut self.trunk {
            Trunk::Two(stack) => stack.train(be, blocks, input, head, pass),
            Trunk::One(stack) if self.setup.drop_path > 0.0 => {
                let (rate, layers) = (self.setup.drop_path, self.setup.dims.layers);
                stack.train(be, &mut DropPath { blocks, rate, layers }, input, head, pass)
            }
            Trunk::One(stack) => stack.train(be, blocks, input, head, pass),
        }
    }

    fn loss(&self, be: &B) -> Result<f64> {
        let [losses, others] =
            self.losses.map(|all| all.sub(0, self.setup.accumulate * self.setup.batch));
        let loss = sum(be, losses)?;
        Ok(match self.mixup {
            Some(m) => m.share * loss + (1.0 - m.share) * sum(be, others)?,
            None => loss,
        })
    }

    fn rebuilt(&self, be: &B) -> Result<Rebuilt> {
        match &self.trunk {
            Trunk::One(stack) => Rebuilt::of(be, stack),
            Trunk::Two(stack) => Ok(Rebuilt { mismatches: 0, error: stack.rebuild_error() }),
        }
    }
}

/// Residuals that are dropped for whole samples, with probability `rate·k/(K-1)`, and multiplied by
/// the inverse of the probability of being kept otherwise: stochastic depth.
struct DropPath<'a> {
    blocks: &'a mut PreNorm,
    rate: f64,
    layers: usize,
}

impl DropPath<'_> {
    /// The same draws in every pass of a step.
    fn apply<B: Backend>(&self, be: &mut B, call: &Call, h: Reals) -> Result<()> {
        let (k, per) = (call.block, h.len() / call.chunk.samples.max(1));
        let rate = self.rate * k as f64 / self.layers.saturating_sub(1).max(1) as f64;
        if !call.train || rate == 0.0 {
            return Ok(());
        }
        for i in 0..call.chunk.samples {
            let (h, scaled) = (h.sub(i * per, per), call.scratch.sub(0, per));
            be.fill_reals(scaled, B::Real::of(0.0))?;
            if call.chunk.stream(i, Draw::StochasticDepth).uniform(0) >= rate {
                let row = |of| Columns { of, stride: per, at: 0 };
                be.add_columns(per, 1.0 / (1.0 - rate), row(h), row(scaled))?;
            }
            be.copy_reals(scaled, h)?;
        }
        Ok(())
    }
}

impl<B: Backend> Blocks<B> for DropPath<'_> {
    fn residual(&mut self, be: &mut B, call: &Call, h: Reals) -> Result<()> {
        self.blocks.residual(be, call, h)?;
        self.apply(be, call, h)
    }

    fn vjp(&mut self, be: &mut B, call: &Call, gh: Reals, gx: Reals) -> Result<()> {
        self.apply(be, call, gh)?;
        self.blocks.vjp(be, call, gh, gx)
    }

    fn done(&mut self, be: &mut B, block: usize) -> Result<()> {
        Blocks::<B>::done(self.blocks, be, block)
    }
}

/// The names that files have for the block's tensors.
fn file_name(name: &str) -> &str {
    match name {
        "ln_1.weight" => "norm1.weight",
        "ln_1.bias" => "norm1.bias",
        "attn.c_attn.weight" => "attn.qkv.weight",
        "attn.c_attn.bias" => "attn.qkv.bias",
        "attn.c_proj.weight" => "attn.proj.weight",
        "attn.c_proj.bias" => "attn.proj.bias",
        "ln_2.weight" => "norm2.weight",
        "ln_2.bias" => "norm2.bias",
        "mlp.c_fc.weight" => "mlp.fc1.weight",
        "mlp.c_fc.bias" => "mlp.fc1.bias",
        "mlp.c_proj.weight" => "mlp.fc2.weight",
        "mlp.c_proj.bias" => "mlp.fc2.bias",
        other => other,
    }
}
