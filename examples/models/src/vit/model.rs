//! A vision transformer assembled from the layers and the stack of `bdia-core`: where every buffer
//! is, and one optimizer step.

use bdia_core::arena::{Category, Layout, Reals, product};
use bdia_core::backend::{Backend, Chunk, Gelu, Mask, Order, Product};
use bdia_core::error::{Error, Result, Site};
use bdia_core::layers::{
    BlockShape, ClassHead, Mixup, Params, PatchEmbedding, Patches, Tensor, TransformerBlocks,
    Updater, place,
};
use bdia_core::optim::{Rule, clip_scale};
use bdia_core::plan::Choice;
use bdia_core::rng::{Draw, Stream};
use bdia_core::stack::{Blocks, Call, Config as StackConfig, Mode, Pass, Stack, Tail};
use bdia_core::update::{Gamma, Grid};
use bdia_core::{Real, Sign};

use super::revvit::RevStack;
use crate::network::Network;

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
    /// Images of a step.
    pub batch: usize,
    /// Images processed together inside a block.
    pub chunk: usize,
    /// Mode of the stack.
    pub mode: Mode,
    /// The grid, if the mode has one.
    pub grid: Option<Grid>,
    /// γ.
    pub gamma: Gamma,
    /// The optimizer; `None` for inference.
    pub rule: Option<Rule>,
    /// Update blocks as they are finished. Without it the gradient can be clipped.
    pub fused: bool,
    /// Keep originals and count differences.
    pub verify: bool,
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

/// What an optimizer step needs to know.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Number of the step, from 0.
    pub step: u32,
    /// Seed of the run.
    pub seed: u64,
    /// Learning rate.
    pub lr: f64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Largest norm of the gradient; 0 for no clipping. Needs full gradients.
    pub clip: f64,
    /// Share of the first label (mixup); 1 where nothing is mixed.
    pub share: f64,
}

/// What an optimizer step gives.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// Mean loss.
    pub loss: f64,
    /// Norm of the whole gradient, before clipping.
    pub grad_norm: f64,
    /// Elements in which rebuilt activations differed (with `verify`).
    pub mismatches: u64,
    /// Largest error of rebuilding (with `verify`, without a grid).
    pub rebuild_error: f64,
}

/// Which network is run at inference.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Inference {
    /// In float, with a constant γ; 0 is the standard transformer.
    Float(Gamma),
    /// On the grid (mode `bdia`), with a constant γ.
    Quantized(Gamma),
}

impl Inference {
    /// The standard transformer.
    ///
    /// # Errors
    /// None in practice: 0 is a γ.
    pub fn standard() -> Result<Self> {
        Ok(Self::Float(Gamma::new(0.0, Sign::Plus)?))
    }
}

/// What carries activations from the embedding to the head.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Trunk {
    One(Stack),
    Two(RevStack),
}

/// Parameter tensors outside the blocks.
const ENDS: usize = 10;

/// A parameter tensor by its name in files (those of timm's vision transformers).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// The name.
    pub name: String,
    /// The shape in a file; linear layers are `[out, in]` there and `[in, out]` here.
    pub shape: Vec<usize>,
    /// Rows and columns here, where the file has the transpose.
    pub transposed: Option<[usize; 2]>,
    /// The values.
    pub values: Reals,
    /// Their gradient; with fused updates the buffer that all blocks use.
    pub gradient: Reals,
    /// The optimizer's state.
    pub state: [Reals; 2],
}

/// A vision transformer laid out in the arenas of a backend.
#[derive(Debug, Clone)]
pub struct Vit {
    setup: Setup,
    trunk: Trunk,
    /// The blocks.
    pub blocks: TransformerBlocks,
    /// Patches, class token, positions.
    pub input: PatchEmbedding,
    /// Final norm, classes, loss.
    pub head: ClassHead,
    ends: Params,
    end_tensors: [Tensor; ENDS],
    /// `1/(1-p)` of every block (stochastic depth).
    kept: Reals,
    mixup: Option<Mixup>,
    /// Host: one image and its patches; two labels of every sample.
    pixels: Vec<f64>,
    staging: Vec<f64>,
    labels: [Vec<i32>; 2],
}

impl Network for Vit {
    type Setup = Setup;

    fn lay_out<B: Backend>(setup: &Setup, choice: Choice) -> Result<(Self, Layout)> {
        Self::layout::<B>(&Setup { chunk: choice.chunk, ..*setup })
    }

    fn sizes(setup: &Setup) -> [usize; 2] {
        [setup.batch, setup.dims.patches.count() + 1]
    }

    fn exchanged(&self) -> Vec<usize> {
        self.exchanged().into()
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
            return Err(setting("classes", 0.0, "1 or more"));
        }
        for (what, p) in
            [("embedding dropout", d.dropout[0]), ("stochastic depth", setup.drop_path)]
        {
            if !(0.0..1.0).contains(&p) {
                return Err(setting(what, p, "0 up to, not including, 1"));
            }
        }
        if d.two_streams && setup.drop_path > 0.0 {
            return Err(setting("stochastic depth", setup.drop_path, "0 with two streams"));
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
        };
        shape.check()?;
        product("parameters", &[values.max(d.classes).max(tokens), d.width])?;

        let blocks = TransformerBlocks::layout(shape, d.layers, setup.rule, setup.fused, l)?;
        let (end_tensors, len) = end_tensors(d);
        let ends = Params::layout(l, 1, len, ENDS, setup.rule, true)?;
        let patches =
            l.reals(Category::Head, product("patches of a batch", &[setup.batch, count, values])?);
        let mut of_samples =
            || (l.ints(Category::Head, setup.batch), l.reals(Category::Head, setup.batch));
        let (labels, losses) = of_samples();
        let mixup = setup.mixup.then(|| {
            let (labels, losses) = of_samples();
            Mixup { share: 1.0, labels, losses }
        });
        let kept = l.reals(Category::Workspace, if setup.drop_path > 0.0 { d.layers } else { 0 });
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
            blocks: d.layers,
            chunk,
            mode: setup.mode,
            grid: setup.grid,
            gamma: setup.gamma,
            verify: setup.verify,
            tail: Tail::Head,
            needs: shape.needs::<B>(chunk, setup.threads),
            ends_scratch: PatchEmbedding::scratch(values, count, d.width, chunk)
                .max(ClassHead::scratch(d.width, d.classes, chunk)),
        };
        let trunk = if d.two_streams {
            Trunk::Two(RevStack::layout(config, l)?)
        } else {
            Trunk::One(Stack::layout(config, l)?)
        };

        let (params, grads) = (ends.group(0), ends.gradient(0));
        let [norm, norm_bias, weight, bias, class, positions, ln, ln_bias, head, head_bias] =
            end_tensors;
        let input = PatchEmbedding {
            width: d.width,
            count,
            patches,
            eps: d.eps,
            norm: [norm.of(params), norm_bias.of(params)],
            dnorm: [norm.of(grads), norm_bias.of(grads)],
            weight,
            bias,
            class,
            positions,
            params,
            grads,
            dropout: d.dropout[0],
        };
        let head = ClassHead {
            width: d.width,
            per_sample: tokens,
            eps: d.eps,
            norm: ln,
            norm_bias: ln_bias,
            weight: head,
            bias: head_bias,
            params,
            grads,
            labels,
            losses,
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
            end_tensors,
            kept,
            mixup,
            pixels,
            staging,
            labels,
        };
        Ok((model, layout))
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

    /// All parameter tensors, in the order of the file.
    pub fn tensors(&self) -> Vec<Named> {
        let mut list = Vec::new();
        let mut push = |prefix: &str, params: &Params, group: usize, tensors: &[Tensor]| {
            for t in tensors.iter().filter(|t| !t.is_empty()) {
                let (shape, transposed) = match t.name {
                    "cls_token" => (vec![1, 1, t.cols], None),
                    "pos_embed" => (vec![1, t.rows, t.cols], None),
                    _ if t.matrix => (vec![t.cols, t.rows], Some([t.rows, t.cols])),
                    _ => (vec![t.cols], None),
                };
                list.push(Named {
                    name: format!("{prefix}{}", file_name(t.name)),
                    shape,
                    transposed,
                    values: t.of(params.group(group)),
                    gradient: t.of(params.gradient(group)),
                    state: params.state(group, t),
                });
            }
        };
        push("", &self.ends, 0, &self.end_tensors[..6]);
        for k in 0..self.setup.dims.layers {
            push(&format!("blocks.{k}."), &self.blocks.params, k, self.blocks.tensors());
        }
        push("", &self.ends, 0, &self.end_tensors[6..]);
        list
    }

    /// All tensors of a checkpoint, in order: the parameters, then the optimizer's state.
    pub fn saved(&self) -> Vec<Reals> {
        let named = self.tensors();
        let states = named.iter().flat_map(|t| t.state).filter(|s| !s.is_empty());
        named.iter().map(|t| t.values).chain(states).collect()
    }

    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        self.tensors().iter().map(|t| t.values.len()).sum()
    }

    /// Lengths of the groups of gradients that are on their way between ranks at the same time: one
    /// block, or as much of the rest as is worth a message.
    pub fn exchanged(&self) -> [usize; 1] {
        [self.blocks.params.group_len().max(self.ends.group_len().min(1 << 18))]
    }

    /// Linear layers: uniform in ±1/√(inputs), as PyTorch does; class token and positions: normal,
    /// σ = 0.02; temperatures: `log(head_dim^-½)`; biases 0, norms 1; optimizer state 0.
    ///
    /// # Errors
    /// Those of writing.
    pub fn initialize<B: Backend>(&self, be: &mut B, seed: u64) -> Result<()> {
        let d = &self.setup.dims;
        let mut piece = Vec::new();
        for (i, t) in self.tensors().iter().enumerate() {
            for state in t.state {
                be.fill_reals(state, B::Real::of(0.0))?;
            }
            let stream = |row: usize| Stream::new(seed, i as u32, row as u32, 0, 0, Draw::Init);
            piece.clear();
            match (t.transposed, t.name.as_str()) {
                (Some([rows, cols]), _) => {
                    let bound = 1.0 / (rows as f64).sqrt();
                    for row in 0..rows {
                        let s = stream(row);
                        piece.extend(
                            (0..cols as u32)
                                .map(|e| B::Real::of(bound * (2.0 * s.uniform(e) - 1.0))),
                        );
                    }
                }
                (None, "cls_token" | "pos_embed") => {
                    for at in 0..t.values.len() {
                        piece.push(B::Real::of(
                            0.02 * stream(at / d.width).normal((at % d.width) as u32),
                        ));
                    }
                }
                (None, name) if name.ends_with("temperature") => {
                    piece.push(B::Real::of(-0.5 * ((d.width / d.heads) as f64).ln()));
                }
                (None, name) => {
                    let one = name.ends_with("weight");
                    piece.resize(t.values.len(), B::Real::of(f64::from(u8::from(one))));
                }
            }
            be.write_reals(t.values, &piece)?;
        }
        Ok(())
    }

    /// One optimizer step. `image` writes the pixels `[C, height, width]` of a sample and returns
    /// its label, and its second label where batches are mixed; of several ranks, the samples of
    /// this one. The outcome is that of all ranks.
    ///
    /// # Errors
    /// [`Error::Fault`] when the numbers went wrong; parameters are then as the fault says. What
    /// `image` returns.
    pub fn train<B: Backend, E: From<Error>>(
        &mut self,
        be: &mut B,
        step: &Step,
        image: impl FnMut(usize, &mut [f64]) -> core::result::Result<[i32; 2], E>,
    ) -> core::result::Result<Outcome, E> {
        let Some(rule) = self.setup.rule else {
            return Err(setting("optimizer", f64::NAN, "one, to train").into());
        };
        let fused = self.setup.fused;
        if fused && step.clip > 0.0 {
            return Err(
                setting("clip", step.clip, "0, or full gradient buffers (fused = false)").into()
            );
        }
        // A fault that an abandoned step left behind is not this one's.
        be.clear_fault()?;
        let updater = Updater {
            rule,
            weight_decay: step.weight_decay,
            lr: step.lr,
            t: step.step + 1,
            scale: 1.0,
            fused,
        };
        self.blocks.updater = updater;
        self.blocks.params.zero_gradients(be)?;
        self.ends.zero_gradients(be)?;
        let own = self.setup.batch;
        self.put(be, own, image)?;
        // All ranks have as many images.
        let batch = own * be.ranks();
        self.head.scale = 1.0 / batch as f64;
        self.head.mixup = self.mixup.map(|m| Mixup { share: step.share, ..m });

        let pass = Pass { seed: step.seed, step: step.step, global: (be.rank() * own) as u32 };
        let (mut mismatches, rebuild_error) = (
            0,
            match &mut self.trunk {
                Trunk::Two(stack) => {
                    stack.train(be, &mut self.blocks, &mut self.input, &mut self.head, &pass)?;
                    stack.rebuild_error()
                }
                Trunk::One(stack) if self.setup.drop_path > 0.0 => {
                    let mut blocks =
                        DropPath::new(be, &mut self.blocks, self.kept, self.setup.drop_path)?;
                    stack.train(be, &mut blocks, &mut self.input, &mut self.head, &pass)?;
                    stack.rebuild_error()
                }
                Trunk::One(stack) => {
                    stack.train(be, &mut self.blocks, &mut self.input, &mut self.head, &pass)?;
                    stack.rebuild_error()
                }
            },
        );
        if let Trunk::One(stack) = &self.trunk {
            mismatches = stack.mismatches(be)?;
        }

        let (layers, [piece]) = (self.setup.dims.layers, self.exchanged());
        self.blocks.params.settle(be, &updater, Site::Block(0), self.blocks.tensors())?;
        if !fused {
            for k in 0..layers {
                self.blocks.params.measure(be, Site::Block(k), k, self.blocks.tensors())?;
            }
        }
        self.ends.sum_over_ranks(be, piece)?;
        self.ends.measure(be, Site::Embedding, 0, &self.end_tensors)?;
        // What was measured cannot go wrong in the update, so the host waits once: for the norm
        // that clipping needs, or when the step is done.
        let early = if fused { None } else { Some(self.result(be)?) };
        let updater = Updater {
            scale: early.map_or(1.0, |(_, norm)| clip_scale(norm, step.clip)),
            ..updater
        };
        if !fused {
            for k in 0..layers {
                self.blocks.params.update(be, &updater, k, self.blocks.tensors())?;
            }
        }
        self.ends.update(be, &updater, 0, &self.end_tensors)?;
        let (loss, grad_norm) = early.map_or_else(|| self.result(be), Ok)?;
        let mut outcome = Outcome { loss: 0.0, grad_norm, mismatches: 0, rebuild_error: 0.0 };
        be.gather([loss, mismatches as f64, rebuild_error, 0.0], &mut |[
            loss,
            mismatches,
            error,
            _,
        ]| {
            outcome.loss += loss;
            outcome.mismatches += mismatches as u64;
            outcome.rebuild_error = outcome.rebuild_error.max(error);
        })?;
        outcome.loss /= batch as f64;
        Ok(outcome)
    }

    /// What a step reads: the sum of its losses and the norm of its gradients.
    fn result<B: Backend>(&self, be: &mut B) -> Result<(f64, f64)> {
        if let Some(fault) = be.take_fault()? {
            return Err(fault.into());
        }
        let mut loss = sum(be, self.head.losses)?;
        if let Some(m) = self.head.mixup {
            loss = m.share * loss + (1.0 - m.share) * sum(be, m.losses)?;
        }
        Ok((loss, (sum(be, self.blocks.params.norms)? + sum(be, self.ends.norms)?).sqrt()))
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
    /// Those of the backend; what `image` returns.
    pub fn largest<B: Backend, E: From<Error>>(
        &mut self,
        be: &mut B,
        samples: usize,
        image: impl FnMut(usize, &mut [f64]) -> core::result::Result<[i32; 2], E>,
    ) -> core::result::Result<f64, E> {
        self.put(be, samples, image)?;
        let Trunk::One(stack) = &self.trunk else {
            return Err(setting("network", f64::NAN, "vit").into());
        };
        let mut probe = Probe { blocks: &mut self.blocks, largest: 0.0 };
        for sign in [Sign::Plus, Sign::Minus] {
            stack.infer(be, &mut probe, &mut self.input, samples, Gamma::new(0.5, sign)?)?;
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
        let x = match (&self.trunk, inference) {
            (Trunk::Two(stack), _) => stack.infer(be, &self.blocks, &mut self.input, samples)?,
            (Trunk::One(stack), Inference::Float(gamma)) => {
                stack.infer(be, &mut self.blocks, &mut self.input, samples, gamma)?
            }
            (Trunk::One(stack), Inference::Quantized(gamma)) => {
                stack.infer_quantized(be, &mut self.blocks, &mut self.input, samples, gamma)?
            }
        };
        let chunk = Chunk {
            seed: 0,
            step: 0,
            stack: 0,
            site: Site::Head,
            first: 0,
            samples,
            global: 0,
            frame: 0,
        };
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

/// Blocks that tell how large activations get.
struct Probe<'a> {
    blocks: &'a mut TransformerBlocks,
    largest: f64,
}

impl<B: Backend> Blocks<B> for Probe<'_> {
    fn residual(&mut self, be: &mut B, call: &Call, h: Reals) -> Result<()> {
        self.blocks.residual(be, call, h)?;
        for values in [call.x, h] {
            let mut host = vec![B::Real::of(0.0); values.len()];
            be.read_reals(values, &mut host)?;
            self.largest = host.iter().fold(self.largest, |m, x| m.max(x.wide().abs()));
        }
        Ok(())
    }

    fn vjp(&mut self, be: &mut B, call: &Call, gh: Reals, gx: Reals) -> Result<()> {
        self.blocks.vjp(be, call, gh, gx)
    }
}

/// Residuals that are dropped for whole samples, with probability `rate·k/(K-1)`, and multiplied by
/// the inverse of the probability of being kept otherwise: stochastic depth.
struct DropPath<'a> {
    blocks: &'a mut TransformerBlocks,
    kept: Reals,
    rate: f64,
}

impl<'a> DropPath<'a> {
    fn new<B: Backend>(
        be: &mut B,
        blocks: &'a mut TransformerBlocks,
        kept: Reals,
        rate: f64,
    ) -> Result<Self> {
        let all = Self { blocks, kept, rate };
        for k in 0..kept.len() {
            be.write_reals(kept.sub(k, 1), &[B::Real::of(1.0 / (1.0 - all.rate(k)))])?;
        }
        Ok(all)
    }

    /// Probability of dropping block `k`.
    fn rate(&self, k: usize) -> f64 {
        self.rate * k as f64 / self.kept.len().saturating_sub(1).max(1) as f64
    }

    /// The same draws in every pass of a step.
    fn apply<B: Backend>(&self, be: &mut B, call: &Call, h: Reals) -> Result<()> {
        let (k, per) = (call.block, h.len() / call.chunk.samples.max(1));
        let rate = self.rate(k);
        if !call.train || rate == 0.0 {
            return Ok(());
        }
        for i in 0..call.chunk.samples {
            let (h, scaled) = (h.sub(i * per, per), call.scratch.sub(0, per));
            if call.chunk.stream(i, Draw::StochasticDepth).uniform(0) < rate {
                be.fill_reals(h, B::Real::of(0.0))?;
            } else {
                let (a, b) = (Order::Plain, Order::Plain);
                let p = Product { rows: 1, cols: per, inner: 1, a, b, accumulate: false };
                be.matmul(&p, self.kept.sub(k, 1), h, None, scaled)?;
                be.copy_reals(scaled, h)?;
            }
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

/// The sum of some values, from the first to the last in `f64`, piece by piece through the stack.
fn sum<B: Backend>(be: &B, values: Reals) -> Result<f64> {
    let (mut total, mut piece) = (0.0, [B::Real::of(0.0); 256]);
    for at in (0..values.len()).step_by(piece.len()) {
        let piece = &mut piece[..256.min(values.len() - at)];
        be.read_reals(values.sub(at, piece.len()), piece)?;
        total = piece.iter().fold(total, |t, x| t + x.wide());
    }
    Ok(total)
}

fn setting(what: &'static str, found: f64, possible: &'static str) -> Error {
    Error::Setting { what, found, possible }
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

/// The tensors outside the blocks, and the length of their group.
fn end_tensors(d: &Dims) -> ([Tensor; ENDS], usize) {
    let t = |name, rows, cols, matrix| Tensor { name, rows, cols, matrix, offset: 0 };
    let values = d.patches.values();
    let norm = usize::from(d.patches.shifted);
    let mut tensors = [
        t("patch_embed.norm.weight", norm, values, false),
        t("patch_embed.norm.bias", norm, values, false),
        t("patch_embed.proj.weight", values, d.width, true),
        t("patch_embed.proj.bias", 1, d.width, false),
        t("cls_token", 1, d.width, false),
        t("pos_embed", d.patches.count() + 1, d.width, true),
        t("norm.weight", 1, d.width, false),
        t("norm.bias", 1, d.width, false),
        t("head.weight", d.width, d.classes, true),
        t("head.bias", 1, d.classes, false),
    ];
    let len = place(&mut tensors);
    (tensors, len)
}
